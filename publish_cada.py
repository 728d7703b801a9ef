"""
Publish a trained model: check the folder, write the model card from the run, push both to the Hub.

    python publish_cada.py --checkpoint runs/cuhk --repo_id org/cada-cuhk --tag v1.0

`train_cada.py` leaves a record of every run, `cada_run.json`, beside the weights. The card is written from it, and an
evaluation counts only for the very weights that it was made with. Only the files that loading needs are published: no
pickles, no optimizer states.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep

import argparse
import datetime
import fnmatch
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file, logging

from checkpoint_cada import check_config, load_config, weight_files
from data_cada import PEDES_SETS
from evaluation_cada import METRICS
from files_cada import CADAError, Parser, counted, one_line, read_json, run_command, written_whole
from processing_cada import CADAProcessor


logger = logging.get_logger(__name__)

RUN_FILE = "cada_run.json"
CARDS = Path(__file__).resolve().parent / "model_cards"
TEMPLATES = {"cuhk_pedes": "cada-cuhk.md", "icfg_pedes": "cada-icfg.md", "rstp_reid": "cada-rstp.md"}
DRAWN_TITLES = {"drawn": "the drawn set", "drawn_night": "the drawn set at night"}
TEMPLATES |= dict.fromkeys(DRAWN_TITLES, "cada-demo.md")
TITLES = {**{name: pedes.title for name, pedes in PEDES_SETS.items()}, **DRAWN_TITLES}
RANDOM_START = {"start": "random weights", "licence": None}
UNKNOWN_START = {"start": "weights whose origin is not recorded", "licence": "not recorded"}
NO_LICENCE = "none: the authors' repository names no licence"
RELEASED = (
    *("README.md", RUN_FILE, "config.json", "*_cada.py", "*.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)
# Meets the rules of a tokenizer: case, accents, punctuation, signs without words, letters of other scripts.
_PROBE = "A Wömän's T-shirt, 2 état-d'âme bags & a \u00ad的 hat.\tunaffable"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
REPORTED_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "pillow", "nltk")
METRIC_TITLES = {"R1": "Rank-1", "R5": "Rank-5", "R10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}


class PublishError(CADAError):
    """Something keeps a model from being published. The message names it and the remedy."""


def environment(processes: int = 1) -> dict:
    """Where and when something is measured: `{"date", "hardware", "versions": {package: version}}`."""
    if torch.cuda.is_available():
        hardware = f"{processes} × {torch.cuda.get_device_name()}"
    else:
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        hardware = f"{os.cpu_count()} CPU cores ({names[0] if names else platform.machine()}), no GPU"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED_PACKAGES}},
    }


def read_run(folder: str | os.PathLike) -> dict:
    """
    The record of a run, `cada_run.json` in `folder`:

    - `origin`: `{"start", "licence", "trained_on"}` of the weights before training, or `None` where nobody recorded
      it; `trained_on` has the sets of earlier trainings, and how many persons of train each held out.
    - `training`: what the model was trained on and how, or `None`; see `train_cada.describe_training`.
    - `evaluations`: a list of `{"dataset", "split", "captions_per_image", "unreadable_images_skipped", "precision",
      "metrics", "weights"}` and [`environment`]; `weights` is the digest of what was evaluated, `precision` such as
      `"float32"`, which it is where an older record says nothing.

    Without a record all are empty.

    Raises:
        PublishError: where the file is damaged.
    """
    path = Path(folder) / RUN_FILE
    if not os.path.lexists(path):
        return {"origin": None, "training": None, "evaluations": []}
    try:
        run = read_json(path)
        _check_record(run)
    except ValueError as error:
        raise PublishError(f"{path} is damaged ({one_line(error)}). Delete it, or run again.") from error
    return {name: run[name] for name in ("origin", "training", "evaluations")}


_NUMBER, _TEXT_OR_NONE, _COUNT_OR_NONE = (int, float), (str, type(None)), (int, type(None))
_MEASURED = {"dataset": str, "captions_per_image": _COUNT_OR_NONE, "date": str, "hardware": str, "versions": dict}
_TRAINING = {**_MEASURED, "data": dict, "recipe": dict, "selected_by": _TEXT_OR_NONE, "seed": int}
_TRAINING |= {"minutes": (*_NUMBER, type(None))}
_EVALUATION = {**_MEASURED, "split": str, "metrics": dict, "weights": str}


def _check_record(run) -> None:
    _check_fields(run, {"origin": (dict, type(None)), "training": (dict, type(None)), "evaluations": list}, "it")
    origin, training = run["origin"], run["training"]
    if origin is not None:
        _check_fields(origin, {"start": str, "licence": _TEXT_OR_NONE}, "`origin`")
        earlier = origin.get("trained_on", {})
        if not isinstance(earlier, dict) or not all(type(persons) is int for persons in earlier.values()):
            raise ValueError(f"`trained_on` of `origin` is {earlier!r:.80}")
    if training is not None:
        _check_fields(training, _TRAINING, "`training`")
        held_out = training["recipe"].get("persons_held_out_of_train", 0)
        if type(held_out) is not int:
            raise ValueError(f"`persons_held_out_of_train` is {held_out!r:.80}")
        _check_fields(training["data"], dict.fromkeys(("persons", "images", "pairs"), int), "`data` of `training`")
    for number, row in enumerate(run["evaluations"]):
        where = f"evaluation {number}"
        _check_fields(row, _EVALUATION, where)
        if not isinstance(row.get("unreadable_images_skipped", False), bool):
            raise ValueError(f"`unreadable_images_skipped` of {where} is {row['unreadable_images_skipped']!r:.80}")
        if not isinstance(_precision(row), str):
            raise ValueError(f"`precision` of {where} is {row['precision']!r:.80}")
        metrics = row["metrics"]
        _check_fields(metrics, dict.fromkeys(("queries", "gallery", "rerank_k"), int), f"`metrics` of {where}")
        stages = [stage for stage in ("global", "local") if f"{stage}_R1" in metrics]
        _check_fields(
            metrics, {f"{stage}_{name}": _NUMBER for stage in stages for name in METRICS}, f"`metrics` of {where}"
        )


def _check_fields(value, kinds: dict, where: str) -> None:
    """`value` is an object that has the fields of `kinds`, each of its kind."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    for name, kind in kinds.items():
        if name not in value:
            raise ValueError(f"{where} has no `{name}`")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise ValueError(f"`{name}` of {where} is {value[name]!r:.80}")


def read_start(name: str, revision: str | None = None) -> dict:
    """The record ([`read_run`]) of a checkpoint in a folder or, at a tag, branch or commit, on the Hub."""
    if Path(name).is_dir():
        return read_run(name)
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, RUN_FILE, revision=revision, **options)
    if path is None:
        logger.warning(f"{name} has no {RUN_FILE} that can be read: the origin of its weights is not recorded.")
    return read_run(Path(path).parent if path else name)


def after_training(run: dict) -> dict | None:
    """The `origin` of what starts from the weights of a run: its own, and the set that it was trained on."""
    origin, training = run["origin"], run["training"]
    return origin if training is None else {**(origin or UNKNOWN_START), "trained_on": trained_on(run)}


def trained_on(run: dict) -> dict[str, int]:
    """The sets that the weights of a record were trained on, each with how many persons of train they never saw."""
    sets, training = dict((run["origin"] or {}).get("trained_on", {})), run["training"]
    if training is not None:
        held_out = training["recipe"].get("persons_held_out_of_train", 0)
        sets[training["dataset"]] = min(held_out, sets.get(training["dataset"], held_out))
    return sets


def write_run(folder: str | os.PathLike, origin: dict | None, training: dict | None, evaluations: list[dict]) -> None:
    """Write the record of a run; an evaluation takes the place of an older one of the same weights and protocol."""
    run = {"origin": origin, "training": training, "evaluations": _newest(evaluations)}
    with written_whole(Path(folder) / RUN_FILE) as path:
        path.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _precision(evaluation: dict) -> str:
    return evaluation.get("precision", "float32")


def _newest(evaluations: list[dict]) -> list[dict]:
    names, sizes = ("weights", "dataset", "split", "captions_per_image"), ("queries", "gallery", "rerank_k")
    rows = {}
    for row in evaluations:
        protocol = (*(row[name] for name in names), row.get("unreadable_images_skipped"), _precision(row))
        rows[protocol, *(row["metrics"][name] for name in sizes)] = row
    return list(rows.values())


def _evaluations_of(digest: str, folder: str | os.PathLike) -> list[dict]:
    """What the record of a folder says of these weights. Evaluations of others are left out, with a warning."""
    rows = read_run(folder)["evaluations"]
    own = [row for row in rows if row["weights"] == digest]
    if len(own) < len(rows):
        left_out = counted(len(rows) - len(own), "evaluation")
        logger.warning(f"{Path(folder) / RUN_FILE}: left out {left_out} of other weights.")
    return own


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names and values of weights, in the order of their names. Ties an evaluation to its model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """[`weights_digest`] of a model in memory; tied weights count once, as in its file."""
    tied = model.all_tied_weights_keys
    return weights_digest((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


def search_digest(model: PreTrainedModel, processor: CADAProcessor) -> str:
    """SHA-256 of the weights and of the settings that change features or scores, those of training left out."""
    config, tokenizer = model.config, processor.tokenizer
    towers = {"vision": config.vision_config, "text": config.text_config}
    training = ("initializer_range", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    # Neither a field that a later version adds with a neutral default changes it, nor another form of tokenizer files.
    settings = {
        side: {
            name: getattr(tower, name)
            for name in type(tower).__annotations__
            if name not in training and getattr(tower, name) != getattr(type(tower), name, None)
        }
        for side, tower in towers.items()
    }
    settings["config"] = [config.projection_dim, config.max_text_length, config.match_score, config.use_atp]
    names = ("do_convert_rgb", "do_resize", "size", "resample", "do_rescale", "rescale_factor")
    names += ("do_normalize", "image_mean", "image_std")
    images = processor.image_processor.to_dict()
    settings["images"] = {name: images.get(name) for name in names}
    backend = tokenizer.backend_tokenizer
    words = _PROBE if backend.normalizer is None else backend.normalizer.normalize_str(_PROBE)
    words = words if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(words)
    settings["texts"] = [words, tokenizer(_PROBE)["input_ids"], tokenizer.get_vocab()]
    settings["texts"] += [tokenizer.model_max_length, tokenizer.init_kwargs.get("max_length")]
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{model_digest(model)}{text}".encode()).hexdigest()


def checkpoint_digest(folder: str | os.PathLike) -> str:
    """[`weights_digest`] of the files of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= load_file(path)
    return weights_digest(tensors.items())


def set_title(dataset: str) -> str:
    """The name of a set as a reader knows it."""
    return TITLES.get(dataset, dataset)


def _code_of(config, path: Path) -> set[str]:
    """The code files that `auto_map` of a configuration, the content of `path`, names."""
    references = config.get("auto_map", {}) if isinstance(config, dict) else None
    if not isinstance(references, dict) or not all(isinstance(name, str) for name in references.values()):
        raise PublishError(f"`auto_map` in {path} is damaged. Save model and processor again.")
    return {f"{reference.split('.')[0]}.py" for reference in references.values()}


def release_files(folder: str | os.PathLike) -> list[str]:
    """
    Names of the files of `folder` that a release consists of.

    Raises:
        PublishError: where something is missing or damaged that loading the model needs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"The folder {folder} does not exist. Give the --output_dir of a training run.")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for needed in ("config.json", "processor_config.json", "tokenizer.json"):
        if needed not in names:
            raise PublishError(
                f"{folder} holds no {needed}. Save model and processor there: model.save_pretrained, "
                "processor.save_pretrained."
            )
    try:
        weights = {path.name for path in weight_files(folder)}
        code = _code_of(check_config(folder), folder / "config.json")
        if code:
            code |= _code_of(read_json(folder / "processor_config.json"), folder / "processor_config.json")
        for name in sorted(code & set(names)):
            code |= {f"{module}.py" for module in get_relative_imports(folder / name)}
    except PublishError:
        raise
    except CADAError as error:
        raise PublishError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(f"The code in {folder} cannot be read: {one_line(error)}. Save the model again.") from error
    missing = sorted(code - set(names)) if code else ["auto_map in config.json"]
    if missing:
        raise PublishError(
            f"{folder} lacks {', '.join(missing)}, so nobody can load the model without this package. Save it again "
            "with model.save_pretrained and processor.save_pretrained."
        )
    released = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in RELEASED)]
    return [name for name in released if not name.endswith(".safetensors") or name in weights]


def _captions(row: dict) -> str:
    count = row["captions_per_image"]
    return "all captions of an image" if count is None else f"the first {count} captions of an image"


def _departures(row: dict) -> str:
    """What an evaluation differs in from one of the split of the set's authors in float32; empty where in nothing."""
    words = f", in {_precision(row)}" if _precision(row) != "float32" else ""
    words += ", unreadable images left out" if row.get("unreadable_images_skipped") else ""
    if row["dataset"] in PEDES_SETS:
        _, images, captions = PEDES_SETS[row["dataset"]].counts.get(row["split"], (0, 0, 0))
        queries, gallery = row["metrics"]["queries"], row["metrics"]["gallery"]
        if gallery != images or (row["captions_per_image"] is None and queries != captions):
            words += f", NOT the official split ({gallery:,} of {images:,} images)"
    return words


def _protocol(evaluations: list[dict], training: dict | None) -> list[str]:
    """What a reader has to know to compare the figures."""
    notes = ["Every caption of the split searches all images of the split; its own image is among them."]
    notes += [
        f"{set_title(row['dataset'])}, {row['split']}: {_captions(row)}{_departures(row)}." for row in evaluations
    ]
    notes.append("Global matching ranks by S_G; local matching ranks the best K of these again by S_G + S_L.")
    if training and training["selected_by"]:
        notes.append(f"The checkpoint was chosen by {training['selected_by']}. The test split chose nothing.")
    elif training:
        notes.append("The last checkpoint was taken; nothing was chosen.")
    if training:
        notes.append("One training run with one seed. Others differ; see the spread before you compare.")
    for where in dict.fromkeys(f"{row['hardware']}, {row['date']}" for row in evaluations):
        notes.append(f"Evaluated on {where}.")
    return list(dict.fromkeys(notes))


def _recipe(training: dict, start: str) -> list[tuple[str, str]]:
    """Rows of the card's table of the training."""
    data = training["data"]
    rows = [
        (
            "data",
            f"{training['title']}: {data['persons']:,} persons, {data['images']:,} images, {data['pairs']:,} pairs",
        ),
        ("captions", _captions(training)),
        ("start", start),
    ]
    for key, value in training["recipe"].items():
        rows.append((key.replace("_", " "), json.dumps(value) if isinstance(value, dict) else value))
    rows.append(("seed", training["seed"]))
    if training["minutes"] is not None:  # of a resumed run nobody knows the whole
        rows.append(("time", f"{training['minutes']:.1f} minutes"))
    rows += [("hardware", training["hardware"]), ("date", training["date"])]
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in training["versions"].items())))
    return [(key, str(value)) for key, value in rows]


def model_card(folder: str | os.PathLike, repo_id: str, revision: str, evaluations: list[dict] = ()) -> ModelCard:
    """
    The model card of a checkpoint, from the record of its run and its configuration.

    Args:
        folder: the checkpoint.
        repo_id: the repository it will be in; the usage snippet loads it from there.
        revision: what the snippet pins: a tag, a commit, or a branch.
        evaluations: further ones, from the records of other runs.
    """
    run, config = read_run(folder), load_config(folder)
    training = run["training"]
    digest = checkpoint_digest(folder)
    own = _evaluations_of(digest, folder)
    if any(row["weights"] != digest for row in evaluations):
        raise PublishError(
            f"The further evaluations are of other weights than those in {folder}. Run --do_predict again."
        )
    evaluations = _newest([*own, *evaluations])
    if training:
        training = {**training, "title": set_title(training["dataset"])}
    name = repo_id.split("/")[-1]
    table, results = [], []
    for row in evaluations:
        metrics = row["metrics"]
        for matching in ("global", "local"):
            if f"{matching}_R1" not in metrics:
                continue
            k = metrics["rerank_k"] if matching == "local" else "–"
            cells = [f"{metrics[f'{matching}_{metric}']:.2f}" for metric in METRICS]
            sizes = [f"{metrics['queries']:,}", f"{metrics['gallery']:,}"]
            title = set_title(row["dataset"]) + _departures(row)
            protocol = f"{sizes[0]} queries, {sizes[1]} images, K = {metrics['rerank_k']}{_departures(row)}"
            table.append([title, row["split"], matching, str(k), *sizes, *cells])
            results += [
                EvalResult(
                    task_type="text-to-image-retrieval",
                    task_name="Text-to-image person retrieval",
                    dataset_type=re.sub(r"[^\w.-]+", "-", row["dataset"]),
                    dataset_name=title,
                    dataset_config=protocol,  # results that agree in it, type and split are listed as one
                    dataset_split=row["split"],
                    metric_type=f"{matching}_{metric}",
                    metric_name=f"{METRIC_TITLES[metric]} ({matching} matching)",
                    metric_value=round(metrics[f"{matching}_{metric}"], 2),
                )
                for metric in METRICS
            ]
    origin = run["origin"] or UNKNOWN_START
    dataset, earlier = training["dataset"] if training else None, origin.get("trained_on", {})
    sets = {dataset, *earlier}
    open_licence = sets <= set(DRAWN_TITLES) and origin["start"] == RANDOM_START["start"]
    restricted = not sets.isdisjoint(PEDES_SETS)
    if earlier:
        origin = {**origin, "start": f"{origin['start']}, then trained on {', '.join(map(set_title, earlier))}"}
    template = TEMPLATES.get(dataset, "base.md") if open_licence or dataset not in DRAWN_TITLES else "base.md"
    for row in evaluations:
        if _departures(row):
            logger.warning(f"{set_title(row['dataset'])}, {row['split']}{_departures(row)}: the card says so.")
    data = ModelCardData(
        language="en",
        license="apache-2.0" if open_licence else "other",
        license_name="research-only" if restricted else None,
        license_link="README.md" if restricted else None,
        library_name="transformers",
        tags=["cada", "text-to-image-retrieval", "person-retrieval", "person-re-identification"],
        model_name=name,
        eval_results=results or None,
    )
    cards = Environment(
        loader=FileSystemLoader(CARDS), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    body = cards.get_template(template).render(
        name=name,
        repo_id=repo_id,
        revision=revision,
        training=training,
        recipe=_recipe(training, origin["start"]) if training else [],
        origin=origin,
        evaluations=evaluations,
        table=table,
        protocol=_protocol(evaluations, training),
        has_local=config.use_atp,
        max_text_length=config.max_text_length,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n")


def check_names(repo_id: str, tag: str | None = None) -> None:
    """The Hub refuses other names of repositories, Git other tags: better before the work than after it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name of a repository on the Hub: {one_line(error)}") from error
    if tag is not None and not re.fullmatch(r"\w([.+/-]?\w)*(?<!\.lock)", tag, re.ASCII):
        raise PublishError(
            f"{tag!r} is no name of a tag. Give letters, digits and '_', with one '.', '-', '+' or '/' between, such "
            "as v1.0."
        )


def open_repository(
    repo_id: str,
    tag: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> tuple[str, list[str]]:
    """
    Create the repository where it does not exist. Returns its full name and the files that it holds.

    Raises:
        PublishError: where a name is not one for the Hub, the repository cannot be written to, has the tag already,
            or holds weights and `overwrite` is not set.
    """
    check_names(repo_id, tag)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        present = api.list_repo_files(repo_id)
        tags = {reference.name for reference in api.list_repo_refs(repo_id).tags}
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise PublishError(
            f"Cannot open {repo_id} on the Hub: {one_line(error)} Check the connection, and run `hf auth login` with "
            "a token that may write there."
        ) from error
    if tag in tags:
        raise PublishError(
            f"{repo_id} has the tag {tag} already. Choose another; a published state should not change."
        )
    weights = [name for name in present if name.endswith((".safetensors", *PICKLES))]
    if weights and not overwrite:
        raise PublishError(
            f"{repo_id} holds {', '.join(weights)} already, and this push would overwrite it. Pass --overwrite (with "
            "train_cada.py --hub_overwrite), or choose another name. The history keeps old states."
        )
    return repo_id, present


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    tag: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | None = None,
    evaluations: list[dict] = (),
    licence_granted: bool = False,
) -> str:
    """
    Push a checkpoint with its card. The card's snippet pins the tag, or the commit that holds the weights.

    Args:
        folder: the checkpoint, with the record of its run; its README.md is written anew.
        repo_id: `org/name`.
        tag: a name for this state, such as `"v1.0"`.
        private: whether a new repository is private.
        overwrite: whether weights that are in the repository already may be replaced, and pickled ones deleted.
        token: of the Hub; by default the one of `hf auth login`.
        evaluations: further rows of the card's table, from the records of other runs.
        licence_granted: whether somebody who may has allowed to publish weights that come without a licence.

    Returns:
        The revision that the card pins.

    Raises:
        PublishError: where the folder is not complete, the tag exists, or the push would overwrite.
    """
    folder, api = Path(folder), HfApi(token=token)
    release_files(folder)
    check_licence(read_run(folder)["origin"], licence_granted)
    model_card(folder, repo_id, tag or "main", evaluations)  # what is wrong with the record shows before the push
    repo_id, present = open_repository(repo_id, tag, private, token, overwrite)
    try:
        return _push(api, folder, repo_id, tag, evaluations, [name for name in present if name.endswith(PICKLES)])
    except CADAError:
        raise
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise PublishError(
            f"The push to {repo_id} broke off: {one_line(error)} Run the command again with --overwrite; nothing is "
            "tagged yet."
        ) from error


def check_licence(origin: dict | None, licence_granted: bool) -> None:
    """Weights converted from a checkpoint without licence are for their user alone, unless somebody allowed more."""
    if origin and origin["licence"] == NO_LICENCE and not licence_granted:
        raise PublishError(
            f"These weights started from {origin['start']}, which comes without a licence: you may use them, not "
            "publish them. If the authors have allowed it, pass --licence_granted."
        )


def _push(api: HfApi, folder: Path, repo_id: str, tag: str | None, evaluations: list[dict], pickles: list[str]) -> str:
    """Upload, tag; returns the revision that the card pins."""
    commit = None
    if tag is None:  # the card names the commit that holds the weights, so they go first
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[name for name in release_files(folder) if name != "README.md"],
            commit_message="Model and processor",
        ).oid
    revision = tag or commit
    with written_whole(folder / "README.md") as path:
        model_card(folder, repo_id, revision, evaluations).save(path)
    release = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=release_files(folder),
        delete_patterns=pickles,  # weights in the old form, pickled arguments: nothing of a release is unpickled
        commit_message=f"Release {tag}" if tag else "Model card",
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=release.oid)  # this state, whatever main has become since
    return revision


def _write_card_or_publish(options: argparse.Namespace) -> None:
    check_names(options.repo_id, options.tag)
    release_files(options.checkpoint)  # what is missing shows before anything is written
    digest, further = checkpoint_digest(options.checkpoint), []
    for folder in options.evaluations:
        rows = _evaluations_of(digest, folder)
        if not rows:
            raise PublishError(
                f"{folder} holds no {RUN_FILE} with an evaluation of the weights in {options.checkpoint}. Run "
                f"train_cada.py --do_predict --model_name_or_path {options.checkpoint} --output_dir {folder}."
            )
        further += rows
    if options.card_only:
        card = model_card(options.checkpoint, options.repo_id, options.tag or "main", further)
        path = Path(options.checkpoint) / "README.md"
        with written_whole(path) as temporary:
            card.save(temporary)
        print(f"Wrote {path}. A push would publish: {', '.join(release_files(options.checkpoint))}")
        return
    revision = publish(
        options.checkpoint,
        options.repo_id,
        tag=options.tag,
        private=options.private,
        overwrite=options.overwrite,
        evaluations=further,
        licence_granted=options.licence_granted,
    )
    print(f"Published {options.repo_id}, revision {revision}.")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="--output_dir of a training run")
    parser.add_argument("--repo_id", required=True, help="org/name on the Hub")
    parser.add_argument("--tag", help="name of this state, such as v1.0; by default the card pins the commit")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are there already")
    parser.add_argument(
        "--evaluations", nargs="*", default=[], help="folders of further --do_predict runs, for the card's table"
    )
    parser.add_argument(
        "--licence_granted", action="store_true", help="the authors allow to publish weights that have no licence"
    )
    parser.add_argument("--card_only", action="store_true", help="write README.md into the folder, push nothing")
    options = parser.parse_args(arguments)
    return run_command(lambda: _write_card_or_publish(options))


if __name__ == "__main__":
    sys.exit(main())
