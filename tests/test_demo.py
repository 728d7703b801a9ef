"""The demo, whole and small."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import cada.demo
from cada import cli
from cada.data.drawn import ATTRIBUTES, IMAGE_SIZE, load_drawn
from cada.demo import SENTENCES, build_start, compare, search, what_is_wrong
from cada.gallery.search import Result
from cada.hub.publish import release_files
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


@pytest.fixture(scope="module")
def splits():
    return load_drawn(train_persons=30, val_persons=2, test_persons=10, images_per_person=2, seed=5)


def test_sentences_name_attributes_of_the_drawn_set():
    for sentence, named in SENTENCES.items():
        for name, value in named.items():
            assert value in ATTRIBUTES[name]
            if value not in ("short", "man", "woman"):
                assert value in sentence


def test_start_is_a_complete_checkpoint(splits, tmp_path):
    build_start(splits, tmp_path, seed=0)
    assert "pipeline_cada.py" in release_files(tmp_path)
    processor = CADAProcessor.from_pretrained(tmp_path)
    model = CADAForTextToImageRetrieval.from_pretrained(tmp_path)
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.text_config.enc_token_id == processor.enc_token_id
    out = model(**processor(images=splits["test"][0]["image"], text=["a man"], return_tensors="pt"))
    assert out.logits_per_text.shape == (1, 1)
    captions = [caption for rows in splits.values() for row in rows["captions"] for caption in row]
    lengths = [len(ids) for ids in processor(text=captions, truncation=False, padding=False)["input_ids"]]
    assert np.mean(np.array(lengths) > model.config.max_text_length) < 0.15  # few captions are cut


def test_table_stands_between_chance_and_ceiling():
    """Four images of two persons; every caption names the sex, which tells them apart: ceiling 100. By chance half."""
    base = dict.fromkeys(ATTRIBUTES, "none")
    rows = Dataset.from_list(
        [
            {
                "image": "",
                "captions": ["x"] * 50,
                "person_id": person,
                "attributes": {**base, "sex": ("man", "woman")[person]},
                "named_attributes": [["sex"]] * 50,
            }
            for person in (0, 0, 1, 1)
        ]
    )
    names = ("R1", "R5", "R10", "mAP", "mINP")
    scores = {f"test_{stage}_{name}": 12.3 for stage in ("global", "local") for name in names}
    table = compare(rows, {**scores, "test_rerank_k": 32}).splitlines()
    values = {line.split("|")[1].strip(): [float(cell) for cell in line.split("|")[2:7]] for line in table[2:]}
    assert values["ceiling"] == [100.0] * 5
    assert 45 < values["chance"][0] < 55
    assert values["local matching (K = 32)"] == [12.3] * 5


def test_picture_shows_ranked_images_of_every_sentence(splits, tmp_path):
    build_start(splits, tmp_path / "model", seed=0)
    splits.save_to_disk(tmp_path / "drawn")
    search(tmp_path)
    with Image.open(tmp_path / "results.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > cada.demo.TOP * 2 * IMAGE_SIZE[1]
    # Each sentence has its row of images, and none of them is blank.
    rows = np.array_split(pixels, len(SENTENCES))
    assert all(row.std() > 30 for row in rows)


def test_caption_names_what_is_wrong():
    sentence, named = next(iter(SENTENCES.items()))
    shown = {f"attributes.{name}": value for name, value in named.items()}
    assert what_is_wrong(sentence, 1, Result("x", 1.0, "local", shown)) == ("1.  5/5 right", "#1a7f37")
    shown |= {"attributes.sex": "woman", "attributes.upper_colour": "blue"}
    text, colour = what_is_wrong(sentence, 2, Result("x", 1.0, "local", shown))
    assert (text, colour) == ("2.  3/5 right\nbut woman, blue", "#57606a")


@pytest.mark.slow
def test_demo_learns_and_local_beats_global(tmp_path, capsys):
    cli.main(["demo", "--out", str(tmp_path / "demo")])
    printed = capsys.readouterr().out
    table = (tmp_path / "demo" / "table.md").read_text()
    assert table.strip() in printed
    rank1 = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in table.splitlines()[2:]}
    local = rank1["local matching (K = 32)"]
    assert rank1["chance"] < 2 < rank1["global matching"] < local
    assert local >= 0.7 * rank1["ceiling"]
    assert (tmp_path / "demo" / "results.png").is_file()
    assert (tmp_path / "demo" / "index" / "index.json").is_file()
    images = sorted((tmp_path / "demo" / "images").glob("*.png"))
    assert len(images) == cada.demo.SAVED_IMAGES
    assert {Image.open(path).size for path in images} == {(IMAGE_SIZE[1], IMAGE_SIZE[0])}
