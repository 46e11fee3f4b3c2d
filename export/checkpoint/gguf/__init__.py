"""GGUF files (llama.cpp) as checkpoints.

blocks          ggml's block types: values, and 4-bit codes of some types
architectures   names of tensors, as transformers has them
changes         the order of rows and columns, and other differences of values
configurations  config.json from the metadata of a file
files           the files: tables of tensors, reading tensors
folder          a model folder made from the metadata of a file
tokenizer       its tokenizer.json
"""

from .files import GgufFormat, open_gguf
from .folder import find_folder, is_gguf, model_folder

__all__ = ["GgufFormat", "find_folder", "is_gguf", "model_folder", "open_gguf"]
