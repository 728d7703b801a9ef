"""
Index person images, and find among them who fits a sentence, or who is on another image.

    cada index FOLDER --model demo/model --out INDEX
    cada search INDEX "a man in a red coat" --picture out.png

The images may lie in a folder (with subfolders), be named by a CSV or JSONL file together with metadata, or be the
column `image` of a data set. The same as a library: [`build_index`], [`open_index`], [`GalleryIndex`].

An index is a folder. `index.json` names its present table, so replacing this one file is the step from the old state
to the new one. Images are encoded in shards; finished ones wait in `pending/`, and the next run takes them up.
"""

import datetime
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.environment import parse_flag_from_env
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers.utils import logging

from cada.data.images import open_image
from cada.evaluation.encoding import Gallery, Queries, encode_queries
from cada.evaluation.matching import match_candidates
from cada.export import is_export, load_export
from cada.files import CADAError, counted, make_output_folder, only_writer, printable, problem_of, written_whole
from cada.gallery.feedback import refine
from cada.gallery.images import ImageFiles, ImageRows, content_digest, describe_source, open_source, source_arguments
from cada.gallery.persons import Persons, person_settings
from cada.gallery.regions import Box, Region, clock
from cada.gallery.store import (
    FORMAT,
    MEND,
    PATCHES,
    PENDING,
    RECORD,
    Hits,
    check_output,
    index_settings,
    open_store,
    parse_conditions,
    read_record,
    shard_files,
    states_file,
)
from cada.gallery.update import Changes, IndexOptions, Update, encode_shards
from cada.hardware import cpu_has_bfloat16
from cada.hub.convert import load_model_and_processor, origin_of
from cada.hub.loading import commit_of
from cada.hub.record import UNKNOWN_START, search_digest
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor, clean_caption


logger = logging.get_logger(__name__)

_IMAGES_AT_ONCE = 16  # whose patch states are in memory for re-ranking
_WAIT = datetime.timedelta(days=7)  # for the slowest process; a dead one ends the others anyway


@dataclass(frozen=True)
class Result:
    """A ranked image."""

    path: str  # of the file, relative to the indexed folder; of a data set its `file_name` or row number
    score: float  # what it is ranked by: S_G + S_L where `stage` is "local", S_G where it is "global"
    stage: str  # "local" for candidates that the decoder has read with the sentence; they rank before all others
    metadata: dict  # the other columns of the list or data set, by name
    probability: float | None = None  # that it shows the person described, of candidates, by a calibrated model
    box: Box | None = None  # of the person, where it is not the whole image
    time: float | None = None  # of the frame, where the file is a video: seconds since its beginning

    @property
    def name(self) -> str:
        """What [`GalleryIndex.image`] and [`GalleryIndex.frame`] ask for; a path, box and time as a media fragment."""
        return Region(self.path, self.box, self.time).name

    @property
    def place(self) -> str:
        """Where it is, for a reader: the file, and in a video the time."""
        return self.path if self.time is None else f"{self.path} {clock(self.time)}"


def _load(name: str, revision: str | None, device, record: dict | None) -> tuple:
    """
    Model (in evaluation mode, on `device`) and processor of a checkpoint, and the digest of what scores depend on. A
    `CADAError` also where `record` has another digest, or the model is no longer where it was, or for the device.
    """
    if record is not None and name == record["model"] and os.path.isabs(name) and not os.path.exists(name):
        raise CADAError(f"The model of this index was in {name}, which is not there. Say where it is: --model NAME.")
    model, processor = load_export(name) if is_export(name) else load_model_and_processor(name, revision)
    digest = search_digest(model, processor, getattr(model, "weights", None))
    if record is not None and digest != record["digest"]:
        raise CADAError(
            f"The index holds features of {record['model']} as it was then, and {name} has other weights, or other "
            "settings for images and texts. Give the same --model, or make another index."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)
    except (AssertionError, RuntimeError) as error:  # PyTorch raises the first where it was built without CUDA
        raise CADAError(f"The device {device} cannot be used: {error}. Give another --device, or none.") from error
    if model.dtype == torch.bfloat16 and model.device.type == "cpu" and not cpu_has_bfloat16():
        logger.warning(
            f"{name} is in bfloat16, which this processor has no instructions for: float32 is faster, so used."
        )
        model.float()
    return model, processor, digest


def build_index(source: str | os.PathLike, index: str | os.PathLike, model: str | None = None, **options) -> Changes:
    """
    Encode the images of `source` into the folder `index`, or bring an index up to date: new and changed images are
    encoded, removed ones dropped, all others left alone. An image that cannot be read is named and left out.

    An interruption at any moment leaves the old state, and the shards that were finished are not encoded again. Under
    `accelerate launch` all processes share the shards; the result is that of one process.

    Args:
        source: a folder; a CSV or JSONL file with a column `path` (or `file_name`, `image`) and metadata; or a data
            set with a column `image`, saved by `save_to_disk` or on the Hub.
        index: folder of the index.
        model: the checkpoint, of CADA or a `BlipForImageTextRetrieval`; an old index knows its own.
        options: fields of [`IndexOptions`].

    Raises:
        CADAError: where `source` holds no image, the index belongs to another model or source, `index` holds other
            files, another run is at work, or the model cannot be loaded.
    """
    options = IndexOptions(**options)
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state, index = PartialState(cpu=use_cpu, timeout=_WAIT), Path(index)
    record = read_record(index)
    if model is not None and Path(model).is_dir():
        model = str(Path(model).resolve())  # an index is searched from anywhere
    given = vars(options) | {"location": os.fspath(source), "model": model}
    settings = index_settings(index, record, given)
    settings["revision"] = commit_of(settings["model"], settings["revision"])
    place = describe_source(given, record and record["source"])
    settings["persons"] = person_settings(given, record and record["persons"])
    check_output(index, place, record is None)
    images = open_source(place, index if record is not None and place == record["source"] else None)
    make_output_folder(index)  # what keeps from writing shows now, not after the work
    network, processor, digest = _load(settings["model"], settings["revision"], state.device, record)
    for folder in (PENDING, PATCHES) if settings["keep_patches"] else (PENDING,):
        (index / folder).mkdir(exist_ok=True)
    new = {**settings, "origin": origin_of(settings["model"], settings["revision"]), "digest": digest, "source": place}
    with only_writer(index) if state.is_main_process else nullcontext():
        update, plan = None, None
        if state.is_main_process:
            persons = Persons(images, settings["persons"], index, state.device, options.check_content)
            update = _begin(index, record, new, network.config, persons)
            plan = update.plan(record is None, options)
        plan = broadcast_object_list([plan])[0]
        part = plan[state.process_index :: state.num_processes]
        encode_shards(network, processor, images, part, index, new, options, state.is_main_process)
        state.wait_for_everyone()
        changes = update and update.commit([name for name, _ in plan])
    return broadcast_object_list([changes])[0]


def _begin(index: Path, record: dict | None, new: dict, config: CADAConfig, persons: Persons) -> Update:
    """The update of an index whose record becomes one with the fields `new`; for the only process that writes it."""
    if read_record(index) != record:
        raise CADAError(f"Another process has changed {index} meanwhile. Run the command again.")
    # Of Milvus. The same for each run of this command, also where the first one is killed.
    name = uuid5(NAMESPACE_URL, f"{platform.node()}{index.resolve()}{new['digest']}{new['approximate']}")
    first = {"format": FORMAT, "dimension": config.projection_dim, "collection": f"cada_{name.hex[:16]}"}
    vision = config.vision_config if new["keep_patches"] else None
    return Update(index, (record or first) | new, persons, vision)


def open_index(index: str | os.PathLike, model: str | None = None, device: str | None = None) -> "GalleryIndex":
    """
    An index to search in.

    Args:
        index: folder written by [`build_index`].
        model: the checkpoint, where it is no longer where it was; its weights have to be the same.
        device: of the model; the GPU where there is one.

    Raises:
        CADAError: where the folder holds no index, or a damaged one.
    """
    folder = Path(index)
    while record := read_record(folder):
        try:
            return GalleryIndex(folder, record, model or record["model"], device)
        except CADAError:
            if read_record(folder) == record:
                raise
            # Else it was brought up to date at this moment.
    again = f"cada index ... --out {shlex.quote(str(folder))}"
    if finished := len(shard_files(folder)):
        raise CADAError(
            f"{index} holds no index yet, but {counted(finished, 'finished shard')} of an interrupted run. Run the "
            f"same command again to go on: {again}"
        )
    raise CADAError(f"{index} holds no index ({RECORD}). Make one: {again}")


def _content(source: ImageFiles | ImageRows, row: dict) -> bytes:
    content = source.read(row["path"])
    if content_digest(content) != row["digest"]:
        raise CADAError("has changed since it was indexed")
    return content


def _decoded(source: ImageFiles | ImageRows, row: dict, size: tuple[int, int] | None = None) -> Image.Image:
    return open_image({"bytes": _content(source, row), "path": None}, size, Region.of(row["path"]).box)


def _written(persons: dict) -> str:
    """How the persons were found, as `info` says it."""
    if persons["detector"]:
        limits = ", ".join(f"{name} {persons[name]:g}" for name in ("min_score", "min_height", "margin"))
        return f"found by {persons['detector']} ({persons['detector_version']}; {limits})"
    return f"boxes of {persons['boxes']}" if persons["boxes"] else "whole images"


class GalleryIndex:
    """
    An index, opened by [`open_index`]. `len(index)` is its number of images.

    Attributes:
        columns: name and type of the metadata columns, which `where` can ask for.
        left_out: images that the last search left out, and why: gone, or changed since they were indexed.
        cut: sentences of the last search that are longer than what the model reads, and the words at which it stops.
    """

    def __init__(self, folder: Path, record: dict, model: str, device: str | None = None):
        self.folder, self.record, self.model_name, self.device = folder, record, model, device
        self.columns: dict[str, str] = record["columns"]
        self.left_out: dict[str, str] = {}
        self.cut: dict[str, str] = {}
        self.store = open_store(folder, record)
        if len(self) < record["images"]:
            right = " Is it the right Milvus?" if record["uri"] else ""
            raise CADAError(
                f"{self.store.place} holds {len(self):,} images, and {record['images']:,} were written.{right} {MEND}"
            )

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def _loaded(self) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
        revision = self.record["revision"] if self.model_name == self.record["model"] else None
        return _load(self.model_name, revision, self.device, self.record)[:2]

    @property
    def model(self) -> CADAForTextToImageRetrieval:
        """The checkpoint, loaded at first use. A `CADAError` where weights or settings are others than indexed."""
        return self._loaded[0]

    @property
    def processor(self) -> CADAProcessor:
        """The processor of the model."""
        return self._loaded[1]

    @cached_property
    def source(self) -> ImageFiles | ImageRows:
        """Where the images are. A `CADAError` where they are no more."""
        return open_source(self.record["source"], self.folder)

    @property
    def _remedy(self) -> str:
        out = shlex.quote(str(self.folder))
        return f"Bring the index up to date: cada index {source_arguments(self.record['source'])} --out {out}"

    def search(
        self,
        sentences: str | Sequence[str],
        top: int = 10,
        rerank: int | None = None,
        where: str | Sequence[str] = (),
        image: Image.Image | None = None,
        like: Sequence[str] = (),
        unlike: Sequence[str] = (),
    ) -> list[list[Result]]:
        """
        The `top` images for every sentence, best first. A candidate of re-ranking whose image is gone or has changed
        is left out, with a warning (see `left_out`); other images are not read, so it is not seen. A sentence that is
        too long for the model is searched as far as the model reads, with a warning (see `cut`).

        Args:
            sentences: one or any number of them; there is a list of results for each.
            top: images per sentence.
            rerank: how many candidates of the global ranking the decoder reads; `config.rerank_k` by default, 0 for
                none.
            where: conditions on metadata, such as `"camera=3"`; operators `=`, `!=`, `<`, `<=`, `>`, `>=`. All have to
                hold. They count before ranking. Dates and times of a list are compared as text.
            image: a photo that every sentence says something about: "but in blue trousers". [`refine`] adds it.
            like, unlike: names of results of an earlier search that show the person, or another one. They are ranked
                as all others.

        Raises:
            CADAError: for an empty sentence, an unknown column or path, or where the folder of the images is gone.
        """
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        self.left_out = {}
        conditions = parse_conditions(where, self.columns)
        rerank = self._candidates(top, rerank)
        if not sentences:
            return []
        queries = self.encode_sentences(sentences)
        asked = self._refined(queries.embeds, image, like, unlike)
        found = self._nearest(asked, max(top, rerank), conditions)
        local_scores = self._local_scores(queries, [[row for _, row in hits[:rerank]] for hits in found])
        if self.left_out:  # others take their places; an approximate index may name more images in another order
            more = self._nearest(asked, max(top, rerank) + len(self.left_out), conditions)
            for hits, others in zip(found, more):
                near = {row["path"] for _, row in hits[:rerank]}
                hits[rerank:] = [hit for hit in others if hit[1]["path"] not in near]
            path, problem = next(iter(self.left_out.items()))
            others = " and others" if len(self.left_out) > 1 else ""
            many = counted(len(self.left_out), "image")
            logger.warning(f"{many} left out: {printable(path)} ({problem}){others}. {self._remedy}")
        # The probability is of a sentence alone.
        calibrated = image is None and not like and not unlike
        return [self._ranked(hits, scores, calibrated)[:top] for hits, scores in zip(found, local_scores)]

    def _candidates(self, top: int, rerank: int | None) -> int:
        """How many candidates the decoder reads."""
        if top < 1 or (rerank is not None and rerank < 0):
            raise CADAError(f"top is {top} and rerank {rerank}. Give 1 or more, and 0 or more.")
        config = self.model.config
        if rerank and not config.use_atp:
            raise CADAError("This model has no match head (`use_atp=False`): give --rerank 0.")
        return rerank if rerank is not None else config.rerank_k if config.use_atp else 0

    def encode_sentences(self, sentences: Sequence[str]) -> Queries:
        """
        Features and word pieces of sentences; `cut` says which ones the model does not read to their end, and warns. A
        `CADAError` for an empty one.
        """
        self.cut = {}
        for sentence in sentences:
            if not clean_caption(sentence):
                raise CADAError(f"The sentence {sentence!r} is empty. Describe a person.")
        queries = encode_queries(self.model, self.processor, list(sentences), progress=len(sentences) > 1000)
        options = {"truncation": True, "return_overflowing_tokens": True, "return_offsets_mapping": True}
        for sentence, length in zip(sentences, queries.attention_mask.sum(dim=1).tolist()):
            text = clean_caption(sentence)
            parts = self.processor.tokenizer(text, max_length=length, **options)
            if len(parts["input_ids"]) > 1:
                end = parts["offset_mapping"][0][length - 2][1]  # before the token that ends a sentence
                self.cut[sentence] = words = " ".join(text[:end].split()[-3:])
                logger.warning(f"The sentence {sentence!r:.60} is too long: the model reads it up to {words!r}.")
        return queries

    @torch.inference_mode()
    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised features `(images, d)` and patch states `(images, 1 + patches, hidden)`, on the CPU."""
        outputs = self.model.get_image_features(pixel_values.to(self.model.device))
        return F.normalize(outputs.pooler_output.float(), dim=-1).cpu(), outputs.last_hidden_state.cpu()

    def search_image(
        self,
        image: Image.Image,
        top: int = 10,
        where: str | Sequence[str] = (),
        like: Sequence[str] = (),
        unlike: Sequence[str] = (),
    ) -> list[Result]:
        """The `top` images most similar to `image` by global features: the same person, if the gallery shows them."""
        return self.search_features(self._refined(self._feature_of(image), None, like, unlike), top, where)[0]

    def search_features(
        self, features: torch.Tensor, top: int = 10, where: str | Sequence[str] = ()
    ) -> list[list[Result]]:
        """The `top` images most similar to each of the `features` `(queries, d)`, by global features."""
        self._candidates(top, 0)
        self.left_out, self.cut = {}, {}
        conditions = parse_conditions(where, self.columns)
        return [self._ranked(hits, []) for hits in self._nearest(features, top, conditions)]

    def _feature_of(self, image: Image.Image) -> torch.Tensor:
        return self.encode_images(self.processor(images=image, return_tensors="pt")["pixel_values"])[0]

    def _refined(
        self, queries: torch.Tensor, image: Image.Image | None, like: Sequence[str], unlike: Sequence[str]
    ) -> torch.Tensor:
        """[`refine`] with the photo and the marked images."""
        try:
            right, wrong = self.store.features(list(like)), self.store.features(list(unlike))
        except KeyError as error:
            raise CADAError(
                f"The index holds no image {error.args[0]!r}. Give a path as a search shows it."
            ) from error
        return refine(queries, right if image is None else torch.cat([right, self._feature_of(image)]), wrong)

    def _nearest(self, queries: torch.Tensor, k: int, conditions: list) -> Hits:
        """The best `k` rows for each of `queries`, which need no length of 1 here."""
        lengths = queries.norm(dim=1, keepdim=True)
        found = self.store.search(queries / lengths, k, conditions)
        return [[(length * score, row) for score, row in hits] for length, hits in zip(lengths[:, 0].tolist(), found)]

    def _ranked(
        self, hits: list[tuple[float, dict]], local_scores: list[float], calibrated: bool = False
    ) -> list[Result]:
        """Candidates by S_G + S_L, then all others by S_G, without those that are left out."""
        known = torch.tensor([score for score, _ in hits[: len(local_scores)]])
        chances = self.model.config.match_probability(known, torch.tensor(local_scores)) if calibrated else None
        chances = [None] * len(known) if chances is None else chances.tolist()
        near = [
            (score + local, row, "local", chance) for (score, row), local, chance in zip(hits, local_scores, chances)
        ]
        near.sort(key=lambda hit: (-hit[0], hit[1]["path"]))
        far = [(*hit, "global", None) for hit in hits[len(local_scores) :]]
        return [
            self._result(row, score, stage, chance)
            for score, row, stage, chance in near + far
            if row["path"] not in self.left_out
        ]

    def _result(self, row: dict, score: float, stage: str, chance: float | None) -> Result:
        path, box, time = Region.of(row["path"])
        return Result(path, score, stage, {name: row[name] for name in self.columns}, chance, box, time)

    def _local_scores(self, queries: Queries, candidates: list[list[dict]]) -> list[list[float]]:
        """S_L of each query's candidates. The patch states of an image are needed once, whatever the queries."""
        rows = list({row["path"]: row for candidate in candidates for row in candidate}.values())
        if not rows:
            return [[] for _ in candidates]
        number_of = {row["path"]: number for number, row in enumerate(rows)}
        table = [torch.tensor([number_of[row["path"]] for row in each], dtype=torch.long) for each in candidates]
        # An approximate index may find fewer candidates for one sentence than for another: 0 fills up.
        padded = torch.nn.utils.rnn.pad_sequence(table, batch_first=True)
        config, size = self.model.config.vision_config, _IMAGES_AT_ONCE
        empty = torch.empty(0, config.sequence_length, config.hidden_size, dtype=self.model.dtype)

        def encode(batches: list[int]) -> Iterator[torch.Tensor]:
            return (self._states(rows[batch * size : (batch + 1) * size]) for batch in batches)

        gallery = Gallery(torch.empty(0), empty, batch_size=size, encode=encode)
        scores = match_candidates(self.model, queries, gallery, padded, progress=padded.numel() > 1000)
        return [row[: len(numbers)] for row, numbers in zip(scores.tolist(), table)]

    def _states(self, rows: list[dict]) -> torch.Tensor:
        """Patch states `(rows, 1 + patches, hidden)`: kept ones, or of the image files. Zeros for those `left_out`."""
        kept, config, size = self.record["keep_patches"], self.model.config.vision_config, self.processor.image_size
        source = None if kept else self.source  # where no image is there, that is an error of all, not of each
        good, found = [], []
        for number, row in enumerate(rows):
            try:
                found.append(self._kept_states(row) if kept else _decoded(source, row, size))
                good.append(number)
            except (OSError, CADAError, SafetensorError) as error:
                self.left_out[row["path"]] = problem_of(error)
        states = torch.zeros(len(rows), config.sequence_length, config.hidden_size)
        if found and kept:
            states[good] = torch.stack(found).float()
        elif found:
            pixel_values = self.processor(images=found, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                states[good] = self.model.encode_images(pixel_values.to(self.model.device)).float().cpu()
        return states

    def _kept_states(self, row: dict) -> torch.Tensor:
        name = states_file(self.record["digest"], row["path"], row["digest"])
        return load_file(self.folder / PATCHES / name)["states"]

    def image(self, name: str) -> Image.Image:
        """
        The image of this name (see [`Result`]), upright, cut out where it has a box; a `CADAError` where it is not in
        the index, gone, or has changed since.
        """
        return self._shown(name, Region.of(name))

    def frame(self, name: str) -> Image.Image:
        """The whole image, or frame of the video, that the box of this name is in; errors as of [`image`]."""
        return self._shown(name, Region.of(name).frame)

    def _shown(self, name: str, region: Region) -> Image.Image:
        row = self.store.find(name)
        if row is None:
            raise CADAError(f"The index holds no image {name!r}.")
        source = self.source
        try:
            return open_image({"bytes": _content(source, row), "path": None}, box=region.box)
        except (OSError, CADAError) as error:
            raise CADAError(f"The image {name} cannot be shown: {problem_of(error)}. {self._remedy}") from error

    def info(self) -> dict:
        """What the index holds and how: a flat dictionary, sizes in bytes."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        origin = self.record["origin"] or UNKNOWN_START
        return {
            "images": len(self),
            "columns": self.columns,
            "source": self.record["source"]["location"],
            "persons": _written(self.record["persons"]),
            "model": self.record["model"],
            "revision": self.record["revision"] or "none",
            "weights_from": origin["start"],
            "licence": origin["licence"] or "none",
            "digest": self.record["digest"],
            "dimension": self.record["dimension"],
            "store": f"milvus at {self.record['uri']}" if self.record["uri"] else "arrow",
            "search": self.record["approximate"] or "exact",
            "keep_patches": self.record["keep_patches"],
            "bytes": sum(path.stat().st_size for path in files),
            "updated": self.record["updated"],
            "unfinished_shards": len(shard_files(self.folder)),
        }

    def verify(self, progress: bool = True) -> list[tuple[str, str]]:
        """Compare every image with what was indexed. Returns `(path, problem)`; nothing where all is well."""
        problems, source = [], self.source
        with tqdm(total=len(self), desc="Verifying images", unit="image", disable=not progress, leave=False) as bar:
            for table in self.store.tables(["path", "digest"]):
                for row in table.to_pylist():
                    bar.update()
                    try:
                        _content(source, row)
                    except (OSError, CADAError) as error:
                        problem = f"cannot be read: {problem_of(error)}" if isinstance(error, OSError) else str(error)
                        problems.append((row["path"], problem))
        return problems

    def export(self, path: str | os.PathLike) -> int:
        """
        Write `path`, `box` (x, y, width, height; empty for a whole image), `digest`, metadata and `feature` of all
        images as a Parquet file; returns their number.
        """
        count = 0
        with ExitStack() as stack:
            temporary = stack.enter_context(written_whole(Path(path)))
            writer = None
            for table in self.store.tables(["path", "digest", *self.columns, "feature"]):
                regions = [Region.of(name) for name in table["path"].to_pylist()]
                boxes = pa.array([region.box for region in regions], pa.list_(pa.int64(), 4))
                table = table.set_column(0, "path", pa.array([region.path for region in regions]))
                table = table.add_column(1, "box", boxes)
                writer = writer or stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table)
                count += len(table)
        return count


class LiveIndex:
    """
    An index that is opened again once `cada index` has brought its folder up to date. It answers several threads, one
    after the other, as an index has one model and remembers its last search.

    Attributes:
        gallery: the index as it was opened last.
    """

    def __init__(self, gallery: GalleryIndex):
        self.gallery, self._lock = gallery, RLock()

    def _present(self) -> GalleryIndex:
        old = self.gallery
        if read_record(old.folder) != old.record:
            self.gallery = open_index(old.folder, old.model_name, old.device)
            if self.gallery.record["digest"] == old.record["digest"]:
                self.gallery._loaded = old._loaded
        return self.gallery

    def ask(self, question: Callable[[GalleryIndex], Any]) -> Any:
        """What `question(index)` gives; asked once more where it fails because the index is replaced meanwhile."""
        with self._lock:
            gallery = self._present()
            try:
                return question(gallery)
            except Exception:  # files of the old state may be gone, and each library has its own error for that
                if self._present() is gallery:
                    raise
            return question(self.gallery)
