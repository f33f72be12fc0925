"""LLaMA-Factory's datasets: names that are looked up in dataset_info.json, as entries of ours.

hiyouga/LLaMA-Factory 0.9.5, its data/parser, converter and loader: what a dataset's entry there
means, and what holds where it says nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.recipe.foreign.rewriting import Rewriting
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.rules import looks_local

INFO = "dataset_info.json"
_ASSUMED = " assumed"  # key of an entry that stands for one that is not at hand: none of its columns is left out
# Names that a ShareGPT row gives to roles and that are read without being said; the rest goes under `roles`.
_KNOWN_ROLES = {
    "user": ("user", "human"), "assistant": ("assistant", "gpt", "model"), "tool": ("tool", "observation"),
    "system": ("system",),
}  # fmt: skip
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_MEDIA = ("images", "videos", "audios")
_PREFERENCES = ("chosen", "rejected", "kto_tag")


class _UnknownError(Exception):
    """A dataset that cannot be an entry of ours; its text says why and what to do."""


@dataclass(frozen=True)
class Columns:
    """Columns of a dataset by LLaMA-Factory's names for them; None: there is none.

    Where its entry has `columns`, those that it does not name are none; else these are the defaults.
    """

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "Columns":
        """Return the columns that an entry of dataset_info.json names. Raises _UnknownError for other kinds of rows."""
        given = info.get("columns")
        if given is None:
            return cls()
        if not isinstance(given, dict) or not all(isinstance(name, str | None) for name in given.values()):
            raise _UnknownError(f"its `columns` in {INFO} are no names: {given!r:.80}")
        for name in _MEDIA:
            if given.get(name) is not None:
                raise _UnknownError(f"not supported yet: rows with {name}. Leave the dataset out")
        for name in _PREFERENCES:
            if given.get(name) is not None:
                raise _UnknownError("not supported yet: preference learning. Leave the dataset out")
        return cls(**{name: given.get(name) for name in cls.__dataclass_fields__})


def rewrite_datasets(rewriting: Rewriting, *, is_text: bool, only_last_turn: bool) -> bool:
    """Put the entries for `dataset` and `eval_dataset`; return whether tool results that follow each other are one.

    is_text: rows are plain text (`stage: pt`). only_last_turn: of each conversation the last answer is learned.
    """
    folder = rewriting.take("dataset_dir", "data")
    rewriting.take("media_dir")
    listing = _Listing(rewriting, folder, is_text=is_text, only_last_turn=only_last_turn)
    most = rewriting.take("max_samples", into="datasets.max_samples")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool)):
        rewriting.refuse("max_samples", f"max_samples is {most!r}, which is no number of rows.")
        most = None
    for key, ours in (("dataset", "datasets"), ("eval_dataset", "test_datasets")):
        named = rewriting.get(key)
        if named is None:
            rewriting.take(key)
            continue
        entries = listing.entries(key, named)
        if not entries and key == "dataset":  # it is refused; that there are no datasets is no second mistake
            rewriting.document.values["datasets"] = [{"path": "refused", "type": "completion"}]
        if entries:
            if most is not None:
                entries = [{**entry, "max_samples": most} for entry in entries]
            if key == "dataset":
                entries = _weighted(rewriting, entries)
            rewriting.put(ours, entries, of=key)
            rewriting.document.values.pop(key, None)
    for key in ("mix_strategy", "interleave_probs"):
        rewriting.take(key)
    return listing.merges_results


class _Listing:
    """dataset_info.json of one folder, and the entries that are made of it."""

    def __init__(self, rewriting: Rewriting, folder: Any, *, is_text: bool, only_last_turn: bool) -> None:
        self.rewriting, self.folder = rewriting, folder
        self.is_text, self.only_last_turn = is_text, only_last_turn
        self.merges_results = False

    def entries(self, key: str, named: Any) -> list[dict[str, Any]]:
        """Return the entries for the datasets that a key names; one that cannot be made is refused at the key."""
        names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            self.rewriting.refuse(key, f"{key} must be names of datasets, with commas between them.")
            return []
        try:
            listed = self._listed(key, names)
        except _UnknownError as error:
            self.rewriting.refuse(key, _sentence(f"{key}: {error}"))
            return []
        entries = []
        for name in names:
            try:
                entries.append(self._entry(name, listed[name]))
            except _UnknownError as error:
                self.rewriting.refuse(key, _sentence(f"{key}: '{name}': {error}"))
        return entries

    def _listed(self, key: str, names: list[str]) -> Mapping[str, Any]:
        """Return what dataset_info.json says of these names; where it is not at hand, what is assumed of them."""
        if self.folder == "ONLINE":
            return {name: {"hf_hub_url": name} for name in names}
        if not isinstance(self.folder, str):
            raise _UnknownError(f"dataset_dir is {self.folder!r:.60}, which is no folder")
        if self.folder.startswith("REMOTE:"):
            repository = self.folder.removeprefix("REMOTE:")
            self.rewriting.remark(
                f"`{key}: {', '.join(names)}` is looked up in {INFO} of the hub's dataset {repository}, which is not "
                "loaded here. Assumed: files there of those names with .json, with the columns instruction, input and "
                "output. Check them, or load it (hf download --repo-type dataset --local-dir) and name its folder as "
                "dataset_dir"
            )
            return {name: {"hf_hub_url": repository, "data_files": f"{name}.json", _ASSUMED: True} for name in names}
        path = Path(self.folder).expanduser() / INFO
        if not path.is_file():
            listed = ", ".join(f"{self.folder}/{name}.json" for name in names)
            self.rewriting.remark(
                f"{path} is not here (seen from {Path.cwd()}), where LLaMA-Factory looks `{key}: {', '.join(names)}` "
                f"up. Assumed: {listed}, with the columns instruction, input and output. Convert where the file is, or "
                "check the path, `type` and columns of each dataset"
            )
            return {name: {"file_name": f"{name}.json", _ASSUMED: True} for name in names}
        try:
            listed_there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _UnknownError(f"{path} cannot be read: {error}") from None
        for name in names:
            if not isinstance(listed_there, dict) or not isinstance(listed_there.get(name), dict):
                known = list(listed_there) if isinstance(listed_there, dict) else []
                raise _UnknownError(f"'{name}' is not in {path}.{did_you_mean(name, known)}")
        found: dict[str, Any] = listed_there
        return found

    def _entry(self, name: str, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entry of ours. Raises _UnknownError."""
        if info.get("ranking"):
            raise _UnknownError("not supported yet: preference learning (ranking). Leave the dataset out")
        if info.get("num_samples") is not None:
            raise _UnknownError(
                f"num_samples takes {info['num_samples']} rows by chance, which is not supported yet. Take it out of "
                f"{INFO}, and write max_samples under the dataset for the first rows"
            )
        columns, place = Columns.of(info), self._place(info)
        formatting = info.get("formatting", "alpaca")
        if self.is_text:
            return place | self._texts(place, columns, formatting, is_said=info.get("columns") is not None)
        if formatting == "alpaca":
            rows = {"type": "instruction_chat"} if info.get(_ASSUMED) is True else _instructions(columns)
        elif formatting in ("sharegpt", "openai"):
            self.merges_results |= formatting == "openai"
            rows = self._chats(name, place, columns, info, formatting)
        else:
            raise _UnknownError(f"its formatting is {formatting!r:.40}, which LLaMA-Factory does not have either")
        if info.get(_ASSUMED) is not True:  # what dataset_info.json names is read there, and nothing else
            rows = rows | {"unused_columns": "ignore"}
        return place | rows | ({"train_on_last_turn": True} if self.only_last_turn else {})

    def _place(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return path, split and the like. Raises _UnknownError for places that are not read here."""
        hub, file = info.get("hf_hub_url"), info.get("file_name")
        more: dict[str, Any] = {}
        if isinstance(hub, str):
            path = hub
            for key, ours in (("subset", "name"), ("split", "split")):
                if isinstance(info.get(key), str):
                    more[ours] = info[key]
            if isinstance(info.get("folder"), str):
                more["data_files"] = f"{info['folder'].rstrip('/')}/*"
            if isinstance(info.get("data_files"), str):
                more["data_files"] = info["data_files"]
        elif isinstance(info.get("ms_hub_url") or info.get("om_hub_url"), str):
            raise _UnknownError("its rows are on ModelScope's or Modelers' hub, which is not read. Download them first")
        elif info.get("script_url") is not None:
            raise _UnknownError("not supported yet: rows made by a Python script. Write them to a file first")
        elif isinstance(info.get("cloud_file_name"), str):
            path = info["cloud_file_name"]
        elif isinstance(file, str):
            path = (Path(str(self.folder)) / file).as_posix()
            path = path if looks_local(path) else f"./{path}"
            if isinstance(info.get("split"), str):
                more["split"] = info["split"]
        else:
            raise _UnknownError(f"{INFO} names no place of its rows (file_name, hf_hub_url)")
        return {"path": path, **more}

    def _texts(self, place: Mapping[str, Any], columns: Columns, formatting: str, *, is_said: bool) -> dict[str, Any]:
        if formatting != "alpaca" or columns.prompt is None:
            raise _UnknownError("not supported yet: plain text out of conversations. Name a column of text as `prompt`")
        row = self.rewriting.first_row(dict(place)) or {}
        if columns.query is not None and (is_said or row.get(columns.query)):
            raise _UnknownError(
                f"not supported yet: plain text joined from the columns {columns.prompt} and {columns.query}. Join them"
            )
        return {"type": "completion"} | ({"field": columns.prompt} if columns.prompt != "text" else {})

    def _chats(
        self, name: str, place: Mapping[str, Any], columns: Columns, info: Mapping[str, Any], formatting: str
    ) -> dict[str, Any]:
        if columns.messages is None:
            raise _UnknownError(f"its `columns` in {INFO} name no messages")
        entry: dict[str, Any] = {"type": "chat_template"}
        if columns.messages != "messages":
            entry["field_messages"] = columns.messages
        entry |= _tags(info, formatting)
        if columns.system not in (None, "system"):
            entry["field_system"] = columns.system
        if columns.tools not in (None, "tools"):
            entry["field_tools"] = columns.tools
        if columns.tools is not None:
            self.rewriting.remark(
                f"rows of '{name}' whose list of tools is empty begin with the question here; LLaMA-Factory puts an "
                "empty system turn before it"
            )
        row = self.rewriting.first_row({**place, "type": None}) or {}
        for part, column in (("system", columns.system), ("tools", columns.tools)):
            if column is None and row.get(part):
                self.rewriting.remark(
                    f"the rows of '{name}' have a column `{part}`, which {INFO} does not name, so that LLaMA-Factory "
                    "leaves it out; here it is read: take it out of the rows if that is not meant"
                )
        return entry


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _instructions(columns: Columns) -> dict[str, Any]:
    if columns.response is None:
        raise _UnknownError(f"its `columns` in {INFO} name no response, so there is nothing to learn")
    asked, more = columns.prompt, columns.query
    if asked is None:
        asked, more = more, None
    if asked is None:
        raise _UnknownError(f"its `columns` in {INFO} name no prompt")
    meant = {
        "instruction": asked, "input": more, "output": columns.response, "system": columns.system,
        "history": columns.history, "tools": columns.tools,
    }  # fmt: skip
    return {
        "type": "instruction_chat",
        "instruction_columns": {part: column or "" for part, column in meant.items() if column != part},
    }


def _tags(info: Mapping[str, Any], formatting: str) -> dict[str, Any]:
    """Return our keys for the names of a message's keys and of its roles. Raises _UnknownError for ones not read."""
    given = info.get("tags")
    if given is not None and not (isinstance(given, dict) and all(isinstance(t, str | None) for t in given.values())):
        raise _UnknownError(f"its `tags` in {INFO} are no names: {given!r:.80}")
    tags: Mapping[str, str | None] = _TAGS if given is None else {tag: given.get(tag) for tag in _TAGS}
    role, content, call = tags["role_tag"], tags["content_tag"], tags["function_tag"]
    if role is None or content is None:
        raise _UnknownError(f"its `tags` in {INFO} name no role_tag or no content_tag")
    if formatting == "sharegpt" and call not in (None, "function_call"):
        raise _UnknownError(f"not supported yet: the role '{call}' for tool calls. Call it function_call in the rows")
    entry: dict[str, Any] = {}
    if (role, content) != ("role", "content"):
        entry["message_property_mappings"] = {"role": role, "content": content}
    named = {
        "user": tags["user_tag"], "assistant": tags["assistant_tag"], "tool": tags["observation_tag"],
        "system": tags["system_tag"],
    }  # fmt: skip
    roles = {ours: [tag] for ours, tag in named.items() if tag is not None and tag not in _KNOWN_ROLES[ours]}
    return entry | ({"roles": roles} if roles else {})


def _weighted(rewriting: Rewriting, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries with the weights that mix_strategy and interleave_probs stand for."""
    strategy, shares = rewriting.get("mix_strategy", "concat"), rewriting.get("interleave_probs")
    if strategy == "interleave_over":
        rewriting.refuse(
            "mix_strategy",
            "mix_strategy: interleave_over repeats rows of the smaller datasets, which is not supported yet. Write "
            "interleave_under, or name a dataset twice.",
        )
    if strategy != "interleave_under" or len(entries) < 2:
        return entries
    texts = shares.split(",") if isinstance(shares, str) else shares if isinstance(shares, list) else [1] * len(entries)
    try:
        weights = [float(text) for text in texts]
    except (TypeError, ValueError):
        weights = []
    if len(weights) != len(entries) or min(weights) <= 0:
        rewriting.refuse("interleave_probs", "interleave_probs must be a number above 0 for each dataset.")
        return entries
    rewriting.remark(
        "mix_strategy: interleave_under is read as weights of the datasets: the same shares, of the largest mixture "
        "that repeats no row, in an order by chance"
    )
    return [{**entry, "weight": weight} for entry, weight in zip(entries, weights, strict=True)]
