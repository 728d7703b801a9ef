"""The page: what it answers to whom, what it keeps to itself, and its use in a real browser."""

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from conftest import bert_tokenizer, tiny_processor
from PIL import Image
from test_hub_cada import save

import app_cada
from explain_cada import attribute_predictions, draw_explanation, word_attention
from gallery_cada import build_index, open_index
from source_cada import GalleryError


pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # Gradio's own

COLOURS = ("red", "green", "blue", "white", "black")
ODD = "<img src=x onerror=alert(1)> & 50%.png"  # a name that the page has to show as it is
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a folder of six images, its index, and files that are nobody's business."""
    folder = tmp_path_factory.mktemp("app")
    save(folder / "model", tiny_processor(bert_tokenizer()), 0)
    (folder / "images" / "more").mkdir(parents=True)
    gradient = Image.linear_gradient("L").resize((24, 48))
    for number, colour in enumerate(COLOURS):
        image = Image.composite(Image.new("RGB", (24, 48), colour), Image.new("RGB", (24, 48), "gray"), gradient)
        image.save(folder / "images" / "more" / f"{number}.png")
    Image.new("RGB", (600, 1200), "orange").save(folder / "images" / ODD)
    (folder / "images" / "notes.txt").write_text("secret")
    (folder / "beside.png").write_bytes((folder / "images" / "more" / "0.png").read_bytes())
    build_index(folder / "images", folder / "index", str(folder / "model"), progress=False)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
        with app_cada.serve(gallery, free_port()) as address:
            yield address.rstrip("/")


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(address, target, method="GET", body=None, **headers):
    """Status, headers and body; the target is sent as it is, with its dots."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
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


FIND, FIND_SIMILAR, EXPLAIN = 0, 1, 2


def test_sentence_ranks_images_and_a_click_explains(address, gallery):
    images, _, why = call(address, FIND, ["a man in a red coat", 4])
    (expected,) = gallery.search(["a man in a red coat"], 4)
    captions = [image["caption"] for image in images]
    assert captions == [f"{rank}.  {each.score:.3f}  {each.path}" for rank, each in enumerate(expected, start=1)]
    assert why is None
    status, headers, body = ask(address, quote(images[0]["image"]["url"].removeprefix(address), safe="/=:"))
    assert status == 200 and headers["content-type"] == "image/webp"
    assert max(Image.open(Path(images[0]["image"]["path"])).size) <= 320

    state = None  # the ranking is kept by the server
    (why,) = call(address, EXPLAIN, [state, "a man in a red coat"], event_data={"index": 1, "value": None})
    inputs = gallery.model, gallery.processor, gallery.image(expected[1].path), "a man in a red coat"
    picture = draw_explanation(*inputs[2:], word_attention(*inputs), attribute_predictions(*inputs))
    shown = Image.open(why["path"]).convert("RGB")
    assert shown.size == picture.size
    assert np.abs(np.asarray(shown, dtype=float) - np.asarray(picture, dtype=float)).mean() < 3  # WebP is lossy


def test_large_images_are_handed_out_small(address):
    images, *_ = call(address, FIND, ["a man", 60])
    assert len(images) == 6
    (odd,) = [image["image"]["path"] for image in images if image["caption"].endswith(ODD)]
    assert Image.open(odd).size == (160, 320)  # of 600×1200


def test_an_image_that_is_gone_is_left_out(address, folder):
    image, away = folder / "images" / "more" / "2.png", folder / "away.png"
    image.rename(away)
    try:
        images, *_ = call(address, FIND, ["a man", 60])
    finally:
        away.rename(image)
    captions = [image["caption"] for image in images]
    assert len(captions) == 5 and not any(caption.endswith("more/2.png") for caption in captions)


@pytest.mark.parametrize(
    ("sentence", "message"),
    [("red " * 126, "has 503 characters. Use 500 at most"), (" .!", "is empty"), (None, "is empty")],
)
def test_sentences_out_of_bounds(address, sentence, message):
    assert message in call(address, FIND, [sentence, 3])


def test_clicks_out_of_bounds(address):
    call(address, FIND, ["a man", 3])
    for index in (3, -1, None, "0", [0, 1]):
        answer = call(address, EXPLAIN, [None, "a man"], event_data={"index": index, "value": None})
        assert "no longer shown" in answer, index
    assert "Type a sentence" in call(address, EXPLAIN, [None, "  "], event_data={"index": 0, "value": None})
    fresh = call(address, EXPLAIN, [["/etc/passwd"], "a man"], "other", event_data={"index": 0, "value": None})
    assert "no longer shown" in fresh  # the client's ranking is not asked


def upload(address, content, name="person.png"):
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--b--\r\n"
    return ask(address, "/gradio_api/upload", "POST", body, Content_Type="multipart/form-data; boundary=b")


def file_data(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "person.png"}


def test_an_uploaded_image_finds_the_same(address, folder):
    status, _, reply = upload(address, (folder / "images" / "more" / "2.png").read_bytes())
    assert status == 200
    images, *_ = call(address, FIND_SIMILAR, [file_data(json.loads(reply)[0]), 3])
    assert images[0]["caption"] == "1.  1.000  more/2.png"
    assert "Choose an image first" in call(address, FIND_SIMILAR, [None, 3])


def test_uploads_are_limited(address, tmp_path):
    status, _, _ = upload(address, bytes(app_cada.MAX_UPLOAD + 1))
    assert status == 413
    with pytest.raises(ValueError, match="no image that can be read"):
        (tmp_path / "no.png").write_bytes(b"no image")
        app_cada.open_upload(tmp_path / "no.png")
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 10_000
    with pytest.raises(ValueError, match="has 50,010,000 pixels. Use 50,000,000 at most"):
        app_cada.open_upload(tmp_path / "huge.png")
    status, _, reply = upload(address, (tmp_path / "huge.png").read_bytes())
    status, _, damaged = upload(address, b"no image")
    assert "no image that can be read" in call(address, FIND_SIMILAR, [file_data(json.loads(damaged)[0]), 3])
    assert "50,010,000 pixels" in call(address, FIND_SIMILAR, [file_data(json.loads(reply)[0]), 3])


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
    images, *_ = call(address, FIND, ["a man", 1])
    cache = Path(images[0]["image"]["path"]).parent
    outside = ["/etc/passwd", "/proc/self/environ", app_cada.__file__, Path.cwd() / "README.md", folder / "beside.png"]
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
        answer = call(address, FIND_SIMILAR, [file_data(path), 3])
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
    body = json.dumps({"data": ["a man", 3], "fn_index": FIND, "session_hash": "evil"})
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
    call(address, FIND, ["a man", 3])
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
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])  # restored afterwards
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    port = free_port()

    def interrupted():
        assert ask(f"http://127.0.0.1:{port}", "/")[0] == 200
        assert len(list(tmp_path.glob("cada_app_*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(app_cada, "_wait", interrupted)
    assert app_cada.main(["--index", str(folder / "index"), "--port", str(port)]) == 0
    assert capsys.readouterr().out == f"Open http://127.0.0.1:{port}/ in a browser. Ctrl+C ends the page.\n"
    assert not list(tmp_path.glob("cada_app_*"))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_command_runs_until_it_is_interrupted(folder, tmp_path, sent):
    port = free_port()
    command = [sys.executable, app_cada.__file__, "--index", str(folder / "index"), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as page:
        try:
            assert page.stdout.readline() == f"Open http://127.0.0.1:{port}/ in a browser. Ctrl+C ends the page.\n"
            assert ask(f"http://127.0.0.1:{port}", "/")[0] == 200
            assert list(tmp_path.glob("cada_app_*"))
        finally:
            page.send_signal(sent)
        assert page.wait(timeout=20) == 0, page.stderr.read()
    assert not list(tmp_path.glob("cada_app_*"))


def test_taken_port_is_named(address, gallery, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])  # restored afterwards
    port = urlsplit(address).port
    with pytest.raises(GalleryError, match=f"Port {port} cannot be used: .*Choose another --port"):
        with app_cada.serve(gallery, port):
            pass


def test_errors_are_one_line(folder, tmp_path, capsys, monkeypatch):
    assert app_cada.main(["--index", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no index")
    monkeypatch.setattr(app_cada, "gr", None)
    assert app_cada.main(["--index", str(folder / "index")]) == 1
    assert capsys.readouterr().err == 'error: The page needs Gradio. Run: pip install "cada-transformers[app]"\n'


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(address, gallery, tmp_path):
    """A visitor types, presses Enter, clicks the second image, then searches by an image of the disk."""
    playwright = pytest.importorskip("playwright.sync_api")
    (expected,) = gallery.search(["a man in a red coat"], 12)
    gallery.image(expected[0].path).save(tmp_path / "person.png")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        addresses, wrong = set(), []
        page.on("request", lambda request: addresses.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(address)
        page.get_by_label("Sentence").fill("a man in a red coat")
        page.get_by_label("Sentence").press("Enter")
        captions = page.locator(".caption-label")
        playwright.expect(captions).to_have_count(6)
        shown = [" ".join(text.split()) for text in captions.all_inner_texts()]
        assert shown == [f"{rank}. {each.score:.3f} {each.path}" for rank, each in enumerate(expected, start=1)]
        page.locator(".thumbnail-item").nth(1).click()
        why = page.locator("img[src*='gradio_api/file']").last
        playwright.expect(page.get_by_test_id("detailed-image").or_(why).last).to_be_visible()
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        page.get_by_text("Search by an image").click()
        page.locator("input[type=file]").set_input_files(tmp_path / "person.png")
        page.get_by_role("button", name="Search by the image").click()
        playwright.expect(captions.first).to_contain_text("1.000")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert wrong == []
    assert addresses - {""} == {urlsplit(address).netloc}
    assert np.asarray(Image.open(tmp_path / "page.png")).std() > 20
