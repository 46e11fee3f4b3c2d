"""Checks every kernel that Inductor generates against the sizes of its buffers, while AOTInductor compiles.

Inductor can lose parts of index expressions: with `loop_index_inversion_in_fusion`, a kernel that repeats a buffer of
16 elements twice reads 32 elements (torch 2.11 to 2.13; see `torch_defects`). Such a kernel reads memory past the end
of the buffer, without any error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from executorch_moe.backends.cuda.patches.registry import KERNELS, replacing

from .accesses import Access, Kernel, accesses
from .intervals import Interval

NOT_CHECKED = "not checked"
MOST_POINTS = 1 << 20
"""Where intervals alone do not decide, a kernel with more index values than this is checked on a sample of them."""
LARGEST_SYMBOL = 1 << 16
"""Largest value that is tried for sizes that are known only at run time."""


class OutOfBoundsError(RuntimeError):
    """A generated kernel reads or writes outside of a buffer."""


@dataclass(frozen=True)
class Finding:
    """An access outside of a buffer.

    Attributes:
        kernel: name of the kernel. access: source of the load or store.
        buffer: name of the buffer. size: its number of elements. index: an element outside it.
    """

    kernel: str
    access: str
    buffer: str
    size: int
    index: int

    def __str__(self) -> str:
        return f"{self.kernel} touches element {self.index} of {self.buffer}, which has {self.size}: {self.access}"


@dataclass
class AccessReport:
    """Results for all kernels of an export.

    Attributes:
        kernels: number of checked kernels.
        proven: number of accesses that are inside for every tried size.
        undecided: accesses that cannot be decided, as "kernel: source".
        outside: accesses outside of their buffers.
    """

    kernels: int = 0
    proven: int = 0
    undecided: list[str] = field(default_factory=list)
    outside: list[Finding] = field(default_factory=list)

    def undecide(self, *texts: str) -> None:
        """Add accesses that cannot be decided; one that is tried with several sizes counts once."""
        self.undecided += [text for text in dict.fromkeys(texts) if text not in self.undecided]

    def __str__(self) -> str:
        undecided = f", {len(self.undecided)} undecided" if self.undecided else ""
        return f"{self.proven} loads and stores of {self.kernels} generated kernels inside their buffers{undecided}"

    def raise_if_outside(self) -> None:
        """Raises:
        OutOfBoundsError: some access is outside of its buffer.
        """
        if self.outside:
            listed = "; ".join(str(finding) for finding in self.outside[:3])
            more = f" (and {len(self.outside) - 3} more)" if len(self.outside) > 3 else ""
            raise OutOfBoundsError(
                f"the compiled program would compute wrong results: {listed}{more}. This is a defect of torch's "
                "compiler: export with another torch version, and report it with this message"
            )


@contextlib.contextmanager
def checked_kernels() -> Iterator[AccessReport]:
    """Context that checks each kernel that Inductor defines, and raises an error at the end if accesses are outside.

    Yields:
        The report, filled while compiling.

    Raises:
        OutOfBoundsError: at the end, unless another error was raised.
    """
    report, seen = AccessReport(), set[Any]()

    def define(self: Any, src_code: str, node_schedule: Any, kernel: Any) -> Any:
        name = stock(self, src_code, node_schedule, kernel)
        try:
            check(str(name), src_code, kernel)
        except Exception as error:  # an unknown kind of kernel: the program may still be correct
            report.undecide(f"{name}: {NOT_CHECKED} ({type(error).__name__}: {error})")
        return name

    def check(name: str, src_code: str, kernel: Any) -> None:
        for symbols in _assignments(kernel):
            sizes, arguments, extents = (
                {key: _number(size, symbols) for key, size in table.items()} for table in _tables(kernel)
            )
            key = (src_code, *(tuple(sorted(part.items())) for part in (sizes, arguments, extents)))
            if key in seen:
                continue
            seen.add(key)
            report.kernels += 1
            numels = {f"{prefix}numel": extent for prefix, extent in extents.items()}
            run = Kernel(_plain_source(src_code, name), set(sizes), {**arguments, **numels}, extents)
            before = len(report.outside)
            check_kernel(report, name, run, sizes)
            if report.outside[before:] and not can_occur(symbols):
                report.undecide(*map(str, report.outside[before:]))
                del report.outside[before:]

    with replacing(KERNELS) as replace:
        stock = replace("torch._inductor.codegen.triton:TritonScheduling.define_kernel", define)
        yield report
    report.raise_if_outside()


def check_kernel(report: AccessReport, name: str, kernel: Kernel, sizes: Mapping[str, int]) -> None:
    """Check one kernel and add the results to `report`.

    Args:
        report: to add to.
        name: name of the kernel.
        kernel: its source and arguments.
        sizes: number of elements of the buffer of each tensor argument.
    """
    ranges = {prefix: Interval(0, max(extent, 1) - 1) for prefix, extent in kernel.extents.items()}
    found = accesses(kernel, ranges) if all(extent > 0 for extent in kernel.extents.values()) else []
    inside = [_inside(access, sizes) for access in found]
    report.proven += sum(inside)
    left = [access for proven, access in zip(inside, found, strict=True) if not proven]
    if all(access.offset is None or access.pointer not in sizes for access in left):
        report.undecide(*(f"{name}: {access.text}" for access in left))  # index values would not decide it either
        return
    for proven, access in zip(inside, accesses(kernel, _points(kernel.extents)), strict=True):
        if proven:
            continue
        size = sizes.get(access.pointer)
        if size is None or access.offset is None:
            report.undecide(f"{name}: {access.text}")
            continue
        low, high, active, maybe = np.broadcast_arrays(
            access.offset.low, access.offset.high, np.equal(access.mask.low, 1), np.equal(access.mask.high, 1)
        )
        outside = (low < 0) | (high >= size)
        sure = outside & active & (low == high)
        if sure.any():
            report.outside.append(Finding(name, access.text, access.pointer, size, int(low[sure][0])))
        elif (outside & maybe).any() or _is_sample(kernel.extents):
            report.undecide(f"{name}: {access.text}")
        else:
            report.proven += 1


def _inside(access: Access, sizes: Mapping[str, int]) -> bool:
    size = sizes.get(access.pointer)
    if size is None or access.offset is None:
        return False
    never = np.equal(access.mask.high, 0)
    inside = np.greater_equal(access.offset.low, 0) & np.less(access.offset.high, size)
    return bool(np.all(never | inside))


def _is_sample(extents: Mapping[str, int]) -> bool:
    return math.prod(extents.values()) > MOST_POINTS


def _points(extents: Mapping[str, int]) -> dict[str, Interval]:
    """All index values, as arrays that broadcast. If there are too many, a sample with the first and last of each."""
    if not extents:
        return {}
    axes: dict[str, Any] = {}
    if _is_sample(extents):
        random, count = np.random.default_rng(0), MOST_POINTS // 4
        corners = np.array(list(itertools.product((0, 1), repeat=len(extents))), dtype=np.int64)
        for axis, (prefix, extent) in enumerate(extents.items()):
            axes[prefix] = np.concatenate([random.integers(0, extent, count), corners[:, axis] * (extent - 1)])
    else:
        for axis, (prefix, extent) in enumerate(extents.items()):
            shape = [1] * len(extents)
            shape[axis] = extent
            axes[prefix] = np.arange(extent, dtype=np.int64).reshape(shape)
    return {prefix: Interval(values, values) for prefix, values in axes.items()}


def _plain_source(src_code: str, name: str) -> str:
    """The kernel's source as Python, with the name in place of Inductor's placeholders for it."""
    from torch._inductor.utils import Placeholder

    for placeholder in (Placeholder.DESCRIPTIVE_NAME, Placeholder.KERNEL_NAME):
        src_code = src_code.replace(str(placeholder), name)
    return src_code.replace("#pragma CMT", "#")


def _tables(kernel: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sizes of the buffers, integer arguments, and extents of the indices of a kernel: numbers or expressions."""
    from torch._inductor.virtualized import V

    # Sizes that several kernels need are computed once and have their own symbols.
    computed = V.graph.sizevars.inv_precomputed_replacements

    def plain(size: Any) -> Any:
        return size.subs(computed) if hasattr(size, "subs") else size

    return (
        {argument: plain(size) for argument, size in _buffers(kernel).items()},
        {argument: plain(size) for size, argument in kernel.args.sizevars.items()},
        {tree.prefix: plain(tree.numel) for tree in _trees(kernel)},
    )


def _buffers(kernel: Any) -> dict[str, Any]:
    """Tensor arguments of a kernel -> number of elements of the buffer."""
    from torch._inductor.virtualized import V

    arguments = kernel.args
    named: list[tuple[str, str]] = []
    for table in (arguments.input_buffers, arguments.output_buffers):
        named += [(argument, buffer) for buffer, argument in table.items() if isinstance(argument, str)]
    for buffer, inplaced in arguments.inplace_buffers.items():
        if hasattr(inplaced, "inner_name"):
            named.append((inplaced.inner_name, buffer))
    found: dict[str, Any] = {}
    for argument, buffer in named:
        extent = _elements(V.graph, buffer)
        if extent is not None:
            found.setdefault(argument, extent)
    return found


def _elements(graph: Any, name: str) -> Any:
    """Number of elements from the start of a buffer to its last one, as number or expression; None without a layout."""
    if name in graph.constants:
        tensor = graph.constants[name]
        return _extent(tensor.size(), tensor.stride(), 0)
    buffer = graph.graph_inputs.get(name)
    if buffer is None:
        buffer = graph.try_get_buffer(name)
    try:
        layout = buffer.get_layout() if hasattr(buffer, "get_layout") else buffer.layout
    except (AttributeError, NotImplementedError):
        return None
    if hasattr(layout, "real_layout"):
        layout = layout.real_layout()
    return _extent(layout.size, layout.stride, layout.offset)


def _extent(sizes: Any, strides: Any, offset: Any) -> Any:
    if any(size == 0 for size in sizes):
        return 0
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _trees(kernel: Any) -> list[Any]:
    """Index ranges of a kernel; none for a template, which computes its own."""
    from torch._inductor.select_algorithm import TritonTemplateKernel

    return [] if isinstance(kernel, TritonTemplateKernel) else list(kernel.range_trees)


def _number(size: Any, symbols: Mapping[Any, int]) -> int:
    return int(size.subs(symbols)) if hasattr(size, "subs") else int(size)


def _assignments(kernel: Any) -> list[dict[Any, int]]:
    """Values to try for sizes that are known only at run time: the smallest, about 17, and a large one."""
    from torch._inductor.virtualized import V

    expressions = [size for table in _tables(kernel) for size in table.values()]
    free = {symbol for size in expressions for symbol in getattr(size, "free_symbols", ())}
    if not free:
        return [{}]
    ranges, tried = V.graph.sizevars.shape_env.var_to_range, []
    for at in range(3):
        values = {}
        for symbol in free:
            known = ranges.get(symbol)
            low = int(max(known.lower, 1)) if known is not None else 1  # the lower bound may be minus infinity
            high = int(min(known.upper, LARGEST_SYMBOL)) if known is not None else LARGEST_SYMBOL
            values[symbol] = (low, min(max(low, 17), high), max(low, high))[at]
        if values not in tried:
            tried.append(values)
    return tried


def can_occur(symbols: Mapping[Any, int]) -> bool:
    """False for sizes that the program may exclude, by a guard or by a check at run time."""
    import sympy
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if free_unbacked_symbols(list(symbols)):
        return False
    return not any(guard.expr.subs(symbols) == sympy.false for guard in V.graph.sizevars.shape_env.guards)
