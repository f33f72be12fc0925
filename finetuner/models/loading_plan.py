"""The way a run gets its base model into memory: the choice, a pure function, and carrying it out.

    LAZY_SHARDED   built empty; the main rank reads each tensor when the engine shards it
    LAZY_FULL      built empty; every rank reads every tensor, one at a time
    MAIN_RANK      the main rank loads it with transformers, and the others have empty memory until it is sharded
    EVERY_RANK     every rank loads it with transformers

The lazy ways take the least memory. They work where tensors can be read from the files one by one as the model names
them, which only a look into the files can tell, so that each has a fallback.
"""

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuner.errors import ModelError
from finetuner.models.dtypes import DTYPES
from finetuner.models.empty_model import empty_model
from finetuner.models.lazy_weights import LazyWeights, ReportBytes, lazy_model
from finetuner.models.load import load_model
from finetuner.models.quant_format import QuantFormat, choose_quant_format
from finetuner.plan.parallel import ParallelPlan
from finetuner.plan.precision import Precision
from finetuner.recipe.sections import QuantizationSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Loading(Enum):
    """One way to load, as the module's docstring describes them."""

    LAZY_SHARDED = auto()
    LAZY_FULL = auto()
    MAIN_RANK = auto()
    EVERY_RANK = auto()


@dataclass(frozen=True)
class LoadingPlan:
    """The base to load, and the ways to try, in order; the last one works for every model.

    `source`: a folder or hub id. `dtype`: of the weights that are not quantized. `empty_dtype`: of an empty model whose
    engine would cast all of it before it shards, and so would occupy memory for all of it; None: `dtype`.
    `full_weights_on_device`: where LAZY_FULL reads to; False: the CPU.
    """

    source: str
    dtype: torch.dtype
    quant_format: QuantFormat | None
    ways: tuple[Loading, ...]
    trust_remote_code: bool = False
    empty_dtype: torch.dtype | None = None
    full_weights_on_device: bool = False
    caches_quantized: bool = False


def choose_loading(
    base_model: str,
    checkpoint: Path | None,
    *,
    checkpoint_is_sharded: bool,
    adapter: str | None,
    quantization: QuantizationSection,
    precision: Precision,
    parallel: ParallelPlan,
    trust_remote_code: bool = False,
) -> LoadingPlan:
    """Choose where the weights of the base come from, in which format, and how they get into memory.

    `adapter`: the recipe's key; None: the base itself is trained, so that its weights are in the `checkpoint` to resume
    from. `checkpoint_is_sharded`: each rank's shards are read later, once the model is sharded.
    """
    trains_base = adapter is None
    dtype = torch.float32 if trains_base else DTYPES[precision]
    quant_format = choose_quant_format(adapter, quantization, dtype)
    resumes_base = trains_base and checkpoint is not None
    reads_shards = resumes_base and checkpoint_is_sharded
    main_rank_loads = parallel.main_rank_reads and quant_format is None and not checkpoint_is_sharded
    ways: tuple[Loading, ...] = (Loading.MAIN_RANK if main_rank_loads else Loading.EVERY_RANK,)
    # Tensor by tensor from the disk is not how shards, a model that comes with code of its own, or LLM.int8 is read.
    if not (reads_shards or trust_remote_code or quantization.load_in_8bit):
        ways = (Loading.LAZY_SHARDED if parallel.shards_weights else Loading.LAZY_FULL, *ways)
    return LoadingPlan(
        source=str(checkpoint) if resumes_base and not reads_shards else base_model,
        dtype=dtype,
        quant_format=quant_format,
        ways=ways,
        trust_remote_code=trust_remote_code,
        empty_dtype=DTYPES[precision] if parallel.casts_full_model and parallel.shards_weights else None,
        full_weights_on_device=parallel.is_replicated,
        caches_quantized=quantization.quantized_cache,
    )


def load_base(
    plan: LoadingPlan,
    *,
    attention: tuple[str, ...],
    device: torch.device,
    is_main_rank: bool,
    prepared_path: str,
    report: ReportBytes = lambda done, total: None,
) -> "tuple[PreTrainedModel, LazyWeights | None]":
    """Load the base as planned. Returns the model, and its unread weights if it was loaded as LAZY_SHARDED.

    `device`: where to quantize. `prepared_path`: the folder under which quantized weights are cached. Raises ModelError
    for a model that cannot be loaded, or cannot be cached although the recipe asks for it.
    """
    if plan.ways[0] in (Loading.LAZY_SHARDED, Loading.LAZY_FULL):
        is_sharded = plan.ways[0] is Loading.LAZY_SHARDED
        writes_cache = plan.caches_quantized and (is_main_rank or not is_sharded)
        found = lazy_model(
            plan.source,
            dtype=plan.dtype,
            attention=attention,
            quant_format=plan.quant_format,
            device=device,
            cache_folder=Path(prepared_path) / "quantized" if writes_cache else None,
            report=report,
            empty_dtype=plan.empty_dtype,
        )
        if found is not None:
            model, weights = found
            if is_sharded:
                return model, weights
            weights.materialize_all(device if plan.full_weights_on_device else torch.device("cpu"))
            return model, None
    if plan.caches_quantized:
        raise ModelError(
            f"quantized_cache: the tensors of '{plan.source}' are renamed or joined as they load, which the cache does "
            "not know. Write `quantized_cache: false`."
        )
    if plan.ways[-1] is Loading.MAIN_RANK and not is_main_rank:
        trust = plan.trust_remote_code
        return empty_model(plan.source, dtype=plan.dtype, attention=attention, trust_remote_code=trust), None
    model = load_model(
        plan.source,
        dtype=plan.dtype,
        attention=attention,
        trust_remote_code=plan.trust_remote_code,
        quant_format=plan.quant_format,
        device=device,
    )
    return model, None
