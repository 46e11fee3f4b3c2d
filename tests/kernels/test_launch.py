"""The device on which kernels are launched, and the width of their offsets into large tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from executorch_moe.kernels import FusedExperts, fused_experts, gpus, pack_experts
from executorch_moe.kernels import launch as launching
from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.experts import problem
from executorch_moe.kernels.experts.elementwise import moe_sum_pairs
from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.experts.problem import needs_wide_offsets
from executorch_moe.kernels.gpus import Gpu, compile_for, find_model, gpu_of
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch, record_launches
from executorch_moe.kernels.shapes import SHAPES, LayerShape

from .cases import Case, make, relative_error
from .test_one_token import attention_arguments, linear_arguments, route_arguments

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Driver:
    """Replaces CUDA and a kernel: two devices, one of them current; records the device of each launch."""

    def __init__(self, current: int = 0) -> None:
        self.current, self.launched_on = current, []  # type: ignore[var-annotated]

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launched_on.append(self.current)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current)
    monkeypatch.setattr(torch.cuda, "device", driver.device)
    return driver


@pytest.mark.parametrize("run", [Launch.run, Launch.run_now])
def test_kernels_are_launched_where_their_tensors_are(run: Any, driver: Driver) -> None:
    if torch.backends.cuda.is_built() and torch.cuda.device_count() == 1:
        pytest.skip("a CUDA build cannot make tensors, not even fake ones, for a missing second GPU")
    with FakeTensorMode():
        for device in ("cuda:1", "cuda:0"):
            tensor = torch.empty(4, device=device)
            run(Launch(driver, (1,), {"num_tokens": 3, "x_ptr": tensor}, {"PTX": 90}))
    run(Launch(driver, (1,), {"x_ptr": torch.empty(4)}, {"PTX": 0}))  # interpreted, on the CPU
    assert driver.launched_on == [1, 0, 0] and driver.current == 0


def test_triton_kernels_are_launched_where_their_tensors_are(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for a kernel of Triton; while torch traces, no device is chosen, because there may be none."""
    if torch.backends.cuda.is_built() and torch.cuda.device_count() == 1:
        pytest.skip("a CUDA build cannot make tensors, not even fake ones, for a missing second GPU")
    monkeypatch.setattr(launching, "wrap_triton", lambda kernel: driver)
    with FakeTensorMode():
        there = Launch(moe_sum_pairs, (1,), {"x_ptr": torch.empty(4, device="cuda:1")}, {"PTX": 90})
        there.run()
        monkeypatch.setattr(launching, "is_traced", lambda value: False)
        there.run()
    assert driver.launched_on == [0, 1] and driver.current == 0


def test_no_index_is_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(gpus, "_device", lambda index: Gpu(90, 100 + index, 1))
    assert [gpu_of(index).num_sms for index in (None, 0, 2)] == [101, 100, 102]
    with compile_for(find_model("l4").gpu):
        assert gpu_of(None).num_sms == 58


@pytest.mark.gpu
@TWO_GPUS
def test_operators_run_on_a_device_that_is_not_current() -> None:
    assert torch.cuda.current_device() == 0
    case = make(Case("second GPU", tokens=5), "w4a16")
    arguments = case.args("cuda:1")
    for path in ("grouped", "few_tokens", "matvec"):
        out = run_fused_experts(arguments, options=Options(path=path))
        assert out.device.index == 1 and relative_error(out, case.expected) < 4.5e-3
    assert relative_error(fused_experts(*arguments), case.expected) < 4.5e-3
    for operator, plain in (
        (ops.one_token_attention, attention_arguments("int8", 2, 5, True)),
        (ops.one_token_router, route_arguments("int8", 3)),
        (ops.one_token_linear, linear_arguments("int8", 50, 96)),
    ):
        found = operator(*(part.to("cuda:1") if isinstance(part, Tensor) else part for part in plain))
        expected = operator(*plain)
        found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu().float(), other.float(), rtol=0.01, atol=0.01)
    assert torch.cuda.current_device() == 0


# --------------------------------------------------------------------------------------------- offsets in large tensors


def wide(layer: LayerShape, tokens: int, scheme: str = "w4a16") -> list[bool]:
    """Whether each GEMM of a layer uses 64-bit offsets."""
    launches = record_launches(find_model("h200").gpu, scheme, tokens, layer, Options(path="grouped"))
    return [launch.constexprs["WIDE_X"] for launch in launches if launch.kernel.__name__ == "moe_grouped_gemm"]


@pytest.mark.parametrize(("name", "tokens"), [("mixtral", 149_796), ("deepseek-v3", 262_144)])
def test_offsets_are_as_wide_as_the_tokens_need(name: str, tokens: int) -> None:
    layer = SHAPES[name]
    assert wide(layer, tokens) == [False, False]
    assert wide(layer, tokens + 1) == [False, True]
    assert wide(layer, 2**32 // layer.hidden + 1) == [True, True]


def test_a_bounded_number_of_tokens_keeps_narrow_offsets() -> None:
    """An exported program knows the largest number of tokens. Without a bound, it must be right for any number."""
    packed = pack_experts(torch.randn(4, 256, 128), torch.randn(4, 128, 128), group_size=32)
    inputs = (torch.randn(5, 128).bfloat16(), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2))
    for most, expected in ((4096, False), (2**25, False), (2**25 + 1, True), (None, True)):
        tokens = Dim("tokens", min=2, max=most) if most else Dim("tokens", min=2)
        program = export(FusedExperts(packed), inputs, dynamic_shapes=({0: tokens},) * 3)
        (node,) = (n for n in program.graph.nodes if n.target is torch.ops.executorch_moe.fused_experts.default)
        rows = node.args[0].meta["val"].shape[0]
        assert needs_wide_offsets(rows, 128) == expected


@pytest.mark.interpreter
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "bf16"])
def test_both_widths_give_the_same_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(Case("wide", tokens=9, hidden=160, intermediate=96), scheme).args()
    options = Options(path="grouped")
    narrow = run_fused_experts(arguments, options=options)
    monkeypatch.setattr(problem, "OFFSETS_32_BITS", 1)
    assert torch.equal(run_fused_experts(arguments, options=options), narrow)


@pytest.mark.compiler
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "bf16"])
def test_wide_offsets_are_of_64_bits(scheme: str) -> None:
    layer, options = LayerShape(8, 2, 4096, 2048), Options(path="grouped")
    launches = record_launches(find_model("h200").gpu, scheme, 2**20, layer, options)
    (gemm1, gemm2) = (launch for launch in launches if launch.kernel.__name__ == "moe_grouped_gemm")
    assert gemm1.constexprs["WIDE_X"] == (scheme != "w4a8") or gemm1.constexprs["STRIDE_X"] * 2**20 <= 2**32
    for launch in (gemm1, gemm2):
        stride = launch.constexprs["STRIDE_X"]
        for wide_x in (True, False):
            launch.constexprs["WIDE_X"] = wide_x
            ttir = compile_kernel(launch, 90).asm["ttir"]
            names = {line.split(" = ")[0].strip() for line in ttir.splitlines() if f"dense<{stride}> " in line}
            products = [
                line for line in ttir.splitlines() if "arith.muli" in line and any(f" {n} " in line for n in names)
            ]
            assert any("xi64>" in line for line in products) == wide_x, products
        launch.constexprs["WIDE_X"] = True
        report = compile_launch(launch, 90)
        assert report.spill_bytes <= 512, report


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "bf16"])
def test_rows_behind_four_billion_elements(scheme: str) -> None:
    """GEMM2 of the last tokens reads rows beyond 32-bit offsets. Needs 9 GB of memory."""
    tokens, intermediate = 131_073, 16_384  # with top_k = 2: 32,768 elements beyond 2^32
    case = Case("wide", tokens=64, experts=2, hidden=128, intermediate=intermediate, group_size=128)
    few = make(case, scheme)
    arguments = few.args("cuda")
    repeats = -(-tokens // 64)
    x, ids, weights = (t.repeat(repeats, 1)[-tokens:].contiguous() for t in arguments[:3])
    out = run_fused_experts(arguments._replace(hidden_states=x, topk_ids=ids, topk_weights=weights))
    bound = {"bf16": 4.0e-3, "w4a16": 4.5e-3}[scheme]
    expected = few.expected.repeat(repeats, 1)[-tokens:]
    for part in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        assert relative_error(out[part], expected[part]) <= bound, part
    assert relative_error(out, expected) <= bound


def test_more_than_kernels_count_is_refused() -> None:
    """On meta tensors, because only sizes matter."""
    args = list(make(Case("many", tokens=3), "w4a16").args())
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    pairs = torch.empty(2**30, 2, device="meta")
    with pytest.raises(ValueError, match=r"topk_ids has 2147483648 pairs .* split the tokens into calls of 1073741823"):
        fused_experts(torch.empty(2**30, 128, dtype=torch.bfloat16, device="meta"), pairs.long(), pairs, *args[3:])
    w13 = torch.empty(2, 2 * 32768, 32768, dtype=torch.bfloat16, device="meta")
    w2 = torch.empty(2, 32768, 32768, dtype=torch.bfloat16, device="meta")
    x = torch.empty(3, 32768, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(3, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"an expert of H=32768 and I=32768 .* count those of one expert in 31 bits"):
        fused_experts(x, ids, ids.float(), w13, w2, *[None] * 6, "bf16", "silu", 0)
