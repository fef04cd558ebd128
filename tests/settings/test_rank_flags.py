"""The flags of a run on several processes: what is refused, and which modes use them."""

from __future__ import annotations

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import build_config
from preflight.settings.unused import drop_unused


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hosts": "2"}, "--hosts also needs --ranks"),
        ({"ranks": "3", "hosts": "2"}, "--ranks 3 must be a multiple of --hosts 2"),
        ({"ranks": "0"}, "--ranks must be at least 1"),
        ({"ranks": "4", "hosts": "2", "network_gbits": "0"}, "--network must be more than 0"),
    ],
)
def test_ranks_that_no_hosts_can_hold_are_refused(given: dict[str, str], told: str) -> None:
    with pytest.raises(PreflightError, match=told) as caught:
        build_config(given, {})
    assert caught.value.code == ExitCode.FLAGS


@pytest.mark.parametrize(
    ("mode", "unused"),
    [
        ("check", set()),
        ("train", {"hosts", "network_gbits"}),
        ("finetune", {"hosts", "network_gbits"}),
        ("get-optimal-bs", {"hosts", "network_gbits"}),
        ("generate", {"ranks", "hosts", "network_gbits"}),
    ],
)
def test_each_mode_says_which_of_the_flags_it_does_not_use(mode: str, unused: set[str]) -> None:
    given = {"ranks": "4", "hosts": "2", "network_gbits": "400"}
    config = build_config(given, dict.fromkeys(given, "the command line"))
    assert {*drop_unused(mode, config)[1]} == unused


def test_hosts_are_for_cards_that_are_not_here() -> None:
    given = {"ranks": "4", "hosts": "2", "network_gbits": "400", "target_gpu": "H100"}
    config = build_config(given, dict.fromkeys(given, "the command line"))
    assert drop_unused("get-optimal-bs", config)[1] == {}


def test_a_network_between_no_hosts_is_said_to_do_nothing() -> None:
    given = {"ranks": "4", "network_gbits": "400"}
    config = build_config(given, dict.fromkeys(given, "the command line"))
    assert {*drop_unused("check", config)[1]} == {"network_gbits"}
