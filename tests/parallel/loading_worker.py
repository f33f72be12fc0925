"""One of two gloo ranks that load a 4-bit model into FSDP2's parts and try it out, as test_stream.py asks.

torchrun --nproc_per_node 2 -m loading_worker SMALL_MODEL MODEL
"""

import json
import re
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


def count_of(name: str, text: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", text)
    assert found is not None
    return int(found[1])


def read_of_self(file: str) -> str:
    return Path(f"/proc/self/{file}").read_text()


class Peak:
    """The largest anonymous memory of this process while it is entered, in bytes more than at the beginning.

    `own_reads`: bytes that the watching itself has read from /proc, which the system counts as read by the process.
    """

    def __enter__(self) -> "Peak":
        self.start = self.most = count_of("RssAnon", read_of_self("status")) * 1024
        self.own_reads = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.is_set():
            status = read_of_self("status")
            self.own_reads += len(status)
            self.most = max(self.most, count_of("RssAnon", status) * 1024)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.most -= self.start


def load_and_try(folder: str) -> dict[str, int]:
    before = count_of("rchar", read_of_self("io"))
    with Peak() as loading, returning_freed_memory():
        found = lazy_model(folder, dtype=NF4.dtype, attention=("sdpa",), quant_format=NF4, device=CPU)
        assert found is not None
        loss = LossModule(found[0], NextToken(), composed=True)
        plan = ParallelPlan("fsdp2", shard=2, fsdp=FsdpOptions(pin_memory=False))
        shard_module(loss, plan, CPU, full=False, lazy=found[1])
    was_read = count_of("rchar", read_of_self("io")) - before - loading.own_reads
    with torch.no_grad(), Peak() as trying, returning_freed_memory():
        assert loss(question=lambda module: module.settle(packs=False)) == 1.0
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
