"""The structure of the package, from its source: direction of imports, no circles, sizes of modules and folders.

Layers import only to their left: kernels, backends, export, executorch_moe (the public names), examples. Inside a
layer, each folder is a room with one purpose, and `ROOMS` lists the rooms of its layer that it may import. The modules
beside the rooms are not listed: they hold what several rooms share, or join them. Circles through these modules are
found module by module.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "executorch_moe"
LAYERS = ("kernels", "backends", "export", PACKAGE, "examples")
ROOMS: dict[str, set[str]] = {
    "kernels/packing": set(),
    "kernels/tuning": set(),
    "kernels/experts": {"kernels/packing", "kernels/tuning", "kernels/decode", "kernels/gluon"},
    "kernels/gluon": {"kernels/tuning"},
    "kernels/decode": set(),
    "kernels/prefill": set(),
    "kernels/batch": {"kernels/decode", "kernels/experts", "kernels/prefill"},
    "kernels/routed": {"kernels/decode", "kernels/experts"},
    "kernels/delta_rule": set(),
    "kernels/measure": {"kernels/packing", "kernels/tuning", "kernels/experts"},
    "backends/artifact": set(),
    "backends/fusion": set(),
    "backends/cuda/patches": set(),
    "backends/cpu": {"backends/fusion", "backends/cuda/patches"},
    "backends/cuda": {"backends/artifact", "backends/fusion", "backends/cuda/patches"},
    "backends/cuda/generated_kernels": {"backends/cuda/patches"},
    "backends/cuda/cross": {"backends/cuda", "backends/cuda/patches"},
    "backends/runtime": {"backends/artifact"},
    "export/models": set(),
    "export/models/batch": {"export/models"},
    "export/quantize": {"export/models"},
    "export/checkpoint/formats": set(),
    "export/checkpoint/gguf": {"export/models", "export/checkpoint/formats"},
    "export/checkpoint": {"export/models", "export/checkpoint/formats", "export/checkpoint/gguf"},
    "export/report": {"export/models", "export/quantize", "export/checkpoint", "export/checkpoint/gguf"},
    "export/generate": {"export/models", "export/report"},
    "export/bench": {"export/models", "export/report", "export/generate"},
    "export/serve": {"export/models", "export/report", "export/generate"},
    "export/cli": {"export/models", "export/report", "export/generate", "export/bench", "export/serve"},
    "examples/demo": set(),
    "examples/tiny": set(),
}
"""Room -> rooms of the same layer that it may import."""
_PLAIN = {"backends/atomic_files", "backends/errors", "backends/versions"}
BACKENDS: dict[str, set[str]] = {
    **{module: set() for module in _PLAIN},
    "backends/artifact": _PLAIN,
    "backends/runtime": _PLAIN,
    "backends/lower": _PLAIN | {name for name in ROOMS if name.startswith("backends/")} - {"backends/runtime"},
}
"""For backends also the modules beside the rooms, as importers and imported; rooms without a row import none of them.

Running an artifact needs nothing that compiles, so neither `runtime` nor `artifact` may import `lower`.
"""
MAX_LINES = 400
MAX_MODULES = 12


class Import(NamedTuple):
    """One import of a module of the package by another.

    Attributes:
        line: where the import is, as FILE:LINE below the root.
        at_import: True if it runs when the importing module is imported: outside of functions and of `TYPE_CHECKING`.
    """

    importer: str
    imported: str
    line: str
    at_import: bool


@functools.cache
def modules() -> dict[str, Path]:
    """Import name -> file, for every module of the package."""
    found = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if layer == PACKAGE else (PACKAGE, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def layer(module: str) -> str:
    return modules()[module].relative_to(ROOT).parts[0]


def room(module: str) -> str:
    return modules()[module].parent.relative_to(ROOT).as_posix()


def targets(node: ast.AST, package: list[str]) -> Iterator[str]:
    """Names that an import statement asks for, absolute, with the names that it takes from modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = package[: len(package) - node.level + 1] if node.level else []
        base = [*start, *([node.module] if node.module else [])]
        yield from (".".join([*base, alias.name]) for alias in node.names)


def walk(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node`, each with whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        runs = at_import and not later and not typing
        yield child, runs
        yield from walk(child, runs)


@functools.cache
def imports() -> tuple[Import, ...]:
    found = {}
    for module, path in modules().items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node, at_import in walk(ast.parse(path.read_text())):
            for target in targets(node, package):
                if target.split(".")[0] != PACKAGE:
                    continue
                while target not in modules():  # the last part is a name in a module
                    target = target.rpartition(".")[0]
                line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if target != module:
                    found[module, target, line] = Import(module, target, line, at_import)
    return tuple(found.values())


def test_modules_and_imports_are_found() -> None:
    """Guards the other tests against a search that finds nothing."""
    assert {layer(name) for name in modules()} == set(LAYERS)
    assert len(modules()) > 100 and len(imports()) > 300
    assert any(not each.at_import for each in imports())


def test_layers_import_only_to_their_left() -> None:
    order = LAYERS.index
    wrong = [each for each in imports() if order(layer(each.importer)) < order(layer(each.imported))]
    assert not wrong, "\n".join(f"{each.line} imports {each.imported}" for each in wrong)


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {
        name: {each.imported for each in imports() if each.importer == name and each.at_import} for name in modules()
    }
    _assert_no_circle(graph)


def test_rooms_import_only_the_rooms_that_are_listed() -> None:
    rooms = {room(name) for name in modules()} - set(LAYERS)
    assert rooms == ROOMS.keys(), "add new folders to ROOMS, remove old ones"
    wrong = []
    for each in imports():
        here, there = room(each.importer), room(each.imported)
        same_layer = layer(each.importer) == layer(each.imported)
        if here in ROOMS and there in ROOMS and here != there and same_layer and there not in ROOMS[here]:
            wrong.append(f"{each.line}: {here} may not import {there} ({each.imported})")
    assert not wrong, "\n".join(wrong)


def test_modules_beside_the_rooms_of_backends() -> None:
    def place(module: str) -> str:
        path = modules()[module]
        return room(module) if room(module) != "backends" or path.stem == "__init__" else f"backends/{path.stem}"

    beside = {place(name) for name in modules() if room(name) == "backends"} - {"backends"}
    assert beside == {*_PLAIN, "backends/lower"}, "add new modules to BACKENDS, remove old ones"
    wrong = []
    for each in imports():
        here, there = place(each.importer), place(each.imported)
        if not (here.startswith("backends/") and there.startswith("backends/")) or here == there:
            continue
        if (here in beside or there in beside) and there not in BACKENDS.get(here, set()):
            wrong.append(f"{each.line}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_the_list_of_rooms_has_no_circle_and_no_unused_entry() -> None:
    _assert_no_circle(ROOMS)
    used = {(room(each.importer), room(each.imported)) for each in imports()}
    unused = [f"{here} -> {there}" for here, rooms in ROOMS.items() for there in rooms if (here, there) not in used]
    assert not unused, "remove from ROOMS: " + ", ".join(unused)


def test_no_module_is_too_long() -> None:
    """Tests and tools too."""
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files}
    long = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]
    assert not long, f"more than {MAX_LINES} lines: " + ", ".join(long)


def test_no_folder_has_too_many_modules() -> None:
    counts: dict[str, int] = {}
    for name, path in modules().items():
        if path.stem not in ("__init__", "__main__"):
            counts[room(name)] = counts.get(room(name), 0) + 1
    full = [f"{folder}: {count} modules" for folder, count in counts.items() if count > MAX_MODULES]
    assert not full, f"more than {MAX_MODULES} modules: " + ", ".join(full)


def _assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("circle of imports: " + " -> ".join(reversed(error.args[1]))) from None
