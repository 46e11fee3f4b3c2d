"""Weight-only INT8 and INT4 for linear layers, lm_head and the embedding, for CUDA targets; see `models.linears`.

`dense_torchao` does the same for the CPU target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from executorch_moe.export.models.linears import (
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    MergedLinear,
    StoredInt4,
    joined_int4,
    stored_int4,
)

KINDS = ("none", "int8", "int4")
CPU_GROUP_SIZE = 32
"""Inputs that share a scale on the CPU target, for both int8 and int4."""


def stored_formats(
    target: str, kind: str, group_size: int, *, lm_head: str | None = None, embedding: str = "none"
) -> dict[str, str]:
    """Names the storage formats that the kinds mean on a target.

    "int8-per-output" has one scale for each output of a layer, "int8-per-32-inputs" one for each 32 inputs.

    Args:
        target: "cpu" or a CUDA target.
        kind, group_size, lm_head, embedding: as for `quantize_dense_`.

    Returns:
        {"linear", "lm_head", "embedding"} -> "none", "int8-per-output", "int4-per-32-inputs" and so on.
    """
    if target == "cpu":  # torchao's tensors, one kind for all layers
        name = kind if kind == "none" else f"{kind}-per-{CPU_GROUP_SIZE}-inputs"
        return dict.fromkeys(("linear", "lm_head", "embedding"), name)
    names = {"none": "none", "int8": "int8-per-output", "int4": f"int4-per-{group_size}-inputs"}
    rows = "none" if embedding == "none" else f"{embedding}-per-token"
    return {"linear": names[kind], "lm_head": names[lm_head or kind], "embedding": rows}


def _quantized(weight: Tensor, bias: Tensor | None, kind: str, group_size: int, stored: StoredInt4 | None) -> nn.Module:
    if kind == "int8":
        return Int8Linear(weight, bias)
    return Int4Linear(weight, group_size, bias, stored)


def _wanted(name: str, kind: str, lm_head: str | None) -> str:
    """The kind in which to store the linear layer `name`."""
    return (lm_head or kind) if name.rpartition(".")[2] == "lm_head" else kind


def check_widths(module: nn.Module, kind: str, group_size: int, *, lm_head: str | None = None) -> None:
    """Checks the layers that `quantize_dense_` would replace. Weights may be on the meta device.

    Raises:
        ValueError: a group size that does not divide a layer's inputs.
    """
    for name, child in module.named_modules():
        if type(child) is not nn.Linear or _wanted(name, kind, lm_head) != "int4" or stored_int4(child):
            continue
        if child.weight.shape[1] % group_size or group_size % 2:
            raise ValueError(
                f"{name} has {child.weight.shape[1]} inputs, which group_size={group_size} does not divide: "
                "choose another group_size, or dense='int8'"
            )


QKV = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def quantize_dense_(
    module: nn.Module, kind: str, group_size: int = 32, *, lm_head: str | None = None, embedding: str = "none"
) -> nn.Module:
    """Replaces the linear layers of a model, or of a part of it, in place; leaves experts and routers alone.

    A layer that was stored as 4-bit codes keeps them for "int4"; see `StoredInt4`. It merges the query, key and value
    projections of a layer. Replaced layers are left alone, so that it may be called for each layer as it is loaded, and
    for the model at the end.

    Args:
        module: a transformers model or decoder layer.
        kind: "none", "int8" (one scale for each output) or "int4" (one scale for each group_size inputs of an output).
        group_size: inputs that share a scale, for "int4".
        lm_head: the kind of the last layer; None: `kind`.
        embedding: "none" or "int8".

    Returns:
        The same module.

    Raises:
        ValueError: an unknown kind, or a group size that does not divide a layer's inputs. The module is unchanged.
    """
    for what, value, known in (
        ("dense", kind, KINDS),
        ("lm_head", lm_head or kind, KINDS),
        ("embedding", embedding, KINDS[:2]),
    ):
        if value not in known:
            raise ValueError(f"{what}={value!r} is unknown: use one of {', '.join(known)}")
    check_widths(module, kind, group_size, lm_head=lm_head)
    if kind != "none":
        for child in list(module.modules()):
            if all(type(getattr(child, projection, None)) is nn.Linear for projection in QKV):
                _merge_qkv(child, kind, group_size)
    for name, child in list(module.named_modules()):
        wanted = _wanted(name, kind, lm_head)
        if type(child) is nn.Linear and wanted != "none":
            _replace(module, name, _quantized(child.weight, child.bias, wanted, group_size, stored_int4(child)))
        elif type(child) is nn.Embedding and embedding == "int8":
            _replace(module, name, Int8Embedding(child.weight))
    return module


def _merge_qkv(attention: nn.Module, kind: str, group_size: int) -> None:
    linears: list[nn.Linear] = [attention.get_submodule(projection) for projection in QKV]  # type: ignore[misc]
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
    stored = joined_int4(linears)
    whole = _quantized(torch.cat(weights), bias, kind, group_size, stored)
    merged = MergedLinear(whole, [len(weight) for weight in weights])
    for projection, replacement in zip(QKV, (merged, *merged.followers), strict=True):
        setattr(attention, projection, replacement)


def _replace(module: nn.Module, name: str, replacement: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, replacement)
