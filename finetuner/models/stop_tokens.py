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
    writes after an answer. A model that was trained on turns ends them with a token of its own, or with that of the
    next turn.
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
    """The added token after an answer, as the chat template writes it; None if there is no template or no token.

    A template that closes an answer with the next turn alone writes that turn's token there.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    for messages in (turns, [*turns, {"role": "user", "content": "another"}]):
        behind = _text_behind_answer(tokenizer, messages)
        if behind is None:
            return None
        if behind.strip():
            ids: Any = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
            # A recipe's `tokens` are added as words, not as special ones, and end its turns all the same.
            return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
    return None


def _text_behind_answer(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> str | None:
    """Return the text that the chat template writes behind ANSWER; None without one, or if it refuses the messages."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError):  # a template that wants more than plain turns
        return None
    return text.rpartition(ANSWER)[2]
