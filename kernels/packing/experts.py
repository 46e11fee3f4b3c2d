"""Packing and unpacking the weights of an expert layer; `fragments` documents the layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.functional import pad

from executorch_moe.kernels.arguments import TENSORS, ExpertArguments
from executorch_moe.kernels.schemes import K_BLOCK, check_any_group_size, check_layer_group_size, get_scheme, round_up

from .fragments import deinterleave_gate_up, dequantize, fragment_order, interleave_gate_up, pack_int4
from .mxfp4 import E8M0_NAN, Mxfp4Codes, pack_e8m0, quantize_mxfp4
from .rounding import Int4Codes, check_algorithm, round_weights


@dataclass
class PackedExperts:
    """Weights of one expert layer in the packed layout, and the other arguments of the operator that belong to them.

    Attributes:
        w13: packed gate and up projection. uint8 [E, Hp/128, 2*Ip, 64], or bf16 [E, 2*Ip, Hp] for scheme bf16.
        w2: packed down projection. uint8 [E, Ip/128, Hp, 64], or bf16 [E, Hp, Ip] for scheme bf16.
        w13_scale, w2_scale: bf16 [E, K/group_size, N], None for scheme bf16. In scheme w4a8, w13_scale holds multiples
            of the rows' scales, and the rows' scales as one more group: [E, K/group_size + 1, N]. In scheme mxfp4,
            scales are uint8 [E, K/128, N, 4].
        w13_zero, w2_zero: bf16, shaped like the scales, or None. Added after scaling: value = q * scale + zero.
        w13_bias, w2_bias: fp32 [E, 2*Ip] in packed row order and fp32 [E, Hp], or None.
        scheme, group_size: as passed to `pack_experts`; group_size is 0 for scheme bf16.
        hidden_size, intermediate_size: H and I before padding.
    """

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    w13_zero: Tensor | None
    w2_zero: Tensor | None
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    scheme: str
    group_size: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    def tensors(self) -> dict[str, Tensor | None]:
        """The eight tensors by field name, in the operator's argument order."""
        return {name: getattr(self, name) for name in TENSORS}

    def arguments(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, activation: str = "silu"
    ) -> ExpertArguments:
        """The operator's arguments with these weights."""
        weights: Any = self.tensors()
        return ExpertArguments(
            hidden_states,
            topk_ids,
            topk_weights,
            **weights,
            scheme=self.scheme,
            activation=activation,
            group_size=self.group_size,
        )

    def with_tensors(self, tensors: Mapping[str, Tensor | None]) -> PackedExperts:
        """A copy with some tensors replaced, by field name; it shares the others."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same weights on another device."""
        return self.with_tensors({name: None if t is None else t.to(device) for name, t in self.tensors().items()})

    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(t.nbytes for t in self.tensors().values() if t is not None)


def _pack_matrix(
    codes: Int4Codes | Mxfp4Codes, order: str, n_pad: int, k_pad: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pads codes q [E, N, K] and their groups [E, N, K/g] to n_pad and k_pad, then packs both.

    Scales and zeros become [E, Kp/g, Np] in pairs of rows; rows' own scales, if there are any, are one more group.
    """
    n, k = codes.q.shape[1:]
    q = pad(codes.q, (0, k_pad - k, 0, n_pad - n))
    if isinstance(codes, Mxfp4Codes):
        return pack_int4(q, order), pack_e8m0(codes.scale, n_pad, k_pad), None

    def by_group(t: Tensor, groups: int = -(-k_pad // codes.group_size)) -> Tensor:
        padded = pad(t.bfloat16(), (0, groups - t.shape[-1], 0, n_pad - n))
        pairs = padded.reshape(-1, n_pad // 16, 2, 8, groups).permute(0, 4, 1, 3, 2)
        return pairs.reshape(-1, groups, n_pad)

    scale = by_group(codes.scale)
    if codes.row_scale is not None:
        scale = torch.cat((scale, by_group(codes.row_scale, 1)), dim=1)
    return pack_int4(q, order), scale, None if codes.zero is None else by_group(codes.zero)


def _pad_gate_up(rows: Tensor, i_pad: int) -> Tensor:
    """[E, 2I, ...] gate then up -> [E, 2*Ip, ...], interleaved."""
    e, n = rows.shape[:2]
    halves = rows.reshape(e, 2, n // 2, *rows.shape[2:])
    padded = pad(halves, (0, 0) * (halves.dim() - 3) + (0, i_pad - n // 2))
    return interleave_gate_up(padded.reshape(e, 2 * i_pad, *rows.shape[2:]))


def _check_weights(gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None) -> None:
    if gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            f"gate_up {list(gate_up.shape)} and down {list(down.shape)} must be 3-D, [E, 2I, H] and [E, H, I]: "
            "stack the experts along a new first dimension"
        )
    e, n, h = gate_up.shape
    if n % 2 or down.shape != (e, h, n // 2):
        raise ValueError(
            f"gate_up {list(gate_up.shape)} and down {list(down.shape)} do not belong together: gate_up [E, 2I, H] "
            f"needs down [E, H, I] = [{e}, {h}, {n // 2}]; transpose weights that are stored [E, in, out]"
        )
    if not gate_up.numel():
        raise ValueError(f"gate_up {list(gate_up.shape)} has no values: pass at least one expert")
    for name, t, shape in (("gate_up_bias", gate_up_bias, (e, n)), ("down_bias", down_bias, (e, h))):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(shape)}")
    for name, t in (("down", down), ("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
        if t is not None and t.device != gate_up.device:
            raise ValueError(f"{name} is on {t.device} but gate_up is on {gate_up.device}: move both to one device")


def _check_floats(**tensors: Tensor | None) -> None:
    """Refuses integers, which would be packed as if they were values, and complex numbers, which would lose a part."""
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise ValueError(
                f"{name} has dtype {str(t.dtype).removeprefix('torch.')}, expected floats: dequantize the weights "
                "first, or pass 4-bit codes to pack_codes"
            )


def _check_finite(expert: int, **tensors: Tensor | Int4Codes | Mxfp4Codes | None) -> None:
    """Checks the scales of rounded weights: a scale is finite only if all weights of its group are.

    Scales are fewer than weights, so this is faster than a check of the weights.

    Raises:
        ValueError: NaN or Inf, which would make a whole group NaN. The message names the first tensor that has one.
    """
    for name, rounded in tensors.items():
        if isinstance(rounded, Int4Codes):
            rounded = rounded.scale if rounded.row_scale is None else rounded.row_scale
        elif isinstance(rounded, Mxfp4Codes):
            rounded = torch.where(rounded.scale == E8M0_NAN, torch.nan, 0.0)
        # Meta and fake tensors have no values to check. aminmax returns NaN if any value is NaN.
        if rounded is None or rounded.is_meta or is_fake(rounded):
            continue
        if not torch.stack(rounded.aminmax()).isfinite().all():
            raise ValueError(
                f"{name} of expert {expert} holds NaN, Inf or values that bfloat16 cannot hold: use another "
                "checkpoint, or convert the original weights to bfloat16 (float16 ends at 65504)"
            )


@torch.no_grad()
def pack_experts(
    gate_up: Tensor,
    down: Tensor,
    *,
    scheme: str = "w4a16",
    group_size: int = 32,
    algorithm: str = "minmax",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    first_expert: int = 0,
) -> PackedExperts:
    """Quantize (4-bit schemes) and pack the experts of one layer, one expert at a time.

    Args:
        gate_up: float [E, 2I, H], gate rows first, then up rows (the layout of transformers' Qwen3-MoE experts).
        down: float [E, H, I].
        scheme: "w4a16", "w4a8", "mxfp4" or "bf16".
        group_size: weights that share one scale; divides H and I. 32 for scheme mxfp4, ignored by scheme bf16.
        algorithm: "minmax" or "hqq", see `rounding`. hqq chooses zero points if the scheme supports them (w4a16).
            Ignored by scheme bf16, and by mxfp4, see `mxfp4.quantize_mxfp4`.
        gate_up_bias, down_bias: float [E, 2I] and [E, H], or None.
        first_expert: index in its layer of the first expert, for error messages.

    Returns:
        PackedExperts on the device of `gate_up`.

    Raises:
        ValueError: unknown scheme or algorithm; shapes or devices that do not match; weights that are not floats or
            hold NaN or Inf; a group size that is unsupported or does not divide K.
    """
    kind = get_scheme(scheme)
    check_algorithm(algorithm)
    _check_weights(gate_up, down, gate_up_bias, down_bias)
    _check_floats(gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias)
    if kind.packed:
        check_any_group_size(group_size, scheme)
        check_layer_group_size(group_size, gate_up.shape[2], down.shape[2])

    def one(e: int) -> PackedExperts:
        w13, w2 = gate_up[e], down[e]
        biases = [None if bias is None else bias[e : e + 1].float() for bias in (gate_up_bias, down_bias)]
        _check_finite(first_expert + e, gate_up_bias=biases[0], down_bias=biases[1])
        if not kind.packed:
            w13, w2 = w13.bfloat16(), w2.bfloat16()
            _check_finite(first_expert + e, gate_up=w13, down=w2)
            return _pack_floats(w13[None], w2[None], scheme, *biases)
        q13, q2 = (
            quantize_mxfp4(weight)
            if kind.microscaled
            else round_weights(weight, group_size, algorithm, kind.takes_zeros, kind.row_scaled(gemm))
            for gemm, weight in ((1, w13), (2, w2))
        )
        _check_finite(first_expert + e, gate_up=q13, down=q2)
        for name, codes in (("gate_up", q13), ("down", q2)):
            if isinstance(codes, Mxfp4Codes):
                codes.check(f"{name} of expert {first_expert + e}")
        return _pack_codes(q13[None], q2[None], scheme, *biases)

    return stack_experts(map(one, range(gate_up.shape[0])), gate_up.shape[0])


@torch.no_grad()
def pack_codes(
    gate_up: Int4Codes | Mxfp4Codes,
    down: Int4Codes | Mxfp4Codes,
    *,
    scheme: str = "w4a16",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> PackedExperts:
    """Pack experts that are already 4-bit codes, without rounding.

    Args:
        gate_up: codes [E, 2I, H], gate rows first, then up rows.
        down: codes [E, H, I]. If the group sizes differ, both become their greatest common divisor, which is exact.
        scheme: "w4a16", or "w4a8" for codes without zero points; "mxfp4" for `Mxfp4Codes`. For w4a8, the `gate_up`
            scales of a row must be 1 to 16 times one scale; a single scale per row always is.
        gate_up_bias, down_bias: float [E, 2I] and [E, H], or None.

    Returns:
        PackedExperts on the device of `gate_up`. If only one matrix has zero points, those of the other are zeros.

    Raises:
        ValueError: unknown scheme, or scheme bf16; codes of another scheme; shapes or devices that do not match; an
            unsupported group size; zero points or scales that w4a8 cannot represent; scales that mxfp4 cannot.
    """
    kind = get_scheme(scheme)
    if not kind.packed:
        raise ValueError(f"scheme={scheme} holds no 4-bit codes: use w4a16 or w4a8, or dequantize the weights first")
    _check_weights(gate_up.q, down.q, gate_up_bias, down_bias)
    if isinstance(gate_up, Mxfp4Codes) or isinstance(down, Mxfp4Codes) or kind.microscaled:
        return _pack_mxfp4(gate_up, down, scheme, gate_up_bias, down_bias)
    if not kind.takes_zeros and not (gate_up.zero is None and down.zero is None):
        raise ValueError(
            f"scheme={scheme} multiplies in int8 and takes no zero points, but these weights have some: use w4a16, or "
            "quantize the original weights again"
        )
    group_size = math.gcd(gate_up.group_size, down.group_size)
    check_layer_group_size(group_size, gate_up.q.shape[2], down.q.shape[2])
    if (gate_up.zero is None) != (down.zero is None):
        gate_up, down = _with_zero(gate_up), _with_zero(down)
    if kind.row_scaled(1):
        gate_up = gate_up.row_scaled()
    if kind.row_scaled(2):
        down = down.row_scaled()

    def one(e: int) -> PackedExperts:
        biases = (None if bias is None else bias[e : e + 1] for bias in (gate_up_bias, down_bias))
        q13, q2 = (codes[e : e + 1].regrouped(group_size) for codes in (gate_up, down))
        return _pack_codes(q13, q2, scheme, *biases)

    return stack_experts(map(one, range(gate_up.q.shape[0])), gate_up.q.shape[0])


def _pack_mxfp4(
    gate_up: Int4Codes | Mxfp4Codes,
    down: Int4Codes | Mxfp4Codes,
    scheme: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> PackedExperts:
    """`pack_codes` for scheme mxfp4, or for codes of it."""
    if not (isinstance(gate_up, Mxfp4Codes) and isinstance(down, Mxfp4Codes) and scheme == "mxfp4"):
        kinds = " and ".join("MXFP4" if isinstance(c, Mxfp4Codes) else "4-bit integers" for c in (gate_up, down))
        raise ValueError(
            f"scheme={scheme} with gate_up and down as {kinds}: scheme mxfp4 takes MXFP4 in both, w4a16 and w4a8 take "
            "integers; dequantize the weights and use pack_experts"
        )
    check_layer_group_size(gate_up.group_size, gate_up.q.shape[2], down.q.shape[2])
    gate_up.check("gate_up")
    down.check("down")

    def one(e: int) -> PackedExperts:
        biases = (None if bias is None else bias[e : e + 1] for bias in (gate_up_bias, down_bias))
        return _pack_codes(gate_up[e : e + 1], down[e : e + 1], scheme, *biases)

    return stack_experts(map(one, range(gate_up.q.shape[0])), gate_up.q.shape[0])


def stack_experts(parts: Iterable[PackedExperts], num_experts: int) -> PackedExperts:
    """Concatenate experts of one layer, with one part and the result in memory at a time.

    Args:
        parts: one or more experts each; all with the same sizes, scheme and optional tensors.
        num_experts: the sum over all parts.
    """
    whole: PackedExperts | None = None
    start = 0
    for part in parts:
        if whole is None:
            empty = {
                name: None if t is None else t.new_empty(num_experts, *t.shape[1:])
                for name, t in part.tensors().items()
            }
            whole = part.with_tensors(empty)
        for to, t in zip(whole.tensors().values(), part.tensors().values(), strict=True):
            if to is not None and t is not None:
                to[start : start + part.num_experts] = t
        start += part.num_experts
    assert whole is not None and start == num_experts, f"got {start} experts, expected {num_experts}"
    return whole


def _with_zero(codes: Int4Codes) -> Int4Codes:
    return codes if codes.zero is not None else Int4Codes(codes.q, codes.scale, torch.zeros_like(codes.scale))


def _pack_floats(
    gate_up: Tensor, down: Tensor, scheme: str, gate_up_bias: Tensor | None, down_bias: Tensor | None
) -> PackedExperts:
    """Packs experts of scheme bf16; the arguments are checked."""
    h, i = gate_up.shape[2], down.shape[2]
    h_pad, i_pad = round_up(h, K_BLOCK), round_up(i, K_BLOCK)
    w13 = pad(_pad_gate_up(gate_up.bfloat16(), i_pad), (0, h_pad - h)).contiguous()
    w2 = pad(down.bfloat16(), (0, i_pad - i, 0, h_pad - h)).contiguous()
    biases = _pack_biases(gate_up_bias, down_bias, h_pad, i_pad)
    return PackedExperts(w13, w2, None, None, None, None, *biases, scheme, 0, h, i)


def _pack_codes(
    gate_up: Int4Codes | Mxfp4Codes,
    down: Int4Codes | Mxfp4Codes,
    scheme: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> PackedExperts:
    """Packs experts of a 4-bit scheme; the arguments are checked and have one group size."""
    h, i = gate_up.q.shape[2], down.q.shape[2]
    h_pad, i_pad = round_up(h, K_BLOCK), round_up(i, K_BLOCK)
    rows = gate_up.map(lambda t: _pad_gate_up(t, i_pad))
    w13, w13_scale, w13_zero = _pack_matrix(rows, fragment_order(scheme, 1), 2 * i_pad, h_pad)
    w2, w2_scale, w2_zero = _pack_matrix(down, fragment_order(scheme, 2), h_pad, i_pad)
    biases = _pack_biases(gate_up_bias, down_bias, h_pad, i_pad)
    group_size = gate_up.group_size
    return PackedExperts(w13, w2, w13_scale, w2_scale, w13_zero, w2_zero, *biases, scheme, group_size, h, i)


def _pack_biases(
    gate_up: Tensor | None, down: Tensor | None, h_pad: int, i_pad: int
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if gate_up is None else _pad_gate_up(gate_up.float(), i_pad).contiguous(),
        None if down is None else pad(down.float(), (0, h_pad - down.shape[1])).contiguous(),
    )


def unpack_experts(packed: PackedExperts) -> tuple[Tensor, Tensor]:
    """Dequantized weights of a packed layer, in the layout of the arguments of `pack_experts`.

    Returns:
        gate_up fp32 [E, 2I, H] and down fp32 [E, H, I].
    """
    h, i = packed.hidden_size, packed.intermediate_size
    w13 = deinterleave_gate_up(
        dequantize(packed.w13, packed.w13_scale, packed.w13_zero, fragment_order(packed.scheme, 1))
    )
    w2 = dequantize(packed.w2, packed.w2_scale, packed.w2_zero, fragment_order(packed.scheme, 2))
    e, n, _ = w13.shape
    gate_up = w13.reshape(e, 2, n // 2, -1)[:, :, :i, :h].reshape(e, 2 * i, h)
    return gate_up, w2[:, :h, :i]
