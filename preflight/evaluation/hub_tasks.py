"""Tasks on the Hugging Face hub: the parquet files of a data set's test or validation part."""

from __future__ import annotations

import io
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.libraries import import_library
from preflight.core.log import log
from preflight.core.units import format_bytes
from preflight.corpus.sources.hub import list_files, read_card
from preflight.corpus.sources.hub_client import HubClient, Patience
from preflight.corpus.sources.hub_files import HubFile, choose_files
from preflight.corpus.sources.protocol import text_error
from preflight.evaluation.items import Task
from preflight.evaluation.tasks import build_task

_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@\s]+))?(?:@(?P<revision>\S+))?"
)
_SPLITS = ("test", "validation")
_MOST_BYTES = 512 * 2**20  # it is read whole


def read_hub_task(name: str, patience: Patience | None = None) -> tuple[Task, str]:
    """The task ``hf:OWNER/NAME[:CONFIG][@REVISION]``, and what its rows were taken for.

    Raises:
        PreflightError: code FLAGS, for another form of name or a configuration that must be chosen;
            TEXT, when the hub cannot be reached, refuses, or its rows are no items.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--tasks {name}: not the name of a data set on the hub",
            "such as hf:EleutherAI/lambada_openai:default, or with @REVISION behind it",
        )
    parquet = import_library("pyarrow.parquet", "pyarrow", name)
    client = HubClient(match["repo"], name, patience)
    client.connect()
    try:
        revision = urllib.parse.quote(match["revision"] or "main", safe="")
        commit = str(client.read_json(f"/revision/{revision}")[0]["sha"])
        files = list_files(client, commit)
        card = read_card(client, commit, files)
        choice = choose_files(files, card, match["config"], name, _SPLITS)
        for note in choice.notes:
            log.info(f"{name}: {note}")
        size = sum(file.size for file in choice.files)
        if size > _MOST_BYTES:
            raise text_error(
                name,
                f"its files have {format_bytes(size)}, which is no set of items",
                f"at most {format_bytes(_MOST_BYTES)} are read",
            )
        rows = _read_rows(client, commit, choice.files, parquet)
        return build_task(name, match["repo"].split("/")[-1], enumerate(rows, 1))
    finally:
        client.close()


def _read_rows(
    client: HubClient, commit: str, files: tuple[HubFile, ...], parquet: Any
) -> Iterator[dict[str, Any]]:
    for file in files:
        content = client.read_range(file.path, commit, 0, file.size, file.size)
        try:
            table = parquet.read_table(io.BytesIO(content))
        except Exception as error:  # Arrow has many kinds
            what = (str(error).splitlines() or ["damaged"])[0][:200]
            raise text_error(client.label, f"{file.path}: {what}") from None
        yield from table.to_pylist()
