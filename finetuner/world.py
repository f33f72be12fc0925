"""The machine as one rank sees it. The only module that reads the environment or counts devices."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

from finetuner.errors import PlanError

DeviceType = Literal["cpu", "cuda", "mps"]


# Variable that `accelerate launch` sets -> the key of its FSDP configuration.
FSDP_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading",
    "FSDP_RESHARD_AFTER_FORWARD": "fsdp_reshard_after_forward",
    "FSDP_STATE_DICT_TYPE": "fsdp_state_dict_type",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "dp_replicate_size",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "dp_shard_size",
}
DEEPSPEED_SETTINGS = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
}


@dataclass(frozen=True)
class Launch:
    """The configuration of `accelerate launch`. The recipe decides; this is compared with it.

    `settings`: key of that configuration -> text.
    """

    engine: Literal["fsdp", "deepspeed"] | None = None
    mixed_precision: str = "no"
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """Ranks, and the device of this one.

    `size` ranks in all, `local_size` of them on this node. `bf16` says that the device multiplies bfloat16 natively;
    where it does not, bf16 is emulated and slower than fp32. `device_name`: a GPU's, by its maker. `num_threads` is
    this rank's share of the CPU cores.
    `device_memory`: free bytes of this rank's GPU, or its share of the node's RAM; `host_memory`: the node's available
    RAM. None where they cannot be known.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    device: DeviceType = "cpu"
    bf16: bool = False
    device_name: str = ""
    num_threads: int = 1
    device_memory: int | None = None
    host_memory: int | None = None
    launch: Launch = Launch()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @classmethod
    def detect(cls) -> "World":
        """Read the launcher's variables and the devices.

        Raises PlanError if the launcher started fewer processes than it was asked for, or more ranks than GPUs.
        """
        import torch

        env = os.environ
        refuse_a_launch_that_lost_its_ranks(env)
        local_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        device: DeviceType = "cpu"
        if env.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1"):
            if torch.cuda.is_available():
                device = "cuda"
            elif torch.backends.mps.is_available():
                device = "mps"
        if device == "cuda":
            require_a_gpu_for_each(local_size, torch.cuda.device_count())
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = device == "mps" or _cpu_multiplies_bf16()
        local_rank, host = int(env.get("LOCAL_RANK", "0")), available_ram()
        device_memory = None if host is None or device == "mps" else host // local_size
        if device == "cuda":
            device_memory, _ = torch.cuda.mem_get_info(local_rank)
        return cls(
            size=int(env.get("WORLD_SIZE", "1")),
            rank=int(env.get("RANK", "0")),
            local_rank=local_rank,
            local_size=local_size,
            device=device,
            bf16=bf16,
            device_name=torch.cuda.get_device_name(local_rank) if device == "cuda" else "",
            num_threads=threads_for_a_rank(env, local_size, _num_usable_cores()),
            device_memory=device_memory,
            host_memory=host,
            launch=read_launch(env),
        )


def read_launch(env: Mapping[str, str]) -> Launch:
    """Return the configuration of `accelerate launch`, from the variables by which it tells its Accelerator."""
    engine: Literal["fsdp", "deepspeed"] | None = None
    table: Mapping[str, str] = {}
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        engine, table = "deepspeed", DEEPSPEED_SETTINGS
    elif env.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        engine, table = "fsdp", FSDP_SETTINGS
    settings = {
        key: env[name] for name, key in table.items() if env.get(name, "").lower() not in ("", "none", "no_wrap")
    }
    return Launch(engine, env.get("ACCELERATE_MIXED_PRECISION", "no"), settings)


def take_engine_from_launcher() -> None:
    """Remove the launcher's variables that name an engine: Accelerate would build that one itself.

    The recipe's engine is built, and the two were found to agree.
    """
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(name, None)


def name_local_rank() -> None:
    """Set LOCAL_RANK to 0 where no launcher has set it: DeepSpeed insists on it.

    Call it after the Accelerator is built, which would take the variable for a launch.
    """
    os.environ.setdefault("LOCAL_RANK", "0")


def refuse_a_launch_that_lost_its_ranks(env: Mapping[str, str]) -> None:
    """Raise PlanError if `accelerate launch --num_processes 2` started one process, as it does without a GPU.

    It sets MASTER_PORT only when more than one was asked for, and RANK only when they were started.
    """
    started = any(name in env for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env and not started:
        raise PlanError(
            "accelerate launch was asked for several processes and started one: without a GPU it ignores "
            "--num_processes.\nType one of these instead (both run several CPU ranks with gloo):\n"
            "  accelerate launch --multi_gpu --num_processes 2 -m finetuner.train RECIPE\n"
            "  torchrun --nproc_per_node 2 -m finetuner.train RECIPE"
        )


def require_a_gpu_for_each(local_size: int, num_gpus: int) -> None:
    """Raise PlanError if ranks of this node would share a GPU."""
    if local_size > num_gpus:
        raise PlanError(
            f"{local_size} ranks were started on this node, but it has {num_gpus} GPU(s).\n"
            f"Start with: accelerate launch --num_processes {num_gpus} ..."
        )


def threads_for_a_rank(env: Mapping[str, str], local_size: int, num_cores: int) -> int:
    """Return the CPU threads of one rank: the user's OMP_NUM_THREADS, else an equal share of the cores.

    Both launchers set OMP_NUM_THREADS=1 on their own, which would leave all cores but one idle, so that value counts
    as "not chosen" under a launcher.
    """
    chosen = env.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in env or "TORCHELASTIC_RUN_ID" in env
    if chosen.isdecimal() and int(chosen) > 0 and not (launched and chosen == "1"):
        return int(chosen)
    return max(1, num_cores // local_size)


def available_ram(root: Path = Path("/")) -> int | None:
    """Return the bytes that processes of this machine, or container, may still take; None where Linux does not say."""
    try:
        text = (root / "proc/meminfo").read_text()
        available = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None
    try:
        limit = int((root / "sys/fs/cgroup/memory.max").read_text())
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
        files = int((root / "sys/fs/cgroup/memory.stat").read_text().split("\nfile ")[1].split()[0])
        return min(available, limit - used + files)  # pages of files are given back when memory is short
    except (OSError, IndexError, ValueError):  # no container, or one without a limit ("max")
        return available


def environment_value(name: str) -> str | None:
    """Return a variable of the environment, for a recipe that says `${env:NAME}`; None if it is not set."""
    return os.environ.get(name)


def launched_rank() -> int:
    """Return this process's rank as its launcher says, before anything heavy is imported."""
    return int(os.environ.get("RANK", "0"))


# By these a launcher, a batch system or a user tells ranks, libraries and kernels what to do.
_LAUNCHER_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "WANDB_MODE",
    "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_GPUS_ON_NODE",
)  # fmt: skip
_LAUNCHER_PREFIXES = (
    "ACCELERATE_", "CUDA_", "DS_", "FSDP_", "GLOO_", "HIP_", "HSA_", "NCCL_", "PARALLELISM_CONFIG_", "PYTORCH_",
    "ROCR_", "TORCH",
)  # fmt: skip
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")


def launcher_variables(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a launcher and of the libraries that are set, by name, for a bug report; secrets say only "set"."""
    found = os.environ if env is None else env
    names = sorted(name for name in found if name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES))
    secret = {name for name in names if any(word in name for word in _SECRET_WORDS)} - {"TOKENIZERS_PARALLELISM"}
    return {name: "set, not shown" if name in secret else found[name] for name in names}


def visible_gpus() -> list[tuple[str, int, int]]:
    """(name, free bytes, bytes in all) of each GPU of this node that the process may use."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [(torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)) for i in range(torch.cuda.device_count())]


def stream_is_terminal(stream: TextIO | None = None) -> bool:
    """Return whether a person watches `stream` (stdout by default)."""
    return (stream or sys.stdout).isatty()


def _cpu_multiplies_bf16() -> bool:
    import torch

    has = torch.cpu.get_capabilities()
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def _num_usable_cores() -> int:
    # A container or a batch system may give this process fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
