"""Settings of Inductor under which it compiles wrong programs; they are switched off.

`loop_index_inversion_in_fusion` (on by default in torch 2.11 to 2.13): where one kernel writes a buffer and the next
reads it in another order, Inductor swaps the order of the second. It inverts the index expression for that without a
look at its range: `ModularIndexing(p, 1, 16)` for p in [0, 32), which reads a buffer of 16 elements twice, counts as
invertible, is replaced by p, and the kernel reads 16 elements behind the buffer. A `cat((x, x))`, as in the cosine and
sine of rotary embeddings, is enough. It takes effect with `loop_ordering_after_fusion` off, as ExecuTorch's CudaBackend
sets it, for a kernel that reads one buffer, after one that it could be fused with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch._inductor.config as inductor_config

SETTINGS = {"loop_index_inversion_in_fusion": False}
"""Setting -> its safe value."""


@contextlib.contextmanager
def defects_avoided() -> Iterator[None]:
    """Within it, Inductor compiles without the settings above; a torch that does not have one of them needs nothing."""
    with inductor_config.patch(_known()):
        yield


def avoid_defects() -> None:
    """Switch the settings off until the process ends.

    For `to_edge_transform_and_lower` with a partitioner, which compiles after the partitioner has returned: there is no
    later moment at which the settings could be put back.
    """
    for name, value in _known().items():
        setattr(inductor_config, name, value)


def _known() -> dict[str, bool]:
    present = inductor_config.get_config_copy()
    return {name: value for name, value in SETTINGS.items() if name in present}
