"""PRW-TBPS in its authors' layout, and own data with boxes: whole frames, of which the model sees the persons."""

import json
import sys

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from pedes_layout import LAYOUTS
from PIL import Image
from scipy.io import loadmat, savemat

from cada import cli
from cada.data.frames import read_frames
from cada.data.images import open_image
from cada.data.loading import load_pairs_dataset
from cada.data.pairs import read_row
from cada.files import CADAError


@pytest.fixture
def prw(tmp_path):
    return LAYOUTS["prw_tbps"](tmp_path)


def test_a_sentence_searches_all_boxes_of_the_test_frames(prw):
    """Persons 7 and 8 in frames 1 and 2 have descriptions; all boxes of all three frames are the gallery."""
    splits = read_frames(prw)
    assert [row["person_id"] for row in splits["train"]][:4] == [1, 2, 3, 2]  # nobody of frame 0 is left out
    assert all(len(row["captions"]) == 1 for row in splits["train"])
    rows = splits["test"]
    # Nobody looks for person 1 of train, nor for -2: they are wrong for every sentence, and no person of train.
    assert [row["person_id"] for row in rows] == [7, 8, -3, -4, 7, 8, -7, -8, 7, 8, -11, -12]
    assert [len(row["captions"]) for row in rows] == [2, 2, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0]
    assert rows[0]["captions"] == ["A man in red.", "He wears a hat. It is blue."]


def test_a_person_is_cut_out_of_the_frame(prw):
    """Four pixels of the first box are left of the frame."""
    rows = load_pairs_dataset("prw_tbps", prw)["train"]
    _, x, y, width, height = loadmat(prw / "annotations/c1s1_000000.jpg.mat")["box_new"][0].astype(int)
    assert (x, rows[0]["box"]) == (-4, [0, y, width - 4, height])
    with Image.open(prw / "frames/c1s1_000000.jpg") as frame:
        expected = frame.convert("RGB").crop((0, y, width - 4, y + height))
    assert np.array_equal(read_row(rows, 0, (16, 8))["image"], expected)


def test_check_compares_with_the_published_numbers(prw, capsys):
    (prw / "frames/c2s2_000100.jpg").unlink()
    assert cli.main(["check", "--dataset", "prw_tbps", "--data-dir", str(prw)]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    counts = ["train persons 6 -", "train images 18 -", "train captions 18 -"]
    assert lines[3:6] == counts
    assert lines[6:9] == ["test persons 2 450 differs", "test images 12 25,062 differs", "test captions 8 -"]
    assert "test 6 image(s) of persons whom no caption describes" in lines
    assert sum("c2s2_000100.jpg (row" in line and line.endswith("is missing") for line in lines) == 4


def test_what_is_wrong_is_named(prw, monkeypatch):
    def fails(match):
        with pytest.raises(CADAError, match=match):
            read_frames(prw)

    texts = json.loads((prw / "PRW-TBPS_train").read_text())
    for change, match in (
        ({"id": 9}, "PRW-TBPS_train describes person 9 in c1s1_000000.jpg, who has no box"),
        ({"pic_path": "../x.jpg"}, "row 0: the path .* leaves the data folder"),
        ({"id": "one"}, "row 0: the person id is 'one'"),
        ({"desrciption": ["", ""]}, "row 0: `captions` should be a list of strings with at least one"),
        ({"desrciption": "a man"}, "row 0: `captions` should be a list"),
    ):
        (prw / "PRW-TBPS_train").write_text(json.dumps([{**texts[0], **change}, *texts[1:]]))
        fails(match)
    (prw / "PRW-TBPS_train").write_text(json.dumps([{"id": 1}]))
    fails("row 0 should be an object with `pic_path`, `id` and `desrciption`")
    (prw / "PRW-TBPS_train").write_text(json.dumps(texts))
    file = prw / "annotations/c1s1_000000.jpg.mat"
    for content, match in (
        ({"box_new": np.zeros((1, 4))}, "five numbers for each box"),
        ({"other": np.zeros((1, 5))}, "holds none of box_new, anno_file, anno_previous"),
        ({"box_new": np.array([[1, 400, 0, 10, 10.0]])}, "describes person 1 in c1s1_000000.jpg, who has no box"),
    ):
        savemat(file, content)
        fails(match)
    file.write_bytes(b"no file of MATLAB")
    fails(r"c1s1_000000.jpg.mat cannot be read \(.*\). Fetch it again")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    fails("To read them: pip install")


def test_a_box_outside_of_its_frame_is_left_out_with_a_word(prw, caplog):
    file = prw / "annotations/c1s1_000000.jpg.mat"
    table = loadmat(file)["box_new"]
    savemat(file, {"box_new": np.vstack([table, [[-2, 400, 0, 10, 10]]])})
    assert len(read_frames(prw)["train"]) == 18
    assert "1 box(es) lie outside of their frame and are left out" in caplog.text


def own_data(folder, boxes):
    """Two persons in one frame of 20×10 pixels: red on the left, blue on the right."""
    frame = Image.new("RGB", (20, 10), "red")
    frame.paste("blue", (10, 0, 20, 10))
    frame.save(folder / "frame.png")
    files = [str(folder / "frame.png")] * 2
    rows = Dataset.from_dict({"image": files, "captions": [["red"], ["blue"]], "person_id": [1, 2], "box": boxes})
    DatasetDict(train=rows).save_to_disk(folder / "own")
    return str(folder / "own")


def test_own_data_with_boxes(tmp_path):
    rows = load_pairs_dataset(own_data(tmp_path, [[0, 0, 10, 10], [12, 2, 8, 8]]))["train"]
    left, right = (read_row(rows, row)["image"] for row in (0, 1))
    assert (left.size, right.size) == ((10, 10), (8, 8))
    assert (left.getpixel((9, 9)), right.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize("box", [[0, 0, 10], [-1, 0, 10, 10], [0, 0, 0, 10], None])
def test_a_row_without_a_box(tmp_path, box):
    with pytest.raises(CADAError, match="split 'train', row 1: `box` is .* Give x, y, width, height"):
        load_pairs_dataset(own_data(tmp_path, [[0, 0, 10, 10], box]))


def test_a_box_beyond_the_image(tmp_path, capsys):
    own = own_data(tmp_path, [[0, 0, 10, 10], [12, 2, 9, 8]])
    with pytest.raises(CADAError, match="frame.png' in row 1 cannot be decoded: the box 12, 2, 9, 8 is not inside"):
        read_row(load_pairs_dataset(own)["train"], 1)
    assert cli.main(["check", "--dataset", own]) == 1
    assert "frame.png (row 1) cannot be decoded (the box 12, 2, 9, 8 is not inside of 20×10" in capsys.readouterr().out
    assert len(load_pairs_dataset(own, skip_unreadable=True)["train"]) == 1
    assert open_image({"path": str(tmp_path / "frame.png"), "bytes": None}).size == (20, 10)
