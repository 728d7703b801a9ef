"""The way from the old state of an index to the new one: what is to be encoded, shards of it, one last step."""

import datetime
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from tqdm.auto import tqdm
from transformers.utils import logging

from cada.data.images import cut_out, open_image
from cada.files import CADAError, counted, problem_of, written_whole
from cada.gallery.images import ImageFiles, ImageRows, content_digest
from cada.gallery.persons import Persons
from cada.gallery.regions import Region
from cada.gallery.store import (
    FOUND,
    PATCHES,
    PENDING,
    RECORD,
    feature_column,
    open_store,
    own_files,
    shard_files,
    shard_schema,
    states_file,
    write_tables,
)
from configuration_cada import CADAVisionConfig
from processing_cada import CADAProcessor


logger = logging.get_logger(__name__)

Shard = tuple[str, list[tuple[str, str]]]  # its name; path and stamp of its images


@dataclass(frozen=True)
class IndexOptions:
    """How [`build_index`] makes an index. What an old index knows need not be said again."""

    revision: str | None = None  # tag, branch or commit of the model on the Hub; the index keeps the commit
    split: str | None = None  # of a data set
    root: str | os.PathLike | None = None  # folder that the paths of a list are relative to; by default the list's own
    boxes: str | os.PathLike | None = None  # file that says where persons are: COCO JSON, CSV or JSONL
    detector: str | None = None  # checkpoint of AutoModelForObjectDetection that says it, with these settings:
    min_score: float | None = None  # the least score of a person, 0.5 by default
    min_height: float | None = None  # the least height of a person in pixels, 32 by default
    margin: float | None = None  # what is added to a box on each side, as a share of its width or height; 0 by default
    fps: float | None = None  # frames of a video that are looked at in each second, 1 by default
    hidden: bool | None = None  # take also hidden files, and those in folders of systems (thumbnails, waste bins)
    uri: str | None = None  # address of Milvus, which keeps the features then; by default they are in the index
    approximate: str | None = None  # an index type of Milvus: "FLAT" (exact, the default), "IVF_FLAT" or "HNSW"
    keep_patches: bool | None = None  # keep patch states, so that re-ranking need not read image files
    # Point an old index to another source, such as the moved folder. Images whose path and content are as before are
    # not encoded again, all others of the old source are dropped.
    moved_source: bool = False
    check_content: bool = False  # read every file; by default one is unchanged if its size, times and inode are
    batch_size: int = 64  # images that are encoded at once
    workers: int = 0  # processes that decode images
    shard_size: int = 1024  # images per shard: what an interruption costs at most
    progress: bool = True  # show bars

    def __post_init__(self):
        if min(self.batch_size, self.shard_size) < 1 or self.workers < 0:
            raise CADAError(
                f"batch_size is {self.batch_size}, shard_size {self.shard_size}, workers {self.workers}. Give 1, 1 "
                "and 0, or more."
            )


@dataclass
class Changes:
    """
    What [`build_index`] did: numbers of images, or of persons, as `kind` says; of hidden files that were left out, and
    of files that show nobody; `(path, problem)` of all that cannot be read.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    hidden: int = 0
    empty: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    kind: str = "image"


class Update:
    """What the main process does before and after encoding. `vision` is given where patch states are kept."""

    def __init__(self, index: Path, record: dict, persons: Persons, vision: CADAVisionConfig | None):
        self.index, self.record, self.persons, self.vision = index, record, persons, vision
        self.images = persons.images

    def plan(self, new: bool, options: IndexOptions) -> list[Shard]:
        """Shards to encode. Images of finished shards and of the index are not among them."""
        files, self.unreadable = self.images.listing()
        self.listing = self.persons.entries(files, self.unreadable) if len(files) else files
        if not len(self.listing):
            problems = "".join(f" {path} {problem}." for path, problem in self.unreadable[:1])
            if self.persons.empty:
                empty = counted(self.persons.empty, "file")
                raise CADAError(f"Nobody was found in {empty}.{problems} {self.persons.remedy}")
            if self.images.hidden:
                problems += f" {counted(self.images.hidden, 'hidden image')}: --hidden takes them."
            raise CADAError(f"{self.record['source']['location']} holds no image that Pillow reads.{problems}")
        self.store = self._open_store()
        images = list(_columns(self.listing, "path", "stamp"))
        stamps, whole = dict(images), whole_states(self.index, self.vision) if self.vision else set()

        def is_current(path: str, stamp: str, digest: str) -> bool:
            """Whether a row is that of the image as it is now, and its patch states are there."""
            if path not in stamps or self.vision and states_file(self.record["digest"], path, digest) not in whole:
                return False
            return stamp == stamps[path] and not options.check_content or self._digest(path) == digest

        self.finished, self.known = [], {}  # rows of earlier runs; whether each image of the index is as it was
        for _, table in read_shards(self.index, self.record):
            current = [is_current(*row) for row in _columns(table, "path", "stamp", "digest")]
            self.finished.append(table if all(current) else table.filter(pa.array(current)))
        if self.record["uri"] and (not len(self.store) or new and not any(map(len, self.finished))):
            self.store.create()  # what is wrong shows now; and the rows go of an index whose folder was deleted
        hide = not options.progress
        with tqdm(total=len(self.store), desc="Comparing", unit="image", disable=hide, leave=False, delay=5) as bar:
            for table in self.store.tables(["path", "stamp", "digest"]):
                for row in _columns(table, "path", "stamp", "digest"):
                    self.known[row[0]] = is_current(*row)
                    bar.update()
        ready = self._ready()
        todo = [image for image in images if image[0] not in ready]
        if self.vision:
            announce_states(self.index, self.vision, len(todo))
        run, size = uuid4().hex[:12], options.shard_size
        starts = enumerate(range(0, len(todo), size))
        return [(f"{run}-{number:06}", todo[start : start + size]) for number, start in starts]

    def _open_store(self):
        try:
            return open_store(self.index, self.record)
        except CADAError as error:
            if not self.record.get("table"):
                raise
            logger.warning(f"{error} All images are encoded again.")
            self.record["table"] = None
            return open_store(self.index, self.record)

    def _digest(self, path: str) -> str | None:
        try:
            return content_digest(self.images.read(path))
        except OSError:  # it is reported when it is to be encoded
            return None

    def _ready(self) -> set[str]:
        """Paths of the images whose features are there."""
        encoded = (path for table in self.finished for path in table["path"].to_pylist())
        return {*encoded, *(path for path, current in self.known.items() if current)}

    def commit(self, shards: list[str]) -> Changes:
        """Write the next state of the index."""
        for name, table in read_shards(self.index, self.record):
            if name in shards:
                self.unreadable += [tuple(row) for row in json.loads(table.schema.metadata[b"unreadable"])]
                self.finished.append(table)
        tables = [table.replace_schema_metadata(None) for table in self.finished]
        encoded = pa.concat_tables([shard_schema(self.record["dimension"]).empty_table(), *tables])
        kept = self.listing.filter(pc.is_in(self.listing["path"], pa.array(list(self._ready()), pa.string())))
        names = {True: "unchanged", False: "changed", None: "added"}
        numbers = Counter(names[self.known.get(path)] for path in kept["path"].to_pylist())
        there, unreadable = set(self.listing["path"].to_pylist()), {path for path, _ in self.unreadable}
        removed = sum(name not in there and Region.of(name).path not in unreadable for name in self.known)
        left_out = {"hidden": self.images.hidden, "empty": self.persons.empty, "unreadable": sorted(self.unreadable)}
        changes = Changes(**numbers, removed=removed, **left_out, kind=self.persons.kind)
        if not len(kept):
            path, problem = changes.unreadable[0]
            raise CADAError(
                f"None of the {len(changes.unreadable)} images can be read, so nothing was changed. {path}: {problem}."
            )
        kinds = {name: str(kept.schema.field(name).type) for name in kept.column_names[2:]}
        self.record["columns"] = {name: kind.replace("double", "float64") for name, kind in kinds.items()}
        self.record |= self.store.write(kept, encoded)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.record |= {"images": len(kept), "updated": now}
        with written_whole(self.index / RECORD) as temporary:
            temporary.write_text(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        clean(self.index, self.record)
        return changes


def _columns(table: pa.Table, *names: str) -> Iterator[tuple]:
    return zip(*(table[name].to_pylist() for name in names))


def announce_states(index: Path, config: CADAVisionConfig, count: int) -> None:
    """Say how much disk the patch states of `count` images take. A `CADAError` for too much."""
    needed, free = 2 * config.sequence_length * config.hidden_size * count, shutil.disk_usage(index).free
    takes, free_now = f"{max(needed / 1e9, 0.01):.2f} GB", f"{free / 1e9:.2f} GB"
    print(f"Patch states of {counted(count, 'image')} will take {takes}; {free_now} are free.")
    if needed > free:
        raise CADAError(f"{index}: the disk is too small for --keep-patches. Leave it out, or choose another.")


def whole_states(index: Path, config: CADAVisionConfig) -> set[str]:
    """Names of the files in `patches/` that are whole."""
    states = torch.empty(config.sequence_length, config.hidden_size, dtype=torch.float16)
    size = len(save({"states": states}))
    return {path.name for path in own_files(index, PATCHES) if path.stat().st_size == size}


def read_shards(index: Path, record: dict) -> Iterator[tuple[str, pa.Table]]:
    """Names and tables of the finished shards. Damaged ones and those of another model are deleted."""
    for path in shard_files(index):
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
            json.loads(table.schema.metadata[b"unreadable"])
            good = table.schema.metadata[b"model"].decode() == record["digest"]
            good = good and table.schema.equals(shard_schema(record["dimension"]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            good = False
        if good:
            yield path.stem, table
        else:
            path.unlink()


def clean(index: Path, record: dict) -> None:
    """Delete the files of an index that its present state does not refer to."""
    used = {record.get("table"), FOUND}
    if record["keep_patches"]:
        for table in open_store(index, record).tables(["path", "digest"]):
            used |= {states_file(record["digest"], *row) for row in _columns(table, "path", "digest")}
    for path in own_files(index):
        if path.name not in used:
            path.unlink()


class _Batches(torch.utils.data.Dataset):
    """For batches of paths: digests by path, pixel values, and problems by path; decoded by data loader workers."""

    def __init__(self, images: ImageFiles | ImageRows, processor: CADAProcessor, batches: list[list[str]]):
        self.images, self.processor, self.batches = images, processor, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[dict[str, str], torch.Tensor | None, dict[str, str]]:
        digests, pixel_values, problems, frame = {}, [], {}, None
        for path in self.batches[number]:
            region = Region.of(path)
            try:
                if region.frame != frame or region.box is None:  # else they are persons of one image
                    frame, content = None, self.images.read(path)
                    size = self.processor.image_size if region.box is None else None
                    opened = open_image({"bytes": content, "path": None}, size)
                    frame, digest = region.frame, content_digest(content)
                image = opened if region.box is None else cut_out(opened, region.box)
            except (OSError, CADAError) as error:
                problems[path] = f"cannot be decoded: {problem_of(error)}"
                continue
            digests[path] = digest
            pixel_values.append(self.processor(images=image, return_tensors="pt")["pixel_values"])
        return digests, torch.cat(pixel_values) if pixel_values else None, problems


@torch.inference_mode()
def encode_shards(
    model, processor, images, shards: list[Shard], index: Path, record: dict, options: IndexOptions, is_main: bool
) -> None:
    """Encode shards, each into a file of `pending/`; and patch states into `patches/`, if asked."""
    size, hide = options.batch_size, not (options.progress and is_main)
    batches = []  # none crosses shards, so that features do not depend on who encodes which shard
    for _, part in shards:
        batches += [[path for path, _ in part[start : start + size]] for start in range(0, len(part), size)]
    samples = _Batches(images, processor, batches)
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=options.workers, collate_fn=tuple)
    total, stream = sum(map(len, batches)), iter(loader)
    bar = tqdm(total=total, desc="Encoding images", unit="image", disable=hide, leave=False)
    for name, part in shards:
        stamps, rows, features, unreadable = dict(part), [], [], {}
        for _ in range(0, len(part), size):
            digests, pixel_values, problems = next(stream)
            bar.update(len(digests) + len(problems))
            unreadable |= problems
            if pixel_values is None:
                continue
            outputs = model.get_image_features(pixel_values.to(model.device))
            normalised = F.normalize(outputs.pooler_output.float(), dim=-1).cpu().numpy()
            for number, (path, digest) in enumerate(digests.items()):
                if not np.isfinite(normalised[number]).all():
                    unreadable[path] = "has no finite features; does the model give any?"
                    continue
                if record["keep_patches"]:
                    states = outputs.last_hidden_state[number].half().cpu()
                    with written_whole(index / PATCHES / states_file(record["digest"], path, digest)) as temporary:
                        save_file({"states": states}, temporary)
                rows.append((path, stamps[path], digest))
                features.append(normalised[number])
        column = feature_column(np.array(features).reshape(-1, model.config.projection_dim))
        columns = [pa.array([row[place] for row in rows], pa.string()) for place in range(3)]
        table = pa.table([*columns, column], schema=shard_schema(model.config.projection_dim))
        about = {"model": record["digest"], "unreadable": json.dumps(list(unreadable.items()))}
        table = table.replace_schema_metadata(about)
        write_tables(index / PENDING / f"{name}.arrow", table.schema, [table])
    bar.close()
