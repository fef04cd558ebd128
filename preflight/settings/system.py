"""The flags of the machine and of this call."""

import re
from dataclasses import dataclass

from preflight.settings.options import setting

LOG_LEVELS = ("debug", "info", "warning", "error")


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError("takes auto, cpu, cuda, cuda:N or mps")
    return name


@dataclass(frozen=True)
class SystemSettings:
    """Device, precision and compilation."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", check=_check_device)
    mixed_precision: bool | None = setting(
        None,
        "bf16 where the hardware supports it, else fp16 with a gradient scaler (CUDA); unset: "
        "where it is faster; in --generate, where a short trial shows that it is",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    compile_model: bool | None = setting(
        None,
        "use torch.compile; unset: for runs long enough to gain from it, on a CPU where a short "
        "trial shows that they do",
    )
    data_on_gpu: str = setting(
        "auto",
        "keep the training tokens in the device's memory; auto: on CUDA, where they take less than "
        "a tenth of what is free",
        choices=("auto", "yes", "no"),
    )
    log_level: str = setting("info", "least severe messages shown on stderr", choices=LOG_LEVELS)
    config: str | None = setting(
        None,
        'JSON file of flags, as in {"batch_size": 16}; flags on the command line override it',
        metavar="FILE",
    )
