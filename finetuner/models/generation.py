"""Text from a model, token by token."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError
from finetuner.models.context_length import context_length
from finetuner.models.stop_tokens import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def draw_token(logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token by its probability, softmax(logits / temperature), among the most likely ones that together have
    `top_p` of it (nucleus sampling, arXiv:1904.09751). Temperature 0 takes the most likely one. logits: (vocabulary,).
    """
    if temperature == 0:
        return int(logits.argmax())
    chances, tokens = (logits.float() / temperature).softmax(-1).cpu().sort(descending=True)
    before = chances.cumsum(-1) - chances
    chances[1:][before[1:] >= top_p] = 0.0  # the likeliest stays always
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


@torch.no_grad()
def generate_tokens(
    model: Any,
    prompt: Sequence[int],
    *,
    count: int,
    choice: Callable[[torch.Tensor], int],
    stops: Iterable[int] = (),
    context: int | None = None,
) -> Iterator[int]:
    """Yield up to `count` tokens that follow the prompt, up to the first of `stops`, which is left out.

    `choice`: logits, (vocabulary,) -> token. A text that outgrows the `context` goes on from its last half: the model
    was not trained to look further back.
    """
    device, tokens, stops = model.device, list(prompt), frozenset(stops)
    inputs, cache, cached = tokens[-context:] if context else tokens, None, 0
    for _ in range(count):
        found = model(input_ids=torch.tensor([inputs], device=device), past_key_values=cache, use_cache=True)
        cache, cached = found.past_key_values, cached + len(inputs)
        token = choice(found.logits[0, -1])
        if token in stops:
            return
        yield token
        tokens.append(token)
        inputs = [token]
        if context is not None and cached >= context:
            inputs, cache, cached = tokens[-(context // 2) :], None, 0


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Return the prompt's tokens; for an empty one, the token that begins a text, or else the one that ends it.

    Raises ModelError if the tokenizer has neither."""
    ids: list[int] = list(tokenizer(prompt).input_ids)
    if ids:
        return ids
    first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ModelError("this tokenizer has no token that begins a text. Give the first words of it.")
    return [int(first)]


def stream_text(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens` as they come, each time the new characters alone. A character of several tokens waits
    for the last of them."""
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
    """Return the prompt with up to `count` tokens that a model in training writes after it.

    Draws from a generator of its own, so that no random number of the training depends on it.
    """
    ids = prompt_tokens(tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    choice = partial(draw_token, temperature=0.8, top_p=0.95, generator=generator)
    stops, context = stop_token_ids(tokenizer, model.generation_config), context_length(model)
    was_training = model.training
    model.eval()
    tokens = generate_tokens(model, ids, count=count, choice=choice, stops=stops, context=context)
    text = prompt + "".join(stream_text(tokenizer, ids, tokens))
    model.train(was_training)
    return text
