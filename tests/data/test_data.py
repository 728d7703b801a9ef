"""Readers of the sets of the field in their authors' layout, damaged data, the drawn set, pairs and batches."""

import json
import os
import runpy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from pedes_layout import ANNOTATIONS, LAYOUTS, lay_out_icfg
from PIL import Image

import cada.data.loading
import cada.data.pedes
import processing_cada
from cada import cli
from cada.data.images import open_image
from cada.data.loading import hold_out_persons, load_pairs_dataset, shared_persons
from cada.data.pairs import GlobalBatches, PairCollator, PairDataset, add_attribute_spans, read_row
from cada.data.pedes import PEDES_SETS, read_annotations
from cada.files import CADAError
from processing_cada import AttributeMasker, clean_caption


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> dict[str, Path]:
    """The sets, undamaged; tests that damage one copy it."""
    return {name: lay_out(tmp_path_factory.mktemp(name)) for name, lay_out in LAYOUTS.items()}


@pytest.fixture
def cuhk(tmp_path) -> Path:
    return LAYOUTS["cuhk_pedes"](tmp_path)


def change_annotations(root: Path, change, name="reid_raw.json") -> None:
    records = json.loads((root / name).read_text())
    change(records)
    (root / name).write_text(json.dumps(records))


def test_official_counts_are_those_of_the_publications():
    assert PEDES_SETS["cuhk_pedes"].counts["train"] == (11003, 34054, 68126)
    assert PEDES_SETS["icfg_pedes"].counts == {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)}
    assert PEDES_SETS["rstp_reid"].counts["test"] == (200, 1000, 2000)


@pytest.mark.parametrize(
    ("name", "images", "captions"),
    [
        # 6 persons of 3 images; CUHK: two captions each and one image with three; the last test person has one image.
        ("cuhk_pedes", {"train": 18, "val": 6, "test": 4}, {"train": 37, "val": 12, "test": 16}),
        ("icfg_pedes", {"train": 18, "test": 9}, {"train": 18, "test": 9}),
        ("rstp_reid", {"train": 18, "val": 6, "test": 6}, {"train": 36, "val": 12, "test": 12}),
        ("ufine6926", {"train": 18, "test": 9}, {"train": 36, "test": 18}),
        # Three frames of four persons are searched by two sentences for each of two persons, in two of the frames.
        ("prw_tbps", {"train": 18, "test": 12}, {"train": 18, "test": 8}),
    ],
)
def test_each_layout_is_read_whole(laid_out, name, images, captions):
    splits = load_pairs_dataset(name, laid_out[name])
    assert {split: len(rows) for split, rows in splits.items()} == images
    assert {split: len(PairDataset(rows)) for split, rows in splits.items()} == captions
    row = splits["train"][0]
    assert set(row) == {"image", "captions", "person_id", "file_name"} | ({"box"} if name == "prw_tbps" else set())
    assert isinstance(row["image"], Image.Image)
    assert row["person_id"] == (0 if name in ("icfg_pedes", "rstp_reid") else 1)
    folder = {"ufine6926": "", "prw_tbps": "frames"}.get(name, "imgs")
    assert (laid_out[name] / folder / row["file_name"]).is_file()


def test_rows_are_those_of_the_annotation_file(laid_out):
    records = json.loads((laid_out["rstp_reid"] / "data_captions.json").read_text(encoding="utf-8"))
    rows = load_pairs_dataset("rstp_reid", laid_out["rstp_reid"])
    expected = [(r["img_path"], r["id"], r["captions"]) for r in records if r["split"] == "test"]
    assert list(zip(rows["test"]["file_name"], rows["test"]["person_id"], rows["test"]["captions"])) == expected
    assert "他穿着红色外套" in rows["train"]["captions"][0][0]


def test_other_spelling_of_the_icfg_file(tmp_path):
    lay_out_icfg(tmp_path, file_name="ICFG_PEDES.json")
    assert len(load_pairs_dataset("icfg_pedes", tmp_path)["train"]) == 18


@pytest.mark.parametrize(("count", "captions"), [(1, 4), (2, 8), (3, 9), (None, 16)])
def test_captions_per_image(laid_out, count, captions):
    """The four test images have 10, 2, 2, 2 captions."""
    splits = load_pairs_dataset("cuhk_pedes", laid_out["cuhk_pedes"], captions_per_image=count)
    assert len(PairDataset(splits["test"])) == captions
    first = json.loads((laid_out["cuhk_pedes"] / "reid_raw.json").read_text())[0]["captions"]
    assert splits["train"]["captions"][0] == first[:count]


def test_captions_per_image_has_to_be_positive(laid_out):
    with pytest.raises(CADAError, match="captions_per_image"):
        load_pairs_dataset("cuhk_pedes", laid_out["cuhk_pedes"], captions_per_image=0)


def remove_split(records):
    del records[2]["split"]


def set_value(row, key, value):
    return lambda records: records[row].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "row", "reason", "remedy"),
    [
        (remove_split, 2, "no `split`", "add one"),
        (set_value(3, "split", "training"), 3, "unknown split 'training'", "train, val, test"),
        (set_value(4, "captions", ["a man", " . "]), 4, "caption 1 is empty", "Write one"),
        (set_value(4, "captions", []), 4, "captions", "Correct the row"),
        (set_value(4, "captions", "a man"), 4, "captions", "list of strings"),
        (set_value(5, "captions", ["red " * 1000]), 5, "1000 words", "Shorten it"),
        (set_value(1, "file_path", "../outside.png"), 1, "leaves the data folder", "Correct the row"),
        (set_value(1, "file_path", "/etc/passwd"), 1, "leaves the data folder", "Correct the row"),
        (set_value(1, "file_path", None), 1, "image path", "Correct the row"),
        (set_value(6, "id", "seven"), 6, "'seven'", "whole number"),
        (lambda records: records[0].pop("file_path"), 0, "no `file_path`", "annotation file of CUHK-PEDES"),
        (lambda records: records.__setitem__(0, "text"), 0, "expected an object", "Fetch the file again"),
    ],
)
def test_damaged_row_is_named_with_file_and_remedy(cuhk, change, row, reason, remedy):
    change_annotations(cuhk, change)
    with pytest.raises(CADAError) as error:
        load_pairs_dataset("cuhk_pedes", cuhk)
    message = str(error.value)
    assert f"{cuhk / 'reid_raw.json'}, row {row}" in message
    assert reason in message
    assert remedy in message


def test_link_that_leaves_the_data_folder(cuhk, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (8, 8)).save(outside)
    os.symlink(outside, cuhk / "imgs" / "cam_a" / "link.png")
    change_annotations(cuhk, set_value(1, "file_path", "cam_a/link.png"))
    with pytest.raises(CADAError, match="row 1: the path 'cam_a/link.png' leaves the data folder"):
        load_pairs_dataset("cuhk_pedes", cuhk)


def test_file_without_splits_names_the_right_one(cuhk):
    change_annotations(cuhk, lambda records: [record.pop("split") for record in records])
    (cuhk / "reid_raw.json").rename(cuhk / "caption_all.json")
    with pytest.raises(CADAError, match="caption_all.json, row 0 has no `split`.*use reid_raw.json"):
        load_pairs_dataset("cuhk_pedes", cuhk)


@pytest.mark.parametrize("content", ["", "[", '{"a": 1}', "[]"])
def test_damaged_annotation_file(cuhk, content):
    (cuhk / "reid_raw.json").write_text(content)
    with pytest.raises(CADAError, match=r"reid_raw\.json.*(etch it again)"):
        load_pairs_dataset("cuhk_pedes", cuhk)


def test_missing_split(cuhk):
    change_annotations(cuhk, lambda records: [record.update(split="train") for record in records])
    with pytest.raises(CADAError, match="no row of split 'val'"):
        load_pairs_dataset("cuhk_pedes", cuhk)


def test_old_rstp_file_is_refused(tmp_path):
    """The file from before October 2022 has 3901/100/100 persons."""
    (tmp_path / "imgs").mkdir()
    records = [
        {"id": person, "img_path": f"{person:04d}.jpg", "captions": ["a man"], "split": split}
        for person, split in enumerate(["train"] * 3901 + ["val"] * 100 + ["test"] * 100)
    ]
    (tmp_path / "data_captions.json").write_text(json.dumps(records))
    with pytest.raises(CADAError, match="before October 2022.*3701/200/200"):
        read_annotations("rstp_reid", tmp_path)


def test_missing_folders(tmp_path):
    with pytest.raises(CADAError, match="needs --data-dir"):
        load_pairs_dataset("cuhk_pedes")
    with pytest.raises(CADAError, match="nowhere does not exist.*reid_raw.json"):
        load_pairs_dataset("cuhk_pedes", tmp_path / "nowhere")
    with pytest.raises(CADAError, match="no annotation file of CUHK-PEDES: looked for reid_raw.json"):
        load_pairs_dataset("cuhk_pedes", tmp_path)
    (tmp_path / "reid_raw.json").write_text("[]")
    with pytest.raises(CADAError, match="no folder imgs/"):
        load_pairs_dataset("cuhk_pedes", tmp_path)


def test_unknown_dataset():
    with pytest.raises(
        CADAError, match="Unknown data set 'cuhk-pedes'.*cuhk_pedes, icfg_pedes, rstp_reid, ufine6926, prw_tbps, demo"
    ):
        load_pairs_dataset("cuhk-pedes")


def damage(cuhk: Path) -> dict[int, str]:
    """Three bad files in train: missing, empty, truncated. Returns what is said of each, by row."""
    names = [record["file_path"] for record in json.loads((cuhk / "reid_raw.json").read_text())]
    (cuhk / "imgs" / names[1]).unlink()
    (cuhk / "imgs" / names[2]).write_bytes(b"")
    content = (cuhk / "imgs" / names[4]).read_bytes()
    (cuhk / "imgs" / names[4]).write_bytes(content[: len(content) // 2])
    return {1: "is missing", 2: "is empty", 4: "cannot be decoded"}


def test_missing_image_is_an_error(cuhk):
    damage(cuhk)
    name = json.loads((cuhk / "reid_raw.json").read_text())[1]["file_path"]
    with pytest.raises(CADAError) as error:
        load_pairs_dataset("cuhk_pedes", cuhk)
    expected = f"cuhk_pedes, split 'train': {cuhk / 'imgs' / name} (row 1) is missing; 2 such"
    assert str(error.value).startswith(expected)
    assert f"cada check --dataset cuhk_pedes --data-dir {cuhk})" in str(error.value)
    assert "--skip_unreadable" in str(error.value)


def test_truncated_image_is_an_error_where_it_is_read(cuhk):
    name = json.loads((cuhk / "reid_raw.json").read_text())[4]["file_path"]
    content = (cuhk / "imgs" / name).read_bytes()
    (cuhk / "imgs" / name).write_bytes(content[: len(content) // 2])
    rows = load_pairs_dataset("cuhk_pedes", cuhk)["train"]
    assert isinstance(read_row(rows, 3)["image"], Image.Image)
    with pytest.raises(CADAError, match=f"image '{name}' in row 4 cannot be decoded.*--skip_unreadable"):
        read_row(rows, 4)


def test_skip_unreadable_leaves_out_counts_and_lists(cuhk, caplog, monkeypatch):
    problems = damage(cuhk)
    monkeypatch.setattr(cada.data.loading.logger.parent, "propagate", True)  # else the messages stop there
    rows = load_pairs_dataset("cuhk_pedes", cuhk, skip_unreadable=True)["train"]
    assert len(rows) == 15
    assert "left out 3 of 18 images" in caplog.text
    for row, problem in problems.items():
        assert f"(row {row}) {problem}" in caplog.text
    for index in range(15):
        read_row(rows, index)


def test_only_the_splits_that_are_asked_for_are_loaded_and_checked(cuhk, laid_out):
    damage(cuhk)  # in train
    assert set(load_pairs_dataset("cuhk_pedes", cuhk, splits=["val", "test"])) == {"val", "test"}
    with pytest.raises(CADAError, match="split 'train'"):
        load_pairs_dataset("cuhk_pedes", cuhk, splits=["train", "test"])
    # A set without val: its persons come from train.
    assert set(load_pairs_dataset("icfg_pedes", laid_out["icfg_pedes"], splits=["val"])) == {"train"}
    with pytest.raises(CADAError, match="icfg_pedes has no split 'query'; it has train, test"):
        load_pairs_dataset("icfg_pedes", laid_out["icfg_pedes"], splits=["test", "query"])


def test_splits_of_own_data(tmp_path):
    rows = {"image": [b""], "captions": [["a man"]], "person_id": [1]}
    good, bad = Dataset.from_dict(rows), Dataset.from_dict({**rows, "captions": [[]]})
    DatasetDict(train=bad, test=good).save_to_disk(tmp_path / "own")
    assert set(load_pairs_dataset(str(tmp_path / "own"), splits=["test"])) == {"test"}
    for splits in (["val"], ["train", "test"], None):
        with pytest.raises(CADAError, match="split 'train', row 0: `captions`"):
            load_pairs_dataset(str(tmp_path / "own"), splits=splits)
    DatasetDict(test=good).save_to_disk(tmp_path / "test alone")
    for split in ("train", "val"):
        with pytest.raises(CADAError, match=f"test alone has no split '{split}'; it has test"):
            load_pairs_dataset(str(tmp_path / "test alone"), splits=[split])


def test_hold_out_persons_splits_by_person(laid_out):
    train = load_pairs_dataset("icfg_pedes", laid_out["icfg_pedes"])["train"]
    splits = hold_out_persons(train, 2)
    assert len(set(splits["val"]["person_id"])) == 2
    assert not set(splits["val"]["person_id"]) & set(splits["train"]["person_id"])
    assert sorted([*splits["val"]["file_name"], *splits["train"]["file_name"]]) == sorted(train["file_name"])
    assert list(hold_out_persons(train, 2)["val"]["file_name"]) == list(splits["val"]["file_name"])
    with pytest.raises(CADAError, match="Cannot hold out 6 of 6"):
        hold_out_persons(train, 6)


def test_persons_of_train_in_other_splits_are_counted():
    persons = {"train": [1, 2, 2, 3], "val": [4, 5], "test": [3, 2, 6, 2]}
    splits = DatasetDict({split: Dataset.from_dict({"person_id": ids}) for split, ids in persons.items()})
    assert shared_persons(splits) == {"test": 2}


def test_own_data_from_disk(tmp_path):
    image = Image.new("RGB", (8, 16), (200, 0, 0))
    rows = Dataset.from_dict({"image": [image, image], "captions": [["a man"], ["a woman"]], "person_id": [4, 5]})
    DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "own")
    splits = load_pairs_dataset(str(tmp_path / "own"))
    assert set(splits) == {"train", "val"}
    assert read_row(splits["val"], 1)["captions"] == ["a woman"]


def test_own_data_with_file_names_of_images(laid_out, tmp_path, caplog, monkeypatch):
    """Column `image` holds paths; one of them is damaged."""
    files = [str(path) for path in sorted((laid_out["rstp_reid"] / "imgs").iterdir())[:3]]
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(Path(files[0]).read_bytes()[:500])
    rows = Dataset.from_dict({"image": [*files, str(damaged)], "captions": [["a man"]] * 4, "person_id": [0, 0, 0, 1]})
    DatasetDict(train=rows).save_to_disk(tmp_path / "own")
    rows = load_pairs_dataset(str(tmp_path / "own"))["train"]
    assert isinstance(read_row(rows, 0)["image"], Image.Image)
    with pytest.raises(CADAError, match="row 3 cannot be decoded"):
        read_row(rows, 3)
    monkeypatch.setattr(cada.data.loading.logger.parent, "propagate", True)  # else the messages stop there
    rows = load_pairs_dataset(str(tmp_path / "own"), skip_unreadable=True)["train"]
    assert list(rows["person_id"]) == [0, 0, 0]
    assert "left out 1 of 4 images" in caplog.text
    assert "damaged.jpg (row 3) cannot be decoded" in caplog.text
    damaged.unlink()
    with pytest.raises(
        CADAError, match=r"split 'train': .*damaged.jpg \(row 3\) is missing; 1 such.*--skip_unreadable"
    ):
        load_pairs_dataset(str(tmp_path / "own"))
    assert len(load_pairs_dataset(str(tmp_path / "own"), skip_unreadable=True)["train"]) == 3


def test_own_data_without_splits(laid_out, tmp_path, capsys):
    """`Dataset.save_to_disk`; the remedy is run as the message says it."""
    rows = load_pairs_dataset("icfg_pedes", laid_out["icfg_pedes"], splits=["test"])["test"]
    rows.save_to_disk(tmp_path / "table")
    with pytest.raises(CADAError, match="table is one table without splits. Give them names: DatasetDict"):
        load_pairs_dataset(str(tmp_path / "table"))
    assert cli.main(["check", "--dataset", str(tmp_path / "table")]) == 1
    message = capsys.readouterr().err
    call = message[message.index("DatasetDict(") : message.index(".save_to_disk")]
    eval(call).save_to_disk(tmp_path / "splits")
    assert len(load_pairs_dataset(str(tmp_path / "splits"))["train"]) == len(rows)


def test_own_data_without_a_column(tmp_path):
    DatasetDict(train=Dataset.from_dict({"image": ["a.png"], "caption": ["a man"]})).save_to_disk(tmp_path / "own")
    with pytest.raises(CADAError, match="split 'train' lacks the column.*captions, person_id"):
        load_pairs_dataset(str(tmp_path / "own"))


def test_own_data_with_an_empty_caption(tmp_path):
    rows = Dataset.from_dict({"image": [b"", b""], "captions": [["a man"], ["!"]], "person_id": [1, 2]})
    DatasetDict(train=rows).save_to_disk(tmp_path / "own")
    with pytest.raises(CADAError, match="split 'train', row 1: caption 0 is empty"):
        load_pairs_dataset(str(tmp_path / "own"))


def test_spans_are_computed_once_per_caption_and_cached(laid_out, monkeypatch):
    rows = load_pairs_dataset("cuhk_pedes", laid_out["cuhk_pedes"])["train"]
    masker = AttributeMasker("phrase")
    tagged = add_attribute_spans(rows, masker)
    assert tagged["attribute_spans"][0] == [masker.find_spans(caption) for caption in rows["captions"][0]]
    tagger, calls = processing_cada._tagger(), []
    monkeypatch.setattr(processing_cada, "_tagger", lambda: calls.append(1) or tagger)
    again = add_attribute_spans(rows, masker)
    assert len(calls) == 1  # the look whether the tagger is there; all 37 captions come from the cache
    assert list(again["attribute_spans"]) == list(tagged["attribute_spans"])


def test_word_unit_splits_the_phrases_that_a_set_brings():
    caption = "A man in a long black coat."
    cleaned = clean_caption(caption)
    start = cleaned.index("long")
    rows = Dataset.from_dict({"captions": [[caption]], "attribute_spans": [[[[start, len(cleaned)]]]]})
    assert add_attribute_spans(rows, AttributeMasker("phrase"))["attribute_spans"] == rows["attribute_spans"]
    words = add_attribute_spans(rows, AttributeMasker("word"))["attribute_spans"][0][0]
    assert [cleaned[a:b] for a, b in words] == ["long", "black", "coat"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"captions": [["a man"], ["a"]], "person_id": [1, 2]}, None),
        (
            {"captions": ["a man", "a woman"], "person_id": [1, 2]},
            "Row 0: `captions` is the text 'a man'. Give a list",
        ),
        ({"captions": [["a"], ["b"]], "person_id": ["1", "2"]}, "Row 0: `person_id` is the text '1'. Give a whole"),
    ],
)
def test_letters_are_no_captions(columns, message):
    """Rows made in Python, which nothing has checked before."""
    rows = Dataset.from_dict({"image": [b""] * 2, **columns})
    if message is None:
        assert len(PairDataset(rows)) == 2
        return
    with pytest.raises(CADAError, match=message):
        PairDataset(rows)


def test_pairs_hold_every_caption_once(laid_out):
    rows = add_attribute_spans(
        load_pairs_dataset("cuhk_pedes", laid_out["cuhk_pedes"])["train"], AttributeMasker("phrase")
    )
    pairs = PairDataset(rows)
    samples = [pairs[index] for index in range(len(pairs))]
    assert [sample["caption"] for sample in samples] == [caption for row in rows["captions"] for caption in row]
    assert samples[3]["person_id"] == rows["person_id"][1]
    assert samples[3]["attribute_spans"] == rows["attribute_spans"][1][0]


def test_batches_have_the_inputs_of_the_model(laid_out, processor):
    rows = add_attribute_spans(
        load_pairs_dataset("rstp_reid", laid_out["rstp_reid"])["train"], processor.attribute_masker
    )
    pairs = PairDataset(rows)
    batch = PairCollator(processor)([pairs[0], pairs[7], pairs[20]])
    assert batch["pixel_values"].shape == (3, 3, 32, 16)
    assert batch["person_ids"].tolist() == [rows["person_id"][index] for index in (0, 3, 10)]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert set(batch) == {
        "pixel_values",
        "input_ids",
        "attention_mask",
        "masked_input_ids",
        "labels",
        "person_ids",
        "pair",
    }
    plain = PairCollator(processor, augment=False)([pairs[0]])["pixel_values"]
    assert torch.equal(plain, processor(images=pairs[0]["image"], return_tensors="pt")["pixel_values"])


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_processes_share_the_batches_of_one(pairs, batch_size, processes, drop_last, epoch):
    """The parts of n processes, side by side, are the batches of one process with the n-fold size, seeds too."""
    parts = [GlobalBatches(pairs, batch_size, 7, rank, processes, drop_last) for rank in range(processes)]
    one = GlobalBatches(pairs, batch_size * processes, 7, drop_last=drop_last or processes > 1)
    for batches in (*parts, one):
        batches.set_epoch(epoch)
    joined = [sum(step, []) for step in zip(*parts, strict=True)]
    assert joined == list(one)
    assert {len(batches) for batches in parts} == {len(joined)}
    rows = [pair for step in joined for pair, _ in step]
    size = batch_size * processes if drop_last or processes > 1 else 1
    assert len(set(rows)) == len(rows) == pairs // size * size


def test_every_epoch_has_another_order_and_other_seeds():
    batches = GlobalBatches(20, 5)
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    second = list(batches)
    assert [pair for step in first for pair, _ in step] != [pair for step in second for pair, _ in step]
    assert not {seed for step in first for _, seed in step} & {seed for step in second for _, seed in step}


def test_augmentation_and_masking_follow_from_the_seed(laid_out, processor):
    """A row is the same whatever stands beside it and was drawn before, and another one with another seed."""
    pairs = PairDataset(
        add_attribute_spans(
            load_pairs_dataset("rstp_reid", laid_out["rstp_reid"])["train"], processor.attribute_masker
        )
    )
    collate = PairCollator(processor)
    alone = collate([pairs[3, 5]])
    torch.rand(9)
    beside = collate([pairs[8, 1], pairs[3, 5], pairs[3, 6]])
    assert torch.equal(beside["pixel_values"][1], alone["pixel_values"][0])
    length = alone["labels"].shape[1]
    assert torch.equal(beside["labels"][1, :length], alone["labels"][0])
    assert not torch.equal(beside["pixel_values"][2], alone["pixel_values"][0])
    assert beside["pair"].tolist() == [8, 3, 3]


@pytest.mark.parametrize(("scale", "expected"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 4), (40, 8)])
def test_large_photographs_are_decoded_at_reduced_size(tmp_path, scale, expected):
    """At least twice the size that is asked for stays, on both sides; the picture is nearly the same."""
    ramp = np.linspace(0, 255, 16 * scale).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[:, None, None], (16 * scale, 24 * scale, 3)).copy())
    picture.save(tmp_path / "a.jpg", quality=95)
    image = {"path": str(tmp_path / "a.jpg"), "bytes": None}
    whole, reduced = open_image(image), open_image(image, (16, 8))
    assert whole.size == (24 * scale, 16 * scale)
    assert reduced.size == (-(-24 * scale // expected), -(-16 * scale // expected))
    assert min(reduced.size) >= min(32, 16 * scale)
    small = [np.asarray(found.resize((8, 16), Image.Resampling.BILINEAR)).astype(int) for found in (whole, reduced)]
    assert abs(small[0] - small[1]).max() <= 4


def test_check_command_compares_with_the_official_numbers(cuhk, monkeypatch, capsys):
    """Run as a user would, on a small copy with a missing image: exit status 1 and every fact on the screen."""
    damage(cuhk)
    monkeypatch.setattr(sys, "argv", ["cada", "check", "--dataset", "cuhk_pedes", "--data-dir", str(cuhk)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("cada", run_name="__main__")
    assert end.value.code == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "train persons 6 11,003 differs" in lines
    assert "train images 18 34,054 differs" in lines
    assert "test captions 16 6,156 differs" in lines
    assert "test 1 person(s) with a single image" in lines
    assert sum("(row 1) is missing" in line for line in lines) == 1
    assert sum("(row 4) cannot be decoded" in line for line in lines) == 1
    assert any(line.startswith("3 bad image file(s).") for line in lines)


def test_check_of_own_data(tmp_path, capsys):
    """The numbers without official ones, every bad image, in the table or a file, and persons of two splits."""
    Image.new("RGB", (8, 16)).save(tmp_path / "good.png")
    files = [str(tmp_path / "good.png"), str(tmp_path / "lost.png"), None]
    train = Dataset.from_dict({"image": files, "captions": [["a", "b"], ["c"], ["d"]], "person_id": [1, 1, 2]})
    inside = [(tmp_path / "good.png").read_bytes(), b"damaged"]
    test = Dataset.from_dict({"image": inside, "captions": [["e"], ["f"]], "person_id": [3, 3]})
    DatasetDict(train=train, validation=test).save_to_disk(tmp_path / "own")
    arguments = ["check", "--dataset", str(tmp_path / "own")]
    assert cli.main(arguments) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [str(tmp_path / "own"), "", "split found", "train persons 2", "train images 3"]
    assert {"train captions 4", "train 1 person(s) with a single image", "val persons 1", "val captions 2"} < set(
        lines
    )
    assert f"train: {tmp_path / 'lost.png'} (row 1) is missing" in lines
    assert "train: The image (row 2) is missing" in lines
    assert sum(line.startswith("val: The image (row 1) cannot be decoded") for line in lines) == 1
    assert lines[-1] == "3 bad image file(s)."
    assert cli.main([*arguments, "--quick"]) == 1
    assert "2 bad image file(s)." in capsys.readouterr().out
    sound = test.select([0])
    DatasetDict(train=sound).save_to_disk(tmp_path / "own")
    assert cli.main(arguments) == 0
    DatasetDict(train=sound, gallery=sound).save_to_disk(tmp_path / "own")
    assert cli.main(arguments) == 1
    assert "1 person(s) are both in train and in gallery." in capsys.readouterr().out


def test_check_is_content_with_a_complete_set(laid_out, monkeypatch, capsys):
    small = {"train": (6, 18, 18), "test": (3, 9, 9)}
    monkeypatch.setitem(
        PEDES_SETS,
        "icfg_pedes",
        cada.data.pedes.PedesSet("ICFG-PEDES", (ANNOTATIONS["icfg_pedes"],), "file_path", small),
    )
    arguments = ["check", "--dataset", "icfg_pedes", "--data-dir", str(laid_out["icfg_pedes"])]
    assert cli.main(arguments) == 0
    assert "0 bad image file(s). Numbers are official." in capsys.readouterr().out


def test_check_command_reports_errors_without_a_traceback(tmp_path, capsys):
    assert cli.main(["check", "--dataset", "cuhk_pedes", "--data-dir", str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


def test_person_in_two_splits_is_reported(cuhk, capsys):
    change_annotations(cuhk, set_value(0, "split", "test"))
    assert cli.main(["check", "--dataset", "cuhk_pedes", "--data-dir", str(cuhk), "--quick"]) == 1
    assert "1 person(s) are both in train and in test." in capsys.readouterr().out


def test_drawn_set_is_known_by_name(monkeypatch):
    small = DatasetDict(train=Dataset.from_dict({"captions": [["a", "b"]], "attribute_spans": [[[], []]]}))
    monkeypatch.setattr(cada.data.loading, "load_drawn", lambda domain: small)
    first = load_pairs_dataset("demo", captions_per_image=1)["train"]
    assert (first["captions"][0], first["attribute_spans"][0]) == (["a"], [[]])


def test_saved_rows_load_again(laid_out, tmp_path):
    load_pairs_dataset("icfg_pedes", laid_out["icfg_pedes"]).save_to_disk(tmp_path / "saved")
    assert load_from_disk(tmp_path / "saved")["test"][0]["image"].size[0] > 0
    assert set(load_pairs_dataset(str(tmp_path / "saved"))) == {"train", "test"}


def test_missing_tagger_is_an_error_of_the_data(laid_out, monkeypatch):
    rows = load_pairs_dataset("rstp_reid", laid_out["rstp_reid"])["train"]
    monkeypatch.setattr(processing_cada, "_tagger", cache(processing_cada._tagger.__wrapped__))
    monkeypatch.setattr(processing_cada.nltk.data, "path", [])
    monkeypatch.setattr(processing_cada, "_shipped_tagger", lambda: None)
    monkeypatch.setattr(processing_cada.nltk, "download", lambda name, quiet: False)
    with pytest.raises(CADAError, match="Attribute phrases cannot be found: .*python -m nltk.downloader"):
        add_attribute_spans(rows, AttributeMasker("phrase"))
