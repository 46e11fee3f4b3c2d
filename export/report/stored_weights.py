"""The lines of an export about its checkpoint: tensors that are left out, and codes that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from executorch_moe.backends.fusion import FusedLayer
from executorch_moe.export.checkpoint.plan import below
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.models.linears import stored_int4
from executorch_moe.export.options import ExportOptions
from executorch_moe.kernels import SCHEMES


def stored_weights(streamed: StreamedModel, records: Sequence[FusedLayer], options: ExportOptions) -> list[str]:
    """What an export leaves out of a checkpoint, and what it does with quantized weights; a line for each, if any.

    Args:
        streamed: the model; not yet changed by `build.prepare_`.
        records: of its packed layers.
        options: of the export.
    """
    lines = _left_out(streamed.plan.left_out)
    if streamed.shards.format is None:
        return lines
    return [
        *lines,
        f"stored as {streamed.shards.format}: {'; '.join([*_experts(records), *_linears(streamed, options)])}",
    ]


def _left_out(names: Sequence[str]) -> list[str]:
    """A line with the first parts of the names of tensors, and how many there are of each."""
    found: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        group = ".".join(parts[: 2 if parts[0] == "model" else 1])
        found[group] = found.get(group, 0) + 1
    counts = [f"{group}.* ({_counted(count, 'tensor')})" for group, count in found.items()]
    return [f"left out, not of the text model: {', '.join(counts)}"] if counts else []


def _experts(records: Sequence[FusedLayer]) -> list[str]:
    found = []
    for kind in dict.fromkeys((layer.algorithm, layer.scheme, layer.group_size) for layer in records):
        layers = [layer for layer in records if (layer.algorithm, layer.scheme, layer.group_size) == kind]
        algorithm, scheme, group_size = kind
        kept, _, rest = algorithm.partition(", ")
        if kept == "kept":
            scales = "scales exact" if SCHEMES[scheme].microscaled else "scales rounded to bf16"
            how = f"with codes kept as {scheme}, groups of {group_size}, {scales}"
            how = f"{how}, matrices of other types rounded again with {rest}" if rest else how
        elif algorithm:
            how = f"rounded again to {scheme}, groups of {group_size}, {algorithm}"
        else:
            how = f"converted to {scheme}"
        error = max(layer.error or 0.0 for layer in layers)
        found.append(f"{_counted(len(layers), 'expert layer')} {how}, relative error {error:.1e}")
    return found


def _linears(streamed: StreamedModel, options: ExportOptions) -> list[str]:
    kept, again = 0, Counter[str]()
    for target, source in streamed.plan.sources.items():
        if any(below(target, layer.name) for layer in streamed.layers):
            continue
        if streamed.shards.tensors[source.all_names()[0]].encoding is None:
            continue
        name = target.rpartition(".")[0]
        module: nn.Module = streamed.model.get_submodule(name)
        kind = options.dense.kind_of(name) if type(module) is nn.Linear else "none"
        if stored_int4(module) and kind == "int4":
            kept += 1
        else:
            again[kind] += 1
    found = [f"{_counted(kept, 'linear layer')} with codes kept as int4"] if kept else []
    for kind, number in again.items():
        then = "" if kind == "none" else f", then quantized to {kind}"
        found.append(f"{_counted(number, 'linear layer')} dequantized to {options.target.dtype}{then}")
    return found


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
