"""The whole recipe, and the one table of its keys."""

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
    RegularisationSection,
    ScheduleSection,
    Section,
    ShardingSection,
    TokenizerSection,
    TrackingSection,
)


class Recipe(Section):
    """What the user said. Frozen; what it means on a machine is the Plan's business."""

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
    regularisation: RegularisationSection
    precision: PrecisionSection
    compilation: CompileSection
    sharding: ShardingSection
    evaluation: EvaluationSection
    guards: GuardSection
    output: OutputSection
    tracking: TrackingSection


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "tokenizer": TokenizerSection,
    "data": DataSection,
    "packing": PackingSection,
    "adapter": AdapterSection,
    "quantization": QuantizationSection,
    "batch": BatchSection,
    "schedule": ScheduleSection,
    "optimizer": OptimizerSection,
    "rates": RatesSection,
    "regularisation": RegularisationSection,
    "precision": PrecisionSection,
    "compilation": CompileSection,
    "sharding": ShardingSection,
    "evaluation": EvaluationSection,
    "guards": GuardSection,
    "output": OutputSection,
    "tracking": TrackingSection,
}

# key -> (section, field); a key that stood in two sections would be a mistake of ours
KEYS: dict[str, tuple[str, FieldInfo]] = {
    key: (name, info) for name, section in SECTIONS.items() for key, info in section.model_fields.items()
}
assert len(KEYS) == sum(len(section.model_fields) for section in SECTIONS.values()), "a key stands in two sections"

# What people write for capabilities that are not built yet: named, so that nobody wonders about the spelling.
NOT_YET = {
    "rl": "preference and reinforcement learning",
}
