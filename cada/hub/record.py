"""What a run leaves beside the weights: `cada_run.json`."""

import datetime
import hashlib
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import torch
from safetensors.torch import load_file
from transformers.utils import cached_file, logging

from cada.data.pedes import PEDES_SETS
from cada.evaluation.metrics import METRICS
from cada.files import CADAError, counted, one_line, read_json, written_whole
from cada.hub.loading import find_adapter, load_model, model_digest, weight_files, weights_digest
from processing_cada import CADAProcessor


logger = logging.get_logger(__name__)

RUN_FILE = "cada_run.json"
DRAWN_TITLES = {"drawn": "the drawn set", "drawn_night": "the drawn set at night"}
TITLES = {**{name: pedes.title for name, pedes in PEDES_SETS.items()}, **DRAWN_TITLES}
RANDOM_START = {"start": "random weights", "licence": None}
UNKNOWN_START = {"start": "weights whose origin is not recorded", "licence": "not recorded"}
NO_LICENCE = "none: the authors' repository names no licence"
# Meets the rules of a tokenizer: case, accents, punctuation, signs without words, letters of other scripts.
_PROBE = "A Wömän's T-shirt, 2 état-d'âme bags & a \u00ad的 hat.\tunaffable"
REPORTED_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "pillow", "nltk")


def environment(processes: int = 1) -> dict:
    """Where and when something is measured: `{"date", "hardware", "versions": {package: version}}`."""
    if torch.cuda.is_available():
        hardware = f"{processes} × {torch.cuda.get_device_name()}"
    else:
        cpuinfo = Path("/proc/cpuinfo")  # of Linux
        names = re.findall("model name.*: (.*)", cpuinfo.read_text("utf-8")) if cpuinfo.exists() else []
        hardware = f"{os.cpu_count()} CPU cores ({names[0] if names else platform.machine()}), no GPU"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED_PACKAGES}},
    }


class Origin(TypedDict):
    """Where weights come from, before training."""

    start: str
    licence: str | None
    trained_on: NotRequired[dict[str, int]]  # sets of earlier trainings: persons of train that each held out


class _Measured(TypedDict):
    dataset: str
    captions_per_image: int | None
    date: str
    hardware: str
    versions: dict[str, str]


class _Data(TypedDict):
    persons: NotRequired[int]  # nobody counts those of a stream
    images: NotRequired[int]
    pairs: int  # of a stream, how many were read


class _Recipe(TypedDict):
    persons_held_out_of_train: NotRequired[int]  # and the options of the training


class _Metrics(TypedDict):
    queries: int
    gallery: int
    rerank_k: int  # and R1, R5, R10, mAP and mINP in percent of each stage, such as `global_R1`


class Training(_Measured):
    """What a model was trained on and how."""

    data: _Data
    recipe: _Recipe
    selected_by: str | None
    seed: int
    minutes: float | int | None


class Evaluation(_Measured):
    """The scores of some weights, which their digest names."""

    split: str
    metrics: _Metrics
    weights: str
    precision: str
    unreadable_images_skipped: bool
    calibrated_on: NotRequired[str]  # where there are scores with half of the persons absent


class Run(TypedDict):
    """The record of a run; where nobody recorded the origin, or nothing was trained, `None` stands."""

    origin: Origin | None
    training: Training | None
    evaluations: list[Evaluation]


def read_run(folder: str | os.PathLike) -> Run:
    """The record of a run, `cada_run.json` in `folder`, empty without one; a `CADAError` where it is damaged."""
    path = Path(folder) / RUN_FILE
    if not os.path.lexists(path):
        return {"origin": None, "training": None, "evaluations": []}
    try:
        run = read_json(path)
        _check(run, Run, "record")
        for number, row in enumerate(run["evaluations"]):
            stages = [stage for stage in ("global", "local") if f"{stage}_R1" in row["metrics"]]
            for name in (f"{stage}_{metric}" for stage in stages for metric in METRICS):
                _check(row["metrics"].get(name), float | int, f"record.evaluations[{number}].metrics.{name}")
    except ValueError as error:
        raise CADAError(f"{path} is damaged ({one_line(error)}). Delete it, or run again.") from error
    return {name: run[name] for name in Run.__annotations__}


def _check(value, kind, where: str) -> None:
    """`value` is of the type `kind`: a class above, a list, a dictionary; in a union it comes first."""
    kind, *others = get_args(kind) if isinstance(kind, UnionType) else [kind]
    if type(value) in others:
        return
    outer, *inner = get_origin(kind) or kind, *get_args(kind)
    if type(value) is not (dict if is_typeddict(kind) else outer):
        raise ValueError(f"`{where}` is {value!r:.80}")
    if is_typeddict(kind):
        missing = sorted(kind.__required_keys__ - value.keys())
        if missing:
            raise ValueError(f"`{where}` has no `{missing[0]}`")
        for name, part in get_type_hints(kind).items():
            if name in value:
                _check(value[name], part, f"{where}.{name}")
    for key, part in value.items() if outer is dict else enumerate(value) if outer is list else ():
        _check(part, inner[-1], f"{where}[{key!r}]")


def read_start(name: str, revision: str | None = None) -> Run:
    """The record ([`read_run`]) of a checkpoint in a folder or, at a tag, branch or commit, on the Hub."""
    if Path(name).is_dir():
        return read_run(name)
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, RUN_FILE, revision=revision, **options)
    if path is None:
        logger.warning(f"{name} has no {RUN_FILE} that can be read: the origin of its weights is not recorded.")
    return read_run(Path(path).parent if path else name)


def after_training(run: Run) -> Origin | None:
    """The `origin` of what starts from the weights of a run: its own, and the set that it was trained on."""
    origin, training = run["origin"], run["training"]
    return origin if training is None else {**(origin or UNKNOWN_START), "trained_on": trained_on(run)}


def trained_on(run: Run) -> dict[str, int]:
    """The sets that the weights of a record were trained on, each with how many persons of train they never saw."""
    sets, training = dict((run["origin"] or {}).get("trained_on", {})), run["training"]
    if training is not None:
        held_out = training["recipe"].get("persons_held_out_of_train", 0)
        sets[training["dataset"]] = min(held_out, sets.get(training["dataset"], held_out))
    return sets


def write_run(
    folder: str | os.PathLike, origin: Origin | None, training: Training | None, evaluations: list[Evaluation]
) -> None:
    """Write the record of a run; an evaluation takes the place of an older one of the same weights and protocol."""
    run = {"origin": origin, "training": training, "evaluations": newest(evaluations)}
    with written_whole(Path(folder) / RUN_FILE) as path:
        path.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def newest(evaluations: list[dict]) -> list[dict]:
    """The last evaluation of each protocol."""
    names = ("weights", "dataset", "split", "captions_per_image", "unreadable_images_skipped", "precision")
    sizes = ("queries", "gallery", "rerank_k")
    rows = {(*map(row.get, names), *map(row["metrics"].get, sizes)): row for row in evaluations}
    return list(rows.values())


def evaluations_of(digest: str, folder: str | os.PathLike) -> list[Evaluation]:
    """What the record of a folder says of these weights. Evaluations of others are left out, with a warning."""
    rows = read_run(folder)["evaluations"]
    own = [row for row in rows if row["weights"] == digest]
    if len(own) < len(rows):
        left_out = counted(len(rows) - len(own), "evaluation")
        logger.warning(f"{Path(folder) / RUN_FILE}: left out {left_out} of other weights.")
    return own


def search_digest(model, processor: CADAProcessor, weights: str | None = None) -> str:
    """
    SHA-256 of the weights and of the settings that change features or scores, those of training left out. `weights` is
    the digest of the weights where the model, as graphs, no longer has them.
    """
    config, tokenizer, images = model.config, processor.tokenizer, processor.image_processor.to_dict()
    training = ("initializer_range", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    # Neither a field that a later version adds with a neutral default changes it, nor another form of tokenizer files.
    settings = {
        side: {
            name: getattr(tower, name)
            for name in type(tower).__annotations__
            if name not in training and getattr(tower, name) != getattr(type(tower), name, None)
        }
        for side, tower in (("vision", config.vision_config), ("text", config.text_config))
    }
    settings["config"] = [config.projection_dim, config.max_text_length, config.match_score, config.use_atp]
    names = ("do_convert_rgb", "do_resize", "size", "resample", "do_rescale", "rescale_factor")
    names += ("do_normalize", "image_mean", "image_std")
    settings["images"] = {name: images.get(name) for name in names}
    backend = tokenizer.backend_tokenizer
    words = _PROBE if backend.normalizer is None else backend.normalizer.normalize_str(_PROBE)
    words = words if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(words)
    settings["texts"] = [words, tokenizer(_PROBE)["input_ids"], tokenizer.get_vocab()]
    settings["texts"] += [tokenizer.model_max_length, tokenizer.init_kwargs.get("max_length")]
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{weights or model_digest(model)}{text}".encode()).hexdigest()


def checkpoint_digest(folder: str | os.PathLike) -> str:
    """[`weights_digest`] of the files of a checkpoint; of an adapter, [`model_digest`] with its base."""
    if find_adapter(folder) is not None:
        return model_digest(load_model(folder))
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= load_file(path)
    return weights_digest(tensors.items())


def set_title(dataset: str) -> str:
    """The name of a set as a reader knows it."""
    return TITLES.get(dataset, dataset)
