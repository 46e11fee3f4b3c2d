"""One artifact of the tiny model per scheme and storage of dense layers, and some of models with recurrent layers.

The methods return logits.

python -m tests.export.matrix FOLDER [TARGET]     from the root of the repository

FOLDER is the value of EXECUTORCH_MOE_CROSS for the GPU tests; TARGET is sm_90 by default. Existing artifacts are kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from executorch_moe.export.build import load_whole, prepare_, quantize_dense, stream
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.quantize.experts import quantize_experts_

from .recurrent_checkpoints import save_recurrent

MAX_CONTEXT = 128
GROUP_SIZE = 32
RECURRENT = {"qwen3_5_moe_text": 128, "qwen3_next": 32}
"""Type of a random model with gated delta rule layers -> width of their heads."""


@dataclass(frozen=True)
class Cell:
    """What an artifact contains."""

    scheme: str
    dense: str
    model: str = "tiny"

    def __str__(self) -> str:
        return "-".join([self.scheme, self.dense, *([] if self.model == "tiny" else [self.model])])

    def file(self, folder: Path) -> Path:
        return folder / f"matrix-{self}.pte"

    def source(self, folder: Path) -> str:
        """The model to export; for a random one, its folder beside the artifact."""
        return self.model if self.model == "tiny" else str(folder / f"matrix-{self.model}")

    def options(self, target: str, folder: Path) -> ExportOptions:
        return ExportOptions(
            self.source(folder),
            self.file(folder),
            experts=Experts(self.scheme, GROUP_SIZE),
            dense=Dense(self.dense, embedding="none" if self.dense == "none" else "int8"),
            target=Target(target),
            context=Context(MAX_CONTEXT, "logits"),
        )

    def write(self, target: str, folder: Path) -> None:
        """Exports it, unless it exists."""
        if not self.file(folder).is_file():
            if self.model != "tiny" and not Path(self.source(folder)).is_dir():
                save_random(self.model, Path(self.source(folder)))
            export_model(self.options(target, folder))

    @torch.no_grad()
    def eager(self, folder: Path) -> CausalLM:
        """The same model in PyTorch, on the current GPU; `folder` is that of the artifact."""
        options = replace(self.options("cuda", folder), out=None)
        if self.model != "tiny":
            streamed = stream(options, Path(options.model))
            streamed.load()
            prepare_(streamed.model, options)
            return CausalLM(streamed.model.cuda(), MAX_CONTEXT)
        model = quantize_experts_(load_whole(options, resolve("tiny")), self.scheme, GROUP_SIZE)
        quantize_dense(model, options)
        return CausalLM(model.cuda(), MAX_CONTEXT)


def save_random(model_type: str, folder: Path) -> None:
    """A random model for texts of bytes. A token takes all experts, so that no near tie decides.

    Its embeddings are large beside what the layers add. With embeddings of 0.1, as the other tests have them, each
    gated norm of a delta rule makes differences about three times as large: in bf16 the logits of eager differ from
    those in fp32 by 2% then (median of 17 tokens, int4), and with these embeddings by 0.7% (at most 0.9%).
    """
    width = RECURRENT[model_type]
    sizes = {"linear_key_head_dim": width, "linear_value_head_dim": width, "vocab_size": 300}
    factors = {"embed_tokens.weight": 16, "experts.down_proj": 1 / 2}
    save_recurrent(model_type, folder, factors, num_experts_per_tok=4, **sizes)


CELLS = [
    *(Cell(scheme, dense) for scheme in ("w4a16", "w4a8", "bf16") for dense in ("none", "int8", "int4")),
    *(Cell("w4a16", dense, "qwen3_5_moe_text") for dense in ("none", "int8", "int4")),
    Cell("w4a16", "int8", "qwen3_next"),
]


def main(folder: str, target: str = "sm_90") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for cell in CELLS:
        cell.write(target, Path(folder))
        print(cell, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
