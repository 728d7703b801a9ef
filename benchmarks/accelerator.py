"""
What an accelerator does with a whole test as large as CUHK-PEDES', and with training steps, at base size.

    python benchmarks/accelerator.py

A base-size model is trained from random weights on drawn pedestrians by the training command, so that its scores are
those of a trained model. Then the drawn test of 3,076 images and 6,152 captions (CUHK-PEDES: 3,074 and 6,148), from
decoding to the metrics, in float32 and in bfloat16, and steps of the paper's batch of 96. Writes
`benchmarks/accelerator.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from report import footer
from transformers import BertTokenizer, set_seed

import train_cada
from cada.data.drawn import load_drawn
from cada.data.pairs import PairCollator, PairDataset
from cada.demo import RECIPE
from cada.evaluation.encoding import encode_gallery, encode_queries
from cada.evaluation.matching import score_gallery
from cada.evaluation.metrics import METRICS, retrieval_metrics
from cada.hub.convert import load_model_and_processor
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor, clean_caption


ROOT = Path(__file__).resolve().parent.parent
BATCH = 96  # of the paper
STEPS = 10
MEMORY = 16  # GB, as by `--rerank_memory 16`
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def autocast(precision: str):
    """As the Trainer sets it with `--bf16`."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast("cuda", dtype=dtype)


def seconds(function) -> float:
    """Of one call, until the accelerator has done its part."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def train_model(train: Dataset, test: Dataset, folder: Path, steps: int) -> None:
    """A base-size model from random weights; the demo's recipe at another size."""
    DatasetDict(train=train, test=test).save_to_disk(folder / "drawn")
    captions = [clean_caption(caption) for row in train["captions"] for caption in row]
    tokenizer = BertTokenizer().train_new_from_iterator(captions, vocab_size=500, show_progress=False)
    processor = CADAProcessor(CADAImageProcessor(erase_probability=0.0), tokenizer)
    set_seed(0)
    config = CADAConfig(text_config={"enc_token_id": processor.enc_token_id}, pool_padding=False)
    CADAForTextToImageRetrieval(config).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    recipe = dict(zip(RECIPE[::2], RECIPE[1::2])) | {
        "--max_steps": str(steps),
        "--learning_rate": "3e-4",
        "--attn_implementation": "sdpa",
        "--bf16": "true",
        "--dataloader_num_workers": "12",
    }
    train_cada.main(
        [
            *("--dataset", str(folder / "drawn"), "--model_name_or_path", str(folder / "start")),
            *("--output_dir", str(folder / "model"), "--do_train"),
            *(word for pair in recipe.items() for word in pair),
        ]
    )


def measure_test(model, processor, test: Dataset, k: int, precisions: list[str]) -> list[str]:
    """Rows of the table of whole tests: seconds of its stages, the scores, and whose ranks are those of float32."""
    captions = [caption for row in test["captions"] for caption in row]
    person_ids = torch.tensor(test["person_id"])
    query_ids = person_ids.repeat_interleave(torch.tensor([len(row) for row in test["captions"]]))
    rows, exact = [], None
    for precision in precisions:
        parts: dict[str, object] = {}

        def encode_images(parts=parts):
            parts["gallery"] = encode_gallery(model, processor, test, num_workers=12, progress=False, memory=MEMORY)

        def encode_texts(parts=parts):
            parts["queries"] = encode_queries(model, processor, captions, progress=False)

        def match(parts=parts):
            parts["scores"] = score_gallery(model, parts["queries"], parts["gallery"], k, memory=MEMORY)[1]

        def metrics(parts=parts):
            parts["metrics"] = retrieval_metrics(parts["scores"], query_ids, person_ids)

        with autocast(precision), torch.inference_mode():
            times = [seconds(stage) for stage in (encode_images, encode_texts, match, metrics)]
        first = [parts["scores"].topk(rank).indices.sort(dim=1).values for rank in (1, 5, 10)]
        exact = first if precision == "float32" else exact
        cells = [*(f"{value:.1f}" for value in (*times, sum(times))), f"{len(captions) * k / times[2]:,.0f}"]
        cells.append(" / ".join(f"{parts['metrics'][name]:.2f}" for name in METRICS[:3]))
        same = [f"{(a == b).all(dim=1).double().mean():.2%}" for a, b in zip(exact or [], first)]
        cells.append(" / ".join(same) or "–")
        rows.append(f"| {k} | {precision} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def measure_steps(model, batch: dict, precision: str, compiled: bool, checkpointing: bool) -> tuple[float, float]:
    """Samples per second of forward and backward pass and AdamW, and the peak of memory in GB."""
    model.train()
    model.activation_checkpointing_enable() if checkpointing else model.activation_checkpointing_disable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    called = torch.compile(model) if compiled else model

    def step():
        with autocast(precision):
            loss = called(**batch, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    taken = seconds(lambda: [step() for _ in range(STEPS)])
    return STEPS * len(batch["input_ids"]) / taken, torch.cuda.max_memory_allocated() / 1e9


def measure_training(model, processor, train: Dataset, with_compiled: bool) -> list[str]:
    """Rows of the table of training steps."""
    pairs = PairDataset(train, processor.image_size)
    batch = PairCollator(processor)([pairs[(2 * row, 0)] for row in range(BATCH)])
    batch.pop("pair")
    batch = {name: tensor.to("cuda") for name, tensor in batch.items()}
    rows = []
    cases = [("float32", False, False), ("bfloat16", False, False), ("bfloat16", False, True)]
    for precision, compiled, checkpointing in [*cases, *[("bfloat16", True, False)] * with_compiled]:
        speed, memory = measure_steps(model, batch, precision, compiled, checkpointing)
        how = " + ".join(
            [precision, *["`--torch_compile`"] * compiled, *["`--activation_checkpointing`"] * checkpointing]
        )
        rows.append(f"| {how} | {speed:.0f} | {memory:.1f} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the training before the test")
    parser.add_argument("--torch_compile", action="store_true", help="also steps of the compiled model, in minutes")
    options = parser.parse_args()
    splits = load_drawn(test_persons=769)
    train, test = splits["train"], splits["test"]
    with tempfile.TemporaryDirectory() as folder:
        train_model(train, test, Path(folder), options.steps)
        model, processor = load_model_and_processor(Path(folder) / "model")
    model = model.to("cuda").eval()
    lines = [
        "# On an accelerator",
        "",
        f"Base size (ViT-B/16, 224×224, 12 text layers), trained for {options.steps} steps on drawn pedestrians. The "
        f"test: {len(test):,} images, {sum(map(len, test['captions'])):,} captions.",
        "",
        "| K | precision | images, s | captions, s | local matching, s | metrics, s | sum, s | pairs a second | "
        "local Rank-1/5/10 | the same first 1/5/10 as float32 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    lines += measure_test(model, processor, test, 32, ["float32", "bfloat16"])
    lines += measure_test(model, processor, test, 128, ["bfloat16"])  # float32 would take minutes
    lines += [
        "",
        f"Training: forward and backward pass and AdamW of a batch of {BATCH}, already on the accelerator.",
        "",
        "| | samples a second | peak memory, GB |",
        "|---|---:|---:|",
        *measure_training(model, processor, train, options.torch_compile),
        "",
        *footer(f"python benchmarks/accelerator.py{'' if options.steps == 100 else f' --steps {options.steps}'}"),
    ]
    (ROOT / "benchmarks" / "accelerator.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
