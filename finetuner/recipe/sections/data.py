"""Which rows are learned."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from finetuner.recipe.sections.base import DiskName, NonNegative, Section, TokenCount


class DatasetEntry(Section):
    """One source of rows."""

    path: DiskName = Field(min_length=1, description="A json, jsonl, csv or parquet file, a folder, or a hub id.")
    type: Literal["alpaca", "chat_template"] = Field(
        description="alpaca: columns instruction, input (may be missing), output. chat_template: a list of messages."
    )
    split: str = Field("train", description="Which split of the dataset.")
    name: str | None = Field(None, description="Which configuration of a hub dataset.")
    field_messages: str = Field("messages", description="Column that holds the messages of a chat_template row.")


class DataSection(Section):
    """Which rows are learned, how long they may be, and which are held out."""

    datasets: Annotated[tuple[DatasetEntry, ...], Strict(False)] = Field(
        min_length=1, description="Sources of training rows, joined in this order."
    )
    test_datasets: Annotated[tuple[DatasetEntry, ...], Strict(False)] = Field(
        (), description="Sources of held-out rows."
    )
    val_set_size: NonNegative = Field(
        0.0, description="Training rows to hold out: a fraction below 1, or a number of rows."
    )
    sequence_len: TokenCount = Field(2048, description="Longest document, in tokens.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to a longer document."
    )
    train_on_inputs: bool = Field(False, description="Learn the prompts too, not only the answers.")
