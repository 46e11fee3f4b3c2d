"""Lists and sums for other libraries' grouped GEMMs, under Triton's interpreter and compiled."""

from __future__ import annotations

import os

import pytest
import torch

from executorch_moe.kernels.gpus import INTERPRETER_GPU, find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel
from executorch_moe.kernels.measure.padded_lists import padded_lists, weighted_sum
from executorch_moe.kernels.measure.timing import make_layers
from executorch_moe.kernels.shapes import LayerShape


@pytest.mark.interpreter
@pytest.mark.parametrize("block_m", [8, 24, 64])  # 24: a library may have heights that are not powers of two
@pytest.mark.parametrize(("tokens", "routing"), [(1, "uniform"), (40, "uniform"), (40, "hot"), (200, "zipf")])
def test_every_pair_is_in_one_block_of_its_expert(tokens: int, routing: str, block_m: int) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    (layer,) = make_layers(LayerShape(8, 2, 128, 128), "w4a16", tokens, 1, routing, device="cpu")
    lists = padded_lists(layer.args(), block_m, INTERPRETER_GPU, 0)
    ids, pairs = layer.topk_ids.flatten(), 2 * tokens
    rows = int(lists.num_rows)
    assert rows % block_m == 0 and rows <= lists.pair_ids.numel()
    blocks = lists.pair_ids[:rows].reshape(-1, block_m)
    assert sorted(blocks[blocks < pairs].tolist()) == list(range(pairs))
    for expert, block in zip(lists.block_expert.tolist(), blocks, strict=False):
        real = block[block < pairs]
        assert real.numel() > 0 and (ids[real.long()] == expert).all()
        assert (block[real.numel() :] == pairs).all()
    counts = ids.bincount(minlength=8)
    assert len(blocks) == int(((counts + block_m - 1) // block_m).sum())


@pytest.mark.interpreter
def test_weighted_sum() -> None:
    y, weights = torch.randn(7 * 3, 96).bfloat16(), torch.rand(7, 3)
    expected = (y.float().reshape(7, 3, 96) * weights[:, :, None]).sum(1)
    torch.testing.assert_close(weighted_sum(y, weights, 0).float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.compiler
def test_both_kernels_wait_for_the_launches_before() -> None:
    launches: list[Launch] = []
    (layer,) = make_layers(LayerShape(8, 2, 128, 128), "w4a16", 40, 1, device="cpu")
    padded_lists(layer.args(), 24, find_model("h200").gpu, 90, submit=launches.append)
    weighted_sum(torch.empty(80, 128, dtype=torch.bfloat16), layer.topk_weights, 90, submit=launches.append)
    assert [launch.kernel.__name__ for launch in launches[-2:]] == ["pad_row_blocks", "sum_weighted_pairs"]
    for launch in launches[-2:]:
        ptx = compile_kernel(launch, 90).asm["ptx"]
        assert ptx.index("griddepcontrol.wait") < ptx.index("st.global") and "launch_dependents" not in ptx
