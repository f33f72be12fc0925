"""What rows and messages say of themselves: that they are trained on, or not."""

from collections.abc import Iterable, Mapping
from typing import Any

from finetuner.errors import DataError

# train and weight: OpenAI's and ShareGPT's words; loss, loss_weight: LLaMA-Factory's; loss_mask: verl's.
FLAGS = ("train", "weight", "loss", "loss_mask", "loss_weight", "trainable")

_WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # CSV knows texts only


def read_flag(names: Iterable[str], cells: Mapping[str, Any], where: str) -> bool | None:
    """Return whether cells of these names say that what they stand in is trained on; None if none of them is there.

    Raises DataError if one is neither 1 nor 0, or two of them disagree. `where`: the place, for the error.
    """
    found: dict[str, bool] = {}
    for name in names:
        value = cells.get(name)
        if value is None:
            continue
        is_true = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
        if isinstance(value, bool | int | float) and value in (0, 1):
            is_true = bool(value)
        if is_true is None:
            raise DataError(
                f"{where}: '{name}' is {value!r:.60}, but must be true or false (1 or 0): a text is trained on or "
                f"not. If it says something else: `unused_columns: [{name}]`"
            )
        found[name] = is_true
    if len(set(found.values())) > 1:
        said = " and ".join(f"'{name}' is {str(value).lower()}" for name, value in found.items())
        raise DataError(f"{where}: {said}. Only one can be true: remove the wrong one, or name it in `unused_columns`")
    return next(iter(found.values()), None)
