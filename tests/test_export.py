"""A checkpoint as graphs: equal to PyTorch, and used in its place by index and search."""

import gc
import importlib.util
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bert_tokenizer, save_checkpoint, tiny_config, tiny_processor
from datasets import Dataset
from PIL import Image
from transformers.exporters.base import ExportedModel

import cada.export
from cada.cli import main
from cada.evaluation.matching import evaluate_retrieval
from cada.export import PACKAGES, CADAGraphs, _compare, export_model, is_export, load_export
from cada.files import CADAError
from cada.gallery.index import open_index
from modeling_cada import CADAForTextToImageRetrieval, CADAImages


SENTENCES = ["a man", "A woman in a long red coat and white shoes, with a bag.", "somebody"]


def save(folder, **changes):
    """A tiny model of one layer of vision, with lively random weights, and its processor. Tracing takes its time."""
    torch.manual_seed(0)
    spread, processor = {"initializer_range": 0.5}, tiny_processor(bert_tokenizer())
    text = {"vocab_size": 30524, "enc_token_id": 30523, **spread}
    config = tiny_config(vision_config={"num_hidden_layers": 1, **spread}, text_config=text, **changes)
    model = CADAForTextToImageRetrieval(config).eval()
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a checkpoint, its model and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = save(folder)
    model.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module", params=PACKAGES)
def exported(request, checkpoint, tmp_path_factory):
    """Folder of its export in each format."""
    for package in PACKAGES[request.param]:
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp(request.param) / "graphs"
    assert main(["export", str(checkpoint[0]), str(folder), "--format", request.param]) == 0
    return folder


def photos(folder, count=7):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 48)).save(folder / f"{number}.png")
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("texts", "length"), [(1, 3), (2, 13), (9, 7)])
def test_graphs_equal_pytorch(exported, checkpoint, texts, length):
    """For numbers and lengths other than those that were traced, with and without padding."""
    model, graphs, generator = checkpoint[1], CADAGraphs(exported), torch.Generator().manual_seed(texts)
    pixel_values = torch.randn(texts, 3, 32, 16, generator=generator)
    input_ids = torch.randint(5, 30000, (texts, length), generator=generator)
    lengths = torch.randint(2, length + 1, (texts,), generator=generator)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    images, text = model.get_image_features(pixel_values), model.get_text_features(input_ids, attention_mask)
    found = graphs.get_image_features(pixel_values)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(found.pooler_output, F.normalize(images.pooler_output, dim=-1), **close)
    torch.testing.assert_close(found.last_hidden_state, images.last_hidden_state, **close)
    known = graphs.get_text_features(input_ids, attention_mask).pooler_output
    torch.testing.assert_close(known, F.normalize(text.pooler_output, dim=-1), **close)
    # Not each text with its own image, not every image, and one pair twice.
    pairs = torch.tensor([texts - 1, 0, 0, 0]), torch.tensor([0, texts - 1, texts // 2, texts - 1])
    logits = model.match(input_ids, attention_mask, images.last_hidden_state, *pairs)
    states = CADAImages(found.last_hidden_state)
    torch.testing.assert_close(graphs.match(input_ids, attention_mask, states, *pairs), logits, **close)
    torch.testing.assert_close(graphs.local_score(logits), model.local_score(logits))
    assert logits.std() > 0.1


def test_index_and_search_use_the_graphs(exported, checkpoint, tmp_path, capsys):
    """An index of one is searched with the other: the weights are the same, so the digest is."""
    source, rankings = photos(tmp_path / "photos"), {}
    for name, folder in {"pytorch": checkpoint[0], "graphs": exported}.items():
        assert main(["index", str(source), "--model", str(folder), "--out", str(tmp_path / name)]) == 0
    for index in ("pytorch", "graphs"):
        for model in (checkpoint[0], exported):
            gallery = open_index(tmp_path / index, str(model))
            assert isinstance(gallery.model, CADAGraphs if model == exported else CADAForTextToImageRetrieval)
            found = gallery.search(SENTENCES, top=7) + [gallery.search_image(gallery.image("3.png"), top=7)]
            rankings[index, model] = [[(result.path, result.stage) for result in results] for results in found]
            scores = [result.score for results in found for result in results]
            assert scores == pytest.approx(rankings.setdefault("scores", scores), abs=1e-3)  # stored in half precision
    rankings.pop("scores")
    assert len(set(map(str, rankings.values()))) == 1
    assert main(["info", str(tmp_path / "graphs")]) == 0
    assert re.search(rf"model +{re.escape(str(exported))}\n", capsys.readouterr().out)
    graphs = open_index(tmp_path / "graphs")
    assert open_index(tmp_path / "pytorch").record["digest"] == graphs.record["digest"]
    assert isinstance(graphs.model.to("cuda"), CADAGraphs)


def test_evaluation_takes_the_graphs(exported, checkpoint):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)) for _ in range(6)]
    captions = [[f"a man with {number} bags", "a coat"] for number in range(6)]
    rows = Dataset.from_dict({"image": images, "captions": captions, "person_id": [0, 0, 1, 1, 2, 2]})
    expected = evaluate_retrieval(*checkpoint[1:], rows, progress=False)
    assert evaluate_retrieval(*load_export(exported), rows, progress=False) == pytest.approx(expected)


def test_transformers_loads_and_runs_them(exported, checkpoint):
    """By the names that the page of the documentation gives, without our class."""
    runners = ExportedModel.from_pretrained(exported, device="cpu").runners
    cada.export._KEPT.append(runners)  # which says why
    assert set(runners) == {"image", "text", "match"}
    pixel_values = torch.zeros(1, 3, 32, 16)
    outputs = runners["image"](pixel_values=pixel_values)
    assert outputs["image_embeds"].shape == (1, 8) and outputs["image_states"].shape == (1, 9, 16)


def test_signals_arrive_after_graphs_are_gone(exported):
    """Which once ended the process."""
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
    try:
        for _ in range(2):
            graphs, _ = load_export(exported)
            del graphs
            gc.collect()
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [True, True]


def test_what_a_user_may_get_wrong(exported, checkpoint, tmp_path, capsys, monkeypatch):
    folder, new = str(checkpoint[0]), str(tmp_path / "new")
    kind = "onnx" if (exported / "image.onnx").exists() else "openvino"

    def error(*arguments):
        assert main(["export", *arguments]) == 1
        return capsys.readouterr().err

    assert "'tflite' is not one of 'parquet', 'onnx', 'openvino'" in error(folder, new, "--format", "tflite")
    assert f"{exported} holds files already. Choose a new folder." in error(folder, str(exported), "--format", kind)
    assert "is a checkpoint, no index. Give --format onnx or openvino." in error(folder, new)
    assert "holds graphs, made by `cada export`" in error(str(exported), new, "--format", kind)
    assert "--int8 and --revision are for a checkpoint" in error(str(tmp_path), new, "--revision", "main")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == kind else find_spec(name))
    assert f'needs {kind}. In a clone of this repository run: pip install -e ".[{kind}]"' in error(
        folder, new, "--format", kind
    )


def test_an_export_that_differs_is_refused(exported, processor, tmp_path):
    """As where the exporter does not fit the model: here the graphs are of other weights."""
    with pytest.raises(CADAError, match=r"The graph image differs from PyTorch by [\d.]+, more than 0.0001"):
        _compare(save_checkpoint(tmp_path, processor, seed=1), CADAGraphs(exported))


def test_a_damaged_graph_is_named(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    assert is_export(folder)
    graph = next(path for path in folder.iterdir() if path.name in ("match.onnx", "openvino_match.xml"))
    graph.write_bytes(graph.read_bytes()[:100])
    with pytest.raises(CADAError, match=rf"The graphs of {re.escape(str(folder))} do not load"):
        load_export(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of a checkpoint in bfloat16, of global matching alone."""
    folder = tmp_path_factory.mktemp("small")
    save(folder, use_atp=False)[0].bfloat16().save_pretrained(folder)
    return folder


def test_without_match_heads_and_in_half_precision(small, tmp_path):
    """A model of global matching alone has two graphs. What is exported is float32."""
    pytest.importorskip("onnxscript")
    assert export_model(small, tmp_path / "graphs", "onnx") < 1e-5
    graphs, _ = load_export(tmp_path / "graphs")
    assert set(graphs.runners) == {"image", "text"}
    assert graphs.encode_images(torch.zeros(1, 3, 32, 16)).dtype == torch.float32
    index = ["index", str(photos(tmp_path / "photos")), "--model", str(tmp_path / "graphs")]
    assert main([*index, "--out", str(tmp_path / "index")]) == 0
    assert {result.stage for result in open_index(tmp_path / "index").search("a man")[0]} == {"global"}


@pytest.mark.slow
def test_int8_is_close_and_no_substitute(small, tmp_path, capsys):
    """Its features are others, so an index belongs to it alone."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    arguments = ["export", str(small), str(tmp_path / "graphs"), "--int8", "--format"]
    assert main([*arguments, "onnx"]) == 1
    assert "int8 is of the format openvino" in capsys.readouterr().err
    assert main([*arguments, "openvino"]) == 0
    difference = float(re.search(r"differ from PyTorch's by ([\d.e-]+) at most", capsys.readouterr().out)[1])
    assert 1e-4 < difference < 0.1
    source = str(photos(tmp_path / "photos"))
    assert main(["index", source, "--model", str(small), "--out", str(tmp_path / "index")]) == 0
    assert main(["search", str(tmp_path / "index"), "a man", "--model", str(tmp_path / "graphs")]) == 1
    assert "has other weights" in capsys.readouterr().err
