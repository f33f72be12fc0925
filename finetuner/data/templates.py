"""Chat templates by name, in the shapes that the model families publish; written for this project.

Each begins with begin-of-text where its family does, ends every turn with a token, and says no word of its own.
"""

from pathlib import Path

from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection
from finetuner.recipe.sections.datasets import FALLBACK

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('gemma has no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI_3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PHI_4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# A system text stands before the first question, inside its brackets.
_MISTRAL = (
    "{{ bos_token }}"
    "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'OPEN' + (first if loop.index0 == (1 if first else 0) else '') + message['content'] + 'CLOSE' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'LEAD' + message['content'] + eos_token }}"
    "{% elif not loop.first %}{{ raise_exception('mistral takes system, user and assistant turns') }}"
    "{% endif %}"
    "{% endfor %}"
)
_ALPACA = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _mistral(opened: str, closed: str, lead: str) -> str:
    return _MISTRAL.replace("OPEN", opened).replace("CLOSE", closed).replace("LEAD", lead)


TEMPLATES: dict[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama3": _LLAMA3,
    "mistral_v1": _mistral(" [INST] ", " [/INST]", " "),
    "mistral_v2v3": _mistral("[INST] ", "[/INST]", " "),
    "mistral_v3_tekken": _mistral("[INST]", "[/INST]", ""),
    "phi_3": _PHI_3,
    "phi_4": _PHI_4,
    "zephyr": _ZEPHYR,
}


def chosen_template(section: DataSection, own: str | None) -> str | None:
    """The template that the recipe asks for, `own` being the tokenizer's; the one that is saved with the result.

    A dataset's choice stands above the recipe's, and all datasets choose the same (a rule says so). Raises DataError if
    the file that chat_template_jinja names cannot be read.
    """
    name, text = section.chat_template, section.chat_template_jinja
    for entry in (*section.datasets, *section.test_datasets):
        if entry.type == "chat_template" and (entry.chat_template is not None or entry.chat_template_jinja is not None):
            name, text = entry.chat_template, entry.chat_template_jinja
    if text is not None:
        return _text_or_file(text)
    if name is None or name == "tokenizer_default":
        return own
    if name.startswith(FALLBACK) and own is not None:
        return own
    return TEMPLATES[name.removeprefix(FALLBACK)]


def _text_or_file(text: str) -> str:
    if "{" in text or "\n" in text:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template_jinja is neither a template nor a file that can be read: '{text}'.") from error
