"""Runs an artifact, in ExecuTorch's runtime or in the delegate host inside PyTorch."""

from .loader import LoadedProgram, load

__all__ = ["LoadedProgram", "load"]
