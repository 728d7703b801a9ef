"""Lists of images, CSV or JSONL files: their columns as they are written, and in one type each."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cada.files import CADAError, parse_json


LISTS = (".csv", ".jsonl")
PATH_COLUMNS = ("path", "file_name", "image")  # the first that is there names the image
# Cells of a CSV file that are numbers or truth values, if all of their column are. With leading zeros they are no
# numbers but ids, which keep their form.
_KINDS = (
    (r"^-?(0|[1-9][0-9]*)$", pa.int64()),
    (r"(?i)^-?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|inf(inity)?)$", pa.float64()),
    (r"(?i)^(true|false)$", pa.bool_()),
)
_NO_VALUE = pa.array(["", "#N/A", "#NA", "-NaN", "-nan", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"])
_NAMES = {int: "numbers", float: "numbers", bool: "truth values", str: "texts"}


def is_csv(file: Path) -> bool:
    """Whether a list is a CSV file; else it is a JSONL file."""
    return file.suffix.lower() == ".csv"


def read_list(file: Path) -> dict[str, list]:
    """
    The columns of a CSV or JSONL file by their names, without spaces around these. Cells of a CSV file are texts.

    Raises:
        CADAError: where the file cannot be read, in UTF-8 or UTF-16, or has two columns of one name.
    """
    try:
        content = file.read_bytes()
        text = content.decode(json.detect_encoding(content))
        columns = [(name.strip(), values) for name, values in (_read_csv if is_csv(file) else _read_jsonl)(text)]
    except UnicodeDecodeError as error:
        raise CADAError(
            f"{file} is not UTF-8: {error.reason} at byte {error.start}. Save the file as UTF-8."
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise CADAError(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}") from error
    names = [name for name, _ in columns if name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CADAError(f"{file} has two columns `{twice}`. Rename one of them.")
    return dict(columns)


def _read_csv(text: str) -> list[tuple[str, list[str]]]:
    """Names and cells of the columns. A `ValueError` or `csv.Error` also where a row is too short or too long."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may be as long as the file
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    if not rows:
        raise ValueError("the file is empty")
    header, *rows = rows
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, and the header {len(header)}.")
    return [(name, [row[column] for row in rows]) for column, name in enumerate(header)]


def _read_jsonl(text: str) -> list[tuple[str, list]]:
    """Names and values of the columns. Raises `ValueError`, also where a row is no object."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(dict(parse_json(line).items()))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"line {number} is no object of JSON ({error}).") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, [row.get(name) for row in rows]) for name in names]


def typed_column(file: Path, name: str, values: list) -> pa.Array:
    """The values of a column in one type: whole numbers, numbers, truth values or text."""
    return _typed_cells(values) if is_csv(file) else _typed_values(f"{file}: the column `{name}`", values)


def _typed_cells(cells: list[str]) -> pa.Array:
    texts = pa.array([cell or None for cell in cells], pa.string())  # an empty cell: no value
    bare = pc.utf8_trim_whitespace(texts)
    bare = pc.if_else(pc.is_in(bare, _NO_VALUE), pa.scalar(None, pa.string()), bare)
    filled = bare.drop_null()
    for pattern, kind in _KINDS if len(filled) else ():
        if pc.all(pc.match_substring_regex(filled, pattern)).as_py():
            try:
                return bare.cast(kind)
            except pa.ArrowInvalid:  # a whole number beyond 2^63 is an id, too
                return texts
    return texts


def _typed_values(place: str, values: list) -> pa.Array:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds & {list, dict}:  # which no index keeps
        return pa.nulls(len(values), pa.list_(pa.null()))
    names = sorted({_NAMES[kind] for kind in kinds})
    if len(names) > 1:
        raise CADAError(f"{place} holds {' and '.join(names)}. Write all of them alike, such as in quotes.")
    try:
        return pa.array(values)
    except (ValueError, OverflowError) as error:
        raise CADAError(f"{place} cannot be kept: {error}. Write its values in quotes.") from error
