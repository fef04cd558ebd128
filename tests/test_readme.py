"""The README tells the truth: its flag table, its file table, its sizes, its paths.

``python tests/test_readme.py`` writes the flag table anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preflight.settings import GROUPS, MODEL_PRESETS, ModelSettings, build_options  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- flags: begin -->\n", "<!-- flags: end -->\n"


def render_flags() -> str:
    """All flags as Markdown tables, one a group."""
    lines = []
    for group, settings in GROUPS.items():
        summary = (settings.__doc__ or "").splitlines()[0].rstrip(".")
        lines += [
            f"**{group.capitalize()}** - {summary}",
            "",
            "| flag | default | what it does |",
            "|---|---|---|",
        ]
        for option in build_options().values():
            if option.group != group:
                continue
            default = "" if option.default in (None, ()) else f"`{option.default}`"
            choices = option.metadata["choices"]
            text = option.metadata["help"].replace("%%", "%").replace("|", "\\|")
            text += f" ({', '.join(choices)})" if choices else ""
            flag = option.flag + (f" / --no-{option.flag[2:]}" if option.kind is bool else "")
            lines.append(f"| `{flag}` | {default} | {text} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def split_readme() -> tuple[str, str, str]:
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    flags, tail = rest.split(END)
    return head, flags, tail


def test_the_flag_table_is_the_one_in_the_code() -> None:
    assert split_readme()[1] == render_flags()


def test_every_named_file_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_sizes_are_those_of_the_code() -> None:
    from preflight.models.cost import count_parameters

    text = README.read_text(encoding="utf-8")
    for name in MODEL_PRESETS:
        count = count_parameters(ModelSettings(model_size=name).resolve(50257))
        assert re.search(rf"\| {name} \|.*\| {count:,} \|", text), name


if __name__ == "__main__":
    before, _, after = split_readme()
    README.write_text(before + BEGIN + render_flags() + END + after, encoding="utf-8")
