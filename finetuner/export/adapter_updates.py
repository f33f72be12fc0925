"""What an adapter does to each tensor of its base. Adapters of other tools too, as PEFT writes them."""

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetuner.errors import ModelError
from finetuner.models.adapter_folder import read_config

# PEFT's settings under which an update is more than what is read here.
UNSUPPORTED = (
    "layer_replication", "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
UNSUPPORTED_NOTE = "PEFT's own merge_and_unload can do it where the model fits into memory."
# Ways to start an adapter that leave the base as it is. The others (pissa, olora, corda, loftq, ...) move a part of
# each weight into the adapter.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
BLOCK = 1 << 18  # elements of a product that are made at once: 1 MB in fp32
MIN_ROWS = 16  # of a block: fewer take another path through the matrix library, which rounds differently


class Change(Protocol):
    """What happens to one tensor of the base."""

    @abstractmethod
    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Raises ModelError if the adapter does not fit the base."""

    @abstractmethod
    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """In fp32, rounded once at the end to the number format of `weight`, whose memory the result may take."""


@dataclass(frozen=True)
class LowRank:
    """V = W + scale * B A; with DoRA (arXiv:2402.09353, equation 5) each row of V, one per output, is brought to the
    length that `magnitude` says."""

    scale: float
    stored_in_out: bool  # the base stores W as (in, out)
    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (out, rank)
    magnitude: torch.Tensor | None = None  # (out,)

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        delta = (self.b.shape[0], self.a.shape[1])
        delta = delta[::-1] if self.stored_in_out else delta
        if delta != shape:
            raise ModelError(_misfit(name, shape, delta))
        return shape

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Over blocks of rows that stay in the processor's cache: a whole product in fp32 costs more in fresh pages
        than in arithmetic."""
        left, right = (self.a.t(), self.b.t()) if self.stored_in_out else (self.b, self.a)
        along = 0 if self.stored_in_out else 1
        by_column = self.magnitude is not None and self.stored_in_out
        blocks = 1 if by_column else max(1, min(len(weight) // MIN_ROWS, weight.numel() // BLOCK))
        lengths = [None] * blocks if self.magnitude is None else self.magnitude.float().tensor_split(blocks)
        right = right.float()
        for rows, of_left, length in zip(
            weight.tensor_split(blocks), left.float().tensor_split(blocks), lengths, strict=True
        ):
            merged = (of_left @ right).mul_(self.scale).add_(rows)
            if length is not None:
                merged.mul_((length / torch.linalg.vector_norm(merged, dim=along)).unsqueeze(along))
            rows.copy_(merged)
        return weight


@dataclass(frozen=True)
class Rows:
    """Rows `ids` of a vocabulary table are replaced, and the table grows by those it does not have."""

    rows: torch.Tensor  # (len(ids), width)
    ids: tuple[int, ...]

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.rows.shape[1] != shape[1]:
            raise ModelError(_misfit(name, shape, tuple(self.rows.shape)))
        return (max(shape[0], max(self.ids) + 1), shape[1])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        grown = weight.new_zeros(max(weight.shape[0], max(self.ids) + 1), weight.shape[1])
        grown[: len(weight)] = weight
        grown[list(self.ids)] = self.rows.to(weight.dtype)
        return grown


@dataclass(frozen=True)
class Whole:
    """The tensor is replaced; a vocabulary table may have grown."""

    tensor: torch.Tensor

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        after = tuple(self.tensor.shape)
        grown = len(shape) == 2 and after[1:] == shape[1:] and after[0] >= shape[0]
        if after != shape and not grown:
            raise ModelError(_misfit(name, shape, after))
        return after

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self.tensor.to(weight.dtype, copy=True)


@dataclass(frozen=True)
class Added:
    """scale * tensor is added: a bias of the adapter's own."""

    scale: float
    tensor: torch.Tensor

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if tuple(self.tensor.shape) != shape:
            raise ModelError(_misfit(name, shape, tuple(self.tensor.shape)))
        return shape

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return (self.tensor.float() * self.scale).add_(weight).to(weight.dtype)


@dataclass(frozen=True)
class Both:
    """A table that came with the adapter, and an update of it."""

    first: Change
    then: Change

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.then.shape_after(name, self.first.shape_after(name, shape))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self.then.apply(self.first.apply(weight.float())).to(weight.dtype)


@dataclass(frozen=True)
class Tied:
    """Names of an embedding and of the head that is the same tensor; the files have it once."""

    embedding: str
    head: str


@dataclass(frozen=True)
class Changes:
    """Base tensor -> change; and the head's own, where a tied pair comes apart (`unties`): None leaves it as the
    embedding was."""

    by_name: dict[str, Change]
    unties: bool = False
    head: Change | None = None


A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B, BIAS = "lora_embedding_A", "lora_embedding_B", "lora_B.bias"
LORA_PARTS = (A, B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B, BIAS)
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
# Parts of names that PEFT puts around a module of the base.
WRAPPERS = (".base_layer", ".modules_to_save.default", ".modules_to_save")


def read_changes(adapter: Path, base_shapes: Mapping[str, tuple[int, ...]], tied: Tied | None = None) -> Changes:
    """What the adapter does to a base whose files have tensors of `base_shapes`.

    Raises ModelError for a tensor that matches none, and for whatever cannot be merged.
    """
    config = read_config(adapter)
    _require_supported(adapter, config)
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
    known = set(base_shapes) | ({tied.head} if tied else set())
    parts: dict[str, dict[str, torch.Tensor]] = {}  # module -> kind -> tensor
    changes: dict[str, Change] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        module, kind = _split_key(key)
        if kind in LORA_PARTS:
            names[module] = base_name(f"{module}.weight", key, known)
            parts.setdefault(module, {})[kind] = tensor
        elif kind == TOKEN_ROWS:
            changes[base_name(f"{module}.weight", key, known)] = Rows(tensor, _token_ids(config, module))
        else:
            changes[base_name(module, key, known)] = Whole(tensor)
    turned = _stored_in_out(adapter, config, parts, {m: base_shapes.get(n) for m, n in names.items()})
    for module, part in parts.items():
        update = _update(adapter, config, module, part, turned)
        before = changes.get(names[module])
        changes[names[module]] = Both(before, update) if before is not None else update
        if BIAS in part:
            bias = base_name(names[module].removesuffix("weight") + "bias", f"{module}.{BIAS}", known)
            changes[bias] = Added(_scale(config, module, part), part[BIAS])
    return _settle(changes, tied, config) if tied else Changes(changes)


def _update(adapter: Path, config: dict[str, Any], module: str, part: dict[str, torch.Tensor], turned: bool) -> LowRank:
    is_table = EMBEDDING_A in part or EMBEDDING_B in part
    wanted = (EMBEDDING_A, EMBEDDING_B) if is_table else (A, B)
    missing = [kind for kind in (*wanted, *([MAGNITUDE] if config.get("use_dora") else [])) if kind not in part]
    if missing:
        raise ModelError(
            f"the adapter in '{adapter}' has only a part of the update of '{module}': {missing[0]} is missing. "
            "Train or fetch it again."
        )
    a, b = (part[kind] for kind in wanted)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(
            _unsupported(adapter, f"an update of '{module}' of shapes {tuple(a.shape)} and {tuple(b.shape)}")
        )
    if is_table and MAGNITUDE in part:
        raise ModelError(_unsupported(adapter, f"use_dora on the embedding '{module}'"))
    return LowRank(_scale(config, module, part), is_table or turned, a, b, part.get(MAGNITUDE))


def _scale(config: dict[str, Any], module: str, part: Mapping[str, torch.Tensor]) -> float:
    """alpha / rank, with the alpha that a pattern may give to this module; the rank is the tensors' own."""
    first = part.get(A, part.get(EMBEDDING_A))
    rank = config["r"] if first is None else first.shape[0]
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _stored_in_out(
    adapter: Path,
    config: dict[str, Any],
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...] | None],
) -> bool:
    """Whether the adapted layers store (in, out).

    PEFT writes down the order of the last layer that it adapted. A square matrix cannot tell, so where others
    contradict what was written down, the update could be added turned.
    """
    written = bool(config.get("fan_in_fan_out"))
    other = []
    for module, part in parts.items():
        shape = shapes[module]
        if A in part and B in part and shape is not None:
            delta = (part[B].shape[0], part[A].shape[1])
            delta = delta[::-1] if written else delta
            if delta != shape and delta[::-1] == shape:
                other.append(module)
    if other:
        raise ModelError(
            _unsupported(
                adapter, f"fan_in_fan_out: {str(written).lower()}, but '{other[0]}' stores its weights the other way"
            )
        )
    return written


def _settle(changes: dict[str, Change], tied: Tied, config: dict[str, Any]) -> Changes:
    """A base with one tensor for embedding and head: does it stay one?

    PEFT wraps the two apart, so the adapted model's head is the embedding of before wherever only one of them changed.
    """
    head, embedding = changes.pop(tied.head, None), changes.get(tied.embedding)
    together = bool(config.get("ensure_weight_tying"))
    if head is None and (embedding is None or isinstance(embedding, Rows) or together):
        return Changes(changes)
    if embedding is None and head is not None and together:
        return Changes(changes | {tied.embedding: head})
    if head is not None and embedding is not None and _same(head, embedding):
        return Changes(changes)
    if together:
        raise ModelError(
            f"the adapter has another '{tied.head}' than '{tied.embedding}', and says that the head is tied to the "
            "embedding (ensure_weight_tying). Fetch it again."
        )
    return Changes(changes, unties=True, head=head)


def _same(left: Change, right: Change) -> bool:
    if isinstance(left, Whole) and isinstance(right, Whole):
        return torch.equal(left.tensor, right.tensor)
    if isinstance(left, Rows) and isinstance(right, Rows):
        return left.ids == right.ids and torch.equal(left.rows, right.rows)
    if isinstance(left, Both) and isinstance(right, Both):
        return _same(left.first, right.first) and _same(left.then, right.then)
    if isinstance(left, LowRank) and isinstance(right, LowRank):  # a head's halves are an embedding's, turned
        return left.scale == right.scale and torch.equal(left.a, right.b.t()) and torch.equal(left.b, right.a.t())
    return False


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
    """An adapter key -> (module, kind of tensor); of a tensor trained whole: (name of the tensor, "")."""
    bare = key.removeprefix("base_model.model.")
    for kind in (*LORA_PARTS, TOKEN_ROWS):
        for ending in (kind, kind.replace(".", ".default.") if kind in (A, B, BIAS) else f"{kind}.weight"):
            if bare.endswith("." + ending):
                return bare.removesuffix("." + ending), kind
    module, _, tensor = bare.rpartition(".")
    for wrapper in WRAPPERS:
        module = module.removesuffix(wrapper)
    return f"{module}.{tensor}", ""


def base_name(name: str, key: str, base_names: set[str]) -> str:
    """The tensor of the base that `key` of the adapter is about. Raises ModelError if it has none."""
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


def _misfit(name: str, base: tuple[int, ...], adapter: tuple[int, ...]) -> str:
    return (
        f"the adapter does not fit the base model: '{name}' has shape {base} in the base and {adapter} in the adapter. "
        "Was it trained on another base?"
    )
