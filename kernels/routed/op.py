"""`torch.ops.executorch_moe.one_token_experts`: output projection, router and experts of one token in one operator.

The kernels of the matrix-vector path choose the experts by the router's logits themselves. So no program waits for all
logits, chooses, and ends, before the experts start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.decode.arguments import (
    RouteArguments,
    SharedRouteArguments,
    check_one_token_router,
    check_one_token_shared_router,
)
from executorch_moe.kernels.decode.aten import one_token_router_aten, one_token_shared_router_aten
from executorch_moe.kernels.decode.launches import (
    run_one_token_logits,
    run_one_token_router,
    run_one_token_shared_logits,
    run_one_token_shared_router,
)
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
    gate_up: Tensor | None = None
    gate_up_scale: Tensor | None = None
    width: int = 0
    shared_down: Tensor | None = None
    shared_down_scale: Tensor | None = None

    @property
    def route(self) -> RouteArguments:
        """The arguments of `one_token_router` among these."""
        return RouteArguments(*self[:8])

    @property
    def shared_route(self) -> SharedRouteArguments:
        """The arguments of `one_token_shared_router` among these; there must be a shared expert."""
        assert self.gate_up is not None
        return SharedRouteArguments(*self[:8], self.gate_up, self.gate_up_scale, self.width)

    def experts(
        self, normed: Tensor, ids: Tensor, weights: Tensor, shared: Tensor | None = None, share: Tensor | None = None
    ) -> ExpertArguments:
        """The arguments of `fused_experts` for results of `one_token_router` or `one_token_shared_router`."""
        down = self.shared_down, self.shared_down_scale
        return ExpertArguments(normed, ids, weights, *self[8:19], shared, share, *down)

    def without_choice(
        self, normed: Tensor, shared: Tensor | None = None, share: Tensor | None = None
    ) -> ExpertArguments:
        """`experts` with ids and weights that hold no values."""
        size = (1, self.top_k)
        ids, weights = normed.new_empty(size, dtype=torch.int64), normed.new_empty(size, dtype=torch.float32)
        return self.experts(normed, ids, weights, shared, share)


def check_one_token_experts(arguments: TokenExpertArguments) -> None:
    """Check every argument of `one_token_experts` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
        NotImplementedError: zero points with a scheme that takes none.
    """
    residual, shared, share = arguments.residual, None, None
    if arguments.gate_up is None:
        if arguments.gate_up_scale is not None or arguments.width:
            raise ValueError(
                "gate_up_scale or width was given without gate_up: pass all of a shared expert, or nothing"
            )
        check_one_token_router(arguments.route)
    else:
        check_one_token_shared_router(arguments.shared_route)
        shared, share = residual.new_empty(1, arguments.width), residual.new_empty(1, 1, dtype=torch.float32)
    experts, packed = arguments.router.shape[0], arguments.w13.shape[0]
    if experts != packed:
        raise ValueError(
            f"router has E={experts} rows, but w13 has {packed} experts: pass the router and the experts of one layer"
        )
    check_fused_experts(arguments.without_choice(residual[0], shared, share))


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
    ranks, has_shared = ranks_logits(arguments, options, gpu), arguments.gate_up is not None
    if not ranks:
        if has_shared:
            hidden, normed, weights, ids, *halfway = run_one_token_shared_router(
                arguments.shared_route, gpu=gpu, submit=submit
            )
        else:
            hidden, normed, weights, ids, *halfway = run_one_token_router(arguments.route, gpu=gpu, submit=submit)
        chosen = arguments.experts(normed, ids, weights, *halfway)
        return hidden, run_fused_experts(chosen, options=options, gpu=gpu, submit=submit)
    if has_shared:
        hidden, normed, logits, *halfway = run_one_token_shared_logits(arguments.shared_route, gpu=gpu, submit=submit)
    else:
        hidden, normed, logits, *halfway = run_one_token_logits(arguments.route, gpu=gpu, submit=submit)
    unchosen = arguments.without_choice(normed, *halfway)
    return hidden, run_matvec(Problem(unchosen, gpu, ptx_of(gpu), options, submit), logits)


def ranks_logits(arguments: TokenExpertArguments, options: Options, gpu: Gpu) -> bool:
    """True if the experts' kernels choose the experts: those of the matrix-vector path, of layers without biases."""
    if not options.ranks_logits or arguments.w13_bias is not None or arguments.w2_bias is not None:
        return False
    p = Problem(arguments.without_choice(arguments.residual[0]), gpu, ptx_of(gpu), options)
    return (options.path or choose_path(p)) == "matvec"


@inference_operator("one_token_experts", TokenExpertArguments)
def one_token_experts(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`one_token_router` and `fused_experts` for the experts that it chooses; with or without a shared expert.

    Args:
        x, weight, scale, residual, norm, router, top_k, eps: as for `one_token_router`.
        w13 to w2_bias, scheme, activation, group_size: as for `fused_experts`; E experts.
        gate_up, gate_up_scale, width: of a shared expert, as for `one_token_shared_router`; None, None and 0 without.
        shared_down, shared_down_scale: of a shared expert, as for `fused_experts`.

    Returns:
        Projection plus residual, bf16 [1, 1, H]; the experts' sum, bf16 [1, H]. The same input gives the same bits.

    Raises:
        ValueError: see `check_one_token_experts`.
        NotImplementedError: zero points with a scheme that takes none; backward.
    """
    arguments = TokenExpertArguments(*args, **kwargs)
    check_one_token_experts(arguments)
    if arguments.x.device.type == "cpu":  # only while tracing for the CPU
        hidden, chosen = _choose(arguments)
        return hidden, fused_experts_aten(chosen)
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
    hidden, chosen = _choose(arguments)
    return hidden, fused_experts_cpu(chosen)


def _choose(arguments: TokenExpertArguments) -> tuple[Tensor, ExpertArguments]:
    """The operator's first result, and the arguments of the experts, in ATen."""
    if arguments.gate_up is None:
        hidden, normed, weights, ids = one_token_router_aten(arguments.route)
        return hidden, arguments.experts(normed, ids, weights)
    hidden, normed, weights, ids, *halfway = one_token_shared_router_aten(arguments.shared_route)
    return hidden, arguments.experts(normed, ids, weights, *halfway)
