"""From images and captions to tensors: image transforms, caption cleaning, tokenizer, attribute masker."""

import importlib.util
import json
import os
import re
import zipfile
from functools import cache
from io import BytesIO

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging


try:
    import nltk
except ImportError:
    nltk = None

logger = logging.get_logger(__name__)

DEC_TOKEN, ENC_TOKEN = "[DEC]", "[ENC]"
TAGGER = "averaged_perceptron_tagger_eng"
_TAGGER_PARTS = ("weights", "tagdict", "classes")

_STRIPPED = re.compile(r'[.!"()*#:;~]')
_WORD = re.compile(r"\w+(?:[-']\w+)*|[^\w\s]")
_ADJECTIVES = {"JJ", "JJR", "JJS", "VBN"}  # VBN: participles such as "striped", "hooded"
_NOUNS = {"NN", "NNS", "NNP", "NNPS"}
# What Pillow may try to read a file as. Its other formats are rare, and some start programs, such as Ghostscript.
Image.init()
IMAGE_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM") if name in Image.OPEN
)
# A file of a few kilobytes may claim any size. 90 million pixels are more than any camera at a street has.
MAX_PIXELS = 90_000_000


def clean_caption(caption: str) -> str:
    """
    Lower case, without ``. ! " ( ) * # : ; ~`` and control characters, single spaces: the text that tokenizer and
    tagger read.
    """
    if not caption.isprintable():  # BERT's tokenizer leaves them out too, and breaks on halves of surrogate pairs
        caption = "".join(character for character in caption if character.isprintable() or character.isspace())
    return " ".join(_STRIPPED.sub(" ", caption.lower()).split())


# What turns an image upright, by EXIF's tag of its orientation from 2 on.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def orientation(image: Image.Image) -> int:
    """How the camera of a photograph was held, 1 to 8, by its EXIF tag; 1, upright, without one."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF turns nothing, as in any viewer; Pillow's reader raises many kinds
        return 1


def upright(image: Image.Image) -> Image.Image:
    """A photograph as its camera was held, see [`orientation`]; another image as it is."""
    image.load()
    turn = orientation(image)
    if turn not in range(2, 9):
        return image
    turned = image.transpose(Image.Transpose[_TURNS[turn - 2]])
    turned.info = {name: value for name, value in image.info.items() if name == "transparency"}  # not to turn it twice
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """
    An image of any mode in RGB. Transparent parts show white, as in most viewers, and not the colours that lie hidden
    under them. Of 16 bits of grey the upper eight count, as Pillow does with 16 bits of colour; its own conversion
    would show everything above 255 as white.

    Raises:
        ValueError: for a mode whose white is not defined, such as floating-point numbers.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:  # the grey that stands for "nothing here"
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels are {'32-bit whole' if image.mode == 'I' else 'floating-point'} numbers, which say not what is "
            "white; save it with 8 bits for each colour"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(file, size: tuple[int, int] | None = None) -> Image.Image:
    """
    The image of a file, upright and in RGB (see [`to_rgb`]); the first frame of an animation. A JPEG file that is much
    larger than `size` (height, width) is decoded at a half, a quarter or an eighth, but at no less than twice `size`:
    several times faster, and hardly another image.

    Args:
        file: a path, or an open binary file. Of the formats in `IMAGE_FORMATS`, of at most `MAX_PIXELS` pixels.
        size: what the model reads.

    Raises:
        ValueError: for no file, another format, too many pixels, or colours that [`to_rgb`] refuses. On damaged files
            Pillow raises many kinds.
    """
    if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):  # to open a named pipe would wait for ever
        is_there = os.path.exists(file)
        raise ValueError("it is not a file but a folder or a device" if is_there else "there is no such file")
    try:
        opened = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no {', '.join(IMAGE_FORMATS)} file, or its beginning is damaged") from error
    with opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"it has {opened.width}×{opened.height} pixels, more than {MAX_PIXELS:,}")
        if size is not None and opened.format == "JPEG":
            side = 2 * max(size)  # the file may lie on its side
            opened.draft(None, (side, side))
        return to_rgb(upright(opened))


class CADAImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_augment (`bool`, *optional*):
        Whether to augment for training: flip, pad and crop, erase.
    flip_probability (`float`, *optional*):
        Share of images mirrored.
    crop_padding (`int`, *optional*):
        Black pixels added on each side before a crop of the old size at a random place.
    erase_probability (`float`, *optional*):
        Share of images of which a rectangle is replaced by the mean colour.
    erase_area (`list[float]`, *optional*):
        Smallest and largest area of the rectangle, as a share of the image.
    seeds (`list[int]`, *optional*):
        A seed for every image: its augmentation then follows from it, whatever was drawn before.
    """

    do_augment: bool | None
    flip_probability: float | None
    crop_padding: int | None
    erase_probability: float | None
    erase_area: list[float] | tuple[float, float] | None
    seeds: list[int] | None


class CADAImageProcessor(PilBackend):
    r"""
    Image transforms of the paper: bilinear resize, CLIP's mean and standard deviation; with `do_augment=True` also
    the training augmentation (flip 0.5, pad 10 and random crop, random erasing 0.5 of an area of 0.02 to 0.4).

    Random numbers come from torch's generator, or for each image from its own of `seeds`.
    """

    valid_kwargs = CADAImageProcessorKwargs

    resample = PILImageResampling.BILINEAR
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_augment = False
    flip_probability = 0.5
    crop_padding = 10
    erase_probability = 0.5
    erase_area = (0.02, 0.4)

    def fetch_images(self, images, timeout: float | None = None):
        """
        Paths, contents of files (bytes) and addresses (`http://`, `https://`) as images, with the errors of
        [`read_image`]; images as they are; lists of all these. `timeout`: seconds to wait for an image from the web.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image, timeout) for image in images]
        if isinstance(images, str) and images.startswith(("http://", "https://")):
            images = httpx.get(images, timeout=timeout, follow_redirects=True).raise_for_status().content
        if isinstance(images, (bytes, str, os.PathLike)):
            return read_image(BytesIO(images) if isinstance(images, bytes) else images)
        return super().fetch_images(images)

    def process_image(
        self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs: Unpack[ImagesKwargs]
    ) -> np.ndarray:
        """
        As in every image processor, but photographs are turned upright first, as `datasets` does when it decodes, and
        [`to_rgb`] converts the colours.
        """
        if isinstance(image, Image.Image):
            image = upright(image)
            image = to_rgb(image) if do_convert_rgb else image
        pixels = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        if not pixels.size:
            raise ValueError(f"An image has the shape {pixels.shape}, so no pixels. Leave it out.")
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError("An image holds NaN or infinite numbers. Give pixels from 0 to 255.")
        return pixels

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        do_augment: bool,
        flip_probability: float,
        crop_padding: int,
        erase_probability: float,
        erase_area: tuple[float, float],
        seeds: list[int] | None,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        processed = []
        for image, generator in zip(images, _generators(seeds, len(images)), strict=True):
            # (channels, height, width), 0..255
            if do_resize and image.shape[1:] != (size.height, size.width):
                image = self.resize(image=image, size=size, resample=resample)
            if do_augment:
                image = _flip_and_crop(image, flip_probability, crop_padding, generator)
            if do_rescale:
                image = image.astype(np.float32) * np.float32(rescale_factor)
            if do_normalize:
                mean, std = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (image_mean, image_std))
                image = (image - mean) / std
            if do_augment:  # zero is the mean colour after normalisation
                image = _erase(image, erase_probability, erase_area, generator)
            processed.append(image)
        if len({image.shape for image in processed}) == 1:
            processed = np.stack(processed)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


def _generators(seeds: list[int] | None, count: int) -> list[torch.Generator | None]:
    """A source of random numbers for each of `count` rows; `None` is the one of the process."""
    return [None] * count if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]


def _flip_and_crop(image: np.ndarray, flip_probability: float, padding: int, generator) -> np.ndarray:
    if torch.rand((), generator=generator) < flip_probability:
        image = image[:, :, ::-1]
    if padding:
        height, width = image.shape[1:]
        top, left = torch.randint(0, 2 * padding + 1, (2,), generator=generator).tolist()
        image = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        image = image[:, top : top + height, left : left + width]
    return np.ascontiguousarray(image)


def _erase(image: np.ndarray, probability: float, area: tuple[float, float], generator) -> np.ndarray:
    """Random erasing (Zhong et al., AAAI 2020): a rectangle of side ratio 0.3 to 3.3; ten tries to make it fit."""
    if torch.rand((), generator=generator) >= probability:
        return image
    height, width = image.shape[1:]
    for _ in range(10):
        share = float(torch.empty(()).uniform_(*area, generator=generator))
        ratio = float(torch.empty(()).uniform_(np.log(0.3), np.log(3.3), generator=generator).exp())
        rows, columns = round((share * height * width * ratio) ** 0.5), round((share * height * width / ratio) ** 0.5)
        if 0 < rows < height and 0 < columns < width:
            top = int(torch.randint(0, height - rows + 1, (), generator=generator))
            left = int(torch.randint(0, width - columns + 1, (), generator=generator))
            image[:, top : top + rows, left : left + columns] = 0
            break
    return image


class AttributeMasker:
    """
    Finds attribute phrases in captions and masks them (ARA, section III-C of the paper).

    Args:
        unit: `"phrase"` masks whole phrases of adjectives and nouns ("long black hair"), as in the paper; `"word"`
            masks single adjectives and nouns, as in the authors' code.
        rate: share of units that is masked.
    """

    def __init__(self, unit: str = "phrase", rate: float = 0.8):
        if unit not in ("phrase", "word"):
            raise ValueError(f"`mask_unit` is {unit!r}. Choose 'phrase' or 'word'.")
        if not 0 <= rate <= 1:
            raise ValueError(f"`mask_rate` is {rate}. Give a share between 0 and 1.")
        self.unit, self.rate = unit, rate

    def find_spans(self, caption: str) -> list[list[int]]:
        """[start, end) of every unit in the cleaned `caption`, in characters, by NLTK's part-of-speech tags."""
        caption = clean_caption(caption)
        words = list(_WORD.finditer(caption))
        tags = [tag for _, tag in _tagger().tag([word.group() for word in words])]
        kinds = "".join("a" if tag in _ADJECTIVES else "n" if tag in _NOUNS else "-" for tag in tags)
        # A phrase has two words at least, perhaps no adjective: colours are often tagged as nouns ("grey jacket").
        units = re.finditer("[an]" if self.unit == "word" else "a+n+|nn+", kinds)
        return [[words[unit.start()].start(), words[unit.end() - 1].end()] for unit in units]

    def mask(
        self,
        input_ids: torch.Tensor,
        offsets: torch.Tensor,
        spans: list[list[list[int]]],
        mask_token_id: int,
        seeds: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mask a random share `rate` of the units; all word pieces of a unit together.

        Args:
            input_ids: `(texts, length)`.
            offsets: `(texts, length, 2)`, start and end of every word piece in its caption; both 0 for special tokens.
            spans: the units of every text.
            mask_token_id: id of `[MASK]`.
            seeds: a seed for every text, from which the choice in it follows; by default torch's generator draws.

        Returns:
            Masked ids `(texts, length)`, and labels of the same shape: the masked ids, -100 elsewhere.
        """
        chosen = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (row_spans, generator) in enumerate(zip(spans, _generators(seeds, len(spans)), strict=True)):
            for (start, end), draw in zip(row_spans, torch.rand(len(row_spans), generator=generator).tolist()):
                if draw < self.rate:
                    chosen[row] |= (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start)
        masked = input_ids.masked_fill(chosen, mask_token_id)
        return masked, input_ids.masked_fill(~chosen, -100)


def _shipped_tagger():
    """NLTK's tagger with the data that the package `cada` brings; `None` where only a checkpoint's files are here."""
    package = importlib.util.find_spec("cada")
    for folder in (package and package.submodule_search_locations) or ():
        path = os.path.join(folder, "nltk_data", "taggers", f"{TAGGER}.zip")
        if os.path.isfile(path):
            # Not by NLTK, which reads nothing below a folder that a group may write to, as clones often are.
            with zipfile.ZipFile(path) as data:
                parts = [json.loads(data.read(f"{TAGGER}/{TAGGER}.{part}.json")) for part in _TAGGER_PARTS]
            tagger = nltk.PerceptronTagger(load=False)
            tagger.model.weights, tagger.tagdict, classes = parts
            tagger.classes = tagger.model.classes = set(classes)
            return tagger
    return None


@cache
def _tagger():
    """NLTK's English perceptron tagger: from the user's own data, the package's, or after a download."""
    if nltk is None:
        raise ImportError("Attribute phrases need NLTK. Run: pip install nltk")
    try:
        return nltk.PerceptronTagger()
    except LookupError:
        tagger = _shipped_tagger()
    if tagger is not None:
        return tagger
    logger.warning(f"NLTK's tagger data are missing, downloading {TAGGER}.")
    nltk.download(TAGGER, quiet=True)
    try:
        return nltk.PerceptronTagger()
    except LookupError as error:
        raise LookupError(
            "NLTK's tagger data are missing and could not be downloaded. Install the package cada-transformers, "
            f"which brings them. Or run `python -m nltk.downloader {TAGGER}` on a machine with internet access, "
            "copy the folder nltk_data, and set NLTK_DATA to its path."
        ) from error


# What makes `SentenceTransformer(checkpoint)` encode sentences and images by our own methods. Cosine is its default.
# A module without settings, such as `Normalize`, needs no folder.
_SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.base.modules.{module}"}
        for index, (path, module) in enumerate(
            [("", "transformer.Transformer"), ("1_Normalize", "normalize.Normalize")]
        )
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
            for modality in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    },
}


class CADAProcessor(ProcessorMixin):
    r"""
    Image processor, tokenizer and attribute masker in one.

    Args:
        image_processor ([`CADAImageProcessor`]):
            The image transforms.
        tokenizer (`PreTrainedTokenizerFast`):
            A BERT tokenizer. `[DEC]` and `[ENC]` are added where it lacks them, in BLIP's order.
        mask_unit (`str`, *optional*, defaults to `"phrase"`):
            What the masker masks: `"phrase"` or `"word"`.
        mask_rate (`float`, *optional*, defaults to 0.8):
            Share of the units that is masked.

    ```python
    >>> inputs = processor(images=images, text=captions, return_tensors="pt")
    >>> scores = model(**inputs).logits_per_text
    ```
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None, mask_unit: str = "phrase", mask_rate: float = 0.8):
        missing = [token for token in (DEC_TOKEN, ENC_TOKEN) if token not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        self.attribute_masker = AttributeMasker(mask_unit, mask_rate)
        self.mask_unit, self.mask_rate = mask_unit, mask_rate
        super().__init__(image_processor, tokenizer)

    @property
    def enc_token_id(self) -> int:
        """Id of `[ENC]`, for `CADATextConfig.enc_token_id`."""
        return self.tokenizer.convert_tokens_to_ids(ENC_TOKEN)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model reads, in pixels."""
        size = self.image_processor.size
        return size["height"], size["width"]

    @property
    def unused_input_names(self) -> list[str]:
        """What a BERT tokenizer gives besides, and no CADA model takes."""
        return ["token_type_ids"]

    def to_json_file(self, json_file_path: str | os.PathLike):
        """
        Write the settings and, beside them, what sentence-transformers (6.2 and later) reads of a checkpoint. Here and
        not in `save_pretrained`, which may push what it has written.
        """
        super().to_json_file(json_file_path)
        for name, content in _SENTENCE_TRANSFORMERS.items():
            with open(os.path.join(os.path.dirname(json_file_path), name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        attribute_spans: list[list[list[int]]] | None = None,
        seeds: list[int] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images (image or list of images, *optional*):
                PIL images, arrays, tensors, paths or addresses.
            text (`str` or `list[str]`, *optional*):
                Captions. They are cleaned, and cut at the tokenizer's `model_max_length`.
            attribute_spans (`list[list[list[int]]]`, *optional*):
                Attribute units of every caption as [start, end) in the cleaned caption, see
                [`AttributeMasker.find_spans`]. With them some units are masked for ARA.
            seeds (`list[int]`, *optional*):
                A seed for every row of the batch, from which its augmentation and masking follow.
            kwargs:
                Options of image processor (`do_augment=True` for training) and tokenizer (`return_tensors="pt"`).

        Returns:
            [`BatchFeature`] with `pixel_values` for images; `input_ids`, `attention_mask` for text; `masked_input_ids`
            and `labels` with `attribute_spans`.
        """
        if text is not None:
            captions = [text] if isinstance(text, str) else text
            if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
                raise TypeError(
                    f"`text` should be a string or a list of strings, not {text!r:.80}. Turn it into these."
                )
            text = clean_caption(text) if isinstance(text, str) else list(map(clean_caption, text))
            # Some tokenizers come with a `max_length` of their own, which may be longer than the model can read.
            own = self.tokenizer.init_kwargs.get("max_length")
            if own is not None and "max_length" not in {**kwargs, **kwargs.get("text_kwargs", {})}:
                kwargs["max_length"] = min(own, self.tokenizer.model_max_length)
        if seeds is not None and images is not None:
            kwargs["seeds"] = seeds
        if attribute_spans is None:
            return super().__call__(images=images, text=text, **kwargs)
        if text is None or isinstance(text, str) or len(text) != len(attribute_spans):
            raise ValueError("`attribute_spans` needs `text`, a list of equally many captions.")
        if kwargs.get("return_tensors") != "pt":
            raise ValueError('Masking works on tensors: pass `return_tensors="pt"` with `attribute_spans`.')
        outputs = super().__call__(images=images, text=text, return_offsets_mapping=True, **kwargs)
        outputs["masked_input_ids"], outputs["labels"] = self.attribute_masker.mask(
            outputs["input_ids"], outputs.pop("offset_mapping"), attribute_spans, self.tokenizer.mask_token_id, seeds
        )
        return outputs


CADAImageProcessor.register_for_auto_class("AutoImageProcessor")
CADAProcessor.register_for_auto_class()

__all__ = [
    "AttributeMasker",
    "CADAImageProcessor",
    "CADAProcessor",
    "clean_caption",
    "read_image",
    "to_rgb",
    "upright",
]
