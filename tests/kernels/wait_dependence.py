"""Finds stores in Triton's IR (TTIR) that a compiler may move before a kernel's wait for previous launches.

The wait is inline assembly without side effects (see `launches_before`), so only data and control flow keep a store
after it: its address, value or mask is computed from the wait's result, or it is in a branch or loop whose condition
is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = re.compile(r"%[A-Za-z0-9_$.-]+")
_WRITES = ("tt.store", "tt.atomic_rmw", "tt.atomic_cas")
_WAIT = "griddepcontrol.wait"


@dataclass
class _Region:
    """A region that is being parsed. values: names -> whether they depend on the wait."""

    kind: str
    results: list[str] = field(default_factory=list)
    depends: bool = False  # whether its condition depends on the wait
    starts: list[bool] = field(default_factory=list)  # whether initial values of a loop depend on the wait
    yields: list[list[bool]] = field(default_factory=list)
    values: dict[str, bool] = field(default_factory=dict)


def unordered_stores(ttir: str) -> list[str]:
    """Lines of all stores and atomics that nothing keeps after the wait.

    Args:
        ttir: `compiled.asm["ttir"]`.
    """
    assert _WAIT in ttir, "this kernel does not wait"
    regions: list[_Region] = []
    found = []

    def depends(name: str) -> bool:
        base = name.split("#")[0]
        for region in reversed(regions):
            for known in (name, base):
                if known in region.values:
                    return region.values[known]
        return False

    def close(region: _Region) -> None:
        """Adds the values that a region defines at its end to the enclosing region."""
        for index, result in enumerate(region.results):
            branches = [values[index] for values in region.yields]
            known = region.depends or (all(branches) and bool(branches))
            if region.kind == "scf.for" and not region.depends:  # without an iteration, the result is the initial value
                known = known and region.starts[index]
            regions[-1].values[result] = known

    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*", "", line).strip()
        if not text or text.startswith(("#", "//")):
            continue
        left, equals, right = text.partition(" = ")
        if not equals or not left.startswith("%"):
            left, right = "", text
        defined = _results(left)
        operands = [depends(name) for name in re.findall(r"%[\w$.-]+(?:#\d+)?", right.split(" : ")[0])]
        operation = right.split("(")[0].split(" ")[0].strip('"')
        entered = any(region.depends for region in regions)
        if text.startswith("}"):
            region = regions.pop()
            if "else {" in text:
                regions.append(_Region(region.kind, region.results, region.depends, yields=region.yields))
            elif regions:
                close(region)
        elif operation in ("module", "tt.func", "scf.for", "scf.if") or text.endswith("({"):
            region = _Region(operation, defined)
            if operation == "scf.for":
                bounds, _, carried = right.partition("iter_args(")
                region.depends = any(depends(name) for name in _NAME.findall(bounds.partition("=")[2]))
                pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", carried.split(") ->")[0])
                region.starts = [depends(start) for _, start in pairs]
                region.values = {name: start for (name, _), start in zip(pairs, region.starts, strict=True)}
            elif operation == "scf.if":
                region.depends = any(operands)
            elif operation not in ("module", "tt.func"):  # a reduction: its result depends on its operands
                region.depends = any(operands)
                region.yields = [[any(operands)] * len(defined)]
            regions.append(region)
        elif operation == "scf.yield":
            regions[-1].yields.append(operands)
        else:
            assert not operation.startswith(("scf.", "cf.")), f"unknown control flow: {text}"
            if operation in _WRITES and not (entered or any(operands)):
                found.append(text)
            for name in defined:
                regions[-1].values[name] = _WAIT in right or any(operands) or entered
    assert not regions, "the text ends inside a region"
    return found


def _results(left: str) -> list[str]:
    """%a -> [%a]; %a:3 -> [%a#0, %a#1, %a#2]; %a, %b -> [%a, %b]."""
    names = []
    for part in filter(None, (part.strip() for part in left.split(","))):
        name, _, count = part.partition(":")
        names += [f"{name}#{index}" for index in range(int(count))] if count else [name]
    return names
