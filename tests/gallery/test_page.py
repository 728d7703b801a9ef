"""The page: what it answers to whom, what it keeps to itself, and its use in a real browser."""

import csv
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from conftest import bert_tokenizer, free_port, save_checkpoint, tiny_processor
from PIL import Image
from street import draw_people, draw_street

import cada.gallery.page
from cada import cli
from cada.drawing import draw_explanation
from cada.explain import attribute_predictions, word_attention
from cada.files import CADAError
from cada.gallery.index import LiveIndex, build_index, open_index


pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # Gradio's own

COLOURS = ("red", "green", "blue", "white", "black")
ODD = "<img src=x onerror=alert(1)> & 50%.png"  # a name that the page has to show as it is
ODD_PLACE = "<img src=x onerror=alert(2)>"
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, six images with a list of metadata, their index, and files that are nobody's business."""
    folder = tmp_path_factory.mktemp("app")
    save_checkpoint(folder / "model", tiny_processor(bert_tokenizer()), 0)
    (folder / "images" / "more").mkdir(parents=True)
    gradient = Image.linear_gradient("L").resize((24, 48))
    for number, colour in enumerate(COLOURS):
        image = Image.composite(Image.new("RGB", (24, 48), colour), Image.new("RGB", (24, 48), "gray"), gradient)
        image.save(folder / "images" / "more" / f"{number}.png")
    Image.new("RGB", (600, 1200), "orange").save(folder / "images" / ODD)
    (folder / "images" / "notes.txt").write_text("secret")
    (folder / "beside.png").write_bytes((folder / "images" / "more" / "0.png").read_bytes())
    with open(folder / "images" / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["path", "camera", "place"], *([f"more/{number}.png", number, "hall"] for number in range(5))]
            + [[ODD, "", ODD_PLACE]]
        )
    build_index(folder / "images" / "list.csv", folder / "index", str(folder / "model"), progress=False)
    return folder


@pytest.fixture(scope="module")
def gallery(folder):
    return open_index(folder / "index", device="cpu")


@pytest.fixture(scope="module")
def hosts():
    """Hosts that this process looks up or connects to, from here on."""
    hosts = set()

    def note(event, details):
        if event == "socket.getaddrinfo":
            hosts.add(details[0])
        elif event == "socket.connect" and isinstance(details[1], tuple):
            hosts.add(details[1][0])

    sys.addaudithook(note)
    return hosts


@pytest.fixture(scope="module")
def address(gallery, hosts):
    with cada.gallery.page.serve(gallery, free_port()) as address:
        yield address.rstrip("/")


def ask(address, target, method="GET", body=None, **headers):
    """Status, headers and body; the target is sent as it is, with its dots."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
    try:
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


def call(address, number, data, session="tests", **event):
    """What the page's function `number` answers: its outputs, or its message."""
    body = {"data": data, "fn_index": number, "session_hash": session, **event}
    status, _, reply = ask(
        address, "/gradio_api/queue/join", "POST", json.dumps(body), Content_Type="application/json"
    )
    assert status == 200, reply
    status, _, stream = ask(address, f"/gradio_api/queue/data?session_hash={session}")
    messages = [json.loads(line.removeprefix("data: ")) for line in stream.decode().splitlines() if line]
    (done,) = [message for message in messages if message["msg"] == "process_completed"]
    return done["output"]["data"] if done["success"] else done["output"]["error"]


FIND, FIND_SIMILAR, EXPLAIN, FRAME, _, MORE, LESS = range(7)
RED = "a man in a red coat"
UNCHANGED = {"__type__": "update"}


def line(text):
    """A line of the page that says `text`."""
    return {"__type__": "update", "value": text, "visible": bool(text)}


def find(address, sentence=RED, where="", top=6, **session):
    """Images and message."""
    images, *_, message = call(address, FIND, [sentence, where, top], **session)
    return images, message["value"]


def click(address, index=0, state=None, **session):
    """Picture and message. The ranking is kept by the server: `state` is what a client claims."""
    _, why, _, note = call(address, EXPLAIN, [state], event_data={"index": index, "value": None}, **session)
    return why, note["value"]


def test_sentence_ranks_images_and_a_click_explains(address, gallery):
    images, _, why, note, marks, message = call(address, FIND, [RED, "", 4])
    (expected,) = gallery.search([RED], 4)
    captions = [image["caption"].splitlines()[0] for image in images]
    assert captions == [f"{rank}.  {each.score:.3f}  {each.path}" for rank, each in enumerate(expected, start=1)]
    assert why is None and note == line(None) and marks == {"__type__": "update", "visible": False}
    assert message == line("The best 4 of 6 images. Click one to see why.")
    status, headers, body = ask(address, quote(images[0]["image"]["url"].removeprefix(address), safe="/=:"))
    assert status == 200 and headers["content-type"] == "image/webp"
    assert max(Image.open(Path(images[0]["image"]["path"])).size) <= 320

    why, note = click(address, 1)
    inputs = gallery.model, gallery.processor, gallery.image(expected[1].path), RED
    picture = draw_explanation(*inputs[2:], word_attention(*inputs), attribute_predictions(*inputs))
    shown = Image.open(why["path"]).convert("RGB")
    assert shown.size == picture.size
    assert note == cada.gallery.page._caption(2, expected[1]).split("  ", 2)[2].replace("\n", "  ")
    assert np.abs(np.asarray(shown, dtype=float) - np.asarray(picture, dtype=float)).mean() < 3  # WebP is lossy


def test_more_like_this_and_not_this(address, gallery):
    """A click, then a button: the same search with the image marked, until the next sentence."""
    call(address, FIND, [RED, "", 6])
    paths = [result.path for result in gallery.search(RED, 6)[0]]
    click(address, 2)
    images, *_, message = call(address, MORE, [None, "", 6])
    expected = gallery.search(RED, 6, like=[paths[2]])[0]
    assert [image["caption"].splitlines()[0] for image in images] == [
        f"{rank}.  {result.score:.3f}  {result.path}" for rank, result in enumerate(expected, 1)
    ]
    assert message["value"].endswith(f"Click one to see why. Like {paths[2]}.")
    wrong = expected[0].path
    click(address, 0)
    images, *_, message = call(address, LESS, [None, "", 6])
    like = [] if wrong == paths[2] else [paths[2]]  # a second mark of an image replaces the first
    expected = gallery.search(RED, 6, like=like, unlike=[wrong])[0]
    assert [image["caption"].split("  ")[1] for image in images] == [f"{result.score:.3f}" for result in expected]
    assert message["value"].endswith(f"Not like {wrong}.")
    assert find(address)[1] == "The best 6 of 6 images. Click one to see why."
    for number in (MORE, LESS):
        answer = call(address, number, [None, "", 6], session="unclicked")
        assert answer[0] == UNCHANGED and answer[-1] == line("Click an image first.")


@pytest.fixture  # of each test: while two pages are at work in a process, both put their files where the second does
def street(folder, tmp_path):
    """An index of the persons on a photo of a street, and the address of its page."""
    place = tmp_path / "street"
    place.mkdir()
    photo, boxes = draw_street(draw_people(3, 0), 0)
    (place / "photos").mkdir()
    photo.save(place / "photos" / "corner.png")
    Image.new("RGB", (24, 48), "green").save(place / "photos" / "whole.png")
    rows = [{"path": "corner.png", "box": box} for box in boxes] + [{"path": "whole.png", "box": [0, 0, 24, 48]}]
    (place / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"boxes": place / "boxes.jsonl", "progress": False}
    build_index(place / "photos", place / "index", str(folder / "model"), **options)
    gallery = open_index(place / "index", device="cpu")
    with cada.gallery.page.serve(gallery, free_port()) as address:
        yield gallery, address.rstrip("/"), photo


def test_a_click_shows_the_frame_of_a_person(street):
    gallery, address, photo = street
    (expected,) = gallery.search([RED], 4)
    images = call(address, FIND, [RED, "", 4])[0]
    assert [image["caption"].split("  ")[2] for image in images] == [result.path for result in expected]
    for number, (image, result) in enumerate(zip(images, expected)):
        width, height = Image.open(image["image"]["path"]).size
        assert abs(width / height - result.box[2] / result.box[3]) < 0.05  # the crop
        (shown,) = call(address, FRAME, [None], event_data={"index": number, "value": None})
        assert shown["visible"] and shown["label"] == f"The frame: {result.path}"
        frame = np.asarray(Image.open(shown["value"]["path"]).convert("RGB"), int)
        if result.path == "corner.png":
            x, y, width, height = result.box
            inside = np.s_[y + 1 : y + height - 1, x + 1 : x + width - 1]
            assert np.abs(frame[inside] - np.asarray(photo, int)[inside]).mean() < 12  # WebP is lossy
            assert frame[y + height // 2, x - 1, 0] - frame[y + height // 2, x - 1, 1] > 100  # the line of the box
    (nothing,) = call(address, FRAME, [None], event_data={"index": 9, "value": None})
    assert not nothing["visible"]


def test_a_whole_image_has_no_frame(address):
    find(address, top=3)
    (shown,) = call(address, FRAME, [None], event_data={"index": 0, "value": None})
    assert not shown["visible"] and shown["value"] is None


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: apt-get install chromium")
def test_the_frame_in_a_browser(street):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        patience = 600_000  # milliseconds, for a busy machine
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=patience)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(patience)
        playwright.expect.set_options(timeout=patience)
        page.goto(street[1])
        page.get_by_label("Sentence").fill(RED)
        page.get_by_label("Sentence").press("Enter")
        playwright.expect(page.locator(".caption-label")).to_have_count(4)
        frame = page.get_by_text("The frame: corner.png")
        playwright.expect(frame).to_have_count(0)
        page.locator(".thumbnail-item").filter(has_text="corner.png").first.click()
        playwright.expect(frame).to_be_visible()
        page.get_by_label("Sentence").fill("a woman")
        page.get_by_label("Sentence").press("Enter")
        playwright.expect(frame).to_have_count(0)  # another search shows other persons
        browser.close()


def test_metadata_are_shown_and_choose(address):
    images, _ = find(address)
    captions = {image["caption"].split("  ")[2] for image in images}
    assert captions == {f"more/{number}.png\ncamera={number}, place=hall" for number in range(5)} | {
        f"{ODD}\nplace={ODD_PLACE}"
    }
    images, message = find(address, where="place = hall; camera>=2;")
    cameras = {image["caption"].splitlines()[1] for image in images}
    assert cameras == {f"camera={number}, place=hall" for number in (2, 3, 4)}
    assert message.startswith("The best 3 of 6 images where place = hall and camera>=2. Click")
    assert find(address, where="camera>9") == ([], "No image where camera>9.")
    for where, problem in (
        ("colour=red", "The index has no column 'colour'"),
        ("camera=x", "of type int64, with 'x'"),
    ):
        images, message = find(address, where=where)
        assert images == UNCHANGED and problem in message


def test_large_images_are_handed_out_small(address):
    images, _ = find(address, top=60)
    assert len(images) == 6
    (odd,) = [image["image"]["path"] for image in images if ODD in image["caption"]]
    assert Image.open(odd).size == (160, 320)  # of 600×1200


def test_an_image_that_is_gone_is_left_out(address, folder):
    image, away = folder / "images" / "more" / "2.png", folder / "away.png"
    image.rename(away)
    try:
        images, message = find(address, "a man", top=60)
    finally:
        away.rename(image)
    captions = [image["caption"].splitlines()[0] for image in images]
    assert len(captions) == 5 and not any(caption.endswith("more/2.png") for caption in captions)
    assert "The best 5 of 6 images." in message and "Left out: 1, such as more/2.png" in message


def test_a_sentence_that_is_too_long_is_searched_and_said_where_it_is_cut(address, gallery):
    images, message = find(address, "red " * 80)
    assert len(images) == 6 and "The sentence is too long: it was read up to “red red red”." in message
    assert "too long" not in find(address, "red")[1]


@pytest.mark.parametrize(
    ("sentence", "message"),
    [(" .!", "is empty"), (None, "is empty")],
)
def test_empty_sentences(address, sentence, message):
    """The message is a line of its own; the results stay, and can be clicked."""
    find(address)
    answer = call(address, FIND, [sentence, "", 3])
    assert answer[:1] + answer[2:5] == [UNCHANGED] * 4
    assert message in answer[-1]["value"]
    why, _ = click(address, 5)
    assert why is not None


@pytest.mark.parametrize(("top", "said"), [(None, "missing"), (0, "0"), (61, "61")])
def test_numbers_out_of_bounds(address, top, said):
    images, message = find(address, top=top)
    assert images == UNCHANGED
    assert message == f"The number of images is {said}. Give 1 to 60."


def test_the_sentence_that_was_searched_for_is_explained(address, folder):
    """Not what stands in the field by now, which the page does not even send. An image has no words."""
    find(address, "a blue coat", top=2)
    first, _ = click(address)
    find(address, "a man in a red coat and white sneakers", top=2)
    second, _ = click(address)
    assert Image.open(first["path"]).height < Image.open(second["path"]).height  # more words, more maps
    _, _, reply = upload(address, (folder / "images" / "more" / "2.png").read_bytes())
    call(address, FIND_SIMILAR, [file_data(json.loads(reply)[0]), "", 3])
    why, note = click(address)
    assert why is None
    assert note.startswith("more/2.png  camera=2, place=hall\nIt was found by an image. Search by a sentence")


def test_clicks_out_of_bounds(address):
    find(address, top=3)
    for index in (3, -1, None, "0", [0, 1]):
        why, note = click(address, index)
        assert why is None and "no longer shown" in note, index
    why, note = click(address, 0, ["a man", ["/etc/passwd"]], session="other")
    assert why is None and "no longer shown" in note  # the client's ranking is not asked


def test_an_index_that_is_updated_goes_on(folder, tmp_path):
    """The page stays open while an image comes, one goes, and the index is deleted."""
    shutil.copytree(folder / "images" / "more", tmp_path / "images")
    build_index(tmp_path / "images", tmp_path / "index", str(folder / "model"), progress=False)
    with cada.gallery.page.serve(open_index(tmp_path / "index", device="cpu"), free_port()) as address:
        address = address.rstrip("/")
        assert find(address)[1].startswith("The best 5 of 5 images.")
        Image.new("RGB", (24, 48), "yellow").save(tmp_path / "images" / "new.png")
        (tmp_path / "images" / "0.png").unlink()
        (tmp_path / "images" / "1.png").unlink()
        images, message = find(address)
        assert len(images) == 3 and "Left out: 2, such as 0.png (No such file or directory)" in message
        build_index(tmp_path / "images", tmp_path / "index", progress=False)
        images, message = find(address)
        assert message.startswith("The best 4 of 4 images.")
        assert "new.png" in {image["caption"].split("  ")[2] for image in images}
        shutil.rmtree(tmp_path / "index")
        assert "holds no index" in find(address)[1]


def test_conditions_stand_between_semicolons():
    assert cada.gallery.page._conditions('camera=3; "place=hall; left" ;time>2;') == [
        "camera=3",
        "place=hall; left",
        "time>2",
    ]
    assert cada.gallery.page._conditions('say="a"\nb=1') == ['say="a"', "b=1"]
    assert cada.gallery.page._conditions(" ; ") == cada.gallery.page._conditions(None) == []


def test_a_question_is_asked_again_where_the_index_was_replaced_meanwhile(folder, tmp_path):
    shutil.copytree(folder / "images" / "more", tmp_path / "images")
    build_index(tmp_path / "images", tmp_path / "index", str(folder / "model"), progress=False)
    latest, asked = LiveIndex(open_index(tmp_path / "index", device="cpu")), []

    def question(gallery):
        asked.append(len(gallery))
        if len(asked) == 1:
            (tmp_path / "images" / "0.png").unlink()
            build_index(tmp_path / "images", tmp_path / "index", progress=False)
            raise RuntimeError("a file of the old state is gone")
        return (len(gallery),)

    assert latest.ask(question) == (4,) and asked == [5, 4]
    with pytest.raises(ZeroDivisionError):  # once only, and not where nothing was replaced
        latest.ask(lambda gallery: asked.append(0) or 1 / 0)
    assert asked == [5, 4, 0]


def upload(address, content, name="person.png"):
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--b--\r\n"
    return ask(address, "/gradio_api/upload", "POST", body, Content_Type="multipart/form-data; boundary=b")


def file_data(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "person.png"}


def test_an_uploaded_image_finds_the_same(address, folder):
    status, _, reply = upload(address, (folder / "images" / "more" / "2.png").read_bytes())
    assert status == 200
    images, *_, message = call(address, FIND_SIMILAR, [file_data(json.loads(reply)[0]), "camera!=9", 3])
    assert images[0]["caption"] == "1.  1.000  more/2.png\ncamera=2, place=hall"
    assert message == line("The best 3 of 6 images where camera!=9. Click one to mark it.")
    assert call(address, FIND_SIMILAR, [None, "", 3])[-1] == line("Choose an image first.")


def test_uploads_are_limited(address, tmp_path):
    status, _, _ = upload(address, bytes(cada.gallery.page.MAX_UPLOAD + 1))
    assert status == 413
    Image.new("1", (10_000, 9_001)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 20_000
    status, _, reply = upload(address, (tmp_path / "huge.png").read_bytes())
    status, _, damaged = upload(address, b"no image")
    for sent, problem in ((damaged, "cannot be read"), (reply, "10000×9001 pixels, more than 90,000,000")):
        assert problem in call(address, FIND_SIMILAR, [file_data(json.loads(sent)[0]), "", 3])[-1]["value"]


def forms_of(path) -> list[str]:
    """A path as an attacker would write it."""
    path = str(path)
    up = "/".join([".."] * 20) + path
    return [
        path,
        quote(path, safe=""),
        quote(quote(path, safe=""), safe=""),
        up,
        up.replace("..", "%2e%2e"),
        "/" + path,
    ]


def test_no_other_file_is_handed_out(address, folder):
    """Of the machine, of the package, of the index, and of the gallery itself: copies are shown, not its files."""
    images, _ = find(address, top=1)
    cache = Path(images[0]["image"]["path"]).parent
    outside = [
        "/etc/passwd",
        "/proc/self/environ",
        cada.gallery.page.__file__,
        Path.cwd() / "README.md",
        folder / "beside.png",
    ]
    outside += [
        folder / "images" / "notes.txt",
        folder / "images" / "more" / "0.png",
        folder / "model" / "config.json",
    ]
    outside += [path for path in (folder / "index").rglob("*") if path.is_file()]
    targets = []
    for path in outside:
        targets += [f"/gradio_api/file={form}" for form in [*forms_of(path), f"{cache}/../../../../../..{path}"]]
        targets += [f"/file={path}", f"/gradio_api/file/{path}", f"/static/..%2f..%2f..%2f..%2f..%2f..{path}"]
        targets += [
            f"/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{path}",
            f"/static/{path}",
            f"/gradio_api/proxy=file://{path}",
        ]
    targets += ["/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/file=https://example.com/", "/gradio_api/file="]
    targets += [f"/gradio_api/file={cache}", "/gradio_api/file=.", "/gradio_api/file=README.md"]
    for target in targets:
        status, _, body = ask(address, target)
        assert status in (400, 403, 404), target
        assert len(body) < 200, target
    assert len(targets) > 100


def test_files_of_the_machine_are_no_inputs(address, folder):
    """A client that names a file in place of its upload."""
    for path in ("/etc/passwd", str(folder / "beside.png"), str(folder / "images" / "more" / "0.png")):
        answer = call(address, FIND_SIMILAR, [file_data(path), "", 3])
        assert isinstance(answer, str) or answer is None, path


@pytest.mark.parametrize(
    "target",
    ["/docs", "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/runs", "/monitoring/summary"]
    + ["/gradio_api/call/find", "/gradio_api/api/find", "/gradio_api/vibe-code", "/gradio_api/deep_link"]
    + ["/gradio_api/mcp/", "/gradio_api/proxy=https://example.com/", "/login", "/svelte/x"],
)
def test_other_routes_of_gradio_are_closed(address, target):
    for method in ("GET", "POST"):
        assert ask(address, target, method)[0] == 404


def test_strangers_are_sent_away(address):
    """Pages of other hosts, also where a name of theirs points to this machine, and other machines."""
    assert ask(address, "/", Host="evil.example")[0] == 400
    assert ask(address, "/", Host=urlsplit(address).netloc)[0] == 200
    body = json.dumps({"data": ["a man", "", 3], "fn_index": FIND, "session_hash": "evil"})
    status, headers, _ = ask(
        address, "/gradio_api/queue/join", "POST", body, Content_Type="application/json", Origin="http://evil.example"
    )
    assert "access-control-allow-origin" not in headers
    assert status == 404
    assert ask(address, "/gradio_api/queue/join", "POST", body, Origin="null")[0] == 404


def test_page_names_no_other_host(address):
    status, headers, body = ask(address, "/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    for name in (b"googleapis", b"cdnjs", b"api.gradio.app"):
        assert b"https://fonts." not in body and name not in body, name


def test_server_asks_no_other_host(address, hosts):
    """Not for its version, not to count its users, not for a theme."""
    find(address)
    click(address)
    assert "127.0.0.1" in hosts
    assert {str(host) for host in hosts} <= {"127.0.0.1", "localhost", "::1", "None"}


def test_only_the_loopback_address_listens(address):
    """No socket of this process listens elsewhere."""
    import psutil

    port = urlsplit(address).port
    listening = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    assert ("127.0.0.1", port) in [tuple(each) for each in listening]
    assert {each.ip for each in listening if each.port == port} == {"127.0.0.1"}


def test_command_serves_until_it_is_interrupted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, port = os.environ.get("GRADIO_TEMP_DIR"), free_port()

    def interrupted():
        assert ask(f"http://127.0.0.1:{port}", "/")[0] == 200
        assert len(list(tmp_path.glob("cada_app_*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(cada.gallery.page, "_wait", interrupted)
    assert cli.main(["page", str(folder / "index"), "--port", str(port)]) == 0
    assert capsys.readouterr().out == f"Open http://127.0.0.1:{port}/ in a browser. Ctrl+C ends the page.\n"
    assert not list(tmp_path.glob("cada_app_*"))
    assert os.environ.get("GRADIO_TEMP_DIR") == before


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_command_runs_until_it_is_interrupted(folder, tmp_path, sent):
    port = free_port()
    command = [sys.executable, "-m", "cada", "page", str(folder / "index"), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as page:
        try:
            assert page.stdout.readline() == f"Open http://127.0.0.1:{port}/ in a browser. Ctrl+C ends the page.\n"
            assert ask(f"http://127.0.0.1:{port}", "/")[0] == 200
            assert list(tmp_path.glob("cada_app_*"))
        finally:
            page.send_signal(sent)
        assert page.wait(timeout=600) == 0, page.stderr.read()
    assert not list(tmp_path.glob("cada_app_*"))


def test_ports_that_cannot_be_used_are_named(address, folder, gallery, capsys, monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    port = urlsplit(address).port
    with pytest.raises(CADAError, match=f"Port {port} cannot be used: .*Choose another --port"):
        with cada.gallery.page.serve(gallery, port):
            pass
    assert "GRADIO_TEMP_DIR" not in os.environ
    for number in ("0", "65536", "-1"):
        assert cli.main(["page", str(folder / "index"), "--port", number]) == 1
        assert "error: Invalid value for '--port': Input should be" in capsys.readouterr().err


def test_errors_are_one_line(folder, tmp_path, capsys, monkeypatch):
    assert cli.main(["page", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no index")
    monkeypatch.setattr(cada.gallery.page, "gr", None)
    assert cli.main(["page", str(folder / "index")]) == 1
    assert 'needs Gradio. In a clone of this repository run: pip install -e ".[app]"' in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(address, gallery, tmp_path):
    """A visitor searches, clears the sentence, clicks the second image, narrows the search, searches by an image."""
    playwright = pytest.importorskip("playwright.sync_api")
    (expected,) = gallery.search([RED], 12)
    gallery.image(expected[0].path).save(tmp_path / "person.png")
    with playwright.sync_playwright() as driver:
        patience = 600_000  # milliseconds, for a busy machine
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=patience)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(patience)
        playwright.expect.set_options(timeout=patience)
        addresses, wrong = set(), []
        page.on("request", lambda request: addresses.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(address)
        sentence, captions, said = page.get_by_label("Sentence"), page.locator(".caption-label"), page.locator(".line")
        sentence.fill(RED)
        sentence.press("Enter")
        playwright.expect(captions).to_have_count(6)
        shown = [" ".join(text.split()) for text in captions.all_inner_texts()]
        assert shown == [
            " ".join(cada.gallery.page._caption(rank, each).split()) for rank, each in enumerate(expected, start=1)
        ]
        sentence.fill("")
        sentence.press("Enter")
        message = said.first.locator("textarea")
        playwright.expect(message).to_have_value("The sentence '' is empty. Describe a person.")
        page.locator(".thumbnail-item").nth(1).click()  # nothing lies over the results
        pictures = page.locator("img[src*='gradio_api/file']")
        playwright.expect(pictures).to_have_count(6 + 1)  # with the explanation
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        page.get_by_role("button", name="More like this").click()
        playwright.expect(message).to_have_value(re.compile(f"Like {re.escape(expected[1].path)}"))
        playwright.expect(page.get_by_role("button", name="Not this")).not_to_be_visible()
        sentence.fill(RED)
        page.get_by_label("Only images where").fill("camera<2")
        page.get_by_label("Only images where").press("Enter")
        playwright.expect(captions).to_have_count(2)
        playwright.expect(pictures).to_have_count(2)
        page.get_by_label("Images (1 to 60)").fill("")
        page.get_by_role("button", name="Search by the sentence").click()
        playwright.expect(message).to_have_value("The number of images is missing. Give 1 to 60.")
        page.get_by_label("Images (1 to 60)").fill("12")
        page.get_by_label("Only images where").fill("")
        page.get_by_text("Search by an image").click()
        page.locator("input[type=file]").set_input_files(tmp_path / "person.png")
        page.get_by_role("button", name="Search by the image").click()
        playwright.expect(captions).to_have_count(6)
        playwright.expect(captions.first).to_contain_text("1.000")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert wrong == []
    assert addresses - {""} == {urlsplit(address).netloc}
    assert np.asarray(Image.open(tmp_path / "page.png")).std() > 20
