"""The device that a run is judged for: the present one, or one that is only named."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preflight.device.cards import Card, find_card, match_device
from preflight.device.host_memory import reachable_host_bytes
from preflight.device.runtime import MIN_STEPS_TO_COMPILE, Runtime
from preflight.foresight.absent_ranks import ONE_RANK, Sharing
from preflight.foresight.memory import CUDA_CONTEXT_BYTES, MemoryOptions
from preflight.settings import CheckSettings, SystemSettings

_HOPPER_AND_LATER = ("H100", "H200", "GH200", "B200")


@dataclass(frozen=True)
class Target:
    """A device, what it computes in, and how much of its memory a run may need.

    `runtime` is ``None`` for a device that is not here, `card` for one that is not in the table.
    """

    name: str
    device_type: str
    dtype: torch.dtype
    compile_model: bool
    limit_bytes: int
    card: Card | None = None
    runtime: Runtime | None = None

    @property
    def dtype_name(self) -> str:
        """The precision as torch spells it: ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def planned_runtime(self) -> Runtime:
        """The runtime, or for a device that is not here what a run there would choose."""
        if self.runtime is not None:
            return self.runtime
        return Runtime(torch.device(self.device_type), self.dtype, self.compile_model, ())

    def memory_options(
        self,
        *,
        gradient_checkpointing: bool,
        window_tokens: int | None = None,
        data_bytes: int = 0,
        target_share: float = 1.0,
        sharing: Sharing = ONE_RANK,
    ) -> MemoryOptions:
        """What `estimate_memory` needs to know of it."""
        hopper = None
        if self.runtime is None and self.card is not None:
            hopper = self.card.name.startswith(_HOPPER_AND_LATER)
        return MemoryOptions(
            self.dtype,
            self.device_type,
            gradient_checkpointing,
            self.compile_model,
            window_tokens=window_tokens,
            data_bytes=data_bytes,
            hopper_or_newer=hopper,
            target_share=target_share,
            sharing=sharing,
        )


def is_absent(check: CheckSettings) -> bool:
    """Whether the flags name a device that need not be here."""
    return check.target_gpu is not None or check.gpu_memory is not None


def describe_absent(check: CheckSettings, system: SystemSettings, n_steps: int) -> Target:
    """The card that the flags name, with the precision and compilation that it would get.

    Raises:
        PreflightError: code FLAGS, for a card that is not in the table.
    """
    card = find_card(check.target_gpu) if check.target_gpu else None
    has_bf16 = card is None or card.bf16_tflops is not None
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    if system.mixed_precision is False:
        dtype = torch.float32
    compile_model = system.compile_model
    if compile_model is None:
        compile_model = n_steps >= MIN_STEPS_TO_COMPILE
    limit = int(check.gpu_memory * 2**30) if check.gpu_memory else 0
    if card is None:
        name = f"a card with {check.gpu_memory:g} GiB"
        return Target(name, "cuda", dtype, compile_model, limit)
    return Target(card.name, "cuda", dtype, compile_model, limit or card.usable_bytes, card)


def describe_present(runtime: Runtime) -> Target:
    """The device at hand."""
    device = runtime.device
    if device.type != "cuda":
        # Predicted is the resident memory of the whole process: what it holds now comes on top.
        limit, name, kind, card = reachable_host_bytes(), str(device), "cpu", None
    else:
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        # Our own context is in use already, and counts as needed in the prediction.
        limit, name, kind = min(total, free + CUDA_CONTEXT_BYTES), properties.name, "cuda"
        card = match_device(properties.name, properties.total_memory)
    return Target(name, kind, runtime.dtype, runtime.compile_model, limit, card, runtime)
