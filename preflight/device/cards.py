"""Well-known graphics cards: memory, arithmetic rates and bandwidth, as their vendors state them.

Rates are dense (half of what a data sheet gives "with sparsity"), at boost clock, and accumulate
matmuls in fp32, as training does. That matters on GeForce cards of the 20 to 50 series, whose
tensor cores run at half their rate with fp32 accumulation. A real run reaches a share of the rates.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from preflight.core.errors import ExitCode, PreflightError

# CUDA reports less than the nominal size: the driver keeps a little, and error correction in GDDR
# memory keeps a sixteenth. Both are rounded to the safe side.
_USABLE, _USABLE_WITH_GDDR_ECC = 0.98, 0.92


@dataclass(frozen=True)
class Link:
    """What joins cards: those of one host, or the hosts.

    Attributes:
        name: as its vendor calls it.
        gb_per_second: in one direction, in 10^9 bytes, as its standard or vendor states it.
        share: of that rate which collectives reach; assumed.
        hop_seconds: from one card to the next, besides the bytes; assumed.
    """

    name: str
    gb_per_second: float
    share: float
    hop_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """The rate that a collective is assumed to reach."""
        return self.gb_per_second * 1e9 * self.share


def _nvlink(generation: int, gb_per_second: float) -> Link:
    return Link(f"NVLink {generation}", gb_per_second, 0.8, 4e-6)


def _pcie(generation: int, lanes: int = 16) -> Link:
    # A lane carries 8, 16 and 32 GT/s, of which 128 of 130 bits are data (PCI-SIG).
    rate = {3: 8.0, 4: 16.0, 5: 32.0}[generation] / 8 * 128 / 130 * lanes
    return Link(f"PCIe {generation} x{lanes}", round(rate, 1), 0.6, 10e-6)


_PCIE_3, _PCIE_4, _PCIE_5 = _pcie(3), _pcie(4), _pcie(5)


def describe_network(gbits: float) -> Link:
    """A network between hosts, by its Gb/s for each card."""
    return Link(f"network of {gbits:g} Gb/s a card", gbits / 8, 0.8, 10e-6)


@dataclass(frozen=True)
class Card:
    """One card. Rates in TFLOP/s; ``None`` where the hardware lacks that format.

    Attributes:
        name: as people write it; ``find_card`` accepts any spelling.
        memory_gib: nominal size.
        bf16_tflops: bf16 matmuls (tensor cores).
        fp16_tflops: fp16 matmuls (tensor cores).
        tf32_tflops: fp32 matmuls with inputs rounded to TF32 (tensor cores).
        fp32_tflops: fp32 without tensor cores.
        bandwidth_gb_per_second: of the card's memory, in 10^9 bytes.
        source: the vendor document.
        gddr_ecc: error correction takes a share of the memory, on by default.
        link: to the other cards of a host. Bridges that join pairs of cards do not count.
    """

    name: str
    memory_gib: float
    bf16_tflops: float | None
    fp16_tflops: float
    tf32_tflops: float | None
    fp32_tflops: float
    bandwidth_gb_per_second: float
    source: str
    gddr_ecc: bool = False
    link: Link = _PCIE_4

    @property
    def usable_bytes(self) -> int:
        """The memory that programs can use: the nominal size less 2 % or, with ECC, 8 %."""
        share = _USABLE_WITH_GDDR_ECC if self.gddr_ecc else _USABLE
        return int(self.memory_gib * share * 2**30)

    def rate_tflops(self, dtype_name: str) -> float:
        """Rate of matmuls in ``float32`` (TF32 where the card has it), ``float16`` or ``bfloat16``.

        A card without bf16 emulates it, at the rate of fp32.
        """
        if dtype_name == "float16":
            return self.fp16_tflops
        if dtype_name == "bfloat16":
            return self.bf16_tflops or self.fp32_tflops
        return self.tf32_tflops or self.fp32_tflops


_TURING = "NVIDIA Turing GPU Architecture white paper"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture white paper"
_ADA = "NVIDIA Ada GPU Architecture white paper"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture white paper"
_V100, _T4 = "NVIDIA V100 data sheet", "NVIDIA T4 data sheet"
_A100, _H100 = "NVIDIA A100 data sheet", "NVIDIA H100 data sheet"

# name, GiB, bf16, fp16, tf32, fp32, GB/s, source, GDDR with ECC, and the link unless PCIe 4 x16.
# NVLink: half of the "bidirectional" rate of a data sheet.
CARDS = (
    Card("RTX 2080 Ti", 11, None, 53.8, None, 13.4, 616, _TURING, link=_PCIE_3),
    Card("RTX 3060 12GB", 12, 25.5, 25.5, 12.7, 12.7, 360, _ADA),
    Card("RTX 3070", 8, 40.6, 40.6, 20.3, 20.3, 448, _GA102),
    Card("RTX 3080 10GB", 10, 59.5, 59.5, 29.8, 29.8, 760, _GA102),
    Card("RTX 3090", 24, 71.0, 71.0, 35.6, 35.6, 936, _GA102),
    Card("RTX 4060", 8, 30.2, 30.2, 15.1, 15.1, 272, _ADA, link=_pcie(4, 8)),
    Card("RTX 4060 Ti 8GB", 8, 44.1, 44.1, 22.1, 22.1, 288, _ADA, link=_pcie(4, 8)),
    Card("RTX 4060 Ti 16GB", 16, 44.1, 44.1, 22.1, 22.1, 288, _ADA, link=_pcie(4, 8)),
    Card("RTX 4070", 12, 58.3, 58.3, 29.1, 29.1, 504, _ADA),
    Card("RTX 4070 Ti", 12, 80.2, 80.2, 40.1, 40.1, 504, _ADA),
    Card("RTX 4080", 16, 97.5, 97.5, 48.7, 48.7, 717, _ADA),
    Card("RTX 4090", 24, 165.2, 165.2, 82.6, 82.6, 1008, _ADA),
    Card("RTX 5070", 12, 61.7, 61.7, 30.9, 30.9, 672, _RTX_BLACKWELL, link=_PCIE_5),
    Card("RTX 5070 Ti", 16, 87.9, 87.9, 43.9, 43.9, 896, _RTX_BLACKWELL, link=_PCIE_5),
    Card("RTX 5080", 16, 112.6, 112.6, 56.3, 56.3, 960, _RTX_BLACKWELL, link=_PCIE_5),
    Card("RTX 5090", 32, 209.5, 209.5, 104.8, 104.8, 1792, _RTX_BLACKWELL, link=_PCIE_5),
    Card("T4", 16, None, 65.0, None, 8.1, 320, _T4, True, link=_PCIE_3),
    Card("V100 PCIe 16GB", 16, None, 112.0, None, 14.0, 900, _V100, link=_PCIE_3),
    Card("V100 SXM2 16GB", 16, None, 125.0, None, 15.7, 900, _V100, link=_nvlink(2, 150)),
    Card("V100 PCIe 32GB", 32, None, 112.0, None, 14.0, 900, _V100, link=_PCIE_3),
    Card("V100 SXM2 32GB", 32, None, 125.0, None, 15.7, 900, _V100, link=_nvlink(2, 150)),
    Card("A10", 24, 125.0, 125.0, 62.5, 31.2, 600, "NVIDIA A10 data sheet", True),
    Card("A10G", 24, 70.0, 70.0, 35.0, 35.0, 600, "NVIDIA A10G data sheet", True),
    Card("A40", 48, 149.7, 149.7, 74.8, 37.4, 696, "NVIDIA A40 data sheet", True),
    Card("A100 PCIe 40GB", 40, 312.0, 312.0, 156.0, 19.5, 1555, _A100),
    Card("A100 SXM 40GB", 40, 312.0, 312.0, 156.0, 19.5, 1555, _A100, link=_nvlink(3, 300)),
    Card("A100 PCIe 80GB", 80, 312.0, 312.0, 156.0, 19.5, 1935, _A100),
    Card("A100 SXM 80GB", 80, 312.0, 312.0, 156.0, 19.5, 2039, _A100, link=_nvlink(3, 300)),
    Card("L4", 24, 121.0, 121.0, 60.0, 30.3, 300, "NVIDIA L4 data sheet", True),
    Card("L40", 48, 181.0, 181.0, 90.5, 90.5, 864, "NVIDIA L40 data sheet", True),
    Card("L40S", 48, 362.0, 362.0, 183.0, 91.6, 864, "NVIDIA L40S data sheet", True),
    Card("RTX A6000", 48, 154.8, 154.8, 77.4, 38.7, 768, _GA102),
    Card("RTX 6000 Ada", 48, 364.2, 364.2, 182.1, 91.1, 960, "NVIDIA RTX 6000 Ada data sheet"),
    Card("H100 PCIe 80GB", 80, 756.0, 756.0, 378.0, 51.0, 2000, _H100, link=_PCIE_5),
    Card("H100 NVL 94GB", 94, 835.0, 835.0, 417.0, 60.0, 3900, _H100, link=_PCIE_5),
    Card("H100 SXM 80GB", 80, 989.0, 989.0, 494.0, 67.0, 3350, _H100, link=_nvlink(4, 450)),
    Card(
        "H200 SXM 141GB",
        141,
        989.0,
        989.0,
        494.0,
        67.0,
        4800,
        "NVIDIA H200 data sheet",
        link=_nvlink(4, 450),
    ),
    Card(
        "GH200 96GB",
        96,
        990.0,
        990.0,
        494.0,
        67.0,
        4000,
        "NVIDIA GH200 data sheet",
        link=_nvlink(4, 450),
    ),
    Card(
        "GH200 144GB",
        144,
        990.0,
        990.0,
        494.0,
        67.0,
        4900,
        "NVIDIA GH200 data sheet",
        link=_nvlink(4, 450),
    ),
    Card(
        "B200",
        180,
        2250.0,
        2250.0,
        1125.0,
        75.0,
        7700,
        "NVIDIA HGX B200 data sheet",
        link=_nvlink(5, 900),
    ),
)
# Words of a name that do not tell cards apart: makers, and what a driver adds.
_NOISE = {
    "nvidia",
    "geforce",
    "tesla",
    "quadro",
    "gpu",
    "graphics",
    "generation",
    "hbm2",
    "hbm2e",
    "hbm3",
    "hbm3e",
    "tensor",
    "core",
}
# Words of driver names that the table spells otherwise, as in "A100-SXM4-80GB".
_SAME = {"sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "sxm6": "sxm"}


def _words(name: str) -> frozenset[str]:
    """The words of a name that tell cards apart, with sizes as ``24gb`` and ``rtx4090ti`` split."""
    text = re.sub(r"(\d+)\s*(?:gib|gb)\b", r"\1gb ", name.lower())
    text = re.sub(r"\b(?:rtx|gtx)[\s_-]*(?=[a\d])", "rtx ", text)
    text = re.sub(r"(?<=\d)[\s_-]*(ti|super)\b", r" \1", text)
    parts = (word for word in re.split(r"[^a-z0-9]+", text) if word)
    return frozenset(_SAME.get(word, word) for word in parts if word not in _NOISE)


def find_card(name: str) -> Card:
    """The card of that name in any case and punctuation; a size chooses among variants.

    Without a size or a form factor it is the smallest of the matching cards, to be safe.

    Raises:
        PreflightError: code FLAGS, with the nearest names.
    """
    asked = _words(name)
    optional = {"rtx"}
    fitting = [
        card
        for card in CARDS
        if asked
        and asked - optional <= _words(card.name)
        and _model(_words(card.name)) <= asked | optional
    ]
    if fitting:
        return min(fitting, key=lambda card: (card.memory_gib, card.rate_tflops("float16")))
    keys = {" ".join(sorted(_words(card.name))): card.name for card in CARDS}
    near = difflib.get_close_matches(" ".join(sorted(asked)), keys, n=4, cutoff=0.4)
    known = ", ".join(keys[key] for key in near) or ", ".join(card.name for card in CARDS)
    raise PreflightError(
        ExitCode.FLAGS,
        f"--target-gpu {name[:60]!r} is not in the table of cards",
        f"nearest: {known}" if near else f"known: {known}",
        "or give its memory in GiB to --check: --gpu-memory 24",
    )


def _model(words: frozenset[str]) -> frozenset[str]:
    """The words of the model, without size and form factor."""
    return frozenset(w for w in words if not re.fullmatch(r"\d+gb|sxm|pcie", w))


def match_device(device_name: str, memory_bytes: int | None = None) -> Card | None:
    """The card of a driver's name, or ``None`` for one that is not in the table.

    Args:
        device_name: ``torch.cuda.get_device_properties(...).name``.
        memory_bytes: its ``total_memory``, which tells 16 GB from 32 GB where the name does not.
    """
    found = _words(device_name)
    sized = {word for word in found if re.fullmatch(r"\d+gb", word)}
    if "gh200" in found:
        sized = set()  # the size in its name is that of the CPU's memory
    fitting = [
        card
        for card in CARDS
        if _model(_words(card.name)) == _model(found)
        and (not sized or sized <= _words(card.name) or not _sizes(card))
    ]
    forms = found & {"sxm", "pcie"}
    # "NVIDIA H100 80GB HBM3" has no form factor in its name and is the SXM one; the names of the
    # others say PCIe or NVL.
    preferred = forms or {"sxm"}
    fitting = [c for c in fitting if preferred & _words(c.name)] or fitting
    if memory_bytes is not None:
        gib = memory_bytes / 2**30
        fitting = [c for c in fitting if 0.88 * c.memory_gib <= gib <= 1.02 * c.memory_gib]
    return fitting[0] if fitting else None


def _sizes(card: Card) -> bool:
    return any(re.fullmatch(r"\d+gb", word) for word in _words(card.name))
