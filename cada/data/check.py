"""Counts of a data set beside the official ones, and its bad images."""

import os
from collections import Counter
from itertools import combinations

from cada.data.images import find_bad_images
from cada.data.loading import DRAWN_SETS, open_splits
from cada.data.pedes import PEDES_SETS
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
    title, official = dataset, {}
    if dataset in PEDES_SETS:
        title, official = PEDES_SETS[dataset].title, PEDES_SETS[dataset].counts
    lines = [title if data_dir is None else f"{title} in {data_dir}", ""]
    lines.append(f"{'split':6} {'':9} {'found':>8} {'official' if official else '':>9}".rstrip())
    persons, problems, complete = {}, [], True
    for split, (rows, images) in open_splits(dataset, data_dir, with_content=not quick).items():
        persons[split] = Counter(rows["person_id"])
        found = (len(persons[split]), len(rows), sum(map(len, rows["captions"])))
        wanted = official.get(split, found)
        complete &= found == wanted
        for name, count, expected in zip(("persons", "images", "captions"), found, wanted):
            beside = f" {expected:9,} {'' if count == expected else 'differs'}" if official else ""
            lines.append(f"{split:6} {name:9} {count:8,}{beside}")
        single = list(persons[split].values()).count(1)
        if single:
            lines.append(f"{split:6} {single} person(s) with a single image")
        bad = find_bad_images(split, images, len(rows), decode=not quick)
        problems += [f"{split}: {problem}" for problem in bad.values()]
    for first, second in combinations(persons, 2):
        count = len(persons[first].keys() & persons[second].keys())
        if count:
            complete = False
            lines.append(f"{count} person(s) are both in {first} and in {second}.")
    verdict = f"{len(problems)} bad image file(s)."
    if official:
        verdict += " Numbers are official." if complete else " Numbers differ from the official ones."
    return "\n".join([*lines, *problems, "", verdict]), complete and not problems
