"""The smallest artifact: a linear layer for the CPU target, with a constant method of every type."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import export

from executorch_moe.backends.artifact.files import Artifact, save
from executorch_moe.backends.lower import lower

CONSTANTS = {"get_vocab_size": 7, "get_eos_ids": [1, 2], "name": "tiny", "rope_theta": 1.5, "use_kv_cache": True}


def export_linear(path: Path, *, seed: int = 0, width: int = 3) -> Artifact:
    """Export a linear layer to `path`.pte and `path`.ptd."""
    torch.manual_seed(seed)
    program = export(torch.nn.Linear(4, width), (torch.randn(2, 4),))
    return save(lower({"forward": program}, "cpu", CONSTANTS), path)
