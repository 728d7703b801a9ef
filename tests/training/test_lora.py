"""`--lora_rank`: what a run leaves, merged and alone, and where it goes on."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import run_code_of_a_reader, save_colour_set, save_tiny_start, tiny_batch
from safetensors.torch import load_file, save_file
from test_interruption import Stop, stop_at

import train_cada
from cada import cli
from cada.files import CADAError
from cada.gallery.index import open_index
from cada.hub.loading import load_model, model_digest
from cada.hub.record import RANDOM_START, checkpoint_digest, read_run, write_run
from modeling_cada import CADAForTextToImageRetrieval


LAYER = "cada.text_model.layers.1.cross_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A start with its record, a data set, and `run`, an adapter of rank 4 on it."""
    folder = tmp_path_factory.mktemp("lora")
    save_tiny_start(folder / "start", initializer_range=0.2)
    write_run(folder / "start", RANDOM_START, None, [])
    save_colour_set(folder / "data", train=18, val=7, test=7)
    train_cada.main(arguments(folder, "run"))
    return folder


@pytest.fixture(scope="module")
def merged(folder) -> Path:
    assert cli.main(["merge", str(folder / "run"), "--out", str(folder / "merged")]) == 0
    return folder / "merged"


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "start"), "--dataset", str(folder / "data"), "--lora_rank", "4"),
        *("--output_dir", str(folder / output), "--do_train", "--do_predict", "--num_train_epochs", "3"),
        *("--per_device_train_batch_size", "6", "--learning_rate", "5e-3", "--logging_steps", "1"),
        *("--use_cpu", "--disable_tqdm", "true", *more),
    ]


def outputs_of(model: CADAForTextToImageRetrieval) -> tuple[torch.Tensor, ...]:
    batch = tiny_batch()
    with torch.no_grad():
        outputs = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
        states = model.encode_images(batch["pixel_values"])
        match = model.match(batch["input_ids"], batch["attention_mask"], states)
    return outputs.image_embeds, outputs.text_embeds, model.local_score(match)


def test_a_run_leaves_an_adapter_and_leaves_its_base_alone(folder):
    run, start = folder / "run", load_model(folder / "start")
    for place in (run, *run.glob("checkpoint-*")):
        names = {path.name for path in place.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "cada_run.json"} < names
        assert not names & {"config.json", "model.safetensors", "training_args.bin"}
    model = load_model(run)
    assert type(model) is CADAForTextToImageRetrieval and not model.training
    weights, before = model.state_dict(), start.state_dict()
    assert torch.equal(weights[f"{LAYER}.base_layer.weight"], before[f"{LAYER}.weight"])
    saved = load_file(run / "adapter_model.safetensors")
    assert saved[f"base_model.model.{LAYER}.lora_A.weight"].shape == (4, 16)
    assert saved[f"base_model.model.{LAYER}.lora_B.weight"].abs().sum() > 0  # it was 0 at the start
    assert not torch.equal(saved["base_model.model.match_head.weight"], before["match_head.weight"])
    # Words and the output tied to them stay out: they are most of so small a model.
    assert sum(tensor.numel() for tensor in saved.values()) < sum(tensor.numel() for tensor in before.values()) / 50
    settings = json.loads((run / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"]) == (str(folder / "start"), 4)
    record = read_run(run)
    assert (record["training"]["start"], record["training"]["recipe"]["lora_rank"]) == ("start", 4)
    assert {row["weights"] for row in record["evaluations"]} == {model_digest(model)} == {checkpoint_digest(run)}
    assert model.config.calibration["set"] == "data (own data), val"


def test_merged_it_is_a_checkpoint_like_any_other(folder, merged):
    """W + 2 B A in a layer, the trained head in place of the old one; features and scores stay."""
    saved = load_file(folder / "run" / "adapter_model.safetensors")
    before, after = (load_file(place / "model.safetensors") for place in (folder / "start", merged))
    assert before.keys() == after.keys()
    low = (saved[f"base_model.model.{LAYER}.lora_{part}.weight"] for part in "BA")
    torch.testing.assert_close(after[f"{LAYER}.weight"], before[f"{LAYER}.weight"] + 2 * torch.matmul(*low))
    assert torch.equal(after["match_head.weight"], saved["base_model.model.match_head.weight"])
    alone, whole = load_model(folder / "run"), load_model(merged)
    for ours, theirs in zip(outputs_of(alone), outputs_of(whole)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert whole.config.calibration == alone.config.calibration
    record = read_run(merged)
    assert record["training"]["recipe"]["lora_merged"] and record["evaluations"] == []  # those are of other weights
    assert record["origin"] == read_run(folder / "run")["origin"] == RANDOM_START
    metrics = []
    for place in (folder / "run", merged):
        command = ["--model_name_or_path", str(place), "--output_dir", str(folder / f"again_{place.name}")]
        command += ["--dataset", str(folder / "data"), "--do_predict", "--use_cpu", "--disable_tqdm", "true"]
        metrics.append(train_cada.main(command))
    scores = [name for name in metrics[0] if "global_" in name or "local_" in name]
    assert len(scores) == 10
    assert {name: metrics[0][name] for name in scores} == pytest.approx({s: metrics[1][s] for s in scores}, abs=1e-5)


def test_an_interrupted_run_ends_with_the_same_adapter(folder):
    """At step 5 of 9, after the checkpoint of step 3; the best of both is kept at the end."""
    with pytest.MonkeyPatch.context() as patch, suppress(Stop):
        stop_at(patch, 5, "on_step_end")
        train_cada.main(arguments(folder, "stopped"))
    assert [path.name for path in (folder / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    with pytest.raises(CADAError, match=r"lora_rank \(4, now 2\)"):
        train_cada.main(arguments(folder, "stopped", "--resume_from_checkpoint", "last", "--lora_rank", "2"))
    train_cada.main(arguments(folder, "stopped", "--resume_from_checkpoint", "last", "--activation_checkpointing"))
    whole, other = (load_file(folder / run / "adapter_model.safetensors") for run in ("run", "stopped"))
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    states = [json.loads((folder / run / "trainer_state.json").read_text()) for run in ("run", "stopped")]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]


READER = """
import json, sys
import torch
from peft import PeftModel
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

adapter, start = sys.argv[1:]
processor = AutoProcessor.from_pretrained(adapter, trust_remote_code=True)
inputs = processor(images=Image.open("first.jpg"), text=["a red coat"], return_tensors="pt")
models = [AutoModel.from_pretrained(adapter, trust_remote_code=True)]
models.append(PeftModel.from_pretrained(AutoModel.from_pretrained(start, trust_remote_code=True), adapter))
with torch.no_grad():
    for model in models:
        outputs = model.eval()(**inputs)
        print(json.dumps([*outputs.text_embeds[0].tolist(), *outputs.image_embeds[0].tolist()]))
print(json.dumps(models[0].config.calibration))
encoder = SentenceTransformer(adapter, trust_remote_code=True)
print(json.dumps([*encoder.encode("a red coat").tolist(), *encoder.encode("first.jpg").tolist()]))
"""


def test_others_load_it_as_any_adapter(folder, tmp_path):
    """transformers, PEFT and sentence-transformers, in a process that has none of our modules."""
    start = Path(shutil.copytree(folder / "start", tmp_path / "start"))
    config = json.loads((start / "config.json").read_text())
    fitted = {"weights": [1.0, 1.0, 0.0], "set": "of the base"}  # not of the adapter
    (start / "config.json").write_text(json.dumps(config | {"calibration": fitted}))
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(start)}))
    code = f"import sys\nsys.argv[1:] = {[str(run), str(start)]}\n{READER}"
    by_auto, by_peft, calibration, by_sentence_transformers = run_code_of_a_reader(code, tmp_path)
    assert by_auto == pytest.approx(by_peft, abs=1e-6)
    assert by_auto == pytest.approx(by_sentence_transformers, abs=1e-6)
    assert calibration is None
    assert load_model(run).config.calibration["set"] == "data (own data), val"


def test_an_index_is_made_and_searched_with_it(folder, tmp_path, capsys):
    run, index = str(folder / "run"), str(tmp_path / "index")
    assert cli.main(["index", str(folder / "data"), "--split", "test", "--out", index, "--model", run]) == 0
    assert cli.main(["search", index, "a red coat", "--min-probability", "0"]) == 0
    assert cli.main(["info", index]) == 0
    output = capsys.readouterr().out
    assert f"model             {run}" in output and "probability" in output and "weights from      random w" in output
    expected = load_model(run)
    assert torch.equal(
        open_index(index).model.state_dict()[f"{LAYER}.lora_A.default.weight"],
        expected.state_dict()[f"{LAYER}.lora_A.default.weight"],
    )


def test_calibration_is_kept_beside_the_adapter(folder, tmp_path, capsys):
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    base = json.loads((run / "cada_adapter.json").read_text())["base"]
    assert cli.main(["calibrate", str(run), "--dataset", str(folder / "data"), "--split", "test"]) == 0
    assert f"Wrote {run / 'cada_adapter.json'}." in capsys.readouterr().out
    record = json.loads((run / "cada_adapter.json").read_text())
    assert record["base"] == base == model_digest(load_model(folder / "start"))
    assert load_model(run).config.calibration == record["calibration"]


def test_a_whole_training_takes_the_place_of_an_adapter_and_the_other_way_round(folder, tmp_path):
    place = shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    steps = ["--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    words = arguments(folder, "", "--output_dir", str(place), *steps)
    rank = words.index("--lora_rank")
    for command, holds in ((words[:rank] + words[rank + 2 :], "model"), (words, "adapter_model")):
        train_cada.main(command)
        assert [path.name for path in place.glob("*.safetensors")] == [f"{holds}.safetensors"]
        assert load_model(place)._hf_peft_config_loaded == (holds != "model")


def damaged(run: Path, start: Path, case: str) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    if case == "other base":
        save_tiny_start(start, initializer_range=0.1)
    elif case == "no base":
        shutil.rmtree(start)
    elif case == "no name":
        (run / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    elif case == "code":
        own = {"megatron_config": {"a": 1}, "megatron_core": "evil"}
        settings = json.loads((run / "adapter_config.json").read_text())
        (run / "adapter_config.json").write_text(json.dumps(settings | own))
    elif case == "record":
        (run / "cada_adapter.json").write_text("[]")
    elif case == "pickle":
        (run / "adapter_model.safetensors").unlink()
        torch.save(weights, run / "adapter_model.bin")
    elif case == "cut off":
        content = (run / "adapter_model.safetensors").read_bytes()
        (run / "adapter_model.safetensors").write_bytes(content[:-9])
    else:
        first = sorted(weights)[0]
        weights = {
            "lacking": {name: tensor for name, tensor in weights.items() if name != first},
            "other rank": {**weights, first: torch.cat([weights[first]] * 2)},
            "NaN": {**weights, first: weights[first] * torch.nan},
        }[case]
        save_file(weights, run / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other base", "start holds other weights than those that .*run was trained on. Bring them back"),
        ("no base", "The base of the adapter .*run does not load: .*start"),
        ("no name", "adapter_config.json names no base_model_name_or_path"),
        ("code", "adapter_config.json is of another adapter than LoRA. Merge it by PEFT"),
        ("record", "cada_adapter.json is damaged. Fetch or save"),
        ("pickle", "holds no weights in safetensors form. adapter_model.bin is a pickle, which is not read"),
        ("cut off", "adapter_model.safetensors is damaged"),
        ("lacking", "The adapter .*run does not fit .*start: .*lora_A.* is missing"),
        ("other rank", "The adapter .*run does not fit .*start: "),
        ("NaN", "hold NaN or infinite numbers in .*lora_A"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_named(folder, tmp_path, case, message):
    start = Path(shutil.copytree(folder / "start", tmp_path / "start"))
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(start)}))
    damaged(run, start, case)
    with pytest.raises(CADAError, match=message):
        load_model(run)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_rank", "0"], "--lora_rank is 0. Give 1 or more"),
        (["--config_overrides", '{"rerank_k": 2}'], "has the configuration of its base: leave --config_overrides out"),
        (["--do_train", "false"], "--lora_rank goes with --do_train"),
        (["--push_to_hub"], "nobody else has .*start, on which the adapter rests"),
        (["--model_name_or_path", "RUN"], "is an adapter. To train on, merge it first: cada merge .*run --out FOLDER"),
    ],
)
def test_what_does_not_go_with_an_adapter(folder, tmp_path, more, message):
    more = [str(folder / "run") if word == "RUN" else word for word in more]
    with pytest.raises(CADAError, match=message):
        train_cada.main(arguments(folder, "", "--output_dir", str(tmp_path), *more))


def test_what_cannot_be_merged_or_published(folder, merged, capsys):
    run = str(folder / "run")
    for command, message in (
        (["merge", run, "--out", str(folder / "start")], "start holds files already. Choose a new folder"),
        (["merge", str(merged), "--out", str(folder / "new")], "is no adapter: it has no adapter_config.json"),
        (["publish", run, "org/name", "--card-only"], "which nobody else has. Publish what `cada merge` makes"),
    ):
        assert cli.main(command) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["publish", str(merged), "org/name", "--card-only"]) == 0
    assert "Trained by LoRA (rank 4); the adapter is merged into the weights." in (merged / "README.md").read_text()
