"""`gated_delta_net` as launches of the kernels in decode_kernels.py and prefill_kernels.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from executorch_moe.kernels.gpus import Gpu, gpu_of
from executorch_moe.kernels.launch import Launch

from .arguments import DeltaRuleArguments
from .decode_kernels import moe_delta_rule_one_token


def run_gated_delta_net(
    arguments: DeltaRuleArguments,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for one token, four for more; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    arguments = arguments._replace(projected=arguments.projected.contiguous())
    ptx = _ptx(gpu, arguments.projected)
    states = _states(arguments)
    return _one_token(arguments, states, ptx, submit), *states


def _states(arguments: DeltaRuleArguments) -> tuple[Tensor, Tensor]:
    """Tensors for the new states of convolution and delta rule; the first one has the values of the old one.

    While torch traces, both are copies that the kernels read and write. AOTInductor removes a copy whose original gets
    the new value anyway, so a compiled program updates its buffers in place. Otherwise only the old state of the
    convolution is copied, of which the kernel for one token rewrites one row.
    """
    conv_state, state = arguments.conv_state, arguments.recurrent_state
    traced = isinstance(state, FakeTensor | FunctionalTensor)
    return conv_state.clone(), state.clone() if traced else torch.empty_like(state)


def _one_token(
    arguments: DeltaRuleArguments, states: tuple[Tensor, Tensor], ptx: int, submit: Callable[[Launch], None]
) -> Tensor:
    sizes = arguments.sizes
    new_conv_state, new_state = states
    traced = isinstance(new_state, FakeTensor | FunctionalTensor)
    out = arguments.projected.new_empty(1, sizes.values)
    launch = Launch(
        moe_delta_rule_one_token,
        (sizes.value_heads,),
        {
            "projected_ptr": arguments.projected,
            "weight_ptr": arguments.conv_weight,
            "dt_bias_ptr": arguments.dt_bias,
            "a_log_ptr": arguments.a_log,
            "norm_ptr": arguments.norm_weight,
            "position_ptr": arguments.position,
            "conv_ptr": new_conv_state if traced else arguments.conv_state,
            "new_conv_ptr": new_conv_state,
            "state_ptr": new_state if traced else arguments.recurrent_state,
            "new_state_ptr": new_state,
            "out_ptr": out,
        },
        {
            "SCALE": sizes.key_dim**-0.5,
            "EPS": arguments.eps,
            "HK": sizes.key_heads,
            "HV": sizes.value_heads,
            "DK": sizes.key_dim,
            "DV": sizes.value_dim,
            "K": sizes.conv_size,
            "PTX": ptx,
        },
        num_warps=max(1, min(8, sizes.key_dim * sizes.value_dim // 2048)),
    )
    submit(launch)
    return out


def _ptx(gpu: Gpu | None, x: Tensor) -> int:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return 0
    return (gpu or gpu_of(x.device.index)).capability
