"""Rules about the tokenizer."""

from collections.abc import Iterator

from finetuner.recipe.gpt_shape import MADE_TOKENIZERS
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.sections import NewTokenizer


def _mistral_common_alone(values: Values) -> Iterator[Finding]:
    if not values["tokenizer_use_mistral_common"]:
        return
    key = ("tokenizer_use_mistral_common",)
    if isinstance(values["tokenizer"], NewTokenizer) or values["tokenizer"] in MADE_TOKENIZERS:
        yield Finding(key, "mistral-common reads a tokenizer of Mistral's, and `tokenizer` makes one. Remove one.")
    for name in ("chat_template", "chat_template_jinja"):
        if values[name] not in (None, "tokenizer_default"):
            yield Finding((name,), f"mistral-common writes chats its own way, without {name}. Remove one.", (key,))
        for block in ("datasets", "test_datasets"):
            for i, entry in enumerate(values[block]):
                if dict(entry).get(name) not in (None, "tokenizer_default"):
                    message = f"mistral-common writes chats its own way, without {name}. Remove one."
                    yield Finding((block, i, name), message, (key,))


RULES: tuple[Rule, ...] = (
    (
        (
            "tokenizer_use_mistral_common", "tokenizer", "chat_template", "chat_template_jinja", "datasets",
            "test_datasets",
        ),
        _mistral_common_alone,
    ),
)  # fmt: skip
