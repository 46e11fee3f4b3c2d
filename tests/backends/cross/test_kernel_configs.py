"""Choices without timing of an export for a named GPU: kernel configurations by name, GEMM templates by score."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from executorch_moe.backends.cuda.cross import kernel_configs, static_choices
from executorch_moe.backends.cuda.cross.kernel_configs import (
    UnknownConfigError,
    choose_config,
    given_configs,
    read_configs,
)
from executorch_moe.backends.cuda.cross.static_choices import score_gemm
from executorch_moe.kernels.gpus import find_model

THEIRS = "executorch.backends.cuda.triton.kernels"


@pytest.mark.parametrize("name", kernel_configs.DEFAULTS)
def test_what_is_known_by_name_is_listed_by_the_installed_executorch(name: str) -> None:
    module = importlib.import_module(f"{THEIRS}.{'sdpa' if name.startswith('_sdpa') else 'fused_moe'}")
    assert choose_config(name, getattr(module, name).configs) is not None


def listed(*blocks: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(kwargs={"BLOCK_M": block}, num_warps=4, num_stages=2) for block in blocks]


def test_a_kernel_that_is_not_known_has_no_preference() -> None:
    assert choose_config("some_kernel", listed(16, 32)) is None


def test_a_measured_configuration_comes_before_the_known_one(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    path.write_text(json.dumps({"_sdpa_fwd_kernel": {"BLOCK_M": 32, "num_warps": 4}}))
    configs = listed(16, 32, 64)
    with given_configs(read_configs(path)):
        assert choose_config("_sdpa_fwd_kernel", configs) is configs[1]
        with pytest.raises(UnknownConfigError, match=r"_sdpa_fwd_kernel has no configuration .*'BLOCK_M': 32"):
            choose_config("_sdpa_fwd_kernel", listed(16))
    assert choose_config("_sdpa_fwd_kernel", configs) is None  # known, but not among these


@pytest.mark.parametrize("text", ["[]", '{"kernel": 3}', '{"kernel": {"BLOCK_M": "64"}}', "{", None])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "configs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"kernel_configs='.*configs\.json'"):
        read_configs(path)


def test_configurations_of_kernels_that_take_types_can_be_written_as_json() -> None:
    import triton.language as tl

    plain = [static_choices._plain(value) for value in (tl.bfloat16, True, 4, 0.5, "tf32")]
    assert json.loads(json.dumps(plain)) == ["bf16", True, 4, 0.5, "tf32"]


def template(block_m: int, block_n: int, block_k: int, stages: int, rows: object, columns: int) -> SimpleNamespace:
    return SimpleNamespace(
        info_dict=lambda: {"tile_shape": f"({block_m}, {block_k}, {block_n})", "num_stages": stages},
        layout=SimpleNamespace(size=[rows, columns], dtype=torch.bfloat16),
    )


def test_gemms_of_a_prompt_take_tiles_that_fill_the_gpu_and_reuse_most() -> None:
    import sympy

    tokens = sympy.Symbol("s0", integer=True)
    tiles = [
        (16, 256, 64, 4),
        (32, 32, 16, 1),
        (64, 64, 64, 3),
        (128, 128, 64, 5),
        (128, 256, 64, 4),
        (128, 256, 128, 4),
    ]
    h200 = find_model("h200")

    def best(columns: int) -> tuple[int, ...]:
        return max(tiles, key=lambda tile: score_gemm(template(*tile, tokens, columns), h200))

    # 128 x 256 x 128 in four stages does not fit into shared memory.
    assert best(5120) == (128, 256, 64, 4) and best(2048) == (128, 256, 64, 4)
    # A router has few columns: with large tiles most multiprocessors would be idle.
    assert best(128) == (64, 64, 64, 3)
