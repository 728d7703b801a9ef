"""What goes into the record of a run, `cada_run.json`: the start, the training, each evaluation."""

from glob import has_magic
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import TrainerState
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from cada.data.loading import DRAWN_SETS, shared_persons
from cada.data.pedes import PEDES_SETS
from cada.files import CADAError
from cada.hub.convert import describe_origin
from cada.hub.loading import WEIGHTS, WEIGHTS_INDEX
from cada.hub.record import (
    RANDOM_START,
    Evaluation,
    Run,
    Training,
    after_training,
    checkpoint_digest,
    environment,
    model_digest,
    read_run,
    read_start,
    trained_on,
)
from cada.training.arguments import CADATrainingArguments, DataArguments, ModelArguments
from modeling_cada import CADAForTextToImageRetrieval


HALF_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}
# Arguments that stand in the record under their own names.
ALWAYS = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
WHERE_GIVEN = ("muon_learning_rate", "lr_scheduler_kwargs", "optim_args", "data_seed")


def name_of_set(data: DataArguments, rows: Dataset | None) -> str:
    """
    The set's name for the record of the run; `rows` is `None` for a stream. One's own folders are named, not located,
    and marked as such; the drawn set stands in a folder `drawn`, as `cada demo` leaves it.
    """
    if data.dataset in PEDES_SETS:
        return data.dataset
    if data.dataset in DRAWN_SETS:
        return "drawn_night" if data.dataset == "demo_night" else "drawn"
    path = Path(data.dataset).parent if has_magic(data.dataset) else Path(data.dataset)
    if path.name == "drawn" and rows is not None and "named_attributes" in rows.column_names:
        return "drawn"
    return f"{path.name} (own data)" if path.exists() else data.dataset


def describe_start(arguments: ModelArguments, args: CADATrainingArguments, model: CADAForTextToImageRetrieval) -> Run:
    """
    The record of the weights before this run: where they come from (`None` where the start does not tell), and how
    they were trained. A training on top of another moves the earlier one into the origin.

    Raises:
        CADAError: where an evaluation would replace the record of other weights in the `output_dir`.
    """
    if arguments.init_from is not None:
        start = {"origin": describe_origin(arguments.init_source, arguments.init_from), "training": None}
    elif arguments.model_name_or_path is None:
        start = {"origin": RANDOM_START, "training": None}
    else:
        start = read_start(arguments.model_name_or_path, arguments.model_revision)
    if args.do_train:
        return {"origin": after_training(start), "training": None, "evaluations": []}
    earlier = read_run(args.output_dir)
    if any((Path(args.output_dir) / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX, ADAPTER_SAFE_WEIGHTS_NAME)):
        if checkpoint_digest(args.output_dir) != model_digest(model):
            raise CADAError(
                f"--output_dir {args.output_dir} holds other weights than the evaluated ones, with a record of their "
                "own. Choose another --output_dir."
            )
        # A checkpoint of a run has no record of the whole run, the folder of the run has one.
        start = {name: earlier[name] or start[name] for name in ("origin", "training")}
    return {"origin": start["origin"], "training": start["training"], "evaluations": earlier["evaluations"]}


def check_hold_out(record: Run, dataset: str, held_out: int) -> None:
    """
    Persons that weights were trained on are no validation set. `record` is that of the weights; `dataset` is named as
    by [`name_of_set`]. Of several hold-outs of a set the larger one holds all persons of the smaller one.

    Raises:
        CADAError: where the weights have seen some of the `held_out` persons.
    """
    unseen = trained_on(record).get(dataset, held_out)
    if unseen < held_out:
        raise CADAError(
            f"{held_out} persons of train would be the validation set, but the training of these weights on {dataset} "
            f"held out {unseen} only. Pass --holdout_persons {unseen}, or --do_predict alone."
        )


def _count(rows: Dataset | None, read: int) -> dict[str, int]:
    """Persons, images and pairs of the rows of train, or how many pairs of a stream were `read`."""
    if rows is None:
        return {"pairs": read}
    return {"persons": len(set(rows["person_id"])), "images": len(rows), "pairs": sum(map(len, rows["captions"]))}


def _describe_reading(data: DataArguments, left_out: int) -> dict[str, str | int | bool]:
    """Options of the data, and what was left out."""
    if not data.streaming:
        return {"unreadable_images_skipped": data.skip_unreadable}
    person = data.person_column or "every image is a person of its own"
    columns = f"{data.image_column}; {', '.join(data.caption_column)}; {person}"
    return {"unreadable_pairs_left_out": left_out, "columns": columns, "shuffle_buffer": data.shuffle_buffer}


def describe_training(
    model: ModelArguments,
    data: DataArguments,
    args: CADATrainingArguments,
    splits: DatasetDict,
    held_out: int,
    state: TrainerState,
    left_out: int = 0,
    minutes: float | None = None,
    checkpoint: Path | None = None,
) -> Training:
    """
    What a reader of the model card needs to repeat the training, of its end or of a `checkpoint` on the way, with the
    number of pairs `left_out` of a stream. Folders of this machine are named, not located.
    """
    start = model.model_name_or_path or model.init_from
    rows = splits.get("train")  # none of a stream
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    chosen = best is not None and (checkpoint is None or checkpoint.name == Path(best).name)
    recipe = {
        **({} if data.streaming else {"epochs": round(state.epoch, 2)}),
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "optimizer": getattr(args.optim, "value", args.optim),
        "learning_rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps if args.warmup_steps >= 1 else f"{100 * args.warmup_steps:g}% of all",
        **{name: getattr(args, name) for name in ALWAYS},
        "precision": HALF_PRECISION.get(args.mixed_precision, "float32"),
        "negative_sampling": args.negative_sampling,
        **_describe_reading(data, left_out),
        "persons_held_out_of_train": held_out,
        **{f"persons_of_train_also_in_{split}": count for split, count in shared_persons(splits).items()},
    }
    if args.negative_sampling == "annealed":
        recipe["negative_temperature"] = f"{args.negative_temperature_start} to {args.negative_temperature_end}"
    given = {name: getattr(args, name) for name in WHERE_GIVEN}
    given |= {"config_overrides": model.config_overrides, "lora_rank": model.lora_rank}
    given["label_noise_robust"] = args.label_noise_robust or None
    recipe |= {name: value for name, value in given.items() if value not in (None, "", {})}
    drawn = recipe["steps"] * recipe["batch_size"] * recipe["gradient_accumulation_steps"]
    return {
        "dataset": name_of_set(data, rows),
        "captions_per_image": data.captions_per_image,
        "start": "random weights" if start is None else Path(start).name if Path(start).exists() else start,
        "data": _count(rows, drawn - left_out),
        "recipe": recipe,
        "selected_by": f"{args.metric_for_best_model} on validation" if chosen else None,
        "seed": args.seed,
        "minutes": minutes,
        **environment(args.world_size),
    }


def describe_evaluation(
    model: CADAForTextToImageRetrieval,
    data: DataArguments,
    args: CADATrainingArguments,
    split: str,
    rows: Dataset,
    scores: dict[str, float],
) -> Evaluation:
    """The `scores` of a split, with names as of [`evaluate_retrieval`], and what is needed to compare them."""
    names, fitted = ("queries", "gallery", "rerank_k"), model.config.calibration
    calibrated_on = {} if "open_ECE" not in scores else {"calibrated_on": fitted["set"]}
    return {
        "dataset": name_of_set(data, rows),
        "split": split,
        "captions_per_image": data.captions_per_image,
        "unreadable_images_skipped": data.skip_unreadable,
        "precision": HALF_PRECISION.get(args.mixed_precision, str(model.dtype).removeprefix("torch.")),
        "metrics": {k: v for k, v in scores.items() if k in names or k.startswith(("global_", "local_", "open_"))},
        "weights": model_digest(model),
        **calibrated_on,
        **environment(args.world_size),
    }
