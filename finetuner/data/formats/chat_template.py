"""`type: chat_template`: a list of messages, in the form that the chat template gives them (data/messages.py)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from finetuner.data.chat_renderer import ChatRenderer, build_chat_renderer
from finetuner.data.formats.base import Rendered, Renderer, kind_of
from finetuner.data.inert_names import is_empty
from finetuner.data.message_keys import MessageKeys
from finetuner.data.messages import Conversation, MessageReader, only_last_turn
from finetuner.data.row_files import Row
from finetuner.data.tool_calls import parsed_json
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KWARGS = "chat_template_kwargs"
MAX_CACHED_FORMS = 64
# What a rendering is given in any case, so that a row's value for it would have no effect.
_NOT_FOR_ROWS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize")


def renderer(entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the renderer of conversations. Raises DataError if the tokenizer has no chat template that can be used."""
    rows = ChatRows(entry, section, tokenizer)
    return lambda row: rows.render(row, rows.reader.read(row))


class _Form(NamedTuple):
    """Renderer of conversations with certain variables of the template, and the message keys that it writes."""

    chat: ChatRenderer
    keys: MessageKeys


class ChatRows:
    """Renders the conversations of one entry. A row's own chat_template_kwargs go before the recipe's."""

    def __init__(self, entry: DatasetEntry, section: DataSection, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises DataError if the tokenizer has no chat template that can be used."""
        self.entry, self.section, self.tokenizer = entry, section, tokenizer
        self.usual = self._form({})
        self.forms: dict[str, _Form] = {}
        self.text = _template_text(tokenizer)
        self.reader = MessageReader.of(entry, self.text, trains_all=section.train_on_inputs)

    def render(self, row: Row, conversation: Conversation) -> Rendered:
        """Return the text of a row's conversation. Raises DataError as ChatRenderer does, and for keys left out."""
        if self.entry.train_on_last_turn:
            conversation = only_last_turn(conversation)
        form, ignored = self.usual, conversation.ignored
        kwargs = row.get(KWARGS)
        if not is_empty(kwargs) and KWARGS not in self.entry.unused_names:
            form, unread = self._form_of_row(kwargs)
            ignored += unread
        if conversation.extras:
            conversation, more = form.keys.settle(conversation)
            ignored += more
        roles = tuple([message["role"] for message in conversation.messages])
        return replace(form.chat.render(conversation), roles=roles, ignored=ignored)

    def _form(self, kwargs: Mapping[str, Any]) -> _Form:
        variables = {**self.section.chat_template_kwargs, **kwargs}
        chat = build_chat_renderer(
            self.tokenizer,
            kwargs=variables,
            eot_tokens=self.section.eot_tokens,
            train_on_eos=self.entry.train_on_eos,
            train_on_eot=self.entry.train_on_eot,
        )
        return _Form(chat, MessageKeys(self.tokenizer, variables, self.entry.unused_columns == "ignore"))

    def _form_of_row(self, kwargs: Any) -> tuple[_Form, tuple[str, ...]]:
        """Return the rendering with a row's own variables, and the names of those that its template does not know."""
        if isinstance(kwargs, str):
            kwargs = parsed_json(kwargs, f"column '{KWARGS}'")
        if not isinstance(kwargs, dict):
            raise DataError(
                f"column '{KWARGS}' holds {kind_of(kwargs)}, but must be an object of the template's values"
            )
        given = {name: value for name, value in kwargs.items() if value is not None}
        for name in _NOT_FOR_ROWS:
            if name in given:
                raise DataError(f"column '{KWARGS}' has '{name}', which is not the row's to say. Remove it")
        self._require_read(given)
        key = json.dumps(given, sort_keys=True, default=repr)
        if key not in self.forms:
            if len(self.forms) >= MAX_CACHED_FORMS:
                self.forms.clear()
            self.forms[key] = self._form(given)
        return self.forms[key], tuple(f"{KWARGS}.{name}" for name in given if name not in self.text)

    def _require_read(self, given: Mapping[str, Any]) -> None:
        """Raise DataError for a text or a list among a row's variables of which the template knows nothing."""
        for name, value in given.items():
            says_something = isinstance(value, str | list | dict) and not is_empty(value)
            leaves_out = self.entry.unused_columns == "ignore" or name in self.entry.unused_names
            if says_something and name not in self.text and not leaves_out:
                raise DataError(
                    f"column '{KWARGS}' has '{name}' ({value!r:.60}), which the chat template does not know, so it "
                    f"would be left out. Take a template that does, or write `unused_columns: [{name}]` beside `path`"
                )


def _template_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of the tokenizer's chat template, or of all that it has."""
    given: Any = tokenizer.chat_template
    return "\n".join(given.values()) if isinstance(given, dict) else str(given)
