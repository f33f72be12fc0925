"""torch's number formats by the plan's names of them."""

from typing import TYPE_CHECKING

import torch

from finetuner.plan.precision import Precision

if TYPE_CHECKING:
    pass


DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
