"""
The `Trainer` of CADA and its arguments: every loss part in the log, evaluation by retrieval, checkpoints that are
complete or absent. It works with any data set of pairs ([`PairDataset`]); the command is train_cada.py.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PredictionOutput,
    TrainOutput,
    get_last_checkpoint,
    sort_checkpoints,
    speed_metrics,
)
from transformers.utils import logging

from cada.data.pairs import GlobalBatches, outlive_sigterm
from cada.evaluation.encoding import RERANK_MEMORY
from cada.evaluation.matching import evaluate_retrieval
from cada.evaluation.metrics import METRICS
from cada.files import CADAError, one_line, remove_folder, replace_folder
from cada.hub.loading import check_processor
from cada.hub.publish import publish
from cada.training.muon import MuonAdamW
from cada.training.resume import RECIPE_FILE, SaveOnSigterm, best_checkpoint, recipe_of
from losses_cada import rank_and_size
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


logger = logging.get_logger(__name__)

LOSS_PARTS = ("loss_ndf", "loss_atp", "loss_ara")
STEPS = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")
# Arguments of `TrainingArguments` that are of language models, or would change the training unseen; their defaults.
NO_PLACE = {
    "auto_find_batch_size": False,
    "bf16_full_eval": False,
    "debug": "",
    "fp16_full_eval": False,
    "hub_always_push": False,
    "hub_strategy": "end",  # all others push optimizer states
    "ignore_data_skip": False,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "train_sampling_strategy": "random",
    "use_liger_kernel": False,
}
UNFINISHED = ".unfinished"  # folder of the checkpoint that is being written, beside the others


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
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Train the weight matrices of the layers by Muon with this highest learning rate, such as 0.02, "
            "and the rest by AdamW: faster from random weights. By default AdamW trains all."
        },
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
        least |= {"seed": 0, "data_seed": 0, "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"`{name}` is {value}. Give {lowest} or more.")
        for name in (
            *(
                "learning_rate",
                "muon_learning_rate",
                "weight_decay",
                "max_grad_norm",
                "num_train_epochs",
                "adam_epsilon",
            ),
            *STEPS,
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # also where it is NaN
                raise ValueError(f"`{name}` is {value}. Give a number of 0 or more.")
        if self.do_train and (self.num_train_epochs == 0 or self.max_steps == 0):
            raise ValueError("`num_train_epochs` and `max_steps` of 0 train nothing. Leave out --do_train.")
        scores = [f"{stage}_{metric}" for stage in ("local", "global") for metric in METRICS]
        if (self.metric_for_best_model or "local_R1").removeprefix("eval_") not in scores:
            raise ValueError(f"`metric_for_best_model` is {self.metric_for_best_model!r}. Choose {', '.join(scores)}.")
        for name, default in NO_PLACE.items():
            if getattr(self, name) and getattr(self, name) != default:
                raise ValueError(f"`{name}` has no place in this training. Leave it out.")
        if self.torch_compile_mode is not None:
            modes = list(torch._inductor.list_mode_options())
            if self.torch_compile_mode not in modes:
                raise ValueError(
                    f"`torch_compile_mode` is {self.torch_compile_mode!r}. Choose one of {', '.join(modes)}."
                )
        if self.load_best_model_at_end and "no" in (str(self.eval_strategy), str(self.save_strategy)):
            raise ValueError(
                "Without evaluations or without checkpoints none can be chosen: add --load_best_model_at_end false, "
                "which keeps the last weights."
            )
        super().__post_init__()
        if self.negative_sampling not in ("hardest", "annealed"):
            raise ValueError(f"`negative_sampling` is {self.negative_sampling!r}. Choose 'hardest' or 'annealed'.")
        if not 0 < self.rerank_memory < math.inf:
            raise ValueError(f"`rerank_memory` is {self.rerank_memory}. Give the GB an evaluation may take.")
        if not math.inf > self.negative_temperature_start >= self.negative_temperature_end > 0:
            raise ValueError(
                f"`negative_temperature_start` ({self.negative_temperature_start}) has to be at least "
                f"`negative_temperature_end` ({self.negative_temperature_end}), both above 0 and finite."
            )


@contextmanager
def made_of_arguments(what: str) -> Iterator[None]:
    """Around the making of a part, from arguments whose mistakes show in the part alone."""
    try:
        yield
    except CADAError:
        raise
    except (ImportError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CADAError(f"{what} cannot be made of these arguments: {one_line(error)}") from error


def check_processes(args: TrainingArguments) -> None:
    """
    Every GPU needs a process of its own, and the Trainer has to know all processes.

    Raises:
        CADAError: where it is not so.
    """
    if args.n_gpu > 1:
        raise CADAError(
            f"One process sees {args.n_gpu} GPUs. Start one process for each (`accelerate launch ...`), or choose one "
            "with CUDA_VISIBLE_DEVICES=0."
        )
    if rank_and_size()[1] != args.world_size:
        raise CADAError(
            f"{rank_and_size()[1]} processes were started, and the Trainer knows of {args.world_size}. On a machine "
            "without GPU add --use_cpu --ddp_backend gloo."
        )


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
        eval_dataset: rows with `image`, `captions`, `person_id`; all captions search all images. Or several such sets
            by their names.
        processing_class ([`CADAProcessor`]): the processor, saved with every checkpoint.

    Raises:
        CADAError: for what would train or choose otherwise than it seems: several GPUs in one process, less than a
            batch of pairs, another masking than the configuration's, `compute_metrics`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_processes(self.args)
        if self.compute_metrics is not None:
            raise CADAError("`compute_metrics` has no place: the evaluation is `evaluate_retrieval`. Leave it out.")
        if isinstance(self.processing_class, CADAProcessor):
            check_processor(self.processing_class, self.model.config)
            masker, config = self.processing_class.attribute_masker, self.model.config
            if config.use_ara and (masker.unit, masker.rate) != (config.mask_unit, config.mask_rate):
                raise CADAError(
                    f"The processor masks {masker.unit}s at a rate of {masker.rate}, and the model's configuration "
                    f"says {config.mask_unit}s and {config.mask_rate}. Make the processor with these."
                )
        self.recipe: dict | None = None
        if self.train_dataset is not None:
            batch, pairs = self.args.train_batch_size * self.args.world_size, len(self.train_dataset)
            if self.args.dataloader_drop_last and pairs < batch:
                raise CADAError(
                    f"The training set has {pairs} pairs, less than one batch of {batch}. Lower "
                    "--per_device_train_batch_size."
                )
            several = isinstance(self.eval_dataset, dict)
            if several and self.args.load_best_model_at_end:
                raise CADAError("Several sets choose no checkpoint: pass `load_best_model_at_end=False`, or one set.")
            if several:  # a score without the name of a set is nowhere among theirs
                self.args.metric_for_best_model = None
            others = self.eval_dataset if several else {"val": self.eval_dataset}
            splits = {"train": self.train_dataset.dataset, **others}
            self.recipe = recipe_of(self.args, self.model, splits)
        self.write_record: Callable[[Path], None] | None = None  # puts the record of the run into a checkpoint
        self._part_sums = dict.fromkeys(LOSS_PARTS, 0.0)
        self._part_count = 0
        self._unfinished: Path | None = None  # folder of the checkpoint that is being written
        self._sigterm = SaveOnSigterm()
        self.add_callback(self._sigterm)

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
        with made_of_arguments("The data loader"):
            return EpochLoader(
                self.train_dataset,
                batch_sampler=batches,
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                generator=torch.Generator(),
                worker_init_fn=outlive_sigterm,
            )

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in `Trainer`; with `muon_learning_rate` the matrices of the layers go to Muon."""
        with made_of_arguments("The optimizer"):
            if self.args.muon_learning_rate is not None and self.optimizer is None:
                self.optimizer = self._muon()
            return super().create_optimizer(*args, **kwargs)

    def _muon(self) -> MuonAdamW:
        """Embeddings and heads, whose rows are words and classes, stay with AdamW, as do vectors."""
        args = self.args
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        matrices = {
            name: weight
            for name, weight in weights.items()
            if weight.ndim == 2 and "embed" not in name and "head" not in name
        }
        decay = self.get_decay_parameter_names(self.model)
        others = weights.keys() - matrices.keys()
        groups = [
            {"params": [weights[name] for name in weights if name in others & set(decay)]},
            {"params": [weights[name] for name in weights if name in others - set(decay)], "weight_decay": 0.0},
            {"params": list(matrices.values()), "lr": args.muon_learning_rate, "momentum": 0.95},
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        return MuonAdamW(
            groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay
        )

    def create_scheduler(self, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """As in `Trainer`."""
        with made_of_arguments("The learning rate schedule"):
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
        )
        if not torch.isfinite(outputs.loss):
            raise CADAError(self._describe_divergence(outputs, inputs))
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
            self.state.best_model_checkpoint = best_checkpoint(checkpoint, self.args)
        return start

    def train(self, *args, **kwargs) -> TrainOutput:
        """As in `Trainer`; what a machine cannot do ends with a remedy."""
        try:
            return super().train(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                remedy = (
                    "Add --gradient_checkpointing, which gives the same gradients in less memory, or lower the batch."
                )
            elif "DataLoader worker" in str(error):
                remedy = "Was a worker killed for want of memory? Take fewer --dataloader_num_workers."
            elif isinstance(error, NotImplementedError):
                remedy = "Choose another --attn_implementation, or leave out what this machine cannot do."
            else:
                raise
            raise CADAError(f"Step {self.state.global_step + 1} failed: {one_line(error)} {remedy}") from error
        finally:
            self._sigterm.restore()

    def _check_finite(self) -> None:
        """Weights are kept only where they are numbers; the loss tells one step later."""
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight.to_local() if isinstance(weight, DTensor) else weight).all():
                raise CADAError(
                    f"The weights are not finite after step {self.state.global_step}: {name}. Nothing of this step is "
                    "saved. Lower --learning_rate, or train in float32."
                )

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
        self._check_finite()
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
                recipe = json.dumps(self.recipe, indent=2)
                (self._unfinished / name / RECIPE_FILE).write_text(recipe + "\n", encoding="utf-8")
                if self.write_record is not None:
                    self.write_record(self._unfinished / name)
                replace_folder(self._unfinished / name, folder / name)
                self._delete_old_checkpoints(folder, limit)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            last = get_last_checkpoint(folder)
            raise CADAError(
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
        self._check_finite()
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
        if commit_message is not None or revision is not None:
            raise CADAError("A release goes to `main` with a message of its own. Name it by `hub_tag`.")
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            repo_id = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            pinned = publish(
                self.args.output_dir,
                repo_id,
                tag=self.args.hub_tag,
                private=self.args.hub_private_repo if private is None else private,
                overwrite=self.args.hub_overwrite,
                token=token or self.args.hub_token,
            )
            logger.warning(f"Published {repo_id}, revision {pinned}.")

    def _issue_warnings_after_load(self, load_result) -> None:
        """Tied weights are saved once. Their second name is not missing, so it is no reason for a warning."""
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retrieval scores of [`evaluate_retrieval`] with the prefix, such as `eval_local_R1`."""
        started = time.time()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise CADAError("There is no set to evaluate on. Give `eval_dataset`.")
        if isinstance(dataset, dict):
            metrics = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        try:
            with self.accelerator.autocast():
                metrics = evaluate_retrieval(
                    # Without a training before it, FSDP has not placed the model yet.
                    whole_model(self.accelerator.unwrap_model(self.model)).to(self.args.device),
                    self.processing_class,
                    dataset,
                    batch_size=self.args.eval_batch_size,
                    num_workers=self.args.dataloader_num_workers,
                    progress=not self.args.disable_tqdm and self.is_world_process_zero(),
                    memory=self.args.rerank_memory,
                )
        except CADAError:
            raise
        except ValueError as error:  # scores that are not numbers
            raise CADAError(
                f"The evaluation after step {self.state.global_step} failed: {one_line(error)} Has the training "
                "diverged?"
            ) from error
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=metrics[f"{metric_key_prefix}_queries"]))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """The `metrics` of [`evaluate`]; the scores of all pairs are too many to keep."""
        return PredictionOutput(None, None, self.evaluate(test_dataset, ignore_keys, metric_key_prefix))
