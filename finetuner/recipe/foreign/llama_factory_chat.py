"""A chat template that writes the same text as one of LLaMA-Factory's templates, and marks what that trains on.

Text and marks: hiyouga/LLaMA-Factory 0.9.5, its data/template, converter, tool_utils and processor/supervised. A row
that it would skip, since its turns are not a question and an answer in turn, is refused here.
"""

import json
import re

from finetuner.recipe.foreign.llama_factory_templates import ForeignTemplate, Settings, Thoughts

# Which tools there are, and the form of a call, in the words that Qwen's own chat template has for both.
_TOOLS_BEFORE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
_BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"
_SKIPPED = "LLaMA-Factory skips a row whose turns are not a question and an answer in turn; turn "
_OF_ROLE = " is of the role "
_UNANSWERED = "LLaMA-Factory skips a row that does not end with an answer"


def chat_template(template: ForeignTemplate, settings: Settings) -> str:
    """Return the text of the chat template, on one line."""
    parts = [*_system(template, settings), *_questions_and_answers(template, settings)]
    return "".join(parts)


def _system(template: ForeignTemplate, settings: Settings) -> list[str]:
    shape = template.shape
    default = template.system if settings.default_system is None else settings.default_system
    parts = [
        _write(shape.prefix),
        f"{{% set ns = namespace(system={_quoted(default)}, turn=0, results='') %}}{{% set turns = messages %}}",
        "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% if messages[0]['content'] %}{% set ns.system = messages[0]['content'] %}{% endif %}{% endif %}",
    ]
    if template.writes_tools:
        parts.append(
            f"{{% if tools %}}{{% set ns.system = ns.system ~ {_quoted(_TOOLS_BEFORE)} %}}{{% for tool in tools %}}"
            "{% set ns.system = ns.system ~ '\\n' ~ (tool | tojson) %}{% endfor %}"
            f"{{% set ns.system = ns.system ~ {_quoted(_TOOLS_AFTER)} %}}{{% endif %}}"
        )
    if not shape.joins_system:
        parts.append(f"{{% if ns.system %}}{_write(shape.system, 'ns.system')}{{% endif %}}")
    return parts


def _questions_and_answers(template: ForeignTemplate, settings: Settings) -> list[str]:
    shape = template.shape
    lead = "{% set content = message['content'] %}"
    if shape.joins_system:
        joined = _joined(shape.system, "ns.system")
        lead += f"{{% if loop.first and ns.system %}}{{% set content = {joined} ~ message['content'] %}}{{% endif %}}"
    asked = f"{{% if role == 'user' %}}{_write(shape.user, 'content')}"
    told = f"{{% else %}}{_write(shape.tool or shape.user, 'ns.results ~ content')}{{% set ns.results = '' %}}"
    counted = "{% set ns.turn = ns.turn + 1 %}"
    if settings.merges_results:
        more = "{% elif not loop.last and turns[loop.index0 + 1]['role'] == 'tool' %}"
        kept = f"{{% set ns.results = ns.results ~ content ~ {_quoted(_BETWEEN_RESULTS)} %}}"
        question = f"{asked}{counted}{more}{kept}{told}{counted}{{% endif %}}"
    else:
        question = f"{asked}{told}{{% endif %}}{counted}"
    return [
        "{% for message in turns %}{% set role = message['role'] %}",
        lead,
        "{% if ns.turn % 2 == 0 and role in ['user', 'tool'] %}",
        question,
        "{% elif ns.turn % 2 == 1 and role == 'assistant' %}",
        _answer(template, settings),
        counted,
        f"{{% else %}}{{{{ raise_exception({_quoted(_SKIPPED)} ~ loop.index0 ~ {_quoted(_OF_ROLE)} ~ role) }}}}"
        "{% endif %}{% endfor %}",
        f"{{% if ns.turn % 2 == 1 and not add_generation_prompt %}}{{{{ raise_exception({_quoted(_UNANSWERED)}) }}}}"
        "{% endif %}",
    ]


def _answer(template: ForeignTemplate, settings: Settings) -> str:
    before, after = template.shape.assistant.split("{x}")
    parts = ["{% set answer = message['content'] %}"]
    if template.writes_tools:
        call = "{'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson"
        parts.append(
            "{% if message['tool_calls'] %}{% set ns.results = answer %}{% for call in message['tool_calls'] %}"
            "{% set ns.results = ns.results ~ ('\\n' if ns.results else '') ~ '<tool_call>\\n' ~ "
            f"({call}) ~ '\\n</tool_call>' %}}{{% endfor %}}{{% set answer = ns.results %}}"
            "{% set ns.results = '' %}{% endif %}"
        )
    parts.append("{% set empty = '' %}")
    untrained = trained = ""
    if template.thoughts is not None:
        parts.append(_thoughts(template.thoughts, settings))
        untrained, trained = ("", "{{ empty }}") if settings.enable_thinking else ("{{ empty }}", "")
    text = trained + _write(before) + "{{ answer }}" + _write(after)
    marked = f"{{% generation %}}{text}{{% endgeneration %}}"
    if settings.mask_history:
        marked = f"{{% if loop.last %}}{marked}{{% else %}}{text}{{% endif %}}"
    return "".join(parts) + untrained + marked


def _thoughts(words: Thoughts, settings: Settings) -> str:
    """Statements that take thoughts out of `answer`, and set `empty` to the words of an empty thought where due."""
    begin, end = map(_quoted, words)
    parts = []
    forgets = settings.mask_history and not settings.preserve_thinking  # the thoughts of earlier turns
    removes = "true" if settings.enable_thinking is False else "not loop.last" if forgets else None
    if removes is not None:
        parts.append(
            f"{{% if {removes} %}}{{% if {begin} in answer and {end} in answer.split({begin}, 1)[1] %}}"
            f"{{% set answer = answer.split({begin}, 1)[0] ~ answer.split({begin}, 1)[1].split({end}, 1)[1] %}}"
            "{% endif %}{% set answer = answer.lstrip('\\n') %}{% endif %}"
        )
    due = "loop.last and " if forgets else ""
    within = [f"{_quoted(word.strip())} not in answer" for word in words]
    parts.append(f"{{% if {due}{' and '.join(within)} %}}{{% set empty = {begin} ~ {end} %}}{{% endif %}}")
    return "".join(parts)


def _write(text: str, message: str = "''") -> str:
    """Statements that write a format's text, with the expression `message` in the place of {x}."""
    return "".join(f"{{{{ {expression} }}}}" for expression in _expressions(text, message))


def _joined(text: str, message: str) -> str:
    """One expression for a format's text."""
    return " ~ ".join(_expressions(text, message))


def _expressions(text: str, message: str) -> list[str]:
    tokens = {"{x}": message, "{bos}": "(bos_token or '')", "{eos}": "(eos_token or '')"}
    pieces = [piece for piece in re.split(r"(\{(?:x|bos|eos)\})", text) if piece]
    return [tokens.get(piece) or _quoted(piece) for piece in pieces]


def _quoted(text: str) -> str:
    """A text as one of jinja's, without a word that begins a block of it."""
    return json.dumps(text, ensure_ascii=False)
