"""Experts modules of an eager model: finds them, recognizes their computation, and packs their weights.

The rules are those for exported programs (`regions`, `recognize`), applied to a module instead of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.kernels import FusedExperts, Int4Codes, PackedExperts, pack_codes, pack_experts, stack_experts
from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes

from .probe import Probe, match
from .recognize import ExpertLayout, no_layout, one_line, possible_layouts
from .regions import NotFusable, named_experts, owns_stacks

# Enough rows for both magnitudes of a probe.
_TOKENS, _TOP_K = 6, 2


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (qualified name, module) of each unfused experts module below `model`, outermost modules only.

    A module counts as experts if its class name ends in "Experts" or if it owns stacked matrices (`owns_stacks`).
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or isinstance(module, FusedExperts) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        family = type(module).__name__
        if named_experts(family) or owns_stacks(module.parameters(recurse=False), family):
            found.append(name)
            yield name, module


@torch.no_grad()
def recognize_module(module: nn.Module) -> ExpertLayout:
    """Find the layout and activation of an experts module by running it in fp32 on random weights; see `recognize`.

    Args:
        module: called as module(hidden_states [T, H], topk_ids [T, top_k], topk_weights [T, top_k]) -> [T, H], as in
            transformers. Only the shapes of its parameters are used, so they may be quantized and on any device.

    Raises:
        NotFusable: the module cannot be called this way, or computes something else.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    sizes = sorted({size for shape in shapes.values() if len(shape) == 3 for size in shape[1:]}, reverse=True)
    candidates = [(h, layouts) for h in sizes if (layouts := possible_layouts(shapes, h))]
    reason = no_layout(shapes)
    for h, layouts in candidates:
        experts = min(_TOP_K, shapes[layouts[0].down][0])
        probe = Probe.make(shapes, _TOKENS, h, experts, experts)
        try:
            return match([(probe, _run(module, probe))], layouts)
        except NotFusable as error:
            reason = error
    raise reason


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """A key that is equal for modules that compute the same on equal parameters, so that equal layers are probed once.

    It contains class, shapes, and all other attributes of the module and its submodules, because layers of one class
    can differ in a limit. Attributes without comparable values are equal only if they are the same object.
    """
    parts: list[object] = []
    for name, part in module.named_modules():
        attributes = {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE}
        parts += [name, type(part), repr(part), *sorted((key, _value(value)) for key, value in attributes.items())]
        parts += [(key, tuple(parameter.shape)) for key, parameter in part.named_parameters(recurse=False)]
        parts += [(key, _value(buffer)) for key, buffer in part.named_buffers(recurse=False)]
    return tuple(parts)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _value(value: Any) -> str:
    """Text that is equal for equal values."""
    if isinstance(value, Tensor) and not value.is_meta:
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__} {[_value(part) for part in value]}"
    if isinstance(value, dict):
        return f"{[(_value(key), _value(part)) for key, part in value.items()]}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(value)
    return f"{type(value).__name__} at {id(value)}"


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
    """`pack_experts` on the parameters of a module in its own layout, one expert at a time.

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


def pack_layer_codes(
    layout: ExpertLayout, codes: Mapping[str, Int4Codes | Mxfp4Codes], biases: Mapping[str, Tensor], scheme: str
) -> PackedExperts:
    """`pack_codes` on the codes of a module in its own layout.

    Args:
        layout: how the module stores its experts. Codes are never transposed, because groups run along K.
        codes: name in `layout` -> codes [E, N, K], of one kind; gate and up have the same group size, and zero points
            both or none.
        biases: name in `layout` -> float bias.
        scheme: "w4a16" or "w4a8"; "mxfp4" for `Mxfp4Codes`.

    Raises:
        ValueError: see `pack_codes`.
    """
    layout = replace(layout, transposed=False)

    def rows(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return layout.canonical({**biases, **parts})

    q13, q2, gate_up_bias, down_bias = rows({name: code.q for name, code in codes.items()})
    s13, s2, *_ = rows({name: code.scale for name, code in codes.items()})
    w13: Int4Codes | Mxfp4Codes = Mxfp4Codes(q13, s13)
    w2: Int4Codes | Mxfp4Codes = Mxfp4Codes(q2, s2)
    if scheme != "mxfp4":
        zeros = {
            name: code.zero for name, code in codes.items() if isinstance(code, Int4Codes) and code.zero is not None
        }
        z13, z2, *_ = rows(zeros) if zeros else (None, None)
        w13, w2 = Int4Codes(q13, s13, z13), Int4Codes(q2, s2, z2)
    return pack_codes(w13, w2, scheme=scheme, gate_up_bias=gate_up_bias, down_bias=down_bias)
