"""Keeps programs that are compiled at the same time from taking each other's files."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir

from executorch_moe.backends.cuda.patches.registry import OUTPUTS, replacing


@contextlib.contextmanager
def own_outputs() -> Iterator[None]:
    """Within it, AOTInductor writes each method's library, kernels and weights to a new folder.

    By default the folder is named after the model's Python code, in a cache that all processes of a user share. Then
    two exports of one model at the same time write the same files: ExecuTorch removes the library of one while the
    other is about to read it, and kernels of one may end up in the other's library, for `cubins_combined.o` is one name
    for all. What is a cache (Triton's kernels, timings, precompiled headers) stays shared.
    """

    def options(cls: type, compile_specs: Any) -> dict[str, Any]:
        # Inside the cache, for that may have been put on a disk with room for the weights. Kept until the process ends:
        # ExecuTorch leaves weights in files here and reads them to write the .ptd.
        folder = tempfile.mkdtemp(prefix="executorch_moe_", dir=cache_dir())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return {**stock(compile_specs), "aot_inductor.output_path": folder}

    with replacing(OUTPUTS) as replace:
        name = "executorch.backends.cuda.cuda_backend:CudaBackend.get_aoti_compile_options"
        stock = replace(name, classmethod(options))
        yield
