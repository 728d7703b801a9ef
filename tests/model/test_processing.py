"""Image transforms, caption cleaning, attribute masking, and the processor that joins them."""

import io
import json
import socket
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cada
import processing_cada
from cada.data.pairs import add_attribute_spans
from processing_cada import AttributeMasker, CADAImageProcessor, CADAProcessor, clean_caption


def picture(width=20, height=40, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_evaluation_transform_is_bilinear_resize_and_clip_normalisation():
    image = picture()
    actual = CADAImageProcessor(size={"height": 32, "width": 16})(image, return_tensors="pt")["pixel_values"]
    resized = np.asarray(image.resize((16, 32), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    expected = ((resized - mean) / std).transpose(2, 0, 1)
    assert actual.shape == (1, 3, 32, 16)
    np.testing.assert_allclose(actual[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_colour_mode_becomes_rgb(mode):
    pixels = CADAImageProcessor()(picture().convert(mode), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)


def augmented(image, count=400, **options):
    """`count` augmentations of a 16×32 image, without normalisation."""
    defaults = {
        "size": {"height": 32, "width": 16},
        "do_normalize": False,
        "do_augment": True,
        "flip_probability": 0.0,
        "crop_padding": 0,
        "erase_probability": 0.0,
    }
    processor = CADAImageProcessor(**{**defaults, **options})
    torch.manual_seed(0)
    return processor([image] * count, return_tensors="pt")["pixel_values"]


def test_flip_mirrors_the_stated_share():
    image = picture(16, 32)
    original = torch.tensor(np.asarray(image) / 255).permute(2, 0, 1).float()
    mirrored = original.flip(-1)
    share = 0
    for result in augmented(image, flip_probability=0.25):
        is_mirrored = torch.allclose(result, mirrored, atol=1e-6)
        assert is_mirrored or torch.allclose(result, original, atol=1e-6)
        share += is_mirrored / 400
    assert 0.19 < share < 0.31  # 0.25 and three standard errors of 400 draws


def test_crop_shifts_by_at_most_the_padding_and_fills_with_black():
    white = Image.new("RGB", (16, 32), (255, 255, 255))
    shifts = set()
    for result in augmented(white, crop_padding=2):
        black_rows = int((result[0] == 0).all(dim=1).sum())
        black_columns = int((result[0] == 0).all(dim=0).sum())
        assert result.sum() == 3 * (32 - black_rows) * (16 - black_columns)
        shifts.add((black_rows, black_columns))
    assert shifts == {(rows, columns) for rows in range(3) for columns in range(3)}


def test_erasing_puts_the_mean_colour_on_one_rectangle_of_the_stated_area():
    white = Image.new("RGB", (16, 32), (255, 255, 255))
    areas = []
    for result in augmented(white, erase_probability=0.5, do_normalize=True):
        erased = (result == 0).all(dim=0)
        areas.append(int(erased.sum()))
        if areas[-1]:
            rows, columns = erased.any(dim=1).sum(), erased.any(dim=0).sum()
            assert rows * columns == areas[-1]  # a rectangle
            assert 0.01 < areas[-1] / 512 < 0.45  # 0.02 to 0.4, and the rounding of both sides
    assert 0.40 < np.mean(np.array(areas) > 0) < 0.60


def test_augmentation_is_off_unless_asked_and_follows_the_seed():
    processor = CADAImageProcessor(size={"height": 32, "width": 16})
    image = picture()
    plain = [processor(image, return_tensors="pt")["pixel_values"] for _ in range(2)]
    assert torch.equal(*plain)
    torch.manual_seed(3)
    first = processor([image] * 8, do_augment=True, return_tensors="pt")["pixel_values"]
    torch.manual_seed(3)
    again = processor([image] * 8, do_augment=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_cleaning_strips_the_characters_of_the_recipe():
    assert clean_caption('A man. "Tall"! (in) *blue* #1; red: a~b') == "a man tall in blue 1 red a b"
    assert (
        clean_caption("a grey jacket and a blue shirt.His trousers") == "a grey jacket and a blue shirt his trousers"
    )
    assert clean_caption(" ... ") == ""


@given(st.text(max_size=60))
def test_cleaning_twice_is_cleaning_once(text):
    cleaned = clean_caption(text)
    assert clean_caption(cleaned) == cleaned
    assert not set(cleaned) & set('.!"()*#:;~\n\t')
    assert "  " not in cleaned


def spans_as_text(masker, caption):
    return [clean_caption(caption)[start:end] for start, end in masker.find_spans(caption)]


def test_phrases_are_adjectives_with_their_nouns():
    caption = "A woman with long black hair in a red coat, blue jeans and white sneakers."
    assert spans_as_text(AttributeMasker("phrase"), caption) == [
        "long black hair",
        "red coat",
        "blue jeans",
        "white sneakers",
    ]


def test_words_are_single_adjectives_and_nouns():
    caption = "A woman in a red coat."
    assert spans_as_text(AttributeMasker("word"), caption) == ["woman", "red", "coat"]


def test_spans_survive_captions_without_letters():
    for caption in ("", "...", "你好", "1 2 3"):
        assert AttributeMasker("phrase").find_spans(caption) == []


@pytest.mark.parametrize(("unit", "rate", "name"), [("sentence", 0.5, "mask_unit"), ("word", 1.5, "mask_rate")])
def test_masker_rejects_unknown_settings(unit, rate, name):
    with pytest.raises(ValueError, match=name):
        AttributeMasker(unit, rate)


def test_masking_covers_every_word_piece_of_a_phrase(processor):
    caption = "a woman in a turquoise overcoat"
    span = [caption.index("turquoise"), len(caption)]
    processor.attribute_masker.rate = 1.0
    inputs = processor(text=[caption], attribute_spans=[[span]], return_tensors="pt")
    pieces = processor.tokenizer.convert_ids_to_tokens(inputs["masked_input_ids"][0])
    assert pieces == ["[CLS]", "a", "woman", "in", "a", "[MASK]", "[MASK]", "[MASK]", "[SEP]"]
    hidden = inputs["labels"][0][inputs["labels"][0] != -100]
    assert processor.tokenizer.convert_ids_to_tokens(hidden) == ["turquoise", "over", "##coat"]


def test_units_are_masked_whole_at_the_stated_rate(processor):
    """400 captions with two phrases of two words: each phrase is masked or kept as one, 80 % of them masked."""
    caption = "red coat and blue jeans"
    spans = [[0, 8], [13, 23]]
    torch.manual_seed(0)
    inputs = processor(text=[caption] * 400, attribute_spans=[spans] * 400, return_tensors="pt")
    masked = inputs["labels"] != -100
    assert not masked[:, [0, 3, 6]].any()  # [CLS], "and", [SEP]
    assert torch.equal(masked[:, 1], masked[:, 2])
    assert torch.equal(masked[:, 4], masked[:, 5])
    assert 0.75 < masked[:, [1, 4]].float().mean() < 0.85
    mask_id = processor.tokenizer.mask_token_id
    assert (inputs["masked_input_ids"][masked] == mask_id).all()
    assert torch.equal(inputs["masked_input_ids"][~masked], inputs["input_ids"][~masked])
    assert torch.equal(inputs["labels"][masked], inputs["input_ids"][masked])


@given(st.lists(st.sampled_from(["red coat", "a man", "turquoise", "with", "long black hair", "T-shirt.", "ünïcode"])))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_labels_and_masked_ids_restore_the_caption(processor, words):
    caption = clean_caption(" ".join(words))
    spans = AttributeMasker("phrase").find_spans(caption)
    inputs = processor(text=[caption], attribute_spans=[spans], return_tensors="pt")
    restored = torch.where(inputs["labels"] == -100, inputs["masked_input_ids"], inputs["labels"])
    assert torch.equal(restored, inputs["input_ids"])


@pytest.fixture
def empty_nltk(monkeypatch, tmp_path) -> Path:
    """NLTK has no data of the user's and reaches no network. The folder where it looks for data."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(processing_cada, "_tagger", cache(processing_cada._tagger.__wrapped__))
    monkeypatch.setattr(processing_cada.nltk.data, "path", [str(tmp_path)])
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    return tmp_path


def test_the_package_brings_the_tagger(empty_nltk, processor):
    """Whoever uses the tagger, with nothing downloaded."""
    caption = "A woman with long black hair in a red coat."
    assert AttributeMasker().find_spans(caption) == [[13, 28], [34, 42]]  # long black hair, red coat
    rows = Dataset.from_dict({"captions": [[caption]], "person_id": [1]})
    processing_cada._tagger.cache_clear()
    assert add_attribute_spans(rows, processor.attribute_masker)["attribute_spans"][0] == [[[13, 28], [34, 42]]]
    processing_cada._tagger.cache_clear()
    inputs = processor(text=[caption], attribute_spans=[AttributeMasker().find_spans(caption)], return_tensors="pt")
    assert (inputs["labels"] >= 0).any()


def test_the_tagger_of_the_package_is_nltk_s_own(empty_nltk):
    """Loaded from the file of the package by NLTK itself, as from a folder that `nltk.download` has written."""
    ours = processing_cada._tagger()
    data = Path(cada.__file__).parent / "nltk_data"
    with zipfile.ZipFile(data / "taggers" / f"{processing_cada.TAGGER}.zip") as file:
        file.extractall(empty_nltk / "taggers")
    theirs = processing_cada.nltk.PerceptronTagger()
    assert (ours.model.weights, ours.tagdict, ours.classes) == (theirs.model.weights, theirs.tagdict, theirs.classes)
    assert "MIT License" in (data / "LICENSE").read_text(encoding="utf-8")


def test_the_users_own_tagger_data_come_first(empty_nltk):
    folder = empty_nltk / "taggers" / processing_cada.TAGGER
    folder.mkdir(parents=True)
    for part, content in {
        "weights": {},
        "tagdict": {"turquoise": "JJ", "coat": "NN"},
        "classes": ["JJ", "NN"],
    }.items():
        (folder / f"{folder.name}.{part}.json").write_text(json.dumps(content))
    assert processing_cada._tagger().tagdict == {"turquoise": "JJ", "coat": "NN"}
    assert AttributeMasker().find_spans("turquoise coat") == [[0, 14]]


def test_missing_tagger_data_say_what_to_run(empty_nltk, monkeypatch):
    """A checkpoint that travels alone: no package beside it."""
    monkeypatch.setattr(processing_cada, "_shipped_tagger", lambda: None)
    asked = []
    monkeypatch.setattr(processing_cada.nltk, "download", lambda name, quiet: asked.append(name))
    with pytest.raises(LookupError, match="python -m nltk.downloader averaged_perceptron_tagger_eng"):
        AttributeMasker().find_spans("a red coat")
    assert asked == ["averaged_perceptron_tagger_eng"]


def test_processor_adds_the_tokens_of_blip_once(tokenizer):
    assert len(tokenizer) == 30522
    processor = CADAProcessor(CADAImageProcessor(), tokenizer)
    assert (processor.tokenizer.convert_tokens_to_ids("[DEC]"), processor.enc_token_id) == (30522, 30523)
    again = CADAProcessor(CADAImageProcessor(), processor.tokenizer)
    assert len(again.tokenizer) == 30524


def test_processor_cleans_and_cuts_captions(processor):
    inputs = processor(text=["A man!", "red " * 100], return_tensors="pt")
    assert inputs["input_ids"].shape == (2, processor.tokenizer.model_max_length)
    assert inputs["input_ids"][1, -1] == processor.tokenizer.sep_token_id
    assert inputs["attention_mask"].sum(dim=1).tolist() == [4, processor.tokenizer.model_max_length]
    assert processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "a man"
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_captions_are_cut_where_asked(processor):
    """By the call in either form, else by the tokenizer, which may set less than `model_max_length` (13), not more."""
    caption = {"text": ["red " * 100], "return_tensors": "pt"}
    assert processor(**caption, max_length=7)["input_ids"].shape == (1, 7)
    assert processor(**caption, text_kwargs={"max_length": 5})["input_ids"].shape == (1, 5)
    for own, length in ((9, 9), (128, 13)):
        processor.tokenizer.init_kwargs["max_length"] = own
        assert processor(**caption)["input_ids"].shape == (1, length)
        assert processor(**caption, text_kwargs={"max_length": 5})["input_ids"].shape == (1, 5)


def test_model_input_names(processor):
    """What the model takes: a BERT tokenizer's `token_type_ids` are not among it, even when asked for."""
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}
    inputs = processor(text=["a man"], return_token_type_ids=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_processor_with_images_and_text(processor):
    inputs = processor(images=[picture(), picture(30, 30)], text=["a man", "a woman"], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    assert inputs["pixel_values"].shape == (2, 3, 32, 16)


def test_masking_needs_as_many_spans_as_captions(processor):
    with pytest.raises(ValueError, match="attribute_spans"):
        processor(text=["a man", "a woman"], attribute_spans=[[]], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors"):
        processor(text=["a man"], attribute_spans=[[]])


def test_saved_processor_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = CADAProcessor.from_pretrained(tmp_path)
    assert (loaded.mask_unit, loaded.mask_rate) == (processor.mask_unit, processor.mask_rate)
    assert loaded.image_processor.size == processor.image_processor.size
    assert loaded.image_processor.crop_padding == processor.image_processor.crop_padding
    inputs = {"images": picture(), "text": "a woman in a red coat", "return_tensors": "pt"}
    first, second = processor(**inputs), loaded(**inputs)
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_photographs_are_turned_upright(processor):
    """A camera held sideways writes the turn into EXIF (6: by 90°); `datasets` applies it too when it decodes."""
    upright = Image.linear_gradient("L").resize((16, 32)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, format="PNG", exif=exif)
    values = [processor(images=image, return_tensors="pt")["pixel_values"] for image in (upright, Image.open(file))]
    assert torch.equal(*values)


def test_paths_and_contents_are_read_by_the_processor(processor, tmp_path):
    """As `transformers` does, but with the colours of `to_rgb`: transparent parts are white."""
    image = Image.new("RGBA", (20, 40), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    white = processor(images=Image.new("RGB", (20, 40), "white"), return_tensors="pt")["pixel_values"]
    path = tmp_path / "clear.png"
    for form in (path, str(path), path.read_bytes(), [path], image):
        assert torch.equal(processor(images=form, return_tensors="pt")["pixel_values"], white)
    with pytest.raises(ValueError, match="there is no such file"):
        processor(images=str(tmp_path / "no.png"))
