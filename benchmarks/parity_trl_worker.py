"""Train a recipe of TRL's with TRL itself, and write what it made of the rows: run by parity_trl.py, with its Python.

    PYTHON parity_trl_worker.py RECIPE ORDER RESULT [ADAPTER]

The steps of trl/scripts/sft.py (TRL 1.16), except that rows come in ORDER, a list of row numbers in a JSON file, and
that the adapter's first weights are saved in the folder ADAPTER. RESULT gets the tokens and labels of each row, in the
file's order, the loss of each step, and the defaults that hold.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config
from trl import __version__ as version


class InOrder(SFTTrainer):
    """SFTTrainer that takes the rows as they come, and keeps each step's loss in full precision."""

    def _get_train_sampler(self, *args: object, **kwargs: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        if not hasattr(self, "losses"):
            self.losses, self.open_loss = [], 0.0
        self.open_loss += loss.item()  # divided by the step's tokens already, so that micro-batches add up
        return loss


class StepEnds(TrainerCallback):
    def __init__(self, trainer: InOrder) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.trainer.losses.append(self.trainer.open_loss)
        self.trainer.open_loss = 0.0


def plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def main(recipe: str, order: str, result: str, adapter: str | None = None) -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    values = yaml.safe_load(Path(recipe).read_text())
    sys.argv[1:] = ["--config", recipe]
    _script, training, model = parser.parse_args_and_config()
    rows = load_dataset("json", data_files=values["dataset_name"], split="train")
    training.model_init_kwargs = {"dtype": "float32", "attn_implementation": "eager"}
    trainer = InOrder(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows,
        peft_config=get_peft_config(model),
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
    )
    made = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    if adapter is not None:
        trainer.model.save_pretrained(adapter)
    trainer.train_dataset = trainer.train_dataset.select(json.loads(Path(order).read_text()))
    trainer.add_callback(StepEnds(trainer))
    trainer.train()
    defaults = {
        kind.__name__: {field.name: plain(field.default) for field in fields(kind)}
        for kind in (SFTConfig, ModelConfig, ScriptArguments)
    }
    said = {"version": version, "rows": made, "losses": trainer.losses, "defaults": defaults}
    Path(result).write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
