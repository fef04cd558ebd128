"""What ``docs/formats.md`` says about the formats is tried on the fixture and on the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from preflight.checkpoints.manifest import MAX_FILES, FileEntry, Manifest
from preflight.checkpoints.v1 import rename_weight

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_examples_run_without_preflight() -> None:
    examples = re.findall(r"```python\n(.+?)```", DOCUMENT, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert "preflight" not in example
        subprocess.run(
            [sys.executable, "-I", "-c", example],
            cwd=ROOT / "tests" / "fixtures" / "v1",
            check=True,
            timeout=60,
        )


def test_table_of_names_is_the_one_used() -> None:
    rows = re.findall(r"^\| `(\S+\.\S+)` \| `(\S+\.\S+)` \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 9
    for old, new in rows:
        for kind in ("weight", "bias"):
            names = [name.replace("N", "7").replace("*", kind) for name in (old, new)]
            assert rename_weight(names[0]) == names[1]


def test_every_key_of_the_manifest_is_described() -> None:
    keys = [*Manifest.model_fields, *FileEntry.model_fields, "checksum"]
    assert [key for key in keys if f"`{key}`" not in DOCUMENT] == []
    assert f"up\nto {MAX_FILES} in all" in DOCUMENT
