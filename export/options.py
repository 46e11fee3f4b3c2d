"""`ExportOptions`: what to export, every choice checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executorch_moe.backends.atomic_files import check_writable
from executorch_moe.backends.cuda.cross.kernel_configs import Config, read_configs
from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.models import synthetic
from executorch_moe.export.models.causal_lm import BY_OUTPUT, check_cache, check_context
from executorch_moe.export.models.upstream_experts import PREFILL
from executorch_moe.export.quantize.dense import KINDS
from executorch_moe.kernels.gpus import find_models, target_names

TARGETS = ("cuda", "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERTS = ("ours", "ours-tile", "upstream")
DEFAULT_MAX_CONTEXT = 2048


@dataclass(frozen=True)
class ExportOptions:
    """What to export; checked when made.

    Attributes:
        model: folder of a Hugging Face model, "tiny", or "synthetic:qwen3-30b-a3b" and the like (`synthetic.parse`).
        out: the `.pte` to write; NAME.ptd and NAME.tokenizer.json are written beside it.
        target: "cuda" (the GPU of this machine), "sm_90", "h200" and the like (that GPU, on a machine without one),
            "sm_80,sm_90" (one artifact for both), "cpu", or "auto" (cuda if torch sees a GPU, else cpu).
        scheme: "w4a16", "w4a8" or "bf16".
        group_size: weights that share one scale.
        max_context: positions in the KV cache; None takes 2048 or what the model was made for, if that is less.
        dtype: of everything but the experts: "bf16", "fp32" or "auto" (bf16 on cuda, fp32 on the CPU, whose dense
            kernels are made for it). The experts' activations are bf16 in all.
        output: what the methods return: "token" (picked on the device as their inputs say), "greedy" (always the
            likeliest token) or "logits".
        experts: "ours"; "ours-tile": the one-CTA-per-tile schedule; "upstream": ExecuTorch's own operators.
        dense: linear layers: "none" (as they are), "int8" (on CUDA targets one scale for each output, on the CPU one
            for 32 inputs; `dense.stored_formats` names both) or "int4"; on the CPU, embeddings too.
        lm_head: the last one; None: as dense. embedding: "none" or "int8".
        layers, seed: of a synthetic model; the seed is at least 0.
        thin: write no large weights; of synthetic models, which are made again on the GPU that loads them.
        algorithm: how experts are rounded to 4 bits, "minmax" or "hqq"; see `kernels.rounding`.
        check: nothing is exported, only checked (`preflight`): "cuda" needs no GPU, and "auto" is "cuda".
        kernel_configs: file of measured configurations of ExecuTorch's own kernels (`kernel_configs.read_configs`), for
            a GPU that is not here; None: those that are known.

    Raises:
        ValueError: an unknown choice, choices that do not go together, an output that cannot be written, or a target
            that this machine cannot export for.
        RuntimeError: a GPU that is not here, and no compiler or other versions than are known to work.
    """

    model: str
    out: Path
    target: str = "auto"
    scheme: str = "w4a16"
    group_size: int = 32
    max_context: int | None = None
    dtype: str = "auto"
    output: str = "token"
    experts: str = "ours"
    dense: str = "none"
    lm_head: str | None = None
    embedding: str = "none"
    layers: int | None = None
    seed: int = 0
    thin: bool = False
    algorithm: str = "minmax"
    check: bool = False
    kernel_configs: str | None = None

    def __post_init__(self) -> None:
        if self.crosses and not set(self.target.split(",")) <= set(target_names()):
            raise ValueError(
                f"target={self.target!r} is unknown: use one of {', '.join((*TARGETS, 'auto', *target_names()))}"
            )
        self.fusion()
        self._check_known()
        self._check_together(self.resolved_target())
        if not self.check:
            check_writable("out", self.out, (".pte",))
        if self.crosses:
            _check_cross(self.target)
        self.known_configs()
        if self.target == "cuda" and not self.check and not torch.cuda.is_available():
            raise ValueError(
                f"target='cuda' needs a GPU that torch {torch.__version__} can use, and there is none: "
                "name the GPU to export for (target='sm_90', target='h200'), export on a GPU machine with a CUDA build "
                "of torch, or use target='cpu'"
            )

    def _check_known(self) -> None:
        for what, known in (
            ("dtype", (*DTYPES, "auto")),
            ("output", tuple(BY_OUTPUT)),
            ("experts", EXPERTS),
            ("dense", KINDS),
            ("lm_head", (*KINDS, None)),
            ("embedding", KINDS[:2]),
        ):
            if (value := getattr(self, what)) not in known:
                raise ValueError(f"{what}={value!r} is unknown: use one of {', '.join(filter(None, known))}")
        if synthetic.is_synthetic(self.model):
            model = synthetic.parse(self.model, self.layers)
            synthetic.check_room(model, self.scheme, self.group_size, None if self.check else self.out, thin=self.thin)

    def _check_together(self, target: str) -> None:
        """The choices against each other; `target` is the resolved one."""
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
        if target == "cpu":
            for what, usual in (("experts", "ours"), ("lm_head", None), ("embedding", "none")):
                if (value := getattr(self, what)) != usual:
                    raise ValueError(
                        f"{what}={value!r} is for CUDA targets: name a GPU as target='sm_90', or leave it out"
                    )
        if self.check and made_here:
            raise ValueError(f"check=True is for models in folders, {self.model!r} is made on the spot: leave it out")
        if self.thin and (target == "cpu" or not made_here):
            raise ValueError(
                f"thin=True is for synthetic models and CUDA targets, not for {self.model!r} on {target}: leave it out"
            )
        if self.experts == "upstream" and self.algorithm != "minmax":
            raise ValueError(f"experts='upstream' has no algorithm={self.algorithm!r}: use minmax")
        if self.experts == "upstream" and self.scheme not in PREFILL:
            raise ValueError(f"experts='upstream' has no scheme={self.scheme!r}: use one of {', '.join(PREFILL)}")

    def fusion(self) -> FusionOptions:
        """How experts are fused; checks scheme and algorithm."""
        return FusionOptions(self.scheme, self.group_size, algorithm=self.algorithm)

    def known_configs(self) -> dict[str, Config]:
        """What `kernel_configs` holds.

        Raises:
            ValueError: a file that cannot be read, or a target that times its kernels itself.
        """
        if self.kernel_configs is None:
            return {}
        if not self.crosses:
            raise ValueError(
                f"kernel_configs={self.kernel_configs!r} is for a GPU by name, as target='h200', not for "
                f"{self.target!r}: leave it out"
            )
        return read_configs(Path(self.kernel_configs))

    def resolved_target(self) -> str:
        """The target with "auto" decided."""
        if self.target != "auto":
            return self.target
        return "cuda" if self.check or torch.cuda.is_available() else "cpu"

    def resolved_dtype(self) -> str:
        """The dtype with "auto" decided."""
        return self.dtype if self.dtype != "auto" else "fp32" if self.resolved_target() == "cpu" else "bf16"

    @property
    def crosses(self) -> bool:
        """True for GPUs by name, which need not be here."""
        return self.target not in (*TARGETS, "auto")

    @property
    def leaves_dense(self) -> bool:
        """True if linear layers and embedding stay as they are."""
        return (self.dense, self.lm_head, self.embedding) == ("none", None, "none")

    def context(self, config: Any) -> int:
        """Positions in the cache, checked against the model's configuration.

        Raises:
            ValueError, NotImplementedError: see `causal_lm.check_context` and `causal_lm.check_cache`.
        """
        size = self.max_context
        if size is None:
            size = min(DEFAULT_MAX_CONTEXT, config.max_position_embeddings)
        check_context(config, size)
        check_cache(config, size, DTYPES[self.resolved_dtype()].itemsize)
        return size


def _check_cross(target: str) -> None:
    """Check that GPUs that are not here can be exported for."""
    from executorch_moe.backends.cuda.cross.target import check_target

    for model in find_models(target):
        check_target(model.name)
