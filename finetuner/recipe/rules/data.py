"""Rules about rows."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.rules.files import DATA_SUFFIXES
from finetuner.recipe.sections import DatasetEntry


def _whole_rows_held_out(values: Values) -> Iterator[Finding]:
    size = values["val_set_size"]
    if size >= 1 and size != int(size):
        yield Finding(("val_set_size",), f"{size} is neither a fraction below 1 nor a whole number of rows.")
    if size and values["test_datasets"]:
        yield Finding(("val_set_size",), "test_datasets already says what is held out. Remove one of the two.")


def _columns_of_their_type(values: Values) -> Iterator[Finding]:
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(values[key]):
            given = isinstance(entry, DatasetEntry) and "field_messages" in entry.model_fields_set
            if given and entry.type != "chat_template" and entry.field_messages != "messages":
                yield Finding((key, i, "field_messages"), "field_messages is for `type: chat_template`. Remove it.")


def _names_are_the_hubs(values: Values) -> Iterator[Finding]:
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(values[key]):
            if entry.name is not None and entry.path.endswith(DATA_SUFFIXES):
                yield Finding((key, i, "name"), "name chooses a part of a hub dataset; a file has none. Remove it.")


RULES: tuple[Rule, ...] = (
    (("val_set_size", "test_datasets"), _whole_rows_held_out),
    (("datasets", "test_datasets"), _columns_of_their_type),
    (("datasets", "test_datasets"), _names_are_the_hubs),
)
