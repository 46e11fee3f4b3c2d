"""Experts modules of an eager model: which modules they are, what they compute, and their weights packed.

The same rules as for exported programs (`regions`, `recognise`), on a module that is run instead of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.kernels import FusedExperts, PackedExperts, pack_experts, stack_experts

from .recognise import ExpertLayout, Probe, no_layout, one_line, possible_layouts
from .regions import NotFusable, owns_stacks

_TOKENS, _TOP_K = 3, 2


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (qualified name, module) of each experts module below `model` that is not fused yet, outermost ones only.

    A module counts as experts if its class name ends in "Experts" or if it owns two 3-D parameters of one first size.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or isinstance(module, FusedExperts) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if type(module).__name__.endswith("Experts") or owns_stacks(module.parameters(recurse=False)):
            found.append(name)
            yield name, module


@torch.no_grad()
def recognise_module(module: nn.Module) -> ExpertLayout:
    """What an experts module computes, measured by running it in fp32 on random weights; see `recognise`.

    Args:
        module: called as module(hidden_states [T, H], topk_ids [T, top_k], topk_weights [T, top_k]) -> [T, H], as in
            transformers. Its parameters are read for their shapes only, so that they may be quantised or on any device.

    Raises:
        NotFusable: it cannot be called so, or computes something else.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    sizes = sorted({size for shape in shapes.values() if len(shape) == 3 for size in shape[1:]}, reverse=True)
    candidates = [(h, layouts) for h in sizes if (layouts := possible_layouts(shapes, h))]
    reason = no_layout(shapes)
    for h, layouts in candidates:
        experts = min(_TOP_K, shapes[layouts[0].down][0])
        probe = Probe.make(shapes, _TOKENS, h, experts, experts)
        try:
            return probe.match(layouts, _run(module, probe))
        except NotFusable as error:
            reason = error
    raise reason


def _run(module: nn.Module, probe: Probe) -> Tensor:
    inputs: tuple[Any, ...] = (probe.hidden.clone(), probe.ids.clone(), probe.weights.clone())
    how = "module(hidden_states [T, H], topk_ids [T, top_k], topk_weights [T, top_k]) -> [T, H]"
    remedy = "let the partitioner fuse it while lowering"
    try:
        output = torch.func.functional_call(module, probe.parameters, inputs)
    except Exception as error:
        raise NotFusable(f"cannot be called as {how} ({one_line(error)}): {remedy}") from error
    if not isinstance(output, Tensor) or output.shape != probe.hidden.shape:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NotFusable(f"returns {shape}, expected {how}: {remedy}")
    return output


def pack_layer(
    layout: ExpertLayout, parameters: Mapping[str, Tensor], scheme: str, group_size: int, algorithm: str
) -> PackedExperts:
    """`pack_experts` on parameters as a module stores them, one expert at a time.

    Raises:
        ValueError: see `pack_experts`.
    """
    num_experts = parameters[layout.down].shape[0]

    def one(expert: int) -> PackedExperts:
        alone = {name: tensor[expert : expert + 1].detach() for name, tensor in parameters.items()}
        gate_up, down, gate_up_bias, down_bias = layout.canonical(alone)
        return pack_experts(
            gate_up,
            down,
            scheme=scheme,
            group_size=group_size,
            algorithm=algorithm,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            first_expert=expert,
        )

    return stack_experts(map(one, range(num_experts)), num_experts)
