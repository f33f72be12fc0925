"""What goes wrong when a run starts: said before anything is fetched, once, and by every rank that has to end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.places import ROOT, SHARED_DATA
from support.processes import free_port

from finetuner.errors import PlanError
from finetuner.plan.memory import ModelBytes, RankBytes, bytes_of_a_rank, bytes_of_training
from finetuner.plan.parallel import FsdpOptions, ParallelPlan, ZeroOptions
from finetuner.recipe.optimizers import TrainedTensor
from finetuner.recipe.sections import OptimizerSection
from finetuner.training.metrics import read_metrics
from finetuner.training.watchdog import stacks_when_stuck
from finetuner.world import available_ram

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    """Its config.json and nothing else."""
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


@pytest.mark.parametrize(
    ("keys", "bytes_a_weight", "advice"),
    [
        ({"adapter": None}, 16, "adapter: qlora"),
        ({"adapter": "lora", "bf16": True}, 2, "adapter: qlora"),
        ({"adapter": "lora", "bf16": True, "fsdp": ["full_shard", "auto_wrap"]}, 2, "more nodes"),
    ],
)
def test_a_model_too_big_is_refused_with_both_sizes_before_its_weights_or_the_rows_are_touched(
    keys, bytes_a_weight, advice, llama_70b, write_recipe, train, tmp_path
):
    room = available_ram()
    if room is None or room > 130e9:
        pytest.skip("this machine has room for it, or does not say")
    recipe = write_recipe(base_model=str(llama_70b), **keys)
    with pytest.raises(PlanError, match=r"does not fit") as refused:
        train(recipe)
    needed = 70_553_706_496 * bytes_a_weight / 1e9
    assert f"it takes {needed:,.1f} GB" in str(refused.value) and advice in str(refused.value)
    assert "shows no GPU" in str(refused.value)
    assert not (tmp_path / "prepared").exists()


def zero(stage: int, offload: bool = False) -> ParallelPlan:
    block = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    return ParallelPlan("zero", shard=8, zero=ZeroOptions(stage=stage, config={"zero_optimization": block}))


@pytest.mark.parametrize(
    ("engine", "kept"),
    [
        (ParallelPlan(replicate=8), RankBytes(160, 0)),
        (ParallelPlan("fsdp", shard=8, fsdp=FsdpOptions()), RankBytes(20, 0)),
        (ParallelPlan("fsdp", shard=8, fsdp=FsdpOptions(offload=True)), RankBytes(0, 20)),
        (zero(1), RankBytes(20 + 40 + 15, 0)),
        (zero(2), RankBytes(20 + 5 + 15, 0)),
        (zero(3), RankBytes(20, 0)),
        (zero(2, offload=True), RankBytes(0, 15)),
    ],
)
def test_what_a_rank_of_eight_keeps_of_ten_weights_that_are_trained(engine, kept):
    parts = bytes_of_training([TrainedTensor((2, 5))], OptimizerSection(), parallel=engine, bf16=True)
    expected = ModelBytes(20, 40, 120) if engine.zero is not None else ModelBytes(40, 40, 80)
    assert parts == expected
    assert bytes_of_a_rank(parts, engine) == (RankBytes(22, 0) if engine == zero(3) else kept)


def test_the_memory_of_a_container_is_its_limit_without_the_pages_of_files(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   64000 kB\n")
    assert available_ram(tmp_path) == 64000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "30000000"), ("current", "20000000"), ("stat", "anon 1\nfile 5000000\n")):
        (group / f"memory.{name}").write_text(text)
    assert available_ram(tmp_path) == 15_000_000
    (group / "memory.max").write_text("max\n")
    assert available_ram(tmp_path) == 64000 * 1024
    assert available_ram(tmp_path / "nowhere") is None


def started_by_no_launcher(recipe: Path, port: int, ranks: tuple[int, ...], *overrides: str) -> list[subprocess.Popen]:
    """As a batch system starts ranks: nothing ends the others when one does."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    env |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "finetuner.train", str(recipe), *overrides]
    return [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]


@pytest.mark.slow
def test_a_mistake_that_one_rank_finds_ends_all_and_is_said_once_and_a_taken_port_is_named(write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (alone,) = started_by_no_launcher(recipe, port, (0,))
        text, _ = alone.communicate(timeout=120)
        assert alone.returncode == 2 and "--main_process_port" in text and "Traceback" not in text, text
    (broken := tmp_path / "step-00000001").mkdir()
    (broken / "state.json").write_text("{}")
    both = started_by_no_launcher(recipe, port, (0, 1), f"resume_from_checkpoint={broken}")
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], texts
    assert ["is damaged" in text for text in texts] == [True, False]
    assert "Traceback" not in "".join(texts)


def test_a_rank_without_progress_says_where_it_is(capfd):
    with stacks_when_stuck(1.0) as alive:
        for _ in range(6):
            time.sleep(0.2)
            alive()
        assert "Timeout" not in capfd.readouterr().err
        time.sleep(1.0)
    assert "in test_a_rank_without_progress_says_where_it_is" in capfd.readouterr().err


def until(process: subprocess.Popen, start: str) -> None:
    """Until the process prints a line that starts like this."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(start):
            return
    pytest.fail("".join(seen))


SHARDED = {
    "DDP": {},
    "FSDP2": {"fsdp": ["full_shard", "auto_wrap"]},
    "ZeRO-2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "ZeRO-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("engine", SHARDED)
def test_a_signal_to_one_rank_saves_on_all_and_a_rank_that_hangs_or_dies_is_not_waited_for(
    engine, write_recipe, tmp_path
):
    recipe = write_recipe(max_steps=5000, save_strategy="no", logging_steps=1, ddp_timeout=15, **SHARDED[engine])
    port = free_port()
    processes = started_by_no_launcher(recipe, port, (0, 1))
    try:
        until(processes[0], "step 2/")
        processes[1].send_signal(signal.SIGTERM)
        texts = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], texts
        assert len(list((tmp_path / "out" / "checkpoints").glob("step-*"))) == 1

        main, other = processes = started_by_no_launcher(recipe, port, (0, 1), "resume_from_checkpoint=true")
        until(main, "step ")
        other.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        text, _ = main.communicate(timeout=60)
        assert main.returncode not in (0, 2, 75) and "imed out" in text, text
        assert 5 < time.monotonic() - stopped < 40
        stack = text.partition("Traceback")[0]
        assert "Timeout (0:00:12)!" in stack and "training/loop.py" in stack, "where it waited, before it gave up"
        assert "resume with: accelerate launch" in text
        other.kill()
        other.communicate()

        main, other = processes = started_by_no_launcher(recipe, port, (0, 1), "resume_from_checkpoint=true")
        until(main, "step ")
        other.kill()
        text, _ = main.communicate(timeout=60)
        assert main.returncode not in (0, 2, 75) and "resume with: accelerate launch" in text, text
    finally:
        for process in processes:
            process.kill()
            process.communicate()


SQUAD = SHARED_DATA / "squad_for_llms.jsonl"
KNOWN = {
    "llama70b_qlora_fsdp": (
        # its rows are Alpaca's, which these are not
        ["datasets.0.type={field_instruction: question, field_input: context, format: '{input} {instruction} '}"],
        ["FSDP2 over 2 ranks, offloaded to the CPU", "4-bit nf4, double quantized: 14 linear layers"],
    ),
    "llama3_8b_zero1": (["micro_batch_size=1"], ["ZeRO-1 over 2 ranks", "train_batch_size 2, ", "bf16.enabled "]),
}


@pytest.mark.slow
@pytest.mark.skipif(not SQUAD.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["llama70b_qlora_fsdp", pytest.param("llama3_8b_zero1", marks=pytest.mark.matrix)])
def test_the_known_recipes_run_on_two_ranks_with_another_model_and_other_rows(name, tiny_model, tmp_path):
    overrides, says = KNOWN[name]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words = [f"base_model={tiny_model}", f"datasets.0.path={SQUAD}", "sequence_len=900", "max_steps=2", *overrides]
    folders = [f"output_dir={tmp_path / 'out'}", f"dataset_prepared_path={tmp_path / 'prepared'}", "logging_steps=1"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, "-m", "finetuner.train", f"examples/{name}.yml", *words, *folders],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in says:
        assert text in done.stdout, done.stdout
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def network_namespaces_are_permitted() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"finetuner-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.matrix
def test_two_hosts_train_over_a_network_and_each_prepares_its_rows(write_recipe, train, tmp_path):
    if not network_namespaces_are_permitted():
        pytest.skip("needs root and network namespaces")
    recipe = write_recipe(max_steps=3, logging_steps=1)
    reference = train(recipe, "micro_batch_size=4", f"output_dir={tmp_path / 'one'}")
    words = ["tests/parallel/two_hosts.sh", str(recipe), "micro_batch_size=2", f"output_dir={tmp_path / 'two'}"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DDP over 2 ranks" in done.stdout and "prepared: 2 folders on two hosts" in done.stdout
    received = re.search(r"received: (\d+) bytes", done.stdout)
    assert received and int(received[1]) > 3 * 4 * 75_000, "gradients went over the wire"
    losses = [row["loss"] for row in read_metrics(tmp_path / "two" / "metrics.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in reference], rel=1e-5)


@pytest.mark.parametrize("script", ["examples/slurm/finetune.sbatch", "tests/parallel/two_hosts.sh"])
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0
