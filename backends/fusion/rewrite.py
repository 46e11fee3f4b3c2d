"""Edits an exported program: a region becomes one node, packed weights become buffers, unused parameters go away."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from executorch_moe.kernels import PackedExperts

from .recognize import Roles
from .regions import Region, tensor_of


class ProgramEditor:
    """A copy of a program (graph, signature and tables; tensors are shared) to edit. Call `finish` at the end."""

    def __init__(self, program: ExportedProgram) -> None:
        module = copy.deepcopy(program.graph_module)
        signature = program.graph_signature
        self.program = ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=ExportGraphSignature(list(signature.input_specs), list(signature.output_specs)),
            state_dict=dict(program.state_dict),
            range_constraints=copy.copy(program.range_constraints),
            module_call_graph=copy.copy(program.module_call_graph),
            example_inputs=program.example_inputs,
            constants=dict(program.constants),
            verifiers=list(program.verifiers),
        )
        self._fake_mode = fake_mode_of(self.program)
        self._replaced: list[Node] = []

    def tensor(self, target: str) -> Tensor:
        """The parameter, buffer or lifted constant of a qualified name."""
        value = self.program.state_dict.get(target)
        return self.program.constants[target] if value is None else value

    def replace(self, region: Region, inputs: Roles, packed: PackedExperts, activation: str) -> None:
        """Replace a region with one `fused_experts` node on buffers named MODULE.packed_*."""
        output = region.output()
        hidden, original = tensor_of(inputs.hidden), tensor_of(output)
        assert hidden is not None and original is not None
        graph = self.program.graph
        buffers = [
            None if tensor is None else self._buffer(f"{region.module}.packed_{name}", tensor)
            for name, tensor in packed.tensors().items()
        ]
        # Just before the output: all inputs come before any node of the region, and all users after its output.
        with graph.inserting_before(output):
            x = self._cast(inputs.hidden, torch.bfloat16, output)
            fused = graph.call_function(
                torch.ops.executorch_moe.fused_experts.default,
                (x, inputs.ids, inputs.weights, *buffers, packed.scheme, activation, packed.group_size),
            )
            fused.meta = self._meta(output, hidden.new_empty(hidden.shape, dtype=torch.bfloat16))
            result = self._cast(fused, original.dtype, output)
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        # Dead code elimination keeps in-place nodes, so the region is erased node by node. Sizes with other users stay.
        for node in reversed(region.nodes):
            if not node.users:
                graph.erase_node(node)
        self._replaced += region.parameters.values()

    def finish(self) -> ExportedProgram:
        """The edited program, checked, without the parameters that only fused regions read."""
        program = self.program
        for node in dict.fromkeys(self._replaced):
            if node.users:
                continue
            spec = next(s for s in program.graph_signature.input_specs if s.arg.name == node.name)
            program.graph_signature.input_specs.remove(spec)
            program.graph.erase_node(node)
            if not any(other.target == spec.target for other in program.graph_signature.input_specs):
                program.state_dict.pop(spec.target, None)
                program.constants.pop(spec.target, None)
        program.graph.lint()
        program.graph_module.recompile()
        program.validate()
        return program

    def _buffer(self, target: str, tensor: Tensor) -> Node:
        """The placeholder node of a buffer, created on first use after all parameters and buffers."""
        specs, graph = self.program.graph_signature.input_specs, self.program.graph
        for spec in specs:
            if spec.target == target:
                return next(node for node in graph.nodes if node.op == "placeholder" and node.name == spec.arg.name)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        weights = (InputKind.PARAMETER, InputKind.BUFFER)
        last = max((i for i, spec in enumerate(specs) if spec.kind in weights), default=-1)
        following = placeholders[last + 1] if last + 1 < len(placeholders) else _first_other(graph)
        with graph.inserting_before(following):
            node = graph.placeholder("b_" + target.replace(".", "_"))
        node.meta = {"val": self._fake_mode.from_tensor(tensor, static_shapes=True)}
        specs.insert(last + 1, InputSpec(InputKind.BUFFER, TensorArgument(node.name), target, persistent=True))
        self.program.state_dict[target] = tensor
        return node

    def _cast(self, node: Node, dtype: torch.dtype, like: Node) -> Node:
        tensor = tensor_of(node)
        assert tensor is not None
        if tensor.dtype == dtype:
            return node
        cast = self.program.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})
        cast.meta = self._meta(like, tensor.new_empty(tensor.shape, dtype=dtype))
        return cast

    def _meta(self, like: Node, value: Tensor) -> dict[str, Any]:
        kept = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack", "custom")
        return {"val": value, **{key: like.meta[key] for key in kept if key in like.meta}}


def _first_other(graph: torch.fx.Graph) -> Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def fake_mode_of(program: ExportedProgram) -> FakeTensorMode:
    """The mode of the fake tensors of a program; a new one if it has none."""
    for node in program.graph.nodes:
        if isinstance(value := node.meta.get("val"), FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)
