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
# Characters of a line in the picture.
MAX_LINE = 160
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


def shortened(line: str) -> str:
    """What of a line is drawn: at most `MAX_LINE` characters."""
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


def draw_explanation(
    image: Image.Image, text: str, attention: WordAttention, predictions: list[AttributePrediction], height: int = 192
) -> Image.Image:
    """
    The picture: the image, a map for every word, and the predictions as lines of text. Long lines are cut, and an
    image that is more than three times as wide as high is shown narrower.
    """
    image = to_rgb(upright(image))  # upright, as the processor sees it
    # A panorama would make a picture of any width, a strip none that can be seen.
    width = min(max(8, round(height * image.width / image.height)), 3 * height)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    text = shortened(" ".join(text.split()))
    cell_width, cell_height, margin = max(image.width, 96) + 12, height + 30, 12
    panels = [("image", image)]
    panels += [(word, _heat(image, weights)) for word, weights in zip(attention.words, attention.maps)]
    rows = -(-len(panels) // COLUMNS)
    title, large = drawable(text, 17)
    lines = ["masked: what the image suggests"] if predictions else []
    for prediction in predictions:
        pieces = [", ".join(f"{word} {chance:.2f}" for word, chance in guesses) for guesses in prediction.guesses]
        lines.append(shortened(f"{prediction.phrase}:  {'  |  '.join(pieces)}"))
    lines = [drawable(line, 14) for line in lines]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_width = max(measure.textlength(line, font=font) for line, font in [(title, large), *lines])
    width = max(COLUMNS * cell_width, round(text_width)) + 2 * margin
    top = margin + 30
    lines_top = top + rows * cell_height + 8
    canvas = Image.new("RGB", (width, lines_top + (8 + 22 * len(lines) if lines else 0) + margin), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), title, fill="black", font=large)
    for number, (label, panel) in enumerate(panels):
        left, upper = margin + number % COLUMNS * cell_width, top + number // COLUMNS * cell_height
        canvas.paste(panel, (left, upper))
        label, small = drawable(label[: cell_width // 8], 14)
        draw.text((left, upper + height + 4), label, fill="black", font=small)
    for number, (line, small) in enumerate(lines):
        place = (margin, lines_top + 22 * number + (4 if number else 0))
        draw.text(place, line, fill="black" if number else "#57606a", font=small)
    return canvas


def draw_results(
    gallery,
    rankings: dict[str, list],
    caption: Callable[[str, int, object], tuple[str, str]] | None = None,
    height: int = 192,
    columns: int = 10,
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
    """
    measure, margin, rows, lost = ImageDraw.Draw(Image.new("RGB", (1, 1))), 12, [], []
    for title, results in rankings.items():
        cells = []
        for rank, result in enumerate(results, start=1):
            try:
                image = gallery.image(result.path).convert("RGB")
            except CADAError as error:
                lost.append(error)
                image = Image.new("RGB", (height // 2, height), "#d0d7de")
            # A very wide picture would leave no place for the others.
            width = min(max(1, round(height * image.width / image.height)), 2 * height)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            text, colour = caption(title, rank, result) if caption else (f"{rank}.  {result.score:.3f}", "#57606a")
            cells.append((image, *drawable(text, 13), colour))
        rows.append((*drawable(shortened(" ".join(title.split())), 17), cells))
    if lost:
        logger.warning(f"{counted(len(lost), 'image')} cannot be shown, such as this: {lost[0]}")
    cell = margin + max([96, *(image.width for *_, cells in rows for image, *_ in cells)])
    lines = max([1, *(text.count("\n") + 1 for *_, cells in rows for _, text, *_ in cells)])
    line_height, title_height = height + 20 + 16 * lines, 26
    width = margin + max(
        cell * min(columns, max([1, *(len(cells) for *_, cells in rows)])),
        *(round(measure.textlength(title, font=font)) + margin for title, font, _ in rows),
    )
    total = sum(title_height + line_height * max(1, -(-len(cells) // columns)) for *_, cells in rows)
    canvas = Image.new("RGB", (width, total + margin), "white")
    draw, upper = ImageDraw.Draw(canvas), margin
    for title, font, cells in rows:
        draw.text((margin, upper), title, fill="black", font=font)
        upper += title_height
        for start in range(0, max(1, len(cells)), columns):
            for place, (image, text, font, colour) in enumerate(cells[start : start + columns]):
                left = margin + place * cell
                canvas.paste(image, (left, upper))
                draw.multiline_text((left, upper + 4 + height), text, fill=colour, font=font, spacing=2)
            upper += line_height
    return canvas


def check_picture(path: Path) -> None:
    """
    Raises:
        CADAError: where `path` has an ending that names no format of pictures.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise CADAError(f"The picture {path} cannot be written: no such format. Give a name such as out.png.")


def save_picture(picture: Image.Image, path: Path) -> None:
    """
    Raises:
        CADAError: where `path` cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        raise CADAError(f"The picture {path} cannot be written: {error}. Choose another place or name.") from error
