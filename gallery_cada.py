"""
Index a folder of person images, and find in it who fits a sentence.

    python gallery_cada.py index FOLDER --model demo/model --out INDEX
    python gallery_cada.py search INDEX "a man in a red coat" --picture out.png

(work in progress: the public names and signatures below are final)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image


class GalleryError(ValueError):
    """Something is wrong with an index or its images. The message names the file or argument and the remedy."""


@dataclass(frozen=True)
class Result:
    """
    A ranked image.

    Attributes:
        path: of the image, relative to the indexed folder; of a data set its `file_name` or row number.
        score: what it is ranked by: S_G + S_L where `stage` is `"local"`, S_G where it is `"global"`.
        stage: `"local"` for candidates that the decoder has read with the sentence; they rank before all others.
        metadata: the other columns of the list or data set, by name.
    """

    path: str
    score: float
    stage: str
    metadata: dict


@dataclass
class Changes:
    """What [`build_index`] did: numbers of images, and `(path, problem)` of every image that cannot be read."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def build_index(
    source: str | os.PathLike,
    index: str | os.PathLike,
    model: str | None = None,
    *,
    split: str | None = None,
    root: str | os.PathLike | None = None,
    store: str | None = None,
    uri: str | None = None,
    faiss: str | None = None,
    keep_patches: bool | None = None,
    batch_size: int = 64,
    workers: int = 0,
    shard_size: int = 1024,
    progress: bool = True,
) -> Changes:
    """
    Encode the images of `source` into the folder `index`, or bring an index up to date: new and changed images are
    encoded, removed ones dropped, all others left alone. Finished shards survive an interruption.

    Raises:
        GalleryError: where `source` holds no image, or the index belongs to another model.
    """
    raise NotImplementedError


def open_index(index: str | os.PathLike, model: str | None = None, device: str | None = None) -> "GalleryIndex":
    """
    An index to search in.

    Args:
        index: folder written by [`build_index`].
        model: the checkpoint, where it is no longer where it was; its weights have to be the same.
        device: of the model; the GPU where there is one.

    Raises:
        GalleryError: where the folder holds no index.
    """
    raise NotImplementedError


class GalleryIndex:
    """
    An index, opened by [`open_index`]. `len(index)` is its number of images.

    Attributes:
        columns: name and type of the metadata columns, which `where` can ask for.
        model, processor: the checkpoint, loaded at first use. A `GalleryError` where its weights are others.
    """

    columns: dict[str, str]

    def search(
        self, sentences: Sequence[str], top: int = 10, rerank: int | None = None, where: Sequence[str] = ()
    ) -> list[list[Result]]:
        """
        The `top` images for every sentence, best first.

        Args:
            sentences: any number of them.
            top: images per sentence.
            rerank: how many candidates of the global ranking the decoder reads; `config.rerank_k` by default, 0 for
                none.
            where: conditions on metadata, such as `"camera=3"`; operators `=`, `!=`, `<`, `>`. All have to hold. They
                count before ranking.

        Raises:
            GalleryError: for an empty sentence, an unknown column, or a candidate whose image file is gone.
        """
        raise NotImplementedError

    def search_image(self, image: Image.Image, top: int = 10, where: Sequence[str] = ()) -> list[Result]:
        """The `top` images most similar to `image` by global features: the same person, if the gallery shows them."""
        raise NotImplementedError

    def image(self, path: str) -> Image.Image:
        """The image of the gallery named `path`, upright. A `GalleryError` for anything that is not in the index."""
        raise NotImplementedError

    def info(self) -> dict:
        """Images, model, source, store, columns, size on disk."""
        raise NotImplementedError

    def verify(self, progress: bool = True) -> list[tuple[str, str]]:
        """Compare the content of every image with what was indexed. Returns `(path, problem)`; empty if all is well."""
        raise NotImplementedError

    def export(self, path: str | os.PathLike) -> int:
        """Write paths, metadata and features as a Parquet file; returns the number of rows."""
        raise NotImplementedError


def draw_results(
    gallery: GalleryIndex,
    rankings: dict[str, list[Result]],
    caption: Callable[[str, Result], tuple[str, bool]] | None = None,
    height: int = 192,
) -> Image.Image:
    """
    A picture: under every title of `rankings` its ranked images, with their scores.

    Args:
        caption: gives a text for below an image (lines apart by newlines) and whether to set it in green, from the
            title and the result; by default the score.
        height: of the images in pixels.
    """
    raise NotImplementedError
