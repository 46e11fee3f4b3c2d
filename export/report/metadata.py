"""Constant methods of an artifact, and the files beside it.

The options of an export are stored with flat keys: in NAME.export.json, and in the constant method `MADE_FROM` of
artifacts with placeholder weights. The keys stay the same, so that each version of this package reads the artifacts of
all others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from executorch_moe.backends.runtime.loader import MAX_BATCH, RECURRENT
from executorch_moe.export.checkpoint.gguf import find_folder, is_gguf
from executorch_moe.export.checkpoint.work_folder import work_folder_path
from executorch_moe.export.models.delta_rule import LINEAR
from executorch_moe.export.models.pretrained import attention_kinds, resolve, special_tokens
from executorch_moe.export.models.synthetic import is_synthetic
from executorch_moe.export.options import Dense, Experts, ExportOptions, Target, check_output

from .chat_template import read_chat_template

MADE_FROM = "get_synthetic_options"
TOKENIZER_DIGEST = "get_tokenizer_digest"
MODEL_LIMIT = "get_model_max_context_len"
"""Constant method: the largest `max_context` that the model can be exported with."""

STOCK_RUNNERS = "get_max_seq_len"
"""Constant method that ExecuTorch's runners require. Programs whose methods return tokens lack it: these runners expect
logits, and would abort the process otherwise."""

MUTABLE_BUFFERS = "get_mutable_buffer_metadata"
"""Constant method that the engine of ExecuTorch's example qwen3_5_moe reads: JSON with the names of the buffers that
each session has of its own. Source: executorch/examples/models/qwen3_5_moe, export.py and qwen35_moe_engine.cpp."""

CHAT_TEMPLATE = "get_chat_template"
"""Constant method: the model's chat template, a Jinja text; missing if it has none."""

_EXACT = 2**24

RECORD_SUFFIX = ".export.json"
TOKENIZER_SUFFIX = ".tokenizer.json"


def tokenizer_path(pte: Path) -> Path:
    """The tokenizer of an artifact: NAME.tokenizer.json beside it."""
    return pte.with_suffix(TOKENIZER_SUFFIX)


def record_path(pte: Path) -> Path:
    """The record of an export: NAME.export.json beside the artifact."""
    return pte.with_suffix(RECORD_SUFFIX)


def check_report(report: Path, options: ExportOptions) -> None:
    """Check the name of an export's report before the export: it is written last and replaces an existing file.

    Raises:
        ValueError: a place that cannot be written, or a file that the export itself reads or writes.
    """
    check_output("report", report)
    pte, place = options.pte, _place(report)
    if is_synthetic(options.model):
        source = None
    elif is_gguf(options.model):
        source = _place(Path(options.model))
    else:
        source = _place(resolve(options.model) / "config.json").parent
    if place in map(_place, (pte, pte.with_suffix(".ptd"), tokenizer_path(pte), record_path(pte))):
        whose = "is a file of the artifact"
    elif place.is_relative_to(_place(work_folder_path(pte) / "any").parent):
        whose = "is in the folder of packed layers"
    elif options.target.kernel_configs is not None and place == _place(options.target.kernel_configs):
        whose = "is the file of --kernel-configs"
    elif source is not None and place.is_relative_to(source) and place.exists() and not _is_report(place):
        whose = "is a file of the model"
    else:
        return
    raise ValueError(f"report={str(report)!r} {whose}: choose another, for example {pte.with_suffix('.report.json')}")


def _place(path: Path) -> Path:
    """The file that writing `path` replaces: links in its folder are followed, a link at its end is replaced."""
    return path.parent.resolve() / path.name


def _is_report(path: Path) -> bool:
    """True for a report of another export."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"compiled", "sizes"} <= content.keys()


def tokenizer_digest(content: str | bytes) -> str:
    """SHA-256 of a tokenizer.json in hexadecimal, by which an artifact recognizes its tokenizer."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def constant_methods(
    options: ExportOptions, config: Any, max_context: int, tokenizer: str, mutable: Collection[str] = ()
) -> dict[str, Any]:
    """Constant methods, with the names that ExecuTorch's language model runners read, and a few of our own.

    Args:
        options: of the export.
        config: the model's configuration in transformers.
        max_context: positions in the cache.
        tokenizer: text of the tokenizer.json.
        mutable: qualified names of the buffers that the methods write to.

    Raises:
        ValueError: see `special_tokens` and `read_chat_template`; or a vocabulary that output "engine" cannot return.
    """
    folder = None if is_synthetic(options.model) else find_folder(options.model)
    ends, begins = special_tokens(folder, config)
    constants = {
        "get_max_context_len": max_context,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": -1 if begins is None else begins,
        "get_eos_ids": ends or [-1],
        "get_n_layers": config.num_hidden_layers,
        MODEL_LIMIT: config.max_position_embeddings,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_method_output": options.context.output,
        TOKENIZER_DIGEST: tokenizer_digest(tokenizer),
    }
    if LINEAR in attention_kinds(config):
        constants[RECURRENT] = True
    if options.context.max_batch > 1:
        constants[MAX_BATCH] = options.context.max_batch
    elif options.target.is_cpu or options.context.output in ("logits", "engine"):
        constants[STOCK_RUNNERS] = max_context
    if options.context.output == "engine":
        constants[MUTABLE_BUFFERS] = _engine_state(config.vocab_size, mutable)
    if folder is not None and (template := read_chat_template(folder)):
        constants[CHAT_TEMPLATE] = template
    if options.placeholder_weights:
        constants[MADE_FROM] = made_from(options)
    return constants


def cache_buffers(programs: Mapping[str, ExportedProgram]) -> set[str]:
    """Qualified names of the buffers of the KV cache that exported methods use; methods write to all of them."""
    return {
        buffer
        for program in programs.values()
        for node in program.graph.nodes
        if node.op == "placeholder" and node.users
        for buffer in (program.graph_signature.inputs_to_buffers.get(node.name, ""),)
        if buffer.startswith("kv_cache.")
    }


def _engine_state(vocabulary: int, mutable: Collection[str]) -> str:
    if vocabulary > _EXACT:
        raise ValueError(
            f"output='engine' returns tokens in fp32, which is exact up to {_EXACT}, and the vocabulary has "
            f"{vocabulary}: use output='token'"
        )
    return json.dumps({"version": 1, "mutable_buffers": sorted(mutable)})


def stored_options(options: ExportOptions, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The options with the stored keys, except those in `leave_out`."""
    experts, dense, target = options.experts, options.dense, options.target
    stored = {
        "model": options.model,
        "out": None if options.out is None else options.out.name,
        "target": target.name,
        "scheme": experts.scheme,
        "group_size": experts.group_size,
        "max_context": options.context.max_context,
        "max_batch": options.context.max_batch,
        "dtype": target.dtype,
        "output": options.context.output,
        "experts": experts.implementation,
        "dense": dense.linears,
        "lm_head": dense.lm_head,
        "embedding": dense.embedding,
        "layers": options.layers,
        "seed": options.seed,
        "thin": options.placeholder_weights,
        "algorithm": experts.algorithm,
        "kernel_configs": None if target.kernel_configs is None else str(target.kernel_configs),
    }
    return {key: value for key, value in stored.items() if key not in leave_out}


def made_from(options: ExportOptions) -> str:
    """The options that determine the weights of a synthetic model, as JSON for `read_made_from`."""
    return json.dumps(stored_options(options, ("out", "target", "max_context", "max_batch", "kernel_configs")))


def read_made_from(text: str) -> ExportOptions:
    """The options that `made_from` wrote, in this version or an earlier one, for the GPU of this machine.

    Raises:
        ValueError, KeyError, TypeError: something else.
    """
    stored = json.loads(text)
    return ExportOptions(
        stored["model"],
        experts=Experts(
            stored["scheme"], stored["group_size"], stored.get("algorithm", "minmax"), stored.get("experts", "ours")
        ),
        dense=Dense(stored.get("dense", "none"), stored.get("lm_head"), stored.get("embedding", "none")),
        target=Target("cuda", stored["dtype"]),
        layers=stored.get("layers"),
        seed=stored.get("seed", 0),
        placeholder_weights=True,
    )
