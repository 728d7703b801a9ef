"""The model: outputs, losses, matching, and the way to disk and back."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import losses_cada
from configuration_cada import CADAConfig
from losses_cada import cmpm_loss, draw_negatives, ndf_loss, ndf_reference_loss
from modeling_cada import (
    CADAForTextToImageRetrieval,
    CADAImages,
    CADAModel,
    CADATextLayer,
    CADAVisionLayer,
    blocks_of_pairs,
    resize_positions,
)


PROPERTY = settings(max_examples=25)
LOSSES = ["loss", "loss_ndf", "loss_atp", "loss_ara"]
TIED = "vocabulary_head.decoder.weight"


def tiny_model(seed: int = 0, **changes) -> CADAForTextToImageRetrieval:
    """Every weight, also biases and norms, random and large enough to matter."""
    model = CADAForTextToImageRetrieval(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return model.eval()


def losses(model, batch, **kwargs) -> dict[str, float]:
    with torch.no_grad():
        out = model(**batch, **kwargs)
    return {name: out[name].item() for name in LOSSES if out.get(name) is not None}


def gradients(model, batch, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def full_text(model, batch, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text `text` as the decoder reads it: [ENC] first, padded to `max_text_length`."""
    missing = model.config.max_text_length - batch["input_ids"].shape[1]
    input_ids = F.pad(batch["input_ids"][text : text + 1], (0, missing), value=0)
    input_ids[0, 0] = model.config.text_config.enc_token_id
    return input_ids, F.pad(batch["attention_mask"][text : text + 1], (0, missing))


@torch.no_grad()
def decoder_states(model, batch, text: int, image: int) -> torch.Tensor:
    """States `(length, hidden)` of one pair by itself: nothing shared, nothing left out."""
    image_states = model.cada.vision_model(batch["pixel_values"][image : image + 1]).last_hidden_state
    return model.cada.text_model(*full_text(model, batch, text), image_states).last_hidden_state[0]


def pair_logits(model, batch, text: int, image: int) -> torch.Tensor:
    return model.match_head(decoder_states(model, batch, text, image)[0])


@torch.no_grad()
def naive_atp(model, batch, similarity: torch.Tensor) -> float:
    """Equation (5) pair by pair, negatives by the similarity `(images, texts)`."""
    ids, config = batch["person_ids"].tolist(), model.config
    pairs = [(i, i, 1) for i in range(len(ids))]
    for i, own in enumerate(ids):
        others = [j for j, other in enumerate(ids) if other != own]
        if others:
            pairs.append((max(others, key=lambda j: similarity[i, j].item()), i, 0))
            pairs.append((i, max(others, key=lambda j: similarity[j, i].item()), 0))
    single, grouped = [], []
    for text, image, label in pairs:
        states = decoder_states(model, batch, text, image)
        single.append(-model.match_head(states[0]).log_softmax(0)[label].item())
        words = int(batch["attention_mask"][text].sum()) - 1
        for start in range(1, config.max_text_length - config.group_size + 1, config.group_stride):
            end = start + config.group_size
            group = states[start : end if config.pool_padding else min(end, 1 + words)]
            if len(group):
                grouped.append(-model.group_match_head(group.mean(0)).log_softmax(0)[label].item())
    return sum(single) / len(single) + sum(grouped) / len(grouped)


@torch.no_grad()
def features(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised features of images and texts."""
    image = model.get_image_features(batch["pixel_values"]).pooler_output
    return image, model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output


def cosine(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(rows[:, None], columns[None], dim=-1)


# Sizes and weights


def test_base_size():
    """ViT-B/16 and BERT-base with cross-attention, counted by hand; 224 M, not the 361 M of a separate ARA stack."""
    with torch.device("meta"):
        model = CADAForTextToImageRetrieval(CADAConfig())
    h, m, norm = 768, 3072, 2 * 768
    attention, mlp = 4 * (h * h + h), h * m + m + m * h + h
    vision = (16 * 16 * 3 * h + h) + h + 197 * h + 12 * (attention + mlp + 2 * norm) + norm
    text = (30524 + 512) * h + norm + 12 * (2 * attention + mlp + 3 * norm)
    heads = 2 * (h * 256 + 256) + 2 * (h * 2 + 2) + (h * h + h + norm + 30524)
    assert sum(parameter.numel() for parameter in model.parameters()) == vision + text + heads
    assert round((vision + text + heads) / 1e6) == 224


def test_random_weights_follow_the_configuration():
    """Standard deviations of 512 and more draws; a truncated normal at two standard deviations is 0.88 as wide."""
    torch.manual_seed(0)
    config = tiny_config(vision_config={"initializer_range": 0.5}, text_config={"initializer_range": 0.1})
    model = CADAForTextToImageRetrieval(config)
    vision, text = model.cada.vision_model, model.cada.text_model
    assert vision.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.5, rel=0.2)
    assert text.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.2)
    assert vision.embeddings.position_embedding.std().item() == pytest.approx(0.5, rel=0.3)
    assert vision.embeddings.class_embedding.abs().max() > 0
    assert text.embeddings.word_embeddings.weight[0].abs().max() == 0  # [PAD]
    assert model.vocabulary_head.decoder.bias.abs().max() == 0
    assert vision.layers[1].self_attn.q_proj.bias.abs().max() == 0
    assert text.embeddings.layer_norm.weight.tolist() == [1.0] * 16


@pytest.mark.parametrize("use_atp", [True, False])
@pytest.mark.parametrize("use_ara", [True, False])
def test_every_weight_is_trained(use_atp, use_ara):
    """Distributed training demands it: no weight without a gradient."""
    model = tiny_model(use_atp=use_atp, use_ara=use_ara)
    model(**tiny_batch()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "use_atp, use_ara, names",
    [
        (False, True, ["loss", "loss_ndf", "loss_ara"]),
        (True, False, ["loss", "loss_ndf", "loss_atp"]),
        (False, False, ["loss", "loss_ndf"]),
    ],
)
def test_switched_off_losses(tmp_path, use_atp, use_ara, names):
    full, batch = tiny_model(), tiny_batch()
    model = CADAForTextToImageRetrieval(tiny_config(use_atp=use_atp, use_ara=use_ara)).eval()
    weights = model.state_dict()
    assert any("match_head" in name for name in weights) is use_atp
    assert any("vocabulary_head" in name for name in weights) is use_ara
    assert any("cross_attn" in name for name in weights) is (use_atp or use_ara)
    assert (model.get_output_embeddings() is None) is not use_ara
    model.load_state_dict({name: tensor for name, tensor in full.state_dict().items() if name in weights})
    expected = losses(full, batch)
    actual = losses(model, batch)
    assert sorted(actual) == sorted(names)
    assert [actual[name] for name in names[1:]] == pytest.approx([expected[name] for name in names[1:]], rel=1e-5)
    factors = {"loss_ndf": 1, "loss_atp": 1, "loss_ara": 0.1}
    assert actual["loss"] == pytest.approx(sum(factors[name] * expected[name] for name in names[1:]), rel=1e-5)
    if not use_atp:
        with pytest.raises(ValueError, match="use_atp"):
            model.match(batch["input_ids"], batch["attention_mask"], model.encode_images(batch["pixel_values"]))
    # The same model from the full checkpoint, and from its own.
    full.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "own")
    pruned = CADAForTextToImageRetrieval.from_pretrained(tmp_path / "full", use_atp=use_atp, use_ara=use_ara)
    for loaded in (pruned, CADAForTextToImageRetrieval.from_pretrained(tmp_path / "own")):
        assert sorted(loaded.state_dict()) == sorted(weights)
        assert losses(loaded, batch) == pytest.approx(actual, rel=1e-5)


def test_decoder_needs_cross_attention():
    model = CADAModel(tiny_config(use_atp=False, use_ara=False))
    batch = tiny_batch()
    with pytest.raises(ValueError, match="cross-attention"):
        model.text_model(batch["input_ids"], batch["attention_mask"], torch.zeros(4, 9, 16))


# Outputs


def test_output_fields_and_shapes():
    model, batch = tiny_model(), tiny_batch(batch=4, length=9)
    out = model(**batch)
    assert {name: tuple(out[name].shape) for name in LOSSES} == dict.fromkeys(LOSSES, ())
    assert out.image_embeds.shape == out.text_embeds.shape == (4, 8)
    assert out.logits_per_image.shape == (4, 4)
    assert out.vision_model_output.last_hidden_state.shape == (4, 1 + 4 * 2, 16)
    assert out.vision_model_output.pooler_output.shape == (4, 16)
    assert out.text_model_output.last_hidden_state.shape == (4, 9, 16)
    assert out.text_model_output.pooler_output.shape == (4, 16)
    # Also with unequal numbers, as in retrieval.
    out = model(batch["input_ids"][:3], batch["pixel_values"], batch["attention_mask"][:3])
    assert out.logits_per_image.shape == (4, 3)
    assert out.logits_per_text.shape == (3, 4)
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())


def test_logits_are_cosines():
    model, batch = tiny_model(temperature=0.5), tiny_batch()
    image, text = features(model, batch)
    out = model(**batch)
    assert_close(out.logits_per_image, cosine(image, text) / 0.5)
    assert_close(out.image_embeds, image / image.norm(dim=1, keepdim=True))
    assert_close(out.text_embeds, text / text.norm(dim=1, keepdim=True))


def test_features_are_projections():
    """`pooler_output` is the first state, projected and not normalised."""
    model, batch = tiny_model(), tiny_batch()
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    for output, projection in ((image, model.cada.visual_projection), (text, model.cada.text_projection)):
        expected = output.last_hidden_state[:, 0] @ projection.weight.t() + projection.bias
        assert_close(output.pooler_output, expected)
        assert (output.pooler_output.norm(dim=1) - 1).abs().min() > 0.01
    as_tuple = model.get_image_features(batch["pixel_values"], return_dict=False)
    assert torch.equal(as_tuple[0], image.last_hidden_state) and torch.equal(as_tuple[1], image.pooler_output)


def test_loss_is_the_sum():
    out = losses(tiny_model(ara_weight=0.25), tiny_batch())
    assert out["loss"] == pytest.approx(out["loss_ndf"] + out["loss_atp"] + 0.25 * out["loss_ara"], rel=1e-6)


@pytest.mark.parametrize("changes", [{"person_ids": None}, {"return_loss": False}])
def test_no_losses_unless_asked(changes):
    out = tiny_model()(**{**tiny_batch(), **changes})
    assert [out[name] for name in LOSSES if out.get(name) is not None] == []
    assert out.logits_per_image is not None


@pytest.mark.parametrize("missing", ["masked_input_ids", "labels"])
def test_ara_needs_masked_texts(missing):
    model, batch = tiny_model(), tiny_batch()
    out = losses(model, {**batch, missing: None})
    assert sorted(out) == ["loss", "loss_atp", "loss_ndf"]
    assert out["loss"] == pytest.approx(out["loss_ndf"] + out["loss_atp"])


def test_losses_need_persons():
    with pytest.raises(ValueError, match="person_ids"):
        tiny_model()(**{**tiny_batch(), "person_ids": None}, return_loss=True)


@pytest.mark.parametrize(
    "short", [["person_ids"], ["pixel_values"], ["input_ids", "attention_mask", "masked_input_ids", "labels"]]
)
def test_losses_need_pairs(short):
    batch = tiny_batch()
    with pytest.raises(ValueError, match="pairs"):
        tiny_model()(**{**batch, **{name: batch[name][:3] for name in short}})


def test_loss_comes_first():
    """As in every model of transformers: `model(...)[0]` is the loss, the order is that of the fields."""
    model, batch = tiny_model(), tiny_batch()
    out = model(**batch)
    assert list(out)[:4] == LOSSES
    assert torch.equal(out[0], out.loss)
    assert torch.equal(model(**batch, return_dict=False)[0], out.loss)


def test_attention_mask_defaults_to_ones():
    model, batch = tiny_model(), tiny_batch()
    expected = losses(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    assert losses(model, {**batch, "attention_mask": None}) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("changes", [{}, {"ara_causal": True}, {"pool_padding": False}], ids=str)
def test_eager_equals_sdpa(changes, padded):
    batch = tiny_batch()
    if not padded:
        batch["attention_mask"] = None
    eager = tiny_model(attn_implementation="eager", **changes)
    sdpa = tiny_model(attn_implementation="sdpa", **changes)
    for model, name in ((eager, "eager"), (sdpa, "sdpa")):
        for tower in (model.cada.text_model, model.cada.vision_model):
            assert tower.config._attn_implementation == name
    assert losses(sdpa, batch) == pytest.approx(losses(eager, batch), rel=1e-4)
    expected, actual = eager(**batch), sdpa(**batch)
    assert_close(actual.logits_per_image, expected.logits_per_image, 1e-3)
    assert_close(actual.text_model_output.last_hidden_state, expected.text_model_output.last_hidden_state)
    assert_close(actual.vision_model_output.last_hidden_state, expected.vision_model_output.last_hidden_state)
    expected = gradients(eager, batch)
    for name, gradient in gradients(sdpa, batch).items():
        assert_close(gradient / (1 + expected[name].abs().max()), expected[name] / (1 + expected[name].abs().max()))


def test_hidden_states_and_attentions():
    model = tiny_model(attn_implementation="eager")
    batch = tiny_batch(batch=4, length=9)
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    text, vision = out.text_model_output, out.vision_model_output
    assert [tuple(state.shape) for state in text.hidden_states] == [(4, 9, 16)] * 3
    assert [tuple(state.shape) for state in vision.hidden_states] == [(4, 9, 16)] * 3
    assert [tuple(weights.shape) for weights in text.attentions] == [(4, 2, 9, 9)] * 2
    assert [tuple(weights.shape) for weights in vision.attentions] == [(4, 2, 9, 9)] * 2
    assert torch.equal(text.hidden_states[-1], text.last_hidden_state)
    assert_close(text.attentions[1].sum(-1), torch.ones(4, 2, 9))
    padding = batch["attention_mask"][:, None, None] == 0
    assert padding.any() and text.attentions[0].masked_select(padding).max() < 1e-6


def test_cross_attentions():
    """7 tokens of each text read the class token and 8 patches."""
    model = tiny_model(attn_implementation="eager")
    batch = tiny_batch(batch=3, length=7)
    image_states = model.encode_images(batch["pixel_values"])
    out = model.cada.text_model(batch["input_ids"], batch["attention_mask"], image_states, output_attentions=True)
    assert [tuple(weights.shape) for weights in out.cross_attentions] == [(3, 2, 7, 9)] * 2
    assert_close(out.cross_attentions[0].sum(-1), torch.ones(3, 2, 7))
    assert [tuple(weights.shape) for weights in out.attentions] == [(3, 2, 7, 7)] * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_first_queries(attention):
    model, batch = tiny_model(attn_implementation=attention), tiny_batch()
    inputs = batch["input_ids"], batch["attention_mask"]
    first = model.cada.text_model(*inputs, num_queries=2).last_hidden_state
    assert first.shape == (4, 2, 16)
    assert_close(first, model.cada.text_model(*inputs).last_hidden_state[:, :2])
    with pytest.raises(ValueError, match="num_queries.*is_causal"):
        model.cada.text_model(*inputs, num_queries=2, is_causal=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": {"hidden_dropout_prob": 0.5}},
        {"text_config": {"attention_probs_dropout_prob": 0.5}},
        {"vision_config": {"attention_dropout": 0.5}},
    ],
    ids=str,
)
def test_dropout_works_in_training_only(changes):
    model, batch = tiny_model(**changes), tiny_batch()
    torch.manual_seed(0)
    assert losses(model, batch) == losses(model, batch)
    model.train()
    assert losses(model, batch) != losses(model, batch)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, batch = tiny_model().train(), tiny_batch()
    calls = []
    for module in model.modules():
        if isinstance(module, (CADATextLayer, CADAVisionLayer)):
            module.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model, batch)
    plain_calls = len(calls)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model, batch)
    # Two vision layers, and two text layers that encode, match and fill masks: each is computed twice.
    assert plain_calls == 2 + 2 * 3
    assert len(calls) - plain_calls == 2 * plain_calls
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


def test_bfloat16():
    model, batch = tiny_model().to(torch.bfloat16), tiny_batch()
    out = model(**batch)
    out.loss.backward()
    assert all(out[name].isfinite() for name in LOSSES)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert out.image_embeds.dtype == torch.bfloat16
    logits = model.match(batch["input_ids"], batch["attention_mask"], model.encode_images(batch["pixel_values"]))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    # Eight bits of mantissa: near the loss in single precision, where the softmax is not sharp.
    single, half = tiny_model(temperature=1.0), tiny_model(temperature=1.0).to(torch.bfloat16)
    assert losses(half, batch)["loss"] == pytest.approx(losses(single, batch)["loss"], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_under_autocast(dtype):
    """The towers compute in half precision, the contrastive loss and the choice of negatives in single."""
    model, batch = tiny_model(), tiny_batch()
    single = losses(model, batch)
    seen = []

    def record(function):
        return lambda scores, *more: seen.append(scores.dtype) or function(scores, *more)

    with torch.autocast("cpu", dtype=dtype), pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses_cada, "ndf_loss", record(ndf_loss))
        patch.setattr(losses_cada, "draw_negatives", record(draw_negatives))
        half = losses(model, batch)
    assert seen == [torch.float32] * 3
    for name in LOSSES:
        assert half[name] == pytest.approx(single[name], rel=0.1), name


# To disk and back


def test_save_and_load(tmp_path, monkeypatch):
    model, batch = tiny_model(), tiny_batch()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {TIED}
    devices = []
    build = CADAModel.post_init

    def record(self):
        devices.extend(parameter.device.type for parameter in self.parameters())
        build(self)

    monkeypatch.setattr(CADAModel, "post_init", record)
    loaded, info = CADAForTextToImageRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert set(devices) == {"meta"}
    assert [name for name in info if info[name]] == []
    assert not loaded.training
    tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert [name for name, tensor in tensors.items() if tensor.device.type != "cpu"] == []
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert losses(loaded, batch) == losses(model, batch)
    assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


def test_vocabulary_head_stays_tied(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for tied in (model, CADAForTextToImageRetrieval.from_pretrained(tmp_path)):
        assert tied.vocabulary_head.decoder.weight is tied.cada.text_model.embeddings.word_embeddings.weight
        assert tied.get_input_embeddings() is tied.cada.text_model.embeddings.word_embeddings
        assert tied.get_output_embeddings() is tied.vocabulary_head.decoder
        assert TIED not in dict(tied.named_parameters())


def test_loading_a_base_checkpoint(tmp_path):
    """A `CADAModel` gives its weights to the full model, whose heads are then new."""
    base = tiny_model().cada
    base.save_pretrained(tmp_path)
    loaded, info = CADAForTextToImageRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    heads = ("match_head.", "group_match_head.", "vocabulary_head.")
    assert all(name.startswith(heads) for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert all(parameter.isfinite().all() and parameter.device.type == "cpu" for parameter in loaded.parameters())
    assert loaded.match_head.weight.abs().max() > 0
    assert loaded.match_head.bias.abs().max() == 0
    assert torch.equal(loaded.cada.visual_projection.weight, base.visual_projection.weight)


def test_base_model_alone(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    model.save_pretrained(tmp_path)
    base = CADAModel.from_pretrained(tmp_path)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    out, expected = base(**inputs), model(**inputs)
    assert torch.equal(out.logits_per_image, expected.logits_per_image)
    assert torch.equal(out.text_embeds, expected.text_embeds)
    assert out.loss is None
    assert len(base(**inputs, return_dict=False)) == 6


@pytest.mark.parametrize("size", [50, 38])
def test_resize_token_embeddings(tmp_path, size):
    model, batch = tiny_model(), tiny_batch()
    batch["input_ids"], batch["masked_input_ids"] = batch["input_ids"] % 30, batch["masked_input_ids"] % 30
    batch["labels"] = torch.where(batch["labels"] > 0, batch["labels"] % 30, -100)
    model.config.text_config.enc_token_id = 35
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    kept, before = min(size, 40), model.vocabulary_head(states)
    model.resize_token_embeddings(size)
    assert model.config.text_config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == (size, 16)
    assert model.vocabulary_head.decoder.weight is model.get_input_embeddings().weight
    after = model.vocabulary_head(states)
    assert after.shape == (3, size)
    assert_close(after[:, :kept], before[:, :kept])
    out = losses(model, batch)
    assert sorted(out) == sorted(LOSSES)
    model.save_pretrained(tmp_path)
    loaded = CADAForTextToImageRetrieval.from_pretrained(tmp_path)
    assert losses(loaded, batch) == pytest.approx(out, rel=1e-5)


# Images


def test_patches_go_row_by_row():
    """In an image of 4×2 patches the patch of row r and column c is token 1 + 2 r + c."""
    embeddings = tiny_model().cada.vision_model.embeddings
    blank = torch.zeros(1, 3, 32, 16)
    for row, column in [(0, 1), (3, 0), (2, 1)]:
        image = blank.clone()
        image[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
        changed = (embeddings(image) - embeddings(blank)).abs().sum(-1)[0] > 0
        assert changed.nonzero().flatten().tolist() == [1 + 2 * row + column]


@pytest.mark.parametrize("height, width", [(16, 32), (32, 32), (33, 16)])
def test_wrong_image_size(height, width):
    model, batch = tiny_model(), tiny_batch()
    batch["pixel_values"] = torch.zeros(4, 3, height, width)
    with pytest.raises(ValueError, match=f"{height}×{width}.*32×16"):
        model(**batch)
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        model.get_image_features(batch["pixel_values"])


@pytest.mark.parametrize("height, width, tokens", [(16, 32, 9), (48, 24, 19), (32, 16, 9)])
def test_other_image_sizes(height, width, tokens):
    model, batch = tiny_model(), tiny_batch()
    pixel_values = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    out = model(**{**batch, "pixel_values": pixel_values}, interpolate_pos_encoding=True)
    assert out.loss.isfinite()
    assert out.vision_model_output.last_hidden_state.shape == (4, tokens, 16)
    feature = model.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
    assert_close(F.normalize(feature, dim=-1), out.image_embeds)
    if (height, width) == (32, 16):
        assert_close(
            out.image_embeds, model.get_image_features(pixel_values).pooler_output.div(feature.norm(dim=1)[:, None])
        )


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_of_another_grid():
    """Bicubic, the class token kept; the same grid stays the same."""
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + 64, 2)
    assert resize_positions(positions, (8, 8), (8, 8)) is positions
    resized = resize_positions(positions, (8, 8), (16, 4))
    assert resized.shape == (1, 65, 2)
    assert torch.equal(resized[:, 0], positions[:, 0])
    # Twice as many rows: row 7 has its centre at (7 + 0.5) / 2 - 0.5; half as many columns: column 1 at 2 * 1.5 - 0.5.
    expected = sum(
        cubic(3.25 - row) * cubic(2.5 - column) * positions[0, 1 + 8 * row + column]
        for row in range(8)
        for column in range(8)
    )
    torch.testing.assert_close(resized[0, 1 + 4 * 7 + 1], expected)


@pytest.mark.parametrize("image_size", [16, (16, 40)])
def test_square_and_wide_images(image_size):
    model = tiny_model(vision_config={"image_size": image_size})
    height, width = model.config.vision_config.image_height_width
    batch = {**tiny_batch(), "pixel_values": torch.randn(4, 3, height, width)}
    out = model(**batch)
    assert out.loss.isfinite()
    assert out.vision_model_output.last_hidden_state.shape == (4, 1 + (height // 8) * (width // 8), 16)


def test_cross_attention_between_unequal_widths():
    model, batch = tiny_model(vision_config={"hidden_size": 24}), tiny_batch()
    assert model.cada.text_model.layers[0].cross_attn.k_proj.weight.shape == (16, 24)
    logits = model.match(batch["input_ids"], batch["attention_mask"], model.encode_images(batch["pixel_values"]))
    assert_close(logits, torch.stack([pair_logits(model, batch, i, i) for i in range(4)]))


# Losses


@pytest.mark.parametrize("name, loss", [("ndf", ndf_loss), ("ndf_reference", ndf_reference_loss)])
def test_contrastive_loss(name, loss):
    model, batch = tiny_model(contrastive_loss=name, temperature=0.3), tiny_batch()
    batch["person_ids"] = torch.tensor([5, 9, 5, 2])
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    expected = loss(cosine(*features(model, batch)), same, 0.3)
    assert losses(model, batch)["loss_ndf"] == pytest.approx(expected.item(), rel=1e-4)


def test_cmpm_takes_unnormalised_features():
    model, batch = tiny_model(contrastive_loss="cmpm"), tiny_batch()
    expected = cmpm_loss(*features(model, batch), torch.eye(4, dtype=torch.bool))
    assert losses(model, batch)["loss_ndf"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("pool_padding", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 2, 0]])
def test_atp(similarity, pool_padding, ids):
    model = tiny_model(hard_negative_similarity=similarity, pool_padding=pool_padding, group_size=6, group_stride=3)
    batch = {**tiny_batch(batch=6, seed=5), "person_ids": torch.tensor(ids)}
    image, text = features(model, batch)
    expected = {
        "cosine": naive_atp(model, batch, cosine(image, text)),
        "dot": naive_atp(model, batch, image @ text.t()),
    }
    assert losses(model, batch)["loss_atp"] == pytest.approx(expected[similarity], rel=1e-4)
    assert abs(expected["cosine"] - expected["dot"]) > 1e-3  # this batch tells them apart


def test_padding_in_groups_changes_the_loss():
    batch = tiny_batch()
    counted, left_out = (losses(tiny_model(pool_padding=padding), batch) for padding in (True, False))
    assert abs(counted["loss_atp"] - left_out["loss_atp"]) > 1e-3
    assert counted["loss_ndf"] == pytest.approx(left_out["loss_ndf"])


@pytest.mark.parametrize("pool_padding", [True, False])
def test_losses_do_not_depend_on_padding(pool_padding):
    model, batch = tiny_model(pool_padding=pool_padding), tiny_batch(length=9)
    expected = losses(model, batch)
    for missing in (1, 4):
        padded = {
            name: F.pad(batch[name], (0, missing)) for name in ("input_ids", "attention_mask", "masked_input_ids")
        }
        padded["labels"] = F.pad(batch["labels"], (0, missing), value=-100)
        assert losses(model, {**batch, **padded}) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"pool_padding": False}, {"use_atp": False}], ids=str)
def test_too_long_texts(changes):
    model = tiny_model(**changes)
    with pytest.raises(ValueError, match="14 tokens.*`max_text_length`"):
        model(**tiny_batch(length=14))
    with pytest.raises(ValueError, match="25 tokens.*`max_position_embeddings`"):
        model.get_text_features(torch.ones(1, 25, dtype=torch.long))


@pytest.mark.parametrize("pool_padding", [True, False])
def test_one_person(pool_padding):
    """No negatives: ATP has the positives alone, and the right distribution of NDF is the uniform one."""
    model = tiny_model(pool_padding=pool_padding)
    batch = {**tiny_batch(), "person_ids": torch.full((4,), 7)}
    out = losses(model, batch)
    assert out["loss_atp"] == pytest.approx(naive_atp(model, batch, torch.zeros(4, 4)), rel=1e-4)
    expected = ndf_loss(cosine(*features(model, batch)), torch.ones(4, 4, dtype=torch.bool), 0.02)
    assert out["loss_ndf"] == pytest.approx(expected.item(), rel=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients(model, batch).values())


def test_one_pair():
    model, batch = tiny_model(), tiny_batch(batch=1)
    out = losses(model, batch)
    assert out["loss_ndf"] == pytest.approx(0, abs=1e-6)  # p = q = 1
    assert out["loss_atp"] == pytest.approx(naive_atp(model, batch, torch.zeros(1, 1)), rel=1e-4)


def test_annealed_negatives():
    model, batch = tiny_model(), tiny_batch(batch=6)
    hardest = losses(model, batch)
    torch.manual_seed(0)
    assert losses(model, batch, negative_temperature=1e-6) == pytest.approx(hardest, rel=1e-5)
    drawn = [losses(model, batch, negative_temperature=100.0) for _ in range(8)]
    assert len({round(out["loss_atp"], 4) for out in drawn}) > 4
    assert {round(out["loss_ndf"], 4) for out in drawn} == {round(hardest["loss_ndf"], 4)}


def test_label_noise_robust_weighs_every_loss(monkeypatch):
    """Each pair in turn has the weight of all four: the losses differ, and their mean is that of equal weights."""
    model, batch = tiny_model(), tiny_batch(batch=4)
    plain, turns = losses(model, batch), []
    for weights in 4 * torch.eye(4):
        monkeypatch.setattr(losses_cada, "pair_weights", lambda *_, weights=weights: weights)
        turns.append(losses(model, batch, label_noise_robust=True))
    for name in LOSSES:
        values = [turn[name] for turn in turns]
        assert sum(values) / 4 == pytest.approx(plain[name], rel=1e-5)
        assert max(values) - min(values) > 1e-3
    assert losses(model, batch) == plain  # nobody asked


def test_annealed_negatives_in_both_directions():
    """Per pair a drawn text for the image, then a drawn image for the text: both vary from call to call."""
    model, batch = tiny_model(), tiny_batch(batch=4)
    pairs, every_text = [], F.pad(batch["input_ids"], (0, 4))  # of the decoder: the text and the image of each

    def record(_, args):
        if len(args) > 2 and args[2].image_index is not None:
            texts = [every_text[:, 1:].tolist().index(row) for row in args[0][:, 1:].tolist()]
            pairs.append((texts, args[2].image_index.tolist()))

    model.cada.text_model.register_forward_pre_hook(record)
    torch.manual_seed(0)
    for _ in range(8):
        losses(model, batch, negative_temperature=100.0)
    assert len(pairs) == 8
    for texts, images in pairs:
        assert images[:8] == [0, 1, 2, 3] * 2
        assert texts[:4] == texts[8:] == [0, 1, 2, 3]
    assert len({tuple(images[8:]) for _, images in pairs}) > 1  # images of the texts
    assert len({tuple(texts[4:8]) for texts, _ in pairs}) > 1  # texts of the images


def test_images_share_keys_and_values():
    """Several calls share the keys and values of the same images; what is read and the gradients stay the same."""
    model, batch = tiny_model(), tiny_batch(batch=4)
    inputs = batch["input_ids"], batch["attention_mask"]
    text, image = torch.tensor([0, 1, 3]), torch.tensor([2, 2, 0])
    states = model.encode_images(batch["pixel_values"])
    projected = []
    for layer in model.cada.text_model.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda _, args, out: projected.append(tuple(out.shape)))
    calls = [(text, image), (text[:2], image[1:]), (None, None)]
    expected = torch.cat([model.match(*inputs, states, *pairs) for pairs in calls])
    assert projected == [(4, 9, 16)] * 2 * 3
    images = CADAImages(states)
    actual = torch.cat([model.match(*inputs, images, *pairs) for pairs in calls])
    assert projected == [(4, 9, 16)] * 2 * 4
    torch.testing.assert_close(actual, expected)
    weights = [parameter for name, parameter in model.named_parameters() if "cross_attn" in name]
    wanted = torch.autograd.grad(expected.square().sum(), weights, retain_graph=True)
    got = torch.autograd.grad(actual.square().sum(), weights)
    torch.testing.assert_close(got, wanted)
    assert any(gradient.abs().sum() > 0 for gradient in got)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_shares_keys_and_values(checkpointing):
    """Both passes of the decoder share them; under checkpointing each computes its own, twice."""
    model, batch = tiny_model().train(), tiny_batch()
    projected = []
    for layer in model.cada.text_model.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda *_: projected.append(1))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    assert len(projected) == (2 * 2 * 2 if checkpointing else 2)


def test_blocks_of_pairs_by_hand():
    """Three pairs of image 7 and two of image 2: blocks of two, and the last one of image 7 holds a pair twice."""
    assert blocks_of_pairs(torch.tensor([7, 2, 7, 7, 2])).tolist() == [[1, 4], [0, 2], [3, 3]]
    assert blocks_of_pairs(torch.tensor([0, 1, 1, 2])) is None
    assert blocks_of_pairs(torch.zeros(20, dtype=torch.long)).shape == (3, 8)


@PROPERTY
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_blocks_of_pairs(images):
    """Every pair stands in a block, and a block reads one image."""
    image_index = torch.tensor(images)
    blocks = blocks_of_pairs(image_index)
    if blocks is None:
        assert len(images) < 2 * len(set(images))
        return
    assert set(blocks.flatten().tolist()) == set(range(len(images)))
    read = image_index[blocks]
    assert torch.equal(read, read[:, :1].expand_as(read))
    assert blocks.shape[1] == min(8, len(images) // len(set(images)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("num_queries", [None, 1])
def test_blocks_of_pairs_change_nothing(implementation, num_queries):
    """Pairs of an image that read it together: same states, and same gradients of text and image."""
    model, batch = tiny_model(), tiny_batch()
    model.set_attn_implementation(implementation)
    text_index, image_index = torch.tensor([2, 0, 2, 1, 1, 0, 3]), torch.tensor([0, 0, 3, 3, 0, 3, 3])
    assert blocks_of_pairs(image_index).shape == (3, 3)  # two places are left over
    results = []
    for side_by_side in (False, True):
        model.zero_grad()
        image_states = model.encode_images(batch["pixel_values"]).detach().requires_grad_()
        images = CADAImages(image_states).for_pairs(image_index, side_by_side)
        assert (images.blocks is not None) is side_by_side
        inputs = (batch["input_ids"][text_index], batch["attention_mask"][text_index], images, num_queries)
        states = model.cada.text_model(*inputs).last_hidden_state
        states.square().sum().backward()
        projections = [layer.cross_attn.q_proj.weight.grad.clone() for layer in model.cada.text_model.layers]
        results.append((states, image_states.grad, *projections))
    assert results[0][1].abs().sum() > 0
    torch.testing.assert_close(*results)


def test_ara_by_hand():
    """Cross entropy at the masked positions of the decoder over image i and masked text i."""
    model, batch = tiny_model(), tiny_batch()
    image_states = model.encode_images(batch["pixel_values"])
    costs = []
    for i in range(4):
        mask = batch["attention_mask"][i : i + 1]
        states = model.cada.text_model(batch["masked_input_ids"][i : i + 1], mask, image_states[i : i + 1])
        for position in (batch["labels"][i] != -100).nonzero().flatten().tolist():
            logits = model.vocabulary_head(states.last_hidden_state[0, position])
            costs.append(-logits.log_softmax(0)[batch["labels"][i, position]].item())
    assert len(costs) == 8
    assert losses(model, batch)["loss_ara"] == pytest.approx(sum(costs) / 8, rel=1e-4)


def test_vocabulary_head_by_hand():
    """Dense, GELU, norm, then the scalar product with every word embedding, plus a bias."""
    model = tiny_model()
    head, words = model.vocabulary_head, model.cada.text_model.embeddings.word_embeddings.weight
    states = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    hidden = states @ head.dense.weight.t() + head.dense.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + 1e-12).sqrt()
    hidden = hidden * head.layer_norm.weight + head.layer_norm.bias
    assert_close(head(states), torch.einsum("ph,vh->pv", hidden, words) + head.decoder.bias)


def test_nothing_masked():
    model, batch = tiny_model(), tiny_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert losses(model, batch)["loss_ara"] == 0
    grads = gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in grads.values())
    assert grads["vocabulary_head.dense.weight"].abs().max() == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_ara_causal(attention, causal, with_mask):
    """Asked at position 3 of 9 tokens: an earlier token always matters, a later one where the stack is not causal."""
    model = tiny_model(attn_implementation=attention, ara_causal=causal)
    batch = {**tiny_batch(), "attention_mask": torch.ones(4, 9, dtype=torch.long) if with_mask else None}
    batch["labels"] = torch.full((4, 9), -100)
    batch["labels"][:, 3] = 11
    batch["masked_input_ids"] = torch.full((4, 9), 12)

    def loss_after(position):
        changed = batch["masked_input_ids"].clone()
        if position is not None:
            changed[:, position] = 13
        return losses(model, {**batch, "masked_input_ids": changed})["loss_ara"]

    unchanged = loss_after(None)
    assert abs(loss_after(2) - unchanged) > 1e-3
    later = [abs(loss_after(position) - unchanged) for position in (4, 8)]
    assert max(later) < 1e-5 if causal else min(later) > 1e-3


# Matching


@pytest.fixture(scope="module")
def pairs():
    """A model, five images and texts, and the match logits `(text, image, 2)` of all pairs one by one."""
    model, batch = tiny_model(), tiny_batch(batch=5)
    logits = [torch.stack([pair_logits(model, batch, i, j) for j in range(5)]) for i in range(5)]
    return model, batch, torch.stack(logits).detach()


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(0, 4),
    st.integers(0, 10**6),
)
def test_match_equals_pair_by_pair(pairs, listed, padding, seed):
    """Any pairs in any order, however far the texts are padded and whatever stands there."""
    model, batch, expected = pairs
    text_index, image_index = torch.tensor(listed).unbind(1)
    generator = torch.Generator().manual_seed(seed)
    ids = F.pad(batch["input_ids"], (0, padding))
    mask = F.pad(batch["attention_mask"], (0, padding))
    ids = torch.where(mask == 1, ids, torch.randint(0, 40, ids.shape, generator=generator))
    with torch.no_grad():
        image_states = model.encode_images(batch["pixel_values"])
        logits = model.match(ids, mask, image_states, text_index, image_index)
    assert_close(logits, expected[text_index, image_index])


def test_pairs_differ(pairs):
    """The table that matching is compared with tells all pairs apart."""
    scores = pairs[2][..., 1].flatten().sort().values
    assert scores.diff().min() > 1e-4


def test_match_in_order(pairs):
    model, batch, expected = pairs
    image_states = model.encode_images(batch["pixel_values"])
    assert torch.equal(image_states, model.cada.vision_model(batch["pixel_values"]).last_hidden_state)
    logits = model.match(batch["input_ids"], batch["attention_mask"], image_states)
    assert_close(logits, expected[torch.arange(5), torch.arange(5)])


def test_match_without_pairs(pairs):
    model, batch, _ = pairs
    none = torch.zeros(0, dtype=torch.long)
    image_states = model.encode_images(batch["pixel_values"])
    assert model.match(batch["input_ids"], batch["attention_mask"], image_states, none, none).shape == (0, 2)


@pytest.mark.parametrize("given_index", ["text_index", "image_index"])
def test_match_takes_both_indices(pairs, given_index):
    model, batch, _ = pairs
    image_states = model.encode_images(batch["pixel_values"])
    with pytest.raises(ValueError, match="text_index.*image_index"):
        model.match(batch["input_ids"], batch["attention_mask"], image_states, **{given_index: torch.tensor([0])})


def test_keys_and_values_are_computed_once():
    """Twelve pairs of two images: each layer sees the states of two images, and the last one query per pair."""
    model, batch = tiny_model(), tiny_batch(batch=3, length=9)
    image_states = model.encode_images(batch["pixel_values"][:2])
    rows, queries = [], []
    for layer in model.cada.text_model.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda _, args, out: rows.append(tuple(out.shape)))
        layer.cross_attn.q_proj.register_forward_hook(lambda _, args, out: queries.append(tuple(out.shape)))
    text_index, image_index = torch.tensor([0, 1, 2] * 4), torch.tensor([0] * 6 + [1] * 6)
    model.match(batch["input_ids"], batch["attention_mask"], image_states, text_index, image_index)
    assert rows == [(2, 9, 16)] * 2
    assert queries == [(12, 9, 16), (12, 1, 16)]


def test_match_reads_nothing_back():
    """On an accelerator it waits for no result: there are none to read on the meta device, where reading fails."""
    model, batch = tiny_model().to("meta"), tiny_batch(batch=5, length=9)
    text_index, image_index = torch.tensor([0, 1, 2, 3, 4] * 3), torch.tensor([0] * 6 + [1] * 5 + [2] * 4)
    assert len(batch["attention_mask"].sum(dim=1).unique()) > 1  # so that there is a mask
    images = CADAImages(model.encode_images(batch["pixel_values"].to("meta")))
    logits = model.match(batch["input_ids"], batch["attention_mask"], images, text_index, image_index)
    assert model.local_score(logits).shape == (15,) and logits.is_meta


def test_match_score():
    """Logits (0, log 3): probability 3/4 of a match, and the logit log 3."""
    logits = torch.tensor([[0.0, log(3)], [1.0, 1.0]])
    assert tiny_model().local_score(logits).tolist() == pytest.approx([0.75, 0.5])
    assert tiny_model(match_score="logit").local_score(logits).tolist() == pytest.approx([log(3), 1.0])


def test_equal_captions_change_the_negatives_alone():
    """Four captions that are all equal leave ATP without negatives, as one person would; NDF stays as it is."""
    model, batch = tiny_model(), tiny_batch()
    plain = losses(model, batch)
    equal = losses(model, {**batch, "caption_ids": torch.full((4,), 5)})
    one_person = losses(model, {**batch, "person_ids": torch.zeros(4, dtype=torch.long)})
    other = losses(model, {**batch, "caption_ids": torch.arange(4)})
    assert equal["loss_ndf"] == plain["loss_ndf"] != one_person["loss_ndf"]
    assert equal["loss_atp"] == one_person["loss_atp"] != plain["loss_atp"]
    assert other == plain
