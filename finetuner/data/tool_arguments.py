"""Tool calls in the form that a chat template takes: arguments as an object, or as its JSON; no content as "" or None.

Templates that write them with `tojson` want the object (a text would become a text within a text), others put them
between texts of their own and want the JSON. Which it is shows in what a template makes of a call of ours.
"""

import json
from dataclasses import dataclass
from typing import Any

from finetuner.data.messages import Messages
from finetuner.data.template_sandbox import ChatTemplate
from finetuner.errors import DataError

_KEY, _VALUE = "kq7", "vq7"
_TOOL = {"type": "function", "function": {"name": "fq7", "description": "d", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class CallForms:
    """Whether a template takes the arguments of tool calls as an object, and as text.

    no_content: what it takes for the content of a message that has calls alone.
    """

    objects: bool
    texts: bool
    no_content: str | None

    @classmethod
    def of(cls, template: ChatTemplate) -> "CallForms":
        """Return the forms that a template takes, found by rendering a call with each of them."""
        arguments = {_KEY: _VALUE}
        for with_result in (True, False):
            for content in ("", None, "c"):
                objects, texts = (
                    _is_written(template, given, content, with_result=with_result)
                    for given in (arguments, json.dumps(arguments))
                )
                if objects or texts:
                    return cls(objects, texts, None if content is None else "")
        return cls(objects=True, texts=True, no_content="")  # it refuses such a call: a row's is given as it is

    def convert(self, messages: Messages) -> Messages:
        """Return messages with their calls in the form that the template takes, as they are given if it takes that.

        Raises DataError if they are text and no JSON.
        """
        if not any("tool_calls" in message for message in messages):
            return messages
        return [
            {
                **message,
                "content": message["content"] or self.no_content,
                "tool_calls": [self._call(call, turn) for call in message["tool_calls"]],
            }
            if "tool_calls" in message
            else message
            for turn, message in enumerate(messages)
        ]

    def _call(self, call: dict[str, Any], turn: int) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except ValueError as error:
                raise DataError(
                    f"message {turn}: the arguments of '{function.get('name')}' are not JSON ({error}): "
                    f"{arguments!r:.80}"
                ) from None
            arguments = arguments if self.texts else value
        elif not self.objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}


def _is_written(template: ChatTemplate, arguments: Any, content: str | None, *, with_result: bool) -> bool:
    """Return whether a template writes these arguments, and neither as text within a text nor as Python would."""
    call = {"id": "callq7abc", "type": "function", "function": {"name": "fq7", "arguments": arguments}}
    messages: Messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "r", "name": "fq7", "tool_call_id": "callq7abc"},
        {"role": "assistant", "content": "a"},
    ]
    try:
        text = template.render(messages if with_result else messages[:2], [_TOOL])
    except DataError:
        return False
    return _KEY in text and _VALUE in text and f'\\"{_KEY}\\"' not in text and f"'{_KEY}'" not in text
