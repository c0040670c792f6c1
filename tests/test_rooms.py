"""Rooms stand on each other in one order, nothing private leaves its module, and no imports go in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors",),
    ("progress", "draws", "declared", "signals"),
    ("files",),
    ("problems",),
    ("judging", "sampling"),
    ("learning",),
    ("ppo",),
    ("reports",),
    ("runs",),
    ("scale",),
    ("notebooks", "pretraining"),
    ("cli",),
    ("__main__",),
)
RANKS = {room: rank for rank, floor in enumerate(FLOORS) for room in floor}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "smlib").rglob("*.py"))
    if path.parent != ROOT / "smlib" or path.name != "__init__.py"  # that one gives names of all rooms, on demand
}


def imported(path: Path) -> set[tuple[str, str | None]]:
    """(module, name or None) of every import of ours in a file, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "smlib"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "smlib":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module = whole in MODULES or f"{whole}.__init__" in MODULES
                found.add((whole, None) if module else (node.module, alias.name))
    return found


IMPORTS = {module: imported(path) for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} == set(RANKS)


def test_a_lower_room_never_imports_a_higher_one_nor_its_neighbour():
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other, _ in others
        if room(other) != room(module) and RANKS[room(other)] >= RANKS[room(module)]
    ]
    assert upwards == []


def test_no_imports_go_in_a_circle_not_even_in_functions():
    graph = {module: {other for other, _ in others if other != module} for module, others in IMPORTS.items()}
    assert len([*TopologicalSorter(graph).static_order()]) >= len(MODULES)


def test_nothing_private_is_used_by_another_module():
    used = [
        f"{module}: {other}.{name}"
        for module, others in IMPORTS.items()
        for other, name in others
        if name and name.startswith("_") and not name.startswith("__")
    ]
    for module, path in MODULES.items():
        names = {other.rpartition(".")[2] for other, name in IMPORTS[module] if name is None}
        used += [
            f"{module}: {node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
    assert used == []


@pytest.mark.parametrize("package", [path.parent for path in MODULES.values() if path.name == "__init__.py"])
def test_every_room_says_what_it_is_for(package):
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
