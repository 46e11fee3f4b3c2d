"""Linear layers and embeddings of an exported model: one token as a matrix-vector product, and 8- and 4-bit weights.

Letters: T tokens, N out, K in, g group size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from executorch_moe.kernels.decode.op import one_token_linear
from executorch_moe.kernels.packing.rounding import quantize_int4


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """weight [N, K] times x [..., K] of one row, summed in fp32 -> fp32 [..., N].

    Inductor makes a reduction of it, which fills the GPU. Its GEMM templates, which it takes for `linear`, have tiles
    of 16 rows and so leave most of a GPU idle.
    """
    y = (weight.to(torch.float32) * x.reshape(1, -1).to(torch.float32)).sum(-1)
    return y.reshape(*x.shape[:-1], -1)


def is_one_token(x: Tensor) -> bool:
    """True for [1, ..., 1, K]; a length known only at run time is more than one."""
    return all(isinstance(size, int) and size == 1 for size in x.shape[:-1])


class OneTokenLinears(TorchFunctionMode):
    """Within it, `linear` of one row is traced as `matvec`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs and is_one_token(args[0]) and args[1].dim() == 2:
            y = matvec(args[1], args[0])
            if len(args) > 2 and args[2] is not None:
                y = y + args[2]
            return y.to(args[0].dtype)
        return func(*args, **kwargs)


class Int8Linear(nn.Module):
    """y = x @ (qdata * scale).T with qdata int8 [N, K] and one scale a row, fp32 [N]."""

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
        if is_one_token(x):
            y = matvec(self.qdata, x)
        else:
            y = nn.functional.linear(x, self.qdata.to(x.dtype)).to(torch.float32)
        y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int4Linear(nn.Module):
    """y = x @ w.T with 4-bit codes.

    qdata: uint8 [N, K/g, g/2]; byte j of a group holds value j in its low nibble and value j + g/2 in its high one, so
    that neighboring bytes meet neighboring activations. value = nibble - 8. scale: bf16 [N, K/g].
    """

    def __init__(self, weight: Tensor, group_size: int, bias: Tensor | None = None) -> None:
        super().__init__()
        codes, scale = quantize_int4(weight, group_size)
        halves = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, group_size // 2))
        self.register_buffer("qdata", halves[:, :, 0] | (halves[:, :, 1] << 4))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N] in the dtype of `x`."""
        low, high = (self.qdata & 0xF).to(torch.float32) - 8.0, (self.qdata >> 4).to(torch.float32) - 8.0
        scale = self.scale.to(torch.float32)[:, :, None]
        if is_one_token(x):
            groups = x.reshape(1, self.qdata.shape[1], 2, self.qdata.shape[2]).to(torch.float32)
            y = ((low * groups[:, :, 0] + high * groups[:, :, 1]) * scale).sum((1, 2)).reshape(*x.shape[:-1], -1)
        else:
            weight = (torch.stack((low, high), 2) * scale[:, :, None]).to(x.dtype).flatten(1)
            y = nn.functional.linear(x, weight)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Embedding(nn.Module):
    """Rows of qdata int8 [V, K] times their scale, fp32 [V]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        qdata, scale = quantize_rows(weight)
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.dtype = weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., K] in the dtype of the weight that was quantized."""
        return (self.qdata[ids].to(torch.float32) * self.scale[ids][..., None]).to(self.dtype)


class _Follower(nn.Module):
    """Stands for a projection whose result the first of its group has computed already."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        asked, result = self.waiting.pop()
        assert asked is x, "projections that were merged must be called with one input, in order"
        return result


class MergedLinear(nn.Module):
    """Several projections of one input as one: three kernels with little to do each become one.

    It takes the place of the first; the others' places are taken by `followers`, which must be called after it.
    """

    def __init__(self, merged: nn.Module, sizes: Iterable[int]) -> None:
        super().__init__()
        self.merged = merged
        self.sizes = list(sizes)
        self.followers = [_Follower() for _ in self.sizes[1:]]

    def forward(self, x: Tensor) -> Tensor:
        """The first projection's result; those of the others wait in `followers`."""
        first, *rest = self.merged(x).split(self.sizes, -1)
        for follower, part in zip(self.followers, rest, strict=True):
            follower.waiting[:] = [(x, part)]
        return first


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and fp32 scale [N] with weight ~ qdata * scale, in slices, so that little is held in fp32."""
    qdata = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], 8192):
        part = weight[start : start + 8192].float()
        step = part.abs().amax(-1).clamp_(min=1e-12) / 127.0
        qdata[start : start + 8192] = (part / step[:, None]).round_().to(torch.int8)
        scale[start : start + 8192] = step
    return qdata, scale
