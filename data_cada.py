"""
CUHK-PEDES, ICFG-PEDES and RSTPReid in their authors' layout, and any data set with the same columns, as `DatasetDict`.

One row per image: `image`, `captions`, `person_id`, `file_name`, and optionally `attribute_spans`.

    python data_cada.py check --dataset cuhk_pedes --data_dir /data/CUHK-PEDES
    python data_cada.py check --dataset path/to/own/data
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep

import argparse
import hashlib
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    config,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.utils import logging

import processing_cada
from drawn_cada import load_drawn
from files_cada import CADAError, FileError, Parser, one_line, read_json, run_command
from processing_cada import AttributeMasker, CADAProcessor, clean_caption, read_image


logger = logging.get_logger(__name__)

_MASKER_CODE = hashlib.sha256(Path(processing_cada.__file__).read_bytes()).hexdigest()
# The longest caption of the three sets has about a hundred words. More than this is a damaged file.
MAX_CAPTION_WORDS, MAX_CAPTION_CHARACTERS = 500, 5000


@dataclass(frozen=True)
class PedesSet:
    """Where the authors of a set put things, and what the set holds."""

    title: str
    annotations: tuple[str, ...]  # names seen for the annotation file
    path_key: str
    counts: dict[str, tuple[int, int, int]]  # split: persons, images, captions


BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")  # of `datasets`, for a folder of files
DRAWN_SETS = {"demo": "day", "demo_night": "night"}  # name -> domain
PEDES_SETS = {
    "cuhk_pedes": PedesSet(
        "CUHK-PEDES",
        ("reid_raw.json", "caption_all.json"),
        "file_path",
        {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)},
    ),
    "icfg_pedes": PedesSet(
        "ICFG-PEDES",
        ("ICFG-PEDES.json", "ICFG_PEDES.json"),
        "file_path",
        {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)},
    ),
    "rstp_reid": PedesSet(
        "RSTPReid",
        ("data_captions.json",),
        "img_path",
        {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)},
    ),
}

FEATURES = Features(
    {
        "image": Image(),
        "captions": List(Value("string")),
        "person_id": Value("int64"),
        "file_name": Value("string"),
    }
)


class DataError(CADAError):
    """Something is wrong with the data on disk. The message names the file, the row and the remedy."""


def _annotation_file(pedes: PedesSet, data_dir: Path) -> Path:
    if not os.path.isdir(data_dir):
        raise DataError(
            f"The data folder {data_dir} does not exist. Pass the folder of {pedes.title} that holds "
            f"{pedes.annotations[0]} and imgs/ as --data_dir."
        )
    for name in pedes.annotations:
        if os.path.isfile(data_dir / name):
            return data_dir / name
    raise DataError(
        f"{data_dir} holds no annotation file of {pedes.title}: looked for {' and '.join(pedes.annotations)}. "
        "Put the file of the set's authors there, next to imgs/."
    )


def _read_records(path: Path) -> list:
    try:
        records = read_json(path)
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} should be a JSON list with one object per image. Fetch it again.")
    return records


def read_annotations(dataset: str, data_dir: str | os.PathLike | None) -> dict[str, list[dict]]:
    """
    The annotations of a PEDES set by split, checked: `{"train": [{"path", "captions", "person_id", "file_name",
    "row"}, ...], ...}`. Image files are not opened.

    Raises:
        DataError: names the annotation file, the row and the remedy.
    """
    pedes = PEDES_SETS[dataset]
    if data_dir is None:
        raise DataError(f"{pedes.title} needs --data_dir, the folder with its annotations and imgs/.")
    data_dir = Path(data_dir)
    annotation_file = _annotation_file(pedes, data_dir)
    root = Path(os.path.realpath(data_dir / "imgs"))
    if not os.path.isdir(root):
        raise DataError(f"{data_dir} holds no folder imgs/ with the images of {pedes.title}. Put the images there.")
    splits: dict[str, list[dict]] = {split: [] for split in pedes.counts}
    rows_of_names: dict[str, list[int]] = {}
    for row, record in enumerate(_read_records(annotation_file)):
        where = f"{annotation_file}, row {row}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, found {type(record).__name__}. Fetch the file again.")
        if "split" not in record:
            remedy = (
                "caption_all.json has none; use reid_raw.json of the set's authors"
                if annotation_file.name == "caption_all.json"
                else "add one, or fetch the file again"
            )
            raise DataError(f"{where} has no `split`: {remedy}.")
        for key in ("id", "captions", pedes.path_key):
            if key not in record:
                raise DataError(f"{where} has no `{key}`. Is this the annotation file of {pedes.title}?")
        if not isinstance(record["split"], str) or record["split"] not in splits:
            raise DataError(
                f"{where}: unknown split {record['split']!r}. {pedes.title} has {', '.join(splits)}. Correct the row."
            )
        path = _image_path(record[pedes.path_key], root, where)
        rows_of_names.setdefault(os.path.normpath(path), []).append(row)
        splits[record["split"]].append(
            {
                "path": str(path),
                "captions": _check_captions(record["captions"], where),
                "person_id": _check_person(record["id"], where),
                "file_name": record[pedes.path_key],
                "row": row,
            }
        )
    repeated = [rows for rows in rows_of_names.values() if len(rows) > 1]
    if repeated:
        logger.warning(
            f"{annotation_file}: {len(repeated)} image(s) stand in several rows, the first in rows "
            f"{', '.join(map(str, repeated[0]))}. Each row counts in training and in every score."
        )
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{annotation_file} has no row of split {split!r}. Is the file complete?")
    persons = tuple(len({record["person_id"] for record in rows}) for rows in splits.values())
    if dataset == "rstp_reid" and persons == (3901, 100, 100):
        raise DataError(
            f"{annotation_file} is the RSTPReid file from before October 2022, with 3901/100/100 persons. Its split "
            "is wrong; get the corrected file (3701/200/200) from the set's authors."
        )
    return splits


def _image_path(name, root: Path, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the image path is {name!r:.80}, not a text. Correct the row.")
    if "\\" in name or not name.isprintable():
        raise DataError(
            f"{where}: the image path {name!r:.200} holds a backslash or a control character. Write / between "
            "folders, and correct the row."
        )
    path = root / name
    # The folder itself may be a link, as often on clusters; what counts is that the name stays inside.
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise DataError(f"{where}: the path {name!r:.200} leaves the data folder {root}. Correct the row.")
    return path


def _check_person(person_id, where: str) -> int:
    if isinstance(person_id, bool) or not isinstance(person_id, int) or abs(person_id) >= 2**63:
        raise DataError(
            f"{where}: the person id is {person_id!r:.80}, not a whole number of at most 18 digits. Correct the row."
        )
    return person_id


def _check_captions(captions, where: str) -> list[str]:
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{where}: `captions` should be a list of strings with at least one. Correct the row.")
    for number, caption in enumerate(captions):
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: caption {number} holds half a character at position {error.start} (a lone surrogate). "
                "Correct the row."
            ) from error
        if not clean_caption(caption):
            raise DataError(f"{where}: caption {number} is empty. Write one, or take it out of the row.")
        words = len(caption.split())
        if words > MAX_CAPTION_WORDS or len(caption) > MAX_CAPTION_CHARACTERS:
            raise DataError(
                f"{where}: caption {number} has {words} words and {len(caption)} characters, at most "
                f"{MAX_CAPTION_WORDS} and {MAX_CAPTION_CHARACTERS} are accepted (the model reads about 70 words). "
                "Shorten it."
            )
    return captions


def _rows(records: list[dict]) -> Iterator[dict]:
    for record in records:
        yield {
            "image": record["path"],
            "captions": record["captions"],
            "person_id": record["person_id"],
            "file_name": record["file_name"],
        }


def _image_problem(image: dict, decode: bool) -> str | None:
    """What is wrong with an image, or `None`. Without `decode` only the presence and size of a file are looked at."""
    path, content = image["path"], image.get("bytes")
    if content is None and path is None:
        return "is missing"
    if content is None and "://" not in path:
        if not os.path.isfile(path):
            return "is not a file" if os.path.exists(path) else "is missing"
        if os.path.getsize(path) == 0:
            return "is empty"
    if decode:
        try:
            open_image({"path": path, "bytes": content})
        except DataError as error:
            return f"cannot be decoded ({error})"
    return None


def find_bad_images(split: str, images: Iterable[dict], count: int, decode: bool) -> dict[int, str]:
    """
    Which of `count` images (`row`, `path`, and `bytes` where a table holds the content) are missing, empty or (with
    `decode`) damaged: name, row and what is wrong, by row.
    """
    problems = {}
    for image in tqdm(images, desc=f"{split}: images", unit="image", total=count, disable=count < 1000):
        problem = _image_problem(image, decode)
        if problem:
            name = image["path"] or image.get("file_name") or "The image"
            problems[image["row"]] = f"{name} (row {image['row']}) {problem}"
    return problems


def _rows_to_leave_out(
    dataset: str,
    data_dir: str | os.PathLike | None,
    split: str,
    images: Iterable[dict],
    count: int,
    skip_unreadable: bool,
) -> Collection[int]:
    """The rows of bad images, which are counted and listed; without `skip_unreadable` they are an error."""
    problems = find_bad_images(split, images, count, decode=skip_unreadable)
    if not problems:
        return ()
    first = next(iter(problems.values()))
    if not skip_unreadable:
        folder = "" if data_dir is None else f" --data_dir {data_dir}"
        raise DataError(
            f"{dataset}, split {split!r}: {first}; {len(problems)} such image(s) in this split. Complete the data "
            f"(list them: python data_cada.py check --dataset {dataset}{folder}), or leave them out with "
            "--skip_unreadable."
        )
    logger.warning(f"{split}: left out {len(problems)} of {count} images that cannot be read:")
    for problem in problems.values():
        logger.warning(f"  {problem}")
    if len(problems) == count:
        raise DataError(f"No image of split {split!r} can be read: {first}")
    return problems


def _needed_splits(dataset: str, there: Collection[str], splits: Collection[str] | None) -> list[str]:
    """The splits to load of those that are there; for `splits` see [`load_pairs_dataset`]."""
    if splits is None:
        return list(there)
    found = {split: "train" if split == "val" and split not in there else split for split in splits}
    for split, instead in found.items():
        if instead not in there:
            raise DataError(f"{dataset} has no split {split!r}; it has {', '.join(there)}.")
    return [split for split in there if split in found.values()]


@contextmanager
def _writing_to_the_cache(what: str) -> Iterator[None]:
    """`datasets` keeps tables in files; what keeps it from that is said in our words."""
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        raise DataError(
            f"{what} cannot be written to the cache {config.HF_DATASETS_CACHE}: {one_line(error.__cause__ or error)}. "
            "Free some space, or set HF_HOME to another folder."
        ) from error


def _load_pedes(
    dataset: str, data_dir: str | os.PathLike | None, skip_unreadable: bool, splits: Collection[str] | None
) -> DatasetDict:
    loaded, annotations = {}, read_annotations(dataset, data_dir)
    for split in _needed_splits(dataset, annotations, splits):
        records = annotations[split]
        left_out = _rows_to_leave_out(dataset, data_dir, split, records, len(records), skip_unreadable)
        records = [record for record in records if record["row"] not in left_out]
        with _writing_to_the_cache(f"The table of split {split!r}"):
            loaded[split] = Dataset.from_generator(_rows, features=FEATURES, gen_kwargs={"records": records})
    return DatasetDict(loaded)


def load_pairs_dataset(
    dataset: str,
    data_dir: str | os.PathLike | None = None,
    captions_per_image: int | None = None,
    skip_unreadable: bool = False,
    revision: str | None = None,
    splits: Collection[str] | None = None,
) -> DatasetDict:
    """
    A data set as `DatasetDict` with one row per image.

    Args:
        dataset: `"cuhk_pedes"`, `"icfg_pedes"`, `"rstp_reid"` (with `data_dir`), `"demo"` or `"demo_night"` (drawn),
            a folder written by `save_to_disk`, or a name that `datasets.load_dataset` takes; the last
            two must have the columns `image`, `captions`, `person_id`.
        data_dir: the folder of the set, with the authors' annotation file and `imgs/`.
        captions_per_image: use the first n captions of each image only. The paper uses two; `None` uses all.
        skip_unreadable: decode all images first, and leave out those that cannot be read, with a list.
        revision: tag, branch or commit of a set on the Hub.
        splits: names of the splits to load and check; `None` loads all. In the place of a `val` that the set lacks,
            `train` is loaded, see [`hold_out_persons`].

    Raises:
        DataError: names the file, the row and the remedy.
    """
    if dataset in PEDES_SETS:
        loaded = _load_pedes(dataset, data_dir, skip_unreadable, splits)
    elif dataset in DRAWN_SETS:
        with _writing_to_the_cache("The drawn set"):
            drawn = load_drawn(domain=DRAWN_SETS[dataset])
        loaded = DatasetDict({split: drawn[split] for split in _needed_splits(dataset, drawn, splits)})
    else:
        loaded = _load_other(dataset, data_dir, skip_unreadable, revision, splits)
    if captions_per_image is not None:
        if captions_per_image < 1:
            raise DataError(f"`captions_per_image` is {captions_per_image}. Give 1 or more.")
        with _writing_to_the_cache("The table of captions"):
            loaded = loaded.map(
                _first_captions,
                fn_kwargs={"count": captions_per_image},
                desc=f"first {captions_per_image} captions",
            )
    return loaded


def _first_captions(row: dict, count: int) -> dict:
    return {name: row[name][:count] for name in ("captions", "attribute_spans") if name in row}


def _open_other(dataset: str, data_dir: str | os.PathLike | None, revision: str | None) -> DatasetDict:
    """Own data with all their splits, not yet checked."""
    known = (
        f"Known: {', '.join([*PEDES_SETS, *DRAWN_SETS])}, a folder written by `save_to_disk`, or a name that "
        "`datasets.load_dataset` takes."
    )
    if (Path(dataset) / "dataset_dict.json").is_file():
        try:
            loaded = load_from_disk(dataset)
        except Exception as error:  # the library raises many kinds
            raise DataError(
                f"The data set in {dataset} is damaged or empty ({type(error).__name__}: {one_line(error)}). Write it "
                "again with `save_to_disk`."
            ) from error
    elif "/" not in dataset and not Path(dataset).exists() and (data_dir is None or dataset not in BUILDERS):
        meant = get_close_matches(dataset, [*PEDES_SETS, *DRAWN_SETS], n=1)  # a typing error, no name on the Hub
        raise DataError(f"Unknown data set {dataset!r}. {f'Do you mean {meant[0]}? ' if meant else ''}{known}")
    else:
        try:
            loaded = load_dataset(dataset, data_dir=data_dir, revision=revision)
        except Exception as error:  # the library raises many kinds
            raise DataError(
                f"Cannot load the data set {dataset!r} ({type(error).__name__}: {one_line(error)}). {known}"
            ) from error
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"{dataset} has no splits. Save a DatasetDict with train, val and test.")
    if {"val", "validation"} <= set(loaded):
        raise DataError(f"{dataset} has both splits, 'val' and 'validation'. Rename one, or leave it out.")
    # In another format, such as NumPy's, the values would be of other types.
    return DatasetDict(
        {"val" if split == "validation" else split: rows.with_format(None) for split, rows in loaded.items()}
    )


def _load_other(
    dataset: str,
    data_dir: str | os.PathLike | None,
    skip_unreadable: bool,
    revision: str | None,
    splits: Collection[str] | None,
) -> DatasetDict:
    loaded, there = {}, _open_other(dataset, data_dir, revision)
    for split in _needed_splits(dataset, there, splits):
        rows = _check_split(there[split], f"{dataset}, split {split!r}")
        images = _undecoded_images(rows, with_content=skip_unreadable)
        left_out = _rows_to_leave_out(dataset, data_dir, split, images, len(rows), skip_unreadable)
        loaded[split] = rows.select([row for row in range(len(rows)) if row not in left_out]) if left_out else rows
    return DatasetDict(loaded)


def _check_split(rows: Dataset, where: str) -> Dataset:
    """The rows, all of them checked but the images, whose column gets the type `Image`."""
    missing = {"image", "captions", "person_id"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"{where} lacks the column(s) {', '.join(sorted(missing))}. Every row needs an `image`, a list of "
            "`captions` and the `person_id`."
        )
    if not len(rows):
        raise DataError(f"{where} has no rows. Fill it, or leave the split out.")
    _check_rows(rows, where)
    if isinstance(rows.features["image"], Image):
        return rows
    try:  # file names or bytes
        return rows.cast_column("image", Image())
    except Exception as error:  # the library raises many kinds
        raise DataError(
            f"{where}: the column `image` is of the type {rows.features['image']}. Give images, file names, or the "
            "content of image files."
        ) from error


def _undecoded_images(rows: Dataset, with_content: bool) -> Iterator[dict]:
    """`row`, `path`, `bytes` and `file_name` of every image. Without `with_content`, `b""` stands for the content."""
    start, columns = 0, [name for name in ("image", "file_name") if name in rows.column_names]
    for table in rows.select_columns(columns).with_format("arrow").iter(1000):
        contents = pc.struct_field(table["image"], "bytes")
        paths = pc.struct_field(table["image"], "path").to_pylist()
        names = table["file_name"].to_pylist() if "file_name" in columns else [None] * len(paths)
        for row, (content, path, name) in enumerate(zip(contents, paths, names), start):
            content = content.as_py() if with_content or not content.is_valid else b""
            yield {"row": row, "path": path, "bytes": content, "file_name": name}
        start += len(paths)


def _check_rows(rows: Dataset, where: str) -> None:
    """Captions, person and, where the set brings them, attribute spans of every row."""
    brings_spans = "attribute_spans" in rows.column_names
    spans_of_rows = rows["attribute_spans"] if brings_spans else [None] * len(rows)
    for row, (captions, person_id, spans) in enumerate(zip(rows["captions"], rows["person_id"], spans_of_rows)):
        _check_captions(captions, f"{where}, row {row}")
        _check_person(person_id, f"{where}, row {row}")
        if brings_spans and not _fits(spans, captions):
            raise DataError(
                f"{where}, row {row}: `attribute_spans` should have, for every caption, a list of [start, end) inside "
                "the cleaned caption. Correct the row, or leave the column out: the phrases are then found with NLTK."
            )


def _fits(spans, captions: list[str]) -> bool:
    if not isinstance(spans, list) or len(spans) != len(captions):
        return False
    lengths = [len(clean_caption(caption)) for caption in captions]
    try:
        return all(0 <= start < end <= length for own, length in zip(spans, lengths) for start, end in own)
    except (TypeError, ValueError):  # not lists of two numbers
        return False


def hold_out_persons(train: Dataset, persons: int, seed: int = 0) -> DatasetDict:
    """Split `persons` random persons off a training set, as validation set of a data set that has none."""
    ids = sorted(set(train["person_id"]))
    if not 0 < persons < len(ids):
        raise DataError(f"Cannot hold out {persons} of {len(ids)} persons for validation. Lower --holdout_persons.")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:persons]
    chosen = {ids[index] for index in order.tolist()}
    is_held_out = [person_id in chosen for person_id in train["person_id"]]
    return DatasetDict(
        train=train.select([row for row, held_out in enumerate(is_held_out) if not held_out]),
        val=train.select([row for row, held_out in enumerate(is_held_out) if held_out]),
    )


def shared_persons(splits: DatasetDict) -> dict[str, int]:
    """How many persons of train are in another split too, where there are any. No set of the field has them."""
    persons = {split: set(rows["person_id"]) for split, rows in splits.items()}
    counts = {split: len(own & persons["train"]) for split, own in persons.items() if split != "train"}
    return {split: count for split, count in counts.items() if count}


def add_attribute_spans(dataset: Dataset, masker: AttributeMasker) -> Dataset:
    """
    Add the column `attribute_spans` (units of every caption) with NLTK, once; `datasets` caches it. A phrase column
    that the data set brings along is kept, and split into words where the masker masks words.
    """
    if "attribute_spans" not in dataset.column_names:
        try:
            masker.find_spans("a red coat")  # loads the tagger before any worker starts
        except (ImportError, LookupError, ValueError) as error:  # it is missing, or its data are missing or damaged
            raise DataError(f"Attribute phrases cannot be found: {one_line(error)}") from error
        with _writing_to_the_cache("The table of attribute phrases"):
            return dataset.map(
                _tag_row,
                # `datasets` hashes the arguments, not the code: phrases found by other code or NLTK are not reused.
                fn_kwargs={"unit": masker.unit, "version": f"{_MASKER_CODE} nltk {version('nltk')}"},
                desc="Tagging captions",
            )
    if masker.unit == "word":
        with _writing_to_the_cache("The table of attribute phrases"):
            return dataset.map(_split_spans, desc="Splitting phrases")
    return dataset


def _tag_row(row: dict, unit: str, version: str) -> dict:
    masker = AttributeMasker(unit)
    return {"attribute_spans": [masker.find_spans(caption) for caption in row["captions"]]}


def _split_spans(row: dict) -> dict:
    split = []
    for caption, spans in zip(row["captions"], row["attribute_spans"]):
        words = []
        for start, end in spans:
            for word in clean_caption(caption)[start:end].split(" "):
                words.append([start, start + len(word)])
                start += len(word) + 1
        split.append(words)
    return {"attribute_spans": split}


class GlobalBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """
    The batches of one of several processes, as (pair, seed of its augmentation and masking).

    Order and seeds follow from `seed`, epoch and pair alone. A batch of all processes is cut into as equal parts as
    possible, one for each: n processes train on the batches of one process with the n-fold batch size, the last batch
    of an epoch too. Of a last batch that is smaller than the number of processes, some get an empty part.

    Args:
        pairs: number of pairs.
        batch_size: of one process.
        seed: of the run.
        rank, processes: number of this process, and how many there are.
        drop_last: whether to leave out the last batch of an epoch where it is smaller than the others.
    """

    def __init__(
        self, pairs: int, batch_size: int, seed: int = 0, rank: int = 0, processes: int = 1, drop_last: bool = True
    ):
        self.pairs, self.batch_size, self.seed, self.epoch = pairs, batch_size, seed, 0
        self.rank, self.processes, self.drop_last = rank, processes, drop_last

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.pairs, self.batch_size * self.processes)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = [self.seed, self.epoch]
        order = np.random.default_rng(epoch).permutation(self.pairs)
        for batch in range(len(self)):
            size = self.batch_size * self.processes
            part = np.array_split(order[batch * size : (batch + 1) * size], self.processes)[self.rank].tolist()
            # 63 bits: what torch takes as a seed without complaint.
            seeds = (np.random.SeedSequence([*epoch, pair]).generate_state(1, np.uint64)[0] >> 1 for pair in part)
            yield [(pair, int(seed)) for pair, seed in zip(part, seeds)]


def outlive_sigterm(worker: int) -> None:
    """
    For the workers of a data loader. Clusters send SIGTERM to all processes of a job; the main one saves and ends, and
    its workers have to live until then. SIGTERM of the main process itself still ends them.
    """

    def wait_for_the_main_process():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_the_main_process, daemon=True).start()


class PairDataset(torch.utils.data.Dataset):
    """
    The pairs (image, caption) of a data set with one row per image: every caption is one sample. An index is the
    number of a pair, or (pair, seed) from [`GlobalBatches`].

    Args:
        dataset: rows with `image`, `captions`, `person_id`, and optionally `file_name`, `attribute_spans`.
        image_size: height and width that the model reads, see [`open_image`].
    """

    def __init__(self, dataset: Dataset, image_size: tuple[int, int] | None = None):
        self.dataset, self.image_size = undecoded(dataset), image_size
        counts = [len(captions) for captions in dataset["captions"]]
        self.pairs = [(row, number) for row, count in enumerate(counts) for number in range(count)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index, *seed = index if isinstance(index, tuple) else (index,)
        row_index, number = self.pairs[index]
        row = read_row(self.dataset, row_index, self.image_size)
        sample = {"image": row["image"], "caption": row["captions"][number], "person_id": row["person_id"]}
        sample["pair"] = index
        if "attribute_spans" in row:
            sample["attribute_spans"] = row["attribute_spans"][number]
        if seed:
            sample["seed"] = seed[0]
        return sample

    def name_of(self, index: int) -> str:
        """What a reader needs to find a pair: file (where the data set names it), row, person and caption."""
        row_index, number = self.pairs[index]
        row = self.dataset.select_columns([name for name in self.dataset.column_names if name != "image"])[row_index]
        return f"{row.get('file_name', 'image')} (row {row_index}, person {row['person_id']}, caption {number + 1})"


def undecoded(dataset: Dataset) -> Dataset:
    """The same rows, whose images [`read_row`] decodes."""
    feature = dataset.features["image"]
    is_decoded = isinstance(feature, Image) and feature.decode
    return dataset.cast_column("image", Image(decode=False)) if is_decoded else dataset


def open_image(image: dict, size: tuple[int, int] | None = None) -> PILImage.Image:
    """
    The image of an undecoded row, read for a model that reads `size` (height, width), see [`read_image`].

    Raises:
        DataError: what is wrong with it; whoever calls names the row.
    """
    content, path = image["bytes"], image["path"]
    try:
        if content is not None:
            file = BytesIO(content)
        elif path is None:
            raise DataError("there is neither a file name nor content")
        elif os.path.isfile(path):
            file = path
        elif os.path.exists(path):  # to open a named pipe would wait for ever
            raise DataError("it is not a file but a folder or a device")
        elif "://" not in path:
            raise DataError("there is no such file")
        else:  # of an archive, or remote
            with xopen(path, "rb") as remote:
                file = BytesIO(remote.read())
        return read_image(file, size)
    except DataError:
        raise
    except Exception as error:  # Pillow's readers of the formats raise many kinds on damaged files
        raise DataError(one_line(error)) from error


def read_row(dataset: Dataset, index: int, size: tuple[int, int] | None = None) -> dict:
    """
    A row with its image decoded, see [`open_image`]; an image that cannot be decoded is reported with file, row and
    remedy.
    """
    row = undecoded(dataset)[index]
    image = {"path": None, "bytes": None} if row["image"] is None else row["image"]
    if not isinstance(image, dict):
        return row
    try:
        return {**row, "image": open_image(image, size)}
    except DataError as error:
        raise DataError(
            f"The image {row.get('file_name') or image['path'] or ''!r} in row {index} cannot be decoded: "
            f"{error}. Replace the file, or leave such images out with --skip_unreadable."
        ) from error


@dataclass
class PairCollator:
    """
    Batches of samples of [`PairDataset`] as inputs of the model, and `pair`, their numbers in the data set.

    Args:
        processor: of the model.
        augment: whether to augment the images, for training.
        mask: whether to mask the attributes at `attribute_spans` of the samples, for ARA.
    """

    processor: CADAProcessor
    augment: bool = True
    mask: bool = True

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        if not samples:  # a process without a part in the last batch: what any sample gives, without its row
            any_sample = {"image": PILImage.new("RGB", (1, 1)), "caption": "", "person_id": 0, "pair": 0}
            any_sample["attribute_spans"] = []
            return {name: values[:0] for name, values in self([any_sample]).items()}
        if self.mask and "attribute_spans" not in samples[0]:
            raise DataError(
                "The samples have no `attribute_spans`. Add them with `add_attribute_spans`; for a model without ARA "
                "pass `mask=False`."
            )
        inputs = self.processor(
            images=[sample["image"] for sample in samples],
            text=[sample["caption"] for sample in samples],
            attribute_spans=[sample["attribute_spans"] for sample in samples] if self.mask else None,
            seeds=[sample["seed"] for sample in samples] if "seed" in samples[0] else None,
            do_augment=self.augment,
            return_tensors="pt",
        )
        numbers = {"person_ids": "person_id", "pair": "pair"}
        return {**inputs, **{name: torch.tensor([sample[key] for sample in samples]) for name, key in numbers.items()}}


def check(dataset: str, data_dir: str | os.PathLike | None = None, quick: bool = False) -> bool:
    """
    Print persons, images and captions per split, of the three sets against the official numbers, and every bad image.
    Returns whether nothing is wrong.
    """
    if dataset in DRAWN_SETS:
        raise DataError(f"{dataset} is drawn by this program, so there is nothing to check.")
    if dataset in PEDES_SETS:
        title, official = PEDES_SETS[dataset].title, PEDES_SETS[dataset].counts
        images = splits = read_annotations(dataset, data_dir)
    else:
        title, official, images, splits = dataset, {}, {}, {}
        for split, rows in _open_other(dataset, data_dir, revision=None).items():
            rows = _check_split(rows, f"{dataset}, split {split!r}")
            images[split] = _undecoded_images(rows, with_content=not quick)
            columns = zip(rows["person_id"], rows["captions"])
            splits[split] = [{"person_id": person_id, "captions": captions} for person_id, captions in columns]
    print(title if data_dir is None else f"{title} in {data_dir}", end="\n\n")
    print(f"{'split':6} {'':9} {'found':>8} {'official' if official else '':>9}".rstrip())
    complete = True
    for split, records in splits.items():
        found = (
            len({record["person_id"] for record in records}),
            len(records),
            sum(len(record["captions"]) for record in records),
        )
        for position, (name, count) in enumerate(zip(("persons", "images", "captions"), found)):
            line = f"{split:6} {name:9} {count:8,}"
            if official:
                expected = official[split][position]
                complete &= count == expected
                line += f" {expected:9,} {'' if count == expected else 'differs'}"
            print(line)
        most = Counter(record["person_id"] for record in records).most_common()
        single = sum(1 for _, count in most if count == 1)
        if single:
            print(f"{split:6} {single} person(s) with a single image")
    persons = {split: {record["person_id"] for record in records} for split, records in splits.items()}
    for first, second in combinations(persons, 2):
        count = len(persons[first] & persons[second])
        if count:
            complete = False
            print(f"{count} person(s) are both in {first} and in {second}.")
    bad = 0
    for split, records in splits.items():
        problems = find_bad_images(split, images[split], len(records), decode=not quick)
        bad += len(problems)
        for problem in problems.values():
            print(f"{split}: {problem}")
    line = f"\n{bad} bad image file(s)."
    if official:
        line += " Numbers are official." if complete else " Numbers differ from the official ones."
    print(line)
    return complete and not bad


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser("check", help="find bad images; compare with the official numbers")
    check_parser.add_argument(
        "--dataset", required=True, help=f"{', '.join(PEDES_SETS)}, or a folder written by `save_to_disk`"
    )
    check_parser.add_argument("--data_dir", help="folder with the authors' annotations and imgs/")
    check_parser.add_argument("--quick", action="store_true", help="look for the image files without decoding them")
    options = parser.parse_args(arguments)
    return run_command(lambda: 0 if check(options.dataset, options.data_dir, options.quick) else 1)


if __name__ == "__main__":
    sys.exit(main())
