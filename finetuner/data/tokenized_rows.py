"""The tokenizer of a recipe, and its rows as documents of token ids."""

from finetuner.console import Screen
from finetuner.data.cache import prepare_once
from finetuner.data.chat_templates import choose_template
from finetuner.data.prepared_data import PreparedData, held_out_only
from finetuner.data.tokenizer import Vocabulary, load_tokenizer, make_special
from finetuner.data.tokenizer_source import resolve_tokenizer
from finetuner.data.turn_marks import turn_marks
from finetuner.recipe.sections import DataSection, ModelSection, PackingSection, TokenizerSection
from finetuner.storage.progress import ProgressReport, no_progress
from finetuner.world import World


def tokenize_rows(
    model: ModelSection,
    tokenizer: TokenizerSection,
    data: DataSection,
    packing: PackingSection,
    *,
    world: World,
    seed: int,
    screen: Screen,
) -> tuple[Vocabulary, PreparedData]:
    """Return the tokenizer, and the documents that it makes of the rows; of a stream, the held-out rows alone.

    Both are built once and cached, by the first rank of each node. Raises FinetunerError.
    """
    with screen.work("making the tokenizer", "rows") as work:
        vocabulary = build_tokenizer(model, tokenizer, data, world, work.at)
    with screen.work("tokenizing", "rows") as work:
        section = held_out_only(data) if data.streaming else data
        return vocabulary, prepare_once(section, packing, vocabulary.tokenizer, seed, world, work.at)


def build_tokenizer(
    model: ModelSection,
    section: TokenizerSection,
    data: DataSection,
    world: World,
    report: ProgressReport = no_progress,
) -> Vocabulary:
    """Return the recipe's tokenizer with its added tokens and its chat template. Raises FinetunerError."""
    name = resolve_tokenizer(section, data, world, report) or model.base_model
    entries = (*data.datasets, *data.test_datasets)
    spaced = "mistral_v1" in (data.chat_template, *(entry.chat_template for entry in entries))
    ends = data.eot_tokens or ()
    vocabulary = load_tokenizer(section, name, model.trust_remote_code, ends=ends, spaced_template=spaced)
    tokenizer = vocabulary.tokenizer
    if not section.tokenizer_use_mistral_common:
        tokenizer.chat_template = choose_template(data, tokenizer.chat_template)  # saved with the result
    if section.tokens and any(entry.type == "chat_template" for entry in entries):
        # `tokens: ["<|im_start|>"]`: a row's own text could otherwise begin a turn
        make_special(tokenizer, turn_marks(tokenizer, section.tokens))
    return vocabulary
