"""What is installed: the wheel holds the product, and every requirement has a tested version."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import preflight

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    stripped = (line.split("#")[0].strip() for line in lines)
    return [Requirement(line) for line in stripped if line]


def read_constraints() -> dict[str, str]:
    """The tested version by package name."""
    found = {}
    for requirement in read_requirements("constraints.txt"):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


EXTRAS = sorted((ROOT / "requirements").iterdir())
NAMED = read_requirements("requirements.txt") + read_requirements("requirements-dev.txt")


@pytest.mark.parametrize("requirement", NAMED, ids=lambda requirement: requirement.name)
def test_every_requirement_has_a_tested_version_that_it_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(read_constraints()[canonicalize_name(requirement.name)])


def test_what_the_requirements_bring_along_has_a_tested_version_too() -> None:
    waiting, seen = [requirement.name for requirement in NAMED], set[str]()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen or name.startswith(("nvidia-", "cuda-", "triton")) or name == "pip":
            continue
        seen.add(name)
        needed = map(Requirement, metadata.requires(name) or [])
        waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(seen) > len(NAMED)
    assert seen <= set(read_constraints())


def test_everything_imported_is_a_named_requirement() -> None:
    distributions = metadata.packages_distributions()
    files = ["requirements.txt", *(f"requirements/{p.name}" for p in EXTRAS)]
    named = {canonicalize_name(r.name) for file in files for r in read_requirements(file)}
    named.add("setuptools")
    sources = [*ROOT.glob("*.py"), *(ROOT / "preflight").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    for top in set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)):
        for distribution in distributions.get(top, []):
            name = canonicalize_name(distribution)
            assert name in named or name.startswith("preflight"), f"{top} comes from {name}"


def test_the_commit_hook_checks_what_make_lint_checks() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = makefile.split("\nlint: setup-dev\n")[1].split("\n\n")[0]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()]
    assert len(commands) >= 5
    assert commands == re.findall(r"entry: ([^,]+),", hooks)


@pytest.mark.slow
def test_the_wheel_holds_the_product_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools builds in place; the checkout stays clean
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "data", "*_output")
    shutil.copytree(ROOT, source, ignore=left_out)
    product = {path.name for path in source.glob("*.py")} | {
        str(path.relative_to(source))
        for path in (source / "preflight").rglob("*")
        if path.is_file()
    }
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[:2] == ["preflight_gpt", preflight.__version__]
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        about = archive.read(info["METADATA"]).decode()
        scripts = archive.read(info["entry_points.txt"]).decode()
    assert held == product
    assert "preflight/tokenization/assets/gpt2.tiktoken" in held
    assert "LICENSE" in info
    assert "preflight = main:main" in scripts
    needed = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", about, re.MULTILINE))
    assert needed == {r.name for r in read_requirements("requirements.txt")}
    assert re.findall(r"^Provides-Extra: (.*)$", about, re.MULTILINE) == [
        "dev",
        *(path.stem for path in EXTRAS),
    ]
