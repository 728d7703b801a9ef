"""The sets of persons with captions: their files, their rows, checked."""

import os
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from cada.files import CADAError, read_json
from processing_cada import clean_caption


logger = logging.get_logger(__name__)
# The longest captions, those of UFine6926, have some 80 words on average. More than this is a damaged file.
MAX_CAPTION_WORDS, MAX_CAPTION_CHARACTERS = 500, 5000


Counts = tuple[int | None, int | None, int | None]  # persons, images, captions; `None` where not published
UNPUBLISHED = (None, None, None)


@dataclass(frozen=True)
class PedesSet:
    """Where the authors of a set put things, and what the set holds."""

    title: str
    annotations: tuple[str, ...]  # names seen for the annotation file
    path_key: str
    counts: dict[str, Counts]  # by split
    images: str = "imgs"  # the folder of the images
    total: Counts | None = None  # of all splits, where the authors publish no more


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
    # Rows and counts: https://github.com/Zplusdragon/UFineBench. Name of the file, and paths from the set's folder:
    # https://github.com/CLS-2001/DFLSG, datasets/ufine.py. Not run on the real files.
    "ufine6926": PedesSet(
        "UFine6926",
        ("UFine6926_Annotations.json",),
        "file_path",
        {"train": UNPUBLISHED, "test": UNPUBLISHED},
        images="images",
        total=(6926, 26206, 52412),
    ),
    # See cada/data/frames.py. An image is the box of a person. The counts are of PRW's test, as others counted it:
    # https://github.com/FarhadBayrami/faster-rcnn-oim-person-search. Counts of the descriptions were not found.
    "prw_tbps": PedesSet(
        "PRW-TBPS",
        ("PRW-TBPS_train", "PRW-TBPS_test"),
        "pic_path",
        {"train": UNPUBLISHED, "test": (450, 25062, None)},
        images="frames",
    ),
}


def find_files(pedes: PedesSet, data_dir: str | os.PathLike | None) -> tuple[Path, Path]:
    """The annotation file and the folder of the images, whose name may be a link; a `CADAError` without them."""
    if data_dir is None:
        raise CADAError(f"{pedes.title} needs --data-dir, the folder with its annotations and {pedes.images}/.")
    if not os.path.isdir(data_dir):
        raise CADAError(
            f"The data folder {data_dir} does not exist. Pass the folder of {pedes.title} that holds "
            f"{pedes.annotations[0]} and {pedes.images}/ as --data-dir."
        )
    files = [Path(data_dir, name) for name in pedes.annotations if os.path.isfile(Path(data_dir, name))]
    if not files:
        raise CADAError(
            f"{data_dir} holds no annotation file of {pedes.title}: looked for {' and '.join(pedes.annotations)}. "
            f"Put the file of the set's authors there, next to {pedes.images}/."
        )
    if not os.path.isdir(Path(data_dir, pedes.images)):
        raise CADAError(
            f"{data_dir} holds no folder {pedes.images}/ with the images of {pedes.title}. Put the images there."
        )
    return files[0], Path(os.path.realpath(Path(data_dir, pedes.images)))


def read_annotations(dataset: str, data_dir: str | os.PathLike | None) -> dict[str, list[dict]]:
    """
    The annotations of a PEDES set by split, checked: `{"train": [{"path", "captions", "person_id", "file_name",
    "row"}, ...], ...}`. Image files are not opened. A `CADAError` names annotation file, row and remedy.
    """
    pedes = PEDES_SETS[dataset]
    file, root = find_files(pedes, data_dir)
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise CADAError(f"{file} should be a JSON list with one object per image. Fetch it again.")
    splits: dict[str, list[dict]] = {split: [] for split in pedes.counts}
    rows_of_names: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        checked = _checked(record, pedes, file, row, root)
        splits[record["split"]].append(checked)
        rows_of_names.setdefault(os.path.normpath(checked["path"]), []).append(row)
    repeated = [rows for rows in rows_of_names.values() if len(rows) > 1]
    if repeated:
        logger.warning(
            f"{file}: {len(repeated)} image(s) stand in several rows, the first in rows "
            f"{', '.join(map(str, repeated[0]))}. Each row counts in training and in every score."
        )
    for split, rows in splits.items():
        if not rows:
            raise CADAError(f"{file} has no row of split {split!r}. Is the file complete?")
    persons = tuple(len({record["person_id"] for record in rows}) for rows in splits.values())
    if dataset == "rstp_reid" and persons == (3901, 100, 100):
        raise CADAError(
            f"{file} is the RSTPReid file from before October 2022, with 3901/100/100 persons. Its split is wrong; "
            "get the corrected file (3701/200/200) from the set's authors."
        )
    return splits


def _checked(record, pedes: PedesSet, file: Path, row: int, root: Path) -> dict:
    where = f"{file}, row {row}"
    if not isinstance(record, dict):
        raise CADAError(f"{where}: expected an object, found {type(record).__name__}. Fetch the file again.")
    if "split" not in record:  # nor has caption_all.json of CUHK-PEDES
        raise CADAError(f"{where} has no `split`: add one, or use {pedes.annotations[0]} of the set's authors.")
    for key in ("id", "captions", pedes.path_key):
        if key not in record:
            raise CADAError(f"{where} has no `{key}`. Is this the annotation file of {pedes.title}?")
    if not isinstance(record["split"], str) or record["split"] not in pedes.counts:
        known = f"{pedes.title} has {', '.join(pedes.counts)}"
        raise CADAError(f"{where}: unknown split {record['split']!r}. {known}. Correct the row.")
    name = record[pedes.path_key]
    return {
        "path": str(image_path(name, root, where, pedes.images)),
        "captions": check_captions(record["captions"], where),
        "person_id": check_person(record["id"], where),
        "file_name": name,
        "row": row,
    }


def image_path(name, root: Path, where: str, folder: str) -> Path:
    """The image file of the row `where`, below `root`, whose name `folder` the path may begin with; a `CADAError`."""
    if not isinstance(name, str) or not name:
        raise CADAError(f"{where}: the image path is {name!r:.80}, not a text. Correct the row.")
    if "\\" in name or not name.isprintable():
        raise CADAError(
            f"{where}: the image path {name!r:.200} holds a backslash or a control character. Write / between "
            "folders, and correct the row."
        )
    path = root / name.removeprefix(f"{folder}/")
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise CADAError(f"{where}: the path {name!r:.200} leaves the data folder {root}. Correct the row.")
    return path


def check_person(person_id, where: str) -> int:
    """The person of the row `where`, a whole number; anything else is a `CADAError`."""
    if isinstance(person_id, bool) or not isinstance(person_id, int) or abs(person_id) >= 2**63:
        raise CADAError(
            f"{where}: the person id is {person_id!r:.80}, not a whole number of at most 18 digits. Correct the row."
        )
    return person_id


def check_captions(captions, where: str) -> list[str]:
    """The captions of the row `where`, texts that say something; anything else is a `CADAError`."""
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise CADAError(f"{where}: `captions` should be a list of strings with at least one. Correct the row.")
    for number, caption in enumerate(captions):
        check_caption(caption, f"{where}: caption {number}")
    return captions


def check_caption(caption: str, what: str) -> None:
    """A text that says something, and not too much; else a `CADAError` about `what`."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise CADAError(
            f"{what} holds half a character at position {error.start} (a lone surrogate). Correct the row."
        ) from error
    if not clean_caption(caption):
        raise CADAError(f"{what} is empty. Write one, or take it out of the row.")
    words = len(caption.split())
    if words > MAX_CAPTION_WORDS or len(caption) > MAX_CAPTION_CHARACTERS:
        raise CADAError(
            f"{what} has {words} words and {len(caption)} characters, at most {MAX_CAPTION_WORDS} and "
            f"{MAX_CAPTION_CHARACTERS} are accepted (the model reads about 70 words). Shorten it."
        )
