"""
The probability that an image shows the person described, and whether the person is there at all.

It is fitted on validation, by logistic regression (Platt, 1999) on what a search sees: S_G and S_L of the candidates
of every caption, where half of the persons have no image in the gallery.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from cada.files import ADAPTER_RECORD, read_json, written_whole


FALSE_ALARMS = (0.01, 0.1)  # shares of the searches for somebody who is not there
_BINS = 10
_STEPS = 50  # ten are enough, unless a score is the same for all: then rounding alone moves its weight


@dataclass
class Candidates:
    """
    What searches have found: S_G, S_L, and whether the image shows the person, `(queries, K)`; for each query
    `(queries,)` whether the person is in the gallery at all.
    """

    global_scores: torch.Tensor
    local_scores: torch.Tensor
    right: torch.Tensor
    present: torch.Tensor


def fit_calibration(found: Candidates, config, name: str) -> dict:
    """
    The field `calibration` of [`CADAConfig`]: `weights` of S_G, of the logit of S_L, and of 1; the set's `name`, the
    number of `pairs` and on these the `expected_calibration_error`.
    """
    scores = found.global_scores.double(), config.local_logits(found.local_scores)
    evidence = torch.stack([*scores, torch.ones_like(scores[0])], dim=-1).flatten(0, 1)
    right = found.right.flatten()
    # Platt's targets are a little inside of 0 and 1: weights stay finite where one score separates all pairs.
    hits = int(right.sum())
    targets = torch.where(right, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2)).double()
    weights = torch.zeros(3, dtype=torch.float64)

    def loss(weights: torch.Tensor) -> float:
        return float(F.binary_cross_entropy_with_logits(evidence @ weights, targets))

    for _ in range(_STEPS):  # Newton's method
        chances = (evidence @ weights).sigmoid()
        hessian = evidence.t() * (chances * (1 - chances)) @ evidence
        step = torch.linalg.pinv(hessian, hermitian=True) @ (evidence.t() @ (targets - chances))
        while loss(weights + step) > loss(weights):  # too far
            step /= 2
        weights += step
        if step.abs().max() < 1e-9:
            break
    error = expected_calibration_error((evidence @ weights).sigmoid(), right)
    return {
        "weights": weights.tolist(),
        "set": name,
        "pairs": len(right),
        "expected_calibration_error": error,
    }


def expected_calibration_error(probabilities: torch.Tensor, right: torch.Tensor) -> float:
    """
    How far probabilities `(pairs,)` are from the shares of `right` ones: the mean difference over ten bins of equal
    width, weighted by their pairs (Guo et al., ICML 2017). 0 to 1.
    """
    bins = (probabilities * _BINS).long().clamp(max=_BINS - 1)
    difference = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, probabilities.double() - right.double())
    return float(difference.abs().sum() / len(probabilities))


def open_set_metrics(found: Candidates, probabilities: torch.Tensor) -> dict[str, float]:
    """
    How good the probabilities `(queries, K)` are where half of the persons are absent.

    Returns:
        `ECE`, see [`expected_calibration_error`], and `AUROC` of the highest probability of a search for whether the
        person is there, both 0 to 1. `DIR1`, `DIR10`: detection and identification rate in percent (open set, as in
        NIST's FRVT 1:N): searches for somebody who is there whose first image by S_G + S_L shows the person, above a
        threshold that 1 or 10 % of the searches for others reach.
    """
    highest = probabilities.max(dim=1).values
    there, absent = highest[found.present], highest[~found.present].sort(descending=True).values
    ascending = absent.flip(0)
    below = (torch.searchsorted(ascending, there) + torch.searchsorted(ascending, there, right=True)) / 2
    first = (found.global_scores + found.local_scores).argmax(dim=1, keepdim=True)
    first_right, first_probability = (values.gather(1, first)[:, 0] for values in (found.right, probabilities))
    metrics = {
        "ECE": expected_calibration_error(probabilities.flatten(), found.right.flatten()),
        "AUROC": float((below / len(absent)).mean()),
    }
    for share in FALSE_ALARMS:
        threshold = absent[int(share * len(absent))]  # so many are above it
        identified = first_right & (first_probability > threshold)
        metrics[f"DIR{round(100 * share)}"] = 100 * float(identified[found.present].double().mean())
    return metrics


def save_calibration(checkpoint: str | os.PathLike, fitted: dict | None) -> Path:
    """Put `calibration` into a configuration, or beside an adapter, whole or not at all. Returns the file."""
    beside = Path(checkpoint) / ADAPTER_RECORD
    file = beside if beside.exists() else Path(checkpoint) / "config.json"
    content = json.dumps(read_json(file) | {"calibration": fitted}, indent=2) + "\n"
    with written_whole(file) as path:
        path.write_text(content, encoding="utf-8")
    return file
