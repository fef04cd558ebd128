"""The command line: flags -> config -> one mode -> exit code.

A mode is imported when it runs, so that `--help` and mistakes in flags answer without torch.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

# With PYTHONSAFEPATH or -P Python leaves a script's folder out. Child processes get this list too.
if str(Path(__file__).resolve().parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.registry import suggest
from preflight.core.signals import leave_on_interrupt
from preflight.core.streams import (
    is_on_terminal,
    print_error,
    replace_missing_streams,
    silence_stdout,
)
from preflight.settings import RunConfig, build_config, build_options
from preflight.settings.command_line import build_parser, explain_words
from preflight.settings.kinds import MENUS, MODES
from preflight.settings.unused import PAIRED_MODES, drop_unused


def parse_command_line(argv: list[str]) -> tuple[str, RunConfig]:
    """The mode and the configuration of a command line.

    Raises:
        PreflightError: code FLAGS, naming every mistake found.
        SystemExit: after ``--help`` or ``--version``.
    """
    parsed, rest = build_parser(argv).parse_known_args(argv)
    given = vars(parsed)
    given.pop("help")
    # A mode that takes values is a flag too, whose field may have another name.
    fields = {option.flag[2:]: name for name, option in build_options().items()}
    chosen = [m for m in MODES.names() if fields.get(m, m.replace("-", "_")) in given]
    for done, foreseeing in PAIRED_MODES.items():
        if len(chosen) == 2 and done in chosen and {*chosen} & {*foreseeing}:
            chosen.remove(done)  # foreseen or tried, not done
    given = {name: value for name, value in given.items() if name in build_options()}
    faults, is_clear = explain_words(rest, argv)
    if len(chosen) != 1 and not is_clear:
        faults += _explain_modes(chosen)
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


def _explain_modes(chosen: list[str]) -> list[str]:
    names = ", ".join(f"--{mode}" for mode in MODES.names())
    found = " and ".join(f"--{mode}" for mode in chosen) or "none"
    told = [f"give exactly one mode of {names} (found {found})"]
    if not chosen:
        told.append(f"for example: {format_command('--train', '--text-file', 'my.txt')}")
    return [*told, f"see: {format_command('--help')}"]


def _merge_config_file(
    path: str, given: dict[str, Any], sources: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the file, overridden by those of the command line."""
    from preflight.core.strict_json import read_json

    try:
        content = read_json(Path(path), by_hand=True)
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


def _report_unused(mode: str, config: RunConfig) -> RunConfig:
    """`config` without the flags that this call does not use, each of which is named."""
    from preflight.core.log import log

    used, unused = drop_unused(mode, config)
    options = build_options()
    from_files: dict[str, list[str]] = {}
    for name, told in unused.items():
        option, source = options[name], config.sources[name]
        flag = option.spell(config.get(option))[0].split("=")[0]
        if source == "the command line":
            log.warning(f"{flag} {told}")
        else:  # a file of flags may serve several modes: one line will do
            from_files.setdefault(source, []).append(flag)
    for source, flags in from_files.items():
        log.info(f"not used of {source}: {', '.join(flags)}")
    return used


def run_mode(mode: str, config: RunConfig) -> int:
    """Run one mode; its module, and with it torch, is loaded here."""
    from preflight.core.log import configure_logging

    configure_logging(config.system.log_level)
    config = _report_unused(mode, config)
    if mode == "train":
        from preflight.core.storage import check_access

        check_access(Path(config.control.output_dir))
    from preflight.core.processes import limit_spinning

    limit_spinning()
    with leave_on_interrupt():
        run = MODES.load(mode)
    return run(config)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with replace_missing_streams():
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a narrow encoding must not end the program
                with contextlib.suppress(OSError):  # it stays as it is
                    stream.reconfigure(errors="backslashreplace")
        return _run_reporting_errors(sys.argv[1:] if argv is None else argv)


def _run_reporting_errors(argv: list[str]) -> int:
    output_dir = "."
    try:
        if not argv and is_on_terminal():
            return int(MENUS.load("menu")())
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
    """Write the traceback to a new ``crash.log`` in the output folder, or else in this one."""
    import traceback

    text = "".join(traceback.format_exception(error))
    numbers = ("", *(f"-{n}" for n in range(2, 100)))
    for path in (
        place / f"crash{n}.log" for place in (Path(output_dir), Path.cwd()) for n in numbers
    ):
        try:
            with open(path, "x", encoding="utf-8") as file:  # never through a link, nor over a file
                file.write(text)
        except OSError:
            continue
        print_error(f"internal error, {type(error).__name__}; details in {path}")
        return int(ExitCode.INTERNAL)
    print_error("internal error; crash.log cannot be written", *text.splitlines())
    return int(ExitCode.INTERNAL)


if __name__ == "__main__":
    sys.exit(main())
