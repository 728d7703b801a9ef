"""From what a training goes on, and from what it refuses to."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_interruption import Stop, arguments, assert_same_end, folder, stop_at  # noqa: F401  # `folder` is a fixture
from transformers import TrainerCallback

import train_cada
from checkpoint_cada import CheckpointError
from files_cada import run_command
from publish_cada import read_run
from resume_cada import ResumeError
from trainer_cada import ArgumentError, CADATrainer


def without_resuming(words: list[str]) -> list[str]:
    place = words.index("--resume_from_checkpoint")
    return words[:place] + words[place + 2 :]


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A run of three epochs that ended at step 5 of 9; its checkpoint is of step 3."""
    output = folder / tmp_path.name
    with monkeypatch.context() as patch, suppress(Stop):
        stop_at(patch, 5, "on_step_end")
        train_cada.main(arguments(folder, output.name, "epoch"))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    return output


def test_a_new_training_leaves_the_checkpoints_of_another_alone(folder, stopped):  # noqa: F811
    with pytest.raises(ResumeError, match=r"checkpoint-3 is there.*--resume_from_checkpoint last.*--output_dir"):
        train_cada.main(without_resuming(arguments(folder, stopped.name, "epoch")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rate", "1e-3"], r"learning_rate \(0.005, now 0.001\)"),
        (["--seed", "7", "--num_train_epochs", "2"], r"seed \(42, now 7\), num_train_epochs \(3.0, now 2.0\)"),
        (["--per_device_train_batch_size", "3"], r"batch \(6, now 3\)"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint"),
    ],
)
def test_another_training_does_not_go_on(folder, stopped, more, message):  # noqa: F811
    with pytest.raises(ResumeError, match=message):
        train_cada.main([*arguments(folder, stopped.name, "epoch"), *more])


def test_a_checkpoint_that_is_not_whole(folder, stopped):  # noqa: F811
    checkpoint = stopped / "checkpoint-3"
    (checkpoint / "optimizer.pt").rename(stopped / "kept")
    with pytest.raises(ResumeError, match=r"lacks optimizer\.pt"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))
    (stopped / "kept").rename(checkpoint / "optimizer.pt")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))


def test_a_moved_output_folder(folder, stopped):  # noqa: F811
    """The best checkpoint is found in the new place; where it is gone, nothing else takes its place unsaid."""
    moved = stopped.rename(folder / f"{stopped.name}_moved")
    train_cada.main(arguments(folder, moved.name, "epoch"))
    assert_same_end(folder, moved.name, "epoch")
    state = json.loads((moved / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == moved
    shutil.rmtree(moved / best.name)
    with pytest.raises(ResumeError, match=rf"{best.name}, is gone"):
        train_cada.main(arguments(folder, moved.name, "epoch"))


def test_a_finished_training_is_finished(folder):  # noqa: F811
    """Four steps end within the second epoch of three. The same command trains no further, and reports the same."""
    words = [*arguments(folder, "finished", "steps"), "--max_steps", "4"]
    first = train_cada.main(words)
    weights, names = load_file(folder / "finished" / "model.safetensors"), os.listdir(folder / "finished")
    again = train_cada.main(words)
    assert all(
        (value == weights[name]).all() for name, value in load_file(folder / "finished/model.safetensors").items()
    )
    assert os.listdir(folder / "finished") == names
    assert read_run(folder / "finished")["training"]["recipe"]["steps"] == 4
    assert {name: again[name] for name in again if "_R" in name} == {
        name: first[name] for name in first if "_R" in name
    }


def test_sigterm_in_the_last_evaluation(folder, monkeypatch):  # noqa: F811
    """Status 143, and the same command ends as a whole run does."""

    class Terminator(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == 9:
                os.kill(os.getpid(), signal.SIGTERM)

    build = CADATrainer.__init__
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(
            CADATrainer, "__init__", lambda self, *a, **k: (build(self, *a, **k), self.add_callback(Terminator()))[0]
        )
        train_cada.main(arguments(folder, "last", "steps"))
    assert end.value.code == 143
    train_cada.main(arguments(folder, "last", "steps"))
    assert_same_end(folder, "last", "steps")


def test_the_record_is_there_before_an_evaluation_that_fails(folder, monkeypatch):  # noqa: F811
    def fail(*args, metric_key_prefix, **kwargs):
        raise OSError("the disk is gone")

    words = arguments(folder, "failed", "steps")
    monkeypatch.setattr(CADATrainer, "evaluate", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        train_cada.main([*words, "--eval_strategy", "no"])
    record = read_run(folder / "failed")
    assert record["training"]["recipe"]["steps"] == 9 and record["evaluations"] == []


def test_processes_that_the_trainer_does_not_know(folder, monkeypatch):  # noqa: F811
    """As with `accelerate launch --multi_gpu` on a machine without GPU: each would train on the same batch."""
    monkeypatch.setattr(train_cada, "rank_and_size", lambda: (0, 2))
    with pytest.raises(ArgumentError, match="2 processes were started.*--use_cpu --ddp_backend gloo"):
        train_cada.main(arguments(folder, "unknown", "epoch"))


def test_ctrl_c_ends_a_command_without_a_traceback(capfd):
    def interrupted():
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capfd.readouterr().err == "Interrupted.\n"
