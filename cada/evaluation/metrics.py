"""Rank-k, mAP and mINP."""

import datasets
import evaluate
import numpy as np
import torch


METRICS = ("R1", "R5", "R10", "mAP", "mINP")
_ROWS_AT_ONCE = 512


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
        ValueError: for what are no numbers, shapes that do not fit, scores that are NaN, or a query whose person has
            no image.
    """
    similarity, query_ids, gallery_ids = (
        _tensor(*pair) for pair in (("similarity", similarity), ("query_ids", query_ids), ("gallery_ids", gallery_ids))
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
        sums += metric_sums(similarity[rows], query_ids[rows], gallery_ids, start)
    return dict(zip(METRICS, (100 * sums / len(query_ids)).tolist()))


def _tensor(name: str, values) -> torch.Tensor:
    values = values if isinstance(values, torch.Tensor) else np.asarray(values)
    if isinstance(values, np.ndarray) and values.dtype.kind not in "biuf":
        raise ValueError(f"`{name}` does not hold numbers: {str(values.flat[0])!r:.80}. Give persons whole numbers.")
    return torch.as_tensor(values).detach().cpu()


def metric_sums(similarity, query_ids, gallery_ids, first_row: int = 0) -> torch.Tensor:
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
