"""
The files of an index, and where it keeps its features: a memory-mapped Arrow table of `datasets`, or Milvus.

`index.json` is the record: source, model, store and what they were when the index was written. `pending/` holds
finished shards, `patches/` patch states. Only files of our own names are ever deleted.

A row is an image: `path`, `stamp` (tells a changed image), `digest` (SHA-256 of its bytes), `patches` (where its patch
states are kept, if they are), the metadata columns, `feature` (normalised, in half precision: it halves memory and the
time of a search, and moves a score by 0.0005 at most).
"""

import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from cada.files import LOCK, CADAError, counted, read_json, written_whole
from cada.gallery.images import RESERVED, ImageFiles, ImageRows, digest_of


RECORD, PENDING, PATCHES = "index.json", "pending", "patches"
FORMAT = 3
_RECORDED = ("dimension", "collection", "model", "revision", "store", "uri", "approximate", "keep_patches", "source")
_RECORDED += ("digest", "columns", "images", "updated")
_MEND = "To mend the index, run `index` again."
_RUN = "[0-9a-f]{12}"
_SHARD = re.compile(rf"(\.unfinished-)?{_RUN}-\d{{6,}}\.arrow")
_STATES = re.compile(rf"(\.unfinished-)?{_RUN}-\d{{6,}}\.safetensors")
_OWN = re.compile(rf"(\.unfinished-)?(table-{_RUN}\.arrow|features-{_RUN}\.faiss)|\.unfinished-index\.json")
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
# Of a product of unit vectors in half precision with sums in float32: 2^-11 for the query, 2^-11 for the result, and
# something for the sums.
_COARSE_ERROR = 1.1e-3
_OVERSAMPLING = 4  # images that an approximate index proposes for each one wanted; their scores are then exact
_TRAINING_ROWS = 100_000
_MILVUS_ROWS = 1_000
_MILVUS_LIMIT = 16_384
_MILVUS_LITE = ("FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW", "HNSW_SQ", "AUTOINDEX")
_MILVUS_THOROUGH = {"params": {"nprobe": 65_536, "ef": 32_768}}  # the most lists and candidates that it takes


def read_record(index: Path) -> dict | None:
    """
    The record of an index; `None` where the folder has none.

    Raises:
        CADAError: where it is damaged, of another version, or no record.
    """
    path = index / RECORD
    if not os.path.lexists(path):
        return None
    try:
        record = read_json(path)
        if record["format"] != FORMAT:
            raise CADAError(
                f"{index} was written by another version of this package. Index again, into another folder."
            )
        missing = [name for name in _RECORDED if name not in record]
        if missing:
            raise KeyError(missing[0])
        return record
    except (CADAError, KeyError, TypeError) as error:
        raise CADAError(
            f"{path} is damaged, or no record of an index ({type(error).__name__}: {error}). Index again, into "
            "another folder."
        ) from error


def index_settings(index: Path, record: dict | None, **given) -> dict:
    """
    Arguments of a new index with their defaults; for an old one those that it was made with.

    Raises:
        CADAError: for a wrong argument, or one that is not as it was.
    """
    if given["uri"] is not None and "://" not in given["uri"]:
        # A file in the index moves with it; any other is found from everywhere.
        file, folder = Path(given["uri"]).resolve(), index.resolve()
        given["uri"] = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
    if record is None:
        if given["model"] is None:
            raise CADAError(f"{index} is a new index. Give the --model that encodes its images.")
        store = given["store"] or "arrow"
        if store not in STORES:
            raise CADAError(f"--store is {store!r}. Choose one of {', '.join(STORES)}.")
        if store == "arrow" and given["uri"] is not None:
            raise CADAError("--uri is for --store milvus.")
        if store == "milvus":
            given["uri"] = given["uri"] or "milvus.db"
        approximate = given["approximate"] or None
        return {**given, "store": store, "keep_patches": bool(given["keep_patches"]), "approximate": approximate}
    fixed = ("store", "uri", "keep_patches", *(["approximate"] if record["store"] == "milvus" else []))
    for name in fixed:
        if given[name] is not None and given[name] != record[name]:
            raise CADAError(
                f"{index} was made with --{name.replace('_', '-')} {record[name]}, not {given[name]}. Leave the "
                "argument out, or make another index."
            )
    kept = {name: record[name] for name in ("store", "uri", "keep_patches")}
    kept["model"] = given["model"] or record["model"]
    kept["revision"] = given["revision"] or (record["revision"] if kept["model"] == record["model"] else None)
    kept["approximate"] = record["approximate"] if given["approximate"] is None else given["approximate"] or None
    return kept


def check_output(index: Path, source: dict, new: bool, uri: str | None) -> None:
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
        own = path.name in (LOCK, uri) or _OWN.fullmatch(path.name)
        for folder, names in ((PENDING, _SHARD), (PATCHES, _STATES)):
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
    return [path for path in files if _SHARD.fullmatch(path.name) and path.name[0] != "."]


def announce_states(index: Path, size: int, count: int) -> None:
    """Say how much disk the patch states of `count` images of `size` bytes take. A `CADAError` for too much."""
    free = shutil.disk_usage(index).free
    needed = f"Patch states of {counted(count, 'image')} will take {size * count / 1e9:.2f} GB"
    print(f"{needed}; {free / 1e9:.2f} GB are free.", flush=True)
    if size * count > free:
        raise CADAError(f"{index}: the disk is too small for --keep-patches. Leave it out, or choose another.")


def read_shards(
    index: Path, kind: str, dimension: int, changed: Callable[[str, str, str], bool] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """
    Names and tables of the finished shards of a kind (the text in their metadata). Damaged ones, those of another kind
    and those with a row (path, stamp, digest) that has `changed` are deleted.
    """
    for path in shard_files(index):
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
            about = table.schema.metadata
            json.loads(about[b"unreadable"])
            good = about[b"kind"].decode() == kind and table.schema.equals(shard_schema(dimension))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            good = False
        good = good and not lost_states(index, table["patches"].to_pylist())
        if good and changed is not None:
            rows = zip(*(table[name].to_pylist() for name in ("path", "stamp", "digest")))
            good = not any(changed(*row) for row in rows)
        if good:
            yield path.stem, table
        else:
            path.unlink()


def lost_states(index: Path, places: Iterable[str | None]) -> set[str]:
    """Those of `places` (file and row in `patches/`) that cannot be read: the file is gone, damaged or too short."""
    rows, lost = {}, set()
    for place in places:
        if place is None:
            continue
        name, row = place.split("/")
        if name not in rows:
            try:
                with safe_open(index / PATCHES / name, "pt") as file:
                    rows[name] = file.get_slice("states").get_shape()[0]
            except (OSError, SafetensorError):
                rows[name] = 0
        if int(row) >= rows[name]:
            lost.add(place)
    return lost


def stamps_of_now(
    store,
    index: Path,
    listing: list[tuple[str, str]],
    source: ImageFiles | ImageRows,
    check_content: bool,
    progress: bool,
) -> dict[str, str]:
    """
    The stamp of each image in the store by its path: that of `listing` (path, stamp) where the content is as it was.
    What has other content, or whose patch states are lost, gets no stamp.

    Args:
        check_content: read also the images whose stamp is as it was.
    """
    known = store.known()
    stamps = {path: stamp for path, stamp in listing if path in known and (check_content or known[path] != stamp)}
    if stamps:
        with tqdm(total=len(stamps), desc="Comparing images", unit="image", disable=not progress, leave=False) as bar:
            for table in store.tables(["path", "digest"]):
                for path, indexed in zip(table["path"].to_pylist(), table["digest"].to_pylist()):
                    if path in stamps:
                        bar.update()
                        known[path] = stamps[path] if digest_of(source, path) == indexed else ""
    if store.record["keep_patches"]:
        for table in store.tables(["path", "patches"]):
            places = table["patches"].to_pylist()
            lost = lost_states(index, places)
            known |= {path: "" for path, place in zip(table["path"].to_pylist(), places) if place in lost}
    return known


def clean(index: Path, record: dict) -> None:
    """Delete files of an index that its present state does not refer to."""
    named = {record.get("table"), record.get("faiss")}
    unused = [path for path in index.iterdir() if _OWN.fullmatch(path.name) and path.name not in named]
    unused += [path for path in (index / PENDING).iterdir() if _SHARD.fullmatch(path.name)]
    if record["keep_patches"] and (index / PATCHES).is_dir():
        store = STORES[record["store"]](index, record)
        used = {place.split("/")[0] for table in store.tables(["patches"]) for place in table["patches"].to_pylist()}
        files = (index / PATCHES).iterdir()
        unused += [path for path in files if _STATES.fullmatch(path.name) and path.name not in used]
    for path in unused:
        path.unlink()


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
                raise CADAError(f"{folder / record['table']} is missing or damaged ({error}). {_MEND}") from error

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)

    def ready(self) -> None:
        """
        Open all that a search reads, so that an update does not take it away.

        Raises:
            CADAError: where something is missing or damaged.
        """
        if len(self) != self.record["images"]:
            raise CADAError(
                f"{self.folder / self.record['table']} has {len(self):,} rows, and {self.record['images']:,} were "
                f"written. {_MEND}"
            )
        _ = self._approximate

    def prepare(self) -> None:
        """Try before the work what [`write`] does after it. A `CADAError` where `approximate` cannot be used."""
        if self.record.get("approximate"):
            _new_faiss(self.record["approximate"], self.record["dimension"])

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

    @cached_property
    def _approximate(self):
        """The FAISS index, where there is one."""
        if not self.record.get("faiss"):
            return None
        faiss, path = _import_faiss(), self.folder / self.record["faiss"]
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise CADAError(f"{path} is missing or damaged. {_MEND}") from error
        if index.ntotal != len(self):
            raise CADAError(f"{path} does not belong to the table. {_MEND}")
        return index

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
        proposed = self._approximate.search(queries.numpy(), min(_OVERSAMPLING * k, len(self)))[1]
        for query, rows in zip(queries, proposed):
            rows = np.sort(rows[rows >= 0])
            # The lists that were visited may hold fewer images than are asked for.
            yield from self._features.nearest(query[None], k, rows if len(rows) >= min(k, len(self)) else None)

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
        raise CADAError(
            "An approximate index needs FAISS: pip install faiss-cpu. Without --approximate search is exact and needs "
            "no FAISS."
        ) from error
    return faiss


def _new_faiss(factory: str, dimension: int):
    """An empty FAISS index. A `CADAError` where FAISS is missing or does not know it."""
    faiss = _import_faiss()
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise CADAError(
            f"FAISS has no index {factory!r} for {dimension} numbers: {error}. Choose another --approximate, such as "
            "SQ8; without it search is exact."
        ) from error


def _build_faiss(table: Path, factory: str, path: Path) -> None:
    """A FAISS index over the features of a table. Lists of an inverted file: a sixteenth of them is visited."""
    faiss = _import_faiss()
    features = _Features(Dataset.from_file(str(table)).data.table["feature"])
    chosen = np.random.default_rng(0).permutation(len(features))[:_TRAINING_ROWS]
    index = _new_faiss(factory, features.size)
    inverted = faiss.try_extract_index_ivf(index)
    for part in (inverted, getattr(inverted, "pq", None), getattr(index, "pq", None)):
        if part is not None:  # few images make few lists; FAISS prints a warning of its own
            part.cp.min_points_per_centroid = 1
    try:
        if not index.is_trained:
            index.train(features.take(np.sort(chosen)).float().numpy())
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(features)))
            index.add(features.take(rows).float().numpy())
    except RuntimeError as error:
        raise CADAError(
            f"FAISS cannot build {factory!r} over {len(features)} images: {error}. Choose another --approximate; "
            "without it search is exact."
        ) from error
    if inverted is not None:
        inverted.nprobe = max(1, inverted.nlist // 16)
    faiss.write_index(index, str(path))


class _Client:
    """`MilvusClient` whose errors are a `CADAError`."""

    def __init__(self, uri: str):
        try:
            from pymilvus import MilvusClient, MilvusException
        except ImportError as error:
            raise CADAError('Milvus needs its client: pip install "pymilvus[milvus_lite]".') from error
        self._uri, self._error = uri, MilvusException
        try:
            self._client = MilvusClient(uri=uri, token=os.environ.get("MILVUS_TOKEN", ""))
        except (MilvusException, OSError, ValueError) as error:
            raise CADAError(
                f"Cannot open Milvus at {uri}: {error}. A file is open to one process at a time: end the other one, "
                "such as the page. Or give --uri another file, or the address of a cluster."
            ) from error

    def __getattr__(self, name: str):
        return self.telling(getattr(self._client, name))

    def telling(self, function):
        """`function` with its errors explained."""

        def call(*args, **options):
            try:
                return function(*args, **options)
            except self._error as error:
                raise CADAError(
                    f"Milvus at {self._uri}: {error}. Nothing was lost; mend it, and run the command again."
                ) from error

        return call


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
        self.folder, self.record, self.name = folder, record, record["collection"]
        self.in_file = "://" not in record["uri"]
        if self.in_file:  # Milvus Lite has no timestamps, and the client says so at every reading
            logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(logging.ERROR)
        self.client = _Client(str(folder / record["uri"]) if self.in_file else record["uri"])
        self.exists = self.client.has_collection(self.name)
        if self.exists:
            self.client.load_collection(self.name)

    def ready(self) -> None:
        """A `CADAError` where the collection holds fewer images than the index was written with."""
        if len(self) < self.record["images"]:
            raise CADAError(
                f"The collection {self.name} of Milvus at {self.record['uri']} holds {len(self):,} images, and "
                f"{self.record['images']:,} were written. Is it the right Milvus? {_MEND}"
            )

    def drop(self) -> None:
        """Delete the collection, where there is one."""
        if self.exists:
            self.client.drop_collection(self.name)
        self.exists = False

    def prepare(self) -> None:
        """Make the collection that [`write`] fills. A `CADAError` where `approximate` cannot be used."""
        kind = self.record.get("approximate") or "FLAT"
        if self.in_file and kind not in _MILVUS_LITE:
            raise CADAError(f"Milvus in a file has no index {kind!r}, but {', '.join(_MILVUS_LITE)}.")
        if self.in_file and kind not in ("FLAT", "AUTOINDEX"):
            _import_faiss()
        if not self.exists:
            self._create()

    def __len__(self) -> int:
        if not self.exists:
            return 0
        return self._count("")

    def _count(self, condition: str) -> int:
        return self.client.query(self.name, filter=condition, output_fields=["count(*)"])[0]["count(*)"]

    def known(self) -> dict[str, str]:
        """Stamp of every indexed image by its path."""
        return {row["path"]: row["stamp"] for row in self._iterate(["path", "stamp"])}

    def _iterate(self, fields: list[str], batch: int = _MILVUS_ROWS) -> Iterator[dict]:
        if not self.exists:
            return
        iterator = self.client.query_iterator(self.name, batch_size=batch, filter="", output_fields=fields)
        following = self.client.telling(iterator.next)
        try:
            while rows := following():
                yield from rows
        finally:
            iterator.close()

    def find(self, path: str) -> dict | None:
        """The row of an image without its feature, or `None`."""
        if not self.exists:
            return None
        rows = self.client.get(self.name, ids=[path], output_fields=["path", "digest", "patches", "metadata"])
        return self._row(rows[0]) if rows else None

    def _row(self, entity: dict) -> dict:
        metadata = {name: entity["metadata"].get(name) for name in self.record["columns"]}
        return {"path": entity["path"], "digest": entity["digest"], "patches": entity["patches"] or None, **metadata}

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
            raise CADAError(f"Milvus gives at most {_MILVUS_LIMIT} images; asked for {k}. Lower --top.")
        if not self.exists:
            return [[] for _ in queries]
        condition = " and ".join(_expression(condition) for condition in conditions)
        options = {"data": queries.tolist(), "limit": k, "filter": condition}
        options["output_fields"] = ["path", "digest", "patches", "metadata"]
        hits = self.client.search(self.name, **options)
        fewest = min(map(len, hits))
        if self.record.get("approximate") and fewest < k and fewest < self._count(condition):
            # The lists that were visited may hold fewer images than are asked for.
            hits = self.client.search(self.name, search_params=_MILVUS_THOROUGH, **options)
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
        for start in range(0, len(outdated), _MILVUS_ROWS):  # only stamps and metadata are new
            rows = self.client.get(self.name, ids=outdated[start : start + _MILVUS_ROWS], output_fields=["*"])
            changed = [(row, wanted[row["path"]]) for row in rows]
            self._upsert([{**row, "stamp": new["stamp"], "metadata": _metadata(new)} for row, new in changed])
        self._delete([path for path in present if path not in wanted])  # last: who searches now finds enough images
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
        self.client.create_collection(self.name, schema=schema, index_params=parameters, consistency_level="Strong")
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
    field = f"metadata[{json.dumps(condition.column, ensure_ascii=False)}]"
    operator = "==" if condition.operator == "=" else condition.operator
    comparison = f"{field} {operator} {json.dumps(condition.value, ensure_ascii=False)}"
    return f"(exists {field} and {comparison})" if condition.operator == "!=" else f"({comparison})"


STORES = {"arrow": ArrowStore, "milvus": MilvusStore}
