"""`MoECpuPartitioner`: fused experts as ATen for ExecuTorch's CPU runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch import Tensor
from torch.export.exported_program import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from executorch_moe.backends.fusion import ExpertFuser, FusingPartitioner, FusionOptions, FusionReport
from executorch_moe.backends.fusion.regions import find_regions
from executorch_moe.kernels import fused_experts as _fused_experts  # noqa: F401  registers torch.ops.executorch_moe
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.experts.aten import fused_experts_aten

_WITHOUT_KERNEL = {"aten.histc", "aten._grouped_mm", "transformers.grouped_mm_fallback"}
"""Operators of transformers' experts (experts_implementation="grouped_mm") for which ExecuTorch has no CPU kernel."""


def _right_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits for integers. Shifts are not Core ATen, so ExecuTorch's verifier refuses them."""
    return torch.div(x, 2**bits, rounding_mode="floor")


def _zeros(size: Sequence[int], **kwargs: Any) -> Tensor:
    """empty(size), filled with zeros: ExecuTorch 1.5's `_empty_dim_order` silently makes symbolic sizes static."""
    kept = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
    return torch.full(size, 0, **{"dtype": torch.get_default_dtype(), **kept})


def _zeros_for(x: Tensor, size: Sequence[int], **kwargs: Any) -> Tensor:
    return _zeros(size, **{"dtype": x.dtype, "device": x.device, **kwargs})


def _zeros_like(x: Tensor, **kwargs: Any) -> Tensor:
    return _zeros_for(x, x.shape, **kwargs)


def _dequantize_affine(
    codes: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """torchao's operator for groups along the last of two dimensions.

    Args:
        codes: [N, K]. block_size: [1, group_size].
        scale, zero_point: [N, K/group_size].
    """
    if len(block_size) != 2 or block_size[0] != 1:
        raise NotImplementedError(
            f"torchao.dequantize_affine with block_size={list(block_size)} cannot be lowered to the CPU: use [1, GROUP]"
        )
    grouped = codes.to(output_dtype).reshape(codes.shape[0], -1, block_size[1])
    if zero_point is not None:
        grouped = grouped - zero_point.to(output_dtype).reshape(codes.shape[0], -1, 1)
    return (grouped * scale.to(output_dtype).reshape(codes.shape[0], -1, 1)).reshape(codes.shape)


def _dequantize_int4(
    packed: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, output_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """ExecuTorch's operator.

    Args:
        packed: uint8 [N, K/2], even K in the low nibble.
        scale, zero_point: [K/group_size, N].
    """
    byte = packed.to(torch.int32)
    codes = torch.stack((byte & 0xF, byte >> 4), -1).reshape(packed.shape[0], -1, group_size).to(torch.float32)
    scale, zero_point = scale.t().to(torch.float32).unsqueeze(-1), zero_point.t().to(torch.float32).unsqueeze(-1)
    return ((codes - zero_point) * scale).reshape(packed.shape[0], -1).to(output_dtype)


def _dequantizers() -> dict[Any, Any]:
    """Decompositions of the registered dequantizing operators; programs cannot contain unregistered ones."""
    known = {"dequantize_affine": _dequantize_affine, "dequantize_int4_tensor": _dequantize_int4}
    ops = torch.ops.torchao
    return {getattr(ops, name).default: function for name, function in known.items() if hasattr(ops, name)}


def _check_unfused(program: ExportedProgram, report: FusionReport) -> None:
    """Check that unfused experts can run. Those of transformers' default implementation cannot.

    Raises:
        NotImplementedError: experts use operators for which ExecuTorch has no CPU kernel; names the first module.
    """
    reasons = {region.module: region.reason for region in report.unfused}
    for region in find_regions(program):
        if lacking := sorted({str(node.target).removesuffix(".default") for node in region.nodes} & _WITHOUT_KERNEL):
            raise NotImplementedError(
                f"experts {region.module} ({region.family}) are not fused ({reasons[region.module]}), "
                f"and ExecuTorch's CPU runtime has no {', '.join(lacking)}: change what keeps them from being "
                "fused, or load the model with experts_implementation='batched_mm'"
            )


class MoECpuPartitioner(FusingPartitioner, Partitioner):
    """Replaces `fused_experts` with plain ATen and delegates nothing: the program runs on ExecuTorch's CPU kernels.

    It first fuses the experts of unmodified models, like `MoECudaPartitioner`.

    Args:
        fusion: scheme and group size (None: w4a16, 32), or the `ExpertFuser` that all methods of a program share.
    """

    def __init__(self, fusion: FusionOptions | ExpertFuser | None = None) -> None:
        super().__init__()
        self.set_fusion(fusion)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Fuse the experts, then decompose the fused operator and the dequantization of 8-bit and 4-bit weights.

        ExecuTorch's own decompositions handle all other operators.

        Raises:
            NotImplementedError: experts cannot be fused (with `require_fused`), or unfused experts use operators for
                which ExecuTorch has no CPU kernel.
        """
        exported_program = self.fuse_experts(exported_program)
        if self.report.unfused:
            _check_unfused(exported_program, self.report)
        op = torch.ops.executorch_moe.fused_experts.default
        quantized = any(is_traceable_wrapper_subclass(tensor) for tensor in exported_program.state_dict.values())
        if not quantized and not any(node.target is op for node in exported_program.graph.nodes):
            return exported_program
        table = {
            op: lambda *args: fused_experts_aten(ExpertArguments(*args)),
            **_dequantizers(),
            torch.ops.aten.empty.memory_format: _zeros,
            torch.ops.aten.new_empty.default: _zeros_for,
            torch.ops.aten.empty_like.default: _zeros_like,
            torch.ops.aten.__rshift__.Scalar: _right_shift,
            torch.ops.aten.bitwise_right_shift.Tensor_Scalar: _right_shift,
        }
        return exported_program.run_decompositions(table)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag nothing."""
        return PartitionResult(tagged_exported_program=exported_program, partition_tags={})
