"""Big models on small memory: the model is built empty, and each tensor is read when it gets its place.

A rank that holds a part of every tensor would otherwise read and quantise the whole model first. Here one tensor at a
time is read from the safetensors files, quantised on the device that it goes to, handed out, and forgotten. Only for
models whose files name their tensors as the model does; transformers renames and fuses those of some architectures as
it loads them, and these are loaded whole.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetuner.models.files import find_base, weight_files
from finetuner.models.four_bit_linear import Format, FourBitLinear
from finetuner.models.quantized_cache import PackedCache
from finetuner.storage.safetensors_stream import NAMES, TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Promised:
    """A parameter's tensor in the files, and what becomes of it: `form` says how it is packed."""

    name: str
    path: Path
    info: TensorInfo
    dtype: torch.dtype
    form: Format | None
    shape: tuple[int, ...]  # when it has become that

    def read(self, device: torch.device) -> torch.Tensor:
        """Packed on `device`, or as it is on the CPU."""
        tensor = read_tensor(self.path, self.info)
        if self.form is not None:
            return FourBitLinear.quantize(tensor.to(device, self.form.dtype), self.form).weight.data
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @property
    def info_after(self) -> TensorInfo:
        return TensorInfo(NAMES[self.dtype], self.shape)


class Promises:
    """What the parameters of an empty model are to be. Until it has its value, a parameter holds arbitrary numbers in
    memory that Linux does not occupy before it is written to."""

    def __init__(
        self,
        parameters: Mapping[Promised, nn.Parameter],
        device: torch.device,
        cache: PackedCache | None,
        report: Report,
    ) -> None:
        self.device, self.cache, self.report = device, cache, report
        self._open = {id(parameter): (promised, parameter) for promised, parameter in parameters.items()}
        self.num_bytes = sum(self._cost(promised) for promised in parameters)
        self.done = 0

    def _cost(self, promised: Promised) -> int:
        stored = self.cache is not None and self.cache.stored
        return promised.info_after.num_bytes if stored else promised.info.num_bytes

    def value(self, promised: Promised) -> torch.Tensor:
        """Read it: from the cache, or from the model's files and then into the cache."""
        if self.cache is not None and self.cache.stored:
            tensor = self.cache.read(promised.name)
        else:
            tensor = promised.read(self.device)
            if self.cache is not None:
                self.cache.write(promised.name, tensor)
        self.done += self._cost(promised)
        self.report(self.done, self.num_bytes)
        return tensor

    def keep(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        """Give these parameters their values now, whole, on this rank."""
        for parameter in parameters:
            if id(parameter) in self._open:
                promised, _ = self._open.pop(id(parameter))
                parameter.data = self.value(promised).to(device)
        self._end_if_empty()

    def keep_all(self, device: torch.device) -> None:
        self.keep([parameter for _, parameter in self._open.values()], device)

    def hand_over(self, module: nn.Module) -> dict[str, Promised]:
        """Name in `module` -> what that parameter is to be, for an engine that replaces its parameters by parts. To be
        asked once: the parameters themselves are forgotten, so that nothing keeps them alive."""
        named = {name: self._open[id(p)][0] for name, p in module.named_parameters() if id(p) in self._open}
        assert len(named) == len(self._open), "a parameter was replaced before it had its value"
        self._open = {}
        return named

    def _end_if_empty(self) -> None:
        if not self._open:
            self.close()

    def close(self) -> None:
        """When all are read: the cache takes its name."""
        if self.cache is not None:
            self.cache.close()


def promise(
    base_model: str,
    empty: "PreTrainedModel",
    names: Mapping[str, nn.Parameter],
    layers: Mapping[str, FourBitLinear],
    dtype: torch.dtype,
    device: torch.device,
    cache_folder: Path | None,
    report: Report = lambda done, total: None,
) -> Promises | None:
    """Promises for the parameters `names` of an `empty` model, those that `layers` has packed as its layers are and the
    others in `dtype`; None if the model's files do not have them under these names and in these shapes. Buffers that
    are kept in the files get their values at once.
    """
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in weight_files(find_base(base_model)):
        found |= {name: (path, info) for name, info in read_header(path).items()}
    promises: dict[Promised, nn.Parameter] = {}
    for name, parameter in names.items():
        if name not in found:
            return None
        path, info = found[name]
        layer, shape = layers.get(name), tuple(parameter.shape)
        if info.shape != (shape if layer is None else (layer.out_features, layer.in_features)):
            return None
        form = None if layer is None else layer.form
        kept = dtype if form is None else form.storage
        promises[Promised(name, path, info, kept, form, shape)] = parameter
    kept_buffers = dict(empty.named_buffers()).keys() & empty.state_dict().keys()
    if not kept_buffers <= found.keys():
        return None
    for name in kept_buffers:
        empty.get_buffer(name).copy_(read_tensor(*found[name]))
    cache = None
    if cache_folder is not None and layers:
        key = _key(promises, device)
        cache = PackedCache(cache_folder, key, {p.name: p.info_after for p in promises})
    return Promises(promises, device, cache, report)


def _key(promises: Iterable[Promised], device: torch.device) -> str:
    """Equal only if the same bytes would come out. A model's files are known by their place on the disk, size and
    times: reading 141 GB to hash them would cost what the cache saves. (The hub's files are named by their hash.)"""
    import bitsandbytes

    files = {}
    for promised in promises:
        stat = promised.path.stat()
        files[str(promised.path.resolve())] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    code = [
        path.read_text(encoding="utf-8") for path in (Path(__file__), Path(__file__).with_name("four_bit_linear.py"))
    ]
    tensors = [[p.name, p.info.begin, str(p.form), str(p.form and p.form.dtype), str(p.dtype)] for p in promises]
    facts = [files, tensors, device.type, bitsandbytes.__version__, code]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def settle_buffers(model: "PreTrainedModel") -> None:
    """Compute what a model keeps beside its weights and no file has, such as rotary frequencies: transformers does it
    in the function that draws initial weights, which leaves alone what is marked as read."""
    for parameter in model.parameters():
        marked: Any = parameter
        marked._is_hf_initialized = True
    model.initialize_weights()
