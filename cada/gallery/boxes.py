"""Files of boxes: where persons are, as any other tool has found them. COCO JSON, CSV or JSONL."""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cada.files import CADAError, read_json
from cada.gallery.lists import PATH_COLUMNS, read_list, typed_column


SIDES = ("x", "y", "width", "height")
_OF_COCO = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints", "num_keypoints"}


@dataclass(frozen=True)
class Boxes:
    """
    The rows of a file of boxes.

    Attributes:
        file: its name.
        paths: of the images, as they are written.
        boxes: x, y, width and height in pixels of the upright image; no box may be without area.
        times: seconds since the beginning of a video, `None` for an image.
        metadata: the other columns.
    """

    file: Path
    paths: list[str]
    boxes: list[tuple[float, float, float, float]]
    times: list[float | None]
    metadata: dict[str, pa.Array]

    def place(self, row: int) -> str:
        """How a message names a row."""
        return f"{self.file}, {'annotation' if self.file.suffix.lower() == '.json' else 'row'} {row + 1}"


def read_boxes(file: Path) -> Boxes:
    """
    The boxes of a file. COCO JSON has `images` and `annotations`; of several categories only `person` counts, and
    crowds do not. CSV and JSONL have a column that names the image (`path`, `file_name` or `image`), the box (columns
    `x`, `y`, `width`, `height`, or in JSONL a list `box` or `bbox` of these), for videos `time` in seconds, and any
    metadata.

    Raises:
        CADAError: where it cannot be read so, or a row lacks its path, box or time; names file and row.
    """
    kind = file.suffix.lower()
    if kind not in (".json", ".csv", ".jsonl"):
        raise CADAError(f"--boxes {file} is of no kind that is read. Give COCO JSON, CSV or JSONL.")
    if not file.is_file():
        raise CADAError(f"--boxes {file} is not a file that is there. Say where the boxes are.")
    columns = _read_coco(file) if kind == ".json" else read_list(file)
    named_by = next((name for name in PATH_COLUMNS if name in columns), None)
    if named_by is None:
        raise CADAError(f"{file} has no column that names the images: one of {', '.join(PATH_COLUMNS)}.")
    paths, listed = columns.pop(named_by), next((name for name in ("box", "bbox") if name in columns), None)
    if listed is None and not columns.keys() >= set(SIDES):
        raise CADAError(f"{file} has no boxes: give the columns {', '.join(SIDES)}, or in JSONL a list `box`.")
    boxes = columns.pop(listed) if listed else list(zip(*(columns.pop(side) for side in SIDES)))
    times = columns.pop("time", [None] * len(paths))
    read = Boxes(file, paths, [], [], {})
    for row, (path, box, time) in enumerate(zip(paths, boxes, times)):
        if not isinstance(path, str) or not path or "\0" in path:
            raise CADAError(f"{read.place(row)}: `{named_by}` is {path!r}. Give the path of an image.")
        numbers = _numbers(box)
        if numbers is None:
            raise CADAError(f"{read.place(row)}: the box is {box!r}. Give four numbers: {', '.join(SIDES)}.")
        if time not in (None, "") and (_numbers([time], 1) is None or float(time) < 0):
            raise CADAError(f"{read.place(row)}: `time` is {time!r}. Give seconds since the beginning of the video.")
        read.boxes.append(numbers)
        read.times.append(None if time in (None, "") else float(time))
    read.metadata.update({name: typed_column(file, name, values) for name, values in columns.items()})
    return read


def _numbers(values, count: int = 4) -> tuple[float, ...] | None:
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _read_coco(file: Path) -> dict[str, list]:
    """The columns of the annotations of persons."""
    content = read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise CADAError(
            f"{file} has no `images` and `annotations`, as COCO JSON has. Results of a detector alone, without the "
            "names of the images, are not enough."
        )
    try:
        names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
        kinds = {name.lower() for name in names.values()}
        persons = kinds if len(kinds) == 1 else kinds & {"person"}
        if names and not persons:
            raise CADAError(f"{file} has no category `person`, but {', '.join(names.values())}. Rename one of them.")
        path_of = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [
            {"path": path_of[each["image_id"]], "box": each["bbox"]}
            | {name: value for name, value in each.items() if name not in _OF_COCO}
            for each in content["annotations"]
            if not each.get("iscrowd") and (not names or names[each["category_id"]].lower() in persons)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CADAError(f"{file} is not as COCO JSON is: {type(error).__name__} {error}. Export it again.") from error
    keys = {"path": None, "box": None} | {name: None for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in keys}
