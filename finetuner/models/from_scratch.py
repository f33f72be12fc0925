"""A model folder for a run from scratch: its tokenizer, and random weights, written once.

    <dataset_prepared_path>/tokenizers/<key>/   a tokenizer made for the recipe's text
    <dataset_prepared_path>/scratch/<key>/      config.json and model.safetensors, drawn by the recipe's seed

From there on every engine reads, shards and resumes it as it does a model that was trained before.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from finetuner.errors import ModelError
from finetuner.models import gpt
from finetuner.recipe.gpt_shape import shape_of
from finetuner.recipe.sections import GPTSection
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def scratch_config(section: GPTSection | None, tokenizer: "PreTrainedTokenizerBase") -> gpt.GPTConfig:
    """Return the config of the recipe's shape with the tokenizer's vocabulary.

    Raises ModelError if the tokenizer has more tokens than the key `vocabulary` says.
    """
    assert section is not None, "a rule asks for the block"
    shape = shape_of(section)
    if shape.vocabulary is not None and shape.vocabulary < len(tokenizer):
        raise ModelError(
            f"model.vocabulary is {shape.vocabulary}, but the tokenizer has {len(tokenizer)} tokens.\n"
            f"Write `vocabulary: {-(-len(tokenizer) // 64) * 64}`, or leave it out."
        )
    return gpt.GPTConfig(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.context,
        norm=shape.norm,
        activation=shape.activation,
        positions=shape.positions,
        bias=shape.bias,
        dropout=shape.dropout,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_scratch_model(config: gpt.GPTConfig, root: str, seed: int, world: World) -> str:
    """Write the folder of a model with weights drawn by `seed`, unless it is there already; return its path.

    `root`: dataset_prepared_path. The weights are the same on every machine and rank. Raises ModelError if it cannot be
    written.
    """
    facts = {
        "config": config.to_dict(),
        "seed": seed,
        "code": [Path(gpt.__file__).read_text(encoding="utf-8"), torch.__version__, transformers.__version__],
    }

    def make(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gpt.GPTForCausalLM(config).save_pretrained(folder)

    folder = Path(root) / "scratch" / _key(facts)
    with explain_disk_errors(
        ModelError, f"cannot write to '{folder.parent}'", "Make room, or name another folder: dataset_prepared_path=..."
    ):
        return str(build_once(folder, make, is_builder=world.local_rank == 0))


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
