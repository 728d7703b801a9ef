"""
The sets of the field in their authors' layout, and any data set with the same columns, as `DatasetDict`.

One row per image: `image`, `captions`, `person_id`, `file_name`, and optionally `attribute_spans`, and in whole frames
the `box` of the person (x, y, width, height in pixels of the upright image).

    cada check --dataset cuhk_pedes --data-dir /data/CUHK-PEDES
    cada check --dataset path/to/own/data
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, config, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from cada.data.drawn import FEATURES as DRAWN_FEATURES
from cada.data.drawn import load_drawn
from cada.data.frames import read_frames
from cada.data.images import find_bad_images
from cada.data.pedes import PEDES_SETS, check_captions, check_person, read_annotations
from cada.files import CADAError, one_line
from processing_cada import clean_caption


logger = logging.get_logger(__name__)


BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")  # of `datasets`, for a folder of files
DRAWN_SETS = {"demo": "day", "demo_night": "night"}  # name -> domain

FEATURES = Features({name: DRAWN_FEATURES[name] for name in ("image", "captions", "person_id", "file_name")})
BOX = Features({"box": List(Value("int64"))})


def _rows(records: list[dict]) -> Iterator[dict]:
    for record in records:
        row = {name: record["path" if name == "image" else name] for name in FEATURES}
        yield row | {name: record[name] for name in BOX if name in record}


def _needed_splits(dataset: str, there: Collection[str], splits: Collection[str] | None) -> list[str]:
    """The splits to load of those that are there; for `splits` see [`load_pairs_dataset`]."""
    if splits is None:
        return list(there)
    found = {split: "train" if split == "val" and split not in there else split for split in splits}
    for split, instead in found.items():
        if instead not in there:
            raise CADAError(f"{dataset} has no split {split!r}; it has {', '.join(there)}.")
    return [split for split in there if split in found.values()]


@contextmanager
def _writing_to_the_cache(what: str) -> Iterator[None]:
    """`datasets` keeps tables in files; what keeps it from that is said in our words."""
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        raise CADAError(
            f"{what} cannot be written to the cache {config.HF_DATASETS_CACHE}: {one_line(error.__cause__ or error)}. "
            "Free some space, or set HF_HOME to another folder."
        ) from error


def open_splits(
    dataset: str,
    data_dir: str | os.PathLike | None,
    revision: str | None = None,
    splits: Collection[str] | None = None,
    with_content: bool = True,
) -> dict[str, tuple[Dataset, Iterable[dict]]]:
    """
    Of every split the rows, checked all but the images, and its images as [`find_bad_images`] takes them; arguments as
    of [`load_pairs_dataset`]. Without `with_content`, `b""` stands for the content of images in a table.
    """
    opened, is_pedes = {}, dataset in PEDES_SETS
    if dataset == "prw_tbps":
        there = read_frames(data_dir)
    else:
        there = read_annotations(dataset, data_dir) if is_pedes else _open_other(dataset, data_dir, revision)
    for split in _needed_splits(dataset, there, splits):
        if is_pedes:
            images = there[split]
            features = Features({**FEATURES, **BOX}) if "box" in images[0] else FEATURES
            with _writing_to_the_cache(f"The table of split {split!r}"):
                rows = Dataset.from_generator(_rows, features=features, gen_kwargs={"records": images})
        else:
            rows = _check_split(there[split], f"{dataset}, split {split!r}")
            images = _undecoded_images(rows, with_content)
        opened[split] = rows, images
    return opened


def _without_bad_images(rows: Dataset, problems: dict[int, str], split: str) -> Dataset:
    logger.warning(f"{split}: left out {len(problems)} of {len(rows)} images that cannot be read:")
    for problem in problems.values():
        logger.warning(f"  {problem}")
    if len(problems) == len(rows):
        raise CADAError(f"No image of split {split!r} can be read: {next(iter(problems.values()))}")
    return rows.select([row for row in range(len(rows)) if row not in problems])


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
        dataset: a key of [`PEDES_SETS`] (with `data_dir`), `"demo"` or `"demo_night"` (drawn), a folder written by
            `save_to_disk`, or a name that `datasets.load_dataset` takes; the last two must have the columns `image`,
            `captions`, `person_id`.
        data_dir: the folder of the set, with the authors' annotation file and images.
        captions_per_image: use the first n captions of each image only. The paper uses two; `None` uses all.
        skip_unreadable: decode all images first, and leave out those that cannot be read, with a list.
        revision: tag, branch or commit of a set on the Hub.
        splits: names of the splits to load and check; `None` loads all. In the place of a `val` that the set lacks,
            `train` is loaded, see [`hold_out_persons`].

    Raises:
        CADAError: names the file, the row and the remedy.
    """
    loaded = DatasetDict()
    if dataset in DRAWN_SETS:
        with _writing_to_the_cache("The drawn set"):
            drawn = load_drawn(domain=DRAWN_SETS[dataset])
        loaded |= {split: drawn[split] for split in _needed_splits(dataset, drawn, splits)}
    else:
        opened = open_splits(dataset, data_dir, revision, splits, with_content=skip_unreadable)
        for split, (rows, images) in opened.items():
            problems = find_bad_images(split, images, len(rows), decode=skip_unreadable)
            if problems and not skip_unreadable:
                folder = "" if data_dir is None else f" --data-dir {data_dir}"
                raise CADAError(
                    f"{dataset}, split {split!r}: {next(iter(problems.values()))}; {len(problems)} such image(s) in "
                    f"this split. Complete the data (list them: cada check --dataset {dataset}{folder}), or leave "
                    "them out with --skip_unreadable."
                )
            loaded[split] = _without_bad_images(rows, problems, split) if problems else rows
    if captions_per_image is not None:
        if captions_per_image < 1:
            raise CADAError(f"`captions_per_image` is {captions_per_image}. Give 1 or more.")
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
            raise CADAError(
                f"The data set in {dataset} is damaged or empty ({type(error).__name__}: {one_line(error)}). Write it "
                "again with `save_to_disk`."
            ) from error
    elif (Path(dataset) / "state.json").is_file():
        raise CADAError(
            f"{dataset} is one table without splits. Give them names: DatasetDict(train=load_from_disk({dataset!r}))"
            ".save_to_disk(another folder)."
        )
    elif "/" not in dataset and not Path(dataset).exists() and (data_dir is None or dataset not in BUILDERS):
        meant = get_close_matches(dataset, [*PEDES_SETS, *DRAWN_SETS], n=1)  # a typing error, no name on the Hub
        raise CADAError(f"Unknown data set {dataset!r}. {f'Do you mean {meant[0]}? ' if meant else ''}{known}")
    else:
        try:
            loaded = load_dataset(dataset, data_dir=data_dir, revision=revision)
        except Exception as error:  # the library raises many kinds
            raise CADAError(
                f"Cannot load the data set {dataset!r} ({type(error).__name__}: {one_line(error)}). {known}"
            ) from error
    if not isinstance(loaded, DatasetDict):
        raise CADAError(f"{dataset} has no splits. Save a DatasetDict with train, val and test.")
    if {"val", "validation"} <= set(loaded):
        raise CADAError(f"{dataset} has both splits, 'val' and 'validation'. Rename one, or leave it out.")
    # In another format, such as NumPy's, the values would be of other types.
    return DatasetDict(
        {"val" if split == "validation" else split: rows.with_format(None) for split, rows in loaded.items()}
    )


def _check_split(rows: Dataset, where: str) -> Dataset:
    """The rows, all of them checked but the images, whose column gets the type `Image`."""
    missing = {"image", "captions", "person_id"} - set(rows.column_names)
    if missing:
        raise CADAError(
            f"{where} lacks the column(s) {', '.join(sorted(missing))}. Every row needs an `image`, a list of "
            "`captions` and the `person_id`."
        )
    if not len(rows):
        raise CADAError(f"{where} has no rows. Fill it, or leave the split out.")
    _check_rows(rows, where)
    if isinstance(rows.features["image"], Image):
        return rows
    try:  # file names or bytes
        return rows.cast_column("image", Image())
    except Exception as error:  # the library raises many kinds
        raise CADAError(
            f"{where}: the column `image` is of the type {rows.features['image']}. Give images, file names, or the "
            "content of image files."
        ) from error


def _undecoded_images(rows: Dataset, with_content: bool) -> Iterator[dict]:
    """
    `row`, `path`, `bytes`, `file_name` and `box` of every image. Without `with_content`, `b""` stands for the content.
    """
    start, columns = 0, [name for name in ("image", "file_name", "box") if name in rows.column_names]
    for table in rows.select_columns(columns).with_format("arrow").iter(1000):
        contents = pc.struct_field(table["image"], "bytes")
        paths = pc.struct_field(table["image"], "path").to_pylist()
        names, boxes = (
            table[name].to_pylist() if name in columns else [None] * len(paths) for name in ("file_name", "box")
        )
        for row, (content, path, name, box) in enumerate(zip(contents, paths, names, boxes), start):
            content = content.as_py() if with_content or not content.is_valid else b""
            yield {"row": row, "path": path, "bytes": content, "file_name": name, "box": box}
        start += len(paths)


def _check_rows(rows: Dataset, where: str) -> None:
    """Captions, person and, where the set brings them, attribute spans and box of every row."""
    brings_spans = "attribute_spans" in rows.column_names
    spans_of_rows = rows["attribute_spans"] if brings_spans else [None] * len(rows)
    for row, (captions, person_id, spans) in enumerate(zip(rows["captions"], rows["person_id"], spans_of_rows)):
        check_captions(captions, f"{where}, row {row}")
        check_person(person_id, f"{where}, row {row}")
        if brings_spans and not _fits(spans, captions):
            raise CADAError(
                f"{where}, row {row}: `attribute_spans` should have, for every caption, a list of [start, end) inside "
                "the cleaned caption. Correct the row, or leave the column out: the phrases are then found with NLTK."
            )
    for row, box in enumerate(rows["box"] if "box" in rows.column_names else ()):
        is_whole = isinstance(box, list) and len(box) == 4 and all(isinstance(number, int) for number in box)
        if not is_whole or min(box[:2]) < 0 or min(box[2:]) < 1:
            raise CADAError(
                f"{where}, row {row}: `box` is {box!r:.80}. Give x, y, width, height of the person in whole pixels, "
                "or leave the column out where the images show one person each."
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
        raise CADAError(f"Cannot hold out {persons} of {len(ids)} persons for validation. Lower --holdout_persons.")
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
