"""The probability of a match, and whether the person is there: values by hand, and the whole way with a tiny model."""

import json
import math

import pytest
import torch
from conftest import save_colour_set, save_tiny_start, tiny_config
from datasets import load_from_disk
from huggingface_hub.errors import StrictDataclassError

import train_cada
from cada.cli import main
from cada.evaluation import matching
from cada.evaluation.calibration import Candidates, expected_calibration_error, fit_calibration, open_set_metrics
from cada.evaluation.matching import calibrate, evaluate_retrieval
from cada.files import CADAError
from cada.gallery.index import build_index, open_index
from cada.hub.card import model_card
from cada.hub.convert import load_model_and_processor
from configuration_cada import CADAConfig


FITTED = {"weights": [2.0, 0.5, -1.0], "set": "by hand", "pairs": 4, "expected_calibration_error": 0.0}


def test_probability_by_hand():
    """S_G = 0.5 and S_L = 0.75, whose logit is log 3: sigmoid(2 * 0.5 + 0.5 * log 3 - 1) = sigmoid(log √3)."""
    expected = math.sqrt(3) / (1 + math.sqrt(3))
    config, logits = CADAConfig(calibration=FITTED), CADAConfig(calibration=FITTED, match_score="logit")
    assert config.match_probability(torch.tensor([0.5]), torch.tensor([0.75])).item() == pytest.approx(expected)
    assert logits.match_probability(torch.tensor([0.5]), torch.tensor([math.log(3)])).item() == pytest.approx(expected)
    assert CADAConfig().match_probability(torch.zeros(1), torch.zeros(1)) is None


@pytest.mark.parametrize("wrong", [{}, {"weights": [1, 2]}, {"weights": [1, 2, math.nan]}])
def test_a_damaged_calibration_is_refused(wrong):
    with pytest.raises(StrictDataclassError, match="Give what `cada calibrate` writes"):
        CADAConfig(calibration=wrong)


def test_calibration_error_by_hand():
    """Bins of 0.1: two pairs at 0.05, one right, |0.1 - 1|; two at 0.95 and 1, both right, |1.95 - 2|; of 4 pairs."""
    probabilities = torch.tensor([0.05, 0.05, 0.95, 1.0])
    right = torch.tensor([True, False, True, True])
    assert expected_calibration_error(probabilities, right) == pytest.approx((0.9 + 0.05) / 4)


def test_open_set_metrics_by_hand():
    """
    Three searches for somebody who is there, highest 0.9, 0.6, 0.3, first image right, wrong, right; ten for others,
    highest 0.8, 0.5 and eight times 0.1.
    """
    probabilities = torch.tensor([[0.9, 0.2], [0.6, 0.1], [0.2, 0.3], [0.8, 0.1], [0.5, 0.0], *[[0.1, 0.1]] * 8])
    first = torch.tensor([[1.0, 0.0]]).repeat(13, 1)  # S_G: the first image ranks first, but for the third search
    first[2] = torch.tensor([0.0, 1.0])
    right = torch.zeros(13, 2, dtype=torch.bool)
    right[0, 0] = right[2, 1] = True
    found = Candidates(first, torch.zeros(13, 2), right, torch.arange(13) < 3)
    metrics = open_set_metrics(found, probabilities)
    # 0.9 is above all ten, 0.6 above nine, 0.3 above eight.
    assert metrics["AUROC"] == pytest.approx((10 + 9 + 8) / 30)
    # No alarm allowed: above 0.8 is the first search, right. One allowed: above 0.5 is the second too, but wrong.
    assert metrics["DIR1"] == metrics["DIR10"] == pytest.approx(100 / 3)


def test_fit_finds_the_weights_that_made_the_pairs():
    generator = torch.Generator().manual_seed(0)
    global_scores, logits = torch.rand(200, 500, generator=generator), 3 * torch.randn(200, 500, generator=generator)
    chance = (4 * global_scores + 0.7 * logits - 3).sigmoid()
    right = torch.rand(200, 500, generator=generator) < chance
    found = Candidates(global_scores, logits.sigmoid(), right, torch.ones(200, dtype=torch.bool))
    fitted = fit_calibration(found, tiny_config(), "made")
    assert fitted["weights"] == pytest.approx([4, 0.7, -3], abs=0.1)
    assert (fitted["set"], fitted["pairs"]) == ("made", 100_000) and fitted["expected_calibration_error"] < 0.01
    # At the best weights the mean of every score is the same over the targets and over the probabilities.
    evidence = torch.stack([global_scores.double(), logits.sigmoid().logit(eps=1e-7).double(), torch.ones(200, 500)])
    weights = torch.tensor(fitted["weights"], dtype=torch.float64)
    hits = int(right.sum())
    targets = torch.where(right, (hits + 1) / (hits + 2), 1 / (100_000 - hits + 2)).double()
    rest = (evidence * (targets - (weights[:, None, None] * evidence).sum(dim=0).sigmoid())).mean(dim=(1, 2))
    assert rest.abs().max() < 1e-7


def test_fit_is_finite_where_a_score_separates_all():
    found = Candidates(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), None)
    weights = fit_calibration(found, tiny_config(), "two")["weights"]
    assert all(map(math.isfinite, weights))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny_start(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "colours"
    save_colour_set(folder, train=21, val=14, test=14)
    return folder


@pytest.mark.parametrize("half", [False, True])
def test_every_second_person_is_absent(start, colours, monkeypatch, half):
    """What a test finds among half of the persons is what reading it alone finds; every pair is read once."""
    model, processor = load_model_and_processor(start)
    model.config.rerank_k = 5  # of 14 images
    rows = load_from_disk(colours)["test"]
    found, read = [], []
    open_set, match = matching._Searches.open_set, matching.match_candidates

    def keep(searches, known=None):
        found.append(open_set(searches, known))
        return found[-1]

    def count(*args, **options):
        read.append(args[3].numel() if options["chosen"] is None else int(options["chosen"].sum()))
        return match(*args, **options)

    monkeypatch.setattr(matching._Searches, "open_set", keep)
    monkeypatch.setattr(matching, "match_candidates", count)
    with torch.autocast("cpu", enabled=half):
        model.config.calibration = calibrate(model, processor, rows, "test", progress=False)
        alone = list(read)
        metrics = evaluate_retrieval(model, processor, rows, progress=False, open_set=True)
    one, shared = found
    persons = sorted(set(rows["person_id"]))
    queries = [person for person, captions in zip(rows["person_id"], rows["captions"]) for _ in captions]
    assert one.present.tolist() == [person in persons[::2] for person in queries]
    assert not one.right[~one.present].any()
    assert one.global_scores.isfinite().all()
    assert torch.equal(one.global_scores, shared.global_scores) and torch.equal(one.right, shared.right)
    torch.testing.assert_close(one.local_scores, shared.local_scores, atol=0.01 if half else 1e-6, rtol=0)
    if not half:
        assert alone == read[1:2] == [len(queries) * 5] and 0 < read[2] < len(queries) * 5
    assert {name for name in metrics if "open" in name} == {"open_ECE", "open_AUROC", "open_DIR1", "open_DIR10"}
    model.config.use_atp = False  # nothing gives S_L then
    assert not any(
        "open" in name for name in evaluate_retrieval(model, processor, rows, progress=False, open_set=True)
    )
    model.config.use_atp = True
    with pytest.raises(CADAError, match="two persons at least"):
        calibrate(model, processor, rows.filter(lambda row: row["person_id"] == persons[0]), "one", progress=False)


def test_training_calibrates_and_the_test_is_open(start, colours, tmp_path):
    words = ["--dataset", str(colours), "--model_name_or_path", str(start), "--output_dir", str(tmp_path / "run")]
    words += ["--do_train", "--do_predict", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"]
    metrics = train_cada.main([*words, "--eval_strategy", "no", "--load_best_model_at_end", "false"])
    config = CADAConfig.from_pretrained(tmp_path / "run")
    assert config.calibration["set"] == "colours (own data), val"
    assert 0 <= metrics["test_open_AUROC"] <= 1
    card = str(model_card(tmp_path / "run", "org/name", "main"))
    assert "Is the person there at all?" in card and "| colours (own data), val |" in card


def test_a_set_of_one_person_calibrates_nothing_and_loses_nothing(start, colours, tmp_path, caplog):
    splits = load_from_disk(colours)
    for split in ("val", "test"):
        splits[split] = splits[split].filter(lambda row: row["person_id"] == 0)
    splits.save_to_disk(tmp_path / "one")
    words = [
        "--dataset",
        str(tmp_path / "one"),
        "--model_name_or_path",
        str(start),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += ["--do_train", "--do_predict", "--max_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu"]
    metrics = train_cada.main([*words, "--eval_strategy", "no", "--load_best_model_at_end", "false"])
    assert metrics["test_global_R1"] == 100 and "test_open_ECE" not in metrics
    assert CADAConfig.from_pretrained(tmp_path / "run").calibration is None
    assert "probabilities need two persons at least" in caplog.text


def test_search_says_how_probable_a_match_is(start, colours, tmp_path, capsys):
    folder, index = tmp_path / "model", tmp_path / "index"
    model, processor = load_model_and_processor(start)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    build_index(colours, index, str(folder), split="test", progress=False)
    assert main(["search", str(index), "a red coat", "--min-probability", "0.5"]) == 1
    assert "is not calibrated, so there are no probabilities" in capsys.readouterr().err
    assert open_index(index).search("a red coat")[0][0].probability is None

    assert main(["calibrate", "nope", "--dataset", str(colours)]) == 1
    assert capsys.readouterr().err == "error: nope does not exist. Give the folder of a checkpoint.\n"
    assert main(["calibrate", str(folder), "--dataset", str(colours)]) == 0
    assert "colours, val: " in capsys.readouterr().out
    gallery = open_index(index)  # features and scores are as they were, so it is the same index
    results = gallery.search("a red coat", top=5, rerank=3)[0]
    config = CADAConfig.from_pretrained(folder)
    plain = {result.path: result.score for result in gallery.search("a red coat", top=50, rerank=0)[0]}
    for result in results[:3]:
        local = torch.tensor(result.score - plain[result.path])
        expected = config.match_probability(torch.tensor(plain[result.path]), local)
        assert result.probability == pytest.approx(float(expected), abs=1e-4)
    assert [result.probability for result in results[3:]] == [None, None]  # the decoder has not read them
    marked = gallery.search("a red coat", top=1, like=[results[0].path])[0]
    assert marked[0].probability is None  # it is of a sentence alone

    # All that the decoder reads count, also behind the first: the ranking is by S_G + S_L, not by the probability.
    chances = {result.path: result.probability for result in gallery.search("a red coat", top=50, rerank=10)[0][:10]}
    for least in sorted(chances.values())[-3:]:
        [fitting] = gallery.search("a red coat", top=1, rerank=10, min_probability=least)
        assert len(fitting) == 1 and fitting[0].probability >= least and not fitting.nobody_fits
    for options, problem in (
        ({"rerank": 0}, "what the decoder has read"),
        ({"like": [results[0].path]}, "of a sentence alone"),
    ):
        with pytest.raises(CADAError, match=problem):
            gallery.search("a red coat", min_probability=0.5, **options)
    photo = str(tmp_path / "photo.png")
    gallery.image(results[0].name).save(photo)
    for arguments in (["--image", photo, "--min-probability", "0.5"], ["--image", photo, "--rerank", "3"]):
        assert main(["search", str(index), *arguments]) == 1
        assert "is of a sentence, and with --image alone there is none" in capsys.readouterr().err

    assert main(["search", str(index), "a red coat", "--top", "2", "--min-probability", "1"]) == 0
    printed = capsys.readouterr()
    assert "Nobody fits 'a red coat' with a probability of 1. The best:" in printed.err
    assert printed.out.splitlines()[1].split() == ["rank", "score", "probability", "stage", "path"]
    assert main(["search", str(index), "a red coat", "--top", "2", "--min-probability", "0", "--json"]) == 0
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)
    assert printed.err == "" and found["results"][0]["probability"] > 0 and not found["nobody_fits"]
    assert main(["search", str(index), "a red coat", "--top", "2", "--min-probability", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["nobody_fits"] and len(found["results"]) == 2
