"""Names of columns and keys that are plainly inert: nothing that a model could learn from is lost without them.

An id, a date, a source, a count. A name that is not among them may be a part of what its author trained on.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from finetuner.data.media import is_media

# In snake case: createdAt is created_at.
INERT = frozenset({
    "", "id", "idx", "index", "uuid", "guid", "uid", "qid", "pid", "key", "row", "hash", "sha", "hexsha", "md5",
    "timestamp", "timestamps", "time", "date", "datetime", "year", "created", "updated", "modified", "meta", "metadata",
    "source", "sources", "src", "origin", "provenance", "dataset", "subset", "config", "split", "corpus", "dump", "url",
    "urls", "uri", "link", "path", "file", "filename", "ext", "title", "author", "authors", "username", "license",
    "licence", "language", "lang", "languages", "locale", "country", "category", "categories", "subcategory", "topic",
    "topics", "subtopic", "tag", "tags", "keywords", "domain", "genre", "type", "level", "difficulty", "grade",
    "rating", "score", "scores", "quality", "views", "stars", "likes", "votes", "upvotes", "downvotes", "model",
    "generator", "engine", "annotator", "annotators", "version", "revision", "commit", "fold", "shard", "token_count",
    "tokens_count", "length", "len", "size", "turn", "turns", "perplexity", "ppl", "toxicity", "toxic", "redacted",
    "moderation", "hashed_ip", "finish_reason", "finish_reasons", "usage", "latency", "parallel_tool_calls",
    "token_type_ids", "special_tokens_mask", "skip_prompt_formatting", "used_in_training", "file_extension",
    "crawl", "added", "attributes",
})  # fmt: skip
_INERT_FORM = re.compile(
    r"(.*_(id|uuid|guid|hash|sha|sha1|sha256|hexsha|md5|url|uri|at|date|time|datetime|timestamp|source|language|lang|"
    r"licenses?|score|rating|idx|index|split|version|count|name|path|filename|metadata|meta|category|type|moderation|"
    r"model|length|offset|fraction|ratio|stars)|"
    r"(num|n|nr|max|min|avg|mean|total)_.*|unnamed: ?\d+|__index_level_\d+__)\Z"
)
# Thoughts under names that no template reads.
OTHER_THOUGHTS = r"thoughts?|think|thinking_content|cot|chain_of_thought|rationale|scratchpad|reasoning_\w+"
# Of such a form, and they say something.
_NOT_INERT = re.compile(
    r"(function|tool|character|persona|speaker|user|assistant|bot|role|player)_name|(reward|world)_model|instruction_type"
)


def snake_case(name: str) -> str:
    """Return the name in lower case with underscores: createdAt becomes created_at."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower() if name else name


def is_inert(name: str) -> bool:
    """Whether a column or key of this name holds nothing that a model would learn from."""
    snake = snake_case(name)
    if _NOT_INERT.fullmatch(snake) or is_media(snake):
        return False
    return snake in INERT or _INERT_FORM.match(snake) is not None or name.startswith("Unnamed:")


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, "", [] or {}, or one that holds only such, or is the JSON of one."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")):
        return True
    if isinstance(value, Mapping):
        return all(is_empty(inner) for inner in value.values())
    return isinstance(value, list | tuple) and all(is_empty(inner) for inner in value)


def in_yaml_list(names: list[str]) -> str:
    """Return names as a YAML list, quoted where YAML asks for it."""
    return "[" + ", ".join(name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else json.dumps(name) for name in names) + "]"
