"""One of two gloo ranks that load a 4-bit model into FSDP2's shards and try it out, as test_stream.py asks.

torchrun --nproc_per_node 2 -m support.loading_worker SMALL_MODEL MODEL
"""

import json
import re
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from torch import distributed

from finetuner.models.freed_memory import returning_freed_memory
from finetuner.models.lazy_weights import lazy_model
from finetuner.models.quant_format import QuantFormat
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.parallel.fsdp import shard_module
from finetuner.plan.parallel import FsdpOptions, ParallelPlan

CPU = torch.device("cpu")
NF4 = QuantFormat("nf4", torch.bfloat16, double=True, compute_dtype=torch.bfloat16)


def bytes_read() -> int:
    found = re.search(r"rchar:\s+(\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def anonymous_bytes() -> int:
    """The memory of this process that is no file's, from the shortest file that has it: each look is itself read."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


class Peak:
    """The largest anonymous memory of this process while it is entered, in bytes more than at the beginning.

    `own_reads`: bytes that the watching itself has read from /proc, which the system counts as read by the process.
    """

    def __enter__(self) -> "Peak":
        self.start = self.most = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.most -= self.start


def load_and_try(folder: str) -> dict[str, int]:
    before = bytes_read()
    with Peak() as loading, returning_freed_memory():
        found = lazy_model(folder, dtype=NF4.dtype, attention=("sdpa",), quant_format=NF4, device=CPU)
        assert found is not None
        loss = LossModule(found[0], NextToken(), composed=True)
        plan = ParallelPlan("fsdp", shard=2, fsdp=FsdpOptions(pin_memory=False))
        shard_module(loss, plan, CPU, full=False, lazy=found[1])
    was_read = bytes_read() - before
    with torch.no_grad(), Peak() as trying, returning_freed_memory():
        assert loss(question=lambda module: module.probe_head(packs=False)) == 1.0
    held = sum(p.to_local().numel() * p.itemsize for p in loss.parameters())
    return {"held": held, "read": was_read, "loading": loading.most, "trying": trying.most}


def main() -> None:
    distributed.init_process_group("gloo")
    small, large = sys.argv[1:]
    load_and_try(small)  # which imports what it needs
    told: list = [None, None]
    distributed.all_gather_object(told, load_and_try(large))
    if distributed.get_rank() == 0:
        print("RANKS", json.dumps(told), flush=True)
    distributed.barrier()  # gloo aborts where one rank is gone while another still leaves
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
