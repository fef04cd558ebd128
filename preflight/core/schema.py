"""Files of plain JSON types, checked against a declared shape."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

S = TypeVar("S", bound="Schema")


class Schema(BaseModel):
    """A JSON object. Declared keys must be there and of their type; more keys are accepted."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @classmethod
    def read(cls: type[S], value: Any) -> S:
        """`value` as this shape.

        Raises:
            ValueError: naming the first key at fault.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(describe_first_fault(error)) from None


def describe_first_fault(error: ValidationError) -> str:
    """The first fault in words: ``train.shards.0.n_tokens: Input should be a valid integer``."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:40] for part in fault["loc"]) or "the file"
    return f"{where}: {fault['msg']}"[:200]
