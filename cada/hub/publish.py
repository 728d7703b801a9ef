"""
Publish a trained model: check the folder, write the model card from the run, push both to the Hub.

    cada publish runs/cuhk org/cada-cuhk --tag v1.0

`train_cada.py` leaves a record of every run, `cada_run.json`, beside the weights. The card is written from it, and an
evaluation counts only for the very weights that it was made with. Only the files that loading needs are published: no
pickles, no optimizer states.
"""

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import ADAPTER_CONFIG_NAME

from cada.files import ADAPTER_RECORD, CADAError, one_line, sentence, written_whole
from cada.hub.card import model_card
from cada.hub.loading import base_of, check_config, find_adapter, weight_files
from cada.hub.record import NO_LICENCE, RUN_FILE, checkpoint_digest, evaluations_of, read_run


CODE = tuple(f"{name}_cada.py" for name in ("configuration", "losses", "modeling", "pipeline", "processing"))
SETTINGS = ("config.json", "modules.json", "processor_config.json", "sentence_bert_config.json", "tokenizer.json")
OPTIONAL = ("README.md", RUN_FILE, ADAPTER_RECORD, "model.safetensors.index.json", "tokenizer_config.json")
AUTO_MODEL = "modeling_cada.CADAForTextToImageRetrieval"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def release_files(folder: str | os.PathLike) -> list[str]:
    """Names of the files of `folder` that a release consists of; a `CADAError` where one is missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CADAError(f"The folder {folder} does not exist. Give the --output_dir of a training run.")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    adapter = find_adapter(folder)
    settings = SETTINGS if adapter is None else (ADAPTER_CONFIG_NAME, *SETTINGS[1:])
    config = check_config(folder) if adapter is None else {"auto_map": {"AutoModel": AUTO_MODEL}}  # of the base
    if adapter is not None and os.path.isdir(base_of(adapter)[0]):
        raise CADAError(
            f"The adapter {folder} rests on {base_of(adapter)[0]}, which nobody else has. Publish what `cada merge` "
            "makes of it; or publish the base, and write its name on the Hub into adapter_config.json."
        )
    for needed in settings:
        if needed not in names:
            raise CADAError(
                f"{folder} holds no {needed}. Save model and processor there: model.save_pretrained, "
                "processor.save_pretrained."
            )
    weights = [path.name for path in weight_files(folder)]
    missing = [name for name in CODE if name not in names]
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or auto_map.get("AutoModel") != AUTO_MODEL:
        missing.append("auto_map in config.json")
    if missing:
        raise CADAError(
            f"{folder} lacks {', '.join(missing)}, so nobody can load the model without this package. Save it again "
            "with model.save_pretrained and processor.save_pretrained."
        )
    return sorted([*settings, *CODE, *weights, *names.intersection(OPTIONAL)])


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
    Create the repository where it does not exist. Returns its full name and the files that it holds. A `CADAError`
    where it cannot be written to, has the tag already, or holds weights and `overwrite` is not set.
    """
    check_names(repo_id, tag)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        present = api.list_repo_files(repo_id)
        tags = {reference.name for reference in api.list_repo_refs(repo_id).tags}
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise CADAError(
            f"Cannot open {repo_id} on the Hub: {sentence(error)} Check the connection, and run `hf auth login` with "
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
    Push a checkpoint with its card. Returns the revision that the card pins: the tag, or the commit of the weights.

    Args:
        folder: the checkpoint, with the record of its run; its README.md is written anew.
        repo_id: `org/name`.
        tag: a name for this state, such as `"v1.0"`.
        private: whether a new repository is private.
        overwrite: whether weights that are in the repository already may be replaced, and pickled ones deleted.
        token: of the Hub; by default the one of `hf auth login`.
        evaluations: further rows of the card's table, from the records of other runs.
        licence_granted: whether somebody who may has allowed to publish weights that come without a licence.

    Raises:
        CADAError: where the folder is not complete, the tag exists, or the push would overwrite.
    """
    folder = Path(folder)
    release_files(folder)
    check_licence(read_run(folder)["origin"], licence_granted)
    model_card(folder, repo_id, tag or "main", evaluations)  # what is wrong with the record shows before the push
    repo_id, present = open_repository(repo_id, tag, private, token, overwrite)
    # Pickles, and what would make an adapter of a whole checkpoint.
    old = [name for name in present if name.endswith(PICKLES) or name == ADAPTER_CONFIG_NAME]
    try:
        return _push(HfApi(token=token), folder, repo_id, tag, evaluations, old)
    except CADAError:
        raise
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise CADAError(
            f"The push to {repo_id} broke off: {sentence(error)} Run the command again with --overwrite; nothing is "
            "tagged yet."
        ) from error


def check_licence(origin: dict | None, licence_granted: bool) -> None:
    """Weights converted from a checkpoint without licence are for their user alone, unless somebody allowed more."""
    if origin and origin["licence"] == NO_LICENCE and not licence_granted:
        raise CADAError(
            f"These weights started from {origin['start']}, which comes without a licence: you may use them, not "
            "publish them. If the authors have allowed it, pass --licence-granted."
        )


def _push(api: HfApi, folder: Path, repo_id: str, tag: str | None, evaluations: list[dict], old: list[str]) -> str:
    """Upload, tag; returns the revision that the card pins."""
    revision, upload = tag, partial(api.upload_folder, repo_id=repo_id, folder_path=folder)
    if tag is None:  # the card names the commit that holds the weights, so they go first
        files = [name for name in release_files(folder) if name != "README.md"]
        revision = upload(allow_patterns=files, commit_message="Model and processor").oid
    write_card(folder, repo_id, revision, evaluations)
    message = f"Release {tag}" if tag else "Model card"
    release = upload(allow_patterns=release_files(folder), delete_patterns=old, commit_message=message)
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=release.oid)  # this state, whatever main has become since
    return revision


def evaluations_of_others(
    checkpoint: str | os.PathLike, repo_id: str, tag: str | None, folders: Iterable[str | os.PathLike]
) -> list[dict]:
    """The evaluations of these weights in `folders` of other runs; what is wrong shows before anything is written."""
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


def write_card(folder: str | os.PathLike, repo_id: str, revision: str, evaluations: list[dict]) -> Path:
    """Write README.md into the folder. Returns its path."""
    card = model_card(folder, repo_id, revision, evaluations)
    with written_whole(Path(folder) / "README.md") as path:
        card.save(path)
    return Path(folder) / "README.md"
