"""Checkpoints are loaded whole or not at all, from files that are looked at first; no code of theirs is run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import bert_tokenizer, save_tiny_start, tiny_config, tried
from hub_stand_in import HubStandIn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.image_utils import SizeDict

import train_cada
from cada import cli
from cada.files import CADAError, run_command
from cada.hub.loading import check_processor, load_config, load_model, load_processor, load_tokenizer, weight_files
from cada.training.start import load_start
from modeling_cada import CADAForTextToImageRetrieval


BIAS = "match_head.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny_start(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def start(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "start"))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_sound_checkpoint_loads(start):
    model = load_model(start)
    tensors = load_file(start / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items() if name in tensors)
    assert not model.training
    assert load_processor(start).enc_token_id == model.config.text_config.enc_token_id


def test_a_checkpoint_in_several_files_loads(start):
    model = load_model(start)
    (start / "model.safetensors").unlink()
    model.save_pretrained(start, max_shard_size="1MB")
    assert len(weight_files(start)) > 1
    again = load_model(start).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def truncate(name: str, share: float):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def replace(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def weights(change):
    return lambda folder: change_weights(folder, change)


def config(change):
    return lambda folder: change_json(folder / "config.json", change)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def shards(change):
    def damage(folder: Path) -> None:
        model = load_model(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="1MB")
        change(folder, folder / "model.safetensors.index.json")

    return damage


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def rename_shard(name: str):
    def change(folder: Path, index: Path) -> None:
        shutil.copy(first_shard(folder), folder.parent / "outside.safetensors")

        def point_to_it(content):
            names = content["weight_map"]
            content["weight_map"] = {
                key: name if value == first_shard(folder).name else value for key, value in names.items()
            }

        change_json(index, point_to_it)

    return shards(change)


def drop_a_tensor_of_a_shard(folder: Path, index: Path) -> None:
    path = first_shard(folder)
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGED_MODELS = {
    "truncated weights": (truncate("model.safetensors", 0.7), "model.safetensors is damaged"),
    "truncated header": (truncate("model.safetensors", 0.001), "model.safetensors is damaged"),
    "empty weights": (replace("model.safetensors", b""), "model.safetensors is damaged"),
    "weights of another kind": (replace("model.safetensors", b"PK\x03\x04" * 100), "model.safetensors is damaged"),
    "a huge header": (replace("model.safetensors", b"\xff" * 8 + b"{}"), "model.safetensors is damaged"),
    "no weights": (remove("model.safetensors"), "holds no weights in safetensors form"),
    "a missing tensor": (weights(lambda tensors: tensors.pop(BIAS)), f"lack {BIAS}. The checkpoint is not complete"),
    "a wrong shape": (
        weights(lambda tensors: tensors.update({BIAS: torch.zeros(3)})),
        r"match_head.bias is of the shape \(3,\), config.json asks for \(2,\)",
    ),
    "whole numbers": (
        weights(lambda tensors: tensors.update({BIAS: torch.zeros(2, dtype=torch.int64)})),
        r"match_head.bias \(I64\) is not of a floating-point type",
    ),
    "NaN": (
        weights(lambda tensors: tensors.update({BIAS: torch.tensor([0.0, float("nan")])})),
        f"hold NaN or infinite numbers in {BIAS}",
    ),
    "infinity": (
        weights(lambda tensors: tensors.update({BIAS: torch.tensor([0.0, float("inf")])})),
        f"hold NaN or infinite numbers in {BIAS}",
    ),
    "a missing shard": (shards(lambda folder, index: first_shard(folder).unlink()), "lacks model-00001-of-"),
    "a damaged shard": (shards(lambda folder, index: first_shard(folder).write_bytes(b"x")), "00001-of.* is damaged"),
    "a shard that lacks a tensor": (shards(drop_a_tensor_of_a_shard), "lack .*The checkpoint is not complete"),
    "a shard outside": (rename_shard("../outside.safetensors"), "names '../outside.safetensors', which is no"),
    "a shard by its absolute path": (rename_shard("/etc/passwd"), "names '/etc/passwd', which is no"),
    "a pickled shard": (rename_shard("weights.bin"), "names 'weights.bin', which is no"),
    "a damaged index": (shards(lambda folder, index: index.write_text("{")), "index.json is not a JSON file"),
    "an index of another form": (shards(lambda folder, index: index.write_text("[]")), "is no index of weight files"),
    "an empty folder": (empty, "holds no config.json"),
    "no configuration": (remove("config.json"), "holds no config.json"),
    "a truncated configuration": (truncate("config.json", 0.5), "config.json is not a JSON file"),
    "a list as configuration": (replace("config.json", b"[]"), "config.json is of a model of the type None"),
    "another model": (config(lambda fields: fields.update(model_type="bert")), "of the type 'bert', not 'cada'"),
    "a text as a number": (
        config(lambda fields: fields["text_config"].update(hidden_size="wide")),
        "configuration of .* cannot be used: .*hidden_size",
    ),
    "a tower that is none": (config(lambda fields: fields.update(vision_config=[1])), "cannot be used"),
    "another size": (config(lambda fields: fields["text_config"].update(hidden_size=32)), "asks for"),
    "a size beyond all memory": (
        config(lambda fields: fields["text_config"].update(vocab_size=10**12)),
        "asks for",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_MODELS)
def test_damaged_checkpoint_is_named(start, case):
    damage, message = DAMAGED_MODELS[case]
    damage(start)
    with pytest.raises(CADAError, match=message) as error:
        load_model(start)
    assert str(start) in str(error.value)


DAMAGED_PROCESSORS = {
    "truncated tokenizer": truncate("tokenizer.json", 0.5),
    "tokenizer of another form": replace("tokenizer.json", b"[1, 2]"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "truncated settings": truncate("processor_config.json", 0.5),
    "settings of another form": replace("processor_config.json", b"[]"),
    "unit that does not exist": replace("processor_config.json", b'{"mask_unit": "sentence"}'),
}


@pytest.mark.parametrize("case", DAMAGED_PROCESSORS)
def test_damaged_processor_is_named(start, case):
    DAMAGED_PROCESSORS[case](start)
    with pytest.raises(CADAError, match=f"The processor of {start} cannot be loaded: .*Save it again"):
        load_processor(start)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file.pth").write_bytes(b"x")
    with pytest.raises(CADAError, match="file.pth is a file. Give the folder of a checkpoint"):
        load_model(tmp_path / "file.pth")
    for name in ("runs/no/such/run", "no such run", "a\0b"):
        for load in (load_model, load_config, load_processor, load_tokenizer):
            with pytest.raises(CADAError, match="a name on the Hub, which has to be reachable"):
                load(name)


def test_new_heads_are_random_but_what_was_there_has_to_be_there(tmp_path, caplog, capfd):
    """A checkpoint without ARA starts with a random vocabulary head; one with a hole in it does not start."""
    plain = tiny_config(use_ara=False)
    CADAForTextToImageRetrieval(plain).save_pretrained(tmp_path)
    caplog.clear(), capfd.readouterr()
    model = load_start(str(tmp_path), {"use_ara": True})
    assert f"Weights of {tmp_path} that are new, and random: vocabulary_head.decoder.bias and" in caplog.text
    assert "LOAD REPORT" not in capfd.readouterr().err  # the table of transformers
    load_start(str(tmp_path), {"use_atp": False})
    assert f"Weights of {tmp_path} that are left out: " in caplog.text
    assert hasattr(model, "vocabulary_head")
    change_weights(tmp_path, lambda tensors: tensors.pop(BIAS))
    with pytest.raises(CADAError, match=f"lack {BIAS}"):
        load_start(str(tmp_path), {"use_ara": True})


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_the_payload_works(tmp_path):
    """Else the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.fixture
def trap(saved, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A checkpoint whose every file that could run code does so when it is run, and the file that tells."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, marker = Path(shutil.copytree(saved, tmp_path / "trap")), tmp_path / "marker"
    for name in ("pytorch_model.bin", "model.safetensors", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        with open(folder / name, "wb") as file:
            pickle.dump({"model": Payload(marker)}, file)
    torch.save({"weight": Payload(marker)}, folder / "weights.pth")
    for path in folder.glob("*_cada.py"):
        path.write_text(f"import os; os.system('touch {marker}')\n", encoding="utf-8")
    (folder / "evil.py").write_text(f"import os; os.system('touch {marker}')\nclass Evil: pass\n", encoding="utf-8")
    return folder, marker


def commands(folder: Path, tmp_path: Path) -> dict:
    """Every command that reads a checkpoint, on this one."""
    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    image = Path(train_cada.__file__).parent / "docs" / "why.png"
    output = ["--output_dir", str(tmp_path / "out")]
    convert = ["--tokenizer-name", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    why = ["--image", str(image), "--text", "a man", "--out", str(tmp_path / "out.png")]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = json.dumps({"vision_config": tower, "text_config": tower})
    train = ["--dataset", "rstp_reid", "--data_dir", str(tmp_path / "nowhere"), "--do_predict", "--use_cpu", *output]
    return {
        "explain": lambda: cli.main(["explain", "--model", str(folder), *why]),
        "publish": lambda: cli.main(["publish", str(folder), "a/b", "--card-only"]),
        "convert blip": lambda: cli.main(["convert", "--source", "blip", "--checkpoint", str(folder), *convert]),
        "convert file": lambda: cli.main(
            ["convert", "--source", "cada_original", "--checkpoint", str(folder / "weights.pth"), *convert]
        ),
        "convert safetensors": lambda: cli.main(
            ["convert", "--source", "blip_original", "--checkpoint", str(folder / "model.safetensors"), *convert]
        ),
        "train": lambda: run_command(lambda: train_cada.main(["--model_name_or_path", str(folder), *train])),
        "train from blip": lambda: run_command(
            lambda: train_cada.main(["--init_from", str(folder), "--init_source", "blip", *train])
        ),
        "train with a tokenizer": lambda: run_command(
            lambda: train_cada.main(["--tokenizer_name", str(folder), "--config_overrides", small, *train])
        ),
    }


def one_error(capsys) -> str:
    """The only error on the screen, which is one line."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


def without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def as_blip(folder: Path) -> None:
    """Pickled weights alone, as older copies of BLIP have them."""
    (folder / "model.safetensors").unlink()
    change_json(folder / "config.json", lambda fields: fields.update(model_type="blip"))


def with_own_code(folder: Path) -> None:
    """Configurations that ask for classes of the checkpoint's own files."""
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "evil.Evil")
    change_json(folder / "config.json", lambda fields: fields.update(auto_map=own))
    change_json(folder / "processor_config.json", lambda fields: fields.update(auto_map=own, processor_class="Evil"))
    change_json(
        folder / "tokenizer_config.json",
        lambda fields: fields.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    )


@pytest.mark.parametrize(
    "form", [None, without_safetensors, as_blip, with_own_code], ids=lambda form: getattr(form, "__name__", "as saved")
)
def test_no_command_runs_code_of_a_checkpoint(trap, form, tmp_path, capsys):
    folder, marker = trap
    if form is not None:
        form(folder)
    for name, command in commands(folder, tmp_path).items():
        status = command()
        assert not marker.exists(), name
        assert status == 1, name
        one_error(capsys)


@pytest.mark.parametrize("sound_weights", [True, False])
def test_code_of_a_tokenizer_is_refused_unasked(trap, saved, sound_weights):
    """Weights are sound, the tokenizer names code: no question on the screen, nothing run."""
    folder, marker = trap
    if sound_weights:
        shutil.copy(saved / "model.safetensors", folder / "model.safetensors")
    with_own_code(folder)
    for load in (load_processor, load_tokenizer):
        try:
            load(folder)
        except CADAError:
            pass
        assert not marker.exists()


@tried(60, 1000)
def test_any_damage_to_a_small_file_is_named_or_harmless(saved, tmp_path_factory, trials):
    """Bytes of the configuration, of the processor's settings and of the header of the weights."""
    folder = tmp_path_factory.mktemp("damaged")

    @settings(max_examples=trials)
    @given(st.data())
    def damage(data):
        for path in saved.iterdir():
            (folder / path.name).unlink(missing_ok=True)
            os.symlink(path, folder / path.name)
        name = data.draw(st.sampled_from(["config.json", "processor_config.json", "model.safetensors"]))
        content = bytearray((saved / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        for load in (load_model, load_processor):
            try:
                loaded = load(folder)
            except CADAError:
                continue
            if load is load_model:
                assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())

    damage()


def test_a_revision_is_what_is_loaded(saved, tmp_path):
    """Two commits of a repository: the weights, the processor's settings and the record are those of the one named."""
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    first = {**files, "cada_run.json": b'{"origin": null, "training": null, "evaluations": []}'}
    second = {**first, "processor_config.json": files["processor_config.json"].replace(b"phrase", b"word")}
    second["cada_run.json"] = b'{"origin": {"start": "x", "licence": null}, "training": null, "evaluations": []}'
    tensors = {name: tensor + 1 for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    second["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    code = (
        "import json, sys; from cada.hub.loading import load_model, load_processor\n"
        "from cada.hub.record import read_start\n"
        "for revision in (sys.argv[1], None):\n"
        "    model = load_model('tester/model', revision)\n"
        "    bias = model.match_head.bias.tolist()\n"
        "    unit = load_processor('tester/model', revision).mask_unit\n"
        "    print(json.dumps([bias, unit, read_start('tester/model', revision)['origin']]))\n"
    )
    with HubStandIn() as hub:
        commit = hub.add("tester/model", first)
        hub.add("tester/model", second)
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(Path(train_cada.__file__).parent)}
        result = subprocess.run([sys.executable, "-c", code, commit], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    pinned, newest = map(json.loads, result.stdout.splitlines()[-2:])
    bias = load_file(saved / "model.safetensors")[BIAS]
    assert pinned == [bias.tolist(), "phrase", None]
    assert newest == [(bias + 1).tolist(), "word", {"start": "x", "licence": None}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda processor: setattr(processor.image_processor, "size", SizeDict(height=64, width=16)),
            r"images of .* \(64, 16\), the model",
        ),
        (lambda processor: processor.tokenizer.add_tokens(["turquoise overcoat"]), "words up to 30525"),
        (lambda processor: setattr(processor.tokenizer, "model_max_length", 99), "texts of at most 99, .* 13"),
        (lambda processor: setattr(processor.tokenizer, "pad_token", "[MASK]"), r"\[PAD\] as 103, the model reads 0"),
    ],
)
def test_a_processor_of_another_model_is_refused(start, tmp_path, change, message, capsys):
    """Its inputs would be read without complaint."""
    processor = load_processor(start)
    check_processor(processor, load_config(start))
    change(processor)
    with pytest.raises(CADAError, match=message):
        check_processor(processor, load_config(start))
    processor.save_pretrained(start)
    assert commands(start, tmp_path)["explain"]() == 1
    assert "Are both of the same checkpoint?" in one_error(capsys)
