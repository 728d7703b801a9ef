"""Files: read with errors that say what is wrong, written whole or not at all. The one-line errors of the commands."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


LOCK = ".lock"
ADAPTER_RECORD = "cada_adapter.json"  # beside an adapter of PEFT: the digest of its base, and its calibration
_UNFINISHED = ".unfinished"  # folder of a checkpoint that is being written
# The names that `save_pretrained` gives; other files of a folder are not ours to remove. By `adapter_config.json` a
# folder is an adapter, so it goes with the weights.
_WEIGHTS = re.compile(r"(adapter_)?(config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?)|cada_adapter\.json")


class CADAError(ValueError):
    """Something that the user can put right. The message names file, row or argument, what is wrong, the remedy."""


def printable(text: str) -> str:
    """A text in one line of a terminal: line ends, escape codes and what else has no form are written like `\\n`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def one_line(error: BaseException) -> str:
    """The message of an error, in one line; the libraries write long ones, and put their own names before ours."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:600]} ..."


def sentence(error: BaseException) -> str:
    """[`one_line`] with a full stop, for another sentence behind it."""
    text = one_line(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def problem_of(error: BaseException) -> str:
    """What an error says, without the number and file name that an `OSError` of the system says as well."""
    return getattr(error, "strerror", None) or one_line(error)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def run_command(command: Callable[[], object]) -> int:
    """Exit status of a command: the number that it returns, 1 after the line `error: ...`, 130 after Ctrl+C."""
    try:
        status = command()
        return status if isinstance(status, int) else 0
    except (CADAError, OSError, MemoryError, SafetensorError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def parse_json(text: str | bytes):
    """`json.loads`, where every fault is a `ValueError`: also NaN, infinity and lists in lists without end."""

    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, parse_constant=reject)
    except RecursionError as error:
        raise ValueError("lists or objects stand in each other too deeply") from error


def read_json(path: str | os.PathLike):
    """The content of a JSON file; a `CADAError` where it is missing, unreadable, not text, or not JSON."""
    path = Path(path)
    if not os.path.isfile(path):  # a named pipe would wait for ever
        raise CADAError(f"{path} is not a file." if os.path.exists(path) else f"{path} does not exist.")
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise CADAError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CADAError(
            f"{path} is not a JSON file in UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8, or fetch it "
            "again."
        ) from error
    except ValueError as error:
        raise CADAError(f"{path} is not a JSON file: {one_line(error)}. Is it complete? Fetch it again.") from error


def make_output_folder(folder: str | os.PathLike) -> Path:
    """Create a folder where it is missing; a `CADAError`, before the work, where it cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        reason = "is a file" if os.path.isfile(folder) else f"cannot be written to: {error.strerror}"
        raise CADAError(f"The output folder {folder} {reason}. Choose another one.") from error
    return folder


def make_new_folder(folder: str | os.PathLike) -> Path:
    """As [`make_output_folder`]; a `CADAError` where the folder holds files, of which none is overwritten."""
    folder = make_output_folder(folder)
    if any(path.name != _UNFINISHED for path in folder.iterdir()):
        raise CADAError(f"{folder} holds files already. Choose a new folder.")
    return folder


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of the content of a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """
    During the block no other process that asks for it writes into `folder`; a `CADAError` where one does. Where one is
    killed, the next may.
    """
    with ExitStack() as lock:
        try:
            lock.enter_context(FileLock(Path(folder) / LOCK, timeout=0))
        except Timeout as error:
            raise CADAError(f"Another process is writing {folder}. Wait for it to end.") from error
        yield


def flush(path: Path) -> None:
    """Onto the disk, so that after a power cut no empty file has the new name."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _not_written(path: Path, error: Exception) -> CADAError:
    return CADAError(
        f"{path} cannot be written: {problem_of(error)}. Nothing was replaced. Is its folder there, and room?"
    )


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary name beside `path`, with its ending. After the block the file takes its place; where it cannot be
    written (a `CADAError`), the block fails, or the process is killed, the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".unfinished-{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def checkpoint_written_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary folder inside `folder` for the files of a checkpoint. After the block they move to `folder`: the old
    weights are removed first and the new ones come last, so that at no moment old and new files load together. A
    `CADAError` where a file cannot be written (`folder` is as before, then), or cannot take its place.
    """
    folder = make_output_folder(folder)
    temporary = folder / _UNFINISHED
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            flush(path)
        try:
            for path in folder.iterdir():
                if _WEIGHTS.fullmatch(path.name):
                    path.unlink()
            # The index of several weight files comes after these in the alphabet.
            for path in sorted(temporary.iterdir(), key=lambda path: (".safetensors" in path.name, path.name)):
                os.replace(path, folder / path.name)
        except OSError as error:
            raise CADAError(
                f"The new files cannot take their places in {folder}: {one_line(error)}. What is there now "
                "is not whole. Choose another folder."
            ) from error
    except (OSError, SafetensorError) as error:
        raise _not_written(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
