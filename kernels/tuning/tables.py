"""The checked-in configuration tables: one JSON file for each GPU, written by `executorch-moe tune`.

A file has a list of layers. Each has its key (sizes and scheme), `made_by` (GPU, versions, command), and three lists of
configurations: `matvec` and `few_tokens` by T, and `grouped` by the mean number of pairs of an expert, T * top_k / E.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.schemes import SCHEMES, Scheme
from executorch_moe.kernels.shapes import LayerShape

from .configs import GemmConfig, MatvecConfig

FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class TunedRow:
    """Configurations for up to `up_to` tokens (few_tokens) or mean pairs of an expert (grouped), included."""

    up_to: float
    gemm1: GemmConfig
    gemm2: GemmConfig


@dataclass(frozen=True)
class MatvecRow:
    """Configurations of the matrix-vector path for up to `up_to` tokens, included."""

    up_to: float
    gemm1: MatvecConfig
    gemm2: MatvecConfig


@dataclass(frozen=True)
class TunedLayer:
    """Configurations of one layer on one GPU, in ascending rows. Each path is for more tokens than the one before."""

    matvec: tuple[MatvecRow, ...]
    few_tokens: tuple[TunedRow, ...]
    grouped: tuple[TunedRow, ...]


def table_path(gpu: Gpu) -> Path:
    """File of a GPU. Products with the same architecture and number of multiprocessors share it."""
    return FOLDER / f"sm_{gpu.capability}_{gpu.num_sms}_sms.json"


def layer_key(scheme: Scheme, layer: LayerShape) -> dict[str, Any]:
    """Key of a layer with padded sizes in a table."""
    return {"scheme": scheme.name, **asdict(layer)}


def find_table(gpu: Gpu, scheme: Scheme, layer: LayerShape) -> TunedLayer | None:
    """The table entry of a layer; None if the GPU has no table, or the table no such entry.

    A layer in mxfp4 without an entry has that of the same layer in w4a16.
    """
    layers = _read(table_path(gpu))
    found = layers.get(_frozen(layer_key(scheme, layer)))
    if found is None and scheme.microscaled:
        found = layers.get(_frozen(layer_key(SCHEMES["w4a16"], layer)))
    return found


def _frozen(key: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(key.items()))


@functools.cache
def _read(path: Path) -> dict[tuple[tuple[str, Any], ...], TunedLayer]:
    if not path.is_file():
        return {}
    layers = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["layers"]:
        matvec = tuple(
            MatvecRow(row["up_to"], MatvecConfig(**row["gemm1"]), MatvecConfig(**row["gemm2"]))
            for row in entry.get("matvec", [])  # tables of before have none
        )
        lists = (
            tuple(TunedRow(row["up_to"], GemmConfig(**row["gemm1"]), GemmConfig(**row["gemm2"])) for row in entry[name])
            for name in ("few_tokens", "grouped")
        )
        layers[_frozen(entry["layer"])] = TunedLayer(matvec, *lists)
    return layers
