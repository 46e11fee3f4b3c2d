"""GPU memory: checks that an artifact fits before loading it, and names the call that ran out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from executorch_moe.backends.artifact.weight_metadata import CudaDelegate

GIB = 2**30


def weight_bytes(delegates: Mapping[str, Sequence[CudaDelegate]]) -> int:
    """Bytes of weights and state on the GPU; storages that several methods share count once."""
    storages = {
        weight.storage_key: weight.storage_nbytes
        for parsed in delegates.values()
        for delegate in parsed
        for weight in delegate.weights
        if weight.device == "cuda"
    }
    return sum(storages.values())


def check_memory(path: Path, delegates: Mapping[str, Sequence[CudaDelegate]], device: torch.device) -> None:
    """Check that the weights fit into the free memory of a GPU; other devices pass.

    Raises:
        RuntimeError: they do not fit; the message gives the needed and the free memory.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # Memory that this process has reserved but does not use counts as free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = weight_bytes(delegates)
    if needed > free:
        raise RuntimeError(
            f"{path} needs {needed / GIB:.2f} GiB of GPU memory for weights and cache, "
            f"{torch.cuda.get_device_name(device)} has {free / GIB:.2f} of {total / GIB:.2f} GiB free: end other "
            "processes, use a larger GPU, or export with a smaller --max-context or --dense int4"
        )


@contextlib.contextmanager
def say_out_of_memory(method: str, inputs: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Context that names too little GPU memory as the cause of an error.

    AOTInductor's runtime reports every failure in the same words, so the statistics of the allocator decide.

    Raises:
        RuntimeError: replaces the error; gives the method and the memory that it had.
    """
    if device.type != "cuda":
        yield
        return
    before = _failures(device)
    try:
        yield
    except RuntimeError as error:
        if _failures(device) == before:
            raise
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.max_memory_allocated(device)
        asked = str(error).strip().splitlines()[0] if isinstance(error, torch.OutOfMemoryError) else ""
        raise RuntimeError(
            f"method {method} with inputs {[list(tensor.shape) for tensor in inputs]} ran out of GPU memory: it needs "
            f"more than the available {(held + free) / GIB:.2f} GiB ({total / GIB:.2f} GiB in all; "
            f"{asked or 'the weights are loaded'}): use a smaller --prefill-chunk, or a larger GPU"
        ) from error


def _failures(device: torch.device) -> int:
    """Number of failed allocations."""
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))
