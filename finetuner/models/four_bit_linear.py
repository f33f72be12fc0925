"""A base in 4 bits (QLoRA, arXiv:2305.14314) or 8 bits (LLM.int8, arXiv:2208.07339) on bitsandbytes' kernels.

bitsandbytes' own 4-bit layer keeps what it needs to read the packed bytes on a subclass of Parameter, where FSDP loses
it: the loss is then silently wrong from the second step on. Ours keeps codes and scales as plain bytes in one ordinary
frozen parameter. Whatever shards, gathers, moves or saves parameters does so with them, and nothing knows of 4 bits.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetuner.errors import CheckpointError, ModelError
from finetuner.recipe.sections import QuantizationSection

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale; bitsandbytes' default
SCALE_BLOCK = 256  # scales that share a scale of their own, when they are quantised too
PIECE = 1 << 14  # weights that a CPU quantises at once; a multiple of BLOCK, and even
ALIGN = 16  # bytes at which each part of the packed parameter begins: its kernels read 16 at a time

RECORD = "quantization.json"  # beside the adapter: which modules it was trained on in which format


@dataclass(frozen=True)
class Format:
    """How one weight matrix is kept. `kind`: nf4, fp4 or int8. `dtype`: the number format that it was quantised from
    and that it computes in."""

    kind: str
    dtype: torch.dtype
    double: bool = False
    compute_dtype: torch.dtype = torch.float32
    storage: torch.dtype = torch.uint8

    def __str__(self) -> str:
        bits = "8-bit" if self.kind == "int8" else f"4-bit {self.kind}"
        return bits + (", double quantised" if self.double else "")


def choose_format(adapter: str | None, section: QuantizationSection, dtype: torch.dtype) -> Format | None:
    """The format of the base in a run whose weights are `dtype`; None: not quantised."""
    if section.load_in_8bit:
        return Format("int8", dtype, compute_dtype=dtype)
    if adapter != "qlora" and not section.load_in_4bit:
        return None
    four = section.bnb_config_kwargs
    return Format(
        kind=four.bnb_4bit_quant_type,
        dtype=dtype,
        double=four.bnb_4bit_use_double_quant,
        compute_dtype=getattr(torch, four.bnb_4bit_compute_dtype) if four.bnb_4bit_compute_dtype else dtype,
        storage=getattr(torch, four.bnb_4bit_quant_storage),
    )


def require_bitsandbytes() -> Any:
    """The library. Raises ModelError that names the command to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError("a 4-bit or 8-bit base needs bitsandbytes: pip install 'finetuner[quantize]'.") from error
    return bitsandbytes


def require_full_weights(base_model: str, config: Any) -> None:
    """Raises ModelError for a base that is quantised already: the adapter could not be merged into full weights."""
    if hasattr(config, "quantization_config"):
        raise ModelError(
            f"'{base_model}' is quantised already. Name the full weights: they are quantised as they load."
        )


def bitsandbytes_config(form: Format) -> Any:
    """`form` in transformers' words."""
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if form.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form.kind,
        bnb_4bit_use_double_quant=form.double,
        bnb_4bit_compute_dtype=form.compute_dtype,
    )


def loading_arguments(base_model: str, form: Format, device: torch.device, trust_remote_code: bool) -> dict[str, Any]:
    """For `from_pretrained`, which then quantises each tensor on `device` as it reads it: memory is the quantised model
    and a few tensors. Embeddings, the head and whatever is tied to them stay as they are."""
    from transformers import AutoConfig

    require_full_weights(base_model, AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code))
    return {"quantization_config": bitsandbytes_config(form), "device_map": {"": device}}


class FourBitLinear(nn.Linear):
    """y = x W^T + b with W in 4 bits.

    `weight` is one vector of bytes: the 4-bit codes, two to a byte; then the scale of each 64 weights, as fp32 or, when
    they are quantised too, as a byte with an fp32 scale for each 256 of them and their fp32 mean. As bytes, no engine's
    mixed precision can round them. PEFT sees an `nn.Linear` of the usual sizes.
    """

    def __init__(self, in_features: int, out_features: int, form: Format, bias: torch.Tensor | None) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.form = form
        packed = torch.empty(self.num_bytes // form.storage.itemsize, dtype=form.storage, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def quantize(cls, weight: torch.Tensor, form: Format, bias: torch.Tensor | None = None) -> "FourBitLinear":
        """`weight`: (out, in) in `form.dtype`, quantised on its own device."""
        if weight.device.type == "cpu":
            return cls.of(*_quantize_in_pieces(weight.contiguous(), form), form, bias)
        codes, state = require_bitsandbytes().functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=form.double, quant_type=form.kind
        )
        return cls.of(codes, state, form, bias)

    @classmethod
    def of(
        cls, codes: torch.Tensor, state: "QuantState", form: Format, bias: torch.Tensor | None = None
    ) -> "FourBitLinear":
        """From what bitsandbytes' quantize_4bit gives."""
        assert state.blocksize == BLOCK and state.nested == form.double and state.quant_type == form.kind
        out_features, in_features = state.shape
        layer = cls(in_features, out_features, form, bias)
        parts = {"codes": codes.reshape(-1), "scales": state.absmax}
        if form.double:
            parts |= {"scale_scales": state.state2.absmax, "mean": state.offset.reshape(1)}
            assert torch.equal(state.state2.code, _byte_levels(codes.device)), "bitsandbytes has changed its table"
        packed = torch.zeros(layer.num_bytes, dtype=torch.uint8, device=codes.device)
        for name, (start, end) in layer.layout.items():
            packed[start:end] = parts[name].contiguous().view(torch.uint8)
        layer.weight = nn.Parameter(packed.view(form.storage), requires_grad=False)
        return layer

    @property
    def layout(self) -> dict[str, tuple[int, int]]:
        """Part of the packed bytes -> (start, end)."""
        count = self.in_features * self.out_features
        blocks = -(-count // BLOCK)
        sizes = {"codes": -(-count // 2), "scales": blocks if self.form.double else 4 * blocks}
        if self.form.double:
            sizes |= {"scale_scales": 4 * -(-blocks // SCALE_BLOCK), "mean": 4}
        places, at = {}, 0
        for name, size in sizes.items():
            places[name] = (at, at + size)
            at += -(-size // ALIGN) * ALIGN
        return places

    @property
    def num_bytes(self) -> int:
        end = max(end for _, end in self.layout.values())
        return -(-end // ALIGN) * ALIGN

    def read(self) -> tuple[torch.Tensor, "QuantState"]:
        """Codes and scales as bitsandbytes' kernels take them: views, no copies."""
        from bitsandbytes.functional import QuantState

        if self.weight.dtype != self.form.storage or self.weight.numel() * self.weight.itemsize != self.num_bytes:
            raise ModelError(
                f"the packed bytes of a 4-bit layer were kept as {self.form.storage} and came back as "
                f"{self.weight.numel()} elements of {self.weight.dtype}: an engine cast or cut them.\n"
                "Write `bnb_4bit_quant_storage: uint8` in bnb_config_kwargs."
            )
        packed = self.weight.detach().view(torch.uint8)
        part = {name: packed[start:end] for name, (start, end) in self.layout.items()}
        shape = torch.Size((self.out_features, self.in_features))
        kind, device = self.form.kind, packed.device
        common = {"shape": shape, "blocksize": BLOCK, "quant_type": kind, "dtype": self.form.dtype}
        common["code"] = _levels(kind, device)
        if not self.form.double:
            return part["codes"].view(-1, 1), QuantState(absmax=part["scales"].view(torch.float32), **common)
        scale_scales = part["scale_scales"].view(torch.float32)
        of_scales = QuantState(
            absmax=scale_scales, code=_byte_levels(device), blocksize=SCALE_BLOCK, dtype=torch.float32
        )
        mean = part["mean"].view(torch.float32)[0]
        return part["codes"].view(-1, 1), QuantState(absmax=part["scales"], offset=mean, state2=of_scales, **common)

    def dequantized(self) -> torch.Tensor:
        """W as the products see it: (out, in) in the format that it was quantised from."""
        codes, state = self.read()
        return require_bitsandbytes().functional.dequantize_4bit(codes, state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x.to(self.form.compute_dtype), self).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form}"


class _Product(torch.autograd.Function):
    """x W^T + b, whose backward reads W's bytes from the layer again: between forward and backward an engine may have
    let go of them and gathered them elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        from bitsandbytes import matmul_4bit

        ctx.layer = layer
        codes, state = layer.read()
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return matmul_4bit(x, codes.t(), state, bias=bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.layer.dequantized().to(grads[0].dtype), None


def _quantize_in_pieces(weight: torch.Tensor, form: Format) -> "tuple[torch.Tensor, QuantState]":
    """As bitsandbytes' quantize_4bit, bit for bit. On a CPU it takes some 20 bytes for each weight in passing, and most
    of its time to get that memory from the system: pieces that stay in the processor's cache have neither. By one
    thread: several wait for each other after each small piece, ten times as long where other work has the cores."""
    functional = require_bitsandbytes().functional
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = [
            functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=form.kind)
            for piece in weight.reshape(-1).split(PIECE)
        ]
    finally:
        torch.set_num_threads(threads)
    codes, scales = torch.cat([codes for codes, _ in done]), torch.cat([state.absmax for _, state in done])
    of_scales: dict[str, Any] = {"absmax": scales}
    if form.double:
        mean = scales.mean()
        in_bytes, state = functional.quantize_blockwise(scales - mean, blocksize=SCALE_BLOCK)
        of_scales = {"absmax": in_bytes, "offset": mean, "state2": state}
    return codes, functional.QuantState(
        **of_scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=_levels(form.kind, weight.device),
        quant_type=form.kind,
    )


@cache
def _levels(kind: str, device: torch.device) -> torch.Tensor:
    """The 16 values that a weight can have, before its scale."""
    return require_bitsandbytes().functional.get_4bit_type(kind, device=device)


@cache
def _byte_levels(device: torch.device) -> torch.Tensor:
    """The 256 values that a quantised scale can have."""
    return require_bitsandbytes().functional.create_dynamic_map().to(device)


def adopt_layers(model: "PreTrainedModel", form: Format) -> None:
    """Put ours in the place of each 4-bit layer of bitsandbytes that loading_arguments made."""
    for name, layer in _their_layers(model).items():
        bias = None if layer.bias is None else layer.bias.data
        model.set_submodule(name, FourBitLinear.of(layer.weight.data, layer.weight.quant_state, form, bias))
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)  # what is left is an ordinary model of ordinary modules


def make_room_for_layers(model: "PreTrainedModel", form: Format, skip: tuple[str, ...] | None = None) -> list[str]:
    """Put an empty layer of ours in the place of each layer of a model on the meta device that `from_pretrained` would
    keep in 4 bits. Returns their names. `skip`: names or expressions of layers to leave; None: the head, and what is
    tied."""
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    stay = get_keys_to_not_convert(model) if skip is None else list(skip)
    replace_with_bnb_linear(model, modules_to_not_convert=stay, quantization_config=bitsandbytes_config(form))
    theirs = _their_layers(model)
    for name, layer in theirs.items():
        model.set_submodule(name, FourBitLinear(layer.in_features, layer.out_features, form, layer.bias))
    return list(theirs)


def _their_layers(model: "PreTrainedModel") -> dict[str, Any]:
    """bitsandbytes' 4-bit layers. Raises ModelError if there are none, or one that is not a linear layer."""
    bnb = require_bitsandbytes()
    theirs = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if not theirs:
        raise ModelError(f"{type(model).__name__} has no linear layer to keep in 4 bits. Write `adapter: lora`.")
    for name, layer in theirs.items():
        if layer.source_cls is not nn.Linear:
            raise ModelError(
                f"'{name}' is a {layer.source_cls.__name__}, not a linear layer: {type(model).__name__} cannot be kept "
                "in 4 bits. Write `adapter: lora`."
            )
    return theirs


@dataclass(frozen=True)
class Record:
    """Which modules of the base were quantised, and how; `dtype` names what they were quantised from."""

    kind: str
    double: bool
    dtype: str
    compute_dtype: str
    modules: tuple[str, ...]

    @property
    def format(self) -> Format:
        return Format(self.kind, getattr(torch, self.dtype), self.double, getattr(torch, self.compute_dtype))


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name in the base -> each layer in 4 or 8 bits, adapted or not."""
    kinds: tuple[type[nn.Module], ...] = (FourBitLinear,)
    if getattr(model, "is_loaded_in_8bit", False):
        kinds += (require_bitsandbytes().nn.Linear8bitLt,)
    # PEFT moves the layer that it adapts to the name `base_layer` below its own.
    found = ((name.removesuffix(".base_layer"), m) for name, m in model.named_modules() if isinstance(m, kinds))
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def record_of(model: "PreTrainedModel") -> Record | None:
    """None if nothing of the base is quantised."""
    layers = quantized_layers(model)
    if not layers:
        return None
    first = next(iter(layers.values()))
    form = first.form if isinstance(first, FourBitLinear) else Format("int8", model.dtype, compute_dtype=model.dtype)
    return Record(form.kind, form.double, _name(form.dtype), _name(form.compute_dtype), tuple(layers))


def write_record(record: Record, folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")


def read_record(folder: Path) -> Record | None:
    """What write_record wrote; None if the base was not quantised."""
    try:
        text = (folder / RECORD).read_text()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
        return Record(**values | {"modules": tuple(values["modules"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{folder / RECORD}' cannot be read ({error}). Fetch the adapter again.") from error


def seen_in_training(weight: torch.Tensor, record: Record) -> torch.Tensor:
    """`weight` (out, in), quantised and read back as the products of the training run saw it, in fp32.

    Bit for bit on the kind of device that the run quantised on; kernels of another kind may take the other one of two
    levels that are equally near.
    """
    form, weight = record.format, weight.to(record.format.dtype)
    if form.kind != "int8":
        return FourBitLinear.quantize(weight, form).dequantized().to(form.compute_dtype).float()
    functional = require_bitsandbytes().functional
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return functional.int8_vectorwise_dequant(codes, scales).to(form.compute_dtype).float()


def require_same_record(folder: Path, record: Record | None) -> None:
    """Raises CheckpointError unless the checkpoint's adapter was trained on a base that was kept in the same way."""
    saved = read_record(folder)
    if saved != record:
        raise CheckpointError(
            f"the base of the checkpoint {folder} was kept as {_shown(saved)}, and is {_shown(record)} now.\n"
            "Set load_in_4bit, load_in_8bit, bnb_config_kwargs and bf16 back, or start anew with another output_dir."
        )


def _shown(record: Record | None) -> str:
    if record is None:
        return "full weights"
    return f"{record.format} of {record.dtype} ({len(record.modules)} modules)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
