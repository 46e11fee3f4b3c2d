"""Patches of other packages, all in one registry."""

from .registry import PATCHES, VERSIONS, holder_of, replacing

__all__ = ["PATCHES", "VERSIONS", "holder_of", "replacing"]
