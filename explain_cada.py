"""
Why an image fits a sentence: where every word looks, and which words the image suggests for masked attributes.

    python explain_cada.py --model demo/model --image person.png --text "A man in a red coat." --output why.png

The picture is for the reader; `--arrays why.npz` and the functions below give the numbers (Fig. 5 and 6 of the paper).
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep

import argparse
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoint_cada import check_processor, load_model, load_processor
from data_cada import DataError, open_image
from files_cada import CADAError, Parser, make_output_folder, run_command, written_whole
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor, clean_caption, to_rgb, upright


COLUMNS = 6  # word maps in a row of the picture
_HOT = np.array([[0, 0, 60], [90, 0, 140], [215, 60, 60], [255, 165, 0], [255, 255, 160]], dtype=np.float32)
# Characters of a line in the picture.
MAX_LINE = 160
# Pillow brings a font for English. For all other letters one of the system is asked for, by these names.
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "segoeui.ttf")


class ExplainError(CADAError):
    """An image, a sentence or an argument that cannot be explained with. The message names it and the remedy."""


@dataclass
class WordAttention:
    """
    Attention of every word on the patches.

    Attributes:
        words: the words of the cleaned sentence.
        maps: `(words, rows, columns)`, the share of a word's attention on each patch; with the class token's share a
            word's map adds up to 1.
    """

    words: list[str]
    maps: np.ndarray


@dataclass
class AttributePrediction:
    """
    What the decoder reads off the image for a masked attribute.

    Attributes:
        phrase: the words that were masked.
        guesses: for every masked word piece the most probable ones with their probabilities, best first.
    """

    phrase: str
    guesses: list[list[tuple[str, float]]]


@contextmanager
def _eager(model: CADAForTextToImageRetrieval) -> Iterator[None]:
    """Only eager attention hands out its probabilities."""
    before = model.config._attn_implementation
    was_training = model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)


def _encode(model, processor, image: Image.Image, text: str):
    """Inputs on the model's device, patch states, and the word pieces' offsets in the cleaned sentence."""
    inputs = processor(images=image, text=[text], return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0].tolist()
    if not clean_caption(text) or not any(first < last for first, last in offsets):
        raise ExplainError("The sentence is empty. Describe a person.")
    inputs = inputs.to(model.device)
    return inputs, model.encode_images(inputs["pixel_values"]), offsets


def _pieces(offsets: list[list[int]], start: int, end: int) -> list[int]:
    """Positions of the word pieces between two characters; special tokens have no characters."""
    return [number for number, (first, last) in enumerate(offsets) if first < last and first < end and last > start]


@torch.no_grad()
def word_attention(
    model: CADAForTextToImageRetrieval,
    processor: CADAProcessor,
    image: Image.Image,
    text: str,
    layer: int | None = None,
    head: int | None = None,
) -> WordAttention:
    """
    Where every word of `text` looks in `image`, in the matching task.

    Args:
        layer, head: of the decoder's cross-attention, counted from 0, negative ones from the end; by default the mean.

    Raises:
        ValueError: for a layer or head that the model has not, an empty sentence, or a model without decoder.
    """
    config = model.config
    if not config.use_atp:
        raise ValueError("This model has no match head (`use_atp=False`), so no decoder that reads the image.")
    sizes = {"layer": config.text_config.num_hidden_layers, "head": config.text_config.num_attention_heads}
    for name, value in (("layer", layer), ("head", head)):
        if value is not None and not -sizes[name] <= value < sizes[name]:
            raise ValueError(f"`{name}` is {value}, but the decoder has {sizes[name]}: 0 to {sizes[name] - 1}.")
    with _eager(model):
        inputs, states, offsets = _encode(model, processor, image, text)
        input_ids = inputs["input_ids"].clone()
        input_ids[:, 0] = config.text_config.enc_token_id
        outputs = model.cada.text_model(input_ids, inputs["attention_mask"], states, output_attentions=True)
    attention = torch.stack(outputs.cross_attentions)[:, 0].float()  # (layers, heads, tokens, 1 + patches)
    attention = attention.mean(dim=0) if layer is None else attention[layer]
    attention = attention.mean(dim=0) if head is None else attention[head]
    grid = attention[:, 1:].view(-1, *config.vision_config.grid_size).cpu().numpy()

    words, maps, cleaned, start = [], [], clean_caption(text), 0
    for word in cleaned.split(" "):
        end = start + len(word)
        pieces = _pieces(offsets, start, end)
        if pieces:  # words behind the longest text that the model reads are cut
            words.append(word)
            maps.append(grid[pieces].mean(axis=0))
        start = end + 1
    return WordAttention(words, np.stack(maps))


@torch.no_grad()
def attribute_predictions(
    model: CADAForTextToImageRetrieval, processor: CADAProcessor, image: Image.Image, text: str, top: int = 3
) -> list[AttributePrediction]:
    """
    The `top` predictions for every attribute phrase of `text`, each masked alone, as ARA learns it.

    Raises:
        ValueError: for an empty sentence, or a model without vocabulary head.
    """
    if not model.config.use_ara:
        raise ValueError("This model has no vocabulary head (`use_ara=False`), so it predicts no attributes.")
    cleaned = clean_caption(text)
    spans = processor.attribute_masker.find_spans(cleaned)
    with _eager(model):
        inputs, states, offsets = _encode(model, processor, image, text)
        predictions = []
        for start, end in spans:
            masked = _pieces(offsets, start, end)
            if not masked:
                continue
            input_ids = inputs["input_ids"].clone()
            input_ids[0, masked] = processor.tokenizer.mask_token_id
            outputs = model.cada.text_model(
                input_ids, inputs["attention_mask"], states, is_causal=model.config.ara_causal
            )
            chances = model.vocabulary_head(outputs.last_hidden_state[0, masked]).float().softmax(dim=-1)
            best = chances.topk(top)
            guesses = [
                list(zip(processor.tokenizer.convert_ids_to_tokens(ids), values))
                for ids, values in zip(best.indices.tolist(), best.values.tolist())
            ]
            predictions.append(AttributePrediction(cleaned[start:end], guesses))
    return predictions


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


def _explain(options: argparse.Namespace) -> None:
    outputs = [options.output] if options.arrays is None else [options.output, options.arrays]
    for name, path, ending in zip(("--output", "--arrays"), outputs, (".png", ".npz")):
        if path.suffix.lower() != ending:
            raise ExplainError(f"{name} {path} should end in {ending}.")
        if path.is_dir():
            raise ExplainError(f"{name} {path} is a folder. Give the name of a file.")
        make_output_folder(path.parent)
    try:
        image = open_image({"path": os.fspath(options.image), "bytes": None})
    except DataError as error:
        raise ExplainError(f"The image {options.image} cannot be read: {error}.") from error
    model = load_model(options.model, options.revision)
    processor = load_processor(options.model, options.revision)
    check_processor(processor, model.config)
    try:
        attention = word_attention(model, processor, image, options.text, options.layer, options.head)
        predictions = attribute_predictions(model, processor, image, options.text) if model.config.use_ara else []
    except ValueError as error:
        raise ExplainError(str(error)) from error
    with written_whole(options.output) as path:
        draw_explanation(image, options.text, attention, predictions).save(path)
    if options.arrays is not None:
        with written_whole(options.arrays) as path:
            np.savez(path, words=np.array(attention.words), maps=attention.maps)
    for prediction in predictions:
        best = " ".join(piece[0][0] for piece in prediction.guesses)
        print(f"{prediction.phrase}: the image suggests {best}")
    print(f"Wrote {options.output}.")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a CADA checkpoint")
    parser.add_argument("--revision", help="tag, branch or commit of --model on the Hub")
    parser.add_argument("--image", required=True, type=Path)
    parser.add_argument("--text", required=True, help="a sentence")
    parser.add_argument("--output", required=True, type=Path, help="the picture, a PNG")
    parser.add_argument("--arrays", type=Path, help="also write words and maps as .npz")
    parser.add_argument("--layer", type=int, help="of the decoder; the mean of all by default")
    parser.add_argument("--head", type=int, help="of the layer; the mean of all by default")
    options = parser.parse_args(arguments)
    return run_command(lambda: _explain(options))


if __name__ == "__main__":
    sys.exit(main())
