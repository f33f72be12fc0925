"""Compare a merged model with base + adapter by their logits on the same tokens, the files read back."""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from finetuner.errors import ModelError
from finetuner.export.merge_writer import MERGE_FILE
from finetuner.export.quantized_base import quantization_in_training, quantized_tensors
from finetuner.models.files import find_base, weight_files
from finetuner.models.load import load_model
from finetuner.models.quant_record import QuantRecord, quantization_round_trip
from finetuner.storage.safetensors_stream import read_header
from finetuner.world import available_ram

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (
    "The capital of France is",
    "Write a function that returns the sum of the even numbers in a list.",
    "Question: Which planet is closest to the sun?\nAnswer:",
    "In 1969 two people walked on the moon. Their names were",
    "1, 2, 4, 8, 16,",
)
# Largest mean KL divergence, in nats a token, by how the merged weights are stored: rounding alone costs less.
KL_BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
NUM_LAST_TOKENS = 16  # the rows that an adapter may have added are the last ones


@dataclass(frozen=True)
class LogitAgreement:
    """Distance of two models' logits, both computed in fp32.

    `kl`: nats a token, the mean over `num_tokens` positions; `same_choice`: the share of positions at which both have
    the same likeliest next token. `bound`: of `kl`, beyond which the models are not the same.
    """

    largest_difference: float
    kl: float
    same_choice: float
    num_tokens: int
    bound: float

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.2g}, KL divergence {self.kl:.2g} a token (at most "
            f"{self.bound:g}), same likeliest token {self.same_choice:.1%}, {self.num_tokens:,} tokens"
        )


def memory_shortage(base_model: str) -> str | None:
    """Say why this machine's free memory cannot hold the model in fp32; None if it can, or nobody knows."""
    infos = (info for path in weight_files(find_base(base_model)) for info in read_header(path).values())
    needed = 4 * sum(math.prod(info.shape) for info in infos) * 1.25
    free = available_ram()
    if free is None or needed <= free:
        return None
    return f"it takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"


def verify_logits(
    adapter: Path,
    base_model: str,
    merged: Path,
    *,
    dequantize: bool | None = None,
    trust_remote_code: bool = False,
    rows: Sequence[torch.Tensor] = (),
) -> LogitAgreement:
    """Compare the merged model with base + adapter, and write the figures into the merged folder's mark.

    On `rows` of token ids, each (length,), or on prompts, and on the last tokens of the vocabulary. `dequantize`: see
    MergeOptions. Raises ModelError beyond the bound."""
    rows = [*rows, last_tokens(merged)] if rows else prompt_rows(merged, trust_remote_code)
    stored = {info.dtype for path in weight_files(merged) for info in read_header(path).values()}
    bound = KL_BOUNDS["bfloat16" if "BF16" in stored else "float16" if "F16" in stored else "float32"]

    def models() -> "Iterator[PreTrainedModel]":  # one in memory at a time
        yield _adapted_model(adapter, base_model, merged, dequantize, trust_remote_code)
        yield _load(str(merged), trust_remote_code)

    agreement = logit_agreement(models(), rows, bound)
    mark: dict[str, Any] = json.loads((merged / MERGE_FILE).read_text())
    (merged / MERGE_FILE).write_text(json.dumps(mark | {"verified": asdict(agreement)}, indent=1) + "\n")
    if not agreement.kl <= bound:  # NaN too
        raise ModelError(
            f"the merged model in {merged} is not what base + adapter compute: {agreement}.\n"
            "Do not use it. If its number format is too coarse for this adapter: dtype=float32"
        )
    return agreement


def logit_agreement(models: "Iterable[PreTrainedModel]", rows: list[torch.Tensor], bound: float) -> LogitAgreement:
    """Compare two models on rows of token ids, each (length,)."""
    expected, found = (_logits(model, rows) for model in models)
    return _compare(expected, found, bound)


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor], bound: float) -> LogitAgreement:
    """Compare logits (length, vocabulary), row by row."""
    largest, kl, same, count = 0.0, 0.0, 0, 0
    for left, right in zip(expected, found, strict=True):
        largest = max(largest, float((left - right).abs().max()))
        p, q = (functional.log_softmax(logits.double(), dim=-1) for logits in (left, right))
        kl += float((p.exp() * (p - q)).sum())
        same += int((left.argmax(-1) == right.argmax(-1)).sum())
        count += len(left)
    return LogitAgreement(largest, kl / count, same / count, count, bound)


@torch.no_grad()
def _logits(model: "PreTrainedModel", rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=ids[None]).logits[0].float() for ids in rows]


def _load(folder: str, trust_remote_code: bool) -> "PreTrainedModel":
    return load_model(
        folder, dtype=torch.float32, attention=("sdpa", "eager"), trust_remote_code=trust_remote_code
    ).eval()


def _adapted_model(
    adapter: Path, base_model: str, merged: Path, dequantize: bool | None, trust_remote_code: bool
) -> "PreTrainedModel":
    """Load base and adapter as PEFT puts them together, with as many rows of the vocabulary as the merged model."""
    from peft import PeftModel

    model: Any = _load(base_model, trust_remote_code)
    base = find_base(base_model)
    names = {name for path in weight_files(base) for name in read_header(path)}
    _round_as_in_training(model, quantized_tensors(quantization_in_training(adapter, base, dequantize), names))
    vocab_size = _vocab_size(merged)
    if vocab_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied modules, which is what is looked at here
        return PeftModel.from_pretrained(model, str(adapter)).eval()  # type: ignore[return-value]


@torch.no_grad()
def _round_as_in_training(model: "PreTrainedModel", quantized: Mapping[str, QuantRecord]) -> None:
    named = dict(model.named_parameters())
    for name, record in quantized.items():
        parameter = named[name] if name in named else named[f"{model.base_model_prefix}.{name}"]
        parameter.copy_(quantization_round_trip(parameter, record))


def _vocab_size(folder: Path) -> int:
    settings = json.loads((folder / "config.json").read_text())
    return int(settings.get("text_config", settings)["vocab_size"])


def last_tokens(folder: Path) -> torch.Tensor:
    """Return the last ids of a model's vocabulary, (NUM_LAST_TOKENS,) or fewer."""
    vocab_size = _vocab_size(folder)
    return torch.arange(max(0, vocab_size - NUM_LAST_TOKENS), vocab_size)


def prompt_rows(folder: Path, trust_remote_code: bool = False) -> list[torch.Tensor]:
    """Return token ids, each (length,): the prompts, as text and as a turn where there is a template; then the last
    ids of the vocabulary."""
    last = last_tokens(folder)
    if not (folder / "tokenizer_config.json").exists():
        far_apart = torch.arange(64) * 7919 % (int(last[-1]) + 1)
        return [far_apart, last]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": PROMPTS[1]}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*(torch.tensor(ids) for ids in rows if ids), last]
