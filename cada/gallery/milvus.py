"""The rows of an index as entities of a Milvus cluster, for more images than one machine holds."""

import json
import logging
import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch
from huggingface_hub.utils import chunk_iterable
from pymilvus import DataType, MilvusClient, MilvusException

from cada.files import CADAError
from cada.gallery.images import RESERVED, content_digest
from cada.gallery.store import Condition, Hits, feature_type


logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints every error before it raises it
# Types of index, and what a server wants to know to build one: lists; neighbours, and candidates for these.
INDEXES = {"FLAT": {}, "IVF_FLAT": {"nlist": 1024}, "HNSW": {"M": 16, "efConstruction": 200}}
_ROWS = 1_000  # of one message
_FIELDS = ["path", "digest", "metadata"]


class _Client:
    """`MilvusClient` whose errors are a `CADAError`."""

    def __init__(self, uri: str):
        self._uri = uri
        self._client = self.call(MilvusClient, uri=uri, token=os.environ.get("MILVUS_TOKEN", ""))

    def __getattr__(self, name: str):
        return lambda *args, **options: self.call(getattr(self._client, name), *args, **options)

    def call(self, function, *args, **options):
        try:
            return function(*args, **options)
        except (MilvusException, OSError, ValueError) as error:
            raise CADAError(
                f"Milvus at {self._uri}: {error}. Does it run, and is --uri its address? Nothing was lost; run the "
                "command again."
            ) from error


class MilvusStore:
    """
    The rows in a collection of a Milvus server. Search is exact (`FLAT`) unless `approximate` names another of
    [`INDEXES`]. Rows are replaced one after the other, not all at once. Methods are those of [`ArrowStore`].
    """

    def __init__(self, record: dict):
        self.record, self.name, self.client = record, record["collection"], _Client(record["uri"])
        self.place = f"The collection {self.name} of Milvus at {record['uri']}"
        if self.client.has_collection(self.name):
            self.client.load_collection(self.name)

    def create(self) -> None:
        """Make the collection, without rows."""
        if (kind := self.record["approximate"] or "FLAT") not in INDEXES:
            raise CADAError(f"--approximate is {kind!r}. Choose one of {', '.join(INDEXES)}.")
        self.client.drop_collection(self.name)
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        # The SHA-256 of the path, as a path may hold what no filter text of Milvus can.
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        for name, size in {"path": 16_384, "stamp": 256, "digest": 64}.items():
            schema.add_field(name, DataType.VARCHAR, max_length=size)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("feature", DataType.FLOAT_VECTOR, dim=self.record["dimension"])
        index = self.client.prepare_index_params()
        index.add_index("feature", index_type=kind, metric_type="IP", params=INDEXES[kind])
        self.client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")

    def __len__(self) -> int:
        return self._count("") if self.client.has_collection(self.name) else 0

    def _count(self, condition: str) -> int:
        return self.client.query(self.name, filter=condition, output_fields=["count(*)"])[0]["count(*)"]

    def _get(self, paths: Sequence[str], fields: list[str]) -> list[dict]:
        return self.client.get(self.name, ids=[content_digest(path.encode()) for path in paths], output_fields=fields)

    def find(self, path: str) -> dict | None:
        return next(map(self._row, self._get([path], _FIELDS)), None)

    def features(self, paths: Sequence[str]) -> torch.Tensor:
        known = {row["path"]: row["feature"] for row in self._get(paths, ["path", "feature"])} if paths else {}
        return torch.tensor([known[path] for path in paths]).view(-1, self.record["dimension"])

    def _row(self, row: dict) -> dict:
        return {"path": row["path"], "digest": row["digest"]} | {
            n: row["metadata"].get(n) for n in self.record["columns"]
        }

    def _rows(self, fields: list[str]) -> Iterator[dict]:
        iterator = self.client.query_iterator(self.name, batch_size=_ROWS, filter="", output_fields=fields)
        while rows := self.client.call(iterator.next):
            yield from rows

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        kinds = {"feature": feature_type(self.record["dimension"]), **self.record.get("columns", {})}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        own = [name for name in columns if name in RESERVED]
        for rows in map(list, chunk_iterable(self._rows([*own, "metadata"]), _ROWS)):
            yield pa.Table.from_pylist([row["metadata"] | {name: row[name] for name in own} for row in rows], schema)

    def search(self, queries: torch.Tensor, k: int, conditions: Sequence[Condition] = ()) -> Hits:
        if k > 16_384:
            raise CADAError(f"Milvus gives at most 16384 images; asked for {k}. Lower --top.")
        options = {"filter": " and ".join(map(_expression, conditions)), "limit": k, "output_fields": _FIELDS}
        # The lists and candidates that are visited may hold fewer images than are asked for; then all are.
        for visited in ({"nprobe": 64, "ef": max(64, 2 * k)}, {"nprobe": 1024, "ef": 32_768}):
            hits = self.client.search(self.name, queries.tolist(), search_params={"params": visited}, **options)
            if (fewest := min(map(len, hits))) == k or fewest >= self._count(options["filter"]):
                break
        rows = [[(min(hit["distance"], 1.0), self._row(hit["entity"])) for hit in row] for row in hits]  # a cosine
        return [sorted(row, key=lambda pair: (-pair[0], pair[1]["path"])) for row in rows]

    def write(self, listing: pa.Table, encoded: pa.Table) -> dict:
        wanted = {}
        for row in listing.to_pylist():  # without missing values: these fulfil no condition
            metadata = {name: value for name, value in row.items() if name not in RESERVED and value is not None}
            key = content_digest(row["path"].encode())
            wanted[row["path"]] = {"key": key, "stamp": row["stamp"], "metadata": metadata}
        for batch in encoded.to_batches(max_chunksize=_ROWS):
            self._upsert(batch.to_pylist(), wanted)
        outdated, gone = [], []
        for row in self._rows(["key", "path", "stamp", "metadata"]):
            if row["path"] not in wanted:
                gone.append(row["key"])
            elif row != row | wanted[row["path"]]:
                outdated.append(row["key"])
        for keys in map(list, chunk_iterable(outdated, _ROWS)):  # only stamps and metadata are new
            self._upsert(self.client.get(self.name, ids=keys, output_fields=["*"]), wanted)
        for keys in map(list, chunk_iterable(gone, _ROWS)):  # last: searches find enough meanwhile
            self.client.delete(self.name, ids=keys)
        self.client.flush(self.name)
        return {}

    def _upsert(self, rows: list[dict], wanted: dict[str, dict]) -> None:
        floats = ({"feature": list(map(float, row["feature"]))} for row in rows)
        self.client.upsert(self.name, data=[row | wanted[row["path"]] | each for row, each in zip(rows, floats)])


def _expression(condition: Condition) -> str:
    """A condition in the language of Milvus. JSON escapes what has a meaning there."""
    column, value = (json.dumps(part, ensure_ascii=False) for part in (condition.column, condition.value))
    return f"((exists metadata[{column}]) and (metadata[{column}] {condition.operator} {value}))"
