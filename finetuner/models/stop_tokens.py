"""The tokens at which generation stops, known in one way to every command that generates."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

ANSWER = "answer"


def stop_token_ids(
    tokenizer: "PreTrainedTokenizerBase", generation_config: "GenerationConfig | None" = None
) -> list[int]:
    """Return the ids of the tokens that end a text or an answer, each once, in this order:

    those of the model's `generation_config`, the tokenizer's end of text, and the added token that the chat template
    writes after an answer. A model that was trained on turns ends them with a token of its own.
    """
    named = [*as_id_list(None if generation_config is None else generation_config.eos_token_id)]
    named += as_id_list(tokenizer.eos_token_id)
    named += as_id_list(_end_of_turn(tokenizer))
    return list(dict.fromkeys(named))


def as_id_list(value: Any) -> list[int]:
    """Return the token ids in a config's value, which is None, one id or a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The added token after an answer, as the chat template writes it; None if there is no template or no token."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError):  # a template that wants more than two plain turns
        return None
    behind: Any = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    # A recipe's `tokens` are added as words, not as special ones, and end its turns all the same.
    return behind[0] if behind and behind[0] in tokenizer.added_tokens_decoder else None
