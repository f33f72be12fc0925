"""What an adapter does to each tensor of its base."""

import json
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from finetuner.errors import ModelError

# PEFT's settings under which an update is more than what is read here.
UNSUPPORTED = (
    "lora_bias", "layer_replication", "rank_pattern", "alpha_pattern", "target_parameters", "use_qalora",
    "exclude_modules",
)  # fmt: skip
UNSUPPORTED_NOTE = "PEFT's own merge_and_unload can do it where the model fits into memory."


class Change(Protocol):
    """What happens to one tensor of the base."""

    @abstractmethod
    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Raises ModelError if the adapter does not fit the base."""

    @abstractmethod
    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """In fp32, rounded once at the end to the number format of `weight`."""


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
        merged = self.a.float().t() @ self.b.float().t() if self.stored_in_out else self.b.float() @ self.a.float()
        merged.mul_(self.scale).add_(weight)  # in place: fresh pages cost more than the arithmetic
        if self.magnitude is not None:
            along = 0 if self.stored_in_out else 1
            length = torch.linalg.vector_norm(merged, dim=along)
            merged.mul_((self.magnitude.float() / length).unsqueeze(along))
        return merged.to(weight.dtype)


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
        return self.tensor.to(weight.dtype)


LORA_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


def read_changes(adapter: Path, base_names: set[str]) -> dict[str, Change]:
    """Base tensor -> what the adapter does to it. Raises ModelError for a tensor that matches none."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the adapter in '{adapter}': {error}") from error
    _require_supported(adapter, config)
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    stored_in_out = bool(config.get("fan_in_fan_out"))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    changes: dict[str, Change] = {}
    for key, tensor in tensors.items():
        module, kind = _split_key(key, config)
        if kind in LORA_PARTS:
            name = base_name(f"{module}.weight", key, base_names)
            parts.setdefault(name, {})[kind] = tensor
        elif kind == TOKEN_ROWS:
            ids = tuple(config["trainable_token_indices"][module.rpartition(".")[2]])
            changes[base_name(f"{module}.weight", key, base_names)] = Rows(tensor, ids)
        elif not _is_tied_copy(module, tensor, tensors, base_names):
            changes[base_name(module, key, base_names)] = Whole(tensor)
    for name, part in parts.items():
        wanted = LORA_PARTS if config.get("use_dora") else LORA_PARTS[:2]
        missing = [kind for kind in wanted if kind not in part]
        if missing:
            raise ModelError(
                f"the adapter in '{adapter}' has only a part of the update of '{name}': {missing[0]} is missing. "
                "Train or fetch it again."
            )
        a, b = part["lora_A.weight"], part["lora_B.weight"]
        changes[name] = LowRank(scale, stored_in_out, a, b, part.get("lora_magnitude_vector"))
    return changes


def _require_supported(adapter: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"the adapter in '{adapter}' is of type {config.get('peft_type')}; only LORA can be merged.")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ModelError(_unsupported(adapter, f"{key}: {config[key]}"))
    if config.get("bias", "none") != "none":
        raise ModelError(_unsupported(adapter, f"bias: {config['bias']}"))


def _split_key(key: str, config: dict[str, Any]) -> tuple[str, str]:
    """An adapter key -> (module, kind of tensor); of a module trained whole: (name of the tensor, "")."""
    bare = key.removeprefix("base_model.model.")
    for kind in (*LORA_PARTS, TOKEN_ROWS):
        if bare.endswith("." + kind):
            return bare.removesuffix("." + kind), kind
    module = bare.rpartition(".")[0]
    if any(f".{module}.".find(f".{name}.") >= 0 for name in config.get("modules_to_save") or ()):
        return bare, ""
    if config.get("ensure_weight_tying"):  # the other half of a tied pair, which is not among modules_to_save
        return bare, ""
    raise ModelError(f"the adapter tensor '{key}' is of a kind that cannot be merged yet. {UNSUPPORTED_NOTE}")


def _is_tied_copy(name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor], base_names: set[str]) -> bool:
    """Whether a head has no tensor of its own in the base, and here is the embedding's again: PEFT saves it twice."""
    return name not in base_names and any(
        other.removeprefix("base_model.model.") in base_names and torch.equal(tensor, value)
        for other, value in tensors.items()
        if value.shape == tensor.shape
    )


def base_name(name: str, key: str, base_names: set[str]) -> str:
    """The tensor of the base that `key` of the adapter is about. Raises ModelError if it has none."""
    # Files saved from the model without its head (older GPT-2, for one) leave out the first part of the name.
    for candidate in (name, name.partition(".")[2]):
        if candidate in base_names:
            return candidate
    raise ModelError(
        f"the adapter tensor '{key}' matches no tensor of the base model: it was trained on another base, or on a head "
        "that is tied to the embedding and so is not in its files."
    )


def _unsupported(adapter: Path, what: str) -> str:
    return f"the adapter in '{adapter}' has {what}, which cannot be merged yet. {UNSUPPORTED_NOTE}"


def _misfit(name: str, base: tuple[int, ...], adapter: tuple[int, ...]) -> str:
    return (
        f"the adapter does not fit the base model: '{name}' has shape {base} in the base and {adapter} in the adapter. "
        "Was it trained on another base?"
    )
