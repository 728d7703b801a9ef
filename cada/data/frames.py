"""
PRW-TBPS: persons in whole frames, by the boxes of PRW and their descriptions. Not run on the real files.

The layout is what others read, see README.md, data/bert_emb.py and mmdet/datasets/prw_tbps.py of
https://github.com/suliangxu/MACA; the descriptions are those of https://github.com/Dacun/Text-based-Person-Search
(arXiv 2109.12965), the frames those of PRW (arXiv 1604.02531). One folder holds:

    PRW-TBPS_train, PRW-TBPS_test   JSON lists of {"pic_path": "c1s1_000151.jpg", "id": 1, "desrciption": [...]}
    frames/c1s1_000151.jpg
    annotations/c1s1_000151.jpg.mat   a table of id (-2: nobody knows), x, y, width, height
    frame_test.mat                  `img_index_test`: the frames of the test, without .jpg
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers.utils import logging

from cada.data.images import Box, box_within, image_size
from cada.data.pedes import PEDES_SETS, check_captions, check_person, find_files, image_path
from cada.files import CADAError, one_line, read_json


logger = logging.get_logger(__name__)
_TABLES = ("box_new", "anno_file", "anno_previous")  # names seen for the table of boxes
_ANY_SIZE = (2**31, 2**31)


def read_frames(data_dir: str | os.PathLike | None) -> dict[str, list[dict]]:
    """
    The rows of PRW-TBPS by split, as of [`read_annotations`], each with its `box` in the frame. `train` holds the
    boxes with descriptions. `test` holds all boxes of its frames: a sentence searches them all. Persons whom no
    sentence of the test describes get negative numbers, each box its own, so they are never right.

    Raises:
        CADAError: names the file, the row or frame, and the remedy.
    """
    pedes = PEDES_SETS["prw_tbps"]
    file, folder = find_files(pedes, data_dir)
    root, splits = file.parent, {}
    for split, name in zip(pedes.counts, pedes.annotations):
        texts, rows = _read_texts(root / name, folder), []
        described = {person_id for _, person_id in texts}
        if split == "test":
            frames = [f"{frame}.jpg" for frame in _read_mat(root / "frame_test.mat", ("img_index_test",)).flat]
        else:
            frames = list(dict.fromkeys(frame for frame, _ in texts))
        for frame, person_id, box in _persons(root, frames):
            captions = texts.pop((frame, person_id), [])
            if captions or split == "test":
                row = {"path": str(folder / frame), "box": box, "captions": captions, "file_name": frame}
                row |= {"person_id": person_id if person_id in described else -1 - len(rows), "row": len(rows)}
                rows.append(row)
        if texts:
            frame, person_id = next(iter(texts))
            raise CADAError(
                f"{root / name} describes person {person_id} in {frame}, who has no box there ({len(texts)} such). "
                "Are annotations/ and frame_test.mat those of PRW, all of them?"
            )
        splits[split] = rows
    return splits


def _read_texts(file: Path, frames: Path) -> dict[tuple[str, int], list[str]]:
    """Captions by frame and person."""
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise CADAError(f"{file} should be a JSON list with one object per person and frame. Fetch it again.")
    texts: dict[tuple[str, int], list[str]] = {}
    for row, record in enumerate(records):
        where = f"{file}, row {row}"
        if not isinstance(record, dict) or not {"pic_path", "id", "desrciption"} <= record.keys():
            raise CADAError(f"{where} should be an object with `pic_path`, `id` and `desrciption`. Fetch it again.")
        image_path(record["pic_path"], frames, where, "frames")
        pieces = record["desrciption"]
        captions = check_captions(
            [piece for piece in pieces if piece != ""] if isinstance(pieces, list) else pieces, where
        )
        # There are two at most; further pieces belong to the second, as in MACA's data/bert_emb.py.
        captions = captions[:1] + ([" ".join(captions[1:])] if captions[1:] else [])
        texts.setdefault((record["pic_path"], check_person(record["id"], where)), []).extend(captions)
    return texts


def _persons(root: Path, frames: list[str]) -> Iterator[tuple[str, int, Box]]:
    """Frame, person and box of everybody. Several boxes of PRW reach beyond their frame; they end at its edge."""
    outside = 0
    for frame in frames:
        file = root / "annotations" / f"{frame}.mat"
        table = _read_mat(file, _TABLES)
        if table.size % 5 or table.dtype.kind not in "iuf" or not np.isfinite(table).all():
            raise CADAError(
                f"{file} should hold five numbers for each box: person, x, y, width, height. Fetch it again."
            )
        try:
            size = image_size(root / "frames" / frame)
        except CADAError:  # the check of the images names it
            size = _ANY_SIZE
        for person_id, *corners in table.reshape(-1, 5).tolist():
            box = box_within(corners, size)
            outside += box is None
            if box is not None:
                yield frame, int(person_id), box
    if outside:
        logger.warning(f"{root}: {outside} box(es) lie outside of their frame and are left out.")


def _read_mat(file: Path, names: tuple[str, ...]) -> np.ndarray:
    """The first of these variables of a file of MATLAB; cells of texts become texts."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise CADAError("PRW has files of MATLAB. To read them: pip install scipy.") from error
    try:
        content = loadmat(file, simplify_cells=True)
    except Exception as error:  # the library raises many kinds
        raise CADAError(
            f"{file} cannot be read ({type(error).__name__}: {one_line(error)}). Fetch it again."
        ) from error
    found = next((content[name] for name in names if name in content), None)
    if found is None:
        raise CADAError(f"{file} holds none of {', '.join(names)}. Is it a file of PRW?")
    return np.atleast_1d(found)
