"""The loader alone, measured: tokens a second from memory-mapped shards and from device memory.

    python benchmarks/loader.py            (on the GPU, where there is one; half a minute)
    python benchmarks/loader.py --smoke    (small, on the CPU)

Both give the same batches. `--data-on-gpu auto` keeps the tokens on a GPU where they are few; this
says what that gains.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.prepare import gather_text  # noqa: E402
from preflight.corpus.build import prepare_data  # noqa: E402
from preflight.corpus.shards import DataFolder  # noqa: E402
from preflight.settings import DataSettings  # noqa: E402
from preflight.tokenization import load_tokenizer  # noqa: E402
from train_utils import BatchLoader  # noqa: E402

SHAPES = ((8, 1024), (8, 256))  # batch size, context length


def measure(
    data: DataFolder, shape: tuple[int, int], device: str, seconds: float, *, on_device: bool
) -> float:
    """Tokens a second."""
    batch_size, context = shape
    with BatchLoader(
        data,
        "train",
        batch_size=batch_size,
        context_length=context,
        seed=1,
        device=device,
        on_device=on_device,
    ) as loader:
        loader.next_batch()
        began, n_tokens = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(50):
                n_tokens += loader.next_batch()[0].numel()
            if device == "cuda":
                torch.cuda.synchronize()
        return n_tokens / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not given.smoke else "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        gather_text(text, 2 * 10**6 if given.smoke else 12 * 10**6)
        settings = DataSettings(text_file=(str(text),), data_dir=str(Path(folder) / "data"))
        data = prepare_data(settings, load_tokenizer("gpt2"))
        for shape in SHAPES:
            for on_device in (False, True):
                rate = measure(data, shape, device, 0.3 if given.smoke else 5, on_device=on_device)
                place = f"in memory of {device}" if on_device else "memory-mapped"
                rows.append({"shape": shape, "place": place, "tokens_per_second": rate})
                print(
                    f"batch {shape[0]}, context {shape[1]:,}, {place:18} "
                    f"{rate / 1e6:8.1f} M tokens/s",
                    flush=True,
                )
    print(json.dumps({"device": device, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
