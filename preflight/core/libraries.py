"""Libraries that only some runs need."""

from __future__ import annotations

import importlib
from typing import Any

from preflight.core.errors import ExitCode, PreflightError


def import_library(module: str, package: str, needed_for: str) -> Any:
    """The module, imported when it is first needed.

    Args:
        module: its name, such as ``pyarrow.parquet``.
        package: what pip calls its distribution.
        needed_for: what the user asked for, as the message begins: a file or a flag.

    Raises:
        PreflightError: code FLAGS, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PreflightError(
            ExitCode.FLAGS,
            f"{needed_for} needs {package}, which is not installed ({error})",
            f"pip install {package}",
        ) from None
