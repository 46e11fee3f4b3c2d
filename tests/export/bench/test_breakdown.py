"""The breakdown of a decode token's time, from a trace in torch.profiler's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from executorch_moe.export.bench.breakdown import (
    Breakdown,
    Kernel,
    Share,
    break_down,
    group_of,
    own_times,
    read_trace,
    token_bytes,
)

# Names of kernels in artifacts with our operators and with ExecuTorch's.
NAMES = (
    ("moe_few_tokens_gemm", 96, "experts GEMM1"),  # and GEMM2 in turn
    ("moe_grouped_gemm2", 132, "experts GEMM2"),
    ("moe_sum_pairs", 1, "experts, other"),
    ("moe_one_token_matvec", 640, "dense"),
    ("moe_one_token_attention", 64, "attention"),
    ("moe_one_token_router", 32, "routing"),
    ("triton_poi_fused_index_put_select_view_copy_2", 2, "norm, elementwise"),
    ("triton_poi_fused__to_copy_cat_cos_mul_sin_unsqueeze_copy_1", 1, "norm, elementwise"),
    ("triton_poi_fused__to_copy_index_mul_unsqueeze_copy_0", 8, "norm, elementwise"),
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_unsqueeze_copy_view_copy_4", 1, "norm, elementwise"),
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_sum_unsqueeze_copy_view_copy_5", 18992, "dense"),
    ("triton_per_fused__to_copy_max_mul_select_view_copy_6", 149, "sampling"),
    ("triton_red_fused_add_argmax_index_mul_7", 1, "sampling"),
    ("_fused_moe_kernel", 96, "experts GEMM1"),
    ("triton_per_fused_sum_view_2", 256, "experts, other"),
    ("_fused_moe_silu_kernel", 96, "experts GEMM2"),
    ("_fused_moe_batched_int8_kernel", 96, "experts GEMM1"),
    ("_fused_moe_silu_batched_kernel", 96, "experts GEMM2"),
    ("moe_route_scatter", 1, "routing"),
    ("_topk_kernel", 1, "routing"),
    ("moe_top_experts", 206, "routing"),
    ("triton_tem_fused__to_copy__unsafe_view_add_cat_clone_cos_index_mean_mm_mul_pow_rsqrt_sin_2", 80, "dense"),
    ("moe_cached_attention", 412, "attention"),
    ("moe_delta_rule_one_token", 32, "gated delta rule"),
    ("moe_rotated_heads", 4120, "norm, elementwise"),
    ("triton_per_fused__softmax__to_copy_prepare_softmax_online_view_copy_9", 1, "routing"),
    ("_sdpa_decode_splitk_kernel", 36, "attention"),
    ("_sdpa_decode_reduce_kernel", 32, "attention"),
    ("triton_tem_fused_mm_t_view_1", 64, "dense"),
    ("triton_per_fused___rshift____to_copy_add_bitwise_and_mul_select_sub_sum_unsqueeze_copy_1", 640, "dense"),
    ("triton_per_fused__to_copy_mul_sum_view_copy_8", 128, "dense"),
    # Names with the same words: a product that includes a norm, and a norm that includes routing weights.
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_sum_view_copy_14", 640, "dense"),
    ("triton_per_fused__to_copy_add_div_mean_mul_pow_rsqrt_sum_view_copy_7", 1, "norm, elementwise"),
    ("triton_per_fused__to_copy_add_cos_flip_index_put_mean_mul_pow_rsqrt_sin_sum_3", 32, "norm, elementwise"),
    ("triton_per_fused__to_copy_lt_mul_sum_19", 1, "sampling"),
    ("triton_red_fused__to_copy_div_exp_le_max_mul_neg_select_sub_sum_17", 19, "sampling"),
    ("triton_per_fused__to_copy_arange_argmax_bitwise_and_bitwise_xor_clamp_log1p_23", 19, "sampling"),
    ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_view_copy_14", 1, "norm, elementwise"),
)


@pytest.mark.parametrize(("name", "blocks", "group"), NAMES)
def test_groups(name: str, blocks: int, group: str) -> None:
    assert group_of(Kernel(name, 0.0, 1.0, blocks)) == group


def trace(*kernels: tuple[str, float, float]) -> dict[str, Any]:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"grid": [4, 3, 1]}}
        for name, start, duration in kernels
    ]
    noise = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 1e6}
    return {"traceEvents": [noise, *reversed(events), {"ph": "M", "name": "process_name"}]}


def test_kernels_of_a_trace_come_by_start() -> None:
    assert read_trace(trace(("a", 1.0, 2.0), ("b", 5.0, 1.0))) == [
        Kernel("a", 1.0, 2.0, 12),
        Kernel("b", 5.0, 1.0, 12),
    ]
    with pytest.raises(ValueError, match="the profile has no GPU kernels"):
        read_trace(trace())


def test_time_in_which_kernels_overlap_is_that_of_the_first() -> None:
    assert own_times([Kernel("a", 0, 10), Kernel("b", 2, 3), Kernel("c", 8, 6), Kernel("d", 20, 1)]) == [10, 0, 4, 1]


def example() -> Breakdown:
    """Two tokens of 50 us: 10 + 20 us of experts, 5 of dense, and gaps."""
    token = [("moe_few_tokens_gemm", 0.0, 10.0), ("moe_few_tokens_gemm", 12.0, 20.0), ("triton_tem_fused_mm", 40, 5.0)]
    kernels = [(name, start + 55.0 * n, duration) for n in range(2) for name, start, duration in token]
    return break_down(read_trace(trace(*kernels)), 2, {"experts GEMM1": 4_000_000, "dense": 1_000_000}, 1e12, 2.0)


def test_shares_gaps_and_what_is_accounted_for() -> None:
    result = example()
    assert result.token_us == 50.0 and result.gap_us == pytest.approx((100 - 70) / 2)
    assert result.shares == [
        Share("experts GEMM2", 1, 20.0, None),
        Share("experts GEMM1", 1, 10.0, 4_000_000),
        Share("dense", 1, 5.0, 1_000_000),
    ]
    assert result.bytes_us == 5.0 and result.accounted == pytest.approx((5.0 + 3 * 2.0) / 50.0)
    assert result.longest["moe_few_tokens_gemm"] == (2.0, 30.0)


def test_table() -> None:
    table = example().markdown()
    assert "| experts GEMM1 | 1 | 10.0 | 20.0% | 4.0 MB | 4.0 |" in table
    assert "| experts GEMM2 | 1 | 20.0 | 40.0% |  |  |" in table
    assert "| gaps | | 15.0 | 30.0% | | |" in table
    assert "Accounted for: 22% = (5 us of bytes at 1.00 TB/s + 3 launches of 2.00 us) / 50 us." in table


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    example().plot(tmp_path / "token.svg", "a title")
    text = (tmp_path / "token.svg").read_text()
    assert text.startswith("<?xml") and [path.name for path in tmp_path.iterdir()] == ["token.svg"]


def test_bytes_of_a_token() -> None:
    record = {
        "expert_bytes": 3000,
        "active_experts": 0.1,
        "other_bytes": 500,
        "embedding_bytes": 100,
        "cache_bytes": 70,
        "max_context": 35,
    }
    whole = {"experts GEMM1": 200, "experts GEMM2": 100, "dense": 400, "attention": 70}
    assert token_bytes(record, 5) == whole
    assert token_bytes(record | {"cache_reads": "all"}, 5) == whole
    assert token_bytes(record | {"cache_reads": "written"}, 5) == whole | {"attention": 10}
    assert token_bytes({}, 5) == {}
