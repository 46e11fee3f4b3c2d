"""Fuses the experts of exported programs: finds expert regions, recognizes, packs and replaces them."""

from .fuser import ExpertFuser, FusionOptions
from .fusing_partitioner import FusingPartitioner
from .recognize import ExpertLayout
from .regions import NotFusable
from .report import FusedLayer, FusionReport, UnfusedRegion

__all__ = [
    "ExpertFuser",
    "ExpertLayout",
    "FusedLayer",
    "FusingPartitioner",
    "FusionOptions",
    "FusionReport",
    "NotFusable",
    "UnfusedRegion",
]
