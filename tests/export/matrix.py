"""One artifact of the tiny model per scheme and storage of dense layers; the methods return logits.

python -m tests.export.matrix FOLDER [TARGET]     from the root of the repository

FOLDER is the value of EXECUTORCH_MOE_CROSS for the GPU tests; TARGET is sm_90 by default. Existing artifacts are kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from executorch_moe.export.build import load_whole, quantize_dense
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.quantize.experts import quantize_experts_

MAX_CONTEXT = 128
GROUP_SIZE = 32


@dataclass(frozen=True)
class Cell:
    """What an artifact contains."""

    scheme: str
    dense: str

    def __str__(self) -> str:
        return f"{self.scheme}-{self.dense}"

    def file(self, folder: Path) -> Path:
        return folder / f"matrix-{self}.pte"

    def options(self, target: str, folder: Path) -> ExportOptions:
        return ExportOptions(
            "tiny",
            self.file(folder),
            experts=Experts(self.scheme, GROUP_SIZE),
            dense=Dense(self.dense, embedding="none" if self.dense == "none" else "int8"),
            target=Target(target),
            context=Context(MAX_CONTEXT, "logits"),
        )

    def write(self, target: str, folder: Path) -> None:
        """Exports it, unless it exists."""
        if not self.file(folder).is_file():
            export_model(self.options(target, folder))

    @torch.no_grad()
    def eager(self) -> CausalLM:
        """The same model in PyTorch, on the current GPU."""
        options = replace(self.options("cuda", Path()), out=None)
        model = quantize_experts_(load_whole(options, resolve("tiny")), self.scheme, GROUP_SIZE)
        quantize_dense(model, options)
        return CausalLM(model.cuda(), MAX_CONTEXT)


CELLS = [Cell(scheme, dense) for scheme in ("w4a16", "w4a8", "bf16") for dense in ("none", "int8", "int4")]


def main(folder: str, target: str = "sm_90") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for cell in CELLS:
        cell.write(target, Path(folder))
        print(cell, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
