"""Options of a merge, and the KEY=VALUE words in which `finetuner merge` takes them."""

import re
from dataclasses import dataclass
from pathlib import Path

from finetuner.errors import RecipeError

MERGE_DTYPES = ("bfloat16", "float16", "float32")
MERGE_BASES = ("dequantized", "original")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
QUANTIZED = ("4bit", "8bit", "int4", "int8", "nf4", "fp4", "4", "8")
MERGE_KEYS = ("output", "dtype", "shard_size", "base", "verify")


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge; None: as the base is, in the adapter's folder `merged`.

    `output`: the folder to write. `dtype`: number format of the weights, one of MERGE_DTYPES. `shard_bytes`: size of a
    file of weights at most. `dequantize`: merge onto the base as it was quantized in training (True), onto the original
    weights (False), or onto what training saw, as far as that is known (None). `verify`: read the result back and
    compare. `base_model`: for an adapter's folder, another base than the one it names.
    """

    output: str | Path | None = None
    dtype: str | None = None
    shard_bytes: int | None = None
    dequantize: bool | None = None
    verify: bool = True
    base_model: str | None = None

    def __post_init__(self) -> None:
        """Raise RecipeError for a dtype that weights are not stored in."""
        if self.dtype in QUANTIZED:
            raise RecipeError(
                f"dtype={self.dtype}: an adapter is not merged into {self.dtype} weights: their steps are wider than "
                "most of what it changes, and 3 % of a small update's direction is left.\n"
                "Merge into bfloat16 and let the tool that serves the model quantize it, or serve base and adapter "
                "apart."
            )
        if self.dtype is not None and self.dtype not in MERGE_DTYPES:
            raise RecipeError(
                f"dtype={self.dtype} is not one that weights are stored in. Write one of {', '.join(MERGE_DTYPES)}."
            )


def read_merge_options(words: list[str]) -> tuple[MergeOptions, list[str]]:
    """Split KEY=VALUE words into the options of a merge and those that belong to a recipe. Raises RecipeError."""
    values: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in MERGE_KEYS:
            others.append(word)
        elif not equals or not value:
            raise RecipeError(f"'{word}' has no value. Write {key}=...")
        else:
            values[key] = value
    verify, base = values.get("verify", "true"), values.get("base")
    if verify not in ("true", "false"):
        raise RecipeError(f"verify={verify} is neither true nor false.")
    if base is not None and base not in MERGE_BASES:
        raise RecipeError(
            f"base={base}: it says onto which form of the base to merge, {' or '.join(MERGE_BASES)}.\n"
            f"To name another base model: base_model={base}"
        )
    options = MergeOptions(
        output=Path(values["output"]) if "output" in values else None,
        dtype=values.get("dtype"),
        shard_bytes=_bytes(values["shard_size"]) if "shard_size" in values else None,
        dequantize=None if base is None else base == "dequantized",
        verify=verify == "true",
    )
    return options, others


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]i?B)", text, re.IGNORECASE)
    size = round(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if not size:
        raise RecipeError(f"shard_size={text} is not a size. Write a number and a unit, such as shard_size=5GB.")
    return size
