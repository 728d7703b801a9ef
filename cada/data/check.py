"""Counts of a data set beside the official ones, and its bad images."""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from cada.data.images import find_bad_images
from cada.data.loading import DRAWN_SETS, open_splits
from cada.data.pedes import PEDES_SETS, UNPUBLISHED, Counts
from cada.files import CADAError


def check_dataset(dataset: str, data_dir: str | os.PathLike | None = None, quick: bool = False) -> tuple[str, bool]:
    """
    A report of persons, images and captions of every split, of persons in two splits and of every bad image (with
    `quick` none is decoded); and whether nothing is wrong and the numbers are the official ones, where there are any.

    Raises:
        CADAError: for annotations that cannot be read, and for a drawn set.
    """
    if dataset in DRAWN_SETS:
        raise CADAError(f"{dataset} is drawn by this program, so there is nothing to check.")
    pedes = PEDES_SETS.get(dataset)
    title = pedes.title if pedes else dataset
    lines = [title if data_dir is None else f"{title} in {data_dir}", ""]
    lines.append(f"{'split':6} {'':9} {'found':>8} {'official' if pedes else '':>9}".rstrip())
    persons, problems, total, differs = {}, [], [0, 0, 0], False
    for split, (rows, images) in open_splits(dataset, data_dir, with_content=not quick).items():
        described = {person for person, captions in zip(rows["person_id"], rows["captions"]) if captions}
        persons[split] = Counter(person for person in rows["person_id"] if person in described)
        counts = (len(described), len(rows), sum(map(len, rows["captions"])))
        total = [sum(pair) for pair in zip(total, counts)]
        official = pedes.counts.get(split, UNPUBLISHED) if pedes else None
        lines += _beside(split, counts, official)
        differs |= _differ(counts, official)
        others = len(rows) - persons[split].total()
        if others:
            lines.append(f"{split:6} {others:,} image(s) of persons whom no caption describes")
        single = list(persons[split].values()).count(1)
        if single:
            lines.append(f"{split:6} {single} person(s) with a single image")
        bad = find_bad_images(split, images, len(rows), decode=not quick)
        problems += [f"{split}: {problem}" for problem in bad.values()]
    for first, second in combinations(persons, 2):
        count = len(persons[first].keys() & persons[second].keys())
        if count:
            differs = True
            lines.append(f"{count} person(s) are both in {first} and in {second}.")
    if pedes and pedes.total:
        lines += _beside("all", total, pedes.total)
        differs |= _differ(total, pedes.total)
    verdict = f"{len(problems)} bad image file(s)."
    if pedes and differs:
        verdict += " Numbers differ from the official ones."
    elif pedes:
        some = any(None in counts for counts in pedes.counts.values())
        verdict += " Numbers that are published agree." if some else " Numbers are official."
    return "\n".join([*lines, *problems, "", verdict]), not (differs or problems)


def _differ(found: Sequence[int], official: Counts | None) -> bool:
    return any(expected not in (None, count) for count, expected in zip(found, official or UNPUBLISHED))


def _beside(split: str, found: Sequence[int], official: Counts | None) -> list[str]:
    """Lines of persons, images and captions, beside the official numbers where the set has some."""
    lines = []
    for name, count, expected in zip(("persons", "images", "captions"), found, official or UNPUBLISHED):
        line = f"{split:6} {name:9} {count:8,}"
        if official:
            line += f" {'-' if expected is None else f'{expected:,}':>9}"
            line += "" if expected in (None, count) else " differs"
        lines.append(line)
    return lines
