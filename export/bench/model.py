"""Measures prefill and decode speed of an exported model, in the manner of llama-bench."""

from __future__ import annotations

import json
import platform
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from executorch_moe.backends.artifact.files import companion
from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.host_memory import size
from executorch_moe.export.report.metadata import RECORD_SUFFIX

from .batch import BatchSpeed, check_batch, measure_batch
from .breakdown import Breakdown, profile_decode
from .prefill import PromptBreakdown, profile_prompt

FORMATS = ("md", "json")


@dataclass
class Speed:
    """Tokens per second for one prompt length, an entry for each repeat."""

    prompt_tokens: int
    new_tokens: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass
class ModelBenchmark:
    """Results of a benchmark, with what was measured and how.

    Attributes:
        bytes: bytes of the artifact's files, by suffix, and of the model's parts, if the export recorded them.
        export: the export's record, empty if the file is missing.
        batches: speeds of several sequences at once.
        breakdown: of a decode token. prompts: of a prompt of each length; both only with a profile.
        load_seconds: from opening the files to weights in the device's memory; None if the program was not loaded
            with `TextGenerator.load`.
        peak_bytes: peak memory: "host" (this process), and on a GPU also "gpu" (weights, cache, temporaries).
    """

    artifact: str
    runtime: str
    device: str
    versions: dict[str, str]
    method: str
    speeds: list[Speed]
    cuda_graph: bool = False
    prefill_chunk: int | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    load_seconds: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    breakdown: Breakdown | None = None
    prompts: list[PromptBreakdown] = field(default_factory=list)
    batches: list[BatchSpeed] = field(default_factory=list)

    def profile_decode(self, generator: TextGenerator, prompt_tokens: int, steps: int) -> None:
        """Profiles decode tokens and sets `breakdown`; see `breakdown.profile_decode`."""
        ids = random_prompt(generator.vocabulary, prompt_tokens)
        self.breakdown = profile_decode(generator, ids, steps, self.export)

    def profile_prompts(self, generator: TextGenerator, prompt_lengths: Sequence[int]) -> None:
        """Profiles a prompt of each length and sets `prompts`; see `prefill.profile_prompt`."""
        ids = random_prompt(generator.vocabulary, max(prompt_lengths))
        self.prompts = [profile_prompt(generator, ids[:length], self.export) for length in prompt_lengths]

    def markdown(self) -> str:
        """Device, versions and method, and a table of means and standard deviations, in Markdown."""
        lines = [
            f"`{self.artifact}` on {self.device}, runtime: {self.runtime}"
            + (", decode as a CUDA graph" if self.cuda_graph else "")
            + (f", prompts in chunks of {self.prefill_chunk}" if self.prefill_chunk else "")
            + "; "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "",
            self.method,
            "",
            "| model | size | test | tokens/s |",
            "|---|---|---|---|",
        ]
        total = size(sum(self.bytes.get(suffix, 0) for suffix in (".pte", ".ptd")))
        for speed in self.speeds:
            start = f"| {self.model_name()} | {total} |"
            lines.append(f"{start} prefill {speed.prompt_tokens} | {spread(speed.prefill)} |")
            lines.append(f"{start} decode {speed.new_tokens} after {speed.prompt_tokens} | {spread(speed.decode)} |")
        if self.batches:
            lines += ["", "| sequences at once | test | tokens/s in sum | of each |", "|---|---|---|---|"]
        for batch in self.batches:
            test = f"decode {batch.new_tokens} after {batch.prompt_tokens}"
            each = [rate / batch.sequences for rate in batch.decode]
            lines.append(f"| {batch.sequences} | {test} | {spread(batch.decode)} | {spread(each)} |")
        lines += ["", "; ".join(self.notes()) + "."]
        for prompt in self.prompts:
            lines += ["", prompt.markdown()]
        if self.breakdown is not None:
            lines += ["", self.breakdown.markdown()]
        return "\n".join(lines)

    def model_name(self) -> str:
        """Model and options of the export from its record, or the artifact's name without one."""
        options = self.export.get("options")
        if not options:
            return self.artifact
        parts = [options["model"], options["scheme"], f"experts {options['experts']}", f"dense {options['dense']}"]
        if options.get("layers"):
            parts.insert(1, f"{options['layers']} layers")
        return ", ".join(parts)

    def notes(self) -> list[str]:
        """Notes on sizes, time of export and load, and memory."""
        notes = [f"{name} {size(value)}" for name, value in self.bytes.items()]
        if seconds := self.export.get("seconds"):
            times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            notes.append(f"export {sum(seconds.values()):.1f} s ({times})")
        if peak := self.export.get("peak_bytes"):
            notes.append("peak of the export: " + ", ".join(f"{name} {size(value)}" for name, value in peak.items()))
        if self.load_seconds is not None:
            notes.append(f"loaded in {self.load_seconds:.1f} s")
        notes.append("peak of this run: " + ", ".join(f"{k} {size(v)}" for k, v in self.peak_bytes.items()))
        return notes

    def json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=2)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation: 123.4 ± 1.2."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.1f} ± {deviation:,.1f}"


def device_name(device: torch.device) -> str:
    """Name of the device; for a CPU, architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions(distributions: Sequence[str] = ("torch", "triton", "executorch", "executorch-moe")) -> dict[str, str]:
    """Installed versions by distribution name."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak memory of this process so far in bytes, on the host and on a GPU."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_reserved(device)
    return peak


def read_record(pte: Path) -> dict[str, Any]:
    """The export's record beside the artifact; empty if the file is missing.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = companion(pte, RECORD_SUFFIX)
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path} is not a record of an export ({error}): delete it, or export again") from None
    return record


def random_prompt(vocabulary: int, length: int, seed: int = 0) -> list[int]:
    """Random token ids, the same in each run."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (length,), generator=random).tolist()


def benchmark_model(
    artifact: Path,
    prompt_lengths: Sequence[int],
    new_tokens: int = 64,
    repeats: int = 5,
    runtime: str = "auto",
    on_repeat: Callable[[Speed], Any] | None = None,
    *,
    cuda_graph: bool = False,
    prefill_chunk: int | None = None,
    generator: TextGenerator | None = None,
    batch: Sequence[int] = (),
) -> ModelBenchmark:
    """Measures an artifact for each prompt length, after a warm-up of the same size.

    Args:
        artifact: the `.pte`.
        prompt_lengths: numbers of tokens in a prompt, at least 1; the ids are random, the same in each run.
        new_tokens: tokens to generate after each prompt, at least 2; end-of-text tokens are ignored.
        repeats: runs for each length.
        runtime: as for `executorch_moe.backends.runtime.loader.load`.
        on_repeat: called after each run.
        cuda_graph, prefill_chunk: as for `TextGenerator.load`.
        generator: the artifact, if it is loaded already.
        batch: numbers of sequences to decode at once, after each prompt length; see `batch.measure_batch`.

    Raises:
        ValueError: sizes that are not positive or do not fit into the exported cache.
    """
    for name, value, least in (("repeats", repeats, 1), ("new_tokens", new_tokens, 2)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not prompt_lengths or min(prompt_lengths) < 1:
        raise ValueError(f"prompt_lengths={list(prompt_lengths)} must be positive: give for example 32,128")
    if generator is None:
        generator = TextGenerator.load(artifact, runtime, cuda_graph=cuda_graph, prefill_chunk=prefill_chunk)
    for length in prompt_lengths:
        generator.check_length(length, new_tokens + 1 if batch else new_tokens)
    if batch:
        check_batch(generator, batch)
    speeds = []
    for length in prompt_lengths:
        ids = random_prompt(generator.vocabulary, length)
        speed = Speed(length, new_tokens)
        speeds.append(speed)
        generator.warm_up(length)
        for _ in range(repeats):
            run = generator.generate(ids, new_tokens, ignore_eos=True)
            speed.prefill.append(run.prefill_rate)
            speed.decode.append(run.decode_rate)
            if on_repeat is not None:
                on_repeat(speed)
    batches = []
    for length in prompt_lengths:
        prompts = [random_prompt(generator.vocabulary, length, seed) for seed in range(max(batch, default=0))]
        batches += [measure_batch(generator, prompts[:size], new_tokens, repeats) for size in batch]
    picked = "from the logits" if generator.output == "logits" else "on the device"
    files = {".pte": artifact, ".ptd": companion(artifact, ".ptd")}
    sizes = {suffix: path.stat().st_size for suffix, path in files.items() if path.is_file()}
    record = read_record(artifact)
    sizes |= {name: record[f"{key}_bytes"] for name, key in PARTS.items() if f"{key}_bytes" in record}
    return ModelBenchmark(
        artifact=artifact.name,
        runtime=generator.program.runtime,
        device=device_name(generator.program.device),
        versions=versions(),
        method=(
            f"Batch 1, greedy, picked {picked}; mean ± standard deviation of {repeats} runs after a warm-up of the "
            "same length. Prefill: from token ids to the first new token. Decode: each further token."
        ),
        speeds=speeds,
        batches=batches,
        cuda_graph=cuda_graph,
        prefill_chunk=generator.prefill_chunk,
        bytes=sizes,
        export=record,
        load_seconds=generator.load_seconds,
        peak_bytes=peak_bytes(generator.program.device),
    )


PARTS = {"expert weights": "expert", "other weights": "other"}
