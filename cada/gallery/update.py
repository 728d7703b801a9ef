"""The way from the old state of an index to the new one: what is to be encoded, shards of it, one last step."""

import datetime
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils import logging

from cada.files import CADAError, counted, written_whole
from cada.gallery.images import ImageFiles, ImageRows, ImageSamples, digest_of
from cada.gallery.milvus import MilvusStore, open_store
from cada.gallery.store import (
    OWN_FILES,
    OWN_SHARDS,
    OWN_STATES,
    PATCHES,
    PENDING,
    RECORD,
    feature_column,
    shard_files,
    shard_schema,
    write_table,
)
from configuration_cada import CADAVisionConfig


logger = logging.get_logger(__name__)


@dataclass
class Changes:
    """
    What [`build_index`] did: numbers of images, also of hidden ones that were left out, and `(path, problem)` of every
    image that cannot be read.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    hidden: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


class Update:
    """What the main process does before and after encoding."""

    def __init__(self, index: Path, record: dict, images: ImageFiles | ImageRows):
        self.index, self.record, self.images = index, record, images
        self.kind = shard_kind(record)

    def plan(
        self, shard_size: int, new: bool, check_content: bool, progress: bool
    ) -> list[tuple[str, list[str], list[str]]]:
        """Shards to encode: name, paths, stamps. Images of finished shards and of the index are not among them."""
        self.listing, self.unreadable = self.images.listing()
        if not len(self.listing):
            problems = "".join(f" {path} {problem}." for path, problem in self.unreadable[:1])
            if self.images.hidden:
                problems += f" {counted(self.images.hidden, 'hidden image')}: --hidden takes them."
            raise CADAError(f"{self.record['source']['location']} holds no image that Pillow reads.{problems}")
        try:
            self.store = open_store(self.index, self.record)
        except CADAError as error:
            if not self.record.get("table"):
                raise
            logger.warning(f"{error} All images are encoded again.")
            self.record["table"] = None
            self.store = open_store(self.index, self.record)
        images = _images_of(self.listing)
        stamps = dict(images)

        def changed(path: str, stamp: str, digest: str) -> bool:
            return stamps.get(path) == stamp and digest_of(self.images, path) != digest

        shards = self._finished(changed if check_content else None)
        done = {image for _, table in shards for image in _images_of(table)}
        if isinstance(self.store, MilvusStore):
            if new and not done:
                self.store.drop()  # of an index whose folder was deleted
            self.store.create()  # what is wrong shows now, not after the work
        self.known = stamps_of_now(self.store, self.index, images, self.images, check_content, progress)
        done |= set(self.known.items())
        todo = [image for image in images if image not in done]
        run = uuid4().hex[:12]
        parts = [todo[start : start + shard_size] for start in range(0, len(todo), shard_size)]
        return [(f"{run}-{number:06}", *map(list, zip(*part))) for number, part in enumerate(parts)]

    def _finished(self, changed: Callable[[str, str, str], bool] | None = None) -> Iterator[tuple[str, pa.Table]]:
        return read_shards(self.index, self.kind, self.record["dimension"], changed)

    def commit(self, shards: list[str]) -> Changes:
        """Write the next state of the index."""
        tables = [shard_schema(self.record["dimension"]).empty_table()]
        for name, table in self._finished():
            if name in shards:
                self.unreadable += [tuple(row) for row in json.loads(table.schema.metadata[b"unreadable"])]
            tables.append(table.replace_schema_metadata(None))
        encoded = pa.concat_tables(tables)
        ready = set(_images_of(encoded)) | set(self.known.items())
        images = _images_of(self.listing)
        kept = self.listing.take(pa.array([row for row, key in enumerate(images) if key in ready], pa.int64()))
        paths = {path for path, _ in images} | {path for path, _ in self.unreadable}
        removed = sum(path not in paths for path in self.known)
        changes = Changes(removed=removed, hidden=self.images.hidden, unreadable=sorted(self.unreadable))
        for path, stamp in _images_of(kept):
            if path not in self.known:
                changes.added += 1
            elif self.known[path] != stamp:
                changes.changed += 1
            else:
                changes.unchanged += 1
        if not len(kept):
            path, problem = changes.unreadable[0]
            raise CADAError(
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
        clean(self.index, open_store(self.index, self.record))
        return changes


def _images_of(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["path"].to_pylist(), table["stamp"].to_pylist()))


def shard_kind(record: dict) -> str:
    """What the rows of a shard are: they belong to an index of the same model, with patch states or without."""
    return f"{record['digest']}{' with patches' if record['keep_patches'] else ''}"


def announce_states(index: Path, config: CADAVisionConfig, count: int) -> None:
    """Say how much disk the patch states of `count` images take. A `CADAError` for too much."""
    needed, free = 2 * config.sequence_length * config.hidden_size * count, shutil.disk_usage(index).free
    print(f"Patch states of {counted(count, 'image')} will take {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free.")
    if needed > free:
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


def clean(index: Path, store) -> None:
    """Delete files of an index that its present state, the record of `store`, does not refer to."""
    table = store.record.get("table")
    unused = [path for path in index.iterdir() if OWN_FILES.fullmatch(path.name) and path.name != table]
    unused += [path for path in (index / PENDING).iterdir() if OWN_SHARDS.fullmatch(path.name)]
    if store.record["keep_patches"] and (index / PATCHES).is_dir():
        used = {place.split("/")[0] for table in store.tables(["patches"]) for place in table["patches"].to_pylist()}
        files = (index / PATCHES).iterdir()
        unused += [path for path in files if OWN_STATES.fullmatch(path.name) and path.name not in used]
    for path in unused:
        path.unlink()


@torch.inference_mode()
def encode_shards(
    model, processor, images, shards, index: Path, record: dict, batch_size: int, workers: int, progress: bool
) -> None:
    """Encode shards (name, paths, stamps), each into a file of `pending/`, with a file of `patches/` if asked."""
    samples = ImageSamples(images, processor, [path for _, paths, _ in shards for path in paths])
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
                place = f"{name}.safetensors/{len(rows)}" if record["keep_patches"] else None
                rows.append((path, stamps[start + number], batch[number][0], place, features[row]))
                if record["keep_patches"]:
                    states.append(outputs.last_hidden_state[row].half().cpu())
        if states:
            (index / PATCHES).mkdir(exist_ok=True)
            with written_whole(index / PATCHES / f"{name}.safetensors") as temporary:
                save_file({"states": torch.stack(states)}, temporary)
        schema = shard_schema(model.config.projection_dim)
        table = schema.empty_table()
        if rows:
            *columns, kept = zip(*rows)
            columns = [pa.array(column, pa.string()) for column in columns]
            table = pa.table([*columns, feature_column(torch.stack(kept))], schema=schema)
        about = {"kind": shard_kind(record), "unreadable": json.dumps(unreadable)}
        write_table(table.replace_schema_metadata(about), index / PENDING / f"{name}.arrow")
    bar.close()
