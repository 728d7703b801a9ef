"""
Pairs for pre-training, streamed from any data set of `datasets`: images with captions, without persons.

The order of the pairs follows from the seed, the files and the batch of all processes, never from the number of
processes or workers. The files are dealt into *lanes*, as many as divide both their number and that batch. A lane
reads its files in an order of its own, a *window* of rows at a time, and shuffles each window. A batch takes equally
many pairs of every lane, and a process reads the lanes that its part of the batch comes from. A checkpoint keeps where
the present window of each lane begins: from there training goes on with the same pair.

Rows are read in the main process; its workers decode the images and find the attribute phrases.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import IterableDataset, load_dataset
from transformers.utils import logging

from cada.data.images import open_image
from cada.data.pairs import PairCollator
from cada.data.pedes import check_caption
from cada.files import CADAError, counted, one_line, read_json, written_whole
from processing_cada import AttributeMasker, clean_caption


logger = logging.get_logger(__name__)

# Builders of `datasets` for files that are named.
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}
FIRST_ROWS = 100  # looked at before a training begins
MAX_UNREADABLE, FIRST_UNREADABLE = 0.01, 10  # share of the pairs that may be unreadable; and how many always may
STATE_FILE = "cada_stream_{}.json"  # in a checkpoint, of each process


@dataclass(frozen=True)
class Columns:
    """
    Names of the columns; `a.b` is the field b of the column a.

    Args:
        image: images, contents of files, or names of files.
        captions: columns of texts, or of lists of texts. Each time that a row is read, one of its texts is drawn.
        person: numbers or texts; without it every image is a person of its own.
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    person: str | None = None


class Start(NamedTuple):
    """Where a window of a lane begins: rows before it, its pass, its number in that, the state of the rows."""

    rows: int = 0
    lane_pass: int = 0
    window: int = 0
    state: dict | None = None


class StreamedRow(NamedTuple):
    """A row as the stream gives it, the number of the pair in the training, the seed of all that is drawn of it."""

    row: dict
    pair: int
    seed: int


def open_rows(dataset: str, data_dir: str | os.PathLike | None = None, revision: str | None = None) -> IterableDataset:
    """
    The split `train` of a data set, streamed, with images that are not decoded.

    Args:
        dataset: files (`"captions.jsonl"`, `"shards/*.tar"`), or a folder or name that `load_dataset` takes.
        data_dir: with a folder or name, as for `load_dataset`.
        revision: of a set on the Hub.

    Raises:
        CADAError: where it cannot be opened.
    """
    builder = BUILDERS.get(Path(dataset).suffix)
    is_files = builder is not None and (os.path.isfile(dataset) or has_magic(dataset))
    arguments = (builder, {"data_files": dataset}) if is_files else (dataset, {"data_dir": data_dir})
    try:
        rows = load_dataset(arguments[0], **arguments[1], revision=revision, split="train", streaming=True)
        return rows if rows.features is None else rows.decode(False)
    except Exception as error:  # the library raises many kinds
        raise CADAError(
            f"Cannot stream {dataset!r} ({type(error).__name__}: {one_line(error)}). Give files (*.parquet, *.tar, "
            "*.jsonl), a folder of such files, or a name on the Hub, with a split `train`."
        ) from error


def _value(row: dict, column: str):
    """The value of a column, or of a field in it."""
    if column in row:
        return row[column]
    for name in column.split("."):
        if not isinstance(row, dict) or name not in row:
            return None
        row = row[name]
    return row


def _texts(row: dict, column: str) -> list:
    """The value of a column, or the values of the list that it is."""
    value = _value(row, column)
    return value if isinstance(value, list) else [] if value is None else [value]


def _number_of(text: str) -> int:
    """A number of 63 bits, the same for the same text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()) >> 1


class StreamPairs(torch.utils.data.Dataset):
    """
    Reads lists of [`StreamedRow`], in the workers of a data loader. In the place of a pair that cannot be read stands
    the next one of the list once more; the key `unreadable` of the first sample tells which they are, and it is the
    only one where no pair can be read.

    Args:
        rows: of [`open_rows`].
        name: of the data set, for messages.
        columns: where image, caption and person stand.
        folder: the one that names of image files are relative to.
        buffer: rows that are shuffled at a time, of all lanes together.
        image_size: height and width that the model reads, see [`open_image`].
        masker: finds the attribute phrases, for ARA.

    Raises:
        CADAError: where the first rows show that the columns are not what they should be.
    """

    def __init__(
        self,
        rows: IterableDataset,
        name: str,
        columns: Columns = Columns(),
        folder: str | os.PathLike = "",
        buffer: int = 10_000,
        image_size: tuple[int, int] | None = None,
        masker: AttributeMasker | None = None,
    ):
        self.rows, self.name, self.columns, self.folder = rows, name, columns, Path(folder)
        self.buffer, self.image_size, self.masker = buffer, image_size, masker
        try:
            first = list(islice(rows, FIRST_ROWS))
        except Exception as error:  # the library raises many kinds
            raise CADAError(f"The first rows of {name} cannot be read: {one_line(error)}. Is it complete?") from error
        self._check(first)
        begin = hashlib.sha256(json.dumps([self._captions(row) for row in first], default=str).encode())
        self.identity = {  # with another one it is another training
            "files of the stream": rows.num_shards,
            "captions of its first rows": begin.hexdigest()[:16],
            "image_column": columns.image,
            "caption_column": " ".join(columns.captions),
            "person_column": columns.person,
            "shuffle_buffer": buffer,
        }

    def _check(self, rows: list[dict]) -> None:
        if not rows:
            raise CADAError(f"{self.name} has no rows in its split `train`.")
        there, wanted = ", ".join(rows[0]), [self.columns.image, *self.columns.captions, self.columns.person]
        for column in filter(None, wanted):
            if not any(_texts(row, column) for row in rows):
                raise CADAError(
                    f"{self.name}: the column `{column}` is missing, or empty in the first {counted(len(rows), 'row')}"
                    f". Name others by --image_column, --caption_column, --person_column; it has {there}."
                )
        for column in self.columns.captions:
            texts = [text for row in rows for text in _texts(row, column)]
            if not any(isinstance(text, str) and len(text.split()) > 1 for text in texts):
                raise CADAError(
                    f"{self.name}: the column `{column}` holds no sentences; its first value is {texts[0]!r:.80}. "
                    f"Name the column of the captions by --caption_column; it has {there}."
                )
        problems = []
        for row in rows:
            try:
                open_image(self._image(row), self.image_size)
                return
            except CADAError as error:
                problems.append(f"{self._name(row)}: {error}")
        raise CADAError(
            f"{self.name}: none of the first {counted(len(rows), 'image')} in the column `{self.columns.image}` can "
            f"be read. {problems[0]}. Name the column by --image_column, the folder of image files by --data_dir; it "
            f"has {there}."
        )

    def _image(self, row: dict) -> dict:
        """Path and content, as [`open_image`] takes them."""
        image = _value(row, self.columns.image)
        image = {"bytes": image} if isinstance(image, bytes) else {"path": image} if isinstance(image, str) else image
        if not isinstance(image, dict):
            raise CADAError(f"the value is no image, but {type(image).__name__}")
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is not None and "://" not in path:
            path = str(self.folder / path)
        return {"bytes": content, "path": path}

    def _name(self, row: dict) -> str:
        """By which a reader finds the row: the name of its image, else its caption."""
        image = _value(row, self.columns.image)
        name = image.get("path") if isinstance(image, dict) else image
        if isinstance(name, str):
            return name
        caption = next(iter(self._captions(row)), None)
        return str(row.get("__key__") or f"the image with the caption {caption!r:.80}")

    def _captions(self, row: dict) -> list:
        return [text for column in self.columns.captions for text in _texts(row, column)]

    def _person(self, streamed: StreamedRow) -> int:
        if self.columns.person is None:
            return streamed.pair
        person = _value(streamed.row, self.columns.person)
        if isinstance(person, str):
            return _number_of(person)
        if not isinstance(person, int) or abs(person) >= 2**63:
            raise CADAError(f"the person is {person!r:.80}, neither a whole number nor a text")
        return person

    def __getitems__(self, batch: list[StreamedRow]) -> list[dict]:
        samples, unreadable = [], []
        for streamed in batch:
            name = f"{self._name(streamed.row)} (pair {streamed.pair} of the stream)"
            try:
                samples.append({**self._sample(streamed), "name": name})
            except CADAError as error:
                samples.append(None)
                unreadable.append(f"{name}: {error}")
        if not any(samples):
            return [{"unreadable": unreadable}]
        instead = next(filter(None, samples))  # for the last ones, after which none can be read
        for place in reversed(range(len(samples))):
            instead = samples[place] = samples[place] or instead
        samples[0] = {**samples[0], "unreadable": unreadable}
        return samples

    def _sample(self, streamed: StreamedRow) -> dict:
        captions = self._captions(streamed.row) or [None]
        caption = captions[streamed.seed % len(captions)]
        if not isinstance(caption, str):
            raise CADAError(f"the caption (column {', '.join(self.columns.captions)}) is {caption!r:.80}, not a text")
        check_caption(caption, "the caption")
        sample = {
            "image": open_image(self._image(streamed.row), self.image_size),
            "caption": caption,
            "person_id": self._person(streamed),
            "pair": streamed.pair,
            "seed": streamed.seed,
        }
        return sample if self.masker is None else {**sample, "attribute_spans": [*self.masker.find_spans(caption)]}


class StreamCollator(PairCollator):
    """
    As [`PairCollator`], and `caption_ids`, equal for equal captions, `names` of the pairs, and `unreadable`, messages
    of those in whose place others stand.
    """

    def __call__(self, samples: list[dict]) -> dict:
        unreadable = samples[0]["unreadable"]
        if "caption" not in samples[0]:
            return {"pair": torch.empty(len(unreadable)), "unreadable": unreadable}
        caption_ids = [_number_of(clean_caption(sample["caption"])) for sample in samples]
        names = [sample["name"] for sample in samples]
        inputs = {**super().__call__(samples), "caption_ids": torch.tensor(caption_ids)}
        return {**inputs, "names": names, "unreadable": unreadable}


@dataclass
class Unreadable:
    """Counts the pairs of a process that cannot be read, since its training began or went on."""

    pairs: int = 0
    left_out: int = 0

    def add(self, pairs: int, messages: list[str]) -> None:
        """
        Of a batch of `pairs`.

        Raises:
            CADAError: where more than 1 % of the pairs so far, and more than 10, cannot be read; and where all cannot.
        """
        self.pairs += pairs
        for message in messages:
            self.left_out += 1
            logger.warning(f"Left out, {counted(self.left_out, 'pair')} of {self.pairs:,} so far: {message}")
        if len(messages) == pairs:
            raise CADAError(f"No pair of a batch can be read: {messages[0]}. Is the data set complete?")
        if self.left_out > max(FIRST_UNREADABLE, MAX_UNREADABLE * self.pairs):
            raise CADAError(
                f"{self.left_out:,} of {self.pairs:,} pairs cannot be read, more than 1 %; the last one: "
                f"{messages[-1]}. Is the data set complete?"
            )


class _Lane:
    """Some of the files of a stream: their rows without end, pass after pass, in windows that are shuffled."""

    def __init__(self, rows: IterableDataset, name: str, window: int, seed: list[int]):
        self.rows, self.name, self.window, self.seed = rows, name, window, seed
        self.starts = [Start()]  # of the windows read, the oldest first

    def __iter__(self) -> Iterator[tuple[dict, int]]:
        """Rows and their seeds, from the first start on."""
        start = self.starts[0]
        while True:
            self.rows.set_epoch(self._draw(start.lane_pass)[0] // 2 + 1)  # the order of the files follows from it
            self.rows.load_state_dict(start.state)
            rows = iter(self.rows)
            while buffer := self._read(rows, start.rows):
                *seeds, order = self._draw(start.lane_pass, start.window, count=len(buffer) + 1)
                for place in np.random.default_rng(order).permutation(len(buffer)):
                    yield buffer[place], seeds[place]
                start = Start(start.rows + len(buffer), start.lane_pass, start.window + 1, self.rows.state_dict())
                self.starts.append(start)
            if not start.window:
                raise CADAError(f"{self.name}: some of its files hold no rows. Take them away.")
            start = Start(start.rows, start.lane_pass + 1)
            self.starts.append(start)

    def _draw(self, *place: int, count: int = 1) -> list[int]:
        """Numbers of 63 bits: what torch takes as a seed without complaint."""
        words = np.random.SeedSequence([*self.seed, *place]).generate_state(count, np.uint64)
        return (words >> np.uint64(1)).tolist()

    def _read(self, rows: Iterator[dict], done: int) -> list[dict]:
        try:
            return list(islice(rows, self.window))
        except Exception as error:  # of the network, the file system, or the format
            raise CADAError(
                f"The stream {self.name} broke off after {done:,} rows of one of its lanes: {one_line(error)}. Look "
                "at the files or the network, then go on with --resume_from_checkpoint last."
            ) from error

    def start_before(self, rows: int) -> Start:
        """The last start with at most so many rows before it; older ones are forgotten."""
        while len(self.starts) > 1 and self.starts[1].rows <= rows:
            self.starts.pop(0)
        return self.starts[0]


class StreamBatches(torch.utils.data.Sampler[list[StreamedRow]]):
    """
    The batches of one of several processes, without end. n processes train on the batches of one process with the
    n-fold batch size.

    Args:
        pairs: what is streamed.
        batch_size: of one process.
        seed: of the run.
        rank, processes: number of this process, and how many there are.
    """

    def __init__(self, pairs: StreamPairs, batch_size: int, seed: int = 0, rank: int = 0, processes: int = 1):
        whole, shards = batch_size * processes, pairs.rows.num_shards
        self.lane_count = math.gcd(whole, shards)
        self.part = whole // self.lane_count  # of a batch, from each lane
        self.first, self.batch_size, self.whole, self.rank = rank * batch_size, batch_size, whole, rank
        own = range(self.first // self.part, -(-(self.first + batch_size) // self.part))
        window = -(-pairs.buffer // self.lane_count)
        self.lanes = {
            number: _Lane(
                pairs.rows.shard(self.lane_count, number, contiguous=False), pairs.name, window, [seed, number]
            )
            for number in own
        }
        self.skipped = self.left_out = 0  # batches, and unreadable pairs, that a training had before it went on
        if self.lane_count % processes and rank == 0:
            logger.warning(
                f"{pairs.name} has {counted(shards, 'file')}, which cannot be shared out over {processes} processes: "
                f"some are read by several. A number of files that {processes} divides is read once."
            )

    def set_epoch(self, epoch: int) -> None:
        """A stream has no epochs."""

    def __iter__(self) -> Iterator[list[StreamedRow]]:
        lanes = {number: iter(lane) for number, lane in self.lanes.items()}
        for number, lane in self.lanes.items():
            seen = self.skipped * self.part - lane.starts[0].rows
            next(islice(lanes[number], seen, seen), None)
        for _ in range(self.skipped):
            yield []  # whoever goes on leaves these out
        for batch in count(self.skipped):
            rows = []
            for number, lane in lanes.items():
                for place, (row, seed) in enumerate(islice(lane, self.part), number * self.part):
                    if self.first <= place < self.first + self.batch_size:
                        rows.append(StreamedRow(row, batch * self.whole + place, seed))
            yield rows

    def save(self, checkpoint: str | os.PathLike, batches: int, left_out: int) -> None:
        """Write where the stream is after so many batches, of which all processes have left out so many pairs."""
        starts = {number: lane.start_before(batches * self.part) for number, lane in self.lanes.items()}
        with written_whole(Path(checkpoint) / STATE_FILE.format(self.rank)) as path:
            path.write_text(json.dumps({"batches": batches, "left_out": left_out, "lanes": starts}), encoding="utf-8")

    def resume(self, checkpoint: str | os.PathLike) -> None:
        """Go on where the stream was at a checkpoint, which may be of another number of processes."""
        states = [read_json(path) for path in sorted(Path(checkpoint).glob(STATE_FILE.format("*")))]
        starts = {int(number): start for state in states for number, start in state["lanes"].items()}
        missing = [str(number) for number in self.lanes if number not in starts]
        if missing:
            raise CADAError(
                f"{checkpoint} does not say where the stream was: the lane(s) {', '.join(missing)} are in no "
                f"{STATE_FILE.format('*')}. Bring the files of all processes together, or take another checkpoint."
            )
        self.skipped, self.left_out = states[0]["batches"], states[0]["left_out"]
        for number, lane in self.lanes.items():
            lane.starts = [Start(*starts[number])]
