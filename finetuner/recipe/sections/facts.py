"""Facts of a recipe key, which stand at its field, so that no other room lists names of keys.

A key is written `name: Annotated[TYPE, KeyFacts(resume="free")] = Field(DEFAULT, description="...")`, or with FREE,
NOTED or MUST_MATCH where there is nothing more to say. The keys inside a
block have no facts of their own: the key of the block speaks for them.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic.fields import FieldInfo

OnResume = Literal["must_match", "free", "noted"]
SAME = "the same"
ONLY_HERE = "only here"


@dataclass(frozen=True)
class KeyFacts:
    """Facts of one key.

    resume: what a run does that goes on from a checkpoint whose recipe has another value. must_match: it is refused,
    since the weights would not fit or the order of the rows would be another; noted: the change is said; free: the
    value has no part in what is trained.
    prepared_rows: whether documents that are prepared and cached depend on it (asked of the section `data` alone).
    needs: the adapter without which the key has no effect (qlora is a lora too). Without it the key is not dumped,
    and is refused or noted where it is given.
    axolotl: its meaning there, where it is not "the same".
    aliases: other names that are read as this key. known_as: words of other tools that are refused with this name.
    """

    resume: OnResume
    prepared_rows: bool = True
    needs: Literal["lora", "qlora"] | None = None
    axolotl: str = SAME
    aliases: tuple[str, ...] = ()
    known_as: tuple[str, ...] = ()

    def has_effect(self, adapter: str | None) -> bool:
        """Whether the key means something in a recipe with this `adapter`."""
        return self.needs is None or adapter == self.needs or (self.needs == "lora" and adapter is not None)


MUST_MATCH = KeyFacts(resume="must_match")
FREE = KeyFacts(resume="free")
NOTED = KeyFacts(resume="noted")


def facts_of(key: str, info: FieldInfo) -> KeyFacts:
    """Return the facts at a field. Raises TypeError if there are none: a key may not be silent about them."""
    for metadata in info.metadata:
        if isinstance(metadata, KeyFacts):
            return metadata
    raise TypeError(f"the key '{key}' does not say its KeyFacts")
