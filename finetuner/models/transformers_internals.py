"""The private attributes of transformers that this package reads or writes: the one place to look after an upgrade.

Each function says why there is no public way. Attributes that a model class sets for transformers (gpt.py) are its
documented interface for new architectures, and are not here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_class_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """Names of the classes of a model's decoder layers, as the model declares them; () if it declares none.

    `_no_split_modules` is what transformers, Accelerate and FSDP themselves find the layers by; no public attribute
    repeats it, and the names differ between architectures.
    """
    return tuple(sorted(getattr(model, "_no_split_modules", None) or ()))


def attention_implementation(model: "PreTrainedModel") -> str:
    """The attention that a model runs, such as "sdpa" or "flash_attention_2".

    `attn_implementation` is an argument of `from_pretrained`; what came of it is only in this attribute of the config.
    """
    return str(model.config._attn_implementation)


def has_weights_fixed_in_fp32(model: "PreTrainedModel") -> bool:
    """Return whether some weights stay in fp32 whatever dtype the model is loaded in.

    `from_pretrained` does it silently, by these two attributes. Whoever reads the files without it has to know.
    """
    return bool(model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict)


def initialize_buffers(model: "PreTrainedModel") -> None:
    """Compute the buffers that are in no file, such as rotary frequencies, and leave the parameters as they are.

    transformers computes buffers only in `initialize_weights`, which draws random weights too. It passes over
    parameters that bear this mark, as it does itself for those that it has read from files.
    """
    for parameter in model.parameters():
        marked: Any = parameter
        marked._is_hf_initialized = True
    model.initialize_weights()


def forget_origin(config: Any) -> None:
    """Remove the name that a config was loaded by. It is saved with the model, and the next reader of the folder would
    take it for a place to load from; there is no public way to clear it."""
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path
