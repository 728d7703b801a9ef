"""Agreement with the numbers that the authors' code gives on small random weights."""

import pytest
import torch
from conftest import load_reference, match_all_pairs, reference_config

from cada.hub.convert import convert_state_dict
from losses_cada import draw_negatives, group_states, positive_pairs
from modeling_cada import CADAForTextToImageRetrieval


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4):
    """Largest difference relative to the largest entry of the expected tensor."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"relative difference {difference:.2e}"


def forward(model, inputs):
    return model(**{name: inputs[name] for name in inputs})


def test_states_and_features(reference_model, reference):
    inputs, expected = reference["inputs"], reference["outputs"]
    with torch.no_grad():
        image = reference_model.get_image_features(inputs["pixel_values"])
        text = reference_model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        out = forward(reference_model, inputs)
    assert_agrees(image.last_hidden_state, expected["image_hidden_states"])
    assert_agrees(text.last_hidden_state, expected["text_hidden_states"])
    assert_agrees(image.pooler_output, expected["image_features"])
    assert_agrees(text.pooler_output, expected["text_features"])
    assert_agrees(out.logits_per_text * 0.02, expected["cosine_text_to_image"])


def test_hard_negatives(reference_model, reference):
    expected = reference["outputs"]
    same = positive_pairs(reference["inputs"]["person_ids"], reference["inputs"]["person_ids"])
    products = expected["image_features"] @ expected["text_features"].t()
    text_of_image, exists = draw_negatives(products, same)
    image_of_text, _ = draw_negatives(products.t(), same)
    assert exists.all()
    assert text_of_image.tolist() == expected["negative_text_of_image"].tolist()
    assert image_of_text.tolist() == expected["negative_image_of_text"].tolist()


def test_decoder_states_and_groups(reference_model, reference):
    inputs, expected = reference["inputs"], reference["outputs"]
    with torch.no_grad():
        states = reference_model._decode(
            inputs["input_ids"], inputs["attention_mask"], expected["image_hidden_states"]
        )
    assert_agrees(states, expected["decoder_hidden_states"])
    groups, _ = group_states(states, inputs["attention_mask"], 36, 36, pool_padding=True)
    assert_agrees(groups, expected["group_features"])


def test_match_logits_of_all_pairs(reference_model, reference):
    inputs, expected = reference["inputs"], reference["outputs"]
    _, logits = match_all_pairs(reference_model, inputs)
    assert_agrees(logits, expected["match_logits"])


def test_vocabulary_logits(reference_model, reference):
    inputs, expected = reference["inputs"], reference["outputs"]
    with torch.no_grad():
        states = reference_model.cada.text_model(
            inputs["masked_input_ids"], inputs["attention_mask"], expected["image_hidden_states"], is_causal=True
        ).last_hidden_state
        logits = reference_model.vocabulary_head(states[inputs["labels"] != -100])
    assert_agrees(logits, expected["mlm_logits_masked"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_losses_and_gradients(reference, attention):
    config = reference_config(reference["config"], attn_implementation=attention)
    model = CADAForTextToImageRetrieval(config)
    load_reference(model, reference)
    model.eval()
    out = forward(model, reference["inputs"])
    for name in ("loss_ndf", "loss_atp", "loss_ara", "loss"):
        assert_agrees(out[name], reference["outputs"][name])
    out.loss.backward()
    gradients = convert_state_dict(
        {
            ("text_encoder.embeddings.word_embeddings.weight" if name == "word_embeddings" else name): value
            for name, value in reference["grads"].items()
        },
        "cada_original",
    )
    parameters = dict(model.named_parameters())
    assert len(gradients) == 12  # ten tensors, one of which is query, key and value
    for name, expected in gradients.items():
        assert_agrees(parameters[name].grad, expected)
