"""Loss of the held-out rows, computed as the training run's evaluation computes it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from finetuner.data.batch_sampler import evaluation_batches
from finetuner.data.batches import layout_of
from finetuner.data.prepared_data import PreparedData, SourceRange
from finetuner.data.token_store import IGNORE_INDEX
from finetuner.evaluation.settings import EvaluationSettings
from finetuner.models.document_isolation import wants_flat_packs
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.objectives.text_score import TextScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def score_held_out(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prepared: PreparedData,
    settings: EvaluationSettings,
    report: Callable[[int, int], None],
) -> dict[str, TextScore]:
    """Return the summed loss of each source's held-out rows. `report` takes (rows done, rows in all)."""
    rows, packed = prepared.held_out_rows, prepared.held_out_packs is not None
    loss = LossModule(model, NextToken())
    loss.probe_head(packs=packed)
    flat = wants_flat_packs(loss.unwrapped)
    layout = layout_of(settings.packing, settings.data.sequence_len, packed=packed, flat=flat)
    device, done = next(model.parameters()).device, 0
    scores = {}
    for source in prepared.held_out_ranges or (SourceRange("held out", 0, len(rows)),):
        loss_sum, num_tokens = 0.0, 0
        numbers = range(source.start, source.stop)
        for batch in evaluation_batches(rows, settings.plan, layout, numbers=numbers):
            loss_sum += float(loss(batch.to(device).tensors()))
            num_tokens += batch.num_trained
            done += len(batch.input_ids)
            report(done, len(rows))
        documents = (document for i in numbers for document in rows.documents(i))
        num_bytes = sum(len(decode_text(tokenizer, labels[labels != IGNORE_INDEX]).encode()) for _, labels in documents)
        scores[source.name] = TextScore(loss_sum, num_tokens, num_bytes)
    return scores


def decode_text(tokenizer: "PreTrainedTokenizerBase", ids: Any) -> str:
    """Decode an array of token ids, special tokens left out: they are no text, and every tokenizer has others."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
