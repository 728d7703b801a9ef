"""
The paper's ablation (Tables IV to VII, Figures 3 and 4) as training runs, a report and a figure.

    python benchmarks/ablation.py --seeds 0 1 2
    python benchmarks/ablation.py --seeds 0 1 2 --name cuhk_pedes -- recipes/cuhk_pedes.json \\
        --data_dir /data/CUHK-PEDES --model_name_or_path start

The first line runs on the drawn set with the demo's training, and across its two domains: 17 trainings of each seed,
of 5 to 11 minutes on one CPU core. What follows `--` goes to train_cada.py; `start` is a
CADA checkpoint, such as `cada convert` writes. A finished run is not repeated and an interrupted one goes on: stop
the command and type it again. Two commands with other seeds and the same `--output_dir` share the work; the last one
writes the report.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from report import footer, spread
from tqdm.auto import tqdm

import cada.demo
from cada.data.drawn import load_drawn
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  # after the choice of the drawing back end


ROOT = Path(__file__).resolve().parent.parent
K = (2, 4, 8, 16, 32, 64, 128)
MASK_RATES = (0.2, 0.4, 0.6, 0.8, 1.0)
# Number of the groups, and their stride as a part of the text; the paper's text has 72 words.
GROUPS = {"36/36": (2, 1 / 2), "36/18": (3, 1 / 4), "24/24": (3, 1 / 3), "48/24": (2, 1 / 3), "72/72": (1, 1)}
LAYERS = (1 / 2, 2 / 3, 1)
KEPT = ("full", "night")  # models that are evaluated again, with other K or on another set
DRAWN_ARGUMENTS = ("--dataset", "demo", *cada.demo.RECIPE)


@dataclass(frozen=True)
class Run:
    """
    One training, or with `trained` the evaluation of the model of that run; with these fields of CADAConfig, and by
    default on the set that the arguments name; `arguments` of train_cada.py come after those of all runs.
    """

    name: str
    overrides: dict = field(default_factory=dict)
    trained: str | None = None
    dataset: str | None = None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of a table: its title, the run, and the matchings to report."""

    title: str
    run: Run
    stages: tuple[str, ...] = ("global", "local")


def plan(start: CADAConfig, drawn: bool) -> dict[str, list[Row]]:
    """The tables and figures of the paper as rows, for models like `start`; Table VI on the drawn sets alone."""
    neither = {"use_atp": False, "use_ara": False}
    full, atp = Run("full"), Run("atp", {"use_ara": False})
    only_global = ("global",)
    studies = {
        "components": [
            Row("Baseline (CMPM)", Run("cmpm", {**neither, "contrastive_loss": "cmpm"}), only_global),
            Row("+NDF, equation (2)", Run("ndf", {**neither, "contrastive_loss": "ndf"}), only_global),
            Row(
                "+NDF, authors' code",
                Run("ndf_reference", {**neither, "contrastive_loss": "ndf_reference"}),
                only_global,
            ),
            Row("+NDF+ARA", Run("ara", {"use_atp": False}), only_global),
            Row("+NDF+ATP", atp),
            Row("+NDF+ARA+ATP", full),
            Row("+NDF+ARA+ATP, robust to noisy captions", Run("robust", arguments=("--label_noise_robust",))),
        ],
        "k": [Row("K = 0", full, only_global)]
        + [Row(f"K = {k}", Run(f"k_{k}", {"rerank_k": k}, trained="full"), ("local",)) for k in K],
    }
    words = start.max_text_length - 1
    studies["groups"] = [Row("36/36", atp, ("local",))]
    for title, (count, part) in list(GROUPS.items())[1:]:
        stride = int(part * words)
        fields = {"use_ara": False, "group_size": words - (count - 1) * stride, "group_stride": stride}
        studies["groups"].append(Row(title, Run(f"groups_{title.replace('/', '_')}", fields), ("local",)))
    studies["mask_rate"] = [
        Row(str(rate), full if rate == start.mask_rate else Run(f"mask_{rate}", {"mask_rate": rate}))
        for rate in MASK_RATES
    ]
    if drawn:
        night = Run("night", dataset="demo_night")
        studies["domains"] = [
            Row("day → day", full),
            Row("night → night", night),
            Row("day → night", Run("day_to_night", trained="full", dataset="demo_night")),
            Row("night → day", Run("night_to_day", trained="night")),
        ]
    whole = start.vision_config.num_hidden_layers, start.text_config.num_hidden_layers
    studies["layers"] = []
    for vision, text in sorted({tuple(max(1, round(part * count)) for count in whole) for part in LAYERS}):
        towers = {"vision_config": {"num_hidden_layers": vision}, "text_config": {"num_hidden_layers": text}}
        run = full if (vision, text) == whole else Run(f"layers_{vision}_{text}", towers)
        studies["layers"].append(Row(f"{vision} vision, {text} text", run))
    return studies


def claims(start: CADAConfig) -> list[tuple[str, tuple[str, str], tuple[str, str]]]:
    """What the paper finds: the sentence, and the two (run, matching) of which the first has the higher Rank-1."""
    ndf = start.contrastive_loss
    return [
        ("NDF, equation (2), over CMPM", ("ndf", "global"), ("cmpm", "global")),
        ("NDF, authors' code, over CMPM", ("ndf_reference", "global"), ("cmpm", "global")),
        ("ARA adds to NDF", ("ara", "global"), (ndf, "global")),
        ("ATP adds to NDF, global matching", ("atp", "global"), (ndf, "global")),
        ("ATP: local over global matching", ("atp", "local"), ("atp", "global")),
        ("ARA adds to ATP, global matching", ("full", "global"), ("atp", "global")),
        ("ARA adds to ATP, local matching", ("full", "local"), ("atp", "local")),
        ("Both: local over global matching", ("full", "local"), ("full", "global")),
        ("Two groups over one", ("atp", "local"), ("groups_72_72", "local")),
        *(
            (f"Mask rate {start.mask_rate} over {rate}", ("full", "local"), (f"mask_{rate}", "local"))
            for rate in MASK_RATES
            if rate != start.mask_rate
        ),
    ]


def folder_of(output_dir: Path, run: Run, seed: int) -> Path:
    """Where a run keeps its model, log and scores."""
    return output_dir / f"seed_{seed}" / run.name


def carry_out(run: Run, seed: int, output_dir: Path, arguments: list[str]) -> None:
    """Train (or evaluate) and test, unless the scores are there. The log is `log.txt` in the folder of the run."""
    folder = folder_of(output_dir, run, seed)
    if (folder / "test_results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if run.dataset is not None:
        arguments = [*arguments, "--dataset", run.dataset]
    overrides = dict(run.overrides)
    if "--config_overrides" in arguments:
        overrides = {**json.loads(arguments[arguments.index("--config_overrides") + 1]), **overrides}
    command = [sys.executable, str(ROOT / "train_cada.py"), *arguments, "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--config_overrides", json.dumps(overrides), "--disable_tqdm", "true"]
    command += run.arguments
    if run.trained is None:
        command += ["--do_train", "--do_predict", "--resume_from_checkpoint", "last"]
    else:
        trained = folder_of(output_dir, Run(run.trained), seed)
        command += ["--do_train", "false", "--do_eval", "false", "--do_predict", "--model_name_or_path", str(trained)]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        outcome = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    if outcome.returncode:
        sys.exit(f"error: the run {run.name}, seed {seed}, failed. Its log: {folder / 'log.txt'}")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if run.name not in KEPT:
        (folder / "model.safetensors").unlink(missing_ok=True)


def scores_of(output_dir: Path, name: str, seeds: list[int], stage: str, metric: str) -> list[float]:
    """A score of every seed, in percent; empty where a run is not finished."""
    values = []
    for seed in seeds:
        path = folder_of(output_dir, Run(name), seed) / "test_results.json"
        if not path.exists():
            return []
        values.append(json.loads(path.read_text())[f"test_{stage}_{metric}"])
    return values


def count_parameters(config: CADAConfig) -> float:
    """Parameters in millions."""
    with torch.device("meta"):
        model = CADAForTextToImageRetrieval(config)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


TITLES = {
    "components": "Components (Table IV)",
    "groups": "Size and stride of the groups (Table V)",
    "mask_rate": "Mask rate (Fig. 4)",
    "k": "Candidates re-ranked (Fig. 3)",
    "domains": "Trained on one set, tested on another (Table VI)",
    "layers": "Layers (Table VII)",
}


def table(study: str, rows: list[Row], output_dir: Path, seeds: list[int]) -> list[str]:
    """One study as Markdown."""
    lines = ["", f"## {TITLES[study]}", "", "| | matching | Rank-1 | mAP |", "|---|---|---:|---:|"]
    if study in ("components", "layers"):
        lines[-2:] = ["| | matching | Rank-1 | mAP | parameters (M) |", "|---|---|---:|---:|---:|"]
    for row in rows:
        for stage in row.stages:
            cells = [spread(scores_of(output_dir, row.run.name, seeds, stage, metric)) for metric in ("R1", "mAP")]
            if study in ("components", "layers"):
                folder = folder_of(output_dir, row.run, seeds[0])
                known = (folder / "config.json").exists()
                cells.append(f"{count_parameters(CADAConfig.from_pretrained(folder)):.2f}" if known else "–")
            lines.append(f"| {row.title} | {stage} | {' | '.join(cells)} |")
    return lines


def draw_figure(studies: dict[str, list[Row]], output_dir: Path, seeds: list[int], path: Path) -> None:
    """Figures 3 and 4: scores over K (0 is global matching) and over the mask rate, with the deviation as bars."""
    titles = {"k": "candidates K", "mask_rate": "mask rate"}
    panels = {study: title for study, title in titles.items() if study in studies}
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for axis, (study, title) in zip(axes[0], panels.items()):
        for metric, label in (("R1", "Rank-1"), ("mAP", "mAP")):
            points = {
                row.title.split()[-1]: scores_of(output_dir, row.run.name, seeds, row.stages[-1], metric)
                for row in studies[study]
            }
            shown = {place: values for place, values in points.items() if values}
            axis.errorbar(
                list(shown),
                [statistics.mean(values) for values in shown.values()],
                [statistics.stdev(values) if len(values) > 1 else 0 for values in shown.values()],
                marker="o",
                capsize=3,
                label=label,
            )
        axis.set(xlabel=title, ylabel="local matching (%)")
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(
    name: str, studies, start: CADAConfig, output_dir: Path, seeds: list[int], arguments: list[str]
) -> Path:
    """`benchmarks/ablation_NAME.md` and its figure."""
    lines = [
        f"# Ablation: {name}",
        "",
        f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}, on the test split, in percent. "
        "Groups are named as in the paper, for texts of 72 words; in shorter texts they are the same parts of the "
        "text, as far as they fit.",
    ]
    for study, rows in studies.items():
        lines += table(study, rows, output_dir, seeds)
    if {"k", "mask_rate"} & set(studies):
        lines += ["", f"![Local matching over K and over the mask rate](ablation_{name}.png)"]
    lines += ["", "## The paper's findings", ""]
    lines += ["Difference in Rank-1, seed by seed.", "", "| finding | difference | holds in |", "|---|---:|---:|"]
    for sentence, better, worse in claims(start):
        pair = [scores_of(output_dir, run, seeds, stage, "R1") for run, stage in (better, worse)]
        if all(pair):
            differences = [first - second for first, second in zip(*pair)]
            holds = sum(difference > 0 for difference in differences)
            lines.append(f"| {sentence} | {spread(differences, '+')} | {holds} of {len(differences)} seeds |")
    own = " ".join(["--seeds", *map(str, seeds), *([] if set(studies) == set(TITLES) else ["--studies", *studies])])
    lines += [
        "",
        f"- Arguments of train_cada.py: `{' '.join(arguments)}`",
        *footer(f"python benchmarks/ablation.py {own}"),
    ]
    draw_figure(studies, output_dir, seeds, ROOT / "benchmarks" / f"ablation_{name}.png")
    report = ROOT / "benchmarks" / f"ablation_{name}.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", choices=list(TITLES), default=list(TITLES), help="default: all")
    parser.add_argument("--name", default="drawn", help="of the report")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    options, arguments = parser.parse_args(given[:split]), given[split + 1 :]
    output_dir = options.output_dir.absolute()
    starts = {}
    if arguments:
        if "--model_name_or_path" not in arguments:
            parser.error("Give the start after `--`: --model_name_or_path FOLDER.")
        starts = dict.fromkeys(options.seeds, arguments[arguments.index("--model_name_or_path") + 1])
        train_arguments = arguments
    else:
        splits = load_drawn(seed=0)
        for seed in options.seeds:
            starts[seed] = str(output_dir / f"seed_{seed}" / "start")
            if not Path(starts[seed]).exists():
                cada.demo.build_start(splits, Path(starts[seed]), seed)
        train_arguments = list(DRAWN_ARGUMENTS)
    start = CADAConfig.from_pretrained(starts[options.seeds[0]])
    studies = {study: rows for study, rows in plan(start, not arguments).items() if study in options.studies}
    runs = {row.run.name: row.run for rows in studies.values() for row in rows}
    if any(run.trained == "full" for run in runs.values()):
        runs = {"full": Run("full"), **runs}
    with tqdm(total=len(runs) * len(options.seeds), unit="run") as bar:
        for run in runs.values():
            for seed in options.seeds:
                bar.set_description(f"{run.name}, seed {seed}")
                own = train_arguments if arguments else [*train_arguments, "--model_name_or_path", starts[seed]]
                carry_out(run, seed, output_dir, own)
                bar.update()
    shown = arguments or DRAWN_ARGUMENTS
    print(f"Report: {write_report(options.name, studies, start, output_dir, options.seeds, shown)}")


if __name__ == "__main__":
    main()
