"""
Train and evaluate CADA on a PEDES set, on the drawn set, or on any data set with the same columns.

    python train_cada.py --dataset cuhk_pedes --data_dir /data/CUHK-PEDES --model_name_or_path my-start \\
        --output_dir runs/cuhk --do_train --do_predict
    python train_cada.py recipes/cuhk_pedes.json --data_dir /data/CUHK-PEDES

The defaults are the paper's recipe. Several processes: `accelerate launch train_cada.py ...` with the same arguments;
the batch size is then per process, and the paper's 96 is the product of both.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.image_utils import SizeDict
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints, speed_metrics
from transformers.utils import logging

from checkpoint_cada import check_processor, load_config, load_model, load_processor, load_tokenizer
from configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig
from convert_cada import (
    SOURCES,
    convert,
    convert_processor,
    default_image_size,
    describe_origin,
    resize_positions,
)
from data_cada import (
    PEDES_SETS,
    DataError,
    GlobalBatches,
    PairCollator,
    PairDataset,
    add_attribute_spans,
    hold_out_persons,
    load_pairs_dataset,
    shared_persons,
)
from evaluation_cada import METRICS, RERANK_MEMORY, evaluate_retrieval
from files_cada import (
    CADAError,
    FileError,
    make_output_folder,
    one_line,
    parse_json,
    read_json,
    remove_folder,
    replace_folder,
    report_argument,
    run_command,
)
from losses_cada import rank_and_size
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor
from publish_cada import (
    RANDOM_START,
    RUN_FILE,
    after_training,
    check_licence,
    environment,
    model_digest,
    open_repository,
    publish,
    read_run,
    read_start,
    write_run,
)
from resume_cada import RECIPE_FILE, SaveOnSigterm, best_checkpoint, find_checkpoint, recipe_of


logger = logging.get_logger(__name__)

LOSS_PARTS = ("loss_ndf", "loss_atp", "loss_ara")
STEPS = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")
# Arguments of `TrainingArguments` that this training has no use for, with their defaults.
OF_LANGUAGE_MODELS = {
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "train_sampling_strategy": "random",
    "use_liger_kernel": False,
}
UNFINISHED = ".unfinished"  # folder of the checkpoint that is being written, beside the others


class TrainingError(CADAError):
    """Training cannot go on. The message says where it stands and what to do."""


class ArgumentError(CADAError):
    """Arguments that do not go together. The message names them and the remedy."""


@dataclass
class ModelArguments:
    """What is trained or evaluated."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a CADA checkpoint to start from. Without it: random weights."},
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "BLIP or another foreign checkpoint to start from, converted as by convert_cada.py: a folder or "
            "Hub name for --init_source blip, a file for the others."
        },
    )
    init_source: str = field(default="blip", metadata={"help": "Kind of --init_from.", "choices": list(SOURCES)})
    vocabulary_head: str | None = field(
        default=None,
        metadata={"help": "With --init_source blip: the captioning BLIP whose vocabulary head ARA starts from."},
    )
    tokenizer_name: str = field(
        default="bert-base-uncased",
        metadata={"help": "Tokenizer of a model with random or converted weights: folder or Hub name."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa (the default), flash_attention_2 (with pool_padding=False) or flex_attention."},
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Tag, branch or commit of --model_name_or_path or --init_from on the Hub."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields of CADAConfig as JSON, or a JSON file: "
            '\'{"contrastive_loss": "cmpm", "vision_config": {"image_size": [384, 128]}}\'.'
        },
    )


@dataclass
class DataArguments:
    """The data set."""

    dataset: str = field(
        metadata={
            "help": "cuhk_pedes, icfg_pedes, rstp_reid, demo or demo_night (drawn), a folder written by "
            "`save_to_disk`, or a name for `datasets.load_dataset`, with the columns image, captions, person_id."
        }
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the authors' annotations and imgs/."})
    captions_per_image: int | None = field(
        default=None,
        metadata={"help": "Use the first n captions of each image. The paper uses 2 on CUHK-PEDES; default: all."},
    )
    holdout_persons: int = field(
        default=200,
        metadata={
            "help": "For a set without validation split (ICFG-PEDES): persons taken from train to choose the "
            "checkpoint. 0 trains on all and keeps the last checkpoint. The test split never chooses."
        },
    )
    skip_unreadable: bool = field(
        default=False,
        metadata={"help": "Decode every image first, leave out what cannot be read, count it and list it."},
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Tag, branch or commit of --dataset on the Hub."}
    )


@dataclass
class CADATrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's recipe as defaults, and the negatives of ATP."""

    num_train_epochs: float = field(default=40.0, metadata={"help": "Number of epochs."})
    per_device_train_batch_size: int = field(default=96, metadata={"help": "Batch size per process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images encoded at once."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last batch of an epoch where it is smaller than the others."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate on validation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the best and the last."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint on validation."})
    metric_for_best_model: str | None = field(
        default="local_R1", metadata={"help": "Validation score that chooses the checkpoint."}
    )
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs whose activations are in memory at once. A batch of 96 fits a small device so, at the "
            "price of a second forward pass; losses, negatives and gradients stay those of the whole batch. "
            "Default: all."
        },
    )
    rerank_memory: float = field(
        default=RERANK_MEMORY,
        metadata={"help": "GB that an evaluation may take for patch states and batches, whatever the gallery."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pinned memory for copies to an accelerator."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without gradient; CADA has none."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs all columns."})
    hub_strategy: str = field(
        default="end", metadata={"help": "With --push_to_hub: push once, after the evaluation, with the model card."}
    )
    hub_tag: str | None = field(
        default=None,
        metadata={"help": "With --push_to_hub: name of this state, such as v1.0. The card pins it, else the commit."},
    )
    hub_overwrite: bool = field(
        default=False, metadata={"help": "With --push_to_hub: replace weights that the repository holds already."}
    )
    negative_sampling: str = field(
        default="hardest",
        metadata={
            "help": "Negatives of ATP: 'hardest' (the paper), or 'annealed', drawn with probability softmax(S / T), "
            "for training from random weights, where the hardest alone teach nothing.",
            "choices": ["hardest", "annealed"],
        },
    )
    negative_temperature_start: float = field(default=10.0, metadata={"help": "T at the first step of 'annealed'."})
    negative_temperature_end: float = field(default=0.01, metadata={"help": "T at the last step of 'annealed'."})

    def __post_init__(self):
        least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        for name, lowest in {**least, "seed": 0, "data_seed": 0, "dataloader_num_workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"`{name}` is {value}. Give {lowest} or more.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", *STEPS):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # also where it is NaN
                raise ValueError(f"`{name}` is {value}. Give a number of 0 or more.")
        scores = [f"{stage}_{metric}" for stage in ("local", "global") for metric in METRICS]
        if (self.metric_for_best_model or "local_R1").removeprefix("eval_") not in scores:
            raise ValueError(f"`metric_for_best_model` is {self.metric_for_best_model!r}. Choose {', '.join(scores)}.")
        for name, default in OF_LANGUAGE_MODELS.items():
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` has no place in this training. Leave it out.")
        modes = list(torch._inductor.list_mode_options())
        if self.torch_compile_mode not in [None, *modes]:
            raise ValueError(f"`torch_compile_mode` is {self.torch_compile_mode!r}. Choose one of {', '.join(modes)}.")
        if not self.do_train:  # nothing is chosen, and `do_eval` stays as asked
            self.eval_strategy, self.load_best_model_at_end = "no", False
        super().__post_init__()
        if self.negative_sampling not in ("hardest", "annealed"):
            raise ValueError(f"`negative_sampling` is {self.negative_sampling!r}. Choose 'hardest' or 'annealed'.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"`chunk_size` is {self.chunk_size}. Give a number of pairs, or leave it out.")
        if not 0 < self.rerank_memory < math.inf:
            raise ValueError(f"`rerank_memory` is {self.rerank_memory}. Give the GB an evaluation may take.")
        if not self.negative_temperature_start >= self.negative_temperature_end > 0:
            raise ValueError(
                f"`negative_temperature_start` ({self.negative_temperature_start}) has to be at least "
                f"`negative_temperature_end` ({self.negative_temperature_end}), and both above 0."
            )


@contextmanager
def _made_of_arguments(what: str) -> Iterator[None]:
    """Around the making of a part, from arguments whose mistakes show in the part alone."""
    try:
        yield
    except (ImportError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(f"{what} cannot be made of these arguments: {one_line(error)}") from error


class EpochLoader(torch.utils.data.DataLoader):
    """A data loader that tells its batch sampler the epoch, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def whole_model(model: CADAForTextToImageRetrieval) -> CADAForTextToImageRetrieval:
    """
    The model itself, or where FSDP2 shares out its weights, a copy with all of them; to be called in all processes.
    FSDP2 gathers weights in calls that all processes make alike, but an evaluation calls in each of them as often as
    its part of the images needs.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = model.state_dict()
    with torch.device("meta"):
        whole = CADAForTextToImageRetrieval(model.config)
    whole.load_state_dict(
        {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in weights.items()},
        assign=True,
    )
    whole.tie_weights()
    return whole


class CADATrainer(Trainer):
    """
    `Trainer` for CADA: logs every loss part, anneals the negatives of ATP, and evaluates by retrieval.

    Args:
        args ([`CADATrainingArguments`]): training arguments.
        train_dataset ([`PairDataset`]): pairs of image and caption.
        eval_dataset: rows with `image`, `captions`, `person_id`; all captions search all images.
        processing_class ([`CADAProcessor`]): the processor, saved with every checkpoint.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._part_sums = dict.fromkeys(LOSS_PARTS, 0.0)
        self._part_count = 0
        self._unfinished: Path | None = None  # folder of the checkpoint that is being written
        self.add_callback(SaveOnSigterm())

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """
        Batches of [`GlobalBatches`], which knows the processes: the loader is not for accelerate to prepare. It draws
        from a generator of its own, so that the process's random numbers are those of the model alone.
        """
        args = self.args
        batches = GlobalBatches(
            len(self.train_dataset),
            args.train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            args.process_index,
            args.world_size,
            args.dataloader_drop_last,
        )
        with _made_of_arguments("The data loader"):
            return EpochLoader(
                self.train_dataset,
                batch_sampler=batches,
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                generator=torch.Generator(),
            )

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in `Trainer`."""
        with _made_of_arguments("The optimizer"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """As in `Trainer`."""
        with _made_of_arguments("The learning rate schedule"):
            return super().create_scheduler(*args, **kwargs)

    def negative_temperature(self) -> float | None:
        """T of this step: falls geometrically over the run; `None` for the hardest negatives."""
        if self.args.negative_sampling == "hardest":
            return None
        start, end = self.args.negative_temperature_start, self.args.negative_temperature_end
        progress = self.state.global_step / max(1, self.state.max_steps - 1)
        return start * (end / start) ** min(1.0, progress)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Equation (8). `num_items_in_batch` counts tokens of language models, and is not used."""
        outputs = model(
            **{name: values for name, values in inputs.items() if name != "pair"},
            return_loss=True,
            negative_temperature=self.negative_temperature(),
            chunk_size=self.args.chunk_size,
        )
        if not torch.isfinite(outputs.loss):
            raise TrainingError(self._describe_divergence(outputs, inputs))
        self._part_count += 1
        for name in LOSS_PARTS:
            part = outputs.get(name)
            if part is not None:
                self._part_sums[name] = self._part_sums[name] + part.detach()
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _describe_divergence(self, outputs, inputs) -> str:
        """Which loss is not finite, and for which samples: those with damaged features, else all of the batch."""
        losses = ", ".join(f"{name} {outputs[name].item()}" for name in LOSS_PARTS if outputs.get(name) is not None)
        finite = outputs.image_embeds.isfinite().all(dim=1) & outputs.text_embeds.isfinite().all(dim=1)
        rows = list(range(len(finite))) if finite.all() else (~finite).nonzero().flatten().tolist()
        samples = [self.train_dataset.name_of(int(inputs["pair"][row])) for row in rows]
        return (
            f"The loss is not finite at step {self.state.global_step + 1}: {losses}. Samples: {'; '.join(samples)}. "
            "Look at these, lower --learning_rate, or train in float32 (without --fp16)."
        )

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        """As in `Trainer`, but the output folder may have been moved since."""
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is not None:
            self.state.best_model_checkpoint = best_checkpoint(checkpoint, self.args.output_dir)
        return start

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in `Trainer`, which after the last step would make another one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model, trial) -> None:
        """
        As in `Trainer`, but a checkpoint is complete or absent: it is written into a hidden folder, flushed to the
        disk, and then gets its name. One that is deleted loses its name first.
        """
        args, folder = self.args, Path(self.args.output_dir)
        name, limit = f"checkpoint-{self.state.global_step}", args.save_total_limit
        self._unfinished, args.save_total_limit = folder / UNFINISHED, None
        try:
            if args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder / name)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                self.state.save_to_json(str(self._unfinished / name / TRAINER_STATE_NAME))
                recipe = json.dumps(recipe_of(args, len(self.train_dataset)), indent=2)
                (self._unfinished / name / RECIPE_FILE).write_text(recipe + "\n", encoding="utf-8")
                replace_folder(self._unfinished / name, folder / name)
                self._delete_old_checkpoints(folder, limit)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            last = get_last_checkpoint(folder)
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {folder}: {error}. "
                f"{'None is complete yet' if last is None else f'The last complete one is {last}'}. Make room, or "
                "give access, and run again with --resume_from_checkpoint last."
            ) from error
        finally:
            if args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished, args.save_total_limit = None, limit

    def _delete_old_checkpoints(self, folder: Path, limit: int | None) -> None:
        """Keep `limit` checkpoints, the last and the best one among them."""
        checkpoints = sort_checkpoints(str(folder))
        if limit is not None and limit > 0:
            kept = {checkpoints[-1], str(self.state.best_model_checkpoint)}
            others = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
            for checkpoint in others[: max(0, len(checkpoints) - limit)]:
                remove_folder(Path(checkpoint))

    def _finalize_training(self, *args, **kwargs):
        """As in `Trainer`, which with a limit of 1 would delete the last checkpoint here, file by file."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and best is not None and self.args.should_save:
            for checkpoint in sort_checkpoints(self.args.output_dir):
                if Path(checkpoint).name != Path(best).name:
                    remove_folder(Path(checkpoint))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss part since the last line, over all processes."""
        if "loss" in logs and self._part_count:
            for name, value in self._part_sums.items():
                if isinstance(value, torch.Tensor):
                    logs[name] = self.accelerator.reduce(value / self._part_count, reduction="mean").item()
            if "loss_atp" in logs and self.args.negative_sampling == "annealed":
                logs["negative_temperature"] = self.negative_temperature()
            self._part_sums = dict.fromkeys(LOSS_PARTS, 0.0)
            self._part_count = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in `Trainer`, without its pickle of the arguments: nothing of a release is unpickled."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def push_to_hub(self, commit_message=None, blocking=True, token=None, revision=None, private=None, **kwargs):
        """Model, processor, record of the run and model card, by [`publish`]. Always waits for the end."""
        self.save_model(_internal_call=True)
        self._finish_current_push()
        if self.is_world_process_zero():
            pinned = publish(
                self.args.output_dir,
                self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                tag=self.args.hub_tag,
                private=self.args.hub_private_repo if private is None else private,
                # What this very run pushed on its way (`hub_strategy`) is its own to replace.
                overwrite=self.args.hub_overwrite or self.push_in_progress is not None,
                token=token or self.args.hub_token,
            )
            logger.warning(f"Published {self.hub_model_id}, revision {pinned}.")

    def _issue_warnings_after_load(self, load_result) -> None:
        """Tied weights are saved once. Their second name is not missing, so it is no reason for a warning."""
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retrieval scores of [`evaluate_retrieval`] with the prefix, such as `eval_local_R1`."""
        started = time.time()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.accelerator.autocast():
            metrics = evaluate_retrieval(
                whole_model(self.accelerator.unwrap_model(self.model)),
                self.processing_class,
                dataset,
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
                memory=self.args.rerank_memory,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=metrics[f"{metric_key_prefix}_queries"]))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def read_overrides(text: str | None) -> dict:
    """Fields of the configuration from a JSON string or the name of a JSON file."""
    if not text:
        return {}
    shown = text if len(text) <= 100 else f"{text[:100]} ..."
    is_file = not text.lstrip().startswith("{")
    if is_file and not os.path.isfile(text):
        raise ArgumentError(f"--config_overrides {shown!r} is neither a JSON object nor a file.")
    try:
        overrides = read_json(text) if is_file else parse_json(text)
    except FileError as error:
        raise ArgumentError(f"--config_overrides: {error}") from error
    except ValueError as error:
        raise ArgumentError(f"--config_overrides {shown!r} is not JSON: {error}.") from error
    if not isinstance(overrides, dict):
        raise ArgumentError(f"--config_overrides {shown!r} should be a JSON object with fields of CADAConfig.")
    towers = {"vision_config": CADAVisionConfig, "text_config": CADATextConfig}
    for name in towers:
        if not isinstance(overrides.get(name, {}), dict):
            raise ArgumentError(f"--config_overrides: `{name}` should be an object with fields of its own.")
    parts = [(CADAConfig, overrides), *((kind, overrides.get(name, {})) for name, kind in towers.items())]
    for kind, fields in parts:
        unknown = sorted(set(fields) - set(kind.__dataclass_fields__))
        if unknown:
            raise ArgumentError(f"--config_overrides: {kind.__name__} has no field {', '.join(unknown)}.")
    return overrides


def read_recipe(path: str, given: list[str]) -> list[str]:
    """
    The arguments of a recipe as they would stand on the command line. Those that are `null` are left out, and with
    `--model_name_or_path` among the `given` ones also the recipe's other start.
    """
    try:
        recipe = read_json(path)
    except FileError as error:
        raise ArgumentError(f"The recipe: {error}") from error
    if not isinstance(recipe, dict):
        raise ArgumentError(f"The recipe {path} should be a JSON object of arguments.")
    arguments = []
    left_out = {"init_from"} if any(word.split("=")[0] == "--model_name_or_path" for word in given) else set()
    for name, value in recipe.items():
        if value is None or name in left_out:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return arguments


def load_start(path: str, overrides: dict, revision: str | None = None) -> CADAForTextToImageRetrieval:
    """A CADA checkpoint with other fields of its configuration; positions are interpolated to another image size."""
    if not overrides:
        return load_model(path, revision)
    old, config = load_config(path, revision).vision_config, load_config(path, revision, **overrides)
    new = config.vision_config
    if old.image_height_width == new.image_height_width:
        return load_model(path, revision, config)
    wanted, config.vision_config.image_size = new.image_size, old.image_size
    weights = load_model(path, revision, config).state_dict()
    config.vision_config.image_size = wanted
    name = "cada.vision_model.embeddings.position_embedding"
    weights[name] = resize_positions(weights[name], old.grid_size, config.vision_config.grid_size)
    model = CADAForTextToImageRetrieval(config)
    model.load_state_dict(weights)
    logger.warning(f"Position embeddings were interpolated to images of {'×'.join(map(str, new.image_height_width))}.")
    return model


def load_model_and_processor(arguments: ModelArguments) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
    """The model and its processor, from a checkpoint or with random weights."""
    overrides = read_overrides(arguments.config_overrides)
    if arguments.model_name_or_path is not None and arguments.init_from is not None:
        raise ArgumentError("Choose one start: --model_name_or_path or --init_from.")
    if arguments.vocabulary_head is not None and arguments.init_from is None:
        raise ArgumentError("--vocabulary_head goes with --init_from, which is not given.")
    if arguments.init_from is not None:
        model, report = convert(
            arguments.init_source,
            arguments.init_from,
            vocabulary_head=arguments.vocabulary_head,
            image_size=overrides.get("vision_config", {}).get("image_size", default_image_size(arguments.init_source)),
            config_overrides=overrides,
            revision=arguments.model_revision,
        )
        logger.warning(f"Start from {arguments.init_from}: {report}")
        return model, convert_processor(model, arguments.tokenizer_name)
    if arguments.model_name_or_path is not None:
        model = load_start(arguments.model_name_or_path, overrides, arguments.model_revision)
        saved = load_processor(arguments.model_name_or_path, arguments.model_revision)
        image_processor, tokenizer = saved.image_processor, saved.tokenizer
    else:
        tokenizer = load_tokenizer(arguments.tokenizer_name)
        tokenizer = CADAProcessor(CADAImageProcessor(), tokenizer).tokenizer
        text_fields = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "enc_token_id": tokenizer.convert_tokens_to_ids("[ENC]"),
        }
        config = CADAConfig(**{**overrides, "text_config": {**text_fields, **overrides.get("text_config", {})}})
        logger.warning("The model has random weights: no --model_name_or_path was given.")
        model = CADAForTextToImageRetrieval(config)
        image_processor = CADAImageProcessor()
    # What both sides have to agree on follows the model.
    height, width = model.config.vision_config.image_height_width
    image_processor.size = SizeDict(height=height, width=width)
    tokenizer.model_max_length = model.config.max_text_length
    processor = CADAProcessor(image_processor, tokenizer, model.config.mask_unit, model.config.mask_rate)
    check_processor(processor, model.config)
    return model, processor


def count_long_captions(dataset, processor: CADAProcessor) -> int:
    """Captions with more tokens than the model reads; they are cut."""
    limit = processor.tokenizer.model_max_length
    captions = [caption for row in dataset["captions"] for caption in row]
    lengths = processor(text=captions, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(ids) > limit for ids in lengths)


def prepare_data(
    data: DataArguments, args: CADATrainingArguments, processor: CADAProcessor, find_attributes: bool
) -> tuple[DatasetDict, int]:
    """
    Load the splits; hold persons out for validation where the set has none; find the attributes that ARA masks.
    Returns the splits and how many persons were held out of train.
    """
    held_out = 0
    if data.holdout_persons < 0:
        raise ArgumentError(f"--holdout_persons is {data.holdout_persons}. Give 0 or more.")
    with args.main_process_first(desc="loading the data set"):
        splits = load_pairs_dataset(
            data.dataset, data.data_dir, data.captions_per_image, data.skip_unreadable, revision=data.dataset_revision
        )
        if (args.do_train or args.do_eval) and "val" not in splits and data.holdout_persons > 0:
            # The same persons whatever the seed of the run, so that runs can be compared.
            held_out = data.holdout_persons
            splits = DatasetDict({**splits, **hold_out_persons(splits["train"], held_out)})
            logger.warning(
                f"{data.dataset} has no validation split: {data.holdout_persons} persons of train choose the "
                "checkpoint (--holdout_persons)."
            )
        needed = {"train": args.do_train, "val": args.do_eval and not args.do_train, "test": args.do_predict}
        for split, is_needed in needed.items():
            if is_needed and split not in splits:
                raise DataError(f"{data.dataset} has no split {split!r}; it has {', '.join(splits)}.")
        if args.do_train and find_attributes:
            splits["train"] = add_attribute_spans(splits["train"], processor.attribute_masker)
    for split, count in shared_persons(splits).items() if args.do_train else ():
        logger.warning(f"{count} persons of train are in {split} too: its scores say little about persons never seen.")
    for split, rows in splits.items():
        long = count_long_captions(rows, processor)
        if long:
            logger.warning(
                f"{split}: {long} captions are longer than {processor.tokenizer.model_max_length} tokens and are cut."
            )
    return splits, held_out


def name_of_set(data: DataArguments, rows: Dataset) -> str:
    """The set's name for the record of the run. One's own folders are named, not located, and marked as such."""
    if data.dataset in PEDES_SETS:
        return data.dataset
    if "named_attributes" in rows.column_names:  # only the drawn set has them
        return "drawn_night" if data.dataset == "demo_night" else "drawn"
    return f"{Path(data.dataset).name} (own data)" if Path(data.dataset).exists() else data.dataset


def find_history(model: ModelArguments, do_train: bool) -> tuple[dict | None, dict | None]:
    """
    For the record of this run: where the weights come from (`None` where the start does not tell), and how they were
    trained. A training on top of another moves the earlier one into the origin.
    """
    if model.init_from is not None:
        return describe_origin(model.init_source, model.init_from), None
    if model.model_name_or_path is None:
        return RANDOM_START, None
    record = read_start(model.model_name_or_path, model.model_revision)
    return (after_training(record), None) if do_train else (record["origin"], record["training"])


def describe_training(
    model: ModelArguments, data: DataArguments, args: CADATrainingArguments, rows: Dataset, pairs: int, state
) -> dict:
    """What a reader of the model card needs to repeat the training. Folders of this machine are named, not located."""
    start = model.model_name_or_path or model.init_from
    chosen = args.load_best_model_at_end and state.best_model_checkpoint is not None
    recipe = {
        "epochs": round(state.epoch, 2),
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning_rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.warmup_steps if args.warmup_steps >= 1 else f"{100 * args.warmup_steps:g}% of all",
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "negative_sampling": args.negative_sampling,
        "unreadable_images_skipped": data.skip_unreadable,
    }
    if args.negative_sampling == "annealed":
        recipe["negative_temperature"] = f"{args.negative_temperature_start} to {args.negative_temperature_end}"
    return {
        "dataset": name_of_set(data, rows),
        "captions_per_image": data.captions_per_image,
        "data": {"persons": len(set(rows["person_id"])), "images": len(rows), "pairs": pairs},
        "start": "random weights" if start is None else Path(start).name if Path(start).exists() else start,
        "recipe": recipe,
        "selected_by": f"{args.metric_for_best_model} on validation" if chosen else None,
        "seed": args.seed if args.data_seed is None else f"{args.seed}, of the data {args.data_seed}",
        **environment(args.world_size),
    }


def describe_evaluation(
    trainer: CADATrainer, data: DataArguments, split: str, scores: dict[str, float], prefix: str, rows: Dataset
) -> dict:
    """The scores of a split with what is needed to compare them."""
    names = ("queries", "gallery", "rerank_k")
    plain = {name.removeprefix(f"{prefix}_"): value for name, value in scores.items()}
    return {
        "dataset": name_of_set(data, rows),
        "split": split,
        "captions_per_image": data.captions_per_image,
        "unreadable_images_skipped": data.skip_unreadable,
        "metrics": {k: v for k, v in plain.items() if k in names or k.startswith(("global_", "local_"))},
        "weights": model_digest(whole_model(trainer.accelerator.unwrap_model(trainer.model))),
        **environment(trainer.args.world_size),
    }


def check_hold_out(training: dict | None, dataset: str, held_out: int) -> None:
    """Persons that a model was trained on are no validation set. `dataset` is named as by [`name_of_set`]."""
    if training is not None and training["dataset"] == dataset:
        seen = training["recipe"]["persons_held_out_of_train"]
        if seen != held_out:
            raise ArgumentError(
                f"--do_eval would measure on {held_out} persons of train, but the training held out "
                f"{seen}. Pass --holdout_persons {seen}, or --do_predict alone."
            )


def run(model_arguments: ModelArguments, data: DataArguments, args: CADATrainingArguments) -> dict[str, float]:
    """Train, evaluate on validation, test: what `args` asks for. Returns all metrics."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ArgumentError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    if args.n_gpu > 1:
        raise ArgumentError(
            f"One process sees {args.n_gpu} GPUs. Start one process for each (`accelerate launch train_cada.py ...`), "
            "or choose one with CUDA_VISIBLE_DEVICES=0."
        )
    if rank_and_size()[1] != args.world_size:
        raise ArgumentError(
            f"{rank_and_size()[1]} processes were started, and the Trainer knows of {args.world_size}. On a machine "
            "without GPU add --use_cpu --ddp_backend gloo."
        )
    make_output_folder(args.output_dir)  # what keeps from saving shows now, not after days of training
    set_seed(args.seed)
    try:
        model, processor = load_model_and_processor(model_arguments)
    except StrictDataclassError as error:
        raise ArgumentError(f"The configuration does not hold together. {error}") from error
    if model_arguments.attn_implementation is not None:
        with _made_of_arguments("The attention"):
            model.set_attn_implementation(model_arguments.attn_implementation)
    splits, held_out = prepare_data(data, args, processor, find_attributes=model.config.use_ara)
    origin, training = find_history(model_arguments, args.do_train)
    if held_out and not args.do_train:
        check_hold_out(training, name_of_set(data, splits["val"]), held_out)
    if args.do_train and "val" not in splits:
        # Nothing to choose by. The test split must not choose.
        logger.warning("No validation split: the last checkpoint is kept, whatever its score.")
        args.eval_strategy, args.load_best_model_at_end, args.do_eval = "no", False, False
    if not model.config.use_atp and args.metric_for_best_model == "local_R1":
        args.metric_for_best_model = "global_R1"  # without match heads there is no local matching
    if args.push_to_hub and args.process_index == 0:
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        check_licence(origin, licence_granted=False)  # now, not after days of training
        open_repository(repo_id, args.hub_tag, args.hub_private_repo, args.hub_token, args.hub_overwrite)
    train_pairs = None
    if args.do_train:
        train_pairs = PairDataset(splits["train"], processor.image_size)
    batch = args.train_batch_size * args.world_size
    if args.do_train and args.dataloader_drop_last and len(train_pairs) < batch:
        raise ArgumentError(
            f"The training set has {len(train_pairs)} pairs, less than one batch of {batch}. Lower "
            "--per_device_train_batch_size."
        )
    checkpoint = find_checkpoint(args, len(train_pairs)) if args.do_train else None
    with _made_of_arguments("The Trainer"):  # a logger that is not installed, say
        trainer = CADATrainer(
            model=model,
            args=args,
            data_collator=PairCollator(processor, mask=model.config.use_ara),
            train_dataset=train_pairs,
            eval_dataset=splits.get("val"),
            processing_class=processor,
        )
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_world_process_zero():
            (Path(args.output_dir) / RUN_FILE).unlink(missing_ok=True)  # of the weights that are replaced now
        trainer.save_model(_internal_call=True)  # the push waits for the evaluation
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        training = describe_training(model_arguments, data, args, splits["train"], len(train_pairs), trainer.state)
        training["recipe"]["persons_held_out_of_train"] = held_out
        for split, count in shared_persons(splits).items():
            training["recipe"][f"persons_of_train_also_in_{split}"] = count
        training["minutes"] = None if checkpoint else result.metrics["train_runtime"] / 60
        if trainer.is_world_process_zero():  # now, as an evaluation may fail
            write_run(args.output_dir, origin, training, [])
    evaluations = [] if args.do_train else read_run(args.output_dir)["evaluations"]
    metrics: dict[str, float] = {}
    for wanted, split, prefix in ((args.do_eval, "val", "eval"), (args.do_predict, "test", "test")):
        if wanted:
            scores = trainer.evaluate(splits[split], metric_key_prefix=prefix)
            trainer.log_metrics(prefix, scores)
            trainer.save_metrics(prefix, scores)
            metrics.update(scores)
            evaluations.append(describe_evaluation(trainer, data, split, scores, prefix, splits[split]))
    if args.do_train:
        trainer.save_state()  # after the last line of the log
    if trainer.is_world_process_zero():
        write_run(args.output_dir, origin, training, evaluations)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return metrics


class _Parser(HfArgumentParser):
    error = report_argument


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Parse the command line, which may begin with a recipe (a JSON file of arguments), and run."""
    parser = _Parser((ModelArguments, DataArguments, CADATrainingArguments), description=__doc__)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].endswith(".json"):
        arguments = [*read_recipe(arguments[0], arguments[1:]), *arguments[1:]]  # the last of two equal ones counts
    try:
        parsed = parser.parse_args_into_dataclasses(arguments)
    except (OSError, TypeError, ValueError) as error:  # an unknown argument, or values that do not go together
        raise ArgumentError(f"{error} (`python train_cada.py --help` lists all arguments.)") from error
    logging.set_verbosity(parsed[2].get_process_log_level())
    transformers.logging.enable_explicit_format()
    return run(*parsed)


if __name__ == "__main__":
    sys.exit(run_command(main))
