"""A process that imports what a training run needs, once, and forks a child of itself for each command it is sent.

`python -m support.rank_server SOCKET OWNER`. It ends when the process OWNER has gone. A request is one byte with
three open files (its input and outputs), and a line of JSON (argv, env, cwd); the answers are the child's pid and, when
it has ended, its exit code.

Nothing may be started here that a fork does not survive: no thread, no process group, no CUDA context. Each child
then is what a new interpreter would be after the same imports, except for its hash seed, which is the server's.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import socket
import sys
import threading
from pathlib import Path

import finetuner

# Besides this package: what the first step of an ordinary run has imported.
IMPORTED = (
    "accelerate.commands.launch",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "peft",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)


# They are for `python -m`, and refuse to be imported.
COMMANDS = {"finetuner.train", "finetuner.merge"}


def preload() -> None:
    ours = {module.name for module in pkgutil.walk_packages(finetuner.__path__, "finetuner.")} - COMMANDS
    for name in (*IMPORTED, *sorted(ours)):
        with contextlib.suppress(ModuleNotFoundError):  # an extra that is not installed
            importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()


def become(request: dict, files: list[int]) -> None:
    """Turn this forked child into what the request asks for, up to running it."""
    os.setsid()
    for fd, given in enumerate(files):
        os.dup2(given, fd)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # as `python -m` has it
    sys.argv = ["-m", *request["argv"][1:]]


def listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    Path(address + ".new").rename(address)  # who finds it can connect to it
    return listener


def serve(listener: socket.socket, owner: int) -> tuple[dict, list[int]] | None:
    """Answer requests until the owner has gone (None); in a forked child, return its request and its files."""
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for _ in selector.select(timeout=0.02 if running else 0.5):
                connection, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(connection, 1, 3)
                request = json.loads(connection.makefile("rb").readline())
                pid = os.fork()
                if pid == 0:
                    for ours in (listener, connection, *running.values()):
                        ours.close()
                    return request, files
                for opened in files:
                    os.close(opened)
                connection.sendall(f"{pid}\n".encode())
                running[pid] = connection
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                with running.pop(pid) as connection, contextlib.suppress(OSError):  # who asked may have gone
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            if not alive(owner):
                return None


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    listening = listen(sys.argv[1])
    preload()
    gc.collect()
    gc.freeze()
    asked = serve(listening, int(sys.argv[2]))
    if asked is None:
        shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
    else:
        become(*asked)
        gc.unfreeze()
        sys.modules.pop(asked[0]["argv"][0], None)  # runpy warns of a module that it finds imported
        # An exception ends the child as it ends a new interpreter: traceback, exit code, atexit and all.
        runpy.run_module(asked[0]["argv"][0], run_name="__main__", alter_sys=True)
