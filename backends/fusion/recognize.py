"""Recognizes the computation of an expert region: the roles of its inputs, the layout of its weights, its activation.

Shapes give the roles and the possible layouts. To choose among them, the region runs in fp32 on random weights. It must
equal the fp32 oracle for one layout and activation, on inputs of usual and of very large magnitude. So the way in which
a model is written does not matter, and an activation or limit that fused experts do not have is not fused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from executorch_moe.kernels import ACTIVATIONS

from .probe import Probe, match
from .regions import NotFusable, Region, tensor_of

MAX_PROBE_BYTES = 8 << 30
_PROBE_EXPERTS = 8
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Roles:
    """The inputs of a region by role: hidden [T, H], ids [T, top_k], weights [T, top_k]; the rest are sizes."""

    hidden: Node
    ids: Node
    weights: Node
    sizes: tuple[Node, ...]


@dataclass(frozen=True)
class ExpertLayout:
    """How a module stores its experts, by parameter name.

    Attributes:
        gate_up: one name, or the two names of separate gate and up.
        down: name of the down projection.
        transposed: weights are [E, in, out], not [E, out, in].
        order: of the rows of gate_up: "gate, up", "up, gate" or "interleaved" (gate first).
        gate_up_bias, down_bias: names, or None.
        activation: name in `kernels.ACTIVATIONS`.
    """

    gate_up: tuple[str, ...]
    down: str
    transposed: bool
    order: str
    gate_up_bias: str | None
    down_bias: str | None
    activation: str

    def canonical(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Parameters by name -> gate_up [E, 2I, H] (gate rows first), down [E, H, I], biases [E, 2I] and [E, H]."""

        def rows(name: str) -> Tensor:
            return parameters[name].transpose(1, 2) if self.transposed else parameters[name]

        if len(self.gate_up) == 2:
            gate_up = torch.cat([rows(name) for name in self.gate_up], 1)
        else:
            gate_up = self._gate_first(rows(self.gate_up[0]))
        bias = None if self.gate_up_bias is None else self._gate_first(parameters[self.gate_up_bias])
        return gate_up, rows(self.down), bias, None if self.down_bias is None else parameters[self.down_bias]

    def stored(
        self, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Parameters by name as the module stores them: the inverse of `canonical`."""

        def columns(rows: Tensor) -> Tensor:
            return rows.transpose(1, 2).contiguous() if self.transposed else rows

        matrices = gate_up.chunk(2, 1) if len(self.gate_up) == 2 else [self._as_ordered(gate_up)]
        parameters = {name: columns(rows) for name, rows in zip(self.gate_up, matrices, strict=True)}
        parameters[self.down] = columns(down)
        if self.gate_up_bias is not None and gate_up_bias is not None:
            parameters[self.gate_up_bias] = self._as_ordered(gate_up_bias)
        if self.down_bias is not None and down_bias is not None:
            parameters[self.down_bias] = down_bias
        return parameters

    def _as_ordered(self, gate_first: Tensor) -> Tensor:
        gate, up = gate_first.chunk(2, 1)
        if self.order == "interleaved":
            return torch.stack([gate, up], 2).flatten(1, 2)
        return gate_first if self.order == "gate, up" else torch.cat([up, gate], 1)

    def _gate_first(self, rows: Tensor) -> Tensor:
        if self.order == "interleaved":
            return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)
        return rows if self.order == "gate, up" else torch.cat(rows.chunk(2, 1)[::-1], 1)


def hint(size: Any) -> int:
    """The value of a size in the example inputs."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    return int(value if value is not None else size.node.shape_env.size_hint(size.node.expr))


def _shape(node: Node) -> list[int]:
    tensor = tensor_of(node)
    assert tensor is not None
    return [hint(size) for size in tensor.shape]


def find_roles(region: Region) -> Roles:
    """Inputs by role.

    Raises:
        NotFusable: no input, or more than one, fits a role.
    """
    tensors = [node for node in region.inputs if tensor_of(node) is not None]
    sizes = tuple(node for node in region.inputs if isinstance(node.meta.get("val"), (int, torch.SymInt)))
    if odd := [node.name for node in region.inputs if node not in tensors and node not in sizes]:
        raise NotFusable(f"reads {', '.join(odd)}, neither tensors nor sizes: pass tensors to the experts module")
    floats = [node for node in tensors if tensor_of(node).is_floating_point()]  # type: ignore[union-attr]
    ids = [node for node in tensors if node not in floats]
    if len(ids) != 1 or len(_shape(ids[0])) != 2:
        found = ", ".join(f"{node.name} {_shape(node)}" for node in ids) or "none"
        raise NotFusable(
            f"has integer inputs {found}, expected one, the expert ids [T, top_k]: keep the router outside the module"
        )
    weights = [node for node in floats if _shape(node) == _shape(ids[0])]
    hidden = [node for node in floats if node not in weights]
    if len(weights) != 1 or len(hidden) != 1 or len(_shape(hidden[0])) != 2:
        found = ", ".join(f"{node.name} {_shape(node)}" for node in floats) or "none"
        raise NotFusable(
            f"has float inputs {found}, expected hidden states [T, H] and routing weights {_shape(ids[0])}: "
            "flatten batch and sequence, and keep the router outside the module"
        )
    return Roles(hidden[0], ids[0], weights[0], sizes)


def possible_layouts(shapes: Mapping[str, tuple[int, ...]], hidden_size: int) -> list[ExpertLayout]:
    """Every layout that the parameters' shapes allow; empty if they are not experts of this hidden size."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 3]
    biases = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) + len(biases) == len(shapes):
        if len(matrices) == 2 and len(biases) in (0, 2):
            return list(_of_two(shapes, matrices, biases, hidden_size))
        if len(matrices) == 3 and not biases:
            return list(_of_three(shapes, matrices, hidden_size))
    return []


def no_layout(shapes: Mapping[str, tuple[int, ...]], hidden_size: int | None = None) -> NotFusable:
    """The error for parameters that fit no layout."""
    found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"
    known = "" if hidden_size is None else f" with H={hidden_size}"
    return NotFusable(
        f"has parameters {found}, expected gate_up [E, 2I, H] and down [E, H, I]{known}, transposed "
        "or not, with two biases or none, or gate, up and down without biases: store the experts that way"
    )


def _of_two(
    shapes: Mapping[str, tuple[int, ...]], matrices: list[str], biases: list[str], h: int
) -> Iterator[ExpertLayout]:
    for (gate_up, down), transposed in itertools.product(itertools.permutations(matrices), (False, True)):
        e, n, k = shapes[gate_up]
        if transposed:
            n, k = k, n
        if k != h or n % 2 or shapes[down] != ((e, n // 2, h) if transposed else (e, h, n // 2)):
            continue
        for pair in itertools.permutations(biases) if biases else [(None, None)]:
            if biases and (shapes[pair[0]], shapes[pair[1]]) != ((e, n), (e, h)):  # type: ignore[index]
                continue
            for order, activation in itertools.product(("gate, up", "interleaved", "up, gate"), ACTIVATIONS):
                yield ExpertLayout((gate_up,), down, transposed, order, pair[0], pair[1], activation)


def _of_three(shapes: Mapping[str, tuple[int, ...]], matrices: list[str], h: int) -> Iterator[ExpertLayout]:
    for (gate, up, down), transposed in itertools.product(itertools.permutations(matrices), (False, True)):
        e, n, k = shapes[gate]
        if transposed:
            n, k = k, n
        if k != h or shapes[up] != shapes[gate] or shapes[down] != ((e, n, h) if transposed else (e, h, n)):
            continue
        for activation in ACTIVATIONS:
            yield ExpertLayout((gate, up), down, transposed, "gate, up", None, None, activation)


def recognize(region: Region, roles: Roles) -> ExpertLayout:
    """The layout and activation for which the fp32 oracle reproduces the region's output.

    Raises:
        NotFusable: no supported expert layer has these shapes or values.
    """
    t, h = _shape(roles.hidden)
    top_k = _shape(roles.ids)[1]
    output = region.output()
    if _shape(output) != [t, h]:
        raise NotFusable(f"returns {_shape(output)}, expected [T, H] = [{t}, {h}]: return the sum over the experts")
    shapes = {name: tuple(_shape(node)) for name, node in region.parameters.items()}
    layouts = possible_layouts(shapes, h)
    if not layouts:
        raise no_layout(shapes, h)
    largest = max((_elements(node) for node in region.nodes), default=0) * 4
    if largest > MAX_PROBE_BYTES:
        raise NotFusable(
            f"needs a tensor of {largest / 2**30:.0f} GiB to be checked at T={t}: export with an example of fewer "
            "tokens, or with experts_implementation='grouped_mm'"
        )
    e = shapes[layouts[0].down][0]
    if top_k > e:
        raise NotFusable(f"chooses top_k={top_k} of E={e} experts: check the router")

    # A probe of one token has one magnitude, so it takes two.
    results = []
    for first_large in (False,) if t > 1 else (False, True):
        probe = Probe.make(shapes, t, h, top_k, max(top_k, _PROBE_EXPERTS), first_large)
        results.append((probe, _probed(region, roles, probe)))
    return match(results, layouts)


def _probed(region: Region, roles: Roles, probe: Probe) -> Tensor:
    """The region's output for a probe.

    Raises:
        NotFusable: the region cannot be run, or writes to its inputs.
    """
    ids_tensor = tensor_of(roles.ids)
    assert ids_tensor is not None
    ids = probe.ids.to(ids_tensor.dtype)
    env: dict[Node, Any] = {region.parameters[name]: value for name, value in probe.parameters.items()}
    env |= {roles.hidden: probe.hidden.clone(), roles.ids: ids.clone(), roles.weights: probe.weights.clone()}
    env |= {node: hint(node.meta["val"]) for node in roles.sizes}
    try:
        actual = run_region(region, env)
    except Exception as error:
        raise NotFusable(
            f"cannot be run on the CPU ({one_line(error)}): use experts_implementation='grouped_mm' or 'batched_mm'"
        ) from error
    given = ((roles.hidden, probe.hidden), (roles.ids, ids), (roles.weights, probe.weights))
    if changed := [node.name for node, value in given if not torch.equal(env[node], value)]:
        raise NotFusable(f"writes to its input {changed[0]}: clone it before the module")
    return actual


def one_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _elements(node: Node) -> int:
    tensor = tensor_of(node)
    if tensor is None:
        return 0
    return math.prod(hint(size) for size in tensor.shape)


# ------------------------------------------------------------------ running a region in fp32


def _grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`aten._grouped_mm` of [S, K] and [E, K, N] in fp32; torch's CPU kernel accepts bf16 only. `out_dtype` is fp32."""
    if bias is not None:
        raise NotImplementedError("aten._grouped_mm with a bias: add the bias after it")
    out, start = x.new_zeros(x.shape[0], weight.shape[2]), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ weight[expert]
        start = end
    return out


def _histc(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`aten.histc` on floats: programs for CUDA pass integers, which the CPU kernel does not accept."""
    return torch.histc(x.float(), *args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Skips assertions about dtypes, which differ from those of the trace."""


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._grouped_mm.default: _grouped_mm,
    torch.ops.aten.histc.default: _histc,
    torch.ops.aten._assert_tensor_metadata.default: _nothing,
}


def _in_fp32(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float32 if argument in _HALF else argument
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


@torch.no_grad()
def run_region(region: Region, env: dict[Node, Any]) -> Tensor:
    """The region's output for given inputs, on the CPU with fp32 in place of every half-precision type.

    Args:
        region: the region.
        env: values of the region's inputs and parameters; the values of its nodes are added.

    Raises:
        NotImplementedError: a node is not a call of an operator.
    """
    for node in region.nodes:
        if node.op != "call_function":
            raise NotImplementedError(f"{node.op} node {node.name}")
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        args, kwargs = map_aggregate(args, _in_fp32), map_aggregate(kwargs, _in_fp32)
        env[node] = _INSTEAD.get(node.target, node.target)(*args, **kwargs)
    result: Tensor = env[region.output()]
    return result


def fingerprint(region: Region, roles: Roles) -> str:
    """A text that is equal for regions that compute the same, so that forty equal layers are recognized once."""
    names: dict[Node, str] = {roles.hidden: "hidden", roles.ids: "ids", roles.weights: "weights"}
    names |= {node: f"size {hint(node.meta['val'])}" for node in roles.sizes}
    names |= {node: f"{name} {_shape(node)}" for name, node in region.parameters.items()}
    lines = [f"{_shape(roles.hidden)} {_shape(roles.ids)} {tensor_of(roles.ids).dtype}"]  # type: ignore[union-attr]
    for index, node in enumerate(region.nodes):
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: f"<{names[source]}>")
        lines.append(f"{node.target} {args} {kwargs}")
        names[node] = str(index)
    return "\n".join([*lines, names[region.output()]])
