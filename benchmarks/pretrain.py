"""
Does pre-training on noisy pairs of another domain help? On drawn data: pairs without persons of the night, of which a
share has captions that name wrong attributes, then the demo set of the day; against the demo set alone.

    python benchmarks/pretrain.py --pairs 20000 --steps 750 --seeds 0 1 2

For every seed: `steps` of pre-training, streamed; its model on the demo's test set as it is (zero-shot); then `steps`
of fine-tuning. Against it as many steps in all on the demo set alone, and half of them. The report goes to
`benchmarks/`. What is there already in `--output_dir` is not trained again.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value, disable_progress_bars
from report import footer, spread

import cada.demo
from cada.data.drawn import ATTRIBUTES, DOMAINS, draw_caption, draw_image, draw_persons, load_drawn


ROOT = Path(__file__).resolve().parent.parent
FILES = 8
# Attributes of which a wrong caption names other values; those of bag and hat depend on each other.
WRONG = ("sex", "hair_colour", "upper_type", "upper_colour", "lower_type", "lower_colour", "shoes_colour")
ROWS = {  # run: title
    "zero_shot": "pre-trained, zero-shot",
    "tuned": "pre-trained, then the demo set",
    "alone_half": "the demo set alone, half the steps",
    "alone": "the demo set alone",
}


def draw_pairs(folder: Path, count: int, noise: float, seed: int) -> None:
    """Parquet files of `image` and `caption`; in a share `noise` of the captions three attributes are wrong."""
    rng, domain = random.Random(f"{seed}-pairs"), DOMAINS["night"]
    persons = draw_persons(count, rng, domain)
    features = Features({"image": Image(), "caption": Value("string")})

    def rows(part: int):
        for person in persons[part::FILES]:
            file = io.BytesIO()
            draw_image(person, rng, domain).save(file, "BMP")
            named = dict(person)
            for name in rng.sample(WRONG, 3) if rng.random() < noise else ():
                named[name] = rng.choice([value for value in ATTRIBUTES[name] if value != person[name]])
            yield {
                "image": {"bytes": file.getvalue(), "path": None},
                "caption": draw_caption(named, rng, domain).text,
            }

    folder.mkdir(parents=True)
    for part in range(FILES):
        columns = {name: [] for name in features}
        for row in rows(part):
            for name, value in row.items():
                columns[name].append(value)
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{part}.parquet")


def carry_out(folder: Path, start: Path, seed: int, *more: str) -> None:
    """One command of train_cada.py, unless its last file is there. Its output is `log.txt` in `folder`."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train_cada.py"), "--model_name_or_path", str(start), "--seed", str(seed)]
    command += ["--output_dir", str(folder), *cada.demo.RECIPE, *more, "--disable_tqdm", "true"]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
            sys.exit(f"error: a run failed. Its log: {folder / 'log.txt'}")
    (folder / "done").touch()


def run_seed(folder: Path, seed: int, pairs: int, steps: int, noise: float, persons: int) -> None:
    """All runs of a seed."""
    if not (folder / "start").exists():
        splits = load_drawn(seed=seed)
        cada.demo.build_start(splits, folder / "start", seed)
        few = set(sorted(set(splits["train"]["person_id"]))[:persons])
        splits["train"] = splits["train"].filter(lambda person_id: person_id in few, input_columns="person_id")
        splits.save_to_disk(folder / "set")
    if not (folder / "pairs" / "done").exists():
        shutil.rmtree(folder / "pairs", ignore_errors=True)
        draw_pairs(folder / "pairs", pairs, noise, seed)
        (folder / "pairs" / "done").touch()
    files, test = str(folder / "pairs" / "*.parquet"), ("--dataset", str(folder / "set"), "--do_predict")
    tune = (*test, "--do_train")
    stream = ("--dataset", files, "--streaming", "--do_train", "--max_steps", str(steps))
    carry_out(folder / "pre", folder / "start", seed, *stream)
    carry_out(folder / "zero_shot", folder / "pre", seed, *test)
    carry_out(folder / "tuned", folder / "pre", seed, *tune, "--max_steps", str(steps))
    carry_out(folder / "alone_half", folder / "start", seed, *tune, "--max_steps", str(steps))
    carry_out(folder / "alone", folder / "start", seed, *tune, "--max_steps", str(2 * steps))


def scores(folder: Path, seeds: list[int], run: str, name: str) -> list[float]:
    """A score of every seed, in percent."""
    files = [folder / f"seed_{seed}" / run / "test_results.json" for seed in seeds]
    return [json.loads(file.read_text())[f"test_{name}"] for file in files]


def report(folder: Path, seeds: list[int], pairs: int, steps: int, noise: float, persons: int) -> str:
    """The table, and what pre-training adds seed by seed."""
    spend = dict(zip(ROWS, (f"{steps} + 0", f"{steps} + {steps}", f"{steps}", f"{2 * steps}")))
    lines = [
        "# Pre-training on noisy pairs of another domain",
        "",
        f"{pairs:,} drawn pairs of the night without persons, {noise:.0%} of captions with three wrong attributes, "
        f"then the demo set of the day with {persons:,} persons (two images, four captions each). Scores on its test "
        f"set (persons never seen), in percent, mean ± standard deviation over the "
        f"seeds {', '.join(map(str, seeds))}; batches of 64.",
        "",
        "| | steps | global Rank-1 | global mAP | local Rank-1 | local mAP |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for run, title in ROWS.items():
        names = ("global_R1", "global_mAP", "local_R1", "local_mAP")
        cells = [spread(scores(folder, seeds, run, name)) for name in names]
        lines.append(f"| {title} | {spend[run]} | {' | '.join(cells)} |")
    lines += ["", "Difference in local Rank-1 that pre-training makes, seed by seed:", ""]
    for run, words in (("alone", "as many steps in all"), ("alone_half", "as many steps on the demo set")):
        pairs_of_scores = zip(scores(folder, seeds, "tuned", "local_R1"), scores(folder, seeds, run, "local_R1"))
        lines.append(f"- {words}: {', '.join(f'{tuned - alone:+.1f}' for tuned, alone in pairs_of_scores)}")
    command = (
        f"python benchmarks/pretrain.py --pairs {pairs} --steps {steps} --noise {noise} --persons {persons} --seeds "
    )
    return "\n".join([*lines, "", *footer(command + " ".join(map(str, seeds)))])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=20_000, help="drawn for pre-training")
    parser.add_argument("--steps", type=int, default=750, help="of pre-training, and of fine-tuning")
    parser.add_argument("--noise", type=float, default=0.3, help="share of the captions with wrong attributes")
    parser.add_argument("--persons", type=int, default=4000, help="of the demo set, to fine-tune on")
    parser.add_argument("--name", default="pretrain", help="of the report in benchmarks/")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pretrain"), help="folder of the runs")
    options = parser.parse_args()
    disable_progress_bars()
    for seed in options.seeds:
        folder = (options.output_dir / f"seed_{seed}").absolute()
        run_seed(folder, seed, options.pairs, options.steps, options.noise, options.persons)
    given = (options.pairs, options.steps, options.noise, options.persons)
    text = report(options.output_dir, options.seeds, *given)
    (ROOT / "benchmarks" / f"{options.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
