"""Rewrites the entries of `datasets` and `test_datasets` from Axolotl's keys and row types into ours."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from finetuner.recipe.foreign.axolotl import DATASET, UNSUPPORTED_ROW_TYPES
from finetuner.recipe.foreign.prompt_styles import STYLES, refusal_of, style_of
from finetuner.recipe.problems import KeyPath, Note, Problem, near_words
from finetuner.recipe.sections.datasets import CHAT_TEMPLATES, ROW_TYPES

if TYPE_CHECKING:
    from finetuner.recipe.foreign.translate import Translation

Entry = dict[Any, Any]

SAME_TEMPLATES = {"gemma4_unified": "gemma4"}  # Axolotl's file of the one is that of the other, byte for byte
SOURCES = ("datasets", "test_datasets")
# The names that messages give to thoughts, all of which are read as such.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

# ShareGPT's row types, which Axolotl had until 2024 (prompt_strategies.sharegpt of 0.4): name -> the column of the
# messages, the keys of role and text, and roles by names that are not known here anyway.
_SHAREGPT: dict[str, tuple[str, str, str, Mapping[str, list[str]]]] = {
    "sharegpt": ("conversations", "from", "value", {}),
    "sharegpt_simple": ("conversations", "from", "value", {}),
    "sharegpt.load_multirole": ("conversations", "from", "value", {}),
    "sharegpt.load_role": ("conversations", "role", "value", {}),
    "sharegpt_simple.load_role": ("conversations", "role", "value", {}),
    "sharegpt.load_guanaco": ("conversations", "role", "text", {"user": ["prompter"]}),
    "sharegpt_simple.load_guanaco": ("conversations", "role", "text", {"user": ["prompter"]}),
    "sharegpt.load_ultrachat": ("messages", "role", "content", {}),
}
_ROLES_OF_SHAREGPT = {"input": "user", "output": "assistant", "system": "system"}


def translate_entries(translation: "Translation") -> None:
    """Rewrite each entry in place; what is changed joins the notes, and what cannot be read the problems."""
    for name in SOURCES:
        entries = translation.document.values.get(name)
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict):
                _Entry(translation, (name, i), entry).translate()


class _Entry:
    """The rewriting of one entry, which stands at `where`."""

    def __init__(self, translation: "Translation", where: KeyPath, entry: Entry) -> None:
        self.translation, self.where, self.entry = translation, where, entry

    def translate(self) -> None:
        self.row_type()
        for key in [key for key in self.entry if key in DATASET]:
            self.translation.key(self.where, key, DATASET[key])
        self.older_message_keys()
        self.thoughts()
        template = self.entry.get("chat_template")
        if isinstance(template, str) and template in SAME_TEMPLATES:
            self.entry["chat_template"] = SAME_TEMPLATES[template]
            self.note("chat_template", f"'{template}' is read as '{SAME_TEMPLATES[template]}'")

    def note(self, key: str, message: str, *, quiet: bool = False) -> None:
        origin = self.translation.document.origin((*self.where, key), of_key=True)
        self.translation.notes.append(Note((key,), message, origin, quiet=quiet))

    def move(self, path: KeyPath, target: KeyPath, *, silently: bool = False) -> None:
        notes = list(self.translation.notes)
        self.translation.move((*self.where, *path), (*self.where, *target))
        if silently:
            self.translation.notes[:] = notes

    def refuse(self, key: str, message: str) -> None:
        origin = self.translation.document.origin((*self.where, key))
        self.translation.document.problems.append(Problem(message, origin))

    def row_type(self) -> None:
        """Put a type of ours, or a block, in the place of one of Axolotl's."""
        kind = self.entry.get("type")
        if not isinstance(kind, str):
            self.conversation(kind)
            return
        if kind.startswith("sharegpt"):
            self.sharegpt(kind)
            return
        conversation = self.entry.get("conversation")
        style = kind if kind in ROW_TYPES else style_of(kind, conversation if isinstance(conversation, str) else None)
        if kind.removesuffix(".load") == "alpaca_chat":
            self.entry.pop("conversation", None)  # it names the style
        self.conversation(kind)
        if style is None:
            self.refuse_type(kind)
        elif isinstance(style, str):
            self.entry["type"] = style
            if style != kind:
                self.note("type", f"'{kind}' is read as '{style}'")
        else:
            self.entry["type"] = dict(style)
            self.note("type", f"'{kind}' is read as a block of its columns and its prompt")

    def refuse_type(self, kind: str) -> None:
        """Refuse a row type that stands for a capability; leave another one to validation."""
        capability = _unsupported_rows(kind)
        if capability is not None:
            place = ".".join(map(str, self.where))
            self.refuse("type", f"{place}.type: '{kind}' is not supported yet: {capability}.")
            self.entry["type"] = "alpaca"  # so that it is said once

    def sharegpt(self, kind: str) -> None:
        """Rewrite ShareGPT's rows, messages as {"from": ..., "value": ...} in the column `conversations`."""
        name = kind.partition(":")[0].removesuffix(".load")
        if name not in _SHAREGPT:
            known = ", ".join(_SHAREGPT)
            where = ".".join(map(str, self.where))
            message = f"{where}.type: '{kind}' is not supported yet: rows of this shape. Read here: {known}."
            self.refuse("type", message)
            self.entry["type"] = "alpaca"
            return
        column, role, content, roles = _SHAREGPT[name]
        entry = self.entry
        entry["type"] = "chat_template"
        if entry.get("field_messages") is None:
            entry["field_messages"] = column
        if entry.get("message_property_mappings") is None:
            entry["message_property_mappings"] = {"role": role, "content": content}
        if roles and entry.get("roles") is None:
            entry["roles"] = dict(roles)
        self.names_of_speakers()
        meant = f"chat_template of the column `{entry['field_messages']}`, with the keys `{role}` and `{content}`"
        words = "" if entry.get("conversation") else _NO_CONVERSATION
        self.note("type", f"'{kind}' is read as {meant}{words}")
        self.conversation(kind)

    def names_of_speakers(self) -> None:
        """`roles: {input: [ask]}` and `field_human: ask` -> roles: {user: [ask]}."""
        given = self.entry.get("roles")
        roles: dict[Any, Any] = {}
        for key, names in given.items() if isinstance(given, dict) else ():
            role = _ROLES_OF_SHAREGPT.get(key, key)
            both = isinstance(names, list) and isinstance(roles.get(role), list)
            roles[role] = [*roles[role], *names] if both else names
        for key, role in (("field_human", "user"), ("field_model", "assistant")):
            name = self.entry.get(key)
            if isinstance(name, str) and isinstance(roles.get(role, []), list):
                roles[role] = [*roles.get(role, []), name]
                self.note(key, f"is read as roles.{role}: [{name}]")
                del self.entry[key]
        if roles:
            self.entry["roles"] = roles

    def conversation(self, kind: Any) -> None:
        """Read FastChat's name of a conversation's words, where it is a chat template of ours."""
        given = self.entry.get("conversation")
        if given is None:
            self.entry.pop("conversation", None)
            return
        is_chat = isinstance(kind, str) and (kind.startswith("sharegpt") or kind == "chat_template")
        template = self.entry.get("chat_template")
        known = _CONVERSATIONS.get(given) if isinstance(given, str) else None
        if known is not None and is_chat and template in (None, known.template):
            self.note("conversation", f"is read as `chat_template: {known.template}`{known.without_system}")
            self.move(("conversation",), ("chat_template",), silently=True)
            self.entry["chat_template"] = known.template
            return
        del self.entry["conversation"]
        instead = f"Write chat_template: {', '.join(CHAT_TEMPLATES)}" if is_chat else "Remove it: it belongs to chats"
        message = f"'conversation' is not supported yet: FastChat's conversation '{given}'. {instead}."
        self.refuse("conversation", message)

    def older_message_keys(self) -> None:
        """Move message_field_role and _content, and thoughts by other names, into message_property_mappings."""
        for name in ("role", "content"):
            key, block = f"message_field_{name}", self.entry.get("message_property_mappings")
            if key in self.entry and (block is None or isinstance(block, dict)):
                self.entry["message_property_mappings"] = {} if block is None else block
                self.move((key,), ("message_property_mappings", name))
        block = self.entry.get("message_property_mappings")
        for key in [key for key in THOUGHT_KEYS[1:] if key in block] if isinstance(block, dict) else ():
            self.move(("message_property_mappings", key), ("message_property_mappings", THOUGHT_KEYS[0]))

    def thoughts(self) -> None:
        """Read field_thinking, the messages' key of a thought, and template_thinking_key, the template's."""
        if self.entry.get("field_thinking") in THOUGHT_KEYS:
            del self.entry["field_thinking"]
            self.note("field_thinking", "without effect: thoughts are read under this name anyway", quiet=True)
        block = self.entry.get("message_property_mappings")
        if "field_thinking" in self.entry and (block is None or isinstance(block, dict)):
            self.entry["message_property_mappings"] = {} if block is None else block
            self.move(("field_thinking",), ("message_property_mappings", THOUGHT_KEYS[0]))
        given = self.entry.pop("template_thinking_key", None)
        if given in THOUGHT_KEYS:
            message = "without effect: the template is given thoughts under the name that it reads"
            self.note("template_thinking_key", message, quiet=True)
        elif given is not None:
            message = (
                f"'template_thinking_key' is not supported yet: the name '{given}' of thoughts in a template. "
                f"Call them {THOUGHT_KEYS[0]} in the template (chat_template_jinja)."
            )
            self.refuse("template_thinking_key", message)


_NO_CONVERSATION = (
    "; the words around them are the chat template's (versions of 2023 took Vicuna's where no `conversation` was given)"
)


class _Conversation(NamedTuple):
    """A chat template of ours, and how FastChat's words differ where a conversation has no system text."""

    template: str
    without_system: str = ""


_HELPFUL = (
    ", without a system text for conversations that have none: versions of 2023 and 2024 wrote 'You are a helpful "
    "assistant.' there"
)
# Names of 2023 and 2024: FastChat 0.2.36, its module conversation, and Axolotl 0.4, prompt_strategies.sharegpt.
_CONVERSATIONS = {
    "chatml": _Conversation("chatml", _HELPFUL),
    "llama-3": _Conversation("llama3"),
    "llama3": _Conversation("llama3", _HELPFUL),
}


def _unsupported_rows(kind: str) -> str | None:
    """The capability that a row type of Axolotl's stands for, and what to write, if it is not one of ours."""
    for start, capability in UNSUPPORTED_ROW_TYPES.items():
        if kind.startswith(start):
            return capability
    refusal = refusal_of(kind)
    if refusal is not None:
        return ". ".join(refusal)
    if kind.startswith(("alpaca:", "alpaca_", "alpaca.")):
        listed = ", ".join(style for style in STYLES if style.startswith("alpaca"))
        return f"a style of Alpaca rows. Read here: {listed}"
    if near_words(kind, [*ROW_TYPES, *STYLES, *_SHAREGPT]):  # a slip: validation says what it was meant to be
        return None
    return "rows made by a Python module of your own. Make the rows beforehand"
