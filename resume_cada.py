"""An interrupted training goes on: SIGTERM saves it; a checkpoint is whole and of the same training, or refused."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from checkpoint_cada import weight_files
from files_cada import CADAError, read_json


logger = logging.get_logger(__name__)

RECIPE_FILE = "cada_recipe.json"
# Arguments of which the weights of every step depend; with other ones it is another training.
_RECIPE = (
    *("seed", "data_seed", "num_train_epochs", "max_steps", "gradient_accumulation_steps", "dataloader_drop_last"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("weight_decay", "max_grad_norm", "bf16", "fp16"),
    *("negative_sampling", "negative_temperature_start", "negative_temperature_end"),
)


_ANEW = "start a new training from its weights: --model_name_or_path {}, with another --output_dir."


class ResumeError(CADAError):
    """A training cannot go on from what is there. The message says from what, why, and the remedy."""


def recipe_of(args: TrainingArguments, pairs: int) -> dict:
    """What makes a training, besides model and data: arguments, number of pairs, the batch of all processes."""
    recipe = {name: getattr(args, name) for name in _RECIPE}
    recipe = {name: getattr(value, "value", value) for name, value in recipe.items()}
    return {**recipe, "batch": args.train_batch_size * args.world_size, "pairs": pairs}


def find_checkpoint(args: TrainingArguments, pairs: int) -> str | None:
    """
    The folder of the checkpoint from which to go on, looked at; `None` to begin.

    Raises:
        ResumeError: for a checkpoint that is missing, not whole, or of another training; and for checkpoints that an
            earlier training left where a new one is to begin.
    """
    wanted = args.resume_from_checkpoint
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if wanted is None:
        if found is not None:
            raise ResumeError(
                f"{found} is there from an earlier training. Go on with it by --resume_from_checkpoint last, or give "
                "another --output_dir."
            )
        return None
    if wanted == "last":
        if found is None:
            logger.warning(f"{args.output_dir} holds no checkpoint to resume from: training starts at the beginning.")
            return None
        wanted = found
    folder = Path(wanted)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ResumeError(
            f"--resume_from_checkpoint {wanted} is no checkpoint of a training: it has no {TRAINER_STATE_NAME}. Give "
            "the folder of one, or `last`."
        )
    _check_whole(folder, args)
    if (folder / RECIPE_FILE).is_file():
        saved, now = read_json(folder / RECIPE_FILE), json.loads(json.dumps(recipe_of(args, pairs)))
        changed = [name for name, value in now.items() if saved.get(name) != value]
        if changed:
            changed = [f"{name} ({saved.get(name)}, now {now[name]})" for name in changed]
            raise ResumeError(
                f"{folder} is of another training: {', '.join(changed)}. Give the same arguments as before, or "
                f"{_ANEW.format(folder)}"
            )
    return str(folder)


def _check_whole(folder: Path, args: TrainingArguments) -> None:
    names = ["scheduler.pt"]
    if not args.fsdp and "ACCELERATE_USE_FSDP" not in os.environ:  # FSDP saves weights and optimizer in its own form
        weight_files(folder)
        names.append("optimizer.pt")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ResumeError(
            f"{folder} lacks {', '.join(missing)}, as with --save_only_model: a training cannot go on from it. Take "
            f"another checkpoint, or {_ANEW.format(folder)}"
        )


def best_checkpoint(folder: str | os.PathLike, output_dir: str | os.PathLike) -> str | None:
    """
    The best checkpoint that the one in `folder` knows of; it lies in `output_dir`, which may have been moved.

    Raises:
        ResumeError: where it is gone.
    """
    best = read_json(Path(folder) / TRAINER_STATE_NAME).get("best_model_checkpoint")
    if best is None:
        return None
    place = Path(output_dir) / Path(best).name
    if not place.is_dir():
        raise ResumeError(f"The best checkpoint so far, {place}, is gone. Bring it back, or {_ANEW.format(folder)}")
    return str(place)


class SaveOnSigterm(TrainerCallback):
    """
    SIGTERM, by which clusters announce the end, saves a checkpoint after the present step and ends the process with
    status 143. `--resume_from_checkpoint last` goes on from there. One process that gets the signal is enough.
    """

    def __init__(self):
        self.received = False  # by this process
        self.agreed = False  # by all: they have to save and to end at the same place
        self.previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self.previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number, frame):
        self.received = True

    def _agree(self, args) -> bool:
        self.agreed = self.received
        if args.world_size > 1:
            received = torch.tensor(int(self.received), device=args.device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.agreed = bool(received)
        return self.agreed

    def on_step_end(self, args, state, control, **kwargs):
        # At the end of an epoch first comes its evaluation, which a checkpoint before it would leave out.
        if self._agree(args) and state.epoch % 1 != 0:
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._agree(args):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            self._end(f"saved at step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        if self._agree(args):  # it came in the last evaluation
            self._end("after the last step, before the end of the command")
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def _end(self, when: str) -> None:
        logger.warning(f"SIGTERM: {when}. Go on with --resume_from_checkpoint last.")
        sys.exit(128 + signal.SIGTERM)
