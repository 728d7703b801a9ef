"""
Bad annotations, texts, foreign checkpoints and command lines: each gives a right result or a clear error.

`pytest -m slow -k bad` tries many more damages of the same kinds.
"""

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb, bert_tokenizer, save_tiny_start, small_disk, tiny_processor, tried, without_rights
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import cada.evaluation.metrics
import cada.explain
import cada.hub.convert
import cada.hub.publish
import cada.hub.record
import train_cada
from cada import cli
from cada.data.loading import load_pairs_dataset
from cada.data.pairs import add_attribute_spans, read_row
from cada.data.pedes import read_annotations
from cada.files import CADAError, run_command
from cada.hub.card import model_card
from cada.hub.convert import convert, read_checkpoint
from cada.hub.record import read_run, write_run
from processing_cada import AttributeMasker, clean_caption


# Annotations


def written(folder: Path, records) -> Path:
    (folder / "reid_raw.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def test_a_row_twice_is_said(cuhk, caplog):
    records = json.loads((cuhk / "reid_raw.json").read_text())
    again = {**records[3], "file_path": f"./{records[3]['file_path']}"}
    splits = read_annotations("cuhk_pedes", written(cuhk, [*records, again]))
    assert sum(map(len, splits.values())) == len(records) + 1
    assert f"1 image(s) stand in several rows, the first in rows 3, {len(records)}." in caplog.text


NAMES_OUTSIDE = [
    *("/etc/passwd", "../reid_raw.json", "cam_a/../../reid_raw.json", "..", "../imgs-of-others/a.png"),
    *("..\\..\\etc\\passwd", "C:\\a.png", "cam_a/a\0.png", "cam_a/\x1b[2J.png", "cam_a/\ud800.png", ""),
    *("link/passwd", "loop/a.png"),
]


@pytest.mark.parametrize("name", NAMES_OUTSIDE, ids=ascii)
def test_names_never_leave_the_data_folder(cuhk, name):
    os.symlink("/etc", cuhk / "imgs" / "link")
    os.symlink("loop", cuhk / "imgs" / "loop")
    records = json.loads((cuhk / "reid_raw.json").read_text())
    records[1]["file_path"] = name
    if name == "loop/a.png":  # inside, but no file
        with pytest.raises(CADAError, match=r"cuhk_pedes, split 'train': .*loop/a.png \(row 1\) is missing"):
            load_pairs_dataset("cuhk_pedes", written(cuhk, records))
        return
    with pytest.raises(CADAError, match="row 1: the (image )?path"):
        read_annotations("cuhk_pedes", written(cuhk, records))


@pytest.mark.parametrize("person", [2**63, -(2**63), 10**40, 1.0, 1e400, "1", None, True, [1], {"id": 1}])
def test_a_person_is_a_whole_number(cuhk, person):
    records = json.loads((cuhk / "reid_raw.json").read_text())
    records[1]["id"] = person
    with pytest.raises(CADAError, match="row 1: the person id|Infinity is no number"):
        read_annotations("cuhk_pedes", written(cuhk, records))


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("\ud83d a man", "holds half a character at position 0"),
        ("\0\0\u200b", "is empty"),
        (" .!~ ", "is empty"),
        ("red " * 10_000, "10000 words"),
        ("红" * 10_000, "1 words and 10000 characters"),
        (5, "list of strings"),
        (["a man"], "list of strings"),
    ],
    ids=["surrogate", "control", "stripped", "words", "CJK", "number", "list"],
)
def test_a_caption_is_a_sentence(cuhk, caption, message):
    records = json.loads((cuhk / "reid_raw.json").read_text())
    records[1]["captions"][1] = caption
    with pytest.raises(CADAError, match=f"row 1: .*{message}"):
        read_annotations("cuhk_pedes", written(cuhk, records))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@tried(150, 5000)
def test_any_annotation_file_is_read_right_or_named(laid_out, tmp_path_factory, trials):
    """Values of any type in any place, and bytes of the file changed, added or removed."""
    root = tmp_path_factory.mktemp("fuzz")
    os.symlink(laid_out / "imgs", root / "imgs")
    records = json.loads((laid_out / "reid_raw.json").read_text())

    @settings(max_examples=trials)
    @given(st.data())
    def damage(data):
        changed = json.loads(json.dumps(records))
        if data.draw(st.booleans()):
            row = data.draw(st.integers(0, len(changed) - 1))
            where = data.draw(st.sampled_from(["id", "captions", "file_path", "split", "row", "caption"]))
            junk = data.draw(JUNK)
            if where == "row":
                changed[row] = junk
            elif where == "caption":
                changed[row]["captions"][0] = junk
            else:
                changed[row][where] = junk
            content = json.dumps(changed).encode()
        else:
            content = bytearray(json.dumps(changed, ensure_ascii=False).encode())
            start = data.draw(st.integers(0, len(content) - 1))
            content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        (root / "reid_raw.json").write_bytes(content)
        try:
            splits = read_annotations("cuhk_pedes", root)
        except CADAError as error:
            assert "reid_raw.json" in str(error)
            return
        for rows in splits.values():
            for record in rows:
                assert Path(os.path.realpath(record["path"])).is_relative_to(laid_out / "imgs")
                assert type(record["person_id"]) is int and record["captions"]
                assert all(clean_caption(caption) for caption in record["captions"])

    damage()


def saved_rows(folder: Path, **columns) -> str:
    rows = {"image": [b""] * 2, "captions": [["a man"], ["a woman"]], "person_id": [1, 2], **columns}
    DatasetDict(train=Dataset.from_dict(rows)).save_to_disk(folder / "own")
    return str(folder / "own")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2]}, "the column `image` is of the type"),
        ({"person_id": [1.5, 2.0]}, "row 0: the person id is 1.5"),
        ({"person_id": ["1", "2"]}, "row 0: the person id is '1'"),
        ({"captions": ["a man", "a woman"]}, "row 0: `captions` should be a list"),
        ({"captions": [["a man"], None]}, "row 1: `captions` should be a list"),
        ({"captions": [["a man"], ["a woman", None]]}, "row 1: `captions` should be a list"),
        ({"attribute_spans": [[[[0, 1]]], [[[0, 99]]]]}, "row 1: `attribute_spans` should have"),
        ({"attribute_spans": [[[[0, 1]]], [[[3, 2]]]]}, "row 1: `attribute_spans` should have"),
        ({"attribute_spans": [[[[0, 1]]], []]}, "row 1: `attribute_spans` should have"),
        ({"attribute_spans": [[[[0, 1, 2]]], [[]]]}, "row 0: `attribute_spans` should have"),
        ({"attribute_spans": [[[[0, 1]]], None]}, "row 1: `attribute_spans` should have"),
        ({"image": [b"", None]}, r"own, split 'train': The image \(row 1\) is missing; 1 such.*--skip_unreadable"),
        ({"image": ["http://a/b.png", None]}, r"own, split 'train': The image \(row 1\) is missing; 1 such"),
    ],
)
def test_own_data_of_another_form(tmp_path, columns, message):
    with pytest.raises(CADAError, match=message):
        load_pairs_dataset(saved_rows(tmp_path, **columns))


def test_own_data_with_a_row_without_image(tmp_path, caplog):
    images = [Image.new("RGB", (2, 2), "red"), None]
    folder = saved_rows(tmp_path, image=images, file_name=["a.png", "b.png"])
    with pytest.raises(CADAError, match=r"b.png \(row 1\) is missing; 1 such"):
        load_pairs_dataset(folder)
    rows = load_pairs_dataset(folder, skip_unreadable=True)["train"]
    assert list(rows["person_id"]) == [1]
    assert "train: left out 1 of 2 images" in caplog.text and "b.png (row 1) is missing" in caplog.text
    with pytest.raises(CADAError, match="The image 'b.png' in row 1 cannot be decoded: there is neither"):
        read_row(load_from_disk(folder)["train"], 1)


def test_own_data_with_two_validation_splits(tmp_path):
    rows = Dataset.from_dict({"image": [b""], "captions": [["a man"]], "person_id": [1]})
    DatasetDict(train=rows, val=rows, validation=rows).save_to_disk(tmp_path / "own")
    with pytest.raises(CADAError, match="both splits, 'val' and 'validation'"):
        load_pairs_dataset(str(tmp_path / "own"))


def test_own_data_in_the_format_of_another_library(tmp_path):
    """`save_to_disk` keeps the format, in which `datasets` would give arrays instead of lists and images."""
    columns = {"captions": [["a man", "he"]], "person_id": [5], "attribute_spans": [[[[2, 5]], []]]}
    rows = Dataset.from_dict({"image": [Image.new("RGB", (2, 3), "red")], **columns})
    DatasetDict(train=rows.with_format("numpy")).save_to_disk(tmp_path / "own")
    row = load_pairs_dataset(str(tmp_path / "own"))["train"][0]
    assert row.pop("image").size == (2, 3)
    assert row == {name: values[0] for name, values in columns.items()}


def test_own_data_that_is_damaged_or_empty(tmp_path):
    name = saved_rows(tmp_path)
    with pytest.raises(CADAError, match="No image of split 'train' can be read"):
        load_pairs_dataset(name, skip_unreadable=True)
    for path in (Path(name) / "train").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CADAError, match="is damaged or empty .*Write it again with `save_to_disk`"):
        rows = load_pairs_dataset(name)["train"]
        rows[1]
    (Path(name) / "dataset_dict.json").write_text("{")
    with pytest.raises(CADAError, match="is damaged or empty .*Write it again with `save_to_disk`"):
        load_pairs_dataset(name)
    empty = Dataset.from_dict({"image": [], "captions": [], "person_id": []})
    DatasetDict(train=empty).save_to_disk(tmp_path / "empty")
    with pytest.raises(CADAError, match="is damaged or empty"):
        load_pairs_dataset(str(tmp_path / "empty"))


def test_own_data_that_names_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    folder = saved_rows(tmp_path, image=[str(tmp_path / "pipe.png")] * 2)
    with pytest.raises(CADAError, match=r"row 0\) is not a file; 2 such"):
        load_pairs_dataset(folder)
    with pytest.raises(CADAError, match=r"No image of split 'train' can be read: .*pipe.png \(row 0\) is not a file"):
        load_pairs_dataset(folder, skip_unreadable=True)


def test_pickled_data_sets_are_refused(tmp_path):
    """`datasets` has a reader of pickles; it must not be reached."""
    (tmp_path / "rows").mkdir()
    marker = tmp_path / "marker"
    with open(tmp_path / "rows" / "train.pkl", "wb") as file:
        pickle.dump(Bomb(marker), file)
    for name, data_dir in ((str(tmp_path / "rows"), None), ("pandas", str(tmp_path / "rows"))):
        with pytest.raises(CADAError, match="Cannot load the data set|Unknown data set"):
            load_pairs_dataset(name, data_dir)
        assert not marker.exists()


def test_no_space_for_the_tables(cuhk, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_pairs_dataset("cuhk_pedes", cuhk)["train"]
    with small_disk(100):
        with pytest.raises(CADAError, match="table of attribute phrases cannot be written to the cache .*Free some"):
            add_attribute_spans(rows, AttributeMasker())
        with pytest.raises(CADAError, match="table of captions cannot be written to the cache .*Free some space"):
            load_pairs_dataset("cuhk_pedes", cuhk, captions_per_image=1)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another cache")
        with pytest.raises(CADAError, match="table of split 'train' cannot be written to the cache .*Free some space"):
            load_pairs_dataset("cuhk_pedes", cuhk)


# Texts

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=80)
TEXTS = {
    "empty": "",
    "stripped": ' . ! " ( ) * # : ; ~ ',
    "emoji": "a man 👨‍👩‍👧 in a red coat 🧥",
    "CJK": "他穿着红色外套和蓝色牛仔裤",
    "control": "a\x00 man\x07 in\x1b[31m a\x7f red\u200b coat\ufeff",
    "surrogates": "a \ud800man\udfff in a red coat",
    "10,000 words": "a man in a red coat " * 2000,
    "one long word": "red" * 10_000,
    "right to left": "رجل يرتدي معطفا أحمر \u202e man red a",
    "combining marks": "a m\u0301a\u0308n " + "e" + "\u0301" * 500,
    "only marks": "\u0301\u0301\u0301",
    "capitals that grow": "İSTANBUL ǅ ﬁ ẞ",
    "line ends": "a man\r\nin\u2028a\u0085red\tcoat",
}


@pytest.fixture(scope="module")
def shared_processor():
    return tiny_processor(bert_tokenizer())


@pytest.mark.parametrize("unit", ["phrase", "word"])
@pytest.mark.parametrize("case", TEXTS)
def test_any_text_is_read(shared_processor, case, unit):
    check_text(shared_processor, TEXTS[case], unit)


def check_text(processor, text: str, unit: str) -> None:
    """The spans lie in order inside the cleaned text and begin and end with words; ids and masks fit each other."""
    cleaned = clean_caption(text)
    cleaned.encode()  # no half characters
    assert cleaned.isprintable() and clean_caption(cleaned) == cleaned
    spans = AttributeMasker(unit).find_spans(text)
    last = 0
    for start, end in spans:
        assert last <= start < end <= len(cleaned)
        assert cleaned[start:end] == cleaned[start:end].strip()
        last = end
    inputs = processor(text=[text], attribute_spans=[spans], return_tensors="pt")
    ids, labels, masked = inputs["input_ids"][0], inputs["labels"][0], inputs["masked_input_ids"][0]
    assert 2 <= len(ids) <= processor.tokenizer.model_max_length
    assert ids[0] == processor.tokenizer.cls_token_id and ids[-1] == processor.tokenizer.sep_token_id
    assert torch.equal(torch.where(labels == -100, masked, labels), ids)
    assert torch.equal(processor(text=[cleaned], return_tensors="pt")["input_ids"][0], ids)


@tried(300, 20_000)
def test_any_text_at_all_is_read(shared_processor, trials):
    @settings(max_examples=trials)
    @given(ANY_TEXT, st.sampled_from(["phrase", "word"]))
    @example("İ\u0307.", "word")
    def read(text, unit):
        check_text(shared_processor, text, unit)

    read()


def test_control_characters_change_nothing(shared_processor):
    """As the tokenizer does: they are left out and part no words."""
    ids = [shared_processor(text=text)["input_ids"] for text in ("a man in red", "a m\x00an i\u200bn\ud800 red\x07")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("text", [5, [5], [None], [["a man"]], ["a man", b"a woman"]])
def test_what_is_no_text_is_named(shared_processor, text):
    with pytest.raises(TypeError, match="`text` should be a string or a list of strings"):
        shared_processor(text=text)


# Foreign checkpoints


@pytest.fixture(scope="module")
def foreign(reference) -> dict[str, torch.Tensor]:
    return reference["weights"]


def saved(folder: Path, weights, name: str = "weights.pth") -> Path:
    torch.save(weights, folder / name)
    return folder / name


QKV, BIAS = "visual_encoder.blocks.0.attn.qkv.weight", "itm_head.bias"
CLS, PATCH, POSITIONS = (
    "visual_encoder.cls_token",
    "visual_encoder.patch_embed.proj.weight",
    "visual_encoder.pos_embed",
)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (BIAS, torch.zeros(2, dtype=torch.int64), "'itm_head.bias' is of the type torch.int64"),
        (BIAS, torch.zeros(2, dtype=torch.complex64), "is of the type torch.complex64"),
        (BIAS, torch.zeros(2).to_sparse(), "not of plain floating-point numbers"),
        (BIAS, torch.tensor([0.0, float("nan")]), "'itm_head.bias' holds NaN"),
        (BIAS, torch.zeros(3), "The sizes do not fit"),
        (BIAS, torch.zeros(1).expand(10**9), "is not stored whole"),
        (QKV, torch.tensor(1.0), "is not made of q, k and v"),
        (QKV, torch.zeros(7, 32), "is not made of q, k and v"),
        (PATCH, torch.zeros(3), "give no model: .* Is it of 'cada_original'"),
        (POSITIONS, torch.tensor(0.0), "give no model: .* Is it of 'cada_original'"),
        (POSITIONS, torch.zeros(1, 4, 32), "no square number"),
        (CLS, torch.zeros(5), "The sizes do not fit"),
        (
            "visual_encoder.blocks.100000000.norm1.weight",
            torch.zeros(2),
            "no place for cada.vision_model.layers.100000000",
        ),
        ("vision_proj.bias", torch.tensor(0.0), "give no model: .* Is it of 'cada_original'"),
        ("itm_head.extra.bias", torch.zeros(2), "has no place for match_head.extra.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(foreign, tmp_path, key, value, message):
    path = saved(tmp_path, {**foreign, key: value})
    with pytest.raises(CADAError, match=message):
        convert("cada_original", path, num_attention_heads=2)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        5,
        "text",
        {"model": 5},
        {1: torch.zeros(1)},
        {"a": 1},
        {"a": torch.zeros(1), "module.a": torch.zeros(1)},
    ],
    ids=str,
)
def test_a_file_of_other_things_is_named(tmp_path, content):
    with pytest.raises(CADAError, match="weights.pth holds"):
        read_checkpoint(saved(tmp_path, content))


@pytest.mark.parametrize("arguments", [(0, 0), (16, 17), (10**9, 10**9), (-16, 16)])
def test_sizes_that_give_no_model(foreign, tmp_path, arguments):
    with pytest.raises(CADAError, match="give no model|sizes"):
        convert("cada_original", saved(tmp_path, foreign), num_attention_heads=2, image_size=arguments)


@tried(150, 5000)
def test_any_damage_to_a_foreign_file_is_named(tmp_path_factory, trials):
    folder = tmp_path_factory.mktemp("foreign")
    weights = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}
    torch.save({"model": weights, "epoch": 3}, folder / "zip.pth")
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "new.safetensors")
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}

    @settings(max_examples=trials)
    @given(st.data())
    def damage(data):
        name = data.draw(st.sampled_from(sorted(contents)))
        content = bytearray(contents[name])
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        else:
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = folder / f"damaged-{name}"
        path.write_bytes(content)
        try:
            read = read_checkpoint(path)
        except CADAError as error:
            assert path.name in str(error)
            return
        assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in read.items())

    damage()


@tried(40, 500)
def test_any_tensor_in_any_place_is_named_or_fits(foreign, tmp_path_factory, trials):
    """A model is whole and of finite numbers, whatever shape, type or name a tensor of the file has."""
    path = tmp_path_factory.mktemp("tensors") / "weights.pth"

    @settings(max_examples=trials)
    @given(st.data())
    def change(data):
        weights = dict(foreign)
        key = data.draw(st.sampled_from(sorted(weights)))
        shape = data.draw(st.lists(st.integers(0, 33), max_size=4))
        kind = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
        name = data.draw(st.sampled_from([key, f"module.{key}", key.replace("0", "1"), f"{key}.more", key[:-1]]))
        del weights[key]
        weights[name] = torch.ones(shape, dtype=kind)
        torch.save(weights, path)
        source = data.draw(st.sampled_from(["blip_original", "cada_original"]))
        try:
            model, _ = convert(source, path, num_attention_heads=2)
        except CADAError as error:
            assert str(error)
            return
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    change()


# The record of a run and its card


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint with a full record."""
    folder = save_tiny_start(tmp_path_factory.mktemp("released"))
    where = {**cada.hub.record.environment(), "dataset": "rstp_reid", "captions_per_image": 2}
    metrics = {f"{stage}_{name}": 50.0 for stage in ("global", "local") for name in cada.evaluation.metrics.METRICS}
    evaluation = {**where, "split": "test", "metrics": {**metrics, "queries": 12, "gallery": 6, "rerank_k": 3}}
    evaluation |= {"weights": cada.hub.record.checkpoint_digest(folder), "unreadable_images_skipped": False}
    evaluation["precision"] = "float32"
    training = {**where, "start": "random weights", "seed": 0, "minutes": 1.5, "selected_by": None}
    training |= {"recipe": {"epochs": 1}, "data": {"persons": 6, "images": 18, "pairs": 36}}
    write_run(folder, {**cada.hub.record.RANDOM_START, "trained_on": {"cuhk_pedes": 0}}, training, [evaluation])
    return folder


def places(value, path=()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, part in inner for place in places(part, (*path, name)))]


@tried(60, 1500)
def test_any_record_gives_a_card_or_is_named(released, tmp_path_factory, trials):
    folder = Path(shutil.copytree(released, tmp_path_factory.mktemp("record") / "run"))
    record = read_run(released)
    assert "| RSTPReid, NOT the official split" in model_card(folder, "org/name", "main").content
    everywhere = [place for place in places(record) if place]

    @settings(max_examples=trials)
    @given(st.sampled_from(everywhere), JUNK | st.just("removed"))
    @example(("evaluations", 0, "metrics", "global_R1"), float("nan"))
    @example(("evaluations", 0, "metrics", "rerank_k"), "removed")
    def damage(place, junk):
        changed = json.loads(json.dumps(record))
        part = changed
        for name in place[:-1]:
            part = part[name]
        if junk == "removed":
            del part[place[-1]]
        else:
            part[place[-1]] = junk
        text = json.dumps(changed)
        (folder / cada.hub.record.RUN_FILE).write_text(text, encoding="utf-8")
        try:
            model_card(folder, "org/name", "main")
        except CADAError as error:
            assert cada.hub.record.RUN_FILE in str(error)
            return
        json.loads(text, parse_constant=pytest.fail)  # NaN and infinity are no results

    damage()


# Command lines


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return save_tiny_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def word(start, foreign, tmp_path) -> dict[str, str]:
    """Arguments that are right; each test spoils one."""
    Image.new("RGB", (20, 40), "red").save(tmp_path / "person.png")
    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "file").write_text("x")
    return {
        "explain": {
            "--model": str(start),
            "--image": "person.png",
            "--text": "A man in a red coat.",
            "--out": "a.png",
        },
        "convert": {
            "--source": "cada_original",
            "--checkpoint": str(saved(tmp_path, foreign)),
            "--out": "out",
            "--tokenizer-name": "tokenizer",
            "--num-attention-heads": "2",
        },
        "publish": {"checkpoint": str(start), "repo_id": "org/name"},
        "check": {"--dataset": "cuhk_pedes", "--data-dir": "nowhere"},
        "train": {"--model_name_or_path": str(start), "--dataset": "rstp_reid", "--output_dir": "out"},
    }


COMMANDS = {
    **{name: partial(lambda name, words: cli.main([name, *words]), name) for name in ("explain", "convert", "check")},
    "publish": lambda words: cli.main(["publish", *words, "--card-only"]),
    "train": lambda words: run_command(
        lambda: train_cada.main([*words, "--do_predict", "--use_cpu", "--disable_tqdm", "true"])
    ),
}


def status_of(command: str, words: dict[str, str]) -> int:
    """Names without `--` are places in the line."""
    arguments = [part for name, value in words.items() for part in ([name, value] if name[0] == "-" else [value])]
    return COMMANDS[command](arguments)


def error_of(command: str, words: dict[str, str], capsys) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert status_of(command, words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert not any("Traceback" in line for line in lines) and len(lines[-1]) < 1200
    return lines[-1]


@pytest.mark.parametrize(
    ("command", "spoilt", "message"),
    [
        *((name, {"--unknown": "5"}, "--unknown") for name in COMMANDS),
        ("explain", {"--image": "."}, "not a file but a folder"),
        ("explain", {"--image": "nowhere.png"}, "The image nowhere.png cannot be read: there is no such file"),
        ("explain", {"--image": "/dev/zero"}, "not a file but a folder or a device"),
        ("explain", {"--image": "file"}, "The image file cannot be read: it is no JPEG"),
        ("explain", {"--text": ""}, "The sentence is empty"),
        ("explain", {"--text": "\0\u0301"}, "The sentence is empty"),
        ("explain", {"--layer": "99"}, "`layer` is 99"),
        ("explain", {"--layer": "x"}, "Invalid value for '--layer'"),
        ("explain", {"--out": "a"}, "--out a should end in .png"),
        ("explain", {"--out": "file/a.png"}, "The output folder file is a file"),
        ("explain", {"--out": "/proc/none/a.png"}, "The output folder /proc/none cannot be written to"),
        ("explain", {"--arrays": "a.txt"}, "--arrays a.txt should end in .npz"),
        ("explain", {"--model": "file"}, "file is a file. Give the folder"),
        ("explain", {"--model": "tokenizer"}, "tokenizer holds no config.json"),
        ("convert", {"--checkpoint": "."}, "The checkpoint . is not a file"),
        ("convert", {"--checkpoint": "/dev/zero"}, "The checkpoint /dev/zero is not a file"),
        ("convert", {"--checkpoint": "person.png"}, "person.png cannot be read with weights_only=True"),
        ("convert", {"--source": "blip", "--checkpoint": "file"}, "file is a file"),
        ("convert", {"--source": "blip", "--checkpoint": "tokenizer"}, "tokenizer holds no config.json"),
        ("convert", {"--source": "clip"}, "Invalid value for '--source'"),
        ("convert", {"--out": "file"}, "The output folder file is a file"),
        ("convert", {"--out": "/proc/none"}, "The output folder /proc/none cannot be written to"),
        ("convert", {"--tokenizer-name": "out"}, "The tokenizer out cannot be loaded"),
        ("convert", {"--num-attention-heads": "7"}, "give no model"),
        ("convert", {"--num-attention-heads": "-1"}, "give no model"),
        ("publish", {"checkpoint": "file"}, "The folder file does not exist"),
        ("publish", {"checkpoint": "tokenizer"}, "tokenizer holds no config.json"),
        ("publish", {"--evaluations": "tokenizer"}, "tokenizer holds no cada_run.json with an evaluation"),
        ("check", {"--data-dir": "file"}, "The data folder file does not exist"),
        ("check", {"--dataset": "rstp"}, "Do you mean rstp_reid"),
        ("check", {"--dataset": "rstp_ried"}, "Do you mean rstp_reid"),
        ("check", {"--dataset": "demo"}, "demo is drawn"),
        ("train", {"--output_dir": "file"}, "The output folder file is a file"),
        ("train", {"--output_dir": "/proc/none"}, "The output folder /proc/none cannot be written to"),
        ("train", {"--model_name_or_path": "file"}, "file is a file. Give the folder"),
        ("train", {"--data_dir": "file"}, "The data folder file does not exist"),
        ("train", {"--learning_rate": "nan"}, "`learning_rate` is nan. Give a number"),
        ("train", {"--weight_decay": "-1"}, "`weight_decay` is -1.0"),
        ("train", {"--learning_rate": "fast"}, "invalid float value: 'fast'"),
        ("train", {"--config_overrides": "."}, "neither a JSON object nor a file"),
        ("train", {"--config_overrides": "[" * 5000}, "neither a JSON object nor a file"),
        ("train", {"--config_overrides": '{"a":' * 100_000}, "too deeply"),
        ("train", {"--config_overrides": '{"mask_rate": NaN}'}, "NaN is no number of JSON"),
        ("train", {"--config_overrides": "person.png"}, "person.png is not a JSON file"),
        ("train", {"--config_overrides": '{"mask_rate": "much"}'}, "mask_rate"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(word, command, spoilt, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in error_of(command, {**word[command], **spoilt}, capsys)


def test_arguments_that_are_missing(capsys):
    for command in COMMANDS:
        assert "equired" in (message := error_of(command, {}, capsys)) or "Missing" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a JSON file"),
        (b"[1]", "should be a JSON object"),
        (b"\xff\xfe{", "is not a JSON file"),
        (b'{"dataset": "rstp_reid", "unknown": 5}', "--unknown"),
        (b'{"dataset": {"a": 1}, "output_dir": "out"}', "Unknown data set"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_recipe_is_named(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "recipe.json").write_bytes(content)
    small = json.dumps(
        {name: {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} for name in TOWERS}
    )
    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["recipe.json", "--tokenizer_name", "tokenizer", "--config_overrides", small]
    assert COMMANDS["train"](words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


TOWERS = ("vision_config", "text_config")


def test_a_recipe_that_is_a_folder_or_closed(tmp_path, capsys):
    (tmp_path / "recipe.json").mkdir()
    assert COMMANDS["train"]([str(tmp_path / "recipe.json")]) == 1
    assert "recipe.json is not a file" in capsys.readouterr().err
    (tmp_path / "recipe.json").rmdir()
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "recipe.json").chmod(0)
    with without_rights():
        assert COMMANDS["train"]([str(tmp_path / "recipe.json")]) == 1
    assert capsys.readouterr().err.startswith("error: The recipe: ")


@pytest.mark.parametrize("command", ["explain", "convert", "publish"])
def test_a_full_disk_ends_the_command_and_leaves_what_was_there(command, word, tmp_path, monkeypatch, capsys):
    """First a run with space, then one without; nothing of the first is lost, and nothing half is left."""
    monkeypatch.chdir(tmp_path)
    words = word[command]
    if command == "publish":
        shutil.copytree(words["checkpoint"], tmp_path / "run")
        words["checkpoint"] = "run"
    assert status_of(command, words) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if command == "publish":
        words["repo_id"] = "org/another"
    if command == "convert":
        words = {**words, "--out": "another"}  # the first is not overwritten
    with small_disk(1000):
        message = error_of(command, words, capsys)
    assert "cannot be written" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", [TEXTS[name] for name in TEXTS if name not in ("empty", "stripped", "only marks")])
def test_any_sentence_is_explained(word, text, tmp_path, monkeypatch, capsys):
    """The picture stays of a size that can be looked at."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20_000, 2), "red").save(tmp_path / "person.png")
    assert status_of("explain", {**word["explain"], "--text": text, "--arrays": "a.npz"}) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width < 4000 and picture.height < 4000
    assert len(np.load(tmp_path / "a.npz")["words"]) <= 11
