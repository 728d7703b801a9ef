"""Which persons the files of a source show: what an index holds a row for."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image
from tqdm.auto import tqdm

from cada.data.images import box_within, open_image
from cada.files import CADAError, counted, parse_json, problem_of, written_whole
from cada.gallery.boxes import Boxes, read_boxes
from cada.gallery.detector import Detector, detector_version
from cada.gallery.images import ImageFiles, ImageRows, metadata_columns
from cada.gallery.regions import Region
from cada.gallery.store import FOUND
from cada.gallery.video import picture, sample


_OF_DETECTOR = {"min_score": 0.5, "min_height": 32, "margin": 0.0}
_FRAMES_AT_ONCE = 8
_LIMITS = {"min_score": (0, 1), "min_height": (0, 100_000), "margin": (0, 10), "fps": (0.001, 1000)}


def person_settings(given: dict, recorded: dict | None) -> dict:
    """
    How the persons in the files are found: what is `given` (`boxes`, `detector`, `min_score`, `min_height`, `margin`,
    `fps`), else what an index has `recorded`. A `CADAError` where they do not fit each other.
    """
    old = recorded or {"boxes": None, "detector": None, "detector_version": None, "fps": 1.0, **_OF_DETECTOR}
    new = {name: value for name, value in given.items() if name in old and value is not None}
    if "boxes" in new and "detector" in new:
        raise CADAError("--boxes and --detector both say where persons are. Give one of them.")
    if "boxes" in new:
        new |= {"boxes": str(Path(new["boxes"]).resolve()), "detector": None}
    elif "detector" in new:
        is_folder = os.path.isdir(new["detector"])
        new |= {"boxes": None, "detector": os.path.realpath(new["detector"]) if is_folder else new["detector"]}
    settings = old | new
    named = [name for name in _OF_DETECTOR if given[name] is not None]
    if named and settings["detector"] is None:
        raise CADAError(f"--{named[0].replace('_', '-')} is for a --detector, and there is none. Leave it out.")
    for name, (least, most) in _LIMITS.items():
        if not least <= settings[name] <= most:
            raise CADAError(f"--{name.replace('_', '-')} is {settings[name]}. Give a number from {least} to {most}.")
    version = None
    if settings["detector"] is not None:
        same = settings["detector"] == old["detector"]
        version = detector_version(settings["detector"], old["detector_version"] if same else None)
    return settings | {"detector_version": version}


class Persons:
    """
    Finds the persons in the files of a source, as `settings` (of [`person_settings`]) say. What takes long is kept in
    the folder of the index, and done again only for files that have changed.

    Attributes:
        empty: the number of files in which the last [`entries`] found nobody.
    """

    def __init__(
        self, images: ImageFiles | ImageRows, settings: dict, index: Path, device: torch.device, check_content: bool
    ):
        self.images, self.settings, self.device, self.check_content = images, settings, device, check_content
        self.file, self.empty = index / FOUND, 0

    @property
    def kind(self) -> str:
        """What a row of the index is: an image, or a frame of a video, or a person in one."""
        return "person" if self.settings["boxes"] or self.settings["detector"] else "image"

    @property
    def remedy(self) -> str:
        """What to do where nobody was found."""
        if self.settings["boxes"]:
            return f"Are the boxes of {self.settings['boxes']} x, y, width and height in pixels?"
        return "Lower --min-score or --min-height, or take another --detector."

    def entries(self, files: pa.Table, problems: list[tuple[str, str]]) -> pa.Table:
        """
        A row for every person, in the order of names: the name of the region as `path`, and the other columns of its
        file in `files`, with those that are known of the person. Appends to `problems` what cannot be read.
        """
        find = self._in_boxes if self.settings["boxes"] else self._in_images
        regions, metadata = find(files, problems)
        row_of = {path: row for row, path in enumerate(files["path"].to_pylist())}
        table = files.take(pa.array([row_of[region.path] for region in regions], pa.int64()))
        table = table.set_column(0, "path", pa.array([region.name for region in regions], pa.string()))
        if any(region.time is not None for region in regions):
            metadata["time"] = pa.array([region.time for region in regions], pa.float64())
        for name, column in metadata.items():
            if name in table.column_names:
                raise CADAError(
                    f"Both the list of images and the persons have a column `{name}`. Rename it in the list."
                )
            table = table.append_column(name, column)
        named = {region.path for region in regions} | {path for path, _ in problems}
        self.empty = len(row_of.keys() - named)
        return table.sort_by("path")

    def _in_boxes(self, files: pa.Table, problems: list) -> tuple[list[Region], dict[str, pa.Array]]:
        """The boxes that a file gives."""
        boxes = read_boxes(Path(self.settings["boxes"]))
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(boxes.paths):
            rows_of.setdefault(self.images.path_of(name) or name, []).append(row)
        there, unreadable = set(files["path"].to_pylist()), {path for path, _ in problems}
        if not there & rows_of.keys():
            named = f"it names {boxes.paths[0]}" if boxes.paths else "it has no boxes"
            raise CADAError(
                f"{boxes.file} has no box in any of the {counted(len(there), 'file')} to index: {named}. Write paths "
                "relative to the folder of the images."
            )
        row_of: dict[Region, int] = {}
        for path, rows in tqdm(rows_of.items(), "Looking at boxes", unit="image", leave=False, delay=5):
            if path in there:
                self._place(path, rows, boxes, row_of, problems)
            elif path not in unreadable:
                problems.append((path, f"is not there, but {boxes.place(rows[0])} names it"))
        rows = pa.array(row_of.values(), pa.int64())
        metadata = metadata_columns(boxes.metadata, str(boxes.file))
        return list(row_of), {name: column.take(rows) for name, column in metadata.items()}

    def _place(self, path: str, rows: list[int], boxes: Boxes, row_of: dict[Region, int], problems: list) -> None:
        """Put the regions of one image into `row_of`, each with its row in the file of boxes."""
        video = self.images.is_video(path)
        try:
            size = self.images.size(Region(path, None, 0.0 if video else None).name)
        except (OSError, CADAError) as error:
            problems.append((path, f"cannot be decoded: {problem_of(error)}"))
            return
        for row in rows:
            box, time = box_within(boxes.boxes[row], size), boxes.times[row]
            region = Region(path, box, time if video else None)
            if box is None:
                problem = f"has no area inside of the {size[0]}×{size[1]} pixels"
            elif video and time is None:
                problem = "lacks the `time` in this video"
            elif region in row_of:
                problem = f"is that of {boxes.place(row_of[region])}, too"
            else:
                row_of[region] = row
                continue
            problems.append((path, f"{boxes.place(row)}: the box {_written(boxes.boxes[row])} {problem}"))

    def _in_images(self, files: pa.Table, problems: list) -> tuple[list[Region], dict[str, pa.Array]]:
        """The persons that the detector finds; without a detector each image, and each frame of a video, is one."""
        wanted = dict(zip(files["path"].to_pylist(), files["stamp"].to_pylist()))
        detector = self.settings["detector"]
        slow = {path: stamp for path, stamp in wanted.items() if detector or self.images.is_video(path)}
        found = self._search(slow) if slow else {}
        regions, scores = [], []
        for path in wanted:
            if path not in slow:
                regions.append(Region(path))
                continue
            problems += [(path, found[path]["problem"])] if found[path]["problem"] else []
            regions += [Region(path, box and tuple(box), time) for time, box, _ in found[path]["persons"]]
            scores += [score for *_, score in found[path]["persons"]]
        return regions, {"score": pa.array(scores, pa.float64())} if detector else {}

    def _search(self, files: dict[str, str]) -> dict[str, dict]:
        """What is known of the files (path and stamp), or found now and kept."""
        first = {"settings": {name: value for name, value in self.settings.items() if name != "boxes"}}
        kept = self._known(first)
        known = {
            path: kept[path] | {"stamp": stamp} for path, stamp in files.items() if self._holds(kept, path, stamp)
        }
        with written_whole(self.file) as temporary:
            lines = [first, *known.values()]
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if todo := [path for path in files if path not in known]:
            detector = Detector(self.settings, self.device) if self.settings["detector"] else None
            bar = tqdm(total=len(todo), desc="Looking for persons", unit="file", leave=False, delay=2)
            with bar, open(self.file, "a", encoding="utf-8") as file:
                for row in self._rows(todo, detector):
                    known[row["path"]] = row
                    # Stamps are of the time before: what changes meanwhile is looked at again.
                    row |= {"stamp": files[row["path"]]}
                    if row["persons"] or not row["problem"]:  # what cannot be read is tried again
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                    bar.update()
        return known

    def _known(self, first: dict) -> dict[str, dict]:
        """What earlier runs with these settings have kept; a line that is not whole is of an interrupted one."""
        try:
            lines = [parse_json(line) for line in self.file.read_text(encoding="utf-8").split("\n")[:-1]]
            return {row["path"]: row for row in lines[1:]} if lines[0] == first else {}
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return {}

    def _holds(self, kept: dict[str, dict], path: str, stamp: str) -> bool:
        """Whether what was kept of a file is true of it now."""
        if path not in kept:
            return False
        try:
            same = stamp == kept[path]["stamp"] and not self.check_content
            return same or self.images.digest(path) == kept[path]["digest"]
        except OSError:
            return False

    def _rows(self, paths: list[str], detector: Detector | None) -> Iterator[dict]:
        """One row for each file: `path`, `digest`, `persons` (time, box, score), `problem`."""
        rows = {path: {"path": path, "digest": None, "persons": [], "problem": None} for path in paths}
        frames, waiting = self._frames(rows, detector is not None), iter(rows.values())
        row = next(waiting)
        while batch := list(islice(frames, _FRAMES_AT_ONCE)):
            found = detector.find([image for *_, image in batch]) if detector else [[(None, None)]] * len(batch)
            for (path, time, _), persons in zip(batch, found):
                rows[path]["persons"] += [(time, *person) for person in persons]
            while row["path"] != batch[-1][0]:
                yield row
                row = next(waiting)
        yield row
        yield from waiting

    def _frames(self, rows: dict[str, dict], read: bool) -> Iterator[tuple[str, float | None, Image.Image | None]]:
        """Path, time and, where they are to be `read`, image of every frame. Notes digests and problems in `rows`."""
        for path, row in rows.items():
            try:
                row["digest"] = self.images.digest(path)
                if not self.images.is_video(path):
                    yield path, None, open_image({"bytes": self.images.read(path), "path": None})
                    continue
                for time, frame in sample(self.images.file_of(path), self.settings["fps"]):
                    yield path, time, open_image({"bytes": picture(frame), "path": None}) if read else None
            except (OSError, CADAError) as error:
                before = "" if self.images.is_video(path) else "cannot be decoded: "
                row["problem"] = before + problem_of(error)


def _written(box: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in box)
