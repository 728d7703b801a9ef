"""The service: over HTTP, in its own process's stead in a thread, with a tiny model."""

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import bert_tokenizer, free_port, save_checkpoint, tiny_processor
from hypothesis import given, settings
from PIL import Image

from cada import cli
from cada.evaluation.encoding import encode_queries
from cada.gallery.index import LiveIndex, build_index, open_index
from pipeline_cada import CADAPipeline


pytest.importorskip("uvicorn", reason='the service needs FastAPI and uvicorn: pip install -e ".[serve]"')
import openai
import schemathesis
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

import cada.serve.service
from cada.serve.service import KEY, MAX_BODY, Service, build_app


RED = "a man in a red coat"
RIGHT = {"Authorization": "Bearer key"}
NO_IMAGE = "it is no image; addresses are not fetched, so send the image itself as `data:image/jpeg;base64,...`."
SENTENCES = [RED, "a woman with a blue bag", "somebody without a hat", "a child"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and the index of eight images with a column `camera`."""
    folder = tmp_path_factory.mktemp("serve")
    save_checkpoint(folder / "model", tiny_processor(bert_tokenizer()), 0)
    (folder / "images").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 48)).save(folder / "images" / f"{number}.png")
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(8))
    (folder / "images" / "list.csv").write_text(f"path,camera\n{rows}")
    build_index(folder / "images" / "list.csv", folder / "index", str(folder / "model"), progress=False)
    return folder


@pytest.fixture(scope="module")
def live(folder):
    live = LiveIndex(open_index(folder / "index", device="cpu"))
    live.gallery.model  # noqa: B018  # loads it
    return live


@contextmanager
def at_work(service, app=None):
    """A server in a thread: it and its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app or build_app(service), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()


@pytest.fixture(scope="module")
def address(live):
    with at_work(Service(live)) as (_, address):
        yield address


def ask(address, path, body=None, method=None, **headers):
    """Status, headers, and what the JSON of the answer says."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
    if isinstance(body, dict):
        body, headers = json.dumps(body), {"Content_Type": "application/json", **headers}
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, named)
        reply = connection.getresponse()
        content = reply.read()
        is_json = reply.headers.get_content_type() == "application/json"
        return reply.status, dict(reply.getheaders()), json.loads(content) if is_json else content.decode()
    finally:
        connection.close()


def answer(address, path, body, **headers):
    """The answer to a request that is right."""
    status, _, content = ask(address, path, body, **headers)
    assert status == 200, content
    return content


def problem(address, path, body, status=400, method=None, **headers):
    """What is said of one that is wrong, in OpenAI's form."""
    given, _, content = ask(address, path, body, method, **headers)
    assert given == status, content
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    return content["error"]["message"]


def data_url(path) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def counts(address, **headers) -> dict:
    """The numbers of /metrics by name and labels."""
    text = ask(address, "/metrics", **headers)[2]
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def same(found: list[dict], expected: list) -> None:
    """An answer's results are the library's. Batches of other sizes differ in the last digit."""
    assert [each["path"] for each in found] == [each.path for each in expected]
    assert [(each["stage"], each["metadata"]) for each in found] == [(each.stage, each.metadata) for each in expected]
    np.testing.assert_allclose([each["score"] for each in found], [each.score for each in expected], atol=1e-5)


def test_searches_are_those_of_the_library(address, folder):
    gallery = open_index(folder / "index", device="cpu")
    for sentence in SENTENCES:
        same(answer(address, "/search", {"sentence": sentence})["results"], gallery.search(sentence)[0])
    body = {"sentence": RED, "top": 2, "rerank": 0, "where": ["camera=1"]}
    same(answer(address, "/search", body)["results"], gallery.search(RED, 2, 0, ["camera=1"])[0])
    image = folder / "images" / "3.png"
    found = answer(address, "/search", {"image": data_url(image), "top": 3, "where": ["camera!=0"]})["results"]
    same(found, gallery.search_image(Image.open(image), 3, ["camera!=0"]))
    assert found[0]["path"] == "3.png" and found[0]["score"] == pytest.approx(1, abs=1e-3)
    for number in range(8):  # features in half precision are not of length 1, and a cosine is not above 1
        body = {"image": data_url(folder / "images" / f"{number}.png")}
        assert all(each["score"] <= 1 for each in answer(address, "/search", body)["results"])


def test_what_was_not_read_is_said(address, folder):
    found = answer(address, "/search", {"sentence": f"{RED} and " + "red " * 40})
    assert found["read_up_to"] == "red red red" and len(found["results"]) == 8
    assert answer(address, "/search", {"sentence": RED})["read_up_to"] is None
    image, away = folder / "images" / "2.png", folder / "away.png"
    image.rename(away)
    try:
        found = answer(address, "/search", {"sentence": RED, "rerank": 8})
    finally:
        away.rename(image)
    assert found["left_out"] == {"2.png": "No such file or directory"}
    assert {each["path"] for each in found["results"]} == {f"{number}.png" for number in (0, 1, 3, 4, 5, 6, 7)}


def test_openai_client_gets_embeddings_of_texts_and_images(address, folder, live):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list()
    assert model.id == "model" and client.models.retrieve("model") == model
    for ask_for in (client.models.retrieve, lambda name: client.embeddings.create(input=RED, model=name)):
        with pytest.raises(openai.NotFoundError, match="The model 'org/gpt' is not here. Ask for 'model'"):
            ask_for("org/gpt")
    image = folder / "images" / "5.png"
    given = [*SENTENCES, data_url(image)]
    gallery = open_index(folder / "index", device="cpu")
    texts = encode_queries(gallery.model, gallery.processor, SENTENCES, progress=False)
    pixel_values = gallery.processor(images=Image.open(image), return_tensors="pt")["pixel_values"]
    expected = [*texts.embeds.tolist(), *gallery.encode_images(pixel_values)[0].tolist()]
    for encoding in ("float", "base64", openai.omit):
        reply = client.embeddings.create(input=given, model="model", encoding_format=encoding, dimensions=8)
        assert [each.index for each in reply.data] == [0, 1, 2, 3, 4]
        found = [each.embedding for each in reply.data]
        if encoding == "base64":
            found = [np.frombuffer(base64.b64decode(each), dtype="<f4") for each in found]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert reply.usage.prompt_tokens == reply.usage.total_tokens == int(texts.attention_mask.sum())
    one = client.embeddings.create(input=RED, model="model").data
    np.testing.assert_allclose(one[0].embedding, expected[0], atol=1e-6)
    for wrong, message in (
        ({"input": "red " * 40}, r"'red red .* is too long: the model reads it up to 'red red red'\. Shorten it"),
        ({"dimensions": 9}, "`dimensions` is 9, and the model has 8"),
        ({"input": [[1, 2]]}, r"input\.0: Input should be a valid string\."),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.embeddings.create(**{"input": RED, "model": "model", **wrong})


def test_images_are_ranked_as_by_the_pipeline(address, folder, live):
    pipeline = CADAPipeline(live.gallery.model, processor=live.gallery.processor)
    files = [str(folder / "images" / f"{number}.png") for number in (4, 1, 7, 2)]
    expected = pipeline(RED, images=files, rerank=4)
    parts = [{"content": [{"type": "image_url", "image_url": {"url": data_url(file)}}]} for file in files]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        for documents in ([data_url(file) for file in files], parts):
            found = answer(address, path, {"query": RED, "documents": documents, "model": "model"})
            assert [each["index"] for each in found["results"]] == [each["index"] for each in expected]
            scores = [each["relevance_score"] for each in found["results"]]
            np.testing.assert_allclose(scores, [each["score"] for each in expected], atol=1e-5)
    assert found["usage"]["total_tokens"] == 8  # [CLS], six words, [SEP]
    best = answer(address, "/rerank", {"query": RED, "documents": parts, "top_n": 1})["results"]
    assert [each["index"] for each in best] == [expected[0]["index"]]


def test_usual_options_of_other_clients_that_change_nothing_are_accepted(address, folder):
    """Cohere's, Jina's and vLLM's of documents that are texts, and OpenAI's of images."""
    url = data_url(folder / "images" / "4.png")
    part = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    plain = answer(address, "/rerank", {"query": RED, "documents": [url]})["results"]
    options = {"return_documents": False, "max_tokens_per_doc": 4096, "truncate_prompt_tokens": -1, "user": "me"}
    body = {"query": RED, "documents": [{"content": [part], "role": "user"}], "priority": 0, **options}
    assert answer(address, "/v2/rerank", body)["results"] == plain
    said = problem(address, "/rerank", {**body, "return_documents": True})
    assert said == "`return_documents`: a result tells the `index` of its document. Leave it out."


@contextmanager
def held(live):
    """The model is busy, as long as the block runs."""
    busy, free = threading.Event(), threading.Event()
    holder = threading.Thread(target=live.ask, args=(lambda gallery: busy.set() or free.wait(),))
    holder.start()
    busy.wait()
    try:
        yield
    finally:
        free.set()
        holder.join()


def waits(address, count: int) -> None:
    """Until so many requests are there."""
    while counts(address)[("cada_requests_waiting",)] != count:
        time.sleep(0.01)


def test_requests_that_wait_are_computed_together_and_none_suffers_for_another(live, folder):
    """One is alone, five wait meanwhile, of which one is wrong: it fails alone."""
    gallery = open_index(folder / "index", device="cpu")
    with at_work(Service(live)) as (_, address), ThreadPoolExecutor(16) as clients:
        with held(live):
            first = clients.submit(ask, address, "/search", {"sentence": RED})
            waits(address, 1)
            bodies = [{"sentence": sentence, "top": top} for sentence, top in zip(SENTENCES, (8, 3, 1, 5))]
            searches = [clients.submit(ask, address, "/search", body) for body in bodies]
            waits(address, 5)
            texts = [clients.submit(ask, address, "/v1/embeddings", {"input": text}) for text in ("red " * 40, RED)]
            waits(address, 7)
        assert first.result()[0] == 200
        for body, search in zip(bodies, searches):
            same(search.result()[2]["results"], gallery.search(body["sentence"], body["top"])[0])
        assert [text.result()[0] for text in texts] == [400, 200]
        seen = counts(address)
    # Of one (the first, and the good text, asked again), and of four.
    assert seen[("cada_batch_requests_count",)] == 3 and seen[("cada_batch_requests_sum",)] == 6
    assert seen[("cada_batch_requests_bucket", "2.0")] == 2 and seen[("cada_batch_requests_bucket", "4.0")] == 3


def test_a_queue_that_is_full_sends_away(live):
    with at_work(Service(live, max_waiting=2)) as (_, address), ThreadPoolExecutor(4) as clients:
        with held(live):
            asked = [clients.submit(ask, address, "/search", {"sentence": RED}) for _ in range(2)]
            waits(address, 2)
            status, headers, content = ask(address, "/search", {"sentence": RED})
            assert status == 503 and int(headers["retry-after"]) >= 1
            assert content["error"]["message"] == "2 requests wait already. Come again later."
            assert ask(address, "/health")[0] == 200
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")  # which comes again
            patient = clients.submit(client.embeddings.create, input=RED, model="model")
            while counts(address).get(("cada_requests_total", "/v1/embeddings", "503"), 0) == 0:
                time.sleep(0.01)
        assert [each.result()[0] for each in asked] == [200, 200]
        assert len(patient.result().data) == 1


def png(size) -> str:
    content = BytesIO()
    Image.new("1", size).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/search", {"sentence": "..!"}, "sentence: it is empty; describe a person."),
        ("/search", {"sentence": "\u200d"}, "sentence: it is empty; describe a person."),
        ("/search", {"sentence": "red " * 501}, "sentence: String should have at most 2000 characters."),
        ("/search", {}, "The body: give a `sentence` or an `image`."),
        ("/search", {"sentence": RED, "image": "data:image/png;base64,"}, "give a `sentence` or an `image`"),
        ("/search", {"image": png((2, 2)), "rerank": 3}, "`rerank` reads a sentence"),
        ("/search", {"sentence": RED, "top": 1001, "rerank": -1}, "top: Input should be less than or equal to 1000."),
        ("/search", {"sentence": RED, "topk": 3}, "topk: there is no such field."),
        ("/search", {"sentence": RED, "\u0000\n": 3}, "\\x00\\n: there is no such field."),
        (
            "/search",
            {"sentence": RED, "rerank": 0, "min_probability": 0.5},
            "`min_probability` needs the decoder, which reads nothing for an `image`, or with `rerank` 0; leave one",
        ),
        ("/search", {"sentence": "\ud800"}, "unable to parse raw data as a unicode string"),
        ("/search", {"sentence": RED, "where": ["colour=red"]}, "no column 'colour'"),
        ("/search", {"sentence": RED, "where": ["camera=x"]}, "of type int64, with 'x'"),
        ("/search", {"image": "https://example.com/1.png"}, f"image: {NO_IMAGE}"),
        ("/search", {"image": "data:image/png,abc"}, "image: the image cannot be read: there is no `;base64,`"),
        ("/search", {"image": "data:image/png;base64,%%"}, "image: the image cannot be read: Only base64"),
        ("/search", {"image": png((10_000, 9_001))}, "10000×9001 pixels, more than 90,000,000"),
        ("/v1/embeddings", {}, "input: it is missing."),
        ("/v1/embeddings", {"input": []}, "input: List should have at least 1 item, not 0."),
        ("/v1/embeddings", {"input": 3}, "input: Input should be a valid list."),
        ("/v1/embeddings", {"input": [RED, 2, 3]}, "input.1: Input should be a valid string."),
        ("/v1/embeddings", {"input": "red " * 501}, "input.0: a text should have at most 2000 characters."),
        ("/v1/embeddings", {"input": [RED, " .!"]}, "input.1: it is empty; describe a person."),
        (
            "/v1/embeddings",
            {"input": [RED, "data:image/png;base64,AAAA"]},
            "input.1: the image cannot be read: it is no",
        ),
        ("/v1/embeddings", {"input": [RED] * 1001}, "input: List should have at most 1000 items, not 1001."),
        ("/rerank", {"query": RED, "documents": [png((2, 2))] * 65}, "documents: List should have at most 64 items"),
        ("/rerank", {"query": RED, "documents": ["a text"]}, f"documents.0: {NO_IMAGE}"),
        (
            "/rerank",
            {
                "query": RED,
                "documents": [{"content": [{"type": "image_url", "image_url": {"url": "http://x/1.png"}}]}],
            },
            f"documents.0: {NO_IMAGE}",
        ),
        (
            "/rerank",
            {"query": RED, "documents": [{"text": "a text"}]},
            'documents.0: it is no image; one has the form `{"content": [{"type": "image_url", ',
        ),
        ("/rerank", {"query": RED, "documents": [3]}, "documents.0: Input should be a valid string."),
        ("/rerank", {"query": RED, "documents": [png((2, 2)), png((2, 2))[:62]]}, "documents.1: the image"),
    ],
)
def test_requests_that_are_wrong_are_told_what_and_where(address, path, body, message):
    """Each problem is one sentence; `param` names the field that the message begins with."""
    error = ask(address, path, body)[2]["error"]
    assert message in error["message"] == problem(address, path, body)
    assert "body." not in error["message"] and "Value error" not in error["message"]
    if error["param"] is not None:
        assert error["message"].startswith(f"{error['param']}: ")


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{", "application/json", "The body: it is no JSON: Expecting property name enclosed in double quotes at "),
        (b"[1]", "application/json", "The body: it is no JSON object; send one, with the header `Content-Type: app"),
        (b"sentence=a+man", "application/x-www-form-urlencoded", "The body: it is no JSON object; send one, with "),
        (b"", "application/json", "The body: it is missing."),
    ],
)
def test_bodies_that_are_no_requests(address, body, kind, message):
    assert problem(address, "/search", body, Content_Type=kind).startswith(message)


@pytest.mark.parametrize("page", [False, True])
def test_every_error_has_the_same_form(live, page):
    """With and without the page at `/`, whose parts stay what they are."""
    app = build_app(Service(live))
    with ExitStack() as stack:
        if page:
            pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
            stack.enter_context(cada.gallery.page.mounted(app, live))
        _, address = stack.enter_context(at_work(None, app))
        for path, method in (
            ("/search", "GET"),
            ("/v1/embeddings", "GET"),
            ("/search", "DELETE"),
            ("/health", "POST"),
        ):
            said = problem(address, path, None, 405, method)
            assert said == f"{method} {path}: Method Not Allowed. GET /openapi.json tells what there is."
        assert ask(address, "/search", method="GET")[1]["allow"] == "POST"
        for path in ("/nope", "/v1", "/gradio_api/info", "/config"):
            said = problem(address, path, None, 404)
            assert said == f"GET {path}: Not Found. GET /openapi.json tells what there is."
        for path in ("/search", "/", "/nope"):
            said = problem(address, path, None, Host="evil.example")
            assert said == f"The host 'evil.example' is not served without a key. Call 127.0.0.1, or set {KEY}."
        if page:
            assert "Find a person" in ask(address, "/")[2]
            assert ask(address, "/theme.css")[0] == 200
            assert ask(address, "/gradio_api/file=/etc/passwd")[0] == 404


def test_bodies_are_limited(address):
    message = "The body has more than 10,000,000 bytes. Send less at once, or smaller images."
    assert problem(address, "/search", b"x" * (MAX_BODY + 1), 413, Content_Type="application/json") == message
    announced = {"Content_Type": "application/json", "Content_Length": "20000000000"}
    assert problem(address, "/search", b"x", 413, **announced) == message  # before it comes
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
    parts = iter([b"x" * 1_000_000] * 11)  # of a length that no header tells
    connection.request("POST", "/search", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    reply = connection.getresponse()
    assert reply.status == 413 and json.loads(reply.read())["error"]["message"] == message
    connection.close()
    # A page in a browser may send text without asking first, JSON not.
    assert ask(address, "/search", json.dumps({"sentence": RED}), Content_Type="text/plain")[0] == 400
    assert ask(address, "/search", b'{"sentence": "a"' + b"[" * 10_000, Content_Type="application/json")[0] == 400


def test_strangers_are_sent_away(address):
    """A page whose name points to this machine."""
    for host in ("evil.example", "127.0.0.1.evil.example", "192.0.2.1", "", "[::1"):
        problem(address, "/search", {"sentence": RED}, Host=host)
    for host in ("LocalHost:1", "127.0.0.2", "[::1]", "[::1]:8000"):
        assert ask(address, "/health", Host=host)[0] == 200


def test_a_key_is_demanded(live):
    with at_work(Service(live, key="seçret")) as (_, address):
        basic = base64.b64encode("anybody:seçret".encode()).decode()
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic %"}, {"Authorization": "seçret"}):
            for path in ("/search", "/metrics", "/openapi.json", "/nothing"):
                status, headers, _ = ask(address, path, **wrong)
                assert status == 401 and headers["www-authenticate"].startswith("Basic")
        assert "The key is missing or wrong" in problem(address, "/search", {"sentence": RED}, 401)
        assert ask(address, "/health")[0] == 200
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        right = {"Authorization": "Bearer seçret".encode()}, {"Authorization": f"Basic {basic}"}
        for headers in right:
            assert answer(address, "/search", {"sentence": RED}, Host="service.example", **headers)["results"]


def test_addresses_of_the_network_need_a_key(folder, capsys, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        assert cli.main(["serve", str(folder / "index"), "--host", host]) == 1
        assert f"error: --host {host} is for other machines, too. Set {KEY} to a key" in capsys.readouterr().err
    for key in ("", "key"):
        monkeypatch.setenv(KEY, key)
        for host in ("300.1.1.1", "", "::g"):
            assert cli.main(["serve", str(folder / "index"), "--host", host]) == 1
            assert f"error: --host {host!r} is no address. Give one such as 0.0.0.0," in capsys.readouterr().err


def test_errors_of_the_command_are_one_line(folder, tmp_path, address, capsys, monkeypatch):
    assert cli.main(["serve", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no index")
    port = str(urlsplit(address).port)
    assert cli.main(["serve", str(folder / "index"), "--port", port]) == 1
    assert f"error: 127.0.0.1, port {port} cannot be used: " in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "cada.serve.service")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(folder / "index")]) == 1
    assert 'The service needs uvicorn. In a clone of this repository run: pip install -e ".[serve]"' in (
        capsys.readouterr().err
    )


def test_answers_are_counted(live):
    with at_work(Service(live)) as (_, address):
        answer(address, "/search", {"sentence": RED})
        problem(address, "/search", {"sentence": ""})
        ask(address, "/nothing/here")
        seen = counts(address)
    assert seen[("cada_requests_total", "/search", "200")] == 1
    assert seen[("cada_requests_total", "/search", "400")] == 1
    assert seen[("cada_requests_total", "page", "404")] == 1
    assert seen[("cada_request_seconds_count", "/search")] == 2
    assert seen[("cada_index_images",)] == 8
    assert seen[("process_resident_memory_bytes",)] > 1e8


def test_an_index_that_is_updated_goes_on(folder, tmp_path, capfd):
    """With the model that is in memory, as its weights are the same."""
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "list.csv").unlink()
    build_index(tmp_path / "images", tmp_path / "index", str(folder / "model"), progress=False)
    live = LiveIndex(open_index(tmp_path / "index", device="cpu"))
    model = live.gallery.model
    with at_work(Service(live)) as (_, address):
        assert len(answer(address, "/search", {"sentence": RED})["results"]) == 8
        Image.new("RGB", (24, 48), "yellow").save(tmp_path / "images" / "new.png")
        build_index(tmp_path / "images", tmp_path / "index", progress=False)
        assert len(answer(address, "/search", {"sentence": RED})["results"]) == 9
        assert live.gallery.model is model
        shutil.rmtree(tmp_path / "index")
        said = problem(address, "/search", {"sentence": RED}, 500)  # not the fault of who asks
        assert said.startswith(f"{tmp_path / 'index'} holds no index (index.json). Make one: ")
    assert "Traceback" not in capfd.readouterr().err


def test_what_fails_otherwise_is_an_error_of_the_server(live, monkeypatch):
    def broken(gallery, asked, *arguments):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(cada.serve.service, "search_sentences", broken)
    with at_work(Service(live)) as (_, address):
        message = problem(address, "/search", {"sentence": RED}, 500)
        assert message == "This failed. More stands where the service was started."
        monkeypatch.undo()
        assert answer(address, "/search", {"sentence": RED})["results"]  # the thread goes on


def test_requests_at_work_are_answered_at_the_end(live):
    with at_work(Service(live)) as (server, address), ThreadPoolExecutor(4) as clients:
        with held(live):
            asked = [clients.submit(ask, address, "/search", {"sentence": RED}) for _ in range(3)]
            waits(address, 3)
            server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(ConnectionError):  # refused, or at the last moment reset
                while True:
                    ask(address, "/health")
        assert [each.result()[0] for each in asked] == [200, 200, 200]


@pytest.fixture(scope="module")
def description(live):
    with at_work(Service(live, key="key")) as (_, address):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json", headers=RIGHT)


@pytest.mark.parametrize("examples", [15, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", ["POST /search", "POST /v1/embeddings", "POST /rerank"])
def test_openapi_description_holds(description, operation, mode, examples):
    """Answers are those of the description, and what it forbids is refused; without the key everything."""
    method, path = operation.split()
    # What it cannot say: whether an image is one, whether a sentence is short enough and a column is there.
    left_out = [positive_data_acceptance]

    @settings(max_examples=examples)
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def holds(case):
        case.call_and_validate(headers=RIGHT, excluded_checks=left_out)

    holds()


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
def test_openapi_description_holds_of_what_is_read(description, path):
    description[path]["GET"].Case().call_and_validate(headers=RIGHT)


def test_examples_of_the_description_are_answered(description):
    base = description.config.base_url or description.location.removesuffix("/openapi.json")
    answered = 0
    for path, methods in description.raw_schema["paths"].items():
        if "post" in methods:
            name = methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]
            for example in description.raw_schema["components"]["schemas"][name]["examples"]:
                answer(base, path, example, **RIGHT)
                answered += 1
    assert answered == 3


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_programs_and_people_until_it_is_stopped(folder, tmp_path, sent):
    """With the page, whose open connection does not keep the process."""
    pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
    port = free_port()
    command = [sys.executable, "-m", "cada", "serve", str(folder / "index"), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), KEY: "key"}
    right = {"Authorization": "Basic " + base64.b64encode(b":key").decode()}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            line = f"Serving 8 images with the model model at http://127.0.0.1:{port}/ Ctrl+C ends it.\n"
            assert server.stdout.readline() == line
            address = f"http://127.0.0.1:{port}"
            assert ask(address, "/")[0] == 401
            status, headers, page = ask(address, "/", **right)
            assert status == 200 and "Find a person" in page
            assert headers["content-security-policy"].startswith("default-src 'self';")
            for closed in ("/gradio_api/info", "/config", f"/gradio_api/file={folder / 'images' / '0.png'}"):
                assert ask(address, closed, **right)[0] == 404
            body = {"data": [RED, "", 3], "fn_index": 0, "session_hash": "tests"}
            assert ask(address, "/gradio_api/queue/join", body, **right)[0] == 200
            stream = ask(address, "/gradio_api/queue/data?session_hash=tests", **right)[2]
            assert "The best 3 of 8 images" in stream
            assert list(tmp_path.glob("cada_app_*"))
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
            connection.request("GET", "/gradio_api/heartbeat/tests", headers=right)
            assert connection.getresponse().readline() == b"data: ALIVE\n"
        finally:
            server.send_signal(sent)
        assert server.wait(timeout=30) == 0, server.stderr.read()
        connection.close()
    assert not list(tmp_path.glob("cada_app_*"))


def test_probabilities_of_a_calibrated_model(live, address, monkeypatch):
    body = {"sentence": RED, "top": 8, "rerank": 3}
    said = problem(address, "/search", {**body, "min_probability": 0.5})
    assert "model is not calibrated" in said
    assert {found["probability"] for found in answer(address, "/search", body)["results"]} == {None}
    monkeypatch.setattr(live.gallery.model.config, "calibration", {"weights": [1.0, 1.0, 0.0]})
    results = answer(address, "/search", body)["results"]
    chances = [found["probability"] for found in results]
    assert chances[3:] == [None] * 5 and all(0 < chance < 1 for chance in chances[:3])
    least = sorted(chances[:3])[1]
    kept = answer(address, "/search", {**body, "min_probability": least})["results"]
    assert kept == [found for found in results[:3] if found["probability"] >= least]
    assert answer(address, "/search", {**body, "min_probability": 1})["results"] == []  # nobody
