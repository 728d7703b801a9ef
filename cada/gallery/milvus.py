"""The rows of an index as entities of a Milvus cluster, for more images than one machine holds."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cada.files import CADAError
from cada.gallery.images import RESERVED
from cada.gallery.store import MEND, ArrowStore, Condition, feature_column


# Types of index, and what a server wants to know to build one: lists; neighbours, and candidates for these.
INDEXES = {"FLAT": {}, "IVF_FLAT": {"nlist": 1024}, "HNSW": {"M": 16, "efConstruction": 200}}
_LISTS_VISITED = 64
_ROWS = 1_000  # of one message
_LIMIT = 16_384  # images that a search gives at most
_BYTES = {"path": 16_384, "stamp": 256, "digest": 256, "patches": 256}
_FIELDS = ["path", "digest", "patches", "metadata"]


class _Client:
    """`MilvusClient` whose errors are a `CADAError`."""

    def __init__(self, uri: str):
        try:
            from pymilvus import MilvusClient, MilvusException
        except ImportError as error:
            raise CADAError('Milvus needs its client: pip install "pymilvus>=2.6"') from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints every error before it raises it
        self._uri, self._errors = uri, (MilvusException, OSError, ValueError)
        self._client = self.call(MilvusClient, uri=uri, token=os.environ.get("MILVUS_TOKEN", ""))

    def __getattr__(self, name: str):
        return partial(self.call, getattr(self._client, name))

    def call(self, function, *args, **options):
        """What `function` gives."""
        try:
            return function(*args, **options)
        except self._errors as error:
            raise CADAError(
                f"Milvus at {self._uri}: {error}. Does it run, and is --uri its address? Nothing was lost; run the "
                "command again."
            ) from error


class MilvusStore:
    """
    The rows in a collection of a Milvus server, whose token stands in the environment variable `MILVUS_TOKEN`. Search
    is exact (`FLAT`) unless `approximate` names another of [`INDEXES`]. Rows are replaced one after the other, not all
    at once. The key of a row is the SHA-256 of its path: a path may hold what no filter text of Milvus can. Methods
    are those of [`ArrowStore`].
    """

    def __init__(self, folder: Path, record: dict):
        self.folder, self.record, self.name = folder, record, record["collection"]
        self.kind = record["approximate"] or "FLAT"
        self.client = _Client(record["uri"])
        self.exists = self.client.has_collection(self.name)
        if self.exists:
            self.client.load_collection(self.name)

    def ready(self) -> None:
        """A `CADAError` where the collection holds fewer images than the index was written with."""
        if len(self) < self.record["images"]:
            raise CADAError(
                f"The collection {self.name} of Milvus at {self.record['uri']} holds {len(self):,} images, and "
                f"{self.record['images']:,} were written. Is it the right Milvus? {MEND}"
            )

    def drop(self) -> None:
        """Delete the collection, where there is one."""
        if self.exists:
            self.client.drop_collection(self.name)
        self.exists = False

    def create(self) -> None:
        """Make the collection, where there is none."""
        from pymilvus import DataType

        if self.exists:
            return
        if self.kind not in INDEXES:
            raise CADAError(f"--approximate is {self.kind!r}. Choose one of {', '.join(INDEXES)}.")
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        for name, size in _BYTES.items():
            schema.add_field(name, DataType.VARCHAR, max_length=size)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("feature", DataType.FLOAT_VECTOR, dim=self.record["dimension"])
        index = self.client.prepare_index_params()
        index.add_index("feature", index_type=self.kind, metric_type="IP", params=INDEXES[self.kind])
        self.client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")
        self.exists = True

    def __len__(self) -> int:
        return self._count("") if self.exists else 0

    def _count(self, condition: str) -> int:
        return self.client.query(self.name, filter=condition, output_fields=["count(*)"])[0]["count(*)"]

    def known(self) -> dict[str, str]:
        return {row["path"]: row["stamp"] for row in self._rows(["path", "stamp"])}

    def _rows(self, fields: list[str]) -> Iterator[dict]:
        if self.exists:
            iterator = self.client.query_iterator(self.name, batch_size=_ROWS, filter="", output_fields=fields)
            while rows := self.client.call(iterator.next):
                yield from rows

    def find(self, path: str) -> dict | None:
        rows = self.client.get(self.name, ids=[_key(path)], output_fields=_FIELDS) if self.exists else []
        return self._row(rows[0]) if rows else None

    def _row(self, entity: dict) -> dict:
        metadata = {name: entity["metadata"].get(name) for name in self.record["columns"]}
        return {"path": entity["path"], "digest": entity["digest"], "patches": entity["patches"] or None, **metadata}

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        entities = self._rows([*(name for name in columns if name in RESERVED), "metadata"])
        while part := list(islice(entities, _ROWS)):
            table = {}
            for name in columns:
                values = [(row[name] or None) if name in RESERVED else row["metadata"].get(name) for row in part]
                kind = self.record["columns"].get(name, "string")
                table[name] = feature_column(np.array(values)) if name == "feature" else pa.array(values, kind)
            yield pa.table(table)

    def search(
        self, queries: torch.Tensor, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[tuple[float, dict]]]:
        if k > _LIMIT:
            raise CADAError(f"Milvus gives at most {_LIMIT} images; asked for {k}. Lower --top.")
        condition = " and ".join(_expression(condition) for condition in conditions)
        options = {"data": queries.tolist(), "limit": k, "filter": condition, "output_fields": _FIELDS}
        some = {"nprobe": _LISTS_VISITED, "ef": min(max(64, 2 * k), 32_768)}
        hits = self.client.search(self.name, search_params={"params": some}, **options)
        fewest = min(map(len, hits))
        if self.kind != "FLAT" and fewest < k and fewest < self._count(condition):
            # What was visited may hold fewer images than are asked for.
            all_of_them = {"nprobe": INDEXES["IVF_FLAT"]["nlist"], "ef": 32_768}
            hits = self.client.search(self.name, search_params={"params": all_of_them}, **options)
        rows = [[(hit["distance"], self._row(hit["entity"])) for hit in row] for row in hits]
        return [sorted(row, key=lambda pair: (-pair[0], pair[1]["path"])) for row in rows]

    def write(self, listing: pa.Table, encoded: pa.Table) -> dict:
        self.create()
        wanted = {row["path"]: row for row in listing.to_pylist()}
        present = {row["path"]: (row["stamp"], row["metadata"]) for row in self._rows(["path", "stamp", "metadata"])}
        fresh = set()
        for batch in encoded.to_batches(max_chunksize=_ROWS):
            rows = [row for row in batch.to_pylist() if wanted.get(row["path"], {}).get("stamp") == row["stamp"]]
            self._upsert(rows, wanted)
            fresh |= {row["path"] for row in rows}
        others = [path for path in wanted if path not in fresh]
        outdated = [path for path in others if present[path] != (wanted[path]["stamp"], _metadata(wanted[path]))]
        for keys in _keys(outdated):  # only stamps and metadata are new
            self._upsert(self.client.get(self.name, ids=keys, output_fields=["*"]), wanted)
        for keys in _keys([path for path in present if path not in wanted]):  # last: searches find enough meanwhile
            self.client.delete(self.name, ids=keys)
        self.client.flush(self.name)
        return {}

    def _upsert(self, rows: list[dict], wanted: dict[str, dict]) -> None:
        """`rows` with the stamps and metadata that are `wanted`."""
        for row in rows:
            new = wanted[row["path"]]
            row |= {"key": _key(row["path"]), "stamp": new["stamp"], "patches": row["patches"] or ""}
            row |= {"metadata": _metadata(new), "feature": [float(number) for number in row["feature"]]}
        if rows:
            self.client.upsert(self.name, data=rows)


def _key(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def _keys(paths: list[str]) -> Iterator[list[str]]:
    return ([_key(path) for path in paths[start : start + _ROWS]] for start in range(0, len(paths), _ROWS))


def _metadata(row: dict) -> dict:
    """The metadata of a row of a listing, without missing values: those fulfil no condition."""
    return {name: value for name, value in row.items() if name not in RESERVED and value is not None}


def _expression(condition: Condition) -> str:
    """A condition in the language of Milvus. JSON escapes what has a meaning there."""
    field = f"metadata[{json.dumps(condition.column, ensure_ascii=False)}]"
    operator = "==" if condition.operator == "=" else condition.operator
    comparison = f"({field} {operator} {json.dumps(condition.value, ensure_ascii=False)})"
    return f"((exists {field}) and {comparison})" if condition.operator == "!=" else comparison


def open_store(folder: Path, record: dict) -> ArrowStore | MilvusStore:
    """The rows of an index: in its table, or where the record has an address, in Milvus."""
    return (ArrowStore if record["uri"] is None else MilvusStore)(folder, record)
