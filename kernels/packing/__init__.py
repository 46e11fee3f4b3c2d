"""Expert weights in the layout that the kernels read.

rounding   weights -> 4-bit codes with scales and zero points (min-max, HQQ)
mxfp4      MXFP4 codes and scales, and rounding to them
fragments  the layout: the order of packed values in memory, and conversions both ways
experts    `PackedExperts`: packing, unpacking and stacking the experts of a layer
"""

from executorch_moe.kernels.arguments import TENSORS

from .experts import PackedExperts, pack_codes, pack_experts, stack_experts, unpack_experts
from .fragments import (
    deinterleave_gate_up,
    dequantize,
    fragment_order,
    interleave_gate_up,
    pack_int4,
    unpack_int4,
)
from .mxfp4 import Mxfp4Codes, quantize_mxfp4
from .rounding import ALGORITHMS, Int4Codes, quantize_int4

__all__ = [
    "ALGORITHMS",
    "TENSORS",
    "Int4Codes",
    "Mxfp4Codes",
    "PackedExperts",
    "deinterleave_gate_up",
    "dequantize",
    "fragment_order",
    "interleave_gate_up",
    "pack_codes",
    "pack_experts",
    "pack_int4",
    "quantize_int4",
    "quantize_mxfp4",
    "stack_experts",
    "unpack_experts",
    "unpack_int4",
]
