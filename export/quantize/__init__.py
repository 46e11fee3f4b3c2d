"""Quantizing a model in place: experts, linear layers and embeddings."""
