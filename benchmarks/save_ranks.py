"""A checkpoint that all ranks write together, beside one that is gathered to rank 0, in turns.

    python benchmarks/save_ranks.py                    (41.5 M parameters with Adam; 1, 2, 4 ranks)
    python benchmarks/save_ranks.py --folder /mnt/disk (where to write; by default the system's)
    python benchmarks/save_ranks.py --smoke            (a tiny model; seconds)

The ranks are processes of this machine that gloo joins. To gather is what others do: each tensor
whole on every rank (`full_tensor`), kept by rank 0, which saves as one process does. Both write the
same files with the same hashes, and read them back. Given are the medians of seconds and of the
ranks' CPU seconds, and of the resident memory (Linux) how much any rank's peak is above what it
held before, the most of all rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import print_rows  # noqa: E402

from preflight.checkpoints.hashing import CHUNK_BYTES  # noqa: E402
from preflight.checkpoints.saving import save_checkpoint  # noqa: E402
from preflight.device.host_memory import peak_resident_bytes, release_freed_memory  # noqa: E402
from preflight.device.ranks import JoinedRanks, Ranks  # noqa: E402
from preflight.models.building import build_model  # noqa: E402
from preflight.settings import ModelConfig, model_config_to_dict  # noqa: E402
from preflight.training.optimizer_state import list_optimizer_tensors  # noqa: E402

SHAPE = ModelConfig(7_000, 256, 512, 8, 12, 2048)
SMOKE_SHAPE = ModelConfig(97, 16, 8, 2, 2, 12)
_COLUMNS = ("seconds", "cpu", "rise")


class Saving:
    """One rank with its part of a model and of its optimizer's state."""

    def __init__(self, ranks: Ranks, shape: ModelConfig, folder: Path) -> None:
        torch.manual_seed(0)
        self.ranks, self.folder = ranks, folder
        self.model = build_model(shape)
        ranks.shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.config = {
            "model": model_config_to_dict(shape),
            "tokenizer": {"name": "gpt2", "fingerprint": "f" * 64},
        }
        self.digests: dict[str, str] = {}

    def save_together(self) -> None:
        """Each rank writes what it holds."""
        self._save(self._list_tensors(), self.ranks)

    def save_gathered(self) -> None:
        """Rank 0 gets every tensor whole, and writes all."""
        whole: list[dict[str, torch.Tensor]] = []
        for tensors in self._list_tensors():
            gathered = {}
            for name, tensor in tensors.items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                if self.ranks.is_first:
                    gathered[name] = full
            whole.append(gathered)
        if self.ranks.is_first:
            self._save(whole, Ranks())

    def _list_tensors(self) -> list[dict[str, torch.Tensor]]:
        moments = list_optimizer_tensors(self.model, self.optimizer)
        return [dict(self.model.state_dict()), moments]

    def _save(self, tensors: list[dict[str, torch.Tensor]], ranks: Ranks) -> None:
        weights, moments = tensors
        saved = save_checkpoint(
            self.folder, 1, weights, {}, self.config, {}, optimizer=moments, ranks=ranks
        )
        self.digests = {name: entry.sha256 for name, entry in saved.manifest.files.items()}

    def measure(self, act: Callable[[], None]) -> dict[str, float]:
        """Of one save: seconds, CPU seconds of all ranks, and the rise of one rank's memory."""
        self.ranks.decide(lambda: shutil.rmtree(self.folder / "milestones", ignore_errors=True))
        release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak: proc_pid_clear_refs(5)
        before = peak_resident_bytes()
        self.ranks.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        act()
        cpu = self.ranks.add(time.process_time() - began_cpu)
        seconds = time.perf_counter() - began
        rise = max(self.ranks.gather(peak_resident_bytes() - before))
        return {"seconds": seconds, "cpu": cpu, "rise": rise / 2**20}


def work(rank: int, world: int, store: str, folder: str, shape: ModelConfig, repeats: int) -> None:
    """One rank: both ways in turns. Rank 0 writes what it found to ``results.json``."""
    torch.set_num_threads(1)
    ranks = Ranks()
    if world > 1:
        ranks = JoinedRanks(torch.distributed.FileStore(store, world), rank, world)
    saving = Saving(ranks, shape, Path(folder))
    ways = {"together": saving.save_together, "gathered": saving.save_gathered}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    digests = []
    for number in range(1 + repeats):
        for name, act in ways.items():
            row = saving.measure(act)
            digests.append(saving.digests)
            if number:  # the first of each warms up
                rows[name].append(row)
    if ranks.is_first:
        assert digests.count(digests[0]) == len(digests), "the two ways wrote other files"
        Path(folder, "results.json").write_text(json.dumps(rows))
    ranks.close()


def compare(world: int, parent: str | None, shape: ModelConfig, repeats: int) -> dict[str, Any]:
    """Medians, and the largest rise, of both ways with so many ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=parent, prefix="save-ranks-") as folder:
        store = str(Path(folder) / "store")
        arguments = (world, store, folder, shape, repeats)
        processes = [context.Process(target=work, args=(r, *arguments)) for r in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed")
        found = json.loads(Path(folder, "results.json").read_text())
    medians = {
        name: {c: [row[c] for row in rows] for c in _COLUMNS} for name, rows in found.items()
    }
    return {
        name: {c: max(v) if c == "rise" else statistics.median(v) for c, v in columns.items()}
        for name, columns in medians.items()
    }


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to write; unset: the system's temporary folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    flags = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shape = SMOKE_SHAPE if flags.smoke else SHAPE
    n_parameters = sum(p.numel() for p in build_model(shape).parameters())
    state_mib = 12 * n_parameters / 2**20  # weights and two moments in fp32
    print(f"{n_parameters:,} parameters, {state_mib:.0f} MiB; chunks of {CHUNK_BYTES >> 20} MiB")
    rows: list[tuple[str, Any, str]] = []
    for world in [2] if flags.smoke else flags.ranks:
        found = compare(world, flags.folder, shape, 1 if flags.smoke else flags.repeats)
        for name, columns in found.items():
            rows.append((f"{world} ranks, {name}: seconds", columns["seconds"], ""))
            rows.append((f"{world} ranks, {name}: CPU seconds of all", columns["cpu"], ""))
            rows.append((f"{world} ranks, {name}: most memory of a rank, MiB", columns["rise"], ""))
        together, gathered = found["together"], found["gathered"]
        goal = "<= 0.5" if world > 1 else ""
        rows.append((f"{world} ranks: seconds", together["seconds"] / gathered["seconds"], goal))
        rows.append((f"{world} ranks: CPU seconds", together["cpu"] / gathered["cpu"], ""))
        rows.append(
            (f"{world} ranks: memory, % of the state", 100 * together["rise"] / state_mib, "<= 5")
        )
    print_rows(rows)
    print(json.dumps({"rows": [{"name": name, "value": value} for name, value, _ in rows]}))


if __name__ == "__main__":
    main()
