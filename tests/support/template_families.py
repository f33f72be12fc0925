"""Chat templates with the properties of today's families: each plain, and with its answers marked, from one text."""

TOKENS = [
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "[INST]", "[/INST]", "[CALLS]",
    "[RESULT]", "[/RESULT]", "<U>", "<A>", "<C>", "</C>", "<R>", "</R>", "<SEP>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|tool|>", "<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>", "<E>", "<S>",
    "<|eot|>", "<|eom|>",
]  # fmt: skip

TEMPLATES = {
    # a header behind the prompt, another end for the last answer, thoughts under `thinking`
    "channels": (
        "<|start|>system<|message|>Be good.<|end|>"
        "{%- if messages[0].role == 'system' -%}"
        "<|start|>developer<|message|>{{ messages[0].content }}<|end|>{%- endif -%}"
        "{%- set called = namespace(name='') -%}"
        "{%- for m in messages if m.role != 'system' -%}"
        "{%- if m.role == 'user' -%}<|start|>user<|message|>{{ m.content }}<|end|>"
        "{%- elif m.role == 'tool' -%}"
        "<|start|>functions.{{ called.name }} to=assistant<|message|>{{ m.content | tojson }}<|end|>"
        "{%- elif m.tool_calls -%}{%- set called.name = m.tool_calls[0].function.name -%}<|start|>assistant"
        "«{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
        "{{ ' to=functions.' + called.name }}<|channel|>commentary<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>»"
        "{%- else -%}<|start|>assistant"
        "«{% if m.thinking and loop.last %}"
        "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
        "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}»"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"
    ),
    # no generation prompt, the system text before the last question
    "brackets": (
        "{%- set system = messages[0].content if messages[0].role == 'system' else none -%}"
        "{%- set last = namespace(at=0) -%}"
        "{%- for m in messages if m.role != 'system' -%}"
        "{%- if m.role == 'user' -%}{%- set last.at = loop.index0 -%}{%- endif -%}{%- endfor -%}{{ bos_token }}"
        "{%- for m in messages if m.role != 'system' -%}"
        "{%- if m.role == 'user' -%}[INST]"
        "{%- if system is not none and loop.index0 == last.at -%}{{ system + '\\n\\n' }}{%- endif -%}"
        "{{ m.content }}[/INST]"
        "{%- elif m.tool_calls -%}"
        "«[CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}»"
        "{%- elif m.role == 'tool' -%}[RESULT]{{ m.content }}[/RESULT]"
        "{%- else -%}«{{ m.content + eos_token }}»{%- endif -%}{%- endfor -%}"
    ),
    # arguments are concatenated as text; a call's content must be null
    "text arguments": (
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}<U>{{ m.content }}"
        "{%- elif m.role == 'tool' -%}<R>{{ m.content }}</R>"
        "{%- elif m.content is none -%}<A>"
        "«{%- for c in m.tool_calls -%}{{ '<C>' + c.function.name + '<SEP>' + c.function.arguments + '</C>' }}"
        "{%- endfor -%}{{ eos_token }}»"
        "{%- else -%}<A>«{{ m.content + eos_token }}»{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}<A>{%- endif -%}"
    ),
    # the prompt opens a thought, which answers to earlier questions do not have
    "opened thought": (
        "{% set last = namespace(at=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if m.role != 'assistant' %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}"
        "{% else %}{{ '<|start|>assistant\n' }}"
        "{% if loop.index0 > last.at %}{{ '<think>\n' }}{% endif %}"
        "«{% if loop.index0 > last.at %}{{ (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}"
        "{{ '\n<C>' + c.function.name }}{{ c.function.arguments | tojson }}</C>{% endfor %}"
        "<|end|>»{{ '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
    ),
    # results within the model's turn, thoughts beside calls alone
    "results inside": (
        "{% set before = namespace(role='') %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|turn>user\n' + m.content + '<turn|>\n' }}"
        "{% elif m.role == 'tool' %}<|result>{{ m.content }}<result|>"
        "{% else %}{% if before.role != 'tool' %}{{ '<|turn>model\n' }}{% endif %}"
        "«{% if m.tool_calls and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<|call>{{ c.function.name }}{{ c.function.arguments | tojson }}<call|>"
        "{% endfor %}{% if not m.tool_calls %}<turn|>{% endif %}»{% if not m.tool_calls %}{{ '\n' }}{% endif %}"
        "{% endif %}{% set before.role = m.role %}"
        "{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>model\n' }}{% endif %}"
    ),
    # the prompt is always written, and turns begin with a token that follows the end at once
    "always asks": (
        "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'assistant' -%}<S><A>«{{ m.content }}<E>»"
        "{%- else -%}<S><U>{{ m.content }}<E>{%- endif -%}{%- endfor -%}<S><A>"
    ),
    # another header behind the prompt in what was said before: </think> in the place of the prompt's <think>
    "closed thought": (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}<|assistant|>«</think>{{ m.content }}{{ eos_token }}»"
        "{%- else -%}<|{{ m.role }}|>{{ m.content }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|><think>{%- endif -%}"
    ),
    # other ends of turns for a call than for an answer
    "ends of turns": (
        "{%- for m in messages -%}<|start|>{{ m.role }}<|message|>"
        "{%- if m.tool_calls -%}«{{ m.content }}{%- for c in m.tool_calls -%}"
        "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}{%- endfor -%}<|eom|>»"
        "{%- elif m.role == 'assistant' -%}«{{ m.content | trim }}<|eot|>»"
        "{%- else -%}{{ m.content | trim }}<|eot|>{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant<|message|>{%- endif -%}"
    ),
    # the system text twice, and once more in the first question
    "system thrice": (
        "{%- set s = messages[0].content if messages[0].role == 'system' else '-' -%}<|system|>{{ s }}|{{ s }}<E>"
        "{%- for m in messages if m.role != 'system' -%}"
        "{%- if m.role == 'user' -%}<|user|>{{ s if loop.first else '' }}{{ m.content }}<E>"
        "{%- else -%}<|assistant|>«{{ m.content }}<E>»{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    ),
}  # fmt: skip
CLOSED_BY_NEXT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<C>{{ c.function.name }}{{ c.function.arguments | tojson }}</C>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def plain(text: str) -> str:
    return text.replace("«", "").replace("»", "")


def marked(text: str) -> str:
    return text.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")
