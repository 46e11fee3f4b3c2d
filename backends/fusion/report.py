"""Report of fusion: one record for each layer, as objects and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class Experts(Protocol):
    """Common properties of packed experts, as tensors (`PackedExperts`) or as a module."""

    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def scheme(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def w2_bias(self) -> Any: ...


@dataclass(frozen=True)
class FusedLayer:
    """One expert layer that is now a `fused_experts` node.

    Attributes:
        module: qualified name of the experts module.
        family: class name of the module, for example "Qwen3MoeExperts".
        num_experts, top_k, hidden_size, intermediate_size: E, top_k, H and I.
        activation: name in `kernels.ACTIVATIONS`.
        biases: True if the experts have biases.
        scheme, group_size: of the packed weights; group_size is 0 for scheme bf16.
        bytes_before, bytes_after: size of the parameters in the program, and packed.
        algorithm: rounding of the weights, "minmax" or "hqq"; "kept" for codes of the checkpoint;
            "kept, minmax" for a layer of which only some matrices have codes; "" for bf16.
        error: of the packed weights of a quantized checkpoint against the checkpoint's own, relative L2; None for
            weights that are stored as floats.
    """

    module: str
    family: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    biases: bool
    scheme: str
    group_size: int
    bytes_before: int
    bytes_after: int
    algorithm: str = ""
    error: float | None = None

    @classmethod
    def of(
        cls,
        module: str,
        family: str,
        experts: Experts,
        *,
        top_k: int,
        activation: str,
        algorithm: str,
        bytes_before: int,
        bytes_after: int,
        error: float | None = None,
    ) -> FusedLayer:
        """The record of packed experts. The arguments are the attributes of the same names."""
        return cls(
            module=module,
            family=family,
            num_experts=experts.num_experts,
            top_k=top_k,
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
            activation=activation,
            biases=experts.w2_bias is not None,
            scheme=experts.scheme,
            group_size=experts.group_size,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            algorithm=algorithm if experts.group_size else "",
            error=error,
        )


@dataclass(frozen=True)
class UnfusedRegion:
    """An expert region that is not fused, and the reason."""

    module: str
    family: str
    reason: str


@dataclass
class FusionReport:
    """All expert regions of the methods that one `ExpertFuser` processed. A layer in two methods counts once."""

    layers: list[FusedLayer] = field(default_factory=list)
    unfused: list[UnfusedRegion] = field(default_factory=list)

    def add(self, record: FusedLayer | UnfusedRegion) -> None:
        """Record a region, unless another method has recorded it."""
        if isinstance(record, FusedLayer):
            if record not in self.layers:
                self.layers.append(record)
        elif record not in self.unfused:
            self.unfused.append(record)

    @property
    def bytes_before(self) -> int:
        """Bytes of all layers before packing."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all layers, packed."""
        return sum(layer.bytes_after for layer in self.layers)

    def json(self) -> str:
        """The report as JSON: {"layers": [...], "unfused": [...], "bytes_before": ..., "bytes_after": ...}."""
        content = {**asdict(self), "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return json.dumps(content, indent=2)
