"""The table of cards: found however they are spelled, matched to drivers' names, plausible."""

from __future__ import annotations

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.device.cards import CARDS, find_card, match_device

NAMED = """RTX 3060 12GB, RTX 3070, RTX 3080, RTX 3090, RTX 4060, RTX 4060 Ti 16GB, RTX 4070,
RTX 4080, RTX 4090, RTX 5070, RTX 5080, RTX 5090, T4, V100 16GB, V100 32GB, A10, A10G, A40,
A100 40GB, A100 80GB, L4, L40, L40S, A6000, RTX 6000 Ada, H100 PCIe, H100 SXM, H200, B200, GH200"""


@pytest.mark.parametrize("name", [name.strip() for name in NAMED.replace("\n", " ").split(",")])
def test_well_known_cards_are_there(name: str) -> None:
    card = find_card(name)
    assert card.source.startswith("NVIDIA")
    assert match_device(card.name, card.usable_bytes) == card


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("GeForce RTX-4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("4060ti 16 GB", "RTX 4060 Ti 16GB"),
        ("Tesla T4", "T4"),
        ("a100-80gb", "A100 PCIe 80GB"),
        ("H100 SXM5", "H100 SXM 80GB"),
        ("6000 ada", "RTX 6000 Ada"),
        ("h100", "H100 PCIe 80GB"),
        ("A100", "A100 PCIe 40GB"),
        ("V100 32gb", "V100 PCIe 32GB"),
    ],
)
def test_spelling_does_not_matter_and_the_careful_variant_is_taken(
    spelling: str, name: str
) -> None:
    assert find_card(spelling).name == name


def test_an_unknown_card_names_its_neighbours() -> None:
    with pytest.raises(PreflightError) as caught:
        find_card("rtx 4091")
    assert caught.value.code == ExitCode.FLAGS
    assert "RTX 4090" in str(caught.value)
    assert "--gpu-memory" in str(caught.value)
    for nonsense in ("", "xyz", "40", "RTX"):
        with pytest.raises(PreflightError):
            find_card(nonsense)


@pytest.mark.parametrize(
    ("driver_name", "gib", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100 SXM2 32GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", 79.1, "A100 PCIe 80GB"),
        ("NVIDIA A10G", 22.1, "A10G"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "RTX 6000 Ada"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", 79.1, "H100 PCIe 80GB"),
        ("NVIDIA H100 NVL", 93.1, "H100 NVL 94GB"),
        ("NVIDIA H200", 139.8, "H200 SXM 141GB"),
        ("NVIDIA GH200 480GB", 94.5, "GH200 96GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3080", 11.8, None),  # the one with 12 GB is another card
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.7, None),
        ("AMD Instinct MI300X", 191.0, None),
    ],
)
def test_a_drivers_name_finds_its_card_or_none(
    driver_name: str, gib: float, name: str | None
) -> None:
    card = match_device(driver_name, int(gib * 2**30))
    assert (card.name if card else None) == name


def test_rates_are_dense_and_in_proportion() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        # Sparse figures, or ones summed in fp16, would break these proportions.
        assert 1.9 < card.fp16_tflops / card.fp32_tflops < 31, card.name
        if card.tf32_tflops:
            assert card.fp16_tflops / card.tf32_tflops == pytest.approx(2, rel=0.02), card.name
            assert card.bf16_tflops == card.fp16_tflops
        assert 0.9 * card.memory_gib * 2**30 < card.usable_bytes < card.memory_gib * 2**30
    assert find_card("T4").rate_tflops("bfloat16") == 8.1
    assert find_card("A100").rate_tflops("float32") == 156
