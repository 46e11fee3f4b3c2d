"""The chain of a decode step: the same operators as the decoder layers, bytes, times from records, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from executorch_moe.export.bench import chain as cb
from executorch_moe.export.bench.breakdown import Kernel
from executorch_moe.export.bench.decode_chain import (
    DecodeChain,
    Dense,
    check_first_layer,
    check_same_bits,
    find_shape,
)
from executorch_moe.export.bench.launch_times import LaunchTime, in_order, mean_time, of_replays
from executorch_moe.export.cli.app import app


def times(*launches: tuple[float, float, float]) -> list[LaunchTime]:
    """In the chain, own time and start of kernels a, b, c, ..."""
    return [LaunchTime(name, *launch) for name, launch in zip("abcdefgh", launches, strict=False)]


def test_a_gap_an_overlap_and_a_launch_that_ends_first() -> None:
    kernels = [
        Kernel("a", 100.0, 10.0),
        Kernel("b", 112.0, 5.0),  # 2 us after the end of a
        Kernel("c", 114.0, 7.0),  # starts 3 us before the end of b and ends 4 us after it
        Kernel("d", 115.0, 2.0),  # within c
        Kernel("e", 121.0, 4.0),  # at the end of c
    ]
    found = in_order(kernels)
    assert found == times((10, 10, 0), (7, 5, 2), (4, 7, -3), (0, 2, -6), (4, 4, 0))
    assert sum(time.in_chain for time in found) == 125.0 - 100.0
    assert in_order([]) == []


def test_medians_over_replays() -> None:
    # The third replay is disturbed; its launches must not count.
    replays = [(0.0, 4.0, 3.0), (50.0, 4.0, 3.0), (100.0, 40.0, 30.0)]
    kernels = [Kernel(*each) for at, long, short in replays for each in (("a", at, long), ("b", at + long - 1, short))]
    assert of_replays(kernels, ["a", "b"]) == times((4, 4, 0), (2, 3, -1))


def test_launches_that_are_not_those_of_the_chain() -> None:
    kernels = [Kernel("a", 0.0, 1.0), Kernel("b", 2.0, 1.0)]
    with pytest.raises(RuntimeError, match="launch 1 is b, expected c: run it again"):
        of_replays(kernels, ["a", "c"])
    with pytest.raises(RuntimeError, match="2 launches are not a multiple of 3"):
        of_replays(kernels, ["a", "b", "c"])
    with pytest.raises(RuntimeError, match="0 launches are not a multiple of 1"):
        of_replays([], ["a"])


def test_mean_of_layers() -> None:
    assert mean_time([LaunchTime("a", 2, 4, -1), LaunchTime("a", 4, 6, 2)]) == LaunchTime("a", 3, 5, 0.5)


@pytest.mark.parametrize(
    ("sizes", "launches", "expected"),
    [((30, 4), 2, [30, 4]), ((30, 4), 1, [34]), ((30, 4), 3, [None] * 3), ((0,), 2, [0, 0])],
    ids=["as known", "one launch reads all", "unknown launches", "nothing to read"],
)
def test_bytes_of_launches(sizes: tuple[int, ...], launches: int, expected: list[int | None]) -> None:
    assert [cb.bytes_of_launch(sizes, index, launches) for index in range(launches)] == expected


def small(scheme: str = "w4a16", dense: str = "int8", layers: int = 2, context: int = 20) -> DecodeChain:
    return DecodeChain(find_shape("tiny"), layers, context, dense, scheme, device="cpu")


def test_bytes_that_must_be_read() -> None:
    """The tiny shape: H=128, I=128, 4 heads of 32, 2 key/value heads, top-2 of 8 experts, 300 tokens."""
    chain = small()
    assert chain.bytes_of("attention") == (256 * 128 + 256 * 4 + 128 * 2, 2 * 20 * 2 * 32 * 2 + 2 * 32 * 2)
    before = (128 * 128 + 128 * 4, 8 * 128 * 2 + 128 * 2)  # output projection and router
    # Two experts; 4-bit codes and a bf16 scale for each row and group of 128.
    assert chain.bytes_of("experts") == (*before, 2 * (256 * 128 // 2 + 256 * 2), 2 * (128 * 128 // 2 + 128 * 2))
    assert chain.bytes_of("lm_head") == (300 * 128 + 300 * 4,)
    plain = small("bf16", "bf16")
    assert plain.bytes_of("attention")[0] == 256 * 128 * 2 + 128 * 2
    assert plain.bytes_of("experts")[2:] == (2 * 256 * 128 * 2, 2 * 128 * 128 * 2)


def test_bytes_of_qwen3_30b_a3b() -> None:
    """Its weights exceed the L2 cache of an H200, 50 MiB, several times with eight layers."""
    m = find_shape("qwen3")
    dense = (m.heads + 2 * m.kv_heads + m.heads) * m.head_dim * m.hidden
    experts = m.top_k * 3 * m.hidden * m.intermediate * (4 + 16 / 128) / 8
    assert (m.layers, dense, experts) == (48, 18_874_368, 19_464_192)
    assert 8 * (dense + experts) > 5 * (50 << 20)


@pytest.mark.transformers
@pytest.mark.parametrize("dense", ["int8", "bf16"])
def test_the_chain_computes_what_the_decoder_layers_do(dense: str) -> None:
    """Same weights and cache in `OneTokenDecoderLayer`s, which are what an export traces: the same bits."""
    from executorch_moe.export.build import streamline_
    from executorch_moe.export.models import attention, synthetic
    from executorch_moe.export.models.causal_lm import CausalLM
    from executorch_moe.export.quantize.dense import quantize_dense_

    model = find_shape("tiny,layers=3")
    net: Any = synthetic.build(
        model, group_size=32, attention=attention.register(),
        prepare=lambda part: quantize_dense_(streamline_(part), "int8" if dense == "int8" else "none"),
    )  # fmt: skip
    lm = CausalLM(net, 64)
    chain = DecodeChain(model, 3, 20, dense, group_size=32, device="cpu")
    for index, (layer, weights) in enumerate(zip(net.model.layers, chain.layers, strict=True)):
        one = layer.self_attn

        def both(linear: nn.Module) -> Dense:
            return Dense(linear.qdata, linear.scale) if dense == "int8" else Dense(linear.weight, None)  # type: ignore

        weights.qkv, weights.out = both(one.qkv_proj), both(one.o_proj)
        weights.router, weights.experts = layer.mlp.gate.weight, layer.mlp.experts
        for kind in ("key", "value"):
            getattr(lm.kv_cache, f"{kind}_{index}")[:, :, :20] = getattr(weights, kind)[:, :, :20]
    rows = net.lm_head
    chain.head = Dense(rows.qdata, rows.scale) if dense == "int8" else Dense(rows.weight, None)
    with torch.no_grad():
        chain.hidden = net.model.embed_tokens(torch.tensor([[5]]))
        position = torch.tensor([20])
        chain.cos, chain.sin = (part[..., :16] for part in net.model.rotary_emb(chain.hidden, position[None]))
        expected = lm.logits(torch.tensor([[5]]), position, 1)
        logits, _ = chain.step()
    assert torch.equal(logits, expected)
    for index, weights in enumerate(chain.layers):  # the cache update
        assert torch.equal(weights.key[:, :, 20], getattr(lm.kv_cache, f"key_{index}")[:, :, 20])
        assert torch.equal(weights.value[:, :, 20], getattr(lm.kv_cache, f"value_{index}")[:, :, 20])


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "bf16"])
def test_errors_of_the_first_layer(scheme: str) -> None:
    chain = small(scheme)
    _, results = chain.step()
    errors = check_first_layer(chain, results[0])
    assert list(errors) == ["attention", "key and value", "residual", "norm", "router", "experts"]
    results[0].experts = results[0].experts.roll(1, -1)
    with pytest.raises(RuntimeError, match=r"experts of the first layer is wrong \(relative error [0-9.]+, at most"):
        check_first_layer(chain, results[0])


def test_experts_that_are_not_the_best_are_found() -> None:
    chain = small()
    _, results = chain.step()
    chain.layers[0].router = chain.layers[0].router.roll(1, 0)  # the experts that should have been chosen
    with pytest.raises(RuntimeError, match="experts of the first layer is wrong"):
        check_first_layer(chain, results[0])


PARTS = {
    "one_token_attention": ("qkv", "attention"),
    "one_token_experts": ("out", "router", "gemm1", "gemm2"),
    "one_token_router": (),  # only in the check of the first layer
    "one_token_linear": ("one_token_linear",),
}
"""Names for the launches of an operator."""


class Recorder(TorchDispatchMode):
    """Writes down kernels for the operators that run: two for each of the package, except for `one_token_linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = str(func).split(".")[:2]
        if space == "executorch_moe":
            for part in PARTS[name]:
                self.kernels.append(Kernel(part, 10.0 * len(self.kernels), 9.0))
        elif name in ("stack", "index_copy_"):
            self.kernels.append(Kernel(name, 10.0 * len(self.kernels), 9.0))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the chain on the CPU without CUDA graphs, with made-up times: 10 us per layer, 7 us after the last layer."""

    def capture(steps: list[Callable[[], Any]]) -> tuple[Any, list[Any]]:
        recorder = Recorder()
        with recorder:
            results = [step() for step in steps]
        layers = sum(kernel.name == "router" for kernel in recorder.kernels)
        return SimpleNamespace(replay=steps[0], us=7.0 + 10.0 * layers), results

    def profile_kernels(call: Callable[[], Any], device: torch.device) -> list[Kernel]:
        recorder = Recorder()
        with recorder:
            call()
        return recorder.kernels

    monkeypatch.setattr(cb, "capture", capture)
    monkeypatch.setattr(cb, "profile_kernels", profile_kernels)
    monkeypatch.setattr(cb, "replay_us", lambda graph, repeats: graph.us)
    monkeypatch.setattr(cb, "measure_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(cb, "measure_launch", lambda device: 1.5)
    monkeypatch.setattr(cb, "l2_bytes", lambda device: 50_000_000)
    monkeypatch.setattr(cb, "PROFILED_REPLAYS", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")


@pytest.mark.usefixtures("without_gpu")
def test_layers_the_whole_model_and_every_launch() -> None:
    result = cb.measure(small(layers=4), "tiny,layers=10")
    assert result.layer_us == 10.0 and result.chain_us == 47.0
    # Two layers in the shape "tiny", of which the chain has four.
    assert (result.model_layers, result.model_us) == (2, 27.0)
    assert len(result.launches) == 4 * 6 + 3
    names = [(row.operator, row.time.kernel) for row in result.kinds]
    layer = [("attention", name) for name in PARTS["one_token_attention"]]
    layer += [("experts", name) for name in PARTS["one_token_experts"]]
    assert names == [
        *layer, ("cache update", "stack"), ("cache update", "index_copy_"), ("lm_head", "one_token_linear")
    ]  # fmt: skip
    assert [row.time.in_chain for row in result.kinds[:6]] == [10.0] * 6 and result.profiled_layer_us == 60.0
    assert [row.layer for row in result.kinds] == [None] * 6 + [-1] * 3
    assert [row.nbytes for row in result.kinds[:2]] == [34048, 5248]
    assert result.kinds[0].floor_us == 34048 / 1e6
    table = result.markdown()
    assert "| attention | `qkv` | 10.00 | 9.00 | +1.00 | 0.03 | 0.03 | 293.70 |" in table
    assert "| 2 layers and the vocabulary, from these | 27 | 37037.0 |" in table
    # Bytes of a layer: 34,048 + 5,248 + 16,896 + 2,304 + 33,792 + 16,896.
    assert "The layers read 0 MB in a pass, and the L2 cache has 50 MB." in table and result.layer_bytes == 109_184
    (as_json,) = json.loads(cb.as_json([result]))
    assert as_json["launches"][0]["time"]["kernel"] == "qkv" and as_json["layer_us"] == 10.0


@pytest.mark.parametrize(("layers", "counted"), [(1, [0]), (2, [1]), (3, [1]), (5, [1, 2, 3])])
def test_layers_that_count(layers: int, counted: list[int]) -> None:
    rows = [
        cb.LaunchRow("attention", layer, LaunchTime("a", float(10**layer), 1.0, 0.0), 5, 1.0) for layer in range(layers)
    ]
    (kind,) = cb.rows_of_kinds(rows, layers)
    assert kind.time.in_chain == sum(10.0**layer for layer in counted) / len(counted)


@pytest.mark.usefixtures("without_gpu")
def test_results_that_differ_under_overlap_are_refused() -> None:
    chain = small()
    logits, _ = chain.step()
    check_same_bits(chain, logits)
    with pytest.raises(RuntimeError, match="launches that overlap give other results"):
        check_same_bits(chain, logits * 1.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "mixtral"], "--shape 'mixtral' is unknown: use one of qwen3, qwen3-30b-a3b, tiny"),
        (["--shape", "qwen3,head_dim=48"], "which the operators for one token do not support"),
        (["--context", "0"], "--context '0' must be positive whole numbers"),
        (["--dense", "int4"], "--dense 'int4' is unknown: use one of int8, bf16"),
        (["--scheme", "w8a8"], "--scheme 'w8a8' is unknown"),
        (["--group-size", "512"], "intermediate size I=768 must be a multiple of"),
        (["--layers", "0"], "--layers 0 must be at least 1"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "chain", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output


def test_without_a_gpu_the_reason_is_given(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "times.json"
    result = CliRunner().invoke(app, ["bench", "chain", "--json", str(path)])
    assert result.exit_code == 2 and "finds no GPU: run this on a machine with one" in result.output
    assert not path.exists()


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "dense"), [("w4a16", "int8"), ("bf16", "bf16"), ("w4a8", "int8")])
def test_all_launches_are_accounted_for(scheme: str, dense: str) -> None:
    result = cb.chain("tiny", 2, 300, dense, scheme, repeats=5)
    assert [row.operator for row in result.kinds[:6]] == ["attention"] * 2 + ["experts"] * 4
    for row in result.kinds[:6]:
        assert row.time.kernel.startswith("moe_") and row.nbytes is not None and row.time.in_chain >= 0
    assert [row.operator for row in result.kinds if row.time.kernel == "moe_one_token_matvec"][-1] == "lm_head"
    assert len([row for row in result.launches if row.layer == 1]) == 6
    assert result.l2_bytes > 1_000_000
    # Times in the chain tile it: they add up to the layers' share of the replays, which the profile slows down.
    assert 0 < result.layer_us < 2 * result.profiled_layer_us and result.chain_us > 2 * result.layer_us
