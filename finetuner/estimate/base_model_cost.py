"""Parameters, FLOPs and memory of training a base model that exists: its config.json is read, and no weight."""

from pathlib import Path

from finetuner.errors import ModelError
from finetuner.estimate.fit import model_without_weights, training_memory
from finetuner.estimate.training_cost import ModelCost
from finetuner.models.attention import choose_attention
from finetuner.models.model_flops import parameters_by_part, training_flops
from finetuner.models.trainable import train_only
from finetuner.plan.run import Plan
from finetuner.recipe import Recipe
from finetuner.world import World


def base_model_cost(recipe: Recipe, plan: Plan) -> ModelCost:
    """Return the cost of training the recipe's base model. Raises ModelError if its config.json cannot be read."""
    name, adapter = recipe.model.base_model, recipe.adapter
    attention = choose_attention("sdpa", World(), plan.precision)
    model = model_without_weights(name, adapter, recipe.quantization, plan.precision, attention)
    if model is None:
        is_folder = Path(name).is_dir()
        where = "" if is_folder else f" (no folder of that name in {Path.cwd()}, so it was taken for a hub id)"
        raise ModelError(
            f"the config.json of '{name}'{where} cannot be read, or names no causal language model that transformers "
            "knows."
        )
    if adapter.adapter is not None:
        model.requires_grad_(False)
        how = f"{adapter.adapter}, rank {adapter.lora_r}: it comes on top of these"
    else:
        train_only(model, adapter.unfrozen_parameters)
        how = "all trained" if adapter.unfrozen_parameters is None else "trained as unfrozen_parameters says"
    title = f"{name} ({type(model).__name__}), {how}"
    work = training_flops(model, model, recipe.data.sequence_len)
    memory = training_memory(model, adapter, recipe.quantization, recipe.optimizer, plan)
    return ModelCost(title, parameters_by_part(model), work, memory)
