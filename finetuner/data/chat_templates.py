"""Chat templates by name, in the formats that the model families publish; written for this project.

Each begins with begin-of-text where its family does, ends every answer with a token, and adds no text of its own: the
default system texts of some families are left to the rows, and the description of tools is in our words. Those of
vision families are for text alone.
"""

from collections.abc import Mapping
from pathlib import Path

from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection
from finetuner.recipe.sections.datasets import FALLBACK

TurnFormat = tuple[str, str]  # text before and after a turn's content
EOS = "\0"  # in a TurnFormat: the tokenizer's own end-of-text


def _expression(text: str) -> str:
    """Return a jinja2 expression whose value is the text."""
    parts = []
    for i, part in enumerate(text.split(EOS)):
        escaped = part.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        parts += [*(["eos_token"] if i else []), *([f"'{escaped}'"] if part else [])]
    return " + ".join(parts)


def _turn(turn_format: TurnFormat, content: str) -> str:
    """Return a template of one turn, whose content is a jinja2 expression."""
    before, after = map(_expression, turn_format)
    return "{{ " + " + ".join(part for part in (before, content, after) if part) + " }}"


def _turns(forms: Mapping[str, TurnFormat], *, bos: bool = True, trims: bool = False, asks: str | None = None) -> str:
    """Return a template of one format per role, which refuses other roles.

    `asks`: the text that asks for an answer, where it differs from the text before an answer.
    """
    content = "(message['content'] | trim)" if trims else "message['content']"
    text = "{{ bos_token or '' }}" if bos else ""
    text += "{% for message in messages %}"
    for i, (role, form) in enumerate(forms.items()):
        text += f"{{% {'elif' if i else 'if'} message['role'] == '{role}' %}}" + _turn(form, content)
    text += "{% else %}{{ raise_exception('this template has no role ' + message['role']) }}{% endif %}{% endfor %}"
    opened = _expression(forms["assistant"][0] if asks is None else asks)
    return text + ("{% if add_generation_prompt %}{{ " + opened + " }}{% endif %}" if opened else "")


def _any_role(opening: TurnFormat, end: str, *, bos: bool = False, trims: bool = False) -> str:
    """Return a template that writes a role's name between the two texts of `opening`, and ends every turn alike."""
    content = "message['content']" + (" | trim" if trims else "")
    before, between = map(_expression, opening)
    return (
        ("{{ bos_token or '' }}" if bos else "")
        + "{% for message in messages %}"
        + f"{{{{ {before} + message['role'] + {between} + ({content}) + {_expression(end)} }}}}"
        + "{% endfor %}{% if add_generation_prompt %}"
        + f"{{{{ {_expression(f'{opening[0]}assistant{opening[1]}')} }}}}"
        + "{% endif %}"
    )


def _gemma(opened: str, end: str, *, system: bool) -> str:
    """Return a template of the Gemma family, which calls the assistant "model".

    `system`: a system text is allowed, and stands before the first question, in its turn.
    """
    first = "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    if system:
        first += "{% set first = messages[0]['content'] + '\\n\\n' %}{% endif %}"
    else:
        first += "{{ raise_exception('gemma has no system role') }}{% endif %}"
    return (
        "{{ bos_token or '' }}" + first + "{% for message in messages %}"
        "{% if message['role'] != 'system' %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        f"{{{{ {_expression(opened)} + role + '\\n' }}}}"
        "{% if first and loop.index0 == 1 %}{{ first }}{% endif %}"
        f"{{{{ (message['content'] | trim) + {_expression(end)} }}}}"
        "{% elif not loop.first %}{{ raise_exception('a system text comes first') }}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_expression(opened + 'model' + chr(10))} }}}}{{% endif %}}"
    )


def _mistral(opened: str, closed: str, lead: str) -> str:
    """Return a template of the Mistral family: a system text stands before the first question, in its brackets."""
    answer = _turn((lead, EOS), "message['content']")
    return (
        "{{ bos_token or '' }}"
        "{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {_expression(opened)} }}}}"
        "{% if first and loop.index0 == 1 %}{{ first }}{% endif %}"
        f"{{{{ message['content'] + {_expression(closed)} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{answer}"
        "{% elif not loop.first %}{{ raise_exception('mistral takes system, user and assistant turns') }}"
        "{% endif %}"
        "{% endfor %}"
    )


# Qwen's turns are ChatML's. Tools stand in the system turn, calls in the answer, and their results in the user's turn.
_QWEN_SYSTEM = (
    "{% if tools or messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{% if tools %}{% if messages[0]['role'] == 'system' %}{{ '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nThese functions may be called:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '\\n</tools>\\n\\nCALLS' }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
)
_QWEN_CALLS = (
    "A call is a JSON object between tags:\\n<tool_call>\\n"
    '{"name": <function>, "arguments": <object of arguments>}\\n</tool_call>'
)
_QWEN_XML_CALLS = (
    "A call names its function and gives each argument between tags:\\n<tool_call>\\n<function=name>\\n"
    "<parameter=argument>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>"
)
_QWEN_CALL = (
    "{{ '<tool_call>\\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' + (call['arguments'] | tojson) "
    "+ '}\\n</tool_call>' }}"
)
_QWEN_XML_CALL = (
    "{{ '<tool_call>\\n<function=' + call['name'] + '>\\n' }}{% for name, value in call['arguments'] | items %}"
    "{{ '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}"
    "{% endfor %}{{ '</function>\\n</tool_call>' }}"
)
# Thoughts are written for answers to the last question only.
_QWEN_THOUGHT = (
    "{% set thought = message['reasoning_content'] or '' %}"
    "{% if not thought and '</think>' in answer %}"
    "{% set thought = answer.split('</think>')[0].split('<think>')[-1] %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > question.at and (SHOWN) %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
)
_QWEN_TURNS = (
    "{% set question = namespace(at=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set question.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% set answer = message['content'] %}THOUGHT{{ answer }}"
    "{% for each in message['tool_calls'] or [] %}{% set call = each['function'] or each %}"
    "{% if answer or not loop.first %}{{ '\\n' }}{% endif %}CALL{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif not (loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
)
_QWEN_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}OPENED{% endif %}"
_UNTHOUGHT = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"


def _qwen(*, shown: str | None, opened: str, xml: bool = False) -> str:
    """Return a template of the Qwen family.

    `shown`: a jinja2 condition for an answer to the last question to begin with a thought, be it empty; None: no
    thoughts. `opened`: what follows the text that asks for an answer. `xml`: tool calls are written as XML, not JSON.
    """
    thought = "" if shown is None else _QWEN_THOUGHT.replace("SHOWN", shown)
    turns = _QWEN_TURNS.replace("THOUGHT", thought).replace("CALL", _QWEN_XML_CALL if xml else _QWEN_CALL)
    system = _QWEN_SYSTEM.replace("CALLS", _QWEN_XML_CALLS if xml else _QWEN_CALLS)
    return system + turns + _QWEN_ASKS.replace("OPENED", opened)


_CHATML = _any_role(("<|im_start|>", "\n"), "<|im_end|>\n")
_LLAMA3 = _any_role(("<|start_header_id|>", "<|end_header_id|>\n\n"), "<|eot_id|>", bos=True, trims=True)
_GEMMA3 = _gemma("<start_of_turn>", "<end_of_turn>\n", system=True)
_PHI_3 = _any_role(("<|", "|>\n"), "<|end|>\n")
_TULU: dict[str, TurnFormat] = {
    "system": ("<|system|>\n", "\n"),
    "user": ("<|user|>\n", "\n"),
    "assistant": ("<|assistant|>\n", f"{EOS}\n"),
}
_COHERE: dict[str, TurnFormat] = {
    role: (f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
    for role, name in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
}
_COMMAND_A = _COHERE | {
    "assistant": (
        f"{_COHERE['assistant'][0]}<|START_RESPONSE|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    )
}

TEMPLATES: dict[str, str] = {
    "alpaca": _turns(
        {"system": ("", "\n\n"), "user": ("### Instruction:\n", "\n\n"), "assistant": ("### Response:\n", EOS)}
    ),
    "aya": _turns(_COHERE, trims=True),
    "chatml": _CHATML,
    "cohere": _turns(_COHERE, trims=True),
    "command_a": _turns(_COMMAND_A),
    "deepseek_v2": _turns({"system": ("", "\n\n"), "user": ("<｜User｜>", ""), "assistant": ("<｜Assistant｜>", EOS)}),
    "deepseek_v3": _turns({"system": ("", ""), "user": ("<｜User｜>", ""), "assistant": ("<｜Assistant｜>", EOS)}),
    "exaone": _turns(
        {
            "system": ("[|system|]", "[|endofturn|]\n"),
            "user": ("[|user|]", "\n"),
            "assistant": ("[|assistant|]", "[|endofturn|]\n"),
        },
        bos=False,
    ),
    "exaone4": _turns(
        {
            "system": ("[|system|]\n", "[|endofturn|]\n"),
            "user": ("[|user|]\n", "[|endofturn|]\n"),
            "assistant": ("[|assistant|]\n<think>\n\n</think>\n\n", "[|endofturn|]\n"),
        },
        bos=False,
    ),
    "falcon_h1": "{{ bos_token or '' }}" + _CHATML,
    "gemma": _gemma("<start_of_turn>", "<end_of_turn>\n", system=False),
    "gemma3": _GEMMA3,
    "gemma3n": _GEMMA3,
    "gemma4": _turns(
        {
            "system": ("<|turn>system\n", "<turn|>\n"),
            "user": ("<|turn>user\n", "<turn|>\n"),
            "assistant": ("<|turn>model\n", "<turn|>\n"),
        },
        trims=True,
    ),
    "granite": _any_role(("<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>\n"),
    "jamba": _turns(
        {
            "system": ("<|bom|><|system|> ", "<|eom|>"),
            "user": ("<|bom|><|user|> ", "<|eom|>"),
            "assistant": ("<|bom|><|assistant|> ", "<|eom|>"),
        },
        bos=False,
        asks="<|bom|><|assistant|>",
    ).replace("{% for", "{{ '<|startoftext|>' }}{% for", 1),
    "llama3": _LLAMA3,
    "llama3_2_vision": _LLAMA3,
    "llama4": _any_role(("<|header_start|>", "<|header_end|>\n\n"), "<|eot|>", bos=True),
    "metharme": _turns(
        {"system": ("<|system|>", ""), "user": ("<|user|>", ""), "assistant": ("<|model|>", EOS)}, trims=True
    ),
    "mistral_v1": _mistral(" [INST] ", " [/INST]", " "),
    "mistral_v2v3": _mistral("[INST] ", "[/INST]", " "),
    "mistral_v3_tekken": _mistral("[INST]", "[/INST]", ""),
    "mistral_v7_tekken": _turns(
        {"system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "user": ("[INST]", "[/INST]"), "assistant": ("", EOS)}
    ),
    "olmo": _turns(_TULU),
    "phi_3": _PHI_3,
    "phi_35": _PHI_3,
    "phi_4": _any_role(("<|im_start|>", "<|im_sep|>"), "<|im_end|>"),
    "qwen2_vl": _CHATML,
    "qwen3": _qwen(shown="loop.last or thought", opened=f"{_UNTHOUGHT}{{% endif %}}"),
    "qwen3_5": _qwen(shown="true", opened=f"{_UNTHOUGHT}{{% else %}}{{{{ '<think>\\n' }}}}{{% endif %}}", xml=True),
    "qwen_25": _qwen(shown=None, opened=""),
    "smollm": _CHATML,
    "tulu": _turns(_TULU, bos=False),
    "zephyr": _any_role(("<|", "|>\n"), f"{EOS}\n"),
}


def choose_template(section: DataSection, own: str | None) -> str | None:
    """Return the chat template that the recipe asks for, which is also saved with the result; `own`: the tokenizer's.

    A dataset's choice comes before the recipe's, and all datasets choose the same (a rule of the recipe). Raises
    DataError if the file that chat_template_jinja names cannot be read.
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
