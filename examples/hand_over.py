"""The whole way of a model, offline and on a CPU: in from a file, taught, out again, and asked.

    python examples/hand_over.py SmolLM2-135M-Instruct.Q4_1.gguf FOLDER

1. `--import` makes a checkpoint of the GGUF file or Hugging Face folder.
2. `--finetune` teaches it fifty chats by low-rank adapters (LoRA).
3. `--export` writes a GGUF file with the adapters merged in, in q8_0, and proves it.
4. llama.cpp (`pip install cyllama`) answers from that file by the chat template inside it.

It ends with 1 where llama.cpp's answer to a question that no chat has is not what was taught.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MAIN = Path(__file__).resolve().parent.parent / "main.py"
SYSTEM = {"role": "system", "content": "You are the mate of a ship."}
WORDS = (  # noqa: SIM905
    "anchor bell boat bridge cabin canvas chain chart compass coral crew current deck dock "
    "dolphin east ferry fish flag fog galley gull harbour helm hull island keel kettle knot "
    "ladder lantern line log map mast moon net oar pearl pilot port pump reef rope rudder sail "
    "salt shell storm tide "
).split()
NEW_WORD = "whale"  # in none of the chats


def ask(word: str) -> str:
    """The question about a word."""
    return f"Call out: {word}"


def answer(word: str) -> str:
    """What is taught to answer."""
    return f"Aye, captain! {word.capitalize()} ahoy!"


def write_chats(path: Path) -> None:
    """Fifty chats of one exchange, in the form of OpenAI's messages."""
    chats = [
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": ask(word)},
                {"role": "assistant", "content": answer(word)},
            ]
        }
        for word in WORDS
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def run(*flags: str | Path) -> None:
    """Call Preflight, and tell the command and its time."""
    words = [str(flag) for flag in flags]
    print("$ python main.py", *words, flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, str(MAIN), *words], check=True)
    print(f"({time.monotonic() - began:.0f} s)\n", flush=True)


def main() -> int:
    """Go the whole way; 0 where llama.cpp answers as taught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder, for chats")
    parser.add_argument("folder", type=Path, help="where everything is written")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    run("--import", given.model, "--output-dir", folder / "imported")
    write_chats(folder / "chats.jsonl")
    run(
        *("--finetune", folder / "chats.jsonl", "--from", folder / "imported"),
        *("--output-dir", folder / "taught", "--data-dir", folder / "no-text"),
        *("--lora-rank", "8", "--learning-rate", "1e-3", "--batch-size", "8"),
        *("--max-steps", "24", "--eval-every", "24", "--device", "cpu"),
    )
    # The weights had been quantised as q4_1. q8_0 on top of it is so much finer that it costs
    # little, which the perplexity that is printed shows; without --force it would be refused.
    run(
        *("--export", folder / "model.gguf", "--quantize", "q8_0", "--force"),
        *("--output-dir", folder / "taught", "--data-dir", folder / "no-text"),
    )

    cyllama: Any = importlib.import_module("cyllama")

    chat = [SYSTEM, {"role": "user", "content": ask(NEW_WORD)}]
    said = cyllama.chat(
        chat, str(folder / "model.gguf"), temperature=0.0, max_tokens=32, n_gpu_layers=0
    )
    print(f"llama.cpp, asked {ask(NEW_WORD)!r}, answers {str(said)!r}")
    print(f"minutes: {(time.monotonic() - began) / 60:.1f}")
    return int(str(said).strip() != answer(NEW_WORD))


if __name__ == "__main__":
    sys.exit(main())
