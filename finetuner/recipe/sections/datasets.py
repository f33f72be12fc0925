"""One source of rows: where they lie, and how a row becomes text.

A further `type` is a row of ROW_TYPES and its name in TypeName here, its own keys in DatasetEntry, and a file of its
name in data/formats/.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Strict, Tag

from finetuner.recipe.sections.base import Count, CountOrZero, DiskName, Names, Positive, Rows, Section

TypeName = Literal[
    "alpaca", "completion", "chat_template", "input_output", "prompt_completion", "instruction_chat"
]  # fmt: skip


@dataclass(frozen=True)
class RowTypeFacts:
    """Facts of one `type` of rows.

    meaning: its rows, in the words of the reference. columns: those that a row must have. column_key: the key of the
    entry that names such a column. optional: columns that are read where a row has them. optional_keys: keys of the
    entry that name such columns. Every other column that says something is an error. keys: keys of an entry that other
    types do not read; column_key is among them.
    is_plain_text: a row is one text, all of it trained on, so that rows may be joined and cut.
    """

    meaning: str
    columns: tuple[str, ...] = ()
    column_key: str | None = None
    optional: tuple[str, ...] = ()
    optional_keys: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    is_plain_text: bool = False


# Keys of an entry about how a conversation is read and rendered.
_CHAT_KEYS = (
    "field_tools", "field_system", "message_property_mappings", "message_field_training", "roles", "roles_to_train",
    "train_on_last_turn", "train_on_eos", "train_on_eot", "chat_template", "chat_template_jinja",
    "drop_system_message", "split_thinking",
)  # fmt: skip
_CHAT_COLUMNS = ("functions", "chat_template_kwargs")  # the first is OpenAI's older name of tools
_CHAT_COLUMN_KEYS = ("field_tools", "field_system")
ROW_TYPES: dict[str, RowTypeFacts] = {
    "alpaca": RowTypeFacts(
        "instruction, input (may be missing), output",
        ("instruction", "output"),
        optional=("input", "system", "history"),
    ),
    "completion": RowTypeFacts("plain text", column_key="field", keys=("field",), is_plain_text=True),
    "chat_template": RowTypeFacts(
        "a list of messages",
        column_key="field_messages",
        optional=_CHAT_COLUMNS,
        optional_keys=_CHAT_COLUMN_KEYS,
        keys=("field_messages", *_CHAT_KEYS),
    ),
    "input_output": RowTypeFacts("segments of text with a label", ("segments",)),
    "prompt_completion": RowTypeFacts(
        "two texts, or two lists of messages",
        ("prompt", "completion"),
        optional=_CHAT_COLUMNS,
        optional_keys=_CHAT_COLUMN_KEYS,
        keys=_CHAT_KEYS,
    ),
    "instruction_chat": RowTypeFacts(
        "instruction, input, output, system and history as messages of the chat template",
        optional=("chat_template_kwargs",),
        keys=(
            "instruction_columns", "roles_to_train", "train_on_last_turn", "train_on_eos", "train_on_eot",
            "chat_template", "chat_template_jinja", "drop_system_message", "split_thinking",
        ),
    ),
}  # fmt: skip
assert tuple(ROW_TYPES) == get_args(TypeName)
CHATS = ("chat_template", "instruction_chat")  # types all whose rows become conversations of the chat template
# key of an entry -> the types that read it; with any other it would have no effect
KEYS_OF_TYPE: dict[str, tuple[str, ...]] = {
    key: tuple(name for name, other in ROW_TYPES.items() if key in other.keys)
    for row_type in ROW_TYPES.values()
    for key in row_type.keys
}

# Chat templates that come with finetuner, by name; their texts are in data/chat_templates.py.
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
    field_system: str = Field("system", description='Column of the system text; may be missing. "": there is none.')
    field_instruction: str = Field("instruction", min_length=1, description="Column of the question or order.")
    field_input: str = Field("input", description='Column of a text to work on; may be missing. "": there is none.')
    field_output: str = Field("output", min_length=1, description="Column of the answer, which is trained on.")
    format: str = Field("{instruction} {input} ", description="The prompt of a row that has an input.")
    no_input_format: str = Field("{instruction} ", description="The prompt of a row that has none.")
    output_format: str = Field("{output}", description="How the answer is written. {output} stands for its cell.")

    @property
    def input_column(self) -> str | None:
        """Column of the input; None if there is none, or its default name is another text's column."""
        others = ("", self.field_instruction, self.field_output)
        return None if self.field_input in others else self.field_input

    @property
    def system_column(self) -> str | None:
        """Column of the system text; None if the default name of it is another text's column."""
        others = ("", self.field_instruction, self.field_input, self.field_output)
        return None if self.field_system in others else self.field_system


class InstructionColumns(Section):
    """Columns of a row that is an instruction and its answer; "": there is none, or it is not to be read."""

    instruction: str = Field("instruction", min_length=1, description="The question or order.")
    input: str = Field("input", description="A text to work on, written on the line below it.")
    output: str = Field("output", min_length=1, description="The answer, which is trained on.")
    system: str = Field("system", description="The system text.")
    history: str = Field("history", description="Earlier turns: a list of [question, answer].")
    tools: str = Field("tools", description="The tools that may be called.")


class MessageProperties(Section):
    """Names of the keys of a message. Those that are left out have these names themselves."""

    role: str = Field("role", min_length=1, description="Who speaks.")
    content: str = Field("content", min_length=1, description="What is said.")
    reasoning_content: str | None = Field(None, min_length=1, description="What was thought before it.")
    tool_calls: str | None = Field(None, min_length=1, description="The tools that are called.")
    tool_call_id: str | None = Field(None, min_length=1, description="Which call a tool answers.")
    name: str | None = Field(None, min_length=1, description="The name of who speaks, such as a tool's.")


def _is_block(value: Any) -> str:
    return "block" if isinstance(value, dict | InstructionFormat) else "name"


RowType = Annotated[
    Annotated[TypeName | None, Tag("name")] | Annotated[InstructionFormat, Tag("block")],
    Discriminator(_is_block),
]
Roles = dict[str, Annotated[tuple[str, ...], Strict(False)]]


class DatasetEntry(Section):
    """One source of rows."""

    path: DiskName = Field(
        min_length=1,
        description="A file, a folder, an address or a hub id; or json, csv, text, parquet or arrow with data_files.",
    )
    type: RowType = Field(
        None,
        description=" ".join(f"{name}: {row_type.meaning}." for name, row_type in ROW_TYPES.items())
        + " A block of field_* and format keys: your own. Left out: rows of tokens (input_ids, labels).",
    )
    split: str = Field("train", description="Which split of the dataset, or a slice of it such as train[:10%].")
    name: str | None = Field(
        None, description="Which configuration of a hub dataset, or of a clone whose README.md names some."
    )
    revision: str | None = Field(None, description="Which commit, branch or tag of a hub dataset.")
    data_files: DiskName | Names | None = Field(
        None, description="Which files of a folder or hub dataset; names or patterns."
    )
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
        description="Share of the mixture that comes from here, relative to the weights of the other datasets; the "
        "largest mixture is taken that repeats no row.",
    )
    field: str = Field("text", min_length=1, description="Column that holds the text of a completion row.")
    field_messages: str = Field(
        "messages", min_length=1, description="Column that holds the messages of a chat_template row."
    )
    field_tools: str = Field(
        "tools", min_length=1, description="Column that holds the tools a chat_template row may call; may be missing."
    )
    field_system: str = Field(
        "system",
        min_length=1,
        description="Column that holds the system text of a chat_template row, to put before its messages; may be "
        "missing.",
    )
    message_property_mappings: MessageProperties = Field(
        MessageProperties(), description="Names of the keys of a message, where they are not the usual ones."
    )
    message_field_training: str | None = Field(
        None,
        description="Key of a message that says whether it is trained on (true, false, 1 or 0), whatever its role; "
        "beside train, weight, loss, loss_mask, loss_weight and trainable, which are read in any case.",
    )
    drop_system_message: bool = Field(False, description="Leave out a system message that begins a conversation.")
    split_thinking: bool = Field(
        False,
        description="Take a thought that an answer's text begins with, in <think>, <reasoning> or "
        "<|begin_of_thought|>, for its reasoning_content.",
    )
    roles: Roles = Field({}, description="Role of the chat template -> names that the rows give it.")
    roles_to_train: Names = Field(("assistant",), description="Roles whose messages are trained on.")
    train_on_eos: Ends = Field(
        "turn",
        description="Which ends of turns are trained on: those of trained turns (turn), all, the last one's, or none.",
    )
    train_on_eot: Ends | None = Field(
        None, description="The same for turns that end with another token than end-of-text; default: as train_on_eos."
    )
    unused_columns: Literal["refuse", "ignore"] | Names = Field(
        "refuse",
        description="What happens to columns of a row and keys of its messages that its type does not use, unless they "
        "are plainly inert, such as ids and dates. refuse: an error. ignore: they are left out. A list: those "
        "of these names are left out.",
    )
    instruction_columns: InstructionColumns = Field(
        InstructionColumns(), description="Columns of instruction_chat rows, where they have other names."
    )
    train_on_last_turn: bool = Field(
        False, description="Of a conversation's turns that would be trained on, train on the last one alone."
    )
    chat_template: str | None = Field(None, description="As the recipe's chat_template, which it stands above.")
    chat_template_jinja: str | None = Field(None, description="As the recipe's chat_template_jinja.")

    @property
    def row_format(self) -> str | None:
        """Name of the file of data/formats/ that renders the rows; None for rows that hold tokens."""
        return "instruction" if isinstance(self.type, InstructionFormat) else self.type

    @property
    def is_plain_text(self) -> bool:
        """Whether a row is one text, all of it trained on."""
        return isinstance(self.type, str) and ROW_TYPES[self.type].is_plain_text

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        if self.type is None:
            return ("input_ids", "labels")
        if isinstance(self.type, InstructionFormat):
            return (self.type.field_instruction, self.type.field_output)
        if self.type == "instruction_chat":
            return (self.instruction_columns.instruction, self.instruction_columns.output)
        row_type = ROW_TYPES[self.type]
        named = (dict(self)[row_type.column_key],) if row_type.column_key is not None else ()
        return (*named, *row_type.columns)

    @property
    def read_columns(self) -> frozenset[str]:
        """Columns that the type reads, required or not."""
        required = frozenset(self.required_columns)
        if self.type is None:
            return required | {"attention_mask"}
        if isinstance(self.type, InstructionFormat):
            optional = (self.type.system_column, self.type.input_column)
            return required | {name for name in optional if name is not None}
        row_type = ROW_TYPES[self.type]
        named = [dict(self)[key] for key in row_type.optional_keys]
        if self.type == "instruction_chat":
            named += [column for column in dict(self.instruction_columns).values() if column]
        return required | {*row_type.optional, *named}

    @property
    def chat_keys_set(self) -> tuple[str, ...]:
        """Keys of this entry about conversations that have another value than the default."""
        values, fields = dict(self), type(self).model_fields
        return tuple(key for key in _CHAT_KEYS if values[key] != fields[key].default)

    @property
    def unused_names(self) -> tuple[str, ...]:
        """Columns and keys that the recipe leaves out by name, or by a "" in instruction_columns."""
        usual, chosen = dict(InstructionColumns()), dict(self.instruction_columns)
        unread = tuple(usual[part] for part, column in chosen.items() if not column)
        return unread if isinstance(self.unused_columns, str) else (*self.unused_columns, *unread)

    @property
    def column_advice(self) -> str:
        """Advice for a recipe whose rows lack a required column."""
        if self.type is None:
            return "Say what the rows are (`type: alpaca`, `type: chat_template`, ...)"
        if isinstance(self.type, InstructionFormat):
            return "Name the columns in the `type` block (field_*)"
        if self.type == "instruction_chat":
            return "Name the columns with `instruction_columns`"
        key = ROW_TYPES[self.type].column_key
        return f"Name the column with `{key}`" if key is not None else "Rename the columns"
