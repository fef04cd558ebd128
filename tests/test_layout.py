"""The import rule where import-linter cannot see: the five files at the top, late imports."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {
    "models",
    "corpus",
    "checkpoints",
    "device",
    "tokenization",
    "settings",
    "core",
    "__version__",
}
ENGINES = BASE | {"transformer_model", "train_utils", "training", "decoding"}
# What each file may import: the rows below its own (docs/architecture.md).
ALLOWED = {
    "main": {"settings", "core", "__version__"},
    "trainer": ENGINES,
    "generate": ENGINES,
    "transformer_model": BASE,
    "train_utils": BASE,
}
OWN = {*ALLOWED, "preflight"}
# These import when a mode or a name is asked for, so that `--help` answers without torch.
# The server's application needs libraries that are told of first where they are missing.
MAY_IMPORT_LATE = {"main.py", "preflight/core/registry.py", "preflight/modes/serve.py"}
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "preflight").rglob("*.py")])


def find_imports(node: ast.AST) -> Iterator[str]:
    """Full names of the project's modules that are imported anywhere below `node`."""
    for item in ast.walk(node):
        if isinstance(item, ast.ImportFrom):
            assert item.level == 0, "relative imports hide the row"
            names = [f"{item.module}.{alias.name}" for alias in item.names]
        elif isinstance(item, ast.Import):
            names = [alias.name for alias in item.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in OWN)


def read_row(module: str) -> str:
    """The row's name: the file at the top, or the package within preflight."""
    parts = module.split(".")
    return parts[1] if parts[0] == "preflight" else parts[0]


def test_the_contracts_name_every_package() -> None:
    """`exhaustive` sees to the layers; the forbidden contracts have lists of their own."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    packages = {path.parent.name for path in (ROOT / "preflight").glob("*/__init__.py")}
    below_trainer = packages - {"modes", "serving", "evaluation", "foresight"}
    below_model = below_trainer - {"decoding", "formats"}
    named = [{m.removeprefix("preflight.") for m in c.get("source_modules", [])} for c in contracts]
    assert named[2:] == [below_trainer, below_model]


def test_the_five_files_are_the_top_level() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_file_imports_only_from_the_rows_below(name: str) -> None:
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    found = {read_row(module) for module in find_imports(tree)}
    assert found, "every one of the five builds on the package"
    assert found <= ALLOWED[name], found - ALLOWED[name]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_own_modules_are_imported_at_the_top_of_a_file(path: Path) -> None:
    if str(path.relative_to(ROOT)) in MAY_IMPORT_LATE:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    late = sorted({module for function in functions for module in find_imports(function)})
    assert not late, f"import at the top of the file: {late}"
