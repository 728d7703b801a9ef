"""
The demo: train a small CADA on drawn pedestrians, evaluate it on persons never seen, search with three sentences.

    cada demo

Needs no download and no accelerator. Training goes through the same command as on a real set. What differs, because
the weights are random and the time is short, stands in `RECIPE` and `build_start`, each with its reason.
"""

import shutil
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import BertTokenizer, set_seed

import train_cada
from cada.data.drawn import IMAGE_SIZE, ideal_scores, load_drawn
from cada.drawing import draw_results
from cada.evaluation.metrics import METRICS, retrieval_metrics
from cada.gallery.index import build_index, open_index
from cada.gallery.search import Result
from cada.hub.record import RANDOM_START, write_run
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor, clean_caption


# What is searched for at the end, and the attributes that each sentence names.
SENTENCES = {
    "A man in a red coat and blue shorts.": {
        "sex": "man",
        "upper_type": "coat",
        "upper_colour": "red",
        "lower_type": "shorts",
        "lower_colour": "blue",
    },
    "A woman wearing a black jacket and a skirt.": {
        "sex": "woman",
        "upper_type": "jacket",
        "upper_colour": "black",
        "lower_type": "skirt",
    },
    "A man wears black trousers, with a white t-shirt on top.": {
        "sex": "man",
        "upper_type": "t-shirt",
        "upper_colour": "white",
        "lower_type": "trousers",
        "lower_colour": "black",
    },
}
# The training: arguments of train_cada.py.
RECIPE = (
    *("--max_steps", "750", "--per_device_train_batch_size", "64"),
    # Muon reaches in 600 steps what AdamW needs 1,700 for. Without weight decay the persons of the training are
    # learned by heart. It is short: early steps at the full rate count, and AdamW's averages have to follow soon.
    *("--muon_learning_rate", "0.02", "--learning_rate", "2e-3", "--weight_decay", "0.1", "--adam_beta2", "0.98"),
    *("--warmup_steps", "10", "--lr_scheduler_type", "linear", "--max_grad_norm", "5"),
    # From random weights the hardest negatives teach nothing at first.
    *("--negative_sampling", "annealed"),
    *("--negative_temperature_start", "1.5", "--negative_temperature_end", "0.15"),
    # The last weights are the best, as the learning rate falls to zero: no evaluation before the test.
    *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    # Heads of 32 numbers and texts of 31 tokens: plain attention is faster here than the fused one.
    *("--logging_steps", "100", "--attn_implementation", "eager"),
)
MAX_TEXT_LENGTH = 35  # tokens; one caption in forty is longer and loses its last words
TOP = 8  # ranked images in the picture
SAVED_IMAGES = 12


def build_start(splits: DatasetDict, folder: Path, seed: int) -> None:
    """Save a small model with random weights and its processor. The tokenizer learns its words from the captions."""
    captions = [clean_caption(caption) for row in splits["train"]["captions"] for caption in row]
    tokenizer = BertTokenizer().train_new_from_iterator(captions, vocab_size=500, show_progress=False)
    tokenizer.model_max_length = MAX_TEXT_LENGTH
    height, width = IMAGE_SIZE
    # No crop and no erasing: drawings of 96×48 pixels are small, and there is a new person in every second one.
    image_processor = CADAImageProcessor(
        size={"height": height, "width": width}, crop_padding=0, erase_probability=0.0
    )
    processor = CADAProcessor(image_processor, tokenizer)
    tower = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        # A narrow network needs a wider spread of its random weights than the 0.02 of one that is 768 wide.
        "initializer_range": 0.05,
    }
    config = CADAConfig(
        vision_config={**tower, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 16},
        text_config={
            **tower,
            "vocab_size": len(processor.tokenizer),
            "enc_token_id": processor.enc_token_id,
            "max_position_embeddings": MAX_TEXT_LENGTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        projection_dim=128,
        max_text_length=MAX_TEXT_LENGTH,
        group_size=17,
        group_stride=17,
        # The decoder has to learn where to look. Masked attributes teach it, so they count more than the paper's 0.1
        # for a pre-trained decoder; and the contrastive loss has the form of the authors' code, which has a steeper
        # gradient far from the goal. With a larger weight, and with the paper's temperature of 0.02, whose gradients
        # are larger, ATP has too small a share, and local matching may stay below global matching.
        ara_weight=3.0,
        temperature=0.035,
        pool_padding=False,  # then a text is padded to the longest of its batch only
        contrastive_loss="ndf_reference",
    )
    set_seed(seed)
    model = CADAForTextToImageRetrieval(config)
    # Where a colour is matters here from the first step on, so positions start as large as patches.
    torch.nn.init.normal_(model.cada.vision_model.embeddings.position_embedding, std=0.8)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_run(folder, RANDOM_START, None, [])


def train(splits: DatasetDict, folder: Path, seed: int) -> dict[str, float]:
    """Train with the training command. Returns the scores on the test split."""
    splits.save_to_disk(folder / "drawn")
    build_start(splits, folder / "start", seed)
    return train_cada.main(
        [
            *("--dataset", str(folder / "drawn"), "--model_name_or_path", str(folder / "start")),
            *("--output_dir", str(folder / "model"), "--seed", str(seed), "--do_train", "--do_predict"),
            *RECIPE,
        ]
    )


def compare(split: Dataset, scores: dict[str, float]) -> str:
    """The table: both matchings between chance and ceiling. Equal scores of the latter two are ranked by chance."""
    person_ids = np.array(split["person_id"])
    query_ids = np.repeat(person_ids, [len(captions) for captions in split["captions"]])
    rng = np.random.default_rng(0)

    def by_chance(known: np.ndarray) -> dict[str, float]:
        draws = [retrieval_metrics(known + rng.random(known.shape) / 2, query_ids, person_ids) for _ in range(10)]
        return {name: sum(draw[name] for draw in draws) / len(draws) for name in METRICS}

    ideal = ideal_scores(split)
    rows = {
        "chance": by_chance(np.zeros(ideal.shape)),
        "global matching": {name: scores[f"test_global_{name}"] for name in METRICS},
        f"local matching (K = {scores['test_rerank_k']})": {name: scores[f"test_local_{name}"] for name in METRICS},
        "ceiling": by_chance(ideal),
    }
    lines = [f"| {'test':24} | Rank-1 | Rank-5 | Rank-10 |    mAP |   mINP |", f"|{'-' * 26}|{('-' * 7 + ':|') * 5}"]
    for title, row in rows.items():
        cells = " | ".join(f"{row[name]:{7 if name == 'R10' else 6}.1f}" for name in METRICS)
        lines.append(f"| {title:24} | {cells} |")
    return "\n".join(lines)


def search(folder: Path) -> None:
    """Index the test split with the trained model, search it with each sentence, draw the ranked images."""
    build_index(folder / "drawn", folder / "index", str(folder / "model"), split="test")
    gallery = open_index(folder / "index")
    rankings = dict(zip(SENTENCES, gallery.search(list(SENTENCES), top=TOP)))
    draw_results(gallery, rankings, caption=what_is_wrong).save(folder / "results.png")


def what_is_wrong(sentence: str, rank: int, result: Result) -> tuple[str, str]:
    """The text below an image and its colour: how many attributes of the sentence it shows, and what it shows else."""
    named = SENTENCES[sentence]
    shown = {name: result.metadata[f"attributes.{name}"] for name in named}
    wrong = [shown[name] for name, value in named.items() if shown[name] != value]
    text = f"{rank}.  {len(named) - len(wrong)}/{len(named)} right"
    return (f"{text}\nbut {', '.join(wrong)}", "#57606a") if wrong else (text, "#1a7f37")


def save_images(split: Dataset, folder: Path) -> None:
    """One image of each of the first persons as a file, for one's own trials."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    first_rows = {person_id: row for row, person_id in reversed(list(enumerate(split["person_id"])))}
    for number, row in enumerate(sorted(first_rows.values())[:SAVED_IMAGES], start=1):
        split[row]["image"].save(folder / f"person_{number:02}.png")


def run_demo(folder: Path, seed: int = 0) -> None:
    """The whole demo, with all results in `folder`; `seed` is of the drawn persons and of the model."""
    started = time.monotonic()
    for name in ("drawn", "start", "model", "index"):  # of an earlier run
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    print(
        "The demo takes three to six minutes on two CPU cores; beside other work, longer: its bar tells."
        "\nDrawing pedestrians",
        flush=True,
    )
    splits = load_drawn(seed=seed)
    disable_progress_bars()  # of saving tables, which takes no time
    scores = train(splits, folder, seed)
    table = compare(splits["test"], scores)
    search(folder)
    save_images(splits["test"], folder / "images")

    counts = {split: len(set(rows["person_id"])) for split, rows in splits.items()}
    print(
        f"\n{counts['train']} persons for training. Test: {scores['test_queries']} sentences search "
        f"{scores['test_gallery']} images of {counts['test']} persons never seen.\n\n{table}\n\n"
        f"The three searches: {folder / 'results.png'}\nModel and processor: {folder / 'model'}\n"
        f"Index of the test images: {folder / 'index'}\n"
        f"Images to try it with: {folder / 'images'}\n"
        f"Time: {(time.monotonic() - started) / 60:.1f} minutes."
    )
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
