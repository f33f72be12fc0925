"""Rules about streams, whose rows are read while training: their number is not known."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values

# key -> what to write instead; all of them need the rows, or their number, before the first step.
_NEEDS_ALL_ROWS = {
    "val_set_size": "Name held-out rows under test_datasets.",
    "group_by_length": "Remove it.",
    "dataset_exact_deduplication": "Remove it, and leave equal rows out beforehand.",
    "evals_per_epoch": "A stream has no epochs: write eval_steps.",
    "saves_per_epoch": "A stream has no epochs: write save_steps.",
}
_BUFFER = "streaming_multipack_buffer_size"


def _known_length(values: Values) -> Iterator[Finding]:
    if not values["streaming"]:
        return
    here = (("streaming",),)
    if values["max_steps"] is None and values["max_tokens"] is None:
        yield Finding(("streaming",), "a stream has no end: say how long to train, such as `max_steps: 1000`.")
    for key, instead in _NEEDS_ALL_ROWS.items():
        if values[key]:
            yield Finding((key,), f"{key} needs all rows, and streaming reads them one by one. {instead}", here)


def _full_rows_are_counted(values: Values) -> Iterator[Finding]:
    plain = all(entry.is_plain_text for entry in values["datasets"])
    if values["streaming"] and values["max_tokens"] is not None and not (plain or values["sample_packing"]):
        message = (
            "nobody knows how many tokens the rows of this stream have. Write max_steps, or `sample_packing: true`."
        )
        yield Finding(("max_tokens",), message, (("streaming",),))


def _whole_splits(values: Values) -> Iterator[Finding]:
    for i, entry in enumerate(values["datasets"] if values["streaming"] else ()):
        for name in ("shards", "max_samples"):
            if dict(entry)[name] is not None:
                message = f"{name} chooses rows by their number, and streaming reads all of them. Remove it."
                yield Finding(("datasets", i, name), message, (("streaming",),))
        if not entry.split.replace("_", "").replace("-", "").replace(".", "").isalnum():
            message = f"streaming reads whole splits, not '{entry.split}'. Write the name of one split."
            yield Finding(("datasets", i, "split"), message, (("streaming",),))


def _buffer_of_a_stream(values: Values) -> Iterator[Finding]:
    if values[_BUFFER] != 10_000 and not values["streaming"]:
        yield Finding((_BUFFER,), f"{_BUFFER} has no effect without `streaming: true`. Remove it.")


RULES: tuple[Rule, ...] = (
    (("streaming", "max_steps", "max_tokens", *_NEEDS_ALL_ROWS), _known_length),
    (("streaming", "max_tokens", "datasets", "sample_packing"), _full_rows_are_counted),
    (("streaming", "datasets"), _whole_splits),
    (("streaming", _BUFFER), _buffer_of_a_stream),
)
