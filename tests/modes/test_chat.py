"""`--generate --chat`: a model that has learned to answer is talked with, by pipe and terminal."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from test_generate import Terminal

import main
from conftest import ROOT
from generate import generate_ids, stream_ids
from preflight.checkpoints.format import read_checkpoint
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log_once
from preflight.modes import chat
from preflight.settings import ModelConfig, SamplingConfig
from preflight.tokenization import load_tokenizer
from preflight.tokenization.chat_encoding import ChatEncoder
from preflight.tokenization.chat_template import DEFAULT_TEMPLATE, TEMPLATE_NAME, ChatTemplate
from preflight.tokenization.chats import Chat, Message
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer
from preflight.training.chat_templates import read_checkpoint_template
from transformer_model import DecoderOnlyTransformer

MODEL = ModelConfig(
    vocab_size=257, context_length=96, n_embeddings=32, n_heads=2, n_layers=1, ffn_hid_dim=64
)
ANSWERS = {"ping": "pong", "who": "a model", "tell": "no\nnever"}
OWN = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
OWN += "{% if add_generation_prompt %}<a>{% endif %}"
GREEDY = ("--temperature", "0", "--max-new-tokens", "20", "--log-level", "info")


def build_chats() -> list[Chat]:
    """Every question alone, and every one after every other; half of them with a system message."""
    chats = []
    for first in ANSWERS:
        for second in ["", *ANSWERS]:
            messages = [Message("user", first), Message("assistant", ANSWERS[first])]
            if second:
                messages += [Message("user", second), Message("assistant", ANSWERS[second])]
            chats += [Chat(tuple(messages)), Chat((Message("system", "S"), *messages))]
    return chats


def learn(encoder: ChatEncoder) -> DecoderOnlyTransformer:
    """A model that answers, trained on the rows of `encoder` and their masks alone."""
    torch.manual_seed(1)
    model = DecoderOnlyTransformer(MODEL)
    rows = [row for rows in encoder.encode(build_chats()) for row in rows]
    length = max(len(row.ids) for row in rows)
    inputs = torch.zeros(len(rows), length - 1, dtype=torch.long)
    targets = torch.full((len(rows), length - 1), -100)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.ids)
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, : len(ids) - 1] = torch.where(torch.from_numpy(row.mask), ids, -100)[1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(inputs, targets) / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.003:
            break
    return model


@dataclasses.dataclass
class _WithTemplate:
    """Writes a template into a checkpoint."""

    source: str

    def save(self, folder: Path) -> list[Path]:
        (folder / TEMPLATE_NAME).write_text(self.source, encoding="utf-8")
        return [folder / TEMPLATE_NAME]


def save(folder: Path, model: DecoderOnlyTransformer, source: str) -> Path:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tokenizer = load_tokenizer("byte").describe()
    config = {"model": dataclasses.asdict(MODEL), "tokenizer": tokenizer}
    folder.mkdir(parents=True)
    files = _WithTemplate(source) if source else None
    return save_checkpoint(folder, 1, weights, {}, config, {"val_loss": 1.0}, files).path


@pytest.fixture(scope="module")
def model() -> DecoderOnlyTransformer:
    return learn(ChatEncoder(load_tokenizer("byte"), DEFAULT_TEMPLATE, MODEL.context_length))


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory, model: DecoderOnlyTransformer) -> Path:
    folder = tmp_path_factory.mktemp("run") / "plain"
    save(folder, model, "")
    return folder


Run = Callable[..., Any]


@pytest.fixture
def run(
    output_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """`main.py --generate --chat` in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, stdin: str = "", folder: Path = output_dir) -> Any:
        pipe = io.TextIOWrapper(io.BytesIO(stdin.encode()), newline="\n")
        monkeypatch.setattr(sys, "stdin", pipe)
        argv = ["--generate", "--chat", "--output-dir", str(folder), "--device", "cpu"]
        code = main.main([*argv, *GREEDY, *flags])
        return subprocess.CompletedProcess(flags, code, *capfd.readouterr())

    return call


def test_a_model_answers_and_ends_its_answers(run: Run) -> None:
    done = run(stdin="ping\nwho\n\ntell\n/quit\nnever\n")
    assert done.returncode == 0
    assert done.stdout == "pong\na model\nno\nnever\n"
    assert "has no chat template: its model was not fine-tuned on chats" in done.stderr
    assert "1 completion, 6 tokens" in done.stderr  # " pong", and the end


def test_commands_and_what_is_saved(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("keep", encoding="utf-8")
    lines = [
        *("/retry", "/save too-early", "ping", "/system S", "/system", "who", "/retry"),
        *("/save there", "/save no/folder", "/save chat.jsonl", "/len 3", "/nonsense", "/help"),
        *("/new", "ping", "/save second.jsonl"),
    ]
    done = run(stdin="\n".join(lines))
    assert done.stdout == "pong\na model\na model\n" + "pong"[:2] + "\n"
    for told in (
        "/retry: there is no answer yet",
        "/save FILE writes the conversation, once there is one",
        "the system message is now S",
        "the system message is S",
        "the answer will be the same",
        "there exists already, and was not changed",
        "no/folder cannot be written: No such file",
        "5 messages in chat.jsonl",
        "/len is now 3",
        "/nonsense: no such command",
        "a new conversation with the same system message",
    ):
        assert told in done.stderr
    assert (tmp_path / "there").read_text(encoding="utf-8") == "keep"
    assert not (tmp_path / "too-early").exists()
    [saved] = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    roles = ("system", "user", "assistant", "user", "assistant")
    contents = ("S", "ping", "pong", "who", "a model")
    pairs = zip(roles, contents, strict=True)
    assert json.loads(saved) == {"messages": [{"role": r, "content": c} for r, c in pairs]}
    [second] = (tmp_path / "second.jsonl").read_text(encoding="utf-8").splitlines()
    assert [each["content"] for each in json.loads(second)["messages"]] == ["S", "ping", "po"]


def test_the_system_message_of_the_flag(run: Run) -> None:
    done = run("--system-prompt", "S", stdin="/system\nping\n/save s.jsonl\n")
    assert "the system message is S" in done.stderr
    assert "3 messages in s.jsonl" in done.stderr


def test_another_answer_has_other_random_numbers(run: Run) -> None:
    flags = ("--temperature", "2000", "--top-k", "0", "--max-new-tokens", "12")
    first = run(*flags, stdin="ping\n/retry\n").stdout
    assert first == run(*flags, stdin="ping\n/retry\n").stdout
    half = len(first) // 2
    assert first[:half] != first[half:]


def test_a_conversation_longer_than_the_context(run: Run) -> None:
    log_once.cache_clear()
    lines = ("ping", "who", "ping", "x" * 60, "who")  # one exchange and a question fit into 48
    done = run("--max-new-tokens", "48", stdin="\n".join(lines))
    assert done.stdout == "pong\na model\npong\n\na model\n"
    assert done.stderr.count("its earliest turns are left out") == 1
    assert "the message has 77 tokens with what belongs to it" in done.stderr


def test_the_checkpoints_own_template_and_that_of_the_flag(
    run: Run, tmp_path: Path, model: DecoderOnlyTransformer
) -> None:
    own = learn(ChatEncoder(load_tokenizer("byte"), ChatTemplate(OWN, "own"), 96))
    path = save(tmp_path / "own", own, OWN)
    done = run(stdin="ping\nwho\n", folder=tmp_path / "own")
    assert done.stdout == "pong\na model\n"
    assert "no chat template" not in done.stderr
    (tmp_path / "mine.jinja").write_text(OWN, encoding="utf-8")
    flag = ("--chat-template", "mine.jinja")
    save(tmp_path / "default", own, "")
    assert run(*flag, stdin="ping\n", folder=tmp_path / "default").stdout == "pong\n"
    (path / TEMPLATE_NAME).write_text(OWN + " ", encoding="utf-8")
    done = run(stdin="ping\n", folder=tmp_path / "own")
    assert done.returncode == 5
    assert TEMPLATE_NAME in done.stderr


def test_the_template_in_a_checkpoint_is_verified(
    tmp_path: Path, model: DecoderOnlyTransformer
) -> None:
    checkpoint = read_checkpoint(save(tmp_path / "own", model, OWN))
    template = read_checkpoint_template(checkpoint)
    assert template is not None
    assert (template.source, template.code) == (OWN, ExitCode.CHECKPOINT)
    assert read_checkpoint_template(read_checkpoint(save(tmp_path / "no", model, ""))) is None
    (checkpoint.path / TEMPLATE_NAME).write_text(OWN.replace("a", "b"), encoding="utf-8")
    with pytest.raises(PreflightError) as caught:
        read_checkpoint_template(checkpoint)
    assert caught.value.code == ExitCode.CHECKPOINT


def test_a_hostile_template(run: Run, tmp_path: Path, model: DecoderOnlyTransformer) -> None:
    source = "{{ 'a' * 10 ** 12 }}"  # one that takes time is in test_chat_template.py
    save(tmp_path / "bad", model, source)
    done = run(stdin="ping\n", folder=tmp_path / "bad")
    assert done.returncode == 5
    assert f"{TEMPLATE_NAME} does not work" in done.stderr
    (tmp_path / "bad.jinja").write_text(source, encoding="utf-8")
    done = run("--chat-template", "bad.jinja", stdin="ping\n")
    assert done.returncode == 2
    assert "--chat-template bad.jinja does not work" in done.stderr


def test_a_message_that_the_template_refuses_leaves_the_conversation_as_it_was(
    run: Run, tmp_path: Path
) -> None:
    refusing = "{% if messages[-1].content == 'bad' %}{{ raise_exception('rude') }}{% endif %}"
    source = refusing + DEFAULT_TEMPLATE.source
    (tmp_path / "t.jinja").write_text(source, encoding="utf-8")
    done = run("--chat-template", "t.jinja", stdin="ping\nbad\nwho\n/save s.jsonl\n")
    assert done.returncode == 0
    assert "refuses it: rude" in done.stderr
    saved = json.loads((tmp_path / "s.jsonl").read_text(encoding="utf-8"))
    assert [each["content"] for each in saved["messages"]] == ["ping", "pong", "who", "a model"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--output-file", "a.txt"),
        ("--prompts", "a"),
        ("--prompts-file", "a.txt"),
        ("--beams", "2"),
        ("--num-return-sequences", "2"),
    ],
)
def test_flags_that_contradict_a_conversation(run: Run, flags: tuple[str, ...]) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert f"--chat and {flags[0]}: give one of them" in done.stderr


def test_flags_of_a_conversation_without_one(run: Run) -> None:
    flags = ("--no-chat", "--system-prompt", "S", "--chat-template", "absent", "--prompts", "x")
    done = run(*flags)
    assert done.returncode == 0
    assert "--system-prompt is not used: it belongs to a conversation: give --chat" in done.stderr
    assert "--chat-template is not used" in done.stderr


def test_stop_ids_end_a_completion(model: DecoderOnlyTransformer) -> None:
    """The text up to the first of them, with the same random numbers as without."""
    byte = load_tokenizer("byte")
    model.eval()
    ids, config = list(b"User: tell\nAssistant:"), SamplingConfig(max_new_tokens=20, temperature=0)
    [whole] = generate_ids(model, [ids], config, byte)
    assert bytes(whole[:-1]) == b" no\nnever"
    assert "".join(stream_ids(model, byte, ids, config)) == " no\nnever"
    for stops, reason in ((b"n", "end"), (b"v", "end"), (b"", "length")):
        ended: list[Any] = []
        note = functools.partial(_note, ended)
        end = byte.end_of_text_id
        ends = frozenset([*stops, end]) if stops else frozenset[int]()
        text = "".join(stream_ids(model, byte, ids, config, note, 0, ends))
        [(_, generation)] = ended
        assert generation.finish_reason == reason
        if stops:
            assert text == " no\nnever".partition(stops.decode())[0]
            assert generation.tokens == tuple(whole[: len(text) + 1])
        else:
            assert generation.n_tokens == 20


def test_a_special_token_is_generated_only_where_it_ends_the_text() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    specials = {"<|endoftext|>": 256, "<|im_end|>": 257, "<|im_start|>": 258}
    encoding = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=ranks, special_tokens=specials)
    tokenizer = TiktokenTokenizer(encoding)
    torch.manual_seed(2)
    untrained = DecoderOnlyTransformer(dataclasses.replace(MODEL, vocab_size=259)).eval()
    config = SamplingConfig(max_new_tokens=2000, temperature=1e6, top_k=0)
    for stops in ({257}, {257, 258}, {256}):
        ended: list[Any] = []
        note = functools.partial(_note, ended)
        list(stream_ids(untrained, tokenizer, [0], config, note, 0, frozenset(stops)))
        [(_, generation)] = ended
        assert generation.finish_reason == "end"
        assert generation.tokens[-1] in stops
        assert not set(generation.tokens[:-1]) & ({257, 258} | stops)


def _note(ended: list[Any], newly: list[Any], n_tokens: int) -> None:
    ended.extend(newly)


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = iter([[" no", "\nne"], []])

    def stop(*arguments: Any) -> Iterator[str]:
        yield from next(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_ids", stop)
    done = run(stdin="tell\nwho\n/save s.jsonl\n")
    assert done.returncode == 0
    assert done.stdout == "no\nne\n\n"
    assert done.stderr.count("stopped") == 2
    saved = json.loads((tmp_path / "s.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [each["content"] for each in saved] == ["tell", "no\nne"]


@pytest.fixture
def terminal(output_dir: Path, tmp_path: Path) -> Iterator[Terminal]:
    flags = ["--generate", "--chat", "--output-dir", str(output_dir), "--device", "cpu", *GREEDY]
    screen = Terminal([str(ROOT / "main.py"), *flags], tmp_path)
    yield screen
    screen.close()


def test_on_a_terminal(terminal: Terminal) -> None:
    terminal.read_until(b"/help lists the commands")
    terminal.read_until(b"> ")
    terminal.write(b"ping\n")
    assert b"pong\r\n" in terminal.read_until(b"6 tokens")
    terminal.read_until(b"> ")
    terminal.write(b"/help\n")
    terminal.read_until(b"/retry")
    terminal.read_until(b"> ")
    terminal.write(b"who\n")
    terminal.read_until(b"a model\r\n")
    terminal.read_until(b"> ")
    terminal.write(b"\x04")
    assert terminal.wait() == 0
