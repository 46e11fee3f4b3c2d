"""Quantizes a model in place: experts, linear layers and embeddings."""

from .experts import quantize_experts_

__all__ = ["quantize_experts_"]
