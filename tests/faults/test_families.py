"""Mistakes about model parts: told by name, in at most five lines, and nothing is changed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints.samples import rewrite_manifest

import main
from preflight.core.errors import ExitCode

from .harness import find_message_faults, hash_tree

FLAGS = [
    *("--text-file", "text.txt", "--data-dir", "data", "--tokenizer", "byte", "--device", "cpu"),
    *("--num-workers", "1", "--batch-size", "2", "--max-steps", "1", "--warmup-steps", "0"),
]
SIZE = [
    *("--model-size", "custom", "--n-layers", "2", "--n-embeddings", "24", "--n-heads", "4"),
    *("--context-length", "16"),
]
NGRAM = [
    *("--model-size", "custom", "--n-layers", "2", "--n-embeddings", "24"),
    *("--model-family", "mlp"),
]
SHAPES = {
    "gpt2": SIZE,
    "llama": [*SIZE, "--model-family", "llama"],
    "modern": [*SIZE, "--model-family", "modern"],
    "mlp": NGRAM,
}
Refuse = Callable[..., None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each family, each named after it."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "text.txt").write_text("a line of text\n" * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for family, shape in SHAPES.items():
            assert main.main(["--train", *FLAGS, *shape, "--output-dir", family]) == 0
    return folder


@pytest.fixture
def refuse(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run a command line that must be refused for the reason in `words`."""
    monkeypatch.chdir(runs)

    def run(code: ExitCode, words: str, *argv: str) -> None:
        before = hash_tree(runs)
        capsys.readouterr()
        assert main.main(list(argv)) == code
        assert find_message_faults(capsys.readouterr().err, words) == ""
        assert hash_tree(runs) == before

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*SIZE, "--n-kv-heads", "3"], "--n-kv-heads 3 does not divide n-heads 4"),
        ([*SIZE, "--n-kv-heads", "8"], "--n-kv-heads 8 does not divide n-heads 4"),
        ([*SIZE, "--n-heads", "5"], "--n-heads 5 does not divide n-embeddings 24"),
        (
            [*SIZE, "--n-heads", "8", "--positions", "rope"],
            "--positions rope needs heads of an even size, not 3",
        ),
        ([*SIZE, "--rope-scaling", "ntk"], "--rope-scaling ntk needs positions rope"),
        ([*SIZE, "--rope-factor", "2"], "--rope-factor 2.0 needs positions rope"),
        ([*SIZE, "--rope-theta", "5e5"], "--rope-theta 500000.0 needs positions rope"),
        (
            [*SIZE, "--positions", "rope", "--rope-factor", "2"],
            "--rope-factor above 1 and rope-scaling linear or ntk need each other",
        ),
        (
            [*SIZE, "--model-family", "llama", "--activation", "relu"],
            "--activation relu needs feed-forward mlp",
        ),
        ([*NGRAM, "--n-heads", "4"], "--n-heads 4 is no part of model-family mlp"),
        ([*NGRAM, "--n-kv-heads", "1"], "--n-kv-heads 1 is no part of model-family mlp"),
        ([*NGRAM, "--positions", "rope"], "--positions rope is no part of model-family mlp"),
        ([*NGRAM, "--feed-forward", "geglu"], "--feed-forward geglu is no part of"),
        ([*NGRAM, "--norm", "rms", "--qk-norm"], "--norm rms is no part of model-family mlp"),
        ([*SIZE, "--model-family", "lamma"], "did you mean llama?"),
        ([*SIZE, "--norm", "rsm"], "did you mean rms?"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("mode", ["--train", "--check"])
def test_parts_that_do_not_fit_together(
    refuse: Refuse, mode: str, flags: list[str], words: str
) -> None:
    refuse(ExitCode.FLAGS, words, mode, *FLAGS, *flags, "--output-dir", "new")


@pytest.mark.parametrize(
    ("family", "flags", "words"),
    [
        ("gpt2", ["--positions", "rope"], "positions: checkpoint learned, flags rope"),
        ("gpt2", ["--model-family", "llama"], "model_family: checkpoint gpt2, flags llama"),
        ("gpt2", ["--model-family", "mlp"], "model_family: checkpoint gpt2, flags mlp"),
        ("gpt2", ["--norm", "rms"], "norm: checkpoint layer, flags rms"),
        ("llama", ["--positions", "learned"], "positions: checkpoint rope, flags learned"),
        ("llama", ["--activation", "relu"], "activation: checkpoint gelu_tanh, flags relu"),
        ("llama", ["--model-family", "modern"], "model_family: checkpoint llama, flags modern"),
        ("modern", ["--feed-forward", "geglu"], "feed_forward: checkpoint mlp, flags geglu"),
        ("modern", ["--no-qk-norm"], "qk_norm: checkpoint True, flags False"),
        ("mlp", ["--model-family", "gpt2"], "model_family: checkpoint mlp, flags gpt2"),
        ("mlp", ["--positions", "rope"], "positions: checkpoint learned, flags rope"),
        ("mlp", ["--n-heads", "4"], "n_heads: checkpoint 1, flags 4"),
    ],
)
def test_a_checkpoint_of_another_model(
    refuse: Refuse, family: str, flags: list[str], words: str
) -> None:
    refuse(ExitCode.CHECKPOINT, words, "--train", *FLAGS, *flags, "--output-dir", family)


@contextlib.contextmanager
def edited(runs: Path, change: dict[str, Any]) -> Iterator[None]:
    """The Llama's config.json changed by hand, with nothing in the manifest against it."""
    [folder] = (runs / "llama" / "milestones").iterdir()
    path = folder / "config.json"
    original = path.read_bytes()
    config = json.loads(original)
    config["model"] |= change
    path.write_text(json.dumps(config))
    rewrite_manifest(folder)
    try:
        yield
    finally:
        path.write_bytes(original)
        rewrite_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model_family": "mamba"},
        {"model_family": ["gpt2"]},
        {"norm": "batch"},
        {"positions": "alibi"},
        {"feed_forward": "maxout"},
        {"rope_scaling": "yarn"},
        {"n_kv_heads": 3},
        {"model_family": "mlp"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["--train", "--generate"])
def test_a_checkpoint_with_parts_that_nobody_knows(
    refuse: Refuse, runs: Path, mode: str, change: dict[str, Any]
) -> None:
    flags = FLAGS if mode == "--train" else ["--device", "cpu", "--prompts", "a"]
    [name] = change
    with edited(runs, change):
        refuse(ExitCode.CHECKPOINT, name, mode, *flags, "--output-dir", "llama")


@pytest.mark.parametrize("change", [{"bias": True}, {"tied": True}, {"positions": "learned"}])
def test_weights_of_other_parts_than_the_checkpoint_says(
    refuse: Refuse, runs: Path, change: dict[str, Any]
) -> None:
    with edited(runs, change):
        argv = ["--generate", "--device", "cpu", "--prompts", "a", "--output-dir", "llama"]
        refuse(ExitCode.CHECKPOINT, "model.safetensors", *argv)
