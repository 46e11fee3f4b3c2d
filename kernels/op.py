"""`torch.ops.executorch_moe.fused_experts`: schema, fake, CPU kernel and Triton implementation of one operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from executorch_moe.kernels.experts.aten import fused_experts_aten, fused_experts_cpu
from executorch_moe.kernels.experts.plan import Options, run_fused_experts

from .arguments import ExpertArguments
from .inference_only import inference_operator
from .validate import check_fused_experts

_DEFAULT = Options()
_OPTIONS: ContextVar[Options] = ContextVar("executorch_moe_options", default=_DEFAULT)


@contextlib.contextmanager
def forced(options: Options) -> Iterator[None]:
    """Context in which the operator runs and compiles with these options, to compare them in measurements."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def current_options() -> Options:
    """The options that `forced` has set, or the usual ones."""
    return _OPTIONS.get()


@inference_operator("fused_experts", ExpertArguments)
def fused_experts(*args: Any, **kwargs: Any) -> Tensor:
    """Experts of one MoE layer: sum over top_k of weight * act(x @ gate.T, x @ up.T) @ down.T.

    Takes the fields of `ExpertArguments`, in its order or by keyword. All of them but the last four must be given.

    For one token, it also takes a shared expert whose first half `one_token_shared_router` computed, and adds
    share * (shared @ (shared_down * shared_down_scale).T) before it rounds the sum.

    Args:
        hidden_states: bf16 [T, H]; T may be 0.
        topk_ids: int32 or int64 [T, top_k]; an id outside [0, E) is dropped.
        topk_weights: fp32, bf16 or fp16 [T, top_k].
        w13, w2, w13_scale, w2_scale, w13_zero, w2_zero, w13_bias, w2_bias: fields of `packing.PackedExperts`; scales,
            zeros and biases may be None.
        scheme: "bf16", "w4a16", "w4a8" or "mxfp4".
        activation: "silu": silu(gate) * up, or "swiglu_oai": see `schemes.ACTIVATIONS`.
        group_size: weights that share a scale; 0 for scheme bf16.
        shared: bf16 [1, S], input of a shared expert's down projection, or None; T must be 1. share: fp32 [1, 1].
        shared_down: int8 or bf16 [H, S]. shared_down_scale: fp32 [H], or None.

    Returns:
        bf16 [T, H]. The same input gives the same bits.

    Raises:
        ValueError: see `validate.check_fused_experts`.
        NotImplementedError: zero points with a scheme that takes none; backward.
    """
    arguments = ExpertArguments(*args, **kwargs)
    check_fused_experts(arguments)
    if arguments.hidden_states.device.type == "cpu":
        # Calls on the CPU go to the CPU kernel below. Only tracing for the CPU (torch.compile, AOT dispatch) gets here.
        return fused_experts_aten(arguments)
    return run_fused_experts(arguments, options=current_options())


@fused_experts.register_fake
def _(*args: Any) -> Tensor:
    arguments = ExpertArguments(*args)
    check_fused_experts(arguments)
    return torch.empty_like(arguments.hidden_states, memory_format=torch.contiguous_format)


@fused_experts.register_kernel("cpu")
def _(*args: Any) -> Tensor:
    arguments = ExpertArguments(*args)
    check_fused_experts(arguments)
    return fused_experts_cpu(arguments)
