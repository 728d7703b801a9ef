"""Several persons in a frame: boxes of a file, on photos and videos of drawn streets."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import save_tiny_start
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from street import draw_people, draw_street

from cada.cli import main
from cada.data.images import box_within
from cada.evaluation.encoding import encode_gallery, encode_queries
from cada.evaluation.matching import score_gallery
from cada.files import CADAError
from cada.gallery.index import build_index, open_index
from cada.gallery.regions import Region, clock
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


PEOPLE = draw_people(8, 0)
SENTENCE = "a man in a red coat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_start(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple]:
    """Photos and boxes by their names."""
    return {"a.png": draw_street(PEOPLE[:3], 0), "sub/b.png": draw_street(PEOPLE[3:5], 1)}


@pytest.fixture
def photos(drawn, tmp_path) -> Path:
    for name, (image, _) in drawn.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def rows_of(drawn) -> list[dict]:
    return [
        {"path": path, "box": box, "track": f"{number:03}"}
        for path, (_, boxes) in drawn.items()
        for number, box in enumerate(boxes)
    ]


def write_csv(file: Path, rows: list[dict]) -> Path:
    sides = ("x", "y", "width", "height")
    flat = [{**row, **dict(zip(sides, row["box"]))} for row in rows]
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, [name for name in flat[0] if name != "box"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)
    return file


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_coco(file: Path, rows: list[dict]) -> Path:
    paths = sorted({row["path"] for row in rows})
    images = [{"id": number, "file_name": path, "width": 1, "height": 1} for number, path in enumerate(paths)]
    persons = [
        {
            "id": number,
            "image_id": paths.index(row["path"]),
            "category_id": 1,
            "bbox": row["box"],
            "track": row["track"],
        }
        for number, row in enumerate(rows)
    ]
    others = [
        {**persons[0], "category_id": 2, "bbox": [0, 0, 9, 9]},
        {**persons[0], "iscrowd": 1, "bbox": [1, 1, 9, 9]},
    ]
    names = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    file.write_text(json.dumps({"images": images, "annotations": persons + others, "categories": names}))
    return file


WRITERS = {"boxes.csv": write_csv, "boxes.jsonl": write_jsonl, "boxes.json": write_coco}


def build(source, index, model=None, **options):
    return build_index(source, index, None if model is None else str(model), progress=False, **options)


def names_in(index) -> list[str]:
    return [name for table in open_index(index).store.tables(["path"]) for name in table["path"].to_pylist()]


def crop_of(image: Image.Image, box) -> Image.Image:
    x, y, width, height = box
    return image.crop((x, y, x + width, y + height))


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB")))


@pytest.mark.parametrize(
    "region, name",
    [
        (Region("a.jpg"), "a.jpg"),
        (Region("a b#c.jpg", (0, 1, 20, 300)), "a b#c.jpg#xywh=0,1,20,300"),
        (Region("a.mp4", None, 0.0), "a.mp4#t=00:00:00.000"),
        (Region("a.mp4", (1, 2, 3, 4), 3725.04), "a.mp4#t=01:02:05.040&xywh=1,2,3,4"),
        (Region("a.mp4", None, 360_000.0), "a.mp4#t=100:00:00.000"),
    ],
)
def test_a_region_has_a_name(region, name):
    assert region.name == name
    assert Region.of(name) == region


@pytest.mark.parametrize("name", ["a#", "#", "a#xywh=1,2,3", "a#t=1.jpg", "a#xywh=1,2,3,4\n", "a#xywh=-1,2,3,4"])
def test_other_names_are_paths(name):
    assert Region.of(name) == Region(name)


def test_what_lies_outside_of_an_image_is_cut():
    assert box_within((10, 20, 30, 40), (100, 100)) == (10, 20, 30, 40)
    assert box_within((-5, 90.4, 30, 40), (100, 100)) == (0, 90, 25, 10)
    assert box_within((10.4, 10.6, 5.2, 5.2), (100, 100)) == (10, 11, 6, 5)  # to 15.6 and 15.8
    for nothing in ((10, 10, 0, 5), (10, 10, 5, -1), (100, 0, 5, 5), (0, -9, 5, 9)):
        assert box_within(nothing, (100, 100)) is None
    assert clock(59.9996) == "00:01:00.000"


@pytest.mark.parametrize("kind", WRITERS)
def test_boxes_are_cut_out_and_found(checkpoint, drawn, photos, tmp_path, kind):
    boxes = WRITERS[kind](tmp_path / kind, rows_of(drawn))
    changes = build(photos, tmp_path / "index", checkpoint, boxes=boxes, batch_size=2, shard_size=3)
    assert (changes.added, changes.unreadable, changes.empty) == (5, [], 0)
    gallery = open_index(tmp_path / "index")
    assert gallery.columns == {"track": "string"}
    for path, (image, boxes) in drawn.items():
        for number, box in enumerate(boxes):
            first = gallery.search_image(crop_of(image, box), top=1)[0]
            assert (first.path, first.box, first.time) == (path, tuple(box), None)
            assert first.score == pytest.approx(1, abs=1e-3)
            assert first.metadata == {"track": f"{number:03}"}
            assert same(gallery.image(first.name), crop_of(image, box))
            assert same(gallery.frame(first.name), image)
    assert gallery.verify(progress=False) == []
    assert {result.metadata["track"] for result in gallery.search(SENTENCE, where="track=001")[0]} == {"001"}


def test_both_stages_read_the_crop(checkpoint, drawn, photos, tmp_path):
    boxes = write_csv(tmp_path / "boxes.csv", rows_of(drawn))
    build(photos, tmp_path / "index", checkpoint, boxes=boxes)
    build(photos, tmp_path / "kept", checkpoint, boxes=boxes, keep_patches=True)
    crops = [crop_of(drawn[row["path"]][0], row["box"]) for row in rows_of(drawn)]
    names = [Region(row["path"], tuple(row["box"])).name for row in rows_of(drawn)]
    model = CADAForTextToImageRetrieval.from_pretrained(checkpoint).eval()
    processor = CADAProcessor.from_pretrained(checkpoint)
    images = encode_gallery(model, processor, Dataset.from_dict({"image": crops}), progress=False)
    scores = score_gallery(model, encode_queries(model, processor, [SENTENCE], progress=False), images, 5)[1][0]
    for index in ("index", "kept"):
        results = open_index(tmp_path / index).search(SENTENCE, rerank=5)[0]
        assert [result.name for result in results] == [names[n] for n in scores.argsort(descending=True).tolist()]
        expected = scores.sort(descending=True).values.tolist()
        assert [result.score for result in results] == pytest.approx(expected, abs=5e-4)


def test_a_changed_file_renews_all_its_persons(checkpoint, drawn, photos, tmp_path):
    boxes = write_csv(tmp_path / "boxes.csv", rows_of(drawn))
    build(photos, tmp_path / "index", checkpoint, boxes=boxes)
    again = build(photos, tmp_path / "index")  # it knows the file of boxes
    assert (again.added, again.changed, again.removed, again.unchanged) == (0, 0, 0, 5)
    new, _ = draw_street(PEOPLE[5:], 9)
    new.save(photos / "a.png")
    changed = build(photos, tmp_path / "index")
    assert (changed.added, changed.changed, changed.removed, changed.unchanged) == (0, 3, 0, 2)
    box = rows_of(drawn)[0]["box"]
    assert same(open_index(tmp_path / "index").image(Region("a.png", tuple(box)).name), crop_of(new, box))
    write_csv(boxes, [{**rows_of(drawn)[0], "box": (1, 2, 30, 40)}, *rows_of(drawn)[2:]])
    moved = build(photos, tmp_path / "index")
    assert (moved.added, moved.changed, moved.removed, moved.unchanged) == (1, 0, 2, 3)
    (photos / "sub" / "b.png").unlink()
    gone = build(photos, tmp_path / "index")
    assert (gone.removed, gone.unchanged) == (0, 2)  # of a file that cannot be read the persons are not counted
    assert gone.unreadable == [("sub/b.png", f"is not there, but {boxes}, row 3 names it")]


def test_odd_boxes_are_cut_or_named(checkpoint, photos, tmp_path):
    tall = Image.new("RGB", (40, 60), "red")
    tall.getexif()[274] = 6  # lies on its side: 60 wide and 40 high as it is shown
    tall.save(photos / "turned.jpg", exif=tall.getexif())
    (photos / "damaged.png").write_bytes((photos / "a.png").read_bytes()[:99])
    places = [("a.png", (-10, -10, 60, 60)), ("a.png", (300, 100, 100, 100)), ("a.png", (5, 5, 0, 9))]
    places += [("a.png", (300, 0, 100, 9)), ("a.png", (300.2, 0, 90, 9)), ("a.png", (320, 0, 9, 9))]
    places += [("turned.jpg", (50, 0, 20, 60)), ("gone.png", (1, 1, 9, 9)), ("damaged.png", (1, 1, 9, 9))]
    boxes = write_jsonl(tmp_path / "boxes.jsonl", [{"path": path, "box": box} for path, box in places])
    changes = build(photos, tmp_path / "index", checkpoint, boxes=boxes)
    cut = [(0, 0, 50, 50), (300, 100, 20, 60), (300, 0, 20, 9)]
    expected = [*(Region("a.png", box).name for box in cut), Region("turned.jpg", (50, 0, 10, 40)).name]
    assert names_in(tmp_path / "index") == sorted(expected)
    assert changes.empty == 1  # sub/b.png
    assert changes.unreadable[:3] == [
        ("a.png", f"{boxes}, row 3: the box 5, 5, 0, 9 has no area inside of the 320×160 pixels"),
        ("a.png", f"{boxes}, row 5: the box 300.2, 0, 90, 9 is that of {boxes}, row 4, too"),
        ("a.png", f"{boxes}, row 6: the box 320, 0, 9, 9 has no area inside of the 320×160 pixels"),
    ]
    assert [path for path, _ in changes.unreadable[3:]] == ["damaged.png", "gone.png"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("b.txt", "", "is of no kind that is read. Give COCO JSON, CSV or JSONL."),
        ("b.csv", "file,x,y,width,height\n", "has no column that names the images: one of path, file_name, image."),
        (
            "b.csv",
            "path,x,y\na.png,1,2\n",
            "has no boxes: give the columns x, y, width, height, or in JSONL a list `box`.",
        ),
        (
            "b.csv",
            "path,x,y,width,height\na.png,1,2,3,?\n",
            "row 1: the box is ('1', '2', '3', '?'). Give four numbers",
        ),
        ("b.jsonl", '{"path": "a.png", "box": [1, 2, 3]}', "row 1: the box is [1, 2, 3]. Give four numbers"),
        ("b.jsonl", '{"path": 3, "box": [1, 2, 3, 4]}', "row 1: `path` is 3. Give the path of an image."),
        ("b.jsonl", '{"path": "a.png", "box": [1, 2, 3, 4], "time": -1}', "row 1: `time` is -1. Give seconds"),
        (
            "b.jsonl",
            '{"path": "x.png", "box": [1, 2, 3, 4]}',
            "has no box in any of the 2 files to index: it names x.png.",
        ),
        ("b.jsonl", "", "has no column that names the images"),
        ("b.json", "[]", "has no `images` and `annotations`, as COCO JSON has."),
        ("b.json", '{"images": [], "annotations": [{"id": 1}]}', "is not as COCO JSON is: KeyError 'image_id'."),
        (
            "b.json",
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}',
            "has no category `person`, but cat, dog.",
        ),
        (
            "b.json",
            '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "category_id": 7, '
            '"bbox": [1, 1, 9, 9]}], "categories": [{"id": 1, "name": "pedestrian"}]}',
            "is not as COCO JSON is: KeyError 7.",
        ),
        ("b.csv", "path,x,y,width,height\na.png,0.1,0.1,0.2,0.3\n", "b.csv x, y, width and height in pixels?"),
    ],
)
def test_wrong_files_of_boxes_are_explained(checkpoint, photos, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(CADAError) as error:
        build(photos, tmp_path / "index", checkpoint, boxes=tmp_path / name)
    assert message in str(error.value)


def test_a_file_of_boxes_may_move(checkpoint, drawn, photos, tmp_path):
    boxes = write_csv(tmp_path / "boxes.csv", rows_of(drawn))
    build(photos, tmp_path / "index", checkpoint, boxes=boxes)
    boxes.rename(tmp_path / "moved.csv")
    with pytest.raises(CADAError, match=f"--boxes {boxes} is not a file that is there. Say where the boxes are."):
        build(photos, tmp_path / "index")
    assert build(photos, tmp_path / "index", boxes=tmp_path / "moved.csv").unchanged == 5


def test_commands_show_crop_and_frame(checkpoint, drawn, photos, tmp_path, capsys):
    boxes = write_csv(tmp_path / "boxes.csv", rows_of(drawn))
    index = str(tmp_path / "index")
    (photos / "empty.png").write_bytes((photos / "a.png").read_bytes())
    assert main(["index", str(photos), "--model", str(checkpoint), "--out", index, "--boxes", str(boxes)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"{index}: 5 persons; 5 added, 0 changed, 0 removed, 0 unchanged, 0 unreadable.",
        "Nobody is in 1 file.",
    ]
    expected = open_index(index).search(SENTENCE, top=2)[0]
    assert main(["search", index, SENTENCE, "--top", "2"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]] == [each.name for each in expected]
    assert main(["search", index, SENTENCE, "--top", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["results"][0]
    assert (found["path"], found["box"], found["time"]) == (expected[0].path, list(expected[0].box), None)
    sizes = {}
    for name, more in {"crops.png": [], "frames.png": ["--frames"]}.items():
        assert main(["search", index, SENTENCE, "--top", "1", "--picture", str(tmp_path / name), *more]) == 0
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        sizes[name] = picture.width
        red = (np.abs(pixels - (255, 45, 45)).sum(-1) < 60).sum()
        assert (red > 100) == bool(more)  # the box
    assert sizes["frames.png"] > 2 * 192 > sizes["crops.png"]
    capsys.readouterr()
    assert main(["search", index, SENTENCE, "--frames"]) == 1
    assert capsys.readouterr().err == "error: --frames draws, but there is no --picture. Give its name.\n"
    assert main(["info", index]) == 0
    assert f"persons           boxes of {boxes}" in capsys.readouterr().out
    assert main(["export", index, str(tmp_path / "rows.parquet")]) == 0
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [(row["path"], tuple(row["box"])) for row in rows] == [
        (r.path, r.box) for r in map(Region.of, names_in(index))
    ]


def test_whole_files_that_end_like_a_region_are_named(checkpoint, photos, tmp_path):
    os.rename(photos / "a.png", photos / "a#xywh=1,2,3,4")
    list_ = tmp_path / "list.csv"
    list_.write_text('path\nsub/b.png\n"a#xywh=1,2,3,4"\n')
    changes = build(list_, tmp_path / "index", checkpoint, root=photos)
    assert changes.unreadable == [("a#xywh=1,2,3,4", "has a name that ends like a box or a time; rename it")]


def test_metadata_of_the_image_and_of_the_person_stand_together(checkpoint, drawn, photos, tmp_path):
    boxes = write_csv(tmp_path / "boxes.csv", rows_of(drawn))
    list_ = tmp_path / "list.csv"
    list_.write_text("path,camera\na.png,1\nsub/b.png,2\n")
    build(list_, tmp_path / "index", checkpoint, root=photos, boxes=boxes)
    gallery = open_index(tmp_path / "index")
    assert gallery.columns == {"camera": "int64", "track": "string"}
    (found,) = gallery.search(SENTENCE, where=["camera=2", "track=001"])[0]
    assert (found.path, found.box) == ("sub/b.png", tuple(drawn["sub/b.png"][1][1]))
    list_.write_text("path,track\na.png,1\nsub/b.png,2\n")
    with pytest.raises(CADAError, match="Both the list of images and the persons have a column `track`."):
        build(list_, tmp_path / "index", boxes=boxes)


def test_persons_on_the_images_of_a_data_set(checkpoint, drawn, tmp_path):
    images = Dataset.from_dict({"image": [image for image, _ in drawn.values()], "file_name": ["a.png", "clip.mp4"]})
    images.cast_column("image", ImageFeature()).save_to_disk(tmp_path / "images")
    rows = [{**row, "path": row["path"].replace("sub/b.png", "clip.mp4")} for row in rows_of(drawn)]
    build(tmp_path / "images", tmp_path / "index", checkpoint, boxes=write_jsonl(tmp_path / "boxes.jsonl", rows))
    gallery = open_index(tmp_path / "index")
    box = tuple(drawn["sub/b.png"][1][0])
    assert same(gallery.image(Region("clip.mp4", box).name), crop_of(drawn["sub/b.png"][0], box))
    assert len(gallery) == 5
