"""Activations that wait for the backward in the node's memory, and not in the device's."""

import torch
from torch import nn

Packed = torch.Tensor | tuple[torch.device, torch.Tensor]


class HostedActivations(torch.autograd.graph.saved_tensors_hooks):
    """A context whose forward keeps what its backward needs on the host. The numbers are the same, bit for bit.

    Around a forward whose layers are recomputed, it keeps the layers' inputs. `num_bytes`: what has gone to the host.
    Copies are put in the queue of the computation: nothing waits for them, and nothing else runs beside them.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Packed:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor  # it stays where it is in any case
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        host.copy_(tensor, non_blocking=True)
        self.num_bytes += host.nbytes
        return tensor.device, host

    def _unpack(self, packed: Packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)
