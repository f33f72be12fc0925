"""The optimizers, one row each: its arguments, the size of its state, the engines that can shard it, and its builder.

A further optimizer is a row of OPTIMIZERS, its name in OptimizerName, and, unless a builder in training/optimizer.py
fits it already, a builder.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "ao_adamw_fp8",
    "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "adafactor", "muon", "sgd", "rmsprop", "adagrad",
]  # fmt: skip

FLOAT_BYTES = 4  # trained weights, their gradients and every state that is not in 8 bits are fp32
BLOCK_SIZE = 256  # elements of an 8-bit state that share one fp32 scale
MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the state of smaller tensors in fp32


@dataclass(frozen=True)
class TrainedTensor:
    """Shape of one trained tensor. `is_table`: it has a row for each token or position, as an embedding or the head."""

    shape: tuple[int, ...]
    is_table: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


Arguments = Mapping[str, Any]  # optim_args, as read_arguments gives them
StateBytes = Callable[[TrainedTensor, Arguments], int]


@dataclass(frozen=True)
class OptimizerRow:
    """All that this package knows of one optimizer.

    builder: its function in training/optimizer.py; class_name: the library's class, where one builder makes several.
    state_bytes: bytes of state after the first step, of one tensor and with these arguments. Step counters (4 bytes a
    tensor) and bitsandbytes' code books (1 KB a moment, shared by all tensors) are not counted.
    state_kind: optimizers of one kind keep the same state, so that a run can go on with the other; default: its name.
    arguments: what optim_args may name -> its type. uses_betas: adam_beta1 and adam_beta2 mean something.
    not_sharded: engine ("fsdp", "deepspeed") -> why it cannot shard this optimizer's state.
    instead: engine -> the nearest optimizer whose state it can shard; default: adamw_torch.
    is_paged: on a GPU the state is in unified memory, which the driver moves to the node's RAM where the GPU is short.
    """

    builder: str
    state_bytes: StateBytes
    class_name: str = ""
    state_kind: str = ""
    arguments: Mapping[str, type] = field(default_factory=dict)
    not_sharded: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    uses_betas: bool = True
    uses_epsilon: bool = True
    is_paged: bool = False


def _floats(count: int) -> StateBytes:
    """`count` fp32 numbers for each element."""
    return lambda tensor, arguments: FLOAT_BYTES * count * tensor.num_elements


def _blocks(moments: int) -> StateBytes:
    """A byte an element and moment, and an fp32 scale a block; fp32 for tensors below min_8bit_size."""

    def state_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
        if tensor.num_elements < arguments.get("min_8bit_size", MIN_8BIT_SIZE):
            return FLOAT_BYTES * moments * tensor.num_elements
        return moments * (tensor.num_elements + FLOAT_BYTES * -(-tensor.num_elements // BLOCK_SIZE))

    return state_bytes


def _adamw_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
    """Mean and variance; with amsgrad the largest variance too."""
    return FLOAT_BYTES * (2 + bool(arguments.get("amsgrad"))) * tensor.num_elements


def _sgd_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
    return FLOAT_BYTES * bool(arguments.get("momentum")) * tensor.num_elements


def _rmsprop_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
    """Mean square; with momentum a momentum, with centered the mean too."""
    count = 1 + bool(arguments.get("momentum")) + bool(arguments.get("centered"))
    return FLOAT_BYTES * count * tensor.num_elements


def _adafactor_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
    """Mean squares of rows and of columns, of a vector of each element; with beta1 the mean of each element too."""
    *rows, columns = tensor.shape
    squares = math.prod(rows) + math.prod(rows[:-1]) * columns if rows else columns
    return FLOAT_BYTES * (squares + (arguments.get("beta1") is not None) * tensor.num_elements)


def is_hidden_matrix(shape: tuple[int, ...], *, is_table: bool) -> bool:
    """Whether muon updates a tensor of this shape by Muon; the rest is updated by AdamW."""
    return len(shape) == 2 and not is_table


def _muon_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
    """Muon's momentum for a hidden matrix, AdamW's mean and variance for the rest."""
    count = 1 if is_hidden_matrix(tensor.shape, is_table=tensor.is_table) else 2
    return FLOAT_BYTES * count * tensor.num_elements


def _torchao_bytes(bits: int) -> StateBytes:
    """`bits` an element and moment, and an fp32 scale a block; fp32 for tensors that are small or no whole blocks.

    Under FSDP2 the tensor is a rank's shard, so that a few more may stay fp32.
    """

    def state_bytes(tensor: TrainedTensor, arguments: Arguments) -> int:
        count, block = tensor.num_elements, arguments.get("block_size", BLOCK_SIZE)
        if count < MIN_8BIT_SIZE or count % block:
            return FLOAT_BYTES * 2 * count
        return 2 * (count * bits // 8 + FLOAT_BYTES * count // block)

    return state_bytes


# bitsandbytes' kernels know no DTensor, which is what FSDP2 makes of a parameter.
_KERNELS = {"fsdp": "its kernels cannot work on FSDP's shards"}
_BLOCK_STATE = {"fsdp": "it keeps a state that FSDP cannot shard"}
_BLOCK_ARGUMENTS = {"min_8bit_size": int}


def _torch_adamw() -> OptimizerRow:
    return OptimizerRow("adamw", _adamw_bytes, state_kind="adamw_torch", arguments={"amsgrad": bool})


def _bitsandbytes(class_name: str, state_kind: str = "", *, is_paged: bool = False) -> OptimizerRow:
    """A row for AdamW or Lion, in 8 or 32 bits, of bitsandbytes."""
    moments = 2 if class_name.startswith("AdamW") else 1
    in_blocks = class_name.endswith("8bit")
    return OptimizerRow(
        "bitsandbytes",
        _blocks(moments) if in_blocks else _floats(moments),
        class_name=class_name,
        state_kind=state_kind,
        arguments=_BLOCK_ARGUMENTS if in_blocks else {},
        not_sharded=_BLOCK_STATE if in_blocks else _KERNELS,
        instead={"fsdp": "adamw_torch_8bit"} if class_name == "AdamW8bit" else {},
        uses_epsilon=moments == 2,
        is_paged=is_paged,
    )


def _torchao(class_name: str, bits: int) -> OptimizerRow:
    return OptimizerRow(
        "torchao",
        _torchao_bytes(bits),
        class_name=class_name,
        arguments={"block_size": int, "bf16_stochastic_round": bool},
        not_sharded={"deepspeed": "its blocks would lie across parameters, in tensors that DeepSpeed cannot store"},
        instead={"deepspeed": "adamw_bnb_8bit"},
    )


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_torch": _torch_adamw(),
    "adamw_torch_fused": _torch_adamw(),
    "adamw_torch_8bit": _torchao("AdamW8bit", 8),
    "adamw_torch_4bit": _torchao("AdamW4bit", 4),
    "ao_adamw_fp8": _torchao("AdamWFp8", 8),
    "adamw_bnb_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _bitsandbytes("AdamW8bit", "adamw_bnb_8bit", is_paged=True),
    "paged_adamw_32bit": _bitsandbytes("AdamW32bit", "adamw_32bit", is_paged=True),
    "lion_32bit": _bitsandbytes("Lion32bit"),
    "lion_8bit": _bitsandbytes("Lion8bit"),
    "paged_lion_32bit": _bitsandbytes("Lion32bit", "lion_32bit", is_paged=True),
    "paged_lion_8bit": _bitsandbytes("Lion8bit", "lion_8bit", is_paged=True),
    "adafactor": OptimizerRow(
        "adafactor",
        _adafactor_bytes,
        arguments={
            "beta1": float, "clip_threshold": float, "decay_rate": float, "eps": list, "scale_parameter": bool,
        },
        not_sharded=dict.fromkeys(("fsdp", "deepspeed"), "it keeps a mean for each row and column of a whole matrix"),
        uses_betas=False,
        uses_epsilon=False,
    ),
    "muon": OptimizerRow(
        "muon",
        _muon_bytes,
        arguments={"momentum": float, "nesterov": bool, "ns_steps": int, "adjust_lr_fn": str},
        not_sharded=dict.fromkeys(("fsdp", "deepspeed"), "it needs whole matrices"),
    ),
    "sgd": OptimizerRow(
        "sgd",
        _sgd_bytes,
        arguments={"momentum": float, "dampening": float, "nesterov": bool},
        uses_betas=False,
        uses_epsilon=False,
    ),
    "rmsprop": OptimizerRow(
        "rmsprop",
        _rmsprop_bytes,
        arguments={"alpha": float, "momentum": float, "centered": bool},
        uses_betas=False,
    ),
    "adagrad": OptimizerRow(
        "adagrad",
        _floats(1),
        arguments={"lr_decay": float, "initial_accumulator_value": float},
        not_sharded={"deepspeed": "DeepSpeed builds another in its place"},
        uses_betas=False,
    ),
}  # fmt: skip
assert tuple(OPTIMIZERS) == get_args(OptimizerName)
OPTIMIZERS_IN_WORDS = (  # in the reference and in `finetuner explain optimizer`
    "adamw_: AdamW (arXiv:1711.05101), by PyTorch's fused kernel where there is one. lion_: Lion (arXiv:2302.06675). "
    "8bit: with a state in 8 bits (arXiv:2110.02861); paged_: moved to the CPU's memory when a GPU's is short. "
    "adamw_torch_8bit, adamw_torch_4bit and ao_adamw_fp8 are torchao's, which FSDP can shard; a variance may round "
    "to 0 in them, which moves a rare token's embedding far: they are for adapters. "
    "adafactor: arXiv:1804.04235, as transformers has it. muon: Muon for hidden matrices, AdamW for the rest."
)

_OLDER_NAMES = {"adamw_8bit": "adamw_bnb_8bit"}  # in checkpoints of earlier versions


def state_kind(name: str) -> str:
    """The kind of state that the optimizer of a recipe or of a stored checkpoint keeps."""
    name = _OLDER_NAMES.get(name, name)
    return (OPTIMIZERS[name].state_kind or name) if name in OPTIMIZERS else name


def read_arguments(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """optim_args as a block, or as one text: "momentum=0.9,nesterov=true". Raises ValueError for another text."""
    if not isinstance(given, str):
        return dict(given)
    arguments: dict[str, Any] = {}
    for piece in filter(None, (piece.strip() for piece in given.split(","))):
        key, equals, text = (word.strip() for word in piece.partition("="))
        if not (key and equals and text):
            raise ValueError(piece)
        arguments[key] = _value(text)
    return arguments


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# What a type is called in an error.
WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list of numbers", str: "text"}


def fits(value: Any, kind: type) -> bool:
    """Whether a value of the recipe is of a type; a whole number is a number too, and true is none."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, list | tuple) and all(fits(v, float) for v in value)
    return isinstance(value, kind)
