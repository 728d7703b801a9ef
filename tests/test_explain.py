"""Attention of words on patches, and predictions of masked attributes, as numbers and as a picture."""

import numpy as np
import pytest
import torch
from conftest import save_tiny_start, tiny_config
from PIL import Image

import cada.drawing
import cada.explain
from cada import cli
from cada.drawing import draw_explanation
from cada.explain import attribute_predictions, word_attention
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


TEXT = "A man in a red, striped coat."


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def model(start):
    """With attention that is not even: random weights of some size."""
    model = CADAForTextToImageRetrieval.from_pretrained(start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def processor(start):
    return CADAProcessor.from_pretrained(start)


@pytest.fixture
def image():
    return Image.linear_gradient("L").resize((16, 32)).convert("RGB")


def test_words_have_the_attention_of_their_pieces(model, processor, image):
    """By hand from the recorded probabilities: 4×2 patches, mean over layers, heads and the pieces of a word."""
    attention = word_attention(model, processor, image, TEXT)
    assert attention.words == ["a", "man", "in", "a", "red,", "striped", "coat"]
    assert attention.maps.shape == (7, 4, 2)
    model.set_attn_implementation("eager")
    inputs = processor(images=image, text=[TEXT], return_tensors="pt")
    ids = inputs["input_ids"].clone()
    ids[0, 0] = processor.enc_token_id
    with torch.no_grad():
        states = model.encode_images(inputs["pixel_values"])
        outputs = model.cada.text_model(ids, inputs["attention_mask"], states, output_attentions=True)
    recorded = torch.stack(outputs.cross_attentions)[:, 0].mean(dim=(0, 1))  # (tokens, 1 + patches)
    # [ENC] a man in a red , striped coat [SEP]: the fifth word has two pieces.
    pieces = [[1], [2], [3], [4], [5, 6], [7], [8]]
    for word, numbers in enumerate(pieces):
        expected = recorded[numbers, 1:].mean(dim=0).view(4, 2)
        np.testing.assert_allclose(attention.maps[word], expected, rtol=1e-5)
    assert (attention.maps.sum(axis=(1, 2)) < 1).all()  # the class token has the rest


def test_layer_and_head_can_be_chosen(model, processor, image):
    each = [
        [word_attention(model, processor, image, TEXT, layer, head).maps for head in range(2)] for layer in range(2)
    ]
    mean = word_attention(model, processor, image, TEXT).maps
    np.testing.assert_allclose(np.mean(each, axis=(0, 1)), mean, rtol=1e-5)
    np.testing.assert_allclose(word_attention(model, processor, image, TEXT, layer=-1).maps, np.mean(each[1], axis=0))
    assert np.abs(each[0][0] - each[1][1]).max() > 1e-4
    with pytest.raises(ValueError, match="`layer` is 2, but the decoder has 2: 0 to 1"):
        word_attention(model, processor, image, TEXT, layer=2)
    with pytest.raises(ValueError, match="`head` is -3"):
        word_attention(model, processor, image, TEXT, head=-3)


def test_model_is_left_as_it_was(model, processor, image):
    model.train()
    word_attention(model, processor, image, TEXT)
    assert model.training and model.config.text_config._attn_implementation == "sdpa"


def test_predictions_of_masked_phrases(model, processor, image):
    """The three most probable pieces at every masked position, probabilities falling."""
    (prediction,) = attribute_predictions(model, processor, image, "A man in a red coat.")
    assert prediction.phrase == "red coat"
    assert len(prediction.guesses) == 2
    for guesses in prediction.guesses:
        chances = [chance for _, chance in guesses]
        assert len(guesses) == 3 and chances == sorted(chances, reverse=True) and 0 < chances[0] <= 1
    inputs = processor(images=image, text=["A man in a red coat."], return_tensors="pt")
    ids = inputs["input_ids"].clone()
    ids[0, 5:7] = processor.tokenizer.mask_token_id  # [CLS] a man in a red coat [SEP]
    model.eval()
    with torch.no_grad():
        states = model.encode_images(inputs["pixel_values"])
        hidden = model.cada.text_model(ids, inputs["attention_mask"], states).last_hidden_state
        best = model.vocabulary_head(hidden[0, 5]).softmax(-1).max(-1)
    word, chance = prediction.guesses[0][0]
    assert processor.tokenizer.convert_tokens_to_ids(word) == best.indices.item()
    assert chance == pytest.approx(best.values.item(), rel=1e-4)


def test_words_behind_the_longest_text_are_left_out(model, processor, image):
    attention = word_attention(model, processor, image, "red " * 30)
    assert attention.words == ["red"] * 11  # 13 tokens with [ENC] and [SEP]


def test_models_that_cannot_explain_say_so(processor, image):
    vocabulary = {"vocab_size": 30524, "enc_token_id": 30523}
    with pytest.raises(ValueError, match="no match head"):
        model = CADAForTextToImageRetrieval(tiny_config(use_atp=False, text_config=vocabulary))
        word_attention(model, processor, image, TEXT)
    with pytest.raises(ValueError, match="no vocabulary head"):
        model = CADAForTextToImageRetrieval(tiny_config(use_ara=False, text_config=vocabulary))
        attribute_predictions(model, processor, image, TEXT)


def test_sentence_without_words_is_refused(model, processor, image):
    with pytest.raises(ValueError, match="The sentence is empty"):
        word_attention(model, processor, image, " .!")


def test_picture_has_a_panel_for_every_word(model, processor, image):
    attention = word_attention(model, processor, image, TEXT)
    predictions = attribute_predictions(model, processor, image, TEXT)
    picture = draw_explanation(image, TEXT, attention, predictions)
    # Eight panels of 192 rows: two rows of them, with a title above and lines below.
    assert picture.height > 2 * 192 and picture.width >= 6 * 108
    pixels = np.asarray(picture)
    assert (pixels.std(axis=(0, 1)) > 30).all()


def test_letters_of_all_kinds_are_drawn_and_no_boxes(model, processor, image, monkeypatch):
    """With a font of the system, and without one: then letters without accents, and `?`."""
    attention = word_attention(model, processor, image, "a red coat")

    def title(text):
        return np.asarray(draw_explanation(image, text, attention, []))[:40]

    if cada.drawing._system_font(17) is not None:
        drawn = [title(text) for text in ("ä", "ö", "ł", "Ж", "a", "o", "l", "?")]
        assert all((drawn[one] != drawn[two]).any() for one in range(8) for two in range(one))
    monkeypatch.setattr(cada.drawing, "_system_font", lambda size: None)
    np.testing.assert_array_equal(title("Ä grün Mäntel, Ж"), title("A grun Mantel, ?"))


def test_command_writes_picture_and_arrays(start, image, tmp_path, capsys):
    image.save(tmp_path / "person.png")
    arguments = ["--model", str(start), "--image", str(tmp_path / "person.png")]
    arguments += ["--text", "A man in a red coat."]
    arguments += ["--out", str(tmp_path / "why.png"), "--arrays", str(tmp_path / "why.npz")]
    assert cli.main(["explain", *arguments]) == 0
    assert "red coat: the image suggests" in capsys.readouterr().out
    arrays = np.load(tmp_path / "why.npz")
    assert arrays["words"].tolist()[1] == "man" and arrays["maps"].shape == (6, 4, 2)
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.format == "PNG"
    (tmp_path / "broken.png").write_bytes(b"x")
    arguments[3] = str(tmp_path / "broken.png")
    assert cli.main(["explain", *arguments]) == 1
    assert "broken.png cannot be read" in capsys.readouterr().err
