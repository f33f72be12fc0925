"""One source of rows: where they lie, and how a row becomes text."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Strict, Tag

from finetuner.recipe.sections.base import Count, CountOrZero, DiskName, Names, Positive, Rows, Section

TypeName = Literal["alpaca", "completion", "chat_template", "input_output", "prompt_completion"]
# Chat templates that come with finetuner, by name; data/templates.py holds them.
CHAT_TEMPLATES = (
    "alpaca", "aya", "chatml", "cohere", "command_a", "deepseek_v2", "deepseek_v3", "exaone", "exaone4",
    "falcon_h1", "gemma", "gemma3", "gemma3n", "gemma4", "granite", "jamba", "llama3", "llama3_2_vision",
    "llama4", "metharme", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken", "olmo", "phi_3",
    "phi_35", "phi_4", "qwen2_vl", "qwen3", "qwen3_5", "qwen_25", "smollm", "tulu", "zephyr",
)  # fmt: skip
FALLBACK = "tokenizer_default_fallback_"  # before a name: for a tokenizer that has no template
Ends = Literal["all", "turn", "last", "none"]


class InstructionFormat(Section):
    """A row's columns and the text they become. {instruction}, {input} and {system} stand for the row's cells."""

    system_prompt: str = Field("", description="System text of rows that have none of their own.")
    system_format: str = Field("{system}", description="How a system text is written, before the rest.")
    field_system: str = Field("system", min_length=1, description="Column of the system text; may be missing.")
    field_instruction: str = Field("instruction", min_length=1, description="Column of the question or order.")
    field_input: str = Field("input", min_length=1, description="Column of a text to work on; may be missing.")
    field_output: str = Field("output", min_length=1, description="Column of the answer, which is learned.")
    format: str = Field("{instruction} {input} ", description="The prompt of a row that has an input.")
    no_input_format: str = Field("{instruction} ", description="The prompt of a row that has none.")


class MessageProperties(Section):
    """What a message calls its parts."""

    role: str = Field("role", min_length=1, description="Who speaks.")
    content: str = Field("content", min_length=1, description="What is said.")


def _is_block(value: Any) -> str:
    return "block" if isinstance(value, dict | InstructionFormat) else "name"


RowType = Annotated[
    Annotated[TypeName | None, Tag("name")] | Annotated[InstructionFormat, Tag("block")],
    Discriminator(_is_block),
]
Roles = dict[str, Annotated[tuple[str, ...], Strict(False)]]


class DatasetEntry(Section):
    """One source of rows."""

    path: DiskName = Field(min_length=1, description="A file, a folder, or a hub id.")
    type: RowType = Field(
        None,
        description="alpaca: instruction, input (may be missing), output. completion: plain text. chat_template: a "
        "list of messages. input_output: segments of text with a label. prompt_completion: two texts. A block of "
        "field_* and format keys: your own. Left out: rows that are tokenised already (input_ids, labels).",
    )
    split: str = Field("train", description="Which split of the dataset, or a slice of it such as train[:10%].")
    name: str | None = Field(None, description="Which configuration of a hub dataset.")
    revision: str | None = Field(None, description="Which commit, branch or tag of a hub dataset.")
    data_files: DiskName | Names | None = Field(None, description="Which files of a folder or hub dataset.")
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = Field(
        None, description="What is in the files; default: what their names end with."
    )
    sample_by: Literal["line", "document"] = Field(
        "line", description="What a row of a text file is: a line, or the whole file with its line ends."
    )
    shards: Count | None = Field(None, description="Cut the rows into so many parts and take one of them.")
    shards_idx: CountOrZero = Field(0, description="Which part, from 0, of the shards.")
    max_samples: Rows | None = Field(None, description="Take the first rows only, so many.")
    weight: Positive | None = Field(
        None,
        description="How much of the mixture comes from here, beside the weights of the other datasets; the largest "
        "mixture is made that repeats no row.",
    )
    field: str = Field("text", min_length=1, description="Column that holds the text of a completion row.")
    field_messages: str = Field(
        "messages", min_length=1, description="Column that holds the messages of a chat_template row."
    )
    field_tools: str = Field(
        "tools", min_length=1, description="Column that holds the tools a chat_template row may call; may be missing."
    )
    message_property_mappings: MessageProperties = Field(
        MessageProperties(), description="What a message calls its parts, where it is not role and content."
    )
    message_field_training: str | None = Field(
        None, description="Key of a message that says whether it is learned (true or false, 1 or 0), above its role."
    )
    roles: Roles = Field({}, description="Role of the chat template -> names that the rows give it.")
    roles_to_train: Names = Field(("assistant",), description="Roles whose messages are learned.")
    train_on_eos: Ends = Field(
        "turn",
        description="Which ends of turns are learned: those of learned turns (turn), all, the last one's, or none.",
    )
    train_on_eot: Ends | None = Field(
        None, description="The same for turns that end with another token than end-of-text; default: as train_on_eos."
    )
    chat_template: str | None = Field(None, description="As the recipe's chat_template, which it stands above.")
    chat_template_jinja: str | None = Field(None, description="As the recipe's chat_template_jinja.")


# Which `type` a key belongs to; with any other it would have no effect.
KEYS_OF_TYPE: dict[str, str] = {
    "field": "completion",
    **dict.fromkeys(
        (
            "field_messages", "field_tools", "message_property_mappings", "message_field_training",
            "roles", "roles_to_train", "train_on_eos", "train_on_eot", "chat_template",
            "chat_template_jinja",
        ),
        "chat_template",
    ),
}  # fmt: skip
