"""Measuring kernels: timing one expert layer, compiling for GPUs that are not present, writing tuning tables."""
