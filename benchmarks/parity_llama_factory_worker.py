"""Train a recipe of LLaMA-Factory's with LLaMA-Factory itself: run by parity_llama_factory.py, with its Python.

    PYTHON parity_llama_factory_worker.py RECIPE ORDER RESULT [ADAPTER]

The steps of llamafactory/train/sft/workflow.py (0.9.5), except that rows come in ORDER, a list of row numbers in a JSON
file, and that the adapter's first weights are saved in the folder ADAPTER. RESULT gets the tokens and labels of each
row, in the files' order, and the loss of each step. It is run from the folder that `dataset_dir` is relative to.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
from llamafactory.extras.env import VERSION
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import TrainerCallback


class InOrder(CustomSeq2SeqTrainer):
    """The trainer of the SFT stage, with rows as they come, and each step's loss in full precision."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.losses: list[float] = []
        self.open_loss = 0.0

    def _get_train_sampler(self, *args: object, **kwargs: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.open_loss += loss.item()  # divided by the step's tokens already, so that micro-batches add up
        return loss


class StepEnds(TrainerCallback):
    def __init__(self, trainer: InOrder) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.trainer.losses.append(self.trainer.open_loss)
        self.trainer.open_loss = 0.0


def main(recipe: str, order: str, result: str, adapter: str | None = None) -> None:
    values = yaml.safe_load(Path(recipe).read_text())
    model_args, data_args, training, finetuning, _generating = get_train_args(values)
    tokens = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokens["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training, stage="sft", **tokens)
    model = load_model(tokens["tokenizer"], model_args, finetuning, is_trainable=True)
    if adapter is not None:
        model.save_pretrained(adapter)
    collator = SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=model,
        pad_to_multiple_of=8,
        block_diag_attn=model_args.block_diag_attn,
        neat_packing=data_args.neat_packing,
        attn_implementation=model.config._attn_implementation,
        compute_dtype=model_args.compute_dtype,
        **tokens,
    )
    made = [[row["input_ids"], row["labels"]] for row in rows["train_dataset"]]
    chosen = json.loads(Path(order).read_text())
    if len(chosen) == len(made):
        rows["train_dataset"] = rows["train_dataset"].select(chosen)
    trainer = InOrder(model=model, args=training, finetuning_args=finetuning, data_collator=collator, **rows, **tokens)
    trainer.add_callback(StepEnds(trainer))
    trainer.train()
    Path(result).write_text(json.dumps({"version": VERSION, "rows": made, "losses": trainer.losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
