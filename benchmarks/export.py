"""
A checkpoint as graphs of ONNX Runtime and OpenVINO beside PyTorch: are the rankings the same, and how fast are they?

    python benchmarks/export.py runs/demo/seed_0 runs/demo/seed_1 runs/demo/seed_2

The folders are results of `cada demo`. Every caption of their test split searches all its images, by global and by
local matching. The speed is that of a model of base size with random weights. Writes `benchmarks/export.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_from_disk
from report import footer

from cada.evaluation.encoding import encode_gallery, encode_queries
from cada.evaluation.matching import score_gallery
from cada.evaluation.metrics import retrieval_metrics
from cada.export import CADAGraphs, export_model, load_export
from cada.hardware import cpu_has_bfloat16
from cada.hub.convert import load_model_and_processor
from cada.hub.loading import fitted_processor, load_processor
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor


ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {
    "ONNX Runtime": ("onnx", False),
    "OpenVINO": ("openvino", False),
    "OpenVINO, int8": ("openvino", True),
}
PAIRS, LENGTH = 32, 24  # of local matching, as one search reads them
ROUNDS = 5


def rankings(model, processor, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `(queries, images)` of global and of local matching."""
    captions = [caption for row in rows["captions"] for caption in row]
    gallery = encode_gallery(model, processor, rows, progress=False)
    return score_gallery(model, encode_queries(model, processor, captions, progress=False), gallery, rerank_k=32)


def measure_ranking(folder: Path, temporary: Path) -> list[str]:
    """Table rows: difference of scores, same first ten images, and Rank-1 of each export."""
    model, processor = load_model_and_processor(folder / "model")
    rows = load_from_disk(folder / "drawn")["test"]
    gallery_ids = torch.tensor(rows["person_id"])
    query_ids = gallery_ids.repeat_interleave(torch.tensor([len(row) for row in rows["captions"]]))

    def rank_1(scores: torch.Tensor) -> float:
        return retrieval_metrics(scores, query_ids, gallery_ids)["R1"]

    expected, lines = rankings(model, processor, rows), []
    for name, (export_format, int8) in EXPORTS.items():
        graphs = temporary / f"{folder.name}-{name}"
        export_model(folder / "model", graphs, export_format, int8=int8)
        for stage, known, found in zip(("global", "local"), expected, rankings(*load_export(graphs), rows)):
            same = (known.topk(10).indices == found.topk(10).indices).all(dim=1).float().mean()
            change = rank_1(found) - rank_1(known)
            difference = (known.topk(10).values - found.topk(10).values).abs().max()
            lines.append(
                f"| {folder.name} | {name} | {stage} | {difference:.1e} | {100 * same:.2f} % | {rank_1(known):.2f} | "
                f"{change:+.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def fastest(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each step: the best of several rounds, in which all take turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            best[name] = min(best[name], 1000 * (time.perf_counter() - started))
    return best


@torch.inference_mode()
def measure_speed(demo: Path, temporary: Path) -> list[str]:
    """Table rows of a model of base size: size on disk, images, pairs."""
    tokenizer = load_processor(demo / "model").tokenizer
    enc = load_processor(demo / "model").enc_token_id
    torch.manual_seed(0)
    model = CADAForTextToImageRetrieval(CADAConfig(text_config={"enc_token_id": enc})).eval()
    model.save_pretrained(temporary / "base")
    fitted_processor(CADAImageProcessor(), tokenizer, model.config).save_pretrained(temporary / "base")
    models = {"PyTorch": model}
    if cpu_has_bfloat16():
        models["PyTorch, bfloat16"] = load_model_and_processor(temporary / "base")[0].bfloat16()
    sizes = {"PyTorch": (temporary / "base" / "model.safetensors").stat().st_size}
    for name, (export_format, int8) in EXPORTS.items():
        export_model(temporary / "base", temporary / name, export_format, int8=int8)
        models[name] = CADAGraphs(temporary / name)
        sizes[name] = sum(path.stat().st_size for path in (temporary / name).iterdir())
        print(f"exported {name}", flush=True)
    pixel_values = torch.randn(8, 3, 224, 224)
    text = torch.randint(1000, 30000, (PAIRS, LENGTH)), torch.ones(PAIRS, LENGTH, dtype=torch.long)
    states, index = model.encode_images(pixel_values).repeat(PAIRS // 8, 1, 1), torch.arange(PAIRS)
    times = [
        fastest(
            {name: lambda model=each: model.get_image_features(pixel_values[:1]) for name, each in models.items()}
        ),
        fastest({name: lambda model=each: model.get_image_features(pixel_values) for name, each in models.items()}),
        fastest(
            {
                name: lambda model=each: model.match(*text, states.to(model.dtype), index, index)
                for name, each in models.items()
            }
        ),
    ]
    return [
        f"| {name} | {f'{sizes[name] / 1e6:,.0f}' if name in sizes else '–'} | {times[0][name]:.0f} | "
        f"{times[1][name] / 8:.0f} | {times[2][name] / PAIRS:.1f} |"
        for name in models
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        speed = measure_speed(options.folders[0], Path(temporary))
        print(*speed, sep="\n", flush=True)
        ranking = [line for folder in options.folders for line in measure_ranking(folder, Path(temporary))]
    vnni = torch.cpu.get_capabilities().get("avx512_vnni") or torch.cpu.get_capabilities().get("avx_vnni")
    instructions = "by instructions of its own (VNNI)" if vnni else "without instructions of its own (no VNNI)"
    lines = [
        "# Graphs of ONNX and OpenVINO",
        "",
        "Drawn set, split test: 1,200 sentences search 600 images, local matching of the best 32. The difference is "
        "the largest in a score of the first ten images.",
        "",
        "| demo | runtime | matching | difference | same first ten | Rank-1 of PyTorch | change |",
        "|---|---|---|---:|---:|---:|---:|",
        *ranking,
        "",
        "Speed of a model of base size (ViT-B/16, 224×224; BERT-base) with random weights: milliseconds per image, "
        f"alone and in a batch of eight, and per pair of {PAIRS} texts of {LENGTH} tokens, each with its image. The "
        f"best of {ROUNDS} rounds, in which all take turns. The processor multiplies int8 {instructions}.",
        "",
        "| runtime | MB on disk | 1 image | 8 images | pair |",
        "|---|---:|---:|---:|---:|",
        *speed,
        "",
        *footer(" ".join(["python benchmarks/export.py", *sys.argv[1:]]), ("onnxruntime", "openvino", "nncf")),
    ]
    (ROOT / "benchmarks" / "export.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
