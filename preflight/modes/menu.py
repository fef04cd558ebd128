"""The menu: what this folder holds, what makes sense next, and every mode.

Each choice asks only what it needs, shows the command, and runs it as a process of its own, so
that what is learned here can be typed the next time. No torch is imported.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preflight.core.commands import format_command
from preflight.core.errors import ExitCode
from preflight.modes.asking import Asker, Choice, open_asker
from preflight.modes.folder_state import FolderState, read_state, show
from preflight.modes.picking import pick_runs
from preflight.settings import ControlSettings, build_options
from preflight.settings.kinds import MODE_SUMMARIES, MODES
from preflight.settings.unused import is_used

_MAX_TEXTS = 5  # that are offered
_CHATS_NAME = "chats"  # the folder that a fine-tuned run has, see `finetune_setup`
_ON_A_TEXT = ("check", "validate-only", "prepare", "train", "get-optimal-bs", "find-lr")
# Flags that a choice asks for. A mode that is not here asks for none but its own value. A flag in
# `_NEEDED` cannot be left empty.
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "check": ("model_size",),
    "train": ("model_size", "max_steps", "output_dir"),
    "finetune": ("finetune", "output_dir"),
    "sweep": ("sweep", "model_size"),
    "generate": ("prompts",),
    "evaluate": ("evaluate",),
    "compare": ("prompts",),
    "tokenize": ("tokenize",),
    "detokenize": ("detokenize",),
}
_NEEDED = ("sweep", "tokenize", "detokenize", "finetune", "import_path", "export", "serve")
_MAKES_DATA = (*_ON_A_TEXT, "sweep", "forecast")  # modes that need data, and prepare it
_NAMES_A_RUN = {"finetune": "from_checkpoint", "serve": "serve"}  # by the flag of that field
_READS_RUNS = ("generate", "report", "tokenize", "detokenize", "evaluate")  # one run
_TOLD = {
    ExitCode.DONE: "done",
    ExitCode.CHECK_FAILED: "a check did not pass",
    ExitCode.FLAGS: "a mistake in the flags",
    ExitCode.TEXT: "something is wrong with the text or the prompts",
    ExitCode.DATA: "something is wrong with the data folder",
    ExitCode.CHECKPOINT: "something is wrong with a checkpoint, or there is none",
    ExitCode.STORAGE: "something could not be written",
    ExitCode.LOCKED: "another process is using the folder",
    ExitCode.OUT_OF_MEMORY: "the memory did not suffice",
    ExitCode.DIVERGED: "the training diverged",
    ExitCode.WORKER_LOST: "a worker process was lost",
    ExitCode.INTERNAL: "an internal error: a fault of this program",
    ExitCode.SIGINT: "stopped by Ctrl-C",
    ExitCode.SIGPIPE: "the reader of the output has gone",
    ExitCode.SIGTERM: "stopped by a signal",
}


@dataclass(frozen=True)
class Step:
    """Something that can be chosen.

    Attributes:
        mode: of the command.
        words: flags that are known without asking.
        asks: whether the mode's questions are asked too.
    """

    text: str
    mode: str
    words: tuple[str, ...] = ()
    asks: bool = True


def run_menu(root: Path | None = None, asker: Asker | None = None) -> int:
    """Show the menu until the user leaves; 0."""
    root, asker = root or Path(), asker or open_asker()
    while True:
        state = read_state(root)
        for line in ["", *state.describe()]:
            print(line, file=sys.stderr)
        step = _choose_step(state, asker)
        if step is None:
            return ExitCode.DONE
        with contextlib.suppress(KeyboardInterrupt):  # at a question: back to the menu
            words = build_command(step, state, asker)
            if words is not None:
                run_command(words, asker)


def _choose_step(state: FolderState, asker: Asker) -> Step | None:
    """A step of the menu; ``None`` to leave."""
    steps = suggest_steps(state)
    rows: list[tuple[Choice, Step | None]] = [(Choice("next:", heading=True), None)]
    rows += [(Choice(step.text), step) for step in steps]
    rows.append((Choice("all modes:", heading=True), None))
    rows += [
        (Choice(f"--{mode:<15} {MODE_SUMMARIES[mode]}"), Step("", mode)) for mode in MODES.names()
    ]
    rows.append((Choice("leave"), None))
    index = asker.choose("What next?", [choice for choice, _ in rows])
    return None if index is None else rows[index][1]


def suggest_steps(state: FolderState) -> list[Step]:
    """What makes sense with what is here, the most sensible first."""
    steps = []
    for run in state.runs[:2]:
        name, folder = show(run.folder), ("--output-dir", str(run.folder))
        if not run.is_finished and run.command:
            steps.append(Step(f"go on training {name}", "train", run.command[1:], asks=False))
        if run.checkpoints and (run.folder / _CHATS_NAME).is_dir():
            steps.append(
                Step(f"talk to {name}", "generate", ("--generate", "--chat", *folder), asks=False)
            )
        if run.checkpoints:
            steps.append(Step(f"generate text with {name}", "generate", folder))
            flags = ("--evaluate", "quick", *folder)
            steps.append(Step(f"measure {name}", "evaluate", flags, asks=False))
        steps.append(Step(f"make the report of {name}", "report", folder, asks=False))
    if len([run for run in state.runs if run.checkpoints]) > 1:
        steps.append(Step("compare two of the runs", "compare"))
    if state.data:
        steps.append(Step("check a run on this data before it starts", "check"))
        steps.append(Step("train a new model on this data", "train"))
    else:
        for text in state.texts[:_MAX_TEXTS]:
            words = ("--text-file", str(text))
            steps.append(Step(f"check a run on {show(text.name)}", "check", words))
            steps.append(Step(f"train on {show(text.name)}", "train", words))
    if not state.data and not state.texts:
        steps.append(Step("check a run on the built-in sample", "check", asks=False))
        steps.append(Step("train a small model on the built-in sample", "train"))
    return steps


def build_command(step: Step, state: FolderState, asker: Asker) -> list[str] | None:
    """The words of the command, after its questions; ``None`` to go back."""
    options = build_options()
    # A mode that takes values is a flag too, whose field may have another name.
    own = {option.flag[2:]: name for name, option in options.items()}.get(step.mode)
    words = [] if own else [f"--{step.mode}"]
    words += ["--compare", "ask"] if step.mode == "compare" else []
    words += step.words
    if not step.asks:
        return words
    if step.mode in _MAKES_DATA and not state.data and "--text-file" not in words:
        text = asker.ask("text file, folder or pattern; empty: the built-in sample")
        if text is None:
            return None
        words += options["text_file"].spell((text,)) if text else []
    run = _ask_for_run(step, words, state, asker)
    if run is None:
        return None
    words += run
    for name in _QUESTIONS.get(step.mode, (own,) if own else ()):
        if options[name].flag in words or not is_used(options[name], step.mode):
            continue
        answer = _ask_for(name, state, asker)
        if answer is None:
            return None
        words += answer
    return words


def _ask_for_run(
    step: Step, words: list[str], state: FolderState, asker: Asker
) -> list[str] | None:
    """The flag that names a run, where the mode reads one; ``None`` to go back."""
    name = _NAMES_A_RUN.get(step.mode, "output_dir" if step.mode in _READS_RUNS else "")
    option = build_options().get(name)
    if option is None or option.flag in words or not state.runs:
        return []
    picked = pick_runs(state.runs, asker)
    if not picked:
        return None
    folder = str(picked[0].folder)
    return option.spell((folder,) if option.many else folder)


def _ask_for(name: str, state: FolderState, asker: Asker) -> list[str] | None:
    """A flag and its value, as often asked as the value is refused; nothing for an empty answer."""
    option = build_options()[name]
    if option.metadata["choices"]:
        names = [choice for choice in option.metadata["choices"] if choice != "custom"]
        index = asker.choose(option.flag, [Choice(choice) for choice in names])
        if index is None:
            return None
        return [] if names[index] == option.default else option.spell(names[index])
    default = suggest_folder(state) if name == "output_dir" else ""
    while True:
        question = f"{option.flag}: {option.metadata['help']}"
        answer = asker.ask(question, default)
        if answer is None:
            return None
        if not answer and name not in _NEEDED:
            return []
        try:
            value = option.read([answer] if option.many else answer)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        return [] if value == option.default else option.spell(value)


def suggest_folder(state: FolderState) -> str:
    """A name for the output of a new run that no run has."""
    taken = {str(run.folder) for run in state.runs}
    names = [ControlSettings.output_dir, *(f"run_{number}" for number in range(2, 1000))]
    return next(name for name in names if name not in taken)


def run_command(words: list[str], asker: Asker) -> None:
    """Show a command, run it, and tell how it ended."""
    print(f"\n  {format_command(*words)}\n", file=sys.stderr)
    answer = asker.ask("Enter runs it; b goes back")
    if answer is None or answer.lower() == "b":
        return
    with ignore_interrupts():
        code = subprocess.run([sys.executable, _find_program(), *words], check=False).returncode
    print(f"\n{explain_exit(code)}", file=sys.stderr)


def _find_program() -> str:
    """The script that was called, so that the child's messages name it too."""
    called = Path(sys.argv[0]) if sys.argv else Path()
    is_ours = called.name == "main.py" or called.stem == "preflight"
    if is_ours and called.is_file() and called.suffix in ("", ".py"):
        return str(called)
    return str(Path(__file__).parents[2] / "main.py")


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ctrl-C is for the child alone, which saves and ends.

    A handler that does nothing, since a child would inherit that the signal is ignored.
    """
    before = signal.signal(signal.SIGINT, lambda *unused: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def explain_exit(code: int) -> str:
    """How a child ended, in words."""
    if code < 0:
        return f"killed by signal {-code} ({signal.strsignal(-code)})"
    if code in set(ExitCode):
        text = _TOLD[ExitCode(code)]
        return text if code == 0 else f"{text} (exit code {code})"
    return f"it ended with exit code {code}"
