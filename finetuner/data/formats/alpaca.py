"""`type: alpaca`: columns instruction, input (may be missing, null or empty) and output, which is trained on.

The prompt is Stanford Alpaca's (github.com/tatsu-lab/stanford_alpaca), with and without an input.
"""

from typing import TYPE_CHECKING

from finetuner.data.formats.base import Renderer
from finetuner.data.formats.instruction import render_instruction
from finetuner.recipe.sections import DataSection, DatasetEntry, InstructionFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
ALPACA = InstructionFormat(
    format=_INTRO.format(", paired with an input that provides further context")
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    no_input_format=_INTRO.format("") + "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
)


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of Alpaca rows, which have no system text."""
    return lambda row: render_instruction(row, ALPACA, system="")
