"""Exports the tiny model for a named GPU, in its own process like the command line.

python cross_exports.py TARGET FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.cuda.cross.report import CrossCompileReport
from executorch_moe.backends.lower import lower
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.causal_lm import CausalLM, export_methods
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.quantize.experts import quantize_experts_

MAX_CONTEXT = 64


def main(target: str, folder: Path) -> None:
    """Write tiny.pte, tiny.ptd, the state dict of the model (state.pt), and the choices (report.json)."""
    model = CausalLM(quantize_experts_(load_model(resolve("tiny"), torch.bfloat16, "sdpa"), "w4a16", 32), MAX_CONTEXT)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    reports: list[CrossCompileReport] = []
    manager = lower(export_methods(model), target, {"get_max_context_len": MAX_CONTEXT}, on_report=reports.append)
    save(manager, folder / "tiny")
    torch.save(state, folder / "state.pt")
    (folder / "report.json").write_text(json.dumps([{**report.as_dict(), "text": str(report)} for report in reports]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
