"""`target_cuda`: its replacements, that it undoes all of them, and what it refuses."""

from __future__ import annotations

import ast
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from requirements import needs_cross_export
from triton.compiler.compiler import max_shared_mem

from executorch_moe.backends.cuda import patches
from executorch_moe.backends.cuda.cross import replacements
from executorch_moe.backends.cuda.cross.placeholder_weights import own_storage
from executorch_moe.backends.cuda.cross.replacements import check_versions
from executorch_moe.backends.cuda.cross.report import CrossCompileReport, KernelChoice
from executorch_moe.backends.cuda.cross.static_choices import one_parse_at_a_time
from executorch_moe.backends.cuda.cross.target import check_target, target_cuda
from executorch_moe.kernels.gpus import find_model, gpu_of


def replaced() -> list[object]:
    """Everything that `target_cuda` can replace."""
    import triton
    from torch._dynamo.device_interface import device_interfaces, init_device_reg
    from torch._inductor import config, select_algorithm

    init_device_reg()
    found: list[object] = []
    for name, patch in patches.PATCHES.items():
        value = getattr(*patches.holder_of(name), None)
        if not patch.replaced:
            continue
        found.append(dict(value) if isinstance(value, dict) else getattr(value, "__func__", value))
    found += [dict(device_interfaces), dict(triton.backends.backends), triton.runtime.driver._active]
    found += [dict(os.environ), config.get_config_copy(), gpu_of, torch.version.cuda]
    found.append(list(select_algorithm.get_algorithm_selector_cache().preprocessing_fns))
    found.append(hasattr(torch._C, "_cuda_getCurrentRawStream"))
    return found


@needs_cross_export
def test_everything_is_put_back() -> None:
    before = replaced()
    for target, capability, shared, broken in (("sm_90", 90, 232448, False), ("sm_89", 89, 101376, True)):
        with contextlib.suppress(KeyError), target_cuda(target):
            assert torch.cuda.get_device_capability() == divmod(capability, 10) and gpu_of(0).capability == capability
            assert not torch.cuda.is_available() and torch.version.cuda is None
            # Triton caches it for the process: the limit of an earlier target would accept kernels that do not fit.
            assert max_shared_mem(0) == shared
            if broken:
                raise KeyError
        assert replaced() == before


@needs_cross_export
def test_it_is_active_once_at_a_time() -> None:
    before = replaced()
    with pytest.raises(RuntimeError, match="is active already: leave it first"), target_cuda("h200"), target_cuda("l4"):
        pass
    assert replaced() == before

    def enter(target: str) -> None:
        with target_cuda(target):
            entered.set()
            left.wait(60)

    entered, left = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(enter, "h200")
        entered.wait(60)
        for use in (lambda: enter("a100"), check_versions, lambda: check_target("sm_90")):
            with pytest.raises(RuntimeError, match=r"active in another thread, .*: wait until that one is done"):
                use()
        left.set()
        other.result(60)
    assert replaced() == before
    # At the same time: only one of them, or one after the other.
    with ThreadPoolExecutor(4) as pool:
        errors = [future.exception(60) for future in [pool.submit(enter, "h200") for _ in range(8)]]
    assert None in errors
    assert all(error is None or "in another thread" in str(error) for error in errors)
    assert replaced() == before
    enter("l4")


def test_what_a_kernel_writes_to_is_asked_once_for_each_kind_of_arguments() -> None:
    from torch._higher_order_ops import triton_kernel_wrap

    from executorch_moe.kernels.experts.elementwise import moe_sum_pairs

    if not hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        pytest.skip("this torch has another function for it")
    stock = triton_kernel_wrap.identify_accessed_tensors

    def ask(dtype: torch.dtype, block: int, kernel: Any = moe_sum_pairs) -> object:
        tensors = {
            "y_ptr": torch.empty(4, dtype=dtype),
            "topk_ids_ptr": torch.empty(4, dtype=torch.int64),
            "out_ptr": torch.empty(4, dtype=torch.bfloat16),
        }
        numbers = {"H": 128, "TOP_K": 2, "NUM_EXPERTS": 4, "BLOCK_H": block, "PTX": 90}
        return triton_kernel_wrap.identify_accessed_tensors(kernel, {**tensors, **numbers}, {})

    with target_cuda("h200"):
        first = ask(torch.bfloat16, 128)
        assert [write.name for write in first.read_writes.writes] == ["out_ptr"]
        assert ask(torch.bfloat16, 128) is first
        for warps in (2, 4):  # torch wraps the kernel of each launch like this
            assert (
                ask(torch.bfloat16, 128, triton.autotune([triton.Config({}, num_warps=warps)], [])(moe_sum_pairs))
                is first
            )
        assert ask(torch.float32, 128) is not first and ask(torch.bfloat16, 64) is not first
    assert triton_kernel_wrap.identify_accessed_tensors is stock


@needs_cross_export
def test_no_test_program_is_compiled_to_find_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    def compiled(*_: object) -> bool:
        raise AssertionError("a test program is compiled")

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", compiled)
    with target_cuda("h200"):
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa


def test_unknown_versions_and_signatures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "triton" else real(name))
    with pytest.raises(RuntimeError, match=r"with .*triton 9\.9 \(works with .*3\.7.*\): install a version that works"):
        check_versions()
    monkeypatch.setattr(metadata, "version", lambda name: patches.VERSIONS[name][0])
    monkeypatch.setattr("torch._inductor.graph.is_same_tensor", lambda left, right: True)
    with pytest.raises(RuntimeError, match=r"is_same_tensor\(left, right\), not \(data, value\)"), target_cuda("sm_90"):
        pass


def test_unknown_settings_of_inductor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replacements.INDUCTOR_CONFIG, "cpp.no_such_setting", 1)
    with pytest.raises(RuntimeError, match=r"torch\._inductor\.config\.cpp\.no_such_setting: does not exist: install"):
        check_versions()


def test_nothing_is_replaced_that_is_not_checked() -> None:
    # The second is in the registry, but for another use.
    for name in ("torch:compile", "executorch.exir.emit._emitter:_Emitter._tensor_spec_to_evalue"):
        with patches.replacing("cross") as replace, pytest.raises(AssertionError, match=f"{name} is not checked"):
            replace(name, None)


def test_unknown_target_lists_the_known_ones() -> None:
    unknown = r"target 'sm_75' is not a known GPU: use one of sm_80, .*rtx5090"
    with pytest.raises(ValueError, match=unknown), target_cuda("sm_75"):
        pass


def test_shared_memory_budget_names_what_is_over() -> None:
    report = CrossCompileReport(find_model("l4"))
    report.kernels += [KernelChoice("decode", "moe_a", 1, {}, 101376), KernelChoice("prefill", "b", 1, {}, 64)]
    report.check_shared()
    with pytest.raises(ValueError, match=r"sm_89: kernels need more than 65536 bytes .*: moe_a of decode \(101376\): "):
        report.check_shared(65536)


def test_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="'no-such-compiler' is not found: install g"), target_cuda("h200"):
        pass


def test_own_storage_keeps_values_and_strides() -> None:
    whole = torch.arange(60.0).reshape(6, 10)
    for tensor in (whole, whole[2:4], whole.t(), whole[:, 3:5], whole[:1].expand(4, 10), whole[:0], whole[3, 4]):
        own = own_storage(tensor)
        assert torch.equal(own, tensor) and own.stride() == tensor.stride() and own.storage_offset() == 0
    assert own_storage(whole) is whole


def test_threads_parse_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []

    def parse(source: str) -> str:
        inside.append(source)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return source

    monkeypatch.setattr(ast, "parse", parse)
    with one_parse_at_a_time(), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ast.parse, map(str, range(8)))) == list(map(str, range(8)))
    assert most == [1] * 8 and ast.parse is parse


@needs_cross_export
def test_small_computations_are_joined_however_far_apart_they_are() -> None:
    """Cosine and sine of a decode step, and the kernels that write keys and values: one launch for all layers."""
    from torch._inductor.scheduler import Scheduler

    def node(order: int, *sizes: Any) -> Any:
        return SimpleNamespace(min_order=order, max_order=order, group=("cuda", sizes))

    def far(*nodes: Any) -> bool:
        return Scheduler.are_long_distant_nodes(SimpleNamespace(), *nodes)  # type: ignore[arg-type]

    symbol = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint().node.expr
    with target_cuda("h200"):
        assert not far(node(0, 128, 1), node(900, 128, 1)) and not far(node(0, 512), node(900, replacements.SMALL))
        assert far(node(0, 512), node(900, replacements.SMALL + 1)) and far(node(0, symbol, 1), node(900, 128, 1))
        assert far(node(0, 512), SimpleNamespace(min_order=900, max_order=900))
        assert not far(node(0, 9999), node(9, 9999))
    assert far(node(0, 128, 1), node(900, 128, 1))
