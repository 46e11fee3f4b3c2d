"""The command `executorch-moe`, one module per command."""

from . import bench, chat, doctor, export, generate, inspect, serve, tune  # noqa: F401  each module registers its commands
from .app import main

__all__ = ["main"]
