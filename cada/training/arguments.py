"""The arguments of train_cada.py: the model, the data, and `TrainingArguments` with the paper's recipe as defaults."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from cada.data.pedes import PEDES_SETS
from cada.evaluation.encoding import RERANK_MEMORY
from cada.evaluation.metrics import METRICS
from cada.files import CADAError, one_line, parse_json, read_json
from cada.hub.convert import SOURCES
from configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig


# What numbers may be at least, where `TrainingArguments` takes any.
AT_LEAST_1 = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    "dataloader_prefetch_factor",
)
AT_LEAST_0 = (
    *("seed", "data_seed", "dataloader_num_workers", "num_train_epochs", "learning_rate", "muon_learning_rate"),
    *("weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "logging_steps", "eval_steps", "save_steps"),
)
# Arguments of `TrainingArguments` that are of language models, or would change the training unseen; their defaults.
NO_PLACE = {
    "auto_find_batch_size": False,
    "bf16_full_eval": False,
    "debug": "",
    "enable_jit_checkpoint": False,  # SIGTERM saves a checkpoint as it is
    "fp16_full_eval": False,
    "hub_always_push": False,
    "hub_strategy": "end",  # all others push optimizer states
    "ignore_data_skip": False,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "train_sampling_strategy": "random",
    "use_liger_kernel": False,
}
SCORES = [f"{stage}_{metric}" for stage in ("local", "global") for metric in METRICS]


@dataclass
class ModelArguments:
    """What is trained or evaluated."""

    model_name_or_path: str | None = HfArg(
        default=None, help="Folder or Hub name of a CADA checkpoint to start from. Without it: random weights."
    )
    init_from: str | None = HfArg(
        default=None,
        help="BLIP or another foreign checkpoint to start from, converted as by `cada convert`: a folder or "
        "Hub name for --init_source blip, a file for the others.",
    )
    init_source: str | None = HfArg(
        default=None, help="Kind of --init_from; blip by default.", metadata={"choices": list(SOURCES)}
    )
    vocabulary_head: str | None = HfArg(
        default=None, help="With --init_source blip: the captioning BLIP whose vocabulary head ARA starts from."
    )
    tokenizer_name: str | None = HfArg(
        default=None,
        help="Tokenizer of a model with random or converted weights, folder or Hub name; by default "
        "bert-base-uncased.",
    )
    attn_implementation: str | None = HfArg(
        default=None, help="eager, sdpa (the default), flash_attention_2 (with pool_padding=False) or flex_attention."
    )
    model_revision: str | None = HfArg(
        default=None, help="Tag, branch or commit of --model_name_or_path or --init_from on the Hub."
    )
    lora_rank: int | None = HfArg(
        default=None,
        help="Train an adapter of this rank, such as 16, by LoRA (extra `peft`), and freeze the model. It wants a "
        "higher --learning_rate. By default all weights are trained.",
    )
    config_overrides: dict | str | None = HfArg(
        default=None,
        help="Fields of CADAConfig as JSON, or a JSON file: "
        '\'{"contrastive_loss": "cmpm", "vision_config": {"image_size": [384, 128]}}\'.',
    )

    def __post_init__(self):
        self.config_overrides = read_overrides(self.config_overrides)  # once: a file may be another one later
        if self.model_name_or_path is not None and self.init_from is not None:
            raise CADAError("Choose one start: --model_name_or_path or --init_from.")
        for name in ("init_source", "vocabulary_head"):
            if getattr(self, name) is not None and self.init_from is None:
                raise CADAError(f"--{name} goes with --init_from, which is not given.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise CADAError(f"--lora_rank is {self.lora_rank}. Give 1 or more, such as 16.")
        if self.tokenizer_name is not None and self.model_name_or_path is not None:
            raise CADAError("--model_name_or_path brings a tokenizer of its own: leave --tokenizer_name out.")
        self.tokenizer_name = self.tokenizer_name or "bert-base-uncased"
        self.init_source = self.init_source or "blip"


@dataclass
class DataArguments:
    """A data set; `dataset` and `data_dir` as in [`SeveralDataArguments`]."""

    dataset: str
    data_dir: str | None = None
    captions_per_image: int | None = HfArg(
        default=None, help="Use the first n captions of each image. The paper uses 2 on CUHK-PEDES; default: all."
    )
    holdout_persons: int = HfArg(
        default=200,
        help="For a set without validation split (ICFG-PEDES): persons taken from train to choose the "
        "checkpoint. 0 trains on all and keeps the last checkpoint. The test split never chooses.",
    )
    skip_unreadable: bool = HfArg(
        default=False, help="Decode every image first, leave out what cannot be read, count it and list it."
    )
    dataset_revision: str | None = HfArg(default=None, help="Tag, branch or commit of --dataset on the Hub.")
    streaming: bool = HfArg(
        default=False,
        help="Pre-train on the split `train` of any data set of images and captions, read file by file: a folder or "
        "name for `datasets.load_dataset`, or files (*.parquet, *.tar, *.jsonl).",
    )
    image_column: str = HfArg(default="image", help="With --streaming: images, or names of files in --data_dir.")
    caption_column: list[str] = HfArg(
        default_factory=lambda: ["caption"],
        help="With --streaming: texts or lists of texts, of which one is drawn each time. `json.caption` is a field.",
    )
    person_column: str | None = HfArg(
        default=None, help="With --streaming: persons. Without it every image is a person of its own."
    )
    shuffle_buffer: int = HfArg(default=10_000, help="With --streaming: rows that are shuffled at a time.")

    def __post_init__(self):
        of_streams = ("image_column", "caption_column", "person_column", "shuffle_buffer")
        for name in ("captions_per_image", "skip_unreadable") if self.streaming else of_streams:
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != (["caption"] if name == "caption_column" else default):
                raise ValueError(f"`{name}` {'has no place in a stream' if self.streaming else 'is for --streaming'}.")


@dataclass
class SeveralDataArguments(DataArguments):
    """The data set; for an evaluation, also several."""

    dataset: list[str] = HfArg(
        help=f"{', '.join(PEDES_SETS)}, demo or demo_night (drawn), a folder written by "
        "`save_to_disk`, or a name for `datasets.load_dataset`, with the columns image, captions, person_id. "
        "With --do_predict alone, also several."
    )
    data_dir: list[str] | None = HfArg(
        default=None,
        help="Folder with the authors' annotations and images, one for each --dataset ('' where it needs none); with "
        "--streaming, of the image files.",
    )

    def one_by_one(self) -> list[DataArguments]:
        """
        The arguments of each set.

        Raises:
            ValueError: where the folders are not as many, or two sets have the same name.
        """
        folders = self.data_dir or [""] * len(self.dataset)
        if len(folders) != len(self.dataset):
            raise ValueError(
                f"--data_dir names {len(folders)} folders for {len(self.dataset)} sets. Give '' for none."
            )
        names = [Path(name).name for name in self.dataset]
        if len(set(names)) < len(names):
            raise ValueError(f"--dataset: of {', '.join(names)} two have the same name. Evaluate them one by one.")
        others = {name: value for name, value in vars(self).items() if name not in ("dataset", "data_dir")}
        return [DataArguments(name, folder or None, **others) for name, folder in zip(self.dataset, folders)]


@dataclass
class CADATrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's recipe as defaults, and the negatives of ATP."""

    num_train_epochs: float = HfArg(default=40.0, help="Number of epochs.")
    per_device_train_batch_size: int = HfArg(default=96, help="Batch size per process.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Images encoded at once.")
    learning_rate: float = HfArg(default=1e-5, help="Highest learning rate.")
    weight_decay: float = HfArg(default=0.05, help="Weight decay of AdamW.")
    lr_scheduler_type: str = HfArg(default="cosine", help="Learning rate schedule.")
    dataloader_drop_last: bool = HfArg(
        default=True, help="Leave out the last batch of an epoch where it is smaller than the others."
    )
    logging_steps: float = HfArg(default=50, help="Steps between two lines of the log.")
    eval_strategy: str = HfArg(default="epoch", help="When to evaluate on validation.")
    save_strategy: str = HfArg(default="epoch", help="When to save a checkpoint.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept: the best and the last.")
    load_best_model_at_end: bool = HfArg(default=True, help="Keep the best checkpoint on validation.")
    metric_for_best_model: str | None = HfArg(default="local_R1", help="Validation score that chooses the checkpoint.")
    rerank_memory: float = HfArg(
        default=RERANK_MEMORY,
        help="GB that an evaluation may take for patch states and batches, whatever the gallery.",
    )
    dataloader_pin_memory: bool = HfArg(
        default_factory=torch.cuda.is_available, help="Pinned memory for copies to an accelerator."
    )
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Whether DDP looks for parameters without gradient; CADA has none."
    )
    remove_unused_columns: bool = HfArg(default=False, help="The collator needs all columns.")
    hub_strategy: str = HfArg(
        default="end", help="With --push_to_hub: push once, after the evaluation, with the model card."
    )
    hub_tag: str | None = HfArg(
        default=None, help="With --push_to_hub: name of this state, such as v1.0. The card pins it, else the commit."
    )
    hub_overwrite: bool = HfArg(
        default=False, help="With --push_to_hub: replace weights that the repository holds already."
    )
    muon_learning_rate: float | None = HfArg(
        default=None,
        help="Train the weight matrices of the layers by Muon with this highest learning rate, such as 0.02, "
        "and the rest by AdamW: faster from random weights. By default AdamW trains all.",
    )
    negative_sampling: Literal["hardest", "annealed"] = HfArg(
        default="hardest",
        help="Negatives of ATP: 'hardest' (the paper), or 'annealed', drawn with probability softmax(S / T), "
        "for training from random weights, where the hardest alone teach nothing.",
    )
    negative_temperature_start: float = HfArg(default=10.0, help="T at the first step of 'annealed'.")
    negative_temperature_end: float = HfArg(default=0.01, help="T at the last step of 'annealed'.")
    label_noise_robust: bool = HfArg(
        default=False,
        help="Pairs whose caption seems to describe another person count less. Each batch judges its own pairs.",
    )

    def __post_init__(self):
        for name in (*AT_LEAST_1, *AT_LEAST_0):
            value, least = getattr(self, name), int(name in AT_LEAST_1)
            if value is not None and not least <= value < math.inf:  # also where it is NaN
                raise ValueError(f"`{name}` is {value}. Give a number of {least} or more.")
        if self.do_train and (self.num_train_epochs == 0 or self.max_steps == 0):
            raise ValueError("`num_train_epochs` and `max_steps` of 0 train nothing. Leave out --do_train.")
        if (self.metric_for_best_model or SCORES[0]).removeprefix("eval_") not in SCORES:
            raise ValueError(f"`metric_for_best_model` is {self.metric_for_best_model!r}. Choose {', '.join(SCORES)}.")
        for name, default in NO_PLACE.items():
            if getattr(self, name) and getattr(self, name) != default:
                raise ValueError(f"`{name}` has no place in this training. Leave it out.")
        if self.load_best_model_at_end and "no" in (str(self.eval_strategy), str(self.save_strategy)):
            raise ValueError(
                "Without evaluations or without checkpoints none can be chosen: add --load_best_model_at_end false, "
                "which keeps the last weights."
            )
        if self.greater_is_better is False:
            raise ValueError("`greater_is_better` is False, but all scores are the better the higher. Leave it out.")
        super().__post_init__()
        if self.muon_learning_rate is not None and (not self.optim.startswith("adamw_torch") or self.optim_args):
            raise ValueError("`muon_learning_rate` trains by Muon and AdamW. Leave `optim` and `optim_args` out.")
        if self.negative_sampling not in ("hardest", "annealed"):
            raise ValueError(f"`negative_sampling` is {self.negative_sampling!r}. Choose 'hardest' or 'annealed'.")
        if not 0 < self.rerank_memory < math.inf:
            raise ValueError(f"`rerank_memory` is {self.rerank_memory}. Give the GB an evaluation may take.")
        if not math.inf > self.negative_temperature_start >= self.negative_temperature_end > 0:
            raise ValueError(
                f"`negative_temperature_start` ({self.negative_temperature_start}) has to be at least "
                f"`negative_temperature_end` ({self.negative_temperature_end}), both above 0 and finite."
            )


def read_overrides(given: dict | str | None) -> dict:
    """
    Fields of the configuration from a JSON string or the name of a JSON file.

    Raises:
        CADAError: where it is neither, or names a field that `CADAConfig` does not have.
    """
    overrides = given or {}
    if isinstance(given, str):
        shown = given if len(given) <= 100 else f"{given[:100]} ..."
        is_file = not given.lstrip().startswith("{")
        if is_file and not os.path.isfile(given):
            raise CADAError(f"--config_overrides {shown!r} is neither a JSON object nor a file.")
        try:
            overrides = read_json(given) if is_file else parse_json(given)
        except ValueError as error:
            raise CADAError(f"--config_overrides {shown!r} is not JSON: {error}") from error
    for name, kind in {"": CADAConfig, "vision_config": CADAVisionConfig, "text_config": CADATextConfig}.items():
        fields = overrides.get(name, {}) if name else overrides
        if not isinstance(fields, dict):
            raise CADAError(f"--config_overrides: `{name or given}` should be an object with fields of its own.")
        unknown = sorted(set(fields) - set(kind.__dataclass_fields__))
        if unknown:
            raise CADAError(f"--config_overrides: {kind.__name__} has no field {', '.join(unknown)}.")
    return overrides


def read_recipe(path: str, given: list[str]) -> list[str]:
    """
    The arguments of a recipe as they would stand on the command line. Those that are `null` are left out, and with
    `--model_name_or_path` among the `given` ones also the recipe's other start.
    """
    try:
        recipe = read_json(path)
    except CADAError as error:
        raise CADAError(f"The recipe: {error}") from error
    if not isinstance(recipe, dict):
        raise CADAError(f"The recipe {path} should be a JSON object of arguments.")
    arguments = []
    names = {word.split("=")[0].lstrip("-").replace("-", "_") for word in given}
    left_out = {"init_from", "init_source", "vocabulary_head"} if "model_name_or_path" in names else set()
    for name, value in recipe.items():
        if value is None or name in left_out:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return arguments


@contextmanager
def made_of_arguments(what: str) -> Iterator[None]:
    """Around the making of a part, from arguments whose mistakes show in the part alone."""
    try:
        yield
    except CADAError:
        raise
    except (ImportError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CADAError(f"{what} cannot be made of these arguments: {one_line(error)}") from error


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # in the form of all other errors
        raise CADAError(f"{message} (`python train_cada.py --help` lists all arguments.)")


def parse_arguments(
    arguments: list[str] | None, description: str | None = None
) -> tuple[ModelArguments, list[DataArguments], CADATrainingArguments]:
    """The words of a command line, by default of this process; the first may be a recipe, a JSON file of arguments."""
    parser = _Parser((ModelArguments, SeveralDataArguments, CADATrainingArguments), description=description)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].endswith(".json"):
        arguments = [*read_recipe(arguments[0], arguments[1:]), *arguments[1:]]  # the last of two equal ones counts
    try:
        if not parser.parse_known_args(arguments)[0].do_train:  # nothing is chosen, and `do_eval` stays as asked
            arguments += ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
        model, data, args = parser.parse_args_into_dataclasses(arguments)
        return model, data.one_by_one(), args
    except CADAError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:  # unknown arguments, wrong values
        raise CADAError(f"{error} (`python train_cada.py --help` lists all arguments.)") from error
