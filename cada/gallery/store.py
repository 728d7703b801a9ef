"""
The files of an index, and its features in a memory-mapped Arrow table, where search is exact.

`index.json` is the record: source, model, store and what they were when the index was written. `pending/` holds
finished shards, `patches/` patch states, `persons.jsonl` which persons were found in which file. Only files of our own
names are ever deleted.

A row is an image: `path` (of a person in it the name of its [`cada.gallery.regions.Region`]), `stamp` (tells a changed
file), `digest` (SHA-256 of the bytes of the image), the metadata columns, `feature` (normalised, in half precision: it
halves memory and the time of a search, and moves a score by 0.0005 at most).
"""

import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from cada.files import LOCK, CADAError, one_line, read_json, written_whole
from cada.gallery.images import content_digest


RECORD, FOUND, PENDING, PATCHES = "index.json", "persons.jsonl", "pending", "patches"
FORMAT = 6
MEND = "To mend the index, run `index` again."
_RUN, _UNFINISHED = "[0-9a-f]{12}", r"(\.unfinished-)?"
# The files that are ours, by their folder.
OWN_FILES = {
    "": re.compile(rf"{_UNFINISHED}table-{_RUN}\.arrow|\.unfinished-index\.json|(\.unfinished-)?persons\.jsonl"),
    PENDING: re.compile(rf"{_UNFINISHED}{_RUN}-\d{{6,}}\.arrow"),
    PATCHES: re.compile(rf"{_UNFINISHED}[0-9a-f]{{64}}\.safetensors"),
}
TYPES = {"int64": int, "float64": float, "bool": lambda text: {"true": True, "false": False}[text.lower()]}
_CONDITION = re.compile(r"(.+?)(==|!=|<=|>=|=<|=>|=|<|>)(.*)", re.DOTALL)
_COMPARE = {"==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal}
_COMPARE |= {">": pc.greater, ">=": pc.greater_equal}
_ROWS_AT_ONCE = 65_536
_QUERIES_AT_ONCE, _ROWS_OF_A_PRODUCT = 256, 2048  # whose float32 copy stays in the cache
# Of a product of unit vectors in half precision with sums in float32: 2^-11 for the query, 2^-11 for the result, and
# something for the sums. In float32 the order of the sums alone makes a difference.
_ERROR_OF_HALF, _ERROR_OF_SINGLE = 1.1e-3, 2e-5


def read_record(index: Path) -> dict | None:
    """The record of an index, `None` where there is none; a `CADAError` where it is damaged or of another version."""
    path, again = index / RECORD, "Index again, into another folder."
    if not os.path.lexists(path):
        return None
    try:
        record = read_json(path)
        version = record["format"]
    except (CADAError, KeyError, TypeError) as error:
        raise CADAError(f"{path} is damaged, or no record of an index ({one_line(error)}). {again}") from error
    if version != FORMAT:
        raise CADAError(f"{index} was written by another version of this package. {again}")
    return record


def index_settings(index: Path, record: dict | None, given: dict) -> dict:
    """Arguments of a new index; for an old one those that it was made with, and a `CADAError` for others."""
    fixed = ("uri", "keep_patches", "approximate")
    if given["uri"] is not None and "://" not in given["uri"]:
        raise CADAError(f"--uri is {given['uri']!r}. Give the address of Milvus, such as http://localhost:19530.")
    if record is None:
        if given["model"] is None:
            raise CADAError(f"{index} is a new index. Give the --model that encodes its images.")
        if given["approximate"] is not None and given["uri"] is None:
            raise CADAError("--approximate is for Milvus (--uri). The search in a table is exact. Leave it out.")
        settings = {name: given[name] for name in (*fixed, "model", "revision")}
        return settings | {"keep_patches": bool(given["keep_patches"])}
    for name in fixed:
        if given[name] is not None and given[name] != record[name]:
            raise CADAError(
                f"{index} was made with --{name.replace('_', '-')} {record[name]}, not {given[name]}. Leave the "
                "argument out, or make another index."
            )
    model = given["model"] or record["model"]
    revision = given["revision"] or (record["revision"] if model == record["model"] else None)
    return {**{name: record[name] for name in fixed}, "model": model, "revision": revision}


def check_output(index: Path, source: dict, new: bool) -> None:
    """
    A `CADAError` where `index` cannot be the folder of an index of `source`: it holds the images, or is `new` and
    holds more than what an interrupted run has left.
    """
    for place in (source["location"], source["root"]):
        if place is not None and os.path.exists(place) and Path(place).is_relative_to(index.resolve()):
            raise CADAError(f"--out {index} is or holds {place}, where the images are. Choose another folder.")
    if index.exists() and not index.is_dir():
        raise CADAError(f"--out {index} is a file. Choose another folder.")
    if new and index.exists():
        own = {*own_files(index), index / LOCK}
        for path in sorted(index.iterdir()):
            files = path.iterdir() if path.name in OWN_FILES and path.is_dir() else [path]
            if not own.issuperset(files):
                raise CADAError(f"--out {index} is no index and holds {path.name}. Choose an empty or a new folder.")


def own_files(index: Path, *folders: str) -> list[Path]:
    """The files of an index, in some of its folders or in all, that are ours; without the record and the lock."""
    there = [name for name in folders or OWN_FILES if (index / name).is_dir()]
    return [path for name in there for path in (index / name).iterdir() if OWN_FILES[name].fullmatch(path.name)]


def shard_files(index: Path) -> list[Path]:
    """The files of the finished shards that wait in `pending/`."""
    return sorted(path for path in own_files(index, PENDING) if path.name[0] != ".")


def states_file(model: str, path: str, digest: str) -> str:
    """Name in `patches/` of the patch states that the `model` (its digest) gives of an image with this `digest`."""
    return f"{content_digest(f'{model} {digest} {path}'.encode())}.safetensors"


def shard_schema(dimension: int) -> pa.Schema:
    """The columns of a finished shard."""
    names = ("path", "stamp", "digest")
    return pa.schema([*((name, pa.string()) for name in names), ("feature", feature_type(dimension))])


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables of Arrow into one file, whole or not at all."""
    with written_whole(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_stream(sink, schema) as writer:
            for table in tables:
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


def parse_conditions(where: str | Sequence[str], columns: dict[str, str]) -> list[Condition]:
    """
    `"camera=3"` and the like as conditions on `columns` (name: type); a value may stand in quotes. A `CADAError` for
    an unknown column, an unknown form, or a value that is not of the column's type.
    """
    conditions = []
    for text in [where] if isinstance(where, str) else where:
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise CADAError(f"The condition {text!r} has no operator. Write it like camera=3: =, !=, <, <=, >, >=.")
        column, operator, value = (part.strip() for part in found.groups())
        if operator in ("=<", "=>"):
            raise CADAError(f"The condition {text!r} has the operator {operator}. Write {operator[::-1]}.")
        operator = "==" if operator == "=" else operator
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if column not in columns:
            known = ", ".join(columns) or "none; index a CSV, a JSONL or a data set to have some"
            raise CADAError(f"The index has no column {column!r} ({text!r}). Columns: {known}.")
        try:
            typed = TYPES.get(columns[column], str)(value)
            if isinstance(typed, float) and not math.isfinite(typed) or type(typed) is int and abs(typed) >= 2**63:
                raise ValueError("beyond all numbers of the column")
            conditions.append(Condition(column, operator, typed))
        except (ValueError, KeyError) as error:
            raise CADAError(
                f"The condition {text!r} compares {column}, which is of type {columns[column]}, with {value!r}. Give "
                "such a value."
            ) from error
    return conditions


Hits = list[list[tuple[float, dict]]]  # for each query the scores and rows of what is found


class ArrowStore:
    """The rows as one memory-mapped Arrow table in the folder of the index, in the order of their paths."""

    def __init__(self, folder: Path, record: dict):
        self.folder, self.record, self.dataset = folder, record, None
        if record.get("table"):
            self.place = str(folder / record["table"])
            try:
                self.dataset = Dataset.from_file(self.place)
            except (OSError, pa.ArrowInvalid) as error:
                raise CADAError(f"{self.place} is missing or damaged ({error}). {MEND}") from error

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)

    @property
    def _table(self) -> pa.Table:
        return self.dataset.data.table

    def find(self, path: str) -> dict | None:
        """The row of an image without its feature, or `None`."""
        row = -1 if self.dataset is None else pc.index(self._table["path"], path).as_py()
        return None if row < 0 else self._rows[row]

    def features(self, paths: Sequence[str]) -> torch.Tensor:
        """Features `(len(paths), d)` of images; a `KeyError` for a path that no row has."""
        rows = pc.index_in(pa.array(paths, pa.string()), self._table["path"].combine_chunks())
        if rows.null_count:
            raise KeyError(paths[rows.is_null().index(True).as_py()])
        return self._features.take(rows.to_numpy()).float()

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of some columns, piece by piece."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield self._table.select(columns).slice(start, _ROWS_AT_ONCE)

    @cached_property
    def _rows(self) -> Dataset:
        return self.dataset.remove_columns(["stamp", "feature"])

    @cached_property
    def _features(self) -> "_Features":
        return _Features(self._table["feature"])

    def search(self, queries: torch.Tensor, k: int, conditions: Sequence[Condition] = ()) -> Hits:
        """The best `k` rows for each of `queries` `(queries, d)`; those of equal scores in the order of paths."""
        if len(self) == 0:
            return [[] for _ in queries]
        hold = [_COMPARE[asked.operator](self._table[asked.column], asked.value) for asked in conditions]
        rows = np.flatnonzero(pc.fill_null(reduce(pc.and_, hold), False)) if hold else None
        results = []
        for part in queries.split(_QUERIES_AT_ONCE):
            for scores, found in self._features.nearest(part, k, rows):
                columns = self._rows[found] if found else {}
                results.append(
                    [(score, dict(zip(columns, row))) for score, row in zip(scores, zip(*columns.values()))]
                )
        return results

    def write(self, listing: pa.Table, encoded: pa.Table) -> dict:
        """
        Write the next state of the table: the rows of `listing` (`path`, `stamp`, metadata), with digests and features
        from `encoded` or, where that lacks a path, from the present table. Returns what changes in the record; until
        that is written nothing has changed.
        """
        names = ["path", "digest", "feature"]
        tables = [encoded] if self.dataset is None else [self._table, encoded]
        merged = pa.concat_tables([table.select(names) for table in tables])
        row_of = {path: row for row, path in enumerate(merged["path"].to_pylist())}  # the last of a path
        rows = np.array([row_of[path] for path in listing["path"].to_pylist()], dtype=np.int64)
        listing = listing.add_column(2, "digest", merged["digest"].combine_chunks().take(rows))
        features = _Features(merged["feature"])
        schema = listing.schema.append(pa.field("feature", feature_type(self.record["dimension"])))
        changes = {"table": f"table-{uuid4().hex[:12]}.arrow"}

        def parts() -> Iterator[pa.Table]:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                column = feature_column(features.take(rows[start : start + _ROWS_AT_ONCE]))
                yield listing.slice(start, _ROWS_AT_ONCE).append_column("feature", column).combine_chunks()

        write_tables(self.folder / changes["table"], schema, parts())
        return changes


class _Features:
    """The column `feature` `(rows, d)`, where it lies in the file."""

    def __init__(self, column: pa.ChunkedArray):
        values = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks if len(chunk)]
        self.size = column.type.list_size
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # read-only tensors, which are only read
            self.blocks = [torch.from_numpy(array).view(-1, self.size) for array in values]
        self.ends = np.cumsum([len(block) for block in self.blocks])

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Features `(len(rows), d)` of rows in any order."""
        taken = torch.empty(len(rows), self.size, dtype=torch.float16)
        block_of = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(block_of):
            here = np.flatnonzero(block_of == number)
            block = self.blocks[number]
            taken[here] = block[rows[here] - (self.ends[number] - len(block))]
        return taken

    def _parts(self, rows: np.ndarray | None) -> Iterator[tuple[np.ndarray | None, int, torch.Tensor]]:
        """Features of ascending `rows` (of all by default), block by block: their rows, or the first one; features."""
        begin = 0
        for block, end in zip(self.blocks, self.ends):
            start = end - len(block)
            if rows is None:
                yield None, start, block
            elif (stop := int(np.searchsorted(rows, end))) > begin:
                yield rows[begin:stop], start, block[rows[begin:stop] - start]
                begin = stop

    def nearest(
        self, queries: torch.Tensor, k: int, rows: np.ndarray | None = None
    ) -> Iterator[tuple[list[float], list[int]]]:
        """
        For each of `queries` `(queries, d)` the `k` best scores and their rows, among ascending `rows` (all by
        default); of equal scores the first rows. Exact: in one pass over the table each query collects what may be
        among its best so far by a fast product, and at the end the scores of these are computed anew, each by itself.
        """
        error = _ERROR_OF_HALF if len(queries) == 1 else _ERROR_OF_SINGLE
        near = [np.empty(0, dtype=np.int64)] * len(queries)
        scores, floors = [torch.empty(0)] * len(queries), [-math.inf] * len(queries)
        for places, start, block in self._parts(rows):
            for number, fast in enumerate(_products(queries, block)):
                if len(fast) > k and floors[number] == -math.inf:  # the first block
                    floors[number] = float(fast.topk(k).values[-1]) - 2 * error
                good = (fast >= floors[number]).nonzero()[:, 0]
                if not len(good):
                    continue
                found = good.numpy()
                near[number] = np.concatenate([near[number], found + start if places is None else places[found]])
                scores[number] = torch.cat([scores[number], fast[good]])
                if len(scores[number]) > k:
                    floors[number] = float(scores[number].topk(k).values[-1]) - 2 * error
                    kept = scores[number] >= floors[number]
                    near[number], scores[number] = near[number][kept.numpy()], scores[number][kept]
        for query, found in zip(queries, near):
            exact = (self.take(found).float() * query).sum(dim=1).clamp(max=1)  # a cosine, but for the rounding
            order = exact.argsort(descending=True, stable=True)[:k]
            yield exact[order].tolist(), found[order.numpy()].tolist()


def _products(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """
    Products `(queries, rows)` of `queries` and a block of features, in float32. One query is multiplied in half
    precision, as that is bound by memory; for several the block is widened piece by piece.
    """
    if len(queries) == 1:
        return torch.mv(block, queries[0].half()).float()[None]
    products, wide = torch.empty(len(queries), len(block)), torch.empty(_ROWS_OF_A_PRODUCT, block.shape[1])
    for start in range(0, len(block), _ROWS_OF_A_PRODUCT):
        piece = slice(start, start + _ROWS_OF_A_PRODUCT)
        narrow = block[piece]
        torch.mm(queries, wide[: len(narrow)].copy_(narrow).T, out=products[:, piece])
    return products


def open_store(folder: Path, record: dict):
    """The rows of an index: in its table, or where the record has an address, in Milvus."""
    if record["uri"] is None:
        return ArrowStore(folder, record)
    try:
        from cada.gallery.milvus import MilvusStore  # whose client is an extra
    except ImportError as error:
        raise CADAError('Milvus needs its client: pip install "pymilvus>=2.6"') from error
    return MilvusStore(record)
