"""The model, the computation of its attention, and the tokenizer."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from finetuner.recipe.sections.base import Chance, Count, DiskName, Names, Positive, Section, TokenCount
from finetuner.recipe.sections.facts import FREE, MUST_MATCH, NOTED, ONLY_HERE, KeyFacts


class GPTSection(Section):
    """The shape of a model from scratch, whose first weights are random: a preset, or keys, or both."""

    preset: Literal["gpt-nano", "gpt2-small", "gpt2-medium", "gpt2-large", "llama-1b"] | None = Field(
        None,
        description="A shape by name: gpt-nano (under 1M parameters besides the vocabulary), gpt2-small (124M), "
        "gpt2-medium (355M), gpt2-large (774M), llama-1b (as Llama 3.2's 1B).",
    )
    layers: Count | None = Field(None, description="Blocks of attention and MLP, one after another.")
    heads: Count | None = Field(None, description="Attention heads of a layer; they divide the width among them.")
    key_value_heads: Count | None = Field(
        None,
        description="Heads of keys and values, shared by several heads (arXiv:2305.13245); default: as heads.",
    )
    width: Count | None = Field(None, description="Numbers that stand for a token between the layers.")
    mlp_width: Count | None = Field(
        None, description="Width inside an MLP; default: 4 x width, or 8/3 of it with swiglu."
    )
    context: TokenCount | None = Field(None, description="Longest row the model is made for.")
    vocabulary: Count | None = Field(
        None, description="Rows of the embedding; default: the tokenizer's tokens. A multiple of 64 is faster on GPUs."
    )
    tie_embeddings: bool | None = Field(None, description="One matrix for the embedding and the head; default: true.")
    norm: Literal["rms", "layer"] | None = Field(None, description="RMSNorm (default), or GPT-2's LayerNorm.")
    activation: Literal["swiglu", "gelu"] | None = Field(None, description="The MLP's: Llama's (default), or GPT-2's.")
    positions: Literal["rotary", "learned"] | None = Field(
        None, description="How a token's place is told: by rotation (default), or by a learned embedding as in GPT-2."
    )
    bias: bool | None = Field(None, description="A bias in every linear layer but the head; default: false.")
    dropout: Chance | None = Field(None, description="Share of numbers zeroed while training; default: 0.")
    rope_theta: Positive | None = Field(None, description="Base of the rotary angles; default: 10000.")


class ModelSection(Section):
    """The base model, and the computation of its attention."""

    base_model: Annotated[DiskName, MUST_MATCH] = Field(
        min_length=1,
        description="Hub id or folder of the model to start from; from-scratch: random weights, as `model` says.",
    )
    model: Annotated[GPTSection | None, KeyFacts(resume="must_match", axolotl=ONLY_HERE)] = Field(
        None, description="The shape of a model from scratch."
    )
    pickled_weights: Annotated[bool, NOTED] = Field(
        False,
        description="Read weights that are pickled (.bin), which other readers may run code from: turned into "
        "safetensors once, in dataset_prepared_path.",
    )
    trust_remote_code: Annotated[bool, FREE] = Field(False, description="Run Python code that comes with the model.")
    overrides_of_model_config: Annotated[
        dict[str, Any],
        KeyFacts(
            resume="must_match",
            axolotl="there a key that the config lacks is set without a word",
            aliases=("model_config",),
        ),
    ] = Field(
        {},
        description="Values of config.json that this run changes, such as rope_theta, rope_scaling or "
        "attention_dropout: none that changes the weights' shapes.",
    )
    attn_implementation: Annotated[
        Literal["auto", "eager", "sdpa", "flash_attention_2"],
        KeyFacts(
            resume="noted", axolotl="there chosen by transformers when left out; here flash attention where it can run"
        ),
    ] = Field("auto", description="auto: flash attention where it is installed and the device is a GPU, else SDPA.")


class SpecialTokens(Section):
    """Tokens with a role. A token that the vocabulary lacks is added, and the embeddings grow by it."""

    bos_token: str | None = Field(None, description="Begins a text.")
    eos_token: str | None = Field(None, description="Ends a text.")
    pad_token: str | None = Field(None, description="Fills up short rows; never trained on.")
    unk_token: str | None = Field(None, description="Stands for what the vocabulary cannot say.")


class TokenizerTraining(Section):
    """A byte-level BPE: from the 256 bytes on, the most frequent pair of tokens is joined into one, again and again."""

    vocab_size: Annotated[int, Field(ge=257)] = Field(description="Tokens in all, end-of-text among them.")
    files: Names = Field((), description="Files of text, or of rows with a text, to train it on; default: `datasets`.")


class NewTokenizer(Section):
    """A tokenizer that is trained for this run."""

    train: TokenizerTraining = Field(description="Train a byte-level BPE on text.")


def _is_block(value: Any) -> str:
    return "block" if isinstance(value, dict | NewTokenizer) else "name"


class TokenizerSection(Section):
    """The tokenizer, and the tokens added to it."""

    tokenizer: Annotated[
        Annotated[
            Annotated[DiskName | None, Tag("name")] | Annotated[NewTokenizer, Tag("block")], Discriminator(_is_block)
        ],
        KeyFacts(resume="must_match", axolotl=ONLY_HERE, aliases=("tokenizer_config",)),
    ] = Field(
        None,
        description="Hub id or folder of the tokenizer; default: base_model's own. For a model from scratch also byte "
        "(256 of them), char (the characters of the datasets), or a block `train`, for a new BPE.",
    )
    tokenizer_use_mistral_common: Annotated[bool, MUST_MATCH] = Field(
        False,
        description="Read tekken.json or tokenizer.model, and write chats, as mistral-common does, which has to be "
        "installed. For text; tools follow a chat_template.",
    )
    special_tokens: Annotated[SpecialTokens, MUST_MATCH] = Field(
        SpecialTokens(), description="Tokens with a role, by role."
    )
    tokens: Annotated[Names, MUST_MATCH] = Field((), description="Tokens added to the vocabulary.")
    resize_token_embeddings_to_32x: Annotated[bool, MUST_MATCH] = Field(
        False, description="Grow embedding and head to the next multiple of 32 rows above the tokenizer's tokens."
    )
