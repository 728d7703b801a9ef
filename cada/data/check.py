"""Counts of a data set beside the official ones, and its bad images."""

import os
from collections import Counter
from itertools import combinations

from cada.data.images import find_bad_images
from cada.data.loading import DRAWN_SETS, check_split, open_other, undecoded_images
from cada.data.pedes import PEDES_SETS, read_annotations
from cada.files import CADAError


def check_dataset(dataset: str, data_dir: str | os.PathLike | None = None, quick: bool = False) -> bool:
    """
    Print persons, images and captions per split, of the three sets against the official numbers, and every bad image.
    Returns whether nothing is wrong.
    """
    if dataset in DRAWN_SETS:
        raise CADAError(f"{dataset} is drawn by this program, so there is nothing to check.")
    if dataset in PEDES_SETS:
        title, official = PEDES_SETS[dataset].title, PEDES_SETS[dataset].counts
        images = splits = read_annotations(dataset, data_dir)
    else:
        title, official, images, splits = dataset, {}, {}, {}
        for split, rows in open_other(dataset, data_dir, revision=None).items():
            rows = check_split(rows, f"{dataset}, split {split!r}")
            images[split] = undecoded_images(rows, with_content=not quick)
            columns = zip(rows["person_id"], rows["captions"])
            splits[split] = [{"person_id": person_id, "captions": captions} for person_id, captions in columns]
    print(title if data_dir is None else f"{title} in {data_dir}", end="\n\n")
    print(f"{'split':6} {'':9} {'found':>8} {'official' if official else '':>9}".rstrip())
    complete = True
    for split, records in splits.items():
        found = (
            len({record["person_id"] for record in records}),
            len(records),
            sum(len(record["captions"]) for record in records),
        )
        for position, (name, count) in enumerate(zip(("persons", "images", "captions"), found)):
            line = f"{split:6} {name:9} {count:8,}"
            if official:
                expected = official[split][position]
                complete &= count == expected
                line += f" {expected:9,} {'' if count == expected else 'differs'}"
            print(line)
        most = Counter(record["person_id"] for record in records).most_common()
        single = sum(1 for _, count in most if count == 1)
        if single:
            print(f"{split:6} {single} person(s) with a single image")
    persons = {split: {record["person_id"] for record in records} for split, records in splits.items()}
    for first, second in combinations(persons, 2):
        count = len(persons[first] & persons[second])
        if count:
            complete = False
            print(f"{count} person(s) are both in {first} and in {second}.")
    bad = 0
    for split, records in splits.items():
        problems = find_bad_images(split, images[split], len(records), decode=not quick)
        bad += len(problems)
        for problem in problems.values():
            print(f"{split}: {problem}")
    line = f"\n{bad} bad image file(s)."
    if official:
        line += " Numbers are official." if complete else " Numbers differ from the official ones."
    print(line)
    return complete and not bad
