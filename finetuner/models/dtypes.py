"""torch's dtypes by the plan's names of precisions."""

import torch

from finetuner.plan.precision import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
