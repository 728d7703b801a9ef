"""A checkpoint is used by somebody who has nothing but transformers: another process, folder, no package of ours."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SAVED_FILES, run_code_of_a_reader, save_checkpoint
from PIL import Image

from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


READER = """
import json, sys, warnings
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

results = []
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.radial_gradient("L").convert("RGB")
    inputs = processor(images=image, text=["a woman in a red coat"], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
        states = model.encode_images(inputs["pixel_values"])
        match = model.match(inputs["input_ids"], inputs["attention_mask"], states)
    results.append(
        {
            "class": type(model).__name__,
            "module": type(model).__module__,
            "logit": out.logits_per_text.item(),
            "match": match[0].tolist(),
        }
    )
assert not [name for name in sys.modules if name.endswith("_cada") and "." not in name]
with open("results.json", "w") as file:
    json.dump(results, file)
"""


def expected_of(model, processor):
    image = Image.radial_gradient("L").convert("RGB")
    inputs = processor(images=image, text=["a woman in a red coat"], return_tensors="pt")
    with torch.no_grad():
        states = model.encode_images(inputs["pixel_values"])
        match = model.match(inputs["input_ids"], inputs["attention_mask"], states)
        return [model(**inputs).logits_per_text.item(), *match[0].tolist()]


def read_elsewhere(tmp_path, *folders):
    """Run `READER` in an empty folder, without PYTHONPATH, with an empty cache of modules."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "reader.py").write_text(READER)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        [sys.executable, "reader.py", *map(str, folders)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((elsewhere / "results.json").read_text()), result.stdout


def test_two_checkpoints_load_side_by_side_in_a_fresh_process(processor, tmp_path):
    models = [save_checkpoint(tmp_path / name, processor, seed) for seed, name in enumerate(("first", "second"))]
    results, printed = read_elsewhere(tmp_path, tmp_path / "first", tmp_path / "second")
    assert printed == ""
    for model, result in zip(models, results):
        assert result["class"] == "CADAForTextToImageRetrieval"
        assert result["module"].startswith("transformers_modules.")
        assert [result["logit"], *result["match"]] == pytest.approx(expected_of(model, processor), rel=1e-5)
    assert results[0]["logit"] != results[1]["logit"]


def test_code_of_the_readme_runs(processor, tmp_path):
    """ "Use a model" and its page, with another model in place of the demo's: global and then local matching."""
    save_checkpoint(tmp_path / "demo" / "model", processor, 0)
    root = Path(__file__).parents[2]
    section = (root / "README.md").read_text(encoding="utf-8").split("## Use a model")[1].split("\n## ")[0]
    page = (root / "docs/search.md").read_text(encoding="utf-8").split("## In Python")[1].split("\n## ")[0]
    (tmp_path / "demo" / "images").mkdir()
    for number, colour in enumerate(("red", "blue"), start=1):
        Image.new("RGB", (48, 96), colour).save(tmp_path / "demo" / "images" / f"person_0{number}.png")
    blocks = re.findall(r"```python\n(.*?)```", section + page, flags=re.DOTALL)
    short, use, encoder, _, local, registered, many = blocks
    printed = "print(scores.argsort(descending=True).tolist())"
    code = f"{short}\n{use}\n{encoder}\n{local}\n{printed}\n{registered}\n{many}\n{printed}"
    # The path stands for an installed package, which the last lines import.
    rankings = run_code_of_a_reader(code, tmp_path, PYTHONPATH=str(root))
    by_pipeline, by_global, by_encoder, by_local, by_two_sentences = rankings
    assert sorted(by_global) == [0, 1]
    assert by_pipeline == by_local and by_encoder == by_global
    assert [sorted(ranking) for ranking in by_two_sentences] == [[0, 1]] * 2


def test_saved_files_are_these(processor, tmp_path):
    save_checkpoint(tmp_path / "model", processor, 0)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == SAVED_FILES


def test_registered_classes_load_without_trusting_code(processor, tmp_path):
    """`import cada` once (the tests' conftest does); the class is then the one beside this file."""
    from transformers import AutoModel, AutoProcessor

    model = save_checkpoint(tmp_path / "model", processor, 0)
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert type(loaded) is CADAForTextToImageRetrieval
    assert type(AutoProcessor.from_pretrained(tmp_path / "model")) is CADAProcessor
    assert expected_of(loaded.eval(), processor) == pytest.approx(expected_of(model, processor), rel=1e-5)
