"""
Publish a trained model: check the folder, write the model card from the run, push both to the Hub.

    cada publish runs/cuhk org/cada-cuhk --tag v1.0

`train_cada.py` leaves a record of every run, `cada_run.json`, beside the weights. The card is written from it, and an
evaluation counts only for the very weights that it was made with. Only the files that loading needs are published: no
pickles, no optimizer states.
"""

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import logging

from cada.files import CADAError, one_line, read_json, written_whole
from cada.hub.card import model_card
from cada.hub.loading import check_config, weight_files
from cada.hub.record import NO_LICENCE, RUN_FILE, checkpoint_digest, evaluations_of, read_run


logger = logging.get_logger(__name__)
RELEASED = (
    *("README.md", RUN_FILE, "config.json", "*_cada.py", "*.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def _code_of(config, path: Path) -> set[str]:
    """The code files that `auto_map` of a configuration, the content of `path`, names."""
    references = config.get("auto_map", {}) if isinstance(config, dict) else None
    if not isinstance(references, dict) or not all(isinstance(name, str) for name in references.values()):
        raise CADAError(f"`auto_map` in {path} is damaged. Save model and processor again.")
    return {f"{reference.split('.')[0]}.py" for reference in references.values()}


def release_files(folder: str | os.PathLike) -> list[str]:
    """
    Names of the files of `folder` that a release consists of.

    Raises:
        CADAError: where something is missing or damaged that loading the model needs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CADAError(f"The folder {folder} does not exist. Give the --output_dir of a training run.")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for needed in ("config.json", "processor_config.json", "tokenizer.json"):
        if needed not in names:
            raise CADAError(
                f"{folder} holds no {needed}. Save model and processor there: model.save_pretrained, "
                "processor.save_pretrained."
            )
    try:
        weights = {path.name for path in weight_files(folder)}
        code = _code_of(check_config(folder), folder / "config.json")
        if code:
            code |= _code_of(read_json(folder / "processor_config.json"), folder / "processor_config.json")
        for name in sorted(code & set(names)):
            code |= {f"{module}.py" for module in get_relative_imports(folder / name)}
    except (OSError, UnicodeDecodeError) as error:
        raise CADAError(f"The code in {folder} cannot be read: {one_line(error)}. Save the model again.") from error
    missing = sorted(code - set(names)) if code else ["auto_map in config.json"]
    if missing:
        raise CADAError(
            f"{folder} lacks {', '.join(missing)}, so nobody can load the model without this package. Save it again "
            "with model.save_pretrained and processor.save_pretrained."
        )
    released = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in RELEASED)]
    return [name for name in released if not name.endswith(".safetensors") or name in weights]


def check_names(repo_id: str, tag: str | None = None) -> None:
    """The Hub refuses other names of repositories, Git other tags: better before the work than after it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CADAError(f"{repo_id!r} is no name of a repository on the Hub: {one_line(error)}") from error
    if tag is not None and not re.fullmatch(r"\w([.+/-]?\w)*(?<!\.lock)", tag, re.ASCII):
        raise CADAError(
            f"{tag!r} is no name of a tag. Give letters, digits and '_', with one '.', '-', '+' or '/' between, such "
            "as v1.0."
        )


def open_repository(
    repo_id: str,
    tag: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> tuple[str, list[str]]:
    """
    Create the repository where it does not exist. Returns its full name and the files that it holds.

    Raises:
        CADAError: where a name is not one for the Hub, the repository cannot be written to, has the tag already,
            or holds weights and `overwrite` is not set.
    """
    check_names(repo_id, tag)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        present = api.list_repo_files(repo_id)
        tags = {reference.name for reference in api.list_repo_refs(repo_id).tags}
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise CADAError(
            f"Cannot open {repo_id} on the Hub: {one_line(error)} Check the connection, and run `hf auth login` with "
            "a token that may write there."
        ) from error
    if tag in tags:
        raise CADAError(f"{repo_id} has the tag {tag} already. Choose another; a published state should not change.")
    weights = [name for name in present if name.endswith((".safetensors", *PICKLES))]
    if weights and not overwrite:
        raise CADAError(
            f"{repo_id} holds {', '.join(weights)} already, and this push would overwrite it. Pass --overwrite (with "
            "train_cada.py --hub_overwrite), or choose another name. The history keeps old states."
        )
    return repo_id, present


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    tag: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | None = None,
    evaluations: list[dict] = (),
    licence_granted: bool = False,
) -> str:
    """
    Push a checkpoint with its card. The card's snippet pins the tag, or the commit that holds the weights.

    Args:
        folder: the checkpoint, with the record of its run; its README.md is written anew.
        repo_id: `org/name`.
        tag: a name for this state, such as `"v1.0"`.
        private: whether a new repository is private.
        overwrite: whether weights that are in the repository already may be replaced, and pickled ones deleted.
        token: of the Hub; by default the one of `hf auth login`.
        evaluations: further rows of the card's table, from the records of other runs.
        licence_granted: whether somebody who may has allowed to publish weights that come without a licence.

    Returns:
        The revision that the card pins.

    Raises:
        CADAError: where the folder is not complete, the tag exists, or the push would overwrite.
    """
    folder, api = Path(folder), HfApi(token=token)
    release_files(folder)
    check_licence(read_run(folder)["origin"], licence_granted)
    model_card(folder, repo_id, tag or "main", evaluations)  # what is wrong with the record shows before the push
    repo_id, present = open_repository(repo_id, tag, private, token, overwrite)
    try:
        return _push(api, folder, repo_id, tag, evaluations, [name for name in present if name.endswith(PICKLES)])
    except CADAError:
        raise
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise CADAError(
            f"The push to {repo_id} broke off: {one_line(error)} Run the command again with --overwrite; nothing is "
            "tagged yet."
        ) from error


def check_licence(origin: dict | None, licence_granted: bool) -> None:
    """Weights converted from a checkpoint without licence are for their user alone, unless somebody allowed more."""
    if origin and origin["licence"] == NO_LICENCE and not licence_granted:
        raise CADAError(
            f"These weights started from {origin['start']}, which comes without a licence: you may use them, not "
            "publish them. If the authors have allowed it, pass --licence-granted."
        )


def _push(api: HfApi, folder: Path, repo_id: str, tag: str | None, evaluations: list[dict], pickles: list[str]) -> str:
    """Upload, tag; returns the revision that the card pins."""
    commit = None
    if tag is None:  # the card names the commit that holds the weights, so they go first
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[name for name in release_files(folder) if name != "README.md"],
            commit_message="Model and processor",
        ).oid
    revision = tag or commit
    with written_whole(folder / "README.md") as path:
        model_card(folder, repo_id, revision, evaluations).save(path)
    release = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=release_files(folder),
        delete_patterns=pickles,  # weights in the old form, pickled arguments: nothing of a release is unpickled
        commit_message=f"Release {tag}" if tag else "Model card",
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=release.oid)  # this state, whatever main has become since
    return revision


def evaluations_of_others(
    checkpoint: str | os.PathLike, repo_id: str, tag: str | None, folders: Iterable[str | os.PathLike]
) -> list[dict]:
    """
    The evaluations of these weights that other runs have left in `folders`.

    Raises:
        CADAError: where a folder holds none, the checkpoint is not complete, or a name is not one for the Hub: what is
            wrong shows before anything is written.
    """
    check_names(repo_id, tag)
    release_files(checkpoint)
    digest, further = checkpoint_digest(checkpoint), []
    for folder in folders:
        rows = evaluations_of(digest, folder)
        if not rows:
            raise CADAError(
                f"{folder} holds no {RUN_FILE} with an evaluation of the weights in {checkpoint}. Run "
                f"train_cada.py --do_predict --model_name_or_path {checkpoint} --output_dir {folder}."
            )
        further += rows
    return further


def write_card(
    checkpoint: str | os.PathLike, repo_id: str, tag: str | None, evaluations: list[dict]
) -> tuple[Path, list[str]]:
    """Write README.md into the folder. Returns its path, and the names of the files that a push would publish."""
    card = model_card(checkpoint, repo_id, tag or "main", evaluations)
    path = Path(checkpoint) / "README.md"
    with written_whole(path) as temporary:
        card.save(temporary)
    return path, release_files(checkpoint)
