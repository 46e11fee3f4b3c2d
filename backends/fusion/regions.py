"""Expert regions of an exported ATen program: the nodes of one experts module, with its inputs and outputs.

There are no operator patterns: `nn_module_stack` has the module of each node.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from executorch_moe.kernels import fused_experts as _fused_experts  # noqa: F401  registers torch.ops.executorch_moe

_CHOOSING = ("aten.topk.", "aten.sort.", "aten.argsort.", "aten.argmax.", "aten.max.dim", "aten.multinomial.")
"""A module that chooses experts itself uses one of these operators."""


class NotFusable(Exception):
    """A region cannot be fused; the message is the reason and a remedy."""


class NotPackable(NotFusable):
    """Recognized experts cannot be packed because of their weights, or with the given scheme and group size."""


@dataclass
class Region:
    """One call of one experts module.

    Attributes:
        module: qualified name of the module, without the suffix of a repeated call.
        family: class name of the module.
        nodes: its nodes, in graph order.
        parameters: name below the module -> placeholder node of a parameter or buffer that the nodes read.
        inputs: other nodes that they read, in order of first use.
        outputs: tensors that nodes outside the region read.
    """

    module: str
    family: str
    nodes: list[Node] = field(default_factory=list)
    parameters: dict[str, Node] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def output(self) -> Node:
        """The one output.

        Raises:
            NotFusable: the region has none, or several.
        """
        if len(self.outputs) != 1:
            names = ", ".join(node.name for node in self.outputs) or "none"
            raise NotFusable(
                f"has {len(self.outputs)} outputs ({names}), expected 1: return only the experts' sum from the module"
            )
        return self.outputs[0]


def tensor_of(node: Node) -> torch.Tensor | None:
    """The fake tensor that a node produces; None for other values."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def parameter_targets(program: ExportedProgram) -> dict[str, str]:
    """Name of the placeholder node -> qualified name, for parameters, buffers and lifted constants."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }


def named_experts(family: str) -> bool:
    """True for a class name of routed experts, not of shared experts, which compute every token."""
    return family.endswith("Experts") and not _named_shared(family)


def _named_shared(family: str) -> bool:
    # Routed experts of GraniteMoeShared are GraniteMoeSharedExperts.
    return "SharedExpert" in family and not family.endswith("MoeSharedExperts")


def owns_stacks(tensors: Iterable[torch.Tensor], family: str = "") -> bool:
    """True if two of a module's own tensors may be stacked experts.

    These are two 3-D float tensors [E, a, b] and [E, c, d] with a common width. Tensors with a dimension of 1, such as
    the decay rates of linear attention, do not count.

    Args:
        tensors: the parameters of the module itself, without submodules.
        family: class name of the module; a name of shared experts gives False.
    """
    stacks = [tuple(map(int, t.shape)) for t in tensors if t.dim() == 3 and t.is_floating_point()]
    stacks = [shape for shape in stacks if min(shape) > 1]
    pairs = itertools.combinations(stacks, 2)
    return not _named_shared(family) and any(
        one[0] == other[0] and not {*one[1:]}.isdisjoint(other[1:]) for one, other in pairs
    )


def _owners_of_stacks(program: ExportedProgram) -> set[str]:
    """Modules whose own parameters are stacked experts."""
    owned: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    targets = parameter_targets(program)
    for node in program.graph.nodes:
        tensor = tensor_of(node)
        if tensor is not None and node.op == "placeholder" and node.name in targets:
            owned[targets[node.name].rpartition(".")[0]].append(tensor)
    return {module for module, tensors in owned.items() if owns_stacks(tensors)}


def _call_of(node: Node, owners: set[str]) -> tuple[str, str, str] | None:
    """(key of the call, module, class) of the outermost experts module of `node`."""
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        name = path.removeprefix("L['self'].").partition("@")[0]
        family = str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
        if named_experts(family) or (name in owners and not _named_shared(family)):
            return str(key), name, family
    return None


def find_regions(program: ExportedProgram) -> list[Region]:
    """Every unfused expert region, in graph order.

    A module counts as experts if its class name ends in "Experts" or it owns stacked matrices (`owns_stacks`), and if
    it is routed: it reads expert ids or computes them. Other modules compute every token and are not changed.
    """
    owners = _owners_of_stacks(program)
    targets = parameter_targets(program)
    regions: dict[str, Region] = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        call = _call_of(node, owners)
        if call is not None:
            key, module, family = call
            regions.setdefault(key, Region(module, family)).nodes.append(node)
    fused = torch.ops.executorch_moe.fused_experts.default
    kept = [region for region in regions.values() if not any(node.target is fused for node in region.nodes)]
    for region in kept:
        _fill(region, targets)
    return [region for region in kept if (region.outputs or region.parameters) and _is_routed(region)]


def _is_routed(region: Region) -> bool:
    """True for a region with integer inputs, or one that chooses experts itself."""
    inputs = (tensor_of(node) for node in region.inputs)
    if any(tensor is not None and not tensor.is_floating_point() for tensor in inputs):
        return True
    return any(str(node.target).startswith(_CHOOSING) for node in region.nodes)


def _fill(region: Region, targets: dict[str, str]) -> None:
    inside = set(region.nodes)
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source in inside or source in region.inputs:
                continue
            if source.op == "placeholder" and source.name in targets:
                name = targets[source.name].removeprefix(region.module + ".")
                region.parameters[name] = source
            else:
                region.inputs.append(source)
        if tensor_of(node) is not None and any(user not in inside for user in node.users):
            region.outputs.append(node)
