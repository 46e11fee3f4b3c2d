"""`ExportSummary`: what was exported, with sizes, times and memory, as tables and as a record beside the files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
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

from .metadata import stored_options


@dataclass
class ExportSummary:
    """What was exported, with sizes, times and memory.

    Attributes:
        options: of the export.
        report: the fused layers.
        max_context: positions in the KV cache.
        dense_bytes: bytes of all weights except the experts'.
        embedding_bytes: of these, bytes that only the embedding reads.
        cache_bytes: bytes of the KV cache.
        sizes: of the model, see `model_sizes`.
        reads_written: True if decode reads only the positions of the cache that were written.
        files: the files that were written.
        seconds: step -> its time.
        peaks: step -> peak of resident bytes.
        compiled: one record per GPU by name.
        accesses: one record per CUDA target of the memory accesses of generated kernels.
    """

    options: ExportOptions
    report: FusionReport
    max_context: int
    dense_bytes: int
    embedding_bytes: int = 0
    cache_bytes: int = 0
    reads_written: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    compiled: list[CrossCompileReport] = field(default_factory=list)
    accesses: list[AccessReport] = field(default_factory=list)

    def table(self) -> Table:
        """The summary as a table for the terminal."""
        table = Table(
            title=f"{self.options.model} for {self.options.target.name}", show_header=False, title_justify="left"
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        experts = self.options.experts
        scheme = experts.scheme
        layers = self.report.layers
        if SCHEMES[scheme].packed:
            kinds = dict.fromkeys((layer.group_size, layer.algorithm) for layer in layers)
            scheme += "".join(f", group size {size}, {_how(algorithm)}" for size, algorithm in kinds)
        table.add_row(
            "experts", f"{len(layers)} layers fused, {layers[0].num_experts} experts each, top-{layers[0].top_k}"
        )
        table.add_row("scheme", scheme)
        before = sum(2 * 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size for layer in layers)
        after = self.report.bytes_after
        table.add_row("expert weights", f"{size(before)} in bf16 -> {size(after)} packed")
        table.add_row("other weights", size(self.dense_bytes) + self._dense_text())
        methods, rows = f"prefill (1 to {self.max_context} tokens), decode (1 token)", self.options.context.max_batch
        table.add_row("methods", methods + (f", decode_batch ({rows} sequences)" if rows > 1 else ""))
        if rows > 1:
            table.add_row("KV cache", f"{size(self.cache_bytes)}, {size(self.cache_bytes // rows)} for each sequence")
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
        """Storage formats of linear layers, lm_head and embedding; see `dense.stored_formats`."""
        dense, group_size = self.options.dense, self.options.experts.group_size
        return stored_formats(
            self.options.target.name, dense.linears, group_size, lm_head=dense.lm_head, embedding=dense.embedding
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
        table.add_column("module", no_wrap=True)
        table.add_column("experts", overflow="fold", min_width=16)
        table.add_column("weights", overflow="fold", min_width=10)
        for layer in self.report.layers:
            experts = (
                f"{layer.family}: E={layer.num_experts}, top-{layer.top_k}, H={layer.hidden_size}, "
                f"I={layer.intermediate_size}, {layer.activation}, {layer.scheme}"
            )
            table.add_row(layer.module, experts, f"{size(layer.bytes_before)} -> {size(layer.bytes_after)}")
        return table

    def record(self) -> str:
        """Options, sizes, times and memory of the export as JSON, which `bench model` reads."""
        peak = {"host": max(self.peaks.values(), default=0)}  # the system counts anew in each step
        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
        record: dict[str, Any] = {
            "options": stored_options(self.options),
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
        if self.sizes:
            record["sizes"] = self.sizes
        if self.report.layers:
            layer = self.report.layers[0]
            record["active_experts"] = layer.top_k / layer.num_experts
        return json.dumps(record, indent=2) + "\n"


def model_sizes(config: Any) -> dict[str, int]:
    """Sizes of a model from its transformers configuration, by field of `bench.prompt_work.ModelSizes`.

    Empty for other families than Qwen3-MoE, Qwen3.5-MoE and Qwen3-Next, and for models with layers without experts.
    """
    recurrent = config.model_type in ("qwen3_5_moe_text", "qwen3_next")
    dense = getattr(config, "mlp_only_layers", []) or getattr(config, "decoder_sparse_step", 1) != 1
    if not (recurrent or config.model_type == "qwen3_moe") or dense:
        return {}
    sizes = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "intermediate": config.moe_intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
    }
    if recurrent:
        sizes |= {
            "query_parts": 2,
            "shared": config.shared_expert_intermediate_size,
            "recurrent_layers": list(config.layer_types).count("linear_attention"),
            "key_heads": config.linear_num_key_heads,
            "value_heads": config.linear_num_value_heads,
            "key_dim": config.linear_key_head_dim,
            "value_dim": config.linear_value_head_dim,
        }
    return sizes


def _how(algorithm: str) -> str:
    """How the weights of a layer were rounded, as the summary shows it."""
    return algorithm.replace("kept", "codes of the checkpoint")


def bytes_beside_experts(model: nn.Module, report: FusionReport) -> tuple[int, int]:
    """(bytes of all weights outside the fused layers, bytes of those weights that only the embedding reads)."""
    modules = tuple(f"{layer.module}." for layer in report.layers)
    others = {name: t for name, t in model.state_dict().items() if not f"model.{name}".startswith(modules)}
    total = _distinct_bytes(others.values())
    # A head that is tied to the embedding reads the same weights.
    return total, total - _distinct_bytes(tensor for name, tensor in others.items() if "embed_tokens" not in name)


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; tensors that share memory count once."""
    # A quantized tensor consists of several tensors and has no address of its own.
    plain = (torch.Tensor, nn.Parameter)
    return sum({t.data_ptr() if type(t) in plain else id(t): stored_bytes(t) for t in tensors}.values())
