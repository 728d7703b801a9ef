"""
A checkpoint as graphs of ONNX or OpenVINO, which run without PyTorch's weights, and what runs them here.

    cada export demo/model demo/onnx --format onnx
    cada index FOLDER --model demo/onnx --out INDEX

Three graphs, made by the exporters of transformers: `image` (`pixel_values` to `image_embeds` and `image_states`),
`text` (`input_ids`, `attention_mask` to `text_embeds`) and, of a model with match heads, `match` (`input_ids`,
`attention_mask`, `image_states`, `image_index` to `match_logits`: text p reads the states of image `image_index[p]`).
Numbers of images and texts and the length of texts are free. All is computed in float32.
"""

import importlib.util
import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from logging import NOTSET, WARNING, disable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.exporters.auto import get_exporter_class
from transformers.exporters.base import EXPORT_MANIFEST_FILE, ExportedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from cada.files import CADAError, checkpoint_written_whole, make_new_folder, one_line, read_json
from cada.hub.convert import load_model_and_processor, origin_of
from cada.hub.loading import EXPORT_FILE, check_processor, in_one_line, load_config, load_processor, model_digest
from cada.hub.record import write_run
from modeling_cada import CADAForTextToImageRetrieval, CADAImages
from processing_cada import CADAProcessor


logger = logging.get_logger(__name__)

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}  # of each format
TOLERANCE = 1e-4  # between a graph and PyTorch, both in float32
# What OpenVINO has compiled, until the process ends. Each gives the thread another stack for signals; where they go in
# another order than last in, first out, a freed one stays in use, and the next signal ends the process (2026.4).
_KEPT: list[dict] = []


class _Graph(nn.Module):
    """What is traced: a part of the model, from tensors to a dictionary of tensors."""

    def __init__(self, model: CADAForTextToImageRetrieval):
        super().__init__()
        self.model = model


class _ImageGraph(_Graph):
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = self.model.get_image_features(pixel_values)
        return {"image_embeds": F.normalize(outputs.pooler_output, dim=-1), "image_states": outputs.last_hidden_state}


class _TextGraph(_Graph):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        outputs = self.model.get_text_features(input_ids, attention_mask)
        return {"text_embeds": F.normalize(outputs.pooler_output, dim=-1)}


class _MatchGraph(_Graph):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor, image_index: Tensor
    ) -> dict[str, Tensor]:
        images = CADAImages(image_states).for_pairs(image_index)
        states = self.model._decode(input_ids, attention_mask, images, num_queries=1)
        return {"match_logits": self.model.match_head(states[:, 0])}


def _samples(model: CADAForTextToImageRetrieval, texts: int, length: int) -> dict[str, dict[str, Tensor]]:
    """Random inputs of each graph: two images, and `texts` texts, of which all but the first are shorter."""
    config, generator = model.config, torch.Generator().manual_seed(texts)
    vision, vocabulary = config.vision_config, config.text_config.vocab_size
    size = (2, vision.num_channels, *vision.image_height_width)
    pixel_values = torch.randn(size, generator=generator)
    input_ids = torch.randint(vocabulary, (texts, length), generator=generator)
    lengths = torch.arange(texts) % 2
    attention_mask = (torch.arange(length) < length - lengths[:, None]).long()
    text = {"input_ids": input_ids, "attention_mask": attention_mask}
    states = model.encode_images(pixel_values)
    pairs = {**text, "image_states": states, "image_index": torch.arange(texts) % 2}
    return {"image": {"pixel_values": pixel_values}, "text": text, "match": pairs}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their stages, and of operators and packages that this model does not need."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        disable(WARNING)
        try:
            yield
        finally:
            disable(NOTSET)


def _check_packages(export_format: str, *further: str) -> None:
    missing = [name for name in (*PACKAGES[export_format], *further) if importlib.util.find_spec(name) is None]
    if missing:
        raise CADAError(
            f"The format {export_format} needs {', '.join(missing)}. In a clone of this repository run: "
            f'pip install -e ".[{export_format}]"'
        )


def _int8_quantizer():
    """
    Weights of 8 bits, without data to calibrate on; OpenVINO rounds activations while it computes, by a scale for 32
    numbers. Not of ONNX: there a scale is of a whole tensor, and Rank-1 on the drawn set changed by up to 0.6 points.
    """
    from transformers.exporters.quantizers import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

    return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig())


def _trace(model: CADAForTextToImageRetrieval, export_format: str, int8: bool) -> ExportedModel:
    exporter_class = get_exporter_class(export_format)
    graphs = {"image": _ImageGraph, "text": _TextGraph} | ({"match": _MatchGraph} if model.config.use_atp else {})
    free = {"input_ids": (0, 1), "attention_mask": (0, 1)}  # sizes that are not fixed; of all others the first
    components = {}
    for name, graph in graphs.items():
        inputs = _samples(model, texts=3, length=5)[name]
        shapes = {key: dict.fromkeys(free.get(key, (0,)), torch.export.Dim.AUTO) for key in inputs}
        settings = exporter_class.config_class(dynamic_shapes=shapes, quantizer=_int8_quantizer() if int8 else None)
        components[name] = exporter_class().export(graph(model).eval(), inputs, settings).components["model"]
    return ExportedModel(components, export_format, config=model.config)


@torch.no_grad()
def export_model(
    name: str | os.PathLike,
    out: str | os.PathLike,
    export_format: str,
    revision: str | None = None,
    int8: bool = False,
) -> float:
    """
    Write the graphs of a checkpoint into the new folder `out`, with the configuration, the processor and the origin of
    the weights, so that the folder can be used in place of the checkpoint. Every graph is run, and compared with
    PyTorch on inputs of other sizes, before the folder is there.

    Args:
        name: the checkpoint, of CADA or a `BlipForImageTextRetrieval`; folder, or name on the Hub.
        out: folder that is new or empty.
        export_format: "onnx" or "openvino".
        revision: tag, branch or commit on the Hub.
        int8: weights of 8 bits, in OpenVINO. Features are others then: an index of these graphs is one of them alone.

    Returns:
        The largest difference to PyTorch in a feature or a logit.

    Raises:
        CADAError: for a folder with files, a missing package, and a checkpoint that cannot be loaded or exported.
    """
    if int8 and export_format != "openvino":
        raise CADAError(f"int8 is of the format openvino: in {export_format} it changes the ranking. Leave it out.")
    _check_packages(export_format, *["nncf"] * int8)
    make_new_folder(out)
    model, processor = load_model_and_processor(name, revision)
    weights = model_digest(model) + (" as int8" if int8 else "")
    model.float().requires_grad_(False).set_attn_implementation("sdpa")
    with checkpoint_written_whole(out) as folder:
        try:
            with _quiet():
                _trace(model, export_format, int8).save_pretrained(folder)
            processor.save_pretrained(folder)
            for unfit in ("modules.json", "sentence_bert_config.json"):
                (folder / unfit).unlink()  # sentence-transformers looks for weights beside them
            write_run(folder, origin_of(name, revision), None, [])
            (folder / EXPORT_FILE).write_text(json.dumps({"weights": weights}) + "\n", encoding="utf-8")
            difference = _compare(model, CADAGraphs(folder), torch.inf if int8 else TOLERANCE)
        except (CADAError, OSError):
            raise
        except Exception as error:  # of torch, an exporter or a runtime: each has classes of its own
            raise CADAError(f"{name} cannot be exported to {export_format}: {one_line(error)}") from error
    return difference


def _compare(model: CADAForTextToImageRetrieval, graphs: "CADAGraphs", tolerance: float = TOLERANCE) -> float:
    """The largest difference; a `CADAError` where it is above the tolerance, or not a number."""
    inputs = _samples(model, texts=6, length=8)
    text, images, index = inputs["text"], inputs["image"]["pixel_values"], torch.arange(6)
    differences = {}
    outputs, found = model.get_image_features(images), graphs.get_image_features(images)
    differences["image"] = F.normalize(outputs.pooler_output, dim=-1) - found.pooler_output
    known = F.normalize(model.get_text_features(**text).pooler_output, dim=-1)
    differences["text"] = known - graphs.get_text_features(**text).pooler_output
    if model.config.use_atp:
        known = model.match(**text, image_states=outputs.last_hidden_state, text_index=index, image_index=index % 2)
        found = graphs.match(**text, image_states=found.last_hidden_state, text_index=index, image_index=index % 2)
        differences["match"] = known - found
    largest = {name: difference.abs().max().item() for name, difference in differences.items()}
    for name, difference in largest.items():
        if not difference <= tolerance:
            raise CADAError(
                f"The graph {name} differs from PyTorch by {difference:.2g}, more than "
                f"{tolerance:g}: this version of the exporter does not fit the model. Install the versions of "
                "constraints.txt."
            )
    return max(largest.values())


def is_export(name: str | os.PathLike) -> bool:
    """Whether `name` is a folder that [`export_model`] wrote."""
    return (Path(name) / EXPORT_FILE).is_file()


def load_export(folder: str | os.PathLike) -> tuple["CADAGraphs", CADAProcessor]:
    """Graphs and processor of an export; a `CADAError` where they cannot be loaded."""
    graphs, processor = CADAGraphs(folder), load_processor(folder)
    check_processor(processor, graphs.config)
    return graphs, processor


class CADAGraphs(nn.Module):
    """
    The graphs of an export in place of [`CADAForTextToImageRetrieval`], for indexing, searching and evaluation: the
    methods have the arguments and results of the same methods there. They run on the CPU, in float32, with as many
    threads as PyTorch.

    Attributes:
        weights: digest of the weights that were exported.
    """

    device, dtype = torch.device("cpu"), torch.float32
    local_score = CADAForTextToImageRetrieval.local_score

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        self.folder = folder
        self.config = load_config(folder)
        self.weights = read_json(Path(folder) / EXPORT_FILE)["weights"]
        export_format = read_json(Path(folder) / EXPORT_MANIFEST_FILE)["export_format"]
        _check_packages(export_format)
        with in_one_line(f"The graphs of {folder} do not load", folder, "Export the model again."), _quiet():
            self.runners = ExportedModel.from_pretrained(folder, device="cpu", **_options(export_format)).runners
        if export_format == "openvino":
            _KEPT.append(self.runners)

    def to(self, device: torch.device | str) -> "CADAGraphs":
        """The same; a warning for another device than the CPU."""
        if torch.device(device).type != "cpu":
            logger.warning(f"The graphs of {self.folder} run on the CPU, not on {device}.")
        return self

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Features, here normalised, and patch states."""
        outputs = self.runners["image"](pixel_values=pixel_values)
        return BaseModelOutputWithPooling(outputs["image_states"], outputs["image_embeds"])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Features, here normalised."""
        outputs = self.runners["text"](input_ids=input_ids, attention_mask=attention_mask)
        return BaseModelOutputWithPooling(pooler_output=outputs["text_embeds"])

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Patch states."""
        return self.get_image_features(pixel_values).last_hidden_state

    def match(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_states: Tensor | CADAImages,
        text_index: Tensor,
        image_index: Tensor,
    ) -> Tensor:
        """Match logits of the listed pairs. Keys and values are computed once per image and call."""
        states = image_states.states if isinstance(image_states, CADAImages) else image_states
        input_ids, attention_mask = input_ids[text_index], attention_mask[text_index]
        longest = int(attention_mask.sum(dim=1).max())
        used, image_index = image_index.unique(return_inverse=True)
        outputs = self.runners["match"](
            input_ids=input_ids[:, :longest],
            attention_mask=attention_mask[:, :longest],
            image_states=states[used],
            image_index=image_index,
        )
        return outputs["match_logits"]


def _options(export_format: str) -> dict:
    """
    Of the runtime. Both would take every core of the machine, also where a container has fewer; and OpenVINO computes
    in bfloat16 where the processor has instructions for it.
    """
    threads = torch.get_num_threads()
    if export_format == "openvino":
        return {"config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}}
    from onnxruntime import SessionOptions  # an extra

    options = SessionOptions()
    options.intra_op_num_threads = threads
    return {"session_options": options}
