"""Disables settings of Inductor with which it compiles wrong programs.

`loop_index_inversion_in_fusion` (on by default in torch 2.11 to 2.13): where one kernel writes a buffer and the next
reads it in another order, Inductor changes the order of the second. To do so it inverts the index expression without
checking its range: `ModularIndexing(p, 1, 16)` for p in [0, 32), which reads a buffer of 16 elements twice, counts as
invertible and is replaced by p, so the kernel reads 16 elements past the end of the buffer. A `cat((x, x))`, as in the
cosine and sine of rotary embeddings, is enough. It happens with `loop_ordering_after_fusion` off, which ExecuTorch's
CudaBackend sets, in a kernel that reads one buffer and follows one that it could be fused with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch._inductor.config as inductor_config

SETTINGS = {"loop_index_inversion_in_fusion": False}
"""Setting -> its safe value."""


@contextlib.contextmanager
def defects_avoided() -> Iterator[None]:
    """Context in which Inductor compiles with the safe values of `SETTINGS`. Settings that torch lacks are skipped."""
    with inductor_config.patch(_known()):
        yield


def avoid_defects() -> None:
    """Use the safe values of `SETTINGS` until the process ends.

    For `to_edge_transform_and_lower` with a partitioner: it compiles after the partitioner has returned, so there is no
    later moment to restore the settings. These are public settings of torch, not patched functions.
    """
    for name, value in _known().items():
        setattr(inductor_config, name, value)


def _known() -> dict[str, bool]:
    present = inductor_config.get_config_copy()
    return {name: value for name, value in SETTINGS.items() if name in present}
