"""Model cards from the record of a real run, release files, and publishing to a stand-in of the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import SAVED_FILES, run_code_of_a_reader, save_tiny_start
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from pedes_layout import LAYOUTS
from random_blip import random_blip

import cada.hub.card
import cada.hub.publish
import cada.hub.record
import train_cada
from cada import cli
from cada.evaluation.metrics import METRICS
from cada.files import CADAError
from cada.hub.card import CARDS, model_card
from cada.hub.publish import release_files
from cada.hub.record import RUN_FILE, read_run, write_run
from modeling_cada import CADAForTextToImageRetrieval


ROOT = Path(cada.hub.publish.__file__).parent
PAPER = {
    "cada-cuhk": "73.48 89.57 94.10 65.82 78.37 91.57 94.58 68.87",
    "cada-icfg": "62.54 79.46 85.14 37.07 67.81 82.34 87.14 39.85",
    "cada-rstp": "61.50 82.60 89.15 47.28 69.60 86.75 92.40 52.74",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output folder of a training run on a small RSTPReid, through the command."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny_start(folder / "start")
    LAYOUTS["rstp_reid"](folder)
    train_cada.main(
        [
            *("--model_name_or_path", str(folder / "start"), "--output_dir", str(folder / "run")),
            *("--dataset", "rstp_reid", "--data_dir", str(folder), "--captions_per_image", "2"),
            *("--num_train_epochs", "1", "--per_device_train_batch_size", "6", "--learning_rate", "1e-3"),
            *("--do_train", "--do_predict", "--disable_tqdm", "true", "--seed", "7", "--data_seed", "3"),
            *("--config_overrides", '{"mask_rate": 0.4}', "--lr_scheduler_kwargs", '{"num_cycles": 0.25}'),
        ]
    )
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rename(folder: Path, dataset: str, origin: dict = cada.hub.record.RANDOM_START) -> dict:
    """Let the record say that the run was on another set, from another start."""
    record = read_run(folder)
    for part in (record["training"], *record["evaluations"]):
        part["dataset"] = dataset
    write_run(folder, origin, record["training"], record["evaluations"])
    return record


def test_record_says_what_was_run_and_measured(trained):
    record = read_run(trained)
    training = record["training"]
    assert training["dataset"] == "rstp_reid"
    assert training["start"] == "start"  # the name, not the folder of this machine
    assert training["data"] == {"persons": 6, "images": 18, "pairs": 36}
    assert (training["seed"], training["captions_per_image"]) == (7, 2)
    recipe = training["recipe"]
    assert (recipe["learning_rate"], recipe["batch_size"], recipe["data_seed"]) == (1e-3, 6, 3)
    assert (recipe["config_overrides"], recipe["lr_scheduler_kwargs"]) == ({"mask_rate": 0.4}, {"num_cycles": 0.25})
    assert (recipe["adam_beta1"], recipe["adam_beta2"], recipe["adam_epsilon"]) == (0.9, 0.999, 1e-8)
    assert training["selected_by"] == "local_R1 on validation"
    assert training["versions"]["torch"] == version("torch")
    measured = json.loads((trained / "test_results.json").read_text())
    rows = {row["split"]: row["metrics"] for row in record["evaluations"]}
    assert set(rows) == {"val", "test"}
    assert rows["test"] == {
        name.removeprefix("test_"): value
        for name, value in measured.items()
        if re.search("global_|local_|open_|queries|gallery|rerank_k", name)
    }


def evaluate(start: Path, output: Path, data: Path, *more: str) -> None:
    train_cada.main(
        [
            *("--model_name_or_path", str(start), "--output_dir", str(output), "--dataset", "rstp_reid"),
            *("--data_dir", str(data), "--do_predict", "--disable_tqdm", "true", *more),
        ]
    )


def test_evaluation_of_a_checkpoint_keeps_how_it_was_trained(trained, tmp_path):
    evaluate(trained, tmp_path / "again", trained.parent)
    record = read_run(tmp_path / "again")
    assert record["training"] == read_run(trained)["training"]
    assert record["origin"] == read_run(trained)["origin"]  # an evaluation adds no training
    assert [(row["split"], row["captions_per_image"]) for row in record["evaluations"]] == [("test", None)]


def test_evaluation_replaces_no_record_of_other_weights(trained, run, tmp_path):
    """A folder with other weights is refused before the evaluation; one with the same weights keeps its record."""
    save_tiny_start(tmp_path / "other", initializer_range=0.2)
    record, results = read_run(run), (run / "test_results.json").read_text()
    with pytest.raises(CADAError, match="holds other weights than the evaluated ones.* Choose another"):
        evaluate(tmp_path / "other", run, trained.parent)
    assert (read_run(run), (run / "test_results.json").read_text()) == (record, results)
    checkpoint = next(run.glob("checkpoint-*"))  # the one step's checkpoint has these weights and no record
    evaluate(checkpoint, run, trained.parent, "--captions_per_image", "1")
    after = read_run(run)
    assert (after["origin"], after["training"]) == (record["origin"], record["training"])
    assert [row["captions_per_image"] for row in after["evaluations"]] == [2, 2, 1]
    for start in (trained, tmp_path / "other"):  # several models may be compared in a folder without weights
        evaluate(start, tmp_path / "compared", trained.parent)
    assert len({row["weights"] for row in read_run(tmp_path / "compared")["evaluations"]}) == 2


def test_half_precision_is_recorded_and_said(run, trained):
    for more in ((), ("--bf16", "--use_cpu")):
        evaluate(run, run, trained.parent, *more)
    rows = [row for row in read_run(run)["evaluations"] if row["captions_per_image"] is None]
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    content = model_card(run, "org/name", "main").content
    assert "| RSTPReid, in bfloat16, NOT the official split" in content
    assert "RSTPReid, test: all captions of an image, in bfloat16, NOT" in content
    names = [result.dataset_name for result in ModelCard(content).data.eval_results]
    assert sum("in bfloat16" in name for name in names) == 2 * len(METRICS)


@pytest.mark.parametrize(
    "dataset", ["cuhk_pedes", "icfg_pedes", "rstp_reid", "drawn", "drawn_night", "demo (own data)"]
)
def test_card_tells_what_was_measured(dataset, run):
    record = rename(run, dataset)
    card = model_card(run, "org/cada-x", "v1.0")
    loaded = ModelCard(card.content)
    assert (loaded.data.library_name, loaded.data.pipeline_tag) == ("transformers", "feature-extraction")
    assert {"sentence-transformers", "text-to-image-retrieval", "person-re-identification"} < set(loaded.data.tags)
    assert loaded.data.license == ("apache-2.0" if dataset.startswith("drawn") else "other")
    # model-index: five metrics of two matchings on two splits, the measured values.
    values = {(result.dataset_split, result.metric_type): result.metric_value for result in loaded.data.eval_results}
    assert values == {
        (row["split"], f"{matching}_{name}"): round(row["metrics"][f"{matching}_{name}"], 2)
        for row in record["evaluations"]
        for matching in ("global", "local")
        for name in METRICS
    }
    test = next(row["metrics"] for row in record["evaluations"] if row["split"] == "test")
    cells = " | ".join(f"{test[f'local_{name}']:.2f}" for name in METRICS)
    assert f"| test | local | 3 | 12 | 6 | {cells} |" in card.content
    for text in (
        "the first 2 captions of an image",
        'revision = "org/cada-x", "v1.0"',
        "chosen by local_R1 on validation",
        "seed | 7",
        "data seed | 3",
        '| config overrides | {"mask_rate": 0.4} |',
        "legal basis",
        "6 persons, 18 images, 36 pairs",
    ):
        assert text in card.content, text
    assert str(run.parent) not in card.content and "{{" not in card.content and "{%" not in card.content


@pytest.mark.parametrize("template", PAPER)
def test_figures_of_the_paper_are_marked_as_the_papers(template, run):
    """They stand in the section that says so, and nowhere in what was measured."""
    rename(run, {"cada-cuhk": "cuhk_pedes", "cada-icfg": "icfg_pedes", "cada-rstp": "rstp_reid"}[template])
    content = model_card(run, "org/name", "main").content
    before, after = content.split("### The paper's figures")
    section, rest = after.split("\n## ", 1)
    assert "**not measured with this model**" in section
    for figure in PAPER[template].split():
        assert figure in section
        assert figure not in before and figure not in rest


def test_every_template_is_used():
    used = {"base.md", *cada.hub.card.TEMPLATES.values()}
    assert {path.name for path in CARDS.glob("*.md")} == used


def test_card_of_a_model_without_record_claims_nothing(run):
    (run / RUN_FILE).unlink()
    content = model_card(run, "org/name", "main").content
    assert "Weights: started from weights whose origin is not recorded." in content
    assert "random" not in content and "pins what you have read" not in content
    assert "No evaluation was recorded with this model." in content
    assert "No record of the training is kept with this model." in content
    assert ModelCard(content).data.eval_results is None


def test_snippets_of_the_card_run(run, tmp_path):
    """As a reader would: the card's code in a fresh process, with three images beside it."""
    content = model_card(run, str(run), "v1.0").content
    short, long, encoder = re.findall(r"```python\n(.*?)```", content, flags=re.DOTALL)
    assert 'pipeline("text-to-image-person-retrieval"' in short and "model.match(" in long
    by_global = "print((outputs.text_embeds @ outputs.image_embeds.T)[0].argsort(descending=True).tolist())\n"
    ranking, again, expected, encoded = run_code_of_a_reader(short + long + by_global + encoder, tmp_path)
    assert sorted(ranking) == [0, 1, 2] and again == ranking  # three images are all candidates of local matching
    assert encoded == expected


def test_release_holds_what_loading_needs_and_no_pickle(run):
    (run / "optimizer.pt").write_bytes(b"x")
    (run / "training_args.bin").write_bytes(b"x")
    assert release_files(run) == ["cada_run.json", *SAVED_FILES]


def test_training_writes_no_pickled_arguments(trained):
    assert not list(trained.rglob("training_args.bin"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("processor_config.json", None, "holds no processor_config.json. Save model and processor"),
        ("model.safetensors", None, "holds no weights in safetensors form"),
        ("model.safetensors", b"PK\x03\x04", "model.safetensors is damaged"),
        ("losses_cada.py", None, "lacks losses_cada.py, so nobody can load"),
        ("modeling_cada.py", None, "lacks modeling_cada.py, so nobody can load"),
        ("processing_cada.py", None, "lacks processing_cada.py, so nobody can load"),
        (RUN_FILE, b"{", "cada_run.json is damaged"),
    ],
)
def test_incomplete_folders_are_named(name, content, message, run):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    with pytest.raises(CADAError, match=message):
        release_files(run)
        model_card(run, "org/name", "main")


def test_folder_that_does_not_exist(tmp_path, capsys):
    assert cli.main(["publish", str(tmp_path / "no"), "a/b", "--card-only"]) == 1
    assert "does not exist. Give the --output_dir of a training run" in capsys.readouterr().err


def test_card_only_writes_the_card_and_pushes_nothing(run, capsys):
    assert cli.main(["publish", str(run), "org/name", "--card-only"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert "# name" in (run / "README.md").read_text(encoding="utf-8")


def test_further_evaluations_join_the_table(run, trained, tmp_path, caplog, capsys):
    """A cross-domain result, from the folder of its own run."""
    row = {**read_run(trained)["evaluations"][-1], "dataset": "icfg_pedes"}
    foreign = {**row, "weights": "of another model"}
    for name, rows in (("cross", [row, foreign]), ("foreign", [foreign])):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, None, None, rows)
    arguments = [str(run), "org/name", "--card-only"]
    assert cli.main(["publish", *arguments, "--evaluations", str(tmp_path / "cross")]) == 0
    assert "left out 1 evaluation of other weights" in caplog.text
    assert "| ICFG-PEDES, NOT the official split (6 of 19,848 images) | test | local |" in (
        run / "README.md"
    ).read_text(encoding="utf-8")
    assert cli.main(["publish", *arguments, "--evaluations", str(tmp_path)]) == 1
    assert cli.main(["publish", *arguments, "--evaluations", str(tmp_path / "foreign")]) == 1
    assert f"with an evaluation of the weights in {run}. Run train_cada.py --do_predict" in capsys.readouterr().err


def test_figures_of_other_weights_stay_out_of_the_card(run):
    """The record says 50 %, but the weights beside it have changed since."""
    model = CADAForTextToImageRetrieval.from_pretrained(run)
    assert {row["weights"] for row in read_run(run)["evaluations"]} == {cada.hub.record.model_digest(model)}
    with torch.no_grad():
        model.match_head.bias.fill_(3.0)
    model.save_pretrained(run)
    assert cada.hub.record.checkpoint_digest(run) == cada.hub.record.model_digest(model)
    content = model_card(run, "org/name", "main").content
    assert "No evaluation was recorded with this model." in content
    assert ModelCard(content).data.eval_results is None


@pytest.mark.parametrize("start", ["model_base.pth (blip_original)", None])
def test_drawn_model_is_open_only_from_random_weights(start, run):
    origin = None if start is None else {"start": start, "licence": "BSD-3-Clause"}
    rename(run, "drawn", origin)
    content = model_card(run, "org/name", "main").content
    assert ModelCard(content).data.license == "other"
    assert "No image of a person was used" not in content
    assert (start or "not recorded") in content


def test_card_names_every_set_that_the_weights_have_seen(run, trained):
    """Trained on CUHK-PEDES, then on drawings: research only, and no word of random weights alone."""
    rename(run, "cuhk_pedes")
    origin = cada.hub.record.after_training(read_run(run))
    assert origin == {"start": "random weights", "licence": None, "trained_on": {"cuhk_pedes": 0}}

    def after(origin, dataset, held_out):
        training = {"dataset": dataset, "recipe": {"persons_held_out_of_train": held_out}}
        return cada.hub.record.after_training({"origin": origin, "training": training})

    assert after(origin, "cuhk_pedes", 0) == origin  # a set is named once
    unknown = after(None, "drawn", 5)
    assert unknown == {**cada.hub.record.UNKNOWN_START, "trained_on": {"drawn": 5}}
    assert after(unknown, "drawn", 3)["trained_on"] == {"drawn": 3}
    assert after(unknown, "drawn", 7)["trained_on"] == {"drawn": 5}  # two of the seven were seen before
    rename(run, "drawn", origin)
    card = model_card(run, "org/name", "main")
    assert (card.data.license, card.data.license_name) == ("other", "research-only")
    assert "| start | random weights, then trained on CUHK-PEDES |" in card.content
    assert "No image of a person was used" not in card.content
    rename(run, "drawn", {**cada.hub.record.RANDOM_START, "trained_on": {"drawn": 0}})
    assert model_card(run, "org/name", "main").data.license == "apache-2.0"


def test_record_of_a_start_comes_from_its_folder_or_the_hub(run, monkeypatch, tmp_path):
    assert cada.hub.record.read_start(str(run)) == read_run(run)
    monkeypatch.setattr(cada.hub.record, "cached_file", lambda name, file, **_: str(run / file))
    assert cada.hub.record.read_start("org/cada-cuhk") == read_run(run)
    monkeypatch.setattr(cada.hub.record, "cached_file", lambda *_, **__: None)
    assert cada.hub.record.read_start("org/cada-cuhk")["training"] is None


def test_evaluation_without_the_bad_images_does_not_take_the_place_of_the_whole(run):
    record = read_run(run)
    whole = next(row for row in record["evaluations"] if row["split"] == "test")
    part = {**whole, "unreadable_images_skipped": True, "metrics": {**whole["metrics"], "local_R1": 99.0}}
    content = model_card(run, "org/name", "main", [part]).content
    departure = "NOT the official split (6 of 1,000 images) | test | local | 3 | 12 | 6 |"
    assert f"| RSTPReid, {departure} {whole['metrics']['local_R1']:.2f}" in content
    assert f"| RSTPReid, unreadable images left out, {departure} 99.00" in content


@pytest.mark.parametrize(
    ("queries", "gallery", "captions", "official"),
    [(6156, 3074, None, True), (6148, 3074, 2, True), (6148, 3074, None, False), (6156, 3073, None, False)],
)
def test_figures_of_a_part_are_not_called_those_of_the_set(run, queries, gallery, captions, official):
    """CUHK-PEDES' test split: 3,074 images with 6,156 captions."""
    record = rename(run, "cuhk_pedes")
    for row in record["evaluations"]:
        row["captions_per_image"] = captions
        row["metrics"].update(queries=queries, gallery=gallery)
    rows = [row for row in record["evaluations"] if row["split"] == "test"]
    write_run(run, cada.hub.record.RANDOM_START, record["training"], rows)
    assert ("NOT the official split" not in model_card(run, "org/name", "main").content) == official


def test_own_sets_of_one_name_stay_apart(run):
    """Both folders are called `data`; they hold 30 and 50 images."""
    record = rename(run, "data (own data)")
    row = next(row for row in record["evaluations"] if row["split"] == "test")
    rows = [{**row, "metrics": {**row["metrics"], "gallery": gallery}} for gallery in (30, 50, 50)]
    write_run(run, record["origin"], record["training"], rows)
    assert [row["metrics"]["gallery"] for row in read_run(run)["evaluations"]] == [30, 50]
    content = model_card(run, "org/name", "main").content
    assert content.count("- data (own data), test: ") == 1  # what both have in common is said once
    index = ModelCard(content).data.to_dict()["model-index"][0]["results"]
    assert [len(result["metrics"]) for result in index] == [2 * len(METRICS), 2 * len(METRICS)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x y/ä"], "'x y/ä' is no name of a repository on the Hub"),
        (["a/b/c"], "is no name of a repository on the Hub"),
        *(
            (["org/name", "--tag", tag], "is no name of a tag")
            for tag in ("v 1", "", "v1.", "v..1", "ä", "a~1", "@", "v.lock")
        ),
    ],
)
def test_names_that_the_hub_refuses(names, message, run, capsys):
    assert cli.main(["publish", str(run), *names, "--card-only"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (run / "README.md").exists()


@pytest.mark.parametrize("tag", ["v1.0", "1", "release/2026-01", "v1.0-rc.1+cpu", "a_b", None])
def test_names_that_the_hub_takes(tag):
    cada.hub.publish.check_names("org/Some-name_1.0", tag)


def test_weights_without_licence_are_not_published(run, capsys):
    rename(run, "cuhk_pedes", {"start": "cuhk.pth (cada_original)", "licence": cada.hub.record.NO_LICENCE})
    with pytest.raises(CADAError, match="comes without a licence: you may use them, not publish them"):
        cada.hub.publish.publish(run, "org/name")


PUBLISHER = """
import contextlib, io, json, sys
from cada.cli import main
from cada.hub.record import read_start

answers = sys.stdout
for line in sys.stdin:
    function, argument = json.loads(line)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        result = {"main": main, "read_start": read_start}[function](argument)
    print(json.dumps([result, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


@contextmanager
def publisher(hub: HubStandIn, home: Path):
    """Calls of functions of `cada.hub.publish` in a process whose Hub is the stand-in: result, what was printed."""
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER],
        env={**hub.environment(home), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def call(function: str, argument) -> tuple:
            print(json.dumps([function, argument]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()
        assert process.wait() == 0


def test_publish_tags_refuses_to_overwrite_and_overwrites_when_asked(run, tmp_path):
    with HubStandIn() as hub, publisher(hub, tmp_path / "home") as call:

        def publish(*more: str, repo_id: str = "tester/cada") -> tuple[int, str, str]:
            return call("main", ["publish", str(run), repo_id, *more])

        status, printed, errors = publish("--tag", "v1.0")
        assert status == 0, errors
        assert "Published tester/cada, revision v1.0." in printed
        released = hub.files("tester/cada", revision="v1.0")
        assert set(release_files(run)) | {".gitattributes"} == set(released)
        assert released["model.safetensors"] == (run / "model.safetensors").read_bytes()
        assert b'revision = "tester/cada", "v1.0"' in released["README.md"]

        assert call("read_start", "tester/cada")[0] == read_run(run)

        status, _, errors = publish()
        assert status == 1
        assert "holds model.safetensors already, and this push would overwrite it. Pass --overwrite" in errors
        hub.add("tester/old", {"pytorch_model.bin": b"x", "notes.txt": b"mine"})
        status, _, errors = publish(repo_id="tester/old")
        assert status == 1 and "holds pytorch_model.bin already" in errors
        assert publish("--overwrite", repo_id="tester/old")[0] == 0
        assert "pytorch_model.bin" not in hub.files("tester/old") and "notes.txt" in hub.files("tester/old")
        status, _, errors = publish("--tag", "v1.0", "--overwrite")
        assert status == 1
        assert "has the tag v1.0 already" in errors
        assert hub.files("tester/cada") == released

        # Other weights, no tag: the card pins the commit that holds them.
        model = CADAForTextToImageRetrieval.from_pretrained(run)
        with torch.no_grad():
            model.match_head.bias.fill_(3.0)
        model.save_pretrained(run)
        status, printed, errors = publish("--overwrite")
        assert status == 0, errors
        commit = re.search(r"revision ([0-9a-f]{40})\.", printed).group(1)
        newest = hub.files("tester/cada")
        assert f'revision = "tester/cada", "{commit}"'.encode() in newest["README.md"]
        pinned = hub.files("tester/cada", revision=commit)
        assert pinned["model.safetensors"] == newest["model.safetensors"] != released["model.safetensors"]
        assert hub.files("tester/cada", revision="v1.0") == released
        assert hub.unknown == []


CHECKER = """
import sys
from pathlib import Path
from huggingface_hub import ModelCard
for file in sorted(Path(sys.argv[1]).iterdir()):
    ModelCard.load(file).validate()
    print(file.stem)
try:
    ModelCard(file.read_text().replace("license_link: https://", "license_link: ")).validate()
except ValueError as error:
    print("license_link" in str(error))
"""


def test_every_card_passes_the_check_of_the_client(run, tmp_path):
    """`ModelCard.validate`, which asks the Hub: here the stand-in, which knows what the Hub's pages demand."""
    datasets = ["cuhk_pedes", "drawn", "icfg_pedes", "own (own data)", "rstp_reid"]
    (tmp_path / "cards").mkdir()
    for dataset in datasets:
        rename(run, dataset)
        model_card(run, "org/name", "v1.0").save(tmp_path / "cards" / f"{dataset}.md")
    with HubStandIn() as hub:
        command = [sys.executable, "-c", CHECKER, str(tmp_path / "cards")]
        result = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
        assert result.stdout.splitlines() == [*datasets, "True"], result.stderr[-2000:]
        assert len(hub.requests) == len(datasets) + 1 and hub.unknown == []


def test_wrong_token_is_one_line(run, tmp_path):
    with HubStandIn() as hub:
        environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": "hf_wrong"}
        arguments = [str(run), "tester/cada"]
        result = subprocess.run(
            [sys.executable, "-m", "cada", "publish", *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1
    assert "error: Cannot open tester/cada on the Hub" in result.stderr and "hf auth login" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_no_checkpoint_of_cada(tmp_path):
    random_blip().save_pretrained(tmp_path)
    with pytest.raises(CADAError, match="is of a model of the type 'blip', not 'cada'.*convert the checkpoint"):
        release_files(tmp_path)


def test_no_connection_is_a_sentence_of_its_own(tmp_path, run):
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "cada", "publish", str(run), "me/x"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Connection refused. Check the connection, and run" in result.stderr.splitlines()[-1]
