"""The service under load: many clients for a minute, on the model of the demo with random weights."""

import asyncio
import base64
import os
import signal
import subprocess
import sys
import time
from io import BytesIO

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from conftest import free_port
from datasets import disable_progress_bars

from cada.data.drawn import load_drawn
from cada.demo import build_start
from cada.evaluation.encoding import encode_queries
from cada.gallery.index import build_index, open_index
from pipeline_cada import CADAPipeline


pytest.importorskip("uvicorn", reason='the service needs FastAPI and uvicorn: pip install -e ".[serve]"')
pytestmark = pytest.mark.slow

CLIENTS, SECONDS, TOP = 64, 60, 5
CLOSE = 1e-4  # batches of other sizes differ in the last digits of float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model, and an index of 300 drawn images."""
    folder = tmp_path_factory.mktemp("load")
    disable_progress_bars()
    splits = load_drawn(train_persons=50, val_persons=2, test_persons=75)
    build_start(splits, folder / "model", 0)
    splits["test"].save_to_disk(folder / "images")
    build_index(folder / "images", folder / "index", str(folder / "model"), progress=False)
    return folder


def questions(folder) -> list[tuple]:
    """Path, body, and a function that says whether an answer is the library's, for 96 requests of every kind."""
    gallery, images = open_index(folder / "index", device="cpu"), []
    pipeline = CADAPipeline(gallery.model, processor=gallery.processor)
    asked = []
    rows = list(gallery.source.row_of.items())[:32]
    for number, (path, row) in enumerate(rows):
        image = gallery.image(path)
        content = BytesIO()
        image.save(content, "PNG")
        images.append(f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}")
        sentence = f"{number} " + gallery.source.dataset[row]["captions"][0][:60]
        ranking = gallery.search(sentence, len(gallery))[0]
        asked.append(
            ("/search", {"sentence": sentence, "top": TOP}, lambda found, ranking=ranking: agrees(found, ranking))
        )
        feature = encode_queries(gallery.model, gallery.processor, [sentence], progress=False).embeds[0]
        asked.append(("/v1/embeddings", {"input": sentence}, lambda found, feature=feature: equals(found, feature)))
        if number >= 3:
            files = [gallery.image(path) for path, _ in rows[number - 3 : number + 1]]
            ranked = pipeline(sentence, images=files)
            body = {"query": sentence, "documents": images[-4:]}
            asked.append(("/rerank", body, lambda found, ranked=ranked: ranks(found, ranked)))
    return asked


def agrees(found, ranking) -> bool:
    """The scores of the best, each of an image that has it."""
    scores = {each.path: each.score for each in ranking}
    got = [each["score"] for each in found["results"]]
    return np.allclose(got, [each.score for each in ranking[:TOP]], atol=CLOSE) and np.allclose(
        got, [scores[each["path"]] for each in found["results"]], atol=CLOSE
    )


def equals(found, feature) -> bool:
    return np.allclose(found["data"][0]["embedding"], feature, atol=CLOSE)


def ranks(found, ranked) -> bool:
    scores = {each["index"]: each["score"] for each in ranked}
    got = [each["relevance_score"] for each in found["results"]]
    return got == sorted(got, reverse=True) and np.allclose(
        got, [scores[each["index"]] for each in found["results"]], atol=CLOSE
    )


async def ask_for(address: str, asked: list, clients: int, seconds: float) -> float:
    """Answers per second to `clients` that each ask again once they are answered. Each answer is looked at."""
    end, answers = time.monotonic() + seconds, 0
    async with aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int) -> None:
            nonlocal answers
            while time.monotonic() < end:
                path, body, right = asked[number % len(asked)]
                async with session.post(path, json=body) as reply:
                    assert reply.status == 200, await reply.text()
                    assert right(await reply.json()), body
                answers += 1
                number += 1

        begin = time.monotonic()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return answers / (time.monotonic() - begin)


async def watch(process: psutil.Process, memory: list, seconds: float) -> None:
    """The memory of a process, in bytes, once a second."""
    for _ in range(int(seconds)):
        await asyncio.sleep(1)
        memory.append(process.memory_info().rss)


def test_a_minute_of_load(folder):
    torch.set_num_threads(1)
    asked, port, memory = questions(folder), free_port(), []
    command = [sys.executable, "-m", "cada", "serve", str(folder / "index"), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "CADA_API_KEY": ""}
    ) as server:
        try:
            assert server.stdout.readline().startswith("Serving 300 images")
            address = f"http://127.0.0.1:{port}"

            async def load():
                await ask_for(address, asked, CLIENTS, 5)  # warms up
                alone = await ask_for(address, asked, 1, 15)
                watching = asyncio.create_task(watch(psutil.Process(server.pid), memory, SECONDS))
                together = await ask_for(address, asked, CLIENTS, SECONDS)
                await watching
                return alone, together

            alone, together = asyncio.run(load())
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) == 0
    early, late = np.mean(memory[5:15]) / 1e6, np.mean(memory[-10:]) / 1e6
    print(f"\n1 client: {alone:.0f}/s, {CLIENTS}: {together:.0f}/s; memory {early:.0f} MB, at the end {late:.0f} MB")
    assert together > 3 * alone
    assert late < 1.05 * early
