"""Patches of other packages: all in one registry, checked first, active in one thread at a time, and undone."""

from __future__ import annotations

import ast
import copy
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import traceback

import executorch_moe.backends
import executorch_moe.export
import executorch_moe.kernels
from executorch_moe.backends.cpu.uncopied_weights import uncopied_weights
from executorch_moe.backends.cuda.cross.static_choices import one_parse_at_a_time
from executorch_moe.backends.cuda.output_folders import own_outputs
from executorch_moe.backends.cuda.overlapped_launches import LaunchesDoNotOverlap, overlapped_launches
from executorch_moe.backends.cuda.patches import PATCHES, VERSIONS, holder_of, replacing
from executorch_moe.backends.cuda.patches.registry import GO_WITHOUT, USES, problem
from executorch_moe.backends.cuda.placeholders import without_weights
from executorch_moe.backends.cuda.shared_weights import shared_weights
from executorch_moe.backends.lower import shared_history
from executorch_moe.export.checkpoint.plan import _parameters_on_meta

CONTEXTS: list[Callable[[], AbstractContextManager[Any]]] = [
    own_outputs,
    shared_weights,
    without_weights,
    uncopied_weights,
    one_parse_at_a_time,
    lambda: overlapped_launches(90),
    shared_history,
]
IDS = [
    "own_outputs", "shared_weights", "without_weights", "uncopied_weights", "one_parse", "overlapped_launches",
    "shared_history",
]  # fmt: skip


def originals() -> dict[str, Any]:
    found = {name: getattr(*holder_of(name), None) for name in PATCHES}
    return {name: getattr(value, "__func__", value) for name, value in found.items()}


@pytest.mark.parametrize("enter", CONTEXTS, ids=IDS)
def test_two_threads_leave_nothing_behind(enter: Callable[[], AbstractContextManager[Any]]) -> None:
    """The first thread leaves while the second is inside or waits to enter: it must not undo patches of the second."""
    before = originals()
    inside, left, failed = threading.Event(), threading.Event(), []

    def second() -> None:
        try:
            with enter():
                inside.set()
                assert left.wait(20)
        except BaseException as error:  # errors in threads are lost otherwise
            failed.append(error)

    with enter():
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(0.5)
    left.set()
    thread.join(20)
    assert not thread.is_alive() and not failed
    assert originals() == before


def test_concurrent_lowering_leaves_nothing_behind() -> None:
    """All patches of `lower` for target "cuda", many times in several threads: each thread sees only its own."""
    before, failed = originals(), []
    backend, attribute = holder_of("executorch.backends.cuda.cuda_backend:CudaBackend.get_aoti_compile_options")

    def work() -> None:
        try:
            for _ in range(20):
                with overlapped_launches(90), shared_weights(), own_outputs():
                    mine = getattr(backend, attribute).__func__
                    threading.Event().wait(0.001)
                    assert getattr(backend, attribute).__func__ is mine
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and originals() == before


def test_modules_of_other_threads_keep_their_parameters() -> None:
    made: list[nn.Module] = []
    with _parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
        # Code that reads the class gets torch's own function.
        assert nn.Module.register_parameter.__module__ == "torch.nn.modules.module"
    assert not made[0].weight.is_meta and not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    ("enter", "name", "message"),
    [
        (
            own_outputs,
            "get_aoti_compile_options",
            "cannot give each CUDA method files of its own with .*: install exec",
        ),
        (
            shared_weights,
            "_is_aoti_library_local_fqn",
            "cannot share weights between CUDA methods with .*: install exec",
        ),
        (shared_weights, "copy_exported_program_for_preprocess", "cannot share weights between CUDA methods with"),
        (without_weights, "_write_tensor_storage", "cannot write the weights of CUDA methods with .*: install exec"),
        (
            uncopied_weights,
            "_save_new_const_tensor",
            "cannot export for target 'cpu' with .*: install executorch 1.5.1",
        ),
    ],
)
def test_unknown_functions_are_refused(
    enter: Callable[[], AbstractContextManager[None]], name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = (known for known in PATCHES if re.split(r"[:.]", known)[-1] == name)
    holder, attribute = holder_of(entry)
    monkeypatch.setattr(holder, attribute, lambda something, else_: None)
    before = originals()
    with pytest.raises(RuntimeError, match=message), enter():
        pass
    assert originals() == before


def test_an_error_within_puts_everything_back() -> None:
    before = originals()
    for enter in CONTEXTS:
        with pytest.raises(KeyError), enter():
            raise KeyError
    assert originals() == before


def test_what_is_gone_without_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch._higher_order_ops.triton_kernel_wrap:identify_accessed_tensors"
    records = "torch.fx.traceback:NodeSource.__deepcopy__"
    assert {known for known, patch in PATCHES.items() if patch.otherwise == GO_WITHOUT} == {
        name, "torch._inductor.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.kernel_driver", records,
    }  # fmt: skip
    with monkeypatch.context() as without:
        without.delattr(traceback, "NodeSource")
        with shared_history():
            pass
    monkeypatch.setattr(*holder_of(name), lambda other: None)
    assert "not (kernel, kwargs, tma_descriptor_metadata)" in problem(name)
    with replacing("cross"):
        pass
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(LaunchesDoNotOverlap, match="ROCm"), overlapped_launches(90):
        pass


def test_records_of_origin_are_copied_again_afterwards() -> None:
    record = traceback.NodeSource(None, "first")
    with shared_history():
        assert copy.deepcopy([record])[0] is record
    copied = copy.deepcopy(record)
    assert copied is not record and copied.pass_name == "first"


def test_every_entry_is_of_a_known_use_and_package() -> None:
    assert {patch.use for patch in PATCHES.values()} == set(USES)
    for name in PATCHES:
        assert name.partition(":")[0].split(".")[0] in {*VERSIONS, "ast"}, name


def test_nothing_is_replaced_outside_the_registry() -> None:
    """Neither by mock, nor by assigning to an attribute of an imported module or class of another package."""
    found = []
    for layer in (executorch_moe.kernels, executorch_moe.backends, executorch_moe.export):
        for path in sorted(Path(str(layer.__file__)).parent.rglob("*.py")):
            tree = ast.parse(path.read_text())
            imported = {
                alias.asname or alias.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom))
                and not (isinstance(node, ast.ImportFrom) and (node.level or "executorch_moe" in (node.module or "")))
                for alias in node.names
            }
            for node in ast.walk(tree):
                text = ast.unparse(node) if isinstance(node, ast.Call) else ""
                if "mock.patch" in text.partition("(")[0] and "os.environ" not in text:
                    found.append(path.name)
                targets = node.targets if isinstance(node, ast.Assign) else []
                for target in targets:
                    if isinstance(target, ast.Attribute) and ast.unparse(target).split(".")[0] in imported:
                        found.append(f"{path.name}: {ast.unparse(node)}")
    assert set(found) == {"registry.py"}, found
