"""The settings of `finetuner merge` that are no recipe's keys."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from finetuner.errors import RecipeError

DTYPES = ("bfloat16", "float16", "float32")
BASES = ("dequantized", "original")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
QUANTISED = ("4bit", "8bit", "int4", "int8", "nf4", "fp4", "4", "8")


@dataclass(frozen=True)
class Wishes:
    """None: as the base is. `dequantize`: onto the base as it was quantised, or not; None: as training saw it, as far
    as that is known."""

    output: Path | None = None
    dtype: str | None = None
    shard_bytes: int | None = None
    dequantize: bool | None = None
    verify: bool = True
    others: list[str] = field(default_factory=list)


def read_wishes(words: list[str]) -> Wishes:
    """`words` are KEY=VALUE; `others` are those that belong to a recipe. Raises RecipeError."""
    values: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in ("output", "dtype", "shard_size", "base", "verify"):
            others.append(word)
        elif not equals or not value:
            raise RecipeError(f"'{word}' has no value. Write {key}=...")
        else:
            values[key] = value
    verify = values.get("verify", "true")
    if verify not in ("true", "false"):
        raise RecipeError(f"verify={verify} is neither true nor false.")
    dtype, base = values.get("dtype"), values.get("base")
    if dtype in QUANTISED:
        raise RecipeError(
            f"dtype={dtype}: an adapter is not merged into {dtype} weights: their steps are wider than most of what it "
            "changes, and 3 % of a small update's direction is left.\n"
            "Merge into bfloat16 and let the tool that serves the model quantise it, or serve base and adapter apart."
        )
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype={dtype} is not one that weights are stored in. Write one of {', '.join(DTYPES)}.")
    if base is not None and base not in BASES:
        raise RecipeError(
            f"base={base}: it says onto which form of the base to merge, {' or '.join(BASES)}.\n"
            f"To name another base model: base_model={base}"
        )
    return Wishes(
        output=Path(values["output"]) if "output" in values else None,
        dtype=dtype,
        shard_bytes=_bytes(values["shard_size"]) if "shard_size" in values else None,
        dequantize=None if base is None else base == "dequantized",
        verify=verify == "true",
        others=others,
    )


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]i?B)", text, re.IGNORECASE)
    size = round(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if not size:
        raise RecipeError(f"shard_size={text} is not a size. Write a number and a unit, such as shard_size=5GB.")
    return size
