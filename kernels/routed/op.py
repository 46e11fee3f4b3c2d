"""`torch.ops.executorch_moe.one_token_experts`: output projection, router and experts of one token in one operator.

With `Options.ranks_logits`, the experts' kernels choose the experts by the router's logits themselves. Then no program
waits for all logits, chooses, and ends, before the experts start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.decode.arguments import RouteArguments, check_one_token_router
from executorch_moe.kernels.decode.aten import one_token_router_aten
from executorch_moe.kernels.decode.launches import run_one_token_logits, run_one_token_router
from executorch_moe.kernels.experts.aten import fused_experts_aten, fused_experts_cpu
from executorch_moe.kernels.experts.matvec_plan import run_matvec
from executorch_moe.kernels.experts.plan import Options, Problem, choose_path, run_fused_experts
from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.inference_only import inference_operator
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of
from executorch_moe.kernels.op import current_options
from executorch_moe.kernels.validate import check_fused_experts


class TokenExpertArguments(NamedTuple):
    """Arguments of `one_token_experts`, in its order; its docstring gives shapes and dtypes."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    residual: Tensor
    norm: Tensor
    router: Tensor
    top_k: int
    eps: float
    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    w13_zero: Tensor | None
    w2_zero: Tensor | None
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    scheme: str
    activation: str
    group_size: int

    @property
    def route(self) -> RouteArguments:
        """The arguments of `one_token_router` among these."""
        return RouteArguments(*self[:8])

    def experts(self, normed: Tensor, ids: Tensor, weights: Tensor) -> ExpertArguments:
        """The arguments of `fused_experts` for results of `one_token_router`."""
        return ExpertArguments(normed, ids, weights, *self[8:])

    def without_choice(self) -> ExpertArguments:
        """`experts` with ids and weights that hold no values."""
        residual, size = self.residual, (1, self.top_k)
        ids, weights = residual.new_empty(size, dtype=torch.int64), residual.new_empty(size, dtype=torch.float32)
        return self.experts(residual[0], ids, weights)


def check_one_token_experts(arguments: TokenExpertArguments) -> None:
    """Check every argument of `one_token_experts` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
        NotImplementedError: zero points with a scheme that takes none.
    """
    check_one_token_router(arguments.route)
    experts, packed = arguments.router.shape[0], arguments.w13.shape[0]
    if experts != packed:
        raise ValueError(
            f"router has E={experts} rows, but w13 has {packed} experts: pass the router and the experts of one layer"
        )
    check_fused_experts(arguments.without_choice())


def run_one_token_experts(
    arguments: TokenExpertArguments,
    *,
    options: Options = Options(),
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor]:
    """Launches of the output projection, the router and the experts; parameters as in `run_fused_experts`.

    Returns:
        See `one_token_experts`.
    """
    gpu = gpu or kernel_gpu(arguments.x)
    if ranks_logits(arguments, options, gpu):
        hidden, normed, logits = run_one_token_logits(arguments.route, gpu=gpu, submit=submit)
        unchosen = arguments.without_choice()._replace(hidden_states=normed)
        return hidden, run_matvec(Problem(unchosen, gpu, ptx_of(gpu), options, submit), logits)
    hidden, normed, weights, ids = run_one_token_router(arguments.route, gpu=gpu, submit=submit)
    return hidden, run_fused_experts(arguments.experts(normed, ids, weights), options=options, gpu=gpu, submit=submit)


def ranks_logits(arguments: TokenExpertArguments, options: Options, gpu: Gpu) -> bool:
    """True if the experts' kernels choose the experts: those of the matrix-vector path, of layers without biases."""
    if not options.ranks_logits or arguments.w13_bias is not None or arguments.w2_bias is not None:
        return False
    p = Problem(arguments.without_choice(), gpu, ptx_of(gpu), options)
    return (options.path or choose_path(p)) == "matvec"


@inference_operator("one_token_experts", TokenExpertArguments)
def one_token_experts(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`one_token_router` and `fused_experts` for the experts that it chooses.

    Args:
        x, weight, scale, residual, norm, router, top_k, eps: as for `one_token_router`.
        w13 to w2_bias, scheme, activation, group_size: as for `fused_experts`; E experts.

    Returns:
        Projection plus residual, bf16 [1, 1, H]; the experts' sum, bf16 [1, H]. The same input gives the same bits.

    Raises:
        ValueError: see `check_one_token_experts`.
        NotImplementedError: zero points with a scheme that takes none; backward.
    """
    arguments = TokenExpertArguments(*args, **kwargs)
    check_one_token_experts(arguments)
    if arguments.x.device.type == "cpu":  # only while tracing for the CPU
        hidden, normed, weights, ids = one_token_router_aten(arguments.route)
        return hidden, fused_experts_aten(arguments.experts(normed, ids, weights))
    return run_one_token_experts(arguments, options=current_options())


@one_token_experts.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = TokenExpertArguments(*args)
    check_one_token_experts(arguments)
    residual = arguments.residual
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        residual.new_empty(1, residual.shape[2]),
    )


@one_token_experts.register_kernel("cpu")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = TokenExpertArguments(*args)
    check_one_token_experts(arguments)
    hidden, normed, weights, ids = one_token_router_aten(arguments.route)
    return hidden, fused_experts_cpu(arguments.experts(normed, ids, weights))
