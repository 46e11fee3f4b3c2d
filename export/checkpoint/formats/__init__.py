"""Formats of quantized checkpoints: which stored tensors make up a weight, and what its codes and values are.

base      the protocol of a format, stored tensors, and helpers
declared  which format config.json or a separate file declares
others    one module per format
"""

from .base import Encoding, StoredTensor, WeightFormat
from .declared import check_format, read_format

__all__ = ["Encoding", "StoredTensor", "WeightFormat", "check_format", "read_format"]
