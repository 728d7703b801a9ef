"""Images of a data set: opened in one place, with errors that name them."""

import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import BinaryIO

from datasets import Dataset, Image
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage
from tqdm.auto import tqdm

from cada.files import CADAError, one_line
from processing_cada import IMAGE_FORMATS, orientation, read_image


Box = tuple[int, int, int, int]  # x, y, width, height in pixels of the upright image


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
            open_image({"path": path, "bytes": content}, box=image.get("box"))
        except CADAError as error:
            return f"cannot be decoded ({error})"
    return None


def find_bad_images(split: str, images: Iterable[dict], count: int, decode: bool) -> dict[int, str]:
    """
    Which of `count` images (`row`, `path`, and `bytes` where a table holds the content) are missing, empty or (with
    `decode`) damaged: name, row and what is wrong, by their place in `images`.
    """
    problems = {}
    images = tqdm(images, desc=f"{split}: images", unit="image", total=count, disable=count < 1000)
    for place, image in enumerate(images):
        problem = _image_problem(image, decode)
        if problem:
            name = image["path"] or image.get("file_name") or "The image"
            problems[place] = f"{name} (row {image['row']}) {problem}"
    return problems


def undecoded(dataset: Dataset) -> Dataset:
    """The same rows, whose images [`read_row`] decodes."""
    feature = dataset.features["image"]
    is_decoded = isinstance(feature, Image) and feature.decode
    return dataset.cast_column("image", Image(decode=False)) if is_decoded else dataset


def open_image(image: dict, size: tuple[int, int] | None = None, box: Box | None = None) -> PILImage.Image:
    """
    The image of an undecoded row, read for a model that reads `size` (height, width), see [`read_image`]; or what is
    in its `box`.

    Raises:
        CADAError: what is wrong with it; whoever calls names the row.
    """
    content, path = image["bytes"], image["path"]
    if content is None and path is None:
        raise CADAError("there is neither a file name nor content")
    try:
        if content is None and "://" in path and not os.path.exists(path):  # of an archive, or remote
            with xopen(path, "rb") as remote:
                content = remote.read()
        opened = read_image(path if content is None else BytesIO(content), size if box is None else None)
    except Exception as error:  # Pillow's readers of the formats raise many kinds on damaged files
        raise CADAError(one_line(error)) from error
    return opened if box is None else cut_out(opened, box)


def box_within(box: Sequence[float], size: tuple[int, int]) -> Box | None:
    """What of a box (x, y, width, height) lies in an image of `size` (width, height); `None` where that is nothing."""
    x, y, width, height = box
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(size[0], round(x + width)), min(size[1], round(y + height))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def cut_out(image: PILImage.Image, box: Box) -> PILImage.Image:
    """What is in a box of an image; a `CADAError` where it lies outside."""
    x, y, width, height = box
    if x + width > image.width or y + height > image.height:
        raise CADAError(f"the box {x}, {y}, {width}, {height} is not inside of {image.width}×{image.height} pixels")
    return image.crop((x, y, x + width, y + height))


def image_size(file: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Width and height in pixels of an image, upright; only PNG is decoded. A `CADAError` where it is no image."""
    try:
        with PILImage.open(file, formats=IMAGE_FORMATS) as opened:
            if opened.format == "PNG":
                opened.load()  # the EXIF may stand behind the pixels
            return opened.size[::-1] if orientation(opened) in range(5, 9) else opened.size
    except Exception as error:  # as above
        raise CADAError(one_line(error)) from error


def open_file(path: str | os.PathLike) -> PILImage.Image:
    """
    The image of a file that somebody names.

    Raises:
        CADAError: names the file and what is wrong with it.
    """
    try:
        return open_image({"path": os.fspath(path), "bytes": None})
    except CADAError as error:
        raise CADAError(f"The image {path} cannot be read: {error}.") from error
