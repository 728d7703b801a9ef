"""
Time and memory against the authors' way and against BLIP of transformers, side by side, at base size.

    python benchmarks/speed.py
    python benchmarks/speed.py --demo demo    # and how far half precision changes the ranking of the demo's model

All three have random weights: the work does not depend on them. (a) is the authors' way on our weights, written here:
texts padded to 73, keys and values anew for every pair and pass, all positions of every layer, the vocabulary head
over all positions, a separate stack for ARA, plain attention, re-ranking one query at a time. (b) is
`BlipForImageTextRetrieval`. Writes `benchmarks/speed_DEVICE.md`.

With a GPU, the whole test of CUHK-PEDES is measured in its size: 3,074 images, 6,148 captions, K = 128. There (a) has
the patch states of all images on the GPU from the start, which is fast and takes 1.9 GB.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep

import argparse
import copy
import io
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

from configuration_cada import CADAConfig
from data_cada import PairCollator, PairDataset
from drawn_cada import load_drawn
from evaluation_cada import (
    Gallery,
    Queries,
    encode_gallery,
    encode_queries,
    match_candidates,
    rerank_scores,
    retrieval_metrics,
    score_gallery,
    top_candidates,
)
from losses_cada import atp_loss, draw_negatives, group_states, ndf_loss, positive_pairs
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor, clean_caption
from publish_cada import environment


ROOT = Path(__file__).resolve().parent.parent
PADDED = 73
OURS, PLAIN, BLIP = "this code", "(a) authors' way", "(b) BLIP of transformers"


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


def interleaved(cases: dict[str, Callable[[], object]], repeats: int, device: str, bar) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, so that a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, case in cases.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            case()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            bar.update()
    return {name: statistics.median(values) for name, values in seconds.items()}


def backward(loss: torch.Tensor, *models) -> None:
    """Gradients, and forget them."""
    loss.backward()
    for model in models:
        model.zero_grad()


def make_search(model, images: int, texts: int, k: int, device: str):
    """Queries, a gallery of random states, and K random candidates of each query."""
    config = model.config
    ids, mask = make_texts(texts, config.text_config.vocab_size)
    rows, columns = config.vision_config.grid_size
    states = torch.randn(images, 1 + rows * columns, config.vision_config.hidden_size, dtype=model.dtype)
    embeds = torch.randn(texts, 8), torch.randn(images, 8)
    candidates = top_candidates(embeds[0] @ embeds[1].t(), k)
    return Queries(embeds[0], ids, mask), Gallery(embeds[1], states), candidates


def operations_per_pair(config: CADAConfig, lengths: torch.Tensor, pairs_of_image: float) -> dict[str, float]:
    """Additions and multiplications of re-ranking in GFLOP per pair, of matrix products alone."""
    text, rows = config.text_config, config.vision_config.grid_size[0] * config.vision_config.grid_size[1] + 1
    width, layers = text.hidden_size, text.num_hidden_layers
    keys_and_values = 2 * rows * 2 * config.vision_config.hidden_size * width

    def attention(tokens: float, read: float) -> float:
        return 2 * tokens * 2 * read * width

    def own_part(tokens: float, read_tokens: float) -> float:  # self-attention of a layer
        return 2 * (2 * tokens + 2 * read_tokens) * width**2 + attention(read_tokens, tokens)

    def other_part(tokens: float) -> float:  # attention to the image, and the two layers behind
        return 2 * 2 * tokens * width**2 + attention(tokens, rows) + 2 * 2 * tokens * width * text.intermediate_size

    length = float(lengths.double().mean())
    plain = layers * (own_part(PADDED, PADDED) + other_part(PADDED) + keys_and_values)
    # Of the last layer e_cls alone is read.
    ours = (layers - 1) * (own_part(length, length) + other_part(length))
    ours += own_part(length, 1) + other_part(1) + layers * keys_and_values / pairs_of_image
    return {OURS: ours / 1e9, PLAIN: plain / 1e9}


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


def peak_of_evaluation(kind: str, images: int, texts: int, k: int, dtype: str) -> float:
    """Peak memory in GB that re-ranking adds to the loaded model, in a process of its own (Linux, CPU)."""

    def memory(field: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / 1e9

    model = make_model("eager" if kind == PLAIN else "sdpa").eval().to(getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far is that of building the model
    before = memory("VmRSS")
    queries, gallery, candidates = make_search(model, images, texts, k, "cpu")
    # A part of both: two queries, eight images. What comes after takes the memory that they have left.
    if kind == PLAIN:
        plain_rerank(model, queries.input_ids, queries.attention_mask, gallery.states, candidates[:2])
    else:
        match_candidates(model, queries, gallery, candidates, chosen=candidates < 8)
    return memory("VmHWM") - before


def measure(device: str, dtype: torch.dtype, sizes: dict, repeats: int, bar) -> dict[str, dict[str, float]]:
    """Seconds per pair, sample, image and text for the three."""
    with torch.device(device):
        model, plain = make_model().eval().to(dtype), make_model("eager").eval().to(dtype)
        blip = BlipForImageTextRetrieval(BlipConfig(image_text_hidden_size=256)).eval().to(dtype)
    results = {}
    queries, gallery, candidates = make_search(model, sizes["images"], sizes["texts"], sizes["k"], device)
    moved = [
        queries.input_ids.to(device),
        queries.attention_mask.to(device),
        gallery.states.to(device),
        candidates.to(device),
    ]
    seconds = interleaved(
        {
            OURS: lambda: match_candidates(model, queries, gallery, candidates),
            PLAIN: lambda: plain_rerank(plain, *moved),
            BLIP: lambda: blip_rerank(blip, *moved),
        },
        repeats,
        device,
        bar,
    )
    results["re-ranking, ms per pair"] = {name: 1e3 * value / candidates.numel() for name, value in seconds.items()}

    pixels = torch.randn(sizes["images"], 3, 224, 224, device=device, dtype=dtype)
    with torch.inference_mode():
        seconds = interleaved(
            {
                OURS: lambda: model.get_image_features(pixels),
                PLAIN: lambda: plain.get_image_features(pixels),
                BLIP: lambda: blip.vision_model(pixels),
            },
            repeats,
            device,
            bar,
        )
        results["image encoding, ms per image"] = {name: 1e3 * value / len(pixels) for name, value in seconds.items()}
        longest = int(queries.attention_mask.sum(dim=1).max())
        seconds = interleaved(
            {
                OURS: lambda: encode_texts(model, *moved[:2]),
                PLAIN: lambda: plain.get_text_features(*moved[:2]),
                BLIP: lambda: blip.text_encoder(input_ids=moved[0][:, :longest], attention_mask=moved[1][:, :longest]),
            },
            repeats,
            device,
            bar,
        )
        results["text encoding, ms per text"] = {name: 1e3 * value / len(moved[0]) for name, value in seconds.items()}
    return results


def encode_texts(model, input_ids, attention_mask) -> None:
    """As `encode_queries` does: in batches of similar length."""
    lengths = attention_mask.sum(dim=1)
    for rows in lengths.argsort().split(32):
        cut = slice(int(lengths[rows].max()))
        model.get_text_features(input_ids[rows, cut], attention_mask[rows, cut])


def measure_training(device: str, dtype: torch.dtype, size: int, repeats: int, bar) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward per sample. bfloat16 is autocast over float32 weights, as in training."""
    with torch.device(device):
        padded, own_length, plain = make_model(), make_model(pool_padding=False), make_model("eager")
        ara_stack = copy.deepcopy(plain.cada.text_model)
    batch = make_batch(size, padded.config, device)
    mixed = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)

    def step(losses, *models):
        with mixed:
            loss = losses(*models, batch)
        backward(loss, *models)

    seconds = interleaved(
        {
            OURS: lambda: step(our_losses, own_length),
            "padded": lambda: step(our_losses, padded),
            PLAIN: lambda: step(plain_losses, plain, ara_stack),
        },
        repeats,
        device,
        bar,
    )
    per_sample = {name: 1e3 * value / size for name, value in seconds.items()}
    return {
        "training, ms per sample, pool_padding=False": {name: per_sample[name] for name in (OURS, PLAIN)},
        "training, ms per sample, pool_padding=True": {OURS: per_sample["padded"], PLAIN: per_sample[PLAIN]},
    }


@torch.no_grad()
def operations_per_sample(size: int, bar) -> dict[str, float]:
    """GFLOP per sample of a training step, of matrix products: of a forward pass, three times."""
    padded, own_length = make_model("eager"), make_model("eager", pool_padding=False)
    batch = make_batch(size, padded.config, "cpu")
    cases = {
        OURS: lambda: our_losses(own_length, batch),
        "padded": lambda: our_losses(padded, batch),
        PLAIN: lambda: plain_losses(padded, copy.deepcopy(padded.cada.text_model), batch),
    }
    operations = {}
    for name, case in cases.items():
        with FlopCounterMode(display=False) as counter:
            case()
        operations[name] = 3 * counter.get_total_flops() / size / 1e9
        bar.update()
    return operations


READ_AGAIN = 0.08  # share of pairs that bfloat16 leaves in doubt: that of the demo's model. Random weights have none


def make_test(images: int) -> tuple[Dataset, CADAProcessor]:
    """A test split as CUHK-PEDES' own, of drawn persons: JPEG files of 100×250 pixels, two captions."""
    rows = load_drawn(8, 8, 64, 1)["test"]
    words = sorted({word for row in rows["captions"] for caption in row for word in clean_caption(caption).split()})
    tokenizer = BertTokenizer().train_new_from_iterator(words * 4, vocab_size=2000, show_progress=False)
    tokenizer.model_max_length = PADDED
    words = [word for word in words if len(tokenizer.tokenize(word)) == 1]
    files = []
    for image in rows["image"]:
        files.append(io.BytesIO())
        image.resize((100, 250)).save(files[-1], "JPEG", quality=90)
    lengths = make_texts(2 * images, 30_000)[1].sum(dim=1) - 2  # without [CLS] and [SEP]
    generator = torch.Generator().manual_seed(2)
    captions = [
        " ".join(words[number] for number in torch.randint(len(words), (length,), generator=generator))
        for length in lengths.tolist()
    ]
    columns = {
        "image": [{"bytes": files[number % len(files)].getvalue(), "path": None} for number in range(images)],
        "captions": [captions[2 * number : 2 * number + 2] for number in range(images)],
        "person_id": [number // 3 for number in range(images)],
    }
    features = Features({"image": Image(), "captions": List(Value("string")), "person_id": Value("int64")})
    return Dataset.from_dict(columns, features), CADAProcessor(CADAImageProcessor(), tokenizer)


def measure_test(device: str, dtype: torch.dtype, images: int, k: int, bar) -> tuple[dict, dict]:
    """
    Seconds of a whole test, from the files to the metrics, and GB that it takes on a GPU. (a) re-ranks a part of the
    queries. As with `--bf16`, encoding is in float32. Candidates are drawn, so that nearly every image is one.
    """
    rows, processor = make_test(images)
    captions = [caption for row in rows["captions"] for caption in row]
    with torch.device(device):
        model, plain = make_model().eval(), make_model("eager").eval()
    workers = 0 if device == "cpu" else 8
    mixed = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    generator = torch.Generator().manual_seed(3)
    candidates = torch.rand(len(captions), images, generator=generator).argsort(dim=1)[:, :k]
    again = torch.rand(candidates.shape, generator=generator) < READ_AGAIN

    def ours() -> None:
        gallery = encode_gallery(model, processor, rows, num_workers=workers, progress=False)
        queries = encode_queries(model, processor, captions, progress=False)
        with mixed:
            local = match_candidates(model, queries, gallery, candidates)
        if dtype != torch.float32:
            local = torch.where(again, match_candidates(model, queries, gallery, candidates, chosen=again), local)
        score(queries, gallery, local)

    def score(queries, gallery, local) -> None:
        persons = torch.tensor(rows["person_id"])
        similarity = queries.embeds @ gallery.embeds.t()
        retrieval_metrics(similarity, persons.repeat_interleave(2), persons)
        scores = rerank_scores(similarity, candidates, local)
        retrieval_metrics(scores, persons.repeat_interleave(2), persons)

    def authors() -> float:
        started = time.perf_counter()
        gallery = encode_gallery(plain, processor, rows, num_workers=workers, progress=False)
        inputs = processor(text=captions, return_tensors="pt", padding="max_length", max_length=PADDED)
        ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        with torch.inference_mode():
            embeds = [plain.get_text_features(*part).pooler_output for part in zip(ids.split(256), mask.split(256))]
        queries = Queries(F.normalize(torch.cat(embeds), dim=-1).cpu(), inputs["input_ids"], inputs["attention_mask"])
        states, measured = gallery.states.to(device), max(4, len(captions) // 100)
        encoded = time.perf_counter() - started
        with mixed:  # the first query warms up
            plain_rerank(plain, ids, mask, states, candidates[:1].to(device)).cpu()
            matching = time.perf_counter()
            local = plain_rerank(plain, ids, mask, states, candidates[:measured].to(device)).cpu()
        matched = time.perf_counter()
        score(queries, gallery, local.mean() * torch.ones(candidates.shape))
        return encoded + (matched - matching) / measured * len(captions) + time.perf_counter() - matched

    seconds, peaks = {}, {}
    for name, case in {OURS: ours, PLAIN: authors}.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        estimated = case()
        seconds[name] = time.perf_counter() - started if estimated is None else estimated
        if device == "cuda":
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
        bar.update()
    return seconds, peaks


def table_of_tests(tests: dict[str, tuple[dict, dict]], images: int, k: int) -> list[str]:
    """Lines of the report about [`measure_test`], by precision."""
    length = make_texts(2 * images, 30_000)[1].sum(dim=1).double().mean()
    lines = [
        f"A whole test, once: {images:,} images of 100×250 pixels (JPEG files), {2 * images:,} captions of "
        f"{length:.0f} tokens, K = {k}; from the files to the metrics. In bfloat16 {READ_AGAIN:.0%} of the pairs are "
        "read again in float32. (a) re-ranks "
        f"{max(4, 2 * images // 100)} queries, scaled to all.",
        "",
        f"| precision | {OURS}, s | {PLAIN}, s | times (a) | times (a) in float32 | GPU memory, GB | {PLAIN}, GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = tests["float32"][0][PLAIN]
    for name, (seconds, peaks) in tests.items():
        figures = (*seconds.values(), seconds[PLAIN] / seconds[OURS], first / seconds[OURS], *peaks.values())
        cells = [f"{value:.1f}" for value in figures] + ["–"] * (2 - len(peaks))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


PHOTOGRAPHS = {"as in CUHK-PEDES": (100, 250), "as in MSMT17": (300, 700), "a photograph": (1200, 2800)}


def measure_data(folder: Path, images: int, bar) -> list[str]:
    """
    Lines of a table: images per second of one worker, for JPEG files of several sizes; once decoded in full, once as
    small as [`open_image`] allows, and as whole training samples (decoded so, augmented, tokenized, masked).
    """
    rows = load_drawn(8, 8, images, 1)["test"]
    captions = [clean_caption(caption) for row in rows["captions"] for caption in row]
    tokenizer = BertTokenizer().train_new_from_iterator(captions, vocab_size=500, show_progress=False)
    tokenizer.model_max_length = PADDED
    processor = CADAProcessor(CADAImageProcessor(), tokenizer)
    lines = []
    for name, (width, height) in PHOTOGRAPHS.items():
        files = []
        for number, row in enumerate(rows):
            files.append(str(folder / f"{width}_{number}.jpg"))
            row["image"].resize((width, height)).save(files[-1], quality=90)
        photographs = rows.remove_columns("image").add_column("image", files).cast_column("image", Image())
        whole, reduced = PairDataset(photographs), PairDataset(photographs, (224, 224))
        seconds = interleaved(
            {
                "whole": lambda whole=whole: [whole[2 * row]["image"] for row in range(images)],
                "reduced": lambda reduced=reduced: [reduced[2 * row]["image"] for row in range(images)],
                "sample": lambda pairs=reduced: PairCollator(processor)([pairs[2 * row] for row in range(images)]),
            },
            3,
            "cpu",
            bar,
        )
        rates = " | ".join(f"{images / value:.0f}" for value in seconds.values())
        lines.append(f"| {width}×{height} ({name}) | {rates} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--demo", type=Path, help="folder of results of demo_cada.py")
    options = parser.parse_args()
    small = options.device == "cpu"
    # A CUHK-PEDES test with K = 32 has 64 pairs per image; here 16 on a CPU, which is to our disadvantage.
    sizes = {"images": 8, "texts": 16, "k": 8} if small else {"images": 256, "texts": 512, "k": 32}
    # Of fewer pairs what a step costs anyway is too much of it: weights cast to bfloat16, gradients of the vocabulary.
    batch = 8 if small else 32
    test = (8, 8) if small else (3074, 128)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    results: dict[str, dict[str, dict[str, float]]] = {}
    tests: dict[str, tuple[dict, dict]] = {}
    turns = options.repeats + 1
    total = len(kinds) * (turns * 12 + 2) + 4 * 9 + 3
    with tqdm(total=total, unit="measurement") as bar, TemporaryDirectory() as folder:
        data = measure_data(Path(folder), 64, bar)
        for name, dtype in kinds.items():
            results[name] = measure(options.device, dtype, sizes, options.repeats, bar)
            results[name].update(measure_training(options.device, dtype, batch, options.repeats, bar))
            tests[name] = measure_test(options.device, dtype, *test, bar)
        training = operations_per_sample(8, bar)
    lengths = make_texts(sizes["texts"], CADAConfig().text_config.vocab_size)[1].sum(dim=1)
    operations = operations_per_pair(CADAConfig(), lengths, sizes["texts"] * sizes["k"] / sizes["images"])
    where = environment()
    lines = [
        f"# Speed: {options.device}",
        "",
        "Base size (ViT-B/16, 224×224, 12 text layers), captions of 28 tokens on average. "
        f"Median of {options.repeats} turns.",
        f"Re-ranking: {sizes['texts']} queries, K = {sizes['k']}, {sizes['images']} images.",
        f"Training: forward and backward of a batch of {batch}.",
        "",
        f"| | precision | {OURS} | {PLAIN} | {BLIP} | times (a) | times (a) in float32 | times (b) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task in results["float32"]:
        for name in kinds:
            row, first = results[name][task], results["float32"][task][PLAIN]
            other = row.get(BLIP)
            cells = [f"{row[OURS]:.1f}", f"{row[PLAIN]:.1f}", f"{other:.1f}" if other else "–"]
            ratios = [row[PLAIN] / row[OURS], first / row[OURS], other / row[OURS] if other else None]
            cells += [f"{ratio:.2f}" if ratio else "–" for ratio in ratios]
            lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Matrix products of re-ranking, GFLOP per pair: {operations[OURS]:.1f} here, {operations[PLAIN]:.1f} the "
        f"authors' way, {operations[PLAIN] / operations[OURS]:.2f} times as many.",
        f"Of training, GFLOP per sample: {training[OURS]:.0f} here, {training['padded']:.0f} with padding, "
        f"{training[PLAIN]:.0f} the authors' way, {training[PLAIN] / training[OURS]:.2f} and "
        f"{training[PLAIN] / training['padded']:.2f} times as many.",
        "",
        *table_of_tests(tests, *test),
    ]
    if options.demo is not None:
        lines += ["", *compare_precisions(options.demo)]
    if small:
        lines += [
            "",
            "Peak memory that re-ranking 64 texts, K = 32, among 32 images adds to the loaded model (GB), from the "
            "pairs of the first 8 images here, of the first 2 texts in (a):",
            "",
        ]
        # Large tensors are given back at once: what a peak is does not depend on gaps between them.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"
        lines += [f"| precision | {OURS} | {PLAIN} |", "|---|---:|---:|"]
        context = multiprocessing.get_context("spawn")
        for name in kinds:
            peaks = []
            for kind in (OURS, PLAIN):
                with context.Pool(1) as pool:
                    peaks.append(f"{pool.apply(peak_of_evaluation, (kind, 32, 64, 32, name)):.3f}")
            lines.append(f"| {name} | {' | '.join(peaks)} |")
    lines += [
        "",
        "Data: images per second of one data loader worker, of JPEG files, for images of 224×224.",
        "",
        "| width×height | decoded whole | decoded at reduced size | training samples |",
        "|---|---:|---:|---:|",
        *data,
        "",
        f"- Command: `python benchmarks/speed.py --repeats {options.repeats}"
        f"{'' if options.demo is None else ' --demo demo'}`",
        f"- Date: {where['date']}",
        f"- Machine: {where['hardware']}",
        f"- Versions: {', '.join(f'{package} {version}' for package, version in where['versions'].items())}",
        "",
    ]
    report = ROOT / "benchmarks" / f"speed_{options.device}.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
