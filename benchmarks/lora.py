"""
Fine-tuning with less: models of the day, as `benchmarks/demo.py` leaves them, on the drawn set at night. Not trained
further, by LoRA, and whole.

    python benchmarks/lora.py runs/demo/seed_0 runs/demo/seed_1 runs/demo/seed_2

Of the learning rates of a way validation chooses one, with the first model. The report goes to `benchmarks/lora.md`.
What is there already in `--output_dir` is not trained again.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import disable_progress_bars, load_from_disk
from report import footer, spread

import cada.training.lora
import train_cada
from cada.data.drawn import load_drawn
from cada.data.pairs import PairCollator, PairDataset
from cada.hub.loading import load_model, weight_files
from cada.training.arguments import ModelArguments
from cada.training.start import make_model_and_processor


ROOT = Path(__file__).resolve().parent.parent
BATCH = 64
TARGETS = cada.training.lora.TARGETS


class Way(NamedTuple):
    """A way to adapt a model."""

    title: str
    rank: int | None
    targets: list[str]
    rates: tuple[float, ...]


WAYS = {
    "none": Way("no fine-tuning", None, [], ()),
    "lora": Way("LoRA, rank 4", 4, TARGETS, (1e-2,)),
    "lora_mlp": Way("LoRA, rank 4, MLPs too", 4, [*TARGETS, "fc1", "fc2"], (2e-3, 5e-3, 1e-2)),
    "full": Way("all weights", None, [], (5e-4, 1e-3, 2e-3)),
}


def carry_out(folder: Path, model: Path, data: Path, seed: int, way: Way, rate: float | None, steps: int) -> dict:
    """Scores on validation and test after training, how many weights were trained, and bytes of the file."""
    done = folder / "scores.json"
    if done.exists():
        return json.loads(done.read_text())
    arguments = ["--model_name_or_path", str(model), "--dataset", str(data), "--output_dir", str(folder)]
    arguments += ["--do_eval", "--do_predict", "--seed", str(seed), "--attn_implementation", "eager"]
    if rate is not None:
        arguments += ["--do_train", "--max_steps", str(steps), "--per_device_train_batch_size", str(BATCH)]
        arguments += ["--learning_rate", str(rate), "--lr_scheduler_type", "linear", "--warmup_steps", "10"]
        arguments += ["--max_grad_norm", "5", "--eval_strategy", "no", "--save_strategy", "no"]
        arguments += ["--load_best_model_at_end", "false", "--logging_steps", "100"]
    if way.rank is not None:
        arguments += ["--lora_rank", str(way.rank)]
    cada.training.lora.TARGETS = way.targets
    scores = train_cada.main([*arguments, "--use_cpu", "--disable_tqdm", "true"])
    if rate is not None:
        scores["bytes"] = sum(file.stat().st_size for file in weight_files(folder))
        weights = load_model(folder).named_parameters()
        adapted = ".default" if way.rank is not None else ""
        scores["trained"] = sum(weight.numel() for name, weight in weights if adapted in name)
    done.write_text(json.dumps(scores))
    return scores


def run_all(folders: list[Path], output: Path, steps: int) -> dict[str, tuple[float | None, list[dict]]]:
    """The chosen learning rate of each way, and its scores with each model."""
    results = {}
    for name, way in WAYS.items():
        chosen, rows = None, []
        for number, folder in enumerate(folders):
            seed = int(folder.name.removeprefix("seed_"))
            place = output / folder.name
            if not (place / "night").exists():
                load_drawn(seed=seed, domain="night").save_to_disk(place / "night")
            given = (folder / "model", place / "night", seed, way)
            rates = way.rates if number == 0 and way.rates else [chosen]
            tried = {rate: carry_out(place / f"{name}_{rate}", *given, rate, steps) for rate in rates}
            chosen = max(tried, key=lambda rate: tried[rate]["eval_local_R1"])
            rows.append(tried[chosen])
        results[name] = chosen, rows
    return results


def step_seconds(folder: Path, data: Path) -> dict[str, float]:
    """CPU seconds of a step of each way, of all threads together: the median of steps that take turns."""
    started, times = {}, {}
    for name, way in WAYS.items():
        if way.rates:
            cada.training.lora.TARGETS = way.targets
            arguments = ModelArguments(str(folder / "model"), lora_rank=way.rank, attn_implementation="eager")
            model, processor = make_model_and_processor(arguments)
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            started[name], times[name] = (model.train(), torch.optim.AdamW(weights)), []
    pairs = PairDataset(load_from_disk(data)["train"], processor.image_size)
    batch = PairCollator(processor)([pairs[(row, 0)] for row in range(BATCH)])
    batch.pop("pair")
    for _ in range(16):
        for name, (model, optimizer) in started.items():
            begin = time.process_time()
            model(**batch, return_loss=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds[4:]) for name, seconds in times.items()}


def report(results: dict, seconds: dict[str, float], steps: int, arguments: list[str]) -> str:
    """The table."""
    lines = [
        "# LoRA against full fine-tuning",
        "",
        f"Models of the demo, trained on drawn persons by day, adapted to the drawn set at night: {steps} steps of "
        f"{BATCH} pairs by AdamW. Scores on the test set, in percent, mean ± standard deviation over "
        f"{len(results['none'][1])} models. Of the learning rates tried, validation chose with the first model.",
        "",
        "| | learning rate (tried) | trained weights | file (KB) | CPU seconds a step | global Rank-1 "
        "| local Rank-1 |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, (rate, rows) in results.items():
        cells = ["–"] * 4
        if rate is not None:
            tried = ", ".join(f"{other:g}" for other in WAYS[name].rates)
            cells = [f"{rate:g} ({tried})", f"{rows[0]['trained']:,}", f"{rows[0]['bytes'] / 1000:,.0f}"]
            cells.append(f"{seconds[name]:.2f}")
        cells += [spread([row[score] for row in rows]) for score in ("test_global_R1", "test_local_R1")]
        lines.append(f"| {WAYS[name].title} | {' | '.join(cells)} |")
    command = " ".join(["python benchmarks/lora.py", *arguments])
    return "\n".join([*lines, "", *footer(command, ("peft",))])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="results of the demo, named seed_0 and so on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lora"), help="folder of the runs")
    options = parser.parse_args()
    disable_progress_bars()
    results = run_all(options.folders, options.output_dir, options.steps)
    first = options.folders[0]
    seconds = step_seconds(first, options.output_dir / first.name / "night")
    text = report(results, seconds, options.steps, sys.argv[1:])
    (ROOT / "benchmarks" / "lora.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
