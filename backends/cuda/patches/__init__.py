"""Patches of other packages: `registry` names all of them, `cross` has those of `target_cuda`."""

from typing import Any

from .registry import PATCHES, VERSIONS, holder_of, replacing

_OF_CROSS = ("INDUCTOR_CONFIG", "SMALL", "check_versions", "replaced")

__all__ = ["PATCHES", "VERSIONS", "holder_of", "replacing"]


def __getattr__(name: str) -> Any:
    if name in _OF_CROSS:  # it imports modules that use the registry
        from . import cross

        return getattr(cross, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
