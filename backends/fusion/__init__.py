"""Fuses the experts of exported programs: finds expert regions, recognises what they compute, packs and replaces."""

from .fuser import ExpertFuser, FusionOptions
from .partitioner import FusingPartitioner
from .report import FusedLayer, FusionReport, UnfusedRegion

__all__ = [
    "ExpertFuser",
    "FusedLayer",
    "FusingPartitioner",
    "FusionOptions",
    "FusionReport",
    "UnfusedRegion",
]
