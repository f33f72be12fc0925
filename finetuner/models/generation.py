"""Text from a model, token by token."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose(logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn by its probability, softmax(logits / temperature), among the most likely ones that together have
    `top_p` of it (nucleus sampling, arXiv:1904.09751). Temperature 0 takes the most likely one. logits: (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    chances, tokens = (logits.float() / temperature).softmax(-1).cpu().sort(descending=True)
    before = chances.cumsum(-1) - chances
    chances[1:][before[1:] >= top_p] = 0.0  # the likeliest stays always
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


@torch.no_grad()
def sampled(
    model: Any,
    prompt: Sequence[int],
    *,
    count: int,
    choice: Callable[[torch.Tensor], int],
    ends: Iterable[int] = (),
    context: int | None = None,
) -> Iterator[int]:
    """Up to `count` tokens that follow the prompt; one of `ends` is the last, and is not given.

    A text that outgrows the `context` goes on from its last half: the model has not learned to look further back.
    """
    device, tokens, ends = model.device, list(prompt), frozenset(ends)
    feed, cache, seen = tokens[-context:] if context else tokens, None, 0
    for _ in range(count):
        found = model(input_ids=torch.tensor([feed], device=device), past_key_values=cache, use_cache=True)
        cache, seen = found.past_key_values, seen + len(feed)
        token = choice(found.logits[0, -1])
        if token in ends:
            return
        yield token
        tokens.append(token)
        feed = [token]
        if context is not None and seen >= context:
            feed, cache, seen = tokens[-(context // 2) :], None, 0


def first_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """The prompt's tokens; of an empty one, the token that begins a text or else ends one.

    Raises ModelError if the tokenizer has neither."""
    ids: list[int] = list(tokenizer(prompt).input_ids)
    if ids:
        return ids
    first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ModelError("this tokenizer has no token that begins a text. Give the first words of it.")
    return [int(first)]


def context_of(model: "PreTrainedModel") -> int | None:
    """The longest row that the model was made for, where its config says so."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def ends_of(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Tokens that end a text, by the model's configuration or the tokenizer."""
    config: Any = model.generation_config
    named = (None if config is None else config.eos_token_id, tokenizer.eos_token_id)
    return {i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None}


def as_text(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, what is new of it each time. A character of several tokens waits for the last
    of them."""
    known = list(prompt)
    shown = len(_decoded(tokenizer, known))
    for token in tokens:
        known.append(token)
        text = _decoded(tokenizer, known)
        if not text.endswith("�"):
            yield text[shown:]
            shown = len(text)
    yield _decoded(tokenizer, known)[shown:]


def _decoded(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> str:
    text: Any = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def sample_text(model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: str, seed: int, count: int = 128) -> str:
    """The prompt and what a model in training makes of it; no other random number depends on it."""
    ids = first_tokens(tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    choice = partial(choose, temperature=0.8, top_p=0.95, generator=generator)
    ends, context = ends_of(model, tokenizer), context_of(model)
    was_training = model.training
    model.eval()
    tokens = sampled(model, ids, count=count, choice=choice, ends=ends, context=context)
    text = prompt + "".join(as_text(tokenizer, ids, tokens))
    model.train(was_training)
    return text
