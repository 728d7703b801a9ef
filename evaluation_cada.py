"""Retrieval metrics, and evaluation in two stages: global matching of all images, local matching of the top K."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from data_cada import outlive_sigterm, read_row, undecoded
from losses_cada import rank_and_size
from modeling_cada import CADAImages


METRICS = ("R1", "R5", "R10", "mAP", "mINP")
RERANK_MEMORY = 4.0  # GB
_ROWS_AT_ONCE = 512
# Tokens of a batch, and batches of a group of images. Large enough for fast matrix products; an accelerator needs more
# for that, and groups so large that nearly all texts of a batch are of one length.
_BATCHES = {"cpu": (1024, 4)}
_BATCHES_ON_ACCELERATOR = (16_384, 32)
_SAFE_RANKS = (1, 5, 10)
_SAMPLED_PAIRS = 256


def retrieval_metrics(similarity, query_ids, gallery_ids) -> dict[str, float]:
    """
    Rank-1, 5 and 10, mean average precision and mean inverse negative penalty (Ye et al., TPAMI 2021) in percent.

    Images with equal scores are ranked with the wrong persons first. So a result does not depend on the order of the
    gallery, and a model that gives every image the same score gets what it deserves.

    Args:
        similarity (`(queries, gallery)` array or tensor): higher is better.
        query_ids (`(queries,)`): person of each query.
        gallery_ids (`(gallery,)`): person of each image.

    Raises:
        ValueError: for shapes that do not fit, scores that are NaN, or a query whose person has no image.
    """
    similarity, query_ids, gallery_ids = (
        torch.as_tensor(np.asarray(values) if not isinstance(values, torch.Tensor) else values).detach().cpu()
        for values in (similarity, query_ids, gallery_ids)
    )
    if similarity.shape != (len(query_ids), len(gallery_ids)):
        raise ValueError(
            f"`similarity` has shape {tuple(similarity.shape)}, but there are {len(query_ids)} `query_ids` and "
            f"{len(gallery_ids)} `gallery_ids`."
        )
    if len(query_ids) == 0:
        raise ValueError("There are no queries to evaluate.")
    sums = torch.zeros(len(METRICS), dtype=torch.float64)
    for start in range(0, len(query_ids), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        sums += _metric_sums(similarity[rows], query_ids[rows], gallery_ids, start)
    return dict(zip(METRICS, (100 * sums / len(query_ids)).tolist()))


def _metric_sums(similarity, query_ids, gallery_ids, first_row: int = 0) -> torch.Tensor:
    """Sums over queries of the five metrics (as shares)."""
    if similarity.isnan().any():
        row = first_row + int(similarity.isnan().any(dim=1).nonzero()[0, 0])
        raise ValueError(f"`similarity` holds NaN in row {row}. The model has diverged, or the input was damaged.")
    correct = query_ids[:, None] == gallery_ids[None, :]
    counts = correct.sum(dim=1)
    if (counts == 0).any():
        row = int((counts == 0).nonzero()[0, 0])
        raise ValueError(
            f"Query {first_row + row} shows person {query_ids[row].item()}, of whom the gallery has no image. "
            "Evaluate queries and gallery of the same split."
        )
    if similarity.dtype not in (torch.float32, torch.float64):  # integers have no infinity, NumPy has no bfloat16
        similarity = similarity.double()
    # The scores of the right images, best first; behind them -inf, as many as the persons with more images have.
    right = similarity.masked_fill(~correct, -torch.inf).topk(int(counts.max())).values
    number = torch.arange(1, right.shape[1] + 1).expand(right.shape)
    exists = number <= counts[:, None]
    # Images that score as much or more, all and right ones: the wrong ones of them stand before this one.
    as_high = similarity.shape[1] - _places(similarity, right)
    right_as_high = (right.shape[1] - _places(right, right)).minimum(counts[:, None])
    ranks = as_high - right_as_high + number
    precision = (number / ranks.double()).masked_fill(~exists, 0)
    last = ranks.gather(1, counts[:, None] - 1)[:, 0]
    return torch.stack(
        [(ranks[:, 0] <= k).double().sum() for k in (1, 5, 10)]
        + [(precision.sum(dim=1) / counts).sum(), (counts / last.double()).sum()]
    )


def _places(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many of the `scores` of a row are lower, for each of its `wanted`. NumPy sorts much faster than PyTorch."""
    return torch.searchsorted(torch.from_numpy(np.sort(scores.contiguous().numpy(), axis=1)), wanted)


def rerank_scores(similarity: torch.Tensor, candidates: torch.Tensor, local_scores: torch.Tensor) -> torch.Tensor:
    """
    Scores of two-stage retrieval: candidates get S_G + S_L, all others keep the order of S_G and rank behind.

    Args:
        similarity: S_G `(queries, gallery)`.
        candidates: gallery indices `(queries, K)`.
        local_scores: S_L of the candidates `(queries, K)`.

    Returns:
        `(queries, gallery)` in float64, which keeps apart what float32 would round together after the shift.
    """
    similarity = similarity.double()
    combined = similarity.gather(1, candidates) + local_scores.double()
    behind = similarity - similarity.amax(dim=1, keepdim=True) + combined.amin(dim=1, keepdim=True) - 1
    return behind.scatter(1, candidates, combined)


def top_candidates(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """Indices `(queries, min(k, gallery))` of the highest scores, best first; ties in the order of the gallery."""
    values, chosen = similarity.topk(min(k, similarity.shape[1]), dim=1)
    chosen = chosen.sort(dim=1).values
    chosen = chosen.gather(1, similarity.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
    # Where images behind the last one score the same, `topk` took any of them.
    tied = (similarity >= values[:, -1:]).sum(dim=1) > values.shape[1]
    chosen[tied] = similarity[tied].argsort(dim=1, descending=True, stable=True)[:, : values.shape[1]]
    return chosen


@dataclass
class Gallery:
    """
    Encoded images.

    Args:
        embeds: normalised features `(images, d)`.
        states: patch states `(kept, 1 + patches, hidden)` of the images from `first` on, as many as the memory allows.
        first: number of the first image whose states are kept; with several processes each keeps its own part.
        own: images whose pairs this process matches; by default all.
        batch_size, encode: the size of batches, and a function that gives the patch states of batches by their number,
            for images whose states were not kept.
    """

    embeds: torch.Tensor
    states: torch.Tensor
    first: int = 0
    own: range | None = None
    batch_size: int = 1
    encode: Callable[[list[int]], Iterable[torch.Tensor]] | None = None

    def states_of(self, groups: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Patch states `(images, 1 + patches, hidden)` of each group; all indices together are ascending."""
        kept = range(self.first, self.first + len(self.states))
        missing = sorted(
            {image // self.batch_size for images in groups for image in images.tolist() if image not in kept}
        )
        encoded, number, states = zip(missing, self.encode(missing)) if missing else iter(()), -1, self.states
        for images in groups:
            if int(images[0]) in kept and int(images[-1]) in kept:
                yield self.states[images - self.first]
                continue
            rows = []
            for image in images.tolist():
                if image not in kept:
                    while number < image // self.batch_size:
                        number, states = next(encoded)
                        states = states.to(self.states)
                rows.append(self.states[image - self.first] if image in kept else states[image % self.batch_size])
            yield torch.stack(rows)


@dataclass
class Queries:
    """Encoded texts: normalised features `(texts, d)`, word pieces and their mask `(texts, length)`."""

    embeds: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class _Images(torch.utils.data.Dataset):
    """The images of a data set as pixel values, so that data loader workers decode them."""

    def __init__(self, dataset, processor):
        self.dataset, self.processor = undecoded(dataset), processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = read_row(self.dataset, index, self.processor.image_size)["image"]
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _sum_over_processes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum, on the CPU. Where every entry but one is 0 it is that one, exactly."""
    if rank_and_size()[1] == 1:
        return tensor.cpu()
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return tensor.cpu()


@torch.inference_mode()
def encode_gallery(
    model,
    processor,
    dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    memory: float = RERANK_MEMORY,
) -> Gallery:
    """
    Encode the column `image` of a data set. Patch states are kept for half of `memory` (GB); images beyond that are
    encoded again where local matching needs them, in the same batches. Several processes share the batches, and each
    keeps the patch states of its part. Results are on the CPU, and in the precision of the weights, also under
    autocast: which images are candidates does not depend on it.
    """
    images, device = _Images(dataset, processor), model.device
    vision = model.config.vision_config
    bytes_per_image = vision.sequence_length * vision.hidden_size * model.dtype.itemsize
    starts = list(range(0, len(images), batch_size))
    rank, size = rank_and_size()
    own = np.array_split(range(len(starts)), size)[rank].tolist()
    first, last = (starts[own[0]], min(starts[own[-1]] + batch_size, len(images))) if own else (0, 0)
    kept = min(last - first, int(memory / 2 * 1e9 / bytes_per_image)) if model.config.use_atp else 0

    def load(batches: list[int]) -> Iterator[torch.Tensor]:
        indices = [list(range(starts[batch], min(starts[batch] + batch_size, len(images)))) for batch in batches]
        # A generator of its own: an evaluation leaves the random numbers of a training as they were.
        loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=indices,
            num_workers=num_workers,
            generator=torch.Generator(),
            worker_init_fn=outlive_sigterm,
        )
        return (pixel_values.to(device) for pixel_values in loader)

    states = torch.empty(kept, vision.sequence_length, vision.hidden_size, dtype=model.dtype)
    embeds = torch.zeros(len(images), model.config.projection_dim)
    start = first
    bar = tqdm(load(own), total=len(own), desc="Encoding images", unit="batch", disable=not progress, leave=False)
    for pixel_values in bar:
        with torch.autocast(device.type, enabled=False):
            outputs = model.get_image_features(pixel_values)
        end = start + len(pixel_values)
        embeds[start:end] = F.normalize(outputs.pooler_output.float(), dim=-1)
        states[start - first : end - first] = outputs.last_hidden_state[: max(0, first + kept - start)]
        start = end

    def encode(batches: list[int]) -> Iterator[torch.Tensor]:
        for pixel_values in load(batches):
            with torch.autocast(device.type, enabled=False):
                yield model.encode_images(pixel_values).cpu()

    embeds = _sum_over_processes(embeds, device)
    return Gallery(embeds, states, first, range(first, last), batch_size, encode)


@torch.inference_mode()
def encode_queries(model, processor, captions: list[str], batch_size: int = 256, progress: bool = True) -> Queries:
    """
    Encode captions, in batches of similar length, which several processes share. Results are on the CPU, in the order
    of `captions`, and in the precision of the weights, also under autocast.
    """
    inputs = processor(text=captions, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(dim=1)
    embeds = torch.zeros(len(captions), model.config.projection_dim)
    rank, size = rank_and_size()
    batches = lengths.argsort(stable=True).split(batch_size)[rank::size]
    for rows in tqdm(batches, desc="Encoding captions", unit="batch", disable=not progress, leave=False):
        cut = slice(int(lengths[rows].max()))
        input_ids, attention_mask = inputs["input_ids"][rows, cut], inputs["attention_mask"][rows, cut]
        with torch.autocast(model.device.type, enabled=False):
            outputs = model.get_text_features(input_ids.to(model.device), attention_mask.to(model.device))
        embeds[rows] = F.normalize(outputs.pooler_output.float(), dim=-1).cpu()
    return Queries(_sum_over_processes(embeds, model.device), inputs["input_ids"], inputs["attention_mask"])


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
    images, order = candidates.flatten().sort(stable=True)
    kept = torch.ones_like(images, dtype=torch.bool) if chosen is None else chosen.flatten()[order]
    if gallery.own is not None:
        kept &= (images >= gallery.own.start) & (images < gallery.own.stop)
    images, order = images[kept], order[kept]
    images, counts = images.unique_consecutive(return_counts=True)
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
    return _sum_over_processes(scores, device).view_as(candidates)


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
) -> torch.Tensor:
    """
    Local scores S_L `(queries, K)` of the candidates `(queries, K)`, whose global scores are `similarity`
    `(queries, K)`, within `memory` (GB).

    Half precision cannot tell close candidates apart. Under autocast it reads all pairs. A sample, read again in the
    precision of the weights, shows how far it is off. Then candidates whose place among the first 1, 5 or 10 is in
    doubt are read again, too. Thus Rank-1, 5 and 10 are as a rule those of full precision, for a part of its work.
    """
    options = {"memory": memory, "progress": progress}
    scores = match_candidates(model, queries, gallery, candidates, **options)
    if not torch.is_autocast_enabled(model.device.type):
        return scores
    sample = torch.zeros(candidates.numel(), dtype=torch.bool)
    sample[:: max(1, len(sample) // _SAMPLED_PAIRS)] = True
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
    the model has no match heads. `memory` (GB) bounds local matching.
    """
    similarity = _similarity(queries, gallery)
    if not model.config.use_atp:
        return similarity, None
    candidates = top_candidates(similarity, rerank_k)
    known = similarity.gather(1, candidates)
    local_scores = score_candidates(model, queries, gallery, candidates, known, memory, progress)
    return similarity, rerank_scores(similarity, candidates, local_scores)


def evaluate_retrieval(
    model,
    processor,
    dataset,
    rerank_k: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    memory: float = RERANK_MEMORY,
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

    Returns:
        `global_R1`, ... `global_mINP`, `local_R1`, ... in percent; `queries`, `gallery`, `rerank_k` (no more than
        there are images).

    Raises:
        ValueError: for no images, `rerank_k` below 1, or scores that are NaN.
    """
    rerank_k = model.config.rerank_k if rerank_k is None else rerank_k
    if rerank_k < 1:
        raise ValueError(f"`rerank_k` is {rerank_k}. Give the number of candidates, 1 or more.")
    if not len(dataset):
        raise ValueError("There are no images to evaluate.")
    columns = dataset.select_columns(["captions", "person_id"])
    gallery_ids = torch.tensor(columns["person_id"])
    captions = [caption for row in columns["captions"] for caption in row]
    query_ids = gallery_ids.repeat_interleave(torch.tensor([len(row) for row in columns["captions"]]))
    was_training = model.training
    model.eval()
    try:
        gallery = encode_gallery(model, processor, dataset, batch_size, num_workers, progress, memory)
        queries = encode_queries(model, processor, captions, progress=progress)
        parts = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(captions), _ROWS_AT_ONCE)]
        stages = ("global",)
        if model.config.use_atp:
            stages = ("global", "local")
            best = []
            for rows in parts:
                similarity = _similarity(queries, gallery, rows)
                chosen = top_candidates(similarity, rerank_k)
                best.append((chosen, similarity.gather(1, chosen)))
            candidates, known = (torch.cat(tensors) for tensors in zip(*best))
            local_scores = score_candidates(model, queries, gallery, candidates, known, memory, progress)
        sums = {stage: torch.zeros(len(METRICS), dtype=torch.float64) for stage in stages}
        for rows in parts:  # the whole matrix of scores may be too large
            similarity = _similarity(queries, gallery, rows)
            sums["global"] += _metric_sums(similarity, query_ids[rows], gallery_ids, rows.start)
            if "local" in sums:
                scores = rerank_scores(similarity, candidates[rows], local_scores[rows])
                sums["local"] += _metric_sums(scores, query_ids[rows], gallery_ids, rows.start)
    finally:
        model.train(was_training)
    metrics = {
        f"{stage}_{name}": value
        for stage in stages
        for name, value in zip(METRICS, (100 * sums[stage] / len(captions)).tolist())
    }
    counts = {"queries": len(captions), "gallery": len(gallery_ids), "rerank_k": min(rerank_k, len(gallery_ids))}
    return {**metrics, **counts}


class RetrievalMetric(evaluate.Metric):
    """
    [`retrieval_metrics`] as a metric of the `evaluate` library.

    ```python
    >>> metric = RetrievalMetric()
    >>> metric.compute(predictions=[[0.9, 0.1], [0.8, 0.3]], references=[1, 2], gallery_ids=[1, 2])["R1"]
    50.0
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Rank-1, 5, 10, mAP and mINP of text-to-image person retrieval, in percent.",
            citation="@article{lin2023cada, title={Cross-Modal Adaptive Dual Association for Text-to-Image Person "
            "Retrieval}, journal={arXiv:2312.01745}, year={2023}}",
            inputs_description="predictions: scores of every gallery image, one row per query; references: person of "
            "each query; gallery_ids: person of each gallery image.",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, gallery_ids) -> dict[str, float]:
        return retrieval_metrics(np.asarray(predictions), np.asarray(references), np.asarray(gallery_ids))
