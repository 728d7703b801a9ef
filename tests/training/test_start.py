"""What a training starts from: longer texts than the start has read."""

import json
import random

import pytest
import torch
from conftest import save_colour_set, save_tiny_start, tiny_config
from datasets import load_from_disk
from long_captions import lengthen

import train_cada
from cada.data.drawn import draw_persons
from cada.files import CADAError
from cada.training.start import load_start
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import clean_caption


WORDS = "cada.text_model.embeddings.position_embeddings.weight"
LONGER = {"max_text_length": 61, "text_config": {"max_position_embeddings": 61}}  # 60 states: 5 groups of 12


@pytest.fixture
def start(tmp_path):
    """A model of 24 text positions that reads 13 tokens."""
    CADAForTextToImageRetrieval(tiny_config()).save_pretrained(tmp_path)
    return str(tmp_path)


def features(model, length: int):
    ids = torch.arange(5, 5 + length)[None] % model.config.text_config.vocab_size
    with torch.no_grad():
        return model.get_text_features(ids, torch.ones_like(ids)).pooler_output


def test_positions_grow_and_short_texts_read_as_before(start, caplog):
    old, new = load_start(start, {}), load_start(start, LONGER)
    table = old.state_dict()[WORDS]
    assert torch.equal(new.state_dict()[WORDS], torch.cat([table, table, table[:13]]))
    torch.testing.assert_close(features(new, 13), features(old, 13))
    assert "The text positions from 24 on, up to 61, begin as copies of the first ones." in caplog.text
    assert features(new, 61).isfinite().all()
    assert new.config.max_text_length == 61
    assert new.config.num_groups == (60 - new.config.group_size) // new.config.group_stride + 1 > old.config.num_groups


def test_within_the_table_nothing_changes(start, caplog):
    """As with BLIP, whose table has 512 rows."""
    old, new = load_start(start, {}), load_start(start, {"max_text_length": 19})
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    assert "positions" not in caplog.text
    assert features(new, 19).isfinite().all()


def test_images_and_texts_of_other_sizes_at_once(start):
    height, width = tiny_config().vision_config.image_height_width
    new = load_start(start, {**LONGER, "vision_config": {"image_size": [2 * height, width]}})
    assert new.config.vision_config.image_height_width == (2 * height, width)
    assert len(new.state_dict()[WORDS]) == 61
    pixels = torch.zeros(1, 3, 2 * height, width)
    assert new.get_image_features(pixels).pooler_output.isfinite().all()


def test_a_longer_text_says_what_it_needs(start):
    with pytest.raises(CADAError, match="`max_text_length` .25. is above .* `max_position_embeddings` .24."):
        load_start(start, {"max_text_length": 25})
    with pytest.raises(CADAError, match="do not fit the 19 token states .* or raise `max_text_length` to 25"):
        load_start(start, {"max_text_length": 20})


def test_long_captions_of_the_benchmark():
    """Each is of 80 words and of one person; what ARA masks are its phrases."""
    person = draw_persons(1, random.Random(0))[0]
    row = lengthen({"file_name": "a", "captions": ["", ""], "attributes": person}, words=80)
    assert len(row["captions"]) == len(row["attribute_spans"]) == 2
    for text, spans, named in zip(row["captions"], row["attribute_spans"], row["named_attributes"]):
        assert 80 <= len(text.split()) < 160
        phrases = [clean_caption(text)[start:end] for start, end in spans]
        assert all(phrase == phrase.strip() and phrase for phrase in phrases)
        assert any(person["upper_colour"] in phrase for phrase in phrases)
        assert {"sex", "upper_colour"} <= set(named)


def test_what_stands_late_in_a_long_caption_is_learned(tmp_path):
    """Of 80 words the last ones name the colour. Cut at 72 tokens, one sentence in seven would be right by chance."""
    start = save_tiny_start(tmp_path / "start", initializer_range=0.2)
    splits = load_from_disk(save_colour_set(tmp_path / "short", train=35, test=14))
    late = "a person of whom we say many things that are not to be seen at all " * 5
    splits.map(lambda row: {"captions": [late + text for text in row["captions"]]}).save_to_disk(tmp_path / "data")
    longer = {"max_text_length": 145, "group_size": 36, "group_stride": 36}
    longer["text_config"] = {"max_position_embeddings": 145}
    metrics = train_cada.main(
        [
            *("--model_name_or_path", str(start), "--config_overrides", json.dumps(longer)),
            *("--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")),
            *("--do_train", "--do_predict", "--disable_tqdm", "true"),
            *("--num_train_epochs", "25", "--per_device_train_batch_size", "7", "--logging_steps", "5"),
            *("--learning_rate", "5e-3", "--warmup_steps", "0.1", "--max_grad_norm", "5"),
            *("--negative_sampling", "annealed", "--eval_strategy", "no", "--holdout_persons", "0"),
            *("--load_best_model_at_end", "false", "--save_strategy", "no"),
        ]
    )
    assert min(metrics["test_global_R1"], metrics["test_local_R1"]) > 50
