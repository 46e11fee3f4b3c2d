"""Measures exported models and kernels: the commands `bench` and `tune`."""
