"""
Are long captions worth a longer limit? Drawn persons described by captions joined to 80 words and more, read whole or
cut at 72 tokens after the first one, as the paper's limit does.

    python benchmarks/long_captions.py --steps 300 --seeds 0

Both start from the same random weights, whose 35 text positions grow. The report goes to `benchmarks/`. What is there
already in `--output_dir` is not trained again.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import json
import random
import statistics
from pathlib import Path

import numpy as np
from datasets import DatasetDict, disable_progress_bars, load_from_disk
from pretrain import ROOT, carry_out, scores
from report import footer, spread

import cada.demo
from cada.data.drawn import draw_caption, load_drawn
from cada.hub.loading import load_tokenizer
from processing_cada import clean_caption


LIMITS = {"cut": 73, "whole": 145}  # tokens; groups of 36 after the first one
WORDS = 80
TITLES = {"cut": "cut at 72 tokens (2 groups)", "whole": "up to 144 tokens (4 groups)"}


def lengthen(row: dict, words: int) -> dict:
    """Other captions for a row: each as many captions of its person as make up `words` words or more."""
    rng = random.Random(row["file_name"])
    columns = {"captions": [], "attribute_spans": [], "named_attributes": []}
    for _ in row["captions"]:
        text, spans, named = "", [], set()
        while len(text.split()) < words:
            drawn = draw_caption(row["attributes"], rng)
            begin = len(clean_caption(text)) + (text != "")
            text = f"{text} {drawn.text}".strip()
            spans += [[begin + start, begin + end] for start, end in drawn.spans]
            named |= set(drawn.named)
        columns["captions"].append(text)
        columns["attribute_spans"].append(spans)
        columns["named_attributes"].append(sorted(named))
    return columns


def run_seed(folder: Path, seed: int, steps: int, persons: int) -> None:
    """Both runs of a seed."""
    if not (folder / "start").exists():
        drawn = load_drawn(persons, seed=seed)
        splits = DatasetDict({split: rows.map(lengthen, fn_kwargs={"words": WORDS}) for split, rows in drawn.items()})
        splits.save_to_disk(folder / "set")
        cada.demo.build_start(splits, folder / "start", seed)
    for run, limit in LIMITS.items():
        fields = {"max_text_length": limit, "group_size": 36, "group_stride": 36}
        fields["text_config"] = {"max_position_embeddings": limit}
        more = ("--config_overrides", json.dumps(fields), "--max_steps", str(steps), "--do_train", "--do_predict")
        carry_out(folder / run, folder / "start", seed, "--dataset", str(folder / "set"), *more)


def lengths(folder: Path) -> tuple[float, np.ndarray]:
    """Mean words of the captions of the test, and the tokens of each."""
    captions = [text for row in load_from_disk(folder / "set")["test"]["captions"] for text in row]
    tokenizer = load_tokenizer(folder / "start")
    tokens = [len(tokenizer(clean_caption(text), truncation=False)["input_ids"]) for text in captions]
    return statistics.mean(len(text.split()) for text in captions), np.array(tokens)


def report(folder: Path, seeds: list[int], steps: int, persons: int) -> str:
    """The table."""
    words, tokens = lengths(folder / f"seed_{seeds[0]}")
    lines = [
        "# Long captions",
        "",
        f"The drawn persons of the demo ({persons:,} to train on), described by captions joined to at least {WORDS} "
        f"words: {words:.0f} words and {tokens.mean():.0f} tokens on average. {(tokens > 73).mean():.0%} have more "
        f"than 73 tokens, {(tokens > 145).mean():.0%} more than 145. {steps} steps with batches of 64 from random "
        "weights. Scores on the test set (persons never seen), in percent, mean ± standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        "| | global Rank-1 | global mAP | local Rank-1 | local mAP |",
        "|---|---:|---:|---:|---:|",
    ]
    for run, title in TITLES.items():
        names = ("global_R1", "global_mAP", "local_R1", "local_mAP")
        cells = [spread(scores(folder, seeds, run, name)) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    command = f"python benchmarks/long_captions.py --steps {steps} --persons {persons} --seeds "
    return "\n".join([*lines, "", *footer(command + " ".join(map(str, seeds)))])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--persons", type=int, default=2000, help="to train on")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long_captions"), help="folder of the runs")
    options = parser.parse_args()
    disable_progress_bars()
    for seed in options.seeds:
        run_seed((options.output_dir / f"seed_{seed}").absolute(), seed, options.steps, options.persons)
    text = report(options.output_dir, options.seeds, options.steps, options.persons)
    (ROOT / "benchmarks" / "long_captions.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
