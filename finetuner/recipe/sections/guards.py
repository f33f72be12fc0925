"""Conditions under which a run stops by itself, and the choice of its result."""

from typing import Annotated

from pydantic import Field

from finetuner.recipe.sections.base import Count, NonNegative, Positive, Section, Steps
from finetuner.recipe.sections.facts import FREE, ONLY_HERE, KeyFacts


class GuardSection(Section):
    """Conditions that end a run early. A run that goes wrong ends with an error, and overwrites nothing."""

    max_skipped_steps: Annotated[Steps | None, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        None,
        description="Steps in a row that may be skipped because loss or gradient is not finite; default: 2, or 19 in "
        "fp16, whose scaler begins too high.",
    )
    loss_watchdog_threshold: Annotated[Positive | None, FREE] = Field(
        None, description="A training loss above this is wrong; the run stops after loss_watchdog_patience such steps."
    )
    loss_watchdog_patience: Annotated[Steps | None, FREE] = Field(
        None, description="Steps in a row above loss_watchdog_threshold that stop the run; default: 3."
    )
    early_stopping_patience: Annotated[Count | None, FREE] = Field(
        None, description="Evaluations in a row without a lower held-out loss after which training ends."
    )
    early_stopping_threshold: Annotated[NonNegative, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        0.0, description="How much lower the held-out loss has to be to count as lower."
    )
    load_best_model_at_end: Annotated[bool, FREE] = Field(
        False,
        description="The result is the weights with the lowest held-out loss, not the last; their checkpoint "
        "is never pruned.",
    )
