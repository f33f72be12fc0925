"""The added tokens with which a chat template begins and ends turns."""

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from finetuner.data.template_sandbox import compile_template
from finetuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")
_OF_THOUGHTS = re.compile(r"think|thought|reason", re.IGNORECASE)


def turn_marks(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> tuple[str, ...]:
    """Return those of `tokens` that the tokenizer's chat template writes around short plain messages.

    Words are none ("assistant" stands in sentences too), nor are marks of thoughts: a template may write them into an
    answer without thoughts, and rows hold them as text.
    A template that refuses such messages has none either; its rows say why.
    """
    own = tokenizer.chat_template
    templates = own.values() if isinstance(own, dict) else [own] if own is not None else []
    written = ""
    for template, roles in product(templates, (_ROLES, _ROLES[1:])):
        try:
            messages = [{"role": role, "content": "a"} for role in roles]
            written += compile_template(str(template), tokenizer.special_tokens_map).render(messages, None, prompt=True)
        except DataError:
            continue
    return tuple(token for token in tokens if token in written and _is_mark(token))


def _is_mark(token: str) -> bool:
    """Whether a token is a word between signs, such as <|im_end|> or [INST], and not one about thoughts."""
    word = token.strip()
    has_word = any(c.isalnum() for c in word)
    return has_word and not word[0].isalnum() and not word[-1].isalnum() and not _OF_THOUGHTS.search(word)
