"""Reads a .pte with ExecuTorch's own Python deserializers. It needs no pybindings, so it works with any torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import _get_extended_header
from executorch.exir.schema import (
    BackendDelegate,
    Bool,
    DataLocation,
    DelegateCall,
    Double,
    ExecutionPlan,
    Int,
    KernelCall,
    Null,
    Program,
    String,
    Tensor,
    TensorDataLocation,
    TensorShapeDynamism,
)
from executorch.exir.tensor import scalar_type_enum

from executorch_moe.backends.errors import said_in_one_line

from .digests import COPY_AGAIN, TRAILER_BYTES, file_digest, read_trailer

GIVE_THE_PTE = "give the .pte of an export"
_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.bool, torch.bfloat16, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def _dtype_table() -> dict[int, torch.dtype]:
    table = {}
    for dtype in _DTYPES:
        try:
            table[int(scalar_type_enum(dtype))] = dtype
        except (KeyError, ValueError, AssertionError, RuntimeError):  # a dtype that this ExecuTorch does not serialize
            continue
    return table


_DTYPE_OF = _dtype_table()


def dtype_of(scalar_type: int) -> torch.dtype:
    """torch dtype of a serialized scalar type.

    Raises:
        ValueError: no torch dtype has this number.
    """
    dtype = _DTYPE_OF.get(int(scalar_type))
    if dtype is None:
        raise ValueError(
            f"scalar type {int(scalar_type)} has no torch dtype: the file is damaged, or made by a newer ExecuTorch: "
            "export it again with this one"
        )
    return dtype


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a method's input or output. If `dynamic`, the sizes are upper bounds."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    dynamic: bool
    dim_order: tuple[int, ...]

    def __str__(self) -> str:
        bound = " (upper bounds)" if self.dynamic else ""
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(map(str, self.sizes))}]{bound}"

    def why_not(self, value: object) -> str:
        """Empty if `value` is a valid argument for this tensor, else the reason."""
        if not isinstance(value, torch.Tensor):
            return f"is a {type(value).__name__}, expected a tensor {self}"
        shape = list(value.shape)
        if value.dtype != self.dtype:
            return f"has dtype {value.dtype}, expected {self.dtype}: convert it"
        fits = len(shape) == len(self.sizes) and all(
            given <= size if self.dynamic else given == size for given, size in zip(shape, self.sizes, strict=False)
        )
        return "" if fits else f"has shape {shape}, expected {self}: pass a smaller input or export with larger bounds"


class PteFile:
    """A program: its plans as ExecuTorch's schema classes, its named data and delegate payloads as views of the file.

    Args:
        path: the .pte.
        verify: compare its bytes with the digest of the export before parsing them.

    Attributes:
        trailer: sizes and digests of the .pte and its .ptd, or None if the program was written without them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ExecuTorch program, cut short, or damaged.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        content = map_file(self.path, "program")
        if content[4:6] != b"ET":
            raise ValueError(f"{self.path} is not an ExecuTorch program (no 'ET' mark at byte 4): {GIVE_THE_PTE}")
        self.trailer = read_trailer(self.path, content)
        size = len(content) if self.trailer is None else len(content) - TRAILER_BYTES
        if verify and self.trailer is not None and file_digest(self.path, size) != self.trailer.pte_digest:
            raise ValueError(f"{self.path} is damaged: its bytes differ from those that were exported: {COPY_AGAIN}")
        self._view = memoryview(content)[:size]
        program_size = self._check_header()
        # Damaged bytes make the generated reader raise errors of any type.
        with said_in_one_line(f"{self.path} cannot be read as an ExecuTorch program", COPY_AGAIN, ValueError):
            self.program: Program = _flatbuffer_to_program(bytes(self._view[:program_size]))
            self._check_references()
            self._plans = {plan.name: plan for plan in self.program.execution_plan}
            self._named = {entry.key: entry.segment_index for entry in self.program.named_data or []}
        self._inputs: dict[str, list[TensorInfo]] = {}

    def _check_header(self) -> int:
        """Compare the file's size with its header; return the size in bytes of the program without its segments."""
        header = _get_extended_header(bytes(self._view[:256]))
        if header is None:  # programs without segments may have none
            self._base = 0
            return len(self._view)
        self._base = header.segment_base_offset
        needed = max(header.program_size, self._base + header.segment_data_size)
        if len(self._view) < needed:
            raise ValueError(
                f"{self.path} is cut short: {len(self._view)} bytes, its header says {needed}: {COPY_AGAIN}"
            )
        if len(self._view) > needed and header.segment_data_size:
            raise ValueError(f"{self.path} is damaged: {len(self._view)} bytes, its header says {needed}: {COPY_AGAIN}")
        return int(header.program_size)

    def _check_references(self) -> None:
        """Check that every index in the program is in range."""
        segments = self.program.segments
        if any(not 0 <= self._base + s.offset <= self._base + s.offset + s.size <= len(self._view) for s in segments):
            raise self._damaged("a data segment ends past the file")
        named = [entry.segment_index for entry in self.program.named_data or []]
        if any(not 0 <= index < len(segments) for index in named):
            raise self._damaged("named data is in no segment")
        for plan in self.program.execution_plan:
            calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
            values = [*plan.inputs, *plan.outputs]
            for call in calls:
                if isinstance(call, (KernelCall, DelegateCall)):
                    values.extend(call.args)
                if isinstance(call, KernelCall) and not 0 <= call.op_index < len(plan.operators):
                    raise self._damaged(f"method {plan.name} calls an operator that does not exist")
                if isinstance(call, DelegateCall) and not 0 <= call.delegate_index < len(plan.delegates):
                    raise self._damaged(f"method {plan.name} calls a delegate that does not exist")
            if any(not 0 <= index < len(plan.values) for index in values):
                raise self._damaged(f"method {plan.name} uses a value that does not exist")
            for delegate in plan.delegates:
                inline = delegate.processed.location == DataLocation.INLINE
                held = self.program.backend_delegate_data if inline else segments
                if not 0 <= delegate.processed.index < len(held):
                    raise self._damaged(f"method {plan.name} has a delegate without its data")

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {why}: {COPY_AGAIN}")

    @property
    def method_names(self) -> list[str]:
        """Methods that compute something, sorted."""
        return sorted(name for name, plan in self._plans.items() if not is_constant(plan))

    @property
    def constant_names(self) -> list[str]:
        """Constant methods, sorted."""
        return sorted(name for name, plan in self._plans.items() if is_constant(plan))

    def plan(self, method: str) -> ExecutionPlan:
        """Execution plan of a method.

        Raises:
            ValueError: the program has no such method.
        """
        if method not in self._plans:
            raise ValueError(f"no method {method!r} in {self.path}: it has {', '.join(sorted(self._plans)) or 'none'}")
        return self._plans[method]

    def constant(self, name: str) -> Any:
        """Value of a constant method: bool, int, float, str, None, or lists, tuples and dicts of them.

        Raises:
            ValueError: the program has no such method, or the method computes something.
            NotImplementedError: the value is a tensor.
        """
        plan = self.plan(name)
        if not is_constant(plan):
            raise ValueError(f"{name!r} in {self.path} is not a constant method: use run()")
        values = [_constant_value(name, plan.values[index].val) for index in plan.outputs]
        from torch.utils import _pytree as pytree

        with said_in_one_line(f"constant method {name!r} in {self.path} cannot be read", COPY_AGAIN, ValueError):
            spec = pytree.treespec_loads(plan.container_meta_type.encoded_out_str)
            return pytree.tree_unflatten(values, spec)

    def named_data(self) -> dict[str, memoryview]:
        """Named data inside the .pte: key -> bytes."""
        return {key: self._segment(index) for key, index in self._named.items()}

    def delegate_data(self, delegate: BackendDelegate) -> bytes:
        """The payload that a backend's preprocess wrote for a delegate."""
        where = delegate.processed
        if where.location == DataLocation.INLINE:
            return bytes(self.program.backend_delegate_data[where.index].data)
        return bytes(self._segment(where.index))

    def delegates(self) -> Iterator[tuple[str, BackendDelegate]]:
        """(method, delegate) for every delegate of every method."""
        for name in self.method_names:
            for delegate in self._plans[name].delegates:
                yield name, delegate

    def inputs(self, method: str) -> list[TensorInfo]:
        """Inputs of a method.

        Raises:
            NotImplementedError: an input is not a tensor.
        """
        if method not in self._inputs:  # cached: every call needs it
            plan = self.plan(method)
            self._inputs[method] = [_tensor_info(method, "input", plan.values[index].val) for index in plan.inputs]
        return self._inputs[method]

    def outputs(self, method: str) -> list[TensorInfo]:
        """Outputs of a method.

        Raises:
            NotImplementedError: an output is not a tensor.
        """
        plan = self.plan(method)
        return [_tensor_info(method, "output", plan.values[index].val) for index in plan.outputs]

    def check_inputs(self, method: str, tensors: tuple[torch.Tensor, ...]) -> None:
        """Compare the arguments of a call with the inputs that the method was exported for.

        Raises:
            ValueError: wrong number, dtype, rank or size; the message names the input.
        """
        expected = self.inputs(method)
        if len(tensors) != len(expected):
            listed = ", ".join(map(str, expected))
            raise ValueError(f"{method} got {len(tensors)} inputs, expected {len(expected)}: {listed}")
        for position, (info, value) in enumerate(zip(expected, tensors, strict=True)):
            if why := info.why_not(value):
                raise ValueError(f"input {position} of {method} {why}")

    def external_tensors(self) -> dict[str, int]:
        """Tensors outside every delegate that are in the .ptd: fully qualified name -> bytes."""
        found: dict[str, int] = {}
        for plan in self.program.execution_plan:
            for value in plan.values:
                if not isinstance(value.val, Tensor) or (info := value.val.extra_tensor_info) is None:
                    continue
                if info.location == TensorDataLocation.EXTERNAL and info.fully_qualified_name is not None:
                    count = 1
                    for size in value.val.sizes:
                        count *= size
                    found[info.fully_qualified_name] = count * dtype_of(value.val.scalar_type).itemsize
        return found

    def _segment(self, index: int) -> memoryview:
        segment = self.program.segments[index]
        start = self._base + segment.offset
        return self._view[start : start + segment.size]


def is_constant(plan: ExecutionPlan) -> bool:
    """True for a method without inputs and instructions: it returns constants."""
    return not plan.inputs and not any(chain.instructions for chain in plan.chains)


def map_file(path: Path, kind: str) -> mmap.mmap:
    """Map a file for reading.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, or is a folder.
    """
    if not path.exists():
        dangling = f" (it is a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise FileNotFoundError(
            f"{kind} {path} does not exist{dangling}: check the path, or export again (a .pte and its .ptd go together)"
        )
    if not path.is_file():
        raise ValueError(f"{kind} {path} is not a file: give the {path.suffix or '.pte'} of an export")
    if path.stat().st_size == 0:
        raise ValueError(f"{kind} {path} is empty: {COPY_AGAIN}")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _constant_value(name: str, value: object) -> Any:
    if isinstance(value, Int):
        return value.int_val
    if isinstance(value, Bool):
        return value.bool_val
    if isinstance(value, Double):
        return float(value.double_val)
    if isinstance(value, String):
        return value.string_val
    if isinstance(value, Null):
        return None
    raise NotImplementedError(
        f"constant method {name!r} returns a {type(value).__name__}: only bool, int, float, str and lists are supported"
    )


def _tensor_info(method: str, role: str, value: object) -> TensorInfo:
    if not isinstance(value, Tensor):
        raise NotImplementedError(
            f"{role} of {method} is a {type(value).__name__}, only tensors are run: export with tensor {role}s"
        )
    return TensorInfo(
        sizes=tuple(value.sizes),
        dtype=dtype_of(value.scalar_type),
        dynamic=value.shape_dynamism != TensorShapeDynamism.STATIC,
        dim_order=tuple(value.dim_order),
    )
