"""`bench kernel`: options and formats; on a GPU, every implementation runs and is correct."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from executorch_moe.export.bench import kernel as kb
from executorch_moe.export.bench.humming import plain_codes
from executorch_moe.export.cli.app import app
from executorch_moe.kernels import Mxfp4Codes, unpack_experts
from executorch_moe.kernels.experts.aten import fused_experts_cpu
from executorch_moe.kernels.measure.timing import (
    floor_us,
    make_layers,
    random_packed,
    random_routing,
    with_tokens,
    work,
)
from executorch_moe.kernels.packing.fragments import deinterleave_gate_up, dequantize, fragment_order
from executorch_moe.kernels.schemes import SCHEMES
from executorch_moe.kernels.shapes import SHAPES, LayerShape

ROWS = [
    kb.Row("s", "uniform", 8, "w4a16", "ours", 50.0, 1.0, 2.0, 2.5),
    kb.Row("s", "uniform", 1, "w4a16", "ours", 20.0, 1.0, 2.0, 5.0),
    kb.Row("s", "uniform", 8, "w4a16", "upstream-a16", 400.0, 1.0, 2.0, 20.0),
    kb.Row("s", "uniform", 8, "w4a8", "upstream-a8", 300.0, 1.0, 2.0, 15.0),
]


def test_shapes_by_name_and_by_numbers() -> None:
    assert kb.parse_shape("qwen35") is SHAPES["qwen35"]
    assert kb.parse_shape("16x2x256x128x32") == LayerShape(16, 2, 256, 128, 32)
    assert kb.parse_shape("16x2x256x128").group_size == 128


@pytest.mark.parametrize("text", ["qwen99", "16x2", "16x17x256x128", "0x1x2x3", "axbxcxd"])
def test_unknown_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is unknown: use one of qwen35"):
        kb.parse_shape(text)


def test_only_combinations_that_exist_are_measured() -> None:
    benchmark = kb.KernelBenchmark(implementations=("ours", "upstream-a8"), schemes=("w4a16", "w4a8"))
    assert benchmark.pairs() == [("ours", "w4a16"), ("ours", "w4a8"), ("upstream-a8", "w4a8")]
    with pytest.raises(ValueError, match="upstream-a8 has w4a8"):
        kb.KernelBenchmark(implementations=("upstream-a8",), schemes=("bf16",))


def test_ratio_is_to_the_fastest_upstream_of_the_same_tokens() -> None:
    rows = kb.with_ratios(ROWS)
    assert [(r.tokens, r.implementation) for r in rows] == [
        (1, "ours"), (8, "ours"), (8, "upstream-a16"), (8, "upstream-a8")
    ]  # fmt: skip
    assert [r.vs_upstream for r in rows] == [None, 6.0, 0.75, 1.0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [(160, 96, 32), (128, 64, 64), (96, 128, 32)], ids=str)
def test_padding_of_random_weights_is_worth_nothing(scheme: str, sizes: tuple[int, int, int]) -> None:
    """Padding adds nothing, as in packed layers: the kernels sum over it. Two of 16 e2m1 codes are zeros."""
    hidden, intermediate, group_size = sizes
    (layer,) = make_layers(LayerShape(4, 2, hidden, intermediate, group_size), scheme, 5, 1, device="cpu")
    packed = layer.packed
    assert packed is not None
    w13 = dequantize(packed.w13, packed.w13_scale, None, fragment_order(scheme, 1))
    gate, up = deinterleave_gate_up(w13).chunk(2, dim=1)
    w2 = dequantize(packed.w2, packed.w2_scale, None, fragment_order(scheme, 2))
    for part in (gate, up, w2.transpose(1, 2)):
        assert part[:, :intermediate, :hidden].count_nonzero() > 0.85 * part[:, :intermediate, :hidden].numel()
        assert not part[:, intermediate:].any() and not part[:, :, hidden:].any()
    layer.answer.check(fused_experts_cpu(layer.args()), f"{scheme} on the CPU")


PATHS = (("ours", 4), ("ours-grouped", 4), ("ours", 100), ("ours-grouped", 100), ("ours-tile", 100))
"""The path for few tokens, and the grouped kernel with both schedules, for few and for many tokens."""


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_preset_scheme_and_path_is_right(shape: str, scheme: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    packed = random_packed(SHAPES[shape], scheme, "cuda", generator)
    for implementation, tokens in PATHS:
        layer = with_tokens(packed, SHAPES[shape], tokens, "uniform", generator)
        layer.answer.check(layer.run(kb.OURS[implementation]), f"{shape} {scheme} {implementation} at {tokens} tokens")
    del packed, layer
    torch.cuda.empty_cache()


@pytest.mark.parametrize("sizes", [(160, 96, 32), (256, 128, 32)], ids=str)
def test_plain_codes_of_mxfp4(sizes: tuple[int, int, int]) -> None:
    (layer,) = make_layers(LayerShape(3, 2, *sizes), "mxfp4", 1, 1, device="cpu")
    assert layer.packed is not None
    for gemm, expected in enumerate(unpack_experts(layer.packed), start=1):
        codes, scales = plain_codes(layer.packed, gemm)
        assert torch.equal(
            Mxfp4Codes(torch.stack((codes & 0xF, codes >> 4), -1).flatten(2), scales).dequantize(), expected
        )


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
@pytest.mark.parametrize("sizes", [(160, 96, 32), (256, 128, 128)], ids=str)
def test_plain_codes_are_the_packed_weights(scheme: str, sizes: tuple[int, int, int]) -> None:
    """What Humming gets: natural order, no padding; scales of w4a8 are rounded."""
    (layer,) = make_layers(LayerShape(3, 2, *sizes), scheme, 1, 1, device="cpu")
    assert layer.packed is not None
    for gemm, expected in enumerate(unpack_experts(layer.packed), start=1):
        codes, scales = plain_codes(layer.packed, gemm)
        nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(2).float() - 8
        found = nibbles * scales.float().repeat_interleave(sizes[2], 2)
        assert scales.dtype == torch.bfloat16 and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2**-8 if scheme == "w4a8" and gemm == 1 else 0, atol=0)


def test_humming_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = CliRunner().invoke(app, ["bench", "kernel", "--impl", "humming"])
    assert result.exit_code == 2 and "pip install humming-kernels==0.1.19" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["bench", "kernel", "--impl", "humming", "--scheme", "bf16"])
    assert result.exit_code == 2 and "humming has w4a16, w4a8, mxfp4" in " ".join(result.output.split())


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "mxfp4"])
def test_humming_is_right(scheme: str) -> None:
    pytest.importorskip("humming")
    benchmark = kb.KernelBenchmark("64x8x2048x512", (1, 700), ("ours", "humming"), (scheme,), layers=1, replays=3)
    rows = list(benchmark.run())  # each result is checked
    assert [(row.implementation, row.tokens) for row in rows] == [
        ("ours", 1), ("ours", 700), ("humming", 1), ("humming", 700)
    ]  # fmt: skip


def test_table_json_and_plot(tmp_path: Path) -> None:
    benchmark, rows = kb.KernelBenchmark(), kb.with_ratios(ROWS)
    table = kb.markdown(benchmark, rows)
    assert "| 8 | w4a16 | ours | 50.0 | 1.0 | 2 | 2.50 | 6.00x |" in table
    assert "| 1 | w4a16 | ours | 20.0 | 1.0 | 2 | 5.00 |  |" in table
    assert json.loads(kb.as_json(benchmark, rows))["rows"][1]["vs_upstream"] == 6.0
    kb.plot(benchmark, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="not supported"):
        kb.plot(benchmark, rows, tmp_path / "plot.unknown")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "--tokens '1,x' must be positive whole numbers"),
        (["--tokens", "0"], "--tokens '0' must be positive whole numbers"),
        (["--impl", "cutlass"], "implementation='cutlass' is unknown: use one of ours"),
        (["--scheme", "w8a8"], "--scheme 'w8a8' is unknown"),
        (["--routing", "random"], "--routing 'random' is unknown"),
        (["--format", "csv"], "--format 'csv' is unknown: use one of md, json"),
        (["--shape", "llama"], "--shape 'llama' is unknown"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kernel", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output


def test_without_a_gpu_the_reason_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["bench", "kernel"])
    assert result.exit_code == 2 and "finds no GPU" in result.output


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_wrong_is_not_timed(scheme: str, tokens: int) -> None:
    (layer,) = make_layers(LayerShape(4, 2, 256, 128, 128), scheme, tokens, 1, device="cpu")
    answer, right = layer.answer, fused_experts_cpu(layer.args())
    answer.check(right, "ours")
    wrong = layer.hidden_states.roll(1, dims=1)
    with pytest.raises(RuntimeError, match=r"ours gives wrong results \(relative error [0-9.]+\), so its time means"):
        answer.check(fused_experts_cpu(layer.args()._replace(hidden_states=wrong)), "ours")
    with pytest.raises(RuntimeError, match="wrong results"):
        answer.check(right * torch.nan, "ours")


@pytest.mark.parametrize("routing", kb.ROUTINGS)
def test_random_routing_gives_distinct_experts(routing: str) -> None:
    shape = LayerShape(32, 4, 128, 128)
    generator = torch.Generator().manual_seed(0)
    ids, weights = random_routing(200, shape, routing, "cpu", generator)
    assert ids.shape == weights.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist()) and ids.min() >= 0 and ids.max() < 32
    torch.testing.assert_close(weights.sum(1), torch.ones(200))
    counts = ids.reshape(-1).bincount(minlength=32)
    if routing == "hot":
        assert set(ids.reshape(-1).tolist()) == {0, 1, 2, 3}
    elif routing == "zipf":
        assert counts[0] > 4 * counts[16:].float().mean()
    else:
        assert counts.max() < 2 * counts.float().mean()


def test_floor_is_the_larger_of_flops_and_touched_bytes() -> None:
    shape = LayerShape(4, 2, 128, 128, 128)
    layers = make_layers(shape, "w4a16", 3, 2, device="cpu")
    flops, nbytes = work(shape, "w4a16", layers)
    touched = sum(len(set(layer.topk_ids.reshape(-1).tolist())) for layer in layers) / 2
    assert flops == 2 * 3 * 2 * 3 * 128 * 128
    assert nbytes == touched * 3 * 128 * 128 * (4 + 16 / 128) / 8
    assert floor_us(shape, "w4a16", layers) == 1e6 * max(flops / 790e12, nbytes / 4.3e12)


def test_tune_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["tune", "--shape", "qwen35"])
    assert result.exit_code == 2 and "finds no GPU: run this on a machine with one" in result.output
    result = CliRunner().invoke(app, ["tune", "--shape", "nothing"])
    assert result.exit_code == 2 and "--shape 'nothing' is unknown" in result.output


@pytest.mark.gpu
def test_every_implementation_runs() -> None:
    benchmark = kb.KernelBenchmark(
        "8x2x256x128x128",
        (3, 40),
        (*kb.UPSTREAM, "ours", "ours-heuristic", "ours-tile-g32", "torch-grouped-mm"),
        ("w4a16", "w4a8", "bf16"),
        "zipf",
        2,
        3,
    )
    rows = kb.with_ratios(benchmark.run())
    assert len(rows) == 2 * len(benchmark.pairs())
    assert all(row.microseconds > 0 and row.vs_upstream for row in rows)


@pytest.mark.parametrize(
    ("shape", "schemes", "memory", "expected"),
    [
        ("qwen35", ["w4a16"], 150e9, 10),  # 12.6 MB of eight experts in a layer; 120 MB wanted
        ("qwen35", ["w4a16", "bf16"], 150e9, 10),
        ("mixtral", ["w4a16"], 150e9, 3),
        ("qwen35", ["bf16"], 16e9, 3),
        ("qwen35", ["w4a16"], 6e9, 5),  # 0.4 GB a layer
    ],
)
def test_weights_of_the_default_number_of_layers_do_not_stay_in_l2(
    shape: str, schemes: list[str], memory: float, expected: int
) -> None:
    assert kb.layers_beyond_l2(SHAPES[shape], schemes, 60_000_000, int(memory)) == expected
