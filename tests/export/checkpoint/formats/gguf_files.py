"""Writes a model as a GGUF file, by the package gguf. Its `dequantize` gives the right values.

The package does not quantize to K-quants, so that their blocks are random bytes with scales of a usual magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from .stored import tiny_model

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="needs the package gguf")
TYPES = gguf.GGMLQuantizationType
SIZE = 256  # the values in a block of K-quants
BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
"""K-quants: bytes of a block, and where fp16 scales are."""


def quantized(weight: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """Stored blocks, and their values."""
    array = weight.numpy()
    if kind in BLOCKS:
        nbytes, scales = BLOCKS[kind]
        shape = (*weight.shape[:-1], weight.shape[-1] // SIZE, nbytes)
        blocks = np.random.default_rng(weight.numel()).integers(0, 256, shape, dtype=np.uint8)
        for place, value in zip(scales, (1e-4 if kind != "Q6_K" else 2e-5, 1e-3), strict=False):
            blocks[..., place : place + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)
        stored = blocks.reshape(*weight.shape[:-1], -1)
    else:
        stored = gguf.quants.quantize(array, TYPES[kind])
    return stored, torch.from_numpy(gguf.quants.dequantize(stored, TYPES[kind]).copy())


@dataclass(frozen=True)
class Written:
    """A GGUF file, transformers' model on its values, and its stored blocks by name in the file."""

    path: Path
    reference: Any
    blocks: dict[str, np.ndarray]


QWEN3 = {
    "embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "router": "ffn_gate_inp",
    "shared_expert_gate": "ffn_gate_inp_shexp", "shared_expert.gate_proj": "ffn_gate_shexp",
    "shared_expert.up_proj": "ffn_up_shexp", "shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip


def name_in_file(name: str) -> str:
    """Name of a tensor outside of the experts."""
    if name.endswith("sinks"):
        return f"blk.{name.split('.')[2]}.attn_sinks.weight"
    stem, kind = name.rsplit(".", 1)
    part = next(QWEN3[end] for end in sorted(QWEN3, key=len, reverse=True) if f".{stem}".endswith(f".{end}"))
    return f"blk.{name.split('.')[2]}.{part}.{kind}" if ".layers." in name else f"{part}.{kind}"


def write(
    path: Path,
    model: Any,
    kind_of: Callable[[str], str],
    architecture: str = "qwen3moe",
    change: Callable[[Any], object] | None = None,
    most_tensors: int = 0,
) -> Written:
    """Writes a model's file.

    Args:
        kind_of: name in the file -> name of the type.
        change: changes the writer before it writes.
        most_tensors: in one file; 0 for all.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most_tensors)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    experts = next(module for name, module in model.named_modules() if name.endswith("mlp.experts"))
    writer.add_expert_count(experts.gate_up_proj.shape[0])
    writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture.startswith("qwen") or architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if architecture == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if architecture in ("qwen3moe", "gpt-oss"):
        writer.add_key_length(config.head_dim)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    vocabulary = [chr(33 + i) for i in range(config.vocab_size - 3)] + ["cd", "<|end|>", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (config.vocab_size - 2) + [3, 1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(config.vocab_size - 2)
    state = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    plain, blocks = {}, {}

    def add(name: str, tensor: Tensor) -> Tensor:
        kind = kind_of(name) if tensor.dim() > 1 and not name.endswith("bias") else "F32"
        stored, values = quantized(tensor, kind)
        blocks[name] = stored
        floats = kind in ("F32", "F16")
        writer.add_tensor(name, stored, raw_dtype=None if floats else TYPES[kind])
        return values.float()

    for name, tensor in state.items():
        if architecture == "gpt-oss" and ".experts." in name:
            # transformers: [E, K, 2I] or [E, 2I], gate and up in alternating columns
            layer, bias = f"blk.{name.split('.')[2]}", "bias" if name.endswith("bias") else "weight"
            rows = tensor.transpose(1, 2).contiguous() if bias == "weight" else tensor
            if "down" in name:
                values = add(f"{layer}.ffn_down_exps.{bias}", rows)
            else:
                values = torch.empty_like(rows)
                values[:, 0::2] = add(f"{layer}.ffn_gate_exps.{bias}", rows[:, 0::2].contiguous())
                values[:, 1::2] = add(f"{layer}.ffn_up_exps.{bias}", rows[:, 1::2].contiguous())
            plain[name] = values.transpose(1, 2).contiguous() if bias == "weight" else values
        elif name.endswith("experts.gate_up_proj"):
            layer = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2, 1)
            parts = (
                add(f"{layer}.ffn_gate_exps.weight", gate.contiguous()),
                add(f"{layer}.ffn_up_exps.weight", up.contiguous()),
            )
            plain[name] = torch.cat(parts, 1)
        elif name.endswith("experts.down_proj"):
            plain[name] = add(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor)
        elif architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp's permutation (`LlamaModel.permute`)
            paired = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
            values = add(name_in_file(name), paired)
            plain[name] = (
                values.reshape(heads, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
            )
        elif name.endswith("shared_expert_gate.weight"):
            plain[name] = add(name_in_file(name), tensor[0])[None]
        else:
            plain[name] = add(name_in_file(name), tensor)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = path.parent / f"{path.stem}-plain"
    config.save_pretrained(folder)
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Written(path, reference.eval(), blocks)


def big_model() -> Any:
    return tiny_model(hidden_size=SIZE, moe_intermediate_size=SIZE, norm_topk_prob=True, head_dim=128)


def only(kind: str) -> Callable[[str], str]:
    """All matrices but the router in one type."""
    return lambda name: "F32" if "ffn_gate_inp" in name else kind
