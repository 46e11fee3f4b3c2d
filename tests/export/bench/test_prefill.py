"""The breakdown of a prompt's time: parts by name and place, and bytes and FLOPs against numbers by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from executorch_moe.export.bench.breakdown import Kernel
from executorch_moe.export.bench.prefill import PromptBreakdown, break_down_prompt, parts_of
from executorch_moe.export.bench.prompt_work import Work, matrix_bytes, prompt_work, sizes_of
from executorch_moe.export.models.synthetic import PRESETS, parse
from executorch_moe.export.report.summary import model_sizes

# One layer's kernels of prefill in an artifact for sm_90 with int8 linear layers and w4a16 experts, of which
# AOTInductor compiled three tile heights, and what follows the last layer.
NORM = "triton_per_fused__to_copy__unsafe_view_add_mean_mul_pow_rsqrt_view_copy_13"
LAYER = (
    (NORM, "norm, elementwise"),
    ("triton_poi_fused__to_copy_1", "weights to bf16"),
    ("triton_tem_fused__to_copy_add_index_mean_mm_mul_pow_rsqrt_t_unsqueeze_copy_view_2", "qkv projection"),
    ("triton_per_fused__to_copy__unsafe_view_add_cat_cos_flip_index_put_mean_mul_pow_rsqrt_3", "norm, elementwise"),
    ("triton_poi_fused__to_copy_arange_le_transpose_copy_unsqueeze_copy_view_copy_5", "norm, elementwise"),
    ("_sdpa_fwd_kernel", "attention"),
    ("triton_poi_fused__to_copy_7", "weights to bf16"),
    ("triton_tem_fused__to_copy_mm_t_transpose_copy_view_view_copy_8", "output projection"),
    (NORM, "norm, elementwise"),
    ("triton_tem_fused__to_copy_add_mean_mm_mul_pow_rsqrt_t_view_copy_10", "router"),
    ("_topk_kernel", "routing"),
    ("moe_route_count", "routing"),
    ("moe_route_scatter", "routing"),
    ("triton_poi_fused__softmax__to_copy_add_mean_mul_pow_prepare_softmax_online_rsqrt_view_copy_11", "routing"),
    *[("moe_grouped_gemm", "experts GEMM1")] * 3,
    *[("moe_grouped_gemm", "experts GEMM2")] * 3,
    ("moe_sum_pairs", "experts, other"),
)
END = (
    (NORM, "norm, elementwise"),
    ("moe_one_token_matvec", "lm_head"),
    ("triton_per_fused__to_copy_argmax_select_21", "sampling"),
)


def kernels(names: list[str]) -> list[Kernel]:
    """One after the other: 8 us each, 2 us between them."""
    return [Kernel(name, 10.0 * index, 8.0, 64) for index, name in enumerate(names)]


def split(pairs: tuple[tuple[str, str], ...]) -> tuple[list[str], list[str]]:
    return [name for name, _ in pairs], [part for _, part in pairs]


def test_parts_of_two_layers() -> None:
    names, parts = split((*LAYER, *LAYER, *END))
    assert parts_of(kernels(names)) == parts


def test_quantized_activations_and_one_variant() -> None:
    names, parts = split(
        (
            ("moe_route_scatter", "routing"),
            ("moe_quantize_rows", "experts, other"),
            ("moe_grouped_gemm", "experts GEMM1"),
            ("moe_quantize_rows", "experts, other"),
            ("moe_grouped_gemm", "experts GEMM2"),
            ("moe_sum_pairs", "experts, other"),
        )
    )
    assert parts_of(kernels(names)) == parts


def test_a_last_chunk_of_one_token() -> None:
    names, parts = split(
        (
            *LAYER,
            ("moe_one_token_matvec", "qkv projection"),
            ("moe_one_token_attention", "attention"),
            ("moe_one_token_matvec", "output projection"),
            ("moe_one_token_router", "routing"),
            ("moe_few_tokens_gemm", "experts GEMM1"),
            ("moe_few_tokens_gemm", "experts GEMM2"),
            *END,
        )
    )
    assert parts_of(kernels(names)) == parts


NORM_KERNEL = "moe_residual_norm"
SHARED_LAYER_END = (
    ("moe_weights_to_bf16", "weights to bf16"),
    ("moe_prompt_linear", "output projection"),
    (NORM_KERNEL, "norm, elementwise"),
    ("triton_tem_fused_mm_t_view_copy_5", "router"),
    ("moe_top_experts", "routing"),
    ("moe_prompt_linear", "shared expert"),
    ("triton_poi_fused__to_copy_mul_silu_slice_8", "norm, elementwise"),
    ("moe_route_count", "routing"),
    *[("moe_grouped_gemm", "experts GEMM1")] * 2,
    *[("moe_grouped_gemm", "experts GEMM2")] * 2,
    ("moe_sum_pairs", "experts, other"),
    ("moe_prompt_linear", "shared expert"),
    (NORM_KERNEL, "norm, elementwise"),
)


def test_layers_of_the_delta_rule_and_of_attention_with_shared_experts() -> None:
    delta = [(f"moe_delta_rule_{part}", "gated delta rule") for part in ("inputs", "chunk", "state", "output")]
    names, parts = split(
        (
            *[("moe_prompt_linear", "delta rule projection"), *delta, *SHARED_LAYER_END] * 2,
            ("moe_prompt_linear", "qkv projection"),
            ("moe_cached_attention", "attention"),
            *SHARED_LAYER_END,
            ("moe_one_token_matvec", "lm_head"),
        )
    )
    assert parts_of(kernels(names), shared_expert=True) == parts


def test_libraries_and_other_experts() -> None:
    names, parts = split(
        (
            ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "qkv projection"),
            ("_sdpa_fwd_kernel", "attention"),
            ("nvjet_tst_64x64_64x9_1x4_h_bz_TNT", "output projection"),
            ("cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16", "router"),
            ("_fused_moe_batched_kernel", "experts GEMM1"),
            ("_fused_moe_silu_batched_kernel", "experts GEMM2"),
            ("nvjet_tst_8x64_64x16_1x4_h_bz_TNN", "lm_head"),
        )
    )
    assert parts_of(kernels(names)) == parts


RECORD: dict[str, Any] = {
    "options": {"model": "synthetic:tiny", "layers": None},
    "expert_bytes": 2 * 8 * 3000,  # two layers of eight experts
    "dense_formats": {"linear": "int8-per-output", "lm_head": "int8-per-output", "embedding": "int8-per-token"},
}


def test_work_of_a_prompt() -> None:
    """The tiny shape: 2 layers, H=128, I=128, 4 heads of 32, 2 key/value heads, top-2 of 8 experts, 300 tokens."""
    work = prompt_work(RECORD, 100)
    both = 2  # layers
    assert work["qkv projection"] == Work(both * (2 * 256 * 128 + 2 * 100 * (256 + 128)), both * 2 * 100 * 256 * 128)
    assert work["output projection"].flops == both * 2 * 100 * 128 * 128
    assert work["router"] == Work(both * (2 * 8 * 128 + 2 * 100 * (8 + 128)), both * 2 * 100 * 8 * 128)
    # Two products of 4 x 32 numbers for each of 1 + 2 + ... + 100 pairs of positions.
    assert work["attention"].flops == both * 4 * 4 * 32 * 5050
    assert work["attention"].nbytes == both * 2 * (2 * 100 * 128 + 2 * 100 * 2 * 32)
    assert work["experts GEMM1"].flops == both * 2 * 200 * 256 * 128
    assert work["experts GEMM2"].flops == both * 2 * 200 * 128 * 128
    # All eight experts are used, but for a probability of 8 * 0.75^100.
    assert work["experts GEMM1"].nbytes == pytest.approx(both * (8 * 2000 + 2 * 100 * 128 + 2 * 200 * 128))
    assert work["experts GEMM2"].nbytes == pytest.approx(both * (8 * 1000 + 2 * 200 * 128 + 2 * 200 * 128))
    assert work["weights to bf16"].nbytes == both * (3 * 256 * 128 + 4 * 256 + 3 * 128 * 128 + 4 * 128)
    assert work["lm_head"] == Work(300 * 128 + 4 * 300, 2 * 300 * 128)


def test_work_of_the_delta_rule_and_shared_experts() -> None:
    """Four layers of the Qwen3.5 shape, one with attention: H=2048, delta rule with 16 and 32 heads of 128."""
    model = "synthetic:qwen3.5-35b-a3b,layers=4"
    record = RECORD | {"options": {"model": model, "layers": None}, "expert_bytes": 4 * 256 * 3000}
    work = prompt_work(record, 100)
    projected = 2 * 16 * 128 + 2 * 32 * 128 + 2 * 32
    assert work["delta rule projection"].flops == 3 * 2 * 100 * projected * 2048
    assert work["gated delta rule"].flops == 3 * 6 * 32 * 128 * 128 * 100
    state = 32 * 128 * 128 * 4
    assert work["gated delta rule"].nbytes == 3 * (2 * 100 * (projected + 4096) + 2 * state)
    assert work["qkv projection"].flops == 2 * 100 * (2 * 16 + 4) * 256 * 2048  # queries and their gates
    assert work["output projection"].flops == 4 * 2 * 100 * 4096 * 2048
    assert work["shared expert"].flops == 4 * 2 * 100 * (1025 * 2048 + 2048 * 512)
    sizes = sizes_of(record)
    assert sizes is not None and sizes._asdict() == model_sizes(parse(model).config())
    assert sizes_of({"sizes": sizes._asdict()}) == sizes
    plain = prompt_work({**record, "dense_formats": {"linear": "none", "lm_head": "none"}}, 100)
    assert set(work) - set(plain) == {"weights to bf16"}


def test_few_tokens_use_few_experts() -> None:
    one, two = (prompt_work(RECORD, tokens)["experts GEMM1"].nbytes for tokens in (1, 2))
    assert one == pytest.approx(2 * (2 * 2000 + 2 * 128 + 2 * 2 * 128))
    # The second token chooses two of eight, of which a quarter is chosen already.
    assert two == pytest.approx(2 * (3.5 * 2000 + 2 * 2 * 128 + 2 * 4 * 128))


def test_chunks_read_the_weights_again() -> None:
    whole, chunked = prompt_work(RECORD, 100), prompt_work(RECORD, 100, 40)
    assert chunked["attention"].flops == whole["attention"].flops
    assert chunked["weights to bf16"].nbytes == 3 * whole["weights to bf16"].nbytes
    assert chunked["qkv projection"].nbytes == whole["qkv projection"].nbytes + 2 * 2 * (2 * 256 * 128)


def test_sizes_from_the_record() -> None:
    tiny = PRESETS["tiny"]
    named = sizes_of(RECORD)
    assert named is not None and named._field_defaults.items() <= named._asdict().items()
    assert all(
        getattr(tiny, name) == size for name, size in named._asdict().items() if name not in named._field_defaults
    )
    assert sizes_of({"sizes": named._asdict()}) == named
    assert sizes_of({"options": {"model": "folder"}}) is None and prompt_work({}, 5) == {}
    assert prompt_work({**RECORD, "options": {"model": "folder"}}, 5) == {}


@pytest.mark.transformers
def test_sizes_of_a_configuration() -> None:
    config = PRESETS["tiny"].config()
    assert model_sizes(config) == {
        field.name: getattr(PRESETS["tiny"], field.name)
        for field in dataclasses.fields(PRESETS["tiny"])
        if field.name not in ("name", "context")
    }
    config.mlp_only_layers = [0]
    assert model_sizes(config) == {}
    import transformers

    assert model_sizes(transformers.MixtralConfig()) == {}


@pytest.mark.parametrize(
    ("stored", "expected"), [("none", 24.0), ("int8-per-output", 28.0), ("int4-per-2-inputs", 6.0 + 12.0)]
)
def test_bytes_of_matrices(stored: str, expected: float) -> None:
    """[4, 3], except for groups of two inputs: [4, 3] has 1.5 of them a row."""
    assert matrix_bytes(4, 3, stored) == expected


def example() -> PromptBreakdown:
    names, _ = split((*LAYER, *END))
    work = {"qkv projection": Work(4e6, 2e9), "lm_head": Work(1e6, 5e9)}
    return break_down_prompt(kernels(names), 100, work, 1e12, 1e15)


def test_times_floors_and_gaps() -> None:
    found = example()
    count = len(LAYER) + len(END)
    assert found.prompt_us == 10.0 * count - 2 and found.gap_us == pytest.approx(2.0 * (count - 1))
    parts = {part.name: part for part in found.parts}
    assert (parts["experts GEMM1"].launches, parts["experts GEMM1"].microseconds) == (3, 24.0)
    # Bytes decide for the projection, FLOPs for the vocabulary.
    assert parts["qkv projection"].floor_us == 4.0 and parts["lm_head"].floor_us == 5.0
    assert parts["attention"].floor_us is None and found.floor_us == 9.0
    assert sum(kernel.launches for kernel in found.kernels) == count
    assert {(k.part, k.launches) for k in found.kernels if k.kernel == "moe_grouped_gemm"} == {
        ("experts GEMM1", 3), ("experts GEMM2", 3)
    }  # fmt: skip


def test_tables() -> None:
    table = example().markdown()
    assert "A prompt of 100 tokens: 238 us in the profile." in table
    assert "| qkv projection | 1 | 8.0 | 3.4% | 4.0 | 2.0 | 4.0 | 2.00 |" in table
    assert "| attention | 1 | 8.0 | 3.4% |  |  |  |  |" in table
    assert "| gaps | | 46.0 | 19.3% | | | | |" in table
    assert "| all | 24 | 238.0 | | | | 9.0 | 26.44 |" in table
    assert "| experts GEMM2 | `moe_grouped_gemm` | 3 | 24.0 | 8.00 |" in table
