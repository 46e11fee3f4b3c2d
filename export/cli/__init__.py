"""The command `executorch-moe`."""

from .app import main

__all__ = ["main"]
