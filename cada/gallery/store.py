"""
The files of an index, and its features in a memory-mapped Arrow table, where search is exact.

`index.json` is the record: source, model, store and what they were when the index was written. `pending/` holds
finished shards, `patches/` patch states. Only files of our own names are ever deleted.

A row is an image: `path`, `stamp` (tells a changed image), `digest` (SHA-256 of its bytes), `patches` (where its patch
states are kept, if they are), the metadata columns, `feature` (normalised, in half precision: it halves memory and the
time of a search, and moves a score by 0.0005 at most).
"""

import math
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

from cada.files import LOCK, CADAError, one_line, read_json, written_whole


RECORD, PENDING, PATCHES = "index.json", "pending", "patches"
FORMAT = 4
_RECORDED = ("dimension", "collection", "model", "revision", "uri", "approximate", "keep_patches", "source")
_RECORDED += ("digest", "columns", "images", "updated")
MEND = "To mend the index, run `index` again."
_RUN = "[0-9a-f]{12}"
OWN_SHARDS = re.compile(rf"(\.unfinished-)?{_RUN}-\d{{6,}}\.arrow")
OWN_STATES = re.compile(rf"(\.unfinished-)?{_RUN}-\d{{6,}}\.safetensors")
OWN_FILES = re.compile(rf"(\.unfinished-)?table-{_RUN}\.arrow|\.unfinished-index\.json")
TYPES = {"int64": int, "float64": float, "bool": lambda text: {"true": True, "false": False}[text.lower()]}
_CONDITION = re.compile(r"(.+?)(==|!=|<=|>=|=<|=>|=|<|>)(.*)", re.DOTALL)
_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_ROWS_AT_ONCE = 65_536
_QUERIES_AT_ONCE, _ROWS_OF_A_PRODUCT = 256, 2048  # whose float32 copy stays in the cache
# Of a product of unit vectors in half precision with sums in float32: 2^-11 for the query, 2^-11 for the result, and
# something for the sums. In float32 the order of the sums alone makes a difference.
_ERROR_OF_HALF, _ERROR_OF_SINGLE = 1.1e-3, 2e-5


def read_record(index: Path) -> dict | None:
    """
    The record of an index; `None` where the folder has none.

    Raises:
        CADAError: where it is damaged, of another version, or no record.
    """
    path = index / RECORD
    if not os.path.lexists(path):
        return None
    again = "Index again, into another folder."
    try:
        record = read_json(path)
        version, missing = record["format"], [name for name in _RECORDED if name not in record]
    except (CADAError, KeyError, TypeError) as error:
        raise CADAError(f"{path} is damaged, or no record of an index ({one_line(error)}). {again}") from error
    if version != FORMAT:
        raise CADAError(f"{index} was written by another version of this package. {again}")
    if missing:
        raise CADAError(f"{path} is damaged: it lacks {', '.join(missing)}. {again}")
    return record


def index_settings(index: Path, record: dict | None, **given) -> dict:
    """
    Arguments of a new index with their defaults; for an old one those that it was made with.

    Raises:
        CADAError: for a wrong argument, or one that is not as it was.
    """
    if given["uri"] is not None and "://" not in given["uri"]:
        raise CADAError(f"--uri is {given['uri']!r}. Give the address of Milvus, such as http://localhost:19530.")
    if record is None:
        if given["model"] is None:
            raise CADAError(f"{index} is a new index. Give the --model that encodes its images.")
        if given["approximate"] is not None and given["uri"] is None:
            raise CADAError("--approximate is for Milvus (--uri). The search in a table is exact. Leave it out.")
        return {**given, "keep_patches": bool(given["keep_patches"])}
    fixed = ("uri", "keep_patches", "approximate")
    for name in fixed:
        if given[name] is not None and given[name] != record[name]:
            raise CADAError(
                f"{index} was made with --{name.replace('_', '-')} {record[name]}, not {given[name]}. Leave the "
                "argument out, or make another index."
            )
    kept = {name: record[name] for name in fixed}
    kept["model"] = given["model"] or record["model"]
    kept["revision"] = given["revision"] or (record["revision"] if kept["model"] == record["model"] else None)
    return kept


def check_output(index: Path, source: dict, new: bool) -> None:
    """
    Whether `index` can be the folder of an index of `source`. A `new` one may hold nothing but what an interrupted
    run has left.

    Raises:
        CADAError: where it holds the images, or other files.
    """
    for place in (source["location"], source["root"]):
        if place is not None and os.path.exists(place) and Path(place).is_relative_to(index.resolve()):
            raise CADAError(f"--out {index} is or holds {place}, where the images are. Choose another folder.")
    if index.exists() and not index.is_dir():
        raise CADAError(f"--out {index} is a file. Choose another folder.")
    if not new or not index.exists():
        return
    for path in sorted(index.iterdir()):
        own = path.name == LOCK or OWN_FILES.fullmatch(path.name)
        for folder, names in ((PENDING, OWN_SHARDS), (PATCHES, OWN_STATES)):
            if path.name == folder and path.is_dir():
                own = all(names.fullmatch(file.name) for file in path.iterdir())
        if not own:
            raise CADAError(f"--out {index} is no index and holds {path.name}. Choose an empty or a new folder.")


def shard_schema(dimension: int) -> pa.Schema:
    """The columns of a finished shard."""
    names = ("path", "stamp", "digest", "patches")
    return pa.schema([*((name, pa.string()) for name in names), ("feature", feature_type(dimension))])


def shard_files(index: Path) -> list[Path]:
    """The files of the finished shards that wait in `pending/`."""
    files = sorted((index / PENDING).iterdir()) if (index / PENDING).is_dir() else []
    return [path for path in files if OWN_SHARDS.fullmatch(path.name) and path.name[0] != "."]


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


def parse_conditions(where: str | Sequence[str], columns: dict[str, str]) -> list[Condition]:
    """
    `"camera=3"` and the like as conditions on `columns` (name: type).

    Raises:
        CADAError: for an unknown column, an unknown form, or a value that is not of the column's type. A text may
            stand in quotes.
    """
    conditions = []
    for text in [where] if isinstance(where, str) else where:
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise CADAError(f"The condition {text!r} has no operator. Write it like camera=3: =, !=, <, <=, >, >=.")
        column, operator, value = (part.strip() for part in found.groups())
        if operator in ("=<", "=>"):
            raise CADAError(f"The condition {text!r} has the operator {operator}. Write {operator[::-1]}.")
        operator = "=" if operator == "==" else operator
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


class ArrowStore:
    """
    The rows as one memory-mapped Arrow table, in the order of the listing, which is that of the paths.

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
                raise CADAError(f"{folder / record['table']} is missing or damaged ({error}). {MEND}") from error

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)

    def ready(self) -> None:
        """A `CADAError` where the table holds other rows than were written."""
        if len(self) != self.record["images"]:
            raise CADAError(
                f"{self.folder / self.record['table']} has {len(self):,} rows, and {self.record['images']:,} were "
                f"written. {MEND}"
            )

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
        return self.dataset.remove_columns(["stamp", "feature"])

    @cached_property
    def _features(self) -> "_Features":
        return _Features(self._table["feature"])

    def search(
        self, queries: torch.Tensor, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[tuple[float, dict]]]:
        """
        The best `k` rows and their scores for each of `queries` `(queries, d)`, best first; of equal scores in the
        order of paths.
        """
        if len(self) == 0:
            return [[] for _ in queries]
        rows = None
        if conditions:
            mask = np.ones(len(self), dtype=bool)
            for condition in conditions:
                holds = _COMPARE[condition.operator](self._table[condition.column], condition.value)
                mask &= pc.fill_null(holds, False).to_numpy()
            rows = np.flatnonzero(mask)
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
        Write the next state of the table: the rows of `listing` (`path`, `stamp`, metadata), with features from the
        present table or from `encoded`. Returns what changes in the record; until that is written nothing has changed.
        """
        dimension, names = self.record["dimension"], ["path", "stamp", "digest", "patches", "feature"]
        parts = [encoded.select(names)] if self.dataset is None else [self._table.select(names), encoded.select(names)]
        merged, old = pa.concat_tables(parts), len(self)
        row_of = {path: row for row, path in enumerate(merged["path"].slice(0, old).to_pylist())}
        fresh = zip(merged["path"].slice(old).to_pylist(), merged["stamp"].slice(old).to_pylist())
        fresh_row_of = {key: old + row for row, key in enumerate(fresh)}
        keys = zip(listing["path"].to_pylist(), listing["stamp"].to_pylist())
        rows = np.array([fresh_row_of.get(key, row_of.get(key[0])) for key in keys], dtype=np.int64)
        features = _Features(merged["feature"])
        digests, patches = (merged[name].combine_chunks() for name in ("digest", "patches"))
        metadata = listing.column_names[2:]
        changes = {"table": f"table-{uuid4().hex[:12]}.arrow"}
        schema = pa.schema(
            [("path", pa.string()), ("stamp", pa.string()), ("digest", pa.string()), ("patches", pa.string())]
            + [listing.schema.field(name) for name in metadata]
            + [("feature", feature_type(dimension))]
        )
        with written_whole(self.folder / changes["table"]) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_stream(sink, schema) as writer:
                for start in range(0, len(rows), _ROWS_AT_ONCE):
                    part, piece = rows[start : start + _ROWS_AT_ONCE], listing.slice(start, _ROWS_AT_ONCE)
                    columns = [piece["path"], piece["stamp"], digests.take(part), patches.take(part)]
                    columns += [piece[name] for name in metadata]
                    columns.append(feature_column(features.take(part)))
                    writer.write_table(pa.table(columns, schema=schema).combine_chunks())
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
            exact = (self.take(found).float() * query).sum(dim=1)
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
