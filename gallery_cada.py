"""
Index person images, and find among them who fits a sentence, or who is on another image.

    python gallery_cada.py index FOLDER --model demo/model --out INDEX
    python gallery_cada.py search INDEX "a man in a red coat" --picture out.png

The images may lie in a folder (with subfolders), be named by a CSV or JSONL file together with metadata, or be the
column `image` of a data set. The same as a library: [`build_index`], [`open_index`], [`GalleryIndex`].

An index is a folder. `index.json` names its present table, so replacing this one file is the step from the old state
to the new one. Images are encoded in shards; finished ones wait in `pending/`, and the next run takes them up.
"""

import datetime
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated
from uuid import NAMESPACE_URL, uuid4, uuid5

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.environment import parse_flag_from_env
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from checkpoint_cada import check_processor, load_model, load_processor
from data_cada import DataError, open_image
from evaluation_cada import Gallery, encode_queries, match_candidates
from files_cada import FileError, read_json, run_command, written_whole
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor, clean_caption
from publish_cada import model_digest
from source_cada import GalleryError, ImageFiles, ImageRows, content_digest, open_source
from store_cada import STORES, feature_column, feature_type, parse_conditions, write_table


RECORD, PENDING, PATCHES, LOCK = "index.json", "pending", "patches", ".lock"
FORMAT = 1
_IMAGES_AT_ONCE = 16  # whose patch states are in memory for re-ranking
_WAIT = datetime.timedelta(days=7)  # for the slowest process; a dead one ends the others anyway


@dataclass(frozen=True)
class Result:
    """
    A ranked image.

    Attributes:
        path: of the image, relative to the indexed folder; of a data set its `file_name` or row number.
        score: what it is ranked by: S_G + S_L where `stage` is `"local"`, S_G where it is `"global"`.
        stage: `"local"` for candidates that the decoder has read with the sentence; they rank before all others.
        metadata: the other columns of the list or data set, by name.
    """

    path: str
    score: float
    stage: str
    metadata: dict


@dataclass
class Changes:
    """What [`build_index`] did: numbers of images, and `(path, problem)` of every image that cannot be read."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


class _Samples(torch.utils.data.Dataset):
    """Images as pixel values with their digest, or the problem; decoded by data loader workers."""

    def __init__(self, source: ImageFiles | ImageRows, processor: CADAProcessor, paths: list[str]):
        self.source, self.processor, self.paths = source, processor, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[str, torch.Tensor | None, str | None]:
        try:
            content = self.source.read(self.paths[number])
            image = open_image({"bytes": content, "path": None}, self.processor.image_size)
            pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # decoders raise many kinds on damaged files; it is named, counted, and not indexed
            return "", None, f"cannot be decoded: {error or type(error).__name__}"
        return content_digest(content), pixel_values, None


def _load(
    name: str, device: str | torch.device | None = None
) -> tuple[CADAForTextToImageRetrieval, CADAProcessor, str]:
    """
    Model (in evaluation mode, on `device`) and processor of a checkpoint, and the digest of its weights.

    Raises:
        CheckpointError: where one cannot be loaded whole, or they do not belong together.
    """
    model, processor = load_model(name), load_processor(name)
    check_processor(processor, model.config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), processor, model_digest(model)


def _read_record(index: Path) -> dict | None:
    path = index / RECORD
    if not os.path.lexists(path):
        return None
    try:
        record = read_json(path)
        if record["format"] != FORMAT:
            raise GalleryError(f"{index} was written by another version of this package. Make a new index.")
        return record
    except (FileError, KeyError, TypeError) as error:
        raise GalleryError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete {index}, index again."
        ) from error


def _settings(index: Path, record: dict | None, **given) -> dict:
    """Arguments of a new index with their defaults; for an old one those that it was made with."""
    if record is None:
        if given["model"] is None:
            raise GalleryError(f"{index} is a new index. Give the --model that encodes its images.")
        store = given["store"] or "arrow"
        if store not in STORES:
            raise GalleryError(f"--store is {store!r}. Choose one of {', '.join(STORES)}.")
        if store == "arrow" and given["uri"] is not None:
            raise GalleryError("--uri is for --store milvus.")
        if store == "milvus":
            given["uri"] = given["uri"] or str(index.resolve() / "milvus.db")
        return {**given, "store": store, "keep_patches": bool(given["keep_patches"])}
    fixed = ("store", "uri", "keep_patches", *(["approximate"] if record["store"] == "milvus" else []))
    for name in fixed:
        if given[name] is not None and given[name] != record[name]:
            raise GalleryError(
                f"{index} was made with --{name.replace('_', '-')} {record[name]}, not {given[name]}. Leave the "
                "argument out, or make another index."
            )
    kept = {name: record[name] for name in ("store", "uri", "keep_patches")}
    kept["model"] = record["model"] if given["model"] is None else given["model"]
    kept["approximate"] = record["approximate"] if given["approximate"] is None else given["approximate"] or None
    return kept


def build_index(
    source: str | os.PathLike,
    index: str | os.PathLike,
    model: str | None = None,
    *,
    split: str | None = None,
    root: str | os.PathLike | None = None,
    store: str | None = None,
    uri: str | None = None,
    approximate: str | None = None,
    keep_patches: bool | None = None,
    batch_size: int = 64,
    workers: int = 0,
    shard_size: int = 1024,
    progress: bool = True,
) -> Changes:
    """
    Encode the images of `source` into the folder `index`, or bring an index up to date: new and changed images are
    encoded, removed ones dropped, all others left alone. An image that cannot be read is named and left out.

    An interruption at any moment leaves the old state, and the shards that were finished are not encoded again. Under
    `accelerate launch` all processes share the shards; the result is that of one process.

    Args:
        source: a folder; a CSV or JSONL file with a column `path` (or `file_name`, `image`) and metadata; or a data
            set with a column `image`, saved by `save_to_disk` or on the Hub.
        index: folder of the index.
        model: the checkpoint; an old index knows its own.
        split: of the data set.
        root: folder that the paths of a list are relative to; by default the list's own.
        store: `"arrow"` (default) or `"milvus"`.
        uri: of Milvus: a file, or the address of a cluster. By default a file in `index`.
        approximate: a factory string of FAISS such as `"SQ8"`, or an index type of Milvus such as `"HNSW"`, for more
            than a million images. An empty string makes search exact again.
        keep_patches: keep patch states in half precision, so that re-ranking need not read image files.
        batch_size: images that are encoded at once.
        workers: processes that decode images.
        shard_size: images per shard: what an interruption costs at most.

    Raises:
        GalleryError: where `source` holds no image, the index belongs to another model, or another run is at work.
        CheckpointError: where the model cannot be loaded.
    """
    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(), timeout=_WAIT
    )
    index, record = Path(index), _read_record(Path(index))
    if model is not None and Path(model).is_dir():
        model = str(Path(model).resolve())  # an index is searched from anywhere
    settings = _settings(
        index, record, model=model, store=store, uri=uri, approximate=approximate, keep_patches=keep_patches
    )
    location = os.fspath(source)
    place = {
        "location": str(Path(location).resolve()) if Path(location).exists() else location,
        "split": split,
        "root": None if root is None else str(Path(root).resolve()),
    }
    images = open_source(place)
    network, processor, digest = _load(settings["model"], state.device)
    if record is not None and record["digest"] != digest:
        raise GalleryError(
            f"{index} holds features of {record['model']}, and {settings['model']} has other weights. Choose another "
            "--out for this model, or give that one."
        )
    (index / PENDING).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        plan = None
        if state.is_main_process:
            try:
                stack.enter_context(FileLock(index / LOCK, timeout=0))
            except Timeout as error:
                raise GalleryError(f"Another process is writing {index}. Wait for it to end.") from error
            kind = _shard_kind(digest, settings["keep_patches"])
            old = record or {
                "format": FORMAT,
                "dimension": network.config.projection_dim,
                # Of Milvus. The same for each run of this command, also where the first one is killed.
                "collection": f"cada_{uuid5(NAMESPACE_URL, f'{platform.node()}{index.resolve()}{kind}').hex[:16]}",
            }
            job = _Update(index, {**old, **settings, "source": place, "digest": digest}, images)
            plan = job.plan(shard_size)
            if settings["keep_patches"]:
                _announce_patches(index, network, sum(len(paths) for _, paths, _ in plan))
        plan = broadcast_object_list([plan])[0]
        _encode_shards(
            network,
            processor,
            images,
            plan[state.process_index :: state.num_processes],
            index,
            digest,
            settings["keep_patches"],
            batch_size,
            workers,
            progress and state.is_main_process,
        )
        state.wait_for_everyone()
        changes = job.commit([name for name, _, _ in plan]) if state.is_main_process else None
    return broadcast_object_list([changes])[0]


def _state_bytes(model) -> int:
    """Bytes of the patch states of an image in half precision."""
    rows, columns = model.config.vision_config.grid_size
    return 2 * (1 + rows * columns) * model.config.vision_config.hidden_size


def _announce_patches(index: Path, model, count: int) -> None:
    size, free = _state_bytes(model) * count, shutil.disk_usage(index).free
    print(f"Patch states of {count:,} images will take {size / 1e9:.2f} GB; {free / 1e9:.2f} GB are free.", flush=True)
    if size > free:
        raise GalleryError(f"{index}: the disk is too small for --keep-patches. Leave it out, or choose another.")


class _Update:
    """What the main process does before and after encoding."""

    def __init__(self, index: Path, record: dict, images: ImageFiles | ImageRows):
        self.index, self.record, self.images = index, record, images
        self.kind = _shard_kind(record["digest"], record["keep_patches"])

    def plan(self, shard_size: int) -> list[tuple[str, list[str], list[str]]]:
        """Shards to encode: name, paths, stamps. Images of finished shards and of the index are not among them."""
        self.listing, self.unreadable = self.images.listing()
        if not len(self.listing):
            problems = "".join(f" {path} {problem}." for path, problem in self.unreadable[:1])
            raise GalleryError(f"{self.record['source']['location']} holds no image that Pillow reads.{problems}")
        self.store = STORES[self.record["store"]](self.index, self.record)
        self.known = self.store.known()
        finished = self._finished()
        done = set(zip(finished["path"].to_pylist(), finished["stamp"].to_pylist())) | set(self.known.items())
        todo = [image for image in _images_of(self.listing) if image not in done]
        run = uuid4().hex[:12]
        parts = [todo[start : start + shard_size] for start in range(0, len(todo), shard_size)]
        return [(f"{run}-{number:06}", *map(list, zip(*part))) for number, part in enumerate(parts)]

    def _finished(self, problems_of: Sequence[str] = ()) -> pa.Table:
        """The rows of all finished shards; half-written files and shards of another model are deleted."""
        tables = []
        for path in sorted((self.index / PENDING).iterdir()):
            if path.suffix == ".arrow" and not path.name.startswith("."):
                with pa.memory_map(str(path)) as file:
                    table = pa.ipc.open_stream(file).read_all()
                if table.schema.metadata[b"kind"].decode() == self.kind:
                    tables.append(table)
                    if path.stem in problems_of:
                        self.unreadable += [tuple(row) for row in json.loads(table.schema.metadata[b"unreadable"])]
                    continue
            path.unlink()
        return pa.concat_tables(
            [_shard_schema(self.record["dimension"]).empty_table()]
            + [table.replace_schema_metadata(None) for table in tables]
        )

    def commit(self, shards: list[str]) -> Changes:
        """Write the next state of the index."""
        encoded = self._finished(shards)
        ready = set(zip(encoded["path"].to_pylist(), encoded["stamp"].to_pylist())) | set(self.known.items())
        images = _images_of(self.listing)
        kept = self.listing.take(pa.array([row for row, key in enumerate(images) if key in ready], pa.int64()))
        paths = {path for path, _ in images} | {path for path, _ in self.unreadable}
        changes = Changes(removed=sum(path not in paths for path in self.known), unreadable=sorted(self.unreadable))
        for path, stamp in _images_of(kept):
            if path not in self.known:
                changes.added += 1
            elif self.known[path] != stamp:
                changes.changed += 1
            else:
                changes.unchanged += 1
        if not len(kept):
            path, problem = changes.unreadable[0]
            raise GalleryError(
                f"None of the {len(changes.unreadable)} images can be read, so nothing was changed. {path}: {problem}."
            )
        columns = {name: str(kept.schema.field(name).type) for name in kept.column_names[2:]}
        columns = {name: {"double": "float64"}.get(kind, kind) for name, kind in columns.items()}
        self.record["columns"] = columns
        self.record |= self.store.write(kept, encoded)
        self.record |= {
            "images": len(kept),
            "updated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with written_whole(self.index / RECORD) as temporary:
            temporary.write_text(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._clean()
        return changes

    def _clean(self) -> None:
        """Delete what the present state does not refer to."""
        for path in (self.index / PENDING).iterdir():
            path.unlink()
        named = {self.record.get("table"), self.record.get("faiss")}
        for pattern in ("table-*", "features-*", ".unfinished-*"):
            for path in self.index.glob(pattern):
                if path.name not in named:
                    path.unlink()
        if self.record["keep_patches"]:
            store = STORES[self.record["store"]](self.index, self.record)
            used = {
                place.split("/")[0] for table in store.tables(["patches"]) for place in table["patches"].to_pylist()
            }
            for path in (self.index / PATCHES).iterdir():
                if path.name not in used:
                    path.unlink()


def _images_of(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["path"].to_pylist(), table["stamp"].to_pylist()))


def _shard_kind(digest: str, keep_patches: bool) -> str:
    return f"{digest}{' with patches' if keep_patches else ''}"


def _shard_schema(dimension: int) -> pa.Schema:
    names = ("path", "stamp", "digest", "patches")
    return pa.schema([*((name, pa.string()) for name in names), ("feature", feature_type(dimension))])


@torch.inference_mode()
def _encode_shards(
    model, processor, images, shards, index: Path, digest: str, keep_patches: bool, batch_size, workers, progress
) -> None:
    """Encode shards (name, paths, stamps), each into a file of `pending/`, with a file of `patches/` if asked."""
    samples = _Samples(images, processor, [path for _, paths, _ in shards for path in paths])
    batches, start = [], 0
    for _, paths, _ in shards:  # no batch crosses shards, so that features do not depend on who encodes which shard
        end = start + len(paths)
        batches += [list(range(at, min(at + batch_size, end))) for at in range(start, end, batch_size)]
        start = end
    loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=list)
    bar = tqdm(total=len(samples), desc="Encoding images", unit="image", disable=not progress, leave=False)
    stream = iter(loader)
    for name, paths, stamps in shards:
        rows, unreadable, states = [], [], []
        for start in range(0, len(paths), batch_size):
            batch = next(stream)
            bar.update(len(batch))
            numbers = [number for number, (_, pixels, _) in enumerate(batch) if pixels is not None]
            unreadable += [(paths[start + number], problem) for number, (_, _, problem) in enumerate(batch) if problem]
            if not numbers:
                continue
            outputs = model.get_image_features(torch.stack([batch[number][1] for number in numbers]).to(model.device))
            features = F.normalize(outputs.pooler_output.float(), dim=-1).cpu()
            finite = features.isfinite().all(dim=1).tolist()
            for row, number in enumerate(numbers):
                path = paths[start + number]
                if not finite[row]:
                    unreadable.append((path, "has no finite features; does the model give any?"))
                    continue
                place = f"{name}.safetensors/{len(rows)}" if keep_patches else None
                rows.append((path, stamps[start + number], batch[number][0], place, features[row]))
                if keep_patches:
                    states.append(outputs.last_hidden_state[row].half().cpu())
        if states:
            (index / PATCHES).mkdir(exist_ok=True)
            with written_whole(index / PATCHES / f"{name}.safetensors") as temporary:
                save_file({"states": torch.stack(states)}, temporary)
        schema = _shard_schema(model.config.projection_dim)
        table = schema.empty_table()
        if rows:
            *columns, kept = zip(*rows)
            columns = [pa.array(column, pa.string()) for column in columns]
            table = pa.table([*columns, feature_column(torch.stack(kept))], schema=schema)
        about = {"kind": _shard_kind(digest, keep_patches), "unreadable": json.dumps(unreadable)}
        write_table(table.replace_schema_metadata(about), index / PENDING / f"{name}.arrow")
    bar.close()


def open_index(index: str | os.PathLike, model: str | None = None, device: str | None = None) -> "GalleryIndex":
    """
    An index to search in.

    Args:
        index: folder written by [`build_index`].
        model: the checkpoint, where it is no longer where it was; its weights have to be the same.
        device: of the model; the GPU where there is one.

    Raises:
        GalleryError: where the folder holds no index.
    """
    record = _read_record(Path(index))
    if record is None:
        raise GalleryError(f"{index} holds no index ({RECORD}). Make one: python gallery_cada.py index ...")
    return GalleryIndex(Path(index), record, model or record["model"], device)


class GalleryIndex:
    """
    An index, opened by [`open_index`]. `len(index)` is its number of images.

    Attributes:
        columns: name and type of the metadata columns, which `where` can ask for.
        model, processor: the checkpoint, loaded at first use. A `GalleryError` where its weights are others.
    """

    def __init__(self, folder: Path, record: dict, model: str, device: str | None = None):
        self.folder, self.record, self.model_name, self.device = folder, record, model, device
        self.columns: dict[str, str] = record["columns"]
        self.store = STORES[record["store"]](folder, record)

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def _loaded(self) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
        model, processor, digest = _load(self.model_name, self.device)
        if digest != self.record["digest"]:
            raise GalleryError(
                f"{self.folder} holds features of {self.record['model']} as it was then, and {self.model_name} has "
                "other weights. Give the same --model, or make a new index."
            )
        return model, processor

    @property
    def model(self) -> CADAForTextToImageRetrieval:
        """The model whose features the index holds."""
        return self._loaded[0]

    @property
    def processor(self) -> CADAProcessor:
        """The processor of the model."""
        return self._loaded[1]

    @cached_property
    def _source(self) -> ImageFiles | ImageRows:
        return open_source(self.record["source"])

    def search(
        self, sentences: Sequence[str], top: int = 10, rerank: int | None = None, where: Sequence[str] = ()
    ) -> list[list[Result]]:
        """
        The `top` images for every sentence, best first.

        Args:
            sentences: any number of them.
            top: images per sentence.
            rerank: how many candidates of the global ranking the decoder reads; `config.rerank_k` by default, 0 for
                none.
            where: conditions on metadata, such as `"camera=3"`; operators `=`, `!=`, `<`, `<=`, `>`, `>=`. All have to
                hold. They count before ranking.

        Raises:
            GalleryError: for an empty sentence, an unknown column, or a candidate whose image file is gone.
        """
        sentences = list(sentences)
        for sentence in sentences:
            if not clean_caption(sentence):
                raise GalleryError(f"The sentence {sentence!r} is empty. Describe a person.")
        if top < 1 or (rerank is not None and rerank < 0):
            raise GalleryError(f"top is {top} and rerank {rerank}. Give 1 or more, and 0 or more.")
        conditions = parse_conditions(where, self.columns)
        config = self.model.config
        if rerank and not config.use_atp:
            raise GalleryError("This model has no match head (`use_atp=False`): give --rerank 0.")
        if rerank is None:
            rerank = config.rerank_k if config.use_atp else 0
        if not sentences:
            return []
        queries = encode_queries(self.model, self.processor, sentences, progress=len(sentences) > 1000)
        found = self.store.search(queries.embeds, max(top, rerank), conditions)
        local_scores = self._local_scores(queries, [[row for _, row in hits[:rerank]] for hits in found])
        rankings = []
        for hits, scores in zip(found, local_scores):
            near = sorted(
                ((score + local, row) for (score, row), local in zip(hits, scores)),
                key=lambda pair: (-pair[0], pair[1]["path"]),
            )
            ranked = [(*pair, "local") for pair in near] + [(*pair, "global") for pair in hits[len(near) :]]
            rankings.append([self._result(*hit) for hit in ranked[:top]])
        return rankings

    def search_image(self, image: Image.Image, top: int = 10, where: Sequence[str] = ()) -> list[Result]:
        """The `top` images most similar to `image` by global features: the same person, if the gallery shows them."""
        if top < 1:
            raise GalleryError(f"top is {top}. Give 1 or more.")
        conditions = parse_conditions(where, self.columns)
        pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.model.device)
        with torch.inference_mode():
            feature = F.normalize(self.model.get_image_features(pixel_values).pooler_output.float(), dim=-1).cpu()
        return [self._result(*hit, "global") for hit in self.store.search(feature, top, conditions)[0]]

    def _result(self, score: float, row: dict, stage: str) -> Result:
        return Result(row["path"], score, stage, {name: row[name] for name in self.columns})

    def _local_scores(self, queries, candidates: list[list[dict]]) -> list[list[float]]:
        """S_L of each query's candidates. The patch states of an image are needed once, whatever the queries."""
        longest = max(len(rows) for rows in candidates)
        if longest == 0:
            return [[] for _ in candidates]
        rows = {row["path"]: row for candidate in candidates for row in candidate}
        number_of = {path: number for number, path in enumerate(rows)}
        unique = list(rows.values())
        table = [[number_of[row["path"]] for row in candidate] for candidate in candidates]
        # An approximate index may find fewer candidates for one sentence than for another: 0 fills up.
        padded = torch.zeros(len(table), longest, dtype=torch.long)
        for line, numbers in enumerate(table):
            padded[line, : len(numbers)] = torch.tensor(numbers)
        config = self.model.config.vision_config
        patches = config.grid_size[0] * config.grid_size[1]
        empty = torch.empty(0, 1 + patches, config.hidden_size, dtype=self.model.dtype)
        size = _IMAGES_AT_ONCE

        def encode(batches: list[int]) -> Iterator[torch.Tensor]:
            return (self._states(unique[batch * size : (batch + 1) * size]) for batch in batches)

        gallery = Gallery(torch.empty(0), empty, batch_size=size, encode=encode)
        scores = match_candidates(self.model, queries, gallery, padded, progress=padded.numel() > 1000)
        return [row[: len(numbers)] for row, numbers in zip(scores.tolist(), table)]

    def _states(self, rows: list[dict]) -> torch.Tensor:
        """Patch states `(rows, 1 + patches, hidden)`: kept ones, or of the image files."""
        if self.record["keep_patches"]:
            return torch.stack([self._kept_states(row) for row in rows])
        images = [self._decode(row["path"], self.processor.image_size) for row in rows]
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return self.model.encode_images(pixel_values.to(self.model.device)).cpu()

    def _kept_states(self, row: dict) -> torch.Tensor:
        name, number = row["patches"].split("/")
        try:
            with safe_open(self.folder / PATCHES / name, "pt") as file:
                return file.get_slice("states")[int(number)]
        except OSError as error:
            raise GalleryError(f"Patch states of {row['path']}: {error}. Make a new index.") from error

    def _decode(self, path: str, size: tuple[int, int] | None = None) -> Image.Image:
        try:
            return open_image({"bytes": self._source.read(path), "path": None}, size)
        except (OSError, KeyError, DataError) as error:
            raise GalleryError(
                f"The image {path} cannot be read any more ({error}). Bring the index up to date: python "
                f"gallery_cada.py index {self.record['source']['location']} --out {self.folder}"
            ) from error

    def image(self, path: str) -> Image.Image:
        """The image of the gallery named `path`, upright. A `GalleryError` for anything that is not in the index."""
        if self.store.find(path) is None:
            raise GalleryError(f"The index holds no image {path!r}.")
        return self._decode(path)

    def info(self) -> dict:
        """What the index holds and how: a flat dictionary, sizes in bytes."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            "images": len(self),
            "columns": self.columns,
            "source": self.record["source"]["location"],
            "model": self.record["model"],
            "digest": self.record["digest"],
            "dimension": self.record["dimension"],
            "store": self.record["store"] + (f" at {self.record['uri']}" if self.record["uri"] else ""),
            "search": self.record["approximate"] or "exact",
            "keep_patches": self.record["keep_patches"],
            "bytes": sum(path.stat().st_size for path in files),
            "updated": self.record["updated"],
            "unfinished_shards": sum(
                path.parent.name == PENDING and path.suffix == ".arrow" and path.name[0] != "." for path in files
            ),
        }

    def verify(self, progress: bool = True) -> list[tuple[str, str]]:
        """Compare every image with what was indexed. Returns `(path, problem)`; nothing where all is well."""
        problems = []
        with tqdm(total=len(self), desc="Verifying images", unit="image", disable=not progress, leave=False) as bar:
            for table in self.store.tables(["path", "digest"]):
                for path, digest in zip(table["path"].to_pylist(), table["digest"].to_pylist()):
                    bar.update()
                    try:
                        if content_digest(self._source.read(path)) != digest:
                            problems.append((path, "has changed since it was indexed"))
                    except (OSError, KeyError) as error:
                        problems.append((path, f"cannot be read: {getattr(error, 'strerror', None) or error}"))
        return problems

    def export(self, path: str | os.PathLike) -> int:
        """Write `path`, `digest`, metadata and `feature` of all images as a Parquet file; returns their number."""
        count = 0
        with ExitStack() as stack:
            temporary = stack.enter_context(written_whole(Path(path)))
            writer = None
            for table in self.store.tables(["path", "digest", *self.columns, "feature"]):
                writer = writer or stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table)
                count += len(table)
        return count


def draw_results(
    gallery: GalleryIndex,
    rankings: dict[str, list[Result]],
    caption: Callable[[str, int, Result], tuple[str, str]] | None = None,
    height: int = 192,
) -> Image.Image:
    """
    A picture: under every title of `rankings` its ranked images.

    Args:
        caption: gives the text below an image (lines apart by newlines) and its colour, from title, rank (from 1) and
            result; by default rank and score.
        height: of the images in pixels.
    """
    large, small, margin = ImageFont.load_default(17), ImageFont.load_default(13), 12
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows = []
    for title, results in rankings.items():
        cells = []
        for rank, result in enumerate(results, start=1):
            image = gallery.image(result.path).convert("RGB")
            # A very wide picture would leave no place for the others.
            width = min(max(1, round(height * image.width / image.height)), 2 * height)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            text, colour = caption(title, rank, result) if caption else (f"{rank}.  {result.score:.3f}", "#57606a")
            cells.append((image, text, colour))
        rows.append((title, cells))
    cell = margin + max([96, *(image.width for _, cells in rows for image, _, _ in cells)])
    lines = max([1, *(text.count("\n") + 1 for _, cells in rows for _, text, _ in cells)])
    row_height = 26 + height + 20 + 16 * lines
    width = margin + max(
        cell * max([1, *(len(cells) for _, cells in rows)]),
        *(round(measure.textlength(title, font=large)) + margin for title, _ in rows),
    )
    canvas = Image.new("RGB", (width, len(rows) * row_height + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (title, cells) in enumerate(rows):
        upper = line * row_height + margin
        draw.text((margin, upper), title, fill="black", font=large)
        for place, (image, text, colour) in enumerate(cells):
            left = margin + place * cell
            canvas.paste(image, (left, upper + 26))
            draw.multiline_text((left, upper + 30 + height), text, fill=colour, font=small, spacing=2)
    return canvas


app = typer.Typer(
    help="Index person images, and find among them who fits a sentence.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_Index = Annotated[Path, typer.Argument(help="folder of the index")]
_Model = Annotated[str | None, typer.Option(help="the checkpoint; by default the one that the index was made with")]


@app.command("index")
def _index(
    source: Annotated[str, typer.Argument(help="folder of images, CSV or JSONL file, or data set")],
    out: Annotated[Path, typer.Option(help="folder of the index, new or old")],
    model: _Model = None,
    split: Annotated[str | None, typer.Option(help="of a data set")] = None,
    root: Annotated[Path | None, typer.Option(help="folder that the paths of a list are relative to")] = None,
    store: Annotated[str | None, typer.Option(help="arrow (default) or milvus")] = None,
    uri: Annotated[str | None, typer.Option(help="of Milvus: a file or the address of a cluster")] = None,
    approximate: Annotated[
        str | None, typer.Option(help="FAISS factory string such as SQ8, or index type of Milvus; exact by default")
    ] = None,
    keep_patches: Annotated[
        bool | None, typer.Option("--keep-patches", help="keep patch states for re-ranking without the image files")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images encoded at once")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images")] = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="images that an interruption costs at most")] = 1024,
) -> None:
    """Encode images into an index, or bring an index up to date."""
    changes = build_index(
        source,
        out,
        model,
        split=split,
        root=root,
        store=store,
        uri=uri,
        approximate=approximate,
        keep_patches=keep_patches,
        batch_size=batch_size,
        workers=workers,
        shard_size=shard_size,
    )
    is_main_process = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not is_main_process:
        return
    for path, problem in changes.unreadable:
        print(f"unreadable: {path}: {problem}", file=sys.stderr)
    images = changes.added + changes.changed + changes.unchanged
    counts = [f"{getattr(changes, name):,} {name}" for name in ("added", "changed", "removed", "unchanged")]
    print(f"{out}: {images:,} images; {', '.join(counts)}, {len(changes.unreadable):,} unreadable.")


@app.command("search")
def _search(
    index: _Index,
    sentences: Annotated[list[str] | None, typer.Argument(help="one or several")] = None,
    file: Annotated[Path | None, typer.Option(help="a text file with one sentence per line")] = None,
    image: Annotated[Path | None, typer.Option(help="search for the person on this image instead")] = None,
    top: Annotated[int, typer.Option(min=1, help="images per sentence")] = 10,
    rerank: Annotated[
        int | None, typer.Option(min=0, help="candidates that the decoder reads; by default the model's, 0 for none")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="condition on metadata such as camera=3 (=, !=, <, <=, >, >=), repeatable")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the results into this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: one object per sentence")] = False,
    model: _Model = None,
    device: Annotated[str | None, typer.Option(help="of the model, such as cpu or cuda:1")] = None,
) -> None:
    """Rank the images for a sentence, or for a photo."""
    gallery = open_index(index, model, device)
    queries = list(sentences or [])
    if file is not None:
        try:
            queries += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise GalleryError(f"The file {file} cannot be read: {error}") from error
    if (image is not None) == bool(queries):
        raise GalleryError("Give sentences, a --file with sentences, or an --image.")
    if image is None:
        rankings = list(zip(queries, gallery.search(queries, top, rerank, where or ())))
    elif rerank:
        raise GalleryError("--rerank reads a sentence; with --image there is none. Leave it out.")
    else:
        rankings = [(str(image), gallery.search_image(_open_query(image), top, where or ()))]
    if picture is not None:
        _save_picture(draw_results(gallery, dict(rankings)), picture)
    if as_json:
        lists = [
            {"query": query, "results": [{"rank": rank, **asdict(result)} for rank, result in enumerate(results, 1)]}
            for query, results in rankings
        ]
        print(json.dumps(lists, indent=2, ensure_ascii=False))
        return
    for query, results in rankings:
        print(f"{query}\nrank   score  path")
        for rank, result in enumerate(results, start=1):
            print(f"{rank:4}  {result.score:6.3f}  {result.path}")
    if picture is not None:
        print(f"Wrote {picture}.")


def _open_query(path: Path) -> Image.Image:
    try:
        return open_image({"bytes": path.read_bytes(), "path": None})
    except (OSError, DataError) as error:
        raise GalleryError(f"The image {path} cannot be read: {error}") from error


def _save_picture(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        raise GalleryError(f"The picture {path} cannot be written: {error}. Give a name such as out.png.") from error


@app.command("info")
def _info(index: _Index) -> None:
    """Say what an index holds."""
    for name, value in open_index(index).info().items():
        if isinstance(value, dict):
            value = ", ".join(f"{column} ({kind})" for column, kind in value.items()) or "none"
        print(f"{name.replace('_', ' '):17} {f'{value:,}' if type(value) is int else value}")


@app.command("verify")
def _verify(index: _Index) -> None:
    """Compare every image with what was indexed; exit status 1 where one is gone or has changed."""
    gallery = open_index(index)
    problems = gallery.verify()
    for path, problem in problems:
        print(f"{path}: {problem}")
    print(f"{len(gallery):,} images; {len(problems):,} with problems.")
    if problems:
        raise typer.Exit(1)


@app.command("export")
def _export(index: _Index, path: Annotated[Path, typer.Argument(help="a Parquet file")]) -> None:
    """Write paths, metadata and features as Parquet."""
    print(f"Wrote {open_index(index).export(path):,} rows to {path}.")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        return run_command(lambda: app(args=arguments, prog_name="gallery_cada.py"))
    except SystemExit as end:  # how typer ends
        return end.code


if __name__ == "__main__":
    sys.exit(main())
