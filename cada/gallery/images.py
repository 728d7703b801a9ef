"""The images and videos that an index is made of: files of a folder, or of a list, or rows of a data set."""

import hashlib
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, DatasetDict, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from cada.data.images import image_size, undecoded
from cada.files import CADAError, file_digest, problem_of
from cada.gallery.lists import LISTS, PATH_COLUMNS, is_csv, read_list, typed_column
from cada.gallery.regions import Region
from cada.gallery.video import VideoReader, is_video
from processing_cada import IMAGE_FORMATS


logger = logging.get_logger(__name__)

RESERVED = ("path", "box", "stamp", "digest", "feature")  # columns of an index that are no metadata
# Kinds of images that Pillow does not read, or not everywhere.
_OTHER_IMAGES = ".heic .heif .avif .jxl .svg .dng .cr2 .cr3 .nef .arw .orf .raf .rw2".split()
# Names of folders that systems make beside those with a dot: thumbnails, waste bins, snapshots, what archives leave.
_OF_SYSTEMS = {"@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "lost+found"}
_OF_SYSTEMS |= {"$recycle.bin", "recycler", "system volume information"}
MAX_BYTES = 1_000_000_000  # of an image file: more than any image of `MAX_PIXELS` has, less than the memory


def content_digest(content: bytes) -> str:
    """SHA-256 of the bytes of an image."""
    return hashlib.sha256(content).hexdigest()


class ImageFiles:
    """
    Files of images and videos: those below a folder, or those that a CSV or JSONL file names.

    Attributes:
        hidden: number of image files that the last [`listing`] left out because they are hidden.
    """

    def __init__(self, location: str, root: str | None = None, with_hidden: bool = False):
        self.list = Path(location) if Path(location).suffix.lower() in LISTS else None
        if self.list is None and root is not None:
            raise CADAError(f"--root is for a list of paths (CSV, JSONL), but {location} is a folder.")
        folder = Path(root or (location if self.list is None else self.list.parent))
        if not folder.is_dir():
            raise CADAError(f"The folder {folder} does not exist. Give the folder of the images.")
        self.root, self.with_hidden, self.hidden = folder.resolve(), with_hidden, 0
        self.videos = VideoReader()

    @property
    def is_there(self) -> bool:
        """Whether the folder is."""
        return self.root.is_dir()

    def listing(self) -> tuple[pa.Table, list[tuple[str, str]]]:
        """`path`, `stamp` and metadata of the images in the order of their paths, and what cannot be read."""
        problems = []
        columns = {"path": sorted(self._walk(problems))} if self.list is None else self._read_list()
        return _listing(columns, self._stamp, problems)

    def _stamp(self, name: str) -> str:
        status = os.stat(self.root / name)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is not a file")
        self.file_of(name)
        # Of files that are exchanged, or written with their old times, size and time of writing say nothing.
        return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"

    def file_of(self, name: str) -> Path:
        """The file itself. An `OSError` where a link leads out of the folder."""
        file = (self.root / name).resolve()
        if not file.is_relative_to(self.root):
            raise OSError(f"leads out of {self.root}")
        return file

    def _walk(self, problems: list[tuple[str, str]]) -> Iterator[str]:
        """Names, relative to the folder, of the image files. Appends what looks like images and is left out."""
        Image.init()
        format_of = {ending: name for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
        self.hidden = 0

        def left_out(path: Path) -> bool:
            hidden = any(part[0] == "." or part.lower() in _OF_SYSTEMS for part in path.parts)
            return hidden and not self.with_hidden

        def stop(error: OSError):
            if not left_out(Path(error.filename).relative_to(self.root)):  # those of systems are often closed
                raise CADAError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error

        for folder, subfolders, names in os.walk(self.root, onerror=stop):
            here = Path(folder).relative_to(self.root)
            for path in (here / name for name in subfolders):
                if os.path.islink(self.root / path) and not left_out(path):
                    problems.append((path.as_posix(), "is a link to a folder, which is not followed"))
            for path in (here / name for name in names):
                ending = path.suffix.lower()
                kind = format_of.get(ending)
                if left_out(path):
                    # A name such as ._01.jpg is one that Apple's systems give to what they know of 01.jpg.
                    self.hidden += kind in IMAGE_FORMATS or is_video(path.name)
                elif kind in IMAGE_FORMATS or is_video(path.name):
                    yield path.as_posix()
                elif kind is not None:
                    problems.append((path.as_posix(), f"is no {', '.join(IMAGE_FORMATS)} file but {kind}"))
                elif ending in _OTHER_IMAGES:
                    problems.append((path.as_posix(), "is of a kind that Pillow does not read; make it a JPEG"))

    def _read_list(self) -> dict:
        """The columns of the CSV or JSONL file that an index keeps; `path` is a list of the names of the images."""
        columns = read_list(self.list)
        named_by = next((name for name in PATH_COLUMNS if name in columns), None)
        if named_by is None:
            remedy = " Separate the columns by commas." if is_csv(self.list) and len(columns) == 1 else ""
            raise CADAError(
                f"{self.list} has no column that names the images: one of {', '.join(PATH_COLUMNS)}. It has "
                f"{', '.join(columns)}.{remedy}"
            )
        row_of = {}
        for row, name in enumerate(columns.pop(named_by), start=1):
            if not isinstance(name, str) or not name or "\0" in name:
                raise CADAError(f"{self.list}, row {row}: `{named_by}` is {name!r}. Give the path of an image.")
            path = self.path_of(name)
            if path is None:
                raise CADAError(
                    f"{self.list}, row {row}: {name!r} leads out of {self.root}. Give --root, a folder that holds all "
                    "images, and paths relative to it."
                )
            if path in row_of:
                raise CADAError(f"{self.list}: rows {row_of[path]} and {row} name the same image {path!r}.")
            row_of[path] = row
        typed = {name: typed_column(self.list, name, values) for name, values in columns.items()}
        return {"path": list(row_of), **metadata_columns(typed, str(self.list))}

    def is_video(self, path: str) -> bool:
        """Whether a file is a video, by its ending."""
        return is_video(path)

    def path_of(self, name: str) -> str | None:
        """The path, relative to the root, of an image that a list names; `None` where it leads out of the root."""
        place = Path(os.path.normpath(self.root / name))
        if not place.is_relative_to(self.root):  # by a folder's other name, perhaps
            place = place.parent.resolve() / place.name
        return place.relative_to(self.root).as_posix() if place.is_relative_to(self.root) else None

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of the upright image that holds a region; errors as of [`read`]."""
        file = self.file_of(Region.of(name).path)
        return image_size(BytesIO(self.read(name)) if is_video(file.name) else file)

    def digest(self, path: str) -> str:
        """SHA-256 of a file."""
        return file_digest(self.file_of(path))

    def read(self, name: str) -> bytes:
        """
        The image that holds a region: the bytes of the file, or a frame of the video as an image file. An `OSError`
        where there is none, or links lead out of the folder; a `CADAError` for a video.
        """
        path, _, time = Region.of(name)
        file = self.file_of(path)
        if time is not None:
            return self.videos.read(file, time)
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise OSError(f"has {size:,} bytes, more than {MAX_BYTES:,}")
        return file.read_bytes()


class ImageRows:
    """The column `image` of a data set: a folder written by `save_to_disk`, or a name on the Hub."""

    hidden, is_there = 0, True  # see [`ImageFiles`]

    def __init__(self, location: str, split: str | None = None):
        self.name = location
        try:
            loaded = load_from_disk(location) if Path(location).is_dir() else load_dataset(location)
        except Exception as error:  # the library raises many kinds
            raise CADAError(
                f"{location!r} is no folder, no CSV or JSONL file, and no data set ({type(error).__name__}: {error})."
            ) from error
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise CADAError(f"{location} has the splits {', '.join(loaded)}. Choose one with --split.")
            loaded = loaded[split]
        elif split is not None:
            raise CADAError(f"{location} has no splits, so there is no {split!r}. Leave --split out.")
        if "image" not in loaded.column_names:
            raise CADAError(f"{location} has no column `image`. It has {', '.join(loaded.column_names)}.")
        if not isinstance(loaded.features["image"], ImageFeature):
            raise CADAError(
                f"{location}: the column `image` holds {loaded.features['image']}, no images. Save the data set "
                'after dataset.cast_column("image", datasets.Image()).'
            )
        self.dataset = undecoded(loaded)
        names = [f"{row:08}" for row in range(len(loaded))]
        if "file_name" in loaded.column_names:
            given = {str(name): row for row, name in enumerate(loaded["file_name"]) if name is not None}
            if len(given) == len(loaded):
                names = list(given)
            else:
                logger.warning(
                    f"{location}: the column `file_name` has gaps or doubles; images are named by their row."
                )
        self.row_of = {name: row for row, name in enumerate(names)}

    def listing(self) -> tuple[pa.Table, list[tuple[str, str]]]:
        """`path`, `stamp` and metadata of the images in the order of their paths, and what cannot be read."""
        # Captions are for training: no search asks for them.
        own = ("image", "file_name", "captions")
        others = self.dataset.remove_columns([name for name in own if name in self.dataset.column_names])
        others = others.flatten()
        table = others.with_format("arrow")[:] if others.column_names else pa.table({})
        for number, name in enumerate(table.column_names):
            feature = others.features[name]
            if isinstance(feature, ClassLabel):  # -1 is no class
                classes = pc.if_else(pc.less(table[name], 0), pa.scalar(None, pa.int64()), table[name])
                table = table.set_column(number, name, pc.take(pa.array(feature.names), classes))
        columns = metadata_columns(dict(zip(table.column_names, table.columns)), self.name)
        return _listing({"path": self.row_of, **columns}, self.digest, [])

    def is_video(self, path: str) -> bool:
        """No row is a video, whatever its name."""
        return False

    def path_of(self, name: str) -> str:
        """The name of an image that a list names, which is the same."""
        return name

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of the upright image that holds a region; errors as of [`read`]."""
        return image_size(BytesIO(self.read(name)))

    def digest(self, path: str) -> str:
        """SHA-256 of the bytes of an image."""
        return content_digest(self.read(path))

    def read(self, name: str) -> bytes:
        """The bytes of the image that holds a region; an `OSError` where there are none."""
        path = Region.of(name).path
        if path not in self.row_of:
            raise OSError("is no longer in the data set")
        image = self.dataset[self.row_of[path]]["image"]
        if image is None:
            raise OSError("has no image")
        return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def _listing(columns: dict, stamp_of: Callable[[str], str], problems: list) -> tuple[pa.Table, list[tuple[str, str]]]:
    """`path`, `stamp` and the other columns of the images that have a stamp; `problems` with those that have none."""
    paths, stamps = [], []
    for name in tqdm(columns.pop("path"), "Looking at images", unit="image", leave=False, delay=5):
        path = stamp = None
        try:
            name.encode()
            if Region.of(name).path != name:
                raise OSError("has a name that ends like a box or a time; rename it")
            path, stamp = name, stamp_of(name)
        except UnicodeEncodeError:
            problems.append((name.encode(errors="backslashreplace").decode(), "has a name that is not UTF-8"))
        except OSError as error:
            problems.append((name, problem_of(error)))
        paths.append(path)
        stamps.append(stamp)
    table = pa.table({"path": pa.array(paths, pa.string()), "stamp": pa.array(stamps, pa.string()), **columns})
    return table.filter(table["stamp"].is_valid()).sort_by("path"), problems


def metadata_columns(columns: dict, origin: str) -> dict:
    """Those of `columns` that hold one number, text or truth value per row; no spaces around their names."""
    kept, left_out = {}, []
    for name, column in ((name.strip(), column) for name, column in columns.items()):
        if name in kept:
            raise CADAError(f"{origin} has two columns `{name}`. Rename one of them.")
        if name in ("", "__index_level_0__"):  # of pandas: its numbers of rows
            logger.warning(f"{origin}: a column without a name is left out.")
            continue
        if name in RESERVED:
            raise CADAError(f"{origin} has a column `{name}`, a name that the index needs. Rename it.")
        kind = column.type
        if pa.types.is_boolean(kind):
            kept[name] = column
        elif pa.types.is_integer(kind):
            try:
                kept[name] = column.cast(pa.int64())
            except pa.ArrowInvalid:  # a whole number beyond 2^63 is an id
                kept[name] = column.cast(pa.string())
        elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            numbers = column.cast(pa.float64())
            if pc.any(pc.is_inf(numbers)).as_py():
                logger.warning(f"{origin}: infinite numbers of the column `{name}` count as no value.")
            kept[name] = pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, pa.float64()))
        elif pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            left_out.append(name)
        else:  # strings; of data sets also dates and times
            kept[name] = column.cast(pa.string())
    if left_out:
        logger.warning(f"{origin}: not kept, as they hold more than one value per image: {', '.join(left_out)}.")
    return kept


def describe_source(given: dict, recorded: dict | None) -> dict:
    """
    The record of a source: what is `given` (`location`, `split`, `root`, `hidden`), and for an index that has one
    (`recorded`) its split, root and `hidden` where they are not given. A `CADAError` where `recorded` is another
    source, unless it is given as `moved_source`.
    """
    path, root = Path(given["location"]), given["root"]
    source = {
        "location": str(path.resolve()) if path.exists() else given["location"],
        "split": given["split"],
        "root": None if root is None else str(Path(root).resolve()),
        "hidden": bool(given["hidden"]),
    }
    if recorded is not None:
        is_list, is_data_set = path.suffix.lower() in LISTS, not path.exists() or _is_saved(path)
        source["hidden"] = source["hidden"] or recorded["hidden"]
        source["split"] = source["split"] or (recorded["split"] if is_data_set else None)
        source["root"] = source["root"] or (recorded["root"] if is_list else None)
        changed = [name for name in ("location", "split", "root") if source[name] != recorded[name]]
        if changed and not given["moved_source"]:
            raise CADAError(
                f"The index holds the images of {source_arguments(recorded)}, not of {source_arguments(source)} ("
                f"other {' and '.join(changed)}). Choose another --out; or, if the images have moved or these are to "
                "take their place, add --moved-source."
            )
    return source


def source_arguments(source: dict) -> str:
    """The arguments of the command `index` that name this source."""
    options = [part for name in ("split", "root") if source[name] for part in (f"--{name}", source[name])]
    return shlex.join([source["location"], *options, *(["--hidden"] if source["hidden"] else [])])


def _is_saved(path: Path) -> bool:
    """Whether it is a folder written by `save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_source(source: dict, index: str | os.PathLike | None = None) -> ImageFiles | ImageRows:
    """
    The images that [`describe_source`] describes; `index` is the folder of the index that has them in its record. A
    `CADAError` where they are not there, or not of the kind that the arguments are for.
    """
    location, path = source["location"], Path(source["location"])
    for place in (location, source["root"]):
        if index is not None and place is not None and os.path.isabs(place) and not os.path.exists(place):
            again = shlex.join(["NEW", "--out", os.fspath(index)])
            raise CADAError(
                f"The images of the index {index} were in {place}, which is not there. Is its disk mounted? If they "
                f"have moved: cada index {again} --moved-source"
            )
    if path.exists() and not _is_saved(path):
        if source["split"] is not None:
            raise CADAError(f"--split is for a data set, but {location} is none.")
        if path.is_file() and path.suffix.lower() not in LISTS:
            raise CADAError(f"{location} is neither a folder nor a list ({', '.join(LISTS)}).")
        return ImageFiles(location, source["root"], source["hidden"])
    # No name on the Hub, or one that begins with a folder of this machine: do not search it for a typing error.
    if not path.exists() and (location.count("/") != 1 or path.is_absolute() or path.parent.is_dir()):
        raise CADAError(f"{location!r} is no folder, no CSV or JSONL file, and no data set. Correct the name.")
    return ImageRows(location, source["split"])
