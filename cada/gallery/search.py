"""Search in an index: by sentences, by images, with what was found marked as right or wrong."""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers.utils import logging

from cada.data.images import open_image
from cada.evaluation.encoding import Gallery, Queries, encode_queries
from cada.evaluation.matching import match_candidates
from cada.export import is_export, load_export
from cada.files import CADAError, counted, printable, problem_of, written_whole
from cada.gallery.feedback import refine
from cada.gallery.images import ImageFiles, ImageRows, content_digest, open_source, source_arguments
from cada.gallery.regions import Box, Region, clock
from cada.gallery.store import (
    MEND,
    PATCHES,
    Condition,
    Hits,
    open_store,
    parse_conditions,
    shard_files,
    states_file,
)
from cada.hardware import cpu_has_bfloat16
from cada.hub.convert import load_model_and_processor
from cada.hub.record import UNKNOWN_START, search_digest
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor, clean_caption


logger = logging.get_logger(__name__)

_IMAGES_AT_ONCE = 16  # whose patch states are in memory for re-ranking


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


class Ranking(list[Result]):
    """
    The images for one query, the best first.

    Attributes:
        nobody_fits: no image is as probable as was asked for; the list is as if nothing had been asked for.
        read_up_to: the last words that were read of a sentence that is longer than what the model reads.
        left_out: candidates of re-ranking that are gone, or have changed since they were indexed, and why.
    """

    def __init__(
        self,
        results: Iterable[Result],
        nobody_fits: bool = False,
        read_up_to: str | None = None,
        left_out: dict[str, str] | None = None,
    ):
        super().__init__(results)
        self.nobody_fits, self.read_up_to, self.left_out = nobody_fits, read_up_to, left_out or {}


def load_model_of_index(name: str, revision: str | None, device, record: dict | None) -> tuple:
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
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # PyTorch raises the first where it was built without CUDA
        raise CADAError(f"The device {device} cannot be used: {error}. Give another --device, or none.") from error
    if model.dtype == torch.bfloat16 and model.device.type == "cpu" and not cpu_has_bfloat16():
        logger.warning(
            f"{name} is in bfloat16, which this processor has no instructions for: float32 is faster, so used."
        )
        model.float()
    return model, processor, digest


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
    """

    def __init__(self, folder: Path, record: dict, model: str, device: str | None = None):
        self.folder, self.record, self.model_name, self.device = folder, record, model, device
        self.columns: dict[str, str] = record["columns"]
        self._source: ImageFiles | ImageRows | None = None
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
        return load_model_of_index(self.model_name, revision, self.device, self.record)[:2]

    @property
    def model(self) -> CADAForTextToImageRetrieval:
        """The checkpoint, loaded at first use. A `CADAError` where weights or settings are others than indexed."""
        return self._loaded[0]

    @property
    def processor(self) -> CADAProcessor:
        """The processor of the model."""
        return self._loaded[1]

    @property
    def source(self) -> ImageFiles | ImageRows:
        """Where the images are. A `CADAError` where they are no more."""
        if self._source is None or not self._source.is_there:
            self._source = open_source(self.record["source"], self.folder)
        return self._source

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
        min_probability: float | None = None,
    ) -> list[Ranking]:
        """
        The `top` images for every sentence, best first. A candidate of re-ranking whose image is gone or has changed
        is left out, with a warning, and the next one takes its place; other images are not read, so it is not seen. A
        sentence that is too long for the model is searched as far as the model reads, with a warning.

        Args:
            sentences: one or any number of them; there is a [`Ranking`] for each.
            top: images per sentence.
            rerank: how many candidates of the global ranking the decoder reads; `config.rerank_k` by default, 0 for
                none.
            where: conditions on metadata, such as `"camera=3"`; operators `=`, `!=`, `<`, `<=`, `>`, `>=`. All have to
                hold. They count before ranking. Dates and times of a list are compared as text.
            image: a photo that every sentence says something about: "but in blue trousers". [`refine`] adds it.
            like, unlike: names of results of an earlier search that show the person, or another one. They are ranked
                as all others.
            min_probability: only candidates that are so probable, of all that the decoder reads.

        Raises:
            CADAError: for an empty sentence, an unknown column or path, or where the folder of the images is gone; for
                `min_probability` where there are no probabilities, see [`check`].
        """
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        alone = image is None and not like and not unlike  # the probability is of a sentence alone
        conditions, rerank = self.check(top, rerank, where, min_probability, alone)
        if not sentences:
            return []
        queries, ends = self.encode_sentences(sentences)
        asked = self._refined(queries.embeds, image, like, unlike)
        gone: list[dict[str, str]] = [{} for _ in sentences]
        for _ in range(2):  # the second time others take the places of those that are gone
            found = self._nearest(asked, max(top, rerank) + max(map(len, gone)), conditions)
            found = [[hit for hit in hits if hit[1]["path"] not in own] for hits, own in zip(found, gone)]
            candidates = [[row for _, row in hits[:rerank]] for hits in found]
            local_scores, problems = self._local_scores(queries, candidates)
            for rows, own in zip(candidates, gone):
                own |= {row["path"]: problems[row["path"]] for row in rows if row["path"] in problems}
            if not problems:
                break
        self._warn({path: problem for own in gone for path, problem in own.items()})
        rankings = []
        for hits, scores, end, own in zip(found, local_scores, ends, gone):
            results = fitting = self._ranked(hits, scores, own, alone)
            if min_probability is not None:
                fitting = [result for result in results if (result.probability or 0) >= min_probability]
            nobody_fits = min_probability is not None and not fitting
            rankings.append(Ranking((fitting or results)[:top], nobody_fits, end, own))
        return rankings

    def check(
        self,
        top: int = 1,
        rerank: int | None = None,
        where: str | Sequence[str] = (),
        min_probability: float | None = None,
        alone: bool = True,
    ) -> tuple[list[Condition], int]:
        """
        The conditions of a search, and how many candidates the decoder reads; for the arguments see [`search`].
        `alone`: there is a sentence, and neither a photo nor marked images beside it.

        Raises:
            CADAError: for what this index, or its model, cannot answer.
        """
        if top < 1 or (rerank is not None and rerank < 0):
            raise CADAError(f"top is {top} and rerank {rerank}. Give 1 or more, and 0 or more.")
        config = self.model.config
        if rerank and not config.use_atp:
            raise CADAError("This model has no match head (`use_atp=False`): give --rerank 0.")
        rerank = rerank if rerank is not None else config.rerank_k if config.use_atp else 0
        if min_probability is not None and not alone:
            raise CADAError("A probability is of a sentence alone. Leave the minimum out, or what is beside it.")
        if min_probability is not None and not rerank:
            raise CADAError("A probability is of what the decoder has read, and rerank is 0. Leave one of both out.")
        if min_probability is not None and config.calibration is None:
            raise CADAError("This model is not calibrated, so there are no probabilities: cada calibrate MODEL.")
        return parse_conditions(where, self.columns), rerank

    def _warn(self, left_out: dict[str, str]) -> None:
        for path, problem in list(left_out.items())[:1]:
            others = " and others" if len(left_out) > 1 else ""
            many = counted(len(left_out), "image")
            logger.warning(f"{many} left out: {printable(path)} ({problem}){others}. {self._remedy}")

    def encode_sentences(self, sentences: Sequence[str]) -> tuple[Queries, list[str | None]]:
        """
        Features and word pieces of sentences; for each, with a warning, the last words that the model reads of it
        where it is too long. A `CADAError` for an empty one.
        """
        for sentence in sentences:
            if not clean_caption(sentence):
                raise CADAError(f"The sentence {sentence!r} is empty. Describe a person.")
        queries = encode_queries(self.model, self.processor, list(sentences), progress=len(sentences) > 1000)
        options = {"truncation": True, "return_overflowing_tokens": True, "return_offsets_mapping": True}
        ends: list[str | None] = [None] * len(sentences)
        for number, length in enumerate(queries.attention_mask.sum(dim=1).tolist()):
            text = clean_caption(sentences[number])
            parts = self.processor.tokenizer(text, max_length=length, **options)
            if len(parts["input_ids"]) > 1:
                end = parts["offset_mapping"][0][length - 2][1]  # before the token that ends a sentence
                ends[number] = words = " ".join(text[:end].split()[-3:])
                shown = shorten(sentences[number], 60, placeholder=" ...")
                logger.warning(f"The sentence {shown!r} is too long: the model reads it up to {words!r}.")
        return queries, ends

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
    ) -> Ranking:
        """The `top` images most similar to `image` by global features: the same person, if the gallery shows them."""
        return self.search_features(self._refined(self._feature_of(image), None, like, unlike), top, where)[0]

    def search_features(self, features: torch.Tensor, top: int = 10, where: str | Sequence[str] = ()) -> list[Ranking]:
        """The `top` images most similar to each of the `features` `(queries, d)`, by global features."""
        conditions, _ = self.check(top, 0, where)
        return [Ranking(self._ranked(hits, [], {})) for hits in self._nearest(features, top, conditions)]

    def _feature_of(self, image: Image.Image) -> torch.Tensor:
        return self.encode_images(self.processor(images=image, return_tensors="pt")["pixel_values"])[0]

    def _refined(
        self, queries: torch.Tensor, image: Image.Image | None, like: Sequence[str], unlike: Sequence[str]
    ) -> torch.Tensor:
        """[`refine`] with the photo and the marked images."""
        if both := sorted({*like} & {*unlike}):
            raise CADAError(f"{both[0]!r} is marked as right and as wrong. Decide.")
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
        self, hits: list[tuple[float, dict]], local_scores: list[float], left_out: dict, calibrated: bool = False
    ) -> list[Result]:
        """Candidates by S_G + S_L, then all others by S_G, without those that are `left_out`."""
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
            if row["path"] not in left_out
        ]

    def _result(self, row: dict, score: float, stage: str, chance: float | None) -> Result:
        path, box, time = Region.of(row["path"])
        return Result(path, score, stage, {name: row[name] for name in self.columns}, chance, box, time)

    def _local_scores(
        self, queries: Queries, candidates: list[list[dict]]
    ) -> tuple[list[list[float]], dict[str, str]]:
        """
        S_L of each query's candidates, and what is wrong with images that cannot be read, by path. The patch states of
        an image are needed once, whatever the queries.
        """
        rows = list({row["path"]: row for candidate in candidates for row in candidate}.values())
        if not rows:
            return [[] for _ in candidates], {}
        number_of = {row["path"]: number for number, row in enumerate(rows)}
        table = [torch.tensor([number_of[row["path"]] for row in each], dtype=torch.long) for each in candidates]
        # An approximate index may find fewer candidates for one sentence than for another: 0 fills up.
        padded = torch.nn.utils.rnn.pad_sequence(table, batch_first=True)
        config, size, problems = self.model.config.vision_config, _IMAGES_AT_ONCE, {}
        empty = torch.empty(0, config.sequence_length, config.hidden_size, dtype=self.model.dtype)

        def encode(batches: list[int]) -> Iterator[torch.Tensor]:
            return (self._states(rows[batch * size : (batch + 1) * size], problems) for batch in batches)

        gallery = Gallery(torch.empty(0), empty, batch_size=size, encode=encode)
        scores = match_candidates(self.model, queries, gallery, padded, progress=padded.numel() > 1000)
        return [row[: len(numbers)] for row, numbers in zip(scores.tolist(), table)], problems

    def _states(self, rows: list[dict], problems: dict[str, str]) -> torch.Tensor:
        """
        Patch states `(rows, 1 + patches, hidden)`: kept ones, or of the image files. Zeros for what cannot be read,
        which is put into `problems`.
        """
        kept, config, size = self.record["keep_patches"], self.model.config.vision_config, self.processor.image_size
        source = None if kept else self.source  # where no image is there, that is an error of all, not of each
        good, found = [], []
        for number, row in enumerate(rows):
            try:
                found.append(self._kept_states(row) if kept else _decoded(source, row, size))
                good.append(number)
            except (OSError, CADAError, SafetensorError) as error:
                problems[row["path"]] = problem_of(error)
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
