"""The base of every section, a frozen, strict, closed model, and field types that carry their unit."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A block of a recipe: frozen, strict (the text "4" is not the number 4), and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Unit:
    """The unit of a number, which `finetuner explain` and the reference show."""

    name: str


def unit_of(field: FieldInfo) -> str | None:
    """Return the unit that a field's type carries, wherever in `X | None` it stands."""
    return next((unit.name for unit in _units([*field.metadata, field.annotation])), None)


def _units(types: Any) -> Iterator[Unit]:
    for one in types:
        if isinstance(one, Unit):
            yield one
        yield from _units(getattr(one, "__metadata__", ()))
        yield from _units(get_args(one))


def _at_home(name: str) -> str:
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:  # the home of a user there is not; the file check says so
        return name


DiskName = Annotated[str, AfterValidator(_at_home)]
Names = Annotated[tuple[str, ...], Strict(False)]  # a YAML list; its entries stay strict

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1), Unit("steps")]


def _whole_from_one_on(value: Any) -> Any:
    """5.0 -> 5; below 1 it is a part of all steps, and stays."""
    if not isinstance(value, float) or not math.isfinite(value) or value < 1:
        return value
    if value != int(value):
        raise PydanticCustomError("steps_or_part", "a whole number of steps, or a fraction of all steps below 1")
    return int(value)


StepsOrPart = Annotated[
    Steps | Annotated[float, Field(gt=0.0, lt=1.0)],
    BeforeValidator(_whole_from_one_on),
    Unit("steps, or below 1 a fraction of all steps"),
]
StepsOrZero = Annotated[int, Field(ge=0), Unit("steps")]
Rows = Annotated[int, Field(ge=1), Unit("rows")]
TokenCount = Annotated[int, Field(ge=2), Unit("tokens")]


def _in_full(value: Any) -> Any:
    """300M -> 300,000,000."""
    if not isinstance(value, str):
        return value
    found = _IN_SHORT.fullmatch(value.replace("_", ""))
    if found is None:
        raise PydanticCustomError("token_budget", "a number of tokens, such as 300M or 1.5B")
    return int(Decimal(found[1]) * _TIMES[found[2].upper()])


_IN_SHORT = re.compile(r"(\d+(?:\.\d+)?)([kKmMbBtT])")
_TIMES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TokenBudget = Annotated[
    int, Field(ge=1), BeforeValidator(_in_full, json_schema_input_type=int | str), Unit("tokens, or 300M, 1B")
]
Seconds = Annotated[float, Field(gt=0.0), Unit("seconds")]
Share = Annotated[float, Field(ge=0.0, le=1.0), Unit("fraction of 1")]
Chance = Annotated[float, Field(ge=0.0, lt=1.0), Unit("probability")]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]  # of a moving average, for each step
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Rate = Annotated[float, Field(gt=0.0), Unit("per step")]
