"""The command line: flags -> config -> one mode -> exit code.

A mode is imported when it runs, so that `--help` and mistakes in flags answer without torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from preflight import __version__
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.registry import suggest
from preflight.core.signals import leave_on_interrupt
from preflight.core.streams import print_error, replace_missing_streams, silence_stdout
from preflight.settings import (
    GROUPS,
    MODEL_PRESETS,
    Option,
    RunConfig,
    build_config,
    build_options,
)
from preflight.settings.kinds import MODE_SUMMARIES, MODES

EPILOG = """\
examples:
  %(prog)s --train --text-file my.txt
  %(prog)s --generate --prompts "Once upon a time"
exit codes: 0 done, 2 flags, 3 text or prompts, 4 data folder, 5 checkpoint, 6 storage, 7 locked,
  8 out of memory, 9 diverged, 10 lost worker, 70 internal error, 130/143 stopped after saving"""


def _find_prog() -> str:
    """How this program was called: ``python main.py``, or the installed ``preflight``."""
    return "python main.py" if Path(sys.argv[0]).name == "main.py" else "preflight"


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, so that every mistake is reported in one way."""

    def error(self, message: str) -> NoReturn:
        raise PreflightError(ExitCode.FLAGS, message, f"see: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The command line, generated from the modes and the settings classes."""
    parser = _Parser(
        prog=_find_prog(),
        usage="%(prog)s MODE [flags]",
        description="Train GPT language models on your own text, and generate text with them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"preflight {__version__}")
    modes = parser.add_argument_group("mode (exactly one)")
    for mode in MODES.names():
        modes.add_argument(f"--{mode}", action="store_true", help=MODE_SUMMARIES[mode])
    groups = {
        name: parser.add_argument_group(name, (cls.__doc__ or "").splitlines()[0])
        for name, cls in GROUPS.items()
    }
    for option in build_options().values():
        groups[option.group].add_argument(option.flag, **_argument_of(option))
    return parser


def _argument_of(option: Option) -> dict[str, Any]:
    """argparse's view of an option. Values stay text: `build_config` checks them together."""
    default = option.default
    shown = "" if default in (None, (), "") else f" (default {default})"
    if option.name == "model_size":
        sizes = ", ".join(f"{n} {p.n_layers}L-{p.n_embeddings}H" for n, p in MODEL_PRESETS.items())
        shown = f": {sizes}, or custom{shown}"
    arguments: dict[str, Any] = {
        "help": (option.metadata["help"] + shown).replace("%", "%%"),
        "dest": option.name,
        "default": argparse.SUPPRESS,
    }
    if option.kind is bool:
        return arguments | {"action": argparse.BooleanOptionalAction}
    choices = option.metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices else option.metadata["metavar"]
    arguments["metavar"] = metavar or {int: "N", float: "X", str: "NAME"}[option.kind]
    return arguments | ({"nargs": "+", "action": "extend"} if option.many else {})


def parse_command_line(argv: list[str]) -> tuple[str, RunConfig]:
    """The mode and the configuration of a command line.

    Raises:
        PreflightError: code FLAGS, naming every mistake found.
        SystemExit: after ``--help`` or ``--version``.
    """
    parser = build_parser()
    parsed, rest = parser.parse_known_args(argv)
    given = vars(parsed)
    chosen = [mode for mode in MODES.names() if given.pop(mode.replace("-", "_"))]
    faults = [_explain_unknown(word, parser) for word in rest if word.startswith("-")]
    faults += [f"{word!r} belongs to no flag" for word in rest if not word.startswith("-")][:1]
    if len(chosen) != 1:
        names = ", ".join(f"--{mode}" for mode in MODES.names())
        found = " and ".join(f"--{mode}" for mode in chosen) or "none"
        faults.append(f"give exactly one mode of {names} (found {found})")
    sources = dict.fromkeys(given, "the command line")
    values = dict(given)
    try:
        if isinstance(given.get("config"), str):
            values, sources = _merge_config_file(given["config"], given, sources)
        config = build_config(values, sources)
    except PreflightError as error:
        raise PreflightError(ExitCode.FLAGS, *faults, *error.lines) from None
    if faults:
        raise PreflightError(ExitCode.FLAGS, *faults)
    return chosen[0], config


def _explain_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    flag = word.split("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    return f"unknown flag {flag[:60]!r}" + suggest(flag.replace("_", "-"), known)


def _merge_config_file(
    path: str, given: dict[str, Any], sources: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the file, overridden by those of the command line."""
    from preflight.core.strict_json import read_json

    try:
        content = read_json(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PreflightError(ExitCode.FLAGS, f"--config {path}: {reason}") from None
    if not isinstance(content, dict):
        raise PreflightError(ExitCode.FLAGS, f"--config {path}: not a JSON object of flags")
    known = set(build_options()) - {"config"}
    from_file = {key.lstrip("-").replace("-", "_"): value for key, value in content.items()}
    unknown = sorted(set(from_file) - known)
    if unknown:
        hint = suggest(unknown[0], known)
        raise PreflightError(
            ExitCode.FLAGS, f"--config {path}: unknown key {unknown[0][:60]!r}{hint}"
        )
    return from_file | given, dict.fromkeys(from_file, path) | sources


def run_mode(mode: str, config: RunConfig) -> int:
    """Run one mode; its module, and with it torch, is loaded here."""
    from preflight.core.log import configure_logging

    configure_logging(config.system.log_level)
    if mode == "train":
        from preflight.core.storage import check_access

        check_access(Path(config.control.output_dir))
    with leave_on_interrupt():
        run = MODES.load(mode)
    return run(config)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with replace_missing_streams():
        return _run_reporting_errors(sys.argv[1:] if argv is None else argv)


def _run_reporting_errors(argv: list[str]) -> int:
    output_dir = "."
    try:
        mode, config = parse_command_line(argv)
        output_dir = config.control.output_dir
        code = run_mode(mode, config)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the last line
        return code
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except PreflightError as error:
        print_error(*error.lines)
        return int(error.code)
    except KeyboardInterrupt:
        print_error("stopped")
        return int(ExitCode.SIGINT)
    except BrokenPipeError:
        silence_stdout()
        return int(ExitCode.SIGPIPE)
    except Exception as error:  # the last resort
        return (
            _report_disk_error(error)
            or _report_lack_of_memory(error)
            or _report_internal_error(error, output_dir)
        )


def _report_disk_error(error: Exception) -> int:
    """Report a full or failing disk that no mode expected; 0 for other errors."""
    from preflight.core.storage import DISK_ERRNOS, storage_error

    no_temporary = "No usable temporary directory" in str(error)  # tempfile's own, with ENOENT
    if not isinstance(error, OSError) or (error.errno not in DISK_ERRNOS and not no_temporary):
        return 0
    silence_stdout()
    told = storage_error(Path(error.filename or "the output"), error)
    print_error(*told.lines)
    return int(told.code)


def _report_lack_of_memory(error: Exception) -> int:
    """Report a lack of memory that no mode expected; 0 for other errors."""
    from preflight.core.memory_lack import explain_lack_of_memory, lacks_memory

    if not lacks_memory(error):
        return 0
    print_error(*explain_lack_of_memory())
    return int(ExitCode.OUT_OF_MEMORY)


def _report_internal_error(error: Exception, output_dir: str) -> int:
    """Write the traceback to ``crash.log`` in the output folder, or else in this one."""
    import traceback

    text = "".join(traceback.format_exception(error))
    for folder in (Path(output_dir), Path.cwd()):
        try:
            path = folder / "crash.log"
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        print_error(f"internal error, {type(error).__name__}; details in {path}")
        return int(ExitCode.INTERNAL)
    print_error("internal error; crash.log cannot be written", *text.splitlines())
    return int(ExitCode.INTERNAL)


if __name__ == "__main__":
    sys.exit(main())
