"""Who speaks in a message: the names that data sets give to roles, and the template's names for them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuner.data.inert_names import in_yaml_list
from finetuner.errors import DataError

USUAL_ROLES = ("system", "user", "assistant", "tool")
# What data sets call a role, in lower case -> the usual name.
ALIASES: dict[str, str] = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "function_result": "tool", "function_output": "tool", "tool_response": "tool", "tool_result": "tool",
    "tool_output": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # turns of ShareGPT data whose text is the JSON of a call
# Templates that know these take them as they are, since they write them otherwise than system or tool.
_OWN_FORM = ("developer", "function", "observation", "ipython")
_QUOTED = re.compile(r"""['"]([A-Za-z_]+)['"]""")


def words_in_quotes(template: str) -> frozenset[str]:
    """Return the words that a template quotes; the roles that it treats by name are among them."""
    return frozenset(_QUOTED.findall(template))


@dataclass(frozen=True)
class RoleNames:
    """The roles of one data set's messages. given: names that the recipe maps, with their role; wanted: roles that the
    recipe names, so that they need not be usual ones; template_words: see `words_in_quotes`."""

    given: Mapping[str, str]
    wanted: frozenset[str]
    template_words: frozenset[str]
    known: dict[str, str] = field(default_factory=dict)  # names that were resolved -> role

    @classmethod
    def of(
        cls, roles: Mapping[str, Iterable[str]], trained: Iterable[str], template_words: frozenset[str]
    ) -> "RoleNames":
        """Return the names for the recipe's `roles` and `roles_to_train`."""
        given = {name: role for role, names in roles.items() for name in names}
        names = cls(given, frozenset([*roles, *trained]), template_words)
        for name in (*USUAL_ROLES, *ALIASES, *given):
            names.find(name)
        return names

    def find(self, name: str) -> str | None:
        """Return the template's role for a row's name, in any case of letters; None if nothing says what it is."""
        if name not in self.known:
            role = self._resolve(name)
            if role is None:
                return None
            self.known[name] = role
        return self.known[name]

    def _resolve(self, name: str) -> str | None:
        lower = name.strip().lower()
        by_lower = {given.lower(): role for given, role in self.given.items()}
        mapped = self.given.get(name, by_lower.get(lower))
        if mapped is not None:
            return mapped
        if name in self.wanted and name not in ALIASES:
            return name
        if lower in _OWN_FORM and lower in self.template_words:
            is_own = lower == "developer" or ALIASES[lower] not in self.template_words
            return lower if is_own else ALIASES[lower]
        if lower in ALIASES:
            return ALIASES[lower]
        if lower in USUAL_ROLES:
            return lower
        if lower in CALL_ROLES:
            return None
        return next((word for word in (name, lower) if word in self.template_words), None)


def unknown_role(turn: int, name: str, seen: Iterable[Any]) -> DataError:
    """Return the error for a message whose role has a name that nothing explains. `seen`: the roles of its row."""
    listed = ", ".join(dict.fromkeys(str(one) for one in seen))
    return DataError(
        f"message {turn} has the role '{name}', which neither finetuner nor the chat template knows. The row's roles "
        f"are: {listed}. Say what it is: `roles: {{user: {in_yaml_list([name])}}}`, or system or tool for other texts "
        "that the model reads, or assistant if the model is to write them"
    )
