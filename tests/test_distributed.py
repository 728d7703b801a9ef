"""Several processes train on the same numbers as one, through the command a researcher types."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import save_tiny_start
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file

import train_cada


COLOURS = ("red", "green", "blue", "black", "white", "yellow", "brown")
PAIRS = 19  # two batches of 8 and one of 3: of four processes, one gets nothing of the last batch
BATCH = 8
EXACT = ("--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant")
CASES = {
    "padded": (),
    "chunked": ("--chunk_size", "3"),
    "own length, dot": ("--config_overrides", '{"pool_padding": false, "hard_negative_similarity": "dot"}'),
    "cmpm alone": ("--config_overrides", '{"contrastive_loss": "cmpm", "use_atp": false, "use_ara": false}'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint `start` and a data set `data`."""
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_start(folder / "start")

    def rows(count: int) -> Dataset:
        people = [COLOURS[row % len(COLOURS)] for row in range(count)]
        sides = [Image.new("RGB", (16 + row, 32), colour) for row, colour in enumerate(people)]
        captions = [
            [f"a person in a {colour} coat" + " and grey trousers" * (row % 2)] for row, colour in enumerate(people)
        ]
        return Dataset.from_dict(
            {"image": sides, "captions": captions, "person_id": [row % 7 for row in range(count)]}
        )

    DatasetDict({"train": rows(PAIRS), "val": rows(9), "test": rows(11)}).save_to_disk(folder / "data")
    return folder


def arguments(folder: Path, output: str, processes: int, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "start"), "--dataset", str(folder / "data")),
        *("--output_dir", str(folder / output), "--per_device_train_batch_size", str(BATCH // processes)),
        *("--dataloader_drop_last", "false", "--num_train_epochs", "2", "--logging_steps", "1"),
        *("--per_device_eval_batch_size", "2", "--use_cpu", "--disable_tqdm", "true", "--do_train"),
        *more,
    ]


def one_process(rank: int, processes: int, port: int, runs: list[list[str]], variables: dict[str, str]) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ.update({**address, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables})
    for run in runs:
        train_cada.main([*run, "--ddp_backend", "gloo"])


def run_in_processes(processes: int, runs: list[list[str]], **variables: str) -> None:
    """What `accelerate launch` does for a script, for several runs of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_process, args=(processes, port, runs, variables), nprocs=processes)


@pytest.fixture(scope="module")
def single(folder) -> Path:
    """Every case with one process."""
    for number, more in enumerate(CASES.values()):
        train_cada.main(arguments(folder, f"1_{number}", 1, *EXACT, *more, "--do_predict"))
    return folder


def assert_equal_runs(expected: Path, got: Path) -> None:
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
    assert len(logs[0]) == 2 * 3
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
