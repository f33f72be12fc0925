"""Hugging Face causal language models, ready to train."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from finetuner.errors import ModelError
from finetuner.models.four_bit_linear import (
    Format,
    FourBitLinear,
    adopt_layers,
    loading_arguments,
    make_room_for_layers,
    require_full_weights,
)
from finetuner.models.lazy_weights import Promises, Report, promise, settle_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_model(
    base_model: str,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    trust_remote_code: bool = False,
    form: Format | None = None,
    device: torch.device | None = None,
) -> "PreTrainedModel":
    """A causal LM with its weights in `dtype`, on the CPU, with the first `attention` that the architecture has.

    With a `form`, its linear layers but the head are quantised to it, on `device`, while they are read.

    Only safetensors: pickled weights can run code. Raises ModelError unless every weight of the model is in the files;
    transformers fills up what is missing with random numbers.
    """
    from transformers import AutoModelForCausalLM

    know_our_own()
    first_choice, *others = attention
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base_model,
            dtype=dtype,
            attn_implementation=first_choice,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **(loading_arguments(base_model, form, device or torch.device("cpu"), trust_remote_code) if form else {}),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if others and isinstance(error, ValueError | ImportError) and "attention" in str(error).lower():
            return load_model(
                base_model,
                dtype=dtype,
                attention=tuple(others),
                trust_remote_code=trust_remote_code,
                form=form,
                device=device,
            )
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        pickled = list(Path(base_model).glob("pytorch_model*.bin")) if Path(base_model).is_dir() else []
        advice = "Its weights are pickled: if you know who made them, write `pickled_weights: true`." if pickled else ""
        raise ModelError(
            f"cannot load a causal language model from '{base_model}': {first}\n"
            f"{advice or 'Give a folder with config.json and model.safetensors, or a hub id (and a network).'}"
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of '{base_model}' are not those of its config ({type(model).__name__}): '{missing[0]}' and "
            f"{len(missing) - 1} more tensors are missing.\nFetch the model again, or mend its config.json."
        )
    if form is not None and form.kind != "int8":
        adopt_layers(model, form)
    return model


def recompute_activations(model: "PreTrainedModel") -> None:
    """Keep only each block's input and recompute the rest in backward (arXiv:1604.06174)."""
    if not model.supports_gradient_checkpointing:
        name = type(model).__name__
        raise ModelError(f"{name} cannot recompute activations. Write `gradient_checkpointing: false`.")
    arguments = {"use_reentrant": False}  # the reentrant kind needs inputs with a gradient, which frozen layers lack
    # transformers 5.2x renames the method; the old name warns there and the new one is missing before
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def grow_embeddings(model: "PreTrainedModel", vocab_size: int) -> int:
    """Give every token id a row, new rows being the mean of the old ones (arXiv:2111.07408 motivates the mean: the new
    token starts out neither likely nor unlikely). Returns the number of rows added.

    Deterministic, so that all ranks and every later start of the run have the same rows.
    """
    embedding = _weight(model.get_input_embeddings())
    old = embedding.shape[0]
    if vocab_size <= old:
        return 0
    means = [_weight(m).detach().float().mean(dim=0) for m in _vocabulary_modules(model)]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for module, mean in zip(_vocabulary_modules(model), means, strict=True):
        with torch.no_grad():
            _weight(module)[old:] = mean
    return vocab_size - old


def embedding_rows(model: "PreTrainedModel") -> int:
    return _weight(model.get_input_embeddings()).shape[0]


def use_token_ids(model: "PreTrainedModel", token_ids: dict[str, int]) -> None:
    """Let the saved configs name the special tokens that the recipe chose: generation has to stop at the right one."""
    for role, token_id in token_ids.items():
        model.config.update({role: token_id})
        if model.generation_config is not None:
            model.generation_config.update(**{role: token_id})


def length_notes(model: "PreTrainedModel", longest: int) -> list[str]:
    """What to know about rows beyond the positions a model was made for. Raises ModelError where it has no more."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return []
    learned = ("wpe", "embed_positions", "position_embeddings")
    if any(isinstance(m, nn.Embedding) and name.endswith(learned) for name, m in model.named_modules()):
        raise ModelError(
            f"the longest row has {longest} tokens, and the model has positions for {limit}.\n"
            f"Write `sequence_len: {limit}`."
        )
    return [f"the longest row has {longest:,} tokens; the model was made for {limit:,} (max_position_embeddings)"]


def _vocabulary_modules(model: "PreTrainedModel") -> list[nn.Module]:
    """The embedding, and the head unless it is the same tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or _weight(head) is _weight(embedding):
        return [embedding]
    return [embedding, head]


def _weight(module: nn.Module) -> torch.Tensor:
    weight: Any = module.weight
    return weight


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter that is trained. A tied tensor appears once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def vocabulary_parameters(module: nn.Module, model: "PreTrainedModel") -> frozenset[str]:
    """Names, within `module`, of the parameters with a row for each token or position: the embeddings and the head of
    the `model` in it, wrapped by PEFT or not."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    inside = [
        name for name, m in module.named_modules() if isinstance(m, nn.Embedding) or any(m is table for table in tables)
    ]
    return frozenset(n for n, _ in module.named_parameters() if any(n.startswith(f"{name}.") for name in inside))


def train_only(model: nn.Module, patterns: tuple[str, ...] | None) -> None:
    """Freeze all parameters but those whose name begins as one of the regular expressions says; None freezes none.

    Raises ModelError for an expression that no name matches.
    """
    if patterns is None:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.match(pattern, name) for name in names):
            raise ModelError(
                f"unfrozen_parameters has '{pattern}', but no parameter's name begins like that.\n"
                f"They look like: {', '.join(names[:3])}, ..., {names[-1]}. (A tied head has no name of its own.)"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))


def train_in_fp32(model: nn.Module) -> None:
    """A step of AdamW at a small rate is below half a bf16 ulp of most weights: they would not move at all."""
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()


def write_model_folder(
    model: "PreTrainedModel", folder: Path, values: Mapping[str, torch.Tensor], *, portable: bool = False
) -> None:
    """An ordinary model folder with `values` for its weights; of the model itself only the configs are used.

    `portable`: a GPT of ours is written as the Llama or GPT-2 that it is, for tools that have no code of ours; one that
    is neither stays as it is, and its config says so."""
    if portable and model.config.model_type == "finetuner_gpt":
        model, values = _as_others_know_it(model, values)
    model.save_pretrained(folder, state_dict=dict(values))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dtypes = {str(v.dtype).removeprefix("torch.") for v in values.values() if v.is_floating_point()}
    if len(dtypes) == 1:
        config["dtype"] = dtypes.pop()  # transformers wrote that of the live weights
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_others_know_it(
    model: "PreTrainedModel", values: Mapping[str, torch.Tensor]
) -> "tuple[PreTrainedModel, Mapping[str, torch.Tensor]]":
    from transformers import AutoModelForCausalLM

    from finetuner.models.gpt_conversion import is_portable, portable_config, portable_weights

    config: Any = model.config
    if not is_portable(config):
        return model, values
    with torch.device("meta"):
        other: Any = AutoModelForCausalLM.from_config(portable_config(config))
    if model.generation_config is not None:
        other.generation_config = model.generation_config
    return other, portable_weights(config, values)


def reading_notes(model: "PreTrainedModel") -> list[str]:
    """What to know of a result that write_model_folder could not make portable."""
    from finetuner.models.gpt_conversion import is_portable

    config: Any = model.config
    if config.model_type != "finetuner_gpt" or is_portable(config):
        return []
    return [
        f"no other tool has a model with norm {config.norm}, activation {config.activation}, positions "
        f"{config.positions} and bias {str(config.bias).lower()}: only finetuner reads it"
    ]


def know_our_own() -> None:
    """Let transformers' Auto classes read a GPT of ours, which they learn of as its module is imported."""
    from finetuner.models import gpt

    assert gpt.GPTConfig.model_type


def on_meta(
    base_model: "str | PreTrainedConfig",
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    trust_remote_code: bool = False,
    form: Format | None = None,
) -> "PreTrainedModel":
    """As load_model, without memory for its weights; only config.json is read, or a config is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    know_our_own()
    config: Any = base_model
    if isinstance(base_model, str):
        config = AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
        if form is not None:
            require_full_weights(base_model, config)
    for i, choice in enumerate(attention):
        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=choice, trust_remote_code=trust_remote_code
                )
            break
        except (ValueError, ImportError) as error:
            if i + 1 == len(attention) or "attention" not in str(error).lower():
                raise
    if form is not None and form.kind != "int8":
        make_room_for_layers(model, form)
    model.tie_weights()
    return model


def bare_bones(
    base_model: "str | PreTrainedConfig", *, dtype: torch.dtype, attention: tuple[str, ...], form: Format | None
) -> "PreTrainedModel | None":
    """As on_meta, or None where load_model will say what is wrong with it."""
    try:
        return on_meta(base_model, dtype=dtype, attention=attention, form=form)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return None


def empty_model(
    base_model: str,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    trust_remote_code: bool = False,
    form: Format | None = None,
) -> "PreTrainedModel":
    """As load_model, with arbitrary numbers for weights, for ranks that are handed theirs tensor by tensor.

    On Linux its memory is not occupied before it is written to, so a rank pays for its part alone.
    """
    from transformers import GenerationConfig

    model: Any = on_meta(base_model, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code, form=form)
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = parameters.setdefault(id(parameter), new)  # what is tied stays tied
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with contextlib.suppress(OSError):  # it has none: what the config says serves
        model.generation_config = GenerationConfig.from_pretrained(base_model)
    return model.eval()


def promised_model(
    base_model: str,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    form: Format | None,
    device: torch.device,
    cache_folder: Path | None = None,
    report: Report = lambda done, total: None,
    cast_to: torch.dtype | None = None,
) -> "tuple[PreTrainedModel, Promises] | None":
    """As load_model, with weights that are still to be read, in `dtype`; None for a model that has to be loaded whole.

    `cast_to`: number format of the empty model, where an engine would cast all of it.
    """
    try:
        model = empty_model(base_model, dtype=cast_to or dtype, attention=attention, form=form)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # load_model says what is wrong
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return None
    settle_buffers(model)
    names = dict(model.named_parameters())
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, FourBitLinear)}
    promises = promise(base_model, model, names, layers, dtype, device, cache_folder, report)
    return None if promises is None else (model, promises)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) elements; tied tensors count once, and the weights of a 4-bit layer as what they stand for."""
    parameters = list(model.parameters())
    layers = [m for m in model.modules() if isinstance(m, FourBitLinear)]
    unpacked = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers)
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + unpacked


def layers_to_quantize(base_model: str, form: Format, skip: tuple[str, ...]) -> list[str]:
    """Names of the layers of a base that bitsandbytes, as transformers uses it, would keep in few bits; only its config
    is read. `skip`: what its settings leave out beside, or, where they name any, in place of the head."""
    model = on_meta(base_model, dtype=form.dtype, attention=("sdpa", "eager"))
    return make_room_for_layers(model, replace(form, kind="nf4"), skip or None)
