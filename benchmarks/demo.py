"""
Run the demo with several seeds and write time, peak memory and scores to `benchmarks/demo.md`.

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

from cada.hub.record import environment


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
    where = environment()
    summary += [
        "",
        "Peak memory is the highest of this and the seeds before it.",
        "",
        f"- Command: `python benchmarks/demo.py --seeds {' '.join(map(str, options.seeds))}`",
        f"- Date: {where['date']}",
        f"- Machine: {where['hardware']}",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in where['versions'].items())}",
        "",
    ]
    (ROOT / "benchmarks" / "demo.md").write_text("\n".join(lines + summary), encoding="utf-8")


if __name__ == "__main__":
    main()
