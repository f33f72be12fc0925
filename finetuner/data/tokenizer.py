"""Load a tokenizer, with the tokens that the recipe adds to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.data.mistral_chat import mistral_chat_template
from finetuner.data.tokenizer_files import find_vocabulary, load_vocabulary, require_mistral_file
from finetuner.errors import ModelError
from finetuner.recipe.sections import TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the ids of the tokens that the recipe added to it."""

    tokenizer: "PreTrainedTokenizerBase"
    new_ids: tuple[int, ...] = ()


def load_tokenizer(
    section: TokenizerSection,
    name: str,
    trust_remote_code: bool,
    *,
    ends: tuple[str, ...] = (),
    spaced_template: bool = False,
) -> Vocabulary:
    """Return the tokenizer of a hub id or folder, with the section's tokens added.

    `spaced_template`: chats are written by a template that puts spaces behind special tokens itself, which a tokenizer
    that is made of a SentencePiece file then does not.
    Added tokens among `ends`, which end turns, become special tokens, so that the same word in a row is ordinary text.
    One that the tokenizer has as a special token stays what it is.
    Raises ModelError if there is no tokenizer, or none that can say which characters a token stands for.
    """
    from transformers import AddedToken

    if section.tokenizer_use_mistral_common:
        file = require_mistral_file(name)
        tokenizer = load_vocabulary(file, spaced_template=True)
        tokenizer.chat_template = mistral_chat_template(file, tokenizer)
    else:
        tokenizer = _tokenizer_of(name, trust_remote_code, spaced_template)
    before = len(tokenizer)
    roles = {role: token for role, token in section.special_tokens.model_dump().items() if token is not None}
    if roles:
        tokenizer.add_special_tokens(roles)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Adding a special token again would make it an ordinary one, with which a row's text could end a turn.
    tokens = [one for one in section.tokens if one not in special]
    if tokens:
        tokenizer.add_tokens([AddedToken(one, normalized=False, special=one in ends) for one in tokens])
    tokenizer.padding_side = "right"
    return Vocabulary(tokenizer, tuple(range(before, len(tokenizer))))


def make_special(tokenizer: "PreTrainedTokenizerBase", tokens: tuple[str, ...]) -> None:
    """Make special tokens of tokens that the tokenizer has, so that the same words in a row are ordinary text."""
    from transformers import AddedToken

    if tokens:
        tokenizer.add_tokens([AddedToken(one, normalized=False, special=True) for one in tokens], special_tokens=True)


def _tokenizer_of(name: str, trust_remote_code: bool, spaced_template: bool) -> "PreTrainedTokenizerBase":
    """The fast tokenizer of a hub id or folder. Raises ModelError if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = find_vocabulary(name)
    if file is not None and not (trust_remote_code and "auto_map" in file.config):
        return load_vocabulary(file, spaced_template=spaced_template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if type(tokenizer).__name__ == "MistralCommonBackend":  # tekken.json beside tokenizer.json: it has no offsets
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_no_tokenizer_message(name, error)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer '{name}' ({type(tokenizer).__name__}) is written in Python and does not say which "
            "characters a token stands for, which is needed to find the trained tokens of a row. Name a folder or hub "
            "id with a tokenizer.json: `tokenizer: ...`."
        )
    return tokenizer


def _no_tokenizer_message(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = "" if Path(name).is_dir() else f" (no folder of that name in {Path.cwd()}, so it was taken for a hub id)"
    return f"cannot load a tokenizer from '{name}'{where}: {first}\nCheck base_model or tokenizer, and the network."


def special_ids(section: TokenizerSection, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return role -> id of the special tokens that the recipe names, such as {"eos_token_id": 2}."""
    named = section.special_tokens.model_dump(exclude_none=True)
    ids: Any = tokenizer.convert_tokens_to_ids(list(named.values()))
    return {f"{role}_id": token_id for role, token_id in zip(named, ids, strict=True)}
