"""A server with two fake models, the first of which answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.fake_store import FakeModel, FakeStore, serve


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel("fox")


@pytest.fixture(scope="module")
def url(model: FakeModel) -> Iterator[str]:
    with serve(FakeStore(model, FakeModel("owl"))) as url:
        yield url
