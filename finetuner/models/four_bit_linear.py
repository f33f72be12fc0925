"""A linear layer with its weight in 4 bits (QLoRA, arXiv:2305.14314), on bitsandbytes' kernels.

bitsandbytes' own 4-bit layer stores what it needs to unpack the bytes on a subclass of Parameter, where FSDP loses it:
the loss is then silently wrong from the second step on. Ours stores codes and scales as plain bytes in one ordinary
frozen parameter. Whatever shards, gathers, moves or saves parameters does so with them, and needs to know nothing of
4 bits.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetuner.errors import ModelError
from finetuner.models.quant_format import QuantFormat, require_bitsandbytes

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK_SIZE = 64  # weights that share a scale; bitsandbytes' default
SCALE_BLOCK_SIZE = 256  # scales that share a scale of their own, when they are quantized too
PIECE = 1 << 14  # weights that a CPU quantizes at once; a multiple of BLOCK_SIZE, and even
ALIGN = 16  # bytes at which each section of the packed parameter begins: its kernels read 16 at a time


class FourBitLinear(nn.Linear):
    """y = x W^T + b with W, (out, in), in 4 bits.

    `weight` is one vector of bytes: the 4-bit codes, two to a byte; then the scale of each 64 weights, as fp32 or, when
    they are quantized too, as a byte with an fp32 scale for each 256 of them and their fp32 mean. As bytes, no engine's
    mixed precision can round them. PEFT sees an `nn.Linear` of the usual sizes.
    """

    def __init__(
        self, in_features: int, out_features: int, quant_format: QuantFormat, bias: torch.Tensor | None
    ) -> None:
        """Build the layer on the meta device, without values. `bias`: (out,) or None."""
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.quant_format = quant_format
        packed = torch.empty(self.num_bytes // quant_format.storage.itemsize, dtype=quant_format.storage, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, quant_format: QuantFormat, bias: torch.Tensor | None = None
    ) -> "FourBitLinear":
        """Return a layer with `weight`, (out, in) in `quant_format.dtype`, quantized on the device that it is on."""
        if weight.device.type == "cpu":
            codes, state = _quantize_in_pieces(weight.contiguous(), quant_format)
        else:
            codes, state = require_bitsandbytes().functional.quantize_4bit(
                weight.contiguous(),
                blocksize=BLOCK_SIZE,
                compress_statistics=quant_format.double,
                quant_type=quant_format.kind,
            )
        return cls.from_bitsandbytes(codes, state, quant_format, bias)

    @classmethod
    def from_bitsandbytes(
        cls, codes: torch.Tensor, state: "QuantState", quant_format: QuantFormat, bias: torch.Tensor | None = None
    ) -> "FourBitLinear":
        """Return a layer with what bitsandbytes' quantize_4bit returns: `codes`, (out * in / 2, 1) bytes, and `state`
        with the scales. `bias`: (out,) or None."""
        assert state.blocksize == BLOCK_SIZE and state.nested == quant_format.double
        assert state.quant_type == quant_format.kind
        out_features, in_features = state.shape
        layer = cls(in_features, out_features, quant_format, bias)
        sections = {"codes": codes.reshape(-1), "scales": state.absmax}
        if quant_format.double:
            sections |= {"scale_scales": state.state2.absmax, "mean": state.offset.reshape(1)}
            assert torch.equal(state.state2.code, _byte_levels(codes.device)), "bitsandbytes has changed its table"
        packed = torch.zeros(layer.num_bytes, dtype=torch.uint8, device=codes.device)
        for name, (start, end) in layer.layout.items():
            packed[start:end] = sections[name].contiguous().view(torch.uint8)
        layer.weight = nn.Parameter(packed.view(quant_format.storage), requires_grad=False)
        return layer

    @property
    def layout(self) -> dict[str, tuple[int, int]]:
        """Section of the packed bytes -> (first byte, byte after the last)."""
        count = self.in_features * self.out_features
        blocks = -(-count // BLOCK_SIZE)
        sizes = {"codes": -(-count // 2), "scales": blocks if self.quant_format.double else 4 * blocks}
        if self.quant_format.double:
            sizes |= {"scale_scales": 4 * -(-blocks // SCALE_BLOCK_SIZE), "mean": 4}
        places, at = {}, 0
        for name, size in sizes.items():
            places[name] = (at, at + size)
            at += -(-size // ALIGN) * ALIGN
        return places

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, codes and scales together."""
        end = max(end for _, end in self.layout.values())
        return -(-end // ALIGN) * ALIGN

    def unpack(self) -> tuple[torch.Tensor, "QuantState"]:
        """Return codes, (out * in / 2, 1) bytes, and scales as bitsandbytes' kernels take them: views, no copies.

        Raises ModelError if an engine has cast or cut the packed bytes.
        """
        from bitsandbytes.functional import QuantState

        storage = self.quant_format.storage
        if self.weight.dtype != storage or self.weight.numel() * self.weight.itemsize != self.num_bytes:
            raise ModelError(
                f"the packed bytes of a 4-bit layer were stored as {storage} and came back as "
                f"{self.weight.numel()} elements of {self.weight.dtype}: an engine cast or cut them.\n"
                "Write `bnb_4bit_quant_storage: uint8` in bnb_config_kwargs."
            )
        packed = self.weight.detach().view(torch.uint8)
        section = {name: packed[start:end] for name, (start, end) in self.layout.items()}
        codes, shape = section["codes"].view(-1, 1), torch.Size((self.out_features, self.in_features))
        kind, device = self.quant_format.kind, packed.device
        common = {"shape": shape, "blocksize": BLOCK_SIZE, "quant_type": kind, "dtype": self.quant_format.dtype}
        common["code"] = _levels(kind, device)
        if not self.quant_format.double:
            return codes, QuantState(absmax=section["scales"].view(torch.float32), **common)
        scale_scales = section["scale_scales"].view(torch.float32)
        of_scales = QuantState(
            absmax=scale_scales, code=_byte_levels(device), blocksize=SCALE_BLOCK_SIZE, dtype=torch.float32
        )
        mean = section["mean"].view(torch.float32)[0]
        return codes, QuantState(absmax=section["scales"], offset=mean, state2=of_scales, **common)

    def dequantize(self) -> torch.Tensor:
        """Return W as the products see it: (out, in) in the dtype of the full weights."""
        codes, state = self.unpack()
        return require_bitsandbytes().functional.dequantize_4bit(codes, state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype of x; computed in the format's compute_dtype."""
        return _Product.apply(x.to(self.quant_format.compute_dtype), self).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.quant_format}"


class _Product(torch.autograd.Function):
    """x W^T + b, whose backward unpacks W from the layer again: between forward and backward an engine may have freed
    the gathered bytes and gathered them elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        from bitsandbytes import matmul_4bit

        ctx.layer = layer
        codes, state = layer.unpack()
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return matmul_4bit(x, codes.t(), state, bias=bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(..., out) -> (..., in)."""
        return grads[0] @ ctx.layer.dequantize().to(grads[0].dtype), None


def _quantize_in_pieces(weight: torch.Tensor, quant_format: QuantFormat) -> "tuple[torch.Tensor, QuantState]":
    """Quantize `weight`, (out, in) on the CPU, bit for bit as bitsandbytes' quantize_4bit does.

    On a CPU that function takes some 20 bytes of passing memory for each weight, and most of its time to get them from
    the system: pieces that stay in the processor's cache need neither. One thread alone: several wait for each other
    after each small piece, ten times as long where other work has the cores.
    """
    functional = require_bitsandbytes().functional
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = [
            functional.quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type=quant_format.kind)
            for piece in weight.reshape(-1).split(PIECE)
        ]
    finally:
        torch.set_num_threads(threads)
    codes, scales = torch.cat([codes for codes, _ in done]), torch.cat([state.absmax for _, state in done])
    of_scales: dict[str, Any] = {"absmax": scales}
    if quant_format.double:
        mean = scales.mean()
        in_bytes, state = functional.quantize_blockwise(scales - mean, blocksize=SCALE_BLOCK_SIZE)
        of_scales = {"absmax": in_bytes, "offset": mean, "state2": state}
    return codes, functional.QuantState(
        **of_scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK_SIZE,
        code=_levels(quant_format.kind, weight.device),
        quant_type=quant_format.kind,
    )


@cache
def _levels(kind: str, device: torch.device) -> torch.Tensor:
    """(16,): the values that a weight can have, before its scale."""
    return require_bitsandbytes().functional.get_4bit_type(kind, device=device)


@cache
def _byte_levels(device: torch.device) -> torch.Tensor:
    """(256,): the values that a quantized scale can have."""
    return require_bitsandbytes().functional.create_dynamic_map().to(device)
