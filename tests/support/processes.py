"""Commands in processes of their own: with a new interpreter each, or forked from servers that have imported it all.

Forked is the rule, since a new interpreter spends four seconds of a core on imports. What is about the start itself
(a launcher, the imports, variables that a library reads while it is imported) asks for `fresh=True`.
"""

import contextlib
import fcntl
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from support.places import ROOT, TESTS

SERVERS = 2  # so that ranks differ in their hash seeds, as they do under a launcher
START_SECONDS = 120


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def exit_of(*arguments: object) -> int:
    """The exit code of the command line, in this process."""
    from finetuner import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def run_command(
    *arguments: object,
    ranks: int = 0,
    cwd: Path | None = None,
    timeout: int = 300,
    given: str = "",
    fresh: bool = False,
) -> Result:
    """Run `python -m MODULE ...` (ranks=0), or the same as torchrun would on so many CPU ranks; `given` is its input.

    `fresh`: by a new interpreter, and by torchrun itself.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, TESTS)))
    command, folder = [*map(str, arguments)], str(cwd or ROOT)
    if not fresh:
        assert not given or not ranks, "torchrun's ranks have no input"
        return _run_forked(command, env, folder, max(ranks, 1), timeout, given, launched=ranks > 0)
    launch = [sys.executable, "-m"]
    if ranks:
        launch += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    done = subprocess.run(
        [*launch, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, input=given
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Forked:
    """A command in a child of a server; `files` are its input and its two outputs."""

    def __init__(self, server: int, argv: Sequence[str], env: Mapping[str, str], cwd: str, files: Sequence[IO]):
        self._connection = _connect(server)
        socket.send_fds(self._connection, [b"."], [file.fileno() for file in files])
        self._connection.sendall(json.dumps({"argv": argv, "env": dict(env), "cwd": cwd}).encode() + b"\n")
        self._answers = self._connection.makefile("rb")
        self.pid = int(self._answer())
        self.code: int | None = None

    def _answer(self) -> bytes:
        line = b""
        with contextlib.suppress(ConnectionResetError):  # by a server that ended before it read the request
            line = self._answers.readline()
        assert line, _end_of_a_server()
        return line

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit code, as soon as the process has ended within so many seconds."""
        if self.code is None and select.select([self._connection], [], [], seconds)[0]:
            self.code = int(self._answer())
            self._answers.close()
            self._connection.close()
        return self.code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run_forked(
    command: list[str], env: dict[str, str], cwd: str, ranks: int, timeout: int, given: str, *, launched: bool
) -> Result:
    variables = [env]
    if launched:
        port = {"MASTER_PORT": str(free_port())}
        variables = [env | _variables_of(rank, ranks) | port for rank in range(ranks)]
    for server in range(min(ranks, SERVERS)):
        _started(server)  # all at once, before the first is waited for
    children: list[Forked] = []
    with contextlib.ExitStack() as files:
        outs, errs = ([files.enter_context(tempfile.TemporaryFile("w+")) for _ in variables] for _ in range(2))
        try:
            for rank, (of_rank, out, err) in enumerate(zip(variables, outs, errs, strict=True)):
                children.append(_with_input(given, rank % SERVERS, command, of_rank, cwd, out, err))
            code = _wait(children, timeout)
        finally:
            for child in children:
                child.send_signal(signal.SIGKILL)
                child.poll(10.0)
        for file in (*outs, *errs):
            file.seek(0)
        said, complained = ("".join(file.read() for file in of_ranks) for of_ranks in (outs, errs))
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout, said, complained)
    return Result(code, said, complained)


def _with_input(given: str, server: int, command: list[str], env: dict[str, str], cwd: str, out: IO, err: IO) -> Forked:
    """Start the command with `given`, which a pipe has room for, in a pipe."""
    assert len(given) < 4096
    reading, writing = os.pipe()
    with open(reading) as source:  # noqa: PTH123 - a descriptor, no path
        with open(writing, "w") as text:  # noqa: PTH123
            text.write(given)
        return Forked(server, command, env, cwd, (source, out, err))


def _wait(children: list[Forked], timeout: int) -> int | None:
    """The first code that is not 0, or 0: where one ends with an error, the others are told to end, as torchrun does.

    None where they run longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        waited_for = [child for child in children if child.poll() is None]
        failed = [child.code for child in children if child.code]
        if failed:
            for child in waited_for:
                child.send_signal(signal.SIGTERM)
            for child in waited_for:
                child.poll(max(0.0, min(30.0, deadline - time.monotonic())))
            return failed[0]
        if not waited_for:
            return 0
        waited_for[0].poll(0.05)
    return None


_ports = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port below those that systems give away, so that nothing takes it before a rank listens there."""
    while True:
        port = 15000 + next(_ports) % 15000
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _variables_of(rank: int, ranks: int) -> dict[str, str]:
    """What torchrun sets for a rank."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    return {name: str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "tests",
    }


def _connect(server: int) -> socket.socket:
    address = _started(server)
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + START_SECONDS
    while not address.exists():
        assert time.monotonic() < deadline, f"the server did not start: see {address}.log"
        time.sleep(0.02)
    try:
        connection.connect(str(address))
    except ConnectionRefusedError:
        pytest.fail(_end_of_a_server())
    return connection


def _started(server: int) -> Path:
    """The address of a server that all workers of this pytest share; the first that asks starts it."""
    address = _folder() / str(server)
    if not address.exists():
        with (address.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (log := Path(f"{address}.log")).exists():
                _servers.append(_start(address, log))
    return address


_servers: list[subprocess.Popen] = []  # they end by themselves, when pytest has


def _owner() -> int:
    """The process of pytest that tests belong to, however many workers it has."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"finetuner-servers-{_owner()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _end_of_a_server() -> str:
    return "a server has ended: " + "".join(log.read_text() for log in _folder().glob("*.log"))


def _start(address: Path, log: Path) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS))), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "support.rank_server", str(address), str(_owner())],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
