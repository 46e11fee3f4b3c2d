"""Architectures of GGUF files: names of tensors, as transformers has them, and how their values differ.

Source: `constants.py` and `tensor_mapping.py` of the package gguf; llama.cpp's conversion scripts; transformers'
`integrations/gguf`, for Qwen3.5-MoE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .changes import SAME, Change, grouped_heads, interleaved_projections, pairs_to_halves


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
        whole: stored part and kind, such as "attn_sinks.weight" -> name below a layer, which has no kind.
        stacked: True if transformers has the experts stacked and transposed, gate and up in alternating columns, with
            biases.
        plus_one: True if norms, but those of linear attention, are stored plus one.
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
    whole: Mapping[str, str] = field(default_factory=dict)
    stacked: bool = False
    plus_one: bool = False


_USUAL = ("mlp.experts", "gate_proj", "up_proj", "down_proj")
_AFTER_ATTENTION = {"post_attention_norm": "post_attention_layernorm"}
_LATENTS = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
_LINEAR_ATTENTION = {
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_DECAYS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
ARCHITECTURES = {
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _USUAL, "num_experts", "moe_intermediate_size", "mlp.gate",
        {"norm_topk_prob": True},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _USUAL, "num_experts", "moe_intermediate_size", "mlp.gate",
        {"norm_topk_prob": False}, shared="mlp.shared_expert",
    ),
    "qwen3next": Architecture(
        "qwen3_next", "Qwen3NextForCausalLM", _USUAL, "num_experts", "moe_intermediate_size", "mlp.gate",
        {"norm_topk_prob": True}, shared="mlp.shared_expert", plus_one=True, whole=_DECAYS,
        names={**_AFTER_ATTENTION, **_LINEAR_ATTENTION, "ssm_in": "linear_attn.in_proj_qkvz",
               "ssm_ba": "linear_attn.in_proj_ba"},
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _USUAL, "num_experts", "moe_intermediate_size", "mlp.gate",
        {}, shared="mlp.shared_expert", plus_one=True, whole=_DECAYS,
        names={**_AFTER_ATTENTION, **_LINEAR_ATTENTION, "attn_qkv": "linear_attn.in_proj_qkv",
               "attn_gate": "linear_attn.in_proj_z", "ssm_alpha": "linear_attn.in_proj_a",
               "ssm_beta": "linear_attn.in_proj_b"},
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
        names=_AFTER_ATTENTION, whole={"attn_sinks.weight": "self_attn.sinks"}, stacked=True,
    ),
    # DeepSeek-V2 has this architecture too, but routes by softmax; see `configurations`.
    "deepseek2": Architecture(
        "deepseek_v3", "DeepseekV3ForCausalLM", _USUAL, "n_routed_experts", "moe_intermediate_size", "mlp.gate",
        {"attention_bias": False}, shared="mlp.shared_experts", names=_LATENTS, whole=_CORRECTION,
    ),
    "glm4moe": Architecture(
        "glm4_moe", "Glm4MoeForCausalLM", _USUAL, "n_routed_experts", "moe_intermediate_size", "mlp.gate",
        {}, shared="mlp.shared_experts", names=_AFTER_ATTENTION, whole=_CORRECTION,
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
_NAME = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)(?:\.(?P<kind>weight|bias))?$")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
GATE_AND_UP = "ffn_gate_up_exps"
"""A tensor [E, 2I, H] of gate and up, as some files have it. Here it counts as one of 2E experts of I rows."""
_SHARED = {"ffn_gate_shexp": "gate_proj", "ffn_up_shexp": "up_proj", "ffn_down_shexp": "down_proj"}
_NORMS = ("output_norm", "attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm")


class Part(NamedTuple):
    """A stored tensor that is one of several in a weight of the model: name of the weight, and role in it."""

    weight: str
    role: str


def expert_names(name: str, architecture: Architecture, count: int) -> list[str] | None:
    """Names of the matrices that a tensor of `count` stacked experts holds; None for other tensors."""
    match = _NAME.match(name)
    if match is None or match["kind"] != "weight" or architecture.stacked:
        return None
    prefix, *projections = architecture.experts
    if match["part"] == GATE_AND_UP:
        kept = [(expert, projection) for expert in range(count // 2) for projection in projections[:2]]
    elif match["part"] in _EXPERTS:
        kept = [(expert, projections[_EXPERTS.index(match["part"])]) for expert in range(count)]
    else:
        return None
    return [f"model.layers.{match['layer']}.{prefix}.{expert}.{projection}.weight" for expert, projection in kept]


def part_of(name: str, architecture: Architecture) -> Part | None:
    """The weight that a tensor is a part of, and its role there; None for other tensors.

    Roles are "gate", "up" and "down" of stacked experts; "keys" and "values" of the latents' projection; "qkv" and
    "gates" of Qwen3-Next's projections.
    """
    match = _NAME.match(name)
    if match is None:
        return None
    layer = f"model.layers.{match['layer']}."
    if architecture.stacked and match["part"] in _EXPERTS:
        prefix, *projections = architecture.experts
        index = _EXPERTS.index(match["part"])
        bias = "_bias" if match["kind"] == "bias" else ""
        return Part(f"{layer}{prefix}.{projections[index]}{bias}", ("gate", "up", "down")[index])
    roles = {}
    if architecture.model_type == "deepseek_v3":
        roles = {"attn_k_b": ("self_attn.kv_b_proj", "keys"), "attn_v_b": ("self_attn.kv_b_proj", "values")}
    if architecture.model_type == "qwen3_next":
        roles = {"attn_qkv": ("linear_attn.in_proj_qkvz", "qkv"), "attn_gate": ("linear_attn.in_proj_qkvz", "gates")}
    if match["part"] not in roles:
        return None
    weight, role = roles[match["part"]]
    return Part(f"{layer}{weight}.{match['kind']}", role)


def name_in_model(name: str, architecture: Architecture) -> str | None:
    """Name of a tensor in transformers' checkpoints; None if the model has no such tensor."""
    match = _NAME.match(name)
    if match is None:
        return None
    layer, part, kind = match["layer"], match["part"], match["kind"]
    if layer is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP and kind else None
    if (whole := architecture.whole.get(f"{part}.{kind}" if kind else part)) is not None:
        return f"model.layers.{layer}.{whole}"
    names = {**_LAYER, "ffn_gate_inp": architecture.router, **architecture.names}
    if architecture.shared:
        names["ffn_gate_inp_shexp"] = f"{architecture.shared}_gate"
        names |= {key: f"{architecture.shared}.{projection}" for key, projection in _SHARED.items()}
    return f"model.layers.{layer}.{names[part]}.{kind}" if part in names and kind else None


def layer_of(name: str) -> int:
    """Number of the layer that a tensor belongs to; -1 if it belongs to none."""
    match = re.match(r"^blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def shape_in_model(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a stored tensor has in transformers."""
    if name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1:
        return (1, *shape)
    return (shape[0], 1, shape[1]) if name.endswith("ssm_conv1d.weight") and len(shape) == 2 else shape


def change_of(name: str, architecture: Architecture, config: Mapping[str, Any], rows: int) -> Change:
    """What makes the model's tensor of a stored one with this number of rows."""
    match = _NAME.match(name)
    if match is None:
        return SAME
    part = match["part"]
    if architecture.plus_one and part in _NORMS:
        return Change(plus=-1.0)
    if architecture.paired and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads"] if part == "attn_q" else config["num_key_value_heads"]
        return Change(rows=pairs_to_halves(heads, rows))
    if part == "ssm_a" and architecture.model_type == "qwen3_next":
        return Change(log=True)
    if architecture.model_type != "qwen3_5_moe_text":
        return SAME
    size = config["linear_value_head_dim"]
    before = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    changes = {
        "ssm_a": Change(grouped_heads(config, 1), log=True),
        "ssm_dt": Change(grouped_heads(config, 1)),
        "ssm_alpha": Change(grouped_heads(config, 1)),
        "ssm_beta": Change(grouped_heads(config, 1)),
        "attn_gate": Change(grouped_heads(config, size)),
        "attn_qkv": Change(grouped_heads(config, size, before)),
        "ssm_conv1d": Change(grouped_heads(config, size, before)),
        "ssm_out": Change(columns=grouped_heads(config, size)),
    }
    return changes.get(part, SAME)


def joined_rows(architecture: Architecture, config: Mapping[str, Any]) -> Change:
    """The order of the rows of a weight whose parts are "qkv" and "gates"."""
    assert architecture.model_type == "qwen3_next"
    return Change(rows=interleaved_projections(config))
