"""Architectures of GGUF files: configurations and names of tensors, as transformers has them.

transformers' own conversion of configurations is not used: it lacks the width of experts.

Source: `constants.py` and `tensor_mapping.py` of the package gguf; llama.cpp's conversion scripts, for the order of the
rows of queries and keys, and the normalization of routing weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What distinguishes an architecture.

    Attributes:
        model_type, model_class: of transformers.
        experts: prefix of experts below a layer, and the names of gate, up and down.
        num_experts: name of the number of experts in the configuration.
        width: name of the width of experts in the configuration.
        router: name of the router below a layer.
        constants: further entries of the configuration.
        shared: prefix of the shared expert below a layer; "" if there is none.
        paired: True if queries and keys are stored for rotation of neighboring pairs, not of halves as in transformers.
        names: names of further parts of a layer, or of parts with another name than usual.
        stacked: True if transformers has the experts stacked and transposed, gate and up in alternating columns, with
            biases.
    """

    model_type: str
    model_class: str
    experts: tuple[str, str, str, str]
    num_experts: str
    width: str
    router: str
    constants: Mapping[str, Any]
    shared: str = ""
    paired: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    stacked: bool = False


_USUAL = ("mlp.experts", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _USUAL, "num_experts", "moe_intermediate_size", "mlp.gate",
        {"norm_topk_prob": True},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _USUAL, "num_experts", "moe_intermediate_size", "mlp.gate",
        {"norm_topk_prob": False}, shared="mlp.shared_expert",
    ),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", _USUAL, "num_experts", "intermediate_size", "mlp.gate", {"norm_topk_prob": False},
    ),
    # Mixtral: llama.cpp has no architecture of its own for it.
    "llama": Architecture(
        "mixtral", "MixtralForCausalLM", ("block_sparse_moe.experts", "w1", "w3", "w2"), "num_local_experts",
        "intermediate_size", "block_sparse_moe.gate", {}, paired=True,
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM", ("mlp.experts", "gate_up_proj", "gate_up_proj", "down_proj"),
        "num_local_experts", "intermediate_size", "mlp.router", {"attention_bias": True},
        names={"post_attention_norm": "post_attention_layernorm"}, stacked=True,
    ),
}  # fmt: skip
"""`general.architecture` -> architecture. Those without experts in the file are refused."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)$")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_SHARED = {"ffn_gate_shexp": "gate_proj", "ffn_up_shexp": "up_proj", "ffn_down_shexp": "down_proj"}


def expert_names(name: str, architecture: Architecture, count: int) -> list[str] | None:
    """Names of the matrices that a tensor of stacked experts holds; None for other tensors."""
    match = _NAME.match(name)
    if match is None or match["part"] not in _EXPERTS or match["kind"] != "weight" or architecture.stacked:
        return None
    prefix, *projections = architecture.experts
    projection = projections[_EXPERTS.index(match["part"])]
    return [f"model.layers.{match['layer']}.{prefix}.{expert}.{projection}.weight" for expert in range(count)]


def stacked_name(name: str, architecture: Architecture) -> tuple[str, str] | None:
    """Name of the stacked weight or bias that a tensor belongs to, and its role in it: "gate", "up" or "down".

    None for other tensors.
    """
    match = _NAME.match(name)
    if match is None or match["part"] not in _EXPERTS or not architecture.stacked:
        return None
    prefix, *projections = architecture.experts
    index = _EXPERTS.index(match["part"])
    bias = "_bias" if match["kind"] == "bias" else ""
    return f"model.layers.{match['layer']}.{prefix}.{projections[index]}{bias}", ("gate", "up", "down")[index]


def name_in_model(name: str, architecture: Architecture) -> str | None:
    """Name of a tensor in transformers' checkpoints; None if the model has no such tensor."""
    match = _NAME.match(name)
    if match is None:
        return None
    layer, part, kind = match["layer"], match["part"], match["kind"]
    if layer is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP else None
    if architecture.stacked and part == "attn_sinks":
        return f"model.layers.{layer}.self_attn.sinks"
    names = {**_LAYER, "ffn_gate_inp": architecture.router, **architecture.names}
    if architecture.shared:
        names["ffn_gate_inp_shexp"] = f"{architecture.shared}_gate"
        names |= {key: f"{architecture.shared}.{projection}" for key, projection in _SHARED.items()}
    return f"model.layers.{layer}.{names[part]}.{kind}" if part in names else None


def order_of_rows(
    name: str, architecture: Architecture, config: Mapping[str, Any], rows: int
) -> tuple[int, ...] | None:
    """The stored row of each row of the model's tensor; None if the order is the same.

    If a file rotates neighboring pairs, the rows of a head alternate between the two halves that transformers rotates.
    """
    match = _NAME.match(name)
    if not architecture.paired or match is None or match["part"] not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads"] if match["part"] == "attn_q" else config["num_key_value_heads"]
    size = rows // heads
    return tuple(head * size + i for head in range(heads) for start in (0, 1) for i in range(start, size, 2))


def configuration(metadata: Mapping[str, Any], names: set[str], vocabulary: int) -> dict[str, Any]:
    """The config.json of a file.

    Args:
        metadata: key -> value.
        names: of all tensors.
        vocabulary: number of rows of the embedding.

    Raises:
        NotImplementedError: an architecture, or scaling of positions, that is not supported.
        KeyError: a parameter that is missing.
    """
    name = metadata["general.architecture"]
    if name not in ARCHITECTURES or not any("_exps." in tensor for tensor in names):
        raise NotImplementedError(
            f"architecture {name!r} is not supported yet, or has no experts in this file (supported: "
            f"{', '.join(ARCHITECTURES)}, with experts): use the model's safetensors"
        )
    kind = ARCHITECTURES[name]

    def of(key: str, *default: Any) -> Any:
        full = f"{name}.{key}"
        return metadata.get(full, *default) if default else metadata[full]

    heads, hidden = of("attention.head_count"), of("embedding_length")
    width = of("expert_feed_forward_length", None) or of("feed_forward_length")
    config = {
        "model_type": kind.model_type,
        "architectures": [kind.model_class],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(of, name),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        "num_experts_per_tok": of("expert_used_count"),
        kind.num_experts: of("expert_count"),
        **kind.constants,
    }
    config.setdefault("intermediate_size", of("feed_forward_length", width))
    config[kind.width] = width
    if (head_dim := of("attention.key_length", None)) is not None or kind.model_type == "qwen3_moe":
        config["head_dim"] = head_dim or hidden // heads
    if (window := of("attention.sliding_window", None)) is not None:
        config["sliding_window"] = window
    if kind.shared:
        config["shared_expert_intermediate_size"] = of("expert_shared_feed_forward_length")
    for token in ("bos", "eos", "padding"):
        config[f"{token.replace('padding', 'pad')}_token_id"] = metadata.get(f"tokenizer.ggml.{token}_token_id")
    return config


def _rope(of: Any, name: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": of("rope.freq_base", 10000.0)}
    scaling = of("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": of("rope.scaling.factor")}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = of("rope.scaling.original_context_length")
    elif scaling != "none":
        raise NotImplementedError(
            f"{name}.rope.scaling.type={scaling!r} is not supported (only none, linear, yarn): use the model's "
            "safetensors"
        )
    return rope
