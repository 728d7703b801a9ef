"""Retrieval metrics, and evaluation in two stages: global matching of all images, local matching of the top K."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from cada.data.pairs import captions_and_persons
from cada.evaluation.calibration import Candidates, fit_calibration, open_set_metrics
from cada.evaluation.encoding import (
    RERANK_MEMORY,
    Gallery,
    Queries,
    encode_gallery,
    encode_queries,
    sum_over_processes,
)
from cada.evaluation.metrics import _ROWS_AT_ONCE, METRICS, metric_sums, rerank_scores, top_candidates
from cada.files import CADAError
from modeling_cada import CADAImages


logger = logging.get_logger(__name__)

# Tokens of a batch, and batches of a group of images. Large enough for fast matrix products; an accelerator needs more
# for that, and groups so large that nearly all texts of a batch are of one length.
_BATCHES = {"cpu": (1024, 4)}
_BATCHES_ON_ACCELERATOR = (65_536, 32)
_SAFE_RANKS = (1, 5, 10)
_SAMPLED_PAIRS = 256


def _batches(lengths: list[int], too_much: Callable[[int, int], bool]) -> Iterator[slice]:
    """Slices of texts in the order of their `lengths`, as large as `too_much(rows, longest)` allows, 1 at least."""
    start = 0
    for end, length in enumerate(lengths):
        if end > start and too_much(end + 1 - start, length):
            yield slice(start, end)
            start = end
    yield slice(start, len(lengths))


def _groups(counts: torch.Tensor, pairs: int, images: float) -> list[torch.Tensor]:
    """Indices of `counts` in groups that add up to about `pairs`, of at most `images`, 1 at least."""
    groups, group, total = [], [], 0
    for index, count in enumerate(counts.tolist()):
        if group and (total >= pairs or len(group) + 1 > images):
            groups.append(torch.tensor(group))
            group, total = [], 0
        group.append(index)
        total += count
    return [*groups, torch.tensor(group)] if group else groups


def _by_image(
    candidates: torch.Tensor, gallery: Gallery, chosen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This process's images among the candidates, how many pairs each has, and the pairs in their order."""
    images, order = candidates.flatten().sort(stable=True)
    kept = torch.ones_like(images, dtype=torch.bool) if chosen is None else chosen.flatten()[order]
    if gallery.own is not None:
        kept &= (images >= gallery.own.start) & (images < gallery.own.stop)
    images, counts = images[kept].unique_consecutive(return_counts=True)
    return images, counts, order[kept]


@torch.inference_mode()
def match_candidates(
    model,
    queries: Queries,
    gallery: Gallery,
    candidates: torch.Tensor,
    memory: float = RERANK_MEMORY,
    progress: bool = False,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Local scores S_L `(queries, K)` of the candidates `(queries, K)`; 0 for those that are not `chosen` `(queries, K)`.

    Pairs are taken image by image, in groups of images with several batches of pairs: the keys and values of an image
    are computed once for all its pairs. The pairs of a group are sorted by the length of their text, so that padding
    is rare. A group and a batch take at most a quarter of `memory` (GB) each. Several processes share the images:
    each takes those whose patch states it keeps. An accelerator is waited for at the end only, if the patch states of
    all images are kept.
    """
    k, device, text = candidates.shape[1], model.device, model.config.text_config
    lengths = queries.attention_mask.sum(dim=1)
    scores = torch.zeros(candidates.numel(), device=device)
    # Keys and values of one layer; all layers of a group are kept, and one layer is copied for every block of pairs.
    projected = 2 * gallery.states.shape[1] * text.hidden_size * gallery.states.dtype.itemsize
    per_token = (2 * text.intermediate_size + 8 * text.hidden_size) * gallery.states.dtype.itemsize
    budget = memory / 4 * 1e9
    at_once = device.type == "cuda"  # other accelerators may read the memory when it is no longer ours
    tokens_at_once, batches_of_group = _BATCHES.get(device.type, _BATCHES_ON_ACCELERATOR)
    images, counts, order = _by_image(candidates, gallery, chosen)
    groups = _groups(
        counts,
        batches_of_group * tokens_at_once // int(lengths.median()),
        budget / projected / text.num_hidden_layers,
    )
    ends = counts.cumsum(0)
    with tqdm(total=len(order), desc="Re-ranking", unit="pair", disable=not progress, leave=False) as bar:
        for group, states in zip(groups, gallery.states_of([images[group] for group in groups])):

            def too_much(rows: int, length: int, images: int = len(group)) -> bool:
                # At most, for the blocks of `model.match`: of 8 pairs, or of as many as an image has on average.
                copied = min(rows, max(rows // 8 + images, 2 * images)) * projected
                return rows * length > tokens_at_once or copied + rows * length * per_token > budget

            group_images = None  # with the keys and values of the group before, which would double the memory
            states = states.pin_memory() if at_once else states
            group_images = CADAImages(states.to(device, non_blocking=at_once))
            pairs = order[ends[group[0]] - counts[group[0]] : ends[group[-1]]]
            image_index = torch.repeat_interleave(torch.arange(len(group)), counts[group])
            # By length, and the pairs of one text side by side.
            by_length = (lengths[pairs // k] * len(lengths) + pairs // k).argsort(stable=True)
            pairs, image_index = pairs[by_length], image_index[by_length]
            for batch in _batches(lengths[pairs // k].tolist(), too_much):
                texts, text_index = (pairs[batch] // k).unique(return_inverse=True)
                inputs = (queries.input_ids[texts], queries.attention_mask[texts])
                logits = model.match(*inputs, group_images, text_index, image_index[batch])
                scores[pairs[batch].to(device, non_blocking=at_once)] = model.local_score(logits).float()
                bar.update(len(pairs[batch]))
    return sum_over_processes(scores, device).view_as(candidates)


def in_doubt(
    similarity: torch.Tensor, local_scores: torch.Tensor, tolerance: float, match_score: str = "probability"
) -> torch.Tensor:
    """
    Which candidates `(queries, K)` may change places with others at the borders behind ranks 1, 5 and 10.

    Args:
        similarity: S_G of the candidates `(queries, K)`.
        local_scores: their S_L `(queries, K)`.
        tolerance: how far the logits behind S_L may be off.
        match_score: what S_L is: a "probability" or a "logit".

    Returns:
        Booleans `(queries, K)`.
    """
    scores, probability = local_scores.double(), match_score == "probability"
    logits = scores.logit() if probability else scores
    low, high = (
        similarity.double() + (shift.sigmoid() if probability else shift)
        for shift in (logits - tolerance, logits + tolerance)
    )
    doubtful = torch.zeros_like(scores, dtype=torch.bool)
    for rank in _SAFE_RANKS:
        if rank < scores.shape[1]:
            inside = low > high.topk(rank + 1).values[:, -1:]  # no more than `rank` can be as high
            outside = high < low.topk(rank).values[:, -1:]
            doubtful |= ~(inside | outside)
    return doubtful


def score_candidates(
    model,
    queries: Queries,
    gallery: Gallery,
    candidates: torch.Tensor,
    similarity: torch.Tensor,
    memory: float = RERANK_MEMORY,
    progress: bool = False,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Local scores S_L `(queries, K)` of the candidates `(queries, K)`, whose global scores are `similarity`
    `(queries, K)`, within `memory` (GB). Those that are `known` `(queries, K)`, and not NaN there, are not read again.

    Half precision cannot tell close candidates apart. Under autocast it reads all pairs. A sample, read again in the
    precision of the weights, shows how far it is off. Then candidates whose place among the first 1, 5 or 10 is in
    doubt are read again, too. Thus Rank-1, 5 and 10 are as a rule those of full precision, for a part of its work.
    """
    options = {"memory": memory, "progress": progress}
    unread = torch.ones_like(candidates, dtype=torch.bool) if known is None else known.isnan()
    scores = match_candidates(model, queries, gallery, candidates, **options, chosen=unread)
    scores = scores if known is None else torch.where(unread, scores, known)
    if not torch.is_autocast_enabled(model.device.type):
        return scores
    places = unread.flatten().nonzero()[:, 0]
    sample = torch.zeros(candidates.numel(), dtype=torch.bool)
    sample[places[:: max(1, len(places) // _SAMPLED_PAIRS)]] = True
    sample = sample.view_as(candidates)
    match_score = model.config.match_score

    def logits(scores: torch.Tensor) -> torch.Tensor:
        return scores[sample].double().logit(eps=1e-7) if match_score == "probability" else scores[sample].double()

    with torch.autocast(model.device.type, enabled=False):
        exact = match_candidates(model, queries, gallery, candidates, **options, chosen=sample)
        error = (logits(exact) - logits(scores)).square().mean().sqrt()
        doubtful = in_doubt(similarity, scores, 4 * float(error), match_score)
        exact = match_candidates(model, queries, gallery, candidates, **options, chosen=doubtful)
    return torch.where(doubtful, exact, scores)


def _similarity(queries: Queries, gallery: Gallery, rows: slice = slice(None)) -> torch.Tensor:
    """S_G `(rows, images)`, in float32 also under autocast."""
    with torch.autocast(queries.embeds.device.type, enabled=False):
        return queries.embeds[rows] @ gallery.embeds.t()


def score_gallery(
    model, queries: Queries, gallery: Gallery, rerank_k: int, memory: float = RERANK_MEMORY, progress: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Scores `(queries, gallery)` of global matching, and of local matching of the top K; `None` for the latter where
    the model has no match heads. `memory` (GB) bounds local matching. A `ValueError` for `rerank_k` below 1.
    """
    similarity = _similarity(queries, gallery)
    if not model.config.use_atp:
        return similarity, None
    if rerank_k < 1:
        raise ValueError(f"`rerank_k` is {rerank_k}. Give the number of candidates, 1 or more.")
    candidates = top_candidates(similarity, rerank_k)
    known = similarity.gather(1, candidates)
    local_scores = score_candidates(model, queries, gallery, candidates, known, memory, progress)
    return similarity, rerank_scores(similarity, candidates, local_scores)


def _scores_read(candidates: torch.Tensor, read: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """S_L of the candidates that are among those of `read` (candidates, S_L); NaN for others. All `(queries, K)`."""
    order = read[0].argsort(dim=1)
    images, scores = (values.gather(1, order) for values in read)
    place = torch.searchsorted(images, candidates).clamp(max=images.shape[1] - 1)
    return scores.gather(1, place).where(images.gather(1, place) == candidates, torch.nan)


class _Searches:
    """Every caption of a data set searches its images; all are encoded once, by a model in evaluation mode."""

    def __init__(
        self,
        model,
        processor,
        dataset,
        rerank_k: int,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
        memory: float = RERANK_MEMORY,
    ):
        captions, person_ids = captions_and_persons(dataset.select_columns(["captions", "person_id"]))
        self.model, self.rerank_k = model, rerank_k
        self.options = {"memory": memory, "progress": progress}
        self.gallery_ids = torch.tensor(person_ids)
        self.query_ids = self.gallery_ids.repeat_interleave(torch.tensor([len(row) for row in captions]))
        # Part by part, as the whole matrix of scores may be too large.
        self.parts = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(self.query_ids), _ROWS_AT_ONCE)]
        self.gallery = encode_gallery(model, processor, dataset, batch_size, num_workers, **self.options)
        captions = [caption for row in captions for caption in row]
        self.queries = encode_queries(model, processor, captions, progress=progress)

    def candidates(self, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best K of the images `among` these, and their S_G, `(queries, K)` each."""
        found = []
        for rows in self.parts:
            similarity = _similarity(self.queries, self.gallery, rows)[:, among]
            chosen = top_candidates(similarity, self.rerank_k)
            found.append((among[chosen], similarity.gather(1, chosen)))
        candidates, similarity = zip(*found)
        return torch.cat(candidates), torch.cat(similarity)

    def match(self, candidates: torch.Tensor, similarity: torch.Tensor, known: torch.Tensor | None = None):
        """[`score_candidates`]."""
        encoded = self.model, self.queries, self.gallery
        return score_candidates(*encoded, candidates, similarity, **self.options, known=known)

    def metrics(self, read: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, float]:
        """Of each stage in percent; `read` are candidates and their S_L, `(queries, K)` each, `None` without these."""
        sums = {}
        for rows in self.parts:
            scores = {"global": _similarity(self.queries, self.gallery, rows)}
            if read is not None:
                scores["local"] = rerank_scores(scores["global"], *(values[rows] for values in read))
            for stage, own in scores.items():
                added = metric_sums(own, self.query_ids[rows], self.gallery_ids, rows.start)
                sums[stage] = sums.get(stage, 0) + added
        return {
            f"{stage}_{name}": value
            for stage, own in sums.items()
            for name, value in zip(METRICS, (100 * own / len(self.query_ids)).tolist())
        }

    def open_set(self, read: tuple[torch.Tensor, torch.Tensor] | None = None) -> Candidates:
        """
        The candidates among the images of every second person. What was `read` among all images, candidates and their
        S_L `(queries, K)`, is not read again.
        """
        there = self.gallery_ids.unique()[::2]
        candidates, similarity = self.candidates(torch.isin(self.gallery_ids, there).nonzero()[:, 0])
        known = None if read is None else _scores_read(candidates, read)
        local_scores = self.match(candidates, similarity, known)
        right = self.query_ids[:, None] == self.gallery_ids[candidates]
        return Candidates(similarity, local_scores, right, torch.isin(self.query_ids, there))


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """The model in evaluation mode, for the time of the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def evaluate_retrieval(
    model,
    processor,
    dataset,
    rerank_k: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    memory: float = RERANK_MEMORY,
    open_set: bool = False,
) -> dict[str, float]:
    """
    Every caption of `dataset` searches all its images, by global matching and, where the model has match heads, by
    local matching of the top K. A query's own image is in the gallery, as in all three sets' protocols.

    Args:
        model ([`CADAForTextToImageRetrieval`]):
            The model; it is set to evaluation mode for the time of the call.
        processor ([`CADAProcessor`]):
            Its processor.
        dataset:
            Rows with `image`, `captions`, `person_id`.
        rerank_k (`int`, *optional*):
            Number of candidates; `config.rerank_k` by default.
        memory (`float`):
            GB that patch states and the batches of local matching may take, whatever the size of the gallery.
        open_set (`bool`):
            Also search the images of every second person, by a calibrated model, see [`open_set_metrics`]. Not with
            fewer than two persons, for which there is a warning.

    Returns:
        `global_R1`, ... `global_mINP`, `local_R1`, ... in percent; `queries`, `gallery`, `rerank_k` (no more than
        there are images); with `open_set` also `open_ECE`, ...

    Raises:
        ValueError: for no images, captions or persons of another type, `rerank_k` below 1, or scores that are NaN.
    """
    rerank_k = model.config.rerank_k if rerank_k is None else rerank_k
    if rerank_k < 1:
        raise ValueError(f"`rerank_k` is {rerank_k}. Give the number of candidates, 1 or more.")
    if not len(dataset):
        raise ValueError("There are no images to evaluate.")
    config = model.config
    open_set = open_set and config.use_atp and config.calibration is not None and has_two_persons(dataset)
    with _evaluating(model):
        searches = _Searches(model, processor, dataset, rerank_k, batch_size, num_workers, progress, memory)
        read, images = None, len(searches.gallery_ids)
        if config.use_atp:
            candidates, similarity = searches.candidates(torch.arange(images))
            read = candidates, searches.match(candidates, similarity)
        metrics = searches.metrics(read)
        found = searches.open_set(read) if open_set else None
    metrics |= {"queries": len(searches.query_ids), "gallery": images, "rerank_k": min(rerank_k, images)}
    if found is not None:
        probabilities = config.match_probability(found.global_scores, found.local_scores)
        metrics |= {f"open_{name}": value for name, value in open_set_metrics(found, probabilities).items()}
    return metrics


def has_two_persons(dataset) -> bool:
    """Whether one person can be there while another is absent; with a warning where not."""
    enough = len(set(dataset["person_id"])) > 1
    if not enough:
        logger.warning("The set has one person, so nobody can be absent: probabilities need two persons at least.")
    return enough


def calibrate(model, processor, dataset, name: str, **options) -> dict:
    """
    [`fit_calibration`] on a data set of this `name`, where every second person has no image; `options` are
    `batch_size` and what follows it in [`evaluate_retrieval`].

    Raises:
        CADAError: for a model without match head, or fewer than two persons.
    """
    if not model.config.use_atp:
        raise CADAError("This model has no match head (`use_atp=False`), so there is nothing to calibrate.")
    if len(set(dataset["person_id"])) < 2:
        raise CADAError("To calibrate takes two persons at least: one is there, one is not. Take a larger set.")
    with _evaluating(model):
        found = _Searches(model, processor, dataset, model.config.rerank_k, **options).open_set()
    return fit_calibration(found, model.config, name)
