"""
Train and evaluate CADA on a PEDES set, on the drawn set, or on any data set with the same columns.

    python train_cada.py --dataset cuhk_pedes --data_dir /data/CUHK-PEDES --model_name_or_path my-start \\
        --output_dir runs/cuhk --do_train --do_predict
    python train_cada.py recipes/cuhk_pedes.json --data_dir /data/CUHK-PEDES

The defaults are the paper's recipe. Several processes: `accelerate launch train_cada.py ...` with the same arguments;
the batch size is then per process, and the paper's 96 is the product of both.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import transformers
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, set_seed
from transformers.image_utils import SizeDict
from transformers.utils import logging

from cada.data.loading import hold_out_persons, load_pairs_dataset, shared_persons
from cada.data.pairs import PairCollator, PairDataset, add_attribute_spans
from cada.data.pedes import PEDES_SETS
from cada.files import (
    CADAError,
    checkpoint_written_whole,
    make_output_folder,
    only_writer,
    parse_json,
    read_json,
    run_command,
)
from cada.hardware import cpu_has_bfloat16
from cada.hub.convert import SOURCES, convert, convert_processor, default_image_size, describe_origin
from cada.hub.loading import (
    WEIGHTS,
    WEIGHTS_INDEX,
    check_processor,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
)
from cada.hub.publish import check_licence, open_repository
from cada.hub.record import (
    RANDOM_START,
    after_training,
    checkpoint_digest,
    environment,
    model_digest,
    read_run,
    read_start,
    trained_on,
    write_run,
)
from cada.training.resume import find_checkpoint
from cada.training.trainer import CADATrainer, CADATrainingArguments, check_processes, made_of_arguments, whole_model
from configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig
from modeling_cada import CADAForTextToImageRetrieval, resize_positions
from processing_cada import CADAImageProcessor, CADAProcessor


logger = logging.get_logger(__name__)

HALF_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}


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
            "help": "BLIP or another foreign checkpoint to start from, converted as by `cada convert`: a folder or "
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


def read_overrides(text: str | None) -> dict:
    """Fields of the configuration from a JSON string or the name of a JSON file."""
    if not text:
        return {}
    shown = text if len(text) <= 100 else f"{text[:100]} ..."
    is_file = not text.lstrip().startswith("{")
    if is_file and not os.path.isfile(text):
        raise CADAError(f"--config_overrides {shown!r} is neither a JSON object nor a file.")
    try:
        overrides = read_json(text) if is_file else parse_json(text)
    except CADAError as error:
        raise CADAError(f"--config_overrides: {error}") from error
    except ValueError as error:
        raise CADAError(f"--config_overrides {shown!r} is not JSON: {error}.") from error
    if not isinstance(overrides, dict):
        raise CADAError(f"--config_overrides {shown!r} should be a JSON object with fields of CADAConfig.")
    towers = {"vision_config": CADAVisionConfig, "text_config": CADATextConfig}
    for name in towers:
        if not isinstance(overrides.get(name, {}), dict):
            raise CADAError(f"--config_overrides: `{name}` should be an object with fields of its own.")
    parts = [(CADAConfig, overrides), *((kind, overrides.get(name, {})) for name, kind in towers.items())]
    for kind, fields in parts:
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
        raise CADAError("Choose one start: --model_name_or_path or --init_from.")
    if arguments.vocabulary_head is not None and arguments.init_from is None:
        raise CADAError("--vocabulary_head goes with --init_from, which is not given.")
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
    Load the splits that the run needs; hold persons out for validation where the set has none; find the attributes
    that ARA masks. Returns the splits and how many persons were held out of train.
    """
    held_out = 0
    if data.holdout_persons < 0:
        raise CADAError(f"--holdout_persons is {data.holdout_persons}. Give 0 or more.")
    with args.main_process_first(desc="loading the data set"):
        needed = {"train": args.do_train, "val": args.do_train or args.do_eval, "test": args.do_predict}
        splits = load_pairs_dataset(
            data.dataset,
            data.data_dir,
            data.captions_per_image,
            data.skip_unreadable,
            revision=data.dataset_revision,
            splits=[split for split, is_needed in needed.items() if is_needed],
        )
        if needed["val"] and "val" not in splits and data.holdout_persons > 0:
            # The same persons whatever the seed of the run, so that runs can be compared.
            held_out = data.holdout_persons
            splits = DatasetDict({**splits, **hold_out_persons(splits["train"], held_out)})
            logger.warning(
                f"{data.dataset} has no validation split: {data.holdout_persons} persons of train choose the "
                "checkpoint (--holdout_persons)."
            )
        elif args.do_eval and not args.do_train and "val" not in splits:
            raise CADAError(f"{data.dataset} has no split 'val', and --holdout_persons 0 takes no persons of train.")
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
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_epsilon": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "precision": HALF_PRECISION.get(args.mixed_precision, "float32"),
        "negative_sampling": args.negative_sampling,
        "unreadable_images_skipped": data.skip_unreadable,
    }
    if args.negative_sampling == "annealed":
        recipe["negative_temperature"] = f"{args.negative_temperature_start} to {args.negative_temperature_end}"
    given = {name: getattr(args, name) for name in ("lr_scheduler_kwargs", "optim_args", "data_seed")}
    given["config_overrides"] = read_overrides(model.config_overrides)
    recipe |= {name: value for name, value in given.items() if value not in (None, "", {})}
    return {
        "dataset": name_of_set(data, rows),
        "captions_per_image": data.captions_per_image,
        "start": "random weights" if start is None else Path(start).name if Path(start).exists() else start,
        "data": {"persons": len(set(rows["person_id"])), "images": len(rows), "pairs": pairs},
        "recipe": recipe,
        "selected_by": f"{args.metric_for_best_model} on validation" if chosen else None,
        "seed": args.seed,
        **environment(args.world_size),
    }


def describe_evaluation(
    trainer: CADATrainer, data: DataArguments, split: str, scores: dict[str, float], prefix: str, rows: Dataset
) -> dict:
    """The scores of a split with what is needed to compare them."""
    names = ("queries", "gallery", "rerank_k")
    plain = {name.removeprefix(f"{prefix}_"): value for name, value in scores.items()}
    model = whole_model(trainer.accelerator.unwrap_model(trainer.model))
    of_weights = str(model.dtype).removeprefix("torch.")
    return {
        "dataset": name_of_set(data, rows),
        "split": split,
        "captions_per_image": data.captions_per_image,
        "unreadable_images_skipped": data.skip_unreadable,
        "precision": HALF_PRECISION.get(trainer.args.mixed_precision, of_weights),
        "metrics": {k: v for k, v in plain.items() if k in names or k.startswith(("global_", "local_"))},
        "weights": model_digest(model),
        **environment(trainer.args.world_size),
    }


def check_hold_out(record: dict, dataset: str, held_out: int) -> None:
    """
    Persons that weights were trained on are no validation set. `record` is that of the weights; `dataset` is named as
    by [`name_of_set`]. Of several hold-outs of a set the larger one holds all persons of the smaller one.
    """
    unseen = trained_on(record).get(dataset, held_out)
    if unseen < held_out:
        raise CADAError(
            f"{held_out} persons of train would be the validation set, but the training of these weights on {dataset} "
            f"held out {unseen} only. Pass --holdout_persons {unseen}, or --do_predict alone."
        )


def holds_weights(folder: str, model: CADAForTextToImageRetrieval) -> bool:
    """
    Whether the `--output_dir` of an evaluation holds the weights of `model`.

    Raises:
        CADAError: where it holds others, whose record would be replaced.
    """
    if not any((Path(folder) / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return False
    if checkpoint_digest(folder) != model_digest(model):
        raise CADAError(
            f"--output_dir {folder} holds other weights than the evaluated ones, with a record of their own. Choose "
            "another --output_dir."
        )
    return True


def run(model_arguments: ModelArguments, data: DataArguments, args: CADATrainingArguments) -> dict[str, float]:
    """Train, evaluate on validation, test: what `args` asks for. Returns all metrics."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise CADAError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    check_processes(args)
    if args.mixed_precision == "bf16" and args.device.type == "cpu" and not cpu_has_bfloat16():
        logger.warning(
            "This processor has no instructions for bfloat16: --bf16 is slower than float32. Add --bf16 false."
        )
    make_output_folder(args.output_dir)  # what keeps from saving shows now, not after days of training
    with only_writer(args.output_dir) if args.process_index == 0 else nullcontext():
        return train_and_evaluate(model_arguments, data, args)


def train_and_evaluate(
    model_arguments: ModelArguments, data: DataArguments, args: CADATrainingArguments
) -> dict[str, float]:
    """[`run`], after its looks at the machine and the output folder."""
    set_seed(args.seed)
    # Read once: a file may be another one when a checkpoint is written.
    overrides = json.dumps(read_overrides(model_arguments.config_overrides))
    model_arguments = replace(model_arguments, config_overrides=overrides)
    try:
        model, processor = load_model_and_processor(model_arguments)
    except StrictDataclassError as error:
        raise CADAError(f"The configuration does not hold together. {error}") from error
    if model_arguments.attn_implementation is not None:
        with made_of_arguments("The attention"):
            model.set_attn_implementation(model_arguments.attn_implementation)
    splits, held_out = prepare_data(data, args, processor, find_attributes=model.config.use_ara)
    origin, training = find_history(model_arguments, args.do_train)
    evaluations = []
    if not args.do_train:
        earlier = read_run(args.output_dir)
        evaluations = earlier["evaluations"]
        if holds_weights(args.output_dir, model):  # a checkpoint of a run has no record, the folder of the run has one
            origin, training = earlier["origin"] or origin, earlier["training"] or training
    if held_out:
        check_hold_out({"origin": origin, "training": training}, name_of_set(data, splits["val"]), held_out)
    if args.do_train and "val" not in splits:
        # Nothing to choose by. The test split must not choose.
        logger.warning("No validation split: the last checkpoint is kept, whatever its score.")
        args.eval_strategy, args.load_best_model_at_end, args.do_eval = "no", False, False
    if not model.config.use_atp and "local_" in (args.metric_for_best_model or ""):
        if args.metric_for_best_model != "local_R1":
            raise CADAError(
                f"--metric_for_best_model is {args.metric_for_best_model}, but without match heads (`use_atp`) there "
                "is no local matching. Choose global_R1, say."
            )
        args.metric_for_best_model = "global_R1"  # the default, as far as it goes
    if args.push_to_hub and args.process_index == 0:
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        check_licence(origin, licence_granted=False)  # now, not after days of training
        open_repository(repo_id, args.hub_tag, args.hub_private_repo, args.hub_token, args.hub_overwrite)
    train_pairs = None
    if args.do_train:
        train_pairs = PairDataset(splits["train"], processor.image_size)
    with made_of_arguments("The Trainer"):  # a logger that is not installed, say
        trainer = CADATrainer(
            model=model,
            args=args,
            data_collator=PairCollator(processor, mask=model.config.use_ara),
            train_dataset=train_pairs,
            eval_dataset=splits.get("val"),
            processing_class=processor,
        )
    if args.do_train:

        def write_record(folder: Path, minutes: float | None = None) -> dict:
            training = describe_training(model_arguments, data, args, splits["train"], len(train_pairs), trainer.state)
            training["recipe"]["persons_held_out_of_train"] = held_out
            for split, count in shared_persons(splits).items():
                training["recipe"][f"persons_of_train_also_in_{split}"] = count
            training["minutes"] = minutes
            write_run(folder, origin, training, [])
            return training

        trainer.write_record = write_record
        checkpoint = find_checkpoint(args, trainer.recipe)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_world_process_zero():
            # With the record, as an evaluation may fail. The push waits for the evaluation.
            with checkpoint_written_whole(args.output_dir) as folder:
                trainer.save_model(str(folder), _internal_call=True)
                training = write_record(folder, None if checkpoint else result.metrics["train_runtime"] / 60)
        else:
            trainer.save_model(_internal_call=True)  # FSDP gathers the weights from all processes
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
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
    def error(self, message: str) -> NoReturn:  # in the form of all other errors
        raise CADAError(f"{message} (`python train_cada.py --help` lists all arguments.)")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Parse the command line, which may begin with a recipe (a JSON file of arguments), and run."""
    parser = _Parser((ModelArguments, DataArguments, CADATrainingArguments), description=__doc__)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].endswith(".json"):
        arguments = [*read_recipe(arguments[0], arguments[1:]), *arguments[1:]]  # the last of two equal ones counts
    try:
        if not parser.parse_known_args(arguments)[0].do_train:  # nothing is chosen, and `do_eval` stays as asked
            arguments += ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
        parsed = parser.parse_args_into_dataclasses(arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:  # unknown arguments, wrong values
        raise CADAError(f"{error} (`python train_cada.py --help` lists all arguments.)") from error
    logging.set_verbosity(parsed[2].get_process_log_level())
    logging.disable_progress_bar()  # for each model that is loaded or saved; the bars of the phases stay
    transformers.logging.enable_explicit_format()
    return run(*parsed)


if __name__ == "__main__":
    sys.exit(run_command(main))
