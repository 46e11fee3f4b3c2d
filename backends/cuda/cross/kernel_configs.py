"""Which of an autotuned kernel's configurations to take where nothing can be timed.

A kernel of ExecuTorch's own lists several and has them timed on the GPU that exports. Without that GPU, a configuration
that was measured on it, or failing that one of this file, is taken by name; for a kernel of no name here the first that
fits. All of them compute the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

Config = Mapping[str, int]
"""Tile sizes by their names in the kernel, num_warps and num_stages."""

# For tiles of head_dim 128, experts of Qwen3's size and many SMs. Reasons, not measurements, except where one is named:
# - _sdpa_fwd_kernel: its loads stand in a branch, so nothing is fetched ahead, and two to three programs of four warps
#   on a multiprocessor hide what one of eight cannot. The first of its list, 16 x 32, would use a quarter of an MMA.
# - _sdpa_decode_splitk_kernel: a split has 256 positions and a multiprocessor less than one program: few, long steps.
# - _fused_moe*: those that ExecuTorch's list names as the best of an A100, for the same shapes.
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
    """A configuration was asked for that the kernel does not list."""


@contextlib.contextmanager
def given_configs(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within it, an export for a GPU that is not here takes these configurations before those of `DEFAULTS`."""
    token = _GIVEN.set(configs)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def read_configs(path: Path) -> dict[str, Config]:
    """A file of measured configurations: JSON, {"kernel": {"BLOCK_M": 64, ..., "num_warps": 4, "num_stages": 2}}.

    Raises:
        ValueError: it is missing or holds anything else.
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
            f"kernel_configs={str(path)!r} must hold names of kernels with their numbers: "
            '{"kernel": {"BLOCK_M": 64, "num_warps": 4}}'
        )
    return found


def choose_config(kernel: str, configs: Sequence[Listed]) -> Listed | None:
    """That of a kernel's configurations which has the numbers that are known for its name; None if there is none.

    Raises:
        UnknownConfigError: a configuration that was asked for is not among them.
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
