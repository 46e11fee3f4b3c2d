"""Chooses configurations of autotuned kernels without timing them.

ExecuTorch's own kernels list several configurations, which are normally timed on the GPU of the export. Without that
GPU, the kernel's name decides: a configuration that was measured on such a GPU, else the one in this file, else the
first that fits. All of them compute the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

Config = Mapping[str, int]
"""Tile sizes by their names in the kernel, and num_warps and num_stages."""

# For head_dim 128, experts of Qwen3's size and many SMs. Chosen by reasoning, not measured, except where noted:
# - _sdpa_fwd_kernel: its loads are in a branch, so nothing is prefetched. Two to three programs of four warps on a
#   multiprocessor hide the latency better than one of eight. The first of its list, 16 x 32, uses a quarter of an MMA.
# - _sdpa_decode_splitk_kernel: a split has 256 positions, and there are fewer programs than multiprocessors: few, long
#   steps.
# - _fused_moe*: the best ones on an A100 for the same shapes, according to ExecuTorch's list.
DEFAULTS: dict[str, Config] = {
    "_sdpa_fwd_kernel": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "_sdpa_decode_splitk_kernel": {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
    "_fused_moe_kernel": {"BLOCK_SIZE_N": 8, "BLOCK_SIZE_K": 256, "num_warps": 2, "num_stages": 4},
    "_fused_moe_silu_kernel": {"BLOCK_SIZE_N": 8, "BLOCK_SIZE_K": 256, "num_warps": 2, "num_stages": 4},
    "_fused_moe_batched_kernel": {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "num_warps": 4, "num_stages": 3},
    "_fused_moe_silu_batched_kernel": {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "num_warps": 4, "num_stages": 3},
    "_fused_moe_batched_int8_kernel": {"BLOCK_SIZE_N": 128, "num_warps": 4, "num_stages": 3},
    "_fused_moe_silu_batched_int8_kernel": {"BLOCK_SIZE_N": 128, "num_warps": 4, "num_stages": 3},
}

_GIVEN: ContextVar[Mapping[str, Config] | None] = ContextVar("executorch_moe_kernel_configs", default=None)
Listed = TypeVar("Listed")


class UnknownConfigError(ValueError):
    """The kernel does not list the requested configuration."""


@contextlib.contextmanager
def given_configs(configs: Mapping[str, Config]) -> Iterator[None]:
    """Context in which an export for another GPU prefers these configurations (by kernel name) to `DEFAULTS`."""
    token = _GIVEN.set(configs)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def read_configs(path: Path) -> dict[str, Config]:
    """Read a JSON file of measured configurations: {"kernel": {"BLOCK_M": 64, ..., "num_warps": 4, "num_stages": 2}}.

    Raises:
        ValueError: the file is missing or contains anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"kernel_configs={str(path)!r} cannot be read: {error}") from None
    good = isinstance(found, dict) and all(
        isinstance(config, dict) and all(isinstance(value, int) for value in config.values())
        for config in found.values()
    )
    if not good:
        raise ValueError(
            f"kernel_configs={str(path)!r} must map kernel names to numbers: "
            '{"kernel": {"BLOCK_M": 64, "num_warps": 4}}'
        )
    return found


def choose_config(kernel: str, configs: Sequence[Listed]) -> Listed | None:
    """The one of a kernel's configurations that is given or in `DEFAULTS` for its name; None if there is none.

    Raises:
        UnknownConfigError: a given configuration is not among them.
    """
    given = (_GIVEN.get() or {}).get(kernel)
    wanted = given or DEFAULTS.get(kernel)
    for config in configs if wanted else ():
        listed: Any = config
        values = {**listed.kwargs, "num_warps": listed.num_warps, "num_stages": listed.num_stages}
        if all(values.get(name) == value for name, value in (wanted or {}).items()):
            return config
    if given:
        raise UnknownConfigError(
            f"kernel_configs: {kernel} has no configuration {dict(given)}: measure it again with the installed "
            "executorch, or leave it out"
        )
    return None
