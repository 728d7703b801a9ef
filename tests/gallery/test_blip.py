"""BLIP of transformers, not trained on persons: its own scores rank the images, without a step in between."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bert_tokenizer
from hub_stand_in import HubStandIn
from PIL import Image
from random_blip import BASE, TINY, random_blip
from transformers import BlipForConditionalGeneration, BlipImageProcessorPil

from cada.cli import main
from cada.gallery.index import open_index


ROOT = Path(__file__).parents[2]
SENTENCES = ["A man in a red coat.", "somebody with a blue bag, and no hat"]


def save_blip(folder: Path, tower: dict = TINY, size: int = 32, patch_size: int = 8):
    """A `BlipForImageTextRetrieval` as it lies on the Hub: the model, its image processor, BERT's tokenizer."""
    blip = random_blip(tower=tower, image_size=size, patch_size=patch_size)
    blip.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return blip


def save_photos(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 120), Image.Resampling.BILINEAR).save(folder / name)
    return names


@torch.no_grad()
def scores_of(blip, folder: Path, names: list[str], sentence: str) -> dict[str, float]:
    """S_G + S_L by transformers alone. As in BLIP's own code, the text of a pair begins with [ENC]."""
    size = blip.config.vision_config.image_size
    images = [Image.open(folder / name) for name in names]
    pixels = BlipImageProcessorPil(size={"height": size, "width": size})(images, return_tensors="pt")["pixel_values"]
    ids = bert_tokenizer()(sentence.lower().replace(".", " "), return_tensors="pt")["input_ids"]
    cosine = blip(ids, pixels, use_itm_head=False).itm_score[:, 0]
    ids = ids.expand(len(names), -1).clone()
    ids[:, 0] = 30523
    probability = blip(ids, pixels, use_itm_head=True).itm_score.softmax(dim=-1)[:, 1]
    return dict(zip(names, (cosine + probability).tolist()))


def assert_ranks_as_blip(index: Path, blip, folder: Path, names: list[str]) -> None:
    gallery = open_index(index)
    for sentence in SENTENCES:
        expected = scores_of(blip, folder, names, sentence)
        results = gallery.search(sentence, top=len(names), rerank=len(names))[0]
        assert [result.path for result in results] == sorted(names, key=lambda name: -expected[name])
        # The features of the index are in half precision.
        assert {result.path: result.score for result in results} == pytest.approx(expected, abs=5e-4)
        assert np.ptp(list(expected.values())) > 0.01
        model, processor = gallery.model, gallery.processor  # whose own scores are equal
        pixels = processor(images=[gallery.image(name) for name in names], return_tensors="pt")["pixel_values"]
        text = processor(text=[sentence] * len(names), return_tensors="pt")
        with torch.no_grad():
            cosine = model(**text, pixel_values=pixels).logits_per_text[0] * model.config.temperature
            logits = model.match(**text, image_states=model.encode_images(pixels))
        ours = (cosine + model.local_score(logits)).tolist()
        assert dict(zip(names, ours)) == pytest.approx(expected, abs=1e-5)


def test_commands_take_a_folder_of_blip(tmp_path, capsys):
    blip, names = save_blip(tmp_path / "blip"), save_photos(tmp_path / "photos", 5)
    index = tmp_path / "index"
    assert main(["index", str(tmp_path / "photos"), "--model", str(tmp_path / "blip"), "--out", str(index)]) == 0
    assert_ranks_as_blip(index, blip, tmp_path / "photos", names)
    capsys.readouterr()
    main(["search", str(index), SENTENCES[0], "--top", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    main(["info", str(index)])
    assert "BSD-3-Clause (BLIP, Salesforce)" in capsys.readouterr().out
    out = tmp_path / "map.png"
    words = ["explain", "--model", str(tmp_path / "blip"), "--image", str(tmp_path / "photos" / "0.png")]
    main([*words, "--text", SENTENCES[0], "--out", str(out)])
    assert Image.open(out).width > 0
    main(["index", str(tmp_path / "photos"), "--out", str(index)])  # loaded anew, it is the same model
    assert "0 added, 0 changed, 0 removed, 5 unchanged" in capsys.readouterr().out


@pytest.mark.slow
def test_base_size(tmp_path):
    blip, names = save_blip(tmp_path / "blip", BASE, 384, 16), save_photos(tmp_path / "photos", 3)
    main(["index", str(tmp_path / "photos"), "--model", str(tmp_path / "blip"), "--out", str(tmp_path / "index")])
    assert_ranks_as_blip(tmp_path / "index", blip, tmp_path / "photos", names)


def test_from_the_hub(tmp_path):
    """In a process of its own, which knows nothing but the name and the address of the Hub."""
    names = save_photos(tmp_path / "photos", 4)
    save_blip(tmp_path / "blip")
    with HubStandIn() as hub:
        environment = hub.environment(tmp_path / "home", None, PYTHONPATH=str(ROOT))
        push = (
            "import sys; from huggingface_hub import HfApi as A; A().create_repo('tester/blip'); "
            "A().upload_folder(repo_id='tester/blip', folder_path=sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", push, str(tmp_path / "blip")], env=environment, check=True)
        words = [sys.executable, "-m", "cada"]
        index = [*words, "index", "photos", "--model", "tester/blip", "--out", "index"]
        result = subprocess.run(index, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "tester/blip is BLIP, not trained on persons" in result.stderr
        search = [*words, "search", "index", SENTENCES[0], "--json"]
        result = subprocess.run(search, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert {row["path"] for row in json.loads(result.stdout)[0]["results"]} == set(names)
    record = json.loads((tmp_path / "index" / "index.json").read_text())
    assert record["origin"] == {"start": "tester/blip (blip)", "licence": "BSD-3-Clause (BLIP, Salesforce)"}
    assert len(record["revision"]) == 40  # pinned


def test_blip_without_a_matching_head_is_an_error(tmp_path, capsys):
    random_blip(BlipForConditionalGeneration).save_pretrained(tmp_path / "blip")
    save_photos(tmp_path / "photos", 1)
    words = ["index", str(tmp_path / "photos"), "--model", str(tmp_path / "blip"), "--out", str(tmp_path / "index")]
    assert main(words) == 1
    assert "lacks itm_head.bias" in capsys.readouterr().err
