"""Read an adapter in PEFT's format, of any tool, as updates of its base's tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetuner.errors import ModelError
from finetuner.export.tensor_updates import (
    LowRankUpdate,
    Replacement,
    ScaledAddition,
    TensorUpdate,
    UpdateSequence,
    VocabularyRows,
    same_update,
)
from finetuner.models.adapter_folder import read_config

# PEFT's settings under which an update is more than what is read here.
UNSUPPORTED = (
    "layer_replication", "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
UNSUPPORTED_NOTE = "PEFT's own merge_and_unload can do it where the model fits into memory."
# Ways to start an adapter that leave the base as it is. The others (pissa, olora, corda, loftq, ...) move a share of
# each weight into the adapter.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B, BIAS = "lora_embedding_A", "lora_embedding_B", "lora_B.bias"
LORA_TENSORS = (A, B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B, BIAS)
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
# Parts of names that PEFT puts around a module of the base.
WRAPPERS = (".base_layer", ".modules_to_save.default", ".modules_to_save")

LoraTensors = dict[str, torch.Tensor]  # the tensors of one module, by kind: `A`, `B`, `MAGNITUDE`, ...


@dataclass(frozen=True)
class TiedPair:
    """Names of an embedding and of the head that is the same tensor; the base's files have it once."""

    embedding: str
    head: str


@dataclass(frozen=True)
class AdapterUpdates:
    """Updates by the name of the base's tensor. `unties`: embedding and head, which were one tensor, become two;
    `head` is then the head's update, None if it stays as the embedding was."""

    by_name: dict[str, TensorUpdate]
    unties: bool = False
    head: TensorUpdate | None = None


def read_adapter_updates(
    adapter: Path, base_shapes: Mapping[str, tuple[int, ...]], tied: TiedPair | None = None
) -> AdapterUpdates:
    """Read the updates that the adapter makes to a base whose files have tensors of `base_shapes`.

    Raises ModelError for a tensor that matches none, and for whatever cannot be merged.
    """
    config = read_config(adapter)
    _require_supported(adapter, config)
    base_names = set(base_shapes) | ({tied.head} if tied else set())
    by_module: dict[str, LoraTensors] = {}
    updates: dict[str, TensorUpdate] = {}
    names: dict[str, str] = {}  # module -> its weight's name in the base
    for key, tensor in _read_tensors(adapter).items():
        module, kind = _split_key(key)
        if kind in LORA_TENSORS:
            names[module] = base_name(f"{module}.weight", key, base_names)
            by_module.setdefault(module, {})[kind] = tensor
        elif kind == TOKEN_ROWS:
            ids = _token_ids(config, module)
            updates[base_name(f"{module}.weight", key, base_names)] = VocabularyRows(tensor, ids)
        else:
            updates[base_name(module, key, base_names)] = Replacement(tensor)
    transposed = _stored_in_out(adapter, config, by_module, {m: base_shapes.get(n) for m, n in names.items()})
    for module, tensors in by_module.items():
        update = _low_rank_update(adapter, config, module, tensors, transposed)
        before = updates.get(names[module])
        updates[names[module]] = UpdateSequence(before, update) if before is not None else update
        if BIAS in tensors:
            bias = base_name(names[module].removesuffix("weight") + "bias", f"{module}.{BIAS}", base_names)
            updates[bias] = ScaledAddition(_scale(config, module, tensors), tensors[BIAS])
    return _settle_tied(updates, tied, config) if tied else AdapterUpdates(updates)


def _read_tensors(adapter: Path) -> LoraTensors:
    """Read the adapter's safetensors file. Raises ModelError if it is damaged, pickled, or not finite."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.exists() and (adapter / "adapter_model.bin").exists():
        raise ModelError(
            f"the adapter in '{adapter}' is pickled (adapter_model.bin), which can run code and is not read.\n"
            "Save it again with PEFT: model.save_pretrained(folder), which writes safetensors."
        )
    try:
        tensors = load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot read the adapter in '{adapter}': {error}") from error
    broken = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise ModelError(f"'{broken}' of the adapter in '{adapter}' has values that are not finite: it cannot be used.")
    return tensors


def _low_rank_update(
    adapter: Path, config: dict[str, Any], module: str, tensors: LoraTensors, transposed: bool
) -> LowRankUpdate:
    """`transposed`: linear layers of this base store (in, out), as an embedding always does."""
    is_table = EMBEDDING_A in tensors or EMBEDDING_B in tensors
    halves = (EMBEDDING_A, EMBEDDING_B) if is_table else (A, B)
    _require_complete(adapter, module, tensors, (*halves, MAGNITUDE) if config.get("use_dora") else halves)
    a, b = (tensors[kind] for kind in halves)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(
            _unsupported(adapter, f"an update of '{module}' of shapes {tuple(a.shape)} and {tuple(b.shape)}")
        )
    if is_table and MAGNITUDE in tensors:
        raise ModelError(_unsupported(adapter, f"use_dora on the embedding '{module}'"))
    return LowRankUpdate(_scale(config, module, tensors), is_table or transposed, a, b, tensors.get(MAGNITUDE))


def _require_complete(adapter: Path, module: str, tensors: LoraTensors, kinds: tuple[str, ...]) -> None:
    missing = next((kind for kind in kinds if kind not in tensors), None)
    if missing is not None:
        raise ModelError(
            f"the adapter in '{adapter}' has only a part of the update of '{module}': {missing} is missing. "
            "Train or fetch it again."
        )


def _scale(config: dict[str, Any], module: str, tensors: LoraTensors) -> float:
    """alpha / rank, with the alpha that a pattern may give to this module; the rank is the tensors' own."""
    first = tensors.get(A, tensors.get(EMBEDDING_A))
    rank = config["r"] if first is None else first.shape[0]
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _stored_in_out(
    adapter: Path,
    config: dict[str, Any],
    by_module: Mapping[str, LoraTensors],
    shapes: Mapping[str, tuple[int, ...] | None],
) -> bool:
    """Whether the adapted layers store (in, out).

    PEFT writes down the order of the last layer that it adapted. A square matrix cannot tell, so where others
    contradict what was written down, the update could be added transposed: raises ModelError.
    """
    written = bool(config.get("fan_in_fan_out"))
    for module, tensors in by_module.items():
        shape = shapes[module]
        if A in tensors and B in tensors and shape is not None:
            delta = (tensors[B].shape[0], tensors[A].shape[1])
            delta = delta[::-1] if written else delta
            if delta != shape and delta[::-1] == shape:
                what = f"fan_in_fan_out: {str(written).lower()}, but '{module}' stores its weights the other way"
                raise ModelError(_unsupported(adapter, what))
    return written


def _settle_tied(updates: dict[str, TensorUpdate], tied: TiedPair, config: dict[str, Any]) -> AdapterUpdates:
    """Decide whether embedding and head, one tensor in the base, stay one.

    PEFT wraps the two apart, so the adapted model's head is the embedding of before wherever only one of them changed.
    """
    head, embedding = updates.pop(tied.head, None), updates.get(tied.embedding)
    together = bool(config.get("ensure_weight_tying"))
    if head is None and (embedding is None or isinstance(embedding, VocabularyRows) or together):
        return AdapterUpdates(updates)
    if embedding is None and head is not None and together:
        return AdapterUpdates(updates | {tied.embedding: head})
    if head is not None and embedding is not None and same_update(head, embedding):
        return AdapterUpdates(updates)
    if together:
        raise ModelError(
            f"the adapter has another '{tied.head}' than '{tied.embedding}', and says that the head is tied to the "
            "embedding (ensure_weight_tying). Fetch it again."
        )
    return AdapterUpdates(updates, unties=True, head=head)


def _token_ids(config: dict[str, Any], module: str) -> tuple[int, ...]:
    ids = config.get("trainable_token_indices") or {}
    if isinstance(ids, dict):
        ids = ids.get(module, ids.get(module.rpartition(".")[2], ()))
    if not ids:
        raise ModelError(f"the adapter has rows of new tokens for '{module}', and its settings do not say which.")
    return tuple(ids)


def _require_supported(adapter: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"the adapter in '{adapter}' is of type {config.get('peft_type')}; only LORA can be merged.")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ModelError(_unsupported(adapter, f"{key}: {config[key]}"))
    start = config.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise ModelError(
            f"the adapter in '{adapter}' has init_lora_weights: {start}, which changed the base as training began. "
            "Save it with PEFT's path_initial_model_for_weight_conversion, which turns it into an ordinary one."
        )
    try:
        float(config["lora_alpha"]), int(config["r"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the settings of the adapter in '{adapter}' lack a number for r or lora_alpha.") from error


def _split_key(key: str) -> tuple[str, str]:
    """Split an adapter key into (module, kind of tensor); of a replaced tensor: (name of the tensor, "")."""
    name = key.removeprefix("base_model.model.")
    for kind in (*LORA_TENSORS, TOKEN_ROWS):
        for ending in (kind, kind.replace(".", ".default.") if kind in (A, B, BIAS) else f"{kind}.weight"):
            if name.endswith("." + ending):
                return name.removesuffix("." + ending), kind
    module, _, tensor = name.rpartition(".")
    for wrapper in WRAPPERS:
        module = module.removesuffix(wrapper)
    return f"{module}.{tensor}", ""


def base_name(name: str, key: str, base_names: set[str]) -> str:
    """Return the name of the base's tensor that `key` of the adapter updates. Raises ModelError if there is none."""
    # Files saved from the model without its head (older GPT-2, for one) leave out the first part of the name.
    for candidate in (name, name.partition(".")[2]):
        if candidate in base_names:
            return candidate
    raise ModelError(
        f"the adapter tensor '{key}' matches no tensor of the base model: it was trained on another base, or is of a "
        "kind that cannot be merged."
    )


def _unsupported(adapter: Path, what: str) -> str:
    return f"the adapter in '{adapter}' has {what}, which cannot be merged yet. {UNSUPPORTED_NOTE}"
