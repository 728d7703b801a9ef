"""
Checkpoints, loaded whole or not at all, from a folder or the Hub. Nothing is unpickled, and no code of theirs is run.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel
from transformers.image_utils import SizeDict
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    cached_file,
    is_peft_available,
    logging,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import find_adapter_config_file

from cada.files import ADAPTER_RECORD, CADAError, one_line, read_json, sentence
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor


logger = logging.get_logger(__name__)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
EXPORT_FILE = "cada_export.json"  # in a folder of graphs
_FLOATS = {"F64", "F32", "F16", "BF16"}
_WHERE = "Give a folder, or a name on the Hub, which has to be reachable."


@contextmanager
def in_one_line(what: str, name: str | os.PathLike, remedy: str) -> Iterator[None]:
    """What the libraries raise while they load the checkpoint `name`, tokenizers a plain `Exception`, in our words."""
    try:
        yield
    except Exception as error:
        raise CADAError(f"{what}: {sentence(error)} {remedy if os.path.isdir(name) else _WHERE}") from error


@contextmanager
def without_tables() -> Iterator[None]:
    """Without the table of all tensors that transformers prints where some are missing; whoever loads says it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def weight_files(folder: str | os.PathLike, shapes: dict[str, tuple[int, ...]] | None = None) -> list[Path]:
    """
    The safetensors files that a checkpoint's folder consists of, each looked at: present, inside the folder, complete,
    with numbers of a floating-point type and, where given, the `shapes` that its configuration asks for.

    Raises:
        CADAError: names the file.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        files = _indexed_files(folder)
    elif (folder / EXPORT_FILE).is_file():
        raise CADAError(
            f"{folder} holds graphs, made by `cada export`, which only index and search. Give the checkpoint itself."
        )
    elif (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        files = [folder / ADAPTER_SAFE_WEIGHTS_NAME]
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"{pickles[0]} is a pickle, which is not read. " if pickles else ""
        raise CADAError(f"{folder} holds no weights in safetensors form. {found}Load the model and save it again.")
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CADAError(
                f"{path} is damaged ({one_line(error)}). Save the model again, or fetch the file again."
            ) from error
        wrong = [f"{name} ({kind})" for name, (kind, _) in found.items() if kind not in _FLOATS]
        if wrong:
            raise CADAError(
                f"{path}: {wrong[0]} is not of a floating-point type; {len(wrong)} such tensor(s). Save the model "
                "again, not quantised."
            )
        for name, (_, shape) in found.items():
            if shapes and shape != shapes.get(name, shape):
                raise CADAError(
                    f"{path}: {name} is of the shape {shape}, config.json asks for {shapes[name]}. Take both from the "
                    "same checkpoint."
                )
    return files


def _indexed_files(folder: Path) -> list[Path]:
    index = read_json(folder / WEIGHTS_INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
        raise CADAError(f"{folder / WEIGHTS_INDEX} is no index of weight files. Save the model again.")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise CADAError(
                f"{folder / WEIGHTS_INDEX} names {name!r}, which is no safetensors file of this folder. Do not use "
                "this checkpoint, or save it again."
            )
        if not (folder / name).is_file():
            raise CADAError(f"{folder} lacks {name}, which {WEIGHTS_INDEX} names. Fetch or save it again.")
        files.append(folder / name)
    return files


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


def base_digest(model: PreTrainedModel) -> str:
    """[`model_digest`] of a model without the adapter `default` in it."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".default" not in name}
    names = {re.sub(r"\.(base_layer|original_module)\b", "", name): name for name in tensors}
    return weights_digest((name, tensors[names[name]]) for name in names.keys() - model.all_tied_weights_keys.keys())


def check_config(folder: str | os.PathLike, model_type: str = CADAConfig.model_type) -> dict:
    """The content of `config.json` in the folder of a checkpoint; a `CADAError` where it is not of `model_type`."""
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise CADAError(f"{folder} {problem}. Give the folder of a checkpoint.")
    if not (folder / "config.json").is_file():
        raise CADAError(f"{folder} holds no config.json. Is it the folder of a checkpoint?")
    config = read_json(folder / "config.json")
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise CADAError(
            f"{folder / 'config.json'} is of a model of the type {found!r}, not {model_type!r}. Give another folder, "
            "or convert the checkpoint with `cada convert`."
        )
    return config


def commit_of(name: str | os.PathLike, revision: str | None = None) -> str | None:
    """
    The commit that `revision` (default: `main`) of a checkpoint on the Hub is now; `revision` as it is where the Hub
    does not say, and `None` for a folder.
    """
    if os.path.isdir(name):
        return None
    return getattr(resolve_revision(name, revision), "resolved", revision)


def find_adapter(name: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The folder of an adapter of PEFT, fetched from the Hub; `None` for a whole checkpoint, and for none at all."""
    try:
        path = None if os.path.isfile(name) else find_adapter_config_file(os.fspath(name), revision=revision)
        if path is not None and not os.path.isdir(name):
            for file in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_RECORD):
                cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no such repository, no connection: who loads a checkpoint next says so
        return None
    return None if path is None else Path(path).parent


def base_of(adapter: Path) -> tuple[str, str | None]:
    """The checkpoint that an adapter was trained on, and its commit on the Hub."""
    file = adapter / ADAPTER_CONFIG_NAME
    settings = read_json(file)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str):
        raise CADAError(f"{file} names no base_model_name_or_path. Write its base there.")
    # For the layers of Megatron, PEFT would import a module that the file names.
    if settings.get("peft_type") != "LORA" or settings.get("megatron_config"):
        raise CADAError(f"{file} is of another adapter than LoRA. Merge it by PEFT, and save the model.")
    return base, settings.get("revision")


def _adapter_record(adapter: Path) -> dict:
    """What `CADATrainer` wrote beside an adapter; nothing of one that was trained in another way."""
    record = read_json(adapter / ADAPTER_RECORD) if (adapter / ADAPTER_RECORD).exists() else {}
    if not isinstance(record, dict):
        raise CADAError(f"{adapter / ADAPTER_RECORD} is damaged. Fetch or save the adapter again.")
    return record


def load_config(name: str | os.PathLike, revision: str | None = None, **overrides) -> CADAConfig:
    """
    The configuration of a checkpoint, with other values for the fields in `overrides`; of an adapter, that of its base
    with its own calibration.

    Raises:
        CADAError: where it cannot be read, or does not hold together.
    """
    adapter = find_adapter(name, revision)
    if adapter is not None:
        overrides = {"calibration": _adapter_record(adapter).get("calibration"), **overrides}
        return load_config(*base_of(adapter), **overrides)
    remedy = "Do the fields of --config_overrides fit it?" if overrides else "Correct the file."
    with in_one_line(f"The configuration of {name} cannot be used", name, remedy):
        return CADAConfig.from_pretrained(name, revision=revision or "main", **overrides)


def load_model(
    name: str | os.PathLike, revision: str | None = None, config: CADAConfig | None = None
) -> CADAForTextToImageRetrieval:
    """
    The model of a checkpoint, in evaluation mode; of an adapter, its base with the adapter in its layers. Weights that
    another `config` asks for and the checkpoint never had are random, with a warning; all others have to be there.

    Args:
        name: folder, or name on the Hub.
        revision: tag, branch or commit on the Hub.
        config: the checkpoint's own by default.

    Raises:
        CADAError: names what is missing, damaged, or not a number.
    """
    adapter = find_adapter(name, revision)
    if adapter is not None:
        return _load_with_adapter(adapter, config)
    if os.path.exists(name):
        check_config(name)
    own = load_config(name, revision)
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in CADAForTextToImageRetrieval(own).state_dict().items()}
    if os.path.exists(name):
        weight_files(name, shapes)
    remedy = "Do the fields of --config_overrides fit it?"
    with in_one_line(f"The weights of {name} do not load", name, remedy), without_tables():
        model, report = CADAForTextToImageRetrieval.from_pretrained(
            name,
            config=own if config is None else config,
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
        )
    random = set(report["missing_keys"]) - set(model.all_tied_weights_keys)
    missing = random & set(shapes)
    if missing:
        raise CADAError(
            f"The weights of {name} lack {_some(missing)}. The checkpoint is not complete: save or fetch it again."
        )
    for what, names in (("new, and random", random), ("left out", report["unexpected_keys"])):
        if names:
            logger.warning(f"Weights of {name} that are {what}: {_some(names)}.")
    _check_finite(model, name)
    return model


def _load_with_adapter(adapter: Path, config: CADAConfig | None) -> CADAForTextToImageRetrieval:
    if not is_peft_available():
        raise CADAError(f'{adapter} is an adapter, which needs PEFT. In a clone run: pip install -e ".[peft]"')
    weight_files(adapter)  # whole, and no pickle
    base, record = base_of(adapter), _adapter_record(adapter)
    try:
        config = load_config(adapter) if config is None else config
        model = load_model(*base, config)
    except CADAError as error:
        raise CADAError(f"The base of the adapter {adapter} does not load: {error}") from error
    if model_digest(model) != record.get("base", model_digest(model)):
        raise CADAError(
            f"{base[0]} holds other weights than those that {adapter} was trained on. Bring them back, or train again."
        )
    with in_one_line(f"The adapter {adapter} does not fit {base[0]}", adapter, "Save it again by PEFT."):
        report = model.load_adapter(str(adapter))
        lacking = {*report.missing_keys, *report.unexpected_keys, *report.mismatched_keys}
        if lacking:
            raise CADAError(f"{_some(map(str, lacking))} is missing, or has no place.")
    model.config.calibration = config.calibration
    _check_finite(model, adapter)
    return model.eval()


def _check_finite(model: CADAForTextToImageRetrieval, name: str | os.PathLike) -> None:
    broken = [key for key, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CADAError(
            f"The weights of {name} hold NaN or infinite numbers in {_some(broken)}. Take an earlier checkpoint."
        )


def _some(names) -> str:
    names = sorted(names)
    return f"{names[0]} and {len(names) - 1} others" if len(names) > 1 else names[0]


def load_processor(name: str | os.PathLike, revision: str | None = None) -> CADAProcessor:
    """The processor of a checkpoint; a `CADAError` where its files are missing, damaged, or name code of their own."""
    remedy = "Save it again with processor.save_pretrained."
    with in_one_line(f"The processor of {name} cannot be loaded", name, remedy):
        return CADAProcessor.from_pretrained(name, revision=revision or "main", trust_remote_code=False)


def check_processor(processor: CADAProcessor, config: CADAConfig) -> None:
    """A processor of another model gives inputs that are read without complaint, and wrong scores: a `CADAError`."""
    size, tokenizer, text = dict(processor.image_processor.size), processor.tokenizer, config.text_config
    given_size = (size.get("height"), size.get("width"))
    pairs = {
        "images of (height, width)": (given_size, config.vision_config.image_height_width),
        "[ENC] as": (processor.enc_token_id, text.enc_token_id),
        "[PAD] as": (tokenizer.pad_token_id, text.pad_token_id),
        "texts of at most": (tokenizer.model_max_length, min(tokenizer.model_max_length, config.max_text_length)),
        "words up to": (len(tokenizer), min(len(tokenizer), text.vocab_size)),
    }
    for name, (given, wanted) in pairs.items():
        if given != wanted:
            raise CADAError(
                f"The processor gives {name} {given}, the model reads {wanted}. Are both of the same checkpoint?"
            )


def fitted_processor(image_processor: CADAImageProcessor, tokenizer, config: CADAConfig) -> CADAProcessor:
    """
    A processor in which image size, text length and masking follow the model.

    Raises:
        CADAError: where the tokenizer is of another model, see [`check_processor`].
    """
    height, width = config.vision_config.image_height_width
    image_processor.size = SizeDict(height=height, width=width)
    tokenizer.model_max_length = config.max_text_length
    processor = CADAProcessor(image_processor, tokenizer, config.mask_unit, config.mask_rate)
    check_processor(processor, config)
    return processor


def load_tokenizer(name: str | os.PathLike, revision: str | None = None):
    """A tokenizer by the name of a folder or on the Hub; a `CADAError` where it cannot be loaded or is code."""
    with in_one_line(f"The tokenizer {name} cannot be loaded", name, _WHERE):
        if not os.path.isdir(name):  # first, as AutoTokenizer would wait twice for a Hub that cannot be reached
            with suppress(RemoteEntryNotFoundError):  # it needs none
                hf_hub_download(os.fspath(name), CONFIG_NAME, revision=revision)
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
