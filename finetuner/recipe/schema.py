"""The recipe as sections, and the tables of its keys and of their facts."""

from collections.abc import Callable

from pydantic.fields import FieldInfo

from finetuner.recipe.sections import (
    AdapterSection,
    BatchSection,
    CompileSection,
    DataSection,
    EvaluationSection,
    GuardSection,
    ModelSection,
    OptimizerSection,
    OutputSection,
    PackingSection,
    PrecisionSection,
    QuantizationSection,
    RatesSection,
    RegularizationSection,
    ScheduleSection,
    Section,
    ShardingSection,
    TokenizerSection,
    TrackingSection,
)
from finetuner.recipe.sections.facts import KeyFacts, facts_of


class Recipe(Section):
    """The user's recipe, frozen. Its meaning for a number of ranks is the Plan (plan/run.py)."""

    model: ModelSection
    tokenizer: TokenizerSection
    data: DataSection
    packing: PackingSection
    adapter: AdapterSection
    quantization: QuantizationSection
    batch: BatchSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    rates: RatesSection
    regularization: RegularizationSection
    precision: PrecisionSection
    compilation: CompileSection
    sharding: ShardingSection
    evaluation: EvaluationSection
    guards: GuardSection
    output: OutputSection
    tracking: TrackingSection


SECTIONS: dict[str, type[Section]] = {}
for _name, _info in Recipe.model_fields.items():
    assert isinstance(_info.annotation, type) and issubclass(_info.annotation, Section)
    SECTIONS[_name] = _info.annotation

# key -> (section, field); a key that stood in two sections would be a mistake of ours
KEYS: dict[str, tuple[str, FieldInfo]] = {
    key: (name, info) for name, section in SECTIONS.items() for key, info in section.model_fields.items()
}
assert len(KEYS) == sum(len(section.model_fields) for section in SECTIONS.values()), "a key stands in two sections"

FACTS: dict[str, KeyFacts] = {key: facts_of(key, info) for key, (_, info) in KEYS.items()}


def keys_where(holds: Callable[[KeyFacts], bool]) -> tuple[str, ...]:
    """The keys whose facts satisfy `holds`, in the recipe's order."""
    return tuple(key for key, facts in FACTS.items() if holds(facts))


# What people write for capabilities that are not built yet: named, so that nobody wonders about the spelling.
NOT_YET = {
    "rl": "preference and reinforcement learning",
}
