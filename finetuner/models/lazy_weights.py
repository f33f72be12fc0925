"""Big models on small memory: the model is built empty, and each tensor is read when the engine shards it.

Otherwise a rank that has a shard of every tensor would read and quantize the full model first. Here one tensor at a
time is read from the safetensors files, quantized on the device that it goes to, sharded, and freed. Only for models
whose files name their tensors as the model does: transformers renames and fuses those of some architectures as it loads
them, and these are loaded in full.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetuner.models.empty_model import empty_model
from finetuner.models.files import find_base, weight_files
from finetuner.models.four_bit_linear import FourBitLinear
from finetuner.models.quant_format import QuantFormat
from finetuner.models.quantized_cache import PackedCache
from finetuner.models.transformers_internals import has_weights_fixed_in_fp32, initialize_buffers
from finetuner.storage.safetensors_stream import NAMES, TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReportBytes = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class LazyTensor:
    """One parameter's tensor in the model's files, and what it is read as.

    `info`: its dtype and shape in the file. `dtype` and `shape`: those of the parameter; with a `quant_format`, of its
    packed bytes.
    """

    name: str
    path: Path
    info: TensorInfo
    dtype: torch.dtype
    quant_format: QuantFormat | None
    shape: tuple[int, ...]

    def read(self, device: torch.device) -> torch.Tensor:
        """Read the tensor, of `shape`: on `device` if it is quantized, or else on the CPU."""
        tensor = read_tensor(self.path, self.info)
        if self.quant_format is not None:
            on_device = tensor.to(device, self.quant_format.dtype)
            return FourBitLinear.quantize(on_device, self.quant_format).weight.data
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @property
    def parameter_info(self) -> TensorInfo:
        return TensorInfo(NAMES[self.dtype], self.shape)


class LazyWeights:
    """The weights of an empty model, to be read one by one.

    Until it is read, a parameter has arbitrary numbers, in memory that Linux does not occupy before it is written to.
    """

    def __init__(
        self,
        parameters: Mapping[LazyTensor, nn.Parameter],
        device: torch.device,
        cache: PackedCache | None,
        report: ReportBytes,
    ) -> None:
        """`device`: where to quantize. `cache`: packed bytes of an earlier start, or the file to write them to."""
        self.device, self.cache, self.report = device, cache, report
        self._unread = {id(parameter): (tensor, parameter) for tensor, parameter in parameters.items()}
        self.num_bytes = sum(self._bytes_to_read(tensor) for tensor in parameters)
        self.num_bytes_read = 0

    def _bytes_to_read(self, tensor: LazyTensor) -> int:
        cached = self.cache is not None and self.cache.stored
        return tensor.parameter_info.num_bytes if cached else tensor.info.num_bytes

    def read(self, tensor: LazyTensor) -> torch.Tensor:
        """Read the tensor, of `tensor.shape`: from the cache, or from the model's files and then into the cache."""
        if self.cache is not None and self.cache.stored:
            value = self.cache.read(tensor.name)
        else:
            value = tensor.read(self.device)
            if self.cache is not None:
                self.cache.write(tensor.name, value)
        self.num_bytes_read += self._bytes_to_read(tensor)
        self.report(self.num_bytes_read, self.num_bytes)
        return value

    def materialize(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        """Read these parameters now, in full and to `device`, on this rank. Passes over those that are read already."""
        for parameter in parameters:
            if id(parameter) in self._unread:
                tensor, _ = self._unread.pop(id(parameter))
                parameter.data = self.read(tensor).to(device)
        if not self._unread:
            self.close()

    def materialize_all(self, device: torch.device) -> None:
        """Read all parameters that are not read yet, in full and to `device`, on this rank."""
        self.materialize([parameter for _, parameter in self._unread.values()], device)

    def take_unread(self, module: nn.Module) -> dict[str, LazyTensor]:
        """Return name in `module` -> tensor for all that is not read yet, for an engine that replaces the parameters.

        To be called once: the parameters themselves are forgotten, so that their memory can be freed. The engine
        calls `read` for each tensor, and then `close`.
        """
        named = {name: self._unread[id(p)][0] for name, p in module.named_parameters() if id(p) in self._unread}
        assert len(named) == len(self._unread), "a parameter was replaced before it was read"
        self._unread = {}
        return named

    def close(self) -> None:
        """Complete the cache, after all tensors are read."""
        if self.cache is not None:
            self.cache.close()


def lazy_model(
    base_model: str,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    quant_format: QuantFormat | None,
    device: torch.device,
    cache_folder: Path | None = None,
    report: ReportBytes = lambda done, total: None,
    empty_dtype: torch.dtype | None = None,
) -> "tuple[PreTrainedModel, LazyWeights] | None":
    """Return the model that load_model would, empty, and its weights, to be read in `dtype` and quantized on `device`;
    None for a base that has to be loaded in full.

    `cache_folder`: where packed bytes are cached; None: nowhere. `empty_dtype`: number format of the empty model, where
    an engine would cast all of it.
    """
    try:
        model = empty_model(base_model, dtype=empty_dtype or dtype, attention=attention, quant_format=quant_format)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # load_model says what is wrong
    if has_weights_fixed_in_fp32(model):
        return None
    initialize_buffers(model)
    weights = plan_lazy_weights(base_model, model, dtype, device, cache_folder, report)
    return None if weights is None else (model, weights)


def plan_lazy_weights(
    base_model: str,
    empty: "PreTrainedModel",
    dtype: torch.dtype,
    device: torch.device,
    cache_folder: Path | None,
    report: ReportBytes = lambda done, total: None,
) -> LazyWeights | None:
    """Find every parameter of an `empty` model in the base's files, those of FourBitLinear layers to be packed as the
    layers say and the others to be read in `dtype`.

    Returns None if the files do not have them under these names and in these shapes. Buffers that are in the files are
    read at once.
    """
    in_files = {
        name: (path, info) for path in weight_files(find_base(base_model)) for name, info in read_header(path).items()
    }
    layers = {f"{name}.weight": m for name, m in empty.named_modules() if isinstance(m, FourBitLinear)}
    tensors: dict[LazyTensor, nn.Parameter] = {}
    for name, parameter in empty.named_parameters():
        tensor = _find(name, parameter, layers.get(name), in_files, dtype)
        if tensor is None:
            return None
        tensors[tensor] = parameter
    saved_buffers = dict(empty.named_buffers()).keys() & empty.state_dict().keys()
    if not saved_buffers <= in_files.keys():
        return None
    for name in saved_buffers:
        empty.get_buffer(name).copy_(read_tensor(*in_files[name]))
    cache = None
    if cache_folder is not None and layers:
        cache = PackedCache(cache_folder, _cache_key(tensors, device), {t.name: t.parameter_info for t in tensors})
    return LazyWeights(tensors, device, cache, report)


def _find(
    name: str,
    parameter: nn.Parameter,
    layer: FourBitLinear | None,
    in_files: Mapping[str, tuple[Path, TensorInfo]],
    dtype: torch.dtype,
) -> LazyTensor | None:
    """The parameter's tensor, or None if the files have none of that name and shape. `layer`: whose bytes it is."""
    if name not in in_files:
        return None
    path, info = in_files[name]
    shape = tuple(parameter.shape)
    if layer is None:
        return LazyTensor(name, path, info, dtype, None, shape) if info.shape == shape else None
    if info.shape != (layer.out_features, layer.in_features):
        return None
    return LazyTensor(name, path, info, layer.quant_format.storage, layer.quant_format, shape)


def _cache_key(tensors: Iterable[LazyTensor], device: torch.device) -> str:
    """Equal only if the same bytes would come out.

    A model's files are known by their place on the disk, size and times: reading 141 GB to hash them would cost what
    the cache saves. (The hub's files are named by their hash.)
    """
    import bitsandbytes

    files = {}
    for tensor in tensors:
        stat = tensor.path.stat()
        files[str(tensor.path.resolve())] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    sources = (Path(__file__), Path(__file__).with_name("four_bit_linear.py"))  # the code that decides the bytes
    code = [path.read_text(encoding="utf-8") for path in sources]
    described = [
        [t.name, t.info.begin, str(t.quant_format), str(t.quant_format and t.quant_format.dtype), str(t.dtype)]
        for t in tensors
    ]
    facts = [files, described, device.type, bitsandbytes.__version__, code]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
