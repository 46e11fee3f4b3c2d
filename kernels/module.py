"""`FusedExperts`: the operator as a module, a drop-in replacement for experts modules of Hugging Face models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from executorch_moe.kernels.packing.experts import PackedExperts

from .arguments import TENSORS
from .op import fused_experts
from .schemes import get_activation


class FusedExperts(nn.Module):
    """Experts of one MoE layer on packed weights, without router and shared experts.

    Buffers have the names of the fields of `PackedExperts`. fp32 hidden states are rounded to bf16, and the result is
    converted back to fp32, so a model can keep its dense layers in fp32.
    """

    def __init__(self, packed: PackedExperts, activation: str = "silu") -> None:
        """Registers the packed tensors as buffers, without copying them.

        Args:
            packed: weights of the layer.
            activation: "silu" or "swiglu_oai", see `schemes.ACTIVATIONS`.

        Raises:
            ValueError: unknown activation.
        """
        get_activation(activation)
        super().__init__()
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self.scheme = packed.scheme
        self.activation = activation
        self.group_size = packed.group_size
        self.hidden_size = packed.hidden_size
        self.intermediate_size = packed.intermediate_size
        self.num_experts = packed.num_experts

    def packed(self) -> PackedExperts:
        """The buffers as `PackedExperts` (shared, not copied)."""
        return PackedExperts(
            **{name: getattr(self, name) for name in TENSORS},
            scheme=self.scheme,
            group_size=self.group_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # model.to(float32) must not convert packed weights, scales and biases: buffers move, but keep their dtypes.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        shared: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """Run the experts.

        Args:
            hidden_states: bf16 or fp32 [T, H].
            topk_ids: int32 or int64 [T, top_k].
            topk_weights: float [T, top_k].
            shared: the operator's arguments for a shared expert, `shared` to `shared_down_scale`, or None.

        Returns:
            [T, H] in the dtype of `hidden_states`.

        Raises:
            ValueError: a width other than H, or shapes, dtypes or devices that the operator does not accept.
        """
        if hidden_states.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"hidden_states has dtype {hidden_states.dtype}, expected bfloat16 or float32: convert the model"
            )
        # The operator sees padded weights only, and would accept other widths with the same padding.
        if hidden_states.dim() == 2 and hidden_states.shape[1] != self.hidden_size:
            raise ValueError(
                f"hidden_states has {hidden_states.shape[1]} columns, but these experts are packed for hidden size "
                f"H={self.hidden_size}: pass [T, {self.hidden_size}], or pack the experts of this model"
            )
        tensors = (getattr(self, name) for name in TENSORS)
        x = hidden_states.to(torch.bfloat16)
        kind = self.scheme, self.activation, self.group_size
        out: Tensor = fused_experts(x, topk_ids, topk_weights, *tensors, *kind, *(shared or ()))
        return out.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, scheme={self.scheme}, group_size={self.group_size}"
        )
