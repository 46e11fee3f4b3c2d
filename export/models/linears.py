"""Linear layers and embeddings with 8- and 4-bit weights, and matrix-vector products for one token. For CUDA targets.

One token takes one kernel per layer, which reads each packed weight once: `one_token_linear` for int8 weights and bf16
activations, else plain tensor operators, which Inductor fuses. A fixed number of up to 64 tokens takes `rows_linear`
with the same weights, and other numbers `prompt_linear`, for int8 weights and bf16 activations. With other dtypes the
weights are converted to the activations' dtype first.
ExecuTorch's `int4_plain_mm` family is not used: its kernels are part of ExecuTorch's own runtime, so that the delegate
host could not run them.

Letters: T tokens, N out, K in, g group size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from executorch_moe.kernels.batch.op import fits_rows_linear, rows_linear
from executorch_moe.kernels.decode.op import one_token_linear
from executorch_moe.kernels.packing.rounding import Q_MAX, Q_MIN, Int4Codes, quantize_int4
from executorch_moe.kernels.prefill.op import prompt_linear


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """weight [N, K] times one row x [1, ..., 1, K], summed in fp32 -> fp32 [1, ..., 1, N].

    Inductor compiles it to a reduction, which fills the GPU. For `linear` it uses GEMM templates with tiles of 16 rows,
    which leave most of a GPU idle.
    """
    y = (weight.to(torch.float32) * x.reshape(1, -1).to(torch.float32)).sum(-1)
    return y.reshape(*x.shape[:-1], -1)


def is_one_token(x: Tensor) -> bool:
    """True for shape [1, ..., 1, K]; false if a size is symbolic."""
    return all(isinstance(size, int) and size == 1 for size in x.shape[:-1])


class OneTokenLinears(TorchFunctionMode):
    """A context in which `nn.functional.linear` of one row computes `matvec`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs and is_one_token(args[0]) and args[1].dim() == 2:
            y = matvec(args[1], args[0])
            if len(args) > 2 and args[2] is not None:
                y = y + args[2]
            return y.to(args[0].dtype)
        return func(*args, **kwargs)


class Int8Linear(nn.Module):
    """y = x @ (qdata * scale).T + bias, with qdata int8 [N, K] and one scale for each row, fp32 [N]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        qdata, scale = quantize_rows(weight)
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N] in the dtype of `x`."""
        if is_one_token(x) and x.dtype == torch.bfloat16 and self.bias is None:
            return one_token_linear(x, self.qdata, self.scale)
        if fits_rows_linear(x) and self.bias is None:
            return rows_linear(x, self.qdata, self.scale)
        if x.dtype == torch.bfloat16 and self.bias is None:
            return prompt_linear(x, self.qdata, self.scale)
        if is_one_token(x):
            y = matvec(self.qdata, x)
        else:
            y = nn.functional.linear(x, self.qdata.to(x.dtype)).to(torch.float32)
        y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


@dataclass(frozen=True)
class StoredInt4:
    """Scales of the 4-bit codes that a linear layer's weight was made of: w = q * scale (+ zero), q in [-8, 7].

    It is the attribute `stored_int4` of an `nn.Linear` whose weight was dequantized, so that its codes can be
    recovered: the weight and these scales determine them.

    Attributes:
        scale: bf16 [N, K/g].
        zero: bf16 [N, K/g], or None.
    """

    scale: Tensor
    zero: Tensor | None

    def codes(self, weight: Tensor) -> Int4Codes:
        """The codes of a weight [N, K] that was dequantized and rounded to bf16 or a wider type."""
        grouped = weight.float().unflatten(-1, (self.scale.shape[-1], -1))
        shifted = grouped if self.zero is None else grouped - self.zero.float()[..., None]
        unit = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale).float()
        q = (shifted / unit[..., None]).round().clamp(Q_MIN, Q_MAX).to(torch.int8)
        return Int4Codes(q.flatten(-2), self.scale, self.zero)

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredInt4:
        """Applies a function to scales and zero points."""
        return StoredInt4(function(self.scale), None if self.zero is None else function(self.zero))


def stored_int4(linear: nn.Module) -> StoredInt4 | None:
    """The scales of a linear layer that was stored as 4-bit codes; None for other layers."""
    found: StoredInt4 | None = getattr(linear, "stored_int4", None)
    return found


def joined_int4(linears: Sequence[nn.Linear]) -> StoredInt4 | None:
    """The scales of several layers' weights, concatenated along N; None if no layer has some, or their groups differ.

    Layers without scales get those of rounding to the others' groups, so that the others keep their codes.
    """
    parts = [stored_int4(linear) for linear in linears]
    groups = {part.scale.shape[1] for part in parts if part is not None}
    if len(groups) != 1:
        return None
    size = linears[0].in_features // groups.pop()
    whole = [
        StoredInt4(quantize_int4(linear.weight.detach(), size)[1], None) if part is None else part
        for linear, part in zip(linears, parts, strict=True)
    ]
    scale = torch.cat([part.scale for part in whole])
    if all(part.zero is None for part in whole):
        return StoredInt4(scale, None)
    return StoredInt4(
        scale, torch.cat([torch.zeros_like(part.scale) if part.zero is None else part.zero for part in whole])
    )


class Int4Linear(nn.Module):
    """y = x @ w.T + bias, with 4-bit codes: w = (nibble - 8) * scale (+ zero).

    qdata: uint8 [N, K/g, g/2]. Byte j of a group holds value j in the low nibble and value j + g/2 in the high one, so
    that neighboring bytes are multiplied with neighboring activations.
    scale: bf16 [N, K/g]. zero: the same, or None.
    """

    def __init__(
        self, weight: Tensor, group_size: int, bias: Tensor | None = None, stored: StoredInt4 | None = None
    ) -> None:
        """
        Args:
            weight: float [N, K]. group_size: K values that share a scale. bias: float [N] or None.
            stored: scales of the codes that the weight has already; `group_size` is then ignored.
        """
        super().__init__()
        codes = Int4Codes(*quantize_int4(weight, group_size)) if stored is None else stored.codes(weight)
        halves = (codes.q + 8).to(torch.uint8).unflatten(-1, (-1, 2, codes.group_size // 2))
        self.register_buffer("qdata", halves[:, :, 0] | (halves[:, :, 1] << 4))
        self.register_buffer("scale", codes.scale)
        self.register_buffer("zero", codes.zero)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N] in the dtype of `x`."""
        low, high = (self.qdata & 0xF).to(torch.float32) - 8.0, (self.qdata >> 4).to(torch.float32) - 8.0
        scale = self.scale.to(torch.float32)[:, :, None]
        if is_one_token(x):
            groups = x.reshape(1, self.qdata.shape[1], 2, self.qdata.shape[2]).to(torch.float32)
            products = (low * groups[:, :, 0] + high * groups[:, :, 1]) * scale
            if self.zero is not None:
                products = products + (groups[:, :, 0] + groups[:, :, 1]) * self.zero.to(torch.float32)[:, :, None]
            y = products.sum((1, 2)).reshape(*x.shape[:-1], -1)
        else:
            values = torch.stack((low, high), 2) * scale[:, :, None]
            if self.zero is not None:
                values = values + self.zero.to(torch.float32)[:, :, None, None]
            weight = values.to(x.dtype).flatten(1)
            y = nn.functional.linear(x, weight)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Embedding(nn.Module):
    """An embedding whose row v is qdata[v] * scale[v]: qdata int8 [V, K], scale fp32 [V]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        qdata, scale = quantize_rows(weight)
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.dtype = weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., K] in the dtype of the original weight."""
        return (self.qdata[ids].to(torch.float32) * self.scale[ids][..., None]).to(self.dtype)


class _Follower(nn.Module):
    """Replaces a projection whose result `MergedLinear` has computed already."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        asked, result = self.waiting.pop()
        assert asked is x, "merged projections must be called in order, with the same input"
        return result


class MergedLinear(nn.Module):
    """Computes several projections of one input in one kernel.

    It replaces the first projection. `followers` replace the others, and must be called after it, in order.
    """

    def __init__(self, merged: nn.Module, sizes: Iterable[int]) -> None:
        super().__init__()
        self.merged = merged
        self.sizes = list(sizes)
        self.followers = [_Follower() for _ in self.sizes[1:]]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> the first projection's result; keeps those of the others for `followers`."""
        first, *rest = self.merged(x).split(self.sizes, -1)
        for follower, part in zip(self.followers, rest, strict=True):
            follower.waiting[:] = [(x, part)]
        return first


class SideBySide(nn.Module):
    """Linear layers of one input, one after the other; their outputs in one tensor."""

    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., sum of N]."""
        return torch.cat([linear(x) for linear in self.linears], -1)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> qdata int8 [N, K] and scale fp32 [N], with weight ~ qdata * scale.

    It converts 8192 rows at a time, to bound the memory for fp32 values.
    """
    qdata = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], 8192):
        part = weight[start : start + 8192].float()
        step = part.abs().amax(-1).clamp_(min=1e-12) / 127.0
        qdata[start : start + 8192] = (part / step[:, None]).round_().to(torch.int8)
        scale[start : start + 8192] = step
    return qdata, scale
