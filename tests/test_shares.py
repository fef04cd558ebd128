"""The samples of several ranks together are those of one process, each once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import build_trainer
from token_folders import make_folder

from preflight.corpus.shards import DataFolder
from preflight.device.ranks import Ranks, plan_ranks
from preflight.models.loss import count_targets
from preflight.settings import TrainingSettings
from preflight.training.sharing import count_micro_steps
from train_utils import BatchLoader, Shares, iterate_windows, split_update

SAMPLES = 10  # of an update


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Tokens of which no two are alike, 67 windows of 16."""
    return make_folder(tmp_path_factory.mktemp("data") / "folder", [700, 380])


def build_rank(rank: int, world: int) -> Ranks:
    ranks = plan_ranks(world)
    ranks.rank = rank
    return ranks


def read_updates(
    data: DataFolder, world: int, cursor: int, n_updates: int, **values: bool
) -> tuple[list[set[int]], int]:
    """The first tokens of the windows of each update, from all ranks; and the cursor behind."""
    training = TrainingSettings(batch_size=2)
    sizes = split_update(SAMPLES, count_micro_steps(SAMPLES, training, world))
    updates: list[list[int]] = [[] for _ in range(n_updates)]
    cursors = set()
    for rank in range(world):
        with BatchLoader(
            data,
            "train",
            batch_size=2,
            context_length=16,
            seed=1,
            device="cpu",
            cursor=cursor,
            shares=Shares(sizes, build_rank(rank, world)),
            **values,
        ) as loader:
            for update in updates:
                for _ in sizes:
                    inputs, targets = loader.next_batch()
                    assert len(inputs) <= 2
                    if int(count_targets(targets)):
                        update += inputs[:, 0].tolist()
            cursors.add(loader.cursor)
    assert all(len(update) == len(set(update)) == SAMPLES for update in updates)
    assert len(cursors) == 1
    return [set(update) for update in updates], cursors.pop()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("worlds", [(1,), (2,), (3,), (4,), (7,), (2, 3, 1, 4)], ids=str)
def test_the_updates_are_those_of_one_process(
    data: DataFolder, worlds: tuple[int, ...], on_device: bool
) -> None:
    """Over the end of an epoch, and where the number of ranks changes."""
    expected, _ = read_updates(data, 1, 0, 12)
    found, cursor = [], 0
    for world in worlds:
        updates, cursor = read_updates(data, world, cursor, 12 // len(worlds), on_device=on_device)
        found += updates
    assert found == expected
    assert cursor == 120


@given(st.integers(1, 9), st.integers(0, 200))
def test_shares_cover_the_rows_and_differ_by_at_most_one(world: int, n_rows: int) -> None:
    shares = [build_rank(rank, world).share(n_rows) for rank in range(world)]
    assert [row for share in shares for row in range(n_rows)[share]] == list(range(n_rows))
    counts = [share.stop - share.start for share in shares]
    assert max(counts) - min(counts) <= 1


@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 9))
def test_no_rank_has_more_than_its_batch(n_samples: int, batch_size: int, world: int) -> None:
    n_micro_steps = count_micro_steps(n_samples, TrainingSettings(batch_size=batch_size), world)
    sizes = split_update(n_samples, n_micro_steps)
    assert sum(sizes) == n_samples
    assert -(-max(sizes) // world) <= batch_size
    assert (n_micro_steps - 1) * world * batch_size < n_samples


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_validation_windows_are_shared_out_in_as_many_batches(data: DataFolder, world: int) -> None:
    read, counts = [], set()
    for rank in range(world):
        batches = list(
            iterate_windows(
                data,
                "val",
                batch_size=2,
                context_length=16,
                n_windows=11,
                device="cpu",
                ranks=build_rank(rank, world),
            )
        )
        counts.add(len(batches))
        read += [
            t for i, targets in batches if int(count_targets(targets)) for t in i[:, 0].tolist()
        ]
    assert len(counts) == 1
    assert len(read) == len(set(read)) == 11


def test_the_batch_of_an_empty_share_has_no_loss_and_no_gradient(data: DataFolder) -> None:
    with BatchLoader(
        data,
        "train",
        batch_size=1,
        context_length=16,
        seed=1,
        device="cpu",
        shares=Shares([1], build_rank(0, 2)),
    ) as loader:
        inputs, targets = loader.next_batch()
    model = build_trainer().model
    loss = model(inputs, targets)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in model.parameters())
