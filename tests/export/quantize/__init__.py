"""Tests: experts, linear layers, 4-bit tensors."""
