"""A checkpoint as a model of sentence-transformers, in a fresh process that has no package of ours."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_code_of_a_reader, save_checkpoint
from PIL import Image

from cada.data.drawn import load_drawn
from cada.evaluation.matching import evaluate_retrieval


READER = """
import json, os, sys
import torch
import torch.nn.functional as F
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import semantic_search
from transformers import AutoModel, AutoProcessor

folder, data = sys.argv[1:]
encoder = SentenceTransformer(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with open(data) as file:
    data = json.load(file)
images = [Image.open(file) for file in data["images"]]
captions = data["captions"]
options = {"convert_to_tensor": True, "batch_size": 64}
sentences, pictures = encoder.encode(captions, **options), encoder.encode(images, **options)
with torch.no_grad():
    texts = model.get_text_features(**processor(text=captions, return_tensors="pt")).pooler_output
    pixels = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
ours = F.normalize(texts, dim=-1), F.normalize(pixels, dim=-1)

encoder.save_pretrained("again")
again = SentenceTransformer("again", trust_remote_code=True)
found = semantic_search(sentences, pictures, top_k=len(images))
evaluator = InformationRetrievalEvaluator(
    queries=dict(enumerate(captions)),
    corpus=dict(enumerate(images)),
    relevant_docs={query: set(right) for query, right in enumerate(data["right"])},
    accuracy_at_k=[1, 5, 10],
    map_at_k=[len(images)],
    write_csv=False,
)
results = {
    "texts": torch.equal(sentences, ours[0]),
    "images": torch.equal(pictures, ours[1]),
    "paths": torch.equal(encoder.encode(data["images"], **options), pictures),
    "again": [
        torch.equal(again.encode(inputs, **options), before)
        for inputs, before in ((captions, sentences), (images, pictures))
    ],
    "similarity": (encoder.similarity(sentences, pictures) - ours[0] @ ours[1].T).abs().max().item(),
    "function": encoder.similarity_fn_name,
    "size": [encoder.get_embedding_dimension(), encoder.max_seq_length],
    "found": [[result["corpus_id"] for result in row] for row in found],
    "expected": (ours[0] @ ours[1].T).argsort(dim=1, descending=True).tolist(),
    "metrics": evaluator(encoder),
    "module": type(encoder[0].model).__module__.split(".")[0],
    "files": sorted(os.listdir("again")),
}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def drawn():
    """12 drawn persons on two images each, with two captions an image."""
    return load_drawn(train_persons=1, val_persons=1, test_persons=12, images_per_person=2)["test"]


def test_encodes_searches_and_evaluates_as_we_do(processor, drawn, tmp_path):
    model = save_checkpoint(tmp_path / "model", processor, 0)
    ours = evaluate_retrieval(model, processor, drawn)
    data = {"images": [], "captions": [], "right": []}
    for number, row in enumerate(drawn):
        data["images"].append(str(tmp_path / f"{number}.png"))
        row["image"].save(data["images"][-1])
        data["captions"] += row["captions"]
        same = [index for index, other in enumerate(drawn["person_id"]) if other == row["person_id"]]
        data["right"] += [same] * len(row["captions"])
    (tmp_path / "data.json").write_text(json.dumps(data))
    command = [sys.executable, "-c", READER, str(tmp_path / "model"), str(tmp_path / "data.json")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(result.stdout)
    assert results["texts"] and results["images"] and results["paths"] and results["again"] == [True, True]
    assert results["similarity"] < 1e-6 and results["function"] == "cosine"
    assert results["size"] == [8, 13]  # `projection_dim`, `max_text_length`
    assert results["found"] == results["expected"]
    assert 0 < ours["global_R1"] < 100
    for k in (1, 5, 10):
        assert 100 * results["metrics"][f"cosine_accuracy@{k}"] == pytest.approx(ours[f"global_R{k}"])
    assert 100 * results["metrics"]["cosine_map@24"] == pytest.approx(ours["global_mAP"])
    assert results["module"] == "transformers_modules"
    assert {"modeling_cada.py", "processing_cada.py", "modules.json"} < set(results["files"])


def test_code_of_the_page_runs(processor, tmp_path):
    """Both blocks of docs/search.md; local matching as `CrossEncoder` ranks by our S_L."""
    model = save_checkpoint(tmp_path / "demo" / "model", processor, 0)
    page = (Path(__file__).parents[2] / "docs/search.md").read_text(encoding="utf-8")
    section = page.split("## With sentence-transformers")[1].split("\n## ")[0]
    (tmp_path / "demo" / "images").mkdir()
    images = [Image.new("RGB", (48, 96), colour) for colour in ("red", "blue")]
    for number, image in enumerate(images, start=1):
        image.save(tmp_path / "demo" / "images" / f"person_0{number}.png")
    encoded, matched = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    scores = "print([result['score'] for result in ranking])\n"
    by_global, by_local, local_scores = run_code_of_a_reader(encoded + matched + scores, tmp_path)
    sentence = ["a woman with long black hair in a red coat"] * 2
    inputs = processor(text=sentence, images=images, return_tensors="pt")
    outputs = model(**inputs)
    match = model.match(inputs["input_ids"], inputs["attention_mask"], model.encode_images(inputs["pixel_values"]))
    expected = model.local_score(match)
    assert by_global == outputs.logits_per_text[0].argsort(descending=True).tolist()
    assert by_local == expected.argsort(descending=True).tolist()
    assert local_scores == pytest.approx(expected.sort(descending=True).values.tolist(), rel=1e-5)
