"""Counts of a data set beside the official ones, and its bad images."""

import os
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from cada.data.images import find_bad_images
from cada.data.loading import DRAWN_SETS, open_splits
from cada.data.pedes import PEDES_SETS
from cada.files import CADAError


@dataclass
class Check:
    """
    What is found in a data set.

    Attributes:
        title: of the set.
        counts: `{split: (persons, images, captions)}`.
        official: the same of the set's authors; empty for own data.
        single: persons with one image, by split.
        shared: persons of two splits, by the two, where there are any.
        problems: a line for each bad image, by split.
    """

    title: str
    counts: dict[str, tuple[int, int, int]]
    official: dict[str, tuple[int, int, int]]
    single: dict[str, int]
    shared: dict[tuple[str, str], int]
    problems: dict[str, list[str]]

    @property
    def complete(self) -> bool:
        """Whether the numbers are the official ones, where there are any, and no person is in two splits."""
        return not self.shared and (not self.official or self.counts == self.official)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.complete and not any(self.problems.values())

    def __str__(self) -> str:
        lines = [self.title, "", f"{'split':6} {'':9} {'found':>8} {'official' if self.official else '':>9}".rstrip()]
        for split, found in self.counts.items():
            for name, count, expected in zip(
                ("persons", "images", "captions"), found, self.official.get(split, found)
            ):
                beside = f" {expected:9,} {'' if count == expected else 'differs'}" if self.official else ""
                lines.append(f"{split:6} {name:9} {count:8,}{beside}")
            if self.single[split]:
                lines.append(f"{split:6} {self.single[split]} person(s) with a single image")
        for (first, second), count in self.shared.items():
            lines.append(f"{count} person(s) are both in {first} and in {second}.")
        lines += [f"{split}: {problem}" for split, problems in self.problems.items() for problem in problems]
        verdict = f"{sum(map(len, self.problems.values()))} bad image file(s)."
        if self.official:
            verdict += " Numbers are official." if self.complete else " Numbers differ from the official ones."
        return "\n".join([*lines, "", verdict])


def check_dataset(dataset: str, data_dir: str | os.PathLike | None = None, quick: bool = False) -> Check:
    """
    Count persons, images and captions per split, and find every bad image; with `quick` none is decoded.

    Raises:
        CADAError: for annotations that cannot be read, and for a drawn set.
    """
    if dataset in DRAWN_SETS:
        raise CADAError(f"{dataset} is drawn by this program, so there is nothing to check.")
    title, official = dataset, {}
    if dataset in PEDES_SETS:
        title, official = PEDES_SETS[dataset].title, PEDES_SETS[dataset].counts
    splits = open_splits(dataset, data_dir, with_content=not quick)
    persons = {split: Counter(rows["person_id"]) for split, (rows, _) in splits.items()}
    shared = {pair: len(persons[pair[0]].keys() & persons[pair[1]].keys()) for pair in combinations(persons, 2)}
    return Check(
        title=title if data_dir is None else f"{title} in {data_dir}",
        counts={
            split: (len(persons[split]), len(rows), sum(map(len, rows["captions"])))
            for split, (rows, _) in splits.items()
        },
        official=official,
        single={split: sum(count == 1 for count in counts.values()) for split, counts in persons.items()},
        shared={pair: count for pair, count in shared.items() if count},
        problems={
            split: list(find_bad_images(split, images, len(rows), decode=not quick).values())
            for split, (rows, images) in splits.items()
        },
    )
