"""Several processes train on the same numbers as one, through the command a researcher types."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.commands.config.config_args import load_config_from_file
from conftest import (
    free_port,
    run_processes,
    save_colour_set,
    save_tiny_start,
)
from safetensors.torch import load_file

import cada.evaluation.matching
import train_cada
from cada.files import CADAError


RECIPES = Path(train_cada.__file__).parent / "recipes"
PAIRS = 24  # three batches of 8
BATCH = 8
EXACT = ("--optim", "sgd", "--learning_rate", "0.01", "--lr_scheduler_type", "constant")
CASES = {
    "padded": (),
    "checkpointing": ("--activation_checkpointing",),
    "own length, dot": ("--config_overrides", '{"pool_padding": false, "hard_negative_similarity": "dot"}'),
    "cmpm alone": ("--config_overrides", '{"contrastive_loss": "cmpm", "use_atp": false, "use_ara": false}'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint `start` and a data set `data`."""
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_start(folder / "start", initializer_range=0.2)
    save_colour_set(folder / "data", train=PAIRS, val=9, test=11)
    return folder


def arguments(folder: Path, output: str, processes: int, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "start"), "--dataset", str(folder / "data")),
        *("--output_dir", str(folder / output), "--per_device_train_batch_size", str(BATCH // processes)),
        *("--num_train_epochs", "2", "--logging_steps", "1"),
        *("--per_device_eval_batch_size", "2", "--use_cpu", "--disable_tqdm", "true", "--do_train"),
        *more,
    ]


def one_process(rank: int, processes: int, ports: list[int], runs: list[list[str]], variables: dict[str, str]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
    os.environ.update({**address, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables})
    for port, run in zip(ports, runs):
        os.environ["MASTER_PORT"] = str(port)  # who begins a run must not meet the others at the end of the last
        train_cada.main([*run, "--ddp_backend", "gloo"])


def run_in_processes(processes: int, runs: list[list[str]], run=one_process, **variables: str) -> None:
    """What `accelerate launch` does for a script, for several runs of it."""
    ports = [free_port() for _ in runs]
    run_processes(run, processes, ports, runs, variables, processes=processes)


@pytest.fixture(scope="module")
def single(folder) -> Path:
    """Every case with one process."""
    for number, more in enumerate(CASES.values()):
        train_cada.main(arguments(folder, f"1_{number}", 1, *EXACT, *more, "--do_predict"))
    return folder


def assert_equal_runs(expected: Path, got: Path, steps: int = 6) -> None:
    """Losses of every step and weights after the last one to 1e-5, scores to the bit."""
    weights, others = (load_file(run / "model.safetensors") for run in (expected, got))
    assert set(weights) == set(others)
    start = load_file(expected.parent / "start" / "model.safetensors")
    assert max(float((weights[name] - start[name]).abs().max()) for name in weights) > 1e-3  # it has learned
    for name in weights:
        torch.testing.assert_close(
            others[name], weights[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    logs = [
        [
            {key: value for key, value in entry.items() if key.startswith("loss") or key == "grad_norm"}
            for entry in json.loads((run / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for run in (expected, got)
    ]
    assert len(logs[0]) == steps
    for one, other in zip(*logs, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    scores = [
        {
            name: value
            for name, value in json.loads((run / "test_results.json").read_text()).items()
            if "_R" in name or "_m" in name
        }
        for run in (expected, got)
    ]
    assert len(scores[0]) >= 5
    assert scores[0] == scores[1]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one(single, processes):
    runs = [
        arguments(single, f"{processes}_{number}", processes, *EXACT, *more, "--do_predict")
        for number, more in enumerate(CASES.values())
    ]
    run_in_processes(processes, runs)
    for number in range(len(CASES)):
        assert_equal_runs(single / f"1_{number}", single / f"{processes}_{number}")


def killed_process(
    rank: int, processes: int, ports: list[int], runs: list[list[str]], variables: dict[str, str]
) -> None:
    """The second process gets SIGNAL in the second evaluation, when it enters the function MOMENT."""
    name, calls = variables["MOMENT"], []
    function = getattr(cada.evaluation.matching, name)

    def counted(*args, **kwargs):
        calls.append(name)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.Signals[variables["SIGNAL"]])
        return function(*args, **kwargs)

    setattr(cada.evaluation.matching, name, counted)
    one_process(rank, processes, ports, runs, variables)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["encode_gallery", "match_candidates"])
def test_a_process_killed_in_an_evaluation(single, moment):
    """The other one does not wait for ever; the same command goes on from the last checkpoint to the same end."""
    run = arguments(single, f"killed_{moment}", 2, *EXACT, "--do_predict", "--resume_from_checkpoint", "last")
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        run_in_processes(2, [run], killed_process, MOMENT=moment, SIGNAL="SIGKILL")
    assert not (single / f"killed_{moment}" / "test_results.json").exists()
    assert [path.name for path in (single / f"killed_{moment}").glob("checkpoint-*")] == ["checkpoint-3"]
    run_in_processes(2, [run])
    assert_equal_runs(single / "1_0", single / f"killed_{moment}")


@pytest.mark.slow
def test_sigterm_to_one_process_in_an_evaluation(single):
    """Both end after the evaluation, at the same checkpoint, and neither waits for the other."""
    run = arguments(single, "terminated", 2, *EXACT, "--do_predict", "--resume_from_checkpoint", "last")
    run += ["--num_train_epochs", "3"]
    with pytest.raises(mp.ProcessExitedException, match="143"):
        run_in_processes(2, [run], killed_process, MOMENT="encode_gallery", SIGNAL="SIGTERM")
    assert (single / "terminated" / "checkpoint-6" / "trainer_state.json").is_file()
    run_in_processes(2, [run])
    train_cada.main([*arguments(single, "whole", 1, *EXACT, "--do_predict"), "--num_train_epochs", "3"])
    assert_equal_runs(single / "whole", single / "terminated", steps=9)


@pytest.mark.slow
def test_two_machines_equal_one(single):
    """Two launchers on this machine, with the configuration of the recipes, and two processes of each."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(RECIPES / "accelerate" / "two_machines.yaml"), "--num_processes", "4"]
    launch += ["--mixed_precision", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    run = [train_cada.__file__, *arguments(single, "machines", 4, *EXACT, "--do_predict"), "--ddp_backend", "gloo"]
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), *run],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        _, errors = machine.communicate(timeout=600)
        assert machine.returncode == 0, errors[-3000:]
    assert_equal_runs(single / "1_0", single / "machines")


def test_weights_and_batches_that_are_shared_out_are_refused(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(CADAError, match="every process holds all weights"):
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        train_cada.main(arguments(folder, "shared", 1))
    with pytest.raises(mp.ProcessRaisedException, match="--dataloader_drop_last false is for one process"):
        run_in_processes(2, [arguments(folder, "unequal", 2, "--dataloader_drop_last", "false")])


# Recipes


def test_accelerate_reads_the_configurations():
    """Every field is one that accelerate knows."""
    files = sorted((RECIPES / "accelerate").glob("*.yaml"))
    assert [file.stem for file in files] == ["one_machine", "two_machines"]
    for file in files:
        config = load_config_from_file(str(file))
        assert config.num_processes % config.num_machines == 0


def test_slurm_job_starts_a_launcher_on_each_machine(tmp_path):
    """With programs in place of SLURM and accelerate that print what they are told."""
    programs = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*"; fi',
        "srun": 'for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@" || exit; done',
        "accelerate": 'echo "$#: $*"',
    }
    for name, code in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nexport SLURM_NODEID\n{code}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "5"}
    command = ["bash", str(RECIPES / "slurm.sh"), "recipes/cuhk_pedes.json", "--data_dir", "/data/CUHK PEDES"]
    result = subprocess.run(
        command,
        env={**os.environ, **variables, "SLURM_JOB_NUM_NODES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        for part in (
            f"--num_machines 2 --num_processes 8 --machine_rank {rank} --main_process_ip node7",
            "train_cada.py recipes/cuhk_pedes.json --data_dir /data/CUHK PEDES --resume_from_checkpoint last",
        ):
            assert part in line
    assert lines[0].split(":")[0] == "17"  # the folder with a space is one argument


def test_slurm_job_passes_sigterm_on_and_queues_again(tmp_path):
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\nif [ "$1" = show ]; then echo node7; else echo "scontrol $*"; fi\n'
    )
    waiting = "trap 'echo saved; exit 143' TERM; echo started; while true; do sleep 0.1; done"
    (tmp_path / "srun").write_text(f"#!/bin/bash\n{waiting}\n")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "5"}
    process = subprocess.Popen(
        ["bash", str(RECIPES / "slurm.sh")],
        env={**os.environ, **variables, "SLURM_JOB_NUM_NODES": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert output.splitlines() == ["saved", "scontrol requeue 5"]
    assert process.returncode == 143
