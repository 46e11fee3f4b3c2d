"""The operators as launches of the kernels in decode_kernels.py and prefill_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, is_traced, kernel_gpu, ptx_of

from .arguments import DeltaRuleArguments, DeltaRuleSizes, RowsDeltaRuleArguments
from .decode_kernels import moe_delta_rule_one_token, moe_delta_rule_rows
from .prefill_kernels import (
    moe_delta_rule_chunk,
    moe_delta_rule_inputs,
    moe_delta_rule_output,
    moe_delta_rule_state,
)

CHUNK = 64
"""Tokens of a chunk. All products inside a chunk are quadratic in it, the states outside linear in their number."""


def run_gated_delta_net(
    arguments: DeltaRuleArguments,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for one token, four for more; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    arguments = arguments._replace(projected=arguments.projected.contiguous())
    ptx = ptx_of(gpu or kernel_gpu(arguments.projected))
    states = _states(arguments)
    tokens = arguments.projected.shape[0]
    run = _one_token if isinstance(tokens, int) and tokens == 1 else _chunks
    return run(arguments, states, ptx, submit), *states


def run_rows_delta_rule(
    arguments: RowsDeltaRuleArguments,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`.

    The new states are copies, because the kernel writes to the slots of its rows only; see `_states`.
    """
    arguments = arguments._replace(projected=arguments.projected.contiguous())
    ptx = ptx_of(gpu or kernel_gpu(arguments.projected))
    sizes, rows = arguments.sizes, arguments.projected.shape[0]
    new_conv_states, new_states = arguments.conv_states.clone(), arguments.recurrent_states.clone()
    out = arguments.projected.new_empty(rows, sizes.values)
    launch = Launch(
        moe_delta_rule_rows,
        (sizes.value_heads, rows),
        {
            "projected_ptr": arguments.projected,
            "weight_ptr": arguments.conv_weight,
            "dt_bias_ptr": arguments.dt_bias,
            "a_log_ptr": arguments.a_log,
            "norm_ptr": arguments.norm_weight,
            "positions_ptr": arguments.positions,
            "slots_ptr": arguments.slots,
            "conv_ptr": new_conv_states,
            "new_conv_ptr": new_conv_states,
            "state_ptr": new_states,
            "new_state_ptr": new_states,
            "out_ptr": out,
        },
        _constants(sizes, arguments.eps, ptx),
        num_warps=_warps(sizes),
    )
    submit(launch)
    return out, new_conv_states, new_states


def _constants(sizes: DeltaRuleSizes, eps: float, ptx: int) -> dict[str, Any]:
    """Constants of the kernels for one token of a text."""
    return {
        "SCALE": sizes.key_dim**-0.5,
        "EPS": eps,
        "HK": sizes.key_heads,
        "HV": sizes.value_heads,
        "DK": sizes.key_dim,
        "DV": sizes.value_dim,
        "K": sizes.conv_size,
        "PTX": ptx,
    }


def _warps(sizes: DeltaRuleSizes) -> int:
    return max(1, min(8, sizes.key_dim * sizes.value_dim // 2048))


def _states(arguments: DeltaRuleArguments) -> tuple[Tensor, Tensor]:
    """Tensors for the new states of convolution and delta rule; the first one has the values of the old one.

    While torch traces, both are copies that the kernels read and write. AOTInductor removes a copy whose original gets
    the new value anyway, so a compiled program updates its buffers in place. Otherwise only the old state of the
    convolution is copied, of which the kernel for one token rewrites one row.
    """
    conv_state, state = arguments.conv_state, arguments.recurrent_state
    traced = is_traced(state)
    return conv_state.clone(), state.clone() if traced else torch.empty_like(state)


def _one_token(
    arguments: DeltaRuleArguments, states: tuple[Tensor, Tensor], ptx: int, submit: Callable[[Launch], None]
) -> Tensor:
    sizes = arguments.sizes
    new_conv_state, new_state = states
    traced = is_traced(new_state)
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
        _constants(sizes, arguments.eps, ptx),
        num_warps=_warps(sizes),
    )
    submit(launch)
    return out


def _chunks(
    arguments: DeltaRuleArguments, states: tuple[Tensor, Tensor], ptx: int, submit: Callable[[Launch], None]
) -> Tensor:
    """Four launches. All buffers are linear in the number of tokens, which may be a symbol.

    `values` has V after the first launch, U after the second one and the new values after the third one.
    """
    sizes, projected = arguments.sizes, arguments.projected
    new_conv_state, new_state = states
    traced = is_traced(new_state)
    tokens = projected.shape[0]
    chunks = (tokens + CHUNK - 1) // CHUNK
    # Buffers of small heads are fp32. Their products are cheap, and tiles below 64 have no use of larger instructions.
    wide = projected.dtype.itemsize > 2 or min(sizes.key_dim, sizes.value_dim) < 64
    buffers = torch.float32 if wide else projected.dtype
    rows = chunks * CHUNK
    heads = {"HK": sizes.key_heads, "HV": sizes.value_heads, "DK": sizes.key_dim, "DV": sizes.value_dim}
    common = {**heads, "CHUNK": CHUNK, "PTX": ptx}
    qk = projected.new_empty(2 * sizes.key_heads, rows, sizes.key_dim, dtype=buffers)
    values = projected.new_empty(sizes.value_heads, rows, sizes.value_dim, dtype=buffers)
    decay = projected.new_empty(sizes.value_heads, rows, dtype=torch.float32)
    beta = torch.empty_like(decay)
    inputs = Launch(
        moe_delta_rule_inputs,
        (chunks, 2 * sizes.key_heads + sizes.value_heads + 1),
        {
            "projected_ptr": projected,
            "weight_ptr": arguments.conv_weight,
            "dt_bias_ptr": arguments.dt_bias,
            "a_log_ptr": arguments.a_log,
            "position_ptr": arguments.position,
            "conv_ptr": new_conv_state if traced else arguments.conv_state,
            "qk_ptr": qk,
            "v_ptr": values,
            "decay_ptr": decay,
            "beta_ptr": beta,
            "T": tokens,
        },
        {
            **common,
            "K": sizes.conv_size,
            "K_POW2": triton.next_power_of_2(sizes.conv_size),
            "HV_POW2": triton.next_power_of_2(sizes.value_heads),
            "TOKENS": 32,
            "SCALE": sizes.key_dim**-0.5,
        },
    )
    submit(inputs)
    w = projected.new_empty(sizes.value_heads, rows, sizes.key_dim, dtype=buffers)
    pointers = {"qk_ptr": qk, "v_ptr": values, "decay_ptr": decay, "beta_ptr": beta, "w_ptr": w}
    submit(Launch(moe_delta_rule_chunk, (chunks, sizes.value_heads), pointers, common, num_warps=4))
    block_v = min(16 if wide else 32, sizes.value_dim)
    blocks = sizes.value_dim // block_v
    # No dimension of `chunks` alone: while tracing with few tokens it would be 1, and the program be for one chunk.
    before = projected.new_empty(sizes.value_heads, chunks * sizes.key_dim, sizes.value_dim, dtype=buffers)
    state = Launch(
        moe_delta_rule_state,
        (sizes.value_heads, blocks),
        {
            "projected_ptr": projected,
            "qk_ptr": qk,
            "decay_ptr": decay,
            "w_ptr": w,
            "u_ptr": values,
            "position_ptr": arguments.position,
            "new_conv_ptr": new_conv_state,
            "state_ptr": new_state if traced else arguments.recurrent_state,
            "new_state_ptr": new_state,
            "states_ptr": before,
            "T": tokens,
        },
        {
            **common,
            "K": sizes.conv_size,
            "BLOCK_V": block_v,
            "BLOCK_C": triton.next_power_of_2(-(-sizes.channels // (sizes.value_heads * blocks))),
            "STAGES": 1 if wide else 2,
        },
    )
    submit(state)
    out = projected.new_empty(tokens, sizes.values)
    output = Launch(
        moe_delta_rule_output,
        (chunks, sizes.value_heads),
        {
            "projected_ptr": projected,
            "norm_ptr": arguments.norm_weight,
            "qk_ptr": qk,
            "decay_ptr": decay,
            "new_ptr": values,
            "states_ptr": before,
            "out_ptr": out,
            "T": tokens,
        },
        {**common, "EPS": arguments.eps, "BLOCK_K": min(32 if wide else 64, sizes.key_dim), "STAGES": 1 if wide else 2},
        num_warps=8,
    )
    submit(output)
    return out
