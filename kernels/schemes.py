"""What a quantization scheme and an activation are, stated once for packing, operator and kernels."""

from __future__ import annotations

from dataclasses import dataclass

K_BLOCK = 128
"""Elements of K in one packed block; packed weights are padded to a multiple of it in N and in K."""

GATE_UP_GRANULE = 8
"""Gate and up rows alternate in runs of this many rows, so that one thread of an MMA accumulator holds both."""

LAYOUT_VERSION = 3
"""Version of the packed layout described in `packing.py`. Raise it when the bytes change."""

GROUP_SIZES = (32, 64, 128)
"""Weight group sizes below or at one K block; above it, any multiple of K_BLOCK is accepted."""


@dataclass(frozen=True)
class Scheme:
    """Number formats of one expert layer.

    `act_group` is the number of consecutive activations that share one int8 scale (a row's last group may be shorter),
    0 for bf16 activations.
    It is given for GEMM1's input (hidden states) and GEMM2's input (the activated intermediate) apart: the latter is
    a product of two projections with heavy tails, and int8 there costs more accuracy than the whole rest of the
    layer (see docs/numerics.md), so `w4a8` keeps it in bf16.
    """

    name: str
    weight_bits: int
    gemm1_act_group: int
    gemm2_act_group: int

    @property
    def packed(self) -> bool:
        """True for 4-bit weights in the packed layout, False for plain bf16 weights."""
        return self.weight_bits == 4

    @property
    def takes_zeros(self) -> bool:
        """True if weights may have zero points; an int8 MMA multiplies bare codes."""
        return self.packed and not (self.gemm1_act_group or self.gemm2_act_group)

    def act_group(self, gemm: int) -> int:
        """Activation group of GEMM `gemm` (1 or 2); 0 means bf16."""
        return self.gemm1_act_group if gemm == 1 else self.gemm2_act_group

    def row_scaled(self, gemm: int) -> bool:
        """True if the scales of GEMM `gemm`'s weights are small multiples of one scale a row.

        Codes times multiples are int8, so that nothing is scaled inside the sum over K (QServe calls it progressive
        group quantization).
        """
        return self.packed and self.act_group(gemm) > 0


SCHEMES: dict[str, Scheme] = {
    "bf16": Scheme("bf16", 16, 0, 0),
    "w4a16": Scheme("w4a16", 4, 0, 0),
    "w4a8": Scheme("w4a8", 4, 1024, 0),
}

MAX_MULTIPLE = 16
"""Largest multiple of a row's scale: 16 * -8 is the least int8."""


def max_scale_ratio(k_pad: int) -> int:
    """By how much the scales of one token's activation groups may differ at most.

    An int32 sum over K passes from one group's units to the next one's, and must not overflow in any of them.
    """
    largest_sum = k_pad * 127 * (8 * MAX_MULTIPLE)
    return max(1, 1 << (((2**31 - 1) // largest_sum).bit_length() - 1))


ACTIVATIONS: dict[str, int] = {"silu": 0, "swiglu_oai": 1}
"""Gated activations by name -> the constexpr that the epilogue switches on. All of them give 0 for gate = up = 0, which
is what padding holds.
silu: silu(gate) * up.
swiglu_oai: (up + 1) * gate * sigmoid(1.702 * gate), with gate at most 7 and up within [-7, 7] (GPT-OSS)."""

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name.

    Raises:
        ValueError: the name is unknown.
    """
    try:
        return SCHEMES[name]
    except (KeyError, TypeError):
        raise ValueError(f"scheme={name!r} is unknown: use one of {', '.join(SCHEMES)}") from None


def get_activation(name: str) -> int:
    """Constexpr code of a gated activation.

    Raises:
        ValueError: the activation is not supported.
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"activation={name!r} is not supported: use one of {', '.join(ACTIVATIONS)}, or keep these experts unfused"
        ) from None


def check_any_group_size(group_size: int) -> None:
    """Check a weight group size before it is known what it must divide.

    Raises:
        ValueError: it is no int, or not one of GROUP_SIZES nor a multiple of K_BLOCK.
    """
    if type(group_size) is not int:
        raise ValueError(
            f"group_size={group_size!r} is a {type(group_size).__name__}, expected an int: "
            f"use {', '.join(map(str, GROUP_SIZES))} or a multiple of {K_BLOCK}"
        )
    if group_size not in GROUP_SIZES and (group_size <= 0 or group_size % K_BLOCK):
        raise ValueError(
            f"group_size={group_size} is not supported: "
            f"use {', '.join(map(str, GROUP_SIZES))} or a multiple of {K_BLOCK}"
        )


def check_group_size(group_size: int, k: int, what: str) -> None:
    """Check that a weight group size is supported and divides K.

    Raises:
        ValueError: it is not one of GROUP_SIZES nor a multiple of K_BLOCK, or it does not divide `k`.
    """
    _check_divides(group_size, {what: k})


def check_layer_group_size(group_size: int, hidden_size: int, intermediate_size: int) -> None:
    """`check_group_size` for both GEMMs of a layer; the remedy it names fits both.

    Raises:
        ValueError: it is not one of GROUP_SIZES nor a multiple of K_BLOCK, or it does not divide both sizes.
    """
    _check_divides(group_size, {"hidden size H": hidden_size, "intermediate size I": intermediate_size})


def _check_divides(group_size: int, sizes: dict[str, int]) -> None:
    check_any_group_size(group_size)
    for what, k in sizes.items():
        if k % group_size:
            least = GROUP_SIZES[0]
            fits = [g for g in GROUP_SIZES if not any(size % g for size in sizes.values())]
            odd = " and ".join(name for name, size in sizes.items() if size % least)
            remedy = f"group_size={fits[-1]}" if fits else f"group_size={least}, and pad {odd} to a multiple of it"
            raise ValueError(f"{what}={k} must be a multiple of group_size={group_size}: requantize with {remedy}")


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= `value`."""
    return -(-value // multiple) * multiple
