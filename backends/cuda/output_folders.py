"""Gives each compilation its own output folder, so that concurrent exports do not overwrite each other."""

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
    """Context in which AOTInductor writes each method's library, kernels and weights to a new folder.

    By default the folder is named after the model's Python code, in a cache that all processes of a user share. Two
    concurrent exports of one model then write the same files: ExecuTorch removes the library of one before the other
    reads it, and kernels of one can end up in the library of the other, because all use the name `cubins_combined.o`.
    Caches (Triton's kernels, timings, precompiled headers) stay shared.
    """

    def options(cls: type, compile_specs: Any) -> dict[str, Any]:
        # Inside the cache folder, which users may have put on a disk with room for the weights. Kept until the process
        # ends, because ExecuTorch reads the weights from files here when it writes the .ptd.
        folder = tempfile.mkdtemp(prefix="executorch_moe_", dir=cache_dir())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return {**stock(compile_specs), "aot_inductor.output_path": folder}

    with replacing(OUTPUTS) as replace:
        name = "executorch.backends.cuda.cuda_backend:CudaBackend.get_aoti_compile_options"
        stock = replace(name, classmethod(options))
        yield
