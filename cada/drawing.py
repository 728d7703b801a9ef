"""Pictures: where words look, ranked images."""

import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers.utils import logging

from cada.explain import AttributePrediction, WordAttention
from cada.files import CADAError, counted
from processing_cada import to_rgb, upright


logger = logging.get_logger(__name__)

COLUMNS = 6  # word maps in a row of the picture
_HOT = np.array([[0, 0, 60], [90, 0, 140], [215, 60, 60], [255, 165, 0], [255, 255, 160]], dtype=np.float32)
MAX_LINE = 160  # characters
GREY = "#57606a"
_BOX = "#ff2d2d"
# Pillow brings a font for English. For all other letters one of the system is asked for, by these names.
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "segoeui.ttf")


def _heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """`weights` (rows, columns) as colours over a grey image, from dark (the smallest) to bright (the largest)."""
    low, high = float(weights.min()), float(weights.max())
    scaled = Image.fromarray(((weights - low) / max(high - low, 1e-12) * 255).astype(np.uint8))
    strength = np.asarray(scaled.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    position = strength * (len(_HOT) - 1)
    below = np.minimum(position.astype(int), len(_HOT) - 2)
    colour = _HOT[below] + (position - below)[..., None] * (_HOT[below + 1] - _HOT[below])
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    return Image.fromarray((0.45 * grey + 0.55 * colour).clip(0, 255).astype(np.uint8))


def _shortened(line: str) -> str:
    """What of a text is drawn: one line of at most `MAX_LINE` characters."""
    line = " ".join(line.split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..."


@cache
def _system_font(size: int) -> ImageFont.FreeTypeFont | None:
    for name in _SYSTEM_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """
    A text and a font of `size` pixels that shows it: Pillow's own for English, else one of the system. Where the
    system has none, letters lose their accents; the rest is `?`.
    """
    font = None if text.isascii() else _system_font(size)
    if font is None:
        text = text.replace("ß", "ss")
        kept = (character for character in unicodedata.normalize("NFKD", text) if not unicodedata.combining(character))
        text, font = "".join(kept).encode("ascii", "replace").decode(), ImageFont.load_default(size)
    return text, font


def _fitted(image: Image.Image, height: int, most: int) -> Image.Image:
    """An image of this height, at most `most` times as wide: a panorama would make a picture of any width."""
    width = min(max(8, round(height * image.width / image.height)), most * height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _sheet(rows: list[tuple[str, list[tuple]]], height: int, columns: int, lines: list[str] = ()) -> Image.Image:
    """
    A picture: under the title of every row its cells, `columns` of them side by side, and `lines` at the end. A cell
    is an image of this `height`, the text below it, and the colour of the text.
    """
    margin, title_height, line_height = 12, 28, 22
    lines = [drawable(_shortened(line), 14) for line in lines]
    rows = [
        (*drawable(_shortened(title), 17), [(image, *drawable(text, 13), ink) for image, text, ink in cells])
        for title, cells in rows
    ]
    all_cells = [cell for *_, cells in rows for cell in cells]
    cell_width = margin + max([96, *(image.width for image, *_ in all_cells)])
    cell_height = height + 20 + 16 * max([1, *(text.count("\n") + 1 for _, text, *_ in all_cells)])
    most = min(columns, max([1, *(len(cells) for *_, cells in rows)]))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lengths = [round(measure.textlength(text, font=font)) + margin for text, font, *_ in (*rows, *lines)]
    total = sum(title_height + cell_height * max(1, -(-len(cells) // columns)) for *_, cells in rows)
    size = (margin + max(cell_width * most, *lengths), total + line_height * len(lines) + margin)
    canvas = Image.new("RGB", size, "white")
    draw, upper = ImageDraw.Draw(canvas), margin
    for title, font, cells in rows:
        draw.text((margin, upper), title, fill="black", font=font)
        upper += title_height
        for start in range(0, max(1, len(cells)), columns):
            for place, (image, text, font, ink) in enumerate(cells[start : start + columns]):
                left = margin + place * cell_width
                canvas.paste(image, (left, upper))
                draw.multiline_text((left, upper + 4 + height), text, fill=ink, font=font, spacing=2)
            upper += cell_height
    for line, font in lines:
        draw.text((margin, upper), line, fill=GREY, font=font)
        upper += line_height
    return canvas


def draw_explanation(
    image: Image.Image, text: str, attention: WordAttention, predictions: list[AttributePrediction], height: int = 192
) -> Image.Image:
    """
    The picture: the image, a map for every word, and the predictions as lines of text. Long lines are cut, and an
    image that is more than three times as wide as high is shown narrower.
    """
    image = _fitted(to_rgb(upright(image)), height, most=3)  # upright, as the processor sees it
    letters = max(image.width, 96) // 8  # that have place below it
    cells = [(image, "image", "black")]
    cells += [(_heat(image, map_), word[:letters], "black") for word, map_ in zip(attention.words, attention.maps)]
    lines = ["masked: what the image suggests"] if predictions else []
    for prediction in predictions:
        pieces = [", ".join(f"{word} {chance:.2f}" for word, chance in guesses) for guesses in prediction.guesses]
        lines.append(f"{prediction.phrase}: {' | '.join(pieces)}")
    return _sheet([(text, cells)], height, COLUMNS, lines)


def draw_results(
    gallery,
    rankings: dict[str, list],
    caption: Callable[[str, int, object], tuple[str, str]] | None = None,
    height: int = 192,
    columns: int = 10,
    frames: bool = False,
) -> Image.Image:
    """
    A picture: under every title of `rankings` its ranked images, `columns` of them in a line. In place of an image
    that is gone or has changed stands a grey field.

    Args:
        gallery: an open index, see [`cada.gallery.index.GalleryIndex`].
        rankings: lists of [`cada.gallery.index.Result`].
        caption: gives the text below an image (lines apart by newlines) and its colour, from title, rank (from 1) and
            result; by default rank and score.
        height: of the images in pixels.
        frames: show whole frames with the box of the person, and below them the names of files and the times.
    """
    rows, lost = [], []
    for title, results in rankings.items():
        cells = []
        for rank, result in enumerate(results, start=1):
            try:
                image = draw_frame(gallery, result) if frames else gallery.image(result.name).convert("RGB")
            except CADAError as error:
                lost.append(error)
                image = Image.new("RGB", (height // 2, height), "#d0d7de")
            where = f"\n{result.place.rpartition('/')[2]}" if frames else ""
            below = caption(title, rank, result) if caption else (f"{rank}.  {result.score:.3f}{where}", GREY)
            cells.append((_fitted(image, height, most=2), *below))
        rows.append((title, cells))
    if lost:
        logger.warning(f"{counted(len(lost), 'image')} cannot be shown, such as this: {lost[0]}")
    return _sheet(rows, height, columns)


def draw_frame(gallery, result) -> Image.Image:
    """The whole image, or frame of a video, of a [`cada.gallery.index.Result`], with a box around the person."""
    frame = gallery.frame(result.name).convert("RGB")
    if result.box is not None:
        x, y, width, height = result.box
        line = max(2, frame.height // 90)
        outside = (x - line, y - line, x + width + line - 1, y + height + line - 1)
        ImageDraw.Draw(frame).rectangle(outside, outline=_BOX, width=line)
    return frame


def check_picture(path: Path) -> None:
    """A `CADAError` where `path` has an ending that names no format of pictures."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise CADAError(f"The picture {path} cannot be written: no such format. Give a name such as out.png.")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture; a `CADAError` where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        raise CADAError(f"The picture {path} cannot be written: {error}. Choose another place or name.") from error
