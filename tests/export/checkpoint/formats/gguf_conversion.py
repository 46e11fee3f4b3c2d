"""Metadata and tensors of a GGUF file for a model of transformers, as llama.cpp's conversion scripts write them.

Names come from the package gguf. The changes of values are written here from llama.cpp's scripts, apart from those of
the exporter: `LlamaModel.permute`, `DeepseekV2Model` and `_LinearAttentionVReorderBase.modify_tensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
NAMES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Converted:
    """The stored tensors of a weight, by name in the file, and the function that makes the weight of their values."""

    parts: dict[str, Tensor]
    back: Callable[..., Tensor] = lambda tensor: tensor


def write_metadata(writer: Any, config: Any, architecture: str, variant: str = "") -> None:
    """The configuration and a tokenizer. Variant "old": of DeepSeek before latents were split."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    writer.add_expert_count(experts or config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    if architecture not in ("llama", "olmoe"):
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    latents = architecture == "deepseek2" and variant != "old"
    writer.add_head_count_kv(1 if latents else config.num_key_value_heads)
    if architecture in ("qwen2moe", "qwen3next", "qwen35moe"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture in ("qwen3moe", "gpt-oss", "qwen3next", "qwen35moe", "glm4moe"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
    if architecture in ("qwen3next", "qwen35moe"):
        _write_linear_attention(writer, config, architecture)
    if architecture in ("deepseek2", "glm4moe"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if architecture == "glm4moe":
        writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    if architecture == "deepseek2":
        _write_latents(writer, config, variant)
    _write_yarn(writer, config)
    vocabulary = [chr(33 + i) for i in range(config.vocab_size - 3)] + ["cd", "<|end|>", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (config.vocab_size - 2) + [3, 1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(config.vocab_size - 2)


def _write_linear_attention(writer: Any, config: Any, architecture: str) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(4)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    if architecture == "qwen35moe":
        writer.add_rope_dimension_sections([*config.rope_parameters.get("mrope_section", (11, 11, 10)), 0])


def _write_latents(writer: Any, config: Any, variant: str) -> None:
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if variant == "old":
        writer.add_key_length(width)
        writer.add_value_length(config.v_head_dim)
        return
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(width)
    writer.add_value_length_mla(config.v_head_dim)


def _write_yarn(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def name_in_file(name: str, architecture: str) -> str:
    """Name that the package gguf has for a tensor of transformers."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace("dt_bias", "dt_proj.bias")
    name += ".weight" if name.endswith(("sinks", "experts.down_proj")) else ""
    found: str | None = gguf.get_tensor_name_map(NAMES[architecture], 8).get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


def convert(name: str, tensor: Tensor, config: Any, architecture: str, variant: str = "") -> Converted:
    """The stored tensors of a weight.

    Args:
        variant: "old": DeepSeek's projection of the latents in one piece, as in earlier files. "fused": gate and up of
            the experts in one tensor.
    """
    layer = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
    if architecture == "gpt-oss" and ".experts." in name:
        return _gpt_oss(name, tensor, layer)
    if name.endswith("experts.gate_up_proj"):
        if variant == "fused":
            return Converted({f"{layer}.ffn_gate_up_exps.weight": tensor})
        gate, up = tensor.chunk(2, 1)
        parts = {f"{layer}.ffn_gate_exps.weight": gate, f"{layer}.ffn_up_exps.weight": up}
        return Converted(parts, lambda gate, up: torch.cat((gate, up), 1))
    if name.endswith("kv_b_proj.weight") and variant != "old":
        return _latents(tensor, config, layer)
    if name.endswith("in_proj_qkvz.weight"):
        return _qkvz(tensor, config, layer)
    stored = name_in_file(name, architecture)
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        paired = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2)
        return Converted(
            {stored: paired.reshape(tensor.shape)},
            lambda t: t.reshape(heads, -1, 2, t.shape[1]).swapaxes(1, 2).reshape(t.shape),
        )
    if name.endswith("shared_expert_gate.weight"):
        return Converted({stored: tensor[0]}, lambda t: t[None])
    if architecture in ("qwen3next", "qwen35moe"):
        return _with_linear_attention(name, stored, tensor, config, architecture)
    return Converted({stored: tensor})


def _gpt_oss(name: str, tensor: Tensor, layer: str) -> Converted:
    """transformers: [E, K, 2I] or [E, 2I], gate and up in alternating columns."""
    weight = not name.endswith("bias")
    kind = "weight" if weight else "bias"

    def swap(t: Tensor) -> Tensor:
        return t.transpose(1, 2) if weight else t

    rows = swap(tensor)
    if "down" in name:
        return Converted({f"{layer}.ffn_down_exps.{kind}": rows}, swap)
    parts = {f"{layer}.ffn_gate_exps.{kind}": rows[:, 0::2], f"{layer}.ffn_up_exps.{kind}": rows[:, 1::2]}
    return Converted(parts, lambda gate, up: swap(torch.stack((gate, up), 2).flatten(1, 2)))


def _latents(tensor: Tensor, config: Any, layer: str) -> Converted:
    keys, values = config.qk_nope_head_dim, config.v_head_dim
    by_head = tensor.view(config.num_attention_heads, keys + values, -1)
    k_b, v_b = torch.split(by_head, [keys, values], 1)
    parts = {f"{layer}.attn_k_b.weight": k_b.transpose(1, 2), f"{layer}.attn_v_b.weight": v_b}
    return Converted(parts, lambda k, v: torch.cat((k.transpose(1, 2), v), 1).reshape(tensor.shape))


def _qkvz(tensor: Tensor, config: Any, layer: str) -> Converted:
    heads, values = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    sizes = [config.linear_key_head_dim] * 2 + [values * config.linear_value_head_dim] * 2
    q, k, v, z = torch.split(tensor.view(heads, sum(sizes), -1), sizes, 1)
    qkv = torch.cat([part.reshape(-1, tensor.shape[1]) for part in (q, k, v)])

    def back(qkv: Tensor, z: Tensor) -> Tensor:
        rows = [heads * size for size in sizes[:3]]
        parts = [part.view(heads, -1, tensor.shape[1]) for part in (*torch.split(qkv, rows), z)]
        return torch.cat(parts, 1).reshape(tensor.shape)

    return Converted(
        {f"{layer}.attn_qkv.weight": qkv, f"{layer}.attn_gate.weight": z.reshape(-1, tensor.shape[1])}, back
    )


def _tiled(tensor: Tensor, dim: int, config: Any, size: int, *, back: bool = False) -> Tensor:
    """Value heads, grouped by key head, in tiled order; `back`: the reverse."""
    keys, per = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    first, second = (per, keys) if back else (keys, per)
    shape = tensor.shape
    heads = tensor.reshape(*shape[:dim], first, second, size, *shape[dim + 1 :])
    return heads.transpose(dim, dim + 1).reshape(shape)


def _with_linear_attention(name: str, stored: str, tensor: Tensor, config: Any, architecture: str) -> Converted:
    tiled = architecture == "qwen35moe"
    size, before = config.linear_value_head_dim, 2 * config.linear_num_key_heads * config.linear_key_head_dim

    def moved(t: Tensor, back: bool) -> Tensor:
        if not tiled or "linear_attn" not in name or name.endswith("norm.weight"):
            return t
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            return torch.cat((t[:before], _tiled(t[before:], 0, config, size, back=back)))
        if name.endswith("out_proj.weight"):
            return _tiled(t, 1, config, size, back=back)
        return _tiled(t, 0, config, size if name.endswith("in_proj_z.weight") else 1, back=back)

    if name.endswith("A_log"):
        return Converted({stored: moved(-torch.exp(tensor), False)}, lambda t: moved(torch.log(-t), True))
    if name.endswith("conv1d.weight"):
        return Converted({stored: moved(tensor.squeeze(1), False)}, lambda t: moved(t, True)[:, None])
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return Converted({stored: tensor + 1}, lambda t: t - 1)
    return Converted({stored: moved(tensor, False)}, lambda t: moved(t, True))
