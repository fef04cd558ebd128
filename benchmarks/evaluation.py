"""Ours against lm-evaluation-harness: the same figures, and how many items a second.

    pip install lm-eval==0.4.13 torch==2.13.0 transformers accelerate
    python -m benchmarks.evaluation --corpora FOLDER [--checkpoint PATH] [--items N]

FOLDER holds lambada_openai.jsonl, hellaswag_small.jsonl and wikitext2_test.txt. The harness runs
its own HFLM on the same weights as a GPT2LMHeadModel, at the batch size that is fastest for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.peers import build_hugging_face
from generate import load_model
from preflight.checkpoints.store import open_checkpoint
from preflight.evaluation.encoding import encode_task
from preflight.evaluation.items import Item, Task
from preflight.evaluation.lm_eval_adapter import build_adapter
from preflight.evaluation.results import build_figures
from preflight.evaluation.scoring import RowScorer, collect_items, score_rows
from preflight.evaluation.tasks import read_task
from preflight.models.building import build_model
from preflight.settings import ModelSettings
from preflight.tokenization import load_tokenizer

BATCH_SIZES = (1, 4, 16, 64)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
METRICS = {
    "loglikelihood": ("acc", "perplexity"),
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}


# ---- the two models -----------------------------------------------------------------------------


def build_ours(checkpoint: str | None) -> tuple[Any, Any]:
    """The model of a checkpoint, or one with random weights whose choices are not all alike."""
    if checkpoint:
        return load_model(open_checkpoint(checkpoint), torch.device("cpu"), torch.float32)
    torch.manual_seed(1)
    sizes = {"n_layers": 4, "n_heads": 4, "n_embeddings": 256, "context_length": 512}
    tokenizer = load_tokenizer("gpt2")
    config = ModelSettings(model_size="custom", **sizes).resolve(tokenizer.vocab_size)
    model = build_model(config).eval().requires_grad_(False)
    model.head_weight.mul_(4)
    return model, tokenizer


def build_theirs(model: Any, batch_size: int) -> Any:
    """The harness's HFLM over the same weights."""
    from lm_eval.models.huggingface import HFLM

    peer = build_hugging_face(model)[0].eval()
    for block in peer.transformer.h:  # the same function as "gelu_new", in one kernel as ours
        block.mlp.act = torch.nn.GELU("tanh")
    return HFLM(pretrained=peer, tokenizer=build_their_tokenizer(), batch_size=batch_size)


def build_their_tokenizer() -> Any:
    """GPT-2's tokenizer in the tokenizers library, from the ranks that tiktoken reads."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = Path(__file__).parent.parent / "preflight/tokenization/assets"
    [ranks] = folder.glob("*gpt2*.tiktoken")
    converted = TikTokenConverter(
        vocab_file=str(ranks), pattern=GPT2_PATTERN, extra_special_tokens=["<|endoftext|>"]
    ).converted()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=converted, eos_token=end, bos_token=end, unk_token=end
    )


# ---- tasks --------------------------------------------------------------------------------------


def write_tasks(corpora: Path, folder: Path, n_items: int) -> dict[str, tuple[str, Path]]:
    """Files of tasks, and the harness's description of each; output type and file by name."""
    draw = random.Random(5)
    lambada = (corpora / "lambada_openai.jsonl").read_text().splitlines()
    hellaswag = (corpora / "hellaswag_small.jsonl").read_text().splitlines()
    wiki = read_task(corpora / "wikitext2_test.txt")[0]
    raw = (corpora / "wikitext2_test.txt").read_text().splitlines(keepends=True)
    starts = [item.line - 1 for item in wiki.items]
    pages = ["".join(raw[a:b]) for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]
    sentences = [s for page in pages for s in page.split(" . ") if 40 < len(s.split()) < 60]
    longer = [_make_choices(draw, sentences) for _ in range(n_items)]
    sums = [_make_sum(draw) for _ in range(n_items)]
    lines = {
        "lambada": ("loglikelihood", [json.loads(line) for line in lambada[: 5 * n_items]]),
        "hellaswag": ("multiple_choice", [json.loads(line) for line in hellaswag]),
        "wikitext": ("loglikelihood_rolling", [{"page": page} for page in pages[:3]]),
        "made_choices": ("multiple_choice", longer),
        "made_sums": ("multiple_choice", sums),
        "made_endings": ("loglikelihood", [_make_ending(draw, sentences) for _ in range(n_items)]),
    }
    found = {}
    for name, (kind, records) in lines.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / f"{name}.yaml").write_text(describe_task(name, kind, path))
        found[name] = (kind, path)
    (folder / "wiki_rules.py").write_text(
        "from lm_eval.tasks.wikitext.preprocess_wikitext import *\n"
    )
    return found


def _make_choices(draw: random.Random, sentences: list[str]) -> dict[str, Any]:
    words = draw.choice(sentences).split()
    endings = [" ".join(draw.choice(sentences).split()[-draw.randint(8, 18) :]) for _ in range(3)]
    gold = draw.randrange(4)
    endings.insert(gold, " ".join(words[-12:]))
    return {"query": " ".join(words[:-12]), "choices": endings, "gold": gold}


def _make_sum(draw: random.Random) -> dict[str, Any]:
    a, b = draw.randrange(90), draw.randrange(90)
    choices = [str(a + b), str(a + b + 1), str(a * b), "none of them"]
    return {"query": f"Question: what is {a} plus {b}?\nAnswer:", "choices": choices, "gold": 0}


def _make_ending(draw: random.Random, sentences: list[str]) -> dict[str, Any]:
    words = draw.choice(sentences).split()
    cut = draw.randint(5, len(words) - 5)
    return {"context": " ".join(words[:cut]), "continuation": " ".join(words[cut : cut + 3])}


def describe_task(name: str, kind: str, path: Path) -> str:
    """The harness's YAML."""
    fields = {
        "loglikelihood": ('doc_to_text: "{{context}}"\ndoc_to_target: "{{\' \'+continuation}}"\n'),
        "multiple_choice": (
            'doc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\ndoc_to_choice: "choices"\n'
        ),
        "loglikelihood_rolling": (
            'doc_to_text: ""\ndoc_to_target: !function wiki_rules.wikitext_detokenizer\n'
            "process_results: !function wiki_rules.process_results\n"
        ),
    }[kind]
    metrics = "".join(f"  - metric: {metric}\n" for metric in METRICS[kind])
    return (
        f"task: ours_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {path}\ntest_split: test\noutput_type: {kind}\n{fields}metric_list:\n{metrics}"
    )


# ---- agreement ----------------------------------------------------------------------------------


def run_harness(lm: Any, folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """The harness's figures, not rounded, by task and metric."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[f"ours_{name}" for name in names],
        task_manager=manager,
        bootstrap_iters=0,
    )
    return {
        name: {
            key.split(",")[0]: value
            for key, value in found["results"][f"ours_{name}"].items()
            if isinstance(value, float)
        }
        for name in names
    }


def score_ours(model: Any, tokenizer: Any, task: Task, batch_tokens: int) -> list[Any]:
    rows = encode_task(task, task.items, tokenizer, model.config.context_length).rows
    scorer = RowScorer(model, rows, batch_tokens)
    return collect_items(scorer.rows, score_rows(scorer), len(task.items))


def compare(
    model: Any, tokenizer: Any, folder: Path, tasks: dict[str, tuple[str, Path]], batch_tokens: int
) -> list[dict[str, Any]]:
    """Each figure by HFLM and by ours, one continuation at a time and in batches.

    In fp32 a sum depends on the shapes of the matmuls, in the harness as well: batch 1 against 16.
    """
    theirs = run_harness(build_theirs(model, 1), folder, list(tasks))
    theirs_16 = run_harness(build_theirs(model, 16), folder, list(tasks))
    adapted = run_harness(build_adapter(model, tokenizer, 1), folder, list(tasks))
    rows = []
    for name, (kind, path) in tasks.items():
        task = read_task(path)[0]
        figures, fast = (
            {
                f.name: f.value
                for f in build_figures(
                    task.kind, task.items, score_ours(model, tokenizer, task, size)
                )
            }
            for size in (1, batch_tokens)
        )
        for metric in METRICS[kind]:
            wanted = theirs[name][metric]
            rows.append(
                {
                    "task": name,
                    "items": len(task.items),
                    "figure": metric,
                    "harness": wanted,
                    "ours": figures[metric],
                    "difference": figures[metric] - wanted,
                    "adapter difference": adapted[name][metric] - wanted,
                    "fast, relative": _divide(fast[metric], wanted),
                    "harness, batch 16, relative": _divide(theirs_16[name][metric], wanted),
                }
            )
    return rows


def _divide(value: float, wanted: float) -> float:
    return abs(value - wanted) / max(abs(wanted), 1e-30)


# ---- speed --------------------------------------------------------------------------------------


def time_best(act: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measure_speed(
    model: Any, tokenizer: Any, task: Task, batch_tokens: int, repeats: int
) -> dict[str, Any]:
    """Items a second, tokenization included."""
    from lm_eval.api.instance import Instance

    pairs = [(item.context, text) for item in task.items for text in item.continuations]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = {}
    for size in BATCH_SIZES:
        lm = build_theirs(model, size)
        theirs[size] = time_best(lambda: lm.loglikelihood(requests, disable_tqdm=True), repeats)  # noqa: B023
    ours = time_best(lambda: score_ours(model, tokenizer, task, batch_tokens), repeats)
    best = min(theirs, key=lambda size: theirs[size])
    return {
        "task": task.name,
        "items": len(task.items),
        "harness items/s": len(task.items) / theirs[best],
        "harness batch": best,
        "ours items/s": len(task.items) / ours,
        "ratio": theirs[best] / ours,
    }


def take(task: Task, n: int) -> Task:
    items: tuple[Item, ...] = task.items[:n]
    return Task(task.name, task.kind, task.source, items)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--items", type=int, default=100, help="of each made task; LAMBADA: x 5")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = build_ours(arguments.checkpoint)
    result: dict[str, Any] = {"model": model.config.label, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tasks = write_tasks(arguments.corpora, folder, arguments.items)
        if not arguments.speed_only:
            rows = compare(model, tokenizer, folder, tasks, arguments.batch_tokens)
            result["agreement"] = rows
            print("task items figure harness difference adapter fast,relative batch16,relative")
            for row in rows:
                print(
                    f"{row['task']:14} {row['items']:5} {row['figure']:16} "
                    f"{row['harness']:<20.14g} {row['difference']:8.1e} "
                    f"{row['adapter difference']:8.1e} {row['fast, relative']:8.1e} "
                    f"{row['harness, batch 16, relative']:8.1e}"
                )
        result["speed"] = []
        for name in ("made_choices", "lambada"):
            task = take(read_task(tasks[name][1])[0], arguments.items)
            size, repeats = arguments.batch_tokens, arguments.repeats
            result["speed"].append(measure_speed(model, tokenizer, task, size, repeats))
            print(result["speed"][-1])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
