"""Measuring exported models and kernels: the commands `bench` and `tune`."""
