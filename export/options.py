"""`ExportOptions`: what to export. Every choice is checked when the object is made, before any model file is read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from executorch_moe.backends.atomic_files import check_writable
from executorch_moe.backends.cuda.cross.kernel_configs import Config, read_configs
from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.models import synthetic
from executorch_moe.export.models.batch.methods import check_batch, check_kinds
from executorch_moe.export.models.causal_lm import BY_OUTPUT, check_context
from executorch_moe.export.models.pretrained import attention_kinds, check_cache
from executorch_moe.export.models.upstream_experts import PREFILL
from executorch_moe.export.quantize.dense import KINDS
from executorch_moe.kernels.gpus import find_models, target_names

TARGETS = ("cuda", "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IMPLEMENTATIONS = ("ours", "ours-tile", "upstream")
DEFAULT_MAX_CONTEXT = 2048


@dataclass(frozen=True)
class Experts:
    """How experts are stored and which kernels compute them.

    Attributes:
        scheme: "w4a16", "w4a8", "mxfp4" or "bf16".
        group_size: number of weights that share one scale, 32 for mxfp4. INT4 linear layers on CUDA targets use it too.
        algorithm: how weights are rounded to 4 bits, "minmax" or "hqq"; see `kernels.packing.rounding`.
        implementation: "ours"; "ours-tile", our kernels with one CTA per tile; "upstream", ExecuTorch's own operators.

    Raises:
        ValueError: an unknown choice, or choices that exclude each other.
    """

    scheme: str = "w4a16"
    group_size: int = 32
    algorithm: str = "minmax"
    implementation: str = "ours"

    def __post_init__(self) -> None:
        self.fusion()
        _check_known("experts", self.implementation, IMPLEMENTATIONS)
        if self.implementation == "upstream" and self.algorithm != "minmax":
            raise ValueError(f"experts='upstream' does not support algorithm={self.algorithm!r}: use minmax")
        if self.implementation == "upstream" and self.scheme not in PREFILL:
            raise ValueError(
                f"experts='upstream' does not support scheme={self.scheme!r}: use one of {', '.join(PREFILL)}"
            )

    def fusion(self) -> FusionOptions:
        """The options of the fuser.

        Raises:
            ValueError: see `FusionOptions`.
        """
        return FusionOptions(self.scheme, self.group_size, algorithm=self.algorithm)


@dataclass(frozen=True)
class Dense:
    """How linear layers and the embedding are stored.

    Attributes:
        linears: "none" (unchanged), "int8" or "int4". int8 has one scale per output on CUDA targets and one per 32
            inputs on the CPU, where embeddings are quantized too; `quantize.dense.stored_formats` names all formats.
        lm_head: the last linear layer, on CUDA targets; None: as `linears`.
        embedding: "none" or "int8", on CUDA targets.

    Raises:
        ValueError: an unknown choice.
    """

    linears: str = "none"
    lm_head: str | None = None
    embedding: str = "none"

    def __post_init__(self) -> None:
        _check_known("dense", self.linears, KINDS)
        _check_known("lm_head", self.lm_head, (*KINDS, None))
        _check_known("embedding", self.embedding, KINDS[:2])

    def kind_of(self, name: str) -> str:
        """How the linear layer `name` is stored: "none", "int8" or "int4"."""
        return (self.lm_head or self.linears) if name.rpartition(".")[2] == "lm_head" else self.linears

    @property
    def unchanged(self) -> bool:
        """True if no linear layer and no embedding is quantized."""
        return (self.linears, self.lm_head or "none", self.embedding) == ("none", "none", "none")


@dataclass(frozen=True)
class Target:
    """Where the artifact will run.

    Attributes:
        name: "cuda" (the GPU of this machine), "cpu", "auto" (see `resolved`), the name of a GPU or architecture that
            this machine need not have ("sm_90", "h200"; `kernels.gpus.target_names`), or several architectures in one
            artifact ("sm_80,sm_90").
        dtype: of everything except the experts, "bf16", "fp32" or "auto" (see `resolved`). The experts' activations
            are bf16 in all cases.
        kernel_configs: file with measured configurations of ExecuTorch's own kernels, for a GPU by name
            (`kernel_configs.read_configs`); None: the built-in ones.

    Raises:
        ValueError: an unknown choice, two targets of one architecture, or a file that cannot be read.
        RuntimeError: a GPU by name, and no C++ compiler or untested versions of torch, Triton or ExecuTorch.
    """

    name: str = "auto"
    dtype: str = "auto"
    kernel_configs: Path | None = None

    def __post_init__(self) -> None:
        if self.is_named_gpu and not set(self.name.split(",")) <= set(target_names()):
            raise ValueError(
                f"target={self.name!r} is unknown: use one of {', '.join((*TARGETS, 'auto', *target_names()))}"
            )
        _check_known("dtype", self.dtype, (*DTYPES, "auto"))
        if self.is_named_gpu:
            _check_cross(self.name)
        self.configs()

    @property
    def is_cpu(self) -> bool:
        """True for ExecuTorch's CPU runtime."""
        return self.name == "cpu"

    @property
    def is_named_gpu(self) -> bool:
        """True for a GPU by name, which this machine need not have."""
        return self.name not in (*TARGETS, "auto")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of a resolved target."""
        return DTYPES[self.dtype]

    def configs(self) -> dict[str, Config]:
        """The content of `kernel_configs`; empty without a file.

        Raises:
            ValueError: a file that cannot be read, or a target that times its kernels itself.
        """
        if self.kernel_configs is None:
            return {}
        if not self.is_named_gpu:
            raise ValueError(
                f"kernel_configs={str(self.kernel_configs)!r} is for a GPU by name, as in target='h200', not for "
                f"target={self.name!r}: leave it out"
            )
        return read_configs(self.kernel_configs)

    def resolved(self, *, only_check: bool = False) -> Target:
        """The same target without "auto".

        The name becomes "cuda" if torch finds a GPU, or with `only_check`, which needs none; else "cpu". The dtype
        becomes fp32 on the CPU, whose dense kernels are written for it, and bf16 on GPUs.
        """
        name, dtype = self.name, self.dtype
        if name == "auto":
            name = "cuda" if only_check or torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "fp32" if name == "cpu" else "bf16"
        return replace(self, name=name, dtype=dtype)


@dataclass(frozen=True)
class Context:
    """The inputs and outputs of the exported methods.

    Attributes:
        max_context: positions in the KV cache; None: 2048, or the model's own limit if that is smaller.
        output: what the methods return: "token" (sampled on the device, with settings as inputs), "greedy" (the most
            likely token), "logits", or "engine" (as the engine of ExecuTorch's example qwen3_5_moe expects them).
        max_batch: sequences with a slot of their own in the cache; above 1 there is a method `decode_batch`.

    Raises:
        ValueError: an unknown choice, or a number that is out of range.
    """

    max_context: int | None = None
    output: str = "token"
    max_batch: int = 1

    def __post_init__(self) -> None:
        _check_known("output", self.output, tuple(BY_OUTPUT))
        check_batch(self.max_batch)
        if self.output == "engine" and self.max_batch > 1:
            raise ValueError(
                f"output='engine' does not support max_batch={self.max_batch}, that engine computes one sequence at a "
                "time: leave one of them out"
            )


@dataclass(frozen=True)
class ExportOptions:
    """What to export. `target` has no "auto" left once the object is made.

    Attributes:
        model: folder of a Hugging Face model, a GGUF file, "tiny", or "synthetic:qwen3-30b-a3b" and the like
            (`synthetic.parse`).
        out: the `.pte` to write; `NAME.ptd` and `NAME.tokenizer.json` are written beside it. None: nothing is written,
            as for `check_export`; then target "cuda" needs no GPU and "auto" is "cuda".
        experts, dense, target, context: see the classes.
        layers: number of layers of a synthetic model; None: those of its preset.
        seed: of the weights of a synthetic model, at least 0.
        placeholder_weights: write no large weights. For synthetic models, whose weights the GPU that loads the artifact
            computes again.

    Raises:
        ValueError: an unknown choice, choices that exclude each other, an output that cannot be written, or a target
            that this machine cannot export for.
    """

    model: str
    out: Path | None = None
    _: KW_ONLY
    experts: Experts = field(default_factory=Experts)
    dense: Dense = field(default_factory=Dense)
    target: Target = field(default_factory=Target)
    context: Context = field(default_factory=Context)
    layers: int | None = None
    seed: int = 0
    placeholder_weights: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", self.target.resolved(only_check=self.out is None))
        if synthetic.is_synthetic(self.model):
            model, experts = synthetic.parse(self.model, self.layers), self.experts
            synthetic.check_room(
                model, experts.scheme, experts.group_size, self.out, placeholder_weights=self.placeholder_weights
            )
        self._check_model()
        self._check_target()
        if self.out is not None:
            check_output("out", self.out, (".pte",))
            if self.target.name == "cuda" and not torch.cuda.is_available():
                raise ValueError(
                    f"target='cuda' needs a GPU that torch {torch.__version__} can use, and there is none: "
                    "name the GPU to export for (target='sm_90', target='h200'), export on a GPU machine with a CUDA "
                    "build of torch, or use target='cpu'"
                )

    def _check_model(self) -> None:
        """Choices that only synthetic models have."""
        made_here = synthetic.is_synthetic(self.model)
        if self.layers is not None and not made_here:
            raise ValueError(
                f"layers={self.layers} is for synthetic models, {self.model!r} has its own: leave it out, "
                f"or use {synthetic.PREFIX}{next(iter(synthetic.PRESETS))}"
            )
        if self.seed != 0 and not made_here:
            raise ValueError(f"seed={self.seed} is for synthetic models, {self.model!r} has its weights: leave it out")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0: choose another")
        if self.placeholder_weights and (self.target.is_cpu or not made_here):
            raise ValueError(
                f"placeholder_weights=True is for synthetic models and CUDA targets, not for {self.model!r} on "
                f"{self.target.name}: leave it out"
            )

    def _check_target(self) -> None:
        """Choices that only CUDA targets have."""
        if not self.target.is_cpu:
            return
        if self.context.output == "engine":
            raise ValueError(
                "output='engine' is for CUDA targets, on the CPU ExecuTorch's engine gives each method a KV cache of "
                "its own: name a GPU as target='sm_90', or use output='token', which `executorch-moe serve` and "
                "TextLLMRunner run"
            )
        for what, value, usual in (
            ("experts", self.experts.implementation, "ours"),
            ("lm_head", self.dense.lm_head, None),
            ("embedding", self.dense.embedding, "none"),
        ):
            if value != usual:
                raise ValueError(f"{what}={value!r} is for CUDA targets: name a GPU as target='sm_90', or leave it out")

    @property
    def pte(self) -> Path:
        """The `.pte` to write.

        Raises:
            ValueError: `out` is None.
        """
        if self.out is None:
            raise ValueError("out is missing: name the .pte to write")
        return self.out

    def positions(self, config: Any) -> int:
        """Positions in the KV cache, checked against a transformers configuration.

        Raises:
            ValueError, NotImplementedError: see `causal_lm.check_context` and `pretrained.check_cache`.
        """
        size = self.context.max_context
        if size is None:
            size = min(DEFAULT_MAX_CONTEXT, config.max_position_embeddings)
        check_context(config, size)
        if self.context.max_batch > 1:
            check_kinds(attention_kinds(config), for_cuda=not self.target.is_cpu)
        check_cache(config, size, self.target.torch_dtype.itemsize, self.context.max_batch)
        return size

    def to_json(self) -> str:
        """JSON for `from_json`."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> ExportOptions:
        """The options that `to_json` wrote.

        Raises:
            ValueError: no JSON object, an unknown or missing key, or see `ExportOptions`.
        """
        values = _known(cls, json.loads(text))
        for name, part in _PARTS.items():
            if name in values:
                values[name] = _made(part, values[name])
        return cls(**_with_path(values, "out"))


_PARTS = {"experts": Experts, "dense": Dense, "target": Target, "context": Context}


def _made(part: type, values: object) -> Any:
    return part(**_with_path(_known(part, values), "kernel_configs"))


def _with_path(values: dict[str, Any], name: str) -> dict[str, Any]:
    return values | {name: Path(values[name])} if values.get(name) is not None else values


def _known(part: type, values: object) -> dict[str, Any]:
    """A copy of a JSON object that has fields of a dataclass only."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{part.__name__} is {values!r}, expected a JSON object")
    names = [entry.name for entry in fields(part)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{part.__name__} has the unknown key {unknown[0]!r}: use {', '.join(names)}")
    if part is ExportOptions and "model" not in values:
        raise ValueError("ExportOptions lacks the key 'model'")
    return dict(values)


def _check_known(what: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise ValueError(f"{what}={value!r} is unknown: use one of {', '.join(filter(None, known))}")


def check_output(what: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """`check_writable`, and a file is created and removed again: mode bits say nothing about /proc or a full disk.

    Raises:
        ValueError: see `check_writable`; or the folder accepts no files.
    """
    check_writable(what, path, suffixes)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{what}={str(path)!r} cannot be written, no file can be created in {folder} ({error.strerror}): "
            "choose another folder"
        ) from None


def _check_cross(target: str) -> None:
    """Check that this machine can export for GPUs by name."""
    from executorch_moe.backends.cuda.cross.target import check_target

    for model in find_models(target):
        check_target(model.name)
