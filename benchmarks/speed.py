"""
Time and operations against the authors' way and against BLIP of transformers, side by side, at base size.

    python benchmarks/speed.py
    python benchmarks/speed.py --demo demo    # and how far half precision changes the ranking of the demo's model

All three have random weights: the work does not depend on them. (a) is the authors' way on our weights, written here:
texts padded to 73, keys and values anew for every pair and pass, all positions of every layer, the vocabulary head
over all positions, a separate stack for ARA, plain attention, re-ranking one query at a time. (b) is
`BlipForImageTextRetrieval`. Writes `benchmarks/speed_DEVICE.md`.

On a CPU the sizes follow a first short measurement, so that it ends within ten minutes; bfloat16 is left out where the
processor has no instructions for it.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_from_disk
from report import footer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm.auto import tqdm
from transformers import BlipConfig, BlipForImageTextRetrieval

from cada.evaluation.encoding import Gallery, Queries, encode_gallery, encode_queries
from cada.evaluation.matching import match_candidates, score_gallery
from cada.evaluation.metrics import rerank_scores, top_candidates
from cada.hardware import cpu_has_bfloat16
from configuration_cada import CADAConfig
from losses_cada import atp_loss, draw_negatives, group_states, ndf_loss, positive_pairs
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


ROOT = Path(__file__).resolve().parent.parent
PADDED = 73
TURNS = 2  # measured, after one that warms up
MINUTES = 7  # on a CPU, of measurements; making the models comes on top
OURS, PLAIN, BLIP = "this code", "(a) authors' way", "(b) BLIP of transformers"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: re-ranking of `texts` queries among `images`, K = `k`; training in batches of `batch`."""

    images: int
    texts: int
    k: int
    batch: int


ON_A_GPU = Sizes(images=256, texts=512, k=32, batch=32)


def sizes_for_cpu(seconds: float, precisions: int) -> Sizes:
    """
    The largest sizes, n = 2 to 8, that take `MINUTES` where encoding an image in float32 takes `seconds`.

    n images have 2 n² pairs, 16 each at the most where CUHK-PEDES' test has 64, which is to our disadvantage. A batch
    of few pairs shows too much of what a step costs anyway: weights cast to bfloat16, gradients of the vocabulary.
    """

    def encodings(n: int) -> float:  # that take as long; as measured on two cores with AVX-512
        return (1 + TURNS) * (2.4 * n**2 + 40 * n) * (1 if precisions == 1 else 1.5)

    n = max((n for n in range(2, 9) if encodings(n) * seconds <= 60 * MINUTES), default=2)
    return Sizes(images=n, texts=2 * n, k=n, batch=n)


def make_model(implementation: str = "sdpa", **overrides) -> CADAForTextToImageRetrieval:
    """Base size with random weights."""
    config = CADAConfig(**overrides)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return CADAForTextToImageRetrieval(config)


def make_texts(count: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Word pieces and mask, padded to 73. Lengths as of CUHK-PEDES' captions: 28 tokens on average, 12 to 73."""
    generator = torch.Generator().manual_seed(1)
    lengths = (28 + 9 * torch.randn(count, generator=generator)).round().long().clamp(12, PADDED)
    mask = (torch.arange(PADDED)[None] < lengths[:, None]).long()
    return torch.randint(1000, vocabulary - 10, (count, PADDED), generator=generator) * mask, mask


def plain_decode(model, stack, input_ids, mask, image_states) -> torch.Tensor:
    """Decoder states of every position; pair i is text i and image i."""
    input_ids = torch.cat(
        [torch.full_like(input_ids[:, :1], model.config.text_config.enc_token_id), input_ids[:, 1:]], 1
    )
    return stack(input_ids, mask, image_states, return_dict=True).last_hidden_state


@torch.inference_mode()
def plain_rerank(model, input_ids, mask, image_states, candidates) -> torch.Tensor:
    """The authors' way: one query at a time, against its K candidates."""
    rows = []
    for query, images in enumerate(candidates):
        text = input_ids[query : query + 1].expand(len(images), -1), mask[query : query + 1].expand(len(images), -1)
        states = plain_decode(model, model.cada.text_model, *text, image_states[images])
        rows.append(model.local_score(model.match_head(states[:, 0])))
    return torch.stack(rows)


@torch.inference_mode()
def blip_rerank(blip, input_ids, mask, image_states, candidates) -> torch.Tensor:
    """As in BLIP's forward with the match head: a query and its K candidates, the text at its own length."""
    rows = []
    for query, images in enumerate(candidates):
        length = int(mask[query].sum())
        states = blip.text_encoder(
            input_ids=input_ids[query : query + 1, :length].expand(len(images), -1),
            attention_mask=mask[query : query + 1, :length].expand(len(images), -1),
            encoder_hidden_states=image_states[images],
            encoder_attention_mask=torch.ones_like(image_states[images][..., 0]),
            return_dict=True,
        ).last_hidden_state
        rows.append(blip.itm_head(states[:, 0]).softmax(dim=-1)[:, 1])
    return torch.stack(rows)


def plain_losses(model, ara_stack, batch) -> torch.Tensor:
    """The authors' training step on our weights, with a stack of its own for ARA."""
    config, (ids, mask), person_ids = model.config, batch["text"], batch["person_ids"]
    vision = model.cada.vision_model(batch["pixel_values"], return_dict=True)
    text = model.cada.text_model(ids, mask, return_dict=True)
    image_features = F.normalize(model.cada.visual_projection(vision.pooler_output).float(), dim=-1)
    text_features = F.normalize(model.cada.text_projection(text.pooler_output).float(), dim=-1)
    positives = positive_pairs(person_ids, person_ids)
    similarity = image_features @ text_features.t()
    loss = ndf_loss(similarity, positives, config.temperature)
    texts, _ = draw_negatives(similarity, positives)
    images, _ = draw_negatives(similarity.t(), positives)
    states = vision.last_hidden_state
    positive = plain_decode(model, model.cada.text_model, ids, mask, states)
    negative = plain_decode(
        model,
        model.cada.text_model,
        torch.cat([ids[texts], ids]),
        torch.cat([mask[texts], mask]),
        torch.cat([states, states[images]]),
    )
    decoded = torch.cat([positive, negative])
    groups, group_mask = group_states(
        decoded, torch.cat([mask, mask[texts], mask]), config.group_size, config.group_stride, True
    )
    labels = torch.cat([torch.ones_like(person_ids), torch.zeros_like(person_ids).repeat(2)])
    loss = loss + atp_loss(model.match_head(decoded[:, 0]), model.group_match_head(groups), group_mask, labels)
    logits = model.vocabulary_head(
        ara_stack(batch["masked_input_ids"], mask, states, return_dict=True).last_hidden_state
    )
    ara = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    return loss + config.ara_weight * ara


def our_losses(model, batch) -> torch.Tensor:
    """The training step of this project, with texts as long as the longest of the batch."""
    ids, mask = batch["text"]
    length = int(mask.sum(dim=1).max())
    return model(
        input_ids=ids[:, :length],
        attention_mask=mask[:, :length],
        pixel_values=batch["pixel_values"],
        person_ids=batch["person_ids"],
        masked_input_ids=batch["masked_input_ids"][:, :length],
        labels=batch["labels"][:, :length],
    ).loss


def make_batch(size: int, config: CADAConfig, device: str) -> dict:
    """Pairs of different persons; two of five tokens are masked."""
    ids, mask = (tensor.to(device) for tensor in make_texts(size, config.text_config.vocab_size))
    chosen = (torch.rand(ids.shape, device=device) < 0.4) & mask.bool()
    return {
        "text": (ids, mask),
        "pixel_values": torch.randn(size, 3, *config.vision_config.image_height_width, device=device),
        "person_ids": torch.arange(size, device=device),
        "masked_input_ids": ids.masked_fill(chosen, 103),
        "labels": ids.masked_fill(~chosen, -100),
    }


# The attention of a CPU, which torch does not count by itself. Formulas are called with shapes.
_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


@dataclass(frozen=True)
class Case:
    """What a case takes: seconds, the median of `TURNS`, and GFLOP of matrix products, attention among them."""

    seconds: float
    operations: float

    def each(self, count: int) -> "Case":
        """The same per item."""
        return Case(self.seconds / count, self.operations / count)


def measure(cases: dict[str, Callable[[], object]], device: str, bar) -> dict[str, Case]:
    """Each case by its name. The cases take turns, so that a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    operations = {}
    for name, case in cases.items():  # and warm up
        with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
            case()
        operations[name] = counter.get_total_flops() / 1e9
        bar.update()
    for _ in range(TURNS):
        for name, case in cases.items():
            seconds[name].append(seconds_of(case, device))
            bar.update()
    return {name: Case(statistics.median(values), operations[name]) for name, values in seconds.items()}


def seconds_of(case: Callable[[], object], device: str) -> float:
    """Seconds of one call, until an accelerator has done its part."""
    synchronize = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    synchronize()
    started = time.perf_counter()
    case()
    synchronize()
    return time.perf_counter() - started


def make_search(model, images: int, texts: int, k: int) -> tuple[Queries, Gallery, torch.Tensor]:
    """Queries, a gallery of random states, and K random candidates of each query."""
    config = model.config
    ids, mask = make_texts(texts, config.text_config.vocab_size)
    rows, columns = config.vision_config.grid_size
    states = torch.randn(images, 1 + rows * columns, config.vision_config.hidden_size, dtype=model.dtype)
    embeds = torch.randn(texts, 8), torch.randn(images, 8)
    candidates = top_candidates(embeds[0] @ embeds[1].t(), k)
    return Queries(embeds[0], ids, mask), Gallery(embeds[1], states), candidates


def encode_texts(model, input_ids, attention_mask) -> None:
    """As `encode_queries` does: in batches of similar length. On a CPU smaller ones, as there are few texts."""
    lengths = attention_mask.sum(dim=1)
    for rows in lengths.argsort().split(256 if input_ids.is_cuda else 32):
        cut = slice(int(lengths[rows].max()))
        model.get_text_features(input_ids[rows, cut], attention_mask[rows, cut])


@dataclass(frozen=True)
class Models:
    """The three, each with random weights in float32, and the stack that (a) has for ARA alone."""

    ours: CADAForTextToImageRetrieval
    plain: CADAForTextToImageRetrieval
    ara_stack: torch.nn.Module
    blip: BlipForImageTextRetrieval


def make_models(device: str) -> Models:
    """On the device."""
    with torch.device(device):
        plain = make_model("eager")
        blip = BlipForImageTextRetrieval(BlipConfig(image_text_hidden_size=256)).eval()
        return Models(make_model(), plain, copy.deepcopy(plain.cada.text_model), blip)


@torch.no_grad()  # not `inference_mode`: weights that change their precision within it could not train any more
def measure_inference(models: Models, dtype: torch.dtype, sizes: Sizes, bar) -> dict[str, dict[str, Case]]:
    """Cases by task, per pair, image and text; the weights are of `dtype`."""
    device = models.ours.device.type
    ours, plain, blip = (model.eval().to(dtype) for model in (models.ours, models.plain, models.blip))
    queries, gallery, candidates = make_search(ours, sizes.images, sizes.texts, sizes.k)
    ids, mask = queries.input_ids.to(device), queries.attention_mask.to(device)
    search = ids, mask, gallery.states.to(device), candidates.to(device)
    pixels = torch.randn(sizes.images, 3, 224, 224, device=device, dtype=dtype)
    longest = int(mask.sum(dim=1).max())
    tasks = {
        "re-ranking, ms per pair": (
            candidates.numel(),
            {
                OURS: lambda: match_candidates(ours, queries, gallery, candidates),
                PLAIN: lambda: plain_rerank(plain, *search),
                BLIP: lambda: blip_rerank(blip, *search),
            },
        ),
        "image encoding, ms per image": (
            sizes.images,
            {
                OURS: lambda: ours.get_image_features(pixels),
                PLAIN: lambda: plain.get_image_features(pixels),
                BLIP: lambda: blip.vision_model(pixels),
            },
        ),
        "text encoding, ms per text": (
            sizes.texts,
            {
                OURS: lambda: encode_texts(ours, ids, mask),
                PLAIN: lambda: plain.get_text_features(ids, mask),
                BLIP: lambda: blip.text_encoder(input_ids=ids[:, :longest], attention_mask=mask[:, :longest]),
            },
        ),
    }
    results = {}
    for task, (count, cases) in tasks.items():
        results[task] = {name: case.each(count) for name, case in measure(cases, device, bar).items()}
    for model in (ours, plain, blip):
        model.to(torch.float32)
    return results


def measure_training(models: Models, dtype: torch.dtype, size: int, bar) -> dict[str, dict[str, Case]]:
    """Forward and backward, per sample. bfloat16 is autocast over float32 weights, as in training."""
    device, ours, plain = models.ours.device.type, models.ours.train(), models.plain.train()
    batch = make_batch(size, ours.config, device)

    def step(losses, *networks, pool_padding: bool = True) -> None:
        ours.config.pool_padding = pool_padding
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = losses(*networks, batch)
        loss.backward()
        for network in networks:
            network.zero_grad()

    cases = {
        OURS: lambda: step(our_losses, ours, pool_padding=False),
        "padded": lambda: step(our_losses, ours),
        PLAIN: lambda: step(plain_losses, plain, models.ara_stack),
    }
    each = {name: case.each(size) for name, case in measure(cases, device, bar).items()}
    return {
        "training, ms per sample, pool_padding=False": {name: each[name] for name in (OURS, PLAIN)},
        "training, ms per sample, pool_padding=True": {OURS: each["padded"], PLAIN: each[PLAIN]},
    }


def compare_precisions(folder: Path) -> list[str]:
    """How many queries of the demo's test find the same images first in bfloat16 as in float32, with K = 32."""
    model = CADAForTextToImageRetrieval.from_pretrained(folder / "model").eval()
    processor = CADAProcessor.from_pretrained(folder / "model")
    rows = load_from_disk(folder / "drawn")["test"]
    gallery = encode_gallery(model, processor, rows)
    queries = encode_queries(model, processor, [caption for row in rows["captions"] for caption in row])
    similarity, exact = score_gallery(model, queries, gallery, 32, progress=True)
    candidates = top_candidates(similarity, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read_once = match_candidates(model, queries, gallery, candidates, progress=True)
        half = score_gallery(model, queries, gallery, 32, progress=True)[1]
    alone = rerank_scores(similarity, candidates, read_once)
    read_again = (half.gather(1, candidates) != alone.gather(1, candidates)).double().mean()
    lines = [
        f"Half precision on the demo's model: {len(exact)} queries, {len(gallery.embeds)} images, K = 32. "
        f"Candidates in doubt, {read_again:.1%} of them, are read again in float32.",
        "",
        "| the same images as in float32 among the first | 1 | 5 | 10 |",
        "|---|---:|---:|---:|",
    ]
    for name, scores in {"bfloat16 alone": alone, "bfloat16 as it is used": half}.items():
        cells = []
        for rank in (1, 5, 10):
            first, other = (values.topk(rank).indices.sort(dim=1).values for values in (exact, scores))
            cells.append(f"{(first == other).all(dim=1).double().mean():.2%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table_of_tasks(results: dict[str, dict[str, dict[str, Case]]]) -> list[str]:
    """Lines of the report, from cases by precision and task."""
    lines = [
        f"| | precision | {OURS} | {PLAIN} | {BLIP} | times (a) | times (b) | GFLOP | GFLOP of (a) | times (a) |",
        "|---|---|" + "---:|" * 8,
    ]
    for task in results["float32"]:
        for precision, tasks in results.items():
            ours, plain, blip = (tasks[task].get(name) for name in (OURS, PLAIN, BLIP))
            cells = [f"{1e3 * case.seconds:.4g}" if case else "–" for case in (ours, plain, blip)]
            cells += [f"{case.seconds / ours.seconds:.2f}" if case else "–" for case in (plain, blip)]
            cells += [f"{ours.operations:.1f}", f"{plain.operations:.1f}", f"{plain.operations / ours.operations:.2f}"]
            lines.append(f"| {task} | {precision} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--demo", type=Path, help="folder of results of `cada demo`")
    options = parser.parse_args()
    started, on_cpu = time.monotonic(), options.device == "cpu"
    half = not on_cpu or cpu_has_bfloat16()
    precisions = {"float32": torch.float32, **({"bfloat16": torch.bfloat16} if half else {})}
    models, sizes = make_models(options.device), ON_A_GPU
    if on_cpu:
        image = torch.randn(1, 3, 224, 224)
        with torch.inference_mode():
            first = [seconds_of(lambda: models.ours.get_image_features(image), "cpu") for _ in range(4)]
        sizes = sizes_for_cpu(statistics.median(first[1:]), len(precisions))
    results = {}
    with tqdm(total=len(precisions) * 12 * (1 + TURNS), unit="measurement") as bar:
        for name, dtype in precisions.items():
            results[name] = measure_inference(models, dtype, sizes, bar)
            results[name] |= measure_training(models, dtype, sizes.batch, bar)
    lines = [
        f"# Speed: {options.device}",
        "",
        f"Base size (ViT-B/16, 224×224, 12 text layers), captions of 28 tokens on average. Median of {TURNS} turns. "
        "GFLOP: additions and multiplications of matrix products.",
        f"Re-ranking: {sizes.texts} queries, K = {sizes.k}, {sizes.images} images.",
        f"Training: forward and backward of a batch of {sizes.batch}.",
        *([] if half else ["bfloat16 is left out: this processor has no instructions for it."]),
        "",
        *table_of_tasks(results),
    ]
    if options.demo is not None and half:
        lines += ["", *compare_precisions(options.demo)]
    lines += ["", f"All of it took {(time.monotonic() - started) / 60:.1f} minutes.", ""]
    lines += footer(" ".join(["python benchmarks/speed.py", *sys.argv[1:]]))
    report = ROOT / "benchmarks" / f"speed_{options.device}.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
