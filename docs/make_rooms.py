"""Draw docs/rooms.svg, the rooms of the package and their imports: `python docs/make_rooms.py`.

A room is drawn above all rooms it imports; an arrow points from a room to a room it uses. Arrows implied by others
(through a room in between) are omitted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raytrain"
PICTURE = ROOT / "docs" / "rooms.svg"
GROUND = ("errors", "settings", "redaction", "waiting", "console")  # files that all rooms may use
COLORS = {"lengths": "#2a9d8f", "model": "#2a9d8f", "cluster": "#e76f51", "stages": "#e9c46a"}


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports from, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("raytrain."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "raytrain":
            rooms |= {alias.name for alias in node.names}
    return rooms


def read_graph() -> tuple[dict[str, set[str]], dict[str, int]]:
    """For each folder of the package, the folders it imports and its lines of code."""
    rooms = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py")))
    graph, lines = {}, {}
    for room in rooms:
        files = list((PACKAGE / room).rglob("*.py"))
        graph[room] = {target for path in files for target in imports_of(path)} & set(rooms) - {room}
        lines[room] = sum(len(path.read_text().splitlines()) for path in files)
    return graph, lines


def levels_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """How far above the ground each room is: one more than the highest room that it imports."""
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max(map(level, graph[room]), default=-1)
        return levels[room]

    for room in graph:
        level(room)
    return levels


def reduced(graph: dict[str, set[str]]) -> Iterable[tuple[str, str]]:
    """Arrows that are not implied by others."""

    def reach(room: str) -> set[str]:
        return {room} | {target for child in graph[room] for target in reach(child)}

    for room, targets in graph.items():
        for target in targets:
            if not any(target in reach(middle) for middle in targets - {target}):
                yield room, target


def positions_of(levels: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Centers of the rooms, level by level."""
    rows: dict[int, list[str]] = {}
    for room in sorted(levels):
        rows.setdefault(levels[room], []).append(room)
    return {
        room: ((index - (len(row) - 1) / 2) * 2.4, level * 1.0)
        for level, row in rows.items()
        for index, room in enumerate(row)
    }


def draw(path: Path) -> None:
    """Write the picture."""
    graph, lines = read_graph()
    levels = levels_of(graph)
    positions = positions_of(levels)
    plt.rcParams.update({"svg.hashsalt": "rooms", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(9, 0.85 * (max(levels.values()) + 2)))
    for room, target in sorted(reduced(graph)):
        (x, y), (to_x, to_y) = positions[room], positions[target]
        axes.annotate(
            "",
            (to_x, to_y + 0.28),
            (x, y - 0.28),
            arrowprops={"arrowstyle": "-|>", "color": "#8d99ae", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
        )
    for room, (x, y) in positions.items():
        label = f"{room}\n{lines[room]} lines"
        box = {"boxstyle": "round,pad=0.35", "facecolor": COLORS.get(room, "#edf2f4"), "edgecolor": "#2b2d42"}
        axes.text(x, y, label, ha="center", va="center", fontsize=8.5, bbox=box)
    axes.text(0, -1, "  ".join(GROUND), ha="center", va="center", fontsize=8.5, color="#555555")
    axes.set_xlim(min(x for x, _ in positions.values()) - 1.3, max(x for x, _ in positions.values()) + 1.3)
    axes.set_ylim(-1.4, max(levels.values()) + 0.6)
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
