"""What a checkpoint must hold for a run to continue from it: types, ranges, and tensors.

A stranger may have written it, and every hash may be true. What passes here is used as it is.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from preflight.checkpoints.adapters import read_adapter
from preflight.checkpoints.damage import damage_error
from preflight.checkpoints.format import Checkpoint, load_training_state, load_weights
from preflight.checkpoints.manifest import STATE_NAME, Loss, Step
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.models.lora import list_adapter_weights, list_trained_weights
from preflight.models.protocol import LanguageModel, ParameterGroup
from preflight.settings import TrainingSettings
from preflight.settings.kinds import OPTIMIZERS

_TWIN_SHAPE = (2, 3, 5, 7)  # different sizes, so that each tells its dimension
_NEVER_NEGATIVE = ("step", "exp_avg_sq")  # a square root is taken of the second
_CUDA_RANDOM_BYTES = 16  # seed and offset of Philox


def _check_cpu_random_state(value: Any) -> Any:
    """A state that torch's generator accepts: of its size, and with its indices in range."""
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        raise ValueError("not a random state of torch") from None
    return value


def _check_cuda_random_state(value: Any) -> Any:
    if type(value) is not Tensor or value.dtype != torch.uint8:
        raise ValueError("not a random state of torch")
    if value.shape != (_CUDA_RANDOM_BYTES,) or int(value[8:9]) % 4:  # offsets are multiples of 4
        raise ValueError("not a random state of CUDA")
    return value


class _Progress(Schema):
    """The fields of `TrainState`."""

    step: Step
    cursor: Step
    tokens: Step
    best_val_loss: Loss | None = None
    evaluated_step: Step = 0
    eval_windows: Step = 0
    stale_evaluations: Step = 0

    @model_validator(mode="after")
    def _check_order(self) -> _Progress:
        # A step takes one sample at least, and a sample one token. The cursor alone goes back to
        # zero, where a run continues on new data.
        if not self.evaluated_step <= self.step <= self.tokens or self.cursor > self.tokens:
            raise ValueError("evaluated step, step, cursor and tokens contradict each other")
        return self


class _Scaler(Schema):
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    growth_tracker: Annotated[int, Field(ge=0, lt=2**31, alias="_growth_tracker")]


class _RandomStates(Schema):
    cpu: Annotated[Any, AfterValidator(_check_cpu_random_state)]
    cuda: Annotated[Any, AfterValidator(_check_cuda_random_state)] = None


class _ParameterGroup(Schema):
    """Its hyperparameters are not read: those of the flags are used."""

    params: list[Step]


class _Optimizer(Schema):
    state: dict[Step, dict[str, Any]]
    param_groups: list[_ParameterGroup]


class _Trainer(Schema):
    optimizer: _Optimizer
    scaler: Annotated[dict[str, Any], Field(max_length=0)] | _Scaler
    rng: _RandomStates
    device: Annotated[str, Field(pattern=r"^[a-z]{1,16}$")]


class _TrainingState(Schema):
    """The content of ``checkpoint.pt``."""

    state: _Progress
    trainer: _Trainer
    data_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tokens_per_step: Annotated[int, Field(ge=1, le=2**53)]


def load_saved_state(
    origin: Checkpoint,
    model: LanguageModel,
    training: TrainingSettings,
    samples_per_step: int | None = None,
) -> dict[str, Any]:
    """The training state of `origin`, which has passed every check, as have the weights.

    Args:
        origin: verified.
        model: of its architecture, on any device; with adapters where `origin` holds adapters.
        training: its settings.
        samples_per_step: of its run; unset: those of one process with its settings.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    _check_kind(origin, model)
    shapes = {name: tuple(p.shape) for name, p in list_trained_weights(model).items()}
    load_weights(origin, shapes)
    saved = load_training_state(origin)
    try:
        content = _TrainingState.read(saved)
        if content.state.step != origin.step:
            raise ValueError(f"it is of step {content.state.step:,}, not of {origin.step:,}")
        own = training.batch_size * training.gradient_accumulation_steps
        _check_cursor(content, samples_per_step or own)
        _check_optimizer(content.trainer.optimizer, origin.step, model, training)
    except ValueError as error:
        raise damage_error(origin.path / STATE_NAME, str(error)) from None
    return saved


def _check_kind(origin: Checkpoint, model: LanguageModel) -> None:
    """Raise PreflightError where one holds adapters, and the other all weights."""
    holds = "all weights" if read_adapter(origin) is None else "adapters"
    trains = "adapters" if list_adapter_weights(model) else "all weights"
    if holds != trains:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{origin.path} holds {holds}, and this run trains {trains}",
            "continue it with the flags that it was started with, or choose another --output-dir",
        )


def _check_cursor(content: _TrainingState, samples_per_step: int) -> None:
    """Raise ValueError for a cursor beyond the samples that the steps can have taken.

    That is known where every step had as many tokens as the last.
    """
    step, cursor, tokens = content.state.step, content.state.cursor, content.state.tokens
    samples = step * samples_per_step
    if tokens == step * content.tokens_per_step and cursor > samples:
        raise ValueError(f"its cursor {cursor:,} is beyond the {samples:,} samples of its steps")


def _check_optimizer(
    saved: _Optimizer, step: int, model: LanguageModel, training: TrainingSettings
) -> None:
    """Compare names, types, shapes and ranges with those of an optimizer of `training`.

    Raises:
        ValueError: they differ.
    """
    expected, shapes = _describe_optimizer(model, training)
    groups = [group["params"] for group in expected["param_groups"]]
    if [group.params for group in saved.param_groups] != groups:
        raise ValueError("the optimizer's parameters are not those of the model")
    tensors = expected["state"] if step else {}
    if saved.state.keys() != tensors.keys():
        raise ValueError("the optimizer's state does not cover the model's parameters")
    for index, names in tensors.items():
        found = saved.state[index]
        if found.keys() != names.keys():
            raise ValueError(f"parameter {index} has {', '.join(found)[:60]}, not {list(names)}")
        for name, example in names.items():
            shape = tuple(shapes[index].get(size, size) for size in example.shape)
            _check_tensor(f"{name} of parameter {index}", found[name], example, shape)
            most = step if name == "step" else math.inf
            if name in _NEVER_NEGATIVE and not _is_within(found[name], most):
                raise ValueError(f"{name} of parameter {index} is out of range")


def _check_tensor(what: str, found: Any, example: Tensor, shape: tuple[int, ...]) -> None:
    expected = f"{example.dtype} {shape}"
    kind = f"{found.dtype} {tuple(found.shape)}" if type(found) is Tensor else repr(found)[:40]
    if kind != expected:
        raise ValueError(f"{what} is {kind}, not {expected}")


def _is_within(values: Tensor, most: float) -> bool:
    least, greatest = values.aminmax()
    return float(least) >= 0 and float(greatest) <= most


def _describe_optimizer(
    model: LanguageModel, training: TrainingSettings
) -> tuple[dict[str, Any], dict[int, dict[int, int]]]:
    """What an optimizer holds after a step, seen from one over parameters of a few elements.

    Returns:
        its `state_dict`, and by a parameter's index what each size in it stands for.
    """
    groups, sizes = [], {}
    for group in model.parameter_groups():
        twins = [nn.Parameter(torch.zeros(_TWIN_SHAPE[: p.dim()])) for p in group.parameters]
        groups.append(ParameterGroup(group.kind, twins))
        for twin, parameter in zip(twins, group.parameters, strict=True):
            twin.grad = torch.zeros_like(twin)
            sizes[id(twin)] = dict(zip(twin.shape, parameter.shape, strict=True))
    optimizer = OPTIMIZERS.load(training.optimizer).build(groups, training, 0.0)
    optimizer.step()
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer.state_dict(), {i: sizes[id(p)] for i, p in enumerate(ordered)}
