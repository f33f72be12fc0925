"""Rules about datasets, their formats and templates, and packing."""

import re
from collections.abc import Iterator

from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.rules.files import DATA_SUFFIXES, data_suffix
from finetuner.recipe.sections import DatasetEntry, InstructionFormat
from finetuner.recipe.sections.datasets import CHAT_TEMPLATES, CHATS, FALLBACK, KEYS_OF_TYPE

_PACK_ATTENTION = "pretrain_multipack_attn"


def _entries(values: Values) -> Iterator[tuple[str, int, DatasetEntry]]:
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(values[key]):
            if isinstance(entry, DatasetEntry):
                yield key, i, entry


def _held_out_size(values: Values) -> Iterator[Finding]:
    size = values["val_set_size"]
    if size >= 1 and size != int(size):
        yield Finding(("val_set_size",), f"{size} is neither a fraction below 1 nor a whole number of rows.")
    if size and values["test_datasets"]:
        yield Finding(("val_set_size",), "test_datasets already says what is held out. Remove one of the two.")


def _keys_of_their_type(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        for name in sorted(entry.model_fields_set & set(KEYS_OF_TYPE)):
            default = type(entry).model_fields[name].default
            types = KEYS_OF_TYPE[name]
            if entry.type not in types and dict(entry)[name] != default:
                listed = " and ".join(f"`type: {one}`" for one in types)
                yield Finding((key, i, name), f"{name} is for {listed}. Remove it.")


def _names_are_the_hubs(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        for name in ("name", "revision"):
            if dict(entry)[name] is not None and entry.path.endswith(DATA_SUFFIXES):
                yield Finding((key, i, name), f"{name} chooses a part of a hub dataset; a file has none. Remove it.")


def _only_text_is_cut(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        is_text = entry.ds_type == "text" or (entry.ds_type is None and data_suffix(entry.path) == ".txt")
        if entry.sample_by != "line" and not is_text:
            message = "sample_by is for text files; other rows are rows already. Remove it, or write `ds_type: text`."
            yield Finding((key, i, "sample_by"), message)


def _shards_that_exist(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        if entry.shards_idx >= (entry.shards or 1):
            count = f"shards is {entry.shards}" if entry.shards else "shards is not given"
            yield Finding(
                (key, i, "shards_idx"), f"there is no part {entry.shards_idx}: {count}, and parts count from 0."
            )


def _weights_of_all_or_none(values: Values) -> Iterator[Finding]:
    weighted = [i for i, entry in enumerate(values["datasets"]) if entry.weight is not None]
    others = [i for i, entry in enumerate(values["datasets"]) if entry.weight is None]
    if weighted and others:
        message = f"'{values['datasets'][others[0]].path}' has no weight beside it. Give each dataset one, or none."
        yield Finding(("datasets", weighted[0], "weight"), message, (("datasets", others[0]),))
    for i, entry in enumerate(values["test_datasets"]):
        if entry.weight is not None:
            yield Finding(
                ("test_datasets", i, "weight"), "weights mix training rows; held-out ones all count. Remove it."
            )
    if values["mix_by"] != "rows" and not weighted:
        yield Finding(("mix_by",), "mix_by has no effect: no dataset has a weight. Remove it, or give each a weight.")


_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PLACEHOLDERS_OF = {
    "format": ("instruction", "input", "system"),
    "no_input_format": ("instruction", "system"),
    "system_format": ("system",),
    "output_format": ("output",),
}


def _placeholders_of_a_format(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        if not isinstance(entry.type, InstructionFormat):
            continue
        for name, known in _PLACEHOLDERS_OF.items():
            used = _PLACEHOLDER.findall(dict(entry.type)[name])
            for word in sorted(set(used) - set(known)):
                listed = ", ".join(f"{{{one}}}" for one in known)
                message = f"{{{word}}} stands for nothing in {name}; it may have {listed}.{did_you_mean(word, known)}"
                yield Finding((key, i, "type", name), message)
            if known[0] not in used and not set(used) - set(known):
                message = f"{name} has no {{{known[0]}}}, so the row's text would be left out. Write it where it goes."
                yield Finding((key, i, "type", name), message)


def _each_column_once(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        form = entry.type
        if not isinstance(form, InstructionFormat):
            continue
        names = ("field_output", "field_instruction", "field_input", "field_system")
        columns: dict[str, str] = {}
        for name in names:
            column, default = dict(form)[name], InstructionFormat.model_fields[name].default
            if column == "" or column not in columns:
                columns[column] = name
            elif column != default or name in names[:2]:
                message = f"the column '{column}' is {columns[column]} already, so its text would stand there twice."
                yield Finding((key, i, "type", name), message, ((key, i, "type", columns[column]),))


def _unused_columns_that_are_not_needed(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        for name in entry.unused_names:
            if name in entry.required_columns:
                message = f"the column '{name}' is what the rows are read from. Take it out of unused_columns."
                yield Finding((key, i, "unused_columns"), message)


def _one_role_a_name(values: Values) -> Iterator[Finding]:
    for key, i, entry in _entries(values):
        found: dict[str, str] = {}
        for role, names in entry.roles.items():
            for name in names:
                other = found.setdefault(name.strip().lower(), role)
                if other != role:
                    yield Finding((key, i, "roles"), f"'{name}' is under '{other}' and under '{role}'. Leave one.")


def _one_chat_template(values: Values) -> Iterator[Finding]:
    """A trained model answers in one form, and its tokenizer is saved with one template: all datasets must agree."""
    default = values["chat_template"], values["chat_template_jinja"]
    first: tuple[tuple[str | None, str | None], tuple[str | int, ...]] | None = None
    for key, i, entry in _entries(values):
        if entry.type not in CHATS and not (entry.type == "prompt_completion" and entry.chat_keys_set):
            continue
        named = entry.chat_template is not None or entry.chat_template_jinja is not None
        chosen = (entry.chat_template, entry.chat_template_jinja) if named else default
        where = (key, i, "chat_template" if entry.chat_template is not None else "chat_template_jinja")
        if first is not None and first[0] != chosen:
            message = "every dataset must be rendered with the same chat template: the model answers in one form."
            yield Finding(where if named else (key, i), message, (first[1],))
        first = first or (chosen, where if named else (key, i))


def _a_template_of_that_name(values: Values) -> Iterator[Finding]:
    names: list[tuple[tuple[str | int, ...], str | None]] = [(("chat_template",), values["chat_template"])]
    names += [((key, i, "chat_template"), entry.chat_template) for key, i, entry in _entries(values)]
    known = ("tokenizer_default", "jinja", *CHAT_TEMPLATES)
    for where, name in names:
        if name is not None and name.removeprefix(FALLBACK) not in known:
            message = (
                f"chat_template is not supported yet: the name '{name}'. Write one of: {', '.join(known)}."
                f"{did_you_mean(name, known)} A template of your own: jinja, and chat_template_jinja beside it."
            )
            yield Finding(where, message)


def _template_and_its_text(values: Values) -> Iterator[Finding]:
    places: list[tuple[tuple[str | int, ...], str | None, str | None]] = [
        ((), values["chat_template"], values["chat_template_jinja"])
    ]
    places += [((k, i), entry.chat_template, entry.chat_template_jinja) for k, i, entry in _entries(values)]
    for where, name, text in places:
        if name == "jinja" and text is None:
            yield Finding((*where, "chat_template"), "chat_template: jinja needs chat_template_jinja beside it.")
        if text is not None and name not in (None, "jinja"):
            message = f"chat_template is '{name}', so this has no effect. Write `chat_template: jinja`, or remove it."
            yield Finding((*where, "chat_template_jinja"), message, ((*where, "chat_template"),))


def _packing_makes_lengths_equal(values: Values) -> Iterator[Finding]:
    if values["sample_packing"] and values["group_by_length"]:
        message = "packs are all of nearly one length: group_by_length has no effect with sample_packing. Remove it."
        yield Finding(("group_by_length",), message, (("sample_packing",),))


def _only_plain_texts_see_each_other(values: Values) -> Iterator[Finding]:
    if values[_PACK_ATTENTION]:
        return
    if not values["sample_packing"]:
        message = f"{_PACK_ATTENTION} is about the documents of a pack. Write `sample_packing: true`, or remove it."
        yield Finding((_PACK_ATTENTION,), message, (("sample_packing",),))
    for i, entry in enumerate(values["datasets"]):
        if not entry.is_plain_text:
            message = (
                f"{_PACK_ATTENTION}: false is for plain texts, and these rows are `type: {entry.type}`: an answer "
                "would be predicted from other rows' words. Remove it."
            )
            yield Finding((_PACK_ATTENTION,), message, (("datasets", i, "type"),))


_SOURCES = ("datasets", "test_datasets")

RULES: tuple[Rule, ...] = (
    (("val_set_size", "test_datasets"), _held_out_size),
    (_SOURCES, _keys_of_their_type),
    (_SOURCES, _names_are_the_hubs),
    (_SOURCES, _only_text_is_cut),
    (_SOURCES, _shards_that_exist),
    ((*_SOURCES, "mix_by"), _weights_of_all_or_none),
    (_SOURCES, _placeholders_of_a_format),
    (_SOURCES, _each_column_once),
    (_SOURCES, _unused_columns_that_are_not_needed),
    (_SOURCES, _one_role_a_name),
    ((*_SOURCES, "chat_template", "chat_template_jinja"), _one_chat_template),
    ((*_SOURCES, "chat_template"), _a_template_of_that_name),
    ((*_SOURCES, "chat_template", "chat_template_jinja"), _template_and_its_text),
    (("sample_packing", "group_by_length"), _packing_makes_lengths_equal),
    ((_PACK_ATTENTION, "sample_packing", "datasets"), _only_plain_texts_see_each_other),
)
