"""The config.json of a GGUF file, from its metadata.

transformers' own conversion of configurations is not used: it lacks most architectures with experts.

Source: `set_gguf_parameters` of llama.cpp's conversion scripts; its `llm_build_deepseek2` and `llama_context` (YaRN).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .architectures import ARCHITECTURES

_SIGMOID = 2
"""`expert_gating_func` of routers that take the sigmoid of each expert's logit."""
SAFETENSORS = "use the model's safetensors"


class Metadata:
    """Metadata of a file by names without the architecture.

    Attributes:
        name: of the architecture.
        tensors: names of all tensors.
    """

    def __init__(self, values: Mapping[str, Any], tensors: set[str]) -> None:
        self.values, self.tensors = values, tensors
        self.name: str = values["general.architecture"]

    def __call__(self, key: str, *default: Any) -> Any:
        """A value; raises KeyError if it is missing and no default is given."""
        full = f"{self.name}.{key}"
        value = self.values.get(full, *default) if default else self.values[full]
        # The decimal fraction that was rounded to 32 bits: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def refuse(self, key: str, accepted: str) -> NotImplementedError:
        """The error for a value that is not supported."""
        found = self(key, None)
        return NotImplementedError(
            f"{self.name}.{key}{' is missing, which' if found is None else f'={found!r}'} is not supported (only "
            f"{accepted}): {SAFETENSORS}"
        )


def configuration(metadata: Mapping[str, Any], names: set[str], vocabulary: int) -> dict[str, Any]:
    """The config.json of a file.

    Args:
        metadata: key -> value.
        names: of all tensors.
        vocabulary: number of rows of the embedding.

    Raises:
        NotImplementedError: an architecture, a router, or scaling of positions, that is not supported.
        KeyError: a parameter that is missing.
    """
    of = Metadata(metadata, names)
    if of.name not in ARCHITECTURES or not any("_exps." in tensor for tensor in names):
        raise NotImplementedError(
            f"architecture {of.name!r} is not supported yet, or has no experts in this file (supported: "
            f"{', '.join(ARCHITECTURES)}, with experts): {SAFETENSORS}"
        )
    kind = ARCHITECTURES[of.name]
    heads = of("attention.head_count")
    width = of("expert_feed_forward_length", None) or of("feed_forward_length")
    config = {
        "model_type": kind.model_type,
        "architectures": [kind.model_class],
        "vocab_size": vocabulary,
        "hidden_size": of("embedding_length"),
        "num_hidden_layers": of("block_count") - prediction_layers(metadata),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(of),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        "num_experts_per_tok": of("expert_used_count"),
        kind.num_experts: of("expert_count"),
        **kind.constants,
    }
    config.setdefault("intermediate_size", of("feed_forward_length", width))
    config[kind.width] = width
    if (head_dim := of("attention.key_length", None)) is not None or kind.model_type == "qwen3_moe":
        config["head_dim"] = head_dim or config["hidden_size"] // heads
    if (window := of("attention.sliding_window", None)) is not None:
        config["sliding_window"] = window
    for token in ("bos", "eos", "padding"):
        config[f"{token.replace('padding', 'pad')}_token_id"] = metadata.get(f"tokenizer.ggml.{token}_token_id")
    if of.name in _OTHERS:
        _OTHERS[of.name](of, config)
    return config


def prediction_layers(metadata: Mapping[str, Any]) -> int:
    """Number of layers for multi-token prediction, which a file counts as its last layers."""
    return int(metadata.get(f"{metadata['general.architecture']}.nextn_predict_layers", 0))


_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}


def _rope(of: Metadata) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": of("rope.freq_base", 10000.0)}
    scaling = of("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": of("rope.scaling.factor")}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = of("rope.scaling.original_context_length")
            if of("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
                raise of.refuse("rope.scaling.yarn_ext_factor", "1")
            for name, key in _YARN.items():
                if (value := of(f"rope.scaling.{key}", None)) is not None:
                    rope[name] = value
            if of("rope.scaling.yarn_log_multiplier", 0.0) and of.name != "deepseek2":
                raise of.refuse("rope.scaling.yarn_log_multiplier", "that of deepseek2")
    elif scaling != "none":
        raise of.refuse("rope.scaling.type", "none, linear, yarn")
    return rope


def _shared_expert(of: Metadata, config: dict[str, Any]) -> None:
    config["shared_expert_intermediate_size"] = of("expert_shared_feed_forward_length")


def _linear_attention(of: Metadata, config: dict[str, Any]) -> None:
    """Qwen3-Next: three of four layers have linear attention."""
    _shared_expert(of, config)
    values = of("ssm.time_step_rank")
    config |= {
        "full_attention_interval": of("full_attention_interval", 4),
        "linear_conv_kernel_dim": of("ssm.conv_kernel"),
        "linear_key_head_dim": of("ssm.state_size"),
        "linear_num_key_heads": of("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": of("ssm.inner_size") // values,
    }
    _partial_rotation(of, config)


def _partial_rotation(of: Metadata, config: dict[str, Any]) -> None:
    config["rope_parameters"]["partial_rotary_factor"] = of("rope.dimension_count") / config["head_dim"]


def _qwen35(of: Metadata, config: dict[str, Any]) -> None:
    _linear_attention(of, config)
    sections = [section for section in of("rope.dimension_sections") if section]
    if of("feed_forward_length", None) is None:
        del config["intermediate_size"]
    config["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}


def _gpt_oss(of: Metadata, config: dict[str, Any]) -> None:
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False  # as in the published models; files do not say it


def _grouped_router(of: Metadata, config: dict[str, Any]) -> None:
    """A router by sigmoid whose experts may be in groups. A file without groups has one, as in llama.cpp."""
    if of("expert_gating_func", 0) != _SIGMOID:
        raise of.refuse("expert_gating_func", f"{_SIGMOID}, sigmoid, as in DeepSeek-V3")
    config |= {
        "n_shared_experts": of("expert_shared_count"),
        "first_k_dense_replace": of("leading_dense_block_count"),
        "routed_scaling_factor": of("expert_weights_scale", 1.0),
        "norm_topk_prob": of("expert_weights_norm", False),
        "n_group": of("expert_group_count", 1),
        "topk_group": of("expert_group_used_count", 1),
    }


def _deepseek(of: Metadata, config: dict[str, Any]) -> None:
    _grouped_router(of, config)
    if of("attention.temperature_scale", 0.0):
        raise of.refuse("attention.temperature_scale", "0")
    rotated = of("rope.dimension_count")
    # Earlier files have one key and value for each head, later ones the latents as a single one.
    keys, values = of("attention.key_length_mla", None), of("attention.value_length_mla", None)
    config.pop("head_dim", None)
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": of("attention.q_lora_rank", None),
        "kv_lora_rank": of("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": (keys or of("attention.key_length")) - rotated,
        "v_head_dim": values or of("attention.value_length"),
    }
    if multiplier := of("rope.scaling.yarn_log_multiplier", 0.0):
        # A tenth of mscale_all_dim. mscale is equal to it in all models that llama.cpp converts.
        mscale = round(10 * multiplier, 6)
        config["rope_parameters"] |= {"mscale": mscale, "mscale_all_dim": mscale}


def _glm(of: Metadata, config: dict[str, Any]) -> None:
    _grouped_router(of, config)
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["attention_bias"] = "blk.0.attn_q.bias" in of.tensors
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in of.tensors
    _partial_rotation(of, config)


_OTHERS: dict[str, Callable[[Metadata, dict[str, Any]], None]] = {
    "qwen2moe": _shared_expert,
    "qwen3next": _linear_attention,
    "qwen35moe": _qwen35,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek,
    "glm4moe": _glm,
}
"""Architecture -> function that adds to the configuration."""
