"""A run that is interrupted, at any moment and in any way, ends with the weights of one that is not."""

import errno
import json
import os
import random
import shutil
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import count_calls, is_killed, save_colour_set, save_tiny_start
from safetensors.torch import load_file
from transformers import TrainerCallback

import cada.training.trainer
import train_cada
from cada.files import CADAError
from cada.training.trainer import CADATrainer


# Checkpoints at the end of an epoch of three steps, the best is kept; or every two steps, the last is kept.
STRATEGIES = {
    "epoch": ("--save_strategy", "epoch"),
    "steps": ("--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "false"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A start with dropout, a data set, and the runs `whole_epoch` and `whole_steps`, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("interruption")
    save_tiny_start(folder / "start", initializer_range=0.2)
    save_colour_set(folder / "data", train=17, val=9, test=11)
    for strategy in STRATEGIES:
        train_cada.main(arguments(folder, f"whole_{strategy}", strategy))
    return folder


def arguments(folder: Path, output: str, strategy: str) -> list[str]:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return [
        *("--model_name_or_path", str(folder / "start"), "--dataset", str(folder / "data")),
        *("--output_dir", str(folder / output), "--do_train", "--do_predict", "--num_train_epochs", "3"),
        *("--per_device_train_batch_size", "6", "--dataloader_drop_last", "false", "--learning_rate", "5e-3"),
        *("--config_overrides", json.dumps({"text_config": dropout}), "--negative_sampling", "annealed"),
        *("--logging_steps", "1", "--use_cpu", "--disable_tqdm", "true"),
        *("--resume_from_checkpoint", "last", *STRATEGIES[strategy]),
    ]


def assert_same_end(folder: Path, output: str, strategy: str) -> None:
    """The same weights to the bit, chosen by the same scores; and nothing half-written beside them."""
    runs = (folder / f"whole_{strategy}", folder / output)
    whole, other = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    start = load_file(folder / "start" / "model.safetensors")
    assert not all(torch.equal(whole[name], start[name]) for name in whole)
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in runs]
    scores = [[(entry["step"], entry["eval_local_R1"]) for entry in log if "eval_local_R1" in entry] for log in logs]
    if strategy == "epoch":  # else a checkpoint may come between the last step of an epoch and its evaluation
        assert scores[0] == scores[1]
        assert {step for step, _ in scores[0]} == {3, 6, 9}
    assert [path.name for path in runs[1].iterdir() if path.name.startswith(".")] == [".lock"]


class Stop(Exception):
    """The end of a process, in the middle of it."""


def stop_at(monkeypatch, step: int, event: str) -> None:
    """Make the next run end at `event` of `step`."""

    class Stopper(TrainerCallback):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Stop

    setattr(Stopper, event, stop)
    build = CADATrainer.__init__

    def build_with_stopper(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.add_callback(Stopper())

    monkeypatch.setattr(CADATrainer, "__init__", build_with_stopper)


@pytest.mark.parametrize(
    ("strategy", "event"),
    [
        *(("epoch", event) for event in ("on_step_begin", "on_step_end", "on_evaluate", "on_save")),
        *(("steps", event) for event in ("on_step_end", "on_save")),
    ],
)
def test_stopped_and_resumed(folder, strategy, event, monkeypatch):
    """Stopped in the first epoch, at its end, and within the second, which an interrupted evaluation precedes."""
    output = f"{strategy}_{event}"
    for step in (2, 3, 4):
        with monkeypatch.context() as patch, suppress(Stop):
            stop_at(patch, step, event)
            train_cada.main(arguments(folder, output, strategy))
    train_cada.main(arguments(folder, output, strategy))
    assert_same_end(folder, output, strategy)


WRITERS = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_is_complete_or_absent(folder, writer, monkeypatch):
    """The disk is full while the second checkpoint is written: the first one stays, and the run goes on from it."""
    write = getattr(CADATrainer, writer)

    def full(self, *args, **kwargs):
        write(self, *args, **kwargs)
        if self.state.global_step == 6 and self.is_in_train:
            raise OSError(errno.ENOSPC, "No space left on device")

    output = f"full_{writer}"
    with monkeypatch.context() as patch, pytest.raises(CADAError) as problem:
        patch.setattr(CADATrainer, writer, full)
        train_cada.main(arguments(folder, output, "epoch"))
    assert isinstance(problem.value, CADAError)
    for said in ("step 6", "No space left", "checkpoint-3", "--resume_from_checkpoint last"):
        assert said in str(problem.value)
    assert [path.name for path in (folder / output).glob("checkpoint-*")] == ["checkpoint-3"]
    train_cada.main(arguments(folder, output, "epoch"))
    assert_same_end(folder, output, "epoch")


def test_workers_change_no_number(folder):
    """Augmentation and masking follow from the row, whatever process draws them."""
    more = ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true"]
    train_cada.main([*arguments(folder, "workers", "epoch"), *more])
    assert_same_end(folder, "workers", "epoch")


def test_old_checkpoints_are_deleted(folder):
    """The best and the last are kept, `save_total_limit` of them."""
    state = json.loads((folder / "whole_epoch" / "trainer_state.json").read_text())
    kept = {path.name for path in (folder / "whole_epoch").glob("checkpoint-*")}
    assert kept >= {Path(state["best_model_checkpoint"]).name, "checkpoint-9"}
    assert len(kept) == 2


def test_one_checkpoint_is_the_best(folder, monkeypatch):
    """With a limit of 1 the last one goes at the end of training, by its name first."""
    deleted = []
    delete = cada.training.trainer.delete_checkpoint
    monkeypatch.setattr(
        cada.training.trainer,
        "delete_checkpoint",
        lambda path: (deleted.append(path.name) if path.exists() else None, delete(path)),
    )
    output = folder / "limit"
    train_cada.main([*arguments(folder, output.name, "epoch"), "--save_total_limit", "1"])
    state = json.loads((output / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"]).name
    assert [path.name for path in output.glob("checkpoint-*")] == [best]
    assert set(deleted) == {"checkpoint-3", "checkpoint-6", "checkpoint-9"} - {best}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("step", [1, 3])
def test_sigterm_saves_and_ends(folder, strategy, step, monkeypatch):
    """The signal comes within the step, at step 3 within the last of an epoch. 143 is what a shell makes of it."""

    class Terminator(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    output = f"sigterm_{strategy}_{step}"
    build = CADATrainer.__init__
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(
            CADATrainer, "__init__", lambda self, *a, **k: (build(self, *a, **k), self.add_callback(Terminator()))[0]
        )
        train_cada.main(arguments(folder, output, strategy))
    assert end.value.code == 143
    assert (folder / output / f"checkpoint-{step}" / "trainer_state.json").is_file()
    train_cada.main(arguments(folder, output, strategy))
    assert_same_end(folder, output, strategy)


def test_a_loss_that_is_not_finite_ends_training(folder, monkeypatch):
    """With the step, the losses and the pairs: here one image of a batch gives no numbers."""
    build = train_cada.PairCollator.__call__

    def damaged(self, samples):
        batch = build(self, samples)
        batch["pixel_values"][batch["pair"] == 4] = float("nan")
        return batch

    monkeypatch.setattr(train_cada.PairCollator, "__call__", damaged)
    with pytest.raises(CADAError) as problem:
        train_cada.main(arguments(folder, "nan", "epoch"))
    message = str(problem.value)
    assert "loss_ndf nan" in message and "(row 4, person 4, caption 1)" in message
    assert message.count("(row ") == 1


@pytest.mark.slow
def test_killed_at_random_moments(folder):
    """Twelve times, at any moment from the first line of the command to the last file."""
    draw, kills = random.Random(0), 0
    calls = count_calls(partial(train_cada.main, arguments(folder, "counted", "epoch")))
    run = partial(train_cada.main, arguments(folder, "killed", "epoch"))
    while kills < 12:
        if is_killed(run, draw.randint(1, calls), draw.uniform(1e-6, 0.01)):
            kills += 1
        else:
            assert_same_end(folder, "killed", "epoch")
            shutil.rmtree(folder / "killed")  # and again from the beginning
    run()
    assert_same_end(folder, "killed", "epoch")
