"""Decompositions for ExecuTorch's CPU kernels: of experts, attention, delta rule, and operators that it lacks."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from executorch.exir.tracer import _default_decomposition_table
from torch import Tensor
from torch.export.exported_program import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten

from executorch_moe.kernels import fused_experts as _fused_experts  # noqa: F401  registers torch.ops.executorch_moe
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.delta_rule.arguments import DeltaRuleArguments, RowsDeltaRuleArguments
from executorch_moe.kernels.delta_rule.aten import gated_delta_net_aten, rows_delta_rule_aten
from executorch_moe.kernels.delta_rule.op import gated_delta_net as _gated_delta_net  # noqa: F401  registers it too
from executorch_moe.kernels.experts.aten import fused_experts_aten
from executorch_moe.kernels.prefill.arguments import CachedAttentionArguments
from executorch_moe.kernels.prefill.aten import cached_attention_by_rows
from executorch_moe.kernels.prefill.op import cached_attention as _cached_attention  # noqa: F401  registers it too

KEPT_WHOLE = (torch.ops.aten.linear.default,)
"""Not decomposed: ExecuTorch has a CPU kernel for linear layers. Decomposed, each call would transpose the weights."""


def _right_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits for integers. Shifts are not Core ATen, so ExecuTorch's verifier refuses them."""
    return torch.div(x, 2**bits, rounding_mode="floor")


def _zeros(size: Sequence[int], **kwargs: Any) -> Tensor:
    """empty(size), filled with zeros: ExecuTorch 1.5's `_empty_dim_order` silently makes symbolic sizes static."""
    kept = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
    return torch.full(size, 0, **{"dtype": torch.get_default_dtype(), **kept})


def _zeros_for(x: Tensor, size: Sequence[int], **kwargs: Any) -> Tensor:
    return _zeros(size, **{"dtype": x.dtype, "device": x.device, **kwargs})


def _zeros_like(x: Tensor, **kwargs: Any) -> Tensor:
    return _zeros_for(x, x.shape, **kwargs)


def _dequantize_affine(
    codes: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """torchao's operator for groups along the last of two dimensions.

    Args:
        codes: [N, K]. block_size: [1, group_size].
        scale, zero_point: [N, K/group_size].
    """
    if len(block_size) != 2 or block_size[0] != 1:
        raise NotImplementedError(
            f"torchao.dequantize_affine with block_size={list(block_size)} cannot be lowered to the CPU: use [1, GROUP]"
        )
    grouped = codes.to(output_dtype).reshape(codes.shape[0], -1, block_size[1])
    if zero_point is not None:
        grouped = grouped - zero_point.to(output_dtype).reshape(codes.shape[0], -1, 1)
    return (grouped * scale.to(output_dtype).reshape(codes.shape[0], -1, 1)).reshape(codes.shape)


def _dequantize_int4(
    packed: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, output_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """ExecuTorch's operator.

    Args:
        packed: uint8 [N, K/2], even K in the low nibble.
        scale, zero_point: [K/group_size, N].
    """
    byte = packed.to(torch.int32)
    codes = torch.stack((byte & 0xF, byte >> 4), -1).reshape(packed.shape[0], -1, group_size).to(torch.float32)
    scale, zero_point = scale.t().to(torch.float32).unsqueeze(-1), zero_point.t().to(torch.float32).unsqueeze(-1)
    return ((codes - zero_point) * scale).reshape(packed.shape[0], -1).to(output_dtype)


def _dequantizers() -> dict[Any, Any]:
    """Decompositions of the dequantizing operators that are registered; programs cannot contain others."""
    known = {"dequantize_affine": _dequantize_affine, "dequantize_int4_tensor": _dequantize_int4}
    ops = torch.ops.torchao
    return {getattr(ops, name).default: function for name, function in known.items() if hasattr(ops, name)}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` without copies of keys and values.

    Heads that share a key are rows of one matrix product. ExecuTorch's `permute_copy` takes about 9 ns per
    element, ten times as long as its matrix products, so the smaller of keys and scores is transposed.

    Args:
        query: [..., heads, T, D]. key, value: [..., kv_heads, C, D] and [..., kv_heads, C, Dv], where kv_heads divides
            heads with `enable_gqa`. Other leading dimensions are broadcast.
        attn_mask: bool or float, broadcastable to [..., heads, T, C].

    Returns:
        [..., heads, T, Dv]; zeros for rows whose mask excludes every key, as torch's own operator.
    """
    shared = 3 if enable_gqa else 2  # the last dimensions, in which queries and keys differ
    if not query.shape[:-shared] == key.shape[:-shared] == value.shape[:-shared]:
        outer = torch.broadcast_shapes(*(x.shape[:-shared] for x in (query, key, value)))
        query, key, value = (x.expand(*outer, *x.shape[-shared:]) for x in (query, key, value))
    lead, (t, d), c = query.shape[:-2], query.shape[-2:], key.shape[-2]
    batch = math.prod(key.shape[:-2])
    group = math.prod(lead) // batch
    q, k, v = (x.to(torch.float32) for x in (query, key, value))
    q = (q * (1.0 / math.sqrt(d) if scale is None else scale)).reshape(batch, group * t, d)
    k, v = k.reshape(batch, c, d), v.reshape(batch, c, v.shape[-1])
    if isinstance(t, int) and group * t < d:
        scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2)
    else:
        scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.reshape(*lead, t, c)
    if is_causal:
        attn_mask = torch.arange(t, device=q.device)[:, None] >= torch.arange(c, device=q.device)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -math.inf)
        scores = scores + attn_mask.to(torch.float32)
    weights = scores.softmax(-1)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    out = torch.bmm(weights.reshape(batch, group * t, c), v).reshape(*lead, t, v.shape[-1])
    if attn_mask is not None and not is_causal:
        out = torch.where(scores.amax(-1, keepdim=True) > -math.inf, out, 0.0)
    return out.to(query.dtype)


def _needed() -> dict[Any, Any]:
    """Decompositions of operators that ExecuTorch does not decompose, or decomposes into slow programs."""
    return {
        torch.ops.executorch_moe.fused_experts.default: lambda *args: fused_experts_aten(ExpertArguments(*args)),
        torch.ops.executorch_moe.gated_delta_net.default: lambda *args: gated_delta_net_aten(DeltaRuleArguments(*args)),
        torch.ops.executorch_moe.rows_delta_rule.default: lambda *args: rows_delta_rule_aten(
            RowsDeltaRuleArguments(*args)
        ),
        torch.ops.executorch_moe.cached_attention.default: lambda *args: cached_attention_by_rows(
            CachedAttentionArguments(*args)
        ),
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        **_dequantizers(),
    }


def _table() -> dict[Any, Any]:
    """All decompositions. They include ExecuTorch's own, so that it need not trace the program a second time."""
    table = dict(_default_decomposition_table())
    for op in KEPT_WHOLE:
        table.pop(op, None)
    return {
        **table,
        **_needed(),
        torch.ops.aten.empty.memory_format: _zeros,
        torch.ops.aten.new_empty.default: _zeros_for,
        torch.ops.aten.empty_like.default: _zeros_like,
        torch.ops.aten.__rshift__.Scalar: _right_shift,
        torch.ops.aten.bitwise_right_shift.Tensor_Scalar: _right_shift,
    }


class Decomposed(ExportedProgram):
    """A program that `run_decompositions` made, so that it is functional and has few operators.

    ExecuTorch decomposes it again while lowering. Each time takes about a tenth of an export.
    """

    def run_decompositions(self, decomp_table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        """The same program if it has no operator of the table."""
        modules = (module for module in self.graph_module.modules() if isinstance(module, torch.fx.GraphModule))
        targets = {node.target for module in modules for node in module.graph.nodes if node.op == "call_function"}
        # Tracing again does not replace sym_size, although the default table has it.
        if decomp_table is not None and not any(t in decomp_table for t in targets - {torch.ops.aten.sym_size.int}):
            return self
        return super().run_decompositions(decomp_table, *args, **kwargs)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program in operators that ExecuTorch has CPU kernels for, with equal nodes merged.

    A program that has neither experts nor attention nor delta rule nor quantized weights is returned unchanged.
    """
    needed = _needed()
    quantized = any(is_traceable_wrapper_subclass(tensor) for tensor in program.state_dict.values())
    if not quantized and not any(node.target in needed for node in program.graph.nodes):
        return program
    decomposed = program.run_decompositions(_table())
    _merge_equal(decomposed.graph)
    decomposed.graph_module.recompile()
    decomposed.__class__ = Decomposed
    return decomposed


def _merge_equal(graph: torch.fx.Graph) -> None:
    """Replaces each node by the first one with the same operator and arguments. Layers repeat masks and layouts.

    Nodes that are outputs stay, because the program's signature names them.
    """
    first: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_pure(node.target):
            continue
        # The key has types, because 1, 1.0 and True are equal but give tensors of different dtypes.
        leaves, spec = tree_flatten((node.args, node.kwargs))
        known = first.setdefault((node.target, str(spec), tuple((type(leaf), leaf) for leaf in leaves)), node)
        if known is not node:
            node.replace_all_uses_with(known, delete_user_cb=lambda user: user.op != "output")
            if not node.users:
                graph.erase_node(node)


def _is_pure(target: Any) -> bool:
    if target is operator.getitem:
        return True
    random = torch.Tag.nondeterministic_seeded
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and random not in target.tags
