"""
Train and evaluate CADA on a PEDES set, on the drawn set, or on any data set with the same columns; pre-train it on any
images with captions (--streaming).

    python train_cada.py --dataset cuhk_pedes --data_dir /data/CUHK-PEDES --model_name_or_path my-start \\
        --output_dir runs/cuhk --do_train --do_predict
    python train_cada.py recipes/cuhk_pedes.json --data_dir /data/CUHK-PEDES

The defaults are the paper's recipe. Several processes: `accelerate launch train_cada.py ...` with the same arguments;
the batch size is then per process, and the paper's 96 is the product of both.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import transformers
from datasets import DatasetDict
from transformers import set_seed
from transformers.utils import logging

from cada.data.pairs import PairCollator, PairDataset
from cada.data.streams import StreamCollator
from cada.evaluation.calibration import save_calibration
from cada.files import CADAError, checkpoint_written_whole, make_output_folder, only_writer, run_command
from cada.hardware import cpu_has_bfloat16
from cada.hub.publish import check_licence, open_repository
from cada.hub.record import Run, write_run
from cada.training.arguments import (
    CADATrainingArguments,
    DataArguments,
    ModelArguments,
    made_of_arguments,
    parse_arguments,
)
from cada.training.describe import check_hold_out, describe_evaluation, describe_start, describe_training, name_of_set
from cada.training.lora import check_lora
from cada.training.start import load_splits, load_stream, make_model_and_processor
from cada.training.trainer import CADATrainer, check_processes
from modeling_cada import CADAForTextToImageRetrieval


logger = logging.get_logger(__name__)


def choose_by_what_is_there(args: CADATrainingArguments, model: CADAForTextToImageRetrieval, has_val: bool) -> None:
    """Without a validation set nothing chooses a checkpoint, and without match heads no score of local matching."""
    if args.do_train and not has_val:
        logger.warning("No validation split: the last checkpoint is kept, whatever its score.")
        args.eval_strategy, args.load_best_model_at_end, args.do_eval = "no", False, False
    if not model.config.use_atp and "local_" in (args.metric_for_best_model or ""):
        if args.metric_for_best_model != "local_R1":
            raise CADAError(
                f"--metric_for_best_model is {args.metric_for_best_model}, but without match heads (`use_atp`) there "
                "is no local matching. Choose global_R1, say."
            )
        args.metric_for_best_model = "global_R1"  # the default, as far as it goes


def train(trainer: CADATrainer, describe: partial, record: Run, name: str) -> None:
    """
    Train, from the checkpoint where there is one to go on from, save the model with the record of the run, and
    calibrate it on the validation split of the set, which has this `name`.
    """
    args = trainer.args
    trainer.write_record = lambda folder: write_run(
        folder, record["origin"], describe(trainer.state, trainer.left_out, checkpoint=folder), []
    )
    result = trainer.train()
    # Of a resumed run nobody knows the whole.
    minutes = None if trainer.resumed_from else result.metrics["train_runtime"] / 60
    record["training"] = describe(trainer.state, trainer.left_out, minutes)
    if trainer.is_world_process_zero():
        with checkpoint_written_whole(args.output_dir) as folder:
            trainer.save_model(str(folder), _internal_call=True)
            write_run(folder, record["origin"], record["training"], [])  # what follows may fail
    if trainer.eval_dataset is not None and trainer.model.config.use_atp:
        trainer.calibrate(trainer.eval_dataset, f"{name}, val")
        if trainer.is_world_process_zero():
            save_calibration(args.output_dir, trainer.model.config.calibration)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)


def evaluate(trainer: CADATrainer, sets: list[tuple[DataArguments, DatasetDict]], record: Run) -> dict[str, float]:
    """Evaluate on validation and on test, as asked; the scores go into the record."""
    metrics: dict[str, float] = {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    asked = {"val": trainer.args.do_eval, "test": trainer.args.do_predict}
    for split, (data, splits) in product((split for split in asked if asked[split]), sets):
        prefix = {"val": "eval", "test": "test"}[split] + (f"_{Path(data.dataset).name}" if len(sets) > 1 else "")
        scores = trainer.evaluate(splits[split], metric_key_prefix=prefix, open_set=split == "test")
        trainer.log_metrics(prefix, scores)
        trainer.save_metrics(prefix, scores)
        metrics.update(scores)
        plain = {name.removeprefix(f"{prefix}_"): value for name, value in scores.items()}
        record["evaluations"].append(describe_evaluation(model, data, trainer.args, split, splits[split], plain))
    return metrics


def run(model_arguments: ModelArguments, sets: list[DataArguments], args: CADATrainingArguments) -> dict[str, float]:
    """
    Train, evaluate on validation, test: what `args` asks for, or test on several sets. Returns all metrics; of several
    sets they are named such as `test_rstp_reid_global_R1`.
    """
    data, *others = sets  # the others are tested on
    if not (args.do_train or args.do_eval or args.do_predict):
        raise CADAError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    if others and (args.do_train or args.do_eval):
        raise CADAError("--dataset names several sets: with --do_predict alone. A pattern of files goes in quotes.")
    check_processes(args)
    check_lora(model_arguments, args)
    if args.mixed_precision == "bf16" and args.device.type == "cpu" and not cpu_has_bfloat16():
        logger.warning(
            "This processor has no instructions for bfloat16: --bf16 is slower than float32. Add --bf16 false; to "
            "`accelerate launch`, --mixed_precision no."
        )
    make_output_folder(args.output_dir)  # what keeps from saving shows now, not after days of training
    with only_writer(args.output_dir) if args.process_index == 0 else nullcontext():
        set_seed(args.seed)
        model, processor = make_model_and_processor(model_arguments)
        if data.streaming:
            pairs, splits, held_out = load_stream(data, args, processor, model.config.use_ara), DatasetDict(), 0
            collator = StreamCollator(processor, mask=model.config.use_ara)
        else:
            splits, held_out = load_splits(data, args, processor, find_attributes=model.config.use_ara)
            pairs = PairDataset(splits["train"], processor.image_size) if args.do_train else None
            collator = PairCollator(processor, mask=model.config.use_ara)
        tested = [(data, splits), *((other, load_splits(other, args, processor, False)[0]) for other in others)]
        record = describe_start(model_arguments, args, model)
        if held_out:
            check_hold_out(record, name_of_set(data, splits["val"]), held_out)
        choose_by_what_is_there(args, model, "val" in splits)
        if args.push_to_hub and args.process_index == 0:
            repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
            check_licence(record["origin"], licence_granted=False)  # now, not after days of training
            open_repository(repo_id, args.hub_tag, args.hub_private_repo, args.hub_token, args.hub_overwrite)
        with made_of_arguments("The Trainer"):  # a logger that is not installed, say
            trainer = CADATrainer(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=pairs,
                eval_dataset=splits.get("val"),
                processing_class=processor,
            )
        if args.do_train:
            describe = partial(describe_training, model_arguments, data, args, splits, held_out)
            train(trainer, describe, record, name_of_set(data, splits.get("train")))
        metrics = evaluate(trainer, tested, record)
        if args.do_train:
            trainer.save_state()  # after the last line of the log
        if trainer.is_world_process_zero():
            write_run(args.output_dir, **record)
        if args.push_to_hub:
            trainer.push_to_hub()
        trainer.end()
    return metrics


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Parse the command line, which may begin with a recipe (a JSON file of arguments), and run."""
    parsed = parse_arguments(arguments, description=__doc__)
    logging.set_verbosity(parsed[2].get_process_log_level())
    logging.disable_progress_bar()  # for each model that is loaded or saved; the bars of the phases stay
    transformers.logging.enable_explicit_format()
    return run(*parsed)


if __name__ == "__main__":
    sys.exit(run_command(main))
