"""Streams of pairs: the same in every number of processes, resumed to the pair, bad input named."""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from pair_files import COLOURS, caption_of, content_of, save_parquet, save_tars

from cada.data.streams import Columns, StreamBatches, StreamCollator, StreamPairs, Unreadable, open_rows
from cada.files import CADAError


ROOT = Path(__file__).parents[2]
COLUMNS = Columns()


def stream(dataset: str | Path, columns: Columns = COLUMNS, **options) -> StreamPairs:
    return StreamPairs(open_rows(str(dataset)), str(dataset), columns, **options)


def read(pairs: StreamPairs, count: int, resume: Path | None = None, skip: int = 0, **place) -> list[list[tuple]]:
    """Of so many batches what each pair is: its number, seed, and caption."""
    batches = StreamBatches(pairs, **place)
    if resume is not None:
        batches.resume(resume)
    return [
        [(one.pair, one.seed, pairs.__getitems__([one])[0]["caption"]) for one in batch]
        for batch in islice(batches, skip, skip + count)
    ]


@pytest.mark.parametrize("save", [save_parquet, save_tars])
@pytest.mark.parametrize("processes", [2, 4])
def test_every_number_of_processes_gives_the_same_batches(tmp_path, save, processes):
    """Over several passes; with 3 files for two and four processes each reads what it needs of all."""
    columns = Columns("png", ("json.caption",)) if save is save_tars else Columns()
    for files in (4, 3):
        folder = save(tmp_path / str(files), files=files)
        pairs = stream(folder, columns, buffer=8)
        whole = read(pairs, 12, batch_size=8, seed=3)
        parts = [
            read(pairs, 12, batch_size=8 // processes, seed=3, rank=rank, processes=processes)
            for rank in range(processes)
        ]
        assert [sum(batch, []) for batch in zip(*parts)] == whole
        assert [pair for batch in whole for pair, _, _ in batch] == list(range(12 * 8))


def test_a_pass_reads_every_row_once_in_another_order(tmp_path):
    """40 rows in batches of 8: five batches are a pass."""
    pairs = stream(save_parquet(tmp_path / "data"), buffer=12)
    captions = [[caption for *_, caption in batch] for batch in read(pairs, 10, batch_size=8)]
    passes = [sum(captions[:5], []), sum(captions[5:], [])]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(caption_of, range(40)))
    assert passes[0] != passes[1] and passes[0] != list(map(caption_of, range(40)))
    assert captions == [[caption for *_, caption in batch] for batch in read(pairs, 10, batch_size=8)]
    assert captions != [[caption for *_, caption in batch] for batch in read(pairs, 10, batch_size=8, seed=1)]
    seeds = [seed for batch in read(pairs, 10, batch_size=8) for _, seed, _ in batch]
    assert len(set(seeds)) == 80 and all(0 <= seed < 2**63 for seed in seeds)


def test_each_process_reads_its_own_files(tmp_path, caplog):
    """Each of two processes has two of four lanes."""
    folder = save_parquet(tmp_path / "data")
    own = [
        {caption for batch in read(stream(folder), 10, batch_size=4, rank=rank, processes=2) for *_, caption in batch}
        for rank in (0, 1)
    ]
    assert own[0].isdisjoint(own[1]) and len(own[0]) == len(own[1]) == 20
    assert "cannot be shared out" not in caplog.text
    StreamBatches(stream(save_parquet(tmp_path / "three", files=3)), 4, 0, 0, 2)
    assert "has 3 files, which cannot be shared out over 2 processes" in caplog.text


@pytest.mark.parametrize("save", [save_parquet, save_tars])
@pytest.mark.parametrize("after", [0, 1, 4, 5, 13])
def test_resumed_to_the_pair(tmp_path, save, after):
    """Within a window, at the end of a pass, in the third pass; also with another number of processes."""
    columns = Columns("png", ("json.caption",)) if save is save_tars else Columns()
    pairs = stream(save(tmp_path / "data"), columns, buffer=12)
    whole = read(pairs, after + 4, batch_size=8)
    for rank in (0, 1):
        batches = StreamBatches(pairs, 4, 0, rank, 2)
        list(islice(batches, after + 3))  # the loader is ahead of the training
        batches.save(tmp_path, after, 0)
    assert read(pairs, 4, tmp_path, after, batch_size=8) == whole[after:]
    (tmp_path / "cada_stream_1.json").unlink()
    with pytest.raises(CADAError, match=r"the lane\(s\) 2, 3 are in no cada_stream_\*\.json"):
        StreamBatches(pairs, 8).resume(tmp_path)


def test_a_resumed_stream_opens_no_file_that_it_has_read(tmp_path, monkeypatch):
    """It goes to the window: rows before it are not read again."""
    pairs = stream(save_parquet(tmp_path / "data", files=1, rows=60), buffer=10)
    batches = StreamBatches(pairs, 5)
    list(islice(batches, 9))
    batches.save(tmp_path, 9, 0)
    (lane,) = json.loads((tmp_path / "cada_stream_0.json").read_text())["lanes"].values()
    assert lane[:3] == [40, 0, 4] and lane[3] is not None


def test_samples_of_a_batch(tmp_path, processor):
    """One of the captions is drawn; persons by a column, else each image is one; equal captions have equal ids."""
    rows = [
        {"file": "a.png", "one": "a red coat", "more": ["a blue hat", "A red coat."], "id": 7},
        {"file": "b.png", "one": "A RED COAT!", "more": None, "id": 7},
        {"file": "c.png", "one": "a green bag", "more": ["a green bag"], "id": 8},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for number, row in enumerate(rows):
        (tmp_path / row["file"]).write_bytes(content_of(number))
    columns = Columns("file", ("one", "more"), "id")
    options = {"folder": tmp_path, "masker": processor.attribute_masker}
    pairs = stream(tmp_path / "rows.jsonl", columns, **options)
    drawn = set()
    for batch in islice(StreamBatches(pairs, 3), 20):
        samples = sorted(pairs.__getitems__(batch), key=lambda sample: sample["image"].getpixel((0, 0)))
        assert [sample["person_id"] for sample in samples] == [7, 7, 8]
        drawn.add(samples[0]["caption"])
    assert drawn == {"a red coat", "a blue hat", "A red coat."}
    by_themselves = stream(tmp_path / "rows.jsonl", Columns("file", ("one",)), **options)
    (batch,) = islice(StreamBatches(by_themselves, 3), 1)
    samples = by_themselves.__getitems__(batch)
    assert [sample["person_id"] for sample in samples] == [0, 1, 2]
    inputs = StreamCollator(processor)(samples)
    ids = dict(zip((sample["caption"] for sample in samples), inputs["caption_ids"].tolist()))
    assert ids["a red coat"] == ids["A RED COAT!"] != ids["a green bag"]
    assert (inputs["labels"] >= 0).any()  # each caption is a phrase, which is masked at a rate of 0.8
    assert inputs["unreadable"] == [] and inputs["names"][0].endswith("(pair 0 of the stream)")


def test_an_unreadable_pair_is_named_and_its_neighbour_stands_twice(tmp_path, processor):
    pairs = stream(save_parquet(tmp_path / "data", files=1, rows=6, damaged=(1, 5)))
    (batch,) = islice(StreamBatches(pairs, 6), 1)
    order = sorted(batch, key=lambda one: one.row["caption"][-1])
    samples = pairs.__getitems__(order)
    assert [sample["image"].getpixel((0, 0))[0] for sample in samples] == [0, 2, 2, 3, 4, 0]
    names = [f"{file}.png (pair {order[file].pair} of the stream)" for file in (1, 5)]
    assert [message.split(":")[0] for message in samples[0]["unreadable"]] == names
    inputs = StreamCollator(processor)(pairs.__getitems__([order[1], order[5]]))
    assert set(inputs) == {"pair", "unreadable"}
    with pytest.raises(CADAError, match=r"No pair of a batch can be read: 1.png \(pair"):
        Unreadable().add(len(inputs["pair"]), inputs["unreadable"])


def test_rows_without_a_name_and_without_a_caption(tmp_path):
    """A Parquet row has its caption for a name; of a null no list is asked for."""
    contents = [content_of(0), b"no image", content_of(2), content_of(3), content_of(4)]
    captions = ["a red coat", "a green bag", None, "!", "word " * 2000]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    images = [{"bytes": content, "path": None} for content in contents]
    (tmp_path / "data").mkdir()
    rows = Dataset.from_dict({"image": images, "caption": captions}, features=features)
    rows.to_parquet(tmp_path / "data" / "0.parquet")
    pairs = stream(tmp_path / "data", buffer=1)
    (batch,) = islice(StreamBatches(pairs, 5), 1)
    damaged, null, empty, long = pairs.__getitems__(batch)[0]["unreadable"]
    assert damaged.startswith("the image with the caption 'a green bag' (pair 1 of the stream): it is no JPEG")
    assert null.endswith("the caption None (pair 2 of the stream): the caption (column caption) is None, not a text")
    assert empty.endswith("(pair 3 of the stream): the caption is empty. Write one, or take it out of the row.")
    assert "(pair 4 of the stream): the caption has 2000 words and" in long


def test_more_than_one_in_a_hundred_ends_the_training(caplog):
    unreadable = Unreadable()
    unreadable.add(200, [f"{number}.png: it is damaged" for number in range(10)])  # so many may always be
    assert "Left out, 1 pair of 200 so far: 0.png: it is damaged" in caplog.text
    assert "Left out, 10 pairs of 200 so far: 9.png: it is damaged" in caplog.text
    with pytest.raises(CADAError, match="11 of 204 pairs cannot be read, more than 1 %; the last one: b.png: empty"):
        unreadable.add(4, ["b.png: empty"])
    unreadable = Unreadable(pairs=1990, left_out=19)
    unreadable.add(10, ["d.png: empty"])  # 20 of 2,000
    with pytest.raises(CADAError, match="21 of 2,010"):
        unreadable.add(10, ["e.png: empty"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("photo"), r"the column `photo` is missing.*--image_column.*it has image, caption, who"),
        (Columns(captions=("caption", "text")), "the column `text` is missing"),
        (Columns(person="id"), "the column `id` is missing"),
        (Columns(captions=("image",)), r"the column `image` holds no sentences; its first value is \{'bytes'"),
        (Columns(captions=("who",)), "the column `who` holds no sentences; its first value is '0'"),
        (
            Columns("caption"),
            "none of the first 4 images in the column `caption` can be read. a red coat and number 0",
        ),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    folder = save_parquet(tmp_path / "data", files=1, rows=4)
    with pytest.raises(CADAError, match=message):
        stream(folder, columns)


def test_sets_without_images(tmp_path):
    folder = save_parquet(tmp_path / "data", files=1, rows=3, damaged=(0, 1, 2))
    with pytest.raises(CADAError, match="none of the first 3 images in the column `image` can be read. 0.png"):
        stream(folder)
    with pytest.raises(CADAError, match=r"Cannot stream '.*nowhere'.*Give files"):
        stream(tmp_path / "nowhere")
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    (tmp_path / "empty").mkdir()
    Dataset.from_dict({"image": [], "caption": []}, features=features).to_parquet(tmp_path / "empty" / "0.parquet")
    with pytest.raises(CADAError, match="has no rows"):
        stream(tmp_path / "empty")


@pytest.mark.parametrize("save", [save_parquet, save_tars])
def test_a_stream_that_breaks_off(tmp_path, save):
    """A file is cut off: what stands before it is read, then the message says what to do."""
    folder = save(tmp_path / "data", files=2, rows=40)
    columns = Columns("png", ("json.caption",)) if save is save_tars else Columns()
    pairs = stream(folder, columns, buffer=10)
    for file in folder.iterdir():  # a block of 512 bytes of a tar is a header, the next one is content
        file.write_bytes(file.read_bytes()[: 41 * 512 + 10 if save is save_tars else -100])
    with pytest.raises(CADAError, match="broke off after .* rows of one of its lanes.*--resume_from_checkpoint last"):
        read(pairs, 20, batch_size=4)


# Layouts of the sets that others have made, as their authors describe them


def lay_out_webperson(folder: Path) -> tuple[Path, Columns]:
    """Parquet: `image`, `image_path`, `caption1`, `caption2`."""
    (folder / "data").mkdir()
    features = {"image": ImageFeature(), "image_path": Value("string")}
    features |= {"caption1": Value("string"), "caption2": Value("string")}
    table = {
        "image": [{"bytes": content_of(number), "path": None} for number in range(6)],
        "image_path": [f"{number}.jpg" for number in range(6)],
        "caption1": list(map(caption_of, range(6))),
        "caption2": [f"somebody in {colour}" for colour in COLOURS[:6]],
    }
    Dataset.from_dict(table, features=Features(features)).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder, Columns("image", ("caption1", "caption2"))


def lay_out_synth_pedes(folder: Path) -> tuple[Path, Columns]:
    """A list of `id`, `file_path`, `captions` and more; images beside it."""
    rows = [
        {
            "id": number // 2,
            "file_path": f"Part1/{number // 2}/{number % 2}.jpg",
            "attributes": ["man,black hair,black shirt,pink shorts,black shoes,unknown"],
            "captions": [caption_of(number), f"somebody in {COLOURS[number]}"],
            "prompt_caption": ["A man with black hair."],
        }
        for number in range(6)
    ]
    for number, row in enumerate(rows):
        (folder / row["file_path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / row["file_path"]).write_bytes(content_of(number))
    (folder / "synthpedes_dataset.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "synthpedes_dataset.json", Columns("file_path", ("captions",), "id")


def lay_out_mals(folder: Path) -> tuple[Path, Columns]:
    """Lists of `image`, `caption`, `image_id`, `label` in several files; images beside their folder."""
    (folder / "gene_attrs").mkdir()
    (folder / "gene_crop/c_g_a_0").mkdir(parents=True)
    for file in range(2):
        rows = [
            {
                "image": f"gene_crop/c_g_a_0/{n}.jpg",
                "caption": caption_of(n),
                "image_id": f"c_{n}",
                "label": [1, 0, -1],
            }
            for n in range(file * 3, file * 3 + 3)
        ]
        (folder / f"gene_attrs/g_c_g_a_{file}_attrs.json").write_text(json.dumps(rows), encoding="utf-8")
    for number in range(6):
        (folder / f"gene_crop/c_g_a_0/{number}.jpg").write_bytes(content_of(number))
    return folder / "gene_attrs/*.json", Columns("image", ("caption",))


def lay_out_luperson(folder: Path) -> tuple[Path, Columns]:
    """Objects of image and caption, which the lines in docs/train.md bring into one file; images in one folder."""
    (folder / "caption").mkdir()
    first = {f"part1/{number}.png": caption_of(number) for number in range(6)}
    second = {f"part1/{number}.png": f"somebody in {COLOURS[number]}" for number in range(6)}
    for name, captions in (("Ts-qwen", first), ("Td-shikra", second)):
        (folder / f"caption/{name}.json").write_text(json.dumps(captions), encoding="utf-8")
    for number in range(6):
        (folder / f"{number}.png").write_bytes(content_of(number))
    code = re.search(
        r"```python\n(import json.*?)```", (ROOT / "docs/train.md").read_text(encoding="utf-8"), re.DOTALL
    )
    subprocess.run([sys.executable, "-c", code[1]], cwd=folder, check=True)
    return folder / "luperson.jsonl", Columns(captions=("captions",))


@pytest.mark.parametrize("lay_out", [lay_out_webperson, lay_out_synth_pedes, lay_out_mals, lay_out_luperson])
def test_layouts_of_known_sets(tmp_path, lay_out):
    """Every image with a caption of its own; in SYNTH-PEDES two images of each person."""
    dataset, columns = lay_out(tmp_path)
    pairs = stream(dataset, columns, folder=tmp_path)
    (batch,) = islice(StreamBatches(pairs, 6), 1)
    samples = pairs.__getitems__(batch)
    for sample in samples:
        number = sample["image"].getpixel((0, 0))[0]
        assert sample["caption"] in (caption_of(number), f"somebody in {COLOURS[number]}")
    assert len({sample["person_id"] for sample in samples}) == (3 if lay_out is lay_out_synth_pedes else 6)
