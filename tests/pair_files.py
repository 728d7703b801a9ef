"""Pairs without persons in files that a stream reads: Parquet and WebDataset."""

import io
import json
import tarfile
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image


COLOURS = ("red", "green", "blue", "black", "white", "yellow", "brown")


def content_of(number: int) -> bytes:
    """A file of an image whose first pixel is (number, 0, 0)."""
    file = io.BytesIO()
    Image.new("RGB", (16, 32), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def caption_of(number: int) -> str:
    return f"a {COLOURS[number % 7]} coat and number {number}"


def save_parquet(folder: Path, files: int = 4, rows: int = 10, damaged: tuple[int, ...] = ()) -> Path:
    """Rows `image`, `caption`, `who`, numbered over all files, in files that end with a short one."""
    folder.mkdir(parents=True)
    features = Features({"image": ImageFeature(), "caption": Value("string"), "who": Value("string")})
    for file in range(files):
        numbers = range(file * rows, (file + 1) * rows)
        images = [
            {"bytes": b"no image" if number in damaged else content_of(number), "path": f"{number}.png"}
            for number in numbers
        ]
        table = {"image": images, "caption": list(map(caption_of, numbers)), "who": [str(n // 2) for n in numbers]}
        Dataset.from_dict(table, features=features).to_parquet(folder / f"train-{file}.parquet")
    return folder


def save_tars(folder: Path, files: int = 4, rows: int = 10) -> Path:
    """The same as WebDataset: an image and a JSON file for each key."""
    folder.mkdir(parents=True)
    for file in range(files):
        with tarfile.open(folder / f"{file}.tar", "w") as tar:
            for number in range(file * rows, (file + 1) * rows):
                described = json.dumps({"caption": caption_of(number)}).encode()
                for name, content in ((f"{number:03}.png", content_of(number)), (f"{number:03}.json", described)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder
