"""Renames the keys of fsdp_config that carry accelerate's prefix: fsdp_offload_params is offload_params."""

from finetuner.recipe.problems import Problem
from finetuner.recipe.yaml_document import YamlDocument

BLOCK, PREFIX = "fsdp_config", "fsdp_"


def drop_fsdp_prefix(document: YamlDocument, *, overrides: bool = False) -> None:
    """Rename the keys in place. A key that is there in both spellings is a problem, unless `overrides` were applied:
    then the prefixed one is the override, and wins."""
    block = document.values.get(BLOCK)
    if not isinstance(block, dict):
        return
    for long in [key for key in block if key.startswith(PREFIX) and key != PREFIX]:
        short, value = long.removeprefix(PREFIX), block.pop(long)
        if short in block and not overrides:
            document.problems.append(_given_twice(document, long, short))
        else:
            block[short] = value
            _move_origins(document, long, short)


def _given_twice(document: YamlDocument, long: str, short: str) -> Problem:
    where, first = (document.origin((BLOCK, key), of_key=True) for key in (long, short))
    message = f"'{short}' is given twice, with and without '{PREFIX}'. Remove one."
    return Problem(message, where, (first,) if first else ())


def _move_origins(document: YamlDocument, long: str, short: str) -> None:
    for table in (document.keys, document.places):
        for path in [path for path in table if path[:2] == (BLOCK, long)]:
            table[(BLOCK, short, *path[2:])] = table.pop(path)
