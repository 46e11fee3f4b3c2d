"""Runs the inline PTX of a device function on the CPU, with the few instructions that decoders use."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Word = NDArray[np.int64]
FULL = 0xFFFFFFFF


def _signed(x: Word, bits: int) -> Word:
    return (x & ((1 << bits) - 1) ^ (1 << (bits - 1))) - (1 << (bits - 1))


def _lop3(a: Word, b: Word, c: Word, table: Word) -> Word:
    out = np.zeros(np.broadcast(a, b, c).shape, np.int64)
    for row in range(8):
        if int(table) >> row & 1:
            picks = [x if row >> (2 - i) & 1 else ~x for i, x in enumerate((a, b, c))]
            out = out | (picks[0] & picks[1] & picks[2] & FULL)
    return out


def _prmt(a: Word, b: Word, selector: Word) -> Word:
    out = np.zeros(np.broadcast(a, b, selector).shape, np.int64)
    source = [(x >> (8 * i)) & 255 for x in (a, b) for i in range(4)]
    table = np.stack(np.broadcast_arrays(*source, out))[:8]
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = np.take_along_axis(table, np.broadcast_to(nibble & 7, out.shape)[None], 0)[0]
        out = out | (np.where(nibble > 7, (byte >> 7) * 255, byte) << (8 * i))
    return out


def _dp2a(a: Word, b: Word, c: Word, first: int) -> Word:
    products = [_signed(a >> (16 * i), 16) * _signed(b >> (8 * (first + i)), 8) for i in (0, 1)]
    return (products[0] + products[1] + c) & FULL


def _bf16(x: Word) -> NDArray[np.float64]:
    return ((x & 0xFFFF) << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def _fma_bf16x2(a: Word, b: Word, c: Word) -> Word:
    """Only for results that are exact in bf16, which it checks."""
    halves = []
    for shift in (0, 16):
        # In fp64, no product of these is subnormal; -0 + -0 is -0.
        exact = _bf16(a >> shift) * _bf16(b >> shift) + _bf16(c >> shift)
        bits = exact.astype(np.float32).view(np.uint32).astype(np.int64)
        assert np.array_equal(_bf16(bits >> 16), exact), "a result is not exact in bf16"
        halves.append(bits >> 16)
    return halves[0] | (halves[1] << 16)


def run_ptx(function: Any, *inputs: Any) -> list[Word]:
    """The outputs of the inline PTX of a `@triton.jit` function.

    Args:
        function: has one block of inline assembly.
        inputs: words for the operands after the outputs, as arrays of integers.

    Raises:
        KeyError: an instruction that is not known.
    """
    source = inspect.getsource(getattr(function, "fn", function))
    (body,) = re.findall(r'inline_asm_elementwise\(\s*"""(.*?)"""', source, re.DOTALL)
    (constraints,) = re.findall(r'"(=&?r[=&r,]*)"', source)
    outputs = constraints.count("=")
    registers: dict[str, Word] = {f"${outputs + i}": np.asarray(x, np.int64) & FULL for i, x in enumerate(inputs)}

    def value(text: str) -> Word:
        return registers[text] if text in registers else np.asarray(int(text, 0), np.int64)

    known: dict[str, Any] = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "xor.b32": lambda a, b: a ^ b,
        "shl.b32": lambda a, b: (a << b) & FULL,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": _lop3,
        "prmt.b32": _prmt,
        "dp2a.lo.s32.s32": lambda a, b, c: _dp2a(a, b, c, 0),
        "dp2a.hi.s32.s32": lambda a, b, c: _dp2a(a, b, c, 2),
        "fma.rn.bf16x2": _fma_bf16x2,
    }
    for line in body.split(";"):
        name, _, operands = line.strip().removeprefix("{").strip().partition(" ")
        if name and not name.startswith((".reg", "}")):
            into, *given = (text.strip() for text in operands.split(","))
            registers[into] = known[name](*map(value, given))
    return [registers[f"${i}"] for i in range(outputs)]
