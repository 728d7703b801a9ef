"""
Does `--label_noise_robust` help where captions describe another person? On drawn sets, a share of whose training
captions are swapped between persons, against the plain losses: fine-tuning models of the day, as `benchmarks/demo.py`
leaves them, on the set at night; and training from random weights on the set of the day.

    python benchmarks/noise.py runs/demo/seed_0 runs/demo/seed_1 runs/demo/seed_2

What is there already in `--output_dir` is not trained again. Commands with other folders or `--starts` and the same
`--output_dir` share the work; the last one writes the report, `benchmarks/noise.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, disable_progress_bars
from report import footer, spread

import cada.demo
import train_cada
from cada.data.drawn import FEATURES, load_drawn


ROOT = Path(__file__).resolve().parent.parent
NOISE = (0.5, 0.2, 0.0)  # shares of the captions
LOSSES = {"plain": (), "robust": ("--label_noise_robust",)}


class Start(NamedTuple):
    """What a training starts from: its title, the folder in a result of the demo, the domain of the set, arguments."""

    title: str
    folder: str
    domain: str
    arguments: tuple[str, ...]


STARTS = {
    "model": Start(
        "A model of the day, fine-tuned at night, {} steps",
        "model",
        "night",
        # It has learned already: half the rates, and hard negatives from the first step.
        ("--muon_learning_rate", "0.01", "--learning_rate", "1e-3", "--negative_temperature_start", "0.15"),
    ),
    "random": Start("From random weights, the set of the day, {} steps", "start", "day", ()),
}
STEPS = {"model": 60, "random": 400}
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


def carry_out(folder: Path, demo: Path, seed: int, start: str) -> None:
    """The trainings from one start: both losses on every share. `demo` is a result of the demo, drawn with `seed`."""
    _, name, domain, arguments = STARTS[start]
    for share in NOISE:
        data = folder / start / f"seed_{seed}" / f"swapped_{share}"
        runs = {losses: data / losses for losses in LOSSES if not (data / losses / "test_results.json").exists()}
        if runs and not (data / "set").exists():
            splits = load_drawn(seed=seed, domain=domain)
            train = swap_captions(splits["train"], share, seed)
            DatasetDict(train=train, test=splits["test"]).save_to_disk(data / "set")
        for losses, run in runs.items():
            command = ["--model_name_or_path", str(demo / name), "--dataset", str(data / "set"), "--do_train"]
            command += ["--do_predict", "--output_dir", str(run), "--seed", str(seed), "--disable_tqdm", "true"]
            # Nothing is chosen or calibrated on validation.
            command += ["--holdout_persons", "0", *cada.demo.RECIPE, "--max_steps", str(STEPS[start])]
            train_cada.main([*command, *arguments, *LOSSES[losses]])


def section(folder: Path, start: str, seeds: list[int]) -> list[str]:
    """The scores of both losses from one start, and their difference seed by seed."""
    lines = ["", f"## {STARTS[start].title.format(STEPS[start])}", "", f"Seeds {', '.join(map(str, seeds))}.", ""]
    lines += ["| swapped | losses | global Rank-1 | global mAP | local Rank-1 | local mAP |"]
    lines += ["|---:|---|---:|---:|---:|---:|"]
    for share in reversed(NOISE):
        scores = {}
        for losses in LOSSES:
            runs = [folder / start / f"seed_{seed}" / f"swapped_{share}" / losses for seed in seeds]
            results = [json.loads((run / "test_results.json").read_text()) for run in runs]
            scores[losses] = [[result[f"test_{score}"] for result in results] for score in SCORES]
            lines.append(f"| {share:.0%} | {losses} | {' | '.join(map(spread, scores[losses]))} |")
        pairs = [list(zip(*both)) for both in zip(scores["robust"], scores["plain"])]
        cells = [", ".join(f"{robust - plain:+.1f}" for robust, plain in values) for values in pairs]
        lines.append(f"| {share:.0%} | difference, seed by seed | {' | '.join(cells)} |")
    return lines


def report(folder: Path, demos: list[Path]) -> str:
    """All that is finished."""
    lines = [
        "# Captions of another person",
        "",
        "A share of the training captions is swapped between persons. `robust` is `--label_noise_robust`, `plain` is "
        "without. Test: persons never seen, all captions right. In percent, mean ± standard deviation; batches of 64.",
    ]
    shown = []
    for start in STARTS:
        done = [
            seed
            for seed in map(seed_of, demos)
            if all(
                (folder / start / f"seed_{seed}" / f"swapped_{share}" / losses / "test_results.json").exists()
                for share in NOISE
                for losses in LOSSES
            )
        ]
        lines += section(folder, start, done) if done else []
        shown += [start] if done else []
    command = f"python benchmarks/noise.py {' '.join(f'runs/demo/{demo.name}' for demo in demos)} --starts "
    return "\n".join([*lines, "", *footer(command + " ".join(shown))])


def seed_of(demo: Path) -> int:
    """`runs/demo/seed_2` is of seed 2."""
    return int(demo.name.removeprefix("seed_"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="results of the demo, named seed_0 and so on")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS), help="default: both")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/noise"), help="folder of the runs")
    options = parser.parse_args()
    disable_progress_bars()
    for start in options.starts:
        for demo in options.folders:
            carry_out(options.output_dir, demo, seed_of(demo), start)
    text = report(options.output_dir, options.folders)
    (ROOT / "benchmarks" / "noise.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
