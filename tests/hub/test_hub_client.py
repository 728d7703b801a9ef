"""The real client of the Hub against a server on the loopback address: what is pushed is what a user loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import bert_tokenizer, save_checkpoint, save_colour_set, tiny_processor
from datasets import Dataset, load_from_disk
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from pedes_layout import lay_out_rstp
from PIL import Image
from test_travelling_code import expected_of

from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAProcessor


ROOT = Path(__file__).parents[2]
CODE = [f"{name}_cada.py" for name in ("configuration", "losses", "modeling", "pipeline", "processing")]
MODEL = ["config.json", "model.safetensors"]
PROCESSOR = ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
SENTENCE_TRANSFORMERS = ["modules.json", "sentence_bert_config.json"]

CARD = """---
library_name: transformers
license: apache-2.0
tags:
- person-retrieval
---
# Tiny
"""


@pytest.fixture
def hub():
    with HubStandIn() as hub:
        yield hub


def run(hub: HubStandIn, tmp_path: Path, script: str, *arguments, token: str | None = None, modules: bool = False):
    """
    Run a script as a first-time user: empty caches, an empty folder, and no module of ours unless `modules`.

    Returns what it wrote into `results.json`. What it prints has to be nothing.
    """
    place = tmp_path / f"place-{len(list(tmp_path.glob('place-*')))}"
    place.mkdir()
    (place / "script.py").write_text(script)
    environment = hub.environment(place / "home", token, **({"PYTHONPATH": str(ROOT)} if modules else {}))
    command = [sys.executable, "script.py", *map(str, arguments)]
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == ""
    return json.loads((place / "results.json").read_text()) if (place / "results.json").is_file() else None


RELEASE = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, repo = HfApi(), "tester/model"
urls = [str(api.create_repo(repo, exist_ok=True)) for _ in range(2)]
folder = Path("folder")
(folder / "figures").mkdir(parents=True)
(folder / "model.safetensors").write_bytes(b"first weights")
(folder / "figures" / "table.md").write_text("1")
(folder / "empty.bin").touch()
first = api.upload_folder(folder_path=folder, repo_id=repo).oid
again = api.upload_folder(folder_path=folder, repo_id=repo).oid  # nothing has changed
api.create_tag(repo, tag="v1.0", tag_message="First")
api.create_tag(repo, tag="v1.0", exist_ok=True)
(folder / "model.safetensors").write_bytes(b"second weights")
(folder / "figures" / "table.md").unlink()
second = api.upload_folder(folder_path=folder, repo_id=repo, delete_patterns="*.md", parent_commit=first).oid

snapshot = Path(snapshot_download(repo, revision="v1.0"))
files = {path.relative_to(snapshot).as_posix(): path.read_text() for path in snapshot.rglob("*") if path.is_file()}
weights = [Path(hf_hub_download(repo, "model.safetensors", revision=r)).read_text() for r in ("v1.0", "main", first)]
info = api.model_info(repo, files_metadata=True)
results = {
    "urls": urls,
    "commits": [commit.commit_id for commit in api.list_repo_commits(repo)],
    "expected commits": [second, first],
    "again": again,
    "files": files,
    "weights": weights,
    "tags": [(tag.name, tag.target_commit) for tag in api.list_repo_refs(repo).tags],
    "sizes": {file.rfilename: file.size for file in info.siblings},
    "tree": [entry.path for entry in api.list_repo_tree(repo, revision="v1.0", recursive=True, expand=True)],
    "paths": [entry.path for entry in api.get_paths_info(repo, ["figures", "none"], revision="v1.0")],
    "exists": [api.repo_exists(repo), api.file_exists(repo, "none"), api.revision_exists(repo, "v1.0")],
}
api.delete_tag(repo, tag="v1.0")
api.create_branch(repo, branch="a/b", revision=first)
api.upload_file(path_or_fileobj=b"1", path_in_repo="new", repo_id=repo, revision="a/b")
api.create_repo("gone", private=True)
api.delete_repo("gone")
Path("results.json").write_text(json.dumps(results))
"""


def test_create_upload_tag_download(hub, tmp_path):
    results = run(hub, tmp_path, RELEASE)
    assert results["urls"] == [f"{hub.endpoint}/tester/model"] * 2
    assert results["commits"][:2] == results["expected commits"]
    first = results["again"]
    assert first == results["commits"][1]  # no commit without a change
    attributes = results["files"].pop(".gitattributes")
    assert "*.safetensors filter=lfs" in attributes
    assert results["files"] == {"model.safetensors": "first weights", "figures/table.md": "1", "empty.bin": ""}
    assert results["weights"] == ["first weights", "second weights", "first weights"]
    assert results["tags"] == [["v1.0", first]]
    assert results["sizes"] == {".gitattributes": len(attributes), "empty.bin": 0, "model.safetensors": 14}
    assert results["tree"] == [".gitattributes", "empty.bin", "figures", "figures/table.md", "model.safetensors"]
    assert results["paths"] == ["figures"]
    assert results["exists"] == [True, False, True]

    assert hub.tags("tester/model") == {}
    assert list(hub.files("tester/model", "a/b")) == [
        *(".gitattributes", "empty.bin", "figures/table.md", "model.safetensors", "new")
    ]
    assert hub.files("tester/model")["model.safetensors"] == b"second weights"
    # Small as they are, the weights went through LFS, once each; the empty file did not.
    assert sum(method == "PUT" for method, *_ in hub.requests) == 2
    assert hub.unknown == []


REFUSED = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationDelete, HfApi, get_session, hf_hub_download, snapshot_download

repo, first = "tester/model", sys.argv[1]
api, stranger, visitor = HfApi(), HfApi(token="hf_wrong"), HfApi(token=False)
card = b"---\\nmodel-index: [{name: tiny, results: [{task: {type: a}, dataset: {type: drawn persons}}]}]\\n---\\n"
calls = {
    "repository": lambda: api.model_info("tester/none"),
    "repository to download": lambda: snapshot_download("tester/none"),
    "repository to fill": lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="tester/none"),
    "file": lambda: hf_hub_download(repo, "none"),
    "folder": lambda: list(api.list_repo_tree(repo, "none")),
    "revision": lambda: snapshot_download(repo, revision="v9"),
    "revision of a file": lambda: hf_hub_download(repo, "a.txt", revision="v9"),
    "branch": lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo, revision="v9"),
    "file to delete": lambda: api.delete_file("none", repo),
    "tag": lambda: api.delete_tag(repo, tag="v9"),
    "second repository": lambda: api.create_repo(repo),
    "second tag": lambda: [api.create_tag(repo, tag="v1.0") for _ in range(2)],
    "parent": lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo, parent_commit=first),
    "card": lambda: api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo),
    "wrong token": lambda: stranger.create_repo("other"),
    "whose token": lambda: stranger.whoami(),
    "no token": lambda: visitor.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo),
    "other host": lambda: get_session().get("https://example.org"),
    "pull request": lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo, create_pr=True),
}
results = {}
for name, call in calls.items():
    try:
        results[name] = ["", str(call())]
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
Path("results.json").write_text(json.dumps(results))
"""


def test_errors_are_those_of_the_hub(hub, tmp_path):
    first = hub.add("tester/model", {"a.txt": b"1"})
    hub.add("tester/model", {"a.txt": b"2"})
    results = run(hub, tmp_path, REFUSED, first)
    assert {name: error for name, (error, _) in results.items()} == {
        **dict.fromkeys(["repository", "repository to download", "repository to fill"], "RepositoryNotFoundError"),
        **dict.fromkeys(["file", "folder", "file to delete"], "RemoteEntryNotFoundError"),
        **dict.fromkeys(["revision", "revision of a file", "branch", "tag"], "RevisionNotFoundError"),
        **dict.fromkeys(["second repository", "second tag", "parent"], "HfHubHTTPError"),
        **dict.fromkeys(["wrong token", "whose token", "no token", "pull request"], "HfHubHTTPError"),
        **{"card": "ValueError", "other host": "ProxyError"},
    }
    for name, message in (
        ("second repository", "You already created this model repo"),
        ("second tag", "The tag v1.0 exists already"),
        ("parent", "A commit has happened since"),
        ("card", '"model-index[0].results[0].dataset.name" is required'),
        ("card", '"model-index[0].results[0].dataset.type" with value "drawn persons" fails to match'),
        ("wrong token", "Invalid credentials in Authorization header"),
        ("whose token", "Invalid user token"),
        ("no token", "Invalid username or password"),
        ("pull request", "Not in the stand-in"),
    ):
        assert message in results[name][1]
    # What the stand-in cannot do and what was meant for another host is not lost.
    assert len(hub.unknown) == 2
    assert hub.unknown[0] == "CONNECT example.org:443"
    assert "pull request" in hub.unknown[1]
    assert hub.files("tester/model")["a.txt"] == b"2"
    assert hub.titles("tester/model") == ["Add files", "Add files", "initial commit"]


RESUMED = """
from huggingface_hub import hf_hub_download
with open(hf_hub_download("tester/model", "model.safetensors"), "rb") as weights, open("results.json", "w") as file:
    file.write(str(sum(weights.read())))
"""


def test_broken_download_is_resumed(hub, tmp_path):
    """The client keeps what it has in steps of 10 MiB, so the file is larger than that."""
    weights = bytes(range(256)) * (45 * 1024)
    hub.add("tester/model", {"model.safetensors": weights})
    hub.cut_next_download = 11 * 1024**2
    assert run(hub, tmp_path, RESUMED) == sum(weights)
    downloads = [status for method, path, status in hub.requests if method == "GET" and "/resolve/" in path]
    assert downloads == [200, 206]


PUSHER = """
import contextlib, sys
import train_cada
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoProcessor

first, second, card, *training = sys.argv[1:]
repo = "tester/cada-tiny"
AutoModel.from_pretrained(first).push_to_hub(repo)
AutoProcessor.from_pretrained(first).push_to_hub(repo)
ModelCard(card).push_to_hub(repo)
HfApi().create_tag(repo, tag="v1.0")
AutoModel.from_pretrained(second).push_to_hub(repo, commit_message="Other weights")
with contextlib.redirect_stdout(sys.stderr):
    train_cada.main(training)
"""

READER = """
import json, sys
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline

results = []
for name in sys.argv[1:]:
    repo, revision = name.split("@")
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    image = Image.radial_gradient("L").convert("RGB")
    inputs = processor(images=image, text=["a woman in a red coat"], return_tensors="pt")
    with torch.no_grad():
        states = model.encode_images(inputs["pixel_values"])
        match = model.match(inputs["input_ids"], inputs["attention_mask"], states)
        results.append([model(**inputs).logits_per_text.item(), *match[0].tolist()])
    search = pipeline("text-to-image-person-retrieval", model=repo, revision=revision, trust_remote_code=True)
    (found,) = search("a woman in a red coat", images=[image])
    assert abs(found["global_score"] / model.config.temperature - results[-1][0]) < 1e-3
    assert type(model).__module__.startswith("transformers_modules.")
    encoder = SentenceTransformer(repo, revision=revision, trust_remote_code=True)
    similarity = encoder.similarity(encoder.encode("a woman in a red coat"), encoder.encode(image)).item()
    assert abs(similarity - found["global_score"]) < 1e-5
assert not [name for name in sys.modules if name.endswith("_cada") and "." not in name]
with open("results.json", "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A Hub with models pushed by hand and by `--push_to_hub`; their folders here; what a visitor computes."""
    folder, processor = tmp_path_factory.mktemp("released"), tiny_processor(bert_tokenizer())
    for seed, name in enumerate(("first", "second")):
        save_checkpoint(folder / name, processor, seed)
    (folder / "data").mkdir()
    lay_out_rstp(folder / "data")
    training = ["--model_name_or_path", folder / "first", "--dataset", "rstp_reid", "--data_dir", folder / "data"]
    training += ["--output_dir", folder / "trained", "--num_train_epochs", "1", "--per_device_train_batch_size", "12"]
    training += ["--do_train", "--push_to_hub", "--hub_model_id", "tester/trained", "--disable_tqdm", "true"]
    with HubStandIn() as hub:
        run(hub, folder, PUSHER, folder / "first", folder / "second", CARD, *training, modules=True)
        # A visitor: no token, nothing in the caches, none of our modules.
        names = ("tester/cada-tiny@v1.0", "tester/cada-tiny@main", "tester/trained@main")
        yield hub, folder, run(hub, folder, READER, *names, token="")


def expected_in(folder: Path) -> list[float]:
    model = CADAForTextToImageRetrieval.from_pretrained(folder).eval()
    return pytest.approx(expected_of(model, CADAProcessor.from_pretrained(folder)), rel=1e-5)


def test_pushed_release_loads_at_its_tag(released):
    """Model, processor and card are pushed and tagged; then `main` moves on to other weights."""
    hub, folder, (tagged, newest, _) = released
    files = hub.files("tester/cada-tiny", "v1.0")
    assert list(files) == sorted([".gitattributes", "README.md", *CODE, *MODEL, *PROCESSOR, *SENTENCE_TRANSFORMERS])
    assert files["README.md"].decode() == CARD
    assert files["model.safetensors"] == (folder / "first" / "model.safetensors").read_bytes()
    assert hub.files("tester/cada-tiny")["model.safetensors"] == (folder / "second" / "model.safetensors").read_bytes()
    assert hub.titles("tester/cada-tiny")[0] == "Other weights"
    assert len(hub.tags("tester/cada-tiny")) == 1
    assert tagged == expected_in(folder / "first")
    assert newest == expected_in(folder / "second")
    assert tagged != pytest.approx(newest, rel=1e-3)
    assert hub.unknown == []


def test_trainer_pushes_a_checkpoint_that_loads(released):
    """`--push_to_hub` of the training command."""
    hub, folder, (*_, trained) = released
    files = hub.files("tester/trained")
    assert set(files) >= {".gitattributes", "README.md", *CODE, *MODEL, *PROCESSOR, *SENTENCE_TRANSFORMERS}
    # No pickle, such as `training_args.bin`, and no optimizer state.
    assert {name.rsplit(".", 1)[-1] for name in files} == {"gitattributes", "json", "md", "py", "safetensors"}
    assert not [name for name in files if name.startswith("checkpoint-")]
    for name in (*CODE, *MODEL, *PROCESSOR):
        assert files[name] == (folder / "trained" / name).read_bytes()
    assert trained == expected_in(folder / "trained")
    assert hub.unknown == []


ADAPTER = """
import contextlib, sys
from transformers import AutoModel, AutoProcessor
import train_cada
from cada import cli

first, second, merged, *training = sys.argv[1:]
AutoModel.from_pretrained(first).push_to_hub("tester/base")
AutoProcessor.from_pretrained(first).push_to_hub("tester/base")
with contextlib.redirect_stdout(sys.stderr):
    train_cada.main(training)
    AutoModel.from_pretrained(second).push_to_hub("tester/base")  # the base moves on
    assert cli.main(["merge", "tester/adapter", "--revision", "v1.0", "--out", merged]) == 0
    assert cli.main(["merge", "tester/adapter", "--revision", "v2.0", "--out", merged]) == 1
"""

SNIPPET = """
import json, sys
from PIL import Image

sys.stdout = sys.stderr
for name, colour in (("first", "red"), ("second", "blue"), ("third", "green")):
    Image.new("RGB", (20, 40), colour).save(f"{name}.jpg")
CODE
with open("results.json", "w") as file:
    json.dump(scores.tolist(), file)
"""


def test_a_published_adapter_loads_on_the_commit_of_its_base(hub, processor, tmp_path):
    """By the snippet of its card, as a visitor; and it is merged from there."""
    for seed, name in enumerate(("first", "second")):
        save_checkpoint(tmp_path / name, processor, seed)
    save_colour_set(tmp_path / "data", train=14, val=7, test=7)
    training = ["--model_name_or_path", "tester/base", "--dataset", tmp_path / "data", "--lora_rank", "2"]
    training += ["--output_dir", tmp_path / "run", "--num_train_epochs", "1", "--per_device_train_batch_size", "7"]
    training += ["--learning_rate", "1e-2", "--do_train", "--do_predict", "--disable_tqdm", "true"]
    training += ["--push_to_hub", "--hub_model_id", "tester/adapter", "--hub_tag", "v1.0"]
    places = [tmp_path / name for name in ("first", "second", "merged")]
    run(hub, tmp_path, ADAPTER, *places, *training, modules=True)
    files = hub.files("tester/adapter", "v1.0")
    own = ["adapter_config.json", "adapter_model.safetensors", "cada_adapter.json", "cada_run.json"]
    assert set(files) == {".gitattributes", "README.md", *own, *CODE, *PROCESSOR, *SENTENCE_TRANSFORMERS}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("tester/base", "peft")
    assert "**An adapter** (LoRA, rank 2) for [tester/base]" in card.content
    assert len(card.data.eval_results) == 2 * 2 * 5  # val and test, both matchings
    (snippet,) = re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)
    scores = run(hub, tmp_path, SNIPPET.replace("CODE", snippet), token="")
    model = CADAForTextToImageRetrieval.from_pretrained(tmp_path / "merged").eval()
    images = [Image.open(next(tmp_path.glob(f"place-*/{name}.jpg"))) for name in ("first", "second", "third")]
    inputs = processor(images=images, text=["a woman with long black hair in a red coat"], return_tensors="pt")
    with torch.no_grad():
        outputs, rows = model(**inputs), torch.arange(3)
        states = model.encode_images(inputs["pixel_values"])
        match = model.match(inputs["input_ids"], inputs["attention_mask"], states, torch.zeros_like(rows), rows)
    expected = (outputs.text_embeds @ outputs.image_embeds.T)[0] + model.local_score(match)
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert hub.unknown == []


PINNED = """
import json, shutil, sys
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from cada.data.loading import load_pairs_dataset
from cada.files import CADAError
from cada.gallery.index import build_index, open_index

images, second, *revisions = sys.argv[1:]
counts = [len(load_pairs_dataset("tester/people", revision=revision)["test"]) for revision in revisions]
try:
    load_pairs_dataset("tester/people", revision="v9")
except CADAError as error:
    message = str(error)

def look(model=None):
    build_index(images, "index", model)
    gallery = open_index("index")
    [found] = gallery.search("a red coat", rerank=0)
    return gallery.info()["revision"], [result.score for result in found]

before = look("tester/cada-tiny")
HfApi().upload_folder(folder_path=second, repo_id="tester/cada-tiny")
shutil.rmtree(HF_HUB_CACHE)
json.dump([counts, message, before, look()], open("results.json", "w"))
"""


def test_data_of_a_revision_and_an_index_that_keeps_the_commit_of_its_model(hub, processor, tmp_path):
    """
    Two commits of a data set with 3 and 5 test images, by commit and branch. An index made from `main` goes on with
    its weights when `main` has others. In one process, as it takes long to start.
    """
    commits = []
    for count in (3, 5):
        rows = load_from_disk(save_colour_set(tmp_path / str(count), test=count))["test"]
        rows.to_parquet(tmp_path / "test.parquet")
        commits.append(hub.add("tester/people", {"data/test.parquet": (tmp_path / "test.parquet").read_bytes()}))
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 32), (80 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    save_checkpoint(tmp_path / "first", processor, 0)
    save_checkpoint(tmp_path / "second", processor, 1)
    commit = hub.add("tester/cada-tiny", {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()})
    arguments = (tmp_path / "images", tmp_path / "second", *commits, "main")
    counts, message, before, after = run(hub, tmp_path, PINNED, *arguments, modules=True)
    assert counts == [3, 5, 5]
    assert "tester/people" in message and "v9" in message
    assert before == after and after[0] == commit
    newest = hub.files("tester/cada-tiny")["model.safetensors"]
    assert newest == (tmp_path / "second" / "model.safetensors").read_bytes()


STREAMED = """
import json, sys
from itertools import islice
from cada.data.streams import StreamBatches, StreamPairs, open_rows

def read(revision, begin, count):
    pairs = StreamPairs(open_rows("tester/pairs", revision=revision), "tester/pairs", buffer=6)
    batches = StreamBatches(pairs, 4)
    if begin:
        batches.resume(".")
    found = [[one["caption"] for one in pairs.__getitems__(batch)] for batch in islice(batches, begin, begin + count)]
    batches.save(".", begin + count - 2, 0)
    return found

first = read(sys.argv[1], 0, 5)
json.dump([first, read(sys.argv[1], 3, 2), read("main", 3, 1)], open("results.json", "w"))
"""


def test_streamed_pairs_of_a_revision(hub, tmp_path):
    """Read by ranges, resumed, of a pinned commit; `main` has other captions by then."""
    commits = []
    for word in ("coat", "hat"):
        rows = {"image": [Image.new("RGB", (16, 32))] * 12, "caption": [f"a red {word} {row}" for row in range(12)]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        commits.append(hub.add("tester/pairs", {"data/train.parquet": (tmp_path / "train.parquet").read_bytes()}))
    first, again, other = run(hub, tmp_path, STREAMED, commits[0], modules=True)
    assert sorted(sum(first[:3], [])) == sorted(f"a red coat {row}" for row in range(12))
    assert again == first[3:]
    assert other == [[caption.replace("coat", "hat") for caption in first[3]]]


def test_hf_upload_and_hf_download(hub, tmp_path):
    """The console command, as somebody types it who has trained a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in (("model.safetensors", b"weights"), ("config.json", b"{}"), ("README.md", CARD.encode())):
        (folder / name).write_bytes(content)

    def hf(*arguments) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("hf")), *map(str, arguments)]
        return subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)

    uploaded = hf("upload", "tester/model", folder, "--commit-message", "First", "--exclude", "config.json")
    assert uploaded.returncode == 0, uploaded.stderr
    assert f"{hub.endpoint}/tester/model" in uploaded.stdout
    assert list(hub.files("tester/model")) == [".gitattributes", "README.md", "model.safetensors"]
    uploaded = hf("upload", "tester/model", folder / "config.json", "nested/config.json", "--revision", "dev")
    assert uploaded.returncode == 0, uploaded.stderr
    assert hub.titles("tester/model") == ["First", "initial commit"]
    assert hub.files("tester/model", "dev")["nested/config.json"] == b"{}"

    downloaded = hf("download", "tester/model", "--revision", "dev", "--local-dir", tmp_path / "copy")
    assert downloaded.returncode == 0, downloaded.stderr
    copied = [path for path in (tmp_path / "copy").rglob("*") if path.is_file() and ".cache" not in path.parts]
    found = {path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes() for path in copied}
    assert found == hub.files("tester/model", "dev")

    missing = hf("download", "tester/none")
    assert missing.returncode == 1
    assert "not found" in missing.stderr.lower() and "Traceback" not in missing.stderr
    assert hub.unknown == []


@pytest.mark.slow
def test_a_tokenizer_is_asked_for_once_where_there_is_no_hub(tmp_path):
    """The client tries six times, over 23 seconds; AutoTokenizer alone would make it twelve."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    code = "from cada.hub.loading import load_tokenizer; load_tokenizer('bert-base-uncased')"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "The tokenizer bert-base-uncased cannot be loaded" in result.stderr
    assert result.stderr.count("thrown while requesting") == 6
