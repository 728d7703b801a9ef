"""BLIP and the authors' checkpoints: whole, renamed, and with the outputs that they had before."""

import pytest
import torch
from conftest import bert_tokenizer, match_all_pairs, reference_config
from random_blip import BASE, random_blip
from transformers import AutoModel, AutoProcessor, BlipForConditionalGeneration

import cada.hub.convert
import train_cada
from cada import cli
from cada.files import CADAError
from cada.hub.convert import convert, convert_state_dict, grow_vocabulary
from cada.hub.publish import release_files
from cada.hub.record import read_run
from cada.training.arguments import ModelArguments
from cada.training.start import make_model_and_processor


def random_inputs(size: int):
    """Two images; two texts that begin with [ENC], the second one shorter."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1000, 30000, (2, 9), generator=generator)
    input_ids[:, 0] = 30523
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 6:], attention_mask[1, 6:] = 0, 0
    return torch.randn(2, 3, size, size, generator=generator), input_ids, attention_mask


@torch.no_grad()
def assert_same_outputs(blip, model, size: int, tolerance: float = 1e-5):
    pixel_values, input_ids, attention_mask = random_inputs(size)
    real = attention_mask.bool()
    states = model.encode_images(pixel_values)
    texts = model.cada.text_model(input_ids, attention_mask).last_hidden_state
    outputs = model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
    pairs = {
        "image states": (states, blip.vision_model(pixel_values)[0]),
        "text states": (texts[real], blip.text_encoder(input_ids, attention_mask=attention_mask)[0][real]),
        "features": (
            outputs.logits_per_image * model.config.temperature,
            blip(input_ids, pixel_values, attention_mask=attention_mask, use_itm_head=False).itm_score,
        ),
        "match logits": (
            model.match(input_ids, attention_mask, states),
            blip(input_ids, pixel_values, attention_mask=attention_mask, use_itm_head=True).itm_score,
        ),
    }
    for name, (ours, theirs) in pairs.items():
        assert theirs.std() > 0.01, name
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert difference < tolerance, f"{name}: {difference}"


def test_blip_of_transformers(tmp_path):
    blip = random_blip()
    blip.save_pretrained(tmp_path)
    model, report = convert("blip", tmp_path)
    assert_same_outputs(blip, model, 32)
    assert model.config.vision_config.layer_norm_eps == 1e-5  # its configuration says so; BLIP's own code has 1e-6
    assert not report.left_out
    assert {name.split(".")[0] for name in report.new} == {"group_match_head", "vocabulary_head"}
    assert "2 newly initialised" not in str(report) and "newly initialised: group_match_head.weight" in str(report)


@pytest.mark.slow
def test_blip_of_transformers_at_base_size(tmp_path):
    blip = random_blip(tower=BASE, image_size=224, patch_size=16)
    blip.save_pretrained(tmp_path)
    model, _ = convert("blip", tmp_path)
    assert_same_outputs(blip, model, 224)


def test_vocabulary_head_comes_from_the_captioning_model(tmp_path):
    random_blip().save_pretrained(tmp_path / "retrieval")
    captioner = random_blip(BlipForConditionalGeneration)
    captioner.save_pretrained(tmp_path / "captioning")
    model, report = convert("blip", tmp_path / "retrieval", vocabulary_head=tmp_path / "captioning")
    head = captioner.text_decoder.cls.predictions
    states = torch.randn(3, 32)
    with torch.no_grad():
        expected = head.transform(states) @ model.cada.text_model.embeddings.word_embeddings.weight.t() + head.bias
        torch.testing.assert_close(model.vocabulary_head(states), expected)
    assert report.new == ["group_match_head.weight", "group_match_head.bias"]
    reasons = {reason for key, reason in report.left_out.items() if key.endswith("decoder.weight")}
    assert reasons == {"tied to the word embeddings of the text stack"}


def original_file(reference, path, **more):
    """A checkpoint as BLIP's code writes it: weights under `model`, with momentum copies, queues and a temperature."""
    weights = {**reference["weights"], **more}
    momentum = {
        key.replace("visual_encoder.", "visual_encoder_m.", 1): value
        for key, value in weights.items()
        if key.startswith("visual_encoder.")
    }
    extra = {"temp": torch.tensor(0.07), "image_queue": torch.randn(4, 8), "ptr_queue": torch.zeros(1)}
    torch.save({"model": {**weights, **momentum, **extra}, "epoch": 3}, path)
    return path


def reference_fields(reference) -> dict:
    """What the shapes of the reference weights do not tell."""
    sizes = reference["config"]
    config = reference_config(sizes)
    return {
        "text_config": {"enc_token_id": sizes["enc"], "pad_token_id": sizes["pad"]},
        "temperature": config.temperature,
        "max_text_length": config.max_text_length,
        "group_size": config.group_size,
        "group_stride": config.group_stride,
    }


def assert_reference_outputs(model, reference):
    inputs, expected = reference["inputs"], reference["outputs"]
    states, logits = match_all_pairs(model, inputs)
    torch.testing.assert_close(states, expected["image_hidden_states"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, expected["match_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["blip_original", "cada_original"])
def test_original_files(source, reference, tmp_path):
    """The numbers of the authors' code, from a file in their form."""
    path = original_file(reference, tmp_path / "weights.pth")
    heads = reference["config"]["num_attention_heads"]
    model, report = convert(source, path, num_attention_heads=heads, config_overrides=reference_fields(reference))
    assert_reference_outputs(model, reference)
    assert report.left_out["temp"].startswith("temperature")
    assert report.left_out["visual_encoder_m.cls_token"].startswith("momentum")
    assert report.left_out["image_queue"].startswith("queue")
    assert report.new == []
    assert model.config.vision_config.layer_norm_eps == 1e-6
    assert model.config.match_score == ("logit" if source == "cada_original" else "probability")
    assert "The vocabulary grew by" in str(report)


def test_blip_file_without_local_head(reference, tmp_path):
    """BLIP has no head for groups: new for BLIP, an error for a checkpoint of CADA."""
    torch.save(
        {key: value for key, value in reference["weights"].items() if not key.startswith("itm_local_head")},
        tmp_path / "weights.pth",
    )
    more = {"num_attention_heads": 2, "config_overrides": reference_fields(reference)}
    _, report = convert("blip_original", tmp_path / "weights.pth", **more)
    assert report.new == ["group_match_head.weight", "group_match_head.bias"]
    with pytest.raises(CADAError, match="has no tensor for group_match_head.weight"):
        convert("cada_original", tmp_path / "weights.pth", **more)


def test_separate_ara_stack_is_left_out_with_a_word(reference):
    weights = {"text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(2, 2), **reference["weights"]}
    report = cada.hub.convert.ConversionReport()
    converted = convert_state_dict(weights, "cada_original", report)
    assert not any("bert" in name for name in converted)
    assert "a separate decoder; here the text stack is the decoder" in str(report)


def test_unknown_key_is_named():
    with pytest.raises(CADAError, match="No rule for the key 'visual_encoder.extra'"):
        convert_state_dict({"visual_encoder.extra": torch.zeros(1)}, "cada_original")
    with pytest.raises(CADAError, match="Unknown source 'clip'. Known: blip"):
        convert_state_dict({}, "clip")


def test_missing_key_is_named(reference, tmp_path):
    weights = dict(reference["weights"])
    del weights["text_encoder.encoder.layer.0.crossattention.self.key.bias"]
    torch.save(weights, tmp_path / "weights.pth")
    more = {"num_attention_heads": 2, "config_overrides": reference_fields(reference)}
    with pytest.raises(CADAError, match=r"no tensor for cada.text_model.layers.0.cross_attn.k_proj.bias"):
        convert("cada_original", tmp_path / "weights.pth", **more)
    with pytest.raises(CADAError, match="lacks 'cada.vision_model.embeddings.patch_embedding.weight'"):
        torch.save({"temp": torch.zeros(1)}, tmp_path / "empty.pth")
        convert("blip_original", tmp_path / "empty.pth")


class Payload:
    """What `weights_only=True` refuses to build."""


def test_pickles_are_not_executed(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(CADAError, match="cannot be read with weights_only=True"):
        convert("cada_original", tmp_path / "weights.pth")
    (tmp_path / "damaged.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CADAError, match="damaged.pth cannot be read"):
        convert("cada_original", tmp_path / "damaged.pth")
    with pytest.raises(CADAError, match="does not exist"):
        convert("cada_original", tmp_path / "nowhere.pth")


def test_other_image_size(tmp_path):
    random_blip().save_pretrained(tmp_path)
    model, report = convert("blip", tmp_path, image_size=(96, 32))
    assert model.config.vision_config.grid_size == (12, 4)
    assert model.encode_images(torch.randn(1, 3, 96, 32)).shape == (1, 49, 32)
    assert "Position embeddings were interpolated from (4, 4) to (12, 4) patches." in str(report)


def test_vocabulary_grows_to_hold_enc(tmp_path):
    blip = random_blip(vocab_size=30522)
    blip.save_pretrained(tmp_path)
    model, report = convert("blip", tmp_path)
    words = model.cada.text_model.embeddings.word_embeddings.weight
    assert words.shape == (30524, 32)
    assert torch.equal(words[:30522], blip.text_encoder.embeddings.word_embeddings.weight)
    assert "The vocabulary grew by 2 word(s) to 30524." in str(report)
    weights = {
        "cada.text_model.embeddings.word_embeddings.weight": torch.ones(3, 2),
        "vocabulary_head.decoder.bias": torch.ones(3),
    }
    assert grow_vocabulary(weights, 5, std=0.02) == 2
    assert weights["vocabulary_head.decoder.bias"].tolist() == [1, 1, 1, 0, 0]


def test_command_writes_a_checkpoint_that_loads(tmp_path, capsys):
    random_blip().save_pretrained(tmp_path / "blip")
    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["--source", "blip", "--checkpoint", str(tmp_path / "blip"), "--out", str(tmp_path / "start")]
    arguments += ["--tokenizer-name", str(tmp_path / "tokenizer"), "--image-size", "64", "32"]
    assert cli.main(["convert", *arguments]) == 0
    assert "tensors converted" in capsys.readouterr().out
    assert "pipeline_cada.py" in release_files(tmp_path / "start")
    model = AutoModel.from_pretrained(tmp_path / "start")
    processor = AutoProcessor.from_pretrained(tmp_path / "start")
    assert processor.image_processor.size == {"height": 64, "width": 32}
    assert processor.enc_token_id == model.config.text_config.enc_token_id == 30523
    assert read_run(tmp_path / "start")["origin"] == {
        "start": "blip (blip)",
        "licence": "BSD-3-Clause (BLIP, Salesforce)",
    }
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert cli.main(["convert", *arguments, "--out", str(tmp_path / "again")]) == 0  # new weights are of the seed
    again = AutoModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_wrong_kind_and_size_are_one_line(tmp_path, capfd):
    """No table of tensors, no words of the library before ours; one line for tensors that are not used."""
    random_blip().save_pretrained(tmp_path / "blip")
    random_blip(BlipForConditionalGeneration).save_pretrained(tmp_path / "captioning")
    capfd.readouterr()
    words = ["convert", "--source", "blip", "--out", str(tmp_path / "start"), "--checkpoint"]
    for more, message in {
        (str(tmp_path / "captioning"),): f"error: {tmp_path}/captioning lacks itm_head.bias (62 tensor(s) in all)",
        (str(tmp_path / "blip"), "--image-size", "100", "90"): (
            f"error: The sizes of {tmp_path}/blip and the arguments give no model: CADAVisionConfig: `patch_size` (8) "
            "does not divide `image_size` (100×90). Choose"
        ),
    }.items():
        assert cli.main([*words, *more]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(message)


@pytest.mark.parametrize("there", ["trainer_state.json", "person_01.png", "model.safetensors"])
def test_a_folder_with_files_is_left_alone(tmp_path, capsys, there):
    """A training's output, photos, or what is converted."""
    random_blip().save_pretrained(tmp_path / "blip")
    out = tmp_path / ("blip" if there == "model.safetensors" else "out")
    out.mkdir(exist_ok=True)
    (out / there).touch()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    words = ["--source", "blip", "--checkpoint", str(tmp_path / "blip"), "--out", str(out)]
    assert cli.main(["convert", *words]) == 1
    assert capsys.readouterr().err == f"error: {out} holds files already. Choose a new folder.\n"
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_command_reports_an_error_in_one_line(tmp_path, capsys):
    arguments = ["--source", "cada_original", "--checkpoint", str(tmp_path / "no.pth"), "--out", str(tmp_path)]
    assert cli.main(["convert", *arguments]) == 1
    assert capsys.readouterr().err.startswith("error: The checkpoint")


def test_training_starts_from_blip_in_one_step(tmp_path):
    """`--init_from`: the same weights as the converter's, at the image size and text length of the overrides."""
    random_blip().save_pretrained(tmp_path / "blip")
    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model, processor = make_model_and_processor(
        ModelArguments(
            init_from=str(tmp_path / "blip"),
            tokenizer_name=str(tmp_path / "tokenizer"),
            config_overrides='{"vision_config": {"image_size": [64, 32]}, "mask_rate": 0.5, "max_text_length": 145}',
        )
    )
    converted, _ = convert("blip", tmp_path / "blip", image_size=(64, 32))
    ours, theirs = model.state_dict(), converted.state_dict()
    assert all(
        torch.equal(ours[name], theirs[name])
        for name in ours
        if "group_match" not in name and "vocabulary" not in name
    )
    assert processor.attribute_masker.rate == 0.5
    assert model.config.num_groups == 4 and processor.tokenizer.model_max_length == 145
    assert processor.image_processor.size == {"height": 64, "width": 32}
    model, _ = make_model_and_processor(
        ModelArguments(init_from=str(tmp_path / "blip"), tokenizer_name=str(tmp_path / "tokenizer"))
    )
    assert model.config.vision_config.image_height_width == (224, 224)  # the paper's, whatever BLIP had
    with pytest.raises(ValueError, match="one start: --model_name_or_path or --init_from"):
        train_cada.make_model_and_processor(ModelArguments(model_name_or_path="a", init_from="b"))
