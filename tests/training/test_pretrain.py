"""Pre-training on streamed pairs, then fine-tuning; interrupted, in several processes, with bad data."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import save_colour_set, save_tiny_start
from pair_files import save_parquet
from safetensors.torch import load_file
from test_distributed import EXACT, run_in_processes
from test_interruption import Stop, stop_at

import train_cada
from cada.files import CADAError, run_command
from cada.hub.card import model_card
from cada.hub.record import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A start with dropout, 40 pairs in four Parquet files, and the run `whole`, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("pretrain")
    save_tiny_start(folder / "start", initializer_range=0.2)
    save_parquet(folder / "pairs")
    train_cada.main(arguments(folder, "whole"))
    return folder


def arguments(folder: Path, output: str, *more: str, pairs: str = "pairs", batch: int = 8) -> list[str]:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return [
        *("--model_name_or_path", str(folder / "start"), "--dataset", str(folder / pairs), "--streaming"),
        *("--output_dir", str(folder / output), "--do_train", "--max_steps", "9", "--save_steps", "2"),
        *("--per_device_train_batch_size", str(batch), "--learning_rate", "5e-3", "--shuffle_buffer", "12"),
        *("--config_overrides", json.dumps({"text_config": dropout}), "--logging_steps", "1"),
        *("--use_cpu", "--disable_tqdm", "true", "--resume_from_checkpoint", "last", *more),
    ]


def assert_same_weights(folder: Path, output: str, other: str = "whole") -> None:
    whole, weights = (load_file(folder / name / "model.safetensors") for name in (other, output))
    start = load_file(folder / "start" / "model.safetensors")
    assert all(torch.equal(whole[name], weights[name]) for name in whole)
    assert not all(torch.equal(start[name], weights[name]) for name in start)


@pytest.mark.parametrize("steps", [(1, 3, 8), (5,)])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_stopped_and_resumed(folder, steps, workers, monkeypatch):
    """At any step, with and without workers that read ahead: the weights are those of a whole run, bit by bit."""
    output, more = f"stopped_{steps[0]}_{workers}", ("--dataloader_num_workers", workers)
    for step in steps:
        with monkeypatch.context() as patch, suppress(Stop):
            stop_at(patch, step, "on_step_end")
            train_cada.main(arguments(folder, output, *more))
    train_cada.main(arguments(folder, output, *more))
    assert_same_weights(folder, output)


def test_accumulated_batches_are_resumed(folder, monkeypatch):
    """Two batches a step: the stream goes on after twice as many."""
    more = ("--gradient_accumulation_steps", "2")
    train_cada.main(arguments(folder, "two_whole", *more))
    with monkeypatch.context() as patch, suppress(Stop):
        stop_at(patch, 5, "on_step_end")
        train_cada.main(arguments(folder, "two", *more))
    train_cada.main(arguments(folder, "two", *more))
    assert_same_weights(folder, "two", "two_whole")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_on_the_batches_of_one(folder, processes):
    """Also resumed with another number of them: at step 4 of 9 by one process."""
    plain = (*EXACT, "--config_overrides", "{}")
    train_cada.main(arguments(folder, f"one_{processes}", *plain))
    run = arguments(folder, f"several_{processes}", *plain, batch=8 // processes)
    run_in_processes(processes, [[*run, "--max_steps", "9"]])
    one, several = (load_file(folder / f"{name}_{processes}" / "model.safetensors") for name in ("one", "several"))
    for name in one:
        torch.testing.assert_close(several[name], one[name], atol=1e-5, rtol=0)
    checkpoint = folder / f"several_{processes}" / "checkpoint-8"
    assert len(list(checkpoint.glob("cada_stream_*.json"))) == processes
    again = [*arguments(folder, f"again_{processes}", *plain), "--resume_from_checkpoint", str(checkpoint)]
    train_cada.main(again)
    again = load_file(folder / f"again_{processes}" / "model.safetensors")
    for name in one:
        torch.testing.assert_close(again[name], one[name], atol=1e-5, rtol=0)


def test_another_stream_does_not_go_on(folder):
    for more, changed in {
        ("--shuffle_buffer", "13"): r"shuffle_buffer \(12, now 13\)",
        ("--caption_column", "caption", "caption"): r"caption_column \(caption, now caption caption\)",
        ("--person_column", "who"): r"person_column \(None, now who\)",
    }.items():
        with pytest.raises(CADAError, match=f"whole.*is of another training: .*{changed}"):
            train_cada.main(arguments(folder, "whole", *more))
    save_parquet(folder / "fewer", files=2, rows=39)
    with pytest.raises(CADAError, match=r"files of the stream \(4, now 2\), captions of its first rows \("):
        train_cada.main(arguments(folder, "whole", pairs="fewer"))


def test_pre_train_then_fine_tune(folder):
    """Two commands. The record of the second names what the first read; its card does, too."""
    save_colour_set(folder / "set", train=14, val=7, test=7)
    train_cada.main(
        [
            *("--model_name_or_path", str(folder / "whole"), "--dataset", str(folder / "set"), "--do_train"),
            *("--output_dir", str(folder / "tuned"), "--do_predict", "--num_train_epochs", "1", "--use_cpu"),
            *("--per_device_train_batch_size", "7", "--disable_tqdm", "true"),
        ]
    )
    run = read_run(folder / "whole")
    assert run["training"]["data"] == {"pairs": 72}
    assert "epochs" not in run["training"]["recipe"]
    assert run["training"]["recipe"]["columns"] == "image; caption; every image is a person of its own"
    card = str(model_card(folder / "whole", "me/whole", "main"))
    assert "| data | pairs (own data): 72 pairs |" in card and "| shuffle buffer | 12 |" in card
    tuned = read_run(folder / "tuned")
    assert tuned["origin"]["trained_on"] == {"pairs (own data)": 0} and len(tuned["evaluations"]) == 2


def test_the_record_says_how_many_pairs_were_left_out(folder, monkeypatch):
    """The same number where the training was interrupted; and in two processes."""
    save_parquet(folder / "damaged", damaged=(7, 21))
    train_cada.main(arguments(folder, "bad_whole", pairs="damaged"))
    run = read_run(folder / "bad_whole")["training"]
    left_out = run["recipe"]["unreadable_pairs_left_out"]
    assert 2 <= left_out <= 4 and run["data"] == {"pairs": 72 - left_out}  # 72 of 40 are nearly two passes
    assert f"| unreadable pairs left out | {left_out} |" in str(model_card(folder / "bad_whole", "me/x", "main"))
    with monkeypatch.context() as patch, suppress(Stop):
        stop_at(patch, 7, "on_step_end")
        train_cada.main(arguments(folder, "bad", pairs="damaged"))
    train_cada.main(arguments(folder, "bad", pairs="damaged"))
    assert read_run(folder / "bad")["training"]["recipe"] == run["recipe"]
    run_in_processes(2, [arguments(folder, "bad_two", *EXACT, pairs="damaged", batch=4)])
    assert read_run(folder / "bad_two")["training"]["data"] == run["data"]


def test_unreadable_images_are_named_and_end_the_training(folder, caplog, capsys):
    """In workers. Two of 40 are fewer than the ten that may be; with eleven the eleventh ends it."""
    save_parquet(folder / "two_damaged", damaged=(7, 21))
    more = ("--dataloader_num_workers", "1", "--max_steps", "5")
    train_cada.main(arguments(folder, "few", *more, pairs="two_damaged"))
    assert "Left out, 2 pairs of" in caplog.text and "7.png" in caplog.text and "21.png" in caplog.text
    damaged = tuple(range(1, 10))  # whatever the order, a batch of one comes upon them
    words = arguments(folder, "all", "--dataloader_num_workers", "1", pairs="one_file", batch=1)
    save_parquet(folder / "one_file", files=1, damaged=damaged)
    assert run_command(lambda: train_cada.main(words)) == 1
    assert "error: No pair of a batch can be read: " in capsys.readouterr().err
    save_parquet(folder / "many_damaged", damaged=tuple(range(1, 23, 2)))
    words = arguments(folder, "many", *more, pairs="many_damaged")
    capsys.readouterr()
    assert run_command(lambda: train_cada.main(words)) == 1
    error = capsys.readouterr().err
    assert re.search("error: 1[12] of [0-9]+ pairs cannot be read, more than 1 %", error)  # two may be in one batch


def test_a_stream_that_breaks_off_leaves_a_checkpoint(folder, capsys):
    """The files are gone after some steps; once they are back the same command ends as if nothing had been."""
    save_parquet(folder / "gone")
    train_cada.main(arguments(folder, "gone_whole", "--max_steps", "9", pairs="gone"))
    names = sorted((folder / "gone").iterdir())

    def read_files(names, suffix, other):
        for name in names:
            os.rename(f"{name}{suffix}", f"{name}{other}")

    class Remover(train_cada.StreamCollator):
        calls = 0

        def __call__(self, samples):
            Remover.calls += 1
            if Remover.calls == 3:
                read_files(names, "", ".away")
            return super().__call__(samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cada, "StreamCollator", Remover)
        assert run_command(lambda: train_cada.main(arguments(folder, "broken", pairs="gone"))) == 1
    error = capsys.readouterr().err
    assert "broke off after" in error and "--resume_from_checkpoint last" in error
    assert list((folder / "broken").glob("checkpoint-*")) != []
    read_files(names, ".away", "")
    train_cada.main(arguments(folder, "broken", pairs="gone"))
    assert_same_weights(folder, "broken", "gone_whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--do_predict",), "--streaming is for --do_train alone"),
        (("--max_steps", "-1"), "A stream has no epochs. Say by --max_steps how long to train"),
        (("--skip_unreadable",), "`skip_unreadable` has no place in a stream"),
        (("--shuffle_buffer", "0"), "--shuffle_buffer is 0. Give 1 or more"),
        (("--caption_column", "text"), "the column `text` is missing.*it has image, caption, who"),
        (("--streaming", "false", "--caption_column", "text"), "`caption_column` is for --streaming"),
    ],
)
def test_arguments_that_go_with_no_stream(folder, more, message):
    with pytest.raises(CADAError, match=message):
        train_cada.main(arguments(folder, "wrong", *more))


def test_the_recipe_of_a_pre_training(folder, tmp_path):
    """`recipes/pretrain.json` with what a reader adds, and small numbers."""
    recipe = str(Path(train_cada.__file__).parent / "recipes" / "pretrain.json")
    small = [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--bf16",
        "false",
        "--dataloader_num_workers",
        "0",
    ]
    small += ["--dataloader_persistent_workers", "false", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    start = ["--model_name_or_path", str(folder / "start"), "--dataset", str(folder / "pairs")]
    train_cada.main([recipe, *start, *small])
    assert read_run(tmp_path / "run")["training"]["recipe"]["shuffle_buffer"] == 10_000
