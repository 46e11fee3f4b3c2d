"""Fused Mixture-of-Experts operators: packing, Triton kernels, fp32 reference. Importing registers the operator."""

from .module import FusedExperts
from .op import fused_experts
from .packing import PackedExperts, pack_experts, unpack_experts
from .schemes import ACTIVATIONS, LAYOUT_VERSION, SCHEMES

__all__ = [
    "ACTIVATIONS",
    "LAYOUT_VERSION",
    "SCHEMES",
    "FusedExperts",
    "PackedExperts",
    "fused_experts",
    "pack_experts",
    "unpack_experts",
]
