"""The built-in sample: the English prose that comes with every Python, for a run without a text."""

from __future__ import annotations

import ast
import contextlib
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import publish_file
from preflight.corpus.shards import BUILDING_NAME
from preflight.corpus.sources.protocol import SourceFacts
from preflight.corpus.sources.text import TextFile
from preflight.settings import DataSettings

SAMPLE_BYTES = 2_300_000
SAMPLE_NAME = "sample.txt"
_SEPARATOR = "\x1e"
_CODE_INDENTATION = "   "  # at least, after a paragraph that ends in a colon


def find(given: str | None, settings: DataSettings) -> list[Sample] | None:
    """The sample, without ``--text-file``."""
    folder = Path(settings.data_dir) / BUILDING_NAME
    return [Sample(folder / SAMPLE_NAME)] if given is None else None


class Sample(TextFile):
    """The text file into which a scan writes the sample."""

    is_copied = True

    def __init__(self, path: Path) -> None:
        name = f"built-in sample (python {platform.python_version()})"
        super().__init__(path, _SEPARATOR, name=name)

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Write the sample, then scan it as any text."""
        log.info(
            "no --text-file given and the data folder is empty: preparing the built-in sample, "
            "the documentation that comes with Python"
        )
        content = _SEPARATOR.join(_build_sample()).encode()
        with publish_file(self.path, len(content)) as file:
            file.write(content)
        return super().scan(stop)


def _build_sample() -> list[str]:
    """The English prose that comes with every Python, one document per topic or module.

    Documentation topics, then docstrings of the standard library in the order of file names, up
    to `SAMPLE_BYTES`.
    """
    from pydoc_data import topics  # large, and needed only here

    documents = [text for _, text in sorted(topics.topics.items())]
    size = sum(len(text.encode()) for text in documents)
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "__pycache__",
    }
    for path in sorted(library.rglob("*.py")):
        if size >= SAMPLE_BYTES:
            break
        if skipped & set(path.relative_to(library).parts):
            continue
        with contextlib.suppress(OSError, ValueError, SyntaxError):
            text = "\n\n\n".join(_find_docstrings(ast.parse(path.read_bytes()), path.stem))
            if text:
                documents.append(text + "\n")
                size += len(text.encode()) + 1
    return [_flow(text.replace(_SEPARATOR, " ")) for text in documents]


def _flow(text: str) -> str:
    """Paragraphs on one line each: a small model then learns words, not where lines were broken.

    Code keeps its lines and its indentation.
    """
    result: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.rstrip() for line in paragraph.strip("\n").split("\n")]
        before = result[-1] if result else ""
        is_introduced = before.endswith(":") or before.startswith(_CODE_INDENTATION)
        is_code = is_introduced and all(line.startswith(_CODE_INDENTATION) for line in lines)
        if is_code or lines[0].lstrip().startswith(">>>"):
            result.append("\n".join(lines))
        elif paragraph.strip():
            result.append(" ".join(paragraph.split()))
    return "\n\n".join(result) + "\n"


def _find_docstrings(tree: ast.Module, name: str) -> Iterator[str]:
    """Module, class and function docstrings in their order, each under its qualified name."""
    waiting: list[tuple[str, Any]] = [(name, tree)]
    while waiting:
        label, node = waiting.pop()
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield f"{label}\n\n{inspect.cleandoc(text)}"
        inner = [
            child
            for child in node.body
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        waiting += [(f"{label}.{child.name}", child) for child in reversed(inner)]
