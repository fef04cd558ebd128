"""`--check` of a run on several ranks: what the report says, and what it warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preflight.device.cards import Link, find_card
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.memory import MemoryOptions, estimate_memory
from preflight.foresight.rank_time import estimate_rank_step
from preflight.modes.check import build_report
from preflight.modes.check_ranks import count_card_seconds, find_fewest_ranks
from preflight.modes.report import Report
from preflight.settings import ModelConfig, TrainingSettings, build_config

SHAPE = ModelConfig(1003, 64, 64, 4, 3, 256)


def check(tmp_path: Path, **flags: Any) -> Report:
    (tmp_path / "text.txt").write_text("all work and no play makes a dull day\n" * 400)
    given = {
        "text_file": str(tmp_path / "text.txt"),
        "tokenizer": "byte",
        "data_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "model_size": "nano",
        "max_steps": 1000,
        "compile_model": False,
    }
    return build_report(build_config(given | flags, {}))


def test_the_report_is_that_of_all_ranks(tmp_path: Path) -> None:
    report = check(tmp_path, target_gpu="H100 SXM", ranks=16, hosts=2, network_gbits=0.1)
    times = report.sections["performance estimation"]
    plan = report.sections["training configuration"]
    assert not report.problems
    assert plan["effective_batch"] == 16 * 8
    assert plan["ranks"] == "16, 8 on each of 2 hosts"
    assert times["tokens_per_second"] == pytest.approx(
        plan["tokens_per_step"] / times["step_seconds"], rel=1e-3
    )
    assert times["step_seconds"] == pytest.approx(
        times["compute_seconds"] + times["of_which_not_hidden_seconds"]
    )
    assert times["bound_by"] == "the network between hosts"
    assert [w.key for w in report.warnings if w.key == "network"] == ["network"]
    memory = report.sections["memory analysis"]
    assert memory["fewest_cards_that_fit"] == 1
    assert memory["gathered_weights_bytes"] > 0
    # With a network so slow, one host is cheaper, though it takes longer.
    seconds = 16 * times["step_seconds"]
    assert times["card_hours"] == pytest.approx(seconds * 1000 / 3600, abs=0.01)
    assert times["cards_with_the_fewest_card_hours"] <= 8
    assert times["fewest_card_hours"] < times["card_hours"]
    # A card fails once in 50,677 hours.
    assert times["hours_between_failures"] == pytest.approx(50_677 / 16, rel=1e-3)


def test_one_host_has_no_network_and_one_rank_no_ranks(tmp_path: Path) -> None:
    eight = check(tmp_path, target_gpu="H100 SXM", ranks=8)
    one = check(tmp_path, target_gpu="H100 SXM")
    assert eight.sections["performance estimation"]["communication_between_hosts_seconds"] == 0
    assert "network" not in {warning.key for warning in eight.warnings}
    assert "compute_seconds" not in one.sections["performance estimation"]
    assert "ranks" not in one.sections["training configuration"]


def test_cards_without_bf16_are_foreseen_in_fp16(tmp_path: Path) -> None:
    """Their run is not refused, and its memory is known."""
    report = check(tmp_path, target_gpu="T4", ranks=2)
    assert not report.problems
    assert report.sections["training configuration"]["precision"] == "float16"
    assert report.sections["memory analysis"]["verdict"] == "fits"


def test_ranks_on_a_cpu_share_its_memory_and_their_time_is_not_guessed(tmp_path: Path) -> None:
    report = check(tmp_path, ranks=2, device="cpu", measure=False)
    memory = report.sections["memory analysis"]
    assert memory["device"] == "cpu, shared by 2 ranks"
    assert "known cards" in report.sections["performance estimation"]["not_known"]


def test_the_fewest_ranks_are_those_of_a_search_from_one() -> None:
    training = TrainingSettings(batch_size=1)
    options = MemoryOptions(torch.bfloat16, "cuda")
    wide = replace(SHAPE, n_embeddings=1024, ffn_hid_dim=4096, vocab_size=32_000)

    def needed(n_ranks: int) -> int:
        sharing = Sharing(n_ranks)
        return estimate_memory(wide, training, replace(options, sharing=sharing)).required_bytes

    for least in (1, 3, 5):
        limit = needed(least) + 2**20
        fewest = find_fewest_ranks(wide, training, options, limit)
        by_hand = next((n for n in range(1, 9) if needed(n) <= limit), None)
        assert fewest == by_hand == least
    assert find_fewest_ranks(wide, training, options, 2**20) is None


def test_the_same_update_by_fewer_cards() -> None:
    """Where nothing is waited for, cards and time make up for each other but for the update."""
    training = TrainingSettings(batch_size=2)
    card = find_card("H100 SXM")
    free = Link("a free link", 1e9, 1.0, 0.0)
    choices: dict[str, Any] = {"card": replace(card, link=free), "network": free}
    choices |= {"dtype": torch.bfloat16}

    def count(world: int, hosts: int, samples: int, fewest: int = 1) -> dict[int, float]:
        sharing = Sharing(world, hosts)
        return count_card_seconds(SHAPE, training, sharing, samples, fewest, **choices)

    found = count(16, 2, 32)
    assert list(found) == [16, 8, 4, 2, 1]
    assert max(found.values()) == pytest.approx(min(found.values()), rel=0.2)
    for n_ranks, hosts in ((16, 2), (8, 1), (1, 1)):
        asked = replace(training, gradient_accumulation_steps=16 // n_ranks)
        step = estimate_rank_step(SHAPE, asked, Sharing(n_ranks, hosts), **choices)
        assert found[n_ranks] == pytest.approx(n_ranks * step.seconds)
    assert list(count(16, 2, 32, fewest=3)) == [16, 8, 4]
    assert list(count(24, 3, 48)) == [24]  # three hosts cannot be halved
    assert list(count(12, 1, 24)) == [12, 6, 3]
    assert list(count(8, 1, 18)) == [8]  # nine micro-batches are shared evenly by no half
