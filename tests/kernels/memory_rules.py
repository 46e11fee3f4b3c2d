"""Checks the memory accesses of kernels while Triton's interpreter runs them.

On a GPU, memcheck finds addresses outside of allocations, but most races between programs and launches only with
unlucky timing. Here programs run one after the other, so every access can be checked against these rules:

  bounds      Each byte that is read or written belongs to a tensor argument of the launch.
  written     Memory of `torch.empty` is not read before a kernel has written it.
  races       If two programs of a launch access a byte and one of them writes, atomics order them: the threads of the
              first one meet at a barrier, it releases (acq_rel, scope gpu), and the second one acquires.
  overlap     A launch may start while the previous one runs (`launches_before`). Before its wait, a program writes
              nothing and reads nothing that the previous launch writes. Every program waits: otherwise the next launch
              could start while the previous one still runs.

Programs can run in any order (`shuffle`), and the results must be bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter

GUARD = 4096
"""Bytes before and after the copy of a tensor, so that addresses outside of it belong to no other tensor."""

NOBODY, SEVERAL = -1, -2


class MemoryRuleError(AssertionError):
    """A kernel broke a rule; the message names rule, kernel, program and argument."""


@dataclass
class Shadow:
    """State of each byte of a storage, over all launches."""

    storage: Any  # a reference, so that its address is not reused
    size: int
    written: np.ndarray | None = None  # for torch.empty: whether a kernel wrote the byte
    written_by: np.ndarray | None = None  # the last launch that wrote the byte

    def __post_init__(self) -> None:
        self.written_by = np.full(self.size, -1, dtype=np.int32)


@dataclass
class Region:
    """A storage during one launch: a copy between guards, and the programs and times of accesses to each byte."""

    name: str
    copy: Tensor
    shadow: Shadow
    allowed: np.ndarray

    def __post_init__(self) -> None:
        self.base = self.copy.data_ptr() + GUARD
        size = self.shadow.size
        self.writer, self.reader = (np.full(size, NOBODY, dtype=np.int32) for _ in range(2))
        self.write_time, self.read_time = (np.zeros(size, dtype=np.int64) for _ in range(2))


@dataclass
class Program:
    """One program of a launch."""

    waited: bool = False
    barrier_time: int = 0
    knows: dict[int, int] = field(default_factory=dict)  # program -> time up to which its accesses precede ours


class MemoryRules:
    """State of the check. Tests use `check_memory`."""

    def __init__(self, shuffle: int | None) -> None:
        self.random = None if shuffle is None else np.random.default_rng(shuffle)
        self.shadows: dict[int, Shadow] = {}
        self.launch = -1
        self.loads = self.stores = 0
        self.kernel = ""
        self.time = 0
        self.regions: list[Region] = []
        self.programs: dict[int, Program] = {}
        self.current = NOBODY
        self.order: list[int] = []
        self.grid = (1, 1, 1)
        self.broken: MemoryRuleError | None = None
        self.released: dict[int, dict[int, int]] = {}  # address of an atomic -> program -> time of its release

    # ------------------------------------------------------------ launches

    def shadow_of(self, tensor: Tensor) -> Shadow:
        storage = tensor.untyped_storage()
        return self.shadows.setdefault(storage.data_ptr(), Shadow(storage, storage.nbytes()))

    def allocated(self, tensor: Tensor) -> Tensor:
        """Registers a result of torch.empty: no byte of it is written."""
        if tensor.device.type == "cpu" and tensor.numel():
            storage = tensor.untyped_storage()
            shadow = Shadow(storage, storage.nbytes())
            shadow.written = np.zeros(shadow.size, dtype=bool)
            self.shadows[storage.data_ptr()] = shadow
        return tensor

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Begins a launch. Returns its arguments, with copies of its tensors between guards."""
        self.launch += 1
        self.kernel = kernel
        self.regions, self.programs, self.released = [], {}, {}
        self.current = NOBODY
        regions: dict[int, Region] = {}
        copies = {}
        for name, argument in arguments.items():
            if not isinstance(argument, Tensor):
                copies[name] = argument
                continue
            shadow = self.shadow_of(argument)
            address = argument.untyped_storage().data_ptr()
            if address not in regions:
                padded = torch.zeros(shadow.size + 2 * GUARD, dtype=torch.uint8)
                inner = padded[GUARD : GUARD + shadow.size]
                inner.copy_(torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage()))
                regions[address] = Region(name, padded, shadow, np.zeros(shadow.size, dtype=bool))
            region = regions[address]
            size = argument.element_size()
            if argument.numel():
                last = sum((n - 1) * stride for n, stride in zip(argument.shape, argument.stride(), strict=True))
                first = argument.storage_offset() * size
                region.allowed[first : first + (last + 1) * size] = True
            copy = torch.empty(0, dtype=argument.dtype)
            offset = argument.storage_offset() + GUARD // size
            copies[name] = copy.set_(region.copy.untyped_storage(), offset, argument.size(), argument.stride())
        self.regions = list(regions.values())
        return copies

    def end(self) -> None:
        """Ends a launch: writes the copies back."""
        self.end_of_program()
        self.current = NOBODY
        for region in self.regions:
            inner = region.copy[GUARD : GUARD + region.shadow.size]
            torch.empty(0, dtype=torch.uint8).set_(region.shadow.storage).copy_(inner)

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid
        programs = np.arange(np.prod(grid))
        if self.random is not None:
            self.random.shuffle(programs)
        self.order = programs.tolist()

    def begin_program(self, place: tuple[int, ...]) -> tuple[int, int, int]:
        """Begins a program. Returns the place in the grid of the program to run instead of the one at `place`."""
        self.end_of_program()
        self.current = self.order[int(np.ravel_multi_index(place, self.grid))]
        self.programs[self.current] = Program(barrier_time=self.time)
        x, y, z = (int(i) for i in np.unravel_index(self.current, self.grid))
        return x, y, z

    def end_of_program(self) -> None:
        if self.current != NOBODY and not self.programs[self.current].waited:
            self.fail("overlap", "a program ends without waiting for the previous launches")

    def fail(self, rule: str, what: str) -> NoReturn:
        place = tuple(int(i) for i in np.unravel_index(self.current, self.grid))
        self.broken = MemoryRuleError(f"{rule}: {self.kernel}, program {place}: {what}")
        raise self.broken

    # ------------------------------------------------------------ accesses

    def waits(self) -> None:
        self.programs[self.current].waited = True

    def barrier(self) -> None:
        self.programs[self.current].barrier_time = self.time

    def bytes_of(self, pointers: np.ndarray, mask: np.ndarray, size: int, doing: str) -> tuple[Region, np.ndarray]:
        """Region and byte indices [lanes * size] of an access, whose lanes must all be in one storage."""
        pointers = np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64)
        for region in self.regions:
            first = pointers - region.base
            if ((first > -GUARD) & (first < region.shadow.size + GUARD)).all():
                break
        else:
            self.fail("bounds", f"{doing} an address in none of the arguments, or addresses in several")
        index = (first[:, None] + np.arange(size)).ravel()
        inside = (index >= 0) & (index < region.shadow.size)
        if not inside.all() or not region.allowed[index].all():
            outside = index[~inside] if not inside.all() else index[~region.allowed[index]]
            self.fail("bounds", f"{doing} byte {outside[0]} of {region.name}, which has {region.allowed.sum()}")
        return region, index

    def check_order(self, region: Region, index: np.ndarray, who: np.ndarray, when: np.ndarray, what: str) -> None:
        """Fails unless all accesses to these bytes by other programs are known to be complete."""
        others = (who[index] != NOBODY) & (who[index] != self.current)
        if not others.any():
            return
        known = self.programs[self.current].knows
        for other in np.unique(who[index][others]):
            theirs = index[who[index] == other]
            if other == SEVERAL or when[theirs].max() > known.get(int(other), -1):
                whose = "several programs" if other == SEVERAL else f"program {other}"
                self.fail("races", f"{what} by {whose}, without synchronization, {region.name} byte {theirs[0]}")

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        if not mask.any():
            return
        self.time += 1
        self.loads += 1
        region, index = self.bytes_of(pointers, mask, size, "reads")
        shadow, program = region.shadow, self.programs[self.current]
        assert shadow.written_by is not None
        if shadow.written is not None and not shadow.written[index].all():
            self.fail("written", f"reads byte {index[~shadow.written[index]][0]} of {region.name}, never written")
        if not program.waited and (shadow.written_by[index] >= self.launch - 1).any() and self.launch > 0:
            self.fail("overlap", f"reads {region.name} before its wait, which the previous launch writes")
        self.check_order(region, index, region.writer, region.write_time, "reads what was written")
        readers = region.reader[index]
        region.reader[index] = np.where((readers == NOBODY) | (readers == self.current), self.current, SEVERAL)
        region.read_time[index] = self.time

    def store(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        if not mask.any():
            return
        self.time += 1
        self.stores += 1
        region, index = self.bytes_of(pointers, mask, size, "writes")
        if not self.programs[self.current].waited:
            self.fail("overlap", f"writes {region.name} before its wait")
        self.check_order(region, index, region.writer, region.write_time, "writes what was written")
        self.check_order(region, index, region.reader, region.read_time, "writes what was read")
        region.writer[index] = self.current
        region.write_time[index] = self.time
        self.mark_written(region, index)

    def mark_written(self, region: Region, index: np.ndarray) -> None:
        assert region.shadow.written_by is not None
        region.shadow.written_by[index] = self.launch
        if region.shadow.written is not None:
            region.shadow.written[index] = True

    def atomic(self, pointers: np.ndarray, mask: np.ndarray, size: int, sem: Any, scope: Any) -> None:
        """Reads and writes; with acq_rel at GPU scope also acquires what others released here, and releases."""
        if not mask.any():
            return
        self.time += 1
        region, index = self.bytes_of(pointers, mask, size, "updates")
        program = self.programs[self.current]
        if not program.waited:
            self.fail("overlap", f"updates {region.name} before its wait")
        if region.shadow.written is not None and not region.shadow.written[index].all():
            self.fail("written", f"updates {region.name}, never written")
        if (region.writer[index] != NOBODY).any() or (region.reader[index] != NOBODY).any():
            self.fail("races", f"updates {region.name}, which a program of this launch accesses without atomics")
        self.mark_written(region, index)
        if sem == ir.MEM_SEMANTIC.ACQUIRE_RELEASE and scope in (ir.MEM_SYNC_SCOPE.GPU, ir.MEM_SYNC_SCOPE.SYSTEM):
            for address in np.unique(np.broadcast_to(pointers, mask.shape)[mask]):
                before = self.released.setdefault(int(address), {})
                for other, until in before.items():
                    program.knows[other] = max(until, program.knows.get(other, -1))
                before.update(program.knows)
                before[self.current] = (
                    program.barrier_time
                )  # only accesses before the barrier are released for all threads


def checked_grid_executor(rules: MemoryRules) -> type[interpreter.GridExecutor]:
    """The interpreter's executor of launches, with tensors that the rules check."""

    class CheckedGridExecutor(interpreter.GridExecutor):
        def _init_args_hst(self, args_dev, kwargs):  # type: ignore[no-untyped-def]
            named = {**dict(zip(self.arg_names, args_dev, strict=False)), **kwargs}
            return [], rules.begin(self.fn.__name__, named)

        def _restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):  # type: ignore[no-untyped-def]
            rules.end()

    return CheckedGridExecutor


@contextmanager
def check_memory(shuffle: int | None = None) -> Iterator[MemoryRules]:
    """Context in which interpreted launches must keep the rules of this module.

    Args:
        shuffle: seed of a random order of the programs of each launch; None keeps the interpreter's order.

    Raises:
        MemoryRuleError: a launch breaks a rule.
    """
    rules = MemoryRules(shuffle)
    builder = interpreter.InterpreterBuilder
    originals = {
        name: getattr(builder, name)
        for name in ("set_grid_dim", "set_grid_idx", "create_masked_load", "create_masked_store", "create_barrier")
    }
    atomics = {name: getattr(builder, name) for name in ("create_atomic_rmw", "create_atomic_cas")}
    call, empty = interpreter.InterpretedFunction.__call__, torch.empty

    def size_of(pointers: interpreter.TensorHandle) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def set_grid_dim(self, x, y, z):  # type: ignore[no-untyped-def]
        rules.set_grid((x, y, z))
        originals["set_grid_dim"](self, x, y, z)

    def set_grid_idx(self, x, y, z):  # type: ignore[no-untyped-def]
        originals["set_grid_idx"](self, *rules.begin_program((x, y, z)))

    def load(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        rules.load(pointers.data, mask.data.astype(bool), size_of(pointers))
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
        rules.store(pointers.data, mask.data.astype(bool), size_of(pointers))
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def barrier(self):  # type: ignore[no-untyped-def]
        rules.barrier()
        return originals["create_barrier"](self)

    def atomic_rmw(self, op, pointers, value, mask, sem, scope):  # type: ignore[no-untyped-def]
        rules.atomic(pointers.data, mask.data.astype(bool), size_of(pointers), sem, scope)
        return atomics["create_atomic_rmw"](self, op, pointers, value, mask, sem, scope)

    def atomic_cas(self, pointers, compared, value, sem, scope):  # type: ignore[no-untyped-def]
        rules.atomic(pointers.data, np.ones_like(pointers.data, dtype=bool), size_of(pointers), sem, scope)
        return atomics["create_atomic_cas"](self, pointers, compared, value, sem, scope)

    def device_function(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.__name__ == "launches_before":
            rules.waits()
        return call(self, *args, **kwargs)

    replaced = {
        "set_grid_dim": set_grid_dim, "set_grid_idx": set_grid_idx, "create_barrier": barrier,
        "create_masked_load": load, "create_masked_store": store,
        "create_atomic_rmw": atomic_rmw, "create_atomic_cas": atomic_cas,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(builder, name, function))
        stack.enter_context(mock.patch.object(interpreter.InterpretedFunction, "__call__", device_function))
        stack.enter_context(mock.patch.object(interpreter, "GridExecutor", checked_grid_executor(rules)))
        stack.enter_context(mock.patch.object(torch, "empty", lambda *a, **k: rules.allocated(empty(*a, **k))))
        try:
            yield rules
        except interpreter.InterpreterError:  # the interpreter raises this with the text of the kernel's error
            if rules.broken is None:
                raise
            raise rules.broken from None
