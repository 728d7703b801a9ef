"""Storage of an index: search equals a plain computation."""

import operator
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cada.gallery.store
from cada.files import CADAError
from cada.gallery.search import GalleryIndex
from cada.gallery.store import (
    ArrowStore,
    Condition,
    feature_column,
    open_store,
    parse_conditions,
    read_record,
    write_tables,
)
from cada.gallery.update import clean, read_shards


DIMENSION = 8
PLAIN = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def unit_vectors(count: int, seed: int, dimension: int = DIMENSION) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16).astype(np.float32)  # as a store keeps them


def tables(paths: list[str], features: np.ndarray, **metadata: list) -> tuple[pa.Table, pa.Table]:
    """A listing, and the encoded rows of its images."""
    stamps = [f"stamp of {path}" for path in paths]
    listing = pa.table({"path": paths, "stamp": stamps, **metadata})
    encoded = pa.table(
        {
            "path": paths,
            "stamp": stamps,
            "digest": [f"digest of {path}" for path in paths],
            "feature": feature_column(features),
        }
    )
    return listing, encoded


def new_store(folder: Path, columns: dict[str, str] | None = None, **changes):
    record = {"dimension": DIMENSION, "columns": columns or {}, "digest": "of a model", "keep_patches": False}
    record |= {"uri": None, "collection": "test", **changes}
    return open_store(folder, record)


def stamps(store) -> dict[str, str]:
    rows = [row for table in store.tables(["path", "stamp"]) for row in table.to_pylist()]
    return {row["path"]: row["stamp"] for row in rows}


def written(store, listing: pa.Table, encoded: pa.Table):
    """The store after a write, opened again."""
    return open_store(getattr(store, "folder", None), {**store.record, **store.write(listing, encoded)})


@settings(max_examples=40)
@given(
    count=st.integers(1, 60),
    queries=st.integers(1, 4),
    k=st.integers(1, 70),
    rows_at_once=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_exact_search_is_a_sorted_matrix_product(count, queries, k, rows_at_once, seed):
    features, asked = unit_vectors(count, seed), torch.from_numpy(unit_vectors(queries, seed + 1))
    paths = [f"{number:03}.png" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cada.gallery.store, "_ROWS_AT_ONCE", rows_at_once)
        store = written(new_store(Path(folder)), *tables(paths, features))
        found = store.search(asked, k)
    expected = asked.numpy() @ features.T
    for hits, scores in zip(found, expected, strict=True):
        order = np.argsort(-scores, kind="stable")[:k]
        assert [row["path"] for _, row in hits] == [paths[number] for number in order]
        np.testing.assert_allclose([score for score, _ in hits], scores[order], atol=1e-6)


def test_equal_scores_are_in_the_order_of_paths(tmp_path, monkeypatch):
    """Also where the last place is among them, whichever block they lie in, and however many sentences are asked."""
    monkeypatch.setattr(cada.gallery.store, "_ROWS_AT_ONCE", 7)
    different = unit_vectors(5, 0)
    features = different[[0, 1, 2, 3, 4] * 8]
    paths = [f"{number:02}" for number in range(40)]
    store = written(new_store(tmp_path), *tables(paths, features))
    asked = torch.from_numpy(unit_vectors(6, 1))
    for k in (1, 3, 8, 11, 40):
        together = store.search(asked, k)
        assert [store.search(query, k)[0] for query in asked.split(1)] == together
        for query, hits in zip(asked.numpy(), together):
            order = sorted(range(40), key=lambda row: (-float(different[row % 5] @ query), row))
            assert [row["path"] for _, row in hits] == [paths[row] for row in order[:k]]


def test_a_search_goes_in_parts_of_the_sentences(tmp_path, monkeypatch):
    store = written(new_store(tmp_path), *tables(list("abcdef"), unit_vectors(6, 0)))
    asked = torch.from_numpy(unit_vectors(5, 1))
    whole = store.search(asked, 3)
    monkeypatch.setattr(cada.gallery.store, "_QUERIES_AT_ONCE", 2)
    assert store.search(asked, 3) == whole and len(whole) == 5


@settings(max_examples=60)
@given(
    cameras=st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=30),
    symbol=st.sampled_from(sorted(PLAIN)),
    value=st.integers(-1, 5),
    k=st.integers(1, 35),
)
def test_conditions_count_before_ranking(cameras, symbol, value, k):
    features, asked = unit_vectors(len(cameras), 1), torch.from_numpy(unit_vectors(1, 2))
    paths = [f"{number:03}.png" for number in range(len(cameras))]
    with tempfile.TemporaryDirectory() as folder:
        listing, encoded = tables(paths, features, camera=pa.array(cameras, pa.int64()))
        store = written(new_store(Path(folder), {"camera": "int64"}), listing, encoded)
        hits = store.search(asked, k, parse_conditions([f"camera{symbol}{value}"], store.record["columns"]))[0]
    scores = (asked.numpy() @ features.T)[0]
    fits = [n for n, camera in enumerate(cameras) if camera is not None and PLAIN[symbol](camera, value)]
    assert [row["path"] for _, row in hits] == [paths[n] for n in sorted(fits, key=lambda n: -scores[n])[:k]]


def test_conditions_are_typed():
    columns = {"camera": "int64", "height": "float64", "indoors": "bool", "day": "string"}
    assert parse_conditions("camera==3", columns) == parse_conditions(["camera='3'"], columns)
    assert parse_conditions(['day="=>"', "day='"], columns) == [
        Condition("day", "==", "=>"),
        Condition("day", "==", "'"),
    ]
    assert parse_conditions(["camera=3", "height <= 1.8", "indoors=true", "day!=2024-05-01"], columns) == [
        Condition("camera", "==", 3),
        Condition("height", "<=", 1.8),
        Condition("indoors", "==", True),
        Condition("day", "!=", "2024-05-01"),
    ]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("camera", "no operator"),
        ("lens=3", "no column 'lens'.*camera"),
        ("camera=three", "of type int64.*'three'"),
        ("camera=", "of type int64"),
        ("indoors=maybe", "of type bool"),
        ("camera=>3", "operator =>. Write >="),
        ("camera=<3", "operator =<. Write <="),
        ("camera=9223372036854775808", "of type int64"),
        ("height>=inf", "of type float64.*'inf'"),
        ("height!=nan", "of type float64.*'nan'"),
    ],
)
def test_wrong_conditions_are_explained(condition, message):
    with pytest.raises(CADAError, match=message):
        parse_conditions([condition], {"camera": "int64", "indoors": "bool", "height": "float64"})


def test_a_store_keeps_what_is_left_and_takes_what_is_new(tmp_path):
    """Three images; then `a` is gone, `b` stays with other metadata, `c` has changed, `d` is new."""
    features = unit_vectors(4, 0)
    columns = {"camera": "int64", "day": "string"}
    first = tables(["a", "b", "c"], features[:3], camera=[1, 2, 3], day=["mon", "tue", None])
    store = written(new_store(tmp_path, columns), *first)
    assert len(store) == 3
    assert stamps(store) == {name: f"stamp of {name}" for name in "abc"}
    assert store.find("b") == {
        "path": "b",
        "digest": "digest of b",
        "camera": 2,
        "day": "tue",
    }
    assert store.find("x") is None

    _, encoded = tables(["c", "d"], -features[2:])
    encoded = encoded.set_column(1, "stamp", [["new", "stamp of d"]])
    listing = pa.table(
        {"path": ["b", "c", "d"], "stamp": ["stamp of b", "new", "stamp of d"], "camera": [7, 3, 4], "day": ["x"] * 3}
    )
    store = written(store, listing, encoded)
    assert stamps(store) == {"b": "stamp of b", "c": "new", "d": "stamp of d"}
    rows = [row for table in store.tables(["path", "digest", "camera", "feature"]) for row in table.to_pylist()]
    assert {row["path"]: (row["digest"], row["camera"]) for row in rows} == {
        "b": ("digest of b", 7),
        "c": ("digest of c", 3),
        "d": ("digest of d", 4),
    }
    kept = {row["path"]: row["feature"] for row in rows}
    np.testing.assert_allclose([kept[name] for name in "bcd"], [features[1], -features[2], -features[3]], atol=1e-6)

    asked = torch.from_numpy(-features[2:3])
    (score, row), *_ = store.search(asked, 2)[0]
    assert (row["path"], row["camera"]) == ("c", 3)
    assert score == pytest.approx(1, abs=5e-4)
    conditions = parse_conditions(["camera>3", "day=x"], columns)
    assert {row["path"] for _, row in store.search(asked, 5, conditions)[0]} == {"b", "d"}


def test_fewer_rows_than_were_written_are_reported(tmp_path):
    store = written(new_store(tmp_path, images=2), *tables(["a", "b"], unit_vectors(2, 0)))
    GalleryIndex(tmp_path, store.record, "a model")
    with pytest.raises(CADAError, match="table-.* holds 2 images, and 3 were written. .*run `index` again"):
        GalleryIndex(tmp_path, {**store.record, "images": 3}, "a model")


def test_only_own_files_are_deleted(tmp_path):
    """What one of our runs leaves goes; what only looks like it stays."""
    own = ["table-0123456789ab.arrow", ".unfinished-table-0123456789ab.arrow"]
    own += [".unfinished-index.json", "pending/0123456789ab-000000.arrow", f"patches/{64 * 'a'}.safetensors"]
    foreign = [
        "table-of-guests.arrow",
        "features-0123456789ab.faiss",
        ".unfinished-letter",
        "pending/x.arrow",
        "pending/a.jpg",
    ]
    foreign += ["patches/jeans.safetensors", "notes.txt"]
    for name in own + foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    store = written(new_store(tmp_path, keep_patches=True), *tables([], unit_vectors(0, 0)))
    clean(tmp_path, store.record)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*foreign, store.record["table"]}


@pytest.mark.parametrize("damage", ["", "no shard", "cut", "foreign"])
def test_damaged_shards_are_dropped(tmp_path, damage):
    (tmp_path / "pending").mkdir()
    _, encoded = tables(["a"], unit_vectors(1, 0))
    names = [tmp_path / "pending" / f"0123456789ab-00000{number}.arrow" for number in (0, 1)]
    for name in names:
        table = encoded.replace_schema_metadata({"model": "x", "unreadable": "[]"})
        write_tables(name, table.schema, [table])
    content = names[1].read_bytes()
    if damage == "foreign":
        write_tables(names[1], pa.schema([("a", pa.int64())]), [pa.table({"a": [1]})])
    else:
        names[1].write_bytes(content[: len(content) // 2] if damage == "cut" else damage.encode())
    assert [name for name, _ in read_shards(tmp_path, {"digest": "x", "dimension": DIMENSION})] == [names[0].stem]
    assert not names[1].exists()


def test_an_index_may_be_called_as_its_folders_are(tmp_path):
    (tmp_path / "pending").mkdir()
    store = written(new_store(tmp_path / "pending"), *tables(["a"], unit_vectors(1, 0)))
    assert list(read_shards(tmp_path / "pending", store.record)) == [] and Path(store.place).is_file()


def test_a_damaged_table_is_reported(tmp_path):
    store = written(new_store(tmp_path), *tables(["a"], unit_vectors(1, 0)))
    (tmp_path / store.record["table"]).write_bytes(b"no table")
    with pytest.raises(CADAError, match="table-.*damaged.*run `index` again"):
        ArrowStore(tmp_path, store.record)


@pytest.mark.parametrize("text", ['{"format": 3}', "[]", '{"format": 1}', '{"name": "a web page"}'])
def test_what_is_no_record_is_reported(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CADAError, match="another folder"):
        read_record(tmp_path)
