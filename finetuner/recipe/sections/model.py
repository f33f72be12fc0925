"""The model, and how its attention is computed; the tokenizer."""

from typing import Literal

from pydantic import Field

from finetuner.recipe.sections.base import DiskName, Names, Section


class ModelSection(Section):
    """Which model, and how its attention is computed."""

    base_model: DiskName = Field(min_length=1, description="Hub id or folder of the model to start from.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="auto: flash attention where it is installed and the device is a GPU, else SDPA."
    )


class SpecialTokens(Section):
    """Tokens with a role. A token that the vocabulary lacks is added, and the embeddings grow by it."""

    bos_token: str | None = Field(None, description="Begins a text.")
    eos_token: str | None = Field(None, description="Ends a text.")
    pad_token: str | None = Field(None, description="Fills up short rows; never trained on.")
    unk_token: str | None = Field(None, description="Stands for what the vocabulary cannot say.")


class TokenizerSection(Section):
    """Which tokenizer, and the tokens added to it."""

    tokenizer: DiskName | None = Field(
        None, description="Hub id or folder of the tokenizer; default: base_model's own."
    )
    special_tokens: SpecialTokens = Field(SpecialTokens(), description="Tokens with a role, by role.")
    tokens: Names = Field((), description="Tokens added to the vocabulary.")
