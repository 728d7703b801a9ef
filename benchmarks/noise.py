"""
Does `--label_noise_robust` help where captions describe another person? On the drawn set, a share of whose training
captions are swapped between persons; against the plain losses.

    python benchmarks/noise.py --seeds 0 1 2

What is there already in `--output_dir` is not trained again. Two commands with other seeds and the same `--output_dir`
share the work; the last one writes the report, `benchmarks/noise.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from datasets import Dataset, DatasetDict, disable_progress_bars
from report import footer

import cada.demo
from cada.data.drawn import FEATURES, load_drawn


ROOT = Path(__file__).resolve().parent.parent
NOISE = (0.0, 0.2, 0.5)
LOSSES = {"plain": (), "robust": ("--label_noise_robust",)}
SCORES = ("global_R1", "global_mAP", "local_R1", "local_mAP")
CAPTION_COLUMNS = ("captions", "attribute_spans", "named_attributes")


def swap_captions(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The set where a `share` of the captions, drawn by `seed`, have moved on to an image of another person each."""
    columns, persons = {name: list(dataset[name]) for name in CAPTION_COLUMNS}, dataset["person_id"]
    places = [(row, number) for row, captions in enumerate(columns["captions"]) for number in range(len(captions))]
    moved = random.Random(seed).sample(places, round(share * len(places)))
    # In the order of the persons, a step of half the list leads to another one: nobody has so many captions.
    moved.sort(key=lambda place: persons[place[0]])
    sources = moved[len(moved) // 2 :] + moved[: len(moved) // 2]
    for name, rows in columns.items():
        values = [rows[row][number] for row, number in sources]
        rows = [list(row) for row in rows]
        for (row, number), value in zip(moved, values):
            rows[row][number] = value
        dataset = dataset.remove_columns(name).add_column(name, rows)
    return dataset.select_columns(list(FEATURES)).cast(FEATURES)


def carry_out(folder: Path, seed: int, share: float, steps: int) -> None:
    """Both trainings on the set of one seed and share. Their output is `log.txt` in the folder of each."""
    start, data = folder / f"seed_{seed}" / "start", folder / f"seed_{seed}" / f"swapped_{share}"
    if all((data / name / "test_results.json").exists() for name in LOSSES):
        return
    splits = load_drawn(seed=seed)
    if not start.exists():
        cada.demo.build_start(splits, start, seed)
    if not (data / "set").exists():
        train = swap_captions(splits["train"], share, seed)
        # Without a validation split nothing is calibrated, which this does not need.
        DatasetDict(train=train, test=splits["test"]).save_to_disk(data / "set")
    for name, arguments in LOSSES.items():
        if (data / name / "test_results.json").exists():
            continue
        (data / name).mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "train_cada.py"), "--dataset", str(data / "set"), "--do_train"]
        command += ["--do_predict", "--model_name_or_path", str(start), "--output_dir", str(data / name)]
        command += [*cada.demo.RECIPE, "--max_steps", str(steps), "--seed", str(seed), "--disable_tqdm", "true"]
        with open(data / name / "log.txt", "w", encoding="utf-8") as log:
            outcome = subprocess.run([*command, *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        if outcome.returncode:
            sys.exit(f"error: a run failed. Its log: {data / name / 'log.txt'}")


def report(folder: Path, seeds: list[int], steps: int) -> str:
    """The scores of both, and their difference seed by seed."""
    lines = [
        "# Captions of another person",
        "",
        "The drawn set; a share of its training captions, drawn at random, is swapped between persons. Test: persons "
        f"never seen, all captions right. In percent, mean ± standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}; {steps} steps from random weights, batches of 64.",
        "",
        "| swapped | losses | global Rank-1 | global mAP | local Rank-1 | local mAP |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    differences = ["| swapped | global Rank-1 | global mAP | local Rank-1 | local mAP |", "|---:|---:|---:|---:|---:|"]
    for share in NOISE:
        scores = {}
        for name in LOSSES:
            runs = [folder / f"seed_{seed}" / f"swapped_{share}" / name / "test_results.json" for seed in seeds]
            results = [json.loads(run.read_text()) for run in runs]
            scores[name] = {score: [result[f"test_{score}"] for result in results] for score in SCORES}
            cells = [
                f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "")
                for values in scores[name].values()
            ]
            lines.append(f"| {share:.0%} | {name} | {' | '.join(cells)} |")
        cells = [
            ", ".join(
                f"{robust - plain:+.1f}" for plain, robust in zip(scores["plain"][score], scores["robust"][score])
            )
            for score in SCORES
        ]
        differences.append(f"| {share:.0%} | {' | '.join(cells)} |")
    lines += ["", "What `--label_noise_robust` adds, seed by seed:", "", *differences, ""]
    command = f"python benchmarks/noise.py --steps {steps} --seeds {' '.join(map(str, seeds))}"
    return "\n".join([*lines, *footer(command)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/noise"), help="folder of the runs")
    options = parser.parse_args()
    disable_progress_bars()
    folder = options.output_dir.absolute()
    for seed in options.seeds:
        for share in reversed(NOISE):
            carry_out(folder, seed, share, options.steps)
    text = report(folder, options.seeds, options.steps)
    (ROOT / "benchmarks" / "noise.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
