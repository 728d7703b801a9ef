"""
Index person images, and find among them who fits a sentence, or who is on another image.

    cada index FOLDER --model demo/model --out INDEX
    cada search INDEX "a man in a red coat" --picture out.png

The images may lie in a folder (with subfolders), be named by a CSV or JSONL file together with metadata, or be the
column `image` of a data set. The same as a library: [`build_index`], [`open_index`], [`GalleryIndex`].

An index is a folder. `index.json` names its present table, so replacing this one file is the step from the old state
to the new one. Images are encoded in shards; finished ones wait in `pending/`, and the next run takes them up.
"""

import datetime
import os
import platform
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import RLock
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.environment import parse_flag_from_env
from transformers.utils import logging

from cada.files import CADAError, counted, make_output_folder, only_writer
from cada.gallery.images import describe_source, open_source
from cada.gallery.persons import Persons, person_settings
from cada.gallery.search import GalleryIndex, load_model_of_index
from cada.gallery.store import (
    FORMAT,
    PATCHES,
    PENDING,
    RECORD,
    check_output,
    index_settings,
    read_record,
    shard_files,
)
from cada.gallery.update import Changes, IndexOptions, Update, encode_shards
from cada.hub.convert import origin_of
from cada.hub.loading import commit_of
from configuration_cada import CADAConfig


logger = logging.get_logger(__name__)

_WAIT = datetime.timedelta(days=7)  # for the slowest process; a dead one ends the others anyway


def build_index(source: str | os.PathLike, index: str | os.PathLike, model: str | None = None, **options) -> Changes:
    """
    Encode the images of `source` into the folder `index`, or bring an index up to date: new and changed images are
    encoded, removed ones dropped, all others left alone. An image that cannot be read is named and left out.

    An interruption at any moment leaves the old state, and the shards that were finished are not encoded again. Under
    `accelerate launch` all processes share the shards; the result is that of one process.

    Args:
        source: a folder; a CSV or JSONL file with a column `path` (or `file_name`, `image`) and metadata; or a data
            set with a column `image`, saved by `save_to_disk` or on the Hub.
        index: folder of the index.
        model: the checkpoint, of CADA or a `BlipForImageTextRetrieval`; an old index knows its own.
        options: fields of [`IndexOptions`].

    Raises:
        CADAError: where `source` holds no image, the index belongs to another model or source, `index` holds other
            files, another run is at work, or the model cannot be loaded.
    """
    options = IndexOptions(**options)
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state, index = PartialState(cpu=use_cpu, timeout=_WAIT), Path(index)
    record = read_record(index)
    if model is not None and Path(model).is_dir():
        model = str(Path(model).resolve())  # an index is searched from anywhere
    given = vars(options) | {"location": os.fspath(source), "model": model}
    settings = index_settings(index, record, given)
    settings["revision"] = commit_of(settings["model"], settings["revision"])
    place = describe_source(given, record and record["source"])
    settings["persons"] = person_settings(given, record and record["persons"])
    check_output(index, place, record is None)
    images = open_source(place, index if record is not None and place == record["source"] else None)
    make_output_folder(index)  # what keeps from writing shows now, not after the work
    network, processor, digest = load_model_of_index(settings["model"], settings["revision"], state.device, record)
    for folder in (PENDING, PATCHES) if settings["keep_patches"] else (PENDING,):
        (index / folder).mkdir(exist_ok=True)
    new = {**settings, "origin": origin_of(settings["model"], settings["revision"]), "digest": digest, "source": place}
    with only_writer(index) if state.is_main_process else nullcontext():
        update, plan = None, None
        if state.is_main_process:
            persons = Persons(images, settings["persons"], index, state.device, options.check_content)
            update = _begin(index, record, new, network.config, persons)
            plan = update.plan(record is None, options)
        plan = broadcast_object_list([plan])[0]
        part = plan[state.process_index :: state.num_processes]
        encode_shards(network, processor, images, part, index, new, options, state.is_main_process)
        state.wait_for_everyone()
        changes = update and update.commit([name for name, _ in plan])
    return broadcast_object_list([changes])[0]


def _begin(index: Path, record: dict | None, new: dict, config: CADAConfig, persons: Persons) -> Update:
    """The update of an index whose record becomes one with the fields `new`; for the only process that writes it."""
    if read_record(index) != record:
        raise CADAError(f"Another process has changed {index} meanwhile. Run the command again.")
    # Of Milvus. The same for each run of this command, also where the first one is killed.
    name = uuid5(NAMESPACE_URL, f"{platform.node()}{index.resolve()}{new['digest']}{new['approximate']}")
    first = {"format": FORMAT, "dimension": config.projection_dim, "collection": f"cada_{name.hex[:16]}"}
    vision = config.vision_config if new["keep_patches"] else None
    return Update(index, (record or first) | new, persons, vision)


def open_index(index: str | os.PathLike, model: str | None = None, device: str | None = None) -> "GalleryIndex":
    """
    An index to search in.

    Args:
        index: folder written by [`build_index`].
        model: the checkpoint, where it is no longer where it was; its weights have to be the same.
        device: of the model; the GPU where there is one.

    Raises:
        CADAError: where the folder holds no index, or a damaged one.
    """
    folder = Path(index)
    while record := read_record(folder):
        try:
            return GalleryIndex(folder, record, model or record["model"], device)
        except CADAError:
            if read_record(folder) == record:
                raise
            # Else it was brought up to date at this moment.
    again = f"cada index ... --out {shlex.quote(str(folder))}"
    if finished := len(shard_files(folder)):
        raise CADAError(
            f"{index} holds no index yet, but {counted(finished, 'finished shard')} of an interrupted run. Run the "
            f"same command again to go on: {again}"
        )
    raise CADAError(f"{index} holds no index ({RECORD}). Make one: {again}")


class LiveIndex:
    """
    An index that is opened again once `cada index` has brought its folder up to date. It answers several threads, one
    after the other, as an index has one model.

    Attributes:
        gallery: the index as it was opened last.
    """

    def __init__(self, gallery: GalleryIndex):
        self.gallery, self._lock = gallery, RLock()

    def _present(self) -> GalleryIndex:
        old = self.gallery
        if read_record(old.folder) != old.record:
            self.gallery = open_index(old.folder, old.model_name, old.device)
            if self.gallery.record["digest"] == old.record["digest"]:
                self.gallery._loaded = old._loaded
        return self.gallery

    def ask(self, question: Callable[[GalleryIndex], Any]) -> Any:
        """What `question(index)` gives; asked once more where it fails because the index is replaced meanwhile."""
        with self._lock:
            gallery = self._present()
            try:
                return question(gallery)
            except Exception:  # files of the old state may be gone, and each library has its own error for that
                if self._present() is gallery:
                    raise
            return question(self.gallery)
