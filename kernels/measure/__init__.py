"""Measuring kernels.

timing   time of one expert layer on a GPU, with random weights and routing
compile  registers, spills and shared memory of kernels, for GPUs that need not be present
tune     times configurations and writes the tables of `tuning`
"""
