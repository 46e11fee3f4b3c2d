"""Fused Mixture-of-Experts operators. Importing this package registers `torch.ops.executorch_moe.fused_experts`.

    op, arguments, validate, module   the operator, its arguments and their checks, and `FusedExperts`, its module
    schemes, shapes, gpus             what the kernels know of number formats, layers of published models, and GPUs
    packing/                          4-bit rounding and the packed layout of the weights
    experts/                          Triton kernels of `fused_experts` and their launches, and its ATen form
    decode/                           operators for decoding one token: attention, router, linear (`one_token_*`)
    routed/                           both for one token, with the router between them: `one_token_experts`
    prefill/                          operators for several tokens: norms, attention over the cache, choice of experts
    delta_rule/                       the operators for layers of linear attention: `gated_delta_net`, `rows_delta_rule`
    tuning/                           tile configurations: tables by GPU and layer, and heuristics
    measure/                          timing, compiling for GPUs that are not present, writing the tables
    reference                         an expert layer in plain fp32, which tests compare with

Imports inside the package go one way: schemes, shapes, gpus and arguments <- packing <- tuning <- experts <- op, module
and validate <- measure and routed. decode, prefill and delta_rule import only gpus and launch.
"""

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
    from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes
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
    "Mxfp4Codes",
    "PackedExperts",
    "fused_experts",
    "pack_codes",
    "pack_experts",
    "stack_experts",
    "unpack_experts",
]
