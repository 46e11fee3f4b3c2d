"""`ExportSummary`: what was exported and what it cost, as tables for the terminal and as a record beside the files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from executorch_moe.backends.cuda.cross.report import CrossCompileReport
from executorch_moe.backends.cuda.generated_kernels import AccessReport
from executorch_moe.backends.fusion import FusionReport
from executorch_moe.export.host_memory import size
from executorch_moe.export.options import ExportOptions
from executorch_moe.export.quantize.dense import stored_formats
from executorch_moe.export.quantize.dense_torchao import stored_bytes
from executorch_moe.kernels import SCHEMES


@dataclass
class ExportSummary:
    """What was exported and what it cost.

    Attributes:
        options, target: as asked for, and the target with "auto" decided.
        report: the fused layers.
        max_context: positions in the cache.
        dense_bytes: weights that are not experts. embedding_bytes: of them, those that only the embedding reads.
        cache_bytes: the KV cache. reads_written: decode reads the positions of it that were written, not all.
        files: what was written.
        seconds, peaks: of each step, and the most bytes that were resident during it.
        compiled: a record for each GPU that is not here.
        accesses: for each CUDA target, what is known of the memory that generated kernels touch.
    """

    options: ExportOptions
    target: str
    report: FusionReport
    max_context: int
    dense_bytes: int
    embedding_bytes: int = 0
    cache_bytes: int = 0
    reads_written: bool = False
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    compiled: list[CrossCompileReport] = field(default_factory=list)
    accesses: list[AccessReport] = field(default_factory=list)

    def table(self) -> Table:
        """The summary as a table for the terminal."""
        table = Table(title=f"{self.options.model} for {self.target}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        scheme = self.options.scheme
        if SCHEMES[scheme].packed:
            scheme += f", group size {self.options.group_size}, {self.options.algorithm}"
        layers = self.report.layers
        table.add_row(
            "experts", f"{len(layers)} layers fused, {layers[0].num_experts} experts each, top-{layers[0].top_k}"
        )
        table.add_row("scheme", scheme)
        before = sum(2 * 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size for layer in layers)
        after = self.report.bytes_after
        table.add_row("expert weights", f"{size(before)} in bf16 -> {size(after)} packed")
        table.add_row("other weights", size(self.dense_bytes) + self._dense_text())
        table.add_row("methods", f"prefill (2 to {self.max_context} tokens), decode (1 token)")
        for path in self.files:
            table.add_row("file", f"{path}  {size(path.stat().st_size)}")
        for compiled in self.compiled:
            table.add_row("compiled for", str(compiled))
        for accesses in self.accesses:
            table.add_row("checked", str(accesses))
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        table.add_row("time", times)
        table.add_row("peak memory", ", ".join(f"{name} {size(peak)}" for name, peak in self.peaks.items()))
        return table

    def dense_formats(self) -> dict[str, str]:
        """How linear layers, the last of them and the embedding are stored; see `dense.stored_formats`."""
        options = self.options
        return stored_formats(
            self.target, options.dense, options.group_size, lm_head=options.lm_head, embedding=options.embedding
        )

    def _dense_text(self) -> str:
        formats = self.dense_formats()
        if len(set(formats.values())) == 1:
            return "" if formats["linear"] == "none" else f", linear layers and embeddings in {formats['linear']}"
        names = {"linear": "linear layers", "lm_head": "lm_head", "embedding": "embedding"}
        if formats["lm_head"] == formats["linear"]:
            del names["lm_head"]
        return "".join(
            f", {names[part]} in {name}" for part, name in formats.items() if part in names and name != "none"
        )

    def layers_table(self) -> Table:
        """Every fused layer, for --verbose."""
        table = Table(title="fused layers", title_justify="left")
        for column in ("module", "family", "E", "top-k", "H", "I", "activation", "scheme", "before", "after"):
            table.add_column(column, overflow="fold")
        for layer in self.report.layers:
            table.add_row(
                layer.module, layer.family, str(layer.num_experts), str(layer.top_k), str(layer.hidden_size),
                str(layer.intermediate_size), layer.activation, layer.scheme, size(layer.bytes_before),
                size(layer.bytes_after),
            )  # fmt: skip
        return table

    def record(self) -> str:
        """What an export cost, for `bench model`: JSON."""
        choices = asdict(self.options) | {"out": self.options.out.name, "target": self.target}
        peak = {"host": max(self.peaks.values(), default=0)}  # each step starts the system's own count anew
        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
        record: dict[str, Any] = {
            "options": choices,
            "max_context": self.max_context,
            "seconds": self.seconds,
            "peak_bytes": peak,
            "expert_bytes": self.report.bytes_after,
            "other_bytes": self.dense_bytes,
            "embedding_bytes": self.embedding_bytes,
            "cache_bytes": self.cache_bytes,
            "cache_reads": "written" if self.reads_written else "all",
            "dense_formats": self.dense_formats(),
            "generated_kernels": [
                {"kernels": part.kernels, "proven": part.proven, "undecided": part.undecided} for part in self.accesses
            ],
        }
        if self.report.layers:
            layer = self.report.layers[0]
            record["active_experts"] = layer.top_k / layer.num_experts
        return json.dumps(record, indent=2) + "\n"


def bytes_beside_experts(model: nn.Module, report: FusionReport) -> tuple[int, int]:
    """(bytes of all weights outside the fused layers, bytes of those that only the embedding reads)."""
    modules = tuple(f"{layer.module}." for layer in report.layers)
    others = {name: t for name, t in model.state_dict().items() if not f"model.{name}".startswith(modules)}
    total = _distinct_bytes(others.values())
    # A head that is tied to the embedding reads all of it.
    return total, total - _distinct_bytes(tensor for name, tensor in others.items() if "embed_tokens" not in name)


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, those that share their memory counted once."""
    # A quantized tensor is several in one, and has no address of its own.
    plain = (torch.Tensor, nn.Parameter)
    return sum({t.data_ptr() if type(t) in plain else id(t): stored_bytes(t) for t in tensors}.values())
