"""What Axolotl does where a recipe says nothing and this toolkit does something else.

From axolotl-ai-cloud/axolotl 0.19.0: AxolotlInputConfig among its schemas, and _configure_warmup_and_logging
of its trainer builder. Defaults that only change what is logged or kept are
not here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# keys of which one must be given -> Axolotl's default, and ours, in words
DEFAULTS: dict[tuple[str, ...], tuple[str, str]] = {
    ("sequence_len", "sequence_length", "max_seq_length"): ("512", "2048"),
    ("warmup_ratio", "warmup_steps"): ("3 % of the steps, at most 100", "none"),
}


def unlike_ours(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for each key that `values` leave to a default which is another in Axolotl."""
    for keys, (theirs, ours) in DEFAULTS.items():
        if all(values.get(key) is None for key in keys):
            yield keys[0], f"is not given: Axolotl takes {theirs} then, and here it is {ours}. Write what you mean"
