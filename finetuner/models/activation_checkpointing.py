"""Activation checkpointing: memory for compute (arXiv:1604.06174)."""

from typing import TYPE_CHECKING

from finetuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute_activations(model: "PreTrainedModel") -> None:
    """Store only each block's input in forward, and recompute the rest in backward.

    Raises ModelError for a model that cannot.
    """
    if not model.supports_gradient_checkpointing:
        name = type(model).__name__
        raise ModelError(f"{name} cannot recompute activations. Write `gradient_checkpointing: false`.")
    arguments = {"use_reentrant": False}  # the reentrant kind needs inputs with a gradient, which frozen layers lack
    # transformers 5.2x renames the method; the old name warns there and the new one is missing before
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
