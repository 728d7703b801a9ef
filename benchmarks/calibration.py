"""
How good the probability of a match is, and whether it tells that somebody is not there.

    python benchmarks/calibration.py runs/demo/seed_0 runs/demo/seed_1 runs/demo/seed_2

The folders are results of `cada demo`, for example of `benchmarks/demo.py`. Fitted on the validation persons, measured
on the test persons, half of whom are taken out of the gallery. Writes `benchmarks/calibration.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import sys
from pathlib import Path

from datasets import load_from_disk
from report import footer

from cada.evaluation.matching import calibrate, evaluate_retrieval
from cada.hub.convert import load_model_and_processor


ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    lines = [
        "# The probability of a match",
        "",
        "Drawn set. The probability is fitted on all candidates (K = 32) of the validation captions, and measured on "
        "those of the test captions, each time with half of the persons taken out of the gallery. Calibration error: "
        "expected, ten bins. AUROC: of the highest probability of a search for whether the person is there. DIR: "
        "detection and identification rate in percent, at 1 and 10 % false alarms.",
        "",
        "| | error on validation | error on test | AUROC | DIR at 1 % | at 10 % | weights of S_G, logit S_L, 1 |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for folder in options.folders:
        model, processor = load_model_and_processor(folder / "model")
        splits = load_from_disk(folder / "drawn")
        fitted = model.config.calibration = calibrate(model, processor, splits["val"], "drawn", progress=False)
        scores = evaluate_retrieval(model, processor, splits["test"], progress=False, open_set=True)
        cells = [f"{fitted['expected_calibration_error']:.4f}", f"{scores['open_ECE']:.4f}"]
        cells += [f"{scores['open_AUROC']:.3f}", f"{scores['open_DIR1']:.1f}", f"{scores['open_DIR10']:.1f}"]
        cells.append(", ".join(f"{weight:.2f}" for weight in fitted["weights"]))
        lines.append(f"| {folder.name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", *footer(" ".join(["python benchmarks/calibration.py", *sys.argv[1:]]))]
    (ROOT / "benchmarks" / "calibration.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
