"""`--tokenize` and `--detokenize`: pieces, ids and counts, and whose tokenizer they are of."""

from __future__ import annotations

import io
import itertools
import re
import sys
from pathlib import Path

import pytest
from checkpoints.samples import CONFIG, make_weights
from tokenization.fakes import PlainText
from tokenization.library_files import read_library_file

import main
from preflight.checkpoints.saving import save_checkpoint
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer, TokenizerRecipe, load_tokenizer

Said = pytest.CaptureFixture[str]
SOME = "Hi caf\u00e9 \U0001f600 a|b\\\n"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save_model(tokenizer: Tokenizer, step: int = 1, output_dir: str = "training_output") -> Path:
    """A checkpoint with this tokenizer, whose weights nothing looks at."""
    Path(output_dir).mkdir(exist_ok=True)
    config = CONFIG | {"tokenizer": tokenizer.describe()}
    weights = make_weights(1)
    return save_checkpoint(Path(output_dir), step, weights, {}, config, {}, tokenizer).path


def save_data(tokenizer: Tokenizer) -> None:
    Path("text.txt").write_text("a few words, again and again. " * 200)
    prepare_data(DataSettings(text_file=("text.txt",), data_dir="data"), tokenizer, n_workers=0)


def show(said: Said, *argv: str) -> tuple[dict[str, str], str]:
    """What stdout says, by the first word of each line, and what stderr says."""
    assert main.main(list(argv)) == 0
    out, err = said.readouterr()
    return dict(re.split(r" +", line, maxsplit=1) for line in out.splitlines()), err


def refuse(said: Said, code: int, *argv: str) -> str:
    assert main.main(list(argv)) == code
    out, err = said.readouterr()
    assert out == ""
    assert 1 <= len(err.splitlines()) <= 5
    return err


def test_pieces_ids_and_counts(capsys: Said) -> None:
    shown, told = show(capsys, "--tokenize", SOME)
    ids = load_tokenizer("gpt2").encode(SOME).tolist()
    assert shown == {
        "pieces": r"Hi| café| \xf0\x9f\x98|\x80| a|\||b|\\|\n",
        "ids": ",".join(map(str, ids)),
        "tokens": f"{len(ids)} (19 bytes, {19 / len(ids):.2f} bytes per token)",
    }
    assert told == (
        "tokenizer gpt2, 50,257 ids: since there is no checkpoint in training_output and no data "
        "folder data\n"
    )
    back, _ = show(capsys, "--detokenize", shown["ids"])
    assert back == {"text": r"Hi café 😀 a|b\\\n"} | shown
    ended, _ = show(capsys, "--detokenize", " 50256 , 220,220")
    assert ended["pieces"] == "<end of text>| | "
    assert ended["tokens"] == "3 (2 bytes, 0.67 bytes per token)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    def show_on_terminal() -> list[str]:
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert main.main(["--tokenize", "ab|c\x1b", "--tokenizer", "byte"]) == 0
        return sys.stdout.getvalue().splitlines()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces, ids, _ = show_on_terminal()
    found = [re.findall(r"\x1b\[30;(\d+)m(.*?)\x1b\[0m", line) for line in (pieces, ids)]
    assert [text for _, text in found[0]] == ["a", "b", "|", "c", r"\x1b"]
    assert [text for _, text in found[1]] == ["97", "98", "124", "99", "27"]
    colours = [colour for colour, _ in found[0]]
    assert [colour for colour, _ in found[1]] == colours  # a piece has the colour of its id
    assert all(one != other for one, other in itertools.pairwise(colours))
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_on_terminal()[0] == r"pieces  a|b|\||c|\x1b"


def test_whose_tokenizer_it_is(capsys: Said) -> None:
    def find(*flags: str) -> str:
        told = show(capsys, "--tokenize", "abc", *flags)[1].splitlines()
        return told[-1].removeprefix("tokenizer ")

    assert find("--tokenizer", "byte") == "byte, 257 ids: by its name"
    save_data(TokenizerRecipe("char").make(PlainText("abc few words, again and again.")))
    assert re.fullmatch(r"char, \d+ ids: that of data", find())
    save_model(load_tokenizer("byte"), 1)
    newest = save_model(TokenizerRecipe("bpe", 260).make(PlainText("abcabc " * 9)), 2)
    in_output = f"bpe, 260 ids: that of {newest}"
    assert find() == find("--tokenizer", "bpe") == find("--tokenizer", "auto") == in_output
    other = save_model(load_tokenizer("byte"), 3, "elsewhere")
    assert find("--checkpoint-path", str(other)) == f"byte, 257 ids: that of {other}"
    assert find("--output-dir", "elsewhere") == f"byte, 257 ids: that of {other}"
    # One that is asked for passes over what is there.
    assert find("--tokenizer", "gpt2") == "gpt2, 50,257 ids: by its name"
    assert re.fullmatch(r"char, \d+ ids: that of data", find("--tokenizer", "char"))
    Path("own.json").write_bytes(read_library_file("gpt2.json"))
    assert find("--tokenizer", "own.json") == "own.json, 600 ids: by its name"
    told = refuse(
        capsys, 5, "--tokenize", "x", "--checkpoint-path", str(other), "--tokenizer", "gpt2"
    )
    assert "has tokenizer byte, not gpt2" in told


def test_unknown_characters_are_refused_or_replaced(capsys: Said) -> None:
    save_model(TokenizerRecipe("char").make(PlainText("abc ?")))
    assert "U+0078" in refuse(capsys, 3, "--tokenize", "axb")
    shown, _ = show(capsys, "--tokenize", "axb", "--replace-unknown")
    assert shown["pieces"] == "a|?|b"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--detokenize", "1,,2"], "token ids with commas between them, such as 1,2,3"),
        (["--detokenize", ""], "token ids"),
        (["--detokenize", "1,2,"], "token ids"),
        (["--detokenize", "1;2"], "token ids"),
        (["--detokenize", "\u0661"], "token ids"),
        (["--detokenize=-1"], "token ids"),
        (["--detokenize", "9" * 5000], "token ids"),
        (["--detokenize", "3,50257"], "50257 is no id of tokenizer gpt2, whose ids go from 0 to"),
        (["--tokenize", ""], "takes a text, or - for stdin"),
        (["--tokenize", "a\udcffb"], "must be UTF-8 text"),
        (["--tokenize", "\ud83d"], "half a surrogate pair"),
        (["--tokenize"], "expected one argument"),
        (["--tokenize", "a", "--detokenize", "1"], "exactly one mode"),
        (["--tokenize", "a", "--tokenizer", "gtp2"], "did you mean gpt2?"),
        (["--tokenize", "a", "--tokenizer", "bpe"], "--tokenizer bpe is made from a text"),
        (["--detokenize", "1", "--tokenizer", "none.json"], "none.json"),
    ],
)
def test_mistakes_are_named(argv: list[str], words: str, capsys: Said) -> None:
    assert words in refuse(capsys, 2, *argv)


def test_a_text_from_a_pipe(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    pipe(b"two\r\nlines\n")
    shown, _ = show(capsys, "--tokenize", "-")
    assert shown["pieces"] == r"two|\r|\n|lines|\n"
    for content, words in (
        (b"", "0 bytes"),
        (b"a\xff", "not UTF-8 at byte 1"),
        (b"a" * (2**20 + 1), "1 to 1,048,576"),
    ):
        pipe(content)
        assert words in refuse(capsys, 3, "--tokenize", "-")


def test_a_damaged_place_is_told_and_nothing_takes_its_place(capsys: Said) -> None:
    save_data(load_tokenizer("gpt2"))
    metadata = Path("data/metadata.json")
    metadata.write_bytes(metadata.read_bytes()[:-9])
    assert "metadata.json" in refuse(capsys, 4, "--tokenize", "x")
    path = save_model(load_tokenizer("gpt2"))
    (path / "manifest.json").write_bytes(b"{}")
    assert "manifest.json" in refuse(capsys, 5, "--tokenize", "x")
    path = save_model(load_tokenizer("gpt2"), 2)
    (path / "tokenizer.tiktoken").write_bytes(b"x")
    assert "tokenizer.tiktoken" in refuse(capsys, 5, "--tokenize", "x")
