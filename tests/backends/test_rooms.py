"""Import direction between the rooms of backends: there are no circles, and running needs nothing that compiles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "backends"
BASE = {"atomic_files", "errors", "versions"}
# Room -> the other rooms of backends that it imports. Each comes after those that it imports.
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in sorted(BASE)},
    "artifact": BASE,
    "fusion": set(),
    "cuda.patches": set(),
    "cuda.generated_kernels": {"cuda.patches"},
    "cpu": {"fusion", "cuda.patches"},
    "cuda": {"artifact", "fusion", "cuda.patches"},
    "cuda.cross": {"cuda", "cuda.patches"},
    "lower": {"artifact", "fusion", "cpu", "cuda", "cuda.cross", "cuda.generated_kernels"} | BASE,
    "runtime": {"artifact"} | BASE,
}


def room_of(module: str) -> str:
    """The room of a module or of a name in it, below backends: "cuda.cross.target.check_target" -> "cuda.cross"."""
    parts = module.split(".")
    return next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in ROOMS)


def imported(path: Path) -> set[str]:
    """Modules and names of backends that a file imports, below backends."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            start = ["executorch_moe", "backends", *folder] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    prefix = "executorch_moe.backends."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def test_the_table_has_no_circles() -> None:
    order = list(ROOMS)
    for room, others in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in others), room


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_what_their_room_may(path: Path) -> None:
    inside = path.relative_to(ROOT).with_suffix("")
    if inside.name == "__init__" and inside.parent == Path():
        return
    room = room_of(".".join(inside.parts))
    assert {room_of(name) for name in imported(path)} <= ROOMS[room] | {room}
