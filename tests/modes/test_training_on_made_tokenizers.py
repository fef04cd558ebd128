"""Every mode with a tokenizer that is made from the text, which no checkpoint brings yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import MakeConfig
from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.foresight import fits
from preflight.modes import check, find_batch_size, generate, train, validate
from preflight.modes.setup import RunSetup
from preflight.settings import RunConfig, build_config


@pytest.fixture
def tiny(make_config: MakeConfig) -> MakeConfig:
    def make(**flags: object) -> RunConfig:
        return make_config(**{"tokenizer": "auto", "max_steps": 2} | flags)

    return make


def test_train_continue_and_generate(
    tiny: MakeConfig, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.run(tiny()) == 0
    said = capsys.readouterr().err
    assert "auto: bpe" in said
    [first, *_] = list_checkpoints(Path("training_output"))
    facts = first.config["tokenizer"]
    assert (facts["name"], first.model_config.vocab_size) == ("bpe", facts["vocab_size"])
    assert facts["vocab_size"] < 512
    for choice in ("auto", "bpe"):
        assert train.run(tiny(tokenizer=choice, max_steps=3 + len(choice))) == 0
    with pytest.raises(PreflightError, match="tokenizer: checkpoint bpe, flags gpt2") as caught:
        train.run(tiny(tokenizer="gpt2", max_steps=9))
    assert caught.value.code == ExitCode.CHECKPOINT
    for path in Path("data").rglob("tokenizer*"):  # generation needs the checkpoint alone
        if path.is_file():
            path.unlink()
    tiny_text.unlink()
    values = {"prompts": ["the quick"], "device": "cpu", "interactive": False, "max_new_tokens": 4}
    assert generate.run(build_config(values, {})) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_unknown_characters_of_a_prompt(
    tiny: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.run(tiny(tokenizer="char")) == 0
    values = {"prompts": ["caf\u00e9 the"], "device": "cpu", "interactive": False}
    with pytest.raises(PreflightError, match=r"U\+00E9") as caught:
        generate.run(build_config(values, {}))
    assert caught.value.code == ExitCode.TEXT
    assert generate.run(build_config(values | {"replace_unknown": True}, {})) == 0


def test_check_and_validation_make_the_tokenizer(
    tiny: MakeConfig, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.run(tiny(json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    vocab_size = RunSetup(tiny(), StopFlag()).model_config.vocab_size
    assert report["model"]["vocabulary"] == vocab_size < 512
    assert validate.run(tiny()) == 0
    capsys.readouterr()
    tiny_text.write_bytes(b"no \0 text")
    assert check.run(tiny(json=True, data_dir="other")) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["problems"]) == 1
    assert "tiny.txt" in report["dataset"]["not_known"]
    assert validate.run(tiny(data_dir="other")) == 1


@pytest.mark.slow
def test_the_batch_search_makes_the_tokenizer(
    tiny: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_batch_size.run(tiny(test_batch_sizes="2", json=True)) == 0
    assert "prepared data" in capsys.readouterr().out


def test_a_changed_text_is_not_trained_on_by_a_run_that_goes_on(
    tiny: MakeConfig, tiny_text: Path
) -> None:
    assert train.run(tiny()) == 0
    before = RunSetup(tiny(), StopFlag()).data.fingerprint
    tiny_text.write_text(tiny_text.read_text() + "other words " * 500)
    with pytest.raises(PreflightError, match="nothing was changed") as caught:
        train.run(tiny(max_steps=4))
    assert caught.value.code == ExitCode.DATA
    [newest, *_] = list_checkpoints(Path("training_output"))
    assert newest.config["data"]["fingerprint"] == before
    flags = {"resume_from": str(newest.path), "max_steps": 4}
    assert train.run(tiny(**flags)) == 0
    [newest, *_] = list_checkpoints(Path("training_output"))
    data = RunSetup(tiny(), StopFlag()).data
    assert data.fingerprint != before
    assert data.metadata.tokenizer.fingerprint == newest.config["tokenizer"]["fingerprint"]


def test_a_run_that_cannot_fit_keeps_the_old_data(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is checked with the vocabulary that was made, before the data is replaced."""
    before = RunSetup(tiny(tokenizer="char"), StopFlag()).data.fingerprint
    monkeypatch.setattr(fits, "reachable_host_bytes", lambda: 2**20)
    with pytest.raises(PreflightError) as caught:
        train.run(tiny(tokenizer="bpe"))
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    assert RunSetup(tiny(tokenizer="char"), StopFlag()).data.fingerprint == before
