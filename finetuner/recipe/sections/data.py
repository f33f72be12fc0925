"""The rows to train on, and their place in batches."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from finetuner.recipe.sections.base import Count, DiskName, Names, NonNegative, Rows, Section, Share, TokenCount
from finetuner.recipe.sections.datasets import DatasetEntry
from finetuner.recipe.sections.facts import FREE, MUST_MATCH, ONLY_HERE, KeyFacts


class DataSection(Section):
    """The rows to train on, how long they may be, and the rows that are held out."""

    datasets: Annotated[tuple[DatasetEntry, ...], Strict(False), MUST_MATCH] = Field(
        min_length=1, description="Sources of training rows, joined in this order."
    )
    test_datasets: Annotated[tuple[DatasetEntry, ...], Strict(False), MUST_MATCH] = Field(
        (), description="Sources of held-out rows."
    )
    val_set_size: Annotated[NonNegative, KeyFacts(resume="must_match", known_as=("val_size", "val_split"))] = Field(
        0.0, description="Training rows to hold out: a fraction below 1, or a number of rows."
    )
    mix_by: Annotated[Literal["rows", "tokens"], KeyFacts(resume="must_match", axolotl=ONLY_HERE)] = Field(
        "rows", description="What the weights of the datasets are shares of."
    )
    streaming: Annotated[bool, MUST_MATCH] = Field(
        False,
        description="Read rows while training, without preparing them: for a corpus that fits no disk. Rows of "
        "`type: completion` are joined and cut into full rows; others are not cut.",
    )
    streaming_multipack_buffer_size: Annotated[Rows, MUST_MATCH] = Field(
        10_000, description="Documents that are read, shuffled and packed together when streaming."
    )
    dataset_exact_deduplication: Annotated[bool, MUST_MATCH] = Field(
        False,
        description="Of rows with equal tokens and labels take the first, and train on none that is held out.",
    )
    sequence_len: Annotated[
        TokenCount,
        KeyFacts(
            resume="must_match", axolotl="there the default is 512", aliases=("sequence_length", "max_seq_length")
        ),
    ] = Field(2048, description="Longest document, and size of a pack, in tokens.")
    excess_length_strategy: Annotated[
        Literal["drop", "truncate", "split", "raise"],
        KeyFacts(resume="must_match", axolotl="there only drop and truncate"),
    ] = Field("drop", description="What happens to a longer document; split: it becomes several.")
    min_sample_len: Annotated[Count, MUST_MATCH] = Field(2, description="Shorter documents, in tokens, are dropped.")
    max_dropped_fraction: Annotated[Share, KeyFacts(resume="free", prepared_rows=False, axolotl=ONLY_HERE)] = Field(
        0.2, description="Most of the rows that may be dropped; above it, the run stops and says why they were."
    )
    on_bad_row: Annotated[Literal["skip", "raise"], KeyFacts(resume="noted", axolotl=ONLY_HERE)] = Field(
        "raise", description="A row that cannot become text stops the run, or is dropped and listed."
    )
    train_on_inputs: Annotated[
        bool, KeyFacts(resume="must_match", axolotl="there, of chats, without the words around the messages")
    ] = Field(False, description="Train on the prompts too, not only on the answers.")
    chat_template: Annotated[str | None, MUST_MATCH] = Field(
        None,
        description="tokenizer_default: the tokenizer's own. Or a name, such as chatml or llama3; "
        "tokenizer_default_fallback_NAME: the named one if the tokenizer has none; jinja: that of chat_template_jinja.",
    )
    chat_template_jinja: Annotated[str | None, MUST_MATCH] = Field(
        None, description="A chat template: its text, or a file that holds it."
    )
    chat_template_kwargs: Annotated[dict[str, str | bool | int | float], MUST_MATCH] = Field(
        {}, description="Values that the chat template asks for, such as enable_thinking."
    )
    eot_tokens: Annotated[
        Names | None,
        KeyFacts(resume="must_match", axolotl="there end-of-text alone, if left out, even if turns end otherwise"),
    ] = Field(None, description="Tokens that end a turn; default: the token that the template writes after it.")
    dataset_prepared_path: Annotated[DiskName, KeyFacts(resume="free", prepared_rows=False)] = Field(
        ".finetuner/prepared", min_length=1, description="Folder in which tokens are cached for later starts."
    )


class PackingSection(Section):
    """Documents in the rows of a batch: packed together, padded, or grouped by length."""

    sample_packing: Annotated[bool, MUST_MATCH] = Field(
        False, description="Fill each row with several whole documents, which do not see each other."
    )
    eval_sample_packing: Annotated[bool | None, FREE] = Field(
        None, description="The same in evaluation; default: as sample_packing."
    )
    pretrain_multipack_attn: Annotated[bool, MUST_MATCH] = Field(
        True,
        description="Documents of a pack see only themselves; false, for rows of `type: completion`: each token sees "
        "all that stands before it in its row, other documents too.",
    )
    pad_to_sequence_len: Annotated[bool, FREE] = Field(
        False, description="Give every batch the full length, whatever is in it."
    )
    group_by_length: Annotated[bool, MUST_MATCH] = Field(
        False, description="Make the rows of a step of like length: less padding, and an order that is less random."
    )
