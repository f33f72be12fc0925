"""Rules that span keys, and files that must exist. Each finding names the key that should change."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetuner.recipe.problems import KeyPath
from finetuner.recipe.sections import DatasetEntry

Values = Mapping[str, Any]  # key -> validated value; a key in error is missing
Finding = tuple[KeyPath, str]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def looks_local(path: str) -> bool:
    """Whether `path` means a place on this disk rather than a hub id (`name` or `owner/name`)."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or path.endswith(DATA_SUFFIXES)


def rule_findings(values: Values) -> Iterator[Finding]:
    """Apply every rule whose keys are all valid."""
    for keys, rule in _RULES:
        if all(key in values for key in keys):
            yield from rule(values)


def given_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that were written although they can have no effect; a default in their place would be no mistake."""
    if raw.get("adapter") is None:
        for key in raw:
            if key.startswith("lora_") and raw[key] is not None:
                yield (key,), f"{key} has no effect without `adapter: lora`. Add that line, or remove this one."


def file_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Names that mean this disk, and are not there.

    Takes the values as they were written, so that a mistake beside a name does not hide that the name is wrong too.
    """
    for key in ("base_model", "tokenizer"):
        name = raw.get(key)
        if isinstance(name, str) and name and looks_local(name) and not _on_disk(name, Path.is_dir):
            yield (key,), f"there is no model folder '{name}' (seen from {Path.cwd()}). Give a folder or a hub id."
    for key in ("datasets", "test_datasets"):
        entries = raw.get(key)
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            path = entry.get("path") if isinstance(entry, dict) else None
            if isinstance(path, str) and looks_local(path) and not _on_disk(path, Path.exists):
                yield (key, i, "path"), f"there is no file '{path}' (seen from {Path.cwd()})."
    output = raw.get("output_dir")
    for key in ("base_model", "tokenizer"):
        name = raw.get(key)
        if isinstance(output, str) and isinstance(name, str) and _same_folder(output, name):
            yield ("output_dir",), f"output_dir is the folder of {key}: the run would write over it. Name another."
    resume = raw.get("resume_from_checkpoint")
    if isinstance(resume, str) and not _on_disk(resume, Path.is_dir):
        yield (
            ("resume_from_checkpoint",),
            f"there is no checkpoint folder '{resume}'. Write true for the newest one in output_dir.",
        )


def _same_folder(one: str, other: str) -> bool:
    return _on_disk(other, Path.is_dir) and _on_disk(
        one, lambda path: path.resolve() == Path(other).expanduser().resolve()
    )


def _on_disk(name: str, is_there: Callable[[Path], bool]) -> bool:
    try:
        return is_there(Path(name).expanduser())
    except (OSError, RuntimeError):  # a name too long for any file, or the home of an unknown user
        return False


def _one_of(first: str, second: str, why: str) -> Callable[[Values], Iterator[Finding]]:
    def rule(values: Values) -> Iterator[Finding]:
        if values[first] is not None and values[second] is not None:
            yield (second,), f"{first} and {second} are both given: {why}. Remove one."

    return rule


def _one_precision(values: Values) -> Iterator[Finding]:
    if values["bf16"] is True and values["fp16"]:
        yield ("fp16",), "bf16 and fp16 are both true: a run computes in one of them. Set one to false."


def _one_way_to_name_targets(values: Values) -> Iterator[Finding]:
    if values["lora_target_linear"] and values["lora_target_modules"] is not None:
        message = "lora_target_linear adapts every linear layer, lora_target_modules the named ones. Remove one."
        yield ("lora_target_modules",), message
    if values["lora_target_linear"] is False and values["lora_target_modules"] is None:
        message = "no layer is named. Write lora_target_modules: [q_proj, v_proj], or remove this line for all of them."
        yield ("lora_target_linear",), message
    if values["lora_target_modules"] == ():
        yield ("lora_target_modules",), "no layer is named: nothing would be trained. Name some, or remove the key."


def _whole_rows_held_out(values: Values) -> Iterator[Finding]:
    size = values["val_set_size"]
    if size >= 1 and size != int(size):
        yield ("val_set_size",), f"{size} is neither a fraction below 1 nor a whole number of rows."
    if size and values["test_datasets"]:
        yield ("val_set_size",), "test_datasets already says what is held out. Remove one of the two."


def _evaluation_needs_rows(values: Values) -> Iterator[Finding]:
    if not values["val_set_size"] and not values["test_datasets"]:
        for key in ("eval_steps", "evals_per_epoch", "eval_on_start"):
            if values[key]:
                yield (key,), f"{key} needs held-out rows: add `val_set_size: 0.05` or test_datasets."


def _floor_is_cosines(values: Values) -> Iterator[Finding]:
    if values["cosine_min_lr_ratio"] and values["lr_scheduler"] != "cosine":
        message = f"has no effect with lr_scheduler '{values['lr_scheduler']}'. Write `lr_scheduler: cosine`."
        yield ("cosine_min_lr_ratio",), "cosine_min_lr_ratio " + message


def _columns_of_their_type(values: Values) -> Iterator[Finding]:
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(values[key]):
            given = isinstance(entry, DatasetEntry) and "field_messages" in entry.model_fields_set
            if given and entry.type != "chat_template" and entry.field_messages != "messages":
                yield (key, i, "field_messages"), "field_messages is for `type: chat_template`. Remove it."


def _names_are_the_hubs(values: Values) -> Iterator[Finding]:
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(values[key]):
            if entry.name is not None and entry.path.endswith(DATA_SUFFIXES):
                yield (key, i, "name"), "name chooses a part of a hub dataset; a file has none. Remove it."


def _fresh_or_resumed(values: Values) -> Iterator[Finding]:
    if values["overwrite_output_dir"] and values["resume_from_checkpoint"] is not False:
        yield (
            ("overwrite_output_dir",),
            "overwrite_output_dir deletes the checkpoints that resume_from_checkpoint would go on from. Remove one.",
        )


_RULES: tuple[tuple[tuple[str, ...], Callable[[Values], Iterator[Finding]]], ...] = (
    (("warmup_steps", "warmup_ratio"), _one_of("warmup_steps", "warmup_ratio", "both say how long the warmup is")),
    (("eval_steps", "evals_per_epoch"), _one_of("eval_steps", "evals_per_epoch", "both say when to evaluate")),
    (("save_steps", "saves_per_epoch"), _one_of("save_steps", "saves_per_epoch", "both say when to save")),
    (("bf16", "fp16"), _one_precision),
    (("lora_target_linear", "lora_target_modules"), _one_way_to_name_targets),
    (("val_set_size", "test_datasets"), _whole_rows_held_out),
    (("val_set_size", "test_datasets", "eval_steps", "evals_per_epoch", "eval_on_start"), _evaluation_needs_rows),
    (("cosine_min_lr_ratio", "lr_scheduler"), _floor_is_cosines),
    (("datasets", "test_datasets"), _columns_of_their_type),
    (("datasets", "test_datasets"), _names_are_the_hubs),
    (("overwrite_output_dir", "resume_from_checkpoint"), _fresh_or_resumed),
)
