"""The pipeline: its ranking against scores computed pair by pair, what it accepts and refuses, and its journeys."""

import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import save_checkpoint, tiny_config
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from cada.evaluation.encoding import Gallery, encode_queries
from cada.evaluation.matching import score_gallery
from configuration_cada import TASK
from modeling_cada import CADAForTextToImageRetrieval
from pipeline_cada import CADAPipeline
from processing_cada import CADAProcessor


SENTENCES = ["a woman in a red coat", "a man with a blue backpack and white sneakers", "a child", "black hair"]
ROWS = Features({"image": ImageFeature(), "text": Value("string")})
COLOURS = ("red", "green", "blue", "white", "black", "orange", "brown")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from conftest import bert_tokenizer, tiny_processor

    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, tiny_processor(bert_tokenizer()), 0)
    return folder


@pytest.fixture(scope="module")
def search(folder):
    return pipeline(TASK, model=str(folder), device="cpu")


@pytest.fixture(scope="module")
def images():
    """Seven images that differ in colour and in a gradient."""
    gradient = Image.linear_gradient("L").resize((20, 40))
    return [Image.composite(Image.new("RGB", (20, 40), c), Image.new("RGB", (20, 40)), gradient) for c in COLOURS]


@pytest.fixture(scope="module")
def pair_scores(folder, images):
    """S_G and S_L `(sentences, images)`, each pair alone."""
    model = CADAForTextToImageRetrieval.from_pretrained(folder).eval()
    processor = CADAProcessor.from_pretrained(folder)
    scores = torch.empty(2, len(SENTENCES), len(images))
    with torch.no_grad():
        for row, sentence in enumerate(SENTENCES):
            for column, image in enumerate(images):
                inputs = processor(images=image, text=[sentence], return_tensors="pt")
                out = model(**inputs)
                scores[0, row, column] = out.logits_per_text.item() * model.config.temperature
                states = model.encode_images(inputs["pixel_values"])
                match = model.match(inputs["input_ids"], inputs["attention_mask"], states)
                scores[1, row, column] = match.softmax(-1)[0, 1]
    return scores


def expected_ranking(global_scores, local_scores, rerank):
    """By hand: sort by S_G; sort the first `rerank` by the sum; the others keep their places behind."""
    order = sorted(range(len(global_scores)), key=lambda index: -global_scores[index])
    head = sorted(order[:rerank], key=lambda index: -(global_scores[index] + local_scores[index]))
    return [
        (index, global_scores[index] + local_scores[index], local_scores[index])
        if rank < len(head)
        else (index, global_scores[index], None)
        for rank, index in enumerate(head + order[rerank:])
    ]


def check(ranking, expected):
    assert [found["index"] for found in ranking] == [index for index, _, _ in expected]
    for found, (_, score, local) in zip(ranking, expected):
        assert found["score"] == pytest.approx(score, abs=1e-5)
        assert found["local_score"] == (None if local is None else pytest.approx(local, abs=1e-5))
        assert found["global_score"] == pytest.approx(score - (local or 0), abs=1e-5)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    rerank=st.integers(0, 9),
    batch_size=st.integers(1, 5),
    top_k=st.integers(1, 9),
    rows=st.sets(st.integers(0, 3), min_size=1),
)
def test_ranking_is_that_of_the_pairs(search, images, pair_scores, rerank, batch_size, top_k, rows):
    """For any number of sentences and candidates, in batches of any size."""
    rows = sorted(rows)
    sentences = [SENTENCES[row] for row in rows]
    rankings = search(sentences, images=images, rerank=rerank, batch_size=batch_size, top_k=top_k)
    assert len(rankings) == len(rows)
    for row, ranking in zip(rows, rankings):
        check(ranking, expected_ranking(*pair_scores[:, row].tolist(), rerank)[:top_k])


def test_chunks_of_images_change_nothing(search, images, pair_scores, monkeypatch):
    monkeypatch.setattr("pipeline_cada._IMAGES_AT_ONCE", 2)
    for row, ranking in enumerate(search(SENTENCES, images=images, rerank=5, batch_size=3)):
        check(ranking, expected_ranking(*pair_scores[:, row].tolist(), 5))


def test_one_sentence_gives_one_ranking(search, images, pair_scores):
    """By default ten images, and `rerank_k` (3) candidates."""
    check(search(SENTENCES[0], images), expected_ranking(*pair_scores[:, 0].tolist(), 3))
    assert len(search(SENTENCES[0], images * 2, rerank=0)) == 10


def test_ranks_like_the_evaluation(search, images):
    queries = encode_queries(search.model, search.processor, SENTENCES, progress=False)
    with torch.no_grad():
        pixels = search.processor(images=images, return_tensors="pt")["pixel_values"]
        outputs = search.model.get_image_features(pixels)
    embeds = torch.nn.functional.normalize(outputs.pooler_output, dim=-1)
    _, scores = score_gallery(search.model, queries, Gallery(embeds, outputs.last_hidden_state), 4)
    rankings = search(SENTENCES, images=images, rerank=4)
    assert [[found["index"] for found in ranking] for ranking in rankings] == scores.argsort(
        dim=1, descending=True
    ).tolist()


def test_images_are_encoded_once_for_all_sentences(search, images):
    seen = []
    hook = search.model.cada.vision_model.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    try:
        search(SENTENCES, images=images, batch_size=3)
    finally:
        hook.remove()
    assert seen == [3, 3, 1]


def test_arguments_of_the_pipeline_are_defaults_of_the_call(folder, images):
    search = pipeline(TASK, model=str(folder), device="cpu", top_k=2, rerank=0)
    ranking = search("a child", images=images)
    assert len(ranking) == 2 and ranking[0]["local_score"] is None
    ranking = search("a child", images=images, top_k=3, rerank=1)
    assert [found["local_score"] is None for found in ranking] == [False, True, True]


def test_a_calibrated_model_says_how_probable_a_match_is(search, images, monkeypatch):
    assert {found["probability"] for found in search(SENTENCES[0], images)} == {None}
    calibration = {"weights": [2.0, 0.5, -1.0]}
    monkeypatch.setattr(search.model.config, "calibration", calibration)
    for found in search(SENTENCES[0], images, rerank=3)[:3]:
        odds = found["local_score"] / (1 - found["local_score"])
        expected = 1 / (1 + math.exp(1 - 2 * found["global_score"]) / odds**0.5)
        assert found["probability"] == pytest.approx(expected, abs=1e-4)
    assert search(SENTENCES[0], images, rerank=3)[3]["probability"] is None
    assert search(SENTENCES[0], images, rerank=0)[0]["probability"] is None


def test_paths_addresses_and_images_are_the_same(search, images, tmp_path):
    images[0].save(tmp_path / "first.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/first.png"
        forms = [images[0], tmp_path / "first.png", str(tmp_path / "first.png"), address]
        ranking = search("a child", images=forms)
        with pytest.raises(ValueError, match=r"Image 1, http://127.0.0.1:\d+/no.png, cannot be read"):
            search("a child", images=[images[0], address.replace("first", "no")])
        server.shutdown()
        thread.join()
    assert sorted(found["index"] for found in ranking) == [0, 1, 2, 3]
    assert len({round(found["global_score"], 6) for found in ranking}) == 1
    assert search("a child", images=str(tmp_path / "first.png"))[0]["index"] == 0


def hidden_colour(folder):
    """A transparent PNG: white where a viewer looks, red under it."""
    image = Image.new("RGBA", (20, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 20, 10))
    image.save(folder / "hidden.png")
    return folder / "hidden.png"


def grey_of_16_bits(folder):
    """A 16-bit grey PNG, from black to white."""
    rows = np.linspace(0, 65_535, 40, dtype=np.uint16)
    Image.fromarray(np.repeat(rows[:, None], 20, axis=1)).save(folder / "grey.png")
    return folder / "grey.png"


@pytest.mark.parametrize("make", [hidden_colour, grey_of_16_bits])
def test_colours_are_those_of_the_processor(search, tmp_path, make):
    """Pillow's own conversion shows the hidden colour, and cuts 16 bits where it should scale them."""
    path = make(tmp_path)
    with Image.open(path) as image:
        inputs = search.processor(images=image, text=["a man"], return_tensors="pt")
        pillows = search.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert (inputs["pixel_values"] - pillows).abs().max() > 0.5
    with torch.no_grad():
        expected = search.model(**inputs).logits_per_text.item() * search.model.config.temperature
    for form in (path, str(path), path.read_bytes(), Image.open(path)):
        (found,) = search("a man", images=[form])
        assert found["global_score"] == pytest.approx(expected, abs=1e-6)


def test_a_huge_image_and_other_formats_are_refused(search, images, tmp_path):
    Image.new("1", (10_000, 9_001)).save(tmp_path / "huge.png")
    images[0].save(tmp_path / "other.tga")
    for name, message in (("huge.png", "more than 90,000,000"), ("other.tga", "it is no JPEG, PNG")):
        with pytest.raises(ValueError, match=f"Image 0, .*{name}, cannot be read: .*{message}"):
            search("a man", images=[tmp_path / name])


def test_sentences_may_stream(search, images):
    """As in every pipeline: a generator gives a generator, and a column of `datasets` serves as images."""
    rows = Dataset.from_dict({"image": images, "text": SENTENCES + ["a man"] * 3}, features=ROWS)
    rankings = search((sentence for sentence in SENTENCES), images=rows["image"], batch_size=3)
    assert not isinstance(rankings, list)
    assert list(rankings) == search(SENTENCES, images=images, batch_size=3)


def test_half_precision(folder, search, images):
    half = pipeline(TASK, model=str(folder), device="cpu", dtype="bfloat16")
    assert half.model.dtype is torch.bfloat16
    for found, exact in zip(half(SENTENCES, images=images, rerank=7), search(SENTENCES, images=images, rerank=7)):
        scores = {each["index"]: each["score"] for each in exact}
        assert all(each["score"] == pytest.approx(scores[each["index"]], abs=0.05) for each in found)


def test_what_is_wrong_is_named(search, images, tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8\xff no image")
    for arguments, message in (
        ({"images": []}, "`images` is empty"),
        ({"images": [images[0], tmp_path / "damaged.jpg"]}, r"Image 1, .*damaged.jpg, cannot be read"),
        (
            {"images": [str(tmp_path / "missing.jpg")]},
            r"Image 0, .*missing.jpg, cannot be read: there is no such file",
        ),
        ({"images": [tmp_path]}, "Image 0, .*: it is not a file"),
        ({"images": [7]}, "Image 0 cannot be read: int is no path"),
        ({"images": [images[0], Image.new("F", (4, 4))]}, "Image 1 cannot be read: pixels are floating-point numbers"),
        ({"images": (image for image in images)}, "`images` is of the type generator. Give a list"),
        ({"images": None}, "`images` is of the type NoneType"),
        ({"images": {"first": images[0]}}, "`images` is of the type dict"),
        ({"text": []}, "`text` is empty"),
        ({"text": ["a man", ". !"]}, "The sentence '. !' is empty"),
        ({"text": ["a man", None]}, "`text` holds None"),
        ({"top_k": 0}, "`top_k` is 0"),
        ({"top_k": 2.5}, "`top_k` is 2.5. Give the number of images to return, a whole number of 1 or more"),
        ({"rerank": -1}, "`rerank` is -1"),
        ({"rerank": True}, "`rerank` is True"),
        ({"batch_size": 0}, "`batch_size` is 0. Give the number of images to encode at once"),
        ({"batch_size": -1}, "`batch_size` is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            search(**{"text": "a man", "images": images, **arguments})
    with pytest.raises(TypeError, match="no argument top_n. Known: text, images, top_k, rerank"):
        search("a man", images=images, top_n=3)


def test_model_without_match_head_ranks_globally(folder, images, tmp_path):
    processor = CADAProcessor.from_pretrained(folder)
    config = tiny_config(use_atp=False, text_config={"vocab_size": 30524, "enc_token_id": 30523})
    search = CADAPipeline(CADAForTextToImageRetrieval(config).eval(), processor=processor, task=TASK, device="cpu")
    ranking = search("a man", images=images)
    assert len(ranking) == 7 and {found["local_score"] for found in ranking} == {None}
    with pytest.raises(ValueError, match="no match head"):
        search("a man", images=images, rerank=2)


def test_registered_pipeline_runs_the_code_beside_it(search, folder):
    """The checkpoint names its own code, but nobody has to trust it where the package is installed."""
    assert type(search) is CADAPipeline
    assert type(search.model) is CADAForTextToImageRetrieval
    config = json.loads((folder / "config.json").read_text())
    assert config["custom_pipelines"] == {
        TASK: {"impl": "pipeline_cada.CADAPipeline", "pt": ["AutoModel"], "type": "multimodal"}
    }


READER = """
import json, sys
from PIL import Image
from transformers import pipeline

images = [Image.new("RGB", (20, 40), colour) for colour in ("red", "green", "blue")]
results = []
for number, folder in enumerate(sys.argv[1:]):
    search = pipeline("text-to-image-person-retrieval", model=folder, trust_remote_code=True, device="cpu")
    assert type(search).__module__.startswith("transformers_modules.")
    results.append(search(["a woman in a red coat", "a man"], images=images))
    search.save_pretrained(f"again{number}")
    again = pipeline(model=f"again{number}", trust_remote_code=True, device="cpu")  # the only task of the checkpoint
    assert again(["a woman in a red coat", "a man"], images=images) == results[-1]
assert not [name for name in sys.modules if name.endswith("_cada") and "." not in name]
with open("results.json", "w") as file:
    json.dump(results, file)
"""


def test_pipeline_travels_with_the_checkpoint(search, folder, processor, tmp_path):
    """Two checkpoints in a process that has transformers and nothing of ours; then both are saved and read again."""
    save_checkpoint(tmp_path / "second", processor, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "reader.py").write_text(READER)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "reader.py", str(folder), str(tmp_path / "second")]
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = json.loads((elsewhere / "results.json").read_text())
    plain = [Image.new("RGB", (20, 40), colour) for colour in ("red", "green", "blue")]
    assert first == search(["a woman in a red coat", "a man"], images=plain)
    assert first != second
    files = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (elsewhere / "again0").iterdir()) == files


def test_whole_checkpoint_is_saved(search, folder, images, tmp_path):
    search.save_pretrained(tmp_path / "copy")
    copy = pipeline(TASK, model=str(tmp_path / "copy"), device="cpu")
    assert copy(SENTENCES, images=images) == search(SENTENCES, images=images)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in folder.iterdir()}
