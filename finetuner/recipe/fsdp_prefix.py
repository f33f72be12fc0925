"""`fsdp_config: {fsdp_offload_params: true}` and `{offload_params: true}` are the same."""

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
        short = long.removeprefix(PREFIX)
        value = block.pop(long)
        if short in block and not overrides:
            where = document.origin((BLOCK, long), of_key=True)
            first = document.origin((BLOCK, short), of_key=True)
            message = f"'{short}' is given twice, with and without '{PREFIX}'. Remove one."
            document.problems.append(Problem(message, where, (first,) if first else ()))
            continue
        block[short] = value
        for table in (document.keys, document.places):
            for path in [p for p in table if p[:2] == (BLOCK, long)]:
                table[(BLOCK, short, *path[2:])] = table.pop(path)
