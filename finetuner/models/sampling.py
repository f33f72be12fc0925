"""Text from a model, token by token."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
