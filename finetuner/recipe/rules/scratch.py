"""Rules about a model from scratch and its tokenizer."""

from collections.abc import Iterator

from finetuner.recipe.gpt_shape import FROM_SCRATCH, MADE_TOKENIZERS, NEEDED, choices_of
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.sections import NewTokenizer


def _shape_and_name(values: Values) -> Iterator[Finding]:
    scratch, block = values["base_model"] == FROM_SCRATCH, values["model"]
    if scratch and block is None:
        message = "base_model: from-scratch needs a `model:` block beside it, such as `model: {preset: gpt-nano}`."
        yield Finding(("base_model",), message)
    if block is not None and not scratch:
        message = "model describes a model from scratch, and base_model names one that is there. Remove this block, or "
        yield Finding(("model",), message + "write `base_model: from-scratch`.", (("base_model",),))


def _complete_shape(values: Values) -> Iterator[Finding]:
    if values["model"] is None:
        return
    choices = choices_of(values["model"])
    missing = [key for key in NEEDED if key not in choices]
    if missing:
        message = f"model has no {', '.join(missing)}. Write them, or a preset (`preset: gpt-nano`)."
        yield Finding(("model",), message)
    if "rope_theta" in values["model"].model_fields_set and choices["positions"] == "learned":
        yield Finding(("model", "rope_theta"), "rope_theta has no effect with learned positions. Remove it.")


def _heads_divide_the_width(values: Values) -> Iterator[Finding]:
    choices = choices_of(values["model"]) if values["model"] is not None else {}
    width, heads = choices.get("width"), choices.get("heads")
    shared = choices.get("key_value_heads", heads)
    if width and heads and width % heads:
        message = f"width {width} cannot be divided among {heads} heads. Write a multiple of {heads}, such as "
        yield Finding(("model",), f"{message}{-(-width // heads) * heads}.")
    elif width and heads and choices["positions"] == "rotary" and width // heads % 2:
        message = f"a head is {width // heads} wide, but rotary positions turn pairs of numbers. Write an even width "
        yield Finding(("model",), message + "of a head (width / heads).")
    if heads and shared and heads % shared:
        message = f"{heads} heads cannot share {shared} key_value_heads evenly. Write a divisor of {heads}."
        yield Finding(("model",), message)


def _rows_fit_the_context(values: Values) -> Iterator[Finding]:
    context = choices_of(values["model"]).get("context") if values["model"] is not None else None
    if context and values["sequence_len"] > context:
        message = f"sequence_len is {values['sequence_len']}, but the model has a context of {context}. Write "
        yield Finding(("sequence_len",), f"{message}`sequence_len: {context}`, or a longer context.", (("model",),))


def _no_adapter_from_scratch(values: Values) -> Iterator[Finding]:
    if values["base_model"] == FROM_SCRATCH and values["adapter"] is not None:
        message = "a model from scratch has nothing to adapt: all of it is trained. Remove this line."
        yield Finding(("adapter",), message, (("base_model",),))


def _rows_of_a_new_table(values: Values) -> Iterator[Finding]:
    if values["base_model"] == FROM_SCRATCH and values["resize_token_embeddings_to_32x"]:
        message = "a model from scratch has the rows that `model: {vocabulary: ...}` says. Write them there."
        yield Finding(("resize_token_embeddings_to_32x",), message, (("base_model",),))


def _tokenizer_of_its_own(values: Values) -> Iterator[Finding]:
    scratch, named = values["base_model"] == FROM_SCRATCH, values["tokenizer"]
    if scratch and named is None:
        message = "a model from scratch brings no tokenizer. Write `tokenizer: byte`, `char`, the name of one, or "
        yield Finding(("base_model",), message + "`tokenizer: {train: {vocab_size: 8192}}`.")
    if not scratch and (isinstance(named, NewTokenizer) or named in MADE_TOKENIZERS):
        message = "a new tokenizer is for a model from scratch: another model knows its own tokens only. Remove this."
        yield Finding(("tokenizer",), message, (("base_model",),))


def _text_for_the_tokenizer(values: Values) -> Iterator[Finding]:
    named = values["tokenizer"]
    if values["base_model"] != FROM_SCRATCH or not (
        named == "char" or (isinstance(named, NewTokenizer) and not named.train.files)
    ):
        return
    what = "tokenizer: char takes the characters of the datasets" if named == "char" else "train reads the datasets"
    instead = "Write `tokenizer: byte`." if named == "char" else "Name `files` to train it on."
    if values["streaming"]:
        message = f"{what}, and a stream is not read before training. {instead}"
        yield Finding(("tokenizer",), message, (("streaming",),))
    for i, entry in enumerate(values["datasets"]):
        if not entry.is_plain_text:
            message = f"{what}, which must be plain text (`type: completion`). {instead}"
            yield Finding(("tokenizer",), message, (("datasets", i),))
            return


RULES: tuple[Rule, ...] = (
    (("base_model", "model"), _shape_and_name),
    (("model",), _complete_shape),
    (("model",), _heads_divide_the_width),
    (("model", "sequence_len"), _rows_fit_the_context),
    (("base_model", "adapter"), _no_adapter_from_scratch),
    (("base_model", "resize_token_embeddings_to_32x"), _rows_of_a_new_table),
    (("base_model", "tokenizer"), _tokenizer_of_its_own),
    (("base_model", "tokenizer", "streaming", "datasets"), _text_for_the_tokenizer),
)
