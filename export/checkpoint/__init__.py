"""Checkpoints on disk: the stored tensors of each weight, and loading a model whole or packed layer by layer."""
