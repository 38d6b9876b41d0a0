"""The rooms of the repository: a file imports only from its own room, without circles, or from rooms below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top. Each line may import from those below it; `arguments`, `forward_step` and `evaluation` from each other
# may not.
ROOMS = (
    {"scripts"},
    {"proofs"},
    {"pretrain_multimodal"},
    {"arguments", "forward_step", "evaluation"},
    {"data"},
    {"weights"},
    {"runtime"},
    {"models"},
)
LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module in a room."""
    found = {}
    for name in LEVELS:
        files = [root / f"{name}.py"] if (root / f"{name}.py").is_file() else sorted((root / name).rglob("*.py"))
        for file in files:
            dotted = ".".join(file.relative_to(root).with_suffix("").parts)
            found[dotted.removesuffix(".__init__")] = file
    return found


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) of every import, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide the room"
            yield from ((node.module, alias.name) for alias in node.names)


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the repository that it imports. `from package import module` is an import of the module."""
    found = modules(root)
    edges: dict[str, set[str]] = {}
    for name, file in found.items():
        targets = set()
        for module, taken in imported(ast.parse(file.read_text())):
            inner = f"{module}.{taken}"
            if inner in found:
                targets.add(inner)
            elif module in found:
                targets.add(module)
            elif module.split(".")[0] in LEVELS:
                raise AssertionError(f"{file.relative_to(root)} imports {module}, which isn't there")
        edges[name] = targets - {name}
    return edges


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a room above, or from another one of the same line."""
    wrong = []
    for name, targets in edges.items():
        room = name.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            if other != room and LEVELS[other] <= LEVELS[room]:
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, whichever way round."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in edges[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    return sorted(name for name in edges if name in reach(name))


def test_no_import_goes_up() -> None:
    assert upward(graph(ROOT)) == []


def test_no_import_goes_in_a_circle() -> None:
    assert circles(graph(ROOT)) == []


@pytest.mark.parametrize("place", ["top", "function", "type checking"])
def test_an_import_that_goes_up_is_found(tmp_path: Path, place: str) -> None:
    line = "from data.batch import Batch"
    source = {
        "top": line,
        "function": f"def f():\n    {line}",
        "type checking": f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}",
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "data/batch.py").write_text("from models import base\n")
    (tmp_path / "models/base.py").write_text(source[place])
    for name in ("scripts", "proofs", "evaluation", "weights", "runtime"):
        (tmp_path / name).mkdir()
    for name in ("pretrain_multimodal", "arguments", "forward_step"):
        (tmp_path / f"{name}.py").touch()
    edges = graph(tmp_path)
    assert upward(edges) == ["models.base imports data.batch"]
    assert circles(edges) == ["data.batch", "models.base"]
