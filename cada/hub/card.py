"""The model card, written from the record of a run."""

import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers.utils import logging

from cada.data.pedes import PEDES_SETS
from cada.evaluation.metrics import METRICS
from cada.files import CADAError
from cada.hub.loading import base_of, find_adapter, load_config
from cada.hub.record import (
    DRAWN_TITLES,
    RANDOM_START,
    UNKNOWN_START,
    Evaluation,
    checkpoint_digest,
    evaluations_of,
    newest,
    read_run,
    set_title,
)


logger = logging.get_logger(__name__)
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(CARDS), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES = {"cuhk_pedes": "cada-cuhk.md", "icfg_pedes": "cada-icfg.md", "rstp_reid": "cada-rstp.md"}
TEMPLATES |= dict.fromkeys(DRAWN_TITLES, "cada-demo.md")
# By which such models are looked for. With `sentence-transformers` the Hub shows that library's snippet too.
TAGS = [
    "cada",
    "sentence-transformers",
    "text-to-image-retrieval",
    "image-text-retrieval",
    "cross-modal-retrieval",
    "person-retrieval",
    "text-based-person-retrieval",
    "text-based-person-search",
    "person-re-identification",
]
METRIC_TITLES = {"R1": "Rank-1", "R5": "Rank-5", "R10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}


def _captions(row: Evaluation) -> str:
    count = row["captions_per_image"]
    return "all captions of an image" if count is None else f"the first {count} captions of an image"


def _departures(row: Evaluation) -> str:
    """What an evaluation differs in from one of the split of the set's authors in float32; empty where in nothing."""
    words = f", in {row['precision']}" if row["precision"] != "float32" else ""
    words += ", unreadable images left out" if row["unreadable_images_skipped"] else ""
    if row["dataset"] in PEDES_SETS:
        _, images, captions = PEDES_SETS[row["dataset"]].counts.get(row["split"], (0, 0, 0))
        queries, gallery = row["metrics"]["queries"], row["metrics"]["gallery"]
        all_queries = row["captions_per_image"] is None
        if images not in (None, gallery) or (all_queries and captions not in (None, queries)):
            words += f", NOT the official split ({gallery:,} of {images:,} images)"
    return words


def _stages(evaluations: list[Evaluation]) -> list[tuple[Evaluation, str]]:
    """Each evaluation with each matching that it measured."""
    stages = ((row, matching) for row in evaluations for matching in ("global", "local"))
    return [(row, matching) for row, matching in stages if f"{matching}_R1" in row["metrics"]]


def _title(row: Evaluation) -> str:
    return set_title(row["dataset"]) + _departures(row)


def _results(evaluations: list[Evaluation]) -> list[EvalResult]:
    """The scores as the Hub lists them."""
    return [
        EvalResult(
            task_type="text-to-image-retrieval",
            task_name="Text-to-image person retrieval",
            dataset_type=re.sub(r"[^\w.-]+", "-", row["dataset"]),
            dataset_name=_title(row),
            # Results that agree in this, type and split are listed as one.
            dataset_config=(
                f"{row['metrics']['queries']:,} queries, {row['metrics']['gallery']:,} images, "
                f"K = {row['metrics']['rerank_k']}{_departures(row)}"
            ),
            dataset_split=row["split"],
            metric_type=f"{matching}_{metric}",
            metric_name=f"{METRIC_TITLES[metric]} ({matching} matching)",
            metric_value=round(row["metrics"][f"{matching}_{metric}"], 2),
        )
        for row, matching in _stages(evaluations)
        for metric in METRICS
    ]


def _metadata(
    repo_id: str, evaluations: list[Evaluation], open_licence: bool, restricted: bool, base: str | None
) -> ModelCardData:
    """What the Hub reads of a card, to list the model and its scores."""
    return ModelCardData(
        language="en",
        license="apache-2.0" if open_licence else "other",
        license_name="research-only" if restricted else None,
        # The Hub knows a file LICENSE and addresses here; what may be done says the card itself.
        license_link=f"https://huggingface.co/{repo_id}#origin-and-licence" if restricted else None,
        library_name="transformers" if base is None else "peft",
        base_model=base,
        pipeline_tag="feature-extraction",  # what the Hub calls a model of embeddings; it has no task of retrieval
        tags=TAGS,
        model_name=repo_id.split("/")[-1],
        eval_results=_results(evaluations) or None,
    )


def model_card(
    folder: str | os.PathLike, repo_id: str, revision: str, evaluations: list[Evaluation] = ()
) -> ModelCard:
    """
    The model card of a checkpoint, from the record of its run and its configuration.

    Args:
        folder: the checkpoint.
        repo_id: the repository it will be in; the usage snippet loads it from there.
        revision: what the snippet pins: a tag, a commit, or a branch.
        evaluations: further ones, from the records of other runs.
    """
    run, config, digest = read_run(folder), load_config(folder), checkpoint_digest(folder)
    if any(row["weights"] != digest for row in evaluations):
        raise CADAError(
            f"The further evaluations are of other weights than those in {folder}. Run --do_predict again."
        )
    evaluations = newest([*evaluations_of(digest, folder), *evaluations])
    for row in evaluations:
        if _departures(row):
            logger.warning(f"{set_title(row['dataset'])}, {row['split']}{_departures(row)}: the card says so.")
    training, origin = run["training"], run["origin"] or UNKNOWN_START
    dataset, earlier = training["dataset"] if training else None, origin.get("trained_on", {})
    sets = {dataset, *earlier}
    open_licence = sets <= set(DRAWN_TITLES) and origin["start"] == RANDOM_START["start"]
    if earlier:
        origin = {**origin, "start": f"{origin['start']}, then trained on {', '.join(map(set_title, earlier))}"}
    if training:
        training = {**training, "title": set_title(dataset)}
    adapter = find_adapter(folder)
    base, base_revision = (None, None) if adapter is None else base_of(adapter)
    data = _metadata(repo_id, evaluations, open_licence, not sets.isdisjoint(PEDES_SETS), base)
    template = TEMPLATES.get(dataset, "base.md") if open_licence or dataset not in DRAWN_TITLES else "base.md"
    body = _ENVIRONMENT.get_template(template).render(
        name=data.model_name,
        repo_id=repo_id,
        revision=revision,
        base=base,
        base_revision=base_revision or "main",
        training=training,
        captions=_captions(training) if training else None,
        origin=origin,
        stages=_stages(evaluations),
        title=_title,
        metrics=METRICS,
        protocols=dict.fromkeys(
            f"{set_title(row['dataset'])}, {row['split']}: {_captions(row)}{_departures(row)}" for row in evaluations
        ),
        places=dict.fromkeys(f"{row['hardware']}, {row['date']}" for row in evaluations),
        has_local=config.use_atp,
        open_sets=[row for row in evaluations if "calibrated_on" in row],
        max_text_length=config.max_text_length,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n")
