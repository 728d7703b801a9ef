"""
The `Trainer` of CADA: every loss part in the log, evaluation by retrieval, checkpoints that are complete or absent. It
works with any data set of pairs ([`PairDataset`]); the command is train_cada.py.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PredictionOutput, TrainOutput, sort_checkpoints, speed_metrics
from transformers.utils import logging

from cada.data.pairs import GlobalBatches, outlive_sigterm
from cada.data.streams import StreamBatches, StreamPairs, Unreadable
from cada.evaluation.matching import calibrate, evaluate_retrieval, has_two_persons
from cada.files import ADAPTER_RECORD, CADAError, checkpoint_written_whole, sentence
from cada.hub.loading import base_digest, check_processor
from cada.hub.publish import publish
from cada.training.arguments import made_of_arguments
from cada.training.lora import load_lora
from cada.training.muon import muon_for
from cada.training.resume import (
    SaveOnSigterm,
    complete,
    complete_checkpoints,
    delete_checkpoint,
    find_checkpoint,
    recipe_of,
)
from losses_cada import rank_and_size


logger = logging.get_logger(__name__)

LOSS_PARTS = ("loss_ndf", "loss_atp", "loss_ara")
NOT_FOR_THE_MODEL = ("pair", "names", "unreadable")  # of a batch


def check_processes(args: TrainingArguments) -> None:
    """
    Every accelerator has a process of its own, with all weights, and the Trainer knows all processes.

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
    launched = [os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")]
    if args.fsdp or args.deepspeed or "true" in launched:
        raise CADAError(
            "FSDP and DeepSpeed have no place in this training: every process holds all weights. Use "
            "recipes/accelerate/one_machine.yaml, and --activation_checkpointing where memory is short."
        )
    if args.world_size > 1 and not args.dataloader_drop_last:
        raise CADAError("--dataloader_drop_last false is for one process: several train on batches of equal parts.")


class CADATrainer(Trainer):
    """
    `Trainer` for CADA: logs every loss part, anneals the negatives of ATP, and evaluates by retrieval.

    Args:
        args ([`CADATrainingArguments`]): training arguments.
        train_dataset ([`PairDataset`] or [`StreamPairs`]): pairs of image and caption.
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
        masker = getattr(self.processing_class, "attribute_masker", None)  # of a CADAProcessor, a checkpoint's own too
        if masker is not None:
            check_processor(self.processing_class, self.model.config)
            config = self.model.config
            if config.use_ara and (masker.unit, masker.rate) != (config.mask_unit, config.mask_rate):
                raise CADAError(
                    f"The processor masks {masker.unit}s at a rate of {masker.rate}, and the model's configuration "
                    f"says {config.mask_unit}s and {config.mask_rate}. Make the processor with these."
                )
        # Tied weights are saved once: the Trainer would miss their second name where it loads the best checkpoint.
        self.model._keys_to_ignore_on_save = list(self.model.all_tied_weights_keys)
        self.recipe = None if self.train_dataset is None else self._recipe()
        self.write_record: Callable[[Path], object] | None = None  # puts the record of the run into a checkpoint
        self.resumed_from: str | None = None  # the checkpoint that the training goes on from
        self._part_sums = dict.fromkeys(LOSS_PARTS, 0.0)
        self._part_count = 0
        self._stream: StreamBatches | None = None  # where the pairs are streamed
        self._unreadable = Unreadable()
        self.left_out = 0  # unreadable pairs of the stream, up to the last checkpoint or the end, of all processes
        self._sigterm = SaveOnSigterm()
        self.add_callback(self._sigterm)

    def _recipe(self) -> dict:
        """What makes this training, once it has what it needs."""
        if isinstance(self.train_dataset, StreamPairs):
            return recipe_of(self.args, self.model, {}) | self.train_dataset.identity
        batch, pairs = self.args.train_batch_size * self.args.world_size, len(self.train_dataset)
        if self.args.dataloader_drop_last and pairs < batch:
            raise CADAError(
                f"The training set has {pairs} pairs, less than one batch of {batch}. Lower "
                "--per_device_train_batch_size."
            )
        sets = {"val": self.eval_dataset}
        if isinstance(self.eval_dataset, dict):
            if self.args.load_best_model_at_end:
                raise CADAError("Several sets choose no checkpoint: pass `load_best_model_at_end=False`, or one set.")
            self.args.metric_for_best_model = None  # a score without the name of a set is nowhere among theirs
            sets = {f"evaluation {name}": rows for name, rows in self.eval_dataset.items()}
        return recipe_of(self.args, self.model, {"train": self.train_dataset.dataset, **sets})

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """
        Batches of [`GlobalBatches`] or [`StreamBatches`], which know the processes: the loader is not for accelerate
        to prepare. It draws from a generator of its own, so that the process's random numbers are those of the model
        alone.
        """
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        place = (args.train_batch_size, seed, args.process_index, args.world_size)
        if isinstance(self.train_dataset, StreamPairs):
            batches = self._stream = StreamBatches(self.train_dataset, *place)
            if self.resumed_from is not None:
                batches.resume(self.resumed_from)
        else:
            batches = GlobalBatches(len(self.train_dataset), *place, args.dataloader_drop_last)
        with made_of_arguments("The data loader"):
            loader = torch.utils.data.DataLoader(
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
        loader.set_epoch = batches.set_epoch  # which the Trainer calls
        return loader

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in `Trainer`; with `muon_learning_rate` the matrices of the layers go to Muon."""
        with made_of_arguments("The optimizer"):
            if self.args.muon_learning_rate is not None and self.optimizer is None:
                self.optimizer = muon_for(self.model, self.args, self.get_decay_parameter_names(self.model))
            return super().create_optimizer(*args, **kwargs)

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
        if self._stream is not None:
            self._unreadable.add(len(inputs["pair"]), inputs["unreadable"])
        self._temperature = self.negative_temperature()
        outputs = model(
            **{name: values for name, values in inputs.items() if name not in NOT_FOR_THE_MODEL},
            return_loss=True,
            negative_temperature=self._temperature,
            label_noise_robust=self.args.label_noise_robust,
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
        if "names" in inputs:
            samples = [inputs["names"][row] for row in rows]
        else:
            samples = [self.train_dataset.name_of(int(inputs["pair"][row])) for row in rows]
        return (
            f"The loss is not finite at step {self.state.global_step + 1}: {losses}. Samples: {'; '.join(samples)}. "
            "Look at these, lower --learning_rate, or train in float32 (without --fp16)."
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        As in `Trainer`; `resume_from_checkpoint` is a folder or `"last"` (also `True`), by default the argument's.
        What a machine cannot do ends with a remedy.

        Raises:
            CADAError: as [`find_checkpoint`]; for weights and losses that are not finite; for too little memory.
        """
        wanted = "last" if resume_from_checkpoint is True else resume_from_checkpoint
        wanted = wanted or self.args.resume_from_checkpoint
        self.resumed_from = find_checkpoint(self.args, self.recipe, wanted)
        self.model.config.calibration = None  # that of the weights before
        # `Trainer` deletes old checkpoints before the new one is complete: [`_save_checkpoint`] does it, and here.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super().train(self.resumed_from, *args, **kwargs)
            self._check_finite()
            if self._stream is not None:
                self._count_left_out()
            if self._limit == 1 and self.state.best_model_checkpoint is not None:
                self._delete_checkpoints_but({Path(self.state.best_model_checkpoint).name})
            return output
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
                remedy = "Add --activation_checkpointing (same gradients, less memory), or lower the batch."
            elif "DataLoader worker" in str(error):
                remedy = "Was a worker killed for want of memory? Take fewer --dataloader_num_workers."
            elif isinstance(error, NotImplementedError):
                remedy = "Choose another --attn_implementation, or leave out what this machine cannot do."
            else:
                raise
            raise CADAError(f"Step {self.state.global_step + 1} failed: {sentence(error)} {remedy}") from error
        finally:
            self.args.save_total_limit = self._limit
            self._sigterm.restore()

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in `Trainer`, which would make another step where a training that is resumed has made its last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`; its last file makes the checkpoint complete, and only then older ones are deleted."""
        self._check_finite()
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            if self.args.should_save:
                delete_checkpoint(folder)  # which an earlier run may have left
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self._stream is not None:
                self._count_left_out()
                batches = self.state.global_step * self.args.gradient_accumulation_steps
                self._stream.save(folder, batches, self.left_out)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.write_record is not None:
                    self.write_record(folder)
                complete(folder, self.recipe)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                delete_checkpoint(folder)
            there = complete_checkpoints(self.args.output_dir)
            raise CADAError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {folder.parent}: {error}. "
                f"{f'The last complete one is {there[-1]}' if there else 'None is complete yet'}. Make room, or give "
                "access, and run again with --resume_from_checkpoint last."
            ) from error
        if self.args.should_save:
            self._delete_old_checkpoints(folder)
        self.accelerator.wait_for_everyone()

    def _count_left_out(self) -> None:
        own = torch.tensor(self._unreadable.left_out, device=self.args.device)
        self.left_out = self._stream.left_out + int(self.accelerator.reduce(own, reduction="sum"))

    def _check_finite(self) -> None:
        """Weights are kept only where they are numbers; the loss tells one step later."""
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise CADAError(
                    f"The weights are not finite after step {self.state.global_step}: {name}. Nothing of this step is "
                    "saved. Lower --learning_rate, or train in float32."
                )

    def _delete_old_checkpoints(self, newest: Path) -> None:
        """`save_total_limit` of them are kept, the newest and the best one among these."""
        if self._limit is not None and self._limit > 0:
            kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
            others = [Path(path).name for path in sort_checkpoints(self.args.output_dir)]
            others = [name for name in others if name not in kept]
            room = max(0, self._limit - len(kept))
            self._delete_checkpoints_but(kept | set(others[len(others) - room :]))

    def _delete_checkpoints_but(self, kept: set[str]) -> None:
        for path in sort_checkpoints(self.args.output_dir) if self.args.should_save else ():
            if Path(path).name not in kept:
                delete_checkpoint(Path(path))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """As in `Trainer`, which knows adapters only in a wrapper of PEFT around the model."""
        if self.model._hf_peft_config_loaded:
            load_lora(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.model._hf_peft_config_loaded:
            load_lora(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As in `Trainer`, without its pickle of the arguments: nothing of a release is unpickled. Of a model with an
        adapter the adapter is saved, and what tells its base from another.
        """
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.should_save and self.model._hf_peft_config_loaded:
            record = {"base": base_digest(self.model), "calibration": self.model.config.calibration}
            (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss part since the last line, over all processes."""
        if "loss" in logs and self._part_count:
            for name, value in self._part_sums.items():
                if isinstance(value, torch.Tensor):
                    logs[name] = self.accelerator.reduce(value / self._part_count, reduction="mean").item()
            if "loss_atp" in logs and self.args.negative_sampling == "annealed":
                logs["negative_temperature"] = self._temperature
            self._part_sums = dict.fromkeys(LOSS_PARTS, 0.0)
            self._part_count = 0
        super().log(logs, start_time)

    def push_to_hub(self, commit_message=None, blocking=True, token=None, revision=None, private=None, **kwargs):
        """Model, processor, record of the run and model card, by [`publish`]. Always waits for the end."""
        if commit_message is not None or revision is not None:
            raise CADAError("A release goes to `main` with a message of its own. Name it by `hub_tag`.")
        if self.is_world_process_zero():
            with checkpoint_written_whole(self.args.output_dir) as folder:
                self.save_model(str(folder), _internal_call=True)
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

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval", open_set: bool = False
    ) -> dict[str, float]:
        """Scores of [`evaluate_retrieval`] with the prefix, such as `eval_local_R1`; `open_set` as there."""
        started = time.time()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise CADAError("There is no set to evaluate on. Give `eval_dataset`.")
        if isinstance(dataset, dict):
            metrics = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}", open_set)
            return metrics
        metrics = self._measured(evaluate_retrieval, dataset, open_set=open_set)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=metrics[f"{metric_key_prefix}_queries"]))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, measure: Callable, dataset, **options):
        """What `measure` makes of model, processor and a data set, in the precision of the training."""
        try:
            with self.accelerator.autocast():
                return measure(
                    self.accelerator.unwrap_model(self.model),
                    self.processing_class,
                    dataset,
                    batch_size=self.args.eval_batch_size,
                    num_workers=self.args.dataloader_num_workers,
                    progress=not self.args.disable_tqdm and self.is_world_process_zero(),
                    memory=self.args.rerank_memory,
                    **options,
                )
        except CADAError:
            raise
        except ValueError as error:  # scores that are not numbers
            raise CADAError(
                f"The evaluation after step {self.state.global_step} failed: {sentence(error)} Has the training "
                "diverged?"
            ) from error

    def calibrate(self, dataset, name: str) -> None:
        """
        Fit `calibration` of the configuration on a validation set of this `name`, see `cada.evaluation.calibration`;
        on fewer than two persons it stays `None`, with a warning.
        """
        if has_two_persons(dataset):
            self.model.config.calibration = self._measured(calibrate, dataset, name=name)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """The `metrics` of [`evaluate`], with `open_set`; the scores of all pairs are too many to keep."""
        return PredictionOutput(None, None, self.evaluate(test_dataset, ignore_keys, metric_key_prefix, open_set=True))
