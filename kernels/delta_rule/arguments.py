"""Arguments of `gated_delta_net` and `rows_delta_rule`, and their checks.

The operators, their fakes and their CPU kernels share the checks, which depend only on shapes, dtypes and devices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.checks import check_dtype, check_eps, check_layout, check_shape

HEAD_DIMS = (16, 32, 64, 128)
"""Supported sizes of a key head and of a value head: powers of two that tensor cores and one program can take."""
CONV_SIZES = (2, 3, 4, 5, 6, 7, 8)
"""Supported numbers of tokens under the convolution."""
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
MAX_ROWS = 64
"""As for the other operators for rows of several texts (`kernels/batch`)."""
UNFUSED = "or compute this layer with transformers' modules"


class DeltaRuleArguments(NamedTuple):
    """Arguments of `op.gated_delta_net`, in its order; its docstring gives shapes and dtypes."""

    projected: Tensor
    conv_weight: Tensor
    dt_bias: Tensor
    a_log: Tensor
    norm_weight: Tensor
    conv_state: Tensor
    recurrent_state: Tensor
    position: Tensor
    num_key_heads: int
    key_dim: int
    eps: float

    @property
    def sizes(self) -> DeltaRuleSizes:
        """Sizes of the layer; valid after `check_gated_delta_net`."""
        value_heads, value_dim = self.recurrent_state.shape[0], self.recurrent_state.shape[2]
        return DeltaRuleSizes(self.num_key_heads, value_heads, self.key_dim, value_dim, self.conv_weight.shape[1])


class RowsDeltaRuleArguments(NamedTuple):
    """Arguments of `op.rows_delta_rule`, in its order; its docstring gives shapes and dtypes."""

    projected: Tensor
    conv_weight: Tensor
    dt_bias: Tensor
    a_log: Tensor
    norm_weight: Tensor
    conv_states: Tensor
    recurrent_states: Tensor
    positions: Tensor
    slots: Tensor
    num_key_heads: int
    key_dim: int
    eps: float

    @property
    def sizes(self) -> DeltaRuleSizes:
        """Sizes of the layer; valid after `check_rows_delta_rule`."""
        return self.of_one().sizes

    def of_one(self) -> DeltaRuleArguments:
        """Arguments of `op.gated_delta_net` for the first row, with the states of the first slot."""
        first, states = self.projected[:1], (self.conv_states[0], self.recurrent_states[0])
        weights = self.conv_weight, self.dt_bias, self.a_log, self.norm_weight
        position = self.positions[:1]
        return DeltaRuleArguments(first, *weights, *states, position, self.num_key_heads, self.key_dim, self.eps)


class DeltaRuleSizes(NamedTuple):
    """Sizes of a layer: key heads, value heads, numbers of a head, and tokens under the convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int

    @property
    def channels(self) -> int:
        """C: columns of query, key and value, which the convolution reads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def values(self) -> int:
        """Columns of the values, of z and of the result."""
        return self.value_heads * self.value_dim

    @property
    def columns(self) -> int:
        """P: columns of `projected`."""
        return self.channels + self.values + 2 * self.value_heads


def fits_delta_rule(sizes: DeltaRuleSizes) -> bool:
    """True if the operator supports a layer of these sizes."""
    return (
        sizes.key_dim in HEAD_DIMS
        and sizes.value_dim in HEAD_DIMS
        and sizes.conv_size in CONV_SIZES
        and sizes.key_heads > 0
        and sizes.value_heads > 0
        and sizes.value_heads % sizes.key_heads == 0
    )


def check_gated_delta_net(arguments: DeltaRuleArguments) -> None:
    """Check every argument of `gated_delta_net` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    projected, conv_weight, dt_bias, a_log, norm_weight, conv_state, recurrent_state, position = arguments[:8]
    key_heads, key_dim, eps = arguments[8:]
    check_dtype("projected", projected, FLOATS)
    check_dtype("recurrent_state", recurrent_state, (torch.float32,))
    if recurrent_state.dim() != 3 or min(recurrent_state.shape) < 1:
        raise ValueError(
            f"recurrent_state has shape {list(recurrent_state.shape)}, expected [value_heads, key_dim, value_dim]: "
            "pass one layer's state of one text"
        )
    value_heads, state_key_dim, value_dim = recurrent_state.shape
    if state_key_dim != key_dim:
        raise ValueError(
            f"recurrent_state has shape {list(recurrent_state.shape)}, expected key_dim={key_dim} in the middle: "
            "pass the state as [value_heads, key_dim, value_dim]"
        )
    for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
        if size not in HEAD_DIMS:
            raise ValueError(f"{name}={size}, expected one of {HEAD_DIMS}: use such a model, {UNFUSED}")
    if key_heads < 1 or value_heads % key_heads:
        raise ValueError(
            f"num_key_heads={key_heads} must divide the {value_heads} value heads of recurrent_state: pass the "
            "model's linear_num_key_heads"
        )
    if conv_weight.dim() != 2 or conv_weight.shape[1] not in CONV_SIZES:
        raise ValueError(
            f"conv_weight has shape {list(conv_weight.shape)}, expected [C, K] with K one of {CONV_SIZES}: pass the "
            f"convolution's weight without its middle axis, {UNFUSED}"
        )
    sizes = arguments.sizes
    check_shape(
        "conv_weight", conv_weight, (sizes.channels, sizes.conv_size), "a row for each column of query, key and value"
    )
    if projected.dim() != 2 or projected.shape[1] != sizes.columns:
        raise ValueError(
            f"projected has shape {list(projected.shape)}, expected [T, {sizes.columns}]: concatenate query, key, "
            "value, z, b and a of each token in this order"
        )
    if isinstance(projected.shape[0], int) and projected.shape[0] < 1:
        raise ValueError("projected has T=0 tokens, expected 1 at least: skip the layer if there is no token")
    check_dtype("conv_state", conv_state, (projected.dtype,))
    check_shape(
        "conv_state", conv_state, (sizes.conv_size, sizes.channels), "it holds the last K tokens before `position`"
    )
    for name, t, count in (("dt_bias", dt_bias, value_heads), ("a_log", a_log, value_heads)):
        check_dtype(name, t, FLOATS)
        check_shape(name, t, (count,), "pass one number for each value head")
    for name, t in (("conv_weight", conv_weight), ("norm_weight", norm_weight)):
        check_dtype(name, t, FLOATS)
    check_shape("norm_weight", norm_weight, (value_dim,), "one weight for each number of a value head")
    check_dtype("position", position, (torch.int64,))
    check_shape("position", position, (1,), "pass the position of the first token")
    check_eps(eps)
    stored = tuple(name for name in arguments._fields if name != "projected")
    check_layout("projected", projected, arguments._asdict(), stored)


def check_rows_delta_rule(arguments: RowsDeltaRuleArguments) -> None:
    """Check every argument of `rows_delta_rule` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    projected, conv_states, recurrent_states = arguments.projected, arguments.conv_states, arguments.recurrent_states
    if projected.dim() != 2 or not 1 <= projected.shape[0] <= MAX_ROWS:
        raise ValueError(
            f"projected has shape {list(projected.shape)}, expected [T, columns] with T from 1 to {MAX_ROWS}: pass one "
            "token of each text"
        )
    for name, t, dims in (("conv_states", conv_states, 3), ("recurrent_states", recurrent_states, 4)):
        if t.dim() != dims or t.shape[0] < 1:
            raise ValueError(
                f"{name} has shape {list(t.shape)}, expected the state of each of S slots, {dims} dimensions: stack "
                "the states of the texts"
            )
    if conv_states.shape[0] != recurrent_states.shape[0]:
        raise ValueError(
            f"conv_states has {conv_states.shape[0]} slots and recurrent_states has {recurrent_states.shape[0]}: pass "
            "both states of the same slots"
        )
    for name, t in (("positions", arguments.positions), ("slots", arguments.slots)):
        check_dtype(name, t, (torch.int64,))
        check_shape(name, t, (projected.shape[0],), "pass one number for each row")
    stored = tuple(name for name in arguments._fields if name != "projected")
    check_layout("projected", projected, arguments._asdict(), stored)
    check_gated_delta_net(arguments.of_one())


def check_slots(arguments: RowsDeltaRuleArguments) -> None:
    """Check the values of slots, which is possible on the CPU only.

    Raises:
        ValueError: a slot that there is not, or one of two rows that are not empty.
    """
    slots, count = arguments.slots, arguments.conv_states.shape[0]
    if not 0 <= int(slots.min()) <= int(slots.max()) < count:
        raise ValueError(
            f"slots has numbers from {int(slots.min())} to {int(slots.max())}, expected 0 to {count - 1}: pass the "
            "slot of each row, and any for empty rows"
        )
    used = slots[arguments.positions >= 0]
    if len(used.unique()) != len(used):
        raise ValueError(f"slots {slots.tolist()} has one of two rows: give each row that is not empty its own")
