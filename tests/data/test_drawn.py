"""The drawn set: look-alikes, images, captions with their spans, the ideal matcher."""

import random

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cada.data.drawn import (
    ATTRIBUTES,
    DOMAINS,
    IMAGE_SIZE,
    draw_caption,
    draw_image,
    draw_persons,
    ideal_scores,
    load_drawn,
)
from processing_cada import clean_caption


@pytest.fixture(scope="module")
def drawn():
    return load_drawn(train_persons=12, val_persons=4, test_persons=5, images_per_person=3, seed=7)


def test_persons_are_different_and_swaps_occur():
    """A swap: the same person but for the colours of upper and lower garment, which are exchanged."""
    persons = draw_persons(150, random.Random(0))
    keys = {tuple(person.values()) for person in persons}
    assert len(keys) == 150
    swaps = 0
    for person in persons:
        if person["upper_colour"] != person["lower_colour"]:
            exchanged = {**person, "upper_colour": person["lower_colour"], "lower_colour": person["upper_colour"]}
            swaps += tuple(exchanged.values()) in keys
    assert swaps >= 20


def test_what_is_not_there_has_no_colour():
    for person in draw_persons(200, random.Random(1)):
        for item in ("bag", "hat"):
            assert (person[f"{item}_type"] == "none") == (person[f"{item}_colour"] == "none")


def test_every_value_of_every_attribute_occurs():
    persons = draw_persons(400, random.Random(2))
    for name, values in ATTRIBUTES.items():
        assert set(values) <= {person[name] for person in persons}


def test_images_of_a_person_differ_and_follow_the_seed():
    person = draw_persons(1, random.Random(0))[0]
    first, second, again = (np.asarray(draw_image(person, random.Random(seed))) for seed in (1, 2, 1))
    assert first.shape == (*IMAGE_SIZE, 3)
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - second).mean() > 5


def test_clothes_have_their_colours():
    """Mean colour of chest and thighs over 20 images: red above blue, or blue above red."""
    person = {**draw_persons(1, random.Random(0))[0], "sex": "man", "bag_type": "none", "bag_colour": "none"}
    person.update(upper_type="sweater", upper_pattern="plain", lower_type="trousers", lower_pattern="plain")

    def red_minus_blue(upper, lower):
        images = [
            np.asarray(draw_image({**person, "upper_colour": upper, "lower_colour": lower}, random.Random(seed)))
            for seed in range(20)
        ]
        mean = np.mean(images, axis=0)
        chest, thighs = mean[30:40, 20:28].mean(axis=(0, 1)), mean[54:60, 20:28].mean(axis=(0, 1))
        return chest[0] - chest[2], thighs[0] - thighs[2]

    chest, thighs = red_minus_blue("red", "blue")
    assert chest > 50 > -20 > thighs
    chest, thighs = red_minus_blue("blue", "red")
    assert thighs > 50 > -20 > chest


@given(st.integers(0, 10**6))
@settings(max_examples=100)
def test_captions_name_what_they_say(seed):
    """Every colour that is named stands in the text, in some span; spans are words of the cleaned caption."""
    rng = random.Random(seed)
    person = draw_persons(3, rng)[-1]
    caption = draw_caption(person, rng)
    cleaned = clean_caption(caption.text)
    phrases = [cleaned[start:end] for start, end in caption.spans]
    for (start, end), phrase in zip(caption.spans, phrases):
        assert phrase and phrase == phrase.strip()
        assert start == 0 or cleaned[start - 1] == " "
        assert end == len(cleaned) or cleaned[end] in " ,"
    assert caption.spans == sorted(caption.spans)
    synonyms = {"grey": ("grey", "gray"), "blond": ("blond", "blonde"), "purple": ("purple", "violet")}
    for name in caption.named:
        if name.endswith("colour"):
            words = synonyms.get(person[name], (person[name],))
            assert any(word in phrase.split() for word in words for phrase in phrases)
    assert len(caption.named) == len(set(caption.named))
    assert {"sex", "upper_type", "lower_type"} <= set(caption.named)
    assert set(caption.named) < set(ATTRIBUTES)  # something is always left out


def test_splits_share_no_person_and_hold_all_columns(drawn):
    assert {split: len(rows) for split, rows in drawn.items()} == {"train": 24, "val": 12, "test": 15}
    ids = [set(rows["person_id"]) for rows in drawn.values()]
    assert len(set.union(*ids)) == 12 + 4 + 5
    row = drawn["test"][0]
    assert row["image"].size == (IMAGE_SIZE[1], IMAGE_SIZE[0])
    assert len(row["captions"]) == len(row["attribute_spans"]) == len(row["named_attributes"]) == 2
    assert row["file_name"].startswith("test/")


@pytest.mark.parametrize("seed", [0, 32])
def test_nobody_is_in_two_splits(seed):
    """Also by attributes. With seed 32 the splits would share a person if each were drawn without the others."""
    splits = load_drawn(train_persons=400, val_persons=50, test_persons=150, images_per_person=1, seed=seed)
    looks = [{tuple(sorted(person.items())) for person in rows["attributes"]} for rows in splits.values()]
    assert sum(map(len, looks)) == len(set.union(*looks)) == 600
    alone = draw_persons(150, random.Random(f"{seed}-test"))
    shared = {tuple(sorted(person.items())) for person in alone} & (looks[0] | looks[1])
    assert bool(shared) == (seed == 32)


def test_seed_decides_everything(drawn):
    again = load_drawn(train_persons=12, val_persons=4, test_persons=5, images_per_person=3, seed=7)
    other = load_drawn(train_persons=12, val_persons=4, test_persons=5, images_per_person=3, seed=8)
    assert list(again["test"]["captions"]) == list(drawn["test"]["captions"])
    assert np.array_equal(again["test"][3]["image"], drawn["test"][3]["image"])
    assert list(other["test"]["captions"]) != list(drawn["test"]["captions"])


def test_at_night_images_are_dark_and_blue_and_people_wear_coats():
    night = load_drawn(train_persons=12, val_persons=4, test_persons=30, images_per_person=3, seed=7, domain="night")
    day = load_drawn(train_persons=12, val_persons=4, test_persons=30, images_per_person=3, seed=7)

    def mean_colour(rows):
        return np.mean([np.asarray(image).mean(axis=(0, 1)) for image in rows["image"]], axis=0)

    def share(rows, found):
        return np.mean([found(row) for row in rows])

    (day_red, _, day_blue), (night_red, _, night_blue) = mean_colour(day["test"]), mean_colour(night["test"])
    assert night_red < 0.7 * day_red
    assert night_blue / night_red > 1.1 * day_blue / day_red
    night_coats, day_coats = (
        share(rows["attributes"], lambda row: row["upper_type"] == "coat") for rows in (night["test"], day["test"])
    )
    assert night_coats > day_coats
    night_ends, day_ends = (
        share(sum(rows["captions"], []), lambda text: "on top." in text) for rows in (night["test"], day["test"])
    )
    assert night_ends > day_ends


@pytest.mark.parametrize("domain", DOMAINS)
def test_weights_of_a_domain_are_for_known_values(domain):
    for name, weights in DOMAINS[domain].weights.items():
        assert set(weights) == set(ATTRIBUTES[name])


def test_ideal_matcher_counts_agreeing_attributes():
    """Two persons that agree in hair only; caption 0 names sex and hair, caption 1 hair, caption 2 sex."""
    base = dict.fromkeys(ATTRIBUTES, "none")
    rows = Dataset.from_list(
        [
            {
                "image": "",
                "attributes": {**base, "sex": "man", "hair_colour": "red"},
                "named_attributes": [["sex", "hair_colour"], ["hair_colour"]],
            },
            {
                "image": "",
                "attributes": {**base, "sex": "woman", "hair_colour": "red"},
                "named_attributes": [["sex"]],
            },
        ]
    )
    assert ideal_scores(rows).tolist() == [[2, 1], [1, 1], [0, 1]]


def test_ideal_matcher_gives_a_persons_own_images_the_full_score(drawn):
    scores = ideal_scores(drawn["test"])
    assert scores.shape == (30, 15)
    named = [len(names) for row in drawn["test"]["named_attributes"] for names in row]
    persons = list(drawn["test"]["person_id"])
    for query in range(30):
        own = [image for image in range(15) if persons[image] == persons[query // 2]]
        assert (scores[query, own] == named[query]).all()
        assert scores[query].max() == named[query]
