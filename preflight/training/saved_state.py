"""What a checkpoint must hold for a run to continue from it: types, ranges, and tensors.

A stranger may have written it, and every hash may be true. What passes here is used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from preflight.checkpoints.adapters import read_adapter
from preflight.checkpoints.damage import damage_error
from preflight.checkpoints.format import (
    Checkpoint,
    load_optimizer,
    load_training_state,
    load_weights,
    read_optimizer_shapes,
)
from preflight.checkpoints.manifest import (
    OPTIMIZER_FILE_VERSION,
    OPTIMIZER_NAME,
    STATE_NAME,
    Loss,
    Step,
)
from preflight.checkpoints.rows import split_rows
from preflight.checkpoints.weights import Shapes
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


class _EarlyOptimizer(Schema):
    """The optimizer within ``checkpoint.pt``, before format v3: its state by index."""

    state: dict[Step, dict[str, Any]]
    param_groups: list[_ParameterGroup]


class _Trainer(Schema):
    optimizer: dict[str, Any] = Field(default_factory=dict)
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
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """The training state of `origin`, which has passed every check, as have the weights.

    Args:
        origin: verified.
        model: of its architecture, on any device; with adapters where `origin` holds adapters.
        training: its settings.
        samples_per_step: of its run; unset: those of one process with its settings.
        shard: index and number of the shards that ranks hold of each tensor: this one's rows are
            read and checked.

    Returns:
        the content of ``checkpoint.pt``, and under ``optimizer`` the optimizer's tensors by
        ``<parameter>.<key>``: of those with dimensions the shard's rows.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    _check_kind(origin, model)
    shapes = {name: tuple(p.shape) for name, p in list_trained_weights(model).items()}
    load_weights(origin, shapes, _split_all(shapes, shard))
    saved = load_training_state(origin)
    try:
        content = _TrainingState.read(saved)
        if content.state.step != origin.step:
            raise ValueError(f"it is of step {content.state.step:,}, not of {origin.step:,}")
        own = training.batch_size * training.gradient_accumulation_steps
        _check_cursor(content, samples_per_step or own)
    except ValueError as error:
        raise damage_error(origin.path / STATE_NAME, str(error)) from None
    saved["trainer"].pop("optimizer", None)
    saved["optimizer"] = _load_optimizer(origin, content, model, training, shard)
    return saved


def _load_optimizer(
    origin: Checkpoint,
    content: _TrainingState,
    model: LanguageModel,
    training: TrainingSettings,
    shard: tuple[int, int],
) -> dict[str, Tensor]:
    """The optimizer's tensors as `load_saved_state` returns them."""
    is_early = origin.manifest.format_version < OPTIMIZER_FILE_VERSION
    path = origin.path / (STATE_NAME if is_early else OPTIMIZER_NAME)
    parameters = _describe_optimizer(model, training)
    expected = {
        f"{name}.{key}": example
        for name, examples in parameters.items()
        for key, example in examples.items()
        if content.state.step  # before its first step an optimizer holds nothing
    }
    shapes = {name: tuple(example.shape) for name, example in expected.items()}
    rows = _split_all(shapes, shard)
    try:
        if is_early:
            found = _name_early_state(content.trainer.optimizer, list(parameters))
            _check_shapes({name: tuple(t.shape) for name, t in found.items()}, shapes)
            found = {n: t[rows[n]].clone() if n in rows else t for n, t in found.items()}
        else:
            _check_shapes(read_optimizer_shapes(origin), shapes)
            found = load_optimizer(origin, rows)
        for name, tensor in found.items():
            if tensor.dtype != expected[name].dtype:
                raise ValueError(f"{name} is {tensor.dtype}, not {expected[name].dtype}")
            key = name.rpartition(".")[2]
            most = content.state.step if key == "step" else math.inf
            if key in _NEVER_NEGATIVE and not _is_within(tensor, most):
                raise ValueError(f"{name} is out of range")
    except ValueError as error:
        raise damage_error(path, str(error)) from None
    return found


def _split_all(shapes: Mapping[str, tuple[int, ...]], shard: tuple[int, int]) -> dict[str, slice]:
    """The rows of a shard (index, number of shards) of each tensor; none for the whole."""
    if shard[1] == 1:
        return {}
    return {name: split_rows(shape[0], *shard) for name, shape in shapes.items() if shape}


def _name_early_state(optimizer: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The tensors of an optimizer's `state_dict` over the parameters of these names.

    Raises:
        ValueError: it is none of these parameters.
    """
    saved = _EarlyOptimizer.read(optimizer)
    if [i for group in saved.param_groups for i in group.params] != list(range(len(names))):
        raise ValueError("the optimizer's parameters are not those of the model")
    tensors = {}
    for index, held in saved.state.items():
        if index >= len(names):
            raise ValueError("the optimizer's state does not cover the model's parameters")
        for key, value in held.items():
            if type(value) is not Tensor:
                raise ValueError(f"{key[:60]} of parameter {index} is {value!r:.40}, no tensor")
            tensors[f"{names[index]}.{key}"] = value
    return tensors


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


def _check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raise ValueError where names or shapes are not those of the run's optimizer."""
    different = [
        f"{name[:80]} is {found.get(name, 'missing')}, not {expected.get(name, 'there')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if different:
        raise ValueError(f"not the optimizer's state: {'; '.join(different[:2])}")


def _is_within(values: Tensor, most: float) -> bool:
    if not values.numel():
        return True
    least, greatest = values.aminmax()
    return float(least) >= 0 and float(greatest) <= most


def _describe_optimizer(
    model: LanguageModel, training: TrainingSettings
) -> dict[str, dict[str, Tensor]]:
    """What an optimizer holds after a step: by parameter, in its order, and by key.

    It is seen from an optimizer over parameters of a few elements. The tensors have no memory.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, originals = [], {}
    for group in model.parameter_groups():
        twins = [nn.Parameter(torch.zeros(_TWIN_SHAPE[: p.dim()])) for p in group.parameters]
        groups.append(ParameterGroup(group.kind, twins))
        for twin, parameter in zip(twins, group.parameters, strict=True):
            twin.grad = torch.zeros_like(twin)
            originals[id(twin)] = parameter
    optimizer = OPTIMIZERS.load(training.optimizer).build(groups, training, 0.0)
    optimizer.step()
    described = {}
    for twin in (p for group in optimizer.param_groups for p in group["params"]):
        parameter = originals[id(twin)]
        sizes = dict(zip(twin.shape, parameter.shape, strict=True))
        described[names[id(parameter)]] = {
            key: example.new_empty([sizes.get(n, n) for n in example.shape], device="meta")
            for key, example in optimizer.state[twin].items()
        }
    return described
