"""The configurations: defaults, checks, and the way to disk and back."""

import json

import pytest
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.testing_utils import CaptureLogger

import configuration_cada
from configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig


CLASSES = [CADAVisionConfig, CADATextConfig, CADAConfig]


def own_fields(config_class) -> list[str]:
    """The fields that the class itself declares."""
    return sorted(config_class.__annotations__)


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            CADAConfig(),
            {
                "projection_dim": 256,
                "temperature": 0.02,
                "max_text_length": 73,  # [CLS] and M = 72
                "group_size": 36,
                "group_stride": 36,
                "pool_padding": True,
                "contrastive_loss": "ndf",
                "hard_negative_similarity": "cosine",
                "match_score": "probability",
                "mask_unit": "phrase",
                "mask_rate": 0.8,
                "use_atp": True,
                "use_ara": True,
                "ara_weight": 0.1,
                "ara_causal": False,
                "rerank_k": 32,
                "tie_word_embeddings": True,
            },
        ),
        (
            CADAVisionConfig(),  # ViT-B/16 at 224×224
            {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_channels": 3,
                "image_size": 224,
                "patch_size": 16,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
                "attention_dropout": 0.0,
            },
        ),
        (
            CADATextConfig(),  # BERT-base uncased with [DEC] and [ENC]: 30522 + 2
            {
                "vocab_size": 30524,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "max_position_embeddings": 512,
                "hidden_act": "gelu",
                "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.1,
                "layer_norm_eps": 1e-12,
                "pad_token_id": 0,
                "enc_token_id": 30523,
                "add_cross_attention": True,
                "encoder_hidden_size": 768,
            },
        ),
    ],
    ids=["cada", "vision", "text"],
)
def test_defaults(config, expected):
    assert {name: getattr(config, name) for name in expected} == expected


def test_sub_configs_default():
    config = CADAConfig()
    assert type(config.vision_config) is CADAVisionConfig
    assert type(config.text_config) is CADATextConfig
    assert config.vision_config.to_dict() == CADAConfig(vision_config={}).vision_config.to_dict()


@pytest.mark.parametrize(
    "config_class, field, value",
    [
        (CADAVisionConfig, "hidden_size", "768"),
        (CADAVisionConfig, "hidden_size", 768.0),
        (CADAVisionConfig, "num_hidden_layers", True),
        (CADAVisionConfig, "image_size", "224"),
        (CADAVisionConfig, "image_size", (32, 16, 3)),
        (CADAVisionConfig, "image_size", [32.0, 16.0]),
        (CADATextConfig, "vocab_size", "40"),
        (CADATextConfig, "hidden_act", 1),
        (CADATextConfig, "enc_token_id", None),
        (CADAConfig, "temperature", "0.02"),
        (CADAConfig, "pool_padding", 1),
        (CADAConfig, "contrastive_loss", None),
        (CADAConfig, "text_config", "bert"),
    ],
)
def test_wrong_types(config_class, field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        config_class(**{field: value})


@pytest.mark.parametrize("field", ["temperature", "mask_rate", "ara_weight"])
def test_whole_numbers_are_floats_too(field):
    assert getattr(CADAConfig(**{field: 1}), field) == 1


@pytest.mark.parametrize(
    "config_class, fields, named",
    [
        (CADAVisionConfig, {"hidden_size": 100, "num_attention_heads": 12}, ["hidden_size", "num_attention_heads"]),
        (CADATextConfig, {"hidden_size": 100, "num_attention_heads": 12}, ["hidden_size", "num_attention_heads"]),
        (CADAVisionConfig, {"hidden_size": 0}, ["hidden_size"]),
        (CADAVisionConfig, {"num_hidden_layers": 0}, ["num_hidden_layers"]),
        (CADAVisionConfig, {"num_attention_heads": 0}, ["num_attention_heads"]),
        (CADAVisionConfig, {"patch_size": -16}, ["patch_size"]),
        (CADATextConfig, {"num_hidden_layers": 0}, ["num_hidden_layers"]),
        (CADAVisionConfig, {"image_size": 225}, ["patch_size", "image_size", "225×225"]),
        (CADAVisionConfig, {"image_size": (225, 224)}, ["patch_size", "image_size", "225×224"]),
        (CADAVisionConfig, {"image_size": (224, 225)}, ["patch_size", "image_size", "224×225"]),
        (CADAVisionConfig, {"image_size": 0}, ["image_size"]),
        (CADAVisionConfig, {"image_size": [224, -16]}, ["image_size"]),
        (CADAVisionConfig, {"image_size": [224]}, ["image_size"]),
        (CADAVisionConfig, {"image_size": [224, 224, 3]}, ["image_size"]),
        (CADATextConfig, {"vocab_size": 40, "enc_token_id": 40}, ["enc_token_id", "vocab_size", "40"]),
        (CADATextConfig, {"enc_token_id": -1}, ["enc_token_id"]),
        (CADATextConfig, {"pad_token_id": 30524}, ["pad_token_id", "vocab_size"]),
        (CADATextConfig, {"pad_token_id": -1}, ["pad_token_id"]),
        (CADAConfig, {"contrastive_loss": "itc"}, ["contrastive_loss", "'itc'", "ndf", "ndf_reference", "cmpm"]),
        (CADAConfig, {"hard_negative_similarity": "l2"}, ["hard_negative_similarity", "cosine", "dot"]),
        (CADAConfig, {"match_score": "softmax"}, ["match_score", "probability", "logit"]),
        (CADAConfig, {"mask_unit": "token"}, ["mask_unit", "phrase", "word"]),
        (CADAConfig, {"group_size": 35}, ["group_size", "group_stride", "max_text_length"]),
        (CADAConfig, {"group_stride": 35}, ["group_size", "group_stride", "max_text_length"]),
        (CADAConfig, {"group_size": 73}, ["group_size", "max_text_length"]),
        (CADAConfig, {"group_size": 0}, ["group_size"]),
        (CADAConfig, {"group_stride": 0}, ["group_stride"]),
        (CADAConfig, {"max_text_length": 1}, ["max_text_length"]),
        (
            CADAConfig,
            {"text_config": {"max_position_embeddings": 72}},
            ["max_text_length", "73", "max_position_embeddings", "72"],
        ),
        (CADAConfig, {"mask_rate": 1.01}, ["mask_rate", "1.01"]),
        (CADAConfig, {"mask_rate": -0.1}, ["mask_rate"]),
        (CADAConfig, {"ara_weight": -0.1}, ["ara_weight"]),
        (CADAConfig, {"temperature": 0.0}, ["temperature"]),
        (CADAConfig, {"projection_dim": 0}, ["projection_dim"]),
        (CADAConfig, {"rerank_k": 0}, ["rerank_k"]),
    ],
)
def test_checks_name_the_fields(config_class, fields, named):
    with pytest.raises(StrictDataclassClassValidationError) as error:
        config_class(**fields)
    message = str(error.value).split("\n", 1)[1]  # the first line names the validator
    assert message.strip().startswith(f"ValueError: {config_class.__name__}: ")
    assert [name for name in named if name not in message] == []


@pytest.mark.parametrize(
    "config_class, fields",
    [
        (CADAConfig, {"mask_rate": 0.0, "ara_weight": 0.0}),
        (CADAConfig, {"mask_rate": 1.0}),
        (CADAConfig, {"text_config": {"max_position_embeddings": 73}}),
        (CADAConfig, {"contrastive_loss": "ndf_reference", "hard_negative_similarity": "dot", "match_score": "logit"}),
        (CADAConfig, {"contrastive_loss": "cmpm", "mask_unit": "word", "ara_causal": True, "use_atp": False}),
        (CADATextConfig, {"vocab_size": 40, "enc_token_id": 39, "pad_token_id": 38}),
        (CADATextConfig, {"pad_token_id": None, "hidden_dropout_prob": 0}),
    ],
)
def test_values_on_the_boundary(config_class, fields):
    config = config_class(**fields).to_dict()
    for name, value in fields.items():
        values = value if isinstance(value, dict) else {name: value}
        source = config[name] if isinstance(value, dict) else config
        assert {key: source[key] for key in values} == values


@pytest.mark.parametrize(
    "config_class, fields, owner, meant",
    [
        (CADAVisionConfig, {"hiden_size": 64}, "CADAVisionConfig", "hidden_size"),
        (CADATextConfig, {"vocabsize": 64}, "CADATextConfig", "vocab_size"),
        (CADAConfig, {"temprature": 0.1}, "CADAConfig", "temperature"),
        (CADAConfig, {"vision_confg": {}}, "CADAConfig", "vision_config"),
        (CADAConfig, {"text_config": {"hiden_size": 64}}, "CADATextConfig", "hidden_size"),
    ],
)
def test_typing_errors(config_class, fields, owner, meant):
    with pytest.raises(ValueError, match=f"{owner} has no field `.*`. Did you mean `{meant}`?"):
        config_class(**fields)


@settings(max_examples=25)
@given(st.data())
def test_a_missing_letter_is_seen(data):
    config_class = data.draw(st.sampled_from(CLASSES))
    field = data.draw(st.sampled_from(own_fields(config_class)))
    place = data.draw(st.integers(1, len(field) - 1))
    with pytest.raises(ValueError, match="Did you mean"):
        config_class(**{field[:place] + field[place + 1 :]: 1})


@pytest.mark.parametrize("part", [None, "vision_config", "text_config"])
def test_what_was_set_and_saved_loads(tmp_path, part):
    """A name close to a field, set on a configuration: the saved file loads, and a warning names it."""
    config = CADAConfig()
    name, meant = ("layer_norm_epsilon", "layer_norm_eps") if part else ("projection_dims", "projection_dim")
    setattr(getattr(config, part) if part else config, name, 1)
    config.save_pretrained(tmp_path)
    with CaptureLogger(configuration_cada.logger) as said:
        loaded = CADAConfig.from_pretrained(tmp_path)
    assert getattr(getattr(loaded, part) if part else loaded, name) == 1
    assert f"has no field `{name}`. Did you mean `{meant}`?" in said.out


def test_unrelated_keys_are_kept():
    """transformers adds keys of its own to a config.json."""
    assert CADAConfig(zero_shot_source="blip").zero_shot_source == "blip"


@pytest.mark.parametrize(
    "image_size, sides, grid",
    [(224, (224, 224), (14, 14)), ((384, 128), (384, 128), (24, 8)), ([128, 384], (128, 384), (8, 24))],
)
def test_image_size(image_size, sides, grid):
    config = CADAVisionConfig(image_size=image_size)
    assert config.image_height_width == sides
    assert config.grid_size == grid


@pytest.mark.parametrize("size, stride, groups", [(36, 36, 2), (36, 18, 3), (24, 24, 3), (48, 24, 2), (72, 72, 1)])
def test_num_groups(size, stride, groups):
    """Of 72 states: 36/36 begin at 0, 36; 36/18 at 0, 18, 36; 24/24 at 0, 24, 48; 48/24 at 0, 24; 72 at 0."""
    assert CADAConfig(group_size=size, group_stride=stride).num_groups == groups


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6), st.data())
def test_groups_end_with_the_text(size, stride, steps, data):
    """Groups fit where the last one ends at the last state, and are as many as there are starts."""
    states = size + steps * stride
    config = CADAConfig(group_size=size, group_stride=stride, max_text_length=states + 1)
    assert config.num_groups == len([start for start in range(0, states, stride) if start + size <= states])
    if stride > 1:
        rest = data.draw(st.integers(1, stride - 1))
        with pytest.raises(StrictDataclassClassValidationError, match="group_stride"):
            CADAConfig(group_size=size, group_stride=stride, max_text_length=states + rest + 1)


@pytest.mark.parametrize(
    "use_atp, use_ara, cross", [(True, True, True), (True, False, True), (False, True, True), (False, False, False)]
)
def test_cross_attention_follows_the_losses(tmp_path, use_atp, use_ara, cross):
    config = tiny_config(use_atp=use_atp, use_ara=use_ara)
    assert config.text_config.add_cross_attention is cross
    tiny_config().save_pretrained(tmp_path)
    loaded = CADAConfig.from_pretrained(tmp_path, use_atp=use_atp, use_ara=use_ara)
    assert (loaded.use_atp, loaded.use_ara) == (use_atp, use_ara)
    assert loaded.text_config.add_cross_attention is cross


def test_encoder_width_follows_the_vision_tower():
    assert CADAConfig(vision_config={"hidden_size": 48}).text_config.encoder_hidden_size == 48
    config = CADAConfig(
        vision_config=CADAVisionConfig(hidden_size=96),
        text_config=CADATextConfig(encoder_hidden_size=5, hidden_size=120),
    )
    assert config.text_config.encoder_hidden_size == 96
    assert config.text_config.hidden_size == 120


CONFIGS = [
    CADAVisionConfig(hidden_size=48, image_size=(32, 16), patch_size=8),
    CADATextConfig(vocab_size=40, enc_token_id=39, pad_token_id=None),
    CADAConfig(),
    tiny_config(contrastive_loss="cmpm", use_atp=False, temperature=0.5, ara_causal=True),
    tiny_config(use_atp=False, use_ara=False, mask_unit="word", pool_padding=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["vision", "text", "default", "cmpm", "global only"])
def test_round_trip(tmp_path, config):
    config_class = type(config)
    config.save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), config_class.from_dict(config.to_dict())):
        assert type(loaded) is config_class
        assert loaded.to_dict() == config.to_dict()
        for name in own_fields(config_class):
            if not name.endswith("_config"):
                value = getattr(config, name)
                assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value)


def test_round_trip_keeps_sub_configs(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = CADAConfig.from_pretrained(tmp_path)
    assert type(loaded.vision_config) is CADAVisionConfig and type(loaded.text_config) is CADATextConfig
    assert loaded.vision_config.image_height_width == (32, 16)
    assert loaded.text_config.enc_token_id == 39
    # A tower's own configuration is read from the file of the whole.
    assert CADATextConfig.from_pretrained(tmp_path).vocab_size == 40
    assert CADAVisionConfig.from_pretrained(tmp_path).patch_size == 8


def test_changes_while_loading(tmp_path):
    """Fields given to `from_pretrained` are checked as in the constructor, and leave the other fields as stored."""
    tiny_config(temperature=0.5).save_pretrained(tmp_path)
    loaded = CADAConfig.from_pretrained(tmp_path, group_stride=3, vision_config={"hidden_size": 24})
    assert loaded.num_groups == 3  # of 12 states, groups of 6 begin at 0, 3, 6
    assert loaded.temperature == 0.5
    assert loaded.vision_config.image_height_width == (32, 16)
    assert loaded.vision_config.hidden_size == loaded.text_config.encoder_hidden_size == 24
    with pytest.raises(StrictDataclassClassValidationError, match="group_stride"):
        CADAConfig.from_pretrained(tmp_path, group_stride=5)


def test_file_says_what_differs(tmp_path):
    tiny_config(temperature=0.5).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "cada"
    assert stored["temperature"] == 0.5
    assert stored["vision_config"]["model_type"] == "cada_vision_model"
    assert stored["text_config"]["model_type"] == "cada_text_model"


@pytest.mark.parametrize(
    "build, name",
    [
        (lambda: CADAVisionConfig(num_channels=0), "num_channels"),
        (lambda: CADAVisionConfig(intermediate_size=-1), "intermediate_size"),
        (lambda: CADAVisionConfig(attention_dropout=1.5), "attention_dropout"),
        (lambda: CADATextConfig(hidden_dropout_prob=2), "hidden_dropout_prob"),
        (lambda: CADATextConfig(attention_probs_dropout_prob=-0.1), "attention_probs_dropout_prob"),
        (lambda: CADATextConfig(max_position_embeddings=0), "max_position_embeddings"),
        (lambda: CADAConfig(temperature=float("nan")), "temperature"),
        (lambda: CADAConfig(ara_weight=float("nan")), "ara_weight"),
    ],
)
def test_impossible_numbers(build, name):
    with pytest.raises(StrictDataclassClassValidationError, match=name):
        build()
