"""The house: lower storeys never import upper ones, wherever in a module the import stands."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zppo

SOURCE = Path(zppo.__file__).parent

# For every storey the storeys that it may import, besides itself.
BELOW_PROMPTS = {"errors", "core", "imports"}
BELOW_ENGINES = BELOW_PROMPTS | {"images"}
BELOW_TEACHER = BELOW_ENGINES | {"prompts", "grading", "engines"}
BELOW_DATA = BELOW_TEACHER | {"teacher"}
BELOW_TRAIN = BELOW_DATA | {"data"}
BELOW_EVALUATE = BELOW_TRAIN | {"train"}
BELOW_LAB = BELOW_EVALUATE | {"evaluate", "report"}
BELOW_ROOF = BELOW_LAB | {"lab", "serve"}
MAY_IMPORT = {
    "errors": set(),
    "imports": {"errors"},
    "core": {"errors"},
    "images": {"errors", "core"},
    "prompts": BELOW_PROMPTS,
    "grading": BELOW_PROMPTS,
    "engines": BELOW_ENGINES,
    "serve": BELOW_ENGINES | {"engines"},
    "teacher": BELOW_TEACHER,
    "data": BELOW_DATA,
    "train": BELOW_TRAIN,
    "evaluate": BELOW_EVALUATE,
    "report": BELOW_EVALUATE,
    "lab": BELOW_LAB,
    "cli": BELOW_ROOF,
    "__main__": BELOW_ROOF | {"cli"},
    "__init__": set(),
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def storey_of(path: Path) -> str:
    """First part below the package: a folder's or a file's name."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source: str, package: str) -> Iterator[str]:
    """Dotted names of all that a module imports: in functions, relative, behind TYPE_CHECKING, and by a written-out name.

    Args:
        source: the module's text.
        package: the package that it lives in, which relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(parents + ([node.module] if node.module else []))
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "zppo" else [base])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def package_of(path: Path) -> str:
    return ".".join(("zppo", *path.relative_to(SOURCE).parent.parts))


def upward(source: str, package: str, storey: str) -> list[str]:
    """Imports of zppo that a module of this storey may not make; `zppo` itself gives its version and nothing else."""
    allowed = MAY_IMPORT[storey] | {storey, "__version__"}
    names = [name.split(".") for name in imported(source, package)]
    return [".".join(n) for n in names if n[0] == "zppo" and (len(n) == 1 or n[1] not in allowed)]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_module_imports_an_upper_storey(path: Path) -> None:
    storey = storey_of(path)
    assert storey in MAY_IMPORT, f"{storey} has no place in the house yet: give it one in MAY_IMPORT"
    assert upward(path.read_text(encoding="utf-8"), package_of(path), storey) == []


@pytest.mark.parametrize("path", sorted((SOURCE / "core").rglob("*.py")), ids=lambda p: p.name)
def test_the_core_stands_on_the_standard_library_and_torch(path: Path) -> None:
    for name in imported(path.read_text(encoding="utf-8"), package_of(path)):
        root = name.split(".")[0]
        assert root in ("torch", "zppo") or root in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_the_core_does_no_io() -> None:
    """Pure: no file, process or network module of the standard library either."""
    banned = {
        "os",
        "io",
        "pathlib",
        "subprocess",
        "socket",
        "shutil",
        "tempfile",
        "threading",
        "multiprocessing",
        "asyncio",
        "time",
    }
    for path in (SOURCE / "core").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"), package_of(path))}
        assert not roots & banned, path.name
        calls = {
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"open", "print", "input", "eval", "exec"}, path.name


@pytest.mark.parametrize(
    "source",
    [
        "import zppo.train",
        "import os, zppo.train.trainer as t",
        "from zppo.train import trainer",
        "from zppo import train",
        "import zppo",
        "def f():\n    if True:\n        from zppo.config.settings import Settings",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zppo.cli",
        "from ..train import settings",
        "from .. import train",
        "import importlib\nimportlib.import_module('zppo.lab')",
        "try:\n    from zppo.data import jsonl\nexcept ImportError:\n    pass",
    ],
)
def test_the_check_sees_every_way_to_import(source: str) -> None:
    assert upward(source, "zppo.core", "core")


@pytest.mark.parametrize(
    "source",
    [
        "from zppo.core.types import Group",
        "from . import types",
        "from .types import Group",
        "from ..errors import ZPPOError",
        "from zppo import __version__",
        "import zppo.errors",
        "import torch",
        "from zppo import errors",
    ],
)
def test_the_check_lets_lower_storeys_pass(source: str) -> None:
    assert upward(source, "zppo.core", "core") == []


def test_the_order_has_no_circle() -> None:
    """If one storey may import another, that one may import all that the other may, and never the first."""
    for storey, lower in MAY_IMPORT.items():
        for other in lower:
            assert storey not in MAY_IMPORT[other] and MAY_IMPORT[other] <= lower
