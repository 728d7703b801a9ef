"""The rows of an index in a real Milvus server, which these tests start and end."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_port, save_tiny_start
from filelock import FileLock
from test_index import SENTENCES, build, save_images
from test_store import DIMENSION, new_store, stamps, tables, unit_vectors, written

from cada.files import CADAError
from cada.gallery.index import open_index
from cada.gallery.store import parse_conditions


pytest.importorskip("pymilvus", reason='needs the client of Milvus: pip install "pymilvus>=2.6"')
SERVER = Path(sys.executable).parent / "milvus-server"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SERVER.exists(), reason="needs a server of Milvus: pip install milvus==2.3.5 (Linux, x86-64)"
    ),
]
# What a system allows in the name of a file and a filter of Milvus has a meaning for.
NAMES = ["O'Brien.png", 'a"b.png', "back\\slash.png", "both'\"\\.png", "new\nline.png", "{x}%_.png", "größe 😀.png"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """Address of a server at work. A machine bears one at a time, as some of its ports are fixed."""
    with FileLock(Path(tempfile.gettempdir()) / "milvus-of-tests.lock"):
        yield from server_at_work(tmp_path_factory.mktemp("milvus"), free_port())


def server_at_work(folder, port):
    from pymilvus import MilvusClient, MilvusException

    command = [str(SERVER), "--data", str(folder / "data"), "--proxy-port", str(port)]
    with open(folder / "printed", "w") as printed:
        server = subprocess.Popen(command, stdout=printed, stderr=printed, start_new_session=True)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                MilvusClient(uri=address).list_collections()
                break
            except MilvusException:
                printed = (folder / "printed").read_text()
                assert server.poll() is None and "timeout" not in printed and time.monotonic() < end, printed
                time.sleep(1)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=600)
        shutil.rmtree(folder, ignore_errors=True)


def store_in(uri, name, columns=None, approximate=None):
    """A new collection."""
    store = new_store(None, columns, uri=uri, collection=name, approximate=approximate)
    store.create()
    return store


@pytest.mark.parametrize("kind", ["FLAT", "IVF_FLAT", "HNSW"])
def test_every_index_finds_the_images(uri, kind):
    """3,000 rows: a server builds an index from 1,024 on."""
    features, asked = unit_vectors(3000, 5), torch.from_numpy(unit_vectors(5, 6))
    data = tables([f"{number:04}" for number in range(3000)], features, even=[n % 2 == 0 for n in range(3000)])
    store = written(store_in(uri, f"kind_{kind}", {"even": "bool"}, kind), *data)
    scores = asked.numpy() @ features.T
    even = parse_conditions("even=true", store.record["columns"])
    for conditions, step in ((), 1), (even, 2):
        shares = []
        for hits, row in zip(store.search(asked, 10, conditions), scores, strict=True):
            found = [int(image["path"]) for _, image in hits]
            np.testing.assert_allclose([score for score, _ in hits], row[found], atol=1e-5)
            shares.append(len(set(found) & {step * n for n in np.argsort(-row[::step])[:10].tolist()}) / 10)
        assert np.mean(shares) == 1 if kind == "FLAT" else np.mean(shares) > 0.5
    # Features in half precision are not of length 1, and a cosine is not above 1.
    near = [hits[0][0] for hits in store.search(torch.from_numpy(features[:200]), 1)]
    assert 0.9999 < np.mean(near) and max(near) <= 1
    # Where few lists are visited, they hold fewer images than are asked for; then all are.
    assert [len(hits) for hits in store.search(asked, 2000)] == [2000] * 5
    assert [len(hits) for hits in store.search(asked, 2000, even)] == [1500] * 5


def test_rows_come_change_and_go(uri):
    """Of images with odd names: two are lost, one has other metadata, one has changed, one is new."""
    features, columns = unit_vectors(len(NAMES) + 1, 0), {"camera": "int64", 'it\'s a "place"': "string"}
    first = {"camera": list(range(len(NAMES))), 'it\'s a "place"': NAMES}
    store = written(store_in(uri, "updates", columns), *tables(NAMES, features[:-1], **first))
    assert stamps(store) == {name: f"stamp of {name}" for name in NAMES}
    for number, name in enumerate(NAMES):
        assert store.find(name) == {
            **{"path": name, "digest": f"digest of {name}"},
            **{"camera": number, 'it\'s a "place"': name},
        }
        place = parse_conditions(f'it\'s a "place"={name}', columns)
        assert [row["path"] for _, row in store.search(torch.from_numpy(features[:1]), 9, place)[0]] == [name]
    assert store.find("x") is None

    left = [*NAMES[2:], "new"]
    listing, _ = tables(
        left, features[2:], camera=[9, *range(3, len(left) + 2)], **{'it\'s a "place"': ["x"] * len(left)}
    )
    listing = listing.set_column(
        1, "stamp", [["changed" if name == NAMES[3] else f"stamp of {name}" for name in left]]
    )
    _, encoded = tables([NAMES[3], "new"], -features[[3, -1]])
    encoded = encoded.set_column(1, "stamp", [["changed", "stamp of new"]])
    store = written(store, listing, encoded)
    assert stamps(store) == dict(zip(left, listing["stamp"].to_pylist())) and len(store) == len(left)
    rows = {row["path"]: row for table in store.tables(["path", "camera", "feature"]) for row in table.to_pylist()}
    assert {name: row["camera"] for name, row in rows.items()} == dict(zip(left, listing["camera"].to_pylist()))
    expected = [
        -features[number] if left[number - 2] in (NAMES[3], "new") else features[number] for number in range(2, 8)
    ]
    np.testing.assert_allclose([rows[name]["feature"] for name in left], expected, atol=1e-6)
    assert len(store_in(uri, "updates", columns)) == 0


def test_conditions_are_those_of_the_table(uri, tmp_path):
    count = 40
    features, asked = unit_vectors(count, 3), torch.from_numpy(unit_vectors(3, 4))
    metadata = {
        "camera": [None if n % 7 == 0 else n % 4 for n in range(count)],
        "height": [1.5 + n / 100 for n in range(count)],
        "indoors": [n % 2 == 0 for n in range(count)],
        "attributes.sex": ["man" if n % 3 else 'wo"man' for n in range(count)],
        "größe": ["Straße\\" if n % 2 else None for n in range(count)],
        "key": list(range(count)),  # a name that has a meaning for Milvus, too
    }
    columns = {"camera": "int64", "height": "float64", "indoors": "bool", "attributes.sex": "string"}
    columns |= {"größe": "string", "key": "int64"}
    data = tables([f"{n:03}" for n in range(count)], features, **metadata)
    stores = [new_store(tmp_path, columns), store_in(uri, "conditions", columns)]
    arrow, milvus = (written(store, *data) for store in stores)
    (table,) = milvus.tables(["path", "key"])
    assert sorted(table.to_pylist(), key=lambda row: row["key"]) == [
        {"path": f"{n:03}", "key": n} for n in range(count)
    ]
    for where in (
        [],
        ["camera=2"],
        ["camera!=2"],
        ["camera<=1", "height>1.6"],
        ["indoors=true"],
        ['attributes.sex=wo"man'],
        ["attributes.sex!=man", "camera>1"],
        ["camera=99"],
        ["größe=Straße\\"],
    ):
        conditions = parse_conditions(where, columns)
        results = [store.search(asked, 6, conditions) for store in (arrow, milvus)]
        for first, second in zip(*results, strict=True):
            assert [row for _, row in first] == [row for _, row in second], where
            np.testing.assert_allclose([s for s, _ in first], [s for s, _ in second], atol=1e-5)


def test_an_index_lives_in_the_server(uri, tmp_path):
    """Built, searched as a table is, brought up to date; an image with a quote in its name goes."""
    checkpoint = save_tiny_start(tmp_path / "checkpoint")
    folder = tmp_path / "images"
    save_images(folder, [*NAMES, *(f"{number}.png" for number in range(5))])
    build(folder, tmp_path / "arrow", checkpoint)
    build(folder, tmp_path / "milvus", checkpoint, uri=uri, keep_patches=True)
    arrow, milvus = (open_index(tmp_path / name) for name in ("arrow", "milvus"))
    assert len(arrow) == len(milvus) == 12 and milvus.info()["store"] == f"milvus at {uri}"
    for first, second in zip(arrow.search(SENTENCES, rerank=0), milvus.search(SENTENCES, rerank=0), strict=True):
        assert [result.path for result in first] == [result.path for result in second]
        np.testing.assert_allclose([r.score for r in first], [r.score for r in second], atol=1e-5)
    for name in NAMES[:3]:
        (folder / name).unlink()
    changes = build(folder, tmp_path / "milvus")
    assert (changes.removed, changes.unchanged, len(open_index(tmp_path / "milvus"))) == (3, 9, 9)
    # The folder of the index is deleted, its collection stays: a new index of this name begins anew.
    shutil.rmtree(tmp_path / "milvus")
    build(folder, tmp_path / "milvus", checkpoint, uri=uri, keep_patches=True)
    milvus = open_index(tmp_path / "milvus")
    assert len(milvus.search("a man")[0]) == 9
    milvus.store.client.drop_collection(milvus.store.name)
    with pytest.raises(CADAError, match="holds 0 images, and 9 were written.*run `index` again"):
        open_index(tmp_path / "milvus")
    build(folder, tmp_path / "milvus")
    assert len(open_index(tmp_path / "milvus")) == 9


def test_errors_are_explained(uri):
    with pytest.raises(CADAError, match="--approximate is 'FOO'. Choose one of FLAT, IVF_FLAT, HNSW"):
        store_in(uri, "errors", approximate="FOO")
    store = written(store_in(uri, "errors"), *tables(["a"], unit_vectors(1, 0)))
    with pytest.raises(CADAError, match=f"(?s)Milvus at {uri}: .*Nothing was lost"):
        store.search(torch.ones(1, DIMENSION + 1), 1)
    with pytest.raises(CADAError, match="at most 16384 images"):
        store.search(torch.ones(1, DIMENSION), 16_385)
