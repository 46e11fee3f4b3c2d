"""Tiny checkpoints in formats of quantized weights, and what the exporter makes of them.

Each test module packs the tensors of its format by a library, or by the published definition. This module does what all
formats share: it quantizes to integers, saves a model, and loads transformers' model on the dequantized weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing import deinterleave_gate_up, fragment_order, unpack_int4

from ...families import COMMON, FEW, Logits, by_name, tokens

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

H = WIDTH = 128
LAYERS = "model.layers.0."
GATE = f"{LAYERS}mlp.experts.2.gate_proj"
QUANTIZED = re.compile(r"_proj\.weight$")


@dataclass(frozen=True)
class Integers:
    """A weight [N, K] as integers: value = (q - zero) * scale.

    Attributes:
        q: int64 [N, K], 0 to 15.
        scale: fp16 or bf16 [N, K/group_size].
        zero: int64 [N, K/group_size], 0 to 15.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor

    def values(self) -> Tensor:
        """fp32 [N, K]."""
        grouped = self.q.float().unflatten(-1, (self.scale.shape[-1], -1)) - self.zero.float()[..., None]
        return (grouped * self.scale.float()[..., None]).flatten(-2)


def to_integers(weight: Tensor, group_size: int, *, symmetric: bool, dtype: torch.dtype = torch.float16) -> Integers:
    """Rounds a weight to the nearest of 16 values in each group."""
    grouped = weight.float().unflatten(-1, (-1, group_size))
    if symmetric:
        scale = (grouped.abs().amax(-1) / 7).to(dtype)
        zero = torch.full(scale.shape, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, 15).long()
    q = (grouped / scale.float()[..., None]).round().long() + zero[..., None]
    return Integers(q.clamp(0, 15).flatten(-2), scale, zero)


def original_weights() -> dict[str, Tensor]:
    """Weights of `tiny_model`, one matrix for each expert."""
    state: dict[str, Tensor] = tiny_model().state_dict()
    found = dict(state)
    for e in range(4):
        gate_up, prefix = state[f"{LAYERS}mlp.experts.gate_up_proj"][e], f"{LAYERS}mlp.experts.{e}."
        found |= {f"{prefix}gate_proj.weight": gate_up[:WIDTH], f"{prefix}up_proj.weight": gate_up[WIDTH:]}
        found[f"{prefix}down_proj.weight"] = state[f"{LAYERS}mlp.experts.down_proj"][e]
    return found


Quantize = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""Weight [N, K] -> stored tensors by the end of their names, and the dequantized weight."""


@dataclass(frozen=True)
class Saved:
    """A saved checkpoint.

    Attributes:
        folder: of the checkpoint.
        reference: transformers' model on the dequantized weights, fp32.
        values: name of a quantized weight -> its dequantized values.
    """

    folder: Path
    reference: Any
    values: dict[str, Tensor]


def tiny_model(**options: Any) -> Any:
    """A Qwen3-MoE model whose widths all groups divide."""
    import transformers

    sizes = {
        "hidden_size": H,
        "moe_intermediate_size": WIDTH,
        "num_experts": 4,
        "head_dim": 64,
        "intermediate_size": 64,
    }
    config = transformers.Qwen3MoeConfig(**{**COMMON, **FEW, **sizes, **options})
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM._from_config(config).float().eval()


def save(
    folder: Path,
    quantize: Quantize,
    declaration: dict[str, Any],
    chosen: re.Pattern[str] = QUANTIZED,
    **options: Any,
) -> Saved:
    """Saves a tiny model whose chosen weights are quantized.

    Args:
        folder: of the checkpoint, created.
        quantize: called with each weight whose name matches `chosen`.
        declaration: `quantization_config` of config.json; empty for none.
        options: entries of the model's configuration.
    """
    import transformers

    tiny_model(**options).save_pretrained(folder)
    stored, plain, values = {}, {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if chosen.search(name):
            del stored[name]
            parts, values[name] = quantize(weight)
            plain[name] = values[name].float()
            stored |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if declaration:
        edit_json(folder / "config.json", quantization_config=declaration)
    (folder / "tokenizer.json").write_bytes(tokenizer_file().read_bytes())
    return Saved(folder, reference.eval(), values)


def save_gpt_oss(folder: Path) -> Saved:
    """GPT-OSS with random experts in MXFP4, in the layout that transformers reads."""
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model: Any = by_name("gpt_oss").model()
    model.config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    plain, stored = dict(state), dict(state)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        e, k, n = stored.pop(name).shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 124, (e, n, k // 32), dtype=torch.uint8, generator=generator)
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    (folder / "tokenizer.json").write_bytes(tokenizer_file().read_bytes())
    return Saved(folder, reference.eval(), {})


def tokenizer_file() -> Path:
    """A tokenizer that fits all models here."""
    from executorch_moe.export.models.pretrained import resolve

    return resolve("tiny") / "tokenizer.json"


def edit_json(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes stored tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def streamed(folder: Path, scheme: str = "w4a16", group_size: int = 32) -> StreamedModel:
    return StreamedModel(folder, torch.float32, "eager", FusionOptions(scheme, group_size))


def codes_of(packed: PackedExperts) -> tuple[Tensor, Tensor]:
    """Codes of packed experts in natural order, -8 to 7: gate and up [E, 2I, H], down [E, H, I]."""
    w13 = deinterleave_gate_up(unpack_int4(packed.w13, fragment_order(packed.scheme, 1)))
    halves = w13.unflatten(1, (2, -1))[:, :, : packed.intermediate_size, : packed.hidden_size]
    down = unpack_int4(packed.w2, fragment_order(packed.scheme, 2))
    return halves.flatten(1, 2), down[:, : packed.hidden_size, : packed.intermediate_size]


def of_experts(get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """A property of the experts of the first layer, stacked: of gate and up, and of down. `get` takes a prefix."""
    experts = [f"{LAYERS}mlp.experts.{number}." for number in range(4)]
    gate_up = torch.stack([torch.cat([get(f"{e}gate_proj."), get(f"{e}up_proj.")]) for e in experts])
    return gate_up, torch.stack([get(f"{e}down_proj.") for e in experts])


@torch.no_grad()
def logits_error(model: Any, reference: Any) -> float:
    """Relative L2 error of logits. The experts of a loaded model compute in bf16, everything else in fp32."""
    actual, expected = Logits(model)(tokens(9)), Logits(reference)(tokens(9))
    return float((actual - expected).norm() / expected.norm())


def experts_of(model: StreamedModel, layer: int = 0) -> PackedExperts:
    module: Any = model.model.get_submodule(model.layers[layer].name)
    packed: PackedExperts = module.packed()
    return packed
