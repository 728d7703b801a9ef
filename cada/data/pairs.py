"""Pairs of image and caption for training: rows, attribute phrases, batches."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

import processing_cada
from cada.data.images import open_image, undecoded
from cada.data.loading import _writing_to_the_cache
from cada.files import CADAError, one_line
from processing_cada import AttributeMasker, CADAProcessor, clean_caption


_MASKER_CODE = hashlib.sha256(Path(processing_cada.__file__).read_bytes()).hexdigest()


def load_tagger(masker: AttributeMasker) -> None:
    """Load NLTK's tagger before any worker starts; a `CADAError` where it or its data are missing or damaged."""
    try:
        masker.find_spans("a red coat")
    except (ImportError, LookupError, ValueError) as error:
        raise CADAError(f"Attribute phrases cannot be found: {one_line(error)}") from error


def add_attribute_spans(dataset: Dataset, masker: AttributeMasker) -> Dataset:
    """
    Add the column `attribute_spans` (units of every caption) with NLTK, once; `datasets` caches it. A phrase column
    that the data set brings along is kept, and split into words where the masker masks words.
    """
    if "attribute_spans" not in dataset.column_names:
        load_tagger(masker)
        with _writing_to_the_cache("The table of attribute phrases"):
            return dataset.map(
                _tag_row,
                # `datasets` hashes the arguments, not the code: phrases found by other code or NLTK are not reused.
                fn_kwargs={"unit": masker.unit, "version": f"{_MASKER_CODE} nltk {version('nltk')}"},
                desc="Tagging captions",
            )
    if masker.unit == "word":
        with _writing_to_the_cache("The table of attribute phrases"):
            return dataset.map(_split_spans, desc="Splitting phrases")
    return dataset


def _tag_row(row: dict, unit: str, version: str) -> dict:
    masker = AttributeMasker(unit)
    return {"attribute_spans": [masker.find_spans(caption) for caption in row["captions"]]}


def _split_spans(row: dict) -> dict:
    split = []
    for caption, spans in zip(row["captions"], row["attribute_spans"]):
        words = []
        for start, end in spans:
            for word in clean_caption(caption)[start:end].split(" "):
                words.append([start, start + len(word)])
                start += len(word) + 1
        split.append(words)
    return {"attribute_spans": split}


class GlobalBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """
    The batches of one of several processes, as (pair, seed of its augmentation and masking).

    Order and seeds follow from `seed`, epoch and pair alone. A batch of all processes is cut into equal parts, one for
    each: n processes train on the batches of one process with the n-fold batch size.

    Args:
        pairs: number of pairs.
        batch_size: of one process.
        seed: of the run.
        rank, processes: number of this process, and how many there are.
        drop_last: whether to leave out the last batch of an epoch where it is smaller than the others; with several
            processes it always is.
    """

    def __init__(
        self, pairs: int, batch_size: int, seed: int = 0, rank: int = 0, processes: int = 1, drop_last: bool = True
    ):
        self.pairs, self.batch_size, self.seed, self.epoch = pairs, batch_size, seed, 0
        self.rank, self.processes, self.drop_last = rank, processes, drop_last or processes > 1

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.pairs, self.batch_size * self.processes)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = [self.seed, self.epoch]
        order = np.random.default_rng(epoch).permutation(self.pairs)
        for batch in range(len(self)):
            begin = (batch * self.processes + self.rank) * self.batch_size
            part = order[begin : begin + self.batch_size].tolist()
            # 63 bits: what torch takes as a seed without complaint.
            seeds = (np.random.SeedSequence([*epoch, pair]).generate_state(1, np.uint64)[0] >> 1 for pair in part)
            yield [(pair, int(seed)) for pair, seed in zip(part, seeds)]


def outlive_sigterm(worker: int) -> None:
    """
    For the workers of a data loader. Clusters send SIGTERM to all processes of a job; the main one saves and ends, and
    its workers have to live until then. SIGTERM of the main process itself still ends them.
    """

    def wait_for_the_main_process():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_the_main_process, daemon=True).start()


class PairDataset(torch.utils.data.Dataset):
    """
    The pairs (image, caption) of a data set with one row per image: every caption is one sample. An index is the
    number of a pair, or (pair, seed) from [`GlobalBatches`].

    Args:
        dataset: rows with `image`, `captions`, `person_id`, and optionally `file_name`, `attribute_spans`, `box`.
        image_size: height and width that the model reads, see [`open_image`].
    """

    def __init__(self, dataset: Dataset, image_size: tuple[int, int] | None = None):
        self.dataset, self.image_size = undecoded(dataset), image_size
        captions, _ = captions_and_persons(dataset)
        self.pairs = [(row, number) for row, own in enumerate(captions) for number in range(len(own))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index, *seed = index if isinstance(index, tuple) else (index,)
        row_index, number = self.pairs[index]
        row = read_row(self.dataset, row_index, self.image_size)
        sample = {"image": row["image"], "caption": row["captions"][number], "person_id": row["person_id"]}
        sample["pair"] = index
        if "attribute_spans" in row:
            sample["attribute_spans"] = row["attribute_spans"][number]
        if seed:
            sample["seed"] = seed[0]
        return sample

    def name_of(self, index: int) -> str:
        """What a reader needs to find a pair: file (where the data set names it), row, person and caption."""
        row_index, number = self.pairs[index]
        row = self.dataset.select_columns([name for name in self.dataset.column_names if name != "image"])[row_index]
        return f"{row.get('file_name', 'image')} (row {row_index}, person {row['person_id']}, caption {number + 1})"


def captions_and_persons(dataset: Dataset) -> tuple[list[list[str]], list[int]]:
    """
    The columns `captions` and `person_id` of rows that somebody made in Python.

    Raises:
        CADAError: names the row where one is a text: its letters would count as captions, and it is no number.
    """
    columns = list(dataset["captions"]), list(dataset["person_id"])
    for row, (captions, person_id) in enumerate(zip(*columns)):
        if isinstance(captions, str):
            raise CADAError(f"Row {row}: `captions` is the text {captions!r:.80}. Give a list, also of one caption.")
        if isinstance(person_id, str):
            raise CADAError(f"Row {row}: `person_id` is the text {person_id!r:.80}. Give a whole number.")
    return columns


def read_row(dataset: Dataset, index: int, size: tuple[int, int] | None = None) -> dict:
    """
    A row with its image decoded, or with what is in its `box`, see [`open_image`]; an image that cannot be decoded is
    reported with file, row and remedy.
    """
    row = undecoded(dataset)[index]
    image = {"path": None, "bytes": None} if row["image"] is None else row["image"]
    if not isinstance(image, dict):
        return row
    try:
        return {**row, "image": open_image(image, size, row.get("box"))}
    except CADAError as error:
        raise CADAError(
            f"The image {row.get('file_name') or image['path'] or ''!r} in row {index} cannot be decoded: "
            f"{error}. Replace the file, or leave such images out with --skip_unreadable."
        ) from error


@dataclass
class PairCollator:
    """
    Batches of samples of [`PairDataset`] as inputs of the model, and `pair`, their numbers in the data set.

    Args:
        processor: of the model.
        augment: whether to augment the images, for training.
        mask: whether to mask the attributes at `attribute_spans` of the samples, for ARA.
    """

    processor: CADAProcessor
    augment: bool = True
    mask: bool = True

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        if self.mask and "attribute_spans" not in samples[0]:
            raise CADAError(
                "The samples have no `attribute_spans`. Add them with `add_attribute_spans`; for a model without ARA "
                "pass `mask=False`."
            )
        inputs = self.processor(
            images=[sample["image"] for sample in samples],
            text=[sample["caption"] for sample in samples],
            attribute_spans=[sample["attribute_spans"] for sample in samples] if self.mask else None,
            seeds=[sample["seed"] for sample in samples] if "seed" in samples[0] else None,
            do_augment=self.augment,
            return_tensors="pt",
        )
        numbers = {"person_ids": "person_id", "pair": "pair"}
        return {**inputs, **{name: torch.tensor([sample[key] for sample in samples]) for name, key in numbers.items()}}
