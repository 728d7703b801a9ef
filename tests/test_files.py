"""JSON with clear errors, files written whole or not at all, the one-line errors of the commands."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import small_disk, without_rights
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import cada.files
from cada.files import (
    CADAError,
    checkpoint_written_whole,
    make_new_folder,
    make_output_folder,
    parse_json,
    read_json,
    run_command,
    sentence,
    written_whole,
)
from configuration_cada import CADAConfig


ROOT = Path(cada.files.__file__).parents[1]


@pytest.fixture
def closed_folder():
    """A folder that may be read and not written to."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        yield Path(name)
        os.chmod(name, 0o755)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_each_unicode_encoding(tmp_path, encoding):
    content = [{"caption": "a man, 红色外套, Größe"}]
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON file"),
        (b'[{"a": 1}', "Is it complete"),
        ('["Größe"]'.encode("latin-1"), "is not a JSON file in UTF-8: .* at byte 4. Save it as UTF-8"),
        (b"[" * 100_000, "too deeply"),
        (b"[NaN]", "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number of JSON"),
        (b"[" + b"9" * 10_000 + b"]", "is not a JSON file: Exceeds the limit"),
        (b"\x80\x04\x95", "is not a JSON file"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CADAError, match=f"a.json {message}" if message.startswith("is") else message):
        read_json(tmp_path / "a.json")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(CADAError, match="is not a file"):
            read_json(tmp_path / name)
    with pytest.raises(CADAError, match="nowhere does not exist"):
        read_json(tmp_path / "nowhere")


def test_file_without_the_right_to_read(closed_folder):
    os.chmod(closed_folder, 0o755)
    (closed_folder / "a.json").write_text("[]")
    os.chmod(closed_folder / "a.json", 0)
    with without_rights(), pytest.raises(CADAError, match="a.json cannot be read: Permission denied"):
        read_json(closed_folder / "a.json")


@given(st.binary(max_size=40) | st.text(max_size=40))
@settings(max_examples=300)
def test_any_bytes_are_json_or_a_value_error(content):
    try:
        parse_json(content)
    except ValueError:
        pass


def test_written_whole_replaces_at_the_end_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.suffix == ".txt"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(CADAError, match="a.txt cannot be written: File too large"), small_disk(1000):
        with written_whole(path) as temporary:
            temporary.write_bytes(bytes(5000))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def save_checkpoint(folder: Path, value: float, shards: int = 1) -> None:
    (folder / "config.json").write_text(json.dumps(value))
    for number in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({"weight": np.full(1000, value, dtype=np.float32)}, folder / name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text("{}")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CADAError, match="cannot take their places.*config.json.*is not whole"):
        with checkpoint_written_whole(tmp_path) as folder:
            (folder / "config.json").write_text("{}")


def test_checkpoint_is_replaced_as_a_whole(tmp_path):
    """Weights of an earlier one that the new one has no file for do not stay; what is not of a checkpoint does."""
    (tmp_path / "notes.txt").write_text("mine")
    save_file({"x": np.zeros(1)}, tmp_path / "mine.safetensors")
    with checkpoint_written_whole(tmp_path) as folder:
        save_checkpoint(folder, 1.0, shards=2)
    with checkpoint_written_whole(tmp_path) as folder:
        save_checkpoint(folder, 2.0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "mine.safetensors", "model.safetensors", "notes.txt"]
    assert json.loads((tmp_path / "config.json").read_text()) == 2.0


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    with checkpoint_written_whole(tmp_path) as folder:
        save_checkpoint(folder, 1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CADAError, match="cannot be written: .*Nothing was replaced"), small_disk(1000):
        with checkpoint_written_whole(tmp_path) as folder:
            save_checkpoint(folder, 2.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_killed_while_a_checkpoint_is_written(tmp_path):
    """The old one stays; the next run clears what was left."""
    with checkpoint_written_whole(tmp_path) as folder:
        save_checkpoint(folder, 1.0)
    code = (
        "import os, signal, sys; from pathlib import Path; from cada.files import checkpoint_written_whole\n"
        "with checkpoint_written_whole(sys.argv[1]) as folder:\n"
        "    (folder / 'config.json').write_text('2.0'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "config.json").read_text()) == 1.0 and (tmp_path / "model.safetensors").is_file()
    with checkpoint_written_whole(tmp_path) as folder:
        save_checkpoint(folder, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_output_folder_is_tried_first(tmp_path, closed_folder):
    assert make_output_folder(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(CADAError, match="file is a file. Choose another"):
        make_output_folder(tmp_path / "file")
    with pytest.raises(CADAError, match="cannot be written to: Not a directory"):
        make_output_folder(tmp_path / "file" / "below")
    with without_rights(), pytest.raises(CADAError, match="cannot be written to: Permission denied"):
        make_output_folder(closed_folder)


def test_a_new_folder_holds_nothing(tmp_path):
    """What a command that was killed has begun does not count."""
    (tmp_path / ".unfinished").mkdir()
    assert make_new_folder(tmp_path) == tmp_path and make_new_folder(tmp_path / "new").is_dir()
    (tmp_path / ".hidden").touch()
    with pytest.raises(CADAError, match="holds files already. Choose a new folder"):
        make_new_folder(tmp_path)


def test_errors_of_libraries_are_sentences():
    assert sentence(OSError(2, "No such file")) == "[Errno 2] No such file."
    assert sentence(ValueError("Is it\nwhole?")) == "Is it whole?"
    for fields, message in (({"mask_rate": 2.0}, "CADAConfig: `mask_rate`"), ({"rerank_k": "a"}, "Field 'rerank_k'")):
        with pytest.raises(StrictDataclassError) as caught:
            CADAConfig(**fields)
        assert sentence(caught.value).startswith(message)


def test_commands_report_in_one_line(capsys):
    def fail(error):
        raise error

    assert run_command(lambda: None) == 0 and run_command(lambda: 3) == 3 and run_command(lambda: {"R1": 1.0}) == 0
    for error in (CADAError("first\nsecond"), PermissionError(13, "Permission denied", "a.txt"), MemoryError()):
        assert run_command(lambda error=error: fail(error)) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "error: first second"
    assert second == "error: [Errno 13] Permission denied: 'a.txt'"
    assert third == "error: MemoryError"
