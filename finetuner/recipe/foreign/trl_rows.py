"""TRL's datasets: which rows they are, by their columns or by what the recipe says, and which tokens are learned.

TRL looks at the first row of a dataset and has no key for the kind: huggingface/trl 1.16.0, SFTTrainer._prepare_dataset
and data_utils.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.recipe.foreign.rewriting import Rewriting

Entry = dict[str, Any]

CHATS: Entry = {"type": "chat_template"}
PAIRS: Entry = {"type": "prompt_completion"}
FROM_VALUE: Entry = {
    "type": "chat_template",
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}
# Columns that the recipe chooses leave the others out.
_CHOSEN_COLUMNS: Entry = {"unused_columns": "ignore"}
_OF_MESSAGES = ("chat_template", "prompt_completion")
# Columns beside messages that mean something here and nothing to TRL: a system text, tools, whether a row is learned.
_READ_HERE_ALONE = frozenset(
    ("system", "functions", "weight", "train", "loss", "loss_mask", "loss_weight", "trainable")
)
_SOURCES = ("datasets", "dataset_mixture", "dataset_mixer", "dataset_name")


class UnreadableRowsError(Exception):
    """Rows that TRL does not train on, or that cannot be told here. The message says which."""


def rewrite_rows(rewriting: Rewriting) -> None:
    """Rewrite the datasets, their splits and columns, and the keys that say which tokens are learned."""
    source = next((key for key in _SOURCES if rewriting.get(key) is not None), None)
    evaluates = rewriting.get("eval_strategy", rewriting.get("evaluation_strategy", "no")) != "no"
    try:
        train, test, held_out = _entries(rewriting, source, evaluates)
        may_be_messages = _say_kinds(rewriting, [*train, *test])
        if train:
            _say_what_is_learned(rewriting, train, may_be_messages)
    except UnreadableRowsError as error:
        rewriting.refuse(source or "dataset_name", str(error))
        rewriting.document.values["datasets"] = [{"path": "?", "type": "alpaca"}]  # so that it is said once
        train = []
    for key in ("dataset_config", "dataset_configs", "dataset_train_split", "dataset_test_split", "dataset_splits",
                "dataset_text_field", "dataset_kwargs", "dataset_streaming", "assistant_only_loss",
                "completion_only_loss", "test_split_size", *_SOURCES):  # fmt: skip
        if key not in (source, "datasets"):
            rewriting.ignore(key, f"{source} says it" if source else "no dataset is named")
    if not train or source is None:
        return
    rewriting.take(source)
    rewriting.put("datasets", train, of=source, quiet=True)
    if test and evaluates:
        rewriting.put("test_datasets", test, of=source, quiet=True)
    elif held_out:
        rewriting.put("val_set_size", held_out, of=source)
        if not evaluates:
            rewriting.defaults["eval_strategy"] = "no"


def _entries(
    rewriting: Rewriting, source: str | None, evaluates: bool
) -> tuple[list[Entry], list[Entry], float | None]:
    """Return the training entries, the held-out ones, and how many training rows to hold out instead."""
    if source is None:
        raise UnreadableRowsError("no dataset is named: TRL takes dataset_name, datasets or dataset_mixture.")
    value = rewriting.get(source)
    if source == "dataset_name":
        return *_named(rewriting, value, evaluates), None
    if source == "dataset_mixer":
        return *_mixer(rewriting, value), None
    streams = rewriting.take("streaming", default=False) if source == "datasets" else False
    if streams is True:
        rewriting.put("streaming", True, of="streaming")
    of_mixture = value if isinstance(value, dict) else {"datasets": value, **_around(rewriting)}
    return list(_mixture(of_mixture.get("datasets"))), [], of_mixture.get("test_split_size")


def _around(rewriting: Rewriting) -> Entry:
    return {"test_split_size": rewriting.take("test_split_size")}


def _named(rewriting: Rewriting, name: Any, evaluates: bool) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of dataset_name, dataset_config and the splits' names."""
    if not isinstance(name, str):
        raise UnreadableRowsError("dataset_name has a value that TRL would not take.")
    configuration = rewriting.take("dataset_config", into="datasets")
    entry: Entry = {"path": name} | ({"name": str(configuration)} if configuration is not None else {})
    train = str(rewriting.take("dataset_train_split", "train", into="datasets"))
    test = str(rewriting.take("dataset_test_split", "test", into="test_datasets"))
    if rewriting.take("dataset_streaming") is True:
        rewriting.put("streaming", True, of="dataset_streaming")
    splits = {} if train == "train" else {"split": train}
    return [entry | splits], [entry | {"split": test}] if evaluates else []


def _mixture(entries: Any) -> Iterator[Entry]:
    """Yield the entries of TRL's `datasets` and of alignment-handbook's dataset_mixture."""
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UnreadableRowsError("the mixture must hold `datasets`, a list of blocks.")
    for given in entries:
        path = given.get("path", given.get("id"))
        if not isinstance(path, str):
            raise UnreadableRowsError("a dataset of the mixture has no `path` or `id`.")
        known = {"path", "id", "name", "config", "split", "columns", "weight", "fraction", "data_files", "data_dir"}
        unknown = sorted(set(given) - known)
        if unknown or given.get("data_dir") is not None:
            key = unknown[0] if unknown else "data_dir"
            raise UnreadableRowsError(f"'{key}' of the dataset '{path}' is not supported yet. Name data_files instead.")
        entry: Entry = {"path": path}
        name = given.get("name", given.get("config"))
        if name not in (None, "default"):
            entry["name"] = str(name)
        if given.get("split", "train") != "train":
            entry["split"] = given["split"]
        if given.get("data_files") is not None:
            entry["data_files"] = given["data_files"]
        if given.get("columns") is not None:
            entry["columns"] = given["columns"]
        if given.get("fraction") is not None:
            entry["weight"] = given["fraction"]  # both: a share of the largest mixture that repeats no row
        _take_all_rows(path, given.get("weight", 1.0))
        yield entry


def _mixer(rewriting: Rewriting, mixed: Any) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of dataset_mixer, {dataset: share of its rows}, with dataset_splits and dataset_configs."""
    if not isinstance(mixed, dict) or not mixed:
        raise UnreadableRowsError("dataset_mixer must be a block: the name of each dataset and the share of its rows.")
    splits = rewriting.take("dataset_splits", ["train", "test"], into="datasets")
    configurations = rewriting.take("dataset_configs", into="datasets")
    columns = rewriting.take("columns_to_keep", into="datasets")
    names = configurations if isinstance(configurations, list) else [None] * len(mixed)
    train: list[Entry] = []
    test: list[Entry] = []
    for (path, share), name in zip(mixed.items(), names, strict=False):
        entry: Entry = {"path": path} | ({"name": str(name)} if name not in (None, "default") else {})
        entry |= {"columns": columns} if columns else {}
        for split in splits:
            if "train" in split:
                _take_all_rows(path, share)
                train.append(entry | ({} if split == "train" else {"split": split}))
            elif "test" in split:
                test.append(entry | {"split": split})
    return train, test


def _take_all_rows(path: str, share: Any) -> None:
    """Raise UnreadableRowsError unless the share of a dataset's rows is all of them."""
    if share is None or share == 1:
        return
    percent = f"train[:{share:.0%}]" if isinstance(share, float) and round(share * 100) == share * 100 else "train[:N]"
    raise UnreadableRowsError(
        f"a share of a dataset's rows ({share} of '{path}'), drawn at random, is not supported yet. Write "
        f"`weight: 1.0` here, and in the converted recipe `split: {percent}` for the first rows, or max_samples."
    )


def _say_kinds(rewriting: Rewriting, entries: list[Entry]) -> bool:
    """Add to each entry the type of its rows and their columns. Raises UnreadableRowsError.

    Return whether completions may be messages: none is at hand, or one is.
    """
    assumed: dict[str, Entry] = {}
    has_messages = False
    skips = (rewriting.take("dataset_kwargs", {}) or {}) if entries else {}
    arguments = dict(skips) if isinstance(skips, dict) else {"?": skips}
    is_tokenized = arguments.pop("skip_prepare_dataset", False) is True
    rest = [key for key, value in arguments.items() if value not in (None, False)]
    if rest:
        raise UnreadableRowsError(f"dataset_kwargs: {rest[0]} is not supported yet. Remove it.")
    for entry in entries:
        columns = entry.pop("columns", None)
        row = rewriting.first_row(entry)
        has_messages |= row is None
        if row is not None:
            has_messages |= not isinstance(row.get("completion"), str)
            _say_roles(rewriting, row)
            kind = _kind_of_row(_kept(row, columns), rewriting.get("dataset_text_field", "text"))
        elif columns is not None:
            kind = _kind_of_row(dict.fromkeys(columns), rewriting.get("dataset_text_field", "text"))
        elif is_tokenized:
            kind = {}
        else:
            kind = assumed.setdefault(entry["path"], _kind_by_keys(rewriting))
        entry |= kind | _left_out(rewriting, row or {}, columns, kind)
    if assumed:
        kind = next(iter(assumed.values()))
        kinds = {one: _IN_WORDS[one] for one in _IN_WORDS if one != kind["type"]}
        rewriting.remark(
            f"TRL tells the kind of rows by their columns. Those of {', '.join(assumed)} are not at hand: "
            f"{_IN_WORDS[kind['type']]} are assumed. `finetuner preview` shows them. Write "
            + ", or ".join(f"`type: {one}` for {words}" for one, words in kinds.items())
            + "; train_on_inputs is true for chats of which TRL learns every token, and for no others"
        )
    return has_messages


def _left_out(rewriting: Rewriting, row: Mapping[str, Any], columns: Any, kind: Entry) -> Entry:
    """Return the key that leaves out what TRL does not read of chats, and say so of columns that are read here."""
    unread = set(row) - set(columns) if columns is not None else set(row) & _READ_HERE_ALONE
    read_here = (
        sorted(unread & (_READ_HERE_ALONE | {"tools", "chat_template_kwargs"}))
        if kind.get("type") in _OF_MESSAGES
        else []
    )
    if not read_here:
        return {} if columns is None else _CHOSEN_COLUMNS
    rewriting.remark(
        f"TRL does not read the column{'s' if read_here[1:] else ''} {', '.join(read_here)} of the rows; nor are they "
        "read here. Take them out of unused_columns to have them read"
    )
    return {"unused_columns": read_here if columns is None else sorted(unread)}


def _say_roles(rewriting: Rewriting, row: Mapping[str, Any]) -> None:
    """Say that TRL hands roles such as `human` to the chat template as they are."""
    messages = row.get("conversations")
    named = [m.get("from") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    other = [str(role) for role in named if role not in (None, "system", "user", "assistant", "tool")]
    if other:
        rewriting.remark(
            f"TRL hands the role '{other[0]}' to the chat template as it is; here it is read as the template's own role"
        )


_IN_WORDS = {
    "chat_template": "chats (a column `messages`)",
    "prompt_completion": "rows with the columns `prompt` and `completion`",
    "completion": "rows of one text",
}


def _kept(row: Mapping[str, Any], columns: Any) -> Mapping[str, Any]:
    return row if columns is None else {name: row.get(name) for name in columns}


def _kind_by_keys(rewriting: Rewriting) -> Entry:
    """Return the kind of rows that are not at hand, by the keys that TRL heeds for one kind alone."""
    if rewriting.get("completion_only_loss") is not None:
        return PAIRS
    field = rewriting.get("dataset_text_field")
    if field is not None and rewriting.get("assistant_only_loss") is not True:
        return _texts(field)
    return CHATS


def _kind_of_row(row: Mapping[str, Any], text_field: Any) -> Entry:
    """Return the type of rows and its keys, in TRL's order of looking. Raises UnreadableRowsError.

    Values are None where only the names of the columns are known.
    """
    names = set(row)
    if names & {"chosen", "rejected"}:
        raise UnreadableRowsError(
            "its rows have chosen and rejected answers: preference learning is not supported yet. Only SFT recipes are "
            "converted."
        )
    if names & {"image", "images"} and not names & {"input_ids"}:
        raise UnreadableRowsError("its rows have images, which are not supported yet. Take rows of text.")
    if "input_ids" in names:
        if "labels" not in names:
            raise UnreadableRowsError(
                "its rows are tokens (input_ids) without labels, of which TRL learns all. Give them `labels`, a copy."
            )
        return {}
    if "conversations" in names and "messages" not in names:
        return _conversations(row["conversations"])
    if {"prompt", "completion"} <= names:
        return PAIRS
    if "messages" in names:
        return CHATS
    if text_field in names:
        return _texts(text_field)
    raise UnreadableRowsError(
        f"its rows have the columns {', '.join(sorted(names)) or '(none)'}, of which TRL trains on none: it reads "
        f"messages, conversations, prompt and completion, or '{text_field}' (dataset_text_field)."
    )


def _conversations(messages: Any) -> Entry:
    first = messages[0] if isinstance(messages, list) and messages else None
    has_roles = isinstance(first, dict) and "role" in first
    return {**CHATS, "field_messages": "conversations"} if has_roles else FROM_VALUE


def _texts(field: Any) -> Entry:
    return {"type": "completion"} | ({} if field == "text" else {"field": field})


def _say_what_is_learned(rewriting: Rewriting, train: list[Entry], may_be_messages: bool) -> None:
    """Write train_on_inputs: TRL learns prompts of chats unless assistant_only_loss is true, and of rows with a prompt
    and a completion if completion_only_loss is false. Raises UnreadableRowsError."""
    only_answers = rewriting.take("assistant_only_loss", default=False) is True
    only_completions = rewriting.take("completion_only_loss")
    kinds = {str(entry.get("type")) for entry in train}
    _say_other_masks(rewriting, kinds, only_answers, may_be_messages)
    if "prompt_completion" in kinds and len(kinds) > 1:
        raise UnreadableRowsError("some datasets hold a prompt and a completion, others do not: TRL cannot mix them.")
    if only_answers and "completion" in kinds:
        raise UnreadableRowsError("assistant_only_loss is true, but the rows are plain texts. Remove it.")
    key, learns_prompts = "assistant_only_loss", "chat_template" in kinds and not only_answers
    if kinds == {"prompt_completion"}:
        key, learns_prompts = "completion_only_loss", only_completions is False
        if learns_prompts and only_answers:
            raise UnreadableRowsError(
                "answers in the prompts are to be learned as well (completion_only_loss: false with "
                "assistant_only_loss), which is not supported yet. Write the rows as messages."
            )
    elif only_completions is True:
        rewriting.remark("completion_only_loss is for rows with a prompt and a completion: TRL heeds it for no others")
    if key in rewriting.given and kinds & {"chat_template", "prompt_completion"}:
        rewriting.put("train_on_inputs", learns_prompts, of=key)
    elif learns_prompts:
        rewriting.defaults["train_on_inputs"] = True


def _say_other_masks(rewriting: Rewriting, kinds: set[str], only_answers: bool, may_be_messages: bool) -> None:
    """Say which tokens TRL learns beside an answer and its end, which are all that is learned here."""
    if only_answers and "chat_template" in kinds:
        rewriting.remark(
            "with assistant_only_loss TRL learns what a template marks with {% generation %}, as is done here; in the "
            "place of some known templates it puts marked ones of its own, which take in the line breaks beside an "
            "answer, and those are not learned here"
        )
    if "prompt_completion" in kinds and may_be_messages:
        rewriting.remark(
            "of a completion of messages TRL learns all that stands behind the prompt, also a line break behind the "
            "answer's end and messages that are no answers; here answers and their ends"
        )
