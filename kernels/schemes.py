"""Quantization schemes and activations: the one definition for packing, operator and kernels."""

from __future__ import annotations

from dataclasses import dataclass

K_BLOCK = 128
"""Elements of K in one packed block; packed weights are padded to a multiple of it in N and K."""

GATE_UP_GRANULE = 8
"""Gate and up rows alternate in runs of this many rows, so that one thread holds both in its MMA accumulator."""

LAYOUT_VERSION = 3
"""Version of the packed layout, which packing/fragments.py describes. Increment it when the bytes change."""

GROUP_SIZES = (32, 64, 128)
"""Weight group sizes up to one K block. Larger ones must be multiples of K_BLOCK."""

MX_GROUP = 32
"""Weights along K that share one scale in scheme mxfp4."""


@dataclass(frozen=True)
class Scheme:
    """Number formats of one expert layer.

    Attributes:
        name: key in `SCHEMES`. weight_bits: 4 or 16.
        gemm1_act_group: number of consecutive hidden states, the input of GEMM1, that share one int8 scale; the last
            group of a row may be shorter. 0 for bf16 activations.
        gemm2_act_group: the same for the activated intermediate, the input of GEMM2. It is a product of two projections
            with heavy tails, and int8 there costs more accuracy than the rest of the layer (docs/numerics.md), so
            `w4a8` keeps it in bf16.
        microscaled: True for 4-bit floats (e2m1) with one power of two for each MX_GROUP weights, False for 4-bit
            integers.
    """

    name: str
    weight_bits: int
    gemm1_act_group: int
    gemm2_act_group: int
    microscaled: bool = False

    @property
    def packed(self) -> bool:
        """True for 4-bit weights in the packed layout, False for plain bf16 weights."""
        return self.weight_bits == 4

    @property
    def takes_zeros(self) -> bool:
        """True if weights may have zero points. int8 MMAs multiply codes and support none; MXFP4 has none."""
        return self.packed and not (self.microscaled or self.gemm1_act_group or self.gemm2_act_group)

    def act_group(self, gemm: int) -> int:
        """Activation group of GEMM `gemm` (1 or 2); 0 means bf16."""
        return self.gemm1_act_group if gemm == 1 else self.gemm2_act_group

    def row_scaled(self, gemm: int) -> bool:
        """True if the weight scales of GEMM `gemm` (1 or 2) are small multiples of one scale per row.

        Codes times multiples fit int8, so that the sum over K needs no scaling. Source: QServe, "progressive group
        quantization".
        """
        return self.packed and self.act_group(gemm) > 0


SCHEMES: dict[str, Scheme] = {
    "bf16": Scheme("bf16", 16, 0, 0),
    "w4a16": Scheme("w4a16", 4, 0, 0),
    "w4a8": Scheme("w4a8", 4, 1024, 0),
    "mxfp4": Scheme("mxfp4", 4, 0, 0, microscaled=True),
}

MAX_MULTIPLE = 16
"""Largest multiple of a row's scale: 16 * -8 is the smallest int8."""


def max_scale_ratio(k_pad: int) -> int:
    """Largest allowed ratio between the scales of one token's activation groups.

    The int32 sum over K is converted from the unit of each group to that of the next, and must not overflow in any.

    Args:
        k_pad: padded K.
    """
    largest_sum = k_pad * 127 * (8 * MAX_MULTIPLE)
    return max(1, 1 << (((2**31 - 1) // largest_sum).bit_length() - 1))


ACTIVATIONS: dict[str, int] = {"silu": 0, "swiglu_oai": 1}
"""Gated activations: name -> constexpr of the kernels. All of them give 0 for gate = up = 0, the values of padding.
silu: silu(gate) * up.
swiglu_oai: (up + 1) * gate * sigmoid(1.702 * gate), with gate at most 7 and up within [-7, 7] (GPT-OSS)."""

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


def get_scheme(name: str) -> Scheme:
    """Look up a scheme by name.

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


def check_any_group_size(group_size: int, scheme: str = "") -> None:
    """Check a weight group size before the sizes that it must divide are known.

    Raises:
        ValueError: it is not an int, neither one of GROUP_SIZES nor a multiple of K_BLOCK, or not that of the scheme.
    """
    if scheme and get_scheme(scheme).microscaled and group_size != MX_GROUP:
        raise ValueError(
            f"group_size={group_size!r} is not supported by scheme {scheme}, which has one scale for {MX_GROUP} "
            f"weights: use group_size={MX_GROUP}"
        )
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
        ValueError: it is neither one of GROUP_SIZES nor a multiple of K_BLOCK, or does not divide `k`.
    """
    _check_divides(group_size, {what: k})


def check_layer_group_size(group_size: int, hidden_size: int, intermediate_size: int) -> None:
    """Check that a weight group size is supported and divides both sizes of a layer.

    Raises:
        ValueError: it is neither one of GROUP_SIZES nor a multiple of K_BLOCK, or does not divide both sizes. The
            message names a group size that does.
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
