"""The arguments of `fused_experts` with the sizes and choices that its launches share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.packing.fragments import fragment_order
from executorch_moe.kernels.schemes import K_BLOCK, get_activation, get_scheme
from executorch_moe.kernels.shapes import LayerShape
from executorch_moe.kernels.tuning.choose import Variant
from executorch_moe.kernels.tuning.configs import GemmConfig, GluonConfig, MatvecConfig

OFFSETS_32_BITS = 2**32
"""Elements that a GEMM can address with unsigned 32-bit offsets. 64-bit offsets take twice the registers."""


@dataclass(frozen=True)
class Options:
    """Choices that tests and benchmarks force; None leaves a choice to the operator.

    Attributes:
        path: "grouped", "few_tokens", "matvec" or "gluon", which is never chosen by itself.
        persistent: False runs the one-CTA-per-tile schedule.
        gemm1, gemm2: tile configurations. variants: of the grouped path; replace gemm1 and gemm2.
        matvec: sizes of both GEMMs of the matrix-vector path.
        gluon: tile configurations of both GEMMs for path "gluon".
        group_size_m: row blocks of a group in the tile order; replaces that of the configurations.
        tables: False ignores the tuning tables.
        ranks_logits: in `one_token_experts`, kernels of the matrix-vector path choose the experts themselves.
    """

    path: str | None = None
    persistent: bool = True
    gemm1: GemmConfig | None = None
    gemm2: GemmConfig | None = None
    variants: tuple[Variant, ...] | None = None
    matvec: tuple[MatvecConfig, MatvecConfig] | None = None
    gluon: tuple[GluonConfig, GluonConfig] | None = None
    group_size_m: int | None = None
    tables: bool = True
    ranks_logits: bool = True


@dataclass
class Problem:
    """The operator's arguments with the sizes that every launch needs.

    Attributes:
        ptx: compute capability for inline PTX, 0 under Triton's interpreter.
        submit: called with each launch; the default runs it.
    """

    arguments: ExpertArguments
    gpu: Gpu
    ptx: int
    options: Options = field(default_factory=Options)
    submit: Callable[[Launch], None] = Launch.run

    def __post_init__(self) -> None:
        self.hidden_states, self.topk_ids, self.topk_weights = (t.contiguous() for t in self.arguments[:3])
        self.scheme = get_scheme(self.arguments.scheme)
        self.num_tokens = self.hidden_states.shape[0]
        # int(): kernels are compiled for these sizes, so symbols of a trace become numbers.
        self.h, self.top_k = int(self.hidden_states.shape[1]), int(self.topk_ids.shape[1])
        self.num_pairs = self.num_tokens * self.top_k
        self.num_experts, w2 = int(self.arguments.w13.shape[0]), self.arguments.w2
        self.i_pad = int(w2.shape[1] * K_BLOCK if self.scheme.packed else w2.shape[2])
        self.group_size = self.arguments.group_size if self.scheme.packed else 0
        self.layer = LayerShape(self.num_experts, self.top_k, self.h, self.i_pad, self.group_size).padded()
        self.h_pad = self.layer.hidden

    @property
    def has_aligned_pairs(self) -> bool:
        """Whether two neighboring activations can be read as one 32-bit word."""
        return self.h % 2 == 0 and self.hidden_states.storage_offset() % 2 == 0

    def empty(self, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.hidden_states.device)

    def weights(self, gemm: int) -> dict[str, Any]:
        """Pointer arguments of one GEMM's weights. For those that are None, a tensor that the kernel never reads."""
        w, scale, zero, bias = self.arguments.matrix(gemm)
        return {
            "w_ptr": w,
            "w_scale_ptr": w if scale is None else scale,
            "w_zero_ptr": w if zero is None else zero,
            "bias_ptr": w if bias is None else bias,
        }

    def dense(self) -> dict[str, Any]:
        """Pointer arguments of the shared expert's dense layer. Without one, a tensor that the kernel never reads."""
        unused, a = self.topk_weights, self.arguments
        named = {
            "shared_ptr": None if a.shared is None else a.shared.contiguous(),
            "share_ptr": a.share,
            "dense_ptr": a.shared_down,
            "dense_scale_ptr": a.shared_down_scale,
        }
        return {name: unused if tensor is None else tensor for name, tensor in named.items()}

    def constants(self, gemm: int) -> dict[str, Any]:
        """Constexprs that both GEMM kernels share."""
        matrix = self.arguments.matrix(gemm)
        n, k_pad = self.layer.rows_and_k(gemm)
        return {
            "N": n,
            "K": self.h if gemm == 1 else self.i_pad,
            "KP": k_pad,
            "OUT_COLS": self.i_pad if gemm == 1 else self.h,
            "TOP_K": self.top_k,
            "GROUP": self.group_size or 128,
            "W_BITS": self.scheme.weight_bits,
            "INT8_ORDER": self.scheme.packed and fragment_order(self.scheme, gemm) == "w4a8",
            "HAS_ZERO": matrix.zero is not None,
            "HAS_BIAS": matrix.bias is not None,
            "ACTIVATION": get_activation(self.arguments.activation),
            "GEMM": gemm,
            "PTX": self.ptx,
        }


def cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


def needs_wide_offsets(rows: Any, columns: int) -> bool:
    """True if [rows, columns] may have more elements than 32-bit offsets can address.

    Args:
        rows: a number, or a symbol of a traced program, which knows the bounds of its dimension.
        columns: a number.
    """
    fits = rows * columns <= OFFSETS_32_BITS
    return not (fits if isinstance(fits, bool) else statically_known_true(fits))
