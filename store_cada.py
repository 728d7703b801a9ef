"""
Where an index keeps its features: a memory-mapped Arrow table of `datasets`, or Milvus.

A row is an image: `path`, `stamp` (tells a changed image), `digest` (SHA-256 of its bytes), `patches` (where its patch
states are kept, if they are), the metadata columns, `feature` (normalised, in half precision: it halves memory and the
time of a search, and moves a score by 0.0005 at most).
"""

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from files_cada import written_whole
from source_cada import RESERVED, GalleryError


TYPES = {"int64": int, "float64": float, "bool": lambda text: {"true": True, "false": False}[text.lower()]}
_CONDITION = re.compile(r"(.+?)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_ROWS_AT_ONCE = 65_536
# Of a product of unit vectors in half precision with sums in float32: 2^-11 for the query, 2^-11 for the result, and
# something for the sums.
_COARSE_ERROR = 1.1e-3
_OVERSAMPLING = 4  # images that an approximate index proposes for each one wanted; their scores are then exact
_TRAINING_ROWS = 100_000
_MILVUS_ROWS = 1_000
_MILVUS_LIMIT = 16_384


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table of Arrow, whole or not at all."""
    with written_whole(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def feature_type(dimension: int) -> pa.DataType:
    """The type of the column `feature`."""
    return pa.list_(pa.float16(), dimension)


def feature_column(features: np.ndarray | torch.Tensor) -> pa.Array:
    """Features `(rows, d)` as a column."""
    values = np.asarray(features, dtype=np.float16)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=feature_type(values.shape[1]))


@dataclass(frozen=True)
class Condition:
    """What a metadata column has to fulfil. A row without a value never does."""

    column: str
    operator: str
    value: int | float | bool | str


def parse_conditions(where: Sequence[str], columns: dict[str, str]) -> list[Condition]:
    """
    `"camera=3"` and the like as conditions on `columns` (name: type).

    Raises:
        GalleryError: for an unknown column, an unknown form, or a value that is not of the column's type.
    """
    conditions = []
    for text in where:
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise GalleryError(f"The condition {text!r} has no operator. Write it like camera=3: =, !=, <, <=, >, >=.")
        column, operator, value = (part.strip() for part in found.groups())
        if column not in columns:
            known = ", ".join(columns) or "none; index a CSV, a JSONL or a data set to have some"
            raise GalleryError(f"The index has no column {column!r} ({text!r}). Columns: {known}.")
        try:
            conditions.append(Condition(column, operator, TYPES.get(columns[column], str)(value)))
        except (ValueError, KeyError) as error:
            raise GalleryError(
                f"The condition {text!r} compares {column}, which is of type {columns[column]}, with {value!r}. Give "
                "such a value."
            ) from error
    return conditions


class ArrowStore:
    """
    The rows as one memory-mapped Arrow table, in the order of the listing. Search is exact unless the index was made
    with `approximate`, a factory string of FAISS; with conditions it is always exact.

    Args:
        folder: of the index.
        record: its `index.json`.
    """

    def __init__(self, folder: Path, record: dict):
        self.folder, self.record, self.dataset = folder, record, None
        if record.get("table"):
            try:
                self.dataset = Dataset.from_file(str(folder / record["table"]))
            except (OSError, pa.ArrowInvalid) as error:
                raise GalleryError(
                    f"{folder / record['table']} is missing or damaged ({error}). Delete {folder} and index again."
                ) from error

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)

    @property
    def _table(self) -> pa.Table:
        return self.dataset.data.table

    def known(self) -> dict[str, str]:
        """Stamp of every indexed image by its path."""
        if self.dataset is None:
            return {}
        return dict(zip(self._table["path"].to_pylist(), self._table["stamp"].to_pylist()))

    def find(self, path: str) -> dict | None:
        """The row of an image without its feature, or `None`."""
        row = -1 if self.dataset is None else pc.index(self._table["path"], path).as_py()
        return None if row < 0 else self._rows[row]

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of some columns, piece by piece."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield self._table.select(columns).slice(start, _ROWS_AT_ONCE)

    @cached_property
    def _rows(self) -> Dataset:
        return self.dataset.remove_columns(["stamp", "digest", "feature"])

    @cached_property
    def _features(self) -> "_Features":
        return _Features(self._table["feature"])

    @cached_property
    def _approximate(self) -> Dataset | None:
        """The table with its FAISS index."""
        if not self.record.get("faiss"):
            return None
        _import_faiss()
        self.dataset.load_faiss_index("feature", self.folder / self.record["faiss"])
        return self.dataset

    def search(
        self, queries: torch.Tensor, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[tuple[float, dict]]]:
        """The best `k` rows and their scores for each of `queries` `(queries, d)`, best first."""
        if len(self) == 0:
            return [[] for _ in queries]
        if conditions:
            mask = np.ones(len(self), dtype=bool)
            for condition in conditions:
                holds = _COMPARE[condition.operator](self._table[condition.column], condition.value)
                mask &= pc.fill_null(holds, False).to_numpy()
            found = self._features.nearest(queries, k, np.flatnonzero(mask))
        elif self._approximate is not None:
            found = self._approximately_nearest(queries, k)
        else:
            found = self._features.nearest(queries, k)
        results = []
        for scores, rows in found:
            columns = self._rows[rows] if rows else {}
            dicts = [dict(zip(columns, values)) for values in zip(*columns.values())]
            # Equal scores in the order of paths, so that a result does not depend on how the index came about.
            results.append(sorted(zip(scores, dicts), key=lambda pair: (-pair[0], pair[1]["path"])))
        return results

    def _approximately_nearest(self, queries: torch.Tensor, k: int) -> Iterator[tuple[list[float], list[int]]]:
        proposed = self._approximate.search_batch("feature", queries.numpy(), k=min(_OVERSAMPLING * k, len(self)))
        for query, rows in zip(queries, proposed.total_indices):
            rows = np.sort(rows[rows >= 0])
            yield from self._features.nearest(query[None], k, rows)

    def write(self, listing: pa.Table, encoded: pa.Table) -> dict:
        """
        Write the next state of the table: the rows of `listing` (`path`, `stamp`, metadata), with features from the
        present table or from `encoded`. Returns what changes in the record; until that is written nothing has changed.
        """
        dimension, names = self.record["dimension"], ["path", "stamp", "digest", "patches", "feature"]
        parts = [encoded.select(names)] if self.dataset is None else [self._table.select(names), encoded.select(names)]
        merged = pa.concat_tables(parts)
        row_of = {key: row for row, key in enumerate(zip(merged["path"].to_pylist(), merged["stamp"].to_pylist()))}
        rows = np.array(
            [row_of[key] for key in zip(listing["path"].to_pylist(), listing["stamp"].to_pylist())], dtype=np.int64
        )
        features = _Features(merged["feature"])
        digests, patches = (merged[name].combine_chunks() for name in ("digest", "patches"))
        metadata = listing.column_names[2:]
        changes = {"table": f"table-{uuid4().hex[:12]}.arrow", "faiss": None}
        schema = pa.schema(
            [("path", pa.string()), ("stamp", pa.string()), ("digest", pa.string()), ("patches", pa.string())]
            + [listing.schema.field(name) for name in metadata]
            + [("feature", feature_type(dimension))]
        )
        path = self.folder / changes["table"]
        with written_whole(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_stream(sink, schema) as writer:
                for start in range(0, len(rows), _ROWS_AT_ONCE):
                    part, piece = rows[start : start + _ROWS_AT_ONCE], listing.slice(start, _ROWS_AT_ONCE)
                    columns = [piece["path"], piece["stamp"], digests.take(part), patches.take(part)]
                    columns += [piece[name] for name in metadata]
                    columns.append(feature_column(features.take(part)))
                    writer.write_table(pa.table(columns, schema=schema).combine_chunks())
        if self.record.get("approximate") and len(rows):
            changes["faiss"] = changes["table"].replace("table", "features").replace(".arrow", ".faiss")
            with written_whole(self.folder / changes["faiss"]) as temporary:
                _build_faiss(path, self.record["approximate"], temporary)
        return changes


def feature_values(column: pa.Array) -> np.ndarray:
    """Features `(rows, d)` of a column, where they lie."""
    return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)


class _Features:
    """The column `feature` `(rows, d)`, where it lies in the file."""

    def __init__(self, column: pa.ChunkedArray):
        arrays = [feature_values(chunk) for chunk in column.chunks if len(chunk)]
        with warnings.catch_warnings(
            action="ignore", category=UserWarning
        ):  # these tensors are read only, and only read
            self.blocks = [torch.from_numpy(array) for array in arrays]
        self.size, self.ends = column.type.list_size, np.cumsum([len(block) for block in self.blocks])

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.blocks else 0

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Features `(len(rows), d)` of rows in any order."""
        taken = torch.empty(len(rows), self.size, dtype=torch.float16)
        block_of = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(block_of):
            here = np.flatnonzero(block_of == number)
            block = self.blocks[number]
            taken[here] = block[rows[here] - (self.ends[number] - len(block))]
        return taken

    def _parts(self, rows: np.ndarray | None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Features of ascending `rows` (of all by default), block by block, and where they belong in the result."""
        begin = 0
        for block, end in zip(self.blocks, self.ends):
            if rows is None:
                yield slice(end - len(block), end), block
                continue
            stop = int(np.searchsorted(rows, end))
            if stop > begin:
                yield slice(begin, stop), block[rows[begin:stop] - (end - len(block))]
            begin = stop

    def nearest(
        self, queries: torch.Tensor, k: int, rows: np.ndarray | None = None
    ) -> Iterator[tuple[list[float], list[int]]]:
        """
        For each query the `k` best scores and their rows, among ascending `rows` (all by default). Exact: products in
        half precision leave out what cannot be among the best, the others are computed again in float32.
        """
        count = len(self) if rows is None else len(rows)
        k = min(k, count)
        for query in queries:
            coarse = torch.empty(count, dtype=torch.float16)
            for place, block in self._parts(rows):
                torch.mv(block, query.half(), out=coarse[place])
            coarse = coarse.float()
            near = (coarse >= coarse.topk(k).values.min() - 2 * _COARSE_ERROR).nonzero()[:, 0].numpy() if k else []
            chosen = near if rows is None else rows[near]
            best = (self.take(chosen).float() @ query).topk(k)
            yield best.values.tolist(), chosen[best.indices.numpy()].tolist()


def _import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise GalleryError(
            "An approximate index needs FAISS: pip install faiss-cpu. Without --approximate search is exact and needs "
            "no FAISS."
        ) from error
    return faiss


def _build_faiss(table: Path, factory: str, path: Path) -> None:
    """A FAISS index over the features of a table. Lists of an inverted file: a sixteenth of them is visited."""
    faiss = _import_faiss()
    dataset = Dataset.from_file(str(table))
    features = _Features(dataset.data.table["feature"])
    chosen = np.random.default_rng(0).permutation(len(features))[:_TRAINING_ROWS]
    try:
        index = faiss.index_factory(features.size, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(features.take(np.sort(chosen)).float().numpy())
        dataset.add_faiss_index("feature", custom_index=index, batch_size=_ROWS_AT_ONCE)
    except RuntimeError as error:
        raise GalleryError(
            f"FAISS cannot build {factory!r} over {len(features)} images: {error}. Choose another --approximate; "
            "without it search is exact."
        ) from error
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = max(1, inverted.nlist // 16)
    dataset.save_faiss_index("feature", path)


class MilvusStore:
    """
    The rows as entities of a Milvus collection, through `MilvusClient`: a local file (Milvus Lite) or a cluster, whose
    token stands in the environment variable `MILVUS_TOKEN`. Search is exact (`FLAT`) unless `approximate` names
    another index type of Milvus. Rows are replaced one after the other, not all at once.

    Args:
        folder: of the index.
        record: its `index.json`.
    """

    def __init__(self, folder: Path, record: dict):
        try:
            from pymilvus import MilvusClient, MilvusException
        except ImportError as error:
            raise GalleryError('Milvus needs its client: pip install "pymilvus[milvus_lite]".') from error
        self.record, self.name, self.error = record, record["collection"], MilvusException
        if "://" not in record["uri"]:  # Milvus Lite has no timestamps, and the client says so at every reading
            logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(logging.ERROR)
        try:
            self.client = MilvusClient(uri=record["uri"], token=os.environ.get("MILVUS_TOKEN", ""))
            self.exists = self.client.has_collection(self.name)
            if self.exists:
                self.client.load_collection(self.name)
        except (MilvusException, OSError, ValueError) as error:
            raise GalleryError(
                f"Cannot open Milvus at {record['uri']}: {error}. Give --uri a file, which one process at a "
                "time can open, or the address of a cluster."
            ) from error

    def __len__(self) -> int:
        if not self.exists:
            return 0
        return self.client.query(self.name, filter="", output_fields=["count(*)"])[0]["count(*)"]

    def known(self) -> dict[str, str]:
        """Stamp of every indexed image by its path."""
        return {row["path"]: row["stamp"] for row in self._iterate(["path", "stamp"])}

    def _iterate(self, fields: list[str], batch: int = _MILVUS_ROWS) -> Iterator[dict]:
        if not self.exists:
            return
        iterator = self.client.query_iterator(self.name, batch_size=batch, filter="", output_fields=fields)
        try:
            while rows := iterator.next():
                yield from rows
        finally:
            iterator.close()

    def find(self, path: str) -> dict | None:
        """The row of an image without its feature, or `None`."""
        if not self.exists:
            return None
        rows = self.client.get(self.name, ids=[path], output_fields=["path", "patches", "metadata"])
        return self._row(rows[0]) if rows else None

    def _row(self, entity: dict) -> dict:
        metadata = {name: entity["metadata"].get(name) for name in self.record["columns"]}
        return {"path": entity["path"], "patches": entity["patches"] or None, **metadata}

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of some columns, piece by piece."""
        fields = [name for name in columns if name in RESERVED]
        rows = []
        for entity in self._iterate([*fields, "metadata"]):
            rows.append(entity)
            if len(rows) == _MILVUS_ROWS:
                yield self._as_table(rows, columns)
                rows = []
        if rows:
            yield self._as_table(rows, columns)

    def _as_table(self, entities: list[dict], columns: list[str]) -> pa.Table:
        table = {}
        for name in columns:
            if name == "feature":
                table[name] = feature_column(np.array([entity[name] for entity in entities]))
            elif name in RESERVED:
                table[name] = pa.array([entity[name] for entity in entities], pa.string())
            else:
                values = [entity["metadata"].get(name) for entity in entities]
                table[name] = pa.array(values, self.record["columns"][name])
        return pa.table(table)

    def search(
        self, queries: torch.Tensor, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[tuple[float, dict]]]:
        """The best `k` rows and their scores for each of `queries` `(queries, d)`, best first."""
        if k > _MILVUS_LIMIT:
            raise GalleryError(f"Milvus gives at most {_MILVUS_LIMIT} images; asked for {k}. Lower --top.")
        if not self.exists:
            return [[] for _ in queries]
        hits = self.client.search(
            self.name,
            data=queries.tolist(),
            limit=k,
            filter=" and ".join(_expression(condition) for condition in conditions),
            output_fields=["path", "patches", "metadata"],
        )
        return [
            sorted(
                ((hit["distance"], self._row(hit["entity"])) for hit in row),
                key=lambda pair: (-pair[0], pair[1]["path"]),
            )
            for row in hits
        ]

    def write(self, listing: pa.Table, encoded: pa.Table) -> dict:
        """
        Bring the collection to the rows of `listing` (`path`, `stamp`, metadata), with features from the collection
        or from `encoded`. Returns what changes in the record.
        """
        if not self.exists:
            self._create()
        wanted = {row["path"]: row for row in listing.to_pylist()}
        present = {
            row["path"]: (row["stamp"], row["metadata"]) for row in self._iterate(["path", "stamp", "metadata"])
        }
        self._delete([path for path in present if path not in wanted])
        fresh = set()
        for batch in encoded.to_batches(max_chunksize=_MILVUS_ROWS):
            features = feature_values(batch["feature"])
            rows = []
            for row, feature in zip(batch.drop_columns(["feature"]).to_pylist(), features.tolist()):
                if row["path"] in wanted and wanted[row["path"]]["stamp"] == row["stamp"]:
                    metadata = _metadata(wanted[row["path"]])
                    rows.append({**row, "patches": row["patches"] or "", "metadata": metadata, "feature": feature})
                    fresh.add(row["path"])
            self._upsert(rows)
        outdated = [
            path
            for path, row in wanted.items()
            if path not in fresh and present[path] != (row["stamp"], _metadata(row))
        ]
        for start in range(0, len(outdated), _MILVUS_ROWS):  # only the metadata are new
            rows = self.client.get(self.name, ids=outdated[start : start + _MILVUS_ROWS], output_fields=["*"])
            self._upsert([{**row, "metadata": _metadata(wanted[row["path"]])} for row in rows])
        self.client.flush(self.name)  # Milvus Lite searches rows that are not flushed many times slower
        return {}

    def _create(self) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("path", DataType.VARCHAR, is_primary=True, max_length=4096)
        for name in ("stamp", "digest", "patches"):
            schema.add_field(name, DataType.VARCHAR, max_length=256)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("feature", DataType.FLOAT_VECTOR, dim=self.record["dimension"])
        parameters = self.client.prepare_index_params()
        parameters.add_index("feature", index_type=self.record.get("approximate") or "FLAT", metric_type="IP")
        try:
            self.client.create_collection(
                self.name, schema=schema, index_params=parameters, consistency_level="Strong"
            )
        except self.error as error:
            raise GalleryError(f"Milvus at {self.record['uri']} cannot create the collection: {error}.") from error
        self.exists = True

    def _delete(self, paths: list[str]) -> None:
        for start in range(0, len(paths), _MILVUS_ROWS):
            self.client.delete(self.name, ids=paths[start : start + _MILVUS_ROWS])

    def _upsert(self, rows: list[dict]) -> None:
        if rows:
            self.client.upsert(self.name, data=rows)


def _metadata(row: dict) -> dict:
    """The metadata of a row of a listing, without missing values: those fulfil no condition."""
    return {name: value for name, value in row.items() if name not in RESERVED and value is not None}


def _expression(condition: Condition) -> str:
    """A condition in the language of Milvus."""
    field = f"metadata[{json.dumps(condition.column)}]"
    operator = "==" if condition.operator == "=" else condition.operator
    comparison = f"{field} {operator} {json.dumps(condition.value)}"
    return f"(exists {field} and {comparison})" if condition.operator == "!=" else f"({comparison})"


STORES = {"arrow": ArrowStore, "milvus": MilvusStore}
