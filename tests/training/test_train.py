"""Training through the command a researcher types, on the sets of the field in their authors' layout."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_colour_set, save_tiny_start, training_command
from datasets import Dataset, DatasetDict
from pedes_layout import LAYOUTS
from PIL import Image
from transformers import HfArgumentParser, TrainerState

import train_cada
from cada.data.pedes import PEDES_SETS
from cada.files import CADAError, run_command
from cada.hub.card import model_card
from cada.hub.record import RANDOM_START, after_training, read_run, write_run
from cada.training.arguments import CADATrainingArguments, DataArguments, ModelArguments, read_overrides, read_recipe
from cada.training.describe import check_hold_out, describe_training, name_of_set
from cada.training.start import count_long_captions, make_model_and_processor
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval


ROOT = Path(train_cada.__file__).parent


@pytest.mark.parametrize("dataset", list(LAYOUTS))
def test_each_set_trains_and_evaluates(dataset, start, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    LAYOUTS[dataset](data_dir)
    output = tmp_path / "run"
    arguments = training_command(start, output, dataset, data_dir, "--do_train", "--do_eval", "--do_predict")
    metrics = train_cada.main([*arguments, "--holdout_persons", "2"])

    queries = {
        "cuhk_pedes": (12, 16),
        "icfg_pedes": (6, 9),
        "rstp_reid": (12, 12),
        "ufine6926": (12, 18),
        "prw_tbps": (6, 8),
    }[dataset]
    assert (metrics["eval_queries"], metrics["test_queries"]) == queries
    names = [f"{stage}_{name}" for stage in ("global", "local") for name in ("R1", "R5", "R10", "mAP", "mINP")]
    assert all(0 <= metrics[f"test_{name}"] <= 100 for name in names)

    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert steps
    for entry in steps:
        total = entry["loss_ndf"] + entry["loss_atp"] + 0.1 * entry["loss_ara"]
        assert entry["loss"] == pytest.approx(total, rel=1e-3)
        assert entry["learning_rate"] > 0 or entry is steps[-1]
    assert [entry["epoch"] for entry in history if "eval_local_R1" in entry] == [1, 2, 2]
    # Test is reported once, and nothing was chosen by it.
    assert sum("test_local_R1" in entry for entry in history) == 1
    assert json.loads((output / "test_results.json").read_text())["test_local_R1"] == metrics["test_local_R1"]

    # What was saved is the checkpoint that was evaluated.
    best = max(entry["eval_local_R1"] for entry in history if "eval_local_R1" in entry)
    assert metrics["eval_local_R1"] == best
    again = [*("--model_name_or_path", str(output), "--output_dir", str(tmp_path / "again"), "--do_predict")]
    repeated = train_cada.main([*again, "--dataset", dataset, "--data_dir", str(data_dir), "--disable_tqdm", "true"])
    assert {name: repeated[f"test_{name}"] for name in names} == {name: metrics[f"test_{name}"] for name in names}


def test_without_validation_the_last_checkpoint_is_kept(start, tmp_path, caplog):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    LAYOUTS["icfg_pedes"](data_dir)
    metrics = train_cada.main(
        training_command(
            start, tmp_path / "run", "icfg_pedes", data_dir, "--do_train", "--do_predict", "--holdout_persons", "0"
        )
    )
    assert "eval_local_R1" not in metrics
    assert metrics["test_queries"] == 9
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert not any("eval_local_R1" in entry for entry in history)


def test_accelerate_launch_runs_the_same_script(start, tmp_path):
    """Two processes: the test scores are those of one process that loads what they saved."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    LAYOUTS["rstp_reid"](data_dir)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", str(ROOT / "train_cada.py")]
    arguments = training_command(start, tmp_path / "run", "rstp_reid", data_dir, "--do_train", "--do_predict")
    command = [*launch, *arguments, "--use_cpu", "--ddp_backend", "gloo"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((tmp_path / "run" / "test_results.json").read_text())
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * (36 // 12)  # 36 pairs, 6 per process and step, two epochs
    again = [*("--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "again"))]
    repeated = train_cada.main([*again, "--do_predict", "--dataset", "rstp_reid", "--data_dir", str(data_dir)])
    assert repeated["test_local_mAP"] == pytest.approx(scores["test_local_mAP"])


def test_training_learns(tmp_path):
    """Seven colours: the contrastive loss falls to a tenth and less, and all sentences find their person."""
    start = save_tiny_start(tmp_path / "start", initializer_range=0.2)
    save_colour_set(tmp_path / "data", train=35, val=7, test=14)
    metrics = train_cada.main(
        [
            *("--model_name_or_path", str(start), "--dataset", str(tmp_path / "data")),
            *("--output_dir", str(tmp_path / "run"), "--do_train", "--do_predict", "--disable_tqdm", "true"),
            *("--num_train_epochs", "25", "--per_device_train_batch_size", "7", "--logging_steps", "5"),
            *("--learning_rate", "5e-3", "--warmup_steps", "0.1", "--max_grad_norm", "5"),
            *("--negative_sampling", "annealed", "--eval_strategy", "no"),
            *("--load_best_model_at_end", "false", "--save_strategy", "no"),
        ]
    )
    assert (metrics["test_global_R1"], metrics["test_local_R1"]) == (100, 100)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss_ndf"] for entry in history if "loss_ndf" in entry]
    assert losses[-1] < losses[0] / 10
    # The seven persons of train are those of the other splits; the record says so, and the model card with it.
    recipe = read_run(tmp_path / "run")["training"]["recipe"]
    assert (recipe["persons_of_train_also_in_val"], recipe["persons_of_train_also_in_test"]) == (7, 7)
    temperatures = [entry["negative_temperature"] for entry in history if "loss_ndf" in entry]
    assert temperatures == sorted(temperatures, reverse=True)


def test_checkpoint_starts_with_another_image_size(start):
    """Images of 32×16 in patches of 8 become 48×16: four rows of positions become six; the others are loaded."""
    overrides = '{"vision_config": {"image_size": [48, 16]}}'
    model, processor = make_model_and_processor(ModelArguments(str(start), config_overrides=overrides))
    old = CADAForTextToImageRetrieval.from_pretrained(start)
    assert processor.image_processor.size == {"height": 48, "width": 16}
    inputs = processor(images=Image.new("RGB", (20, 50), "red"), text=["a man"], return_tensors="pt")
    assert model(**inputs).vision_model_output.last_hidden_state.shape[1] == 1 + 6 * 2
    positions = old.cada.vision_model.embeddings.position_embedding
    grid = positions[:, 1:].reshape(1, 4, 2, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 2), mode="bicubic").flatten(2).transpose(1, 2)
    got = dict(model.named_parameters())
    torch.testing.assert_close(got["cada.vision_model.embeddings.position_embedding"][:, 1:], expected)
    for name, value in old.named_parameters():
        assert name.endswith("position_embedding") or torch.equal(got[name], value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--do_trian"], "--do_trian"),
        (["--config_overrides", '{"temperature": 1'], "is not JSON"),
        (["--config_overrides", '{"group_size": 500}'], "group_size"),
        (["--config_overrides", '{"vision_config": 5}'], "`vision_config` should be an object"),
        (["--dataset", "rstp_ried"], "Do you mean rstp_reid"),
        (["--accelerator_config", "no_such_file"], "no_such_file"),
        (["--vocabulary_head", "captions"], "goes with --init_from"),
    ],
)
def test_mistakes_of_the_command_line_are_named_in_a_line(start, tmp_path, more, message, capfd):
    words = [*training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train"), *more]
    try:
        status = run_command(lambda: train_cada.main(words))
    except SystemExit as end:  # of the parser of arguments
        status = end.code
    assert status == 1
    last = capfd.readouterr().err.strip().split("error: ")[-1]
    assert message in last and len(last) < 800 and "Traceback" not in last


def test_a_mistake_ends_the_program_with_a_line(tmp_path, monkeypatch, capfd):
    words = training_command(tmp_path / "none", tmp_path / "run", "rstp_reid", tmp_path, "--do_train")
    monkeypatch.setattr(sys, "argv", [train_cada.__file__, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(train_cada.__file__, run_name="__main__")
    errors = capfd.readouterr().err
    assert end.value.code == 1
    assert "Traceback" not in errors
    last = errors.strip().split("error: ")[-1]
    assert f"The configuration of {tmp_path / 'none'} cannot be used: " in last and len(last) < 800


def test_held_out_persons_are_compared_by_the_recorded_name_of_the_set():
    trained = {"dataset": "mine (own data)", "recipe": {"persons_held_out_of_train": 5}}
    record = {"origin": {**RANDOM_START, "trained_on": {"cuhk_pedes": 0}}, "training": trained}
    check_hold_out(record, "mine (own data)", 5)
    check_hold_out(record, "mine (own data)", 4)
    check_hold_out(record, "icfg_pedes", 200)
    check_hold_out({"origin": RANDOM_START, "training": None}, "icfg_pedes", 200)
    with pytest.raises(CADAError, match="Pass --holdout_persons 5"):
        check_hold_out(record, "mine (own data)", 7)


def test_overrides_from_text_or_file(tmp_path):
    assert read_overrides('{"mask_rate": 0.4}') == {"mask_rate": 0.4}
    (tmp_path / "fields.json").write_text('{"mask_rate": 0.3}')
    assert read_overrides(str(tmp_path / "fields.json")) == {"mask_rate": 0.3}
    assert read_overrides(None) == {}
    for text, message in (
        ("nowhere.json", "neither a JSON object nor a file"),
        ("{a", "is not JSON"),
        ('{"mask_rte": 1}', "no field mask_rte"),
    ):
        with pytest.raises(ValueError, match=message):
            read_overrides(text)


def test_overrides_reach_model_and_processor(start):
    overrides = (
        '{"mask_unit": "word", "mask_rate": 0.4, "text_config": {"hidden_dropout_prob": 0.3}, "use_ara": false}'
    )
    model, processor = make_model_and_processor(ModelArguments(str(start), config_overrides=overrides))
    assert model.config.text_config.hidden_dropout_prob == 0.3
    assert model.config.text_config.vocab_size == 30524
    assert not hasattr(model, "vocabulary_head")
    assert (processor.attribute_masker.unit, processor.attribute_masker.rate) == ("word", 0.4)


def test_new_model_agrees_with_its_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    overrides = json.dumps({"vision_config": {**tower, "image_size": [64, 32]}, "text_config": tower})
    model, processor = make_model_and_processor(
        ModelArguments(tokenizer_name=str(tmp_path), config_overrides=overrides)
    )
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == 30524
    assert model.config.text_config.enc_token_id == processor.enc_token_id == 30523
    assert processor.image_processor.size == {"height": 64, "width": 32}
    assert processor.tokenizer.model_max_length == 73


def test_nothing_to_do_says_so(start, tmp_path):
    with pytest.raises(ValueError, match="--do_train, --do_eval or --do_predict"):
        train_cada.main(training_command(start, tmp_path / "run", "rstp_reid", tmp_path))


def test_batch_larger_than_the_set(start, tmp_path):
    LAYOUTS["rstp_reid"](tmp_path)
    arguments = training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train")
    with pytest.raises(ValueError, match="36 pairs, less than one batch of 37"):
        train_cada.main([*arguments, "--per_device_train_batch_size", "37"])


def test_damaged_data_end_the_command_with_one_line(start, tmp_path, capfd):
    words = training_command(start, tmp_path / "run", "cuhk_pedes", tmp_path / "nowhere", "--do_train")
    assert run_command(lambda: train_cada.main(words)) == 1
    errors = capfd.readouterr().err
    assert errors.splitlines()[-1].startswith(f"error: The data folder {tmp_path / 'nowhere'} does not exist")
    assert "Traceback" not in errors


def test_image_that_breaks_during_training_is_named(start, tmp_path):
    LAYOUTS["rstp_reid"](tmp_path)
    name = json.loads((tmp_path / "data_captions.json").read_text())[3]["img_path"]
    content = (tmp_path / "imgs" / name).read_bytes()
    (tmp_path / "imgs" / name).write_bytes(content[: len(content) // 2])
    arguments = training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train")
    with pytest.raises(CADAError, match=f"image '{name}' in row 3 cannot be decoded"):
        train_cada.main(arguments)
    metrics = train_cada.main([*arguments, "--skip_unreadable", "--do_predict"])
    assert metrics["test_queries"] == 12


def test_long_captions_are_counted(processor):
    """13 tokens fit: [CLS], eleven words, [SEP]."""
    rows = [["a man", "red " * 12], ["red " * 11], ["red " * 30]]
    assert count_long_captions({"captions": rows}, processor) == 2


def test_recipe_is_a_file_of_arguments(tmp_path):
    """The recipes of the repository parse to the paper's settings; what stands behind a recipe counts more."""
    parser = HfArgumentParser((ModelArguments, DataArguments, CADATrainingArguments))
    for path in (ROOT / "recipes" / f"{name}.json" for name in PEDES_SETS):
        more = ["--data_dir", "elsewhere", "--use_cpu", "--bf16", "false"]
        model, data, args = parser.parse_args_into_dataclasses([*read_recipe(str(path), more), *more])
        assert data.dataset == path.stem and data.data_dir == "elsewhere"
        assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (1e-5, 40, 96)
        assert data.captions_per_image == (2 if path.stem == "cuhk_pedes" else None)
        assert model.init_source == "blip_original" and model.init_from
        # UFine6926 has 80 words, four groups; who has no validation split holds some persons out.
        assert CADAConfig(**model.config_overrides).num_groups == (4 if path.stem == "ufine6926" else 2)
        assert data.holdout_persons == (50 if path.stem == "prw_tbps" else 200)
        # A checkpoint on the command line takes the place of the recipe's start.
        assert "--init_from" not in read_recipe(str(path), ["--model_name_or_path", "runs/x"])
        assert "--init_from" not in read_recipe(str(path), ["--model_name_or_path=runs/x"])
    (tmp_path / "bad.json").write_text("[1]")
    for name, message in (("bad.json", "JSON object of arguments"), ("none.json", "does not exist")):
        with pytest.raises(CADAError, match=message):
            read_recipe(str(tmp_path / name), [])


def test_recipe_runs(start, tmp_path):
    LAYOUTS["rstp_reid"](tmp_path)
    recipe = {"dataset": "rstp_reid", "init_from": "nowhere.pth", "do_predict": True, "captions_per_image": None}
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "config_overrides": {"rerank_k": 2}}))
    arguments = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    metrics = train_cada.main([str(tmp_path / "recipe.json"), "--model_name_or_path", str(start), *arguments])
    assert (metrics["test_queries"], metrics["test_rerank_k"]) == (12, 2)


def test_typing_errors_inside_the_towers_are_named():
    with pytest.raises(CADAError, match="CADATextConfig has no field dropout"):
        read_overrides('{"text_config": {"dropout": 0.3}}')
    with pytest.raises(CADAError, match="CADAConfig has no field mask_ratio"):
        read_overrides('{"mask_ratio": 0.3}')


def test_one_process_with_several_gpus_is_refused(start, tmp_path, monkeypatch):
    """`Trainer` would fall back to DataParallel, where every replica sees its own part of the batch only."""
    monkeypatch.setattr(CADATrainingArguments, "n_gpu", 2)
    with pytest.raises(CADAError, match="One process sees 2 GPUs. Start one process for each"):
        train_cada.main(training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_predict"))


@pytest.mark.parametrize("instructions", [False, True])
def test_bf16_without_its_instructions_is_said_at_the_start(instructions, start, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train_cada, "cpu_has_bfloat16", lambda: instructions)
    words = training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train", "--bf16", "--use_cpu")
    with pytest.raises(CADAError, match="data_captions.json"):  # there is no data; the line comes before
        train_cada.main(words)
    lines = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    remedy = "This processor has no instructions for bfloat16: --bf16 is slower than float32. Add --bf16 false;"
    assert len(lines) == (not instructions) and all(line.startswith(remedy) for line in lines)


def test_persons_of_the_training_are_no_validation_set(start, tmp_path):
    """A model trained on all persons of ICFG-PEDES: the ones held out later are not unseen."""
    LAYOUTS["icfg_pedes"](tmp_path)
    train_cada.main(
        training_command(start, tmp_path / "run", "icfg_pedes", tmp_path, "--do_train", "--holdout_persons", "0")
    )
    again = training_command(tmp_path / "run", tmp_path / "again", "icfg_pedes", tmp_path, "--holdout_persons", "2")

    def assert_refused():
        for task in ("--do_eval", "--do_train"):
            with pytest.raises(CADAError, match="on icfg_pedes held out 0 only.* --do_predict alone"):
                train_cada.main([*again, task])

    assert_refused()
    record = read_run(tmp_path / "run")  # as if trained on CUHK-PEDES after that
    write_run(tmp_path / "run", after_training(record), {**record["training"], "dataset": "cuhk_pedes"}, [])
    assert_refused()


def test_recipe_in_the_record_names_what_was_given(tmp_path):
    """The fields of --config_overrides, not the name of their file."""
    (tmp_path / "fields.json").write_text('{"mask_rate": 0.4}')
    splits = DatasetDict(train=Dataset.from_dict({"person_id": [1, 1, 2], "captions": [["a"], ["b", "c"], ["d"]]}))
    state = TrainerState(epoch=1.0, global_step=3)
    more = {"data_seed": 0, "adam_beta2": 0.98, "muon_learning_rate": 0.02}
    recipes = []
    for overrides, given in ((None, {}), (str(tmp_path / "fields.json"), more)):
        model, data = ModelArguments(config_overrides=overrides), DataArguments("org/set")
        args = CADATrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
        training = describe_training(model, data, args, splits, 0, state)
        assert training["seed"] == 42 and training["data"] == {"persons": 2, "images": 3, "pairs": 4}
        recipes.append(training["recipe"])
    assert {name: value for name, value in recipes[1].items() if recipes[0].get(name) != value} == {
        **more,
        "config_overrides": {"mask_rate": 0.4},
    }


def test_an_evaluation_needs_its_own_split_alone(start, tmp_path):
    """Images and captions of the others are not looked at; a split that is needed and not there is named."""
    LAYOUTS["rstp_reid"](tmp_path)
    for record in json.loads((tmp_path / "data_captions.json").read_text()):
        if record["split"] != "test":
            (tmp_path / "imgs" / record["img_path"]).unlink()
    words = training_command(start, tmp_path / "run", "rstp_reid", tmp_path)
    assert train_cada.main([*words, "--do_predict"])["test_queries"] == 12
    for more, split in (("--do_eval", "val"), ("--do_train", "train")):
        with pytest.raises(CADAError, match=f"split '{split}': .* is missing"):
            train_cada.main([*words, more])
    own = str(save_colour_set(tmp_path / "own", test=7))
    words = ["--model_name_or_path", str(start), "--output_dir", str(tmp_path / "run"), "--dataset", own]
    assert train_cada.main([*words, "--do_predict", "--disable_tqdm", "true"])["test_queries"] == 7
    for more, split in (("--do_eval", "val"), ("--do_train", "train")):
        with pytest.raises(CADAError, match=f"own has no split '{split}'; it has test"):
            train_cada.main([*words, more])
    save_colour_set(tmp_path / "own", train=7)
    with pytest.raises(CADAError, match="own has no split 'val', and --holdout_persons 0 takes no persons of train"):
        train_cada.main([*words, "--do_eval", "--holdout_persons", "0"])
    metrics = train_cada.main([*words, "--do_eval", "--holdout_persons", "2", "--disable_tqdm", "true"])
    assert metrics["eval_queries"] == 2


def commands_of(page: str) -> list[list[str]]:
    """Every `python train_cada.py ...` of a page, in words. `...` stands for arguments that the page leaves to you."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"python train_cada\.py (.*?)(?:`|\n(?!--)|$)", text.replace("\n--", " --"))
    return [shlex.split(line) for line in found if "..." not in line]


@pytest.mark.parametrize("page", ["docs/train.md", "benchmarks/paper.md"])
def test_commands_of_the_documentation_are_understood(page, monkeypatch):
    """They parse, with the recipes that they name. Nothing is run."""
    runs = []
    monkeypatch.setattr(train_cada, "run", lambda *arguments: runs.append(arguments))
    monkeypatch.chdir(ROOT)
    commands = commands_of(page)
    assert len(commands) >= 4
    for words in commands:
        train_cada.main([*words, "--use_cpu"])  # the recipes use bfloat16, which the Trainer checks
    assert {data.dataset for _, sets, _ in runs for data in sets} >= {"cuhk_pedes", "icfg_pedes", "rstp_reid"}
    assert all(args.do_predict != sets[0].streaming for _, sets, args in runs)


def test_one_checkpoint_on_several_sets(start, tmp_path):
    """Each with the scores that it has alone; the card of the checkpoint has a row for each set and matching."""
    for name in ("cuhk_pedes", "rstp_reid"):
        (tmp_path / name).mkdir()
        LAYOUTS[name](tmp_path / name)
    save_colour_set(tmp_path / "own", test=9)
    words = ["--model_name_or_path", str(start), "--output_dir", str(start), "--do_predict", "--use_cpu"]
    sets = ["cuhk_pedes", str(tmp_path / "own"), "rstp_reid"]
    folders = [str(tmp_path / "cuhk_pedes"), "", str(tmp_path / "rstp_reid")]
    metrics = train_cada.main([*words, "--dataset", *sets, "--data_dir", *folders])
    assert [metrics[f"test_{Path(name).name}_queries"] for name in sets] == [16, 9, 12]
    alone = [*words, "--dataset", "rstp_reid", "--data_dir", folders[2], "--output_dir", str(tmp_path / "alone")]
    for name, value in train_cada.main(alone).items():
        if "_R" in name or "_m" in name:
            assert metrics[name.replace("test_", "test_rstp_reid_")] == value
    rows = [line for line in str(model_card(start, "me/x", "main")).splitlines() if "| test | global |" in line]
    assert [row.split("|")[1].split(",")[0].strip() for row in rows] == ["CUHK-PEDES", "own (own data)", "RSTPReid"]
    assert json.loads((start / "test_own_results.json").read_text())["test_own_queries"] == 9
    for more, message in (
        (["--dataset", *sets, "--do_train"], "several sets: with --do_predict alone. A pattern of files"),
        (["--dataset", *sets, "--data_dir", "a", "b"], "--data_dir names 2 folders for 3 sets"),
        (["--dataset", "a/own", "b/own"], "of own, own two have the same name"),
    ):
        with pytest.raises(CADAError, match=message):
            train_cada.main([*words, *more])


def test_parts_of_the_drawn_set_have_names_of_their_own(tmp_path):
    rows = Dataset.from_dict({"named_attributes": [["sex"]]})
    names = {"short": "short (own data)", "long": "long (own data)", "drawn": "drawn"}
    for folder, name in names.items():
        (tmp_path / folder).mkdir()
        assert name_of_set(DataArguments(str(tmp_path / folder)), rows) == name
    assert name_of_set(DataArguments("demo_night"), rows) == "drawn_night"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer_name": "bert", "model_name_or_path": "start"}, "brings a tokenizer of its own"),
        ({"init_source": "blip"}, "--init_source goes with --init_from"),
        ({"vocabulary_head": "captioner"}, "--vocabulary_head goes with --init_from"),
        ({"model_name_or_path": "start", "init_from": "blip"}, "Choose one start"),
    ],
)
def test_arguments_that_would_be_ignored_are_errors(arguments, message):
    with pytest.raises(CADAError, match=message):
        ModelArguments(**arguments)
