"""Which parquet files of a hub data set are read, by its card or by the names of its folders."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources.protocol import text_error

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
} | dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")


@dataclass(frozen=True)
class HubFile:
    """A file of the data set: its path, its size, and its digest on the hub."""

    path: str
    size: int
    oid: str


@dataclass(frozen=True)
class Choice:
    """The files that are read, in order, and what a user should know."""

    files: tuple[HubFile, ...]
    notes: tuple[str, ...] = ()


def choose_files(
    files: list[HubFile],
    card: dict[str, Any],
    wanted: str | None,
    label: str,
    preferred: tuple[str, ...] = ("train",),
) -> Choice:
    """The parquet files of the configuration `wanted`, or of the only one.

    Args:
        files: all files of the data set.
        card: the metadata of its card.
        wanted: the configuration's name.
        label: of the data set, for messages.
        preferred: splits, of which the first that is there is taken.

    Raises:
        PreflightError: code FLAGS, when a configuration must be chosen; TEXT, when there are no
            parquet files.
    """
    parquet = [file for file in files if file.path.lower().endswith(".parquet")]
    configs = _read_configs(card)
    if configs:
        chosen = _choose_config(configs, wanted, label)
        patterns, notes = _choose_split(configs[chosen], label, preferred)
        found = _match_all(patterns, files)
        kept = [file for file in found if file.path.lower().endswith(".parquet")]
        if kept:
            return Choice(tuple(kept), notes)
        raise _no_parquet_error(found or files, label)
    if not parquet:
        raise _no_parquet_error(files, label)
    return _choose_folder(parquet, wanted, label, preferred)


def _no_parquet_error(files: list[HubFile], label: str) -> PreflightError:
    kinds = Counter(posixpath.splitext(file.path)[1] or "no ending" for file in files)
    kinds = Counter({kind: n for kind, n in kinds.items() if kind not in (".md", ".gitattributes")})
    held = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common(5)) or "none"
    bare = label.split(" ")[0].split("@")[0]
    return text_error(
        label,
        f"no parquet files; its files: {held}",
        f"the hub's own conversion may be there: --source {bare}@refs/convert/parquet",
        "or download its files and give them with --text-file",
    )


# ---- by the card --------------------------------------------------------------------------------


def _read_configs(card: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """The patterns of files, by configuration and split, as far as the card tells them.

    The form of `configs`: https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    configs: dict[str, dict[str, list[str]]] = {}
    entries = card.get("configs")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "data_files" in entry:
            splits: dict[str, list[str]] = {}
            given = entry["data_files"]
            for item in given if isinstance(given, list) else [given]:
                is_named = isinstance(item, dict)
                paths = item.get("path", []) if is_named else item
                split = str(item.get("split", "train")) if is_named else "train"
                listed = paths if isinstance(paths, list) else [paths]
                folder = str(entry.get("data_dir") or "")
                splits.setdefault(split, []).extend(
                    posixpath.join(folder, str(path)) for path in listed
                )
            configs[str(entry.get("config_name", "default"))] = splits
    return configs


def _choose_config(configs: Iterable[str], wanted: str | None, label: str) -> str:
    names = list(configs)
    if wanted in names:
        return str(wanted)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None and "default" in names:
        return "default"
    raise _config_error(names, wanted, label)


def _config_error(names: list[str], wanted: str | None, label: str) -> PreflightError:
    shown = " ".join(names[:60]) + (f" and {len(names) - 60:,} more" if len(names) > 60 else "")
    what = f"no configuration '{wanted}'" if wanted is not None else "several configurations"
    return PreflightError(
        ExitCode.FLAGS, f"{label}: {what}; there are: {shown}", "choose one: --source-config NAME"
    )


def _choose_split(
    splits: dict[str, list[str]], label: str, preferred: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...]]:
    name = next((split for split in (*preferred, *splits) if split in splits), "")
    if name not in preferred and len(splits) != 1:
        told = f"no split '{preferred[0]}'; there are: {', '.join(splits) or 'none'}"
        raise text_error(label, told)
    others = [split for split in splits if split != name]
    note = f"the split '{name}' is read; left out: {', '.join(others)}"
    return splits[name], (note,) if others else ()


def _match_all(patterns: list[str], files: list[HubFile]) -> list[HubFile]:
    """The files that match a pattern, each once: pattern by pattern, and by name."""
    found: dict[str, HubFile] = {}
    for pattern in patterns:
        matcher = re.compile(_translate(posixpath.normpath(pattern)))
        for file in sorted(files, key=lambda file: file.path):
            if matcher.fullmatch(file.path):
                found.setdefault(file.path, file)
    return list(found.values())


def _translate(pattern: str) -> str:
    """A glob as a regular expression: ``**`` crosses folders; a folder stands for its files."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(
        rules.get(part) or (re.sub(r"^\[!", "[^", part) if part[:1] == "[" else re.escape(part))
        for part in parts
    )
    return expression if any(part in rules for part in parts) else f"{expression}(?:/.*)?"


# ---- by the folders -----------------------------------------------------------------------------


def _choose_folder(
    parquet: list[HubFile], wanted: str | None, label: str, preferred: tuple[str, ...]
) -> Choice:
    """Without a card: the files in the folder called `wanted`, in data/, or at the top."""
    if wanted is not None:
        inside = [file for file in parquet if wanted in file.path.split("/")[:-1]]
        inside = inside or [file for file in parquet if f"/{file.path}".find(f"/{wanted}/") >= 0]
        if not inside:
            raise _config_error(_list_folders(parquet) or ["none"], wanted, label)
        return _keep_split(inside, preferred)
    plain = [
        file
        for file in parquet
        if "/" not in file.path or file.path.split("/")[0] in ("data", *_SPLITS)
    ]
    folders = _list_folders(parquet)
    if not plain and len(folders) > 1:
        raise _config_error(folders, None, label)
    return _keep_split(plain or parquet, preferred)


def _list_folders(parquet: list[HubFile]) -> list[str]:
    tops = (file.path.split("/")[0] for file in parquet if "/" in file.path)
    return [name for name in dict.fromkeys(sorted(tops)) if name not in ("data", *_SPLITS)]


def _find_split(path: str) -> str | None:
    """The split that a path's folders or its file's name tell; the last word counts."""
    words = re.split(r"[^a-z]+", path.lower().removesuffix(".parquet"))
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _keep_split(files: list[HubFile], preferred: tuple[str, ...]) -> Choice:
    """The files of a preferred split, or those of no split, or those of the only split."""
    by_split: dict[str | None, list[HubFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        by_split.setdefault(_find_split(file.path), []).append(file)
    order = (*preferred, None, *by_split)
    name = next(split for split in order if split in by_split)
    others = {
        str(split or "no split"): len(own) for split, own in by_split.items() if split != name
    }
    told = ", ".join(f"{n:,} files of {split}" for split, n in others.items())
    note = f"the split '{name}' is read; left out: {told}"
    return Choice(tuple(by_split[name]), (note,) if others else ())
