"""The checked-in configuration tables: one file a GPU, written by `executorch-moe tune`.

A file is JSON: what made it (GPU, versions, command), and a list of layers, each with its key (sizes and scheme) and
two lists of configurations: `few_tokens` by T, `grouped` by the mean number of pairs of an expert, T * top_k / E.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.schemes import Scheme
from executorch_moe.kernels.shapes import LayerShape

from .configs import GemmConfig

FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class TunedRow:
    """Configurations up to (and including) a number of tokens, or of pairs an expert."""

    up_to: float
    gemm1: GemmConfig
    gemm2: GemmConfig


@dataclass(frozen=True)
class TunedLayer:
    """What was found for one layer on one GPU; rows ascend."""

    few_tokens: tuple[TunedRow, ...]
    grouped: tuple[TunedRow, ...]


def table_path(gpu: Gpu) -> Path:
    """File of a GPU: parts with the same architecture and number of multiprocessors share it."""
    return FOLDER / f"sm_{gpu.capability}_{gpu.num_sms}_sms.json"


def layer_key(scheme: Scheme, layer: LayerShape) -> dict[str, Any]:
    """What identifies a layer in a table."""
    return {"scheme": scheme.name, **asdict(layer)}


def find_table(gpu: Gpu, scheme: Scheme, layer: LayerShape) -> TunedLayer | None:
    """The table's entry for a layer; None if there is no table for this GPU, or no entry."""
    return _read(table_path(gpu)).get(_frozen(layer_key(scheme, layer)))


def _frozen(key: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(key.items()))


@functools.cache
def _read(path: Path) -> dict[tuple[tuple[str, Any], ...], TunedLayer]:
    if not path.is_file():
        return {}
    layers = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["layers"]:
        lists = (
            tuple(TunedRow(row["up_to"], GemmConfig(**row["gemm1"]), GemmConfig(**row["gemm2"])) for row in entry[name])
            for name in ("few_tokens", "grouped")
        )
        layers[_frozen(entry["layer"])] = TunedLayer(*lists)
    return layers
