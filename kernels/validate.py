"""The check of the arguments of `fused_experts`, shared by the operator, its fake and its CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from executorch_moe.kernels.tuning.choose import MAX_PAIRS

from .arguments import TENSORS, ExpertArguments
from .checks import check_dtype, check_layout, check_shape
from .schemes import K_BLOCK, check_any_group_size, check_layer_group_size, get_activation, get_scheme, round_up

ID_DTYPES = (torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SHARED = 1024
"""Width of a shared expert: a program of GEMM2 requests whole rows of its down projection at once."""


def _dtype(name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(
            f"{name} has dtype {str(t.dtype).removeprefix('torch.')}, expected {names}: convert it with .to(...)"
        )


def _shape(name: str, t: Tensor, expected: tuple[int, ...], remedy: str) -> None:
    # Weight shapes are static, so this never guards on a symbolic size.
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(expected)}: {remedy}")


def _same_tokens(hidden_states: Tensor, topk_ids: Tensor) -> None:
    t, u = hidden_states.shape[0], topk_ids.shape[0]
    message = f"hidden_states has {t} tokens but topk_ids has {u}: both must be [T, ...]"
    if isinstance(t, int) and isinstance(u, int):
        if t != u:
            raise ValueError(message)
    else:
        torch._check(t == u, lambda: message)


def check_fused_experts(arguments: ExpertArguments) -> None:
    """Check every argument of the operator against the docstring of `op.fused_experts`.

    Raises:
        ValueError: a dtype, rank, shape, device or value that the operator does not accept.
        NotImplementedError: zero points with a scheme that takes none.
    """
    hidden_states, topk_ids, topk_weights, w13, w2 = arguments[:5]
    scheme, group_size = arguments.scheme, arguments.group_size
    kind = get_scheme(scheme)
    get_activation(arguments.activation)

    for name, t, rank in (
        ("hidden_states", hidden_states, 2),
        ("topk_ids", topk_ids, 2),
        ("topk_weights", topk_weights, 2),
    ):
        if t.dim() != rank:
            raise ValueError(
                f"{name} has rank {t.dim()}, expected {rank}: flatten batch and sequence into one dimension of T"
            )
    _dtype("hidden_states", hidden_states, (torch.bfloat16,))
    _dtype("topk_ids", topk_ids, ID_DTYPES)
    _dtype("topk_weights", topk_weights, WEIGHT_DTYPES)
    _same_tokens(hidden_states, topk_ids)
    if topk_weights.dim() != topk_ids.dim() or topk_weights.shape[1] != topk_ids.shape[1]:
        raise ValueError(
            f"topk_weights {list(topk_weights.shape)} and topk_ids {list(topk_ids.shape)} "
            "must have the same shape [T, top_k]: pass one weight for each id"
        )
    _same_tokens(topk_weights, topk_ids)

    h, top_k = hidden_states.shape[1], topk_ids.shape[1]
    num_pairs = topk_ids.shape[0] * top_k
    if isinstance(num_pairs, int) and num_pairs > MAX_PAIRS:
        raise ValueError(
            f"topk_ids has {num_pairs} pairs of token and expert, but routing counts them in 32 bits: "
            f"split the tokens into calls of {MAX_PAIRS // top_k} at most"
        )
    h_pad = round_up(h, K_BLOCK)
    repack = "pack the weights with pack_experts for this scheme and hidden size"
    if w13.dim() != (4 if kind.packed else 3) or w2.dim() != w13.dim():
        raise ValueError(
            f"w13 has rank {w13.dim()} and w2 rank {w2.dim()}, not the packed layout of scheme={scheme}: {repack}"
        )
    e = w13.shape[0]
    if h == 0 or e == 0:
        raise ValueError(
            f"hidden size H={h} and number of experts E={e} must be at least 1: pass tensors that are not empty"
        )
    if not 1 <= top_k <= e:
        raise ValueError(
            f"top_k={top_k} must be between 1 and the number of experts E={e}: check topk_ids and the router"
        )

    weight_dtype = torch.uint8 if kind.packed else torch.bfloat16
    _dtype("w13", w13, (weight_dtype,))
    _dtype("w2", w2, (weight_dtype,))
    if kind.packed:
        i_pad = w2.shape[1] * K_BLOCK
        _shape("w13", w13, (e, h_pad // K_BLOCK, 2 * i_pad, K_BLOCK // 2), repack)
        _shape("w2", w2, (e, i_pad // K_BLOCK, h_pad, K_BLOCK // 2), repack)
        check_any_group_size(group_size, scheme)
        # Of I, only the padded size is known, which any group size up to K_BLOCK divides.
        check_layer_group_size(group_size, h, i_pad if group_size > K_BLOCK else K_BLOCK)
        if arguments.w13_scale is None or arguments.w2_scale is None:
            raise ValueError(f"scheme={scheme} needs w13_scale and w2_scale: {repack}")
    else:
        i_pad = w2.shape[2]
        if i_pad == 0 or i_pad % K_BLOCK:
            raise ValueError(f"w2 has {i_pad} columns, not a multiple of {K_BLOCK}: {repack}")
        _shape("w13", w13, (e, 2 * i_pad, h_pad), repack)
        _shape("w2", w2, (e, h_pad, i_pad), repack)
        for name in ("w13_scale", "w2_scale", "w13_zero", "w2_zero"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name} was given, but scheme=bf16 has no scales or zero points: pass None")

    if 2 * i_pad * h_pad >= 2**31:
        raise ValueError(
            f"an expert of H={h_pad} and I={i_pad} (padded) has {2 * i_pad * h_pad} gate and up weights, but the "
            "kernels count those of one expert in 31 bits: keep these experts unfused"
        )
    groups = group_size or 1
    for gemm, k_pad, n_pad in ((1, h_pad, 2 * i_pad), (2, i_pad, h_pad)):
        matrix, weight = arguments.matrix(gemm), ("w13", "w2")[gemm - 1]
        if kind.microscaled and matrix.scale is not None:
            _dtype(f"{weight}_scale", matrix.scale, (torch.uint8,))
            _shape(f"{weight}_scale", matrix.scale, (e, k_pad // K_BLOCK, n_pad, 4), repack)
            matrix = matrix._replace(scale=None)
        for kind_of, t, extra in (("scale", matrix.scale, int(kind.row_scaled(gemm))), ("zero", matrix.zero, 0)):
            if t is not None:
                _dtype(f"{weight}_{kind_of}", t, (torch.bfloat16,))
                _shape(
                    f"{weight}_{kind_of}",
                    t,
                    (e, k_pad // groups + extra, n_pad),
                    f"it must hold one value per group of group_size={group_size}{' and one per row' * extra}; "
                    f"{repack}",
                )
        if matrix.bias is not None:
            _dtype(f"{weight}_bias", matrix.bias, (torch.float32,))
            _shape(f"{weight}_bias", matrix.bias, (e, n_pad), repack)
    if (arguments.w13_zero is None) != (arguments.w2_zero is None):
        raise ValueError("w13_zero and w2_zero must be given together: pass zeros for the one without zero points")
    if arguments.w13_zero is not None and not kind.takes_zeros:
        raise NotImplementedError(
            f"scheme={scheme} {'has' if kind.microscaled else 'multiplies in int8 and takes'} no zero points: use "
            "w4a16, or requantize symmetrically"
        )

    for name in TENSORS:
        t = getattr(arguments, name)
        if t is not None and not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, strides are {list(t.stride())}: call .contiguous() once after loading"
            )
        if t is not None and t.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {t.device} but hidden_states is on {hidden_states.device}: move both to one device"
            )
    _check_shared(arguments)
    for name, t in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if t.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {t.device} but hidden_states is on {hidden_states.device}: move both to one device"
            )


def _check_shared(arguments: ExpertArguments) -> None:
    """Checks the arguments of a shared expert."""
    shared, share, down, scale = arguments[-4:]
    if shared is None or share is None or down is None:
        if any(t is not None for t in (shared, share, down, scale)):
            raise ValueError("shared, share and shared_down must be given together: pass all three, or None for each")
        return
    tokens, h = arguments.hidden_states.shape
    if not isinstance(tokens, int) or tokens != 1:
        raise ValueError(f"shared was given for T={tokens} tokens: pass one token, or add the shared expert afterwards")
    check_dtype("shared", shared, (torch.bfloat16,))
    if shared.dim() != 2 or shared.shape[0] != 1 or not 1 <= shared.shape[1] <= MAX_SHARED:
        raise ValueError(
            f"shared has shape {list(shared.shape)}, expected [1, S] with S from 1 to {MAX_SHARED}: pass one token's "
            "input of the down projection, or add a larger shared expert afterwards"
        )
    check_dtype("share", share, (torch.float32,))
    check_shape("share", share, (1, 1), "pass one factor of the shared expert's result")
    check_dtype("shared_down", down, (torch.int8, torch.bfloat16))
    check_shape("shared_down", down, (h, shared.shape[1]), "pass the shared expert's down projection")
    if scale is not None:
        check_dtype("shared_down_scale", scale, (torch.float32,))
        check_shape("shared_down_scale", scale, (h,), "pass one scale for each row of shared_down")
    names = ("shared", "share", "shared_down", "shared_down_scale")
    stored = {name: getattr(arguments, name) for name in names}
    check_layout("hidden_states", arguments.hidden_states, stored, ("share", *names[2:]))
