"""The operators `gated_delta_net` and `rows_delta_rule`, their fakes and their CPU kernels.

They do not write to their arguments. They return the new states, and the caller writes them to its buffers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from executorch_moe.kernels.inference_only import inference_operator

from .arguments import (
    DeltaRuleArguments,
    RowsDeltaRuleArguments,
    check_gated_delta_net,
    check_rows_delta_rule,
    check_slots,
)
from .arguments import fits_delta_rule as fits_delta_rule
from .aten import gated_delta_net_aten, rows_delta_rule_aten
from .launches import run_gated_delta_net, run_rows_delta_rule


@inference_operator("gated_delta_net", DeltaRuleArguments)
def gated_delta_net(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, gates, delta rule and gated norm of a layer of linear attention, for the next tokens of one text.

    Everything between the projections: causal convolution and SiLU of query, key and value; query and key divided by
    their norms, query also by sqrt(Dk); for each token with query q, key k and value v of a value head
        S = exp(-exp(a_log) * softplus(a + dt_bias)) * S
        S = S + k (sigmoid(b) * (v - k S))
        o = q S
    then the RMS norm of o, times norm_weight, times silu(z). fp32 inside.

    Letters: T tokens; Hk key heads, each serving Hv/Hk neighboring value heads; Dk, Dv numbers of a head; K tokens
    under the convolution; C = 2 * Hk * Dk + Hv * Dv.

    Args:
        projected: bf16, fp16 or fp32 [T, C + Hv * Dv + 2 * Hv]: query, key, value, z, b and a of each token.
        conv_weight: float [C, K]; the last column is that of the token itself.
        dt_bias, a_log: float [Hv]. norm_weight: float [Dv].
        conv_state: as `projected`, [K, C]: row p % K has query, key and value of `projected` at position p, for the K
            positions before these tokens. Rows of positions below 0 may hold anything.
        recurrent_state: fp32 [Hv, Dk, Dv].
        position: int64 [1], of the first token. At 0 a text starts: both states count as zero, whatever they hold.
        num_key_heads: Hk. key_dim: Dk. eps: of the RMS norm.

    Returns:
        The input of the output projection, as `projected`, [T, Hv * Dv]; the new conv_state, with zeros for positions
        below 0; the new recurrent_state.

    Raises:
        ValueError: see `check_gated_delta_net`.
        NotImplementedError: backward.
    """
    arguments = DeltaRuleArguments(*args, **kwargs)
    check_gated_delta_net(arguments)
    if arguments.projected.device.type == "cpu":  # only while tracing for the CPU
        return gated_delta_net_aten(arguments)
    return run_gated_delta_net(arguments)


@gated_delta_net.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = DeltaRuleArguments(*args)
    check_gated_delta_net(arguments)
    return gated_delta_net_aten(arguments)


@gated_delta_net.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = DeltaRuleArguments(*args)
    check_gated_delta_net(arguments)
    projected, sizes = arguments.projected, arguments.sizes
    return (
        projected.new_empty(projected.shape[0], sizes.values),
        projected.new_empty(sizes.conv_size, sizes.channels),
        arguments.recurrent_state.new_empty(sizes.value_heads, sizes.key_dim, sizes.value_dim),
    )


@inference_operator("rows_delta_rule", RowsDeltaRuleArguments)
def rows_delta_rule(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_delta_net` for one token of each of several texts, whose states are in slots.

    Letters: T rows, at most `MAX_ROWS`; S slots; the others as in `gated_delta_net`.

    Args:
        projected: bf16, fp16 or fp32 [T, C + Hv * Dv + 2 * Hv]: query, key, value, z, b and a of each row.
        conv_weight, dt_bias, a_log, norm_weight: as for `gated_delta_net`.
        conv_states: as `projected`, [S, K, C]; recurrent_states: fp32 [S, Hv, Dk, Dv]: the states of each slot.
        positions: int64 [T], of the rows. At 0 a text starts, whatever its slot holds. Below 0: an empty row.
        slots: int64 [T], the slot of each row, a different one for each that is not empty; any for empty rows.
        num_key_heads: Hk. key_dim: Dk. eps: of the RMS norm.

    Returns:
        The input of the output projection, as `projected`, [T, Hv * Dv], zeros in empty rows; the new conv_states; the
        new recurrent_states. The states of slots without a row are the old ones.

    Raises:
        ValueError: see `check_rows_delta_rule`; on the CPU also `check_slots`.
        NotImplementedError: backward.
    """
    arguments = RowsDeltaRuleArguments(*args, **kwargs)
    check_rows_delta_rule(arguments)
    if arguments.projected.device.type == "cpu":  # only while tracing for the CPU
        return rows_delta_rule_aten(arguments)
    return run_rows_delta_rule(arguments)


@rows_delta_rule.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RowsDeltaRuleArguments(*args)
    check_rows_delta_rule(arguments)
    check_slots(arguments)
    return rows_delta_rule_aten(arguments)


@rows_delta_rule.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RowsDeltaRuleArguments(*args)
    check_rows_delta_rule(arguments)
    projected, states = arguments.projected, arguments.recurrent_states
    return (
        projected.new_empty(projected.shape[0], arguments.sizes.values),
        projected.new_empty(arguments.conv_states.shape),
        states.new_empty(states.shape),
    )
