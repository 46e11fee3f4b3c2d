"""Exports artifacts of each family for a GPU that may be elsewhere: one of dynamic and one of fixed length.

python -m tests.export.gpu.family_artifacts FOLDER [TARGET [FAMILY ...]]     from the root of the repository

Set EXECUTORCH_MOE_CROSS to FOLDER for test_families_on_gpu.py. TARGET is sm_90 by default. Existing files are kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.backends.lower import lower

from ..families import FAMILIES, Family, export_logits

STATIC_LENGTH = 7


def attention(dynamic: bool) -> str | None:
    """Attention of exported models: those for any length are fp32, and ExecuTorch's for CUDA writes bf16."""
    return "eager" if dynamic else None


@dataclass(frozen=True)
class Mode:
    """How one artifact of a family is exported.

    `experts` and `strict` alternate: each family has each value once, and all families together each combination.
    """

    family: Family
    dynamic: bool
    experts: str
    strict: bool

    def __str__(self) -> str:
        strict = "strict" if self.strict else "non_strict"
        return f"{self.family}-{'dynamic' if self.dynamic else 'static'}-{self.experts}-{strict}"

    @property
    def scheme(self) -> str:
        return "w4a16" if self.dynamic else "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """fp32, where only the experts round, or bf16, the usual dtype of models."""
        return torch.float32 if self.dynamic else torch.bfloat16

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model to export, in its dtype or another one."""
        return self.family.model(self.experts, dtype or self.dtype, attention(self.dynamic))

    def eager(self, weights: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """transformers' model with the exported weights and experts in plain PyTorch, in `dtype`."""
        model = self.family.model("eager")
        model.load_state_dict(torch.load(weights))
        return model.to(dtype)

    def program(self) -> Any:
        return export_logits(self.model(), self.strict, self.dynamic, STATIC_LENGTH)

    def files(self, folder: Path) -> tuple[Path, Path]:
        """The .pte, and the weights before packing: another torch may draw other weights from the same seed."""
        return folder / f"family-{self}.pte", folder / f"family-{self}.weights.pt"

    def write(self, target: str, folder: Path) -> None:
        """Exports the model to `folder`."""
        pte, weights = self.files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model().state_dict(), weights)
        fuser = ExpertFuser(FusionOptions(self.scheme, 32))
        save(lower({"forward": self.program()}, target, fusion=fuser), pte)


def _modes() -> list[Mode]:
    modes = []
    for index, family in enumerate(FAMILIES):
        for dynamic in (True, False):
            grouped, strict = (index % 2 == 0) == dynamic, (index // 2 % 2 == 0) == dynamic
            modes.append(Mode(family, dynamic, "grouped_mm" if grouped else "batched_mm", strict))
    return modes


MODES = _modes()


def main(folder: str, target: str = "sm_90", *families: str) -> None:
    for mode in MODES:
        pte, weights = mode.files(Path(folder))
        if (not families or mode.family.name in families) and not (pte.is_file() and weights.is_file()):
            mode.write(target, Path(folder))
            print(pte, flush=True)


if __name__ == "__main__":
    # transformers looks for the Hub's package of that name, which is not our folder.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    main(*sys.argv[1:])
