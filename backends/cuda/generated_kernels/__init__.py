"""Checks that the Triton kernels which Inductor generates stay inside the buffers that they are given."""

from .check import AccessReport, Finding, OutOfBoundsError, checked_kernels

__all__ = ["AccessReport", "Finding", "OutOfBoundsError", "checked_kernels"]
