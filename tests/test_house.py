"""The import contract of the house, read from the code's own imports.

A room is a package or a module right below ``clipless_dp``. Rooms stand on floors: an import goes to a lower floor or
stays in its room. Modules form no circle, within a room neither. What begins with an underscore stays in its room.
And the sizes of functions and files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import clipless_dp

ROOT = Path(clipless_dp.__file__).parents[1]
"""Where the packages are, installed or not."""

FLOORS = (
    # Ground.
    "errors former version",
    "arguments checkpoint display interrupts modules precision tensor_types uncompiled",
    "datasets packing recipes",
    # What is bounded. Noise is as low, because dropout and views of samples draw from it.
    "gates noise norms",
    "constraints distributed isolation layers losses",
    "rules",
    "graph",
    "bounds fusion",
    # What runs.
    "sampling",
    "features statistics",
    "model",
    "architectures monotone optim testing",
    # Training audits bounds before it starts, so that evidence stands below it.
    "audit statement",
    # What predicts tells what was promised.
    "prediction",
    "training",
    # By name, and faces.
    "conversion integrations presets robustness search tables",
    "one_class",
    "loading",
    "estimators",
    "__init__",
    "commands",
    "cli",
    "__main__",
)
"""Rooms of the package, floor by floor from the ground up."""

BREACHES: set[str] = set()
"""What breaks the contract, as :func:`breaches` writes it. This list only ever shrinks."""


LONG_FILES = {"clipless_dp/model/wrapped.py", "clipless_dp/optim/optimizer.py"}
"""Files that may be longer than others, for the reason on top of them."""

MOST_LINES = {"function": 80, "file": 500}
REASON = "# Over 500 lines: "


class Import(NamedTuple):
    """One name that a module imports: the module it comes from, and the name in it, or ``""`` for all of the module."""

    importer: str
    source: str
    name: str


@cache
def imports(root: Path, package: str) -> list[Import]:
    """Every import of one package's modules from each other, wherever in a file it is."""
    paths = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return [
        found
        for module, path in paths.items()
        for found in _imports_of(module, path.name == "__init__.py", ast.parse(path.read_text("utf-8")), paths.keys())
    ]


def _imports_of(module: str, is_package: bool, tree: ast.Module, known: Iterable[str]) -> list[Import]:
    found, bound = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    found.append(Import(module, alias.name, ""))
                    bound[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            around = module.split(".") if is_package else module.split(".")[:-1]
            near = around[: len(around) - node.level + 1] if node.level else []
            source = ".".join([*near, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in known:
                    found.append(Import(module, f"{source}.{alias.name}", ""))
                    bound[alias.asname or alias.name] = f"{source}.{alias.name}"
                elif source in known:
                    found.append(Import(module, source, alias.name))
    # What is reached through an imported module is imported, too.
    reached = ((_path(node.value), node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return [*found, *(Import(module, bound[owner], name) for owner, name in reached if owner in bound)]


def _path(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_path(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def room(module: str) -> str:
    """The room that a module is in."""
    return module.split(".")[1] if "." in module else "__init__"


def breaches(found: Iterable[Import]) -> set[str]:
    """What imports break the contract: ``importing room -> imported room``, and with the name if that is private."""
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
    broken = set()
    for importer, source, name in found:
        above, below = room(importer), room(source)
        if above == below:
            continue
        homeless = [place for place in (above, below) if place not in floors]
        broken |= {f"{place} has no floor" for place in homeless}
        if not homeless and floors[below] >= floors[above]:
            broken.add(f"{above} -> {below}")
        last = name or source.rpartition(".")[2]
        if last.startswith("_") and not last.endswith("__"):
            broken.add(f"{above} -> {below}.{last}")
    return broken


def circle(found: Iterable[Import]) -> list[str]:
    """Modules that import each other in a circle, or nothing if there is none."""
    graph: dict[str, list[str]] = {}
    for importer, source, _ in found:
        graph.setdefault(importer, []).append(source)
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        closed = next(filter(None, (search(source, [*path, module]) for source in graph.get(module, []))), [])
        done.add(module)
        return closed

    return next(filter(None, (search(module, []) for module in graph)), [])


def test_imports_go_down_and_private_names_stay_in_their_rooms() -> None:
    new = breaches(imports(ROOT, "clipless_dp")) - BREACHES
    assert not new


def test_what_is_listed_as_a_breach_still_is_one() -> None:
    mended = BREACHES - breaches(imports(ROOT, "clipless_dp"))
    assert not mended


@pytest.mark.parametrize("package", ["clipless_dp", "accounting"])
def test_modules_import_each_other_in_no_circle(package: str) -> None:
    assert not circle(found for found in imports(ROOT, package) if not breaches([found]) & BREACHES)


def test_accounting_does_not_know_the_package() -> None:
    for path in (ROOT / "accounting").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] == "clipless_dp" for name in names)


def test_only_placement_is_asked_about_processes_and_parts() -> None:
    asked = {
        f"{room(importer)} -> {source}"
        for importer, source, name in imports(ROOT, "clipless_dp")
        # The public name ``clipless_dp.distributed`` and, on the way to it, the package itself.
        if room(source) == "distributed" and room(importer) not in ("distributed", "__init__")
    }
    assert asked
    assert {line for line in asked if not line.endswith(" -> clipless_dp.distributed.placement")} == set()


def test_each_room_has_one_floor() -> None:
    names = " ".join(FLOORS).split()
    assert len(names) == len(set(names))


def too_long(root: Path) -> set[str]:
    """Functions over 80 lines, docstrings not counted, and files over 500 lines without a reason; by their names."""
    found = set()
    for path in sorted(part for package in ("clipless_dp", "accounting") for part in (root / package).rglob("*.py")):
        name, text = path.relative_to(root).as_posix(), path.read_text("utf-8")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > MOST_LINES["function"]:
                found.add(f"{name}: {node.name}")
        if len(text.splitlines()) > MOST_LINES["file"] and not re.search(rf"^{REASON}\S.{{20}}", text, re.MULTILINE):
            found.add(name)
    return found


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        assert node.body[0].end_lineno is not None
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def test_functions_and_files_are_short_or_say_why_not() -> None:
    assert not too_long(ROOT)


def test_files_that_say_why_they_are_long_are_the_listed_ones_and_still_long() -> None:
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for package in ("clipless_dp", "accounting")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name for name, text in files.items() if REASON in text} == LONG_FILES
    assert {name for name, text in files.items() if len(text.splitlines()) > MOST_LINES["file"]} == LONG_FILES


SIZES = {
    "a function of 81 lines": ("def f():\n" + "    pass\n" * 80, {"clipless_dp/long.py: f"}),
    "a function of 80 lines": ("def f():\n" + "    pass\n" * 79, set()),
    "a method, within a function": (
        "def f():\n    class A:\n        async def g(self):\n" + "            pass\n" * 80,
        {"clipless_dp/long.py: f", "clipless_dp/long.py: g"},
    ),
    "a docstring does not count": ('def f():\n    """Says.\n' + "    more\n" * 200 + '    """\n    pass\n', set()),
    "a string that is no docstring counts": (
        'def f():\n    pass\n    """Says.\n' + "    more\n" * 80 + '    """\n',
        {"clipless_dp/long.py: f"},
    ),
    "a file of 501 lines": ("\n" * 501, {"clipless_dp/long.py"}),
    "a file of 500 lines": ("\n" * 500, set()),
    "a reason": (REASON + "one public class, documented at length.\n" + "\n" * 501, set()),
    "no reason": (REASON + "\n" * 501, {"clipless_dp/long.py"}),
}


@pytest.mark.parametrize("case", SIZES)
def test_what_is_too_long_is_told_by_its_name(case: str, tmp_path: Path) -> None:
    text, expected = SIZES[case]
    (tmp_path / "clipless_dp").mkdir()
    (tmp_path / "clipless_dp" / "long.py").write_text(text, "utf-8")
    assert too_long(tmp_path) == expected


HOUSE = {
    "__init__.py": "from clipless_dp.model import Model",
    "errors.py": "",
    "gates/__init__.py": "from clipless_dp.gates.signal import gate\n__version__ = '1'",
    "gates/arithmetic.py": "from ..errors import Wrong",
    "gates/signal.py": "from clipless_dp.gates.arithmetic import _factors",
    "model.py": "from clipless_dp.gates import gate, __version__",
}

MUTANTS = {
    "an import upwards": ("gates/signal.py", "from clipless_dp.model import Model", "gates -> model"),
    "an import within a function": ("errors.py", "def f():\n    import clipless_dp.model", "errors -> model"),
    "a relative import": ("gates/signal.py", "from .. import model", "gates -> model"),
    "a relative import of a package": ("gates/__init__.py", "from ..model import Model", "gates -> model"),
    "an import of what the package exports": ("model.py", "from clipless_dp import Model", "model -> __init__"),
    "an import on one floor": ("norms.py", "from clipless_dp import gates", "norms -> gates"),
    "a private name": ("model.py", "from clipless_dp.gates.arithmetic import _factors", "model -> gates._factors"),
    "a private name of another name": ("model.py", "from .gates.signal import _a as a", "model -> gates._a"),
    "a private module": ("model.py", "from clipless_dp.gates import _hidden", "model -> gates._hidden"),
    "a private attribute": (
        "model.py",
        "from clipless_dp.gates import arithmetic as a\na._factors",
        "model -> gates._factors",
    ),
    "a private attribute by its path": (
        "model.py",
        "import clipless_dp.gates.signal\nclipless_dp.gates.signal._factors",
        "model -> gates._factors",
    ),
    "a room without a floor": ("attic.py", "from clipless_dp.errors import Wrong", "attic has no floor"),
}

CIRCLES = {
    "within a room": ("gates/arithmetic.py", "from clipless_dp.gates.signal import gate"),
    "through a package": ("gates/arithmetic.py", "from clipless_dp.gates import gate"),
    "of three rooms, in a function": ("errors.py", "def f():\n    from clipless_dp.model import Model"),
}


def built(root: Path, files: dict[str, str]) -> list[Import]:
    for name, text in files.items():
        path = root / "clipless_dp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return imports(root, "clipless_dp")


def test_a_house_in_order_passes(tmp_path: Path) -> None:
    found = built(tmp_path, HOUSE)
    assert len(found) == 6
    assert not breaches(found)
    assert not circle(found)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_the_house_is_caught(mutant: str, tmp_path: Path) -> None:
    name, text, breach = MUTANTS[mutant]
    assert breaches(built(tmp_path, {**HOUSE, "gates/_hidden.py": "", name: text})) == {breach}


@pytest.mark.parametrize("mutant", CIRCLES)
def test_a_circle_is_caught(mutant: str, tmp_path: Path) -> None:
    name, text = CIRCLES[mutant]
    assert circle(built(tmp_path, {**HOUSE, name: text}))
