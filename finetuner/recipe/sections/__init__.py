"""The recipe's sections. In YAML all keys are flat; each belongs to exactly one section here.

Names and meanings are Axolotl's where it has the key. Every section is frozen and refuses unknown keys; types are
strict (the text "4" is not the number 4).
"""

from finetuner.recipe.sections.adapter import AdapterSection
from finetuner.recipe.sections.base import Section
from finetuner.recipe.sections.data import DataSection, PackingSection
from finetuner.recipe.sections.datasets import DatasetEntry, InstructionColumns, InstructionFormat, MessageProperties
from finetuner.recipe.sections.guards import GuardSection
from finetuner.recipe.sections.model import GPTSection, ModelSection, NewTokenizer, SpecialTokens, TokenizerSection
from finetuner.recipe.sections.quantization import FourBitSection, QuantizationSection
from finetuner.recipe.sections.running import EvaluationSection, OutputSection
from finetuner.recipe.sections.sharding import FsdpConfig, ShardingSection
from finetuner.recipe.sections.tracking import TrackingSection
from finetuner.recipe.sections.training import (
    BatchSection,
    CompileSection,
    OptimizerSection,
    PrecisionSection,
    RateGroup,
    RatesSection,
    RegularizationSection,
    ScheduleSection,
)

__all__ = [
    "AdapterSection", "BatchSection", "CompileSection", "DataSection", "DatasetEntry", "EvaluationSection",
    "FourBitSection",
    "FsdpConfig", "GPTSection", "GuardSection", "InstructionColumns", "InstructionFormat", "MessageProperties",
    "ModelSection", "NewTokenizer", "OptimizerSection", "OutputSection",
    "PackingSection", "PrecisionSection", "QuantizationSection",
    "RateGroup", "RatesSection", "RegularizationSection",
    "ScheduleSection", "Section", "ShardingSection", "SpecialTokens", "TokenizerSection", "TrackingSection",
]  # fmt: skip
