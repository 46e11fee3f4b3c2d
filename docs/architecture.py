"""Draws docs/architecture.svg from the imports of the source files: rooms as boxes, imports as arrows.

    python docs/architecture.py            # writes the picture
    python docs/architecture.py --check    # exit status 1 if the picture differs from the imports

Only the standard library is used, and nothing of the package is imported. A room is a folder of Python modules. The
modules directly in a layer's folder make two rooms: those that import a room of their layer, and the others.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
LAYERS = ("examples", "export", "backends", "kernels")
"""From the top of the picture to its bottom: each imports only what is below it."""
PACKAGE = "executorch_moe"

WIDTH, MARGIN, BOX_WIDTH, BOX_HEIGHT, ROW = 1040, 24, 158, 40, 84
Edge = tuple[str, str]


@dataclass(frozen=True)
class Graph:
    """The rooms of the project.

    Attributes:
        rooms: room -> names of its modules. imports: (importing room, imported room).
        layers: layer -> its rooms.
    """

    rooms: dict[str, list[str]]
    imports: set[Edge]
    layers: dict[str, list[str]]


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file, for every module of the four layers."""
    found = {}
    for layer in LAYERS:
        for file in sorted((root / layer).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported_modules(name: str, file: Path, modules: Iterable[str]) -> set[str]:
    """The project's modules that a file imports, inside functions too."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(f"{PACKAGE}.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = (node.module or "").removeprefix(f"{PACKAGE}.")
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                parent = ".".join([*start, *filter(None, [node.module])])
            found |= {parent, *(f"{parent}.{alias.name}" for alias in node.names)}
    return found & set(modules)


def read_graph(root: Path = ROOT) -> Graph:
    """Rooms and imports of the source files below `root`."""
    modules = find_modules(root)
    imports = {name: imported_modules(name, file, modules) for name, file in modules.items()}

    def folder(name: str) -> str:
        file = modules[name]
        return "/".join(file.relative_to(root).parent.parts)

    above = {
        name
        for name in modules
        if folder(name) in LAYERS and any(folder(other).startswith(f"{folder(name)}/") for other in imports[name])
    }
    changed = True
    while changed:  # a module that imports one of them is above too
        more = {
            n for n in modules if folder(n) in LAYERS and {o for o in imports[n] & above if folder(o) == folder(n)}
        } - above
        above, changed = above | more, bool(more)
    # Where no room of the layer imports its modules at the top, they make one room.
    used = {folder(other) for name in modules if folder(name) not in LAYERS for other in imports[name]}
    above = {name for name in above if folder(name) in used}

    def room(name: str) -> str:
        where = folder(name)
        return f"{where} (upper)" if name in above else where

    rooms: dict[str, list[str]] = defaultdict(list)
    for name, file in modules.items():
        if file.name != "__init__.py":
            rooms[room(name)].append(name.rpartition(".")[2])
    edges = {
        (room(a), room(b))
        for a, others in imports.items()
        for b in others
        if room(a) != room(b) and {room(a), room(b)} <= rooms.keys()
    }
    layers = {layer: sorted(name for name in rooms if _layer(name) == layer) for layer in LAYERS}
    return Graph(dict(rooms), edges, layers)


def _layer(name: str) -> str:
    return name.replace("/", ".").replace(" ", ".").split(".")[0]


def reachable(edges: set[Edge], start: str) -> set[str]:
    """Rooms that imports lead to from a room; the room itself only through a circle."""
    found: set[str] = set()
    todo = [start]
    while todo:
        here = todo.pop()
        for a, b in edges:
            if a == here and b not in found:
                found.add(b)
                todo.append(b)
    return found


def needed_arrows(rooms: list[str], edges: set[Edge]) -> set[Edge]:
    """Imports inside a layer without those that a chain of others implies."""
    inside = {(a, b) for a, b in edges if a in rooms and b in rooms}
    reach = {room: reachable(inside, room) for room in rooms}

    def implied(a: str, b: str) -> bool:
        circle = a in reach[b]
        return not circle and any(
            other in reach[a] and b in reach[other] and a not in reach[other] and other not in reach[b]
            for other in rooms
            if other not in (a, b)
        )

    return {(a, b) for a, b in inside if not implied(a, b)}


def rows(rooms: list[str], edges: set[Edge]) -> list[list[str]]:
    """Rooms of a layer in rows, so that arrows point down; rooms that import each other share a row."""
    reach = {room: reachable({e for e in edges if set(e) <= set(rooms)}, room) for room in rooms}
    depth: dict[str, int] = {}

    def depth_of(room: str) -> int:
        if room not in depth:
            circle = {other for other in reach[room] if room in reach[other]} | {room}
            below = set().union(*(reach[other] for other in circle)) - circle
            value = 1 + max((depth_of(other) for other in sorted(below)), default=-1)
            depth.update(dict.fromkeys(circle, value))
        return depth[room]

    highest = max(map(depth_of, rooms), default=0)
    return [sorted(room for room in rooms if depth[room] == level) for level in range(highest, -1, -1)]


def draw(graph: Graph) -> str:
    """The picture as SVG."""
    places: dict[str, tuple[float, float]] = {}
    shapes: list[str] = []
    top = float(MARGIN)
    bands: dict[str, tuple[float, float]] = {}
    for layer in LAYERS:
        layout = rows(graph.layers[layer], graph.imports)
        height = ROW * len(layout) + 22
        bands[layer] = (top, height)
        shapes.append(
            f'<rect class="band" x="{MARGIN}" y="{top:.0f}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="8"/>'
            f'<text class="layer" x="{MARGIN + 12}" y="{top + 20:.0f}">{layer}/</text>'
        )
        for index, row in enumerate(layout):
            step = (WIDTH - 2 * MARGIN - 90) / len(row)
            for column, room in enumerate(row):
                places[room] = (MARGIN + 70 + step * (column + 0.5), top + 36 + ROW * index)
        top += height + 34
    arrows = [arrow(places[a], places[b]) for a, b in sorted(set().union(*_arrows(graph)))]
    for upper, lower in itertools.pairwise(LAYERS):
        start, size = bands[upper]
        shapes.append(
            f'<path class="between" d="M {WIDTH / 2:.0f} {start + size:.0f} L {WIDTH / 2:.0f} '
            f'{bands[lower][0] - 3:.0f}" marker-end="url(#big)"/>'
            f'<text class="note" x="{WIDTH / 2 + 14:.0f}" y="{start + size + 21:.0f}">imports</text>'
        )
    boxes = [box(room, graph.rooms[room], places[room]) for room in sorted(places)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - 10:.0f}" font-family="sans-serif">',
            STYLE,
            f'<rect width="{WIDTH}" height="{top - 10:.0f}" fill="#fff"/>',
            *shapes,
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


STYLE = """<defs>
<marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3.5" orient="auto-start-reverse">
<path d="M0 0 L7 3.5 L0 7 z" fill="#456"/></marker>
<marker id="big" markerWidth="5" markerHeight="5" refX="3" refY="2.5" orient="auto">
<path d="M0 0 L5 2.5 L0 5 z" fill="#9ab"/></marker>
</defs>
<style>
.band { fill: #f3f6fa; stroke: #ccd6e2 } .layer { font-size: 16px; font-weight: bold; fill: #345 }
.room { fill: #fff; stroke: #456 } .name { font-size: 12px; fill: #123; text-anchor: middle }
.count { font-size: 9.5px; fill: #678; text-anchor: middle } .note { font-size: 11px; fill: #789 }
.arrow { fill: none; stroke: #456; stroke-width: 1.1; opacity: .75 } .between { stroke: #9ab; stroke-width: 5 }
</style>"""


def _arrows(graph: Graph) -> list[set[Edge]]:
    return [needed_arrows(rooms, graph.imports) for rooms in graph.layers.values()]


def box(room: str, modules: list[str], place: tuple[float, float]) -> str:
    """A room: its folder below the layer and the number of its modules; at the top level, the modules by name."""
    x, y = place
    layer, _, folder = room.partition("/")
    if folder:
        lines = [folder, f"{len(modules)} module{'s' * (len(modules) != 1)}"]
    else:
        names = [name for name in modules if name != "__init__"]
        half = (len(names) + 1) // 2
        lines = (
            [", ".join(names[:half]), ", ".join(names[half:])] if len(names) > 3 else [", ".join(names), f"in {layer}/"]
        )
    width = max(BOX_WIDTH, 6.1 * max(map(len, lines)) + 16) if not folder else BOX_WIDTH
    kind = "name" if folder else "count"
    return (
        f'<rect class="room" x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="5"/>'
        f'<text class="{kind}" x="{x:.0f}" y="{y + 17:.0f}">{escape(lines[0])}</text>'
        f'<text class="count" x="{x:.0f}" y="{y + 32:.0f}">{escape(lines[1])}</text>'
    )


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From the importing room to the imported one; between rooms of one row, an arc below the row."""
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        low = y0 + BOX_HEIGHT
        path = f"M {x0:.0f} {low:.0f} C {x0:.0f} {low + 34:.0f}, {x1:.0f} {low + 34:.0f}, {x1:.0f} {low + 1:.0f}"
    else:
        low, high = y0 + BOX_HEIGHT, y1
        bend = (high - low) / 2
        path = f"M {x0:.0f} {low:.0f} C {x0:.0f} {low + bend:.0f}, {x1:.0f} {high - bend:.0f}, {x1:.0f} {high - 1:.0f}"
    return f'<path class="arrow" d="{path}" marker-end="url(#tip)"/>'


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the rooms of the project and their imports.")
    parser.add_argument("--check", action="store_true", help="compare the picture with the imports, write nothing")
    arguments = parser.parse_args()
    picture = draw(read_graph())
    if not arguments.check:
        PICTURE.write_text(picture, encoding="utf-8")
        return 0
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == picture:
        return 0
    print(f"{PICTURE} differs from the imports: run python docs/architecture.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
