"""
Why an image fits a sentence: where every word looks, and which words the image suggests for masked attributes.

    cada explain --model demo/model --image person.png --text "A man in a red coat." --out why.png

The picture is for the reader; `--arrays why.npz` and the functions below give the numbers (Fig. 5 and 6 of the paper).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from cada.files import CADAError
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor, clean_caption


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
    before, was_training = model.config._attn_implementation, model.training
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
        raise CADAError("The sentence is empty. Describe a person.")
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
        CADAError: for a layer or head that the model has not, an empty sentence, or a model without decoder.
    """
    config = model.config
    if not config.use_atp:
        raise CADAError("This model has no match head (`use_atp=False`), so no decoder that reads the image.")
    sizes = {"layer": config.text_config.num_hidden_layers, "head": config.text_config.num_attention_heads}
    for name, value in (("layer", layer), ("head", head)):
        if value is not None and not -sizes[name] <= value < sizes[name]:
            raise CADAError(f"`{name}` is {value}, but the decoder has {sizes[name]}: 0 to {sizes[name] - 1}.")
    with _eager(model):
        inputs, states, offsets = _encode(model, processor, image, text)
        input_ids = inputs["input_ids"].clone()
        input_ids[:, 0] = config.text_config.enc_token_id
        outputs = model.cada.text_model(input_ids, inputs["attention_mask"], states, output_attentions=True)
    attention = torch.stack(outputs.cross_attentions)[:, 0].float()  # (layers, heads, tokens, 1 + patches)
    attention = attention.mean(dim=0) if layer is None else attention[layer]
    attention = attention.mean(dim=0) if head is None else attention[head]
    grid = attention[:, 1:].view(-1, *config.vision_config.grid_size).cpu().numpy()

    words, maps = [], []
    for word in re.finditer(r"[^ ]+", clean_caption(text)):
        pieces = _pieces(offsets, *word.span())
        if pieces:  # words behind the longest text that the model reads are cut
            words.append(word.group())
            maps.append(grid[pieces].mean(axis=0))
    return WordAttention(words, np.stack(maps))


@torch.no_grad()
def attribute_predictions(
    model: CADAForTextToImageRetrieval, processor: CADAProcessor, image: Image.Image, text: str, top: int = 3
) -> list[AttributePrediction]:
    """
    The `top` predictions for every attribute phrase of `text`, each masked alone, as ARA learns it.

    Raises:
        CADAError: for an empty sentence, or a model without vocabulary head.
    """
    if not model.config.use_ara:
        raise CADAError("This model has no vocabulary head (`use_ara=False`), so it predicts no attributes.")
    cleaned, predictions = clean_caption(text), []
    with _eager(model):
        inputs, states, offsets = _encode(model, processor, image, text)
        for start, end in processor.attribute_masker.find_spans(cleaned):
            masked = _pieces(offsets, start, end)
            if not masked:
                continue
            input_ids = inputs["input_ids"].clone()
            input_ids[0, masked] = processor.tokenizer.mask_token_id
            outputs = model.cada.text_model(
                input_ids, inputs["attention_mask"], states, is_causal=model.config.ara_causal
            )
            chances = model.vocabulary_head(outputs.last_hidden_state[0, masked]).float().softmax(dim=-1)
            values, ids = chances.topk(top)
            words = map(processor.tokenizer.convert_ids_to_tokens, ids.tolist())
            guesses = [list(zip(*piece)) for piece in zip(words, values.tolist())]
            predictions.append(AttributePrediction(cleaned[start:end], guesses))
    return predictions
