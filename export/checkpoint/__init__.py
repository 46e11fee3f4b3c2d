"""Checkpoints on disk: which stored tensors make which weight, and packing them layer by layer."""
