"""From what a training goes on, and from what it refuses to."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import Bomb, run_processes, save_tiny_start, small_disk
from datasets import load_from_disk
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_interruption import Stop, arguments, assert_same_end, folder, stop_at  # noqa: F401  # `folder` is a fixture
from transformers import TrainerCallback

import cada.training.trainer
import train_cada
from cada.files import CADAError, run_command
from cada.hub.record import read_run
from cada.training.trainer import CADATrainer


def without_resuming(words: list[str]) -> list[str]:
    place = words.index("--resume_from_checkpoint")
    return words[:place] + words[place + 2 :]


@pytest.fixture(scope="module")
def stopped_once(folder) -> Path:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch, suppress(Stop):
        stop_at(patch, 5, "on_step_end")
        train_cada.main(arguments(folder, "stopped", "epoch"))
    assert [path.name for path in (folder / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    return folder / "stopped"


@pytest.fixture
def stopped(folder, stopped_once, tmp_path) -> Path:  # noqa: F811
    """A copy of a run of three epochs that ended at step 5 of 9; its checkpoint is of step 3."""
    return Path(shutil.copytree(stopped_once, folder / tmp_path.name))


def test_a_new_training_leaves_the_checkpoints_of_another_alone(folder, stopped):  # noqa: F811
    with pytest.raises(CADAError, match=r"checkpoint-3 is there.*--resume_from_checkpoint last.*--output_dir"):
        train_cada.main(without_resuming(arguments(folder, stopped.name, "epoch")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rate", "1e-3"], r"learning_rate \(0.005, now 0.001\)"),
        (["--seed", "7", "--num_train_epochs", "2"], r"seed \(42, now 7\), num_train_epochs \(3.0, now 2.0\)"),
        (["--per_device_train_batch_size", "3"], r"batch \(6, now 3\)"),
        (["--metric_for_best_model", "global_mINP"], r"metric_for_best_model \(local_R1, now global_mINP\)"),
        (["--config_overrides", '{"rerank_k": 2}'], r"rerank_k \(3, now 2\)"),
        (
            ["--config_overrides", '{"vision_config": {"image_size": [48, 16]}}'],
            r"vision_config.image_size \(\[32, 16\]",
        ),
        (["--lr_scheduler_kwargs", '{"num_cycles": 3.5}'], "lr_scheduler_kwargs"),
        (["--model_name_or_path", "OTHER"], "weights at the start"),
        (["--dataset", "OTHER"], "17 images of train"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is no complete checkpoint"),
    ],
)
def test_another_training_does_not_go_on(folder, stopped, tmp_path, more, message):  # noqa: F811
    """Also where start or data have other content: `OTHER` stands for such a folder."""
    if more[-1] == "OTHER":
        more = [more[0], str(tmp_path / "other")]
        if more[0] == "--dataset":  # the same rows, in another order
            splits = load_from_disk(folder / "data")
            splits["train"] = splits["train"].select(range(16, -1, -1))
            splits.save_to_disk(more[1])
        else:
            save_tiny_start(Path(more[1]), initializer_range=0.1)
    with pytest.raises(CADAError, match=message):
        train_cada.main([*arguments(folder, stopped.name, "epoch"), *more])


def test_another_number_of_threads_goes_on_with_a_warning(folder, stopped, caplog):  # noqa: F811
    recipe = stopped / "checkpoint-3" / "cada_recipe.json"
    saved = json.loads(recipe.read_text(encoding="utf-8"))
    assert saved["threads"] == torch.get_num_threads()
    recipe.write_text(json.dumps({**saved, "threads": 64}), encoding="utf-8")
    train_cada.main(arguments(folder, stopped.name, "epoch"))
    warnings = [record.getMessage() for record in caplog.records if "threads" in record.getMessage()]
    assert len(warnings) == 1 and "was trained with 64 threads, this run has 1. Sums round" in warnings[0]
    assert json.loads((stopped / "checkpoint-9" / "cada_recipe.json").read_text(encoding="utf-8"))["threads"] == 1


def test_a_checkpoint_that_is_not_whole(folder, stopped):  # noqa: F811
    checkpoint = stopped / "checkpoint-3"
    (checkpoint / "optimizer.pt").rename(stopped / "kept")
    with pytest.raises(CADAError, match=r"lacks optimizer\.pt"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))
    (stopped / "kept").rename(checkpoint / "optimizer.pt")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CADAError, match=r"model\.safetensors is damaged.*another checkpoint"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "cada_recipe.json", "config.json"]
)
def test_damaged_files_of_a_checkpoint_are_named(folder, stopped, tmp_path, name):  # noqa: F811
    """Cut off, with code in it where it is a pickle, or gone: a line that names it, and no code is run."""
    path = stopped / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:-20])
    messages = []
    damages = [lambda: None, lambda: torch.save(Bomb(tmp_path / "marker"), path)]
    if name != "cada_recipe.json":  # without it the checkpoint is not complete
        damages.append(path.unlink)
    for damage in damages:
        damage()
        with pytest.raises(CADAError, match=name.replace(".", r"\.")) as error:
            train_cada.main(arguments(folder, stopped.name, "epoch"))
        messages.append(str(error.value))
    assert not (tmp_path / "marker").exists()
    assert all("weights_only=False" not in message for message in messages)
    assert all("another checkpoint" in message or "the folder of one" in message for message in messages)


def test_a_checkpoint_without_its_last_file_is_passed_over(folder, stopped, caplog):  # noqa: F811
    """As a killed run leaves it. The training begins where the one before it ended, and writes it anew."""
    unfinished = Path(shutil.copytree(stopped / "checkpoint-3", stopped / "checkpoint-6"))
    (unfinished / "cada_recipe.json").unlink()
    (unfinished / "rng_state_7.pth").write_bytes(b"of another number of processes")
    with pytest.raises(
        CADAError, match=r"checkpoint-6 is no complete checkpoint of a training: it has no cada_recipe"
    ):
        train_cada.main([*arguments(folder, stopped.name, "epoch"), "--resume_from_checkpoint", str(unfinished)])
    train_cada.main(arguments(folder, stopped.name, "epoch"))
    assert_same_end(folder, stopped.name, "epoch")
    assert not (unfinished / "rng_state_7.pth").exists()
    for checkpoint in stopped.glob("checkpoint-*"):
        (checkpoint / "cada_recipe.json").unlink()
    train_cada.main(arguments(folder, stopped.name, "epoch"))
    assert "holds no complete checkpoint to resume from: training starts at the beginning" in caplog.text
    assert_same_end(folder, stopped.name, "epoch")


def test_weights_that_a_checkpoint_lacks(folder, stopped):  # noqa: F811
    """Of the checkpoint itself, and of the best one, which a finished training would keep."""
    path = stopped / "checkpoint-3" / "model.safetensors"
    whole = path.read_bytes()
    weights = load_file(path)
    del weights["match_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CADAError, match=r"lack match_head\.weight"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))
    path.write_bytes(whole)
    train_cada.main(arguments(folder, stopped.name, "epoch"))
    best = Path(json.loads((stopped / "trainer_state.json").read_text())["best_model_checkpoint"])
    last = stopped / "checkpoint-9"
    (best / "model.safetensors").unlink()
    with pytest.raises(CADAError, match="best checkpoint so far is damaged" if best != last else "checkpoint-9"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))


def test_a_checkpoint_holds_the_record_of_its_run(folder, stopped):  # noqa: F811
    """So the licence of its start and the sets it was trained on are known to whoever goes on from it."""
    record = read_run(stopped / "checkpoint-3")
    assert record["origin"] == read_run(folder / "whole_epoch")["origin"]
    assert record["training"]["recipe"]["steps"] == 3 and record["evaluations"] == []


def test_one_training_at_a_time(folder, stopped):  # noqa: F811
    with FileLock(stopped / ".lock"), pytest.raises(CADAError, match="Another process is writing"):
        train_cada.main(arguments(folder, stopped.name, "epoch"))


def test_weights_that_are_no_numbers_are_not_saved(folder, stopped):  # noqa: F811
    words = [*arguments(folder, f"{stopped.name}_nan", "steps"), "--max_steps", "1", "--eval_strategy", "no"]
    words += ["--optim", "sgd", "--learning_rate", "1e38", "--max_grad_norm", "0", "--warmup_steps", "0"]
    with pytest.raises(CADAError, match="not finite after step 1"):
        train_cada.main(words)
    assert not (folder / f"{stopped.name}_nan" / "model.safetensors").exists()


def test_a_full_disk_at_the_end_leaves_the_old_model(folder, monkeypatch):  # noqa: F811
    """The last save, over an older model in the same folder: all is as before, its record too."""
    output = folder / "old_model"
    words = without_resuming(arguments(folder, output.name, "epoch"))
    words += ["--num_train_epochs", "1", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    train_cada.main(words)
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    save = CADATrainer.save_model

    def on_a_full_disk(self, *args, **kwargs):
        with small_disk(1000):
            save(self, *args, **kwargs)

    monkeypatch.setattr(CADATrainer, "save_model", on_a_full_disk)
    with pytest.raises(CADAError, match="cannot be written.*Nothing was replaced"):
        train_cada.main([*words, "--seed", "1"])
    after = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert after == before


def test_too_little_memory_ends_with_a_remedy(folder, monkeypatch):  # noqa: F811
    def training_step(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(CADATrainer, "training_step", training_step)
    with pytest.raises(CADAError, match="Step 1 failed: CUDA out of memory.*--activation_checkpointing"):
        train_cada.main(arguments(folder, "no_memory", "epoch"))


def test_a_lost_worker_ends_with_a_remedy(folder, monkeypatch):  # noqa: F811
    build = train_cada.PairCollator.__call__

    def killed(self, samples):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return build(self, samples)

    monkeypatch.setattr(train_cada.PairCollator, "__call__", killed)
    with pytest.raises(CADAError, match="Step 1 failed: DataLoader worker.*--dataloader_num_workers"):
        train_cada.main([*arguments(folder, "lost_worker", "epoch"), "--dataloader_num_workers", "1"])


def terminated_job(rank: int, words: list[str]) -> None:
    """A training in a session of its own, all processes of which get SIGTERM after the first step."""

    class Terminator(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.killpg(0, signal.SIGTERM)

    os.setsid()
    build = CADATrainer.__init__
    CADATrainer.__init__ = lambda self, *a, **k: (build(self, *a, **k), self.add_callback(Terminator()))[0]
    train_cada.main(words)


def test_sigterm_to_all_processes_of_a_job(folder):  # noqa: F811
    """As clusters send it: the workers of the data loader get it too, and outlive it. Then as a whole run."""
    output = folder / "job"
    words = [*arguments(folder, output.name, "steps"), "--dataloader_num_workers", "2"]
    words += ["--dataloader_persistent_workers", "true"]
    with pytest.raises(mp.ProcessExitedException, match="143"):
        run_processes(terminated_job, words, processes=1)
    assert list(output.glob("checkpoint-*"))
    train_cada.main(arguments(folder, output.name, "steps"))
    assert_same_end(folder, output.name, "steps")


def test_a_moved_output_folder(folder, stopped):  # noqa: F811
    """The best checkpoint is found in the new place; where it is gone, nothing else takes its place unsaid."""
    moved = stopped.rename(folder / f"{stopped.name}_moved")
    train_cada.main(arguments(folder, moved.name, "epoch"))
    assert_same_end(folder, moved.name, "epoch")
    state = json.loads((moved / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == moved
    shutil.rmtree(moved / best.name)
    with pytest.raises(CADAError, match=rf"{best.name}, is gone"):
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
    monkeypatch.setattr(cada.training.trainer, "rank_and_size", lambda: (0, 2))
    with pytest.raises(CADAError, match="2 processes were started.*--use_cpu --ddp_backend gloo"):
        train_cada.main(arguments(folder, "unknown", "epoch"))


def test_ctrl_c_ends_a_command_without_a_traceback(capfd):
    def interrupted():
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capfd.readouterr().err == "Interrupted.\n"
