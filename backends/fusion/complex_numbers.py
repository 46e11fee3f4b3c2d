"""Replaces complex numbers in an exported program by pairs of real numbers.

DeepSeek-V2 rotates queries and keys by multiplying complex numbers. ExecuTorch has no kernels for them, and Inductor
calls torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from .regions import tensor_of
from .rewrite import ProgramEditor, fake_mode_of

aten = torch.ops.aten
_SAME = (
    aten.to.dtype_layout,
    aten.to.dtype,
    aten.to.device,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten.expand.default)


class _Unknown(Exception):
    """An operator on complex numbers that is not replaced."""


def is_complex(node: Node) -> bool:
    """True for a node that computes a complex tensor."""
    value = tensor_of(node)
    return value is not None and value.is_complex()


def without_complex_numbers(program: ExportedProgram) -> ExportedProgram:
    """Returns the program with a real tensor [..., 2] in place of each complex one [...].

    It returns `program` itself if it has none, or if an operator on them is not known here, or if an input or output of
    the program is complex; then lowering names the operators without a kernel. It does not edit `program`.
    """
    nodes = program.graph.nodes
    if not any(map(is_complex, nodes)):
        return program
    editor = ProgramEditor(program)
    try:
        _Replacer(editor.program).run()
    except _Unknown:
        return program
    return editor.finish()


class _Replacer:
    """Edits one program. `pairs` has the real tensor for each complex node."""

    def __init__(self, program: ExportedProgram) -> None:
        self.graph = program.graph
        self.mode = fake_mode_of(program)
        self.pairs: dict[Node, Node] = {}
        self.origin: Node

    def run(self) -> None:
        """Replaces every complex node.

        Raises:
            _Unknown: an operator that is not known.
        """
        old: list[Node] = []
        for node in list(self.graph.nodes):
            reads = any(source in self.pairs for source in node.all_input_nodes)
            if not reads and not is_complex(node):
                continue
            self.origin = node
            with self.graph.inserting_before(node):
                if node.target is aten._assert_tensor_metadata.default:
                    pass
                elif node.target is aten.view_as_real.default:
                    node.replace_all_uses_with(self.pairs[node.args[0]])  # type: ignore[index]
                elif is_complex(node):
                    self.pairs[node] = self._pair(node)
                else:
                    raise _Unknown(str(node.target))
            old.append(node)
        for node in reversed(old):
            self.graph.erase_node(node)

    def _pair(self, node: Node) -> Node:
        target, args = node.target, node.args
        if target is aten.polar.default:
            length, angle = args
            parts = [self._call(function, angle) for function in (aten.cos.default, aten.sin.default)]
            return self._call(aten.stack.default, [self._call(aten.mul.Tensor, length, part) for part in parts], -1)
        if target is aten.view_as_complex.default:
            return args[0]  # type: ignore[return-value]
        if target is aten.mul.Tensor:
            return self._product(*args)
        z = self.pairs.get(args[0]) if args and isinstance(args[0], Node) else None
        if z is None:
            raise _Unknown(str(target))
        if target is aten.unsqueeze.default:
            dim = args[1]
            return self._call(aten.unsqueeze.default, z, dim if dim >= 0 else dim - 1)  # type: ignore[operator]
        if target in _RESHAPES:
            return self._call(target, z, [*args[1], 2])  # type: ignore[misc]
        value, source = tensor_of(node), tensor_of(args[0])  # type: ignore[arg-type]
        assert value is not None and source is not None
        if target in _SAME and (value.dtype, value.device) == (source.dtype, source.device):
            return z
        raise _Unknown(str(target))

    def _product(self, left: Any, right: Any) -> Node:
        if right in self.pairs and left not in self.pairs:
            left, right = right, left
        z = self.pairs[left]
        if right not in self.pairs:  # a real tensor or number
            factor = self._call(aten.unsqueeze.default, right, -1) if isinstance(right, Node) else right
            return self._call(aten.mul.Tensor, z, factor)
        (a, b), (c, d) = (self._parts(pair) for pair in (z, self.pairs[right]))
        mul = aten.mul.Tensor
        real = self._call(aten.sub.Tensor, self._call(mul, a, c), self._call(mul, b, d))
        imaginary = self._call(aten.add.Tensor, self._call(mul, a, d), self._call(mul, b, c))
        return self._call(aten.stack.default, [real, imaginary], -1)

    def _parts(self, pair: Node) -> tuple[Node, Node]:
        return self._call(aten.select.int, pair, -1, 0), self._call(aten.select.int, pair, -1, 1)

    def _call(self, target: Callable[..., Any], *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta = {key: value for key, value in self.origin.meta.items() if key in ("nn_module_stack", "stack_trace")}
        with self.mode:
            node.meta["val"] = target(*map_arg(args, lambda source: source.meta["val"]))
        return node
