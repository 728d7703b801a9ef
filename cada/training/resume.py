"""An interrupted training goes on: SIGTERM saves it; a checkpoint is complete and of the same training, or refused."""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from cada.files import CADAError, flush, one_line, read_json, written_whole
from cada.hub.loading import load_model
from cada.hub.record import model_digest
from modeling_cada import CADAForTextToImageRetrieval


logger = logging.get_logger(__name__)

RECIPE_FILE = "cada_recipe.json"
# In the recipe; with another number the training goes on, with a warning: what is not as it was, and the remedy.
_WARNED = {
    "threads": "Sums round differently then: weights are not equal to the bit. Set OMP_NUM_THREADS as it was.",
    "processes": "Dropout goes on with other random numbers then.",
}
# Arguments on which the weights depend, and which of them are kept; with other ones it is another training.
_RECIPE = (
    *("seed", "data_seed", "num_train_epochs", "max_steps", "gradient_accumulation_steps", "dataloader_drop_last"),
    *(
        "learning_rate",
        "muon_learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
    ),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "mixed_precision"),
    *("negative_sampling", "negative_temperature_start", "negative_temperature_end", "label_noise_robust"),
    *("metric_for_best_model", "load_best_model_at_end"),
)
_ANEW = "start a new training from its weights: --model_name_or_path {}, with another --output_dir."
_OTHER = f"Take another checkpoint, or {_ANEW}"


def recipe_of(args: TrainingArguments, model: CADAForTextToImageRetrieval, splits: dict[str, Dataset | None]) -> dict:
    """
    What makes a training, as plain values: arguments, the batch of all processes, the configuration, and digests of
    the `model` at its start and of the captions and persons of the `splits`.
    """
    recipe = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in _RECIPE}
    recipe["batch"] = args.train_batch_size * args.world_size
    recipe |= {"threads": torch.get_num_threads(), "processes": args.world_size}
    config = model.config  # of its fields our own: those of another version of transformers may be others
    for prefix, part in {
        "": config,
        "vision_config.": config.vision_config,
        "text_config.": config.text_config,
    }.items():
        fields = set(type(part).__annotations__) - {"vision_config", "text_config"}
        recipe |= {f"{prefix}{name}": getattr(part, name) for name in sorted(fields)}
    recipe["lora_rank"] = getattr(model, "peft_config", None) and model.peft_config["default"].r
    recipe["weights at the start"] = model_digest(model)[:16]
    for split, rows in splits.items():
        if rows is not None:
            content = json.dumps([list(rows["captions"]), list(rows["person_id"])])
            recipe[f"{len(rows)} images of {split}"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return json.loads(json.dumps(recipe, default=str))


def complete(checkpoint: Path, recipe: dict) -> None:
    """Write the recipe, the last file of a checkpoint, once all others are on the disk: now it is complete."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            flush(path)
    with written_whole(checkpoint / RECIPE_FILE) as file:
        file.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def delete_checkpoint(checkpoint: Path) -> None:
    """Its recipe goes first: nobody takes what is left for a checkpoint."""
    (checkpoint / RECIPE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def complete_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Those of a training's `output_dir`, by their steps."""
    return [path for path in map(Path, sort_checkpoints(str(folder))) if (path / RECIPE_FILE).is_file()]


def find_checkpoint(args: TrainingArguments, recipe: dict, wanted: str | None) -> str | None:
    """
    The folder of the checkpoint from which to go on, looked at; `None` to begin.

    Args:
        args: of the training.
        recipe: of the training, by [`recipe_of`].
        wanted: a folder, or `last`, the newest that is complete; `None` to begin.

    Raises:
        CADAError: for a checkpoint that is missing, not whole, or of another training; and for checkpoints that an
            earlier training left where a new one is to begin.
    """
    found, whole = sort_checkpoints(args.output_dir), complete_checkpoints(args.output_dir)
    if wanted is None and found:
        raise CADAError(
            f"{found[-1]} is there from an earlier training. Go on with it by --resume_from_checkpoint last, or give "
            "another --output_dir."
        )
    if wanted == "last" and not whole:
        logger.warning(
            f"{args.output_dir} holds no complete checkpoint to resume from: training starts at the beginning."
        )
    if wanted is None or wanted == "last" and not whole:
        return None
    folder = whole[-1] if wanted == "last" else Path(wanted)
    if not (folder / RECIPE_FILE).is_file():
        raise CADAError(
            f"--resume_from_checkpoint {wanted} is no complete checkpoint of a training: it has no {RECIPE_FILE}, "
            "which is written last. Give the folder of one, or `last`."
        )
    _check_recipe(folder, recipe)
    _check_whole(folder, args)
    return str(folder)


def _check_recipe(folder: Path, recipe: dict) -> None:
    """It is a checkpoint of the same training, see [`recipe_of`]."""
    try:
        saved = read_json(folder / RECIPE_FILE)
        if not isinstance(saved, dict):
            raise CADAError(f"{folder / RECIPE_FILE} holds something else.")
    except CADAError as error:
        raise CADAError(f"{folder} is not whole. {error} {_OTHER.format(folder)}") from error
    changed = [name for name in {**saved, **recipe} if saved.get(name) != recipe.get(name)]
    for name in _WARNED.keys() & changed:
        logger.warning(
            f"{folder} was trained with {saved.get(name)} {name}, this run has {recipe[name]}. {_WARNED[name]}"
        )
        changed.remove(name)
    if changed:
        changed = [f"{name} ({saved.get(name, '-')}, now {recipe.get(name, '-')})" for name in changed]
        raise CADAError(
            f"{folder} is of another training: {', '.join(changed)}. Give the same arguments as before, or "
            f"{_ANEW.format(folder)}"
        )


def _check_whole(folder: Path, args: TrainingArguments) -> None:
    """All that a training goes on from is there and can be read; its best checkpoint too, which it may end with."""
    try:
        state = TrainerState.load_from_json(folder / TRAINER_STATE_NAME)
    except (OSError, TypeError, ValueError) as error:
        raise CADAError(
            f"{folder / TRAINER_STATE_NAME} is damaged ({one_line(error)}). {_OTHER.format(folder)}"
        ) from error
    try:
        load_model(folder)
    except CADAError as error:
        raise CADAError(f"{error} Or {_ANEW.format('another checkpoint')}") from error
    own = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    names = ["optimizer.pt", "scheduler.pt", own]
    if not (folder / own).is_file() and list(folder.glob("rng_state*.pth")):  # of another number of processes
        names.remove(own)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CADAError(
            f"{folder} lacks {', '.join(missing)}, as with --save_only_model: a training cannot go on from it. "
            f"{_OTHER.format(folder)}"
        )
    for name in names:
        try:
            with safe_globals():
                torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of any kind, as the damage is
            reason = one_line(error).split(".")[0]  # what follows would advise to run its code
            raise CADAError(f"{folder / name} is damaged ({reason}). {_OTHER.format(folder)}") from error
    if state.best_model_checkpoint is not None:
        best = Path(args.output_dir, Path(state.best_model_checkpoint).name)  # the `output_dir` may have been moved
        if not best.is_dir():
            best = folder.parent / best.name  # of a run that goes on in another folder
        if not best.is_dir():
            raise CADAError(f"The best checkpoint so far, {best}, is gone. Bring it back, or {_ANEW.format(folder)}")
        try:
            load_model(best)
        except CADAError as error:
            raise CADAError(f"The best checkpoint so far is damaged. {error} Or {_ANEW.format(folder)}") from error


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
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_model_checkpoint is None and best.is_dir():  # the `output_dir` was moved since
            state.best_model_checkpoint = str(best)
        self.received = self.agreed = False
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
        if self._agree(args) and state.epoch % 1 != 0 and state.global_step < state.max_steps:
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._agree(args):
            control.should_save = True

    def on_evaluate(self, args, state, control, **kwargs):
        if self._agree(args):  # it came in the evaluation; what is to be saved is saved next
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            self._end(f"saved at step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        if self._agree(args):  # it came in the last evaluation
            self._end("after the last step, before the end of the command")
        self.restore()

    def restore(self) -> None:
        """What SIGTERM did before the training, which has ended or failed."""
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
        self.previous = None

    def _end(self, when: str) -> None:
        logger.warning(f"SIGTERM: {when}. Go on with --resume_from_checkpoint last.")
        sys.exit(128 + signal.SIGTERM)
