"""Prints the perplexity of the tiny model from 4-bit checkpoints, with codes kept and rounded again.

    python examples/stored_codes.py [--windows N]      (CPU, about 5 minutes)

This is the second table of docs/quality.md. The experts are quantized as GPTQ and AWQ store them: 16 values between the
smallest and the largest of a group, fp16 scales, integer zero points; and in MXFP4. From these, the experts are packed
with the same codes, or dequantized and rounded to 4 bits again. The text is that of `quality.py`.
"""

from __future__ import annotations

import argparse
import math
import platform

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.examples.quality import WINDOW, WINDOWS, Logits, perplexity, windows
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.quantize.experts import quantize_experts_
from executorch_moe.export.quiet import quiet
from executorch_moe.kernels import FusedExperts, Int4Codes, Mxfp4Codes, pack_codes, unpack_experts
from executorch_moe.kernels.packing import quantize_mxfp4

GROUP_SIZES = (32, 64)
CHECKPOINTS = {**{f"4 bits, groups of {group_size}": group_size for group_size in GROUP_SIZES}, "MXFP4": None}
"""Name -> group size of 4-bit integers, or None."""
Stored = dict[str, tuple[Int4Codes | Mxfp4Codes, Int4Codes | Mxfp4Codes]]
"""Name of an experts module -> codes of gate and up, and of down."""
AGAIN = (("minmax", 32), ("minmax", 64), ("hqq", 32), ("hqq", 64))


def stored(weight: Tensor, group_size: int | None) -> Int4Codes | Mxfp4Codes:
    """Codes that a checkpoint has for a weight [E, N, K]; scales and zero points are exact in fp32. None: MXFP4."""
    if group_size is None:
        return quantize_mxfp4(weight)
    grouped = weight.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero_point = (-low / scale).round().clamp(0, 15)
    q = ((grouped / scale[..., None]).round() + zero_point[..., None]).clamp(0, 15) - 8
    return Int4Codes(q.flatten(-2).to(torch.int8), scale, (8 - zero_point) * scale)


@torch.no_grad()
def checkpoint(group_size: int | None) -> tuple[nn.Module, Stored]:
    """The tiny model with the values of a checkpoint, and the codes of each experts module: (gate and up, down)."""
    model = load_model(resolve("tiny"), torch.float32)
    codes: Stored = {}
    for name, experts in find_experts(model):
        codes[name] = stored(experts.gate_up_proj, group_size), stored(experts.down_proj, group_size)
        for weight, code in zip((experts.gate_up_proj, experts.down_proj), codes[name], strict=True):
            weight.copy_(code.dequantize())
    return model, codes


def keep_(model: nn.Module, codes: Stored) -> nn.Module:
    """Packs the experts with the codes of the checkpoint, in place."""
    for name, (gate_up, down) in codes.items():
        parent, _, attribute = name.rpartition(".")
        scheme = "mxfp4" if isinstance(down, Mxfp4Codes) else "w4a16"
        packed = pack_codes(gate_up.rounded(), down.rounded(), scheme=scheme)
        setattr(model.get_submodule(parent), attribute, FusedExperts(packed))
    return model


@torch.no_grad()
def error(model: nn.Module, codes: Stored) -> float:
    """Relative L2 error of packed experts against the values of the checkpoint."""
    change = size = 0.0
    for name, matrices in codes.items():
        found = unpack_experts(model.get_submodule(name).packed())
        for value, exact in zip(found, (code.dequantize() for code in matrices), strict=True):
            change += float((value - exact).square().sum())
            size += float(exact.square().sum())
    return math.sqrt(change / size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the perplexity of the tiny model from 4-bit checkpoints.")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"windows of {WINDOW} bytes; default {WINDOWS}")
    quiet()
    data = windows(parser.parse_args().windows)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    columns = ("checkpoint", "experts", "error", "perplexity", "to checkpoint")
    table = Table(*columns, title=f"perplexity per byte; {data.shape[0]} windows of {WINDOW} bytes, {versions}")
    for name, group_size in CHECKPOINTS.items():
        model, codes = checkpoint(group_size)
        baseline = perplexity(Logits(model), data)
        table.add_row(name, "dequantized", "", f"{baseline:.4f}", "")
        packed = [("codes kept", keep_(model, codes))]
        for algorithm, size in AGAIN:
            model, _ = checkpoint(group_size)
            how = f"rounded again, {algorithm}, groups of {size}"
            packed.append((how, quantize_experts_(model, "w4a16", size, algorithm)))
        for how, fused in packed:
            found = perplexity(Logits(fused), data)
            table.add_row(name, how, f"{error(fused, codes):.2%}", f"{found:.4f}", f"{found / baseline - 1:+.2%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
