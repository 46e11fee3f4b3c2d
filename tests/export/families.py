"""Tiny random models of several families, each with the reason to test it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """A model family: class prefix in transformers, and its options in addition to COMMON.

    `configuration` is the prefix of its configuration, if that is another one.
    """

    name: str
    prefix: str
    options: dict[str, Any]
    moe_layers: int = 1
    configuration: str = ""

    def __str__(self) -> str:
        return self.name

    def config(self) -> Any:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, f"{self.configuration or self.prefix}Config")(**{**COMMON, **self.options})

    def model(
        self, experts: str = "grouped_mm", dtype: torch.dtype = torch.float32, attention: str | None = None
    ) -> nn.Module:
        """A model with random weights; those of the experts are exact in 4 bits with group size 32.

        Args:
            experts, attention: transformers' `experts_implementation` and `attn_implementation`; None: default.
        """
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, f"{self.prefix}ForCausalLM")
        model = cls._from_config(
            self.config(), experts_implementation=experts, **({"attn_implementation": attention} if attention else {})
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    codes = torch.tensor([-7.0, -3.0, -1.0, 1.0, 3.0, 7.0])
                    parameter.copy_(codes[torch.randint(0, len(codes), parameter.shape)] / 32)
                elif self in RECURRENT and parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))  # norms and gates, which start all alike
        return model.to(dtype).eval()


FAMILIES = (
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        {**FEW, "num_experts": 4, "head_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        moe_layers=2,
    ),
    # a shared expert with its gate
    Family(
        "qwen2_moe",
        "Qwen2Moe",
        {**FEW, "num_experts": 4, "intermediate_size": 64, "shared_expert_intermediate_size": 32},
    ),
    Family("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}),
    # routing weights that do not sum to 1
    Family("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32}),
    # one dense layer, then groups of experts, a bias in the router, shared experts; another attention
    Family(
        "deepseek_v3",
        "DeepseekV3",
        {
            **FEW,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    Family(
        "glm4_moe",
        "Glm4Moe",
        {
            **FEW,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "head_dim": 32,
        },
    ),
    # biases, interleaved gate and up, clamped swiglu, weights stored [E, in, out]
    Family(
        "gpt_oss",
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 32},
    ),
)


# Three layers of gated delta rule, then one of full attention with an output gate and partial RoPE; a shared expert.
GATED_DELTA_RULE: dict[str, Any] = {
    **FEW,
    "num_experts": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
WINDOWS_OF_THREE = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "sliding_window": 6,
}
LATENTS = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
ROUTED = {**FEW, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "intermediate_size": 64}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}

FURTHER = (
    # latent attention, one dense layer
    Family(
        "glm4_moe_lite",
        "Glm4MoeLite",
        {**ROUTED, **LATENTS, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    ),
    # layer norms with biases, a router that masks near-ties
    Family("phimoe", "Phimoe", {**LOCAL}),
    # factors of embedding, residual and logits
    Family(
        "granitemoe",
        "GraniteMoe",
        {**LOCAL, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    ),
    Family("granitemoeshared", "GraniteMoeShared", {**LOCAL, "shared_intermediate_size": 32}),
    # a rotation of interleaved pairs, a correction of the router's choice
    Family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        {
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    # a norm of all heads together, partial rotation
    Family("minimax_m2", "MiniMaxM2", {**LOCAL, "head_dim": 32}),
    # norms of heads as in Qwen3, the router of DeepSeek-V3
    Family("dots1", "Dots1", {**ROUTED, "num_hidden_layers": 2, "first_k_dense_replace": 1, "head_dim": 32}),
    # norms of heads after the rotation
    Family(
        "hunyuan_v1_moe", "HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "intermediate_size": 32, "head_dim": 32}
    ),
    # norms after attention and MLP
    Family("flex_olmo", "FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    # sliding windows with a rotation, full attention without
    Family(
        "exaone_moe",
        "ExaoneMoe",
        {
            **FEW,
            **WINDOWS_OF_THREE,
            "num_experts": 4,
            "num_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "intermediate_size": 64,
            "head_dim": 32,
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        },
        moe_layers=3,
    ),
    Family("solar_open", "SolarOpen", {**ROUTED, "head_dim": 32}),
    # four norms in a layer, a gate after attention
    Family(
        "afmoe",
        "Afmoe",
        {
            **FEW,
            **WINDOWS_OF_THREE,
            "num_experts": 4,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "intermediate_size": 64,
            "head_dim": 32,
        },
        moe_layers=3,
    ),
    # attention and MLP side by side, layer norms without biases
    Family(
        "cohere2_moe",
        "Cohere2Moe",
        {**FEW, **WINDOWS_OF_THREE, "num_experts": 4, "intermediate_size": 32, "head_dim": 32},
        moe_layers=4,
    ),
    # latent attention, a rotation by complex numbers
    Family("deepseek_v2", "DeepseekV2", {**ROUTED, **LATENTS, "num_hidden_layers": 2, "first_k_dense_replace": 1}),
)
"""Families that are tested in plain PyTorch and as CPU artifacts, but not in every mode of `FAMILIES`."""

RECURRENT = (
    Family("qwen3_5_moe_text", "Qwen3_5Moe", GATED_DELTA_RULE, moe_layers=4, configuration="Qwen3_5MoeText"),
    # projections that interleave the parts of each key head
    Family("qwen3_next", "Qwen3Next", GATED_DELTA_RULE, moe_layers=4),
)
"""Families with recurrent layers, which can be exported for a changing length within `any_length` only."""


def by_name(name: str) -> Family:
    return next(family for family in (*FAMILIES, *FURTHER, *RECURRENT) if family.name == name)


class Logits(nn.Module):
    """A causal language model without cache: token ids [1, T] -> logits [1, T, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, COMMON["vocab_size"], (1, count), generator=torch.Generator().manual_seed(count))


def export_logits(model: nn.Module, strict: bool = False, dynamic: bool = True, length: int = 7) -> Any:
    """Logits(model) exported with T from 2 to 64, or fixed."""
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=64)}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(Logits(model), (tokens(length),), strict=strict, dynamic_shapes=shapes)


@torch.no_grad()
def operations(program: Any) -> list[tuple[str, ...]]:
    """Operations of a program, to compare programs: each call with its arguments, values by number, inputs by name.

    It omits unused inputs and names of nodes.
    """
    program = program.run_decompositions()
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {
        name: f"constant {program.constants[target].tolist()}"
        for name, target in signature.inputs_to_lifted_tensor_constants.items()
    }
    known: dict[torch.fx.Node, str] = {}
    found = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            known[node] = {**inputs, **constants}.get(node.name, node.name)
            continue
        known[node] = f"%{len(found)}"
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: known[arg])
        found.append((str(node.target), str(args), str(kwargs)))
    return found
