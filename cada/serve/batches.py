"""
Requests that wait together are computed together: what a request asks, and the one thread that answers.

Each question is a function of the index and of the payloads of all requests that ask the same in one batch. It gives
the answers in their order.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from textwrap import shorten

import torch

from cada.evaluation.encoding import Gallery, Queries
from cada.evaluation.matching import match_candidates
from cada.files import CADAError
from cada.gallery.index import LiveIndex
from cada.gallery.search import GalleryIndex, Ranking


MAX_BATCH = 64  # texts and images that wait for one batch; a request with more is a batch of its own
_IMAGES_AT_ONCE = 32  # encoded


class RequestError(CADAError):
    """A request is wrong; any other error is the service's."""


def search_sentences(
    gallery: GalleryIndex,
    asked: Sequence[tuple[str, int]],
    rerank: int | None,
    where: tuple[str, ...],
    min_probability: float | None,
) -> list[Ranking]:
    """Rankings for sentences; with each the number of images wanted, and perhaps more are given."""
    sentences, tops = zip(*asked)
    return gallery.search(sentences, max(tops), rerank, where, min_probability=min_probability)


def search_images(
    gallery: GalleryIndex, asked: Sequence[tuple[torch.Tensor, int]], where: tuple[str, ...]
) -> list[Ranking]:
    """As [`search_sentences`] for images, as pixel values `(1, 3, height, width)`."""
    pixel_values, tops = zip(*asked)
    features, _ = _encoded_images(gallery, torch.cat(pixel_values))
    return gallery.search_features(features, max(tops), where)


def embed_sentences(gallery: GalleryIndex, asked: Sequence[list[str]]) -> list[tuple[torch.Tensor, int]]:
    """
    Features `(texts, d)` of lists of sentences, and the number of their word pieces. A `RequestError` for a sentence
    that the model does not read to its end.
    """
    queries = _encoded_sentences(gallery, [sentence for sentences in asked for sentence in sentences])
    counts = [len(sentences) for sentences in asked]
    lengths = queries.attention_mask.sum(dim=1).split(counts)
    return [(features, int(length.sum())) for features, length in zip(queries.embeds.split(counts), lengths)]


def embed_images(gallery: GalleryIndex, asked: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Features `(images, d)` of images as pixel values `(images, 3, height, width)`."""
    features, _ = _encoded_images(gallery, torch.cat(list(asked)))
    return list(features.split([len(pixel_values) for pixel_values in asked]))


def rank_images(
    gallery: GalleryIndex, asked: Sequence[tuple[str, torch.Tensor]]
) -> list[tuple[list[tuple[int, float]], int]]:
    """
    For a sentence and images, as pixel values `(images, 3, height, width)`: the places of the images and their scores,
    the best first, and the number of word pieces. The score is S_G + S_L, S_G of a model without match heads.
    """
    sentences, pixel_values = zip(*asked)
    queries = _encoded_sentences(gallery, sentences)
    features, states = _encoded_images(gallery, torch.cat(pixel_values))
    counts = [len(images) for images in pixel_values]
    numbers = torch.arange(len(features)).split(counts)  # each sentence has images of its own
    candidates = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True)
    scores = (queries.embeds[:, None] * features[candidates]).sum(dim=-1)
    if gallery.model.config.use_atp:
        real = torch.arange(candidates.shape[1]) < torch.tensor(counts)[:, None]
        scores += match_candidates(gallery.model, queries, Gallery(features, states), candidates, chosen=real)
    answers = []
    for row, count, length in zip(scores, counts, queries.attention_mask.sum(dim=1).tolist()):
        order = row[:count].argsort(descending=True, stable=True)
        answers.append((list(zip(order.tolist(), row[order].tolist())), length))
    return answers


def _encoded_sentences(gallery: GalleryIndex, sentences: Sequence[str]) -> Queries:
    queries, ends = gallery.encode_sentences(sentences)
    for sentence, words in zip(sentences, ends):
        if words is not None:
            shown = shorten(sentence, 60, placeholder=" ...")
            raise RequestError(f"The sentence {shown!r} is too long: the model reads it up to {words!r}. Shorten it.")
    return queries


def _encoded_images(gallery: GalleryIndex, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised features `(images, d)` and patch states `(images, 1 + patches, hidden)`."""
    parts = [gallery.encode_images(part) for part in pixel_values.split(_IMAGES_AT_ONCE)]
    features, states = (torch.cat(tensors) for tensors in zip(*parts))
    return features, states


@dataclass(frozen=True, eq=False)
class _Job:
    """A request that waits."""

    question: tuple  # a function of this module, and its further arguments
    payload: object
    size: int
    answer: asyncio.Future


class Batcher:
    """
    Answers questions with the model, one batch at a time. An idle model begins at once; what comes meanwhile is the
    next batch.

    Args:
        live: the index.
        seen: called with the number of requests that were computed together.
    """

    def __init__(self, live: LiveIndex, seen: Callable[[int], object]):
        self.live, self.seen, self._jobs = live, seen, asyncio.Queue()

    async def ask(self, function: Callable, payload, *arguments, size: int = 1):
        """The answer of `function(index, payloads, *arguments)` to one payload, which has `size` texts or images."""
        answer = asyncio.get_running_loop().create_future()
        self._jobs.put_nowait(_Job((function, *arguments), payload, size, answer))
        return await answer

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as thread:  # always the same, as each thread of torch's has its own team
            while True:
                groups, size = defaultdict(list), 0
                while size == 0 or (size < MAX_BATCH and not self._jobs.empty()):
                    job = await self._jobs.get()
                    groups[job.question].append(job)
                    size += job.size
                for question, jobs in groups.items():
                    payloads = [job.payload for job in jobs]
                    answers = await loop.run_in_executor(thread, self._answers, question, payloads)
                    for job, answer in zip(jobs, answers):
                        if job.answer.done():  # cancelled, as the time to drain was up
                            continue
                        if isinstance(answer, Exception):
                            job.answer.set_exception(answer)
                        else:
                            job.answer.set_result(answer)

    def _answers(self, question: tuple, payloads: list) -> list:
        """Answers, or exceptions in their place. What fails in company is asked alone: others are not to suffer."""
        function, *arguments = question
        try:
            answers = self.live.ask(lambda gallery: function(gallery, payloads, *arguments))
        except Exception as error:  # also of the GPU
            if len(payloads) == 1:
                return [error]
            return [answer for payload in payloads for answer in self._answers(question, [payload])]
        self.seen(len(payloads))
        return answers
