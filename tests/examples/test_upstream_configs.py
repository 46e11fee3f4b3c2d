"""`examples/upstream_configs.py` without a GPU: its calls fit ExecuTorch's operators, it reads what autotuning kept."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from executorch_moe.backends.cuda.cross.kernel_configs import read_configs
from executorch_moe.examples import upstream_configs
from executorch_moe.kernels.experts.elementwise import moe_sum_pairs


@pytest.mark.parametrize("name", sorted(upstream_configs.STEPS))
def test_calls_fit_the_operators(name: str) -> None:
    """On tensors without storage: arguments that an operator does not take, or shapes that disagree, are errors."""
    for module in upstream_configs.MODULES:
        upstream_configs.load(module)
    with FakeTensorMode():
        upstream_configs.STEPS[name]()


def test_what_autotuning_kept_is_read_by_the_kernels_name() -> None:
    module = ModuleType("kernels")
    module.tuned = triton.autotune([triton.Config({"BLOCK_H": size}, num_warps=2) for size in (64, 128)], [])(  # type: ignore[attr-defined]
        moe_sum_pairs
    )
    module.never_ran = triton.autotune([triton.Config({})], [])(moe_sum_pairs)  # type: ignore[attr-defined]
    module.tuned.cache["sizes"] = module.tuned.configs[1]
    found = upstream_configs.chosen(module)
    assert found == {"moe_sum_pairs": {"BLOCK_H": 128, "num_warps": 2, "num_stages": 3}}


def test_the_landed_file_is_one_that_an_export_takes() -> None:
    landed = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-23-h200-kernel-configs.json"
    assert {"_fused_moe_kernel", "_fused_moe_batched_kernel", "_sdpa_fwd_kernel"} <= read_configs(landed).keys()


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    with mock.patch.object(torch.cuda, "is_available", lambda: False), pytest.raises(SystemExit, match="finds no GPU"):
        upstream_configs.main(tmp_path / "configs.json")
    assert list(tmp_path.iterdir()) == []
