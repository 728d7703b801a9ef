"""
Run the demo with several seeds and write time, peak memory and scores to `benchmarks/demo.md`; and how long a training
step takes alone and beside a busy process.

    python benchmarks/demo.py --seeds 0 1 2
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import footer


ROOT = Path(__file__).resolve().parent.parent
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}  # as in the Makefile
COLUMNS = ("Rank-1", "Rank-5", "Rank-10", "mAP", "mINP")


def run_demo(seed: int, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Scores by row of the demo's table, and minutes. The results stay in `folder`."""
    with tempfile.TemporaryDirectory() as cache:  # of its own: drawing the set is part of the time
        variables = {**os.environ, **MALLOC, "HF_DATASETS_CACHE": cache}
        started = time.monotonic()
        command = [sys.executable, "-m", "cada", "demo", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True, env=variables, cwd=ROOT)
        minutes = (time.monotonic() - started) / 60
    lines = (folder / "table.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: [float(cell) for cell in row[1:]] for row in cells}, minutes


# In a process of its own, as OpenMP reads how to wait when torch is loaded. The first steps are of warming up.
STEPS = """
import cada, sys, time, torch
from pathlib import Path
from cada.data.drawn import load_drawn
from cada.data.pairs import PairCollator, PairDataset
from cada.demo import RECIPE, build_start
from cada.hub.convert import load_model_and_processor

splits = load_drawn(seed=0)
build_start(splits, Path(sys.argv[1]), 0)
model, processor = load_model_and_processor(sys.argv[1])
model.train().set_attn_implementation("eager")
pairs = PairDataset(splits["train"], processor.image_size)
size = int(RECIPE[RECIPE.index("--per_device_train_batch_size") + 1])
batch = PairCollator(processor)([pairs[(row, 0)] for row in range(size)])
batch.pop("pair")
times = []
for _ in range(16):
    started = time.monotonic()
    model(**batch, return_loss=True, negative_temperature=0.5).loss.backward()
    times.append(time.monotonic() - started)
print(sorted(times[4:])[6])
"""


def step_seconds(busy: bool) -> float:
    """Median seconds of forward and backward pass of the demo's batch, alone or beside a process that never waits."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", STEPS, folder]
            variables = {**os.environ, **MALLOC}
            return float(subprocess.run(command, check=True, capture_output=True, env=variables, cwd=ROOT).stdout)
    finally:
        if other is not None:
            other.kill()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "demo")
    options = parser.parse_args()
    lines = [
        "# The demo over several seeds",
        "",
        "A seed decides the drawn persons, images and captions, and the random weights. Every run draws, trains, "
        "evaluates and searches from nothing.",
        "",
        f"| seed | test | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    summary = ["", "| seed | minutes | peak memory (GB) | local Rank-1 / ceiling | local − global Rank-1 |"]
    summary.append("|---|---:|---:|---:|---:|")
    peak = 0.0
    for seed in options.seeds:
        rows, minutes = run_demo(seed, options.output_dir / f"seed_{seed}")
        # Highest of all children so far, in KiB on Linux.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        lines += [
            f"| {seed} | {name} | {' | '.join(f'{value:.1f}' for value in values)} |" for name, values in rows.items()
        ]
        local = next(values for name, values in rows.items() if name.startswith("local"))
        ratio, gain = local[0] / rows["ceiling"][0], local[0] - rows["global matching"][0]
        summary.append(f"| {seed} | {minutes:.1f} | {peak:.2f} | {ratio:.2f} | {gain:+.1f} |")
    alone, beside = step_seconds(busy=False), step_seconds(busy=True)
    summary += [
        "",
        "Peak memory is the highest of this and the seeds before it.",
        "",
        f"A training step (forward and backward pass): {alone:.2f} s alone, {beside:.2f} s beside one busy process, "
        f"{beside / alone:.2f} times. Threads that wait sleep (`OMP_WAIT_POLICY=PASSIVE`).",
        "",
        *footer(f"python benchmarks/demo.py --seeds {' '.join(map(str, options.seeds))}"),
    ]
    print(summary[-7])
    (ROOT / "benchmarks" / "demo.md").write_text("\n".join(lines + summary), encoding="utf-8")


if __name__ == "__main__":
    main()
