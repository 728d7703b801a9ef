"""Indexing and searching one's own images: the library and every command, with a tiny model."""

import json
import os
import random
import shutil
import signal
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import count_calls, free_port, is_killed, run_processes, save_tiny_start, tiny_config
from datasets import Dataset
from datasets import Image as ImageFeature
from filelock import FileLock
from PIL import Image
from torch.multiprocessing import ProcessExitedException
from transformers.testing_utils import CaptureLogger

import cada.drawing
import cada.gallery.index
import cada.gallery.search
import cada.gallery.update
from cada.cli import main
from cada.drawing import draw_results
from cada.evaluation.encoding import encode_gallery, encode_queries
from cada.evaluation.matching import score_gallery
from cada.files import CADAError
from cada.gallery.index import build_index, open_index
from cada.hub.record import search_digest
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


ROOT = Path(__file__).parents[2]
SENTENCES = ["a man in a red coat", "a woman with a blue bag", "somebody without a hat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_start(tmp_path_factory.mktemp("checkpoint") / "model")


def save_images(folder: Path, names, seed: int = 0) -> None:
    """Noise, so that every image has its own features."""
    for number, name in enumerate(names):
        pixels = np.random.default_rng([seed, number]).integers(0, 255, (24, 12, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((24, 48)).save(folder / name)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_images(tmp_path / "images", [f"{number:02}.png" for number in range(10)] + ["sub/a.jpg", "sub/b.jpg"])
    return tmp_path / "images"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Number of images in every batch that the model encodes."""
    sizes, encode = [], CADAForTextToImageRetrieval.get_image_features

    def counting(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(CADAForTextToImageRetrieval, "get_image_features", counting)
    return sizes


def build(source, index, model=None, **options):
    return build_index(source, index, None if model is None else str(model), progress=False, **options)


def contents(index: Path) -> dict[str, tuple]:
    """Everything that an index says about each image."""
    gallery = open_index(index)
    names = ["path", "stamp", "digest", *gallery.columns, "feature"]
    rows = [row for table in gallery.store.tables(names) for row in table.to_pylist()]
    return {row.pop("path"): tuple(row[name] for name in names[1:]) for row in rows}


def close(rows: dict[str, tuple]) -> dict[str, tuple]:
    """From batches of other sizes: the last digit of half precision may differ. Other images are 9e-3 away."""
    return {path: (*values[:-1], pytest.approx(values[-1], abs=1e-3)) for path, values in rows.items()}


def test_search_ranks_as_evaluation_does(checkpoint, folder, tmp_path):
    changes = build(folder, tmp_path / "index", checkpoint, shard_size=5, batch_size=2)
    assert (changes.added, changes.changed, changes.removed, changes.unchanged) == (12, 0, 0, 0)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    images = Dataset.from_dict({"image": [str(folder / name) for name in files]}).cast_column("image", ImageFeature())
    model = CADAForTextToImageRetrieval.from_pretrained(checkpoint).eval()
    processor = CADAProcessor.from_pretrained(checkpoint)
    queries = encode_queries(model, processor, SENTENCES, progress=False)
    global_scores, scores = score_gallery(model, queries, encode_gallery(model, processor, images, progress=False), 3)

    gallery = open_index(tmp_path / "index")
    rankings = gallery.search(SENTENCES, top=12, rerank=3)
    for results, row, plain in zip(rankings, scores, global_scores, strict=True):
        order = row.argsort(descending=True).tolist()
        assert [result.path for result in results] == [files[index] for index in order]
        assert [result.stage for result in results] == ["local"] * 3 + ["global"] * 9
        expected = row[order[:3]].tolist() + plain[order[3:]].tolist()
        np.testing.assert_allclose([result.score for result in results], expected, atol=5e-4)
    # By default as many candidates as the configuration says: 3.
    assert [[result.path for result in results] for results in gallery.search(SENTENCES, top=2)] == [
        [result.path for result in results[:2]] for results in rankings
    ]
    for results, plain in zip(gallery.search(SENTENCES, top=12, rerank=0), global_scores):
        assert [result.path for result in results] == [files[n] for n in plain.argsort(descending=True).tolist()]


def test_a_photo_and_marked_results_move_the_question(checkpoint, folder, tmp_path):
    """S_G + mean cosine with the photo and the right images - 0.3 cosine with the wrong one, then + S_L."""
    build(folder, tmp_path / "index", checkpoint)
    gallery = open_index(tmp_path / "index")
    rows = contents(tmp_path / "index")
    features = {path: np.array(values[-1], dtype=np.float64) for path, values in rows.items()}
    photo, right, wrong = Image.open(folder / "03.png"), "05.png", "sub/a.jpg"
    plain = {result.path: result.score for result in gallery.search(SENTENCES[0], top=12, rerank=0)[0]}
    expected = {
        path: score + (features["03.png"] @ feature + features[right] @ feature) / 2 - 0.3 * features[wrong] @ feature
        for (path, feature), score in zip(sorted(features.items()), [plain[path] for path in sorted(plain)])
    }
    options = {"image": photo, "like": [right], "unlike": [wrong], "top": 12}
    found = {result.path: result.score for result in gallery.search(SENTENCES[0], rerank=0, **options)[0]}
    assert found == pytest.approx(expected, abs=2e-3)
    assert list(found) == sorted(found, key=lambda path: -found[path])
    # Candidates are those of the moved question, and S_L is that of the sentence.
    again = gallery.search(SENTENCES[0], rerank=3, **options)[0]
    assert {result.path for result in again[:3]} == set(list(found)[:3])
    local = {result.path: result.score for result in gallery.search(SENTENCES[0], top=12, rerank=12)[0]}
    for result in again[:3]:
        assert result.score - found[result.path] == pytest.approx(local[result.path] - plain[result.path], abs=1e-3)
    with pytest.raises(CADAError, match=f"'{right}' is marked as right and as wrong"):
        gallery.search(SENTENCES[0], like=[right], unlike=[right])
    alone = gallery.search_image(photo, top=12, like=[right])
    scores = {path: (features["03.png"] + features[right]) @ feature for path, feature in features.items()}
    assert {result.path: result.score for result in alone} == pytest.approx(scores, abs=2e-3)


def test_an_index_is_brought_up_to_date_and_nothing_is_encoded_twice(checkpoint, folder, tmp_path, encoded):
    index = tmp_path / "index"
    build(folder, index, checkpoint, shard_size=5)
    assert sum(encoded) == 12
    changes = build(folder, index)
    assert (changes.added, changes.changed, changes.removed, changes.unchanged) == (0, 0, 0, 12)
    assert sum(encoded) == 12
    save_images(folder, ["00.png", "new.png"], seed=7)
    (folder / "01.png").unlink()
    (folder / "sub").rename(folder / "moved")
    encoded.clear()
    changes = build(folder, index)
    assert (changes.added, changes.changed, changes.removed, changes.unchanged) == (3, 1, 3, 8)
    assert sum(encoded) == 4
    build(folder, tmp_path / "fresh", checkpoint, shard_size=3)
    assert contents(index) == close(contents(tmp_path / "fresh"))
    assert list((index / "pending").iterdir()) == []
    assert len(list(index.glob("table-*"))) == 1


def test_damaged_images_are_named_and_do_not_stop_the_run(checkpoint, folder, tmp_path, capsys):
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    index = tmp_path / "index"
    for _ in range(2):  # a second run names them again
        changes = build(folder, index, checkpoint, shard_size=4)
        assert [path for path, _ in changes.unreadable] == ["cut.png", "empty.jpg", "text.png"]
        assert len(open_index(index)) == 12
    (folder / "00.png").write_text("damaged since")
    (folder / "cut.png").write_bytes(whole)
    assert main(["index", str(folder), "--out", str(index)]) == 0
    printed = capsys.readouterr()
    assert "12 images; 1 added, 0 changed, 0 removed, 11 unchanged, 3 unreadable." in printed.out
    assert [line.split(":")[1].strip() for line in printed.err.splitlines() if line.startswith("unreadable")] == [
        "00.png",
        "empty.jpg",
        "text.png",
    ]
    assert "00.png" not in contents(index)


def test_a_folder_of_damaged_images_changes_nothing(checkpoint, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(CADAError, match="holds no image"):
        build(tmp_path / "images", tmp_path / "index", checkpoint)
    (tmp_path / "images" / "text.png").write_text("no image")
    with pytest.raises(CADAError, match="None of the 1 images can be read.*text.png"):
        build(tmp_path / "images", tmp_path / "index", checkpoint)
    with pytest.raises(CADAError, match="holds no index"):
        open_index(tmp_path / "index")


def run_that_dies(rank: int, moment: int, folder: Path, checkpoint: Path, index: Path) -> None:
    """Moments 1 and 2 are before and right after the first file takes its place, 3 and 4 those of the second."""
    count, replace = 0, os.replace

    def dying(source, target):
        nonlocal count
        count += 1
        if 2 * count - 1 == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if 2 * count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    build(folder, index, checkpoint, shard_size=2)


def kill_at(moments, folder: Path, checkpoint: Path, indexes: Path, before: Path | None = None) -> list[bool]:
    """Whether each run was killed; their indexes lie in `indexes`, and were `before` when they started."""
    killed = []
    for moment in moments:
        if before is not None:
            shutil.copytree(before, indexes / str(moment))
        try:
            run_processes(run_that_dies, moment, folder, checkpoint, indexes / str(moment), processes=1)
            killed.append(False)
        except ProcessExitedException as death:
            assert death.signal_name == "SIGKILL"
            killed.append(True)
    return killed


def test_a_killed_run_leaves_its_shards_to_the_next(checkpoint, folder, tmp_path, encoded):
    """Six shards of two images, then the table, then the record: eight files, each of which takes its place whole."""
    build(folder, tmp_path / "fresh", checkpoint, shard_size=2)
    fresh = contents(tmp_path / "fresh")
    # After the second shard, while the third is written, before the record is replaced, right after.
    moments = {4: 4, 5: 4, 15: 12, 16: 12}
    assert kill_at(moments, folder, checkpoint, tmp_path / "killed") == [True] * 4
    for moment, finished in moments.items():
        index = tmp_path / "killed" / str(moment)
        assert (index / "index.json").exists() == (moment == 16)
        encoded.clear()
        build(folder, index, checkpoint, shard_size=2)
        assert sum(encoded) == 12 - finished
        assert contents(index) == fresh
        assert {path.name for path in index.iterdir()} - {path.name for path in index.glob("table-*")} == {
            ".lock",
            "index.json",
            "pending",
        }
        assert not list(index.rglob(".unfinished-*"))


@pytest.mark.slow
def test_a_kill_at_every_moment_leaves_the_old_or_the_new_index(checkpoint, folder, tmp_path):
    """An update with five new images, a changed one and a lost one: three shards, the table, the record."""
    build(folder, tmp_path / "old", checkpoint)
    old = contents(tmp_path / "old")
    save_images(folder, ["00.png", *(f"new/{number}.png" for number in range(5))], seed=3)
    (folder / "01.png").unlink()
    build(folder, tmp_path / "new", checkpoint)
    new = contents(tmp_path / "new")
    moments = range(1, 12)
    killed = kill_at(moments, folder, checkpoint, tmp_path / "killed", tmp_path / "old")
    assert killed == [True] * 10 + [False]
    for moment in moments:
        index = tmp_path / "killed" / str(moment)
        assert contents(index) == (old if moment < 10 else close(new))
        build(folder, index, checkpoint)
        assert contents(index) == close(new)
        assert not list(index.rglob(".unfinished-*"))


@pytest.mark.slow
def test_runs_that_are_killed_at_random_times_end_in_the_right_index(checkpoint, tmp_path):
    folder, index, fresh = tmp_path / "images", tmp_path / "index", tmp_path / "fresh"
    save_images(folder, [f"{number:03}.png" for number in range(40)])
    calls = count_calls(partial(build, folder, fresh, checkpoint, shard_size=1))
    draw, kills, run = random.Random(0), 0, partial(build, folder, index, checkpoint, shard_size=1)
    while kills < 8:
        if is_killed(run, draw.randint(1, calls), draw.uniform(1e-6, 0.01)):
            kills += 1
        else:
            assert contents(index) == contents(fresh)
            shutil.rmtree(index)  # and again from the beginning
    run()
    assert contents(index) == contents(fresh)


def launched(rank: int, port: int, command: list[str], folder: str) -> None:
    """A process of `accelerate launch --cpu -m cada index`."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update({**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"})
    with open(f"{folder}/printed_{rank}", "w") as printed, redirect_stdout(printed):
        assert main(command) == 0


def test_two_processes_make_the_same_index(checkpoint, folder, tmp_path):
    (folder / "text.png").write_text("no image")
    build(folder, tmp_path / "one", checkpoint, shard_size=2)
    command = ["index", str(folder), "--model", str(checkpoint), "--out", str(tmp_path / "two"), "--shard-size", "2"]
    run_processes(launched, free_port(), command, str(tmp_path))
    printed = "".join((tmp_path / f"printed_{rank}").read_text() for rank in range(2))
    assert printed.count("12 images; 12 added, 0 changed, 0 removed, 0 unchanged, 1 unreadable.") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_model_is_refused(checkpoint, folder, tmp_path):
    index, other = tmp_path / "index", tmp_path / "other"
    build(folder, index, checkpoint)
    torch.manual_seed(1)
    processor = CADAProcessor.from_pretrained(checkpoint)
    config = tiny_config(text_config={"vocab_size": 30524, "enc_token_id": processor.enc_token_id})
    CADAForTextToImageRetrieval(config).save_pretrained(other)
    processor.save_pretrained(other)
    with pytest.raises(CADAError, match="holds features of .* other weights"):
        build(folder, index, other)
    with pytest.raises(CADAError, match="other weights"):
        open_index(index, model=str(other)).search(SENTENCES)
    with pytest.raises(CADAError, match="The configuration of .*missing cannot be used"):
        open_index(index, model=str(tmp_path / "missing")).search(SENTENCES)


def test_shards_without_patch_states_are_not_taken_up_where_they_are_wanted(
    checkpoint, folder, tmp_path, encoded, monkeypatch
):
    index = tmp_path / "index"

    def interrupt(self, shards):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cada.gallery.update.Update, "commit", interrupt)
        build(folder, index, checkpoint, shard_size=5)
    assert sum(encoded) == 12
    build(folder, index, checkpoint, keep_patches=True)
    assert sum(encoded) == 24


def test_metadata_filter_and_follow_the_list(checkpoint, folder, tmp_path, encoded):
    index, table = tmp_path / "index", folder / "list.csv"
    table.write_text("path,camera\n" + "".join(f"{number:02}.png,{number % 3}\n" for number in range(10)))
    build(table, index, checkpoint)
    gallery = open_index(index)
    assert gallery.columns == {"camera": "int64"}
    results = gallery.search(SENTENCES, top=10, where=["camera=1"])
    assert all({result.path for result in row} == {"01.png", "04.png", "07.png"} for row in results)
    assert all(result.metadata == {"camera": 1} for row in results for result in row)
    assert gallery.search(SENTENCES[:1], where=["camera>7"]) == [[]]
    # Corrected metadata need no encoding.
    encoded.clear()
    table.write_text("path,camera\n" + "".join(f"{number:02}.png,{number % 3 + 5}\n" for number in range(10)))
    build(table, index)
    assert sum(encoded) == 0
    assert {result.metadata["camera"] for result in open_index(index).search(SENTENCES[:1], top=10)[0]} == {5, 6, 7}


def test_an_image_finds_itself_first(checkpoint, folder, tmp_path):
    build(folder, tmp_path / "index", checkpoint)
    gallery = open_index(tmp_path / "index")
    with Image.open(folder / "07.png") as image:
        results = gallery.search_image(image, top=3)
    assert [results[0].path, results[0].stage] == ["07.png", "global"]
    assert results[0].score == pytest.approx(1, abs=5e-4)
    assert results[0].score > results[1].score >= results[2].score


def test_kept_patch_states_need_no_image_files(checkpoint, folder, tmp_path, capsys):
    build(folder, tmp_path / "plain", checkpoint)
    build(folder, tmp_path / "kept", checkpoint, keep_patches=True, shard_size=5)
    # (1 + 8) states of 16 numbers of 2 bytes for 12 images.
    assert "Patch states of 12 images will take 0.01 GB" in capsys.readouterr().out
    plain = open_index(tmp_path / "plain").search(SENTENCES, top=3)
    kept = open_index(tmp_path / "kept").search(SENTENCES, top=3)
    for first, second in zip(plain, kept, strict=True):
        assert {result.path for result in first} == {result.path for result in second}
        by_path = {result.path: result.score for result in first}
        assert all(abs(by_path[result.path] - result.score) < 5e-3 for result in second)
    gone = plain[0][0].path
    (folder / gone).unlink()
    assert open_index(tmp_path / "kept").search(SENTENCES, top=3) == kept
    left = open_index(tmp_path / "plain")
    rankings = left.search(SENTENCES, top=3)
    for before, after in zip(plain, rankings, strict=True):  # another takes the gone one's place
        kept_paths = [result.path for result in before if result.path != gone]
        assert [result.path for result in after][: len(kept_paths)] == kept_paths
        assert len(after) == 3 and gone not in {result.path for result in after}
    assert rankings[0].left_out == {gone: "No such file or directory"}
    with pytest.raises(CADAError, match=f"{gone} cannot be shown: No such file.*cada index"):
        left.image(gone)
    # An update drops the states of images that are gone.
    for path in [*folder.glob("0*.png")]:
        path.unlink()
    before = set((tmp_path / "kept" / "patches").iterdir())
    build(folder, tmp_path / "kept")
    left = set((tmp_path / "kept" / "patches").iterdir())
    assert left < before and len(left) == len(open_index(tmp_path / "kept")) == len(list(folder.glob("sub/*")))


def test_commands(checkpoint, folder, tmp_path, capsys):
    index = str(tmp_path / "index")
    assert main(["index", str(folder), "--model", str(checkpoint), "--out", index]) == 0
    assert f"{index}: 12 images; 12 added" in capsys.readouterr().out
    assert main(["search", index, SENTENCES[0], "--top", "2", "--picture", str(tmp_path / "out" / "found.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = open_index(index).search(SENTENCES[:1], top=2)[0]
    assert lines[:2] == [SENTENCES[0], "rank   score  stage   path"]
    assert [line.split() for line in lines[2:4]] == [
        [str(rank), f"{result.score:.3f}", result.stage, result.path] for rank, result in enumerate(expected, 1)
    ]
    with Image.open(tmp_path / "out" / "found.png") as picture:
        assert picture.height > 192
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES) + "\n")
    assert main(["search", index, "--file", str(tmp_path / "sentences.txt"), "--json", "--top", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["query"] for entry in found] == SENTENCES
    score = pytest.approx(expected[0].score, abs=1e-5)
    first = {"rank": 1, "path": expected[0].path, "score": score, "stage": "local", "metadata": {}}
    first |= {"probability": None, "box": None, "time": None}
    assert found[0]["results"] == [first]
    assert main(["search", index, "--image", str(folder / "03.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["results"][0]["path"] == "03.png"
    assert main(["info", index]) == 0
    printed = capsys.readouterr().out
    assert "images            12" in printed and str(folder) in printed and "exact" in printed
    assert main(["verify", index]) == 0
    assert "12 images; 0 with problems." in capsys.readouterr().out
    assert main(["export", index, str(tmp_path / "rows.parquet")]) == 0
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert {row["path"]: row["feature"] for row in rows} == {
        path: values[-1] for path, values in contents(Path(index)).items()
    }


def test_verify_finds_what_size_and_time_do_not_tell(checkpoint, folder, tmp_path, capsys):
    build(folder, tmp_path / "index", checkpoint)
    stamp = (folder / "00.png").stat()
    content = bytearray((folder / "00.png").read_bytes())
    content[-20] ^= 1
    (folder / "00.png").write_bytes(content)
    os.utime(folder / "00.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (folder / "01.png").unlink()
    assert main(["verify", str(tmp_path / "index")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "00.png: has changed since it was indexed",
        "01.png: cannot be read: No such file or directory",
        "12 images; 2 with problems.",
    ]


def test_the_picture_shows_every_result(checkpoint, folder, tmp_path):
    build(folder, tmp_path / "index", checkpoint)
    gallery = open_index(tmp_path / "index")
    rankings = dict(zip(SENTENCES, gallery.search(SENTENCES, top=4)))
    pixels = np.asarray(draw_results(gallery, rankings, lambda title, rank, result: (f"{rank}\nx", "red"), height=64))
    rows = np.array_split(pixels, len(SENTENCES))
    assert all(row.std() > 30 for row in rows)
    assert pixels.shape[1] >= 4 * 96
    with pytest.raises(CADAError, match="holds no image '../x.png'"):
        gallery.image("../x.png")


def test_one_run_at_a_time(checkpoint, folder, tmp_path):
    (tmp_path / "index").mkdir()
    with FileLock(tmp_path / "index" / ".lock"), pytest.raises(CADAError, match="Another process is writing"):
        build(folder, tmp_path / "index", checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "IMAGES", "--out", "NEW"], "is a new index. Give the --model"),
        (
            ["index", "IMAGES", "--out", "NEW", "--model", "IMAGES"],
            "holds no config.json. Is it the folder of a",
        ),
        (
            ["index", "IMAGES", "--out", "NEW", "--model", "MODEL", "--uri", "x.db"],
            "--uri is 'x.db'. Give the address",
        ),
        (["index", "IMAGES", "--out", "INDEX", "--uri", "http://localhost:1"], "was made with --uri None"),
        (
            ["index", "IMAGES", "--out", "NEW", "--model", "MODEL", "--uri", "http://localhost:1"],
            "Does it run, and is --uri its address",
        ),
        (["index", "missing", "--out", "NEW", "--model", "MODEL"], "'missing' is no folder"),
        (["index", "IMAGES", "--out", "INDEX", "--keep-patches"], "was made with --keep-patches False"),
        (["search", "NEW", "a man"], "holds no index"),
        (["search", "INDEX"], "Give sentences"),
        (["search", "INDEX", "a man", "--image", "x.png"], "x.png cannot be read"),
        (["search", "INDEX", "a man", "--like", "x.png"], "The index holds no image 'x.png'"),
        (["search", "INDEX", " . "], "is empty. Describe a person"),
        (["search", "INDEX", "a man", "--where", "lens=1"], "no column 'lens'"),
        (["search", "INDEX", "--image", "missing.png"], "missing.png cannot be read"),
        (["search", "INDEX", "--file", "missing.txt"], "missing.txt cannot be read"),
        (["search", "INDEX", "a man", "--picture", "x.unknown"], "x.unknown cannot be written"),
        (["search", "INDEX", "a man", "--device", "nonsense"], "The device nonsense cannot be used"),
        (["index", "IMAGES", "--out", "IMAGES", "--model", "MODEL"], "where the images are. Choose another folder"),
        (["index", "IMAGES", "--out", "FOREIGN", "--model", "MODEL"], "is no index and holds notes.txt"),
        (["index", "FOREIGN", "--out", "INDEX"], "add --moved-source"),
        (
            ["index", "IMAGES", "--out", "NEW", "--model", "MODEL", "--approximate", "HNSW"],
            "--approximate is for Milvus",
        ),
        (["export", "INDEX", "missing/folder/x.parquet"], "missing/folder"),
    ],
)
def test_a_command_explains_what_is_wrong(small_index, arguments, message, capsys):
    assert main([small_index.get(argument, argument) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    last = printed.splitlines()[-1]  # before it a bar may have been drawn
    assert last.startswith("error: ") and message in last and "Traceback" not in printed


@pytest.fixture(scope="module")
def small_index(checkpoint, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("small")
    save_images(folder / "images", ["a.png", "b.png"])
    build(folder / "images", folder / "index", checkpoint)
    names = {"IMAGES": "images", "INDEX": "index", "NEW": "new", "FOREIGN": "foreign"}
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.txt").write_text("kept")
    return {"MODEL": str(checkpoint), **{name: str(folder / value) for name, value in names.items()}}


def test_usage_errors_are_one_line(capsys):
    assert main(["search"]) == 1
    assert "Missing argument 'index'" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_a_damaged_record_is_reported(checkpoint, folder, tmp_path):
    build(folder, tmp_path / "index", checkpoint)
    (tmp_path / "index" / "index.json").write_text('{"format": 1')
    with pytest.raises(CADAError, match="index.json is damaged.*another folder"):
        open_index(tmp_path / "index")


@pytest.fixture
def copied(small_index, tmp_path) -> tuple[Path, Path]:
    """An index of two images `a.png`, `b.png`, and their folder: moved copies of the small ones."""
    for name in ("IMAGES", "INDEX"):
        shutil.copytree(small_index[name], tmp_path / Path(small_index[name]).name)
    build(tmp_path / "images", tmp_path / "index", moved_source=True)
    return tmp_path / "index", tmp_path / "images"


def test_a_moved_folder_is_not_encoded_again(copied, tmp_path, encoded):
    index, folder = copied
    assert encoded == []  # not even the copies that the fixture makes
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CADAError, match="Is its disk mounted.*--moved-source"):
        open_index(index).search("a man")
    changes = build(tmp_path / "elsewhere", index, moved_source=True)
    assert (changes.unchanged, changes.changed, encoded) == (2, 0, [])
    assert len(open_index(index).search("a man")[0]) == 2


def test_an_exchange_of_two_files_is_noticed(copied, encoded):
    """Size and time of both are equal."""
    index, folder = copied
    sizes = [path.write_bytes(path.read_bytes().ljust(9000, b"\0")) for path in folder.iterdir()]
    assert sizes == [9000, 9000]
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    build(folder, index)
    encoded.clear()
    before = contents(index)
    (folder / "a.png").rename(folder / "c")
    (folder / "b.png").rename(folder / "a.png")
    (folder / "c").rename(folder / "b.png")
    assert build(folder, index).changed == 2
    after = contents(index)
    assert [after[name][1:] for name in ("a.png", "b.png")] == [close(before)[name][1:] for name in ("b.png", "a.png")]
    # A file system that tells nothing: only the content does.
    stamps = {name: row[0] for name, row in after.items()}
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
    listing = cada.gallery.images.ImageFiles.listing

    def stale(self):
        table, problems = listing(self)
        return table.set_column(1, "stamp", [[stamps[path] for path in table["path"].to_pylist()]]), problems

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cada.gallery.images.ImageFiles, "listing", stale)
        assert build(folder, index).changed == 0
        assert build(folder, index, check_content=True).changed == 1
    assert contents(index)["a.png"][1:] == close(contents(index))["b.png"][1:]


def test_changed_and_lost_images_are_left_out_with_a_warning(copied, capsys):
    index, folder = copied
    gallery = open_index(index)
    save_images(folder, ["a.png"], seed=5)
    with CaptureLogger(cada.gallery.search.logger) as captured:
        [ranking] = gallery.search("a man")
    assert [result.path for result in ranking] == ["b.png"]
    assert ranking.left_out == {"a.png": "has changed since it was indexed"}
    assert "1 image left out: a.png (has changed since it was indexed). Bring the index up to date" in captured.out
    assert f"cada index {folder} --out {index}" in captured.out
    alike = gallery.search_image(Image.open(folder / "b.png"))
    assert len(alike) == 2 and alike.left_out == {}  # no file is read
    with pytest.raises(CADAError, match="a.png cannot be shown: has changed"):
        gallery.image("a.png")
    grey = np.asarray(draw_results(gallery, {"x": gallery.search("a man", rerank=0)[0]}))
    assert (grey == (0xD0, 0xD7, 0xDE)).all(axis=2).sum() >= 96 * 192
    (folder / "b.png").unlink()
    assert main(["search", str(index), "a man"]) == 0
    assert capsys.readouterr().out == "a man\nNo image.\n"


def test_settings_of_the_model_belong_to_the_index(copied, checkpoint, tmp_path):
    index, folder = copied
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (other / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CADAError, match="other settings for images and texts"):
        build(folder, index, other)
    model, processor = (
        CADAForTextToImageRetrieval.from_pretrained(checkpoint),
        CADAProcessor.from_pretrained(checkpoint),
    )
    digests = [open_index(index).record["digest"], search_digest(model, processor)]
    # How many candidates are read, how it was trained, and what was done with the tokenizer, is no matter.
    model.config.rerank_k, model.config.mask_rate, model.config.text_config.hidden_dropout_prob = 7, 0.5, 0.5
    processor(text=["a man"], max_length=5, truncation=True)
    digests.append(search_digest(model, processor))
    assert len(set(digests)) == 1
    for part, name, value in (
        (model.config, "match_score", "logit"),
        (model.config.vision_config, "layer_norm_eps", 0.1),
        (processor.image_processor, "resample", 0),
        (processor.tokenizer, "model_max_length", 9),
    ):
        setattr(part, name, value)
        digests.append(search_digest(model, processor))
    processor.tokenizer.add_tokens(["anorak"])
    digests.append(search_digest(model, processor))
    assert len(set(digests)) == 6


def test_bfloat16_is_not_computed_in_without_instructions_for_it(checkpoint, folder, tmp_path, monkeypatch):
    """On such a processor it is six times slower than float32."""
    model = CADAForTextToImageRetrieval.from_pretrained(checkpoint).bfloat16()
    model.save_pretrained(tmp_path / "half")
    CADAProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "half")
    build(folder, tmp_path / "index", tmp_path / "half")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(cada.gallery.search, "cpu_has_bfloat16", lambda has=has: has)
        with CaptureLogger(cada.gallery.search.logger) as log:
            assert open_index(tmp_path / "index", device="cpu").model.dtype == dtype
        assert ("is in bfloat16, which this processor has no instructions for" in log.out) == (not has)


def test_damaged_tables_and_patch_states_are_mended(checkpoint, small_index, tmp_path, encoded):
    index, folder = tmp_path / "index", small_index["IMAGES"]
    build(folder, index, checkpoint, keep_patches=True, shard_size=1)
    whole, ranking = contents(index), open_index(index).search(SENTENCES)
    encoded.clear()
    lost, cut = sorted((index / "patches").iterdir())
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    [nothing] = open_index(index).search("a man", rerank=2)
    assert nothing == [] and len(nothing.left_out) == 2
    assert build(folder, index).changed == 2
    assert (sum(encoded), contents(index)) == (2, close(whole))
    (table,) = index.glob("table-*")
    table.write_bytes(b"no table")
    with pytest.raises(CADAError, match="table-.*run `index` again"):
        open_index(index)
    build(folder, index)
    assert open_index(index).search(SENTENCES) == ranking


def test_others_take_the_places_of_images_that_are_gone(checkpoint, folder, tmp_path):
    """The two best of re-ranking are deleted: the decoder reads the next two in their places."""
    build(folder, tmp_path / "index", checkpoint)
    [before] = open_index(tmp_path / "index").search("a man", top=12, rerank=4)
    best = {result.path for result in open_index(tmp_path / "index").search("a man", top=2, rerank=2)[0]}
    for path in best:
        (folder / path).unlink()
    [after] = open_index(tmp_path / "index").search("a man", top=3, rerank=2)
    assert set(after.left_out) == best
    assert [result.stage for result in after] == ["local", "local", "global"]
    assert after[:2] == [result for result in before[:4] if result.path not in best]


def test_the_folder_of_the_images_is_gone_while_an_index_is_open(copied):
    """An error of all, not of each image."""
    index, folder = copied
    gallery = open_index(index)
    assert gallery.search("a man")[0]
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(CADAError, match="which is not there. Is its disk mounted"):
        gallery.search("a man")
    folder.with_name("elsewhere").rename(folder)
    assert gallery.search("a man")[0]


def test_an_answer_does_not_depend_on_the_other_sentences(checkpoint, folder, tmp_path, monkeypatch):
    """For the second sentence the image that is gone is no candidate of re-ranking: nobody looks at its file."""
    build(folder, tmp_path / "index", checkpoint)
    gallery = open_index(tmp_path / "index")
    search = gallery.store.search
    monkeypatch.setattr(
        gallery.store, "search", lambda queries, *more: [search(queries, *more)[0], search(queries, *more)[0][::-1]]
    )
    first, second = gallery.search(["a man", "a man"], top=12, rerank=1)
    gone = first[0].path
    assert second[-1].path == gone
    (folder / gone).unlink()
    without, same = gallery.search(["a man", "a man"], top=12, rerank=1)
    assert list(without.left_out) == [gone] and len(without) == 11 and gone not in {each.path for each in without}
    assert same == second and same.left_out == {}


def test_an_index_that_another_run_changes_meanwhile_is_left_alone(copied, monkeypatch):
    """The other run ends while this one loads the model."""
    index, folder = copied
    load, other = cada.gallery.index.load_model_of_index, []

    def slowly(*arguments):
        if not other:
            other.append(True)
            (folder / "new.png").write_bytes((folder / "a.png").read_bytes())
            build_index(folder, index, progress=False)
        return load(*arguments)

    monkeypatch.setattr(cada.gallery.index, "load_model_of_index", slowly)
    with pytest.raises(CADAError, match="Another process has changed .* meanwhile. Run the command again"):
        build_index(folder, index, progress=False)
    assert "new.png" in {result.path for result in open_index(index).search("a man", top=99)[0]}


def test_a_sentence_of_any_length_has_a_picture(copied):
    gallery = open_index(copied[0])
    results = gallery.search("a man", rerank=0)[0]
    one, long = (draw_results(gallery, {text: results}, height=64) for text in ("a man", "a man\nin red " * 1000))
    assert one.height == long.height and long.width < 2000


def test_json_is_whole_also_where_the_picture_is_not(checkpoint, tmp_path, capsys):
    save_images(tmp_path / "images", ["a.png", "b.png"])
    (tmp_path / "images" / "list.csv").write_text("path,size\na.png,inf\nb.png,1.5\n")
    build(tmp_path / "images" / "list.csv", tmp_path / "index", checkpoint)
    capsys.readouterr()
    assert main(["search", str(tmp_path / "index"), "a man", "--json", "--picture", str(tmp_path / "no.such")]) == 1
    picture = str(tmp_path / "out.png")
    assert main(["search", str(tmp_path / "index"), "a man", "--json", "--picture", picture]) == 0
    printed = capsys.readouterr().out
    results = json.loads(printed, parse_constant=pytest.fail)[0]["results"]
    assert sorted((result["path"], result["metadata"]["size"]) for result in results) == [
        ("a.png", None),
        ("b.png", 1.5),
    ]
    assert Path(picture).is_file()


def test_an_index_is_opened_while_it_is_brought_up_to_date(copied, monkeypatch):
    index, folder = copied
    reads, read = [], cada.gallery.index.read_record

    def late(path):
        record = read(path)
        if not reads:  # the update comes between the record and the table
            reads.append(1)
            save_images(folder, ["c.png"], seed=9)
            build(folder, index)
        return record

    monkeypatch.setattr(cada.gallery.index, "read_record", late)
    assert len(open_index(index)) == 3


def test_an_interrupted_first_run_says_how_to_go_on(checkpoint, small_index, tmp_path, monkeypatch, capsys):
    index = str(tmp_path / "index")
    arguments = ["index", small_index["IMAGES"], "--model", str(checkpoint), "--out", index, "--shard-size", "1"]
    with monkeypatch.context() as patch:

        def interrupt(self, shards):
            raise KeyboardInterrupt

        patch.setattr(cada.gallery.update.Update, "commit", interrupt)
        assert main(arguments) == 130
    assert "Interrupted. 2 finished shards kept; run the same command to go on." in capsys.readouterr().err
    assert main(["info", index]) == 1
    assert "holds no index yet, but 2 finished shards of an interrupted run" in capsys.readouterr().err
    assert main(arguments) == 0


def test_the_picture_goes_on_in_the_next_line_and_has_no_boxes(copied, monkeypatch):
    """No boxes where the system has no font for the letters."""
    monkeypatch.setattr(cada.drawing, "_system_font", lambda size: None)
    gallery = open_index(copied[0])
    results = gallery.search("a man", rerank=0)[0] * 3
    pictures = [draw_results(gallery, {title: results}, height=64, columns=4) for title in ("Süße Öde", "Susse Ode")]
    one = draw_results(gallery, {"x": results[:4]}, height=64, columns=4)
    assert pictures[0].width == one.width
    assert pictures[0].height - one.height == 64 + 20 + 16  # a line more: image and text
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_what_is_printed_stays_in_its_line(checkpoint, tmp_path, capsys):
    name = "a\n\x1b[31mb.png"
    save_images(tmp_path / "images", [name])
    (tmp_path / "images" / "bad\n.png").write_text("no image")
    (tmp_path / "list.csv").write_text(f'path,place\n"images/{name}",Süd\n"images/bad\n.png",Nord\n')
    index = str(tmp_path / "index")
    assert main(["index", str(tmp_path / "list.csv"), "--model", str(checkpoint), "--out", index]) == 0
    printed = capsys.readouterr()
    assert f"{index}: 1 image; 1 added" in printed.out and "unreadable: images/bad\\n.png: " in printed.err
    (tmp_path / "sentences.txt").write_text("a man\n", encoding="utf-8-sig")
    assert main(["search", index, "--file", str(tmp_path / "sentences.txt"), "--where", "place='Süd'"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a man", "rank   score  stage   path"]
    assert lines[2].endswith("  local   images/a\\n\\x1b[31mb.png  place=Süd")
    assert main(["search", index, "a man", "--where", "place=Ost"]) == 0
    assert capsys.readouterr().out == "a man\nNo image fulfils place=Ost.\n"


def test_hidden_images_are_counted_and_the_index_knows_whether_it_has_them(checkpoint, tmp_path, capsys):
    folder, index = tmp_path / "images", str(tmp_path / "index")
    save_images(folder, [".Trash-1000/a.png", "._b.png"])
    arguments = ["index", str(folder), "--model", str(checkpoint), "--out", index]
    assert main(arguments) == 1
    assert "holds no image that Pillow reads. 2 hidden images: --hidden takes them." in capsys.readouterr().err
    save_images(folder, ["b.png"], seed=1)
    assert main(arguments) == 0
    assert "1 image; 1 added" in (printed := capsys.readouterr().out)
    assert "Left out: 2 hidden images. --hidden takes them." in printed
    assert main([*arguments, "--hidden"]) == 0
    assert "3 images; 2 added" in (printed := capsys.readouterr().out) and "Left out" not in printed
    assert main(["index", str(folder), "--out", index]) == 0
    assert "3 images; 0 added, 0 changed, 0 removed, 3 unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["O'Brien.png", 'a"b.png', "back\\slash.png", "new\nline.png", "%_ {x}.png", "ü😀.png"]
)
def test_every_name_of_a_file_is_indexed_and_dropped(checkpoint, tmp_path, name):
    save_images(tmp_path / "images", [name, "other.png"])
    build(tmp_path / "images", tmp_path / "index", checkpoint)
    gallery = open_index(tmp_path / "index")
    assert name in {result.path for result in gallery.search("a man")[0]} and gallery.image(name)
    (tmp_path / "images" / name).unlink()
    assert build(tmp_path / "images", tmp_path / "index").removed == 1
    assert [result.path for result in open_index(tmp_path / "index").search("a man")[0]] == ["other.png"]


def test_a_long_sentence_is_searched_and_said_where_it_is_cut(copied):
    """The tiny model reads 13 tokens, [CLS] and [SEP] among them: 11 words of one token."""
    gallery = open_index(copied[0])
    words = ["man", "red", "coat"] * 40
    long, short = " ".join(words), " ".join(words[:11])
    with CaptureLogger(cada.gallery.search.logger) as captured:
        cut, whole = gallery.search([long, short])
    assert cut == whole
    assert (cut.read_up_to, whole.read_up_to) == (" ".join(words[8:11]), None)
    assert "'man red coat man red coat man red coat man red coat man ...' is too long: the model reads" in captured.out
    assert f"reads it up to '{' '.join(words[8:11])}'" in captured.out


def test_a_missing_model_is_told(copied, tmp_path):
    index, _ = copied
    record = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps({**record, "model": str(tmp_path / "gone")}))
    with pytest.raises(CADAError, match="model of this index was in .*gone, which is not there.*--model"):
        open_index(index).search("a man")
