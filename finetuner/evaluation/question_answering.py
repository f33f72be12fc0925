"""Held-out rows that ask for one short answer, and a model's greedy answers to them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetuner.data.prepared_data import PreparedData
from finetuner.data.token_store import IGNORE_INDEX, Ids
from finetuner.evaluation.held_out_loss import decode_text
from finetuner.models.stop_tokens import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 32  # a longer trained text is no answer that could be the same word by word


@dataclass(frozen=True)
class HeldOutQuestion:
    """A row with one short trained span: the token ids before it, and the text that is trained on."""

    prompt: Ids
    answer: str


def find_questions(prepared: PreparedData, tokenizer: "PreTrainedTokenizerBase", most: int) -> list[HeldOutQuestion]:
    """Return the first `most` held-out rows that ask for one short answer."""
    found: list[HeldOutQuestion] = []
    for i in range(len(prepared.held_out)):
        if len(found) == most:
            break
        ids, labels = prepared.held_out.document(i)
        (trained,) = np.nonzero(labels != IGNORE_INDEX)
        # the last token of an answer ends the turn; after it a template may have a line break
        if 0 < len(trained) <= MAX_ANSWER_TOKENS and trained[0] > 0 and np.ptp(trained) + 1 == len(trained):
            found.append(HeldOutQuestion(ids[: trained[0]], decode_text(tokenizer, labels[trained])))
    return [one for one in found if one.answer.strip()]


@torch.no_grad()
def answer_questions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: list[HeldOutQuestion],
    report: Callable[[int, int], None],
) -> Iterator[tuple[str, str]]:
    """Yield (greedy answer, reference). `report` takes (questions done, questions in all)."""
    stops, device = stop_token_ids(tokenizer, model.generation_config), next(model.parameters()).device
    for done, one in enumerate(questions, 1):
        prompt = torch.from_numpy(one.prompt.astype(np.int64))[None].to(device)
        answered = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        )
        report(done, len(questions))
        yield decode_text(tokenizer, answered[0, prompt.shape[1] :].cpu().numpy()), one.answer
