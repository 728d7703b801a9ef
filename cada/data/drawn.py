"""
The drawn demo set: pedestrians drawn from attributes, with captions that name some of them. It needs no download.

Every person is a set of attributes (sex, hair, upper and lower garment with type, colour and pattern, shoes, bag,
hat). The images of a person differ in pose, crop, light, background and noise. Each image has two captions from a
varied grammar, and each caption leaves attributes out, so a caption can fit several persons: [`ideal_scores`] is the
matcher who knows all attributes of all images and what each caption names; its result is the ceiling.

There are two domains, as if two cameras and two groups of annotators had made them ([`DOMAINS`]): *day*, and *night*
with dim cold light, dark streets and more noise, whose people dress for winter and are described from the feet up.

Two kinds of look-alikes are in every split, next to persons drawn independently: *swaps*, who wear the colours of
another person the other way round (red coat and blue trousers, blue coat and red trousers), and *relatives*, who share
all but two attributes with another person. Everything follows from the seed.
"""

import hashlib
import io
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageEnhance

from processing_cada import clean_caption


IMAGE_SIZE = (96, 48)  # (height, width) in pixels
_DRAW_SCALE = 2  # drawn at twice the size and reduced, for smooth edges

COLOURS = {
    "black": (28, 28, 32),
    "white": (238, 238, 236),
    "grey": (128, 128, 130),
    "red": (200, 30, 35),
    "blue": (35, 65, 190),
    "green": (35, 135, 55),
    "yellow": (235, 205, 45),
    "brown": (115, 70, 35),
    "pink": (240, 140, 180),
    "purple": (115, 45, 145),
}
HAIR_COLOURS = {
    "black": (25, 22, 22),
    "brown": (95, 58, 30),
    "blond": (225, 190, 110),
    "red": (170, 70, 30),
    "grey": (165, 165, 165),
}
# Values and their weights. Some are common and some are rare, as in the street.
ATTRIBUTES: dict[str, dict[str, float]] = {
    "sex": {"man": 1, "woman": 1},
    "hair_length": {"short": 1, "long": 1},
    "hair_colour": {"black": 3, "brown": 3, "blond": 2, "red": 1, "grey": 1},
    "upper_type": {"t-shirt": 2, "sweater": 2, "jacket": 3, "coat": 2},
    "upper_colour": dict(zip(COLOURS, (4, 3, 2, 2, 3, 2, 1, 1, 1, 1))),
    "upper_pattern": {"plain": 5, "striped": 2, "checked": 1},
    "lower_type": {"trousers": 4, "shorts": 2, "skirt": 2},
    "lower_colour": dict(zip(COLOURS, (4, 2, 2, 2, 3, 1, 1, 2, 1, 1))),
    "lower_pattern": {"plain": 5, "striped": 1, "checked": 1},
    "shoes_colour": {"black": 4, "white": 3, "red": 1, "brown": 2, "blue": 1},
    "bag_type": {"none": 3, "backpack": 2, "handbag": 2, "shoulder bag": 2},
    "bag_colour": {"black": 3, "brown": 2, "red": 1, "blue": 1, "yellow": 1},
    "hat_type": {"none": 4, "cap": 1, "beanie": 1},
    "hat_colour": {"black": 2, "red": 1, "blue": 1, "white": 1, "green": 1},
}
SWAP_SHARE, RELATIVE_SHARE = 0.15, 0.25


@dataclass(frozen=True)
class Domain:
    """What differs between two drawn sets. Pairs are ranges of numbers drawn evenly."""

    wall: tuple[int, int] = (70, 215)  # channels of the background, 0 to 255
    things: tuple[int, int] = (40, 230)
    ground: tuple[int, int] = (80, 180)
    brightness: tuple[float, float] = (0.7, 1.2)  # factors
    contrast: tuple[float, float] = (0.8, 1.15)
    warmth: tuple[float, float] = (-0.06, 0.06)  # added share of red, taken from blue
    noise: tuple[float, float] = (2, 10)  # standard deviation, of 255
    weights: dict[str, dict[str, float]] = field(default_factory=dict)  # where they differ from `ATTRIBUTES`
    styles: tuple[int, ...] = (0, 1, 2)  # of captions: one sentence, short sentences, from the feet up


DOMAINS = {
    "day": Domain(),
    "night": Domain(
        wall=(15, 90),
        things=(10, 130),
        ground=(20, 80),
        brightness=(0.5, 0.8),
        contrast=(0.7, 1.0),
        warmth=(-0.2, -0.06),
        noise=(8, 16),
        weights={
            "upper_type": {"t-shirt": 1, "sweater": 2, "jacket": 3, "coat": 5},
            "lower_type": {"trousers": 7, "shorts": 1, "skirt": 2},
            "hat_type": {"none": 2, "cap": 1, "beanie": 3},
        },
        styles=(0, 1, 1, 2, 2, 2, 2, 2),
    ),
}

SKIN = ((244, 208, 177), (224, 172, 125), (180, 120, 80), (110, 70, 45))


def draw_persons(
    count: int, rng: random.Random, domain: Domain = DOMAINS["day"], seen: set[tuple] | None = None
) -> list[dict[str, str]]:
    """Attributes of `count` different persons, look-alikes included. They are none of `seen`, and are added to it."""

    def value(name: str) -> str:
        weights = domain.weights.get(name, ATTRIBUTES[name])
        return rng.choices(list(weights), weights=list(weights.values()))[0]

    persons: list[dict[str, str]] = []
    seen = set() if seen is None else seen
    while len(persons) < count:
        kind = rng.random() if persons else 1.0
        if kind < SWAP_SHARE:
            person = dict(rng.choice(persons))
            if person["upper_colour"] == person["lower_colour"]:
                continue
            person["upper_colour"], person["lower_colour"] = person["lower_colour"], person["upper_colour"]
        elif kind < SWAP_SHARE + RELATIVE_SHARE:
            person = dict(rng.choice(persons))
            for name in rng.sample(list(ATTRIBUTES), 2):
                person[name] = value(name)
        else:
            person = {name: value(name) for name in ATTRIBUTES}
        for item in ("bag", "hat"):  # what is not there has no colour
            if person[f"{item}_type"] == "none":
                person[f"{item}_colour"] = "none"
            elif person[f"{item}_colour"] == "none":
                person[f"{item}_colour"] = value(f"{item}_colour")
        key = tuple(person.values())
        if key not in seen:
            seen.add(key)
            persons.append(person)
    return persons


def _shade(colour: tuple[int, int, int], rng: random.Random, amount: int = 14) -> tuple[int, int, int]:
    offset = rng.randint(-amount, amount)
    return tuple(min(255, max(0, channel + offset + rng.randint(-5, 5))) for channel in colour)


def _draw_cloth(canvas, polygon, colour, pattern) -> None:
    """Fill a polygon with a plain, striped (across) or checked cloth."""
    (width, height), light = canvas.size, sum(colour) > 380
    other = tuple(channel // 3 if light else channel + (255 - channel) * 3 // 4 for channel in colour)
    cloth = PILImage.new("RGB", canvas.size, colour)
    lines = ImageDraw.Draw(cloth)
    for y in range(0, height, 12) if pattern != "plain" else ():
        lines.rectangle((0, y, width, y + 4), fill=other)
    for x in range(0, width, 12) if pattern == "checked" else ():
        lines.rectangle((x, 0, x + 4, height), fill=other)
    mask = PILImage.new("L", canvas.size)
    ImageDraw.Draw(mask).polygon(polygon, fill=255)
    canvas.paste(cloth, mask=mask)


def _draw_background(rng: random.Random, width: int, height: int, domain: Domain) -> PILImage.Image:
    """Wall and ground with a few things in front of the wall."""
    canvas = PILImage.new("RGB", (width, height), tuple(rng.randint(*domain.wall) for _ in range(3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(0, 4)):
        x, y = rng.randint(-20, width), rng.randint(-20, height - 60)
        box = (x, y, x + rng.randint(8, 50), y + rng.randint(15, 90))
        draw.rectangle(box, fill=tuple(rng.randint(*domain.things) for _ in range(3)))
    horizon = int(height * rng.uniform(0.62, 0.85))
    draw.rectangle((0, horizon, width, height), fill=tuple(rng.randint(*domain.ground) for _ in range(3)))
    return canvas


class _Figure:
    """A person in a pose, drawn part by part from back to front. Sizes are in 200ths of the height of the picture."""

    def __init__(self, canvas: PILImage.Image, person: dict[str, str], rng: random.Random):
        width, height = canvas.size
        self.canvas, self.pen, self.person = canvas, ImageDraw.Draw(canvas), person
        # Crop: the person is not centred and not always of the same size.
        self.scale = rng.uniform(0.86, 1.02) * height / 200
        self.origin_x = width / 2 + rng.uniform(-9, 9)
        self.origin_y = height * 0.02 + rng.uniform(-4, 8)
        self.mirror = rng.choice((-1, 1))
        self.skin = random.Random(repr(person)).choice(SKIN)  # no attribute, but the same in all images of a person
        self.hair = _shade(HAIR_COLOURS[person["hair_colour"]], rng)
        self.upper, self.lower, self.shoes = (
            _shade(COLOURS[person[f"{part}_colour"]], rng) for part in ("upper", "lower", "shoes")
        )
        self.bag = None if person["bag_type"] == "none" else _shade(COLOURS[person["bag_colour"]], rng)
        # What a caption names has to be visible, the ceiling counts on it: men and women differ in their outline, a
        # coat ends above the hem of shorts and skirts, the legs of shorts stand apart, a skirt is wide.
        self.shoulder, self.waist, self.hip = (18, 12, 20) if person["sex"] == "woman" else (26, 21, 19)
        self.stride, self.swing, self.lean = rng.uniform(6, 16), rng.uniform(-10, 14), rng.uniform(-3, 3)
        self.hat = None if person["hat_type"] == "none" else _shade(COLOURS[person["hat_colour"]], rng)
        self.brim = _shade(self.hat, rng, 30) if person["hat_type"] == "beanie" else self.hat

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.origin_x + self.mirror * x * self.scale, self.origin_y + y * self.scale

    def box(self, x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
        (x, y), half_width, half_height = self.at(x, y), half_width * self.scale, half_height * self.scale
        return x - half_width, y - half_height, x + half_width, y + half_height

    def limb(self, start, end, thickness: float, colour) -> None:
        self.pen.line((*self.at(*start), *self.at(*end)), fill=colour, width=round(thickness * self.scale))

    def cloth(self, part: str, *corners: tuple[float, float]) -> None:
        polygon = [self.at(*corner) for corner in corners]
        _draw_cloth(self.canvas, polygon, getattr(self, part), self.person[f"{part}_pattern"])

    def draw(self) -> None:
        """All of it, from back to front."""
        if self.person["bag_type"] == "backpack":
            self.pen.rounded_rectangle(self.box(-self.shoulder - 3, 68, 13, 22), radius=6, fill=self.bag)
        if self.person["hair_length"] == "long":
            self.pen.rounded_rectangle(self.box(self.lean, 34, 15, 22), radius=9, fill=self.hair)
        self.draw_legs()
        self.draw_upper()
        self.draw_head()
        self.draw_bag()

    def draw_legs(self) -> None:
        """Legs, shoes, lower garment."""
        kind, hip, ankle = self.person["lower_type"], self.hip, 180
        for side, foot in ((-1, -self.stride), (1, self.stride)):
            start, end = (side * hip * 0.5, 108), (foot + side * 6, ankle)
            self.limb(start, end, 13, self.skin)
            if kind != "skirt":
                x, y = end if kind == "trousers" else ((start[0] + end[0]) / 2, 143)
                half = 9 if kind == "trousers" else 10
                top = [(start[0] - half, 104), (start[0] + half, 104)]
                self.cloth("lower", *top, (x + half - 2, y), (x - half + 2, y))
            self.pen.ellipse(self.box(end[0] + 4, ankle + 5, 11, 6), fill=self.shoes)
        if kind == "skirt":
            self.cloth("lower", (-hip + 3, 100), (hip - 3, 100), (hip + 12, 148), (-hip - 12, 148))
        else:
            self.cloth("lower", (-hip, 98), (hip, 98), (hip, 116), (-hip, 116))

    def draw_upper(self) -> None:
        """Arms and upper garment: its length and its sleeves tell the type."""
        kind, lean, shoulder = self.person["upper_type"], self.lean, self.shoulder
        for side in (-1, 1):
            elbow = (side * (shoulder + 4) + lean, 80)
            hand = (side * (shoulder + 5) + side * self.swing * 0.4, 108)
            self.limb((side * shoulder + lean, 54), elbow, 11, self.upper)
            self.limb(elbow, hand, *((8, self.skin) if kind == "t-shirt" else (9, self.upper)))
            self.pen.ellipse(self.box(hand[0], hand[1] + 3, 5, 5), fill=self.skin)
        bottom = {"t-shirt": 104, "sweater": 107, "jacket": 108, "coat": 126}[kind]
        waist, hem = self.waist + 2, self.hip + {"coat": 9, "sweater": 3}.get(kind, 1)
        right = [(shoulder + lean, 49), (waist, 85), (hem, bottom)]
        self.cloth("upper", (-shoulder + lean, 49), *right, (-hem, bottom), (-waist, 85))
        if kind in ("jacket", "coat"):  # open in front
            inner = (215, 215, 210) if sum(self.upper) < 420 else (60, 60, 65)
            corners = ((-6 + lean, 49), (6 + lean, 49), (3, bottom - 2), (-1, bottom - 2))
            self.pen.polygon([self.at(*corner) for corner in corners], fill=inner)

    def draw_head(self) -> None:
        """Head, hair, hat."""
        lean = self.lean
        self.limb((lean, 38), (lean, 52), 9, self.skin)
        self.pen.ellipse(self.box(lean, 25, 11, 15), fill=self.skin)
        self.pen.pieslice(self.box(lean, 22, 13, 15), 180, 360, fill=self.hair)
        if self.person["hair_length"] == "long":
            for side in (-1, 1):
                self.limb((side * 11 + lean, 22), (side * 13 + lean, 52), 6, self.hair)
        if self.hat is not None:
            self.pen.pieslice(self.box(lean, 19, 14, 16), 180, 360, fill=self.hat)
        if self.person["hat_type"] == "cap":
            self.pen.rectangle(self.box(lean + 12, 18, 13, 2), fill=self.brim)
        elif self.person["hat_type"] == "beanie":
            self.pen.rectangle(self.box(lean, 19, 14, 4), fill=self.brim)
            self.pen.ellipse(self.box(lean, 3, 5, 5), fill=self.hat)

    def draw_bag(self) -> None:
        kind, lean = self.person["bag_type"], self.lean
        if kind == "backpack":
            for side in (-1, 1):
                self.limb((side * 13 + lean, 50), (side * 14, 84), 5, self.bag)
        elif kind == "handbag":
            hand_x = self.shoulder + 6 + self.swing * 0.4
            self.pen.arc(self.box(hand_x, 112, 8, 10), 180, 360, fill=self.bag, width=3)
            self.pen.rectangle(self.box(hand_x, 123, 12, 11), fill=self.bag)
        elif kind == "shoulder bag":
            self.limb((-self.shoulder + 4 + lean, 49), (self.hip + 2, 104), 5, self.bag)
            self.pen.rectangle(self.box(self.hip + 5, 110, 12, 9), fill=self.bag)


def draw_image(person: dict[str, str], rng: random.Random, domain: Domain = DOMAINS["day"]) -> PILImage.Image:
    """One image of a person, `IMAGE_SIZE` large: same attributes, new pose, crop, light, background and noise."""
    height, width = (side * _DRAW_SCALE for side in IMAGE_SIZE)
    figure = _Figure(_draw_background(rng, width, height, domain), person, rng)
    figure.draw()
    image = figure.canvas.reduce(_DRAW_SCALE)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(*domain.brightness))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(*domain.contrast))
    warmth = rng.uniform(*domain.warmth)
    pixels = np.asarray(image, dtype=np.float32) * np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)
    pixels += np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(*domain.noise), pixels.shape)
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))


@dataclass
class DrawnCaption:
    """A caption, the attributes that it names, and where its attribute phrases stand in the cleaned caption."""

    text: str
    named: list[str]
    spans: list[list[int]]


_NOUNS = {
    "t-shirt": ("t-shirt", "tee", "t-shirt"),
    "sweater": ("sweater", "pullover", "jumper"),
    "jacket": ("jacket", "jacket", "blazer"),
    "coat": ("coat", "long coat", "overcoat"),
    "trousers": ("trousers", "pants", "trousers"),
    "shorts": ("shorts", "short pants", "shorts"),
    "skirt": ("skirt", "skirt", "skirt"),
    "backpack": ("backpack", "rucksack", "backpack"),
    "handbag": ("handbag", "purse", "handbag"),
    "shoulder bag": ("shoulder bag", "messenger bag", "shoulder bag"),
    "cap": ("cap", "baseball cap", "cap"),
    "beanie": ("beanie", "knit hat", "beanie"),
}
_COLOUR_WORDS = {"grey": ("grey", "gray"), "blond": ("blond", "blonde"), "purple": ("purple", "violet")}
_PLURAL = ("trousers", "pants", "shorts", "short pants")


class _Writer:
    """Parts of a caption of a person, drawn one after the other; keeps what they named, and their phrases."""

    def __init__(self, person: dict[str, str], rng: random.Random):
        self.person, self.rng, self.woman = person, rng, person["sex"] == "woman"
        self.pronoun = "she" if self.woman else "he"
        self.named: list[str] = ["sex"]
        self.phrases: list[str] = []

    def names(self, attribute: str, chance: float) -> bool:
        if self.rng.random() < chance:
            self.named.append(attribute)
            return True
        return False

    def colour(self, part: str) -> str:
        colour = self.person[f"{part}_colour"]
        return self.rng.choice(_COLOUR_WORDS.get(colour, (colour,)))

    def noun(self, part: str) -> str:
        return self.rng.choice(_NOUNS[self.person[f"{part}_type"]])

    def phrase(self, words: list[str], article: bool = False) -> str:
        """Adjectives and a noun, which alone is no phrase."""
        text = " ".join(words)
        self.phrases += [text] if len(words) > 1 else []
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}" if article else text

    def garment(self, part: str, chance: float) -> str:
        """Adjectives in one of two orders and the garment's noun."""
        words = [self.colour(part)] if self.names(f"{part}_colour", chance) else []
        pattern = self.person[f"{part}_pattern"]
        if self.names(f"{part}_pattern", 0.1 if pattern == "plain" else 0.6):
            words.insert(0 if pattern == "plain" else self.rng.randint(0, len(words)), pattern)
        self.named.append(f"{part}_type")
        noun = self.noun(part)
        return self.phrase([*words, noun], article=noun not in _PLURAL)

    def hair(self, pattern: str = "{}") -> str:
        """`pattern` with the hair in it, or nothing where no attribute is named."""
        words = [self.person["hair_length"]] if self.names("hair_length", 0.75) else []
        words += [self.colour("hair")] if self.names("hair_colour", 0.85) else []
        return pattern.format(self.phrase([*words, "hair"])) if words else ""

    def shoes(self) -> str:
        self.named.append("shoes_colour")
        return self.phrase([self.colour("shoes"), self.rng.choice(("shoes", "sneakers", "shoes"))])

    def item(self, kind: str) -> str:
        self.named.append(f"{kind}_type")
        words = [self.colour(kind)] if self.names(f"{kind}_colour", 0.75) else []
        return self.phrase([*words, self.noun(kind)], article=True)

    def sentences(self, style: int, has_hair: bool, has_shoes: bool, who: str) -> list[str]:
        """Hair, clothes and shoes in one of the styles of [`Domain`]."""
        if style == 0:  # one flowing sentence, hair first
            start = who + (self.hair(" with {}") if has_hair else "")
            clothes = [self.garment("upper", 0.85), self.garment("lower", 0.8)]
            clothes += [self.shoes()] if has_shoes else []
            verb = self.rng.choice(("wearing", "dressed in", "who wears", "in"))
            return [f"{start} {verb} {', '.join(clothes[:-1])} and {clothes[-1]}"]
        if style == 1:  # short sentences
            first = f"{who} is wearing {self.garment('upper', 0.85)}"
            second = f"{self.pronoun} has {self.rng.choice(('on ', ''))}{self.garment('lower', 0.8)}"
            second += f" with {self.shoes()}" if has_shoes else ""
            hair = self.hair() if has_hair else ""
            if hair and self.rng.random() < 0.3:
                hair = f"{'her' if self.woman else 'his'} hair is easy to see, {hair}"
            elif hair:
                hair = f"{self.pronoun} has {hair}"
            return [first, second, *([hair] if hair else [])]
        lower = self.garment("lower", 0.8)  # from the feet up
        with_shoes = f" and {self.shoes()}" if has_shoes else ""
        first = f"{who} wears {lower}{with_shoes}, with {self.garment('upper', 0.85)} on top"
        hair = self.hair(f"the {self.person['sex']} has {{}}") if has_hair else ""
        return [first, *([hair] if hair else [])]


def draw_caption(person: dict[str, str], rng: random.Random, domain: Domain = DOMAINS["day"]) -> DrawnCaption:
    """A caption of a person from a varied grammar that leaves attributes out."""
    writer = _Writer(person, rng)
    nouns = ("a woman", "the woman", "a lady", "a female pedestrian")
    who = rng.choice(nouns if writer.woman else ("a man", "the man", "a guy", "a male pedestrian"))
    has_hair, has_shoes = rng.random() < 0.6, rng.random() < 0.5
    has_bag = person["bag_type"] != "none" and rng.random() < 0.65
    has_hat = person["hat_type"] != "none" and rng.random() < 0.65
    sentences = writer.sentences(rng.choice(domain.styles), has_hair, has_shoes, who)
    if has_hat:
        sentences.append(f"{writer.pronoun} wears {writer.item('hat')}{rng.choice((' on the head', ''))}")
    if has_bag:
        sentences.append(f"{writer.pronoun} {rng.choice(('carries', 'is carrying', 'has'))} {writer.item('bag')}")
    text = ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."

    cleaned, spans, position = clean_caption(text), [], 0
    for phrase in map(clean_caption, writer.phrases):  # in the order of the text
        start = cleaned.index(phrase, position)
        position = start + len(phrase)
        spans.append([start, position])
    return DrawnCaption(text, writer.named, spans)


FEATURES = Features(
    {
        "image": Image(),
        "captions": List(Value("string")),
        "person_id": Value("int64"),
        "file_name": Value("string"),
        "attribute_spans": List(List(List(Value("int64")))),
        "attributes": {name: Value("string") for name in ATTRIBUTES},
        "named_attributes": List(List(Value("string"))),
    }
)


def _rows(split: str, persons: dict[str, int], images_per_person: int, seed: int, domain: str, version: str):
    # `version` makes `datasets` draw again where this file has changed; it hashes the arguments, not the code.
    seen: set[tuple] = set()
    for name, count in persons.items():
        rng, first_id = random.Random(f"{seed}-{name}"), len(seen)
        drawn = draw_persons(count, rng, DOMAINS[domain], seen)  # nobody who is in a split before
        if name == split:
            break
    for person_id, person in enumerate(drawn, start=first_id):
        for number in range(images_per_person):
            captions = [draw_caption(person, rng, DOMAINS[domain]) for _ in range(2)]
            file = io.BytesIO()
            name = f"{split}/{person_id:05d}_{number}.bmp"
            # Noise does not compress, and PNG takes longer to read.
            draw_image(person, rng, DOMAINS[domain]).save(file, format="BMP")
            yield {
                "image": {"path": name, "bytes": file.getvalue()},
                "captions": [caption.text for caption in captions],
                "person_id": person_id,
                "file_name": name,
                "attribute_spans": [caption.spans for caption in captions],
                "attributes": person,
                "named_attributes": [caption.named for caption in captions],
            }


def load_drawn(
    train_persons: int = 4000,
    val_persons: int = 50,
    test_persons: int = 150,
    images_per_person: int = 4,
    seed: int = 0,
    domain: str = "day",
) -> DatasetDict:
    """
    The drawn set as `DatasetDict` of `train`, `val` and `test`; no person is in two splits. Drawn once and kept in the
    cache of `datasets`.

    Besides the columns of every set (`image`, `captions`, `person_id`, `file_name`) it has `attribute_spans` (start
    and end of every attribute phrase in the cleaned captions), `attributes` (of the person), and `named_attributes`
    (what each caption names).

    Args:
        train_persons, val_persons, test_persons: persons of each split.
        images_per_person: images of each person of `val` and `test`; `train` has half as many, of more persons.
        seed: decides persons, images and captions.
        domain: `"day"` or `"night"`, see [`DOMAINS`].
    """
    persons = {"train": train_persons, "val": val_persons, "test": test_persons}
    arguments = {"persons": persons, "seed": seed, "domain": domain}
    arguments["version"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    splits = DatasetDict()
    for split in persons:
        images = (images_per_person + 1) // 2 if split == "train" else images_per_person
        arguments |= {"split": split, "images_per_person": images}
        splits[split] = Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=arguments)
    return splits


def ideal_scores(split: Dataset) -> np.ndarray:
    """
    Scores `(captions, images)` of a matcher that knows the attributes of every image and what every caption names: the
    number of named attributes that agree.
    """
    attributes = {name: np.array([row[name] for row in split["attributes"]]) for name in ATTRIBUTES}
    scores = []
    for index, captions in enumerate(split["named_attributes"]):
        scores += [sum(attributes[name] == attributes[name][index] for name in names) for names in captions]
    return np.stack(scores)
