"""Interprets the source of a generated Triton kernel on intervals, and collects the offsets of its loads and stores.

It understands the part of Triton that Inductor generates for pointwise kernels, reductions and GEMM templates. Other
expressions have an unknown value. An index that depends on one is undecided, and never wrongly reported.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from . import intervals
from .intervals import Interval, Value, constant

# Names in GEMM templates whose values the template itself keeps below M, N or K by a mask or a modulo.
TEMPLATE_RANGES = {
    "rm": "M", "rn": "N", "offs_a_m": "M", "offs_b_n": "N", "a_k_idx_vals": "K", "b_k_idx_vals": "K",
}  # fmt: skip

_ARITHMETIC: dict[str, Callable[[Interval, Interval], Value]] = {
    "Add": intervals.add,
    "Sub": intervals.subtract,
    "Mult": intervals.multiply,
    "FloorDiv": intervals.divide,
    "Mod": intervals.remainder,
}
_OF_TWO: dict[str, Callable[[Interval, Interval], Value]] = {
    "maximum": intervals.maximum,
    "minimum": intervals.minimum,
    "div_floor_integer": lambda a, b: intervals.divide(a, b) if _not_negative(a) else None,
    "remainder_integer": lambda a, b: intervals.remainder(a, b) if _not_negative(a) else None,
}
# Calls that return their first argument: shapes and hints.
_SAME_VALUE = ("broadcast_to", "max_contiguous", "multiple_of", "reshape", "expand_dims")


@dataclass(frozen=True)
class Pointer:
    """A tensor argument of the kernel, plus an offset in elements."""

    name: str
    offset: Value


@dataclass(frozen=True)
class Access:
    """One load or store.

    Attributes:
        pointer: name of the argument; "" if unknown.
        text: the source of the call.
        offset: elements from the start of the tensor.
        mask: where the access happens.
    """

    pointer: str
    text: str
    offset: Value
    mask: Interval


@dataclass
class Kernel:
    """The source and the arguments of a kernel.

    Attributes:
        source: Python source whose last function is the kernel.
        pointers: names of tensor arguments.
        sizes: values of integer arguments by name.
        extents: number of values of each index, by its prefix ("x", "y", "r0_"); empty for templates, which compute
            their own indices.
    """

    source: str
    pointers: set[str]
    sizes: dict[str, int]
    extents: dict[str, int] = field(default_factory=dict)


def accesses(kernel: Kernel, indices: Mapping[str, Interval]) -> list[Access]:
    """Every load and store of a kernel.

    Args:
        kernel: the kernel.
        indices: values of the index of each prefix in `kernel.extents`.
    """
    return _Run(kernel, indices).run()


class _Run:
    def __init__(self, kernel: Kernel, indices: Mapping[str, Interval]) -> None:
        self.kernel, self.indices = kernel, indices
        self.values: dict[str, Value | Pointer] = {}
        self.found: list[Access] = []

    def run(self) -> list[Access]:
        function = _kernel_function(ast.parse(self.kernel.source))
        for argument in function.args.args:
            name = argument.arg
            if name in self.kernel.pointers:
                self.values[name] = Pointer(name, constant(0))
            elif name in self.kernel.sizes:
                self.values[name] = constant(self.kernel.sizes[name])
        self._statements(function.body)
        return self.found

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign):
                value = self._value(statement.value)
                for target in statement.targets:
                    self._assign(target, value)
            elif isinstance(statement, ast.AnnAssign):
                self._assign(statement.target, self._value(statement.value) if statement.value else None)
            elif isinstance(statement, ast.AugAssign):
                self._value(statement.value)
                self._assign(statement.target, None)
            elif isinstance(statement, ast.Expr):
                self._value(statement.value)
            elif isinstance(statement, (ast.For, ast.While)):
                # One pass for all iterations: values that change between them are unknown.
                for name in _assigned(statement.body):
                    self.values[name] = None
                if isinstance(statement, ast.For):
                    self._assign(statement.target, None)
                self._statements(statement.body)
            elif isinstance(statement, ast.If):
                before = dict(self.values)
                self._statements(statement.body)
                after, self.values = self.values, dict(before)
                self._statements(statement.orelse)
                for name in after.keys() | self.values.keys():
                    self.values[name] = _joined(after.get(name), self.values.get(name))

    def _assign(self, target: ast.expr, value: Value | Pointer) -> None:
        if not isinstance(target, ast.Name):
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    self.values[part.id] = None
            return
        name = target.id
        for prefix in self.kernel.extents:
            if name == f"{prefix}index":
                value = self.indices[prefix]
            elif name == f"{prefix}mask":  # `indices` has only valid values
                value = constant(1)
        if not self.kernel.extents and name in TEMPLATE_RANGES:
            size = self.values.get(TEMPLATE_RANGES[name])
            if isinstance(size, Interval):
                value = Interval(0, size.high - 1)
        self.values[name] = value

    def _value(self, node: ast.expr | None) -> Value | Pointer:
        if isinstance(node, ast.Constant):
            return constant(node.value) if isinstance(node.value, (bool, int)) else None
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.Subscript):  # x[:, None]
            return self._value(node.value)
        if isinstance(node, ast.UnaryOp):
            value = self._interval(node.operand)
            if isinstance(node.op, ast.USub):
                return None if value is None else intervals.subtract(constant(0), value)
            if isinstance(node.op, (ast.Invert, ast.Not)):
                return intervals.opposite(value) if intervals.may_be_mask(value) else None
            return value
        if isinstance(node, ast.BinOp):
            return self._operation(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._interval(node.left), self._interval(node.comparators[0])
            return intervals.compare(type(node.ops[0]).__name__, left, right)
        if isinstance(node, ast.Call):
            return self._call(node)
        for child in ast.iter_child_nodes(node) if node is not None else ():  # it may contain loads
            if isinstance(child, ast.expr):
                self._value(child)
        return None

    def _interval(self, node: ast.expr | None) -> Value:
        value = self._value(node)
        return value if isinstance(value, Interval) else None

    def _operation(self, node: ast.BinOp) -> Value | Pointer:
        left, right = self._value(node.left), self._value(node.right)
        kind = type(node.op).__name__
        if isinstance(left, Pointer):
            known = kind == "Add" and isinstance(left.offset, Interval) and isinstance(right, Interval)
            return Pointer(left.name, intervals.add(left.offset, right) if known else None)  # type: ignore[arg-type]
        if isinstance(right, Pointer):
            return None
        if kind in ("BitAnd", "BitOr"):
            if not (intervals.may_be_mask(left) and intervals.may_be_mask(right)) or (left is None and right is None):
                return None  # numbers, not masks
            return (intervals.both if kind == "BitAnd" else intervals.either)(left, right)
        if kind not in _ARITHMETIC or left is None or right is None:
            return None
        return _ARITHMETIC[kind](left, right)

    def _call(self, node: ast.Call) -> Value | Pointer:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        method = isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name)
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id not in ("tl", "triton_helpers", "libdevice", "tl_math", "math"):
            method = True
        if name in ("load", "store") or name.startswith("atomic_"):
            self._access(node, mask_at=1 if name == "load" else 2)
            return None
        if name == "device_assert":
            self._take_for_true(node.args[0])
            return None
        if method:  # value.to(dtype), value.broadcast_to(shape)
            return self._value(owner) if name in ("to", *_SAME_VALUE) else None
        if name in _SAME_VALUE:
            return self._value(node.args[0])
        if name == "full":
            return self._interval(node.args[1])
        if name == "zeros":
            return constant(0)
        if name == "arange":
            end = self._interval(node.args[1])
            return None if end is None else Interval(0, end.high - 1)
        if name == "where":
            return intervals.choose(*(self._interval(argument) for argument in node.args[:3]))
        if name in _OF_TWO:
            a, b = (self._interval(argument) for argument in node.args[:2])
            return None if a is None or b is None else _OF_TWO[name](a, b)
        for argument in node.args:  # they may contain loads
            self._value(argument)
        return None

    def _access(self, node: ast.Call, mask_at: int) -> None:
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        mask_node = given.get("mask", node.args[mask_at] if len(node.args) > mask_at else None)
        absent = mask_node is None or (isinstance(mask_node, ast.Constant) and mask_node.value is None)
        mask = constant(1) if absent else intervals.as_mask(self._interval(mask_node))
        for argument in (*node.args[1:], *(keyword.value for keyword in node.keywords)):
            if argument is not mask_node:
                self._value(argument)
        pointer = self._value(node.args[0])
        text = ast.unparse(node)
        if isinstance(pointer, Pointer):
            self.found.append(Access(pointer.name, text, pointer.offset, mask))
        else:
            self.found.append(Access("", text, None, mask))

    def _take_for_true(self, condition: ast.expr) -> None:
        """After the device assertion `(0 <= v) & (v < n)`, v is in [0, n - 1]: otherwise the kernel traps."""
        for part in ast.walk(condition):
            if not (isinstance(part, ast.Compare) and len(part.ops) == 1 and isinstance(part.ops[0], ast.Lt)):
                continue
            checked, limit = part.left, self._interval(part.comparators[0])
            while isinstance(checked, ast.Call) and checked.args:  # tl.broadcast_to(v, shape)
                checked = checked.args[0]
            if isinstance(checked, ast.Name) and limit is not None:
                value = self.values.get(checked.id)
                known = value if isinstance(value, Interval) else None
                self.values[checked.id] = intervals.intersect(known, Interval(0, limit.high - 1))


def _kernel_function(module: ast.Module) -> ast.FunctionDef:
    """The kernel: the last top-level function, after its helpers."""
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    if not functions:
        raise ValueError("the source has no function")
    return functions[-1]


def _assigned(body: list[ast.stmt]) -> set[str]:
    """Names that carry a value from one loop iteration to the next: read before they are assigned in the body."""
    read: set[str] = set()
    carried: set[str] = set()
    for statement in body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        read |= {node.id for node in names if isinstance(node.ctx, ast.Load)}
        carried |= {node.id for node in names if isinstance(node.ctx, ast.Store) and node.id in read}
    return carried


def _joined(a: Value | Pointer, b: Value | Pointer) -> Value | Pointer:
    if isinstance(a, Interval) and isinstance(b, Interval):
        return intervals.union(a, b)
    return a if a is b else None


def _not_negative(a: Interval) -> bool:
    return bool(np.all(np.greater_equal(a.low, 0)))
