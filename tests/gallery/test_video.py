"""Videos of drawn streets: their frames, by their times; persons in them."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny_start
from PIL import Image
from street import draw_people, draw_street, write_video

from cada.files import CADAError
from cada.gallery.images import ImageFiles
from cada.gallery.index import build_index, open_index
from cada.gallery.video import VideoReader, picture, sample


pytest.importorskip("av", reason='videos need PyAV: pip install -e ".[video]"')

PEOPLE = draw_people(8, 3)
STREETS = [draw_street([PEOPLE[second % 8], PEOPLE[(second + 3) % 8]], second) for second in range(8)]
PICTURES = [image for image, _ in STREETS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_start(tmp_path_factory.mktemp("checkpoint") / "model")


def opened(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content)).convert("RGB")


def nearest(image: Image.Image) -> int:
    """Which of the pictures it is. Compression moves a pixel by less than 12 in the mean, another street by more."""
    distances = [np.abs(np.asarray(image, int) - np.asarray(each, int)).mean() for each in PICTURES]
    assert min(distances) < 12 < sorted(distances)[1]
    return int(np.argmin(distances))


def sampled(file, fps=1.0) -> tuple[list[tuple[float, int]], str | None]:
    """Time and picture of every frame, and what is said at the end."""
    found = []
    try:
        for time, frame in sample(file, fps):
            found.append((time, nearest(opened(picture(frame)))))
    except CADAError as error:
        return found, str(error)
    return found, None


SECONDS = [(float(second), second) for second in range(8)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi", "a.webm"])
def test_every_kind_gives_its_frames_at_their_times(tmp_path, name):
    codec = {"a.avi": "mpeg4", "a.webm": "libvpx"}.get(name)
    shown = [PICTURES[number // 25] for number in range(200)]  # at 25 a second
    file = write_video(tmp_path / name, shown, [number / 25 for number in range(200)], codec=codec)
    assert sampled(file) == (SECONDS, None)
    assert sampled(file, 0.25) == ([(0.0, 0), (4.0, 4)], None)
    assert [number for _, number in sampled(file, 2)[0]] == [number // 2 for number in range(16)]
    reader = VideoReader()
    for time in (0, 1, 1, 2.98, 3, 7.5, 0.5):  # in order, again, between two frames, and back
        assert nearest(opened(reader.read(file, time))) == int(time)


def test_a_frame_is_the_same_whether_it_is_leapt_to_or_not(tmp_path):
    shown = [PICTURES[number % 8] for number in range(100)]
    file = write_video(tmp_path / "a.mkv", shown)
    stream = {time: picture(frame) for time, frame in sample(file, 1)}
    assert len(stream) == 100
    reader = VideoReader()
    for time in (99.0, 60.0, 0.0, 25.0, 48.0, 49.0):
        assert reader.read(file, time) == stream[time]


def test_a_variable_frame_rate_has_the_frames_that_there_are(tmp_path):
    times = [0, 0.4, 1.2, 4.8, 4.92, 5, 9, 9.4]
    file = write_video(tmp_path / "a.mp4", PICTURES, times)
    assert sampled(file) == ([(0.0, 0), (1.2, 2), (4.8, 3), (5.0, 5), (9.0, 6)], None)
    assert nearest(opened(VideoReader().read(file, 3.5))) == 2  # the picture that is still shown


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_turned_video_is_upright(tmp_path, rotation):
    file = write_video(tmp_path / "a.mp4", PICTURES[:3], rotation=rotation)
    assert sampled(file) == (SECONDS[:3], None)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4"])
def test_a_video_that_is_cut_off_gives_its_frames_up_to_there(tmp_path, name):
    codec, container = {"a.avi": ("mpeg4", {}), "a.mp4": (None, {"movflags": "faststart"})}.get(name, (None, {}))
    file = write_video(tmp_path / name, PICTURES, codec=codec, container=container)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 6 // 10])
    found, said = sampled(file)
    assert 2 <= len(found) <= 6 and found == SECONDS[: len(found)]
    assert "is damaged or cut off at 00:00:0" in said and "only frames that are whole are taken" in said


def test_what_is_no_video_is_named(tmp_path):
    whole = write_video(tmp_path / "a.mp4", PICTURES).read_bytes()
    (tmp_path / "headless.mp4").write_bytes(whole[: len(whole) // 2])  # what is where stands at its end
    (tmp_path / "empty.mkv").write_bytes(b"")
    for name in ("headless.mp4", "empty.mkv", "gone.mp4"):
        with pytest.raises(CADAError, match="cannot be opened as a video: .* Is it whole?"):
            next(sample(tmp_path / name, 1))
    write_video(tmp_path / "none.mkv", [])
    with pytest.raises(CADAError, match="cannot be opened|has no"):
        next(sample(tmp_path / "none.mkv", 1))
    with pytest.raises(CADAError, match="has no frame at 00:00:30.000; the last one is that of 00:00:07.000"):
        VideoReader().read(tmp_path / "a.mp4", 30)


def test_other_files_and_addresses_are_not_opened(tmp_path, monkeypatch):
    """A file that only looks like a video may name others; a frame may claim any size."""
    file = write_video(tmp_path / "a.mp4", PICTURES[:2])
    for name, text in {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{file}\n#EXT-X-ENDLIST\n",
        "concat.mkv": f"ffconcat version 1.0\nfile {file}\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(CADAError, match="cannot be opened as a video"):
            next(sample(tmp_path / name, 1))
    monkeypatch.setattr("cada.gallery.video.MAX_PIXELS", 320 * 159)
    with pytest.raises(CADAError, match="is damaged or cut off|has no frames|cannot be opened"):
        next(sample(file, 1))


def build(source, index, model=None, **options):
    return build_index(source, index, None if model is None else str(model), progress=False, **options)


def test_without_boxes_each_frame_is_an_image(checkpoint, tmp_path):
    (tmp_path / "files").mkdir()
    write_video(tmp_path / "files" / "walk.mp4", PICTURES)
    PICTURES[0].save(tmp_path / "files" / "photo.png")
    changes = build(tmp_path / "files", tmp_path / "index", checkpoint, fps=0.5, batch_size=3)
    assert (changes.added, changes.unreadable) == (5, [])
    gallery = open_index(tmp_path / "index")
    assert gallery.columns == {"time": "float64"}
    results = gallery.search("a man in a red coat", rerank=5, where="time>=2")[0]
    assert {(result.path, result.box, result.time) for result in results} == {
        ("walk.mp4", None, time) for time in (2.0, 4.0, 6.0)
    }
    for result in results:
        assert nearest(gallery.image(result.name)) == result.time
    assert results[0].place == f"walk.mp4 00:00:0{results[0].time:.3f}"
    assert gallery.verify(progress=False) == []
    again = build(tmp_path / "files", tmp_path / "index", check_content=True)
    assert (again.unchanged, again.added, again.changed, again.removed) == (5, 0, 0, 0)
    faster = build(tmp_path / "files", tmp_path / "index", fps=1)
    assert (faster.unchanged, faster.added) == (5, 4)
    write_video(tmp_path / "files" / "walk.mp4", PICTURES[4:])
    renewed = build(tmp_path / "files", tmp_path / "index")
    assert (renewed.changed, renewed.removed, renewed.unchanged) == (4, 4, 1)


def test_boxes_and_times_of_a_video(checkpoint, tmp_path):
    (tmp_path / "files").mkdir()
    write_video(tmp_path / "files" / "walk.mkv", PICTURES)
    rows = [
        {"path": "walk.mkv", "time": second, "box": box, "track": number}
        for second, (_, boxes) in enumerate(STREETS)
        for number, box in enumerate(boxes)
    ]
    rows.append({"path": "walk.mkv", "box": [1, 2, 30, 40]})
    rows.insert(0, {"path": "walk.mkv", "box": [1, 2, 30, 40], "time": 20})
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = build(tmp_path / "files", tmp_path / "index", checkpoint, boxes=boxes, workers=2, batch_size=4)
    assert changes.added == 16
    assert changes.unreadable == [
        ("walk.mkv", f"{boxes}, row 18: the box 1, 2, 30, 40 lacks the `time` in this video"),
        (
            "walk.mkv#t=00:00:20.000&xywh=1,2,30,40",
            "cannot be decoded: has no frame at 00:00:20.000; the last one is that of 00:00:07.000",
        ),
    ]
    gallery = open_index(tmp_path / "index")
    assert gallery.columns == {"track": "int64", "time": "float64"}
    for second, (image, boxes) in enumerate(STREETS):
        for number, (x, y, width, height) in enumerate(boxes):
            found = gallery.search_image(image.crop((x, y, x + width, y + height)), top=1)[0]
            assert (found.path, found.box, found.time) == ("walk.mkv", (x, y, width, height), second)
            assert found.metadata == {"track": number, "time": second}
            assert gallery.image(found.name).size == (width, height)
            assert nearest(gallery.frame(found.name)) == second


def test_a_cut_video_says_so_each_time(checkpoint, tmp_path):
    (tmp_path / "files").mkdir()
    file = write_video(tmp_path / "files" / "walk.mkv", PICTURES)
    (tmp_path / "files" / "no.mp4").write_bytes(b"no video")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    for added, unchanged in ((3, 0), (0, 3)):
        changes = build(tmp_path / "files", tmp_path / "index", checkpoint if added else None)
        assert (changes.added, changes.unchanged) == (added, unchanged)
        (no, no_problem), (walk, cut) = changes.unreadable
        assert (no, walk) == ("no.mp4", "walk.mkv")
        assert no_problem.startswith("cannot be opened as a video") and cut.startswith(
            "is damaged or cut off at 00:00:0"
        )


def test_what_is_known_of_a_video_is_not_found_again(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    write_video(tmp_path / "files" / "walk.mp4", PICTURES[:3])
    build(tmp_path / "files", tmp_path / "index", checkpoint)
    (tmp_path / "files").rename(tmp_path / "moved")
    (tmp_path / "moved" / "walk.mp4").touch()
    looked = []
    monkeypatch.setattr("cada.gallery.persons.sample", lambda file, fps: looked.append(file) or sample(file, fps))
    changes = build(tmp_path / "moved", tmp_path / "index", moved_source=True)
    assert (changes.unchanged, looked) == (3, [])
    read = []
    monkeypatch.setattr(ImageFiles, "digest", lambda self, path: read.append(path))
    assert build(tmp_path / "moved", tmp_path / "index").unchanged == 3
    assert read == []
    monkeypatch.undo()
    monkeypatch.setattr("cada.gallery.persons.sample", lambda file, fps: looked.append(file) or sample(file, fps))
    with open(tmp_path / "index" / "persons.jsonl", "a") as file:
        file.write('{"path": "walk.mp4", "sta')  # of a run that was killed
    assert build(tmp_path / "moved", tmp_path / "index").unchanged == 3
    assert looked == []
    (tmp_path / "index" / "persons.jsonl").unlink()
    assert build(tmp_path / "moved", tmp_path / "index").unchanged == 3
    assert looked == [tmp_path / "moved" / "walk.mp4"]


def test_a_list_and_hidden_files_have_videos(tmp_path):
    write_video(tmp_path / "a.mp4", PICTURES[:1])
    write_video(tmp_path / ".b.mp4", PICTURES[:1])
    (tmp_path / "list.csv").write_text("path,camera\na.mp4,1\n")
    assert ImageFiles(str(tmp_path / "list.csv")).listing()[0]["camera"].to_pylist() == [1]
    folder = ImageFiles(str(tmp_path))
    assert (folder.listing()[0]["path"].to_pylist(), folder.hidden) == (["a.mp4"], 1)


def test_without_pyav_a_video_is_named(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", PICTURES[:1])
    monkeypatch.setattr("cada.gallery.video.av", None)
    with pytest.raises(CADAError, match="is a video, which needs PyAV"):
        next(sample(tmp_path / "a.mp4", 1))
