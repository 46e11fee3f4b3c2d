"""Finds instructions in SASS that write registers of a wgmma that may still run.

A wgmma with its first operand in registers reads them until a WARPGROUP.DEPBAR waits for its group, and its sums must
not be accessed before that. Neither Triton nor ptxas enforces it across iterations of a loop, and the result is a race
that made one tile in about 500,000 wrong.
`hazards` follows every path through a kernel, including loops, and names the instructions that break the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_GROUPS = 16
"""Number of wgmma groups that are tracked separately; older ones are merged."""

_NO_RESULT = re.compile(
    r"(ST|STG|STS|STL|RED|REDG|LDGSTS|BRA|BRX|BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|WARPARRIVE|EXIT|NOP|MEMBAR|ERRBAR|"
    r"FENCE|SYNCS|BSSY|BSYNC|CALL|RET|YIELD|NANOSLEEP|PREEXIT|ACQBULK|CCTL|R2P|R2UR|U\w+|BMOV|BREAK|KILL|ARRIVES)\b"
)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS. text: without its predicate. guarded: it has a predicate, so it may be skipped."""

    address: int
    text: str
    guarded: bool

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def operands(self) -> list[str]:
        rest = self.text.split(None, 1)
        return [o.strip() for o in re.split(r",\s*(?![^\[]*\])", rest[1])] if len(rest) > 1 else []

    @property
    def is_wgmma(self) -> bool:
        return bool(re.match(r"[HIQ]GMMA\b", self.opcode))

    def wgmma(self) -> tuple[frozenset[int], frozenset[int], bool]:
        """Registers of the first operand, registers of the sums, and whether it closes a group."""
        found = re.search(r"\.(\d+)x(\d+)x(\d+)\.", self.opcode)
        assert found is not None, self.text
        first, a = self.operands[0], self.operands[1]
        sums = frozenset(range(int(first[1:]), int(first[1:]) + int(found[2]) // 2))
        # 64 rows of 32 bytes over 128 threads are four registers.
        held = frozenset(range(int(a[1:]), int(a[1:]) + 4)) if re.fullmatch(r"R\d+", a.split(".")[0]) else frozenset()
        return held, sums, "gsb0" in self.text

    def waits_down_to(self) -> int | None:
        """Number of groups that may still run after this instruction; None if it does not wait."""
        found = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    def written(self) -> frozenset[int]:
        """General registers that the instruction writes."""
        if _NO_RESULT.match(self.opcode):
            return frozenset()
        operands = self.operands
        while operands and re.fullmatch(r"!?(U?P\d|U?PT)", operands[0]):
            operands = operands[1:]
        found = re.match(r"R(\d+)", operands[0]) if operands else None
        if found is None:
            return frozenset()
        return frozenset(range(int(found[1]), int(found[1]) + self._width()))

    def _width(self) -> int:
        parts = self.opcode.split(".")
        if parts[0] in ("LDG", "LDS", "LD", "LDL", "LDC", "ATOMG", "ATOMS", "ATOM"):
            return 4 if "128" in parts else 2 if "64" in parts else 1
        if parts[0] == "LDSM":
            return int(parts[-1]) if parts[-1].isdigit() else 1
        if parts[0] == "LDCU":
            return 0
        wide = "WIDE" in parts or parts[0] in ("DADD", "DMUL", "DFMA") or "64" in parts or "F64" in parts[:2]
        return 2 if wide else 4 if parts[0] == "HMMA" or parts[0] == "IMMA" else 1

    def read(self) -> frozenset[int]:
        """General registers that the instruction names, except those that it writes."""
        named = set()
        for name, wide in re.findall(r"\bR(\d+)((?:\.\w+)*)", self.text):
            named |= {int(name), int(name) + 1} if ".64" in wide else {int(name)}
        return frozenset(named) - self.written()

    def target(self) -> int | None:
        found = re.match(r"BRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def parse(text: str) -> list[Instruction]:
    """Parses cuobjdump's listing of one kernel."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", line)
        if match:
            found.append(Instruction(int(match[1], 16), match[3], match[2] is not None))
    return found


Groups = tuple[tuple[frozenset[int], frozenset[int]], ...]
"""Operand and sum registers of wgmmas that may run: the open group, then closed groups, newest first."""

_IDLE: Groups = ((frozenset(), frozenset()),)


def _joined(a: Groups, b: Groups) -> Groups:
    empty = (frozenset[int](), frozenset[int]())
    longest = max(len(a), len(b))
    a, b = (g + (empty,) * (longest - len(g)) for g in (a, b))
    return tuple((x[0] | y[0], x[1] | y[1]) for x, y in zip(a, b, strict=True))


def _after(groups: Groups, instruction: Instruction) -> Groups:
    if instruction.is_wgmma:
        held, sums, closes = instruction.wgmma()
        opened = (groups[0][0] | held, groups[0][1] | sums)
        if not closes:
            return (opened, *groups[1:])
        closed = (opened, *groups[1:])
        if len(closed) > MAX_GROUPS:
            closed = (*closed[: MAX_GROUPS - 1], _joined((closed[MAX_GROUPS - 1],), (closed[MAX_GROUPS],))[0])
        return (_IDLE[0], *closed)
    left = instruction.waits_down_to()
    return groups if left is None else groups[: left + 1]


def states(code: list[Instruction]) -> dict[int, Groups]:
    """Groups that may run before each instruction, by address: a fixed point over all paths."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    before: dict[int, Groups] = {code[0].address: _IDLE}
    todo = [0]
    while todo:
        i = todo.pop()
        instruction = code[i]
        after = _after(before[instruction.address], instruction)
        following = []
        target = instruction.target()
        if target is not None and target in index:
            following.append(index[target])
        ends = instruction.opcode in ("BRA", "EXIT", "RET") and not instruction.guarded
        if instruction.opcode.startswith("BRA") and re.search(r"!?U?P\d,", instruction.text):
            ends = False
        if not ends and i + 1 < len(code):
            following.append(i + 1)
        for j in following:
            address = code[j].address
            merged = _joined(before[address], after) if address in before else after
            if before.get(address) != merged:
                before[address] = merged
                todo.append(j)
    return before


def hazards(code: list[Instruction]) -> Iterator[str]:
    """Instructions that write a register which a running wgmma reads, or access the sums of one."""
    before = states(code)
    for instruction in code:
        groups = before.get(instruction.address, _IDLE)
        held = frozenset().union(*(g[0] for g in groups))
        sums = frozenset().union(*(g[1] for g in groups))
        written = instruction.wgmma()[1] if instruction.is_wgmma else instruction.written()
        if written & held:
            yield f"{instruction.address:x} {instruction.text}: writes R{min(written & held)}, an operand in use"
        if not instruction.is_wgmma and (written | instruction.read()) & sums:
            register = min((written | instruction.read()) & sums)
            yield f"{instruction.address:x} {instruction.text}: accesses R{register}, an unfinished sum"
