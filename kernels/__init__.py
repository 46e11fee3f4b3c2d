"""Fused Mixture-of-Experts operators: packing, Triton kernels, fp32 reference. Importing registers the operator."""

# transformers looks for the Hub's package `kernels` while it traces a model. With the repository's root on sys.path it
# finds this folder; under that name nothing is imported, or the operator would be registered twice.
if __name__ == "executorch_moe.kernels":
    from executorch_moe.kernels.packing.experts import (
        PackedExperts,
        pack_codes,
        pack_experts,
        stack_experts,
        unpack_experts,
    )
    from executorch_moe.kernels.packing.rounding import ALGORITHMS, Int4Codes

    from .module import FusedExperts
    from .op import fused_experts
    from .schemes import ACTIVATIONS, LAYOUT_VERSION, SCHEMES

__all__ = [
    "ACTIVATIONS",
    "ALGORITHMS",
    "LAYOUT_VERSION",
    "SCHEMES",
    "FusedExperts",
    "Int4Codes",
    "PackedExperts",
    "fused_experts",
    "pack_codes",
    "pack_experts",
    "stack_experts",
    "unpack_experts",
]
