"""Placeholders for weights while compiling: fake CUDA tensors without bytes. The .ptd gets the bytes, from the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PlaceholderWeights:
    """Replacements for the functions that move, read and compare weights while one method is lowered.

    Args:
        stock_value: `GraphLowering.get_original_value_of_constant`.
        stock_same: `torch._inductor.graph.is_same_tensor`.
    """

    def __init__(self, stock_value: Callable[..., Tensor], stock_same: Callable[[Tensor, Tensor], bool]) -> None:
        self._stock_value, self._stock_same = stock_value, stock_same
        self._by_name: dict[str, Tensor] = {}
        # Constants can lose their name while lowering (_tensor_constant0), but not their storage, which is kept alive
        # here.
        self._by_storage: dict[int, tuple[Tensor, Tensor]] = {}

    def move(self, edge_program: Any, device: str) -> Any:
        """Replaces `CudaBackend.move_program_to_device`: returns the program with placeholders for its tensors."""
        from torch._guards import detect_fake_mode
        from torch.export.passes import move_to_device_pass

        mode = detect_fake_mode([node.meta.get("val") for node in edge_program.graph.nodes if node.op == "placeholder"])
        self._by_name.clear()
        self._by_storage.clear()
        for tensors in (edge_program._state_dict, edge_program._constants):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    self._by_name[name] = own_storage(tensor.detach())
                    with mode:
                        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        edge_program._example_inputs = None
        with mode, torch.no_grad():
            moved = move_to_device_pass(edge_program, device)
        for tensors in (moved._state_dict, moved._constants):
            for name, tensor in tensors.items():
                if name in self._by_name:
                    self._by_storage[tensor.untyped_storage()._cdata] = (tensor, self._by_name[name])
        return moved

    def value(self, graph: Any, name: str) -> Tensor:
        """Replaces `get_original_value_of_constant`: returns the tensor with the bytes of a placeholder."""
        from torch._subclasses.fake_tensor import FakeTensor

        found = self._stock_value(graph, name)
        if not isinstance(found, FakeTensor):
            return found
        real = self._by_name.get(graph.allocated_constant_name[name])
        if real is None:
            real = self._by_storage[graph.constants[name].untyped_storage()._cdata][1]
        assert (real.shape, real.stride(), real.dtype) == (found.shape, found.stride(), found.dtype), name
        return real

    def same(self, data: Tensor, value: Tensor) -> bool:
        """Replaces `is_same_tensor`: placeholders have no bytes or address to compare, only identity."""
        from torch._subclasses.fake_tensor import FakeTensor

        fake = isinstance(data, FakeTensor) or isinstance(value, FakeTensor)
        return data is value if fake else self._stock_same(data, value)


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor itself if it fills its storage, else a copy of its span only, with the same strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = span if tensor.numel() else 0
    if tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == span * tensor.element_size():
        return tensor
    flat = torch.as_strided(tensor, (span,), (1,), tensor.storage_offset()).clone()
    return torch.as_strided(flat, tensor.shape, tensor.stride(), 0)
