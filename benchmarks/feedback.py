"""
What a second round brings: one right image of the first ranking is marked, and perhaps the best wrong one.

    python benchmarks/feedback.py runs/demo/seed_0 runs/demo/seed_1 runs/demo/seed_2

The folders are results of `cada demo`, for example of `benchmarks/demo.py`. Every caption of the test split searches
all its images. The highest ranked image of its person is marked and taken out; how well are the person's other images
ranked, by the first round and by the second? Writes `benchmarks/feedback.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from datasets import load_from_disk
from report import footer

from cada.evaluation.encoding import encode_gallery, encode_queries
from cada.evaluation.matching import score_gallery
from cada.evaluation.metrics import retrieval_metrics
from cada.gallery.feedback import refine
from cada.hub.convert import load_model_and_processor


ROOT = Path(__file__).resolve().parent.parent
ROUNDS = ("first round", "one right image marked", "and the best wrong one")


def rounds(folder: Path, split: str, rerank_k: int = 32) -> dict[str, dict[str, float]]:
    """mAP of the other images of the person, by stage and round."""
    model, processor = load_model_and_processor(folder / "model")
    rows = load_from_disk(folder / "drawn")[split]
    captions = [caption for row in rows["captions"] for caption in row]
    gallery = encode_gallery(model, processor, rows, progress=False)
    queries = encode_queries(model, processor, captions, progress=False)
    gallery_ids = torch.tensor(rows["person_id"])
    query_ids = gallery_ids.repeat_interleave(torch.tensor([len(row) for row in rows["captions"]]))
    right = query_ids[:, None] == gallery_ids
    results = {}
    first = score_gallery(model, queries, gallery, rerank_k)
    for stage, ranked in zip(("global", "local"), first):
        marked = ranked.masked_fill(~right, -torch.inf).argmax(dim=1)
        wrong = ranked.masked_fill(right, -torch.inf).argmax(dim=1)
        scores = [ranked]
        for wrongs in (0, 1):
            moved = [
                refine(query[None], gallery.embeds[[image]], gallery.embeds[[other][:wrongs]])
                for query, image, other in zip(queries.embeds, marked.tolist(), wrong.tolist())
            ]
            again = replace(queries, embeds=torch.cat(moved))
            scores.append(score_gallery(model, again, gallery, rerank_k)[stage == "local"])
        results[stage] = {
            name: mean_average_precision(values, marked, query_ids, gallery_ids)
            for name, values in zip(ROUNDS, scores)
        }
    return results


def mean_average_precision(scores, marked, query_ids, gallery_ids) -> float:
    """mAP in percent where image `marked` `(queries,)` is not in the gallery of its query."""
    total = 0.0
    for row, image, person in zip(scores, marked, query_ids):
        others = torch.arange(len(gallery_ids)) != image
        total += retrieval_metrics(row[others][None], person[None], gallery_ids[others])["mAP"]
    return total / len(scores)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    lines = [
        "# A second round",
        "",
        "One right image of the first ranking is marked (`--like`), then the best wrong one (`--unlike`). mAP, in "
        f"percent, of the other images of the person; drawn set, split {options.split}.",
        "",
        f"| | stage | {' | '.join(ROUNDS)} |",
        f"|---|---|{'---:|' * len(ROUNDS)}",
    ]
    for folder in options.folders:
        for stage, row in rounds(folder, options.split).items():
            lines.append(f"| {folder.name} | {stage} | {' | '.join(f'{row[name]:.1f}' for name in ROUNDS)} |")
            print(lines[-1], flush=True)
    lines += ["", *footer(" ".join(["python benchmarks/feedback.py", *sys.argv[1:]]))]
    (ROOT / "benchmarks" / "feedback.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
