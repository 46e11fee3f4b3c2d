"""Expert weights in the layout that the kernels read: `rounding` to 4 bits, `fragments` (the layout), `experts`."""

from executorch_moe.kernels.arguments import TENSORS

from .experts import PackedExperts, pack_codes, pack_experts, stack_experts, unpack_experts
from .rounding import ALGORITHMS, Int4Codes, quantize_int4

__all__ = [
    "ALGORITHMS",
    "TENSORS",
    "Int4Codes",
    "PackedExperts",
    "pack_codes",
    "pack_experts",
    "quantize_int4",
    "stack_experts",
    "unpack_experts",
]
