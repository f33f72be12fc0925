"""The chat template by which a conversation becomes the tokens that mistral-common makes of it.

mistral-common writes no text, it joins ids. For each of its versions there is a template here that comes to the same
ids, and that it does is checked with the vocabulary in hand.
"""

from typing import TYPE_CHECKING

from finetuner.data.tokenizer_files import VocabularyFile
from finetuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]

# Before version 7 a system text stands in a question, with an empty line behind it: in version 1 in the first one.
_LAST_QUESTION = (
    "{% set asked = namespace(at=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set asked.at = loop.index0 %}{% endif %}{% endfor %}"
)
_FIRST_QUESTION = "{% set asked = namespace(at=1) %}"
_IN_QUESTION = (
    "{% if loop.index0 == asked.at and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
)
_REFUSED = (
    "{% else %}{{ raise_exception('mistral-common has rules of its own for tools, which are not followed here; it "
    "takes system, user and assistant turns, the system text first') }}"
)


def _template(
    opened: str, closed: str, lead: str, *, in_question: str = "", system: str = "", strips: bool = False
) -> str:
    """A template: texts before and after a question and before an answer.

    `in_question`: which question has the system text; or `system`: what is written of it at its place. `strips`: spaces
    at the end of an answer are left out.
    """
    answer = "message['content']" + (".rstrip(' ')" if strips else "")
    return (
        "{{ bos_token }}" + in_question + "{% for message in messages %}"
        "{% if message['role'] == 'system' and loop.first %}" + system + "{% elif message['role'] == 'user' %}"
        f"{{{{ '{opened}' }}}}" + (_IN_QUESTION if in_question else "") + f"{{{{ message['content'] + '{closed}' }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ '{lead}' + {answer} + eos_token }}}}" + _REFUSED + "{% endif %}{% endfor %}"
    )


def _system(lead: str) -> str:
    return f"{{{{ '[SYSTEM_PROMPT]{lead}' + message['content'] + '[/SYSTEM_PROMPT]' }}}}"


def _both(opened: str, closed: str, lead: str, *, in_question: str = "", system: str = "") -> tuple[str, ...]:
    """Both templates, since releases of mistral-common differ in the spaces at the end of an answer."""
    return tuple(
        _template(opened, closed, lead, in_question=in_question, system=system, strips=strips)
        for strips in (True, False)
    )


_SPACED = _both("[INST] ", "[/INST]", " ", in_question=_LAST_QUESTION)
# (is SentencePiece, version) -> templates. Versions from 7 on differ in tools, thoughts and pictures alone.
TEMPLATES: dict[tuple[bool, str], tuple[str, ...]] = {
    (True, "v1"): _both(" [INST] ", " [/INST]", " ", in_question=_FIRST_QUESTION),
    (True, "v2"): _SPACED,
    (True, "v3"): _SPACED,
    (True, "v7"): _both("[INST] ", "[/INST]", " ", system=_system(" ")),
    (False, "v3"): _both("[INST]", "[/INST]", "", in_question=_LAST_QUESTION),
}
LATER = _both("[INST]", "[/INST]", "", system=_system(""))

_ASKED = {"role": "user", "content": " Who  wrote\nthis? 👋"}
_ANSWERED = {"role": "assistant", "content": "Somebody did.\n\n  It was I. "}
_SYSTEM_TEXT = {"role": "system", "content": "Be brief."}
PROBES: tuple[Conversation, ...] = (
    [_ASKED, _ANSWERED],
    [_ASKED, _ANSWERED, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}],
    [_SYSTEM_TEXT, _ASKED, _ANSWERED],
    [_SYSTEM_TEXT, _ASKED, _ANSWERED, _ASKED, {"role": "assistant", "content": "I did"}],
)


def mistral_chat_template(file: VocabularyFile, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the template with which the tokenizer gives the ids that mistral-common gives.

    Raises ModelError if mistral-common is missing, or its ids are others.
    """
    try:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    except ImportError as error:
        raise ModelError(
            f"tokenizer_use_mistral_common takes a package that is not installed ({error}):\n"
            "  pip install mistral-common, or: pip install 'finetuner[mistral]'"
        ) from error
    library = MistralTokenizer.from_file(str(file.path), mode=ValidationMode.finetuning)
    version = str(library.instruct_tokenizer.tokenizer.version.value)
    try:
        expected = [
            list(library.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens) for messages in PROBES
        ]
    except MistralCommonException as error:
        raise ModelError(f"mistral-common does not take a conversation with '{file.path}': {error}") from error
    for template in TEMPLATES.get((file.kind == "sentencepiece", version), LATER):
        if [_tokens(tokenizer, template, messages) for messages in PROBES] == expected:
            return template
    raise ModelError(
        f"'{file.path}' (mistral-common's version {version}) makes other tokens of a conversation than the chat "
        "templates that are known here.\nRemove tokenizer_use_mistral_common and name a template: `chat_template: ...`."
    )


def _tokens(tokenizer: "PreTrainedTokenizerBase", template: str, messages: Conversation) -> list[int]:
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
