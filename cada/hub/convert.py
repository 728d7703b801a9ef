"""
Starting points: BLIP, and checkpoints of the authors' CADA code, converted to this format.

    cada convert --source blip --checkpoint Salesforce/blip-itm-base-coco \
        --vocabulary-head Salesforce/blip-image-captioning-base --out start
    cada convert --source cada_original --checkpoint cuhk.pth --out cuhk

Every key of a checkpoint is converted or left out for a stated reason; an unknown or missing key is an error. Pickled
files are read with `weights_only=True`.
"""

import math
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    ImageProcessingMixin,
    PreTrainedConfig,
)
from transformers.utils import logging

from cada.files import CADAError, checkpoint_written_whole, counted, make_new_folder, one_line, sentence
from cada.hub.loading import (
    base_of,
    check_config,
    check_processor,
    find_adapter,
    fitted_processor,
    in_one_line,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
    weight_files,
    without_tables,
)
from cada.hub.record import NO_LICENCE, Origin, after_training, read_start, write_run
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval, resize_positions
from processing_cada import CADAImageProcessor, CADAProcessor


logger = logging.get_logger(__name__)

SOURCES = ("blip", "blip_original", "cada_original")
VOCABULARY_SIZE = 30524  # bert-base-uncased with [DEC] and [ENC]
ENC_TOKEN_ID = 30523
# Tensors that are not taken as they are.
_POSITIONS = "cada.vision_model.embeddings.position_embedding"
_WORDS, _WORD_BIAS = "cada.text_model.embeddings.word_embeddings.weight", "vocabulary_head.decoder.bias"

# Order matters: the first pattern that matches renames the key, and then each of `_INNER` what is inside a layer.
_VISION_OF_BLIP = [(r"^vision_model\.(encoder\.)?(embeddings|layers|post_layernorm)\.", r"cada.vision_model.\2.")]
_VISION_OF_ORIGINAL = [
    (r"^visual_encoder\.cls_token$", "cada.vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "cada.vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "cada.vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"cada.vision_model.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"cada.vision_model.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"cada.vision_model.layers.\1.mlp."),
    (r"^visual_encoder\.norm\.", "cada.vision_model.post_layernorm."),
]
_TEXT_AND_HEADS = [
    (r"^text_encoder\.embeddings\.LayerNorm\.", "cada.text_model.embeddings.layer_norm."),
    (r"^text_encoder\.embeddings\.", "cada.text_model.embeddings."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.attention\.", r"cada.text_model.layers.\1.self_attn."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.crossattention\.", r"cada.text_model.layers.\1.cross_attn."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"cada.text_model.layers.\1.mlp.fc1."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.output\.dense\.", r"cada.text_model.layers.\1.mlp.fc2."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"cada.text_model.layers.\1.mlp_layer_norm."),
    (r"^vision_proj\.", "cada.visual_projection."),
    (r"^text_proj\.", "cada.text_projection."),
    (r"^itm_head\.", "match_head."),
    (r"^itm_local_head\.", "group_match_head."),
    (r"^text_decoder\.cls\.predictions\.transform\.dense\.", "vocabulary_head.dense."),
    (r"^text_decoder\.cls\.predictions\.transform\.LayerNorm\.", "vocabulary_head.layer_norm."),
    (r"^text_decoder\.cls\.predictions\.bias$", "vocabulary_head.decoder.bias"),
]
_RULES = dict.fromkeys(SOURCES, _VISION_OF_ORIGINAL + _TEXT_AND_HEADS) | {"blip": _VISION_OF_BLIP + _TEXT_AND_HEADS}
_INNER = [
    (r"\.self\.query\.", ".q_proj."),
    (r"\.self\.key\.", ".k_proj."),
    (r"\.self\.value\.", ".v_proj."),
    (r"_attn\.(output\.dense|projection|proj)\.", "_attn.out_proj."),
    (r"_attn\.output\.LayerNorm\.", "_attn_layer_norm."),
]
_LEFT_OUT = [
    (r"\.position_ids$", "a constant, not a weight"),
    (r"^text_decoder\.cls\.predictions\.decoder\.weight$", "tied to the word embeddings of the text stack"),
    (r"^text_decoder\.cls\.predictions\.decoder\.bias$", "stored twice; `predictions.bias` counts"),
    (r"^text_decoder\.bert\.", "a separate decoder; here the text stack is the decoder, and retrieval never uses it"),
    (r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.", "momentum copy, for BLIP's pre-training only"),
    (r"^(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue)$", "queue, for BLIP's pre-training only"),
    (r"^(temp|logit_scale)$", "temperature, a fixed value in CADA"),
]


@dataclass
class ConversionReport:
    """What became of every key of a checkpoint."""

    converted: dict[str, list[str]] = field(default_factory=dict)  # old name: new names
    left_out: dict[str, str] = field(default_factory=dict)  # old name: reason
    new: list[str] = field(default_factory=list)  # names that the checkpoint has not, with random weights
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} tensors converted."]
        for reason in dict.fromkeys(self.left_out.values()):
            keys = [key for key, why in self.left_out.items() if why == reason]
            lines.append(f"{len(keys)} left out ({reason}): {keys[0]}{' ...' if len(keys) > 1 else ''}")
        if self.new:
            lines.append(f"{len(self.new)} newly initialised: {', '.join(self.new)}")
        return "\n".join([*lines, *self.notes])


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], source: str, report: ConversionReport | None = None
) -> dict[str, torch.Tensor]:
    """
    Rename the tensors of a checkpoint to those of [`CADAForTextToImageRetrieval`].

    Args:
        state_dict: the checkpoint's tensors.
        source: `"blip"` (`BlipForImageTextRetrieval` of transformers), `"blip_original"` or `"cada_original"` (BLIP's
            and the authors' own files).
        report: filled with what became of every key.

    Raises:
        CADAError: for an unknown source, a key that no rule knows, or a tensor that holds no finite numbers.
    """
    if source not in SOURCES:
        raise CADAError(f"Unknown source {source!r}. Known: {', '.join(SOURCES)}.")
    report = ConversionReport() if report is None else report
    converted = {}
    for key, tensor in state_dict.items():
        reason = next((reason for pattern, reason in _LEFT_OUT if re.search(pattern, key)), None)
        if reason:
            report.left_out[key] = reason
            continue
        name = next((re.sub(*rule, key) for rule in _RULES[source] if re.search(rule[0], key)), None)
        if name is None:
            raise CADAError(f"No rule for the key {key!r}. Is this a checkpoint of the kind {source!r}?")
        for pattern, replacement in _INNER:
            name = re.sub(pattern, replacement, name)
        _check_tensor(key, tensor)
        parts = {name: tensor}
        if ".qkv." in name:  # ViTs of BLIP keep q, k and v in one matrix
            if tensor.ndim == 0 or len(tensor) % 3:
                raise CADAError(
                    f"{key!r} of the shape {tuple(tensor.shape)} is not made of q, k and v, equally large."
                )
            chunks = zip("qkv", tensor.chunk(3))
            parts = {name.replace(".qkv.", f".{part}_proj."): chunk.clone() for part, chunk in chunks}
        converted |= parts
        report.converted[key] = list(parts)
    return converted


def _check_tensor(key: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise CADAError(f"{key!r} is of the type {tensor.dtype}, not of plain floating-point numbers.")
    # A file of a few bytes may claim a tensor of any size, by repeating one number.
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise CADAError(f"{key!r} of the shape {tuple(tensor.shape)} is not stored whole.")
    if not tensor.float().isfinite().all():
        raise CADAError(f"{key!r} holds NaN or infinite numbers. Take another checkpoint.")


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The tensors of a `.pth` or `.safetensors` file; the weights may stand under `model` or `state_dict`, and the names
    may begin with `module.`, as `DistributedDataParallel` writes them. No code of a pickle is run: torch's reader of
    weights builds tensors and plain containers only.

    Raises:
        CADAError: where the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is not a file. Give the file itself" if os.path.exists(path) else "does not exist"
        raise CADAError(f"The checkpoint {path} {problem}.")
    try:
        is_safe = path.suffix == ".safetensors"
        loaded = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CADAError(f"The checkpoint {path} cannot be read: {error.strerror or one_line(error)}.") from error
    except Exception as error:  # the readers raise many kinds on damaged files
        said = one_line(error)
        if isinstance(error, UnpicklingError):  # torch goes on to advise to run the code of the pickle
            said = said.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0]
        raise CADAError(
            f"{path} cannot be read with weights_only=True ({said[:200] or 'no file of tensors'}). It is damaged, or "
            "holds more than tensors; ask for a file of tensors only."
        ) from error
    for name in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    pairs = loaded.items() if isinstance(loaded, dict) else ()
    if not pairs or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in pairs):
        raise CADAError(f"{path} holds no dictionary of tensors. Is this a checkpoint?")
    weights = {key.removeprefix("module."): value for key, value in loaded.items()}
    if len(weights) < len(loaded):
        raise CADAError(f"{path} holds the same tensors with and without `module.`. Keep one of the two.")
    return weights


def infer_sizes(weights: dict[str, torch.Tensor], num_attention_heads: int | None = None) -> dict:
    """
    Fields of [`CADAConfig`] from the shapes of converted `weights`. Images are square and, unless the argument says
    otherwise, heads are 64 wide, as in BLIP.
    """
    text = "cada.text_model."
    hidden, channels, patch_size, _ = weights["cada.vision_model.embeddings.patch_embedding.weight"].shape
    patches = weights[_POSITIONS].shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise CADAError(f"The checkpoint has {patches} patches, no square number. Take one of square images.")

    def layers(prefix: str) -> int:  # a gap shows when the model is filled
        return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})

    vocabulary, text_hidden = weights[_WORDS].shape
    return {
        "vision_config": {
            "hidden_size": hidden,
            "intermediate_size": len(weights["cada.vision_model.layers.0.mlp.fc1.bias"]),
            "num_hidden_layers": layers("cada.vision_model.layers."),
            "num_attention_heads": num_attention_heads or hidden // 64,
            "num_channels": channels,
            "patch_size": patch_size,
            "image_size": (side * patch_size, side * patch_size),
        },
        "text_config": {
            "hidden_size": text_hidden,
            "intermediate_size": len(weights[f"{text}layers.0.mlp.fc1.bias"]),
            "num_hidden_layers": layers(f"{text}layers."),
            "num_attention_heads": num_attention_heads or text_hidden // 64,
            "max_position_embeddings": len(weights[f"{text}embeddings.position_embeddings.weight"]),
            "vocab_size": vocabulary,
        },
        "projection_dim": len(weights["cada.visual_projection.bias"]),
    }


def grow_vocabulary(weights: dict[str, torch.Tensor], size: int, std: float) -> int:
    """Append rows for new words, random with standard deviation `std`; their bias is 0. Returns how many."""
    words = weights[_WORDS]
    missing = max(size - len(words), 0)
    if missing:
        weights[_WORDS] = torch.cat([words, std * torch.randn(missing, words.shape[1]).to(words.dtype)])
        if _WORD_BIAS in weights:
            weights[_WORD_BIAS] = F.pad(weights[_WORD_BIAS], (0, missing))
    return missing


def settings_of(source: str) -> dict:
    """Fields of [`CADAConfig`] that the code behind a file of its authors fixes, besides the sizes."""
    fields = {"vision_config": {"layer_norm_eps": 1e-6}, "text_config": {"layer_norm_eps": 1e-12}}
    if source == "cada_original":
        fields |= {"contrastive_loss": "ndf_reference", "hard_negative_similarity": "dot", "match_score": "logit"}
        fields |= {"mask_unit": "word", "mask_rate": 0.4, "ara_causal": True}
    return fields


def _join(fields: dict, more: dict) -> dict:
    """Fields of the configuration; those of `more` win, field by field also inside the towers."""
    return fields | {
        name: {**fields.get(name, {}), **value} if isinstance(value, dict) else value for name, value in more.items()
    }


def _read_blip(
    checkpoint: str, vocabulary_head: str | os.PathLike | None, revision: str | None
) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors, and the fields of its configuration that shapes do not tell, of BLIP in transformers."""
    state_dict, config = _load_blip(BlipForImageTextRetrieval, checkpoint, revision)
    if vocabulary_head is not None:
        captioner, _ = _load_blip(BlipForConditionalGeneration, str(vocabulary_head), None)
        state_dict |= {key: value for key, value in captioner.items() if key.startswith("text_decoder.cls.")}
    names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    towers = {"vision_config": names, "text_config": (*names, "pad_token_id")}
    return state_dict, {
        tower: {name: getattr(getattr(config, tower), name) for name in names} for tower, names in towers.items()
    }


def _load_blip(kind: type, name: str, revision: str | None) -> tuple[dict[str, torch.Tensor], BlipConfig]:
    """The tensors of a BLIP model, whole: `transformers` alone would fill gaps with random numbers."""
    if os.path.exists(name):
        check_config(name, BlipConfig.model_type)
        if any(Path(name).glob("*.safetensors*")):  # older copies hold pickles, of which tensors alone are built
            weight_files(name)
    with in_one_line(f"BLIP cannot be loaded from {name}", name, "Save or fetch it again."), without_tables():
        model, report = kind.from_pretrained(
            name, revision=revision or "main", weights_only=True, output_loading_info=True
        )
    missing = sorted(set(report["missing_keys"]) - set(model.all_tied_weights_keys))
    if missing:
        raise CADAError(
            f"{name} lacks {missing[0]} ({len(missing)} tensor(s) in all) of {kind.__name__}. Is it complete, and the "
            "right kind of BLIP?"
        )
    unknown = sorted(report["unexpected_keys"])
    if unknown:
        logger.warning(
            f"{name}: left out {counted(len(unknown), 'tensor')} that {kind.__name__} lacks: {unknown[0]} ..."
        )
    return model.state_dict(), model.config


def convert(
    source: str,
    checkpoint: str | os.PathLike,
    vocabulary_head: str | os.PathLike | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_attention_heads: int | None = None,
    config_overrides: dict | None = None,
    revision: str | None = None,
) -> tuple[CADAForTextToImageRetrieval, ConversionReport]:
    """
    A model with the weights of a checkpoint, whole or not at all.

    Args:
        source: `"blip"`, `"blip_original"` or `"cada_original"`.
        checkpoint: a folder or Hub name for `"blip"`, else a `.pth` or `.safetensors` file.
        vocabulary_head: for `"blip"`, a `BlipForConditionalGeneration` whose vocabulary head ARA starts from.
        image_size: one side or (height, width) in pixels; position embeddings are interpolated to it. By default the
            size of the checkpoint stays.
        num_attention_heads: of both towers, for files that do not tell; by default the width divided by 64.
        config_overrides: further fields of [`CADAConfig`].
        revision: tag, branch or commit of a `"blip"` checkpoint on the Hub.

    Raises:
        CADAError: for a checkpoint that does not fit; the message names the key.
    """
    if source == "blip":
        state_dict, told = _read_blip(str(checkpoint), vocabulary_head, revision)
    elif vocabulary_head is not None:
        raise CADAError("--vocabulary-head goes with --source blip; the other files hold their own.")
    else:
        state_dict, told = read_checkpoint(checkpoint), settings_of(source)
    report = ConversionReport()
    weights = convert_state_dict(state_dict, source, report)
    try:
        fields = _join(infer_sizes(weights, num_attention_heads), told)
        model = _build(weights, fields, image_size, config_overrides or {}, report)
    except CADAError:
        raise
    except KeyError as error:
        raise CADAError(f"{checkpoint} lacks {error.args[0]!r}. Is this a checkpoint of {source!r}?") from error
    except (StrictDataclassError, RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CADAError(
            f"The sizes of {checkpoint} and the arguments give no model: {sentence(error)} Is it of {source!r}?"
        ) from error
    _load(model, weights, source, report, may_leave_out=bool(config_overrides))
    return model, report


def _build(
    weights: dict, fields: dict, image_size: int | tuple[int, int] | None, overrides: dict, report: ConversionReport
) -> CADAForTextToImageRetrieval:
    """The model that the `weights` go into; these get the rows and positions that they lack."""
    added = grow_vocabulary(weights, VOCABULARY_SIZE, std=0.02)
    if added:
        report.notes.append(f"The vocabulary grew by {added} word(s) to {VOCABULARY_SIZE}.")
    fields["text_config"] |= {"vocab_size": len(weights[_WORDS]), "enc_token_id": ENC_TOKEN_ID}
    if image_size is not None:
        old = CADAConfig(**fields).vision_config.grid_size
        fields["vision_config"]["image_size"] = image_size if isinstance(image_size, int) else tuple(image_size)
        new = CADAConfig(**fields).vision_config.grid_size
        weights[_POSITIONS] = resize_positions(weights[_POSITIONS], old, new)
        if old != new:
            report.notes.append(f"Position embeddings were interpolated from {old} to {new} patches.")
    return CADAForTextToImageRetrieval(CADAConfig(**_join(fields, overrides)))


def _load(
    model: CADAForTextToImageRetrieval, weights: dict, source: str, report: ConversionReport, may_leave_out: bool
) -> None:
    """Fill the model; what the source cannot have is new, everything else has to be there."""
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CADAError(f"The sizes do not fit: {one_line(error)}") from error
    if unused and not may_leave_out:
        raise CADAError(f"The model has no place for {', '.join(unused[:3])}. Is this a checkpoint of {source!r}?")
    if unused:  # a switched-off loss has no head
        report.notes.append(f"The configuration has no use for {', '.join(unused)}.")
    may_be_new = ("group_match_head.", "vocabulary_head.") if source != "cada_original" else ()
    report.new = [name for name in missing if name not in model.all_tied_weights_keys]
    wrong = [name for name in report.new if not name.startswith(may_be_new)]
    if wrong:
        raise CADAError(f"The checkpoint has no tensor for {', '.join(wrong)}. Is it complete, and of {source!r}?")
    model.tie_weights()
    model.eval()


def default_image_size(source: str) -> int | None:
    """The paper trains on 224×224; BLIP in transformers often comes at 384×384. CADA's checkpoints keep their size."""
    return None if source == "cada_original" else 224


def describe_origin(source: str, checkpoint: str | os.PathLike) -> Origin:
    """What a model card says of where converted weights come from; folders of this machine are not named."""
    name = Path(checkpoint).name if Path(checkpoint).exists() else str(checkpoint)
    licence = NO_LICENCE if source == "cada_original" else "BSD-3-Clause (BLIP, Salesforce)"
    return {"start": f"{name} ({source})", "licence": licence}


def convert_processor(model: CADAForTextToImageRetrieval, tokenizer_name: str) -> CADAProcessor:
    """The processor of a converted model: CLIP's normalisation, as BLIP and the authors' code have it."""
    tokenizer = load_tokenizer(tokenizer_name)
    try:
        return fitted_processor(CADAImageProcessor(), tokenizer, model.config)
    except CADAError as error:
        raise CADAError(
            f"The tokenizer {tokenizer_name!r} is another than BLIP's: {error} Use bert-base-uncased."
        ) from error


def save_converted(
    model: CADAForTextToImageRetrieval, tokenizer_name: str, source: str, checkpoint: str, out: str | os.PathLike
) -> None:
    """Save a converted model with its processor and its origin, for publishing and training."""
    processor = convert_processor(model, tokenizer_name)
    with checkpoint_written_whole(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_run(folder, describe_origin(source, checkpoint), None, [])


def _is_blip(name: str | os.PathLike, revision: str | None) -> bool:
    if os.path.isfile(name):
        check_config(name)  # which says so
    if find_adapter(name, revision) is not None:
        return False
    with in_one_line(f"The configuration of {name} cannot be used", name, "Give the folder of a checkpoint."):
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main")
    return config.get("model_type") == BlipConfig.model_type


def load_model_and_processor(
    name: str | os.PathLike, revision: str | None = None
) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
    """
    Model, in evaluation mode, and processor, which belong together: of a checkpoint of CADA, or of a
    `BlipForImageTextRetrieval` of transformers, which is converted in memory and keeps its image size. BLIP's cosine
    is S_G then, and its matching probability S_L.

    Raises:
        CADAError: as [`load_model`], [`load_processor`] and [`convert`].
    """
    if not _is_blip(name, revision):
        model, processor = load_model(name, revision), load_processor(name, revision)
        check_processor(processor, model.config)
        return model, processor
    model, _ = convert("blip", name, config_overrides={"use_ara": False}, revision=revision)
    # Only training reads the head of groups. Equal weights at each loading make an equal digest.
    model.group_match_head.load_state_dict(model.match_head.state_dict())
    with in_one_line(f"The image processor of {name} cannot be loaded", name, "Save it with the model."):
        images, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision or "main")
    names = ("resample", "image_mean", "image_std")
    image_processor = CADAImageProcessor(**{field: images[field] for field in names if field in images})
    processor = fitted_processor(image_processor, load_tokenizer(name, revision), model.config)
    size = "×".join(map(str, model.config.vision_config.image_height_width))
    logger.warning(f"{name} is BLIP, not trained on persons: converted in memory, reads images of {size}.")
    return model, processor


def merge_adapter(name: str | os.PathLike, out: str | os.PathLike, revision: str | None = None) -> None:
    """
    Add an adapter to the weights of its base, and save the whole checkpoint, which needs no PEFT, with the record of
    the training. Evaluations are of other weights: the sums round differently.

    Raises:
        CADAError: as [`load_model`]; where there is no adapter, or `out` holds files.
    """
    adapter = find_adapter(name, revision)
    if adapter is None:
        raise CADAError(f"{name} is no adapter: it has no adapter_config.json. Give the folder of one, or its name.")
    make_new_folder(out)
    base, run = base_of(adapter), read_start(name, revision)
    _, processor = load_model_and_processor(name, revision)  # which looks at all files
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT, which asks transformers by an old name
        model = PeftModel.from_pretrained(load_model(*base, load_config(adapter)), adapter).merge_and_unload()
    if run["training"] is not None:
        run["training"]["recipe"]["lora_merged"] = True
    with checkpoint_written_whole(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_run(folder, run["origin"], run["training"], [])


def origin_of(name: str | os.PathLike, revision: str | None = None) -> Origin | None:
    """Where the weights of a checkpoint of CADA or BLIP come from, with their licence; `None` if unrecorded."""
    if _is_blip(name, revision):
        return describe_origin("blip", name)
    return after_training(read_start(name, revision))
