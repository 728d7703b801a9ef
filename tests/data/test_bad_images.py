"""Images of every kind and damage: the colours that a viewer shows, or an error that names what is wrong."""

import io
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import bert_tokenizer, tiny_processor, tried
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cada import cli
from cada.data.images import image_size, open_image
from cada.data.loading import load_pairs_dataset
from cada.data.pairs import read_row
from cada.files import CADAError
from processing_cada import MAX_PIXELS, upright


def in_format(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, chunks: bytes = b"") -> bytes:
    """A PNG file of `rows` without filters. `colour`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def opened(content: bytes) -> Image.Image:
    return open_image({"bytes": content, "path": None})


def pixels(content: bytes) -> list:
    """RGB of the first row."""
    return np.asarray(opened(content))[0].tolist()


RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]


def test_16_bits_of_grey_are_scaled_and_not_cut():
    """0x8000 is the middle of the range; Pillow's own conversion gives white for everything above 255."""
    values = [0, 0x0100, 0x8000, 0xFFFF]
    expected = [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    assert pixels(png(4, 1, 16, 0, b"\0" + struct.pack(">4H", *values))) == expected
    image = Image.fromarray(np.array([values], dtype=np.uint16))
    assert image.mode == "I;16"
    assert pixels(in_format(image, "TIFF")) == expected
    assert pixels(b"P5 4 1 65535\n" + struct.pack(">4H", *values)) == expected  # PGM
    assert (
        pixels(png(4, 1, 16, 2, b"\0" + struct.pack(">12H", *(value for value in values for _ in range(3)))))
        == expected
    )
    assert (
        pixels(png(4, 1, 16, 4, b"\0" + struct.pack(">8H", *sum(([value, 0xFFFF] for value in values), []))))
        == expected
    )


def test_transparent_parts_are_white_and_not_what_is_hidden_there():
    hidden = Image.new("RGBA", (2, 1), (0, 255, 0, 0))
    hidden.putpixel((1, 0), (255, 0, 0, 255))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert pixels(in_format(hidden, kind, **options)) == [WHITE, RED], kind
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert pixels(in_format(half, "PNG")) == [[255, 127, 127]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(in_format(grey, "PNG")) == [WHITE]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(in_format(palette, kind, transparency=0)) == [WHITE, RED], kind
    key = png(2, 1, 8, 2, b"\0" + bytes(GREEN + RED), png_chunk(b"tRNS", struct.pack(">3H", *GREEN)))
    assert pixels(key) == [WHITE, RED]
    key = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 0x1234, 0x1200), png_chunk(b"tRNS", struct.pack(">H", 0x1234)))
    assert pixels(key) == [WHITE, [0x12] * 3]


def test_other_modes_have_the_colours_that_a_viewer_shows():
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert pixels(in_format(cmyk, "TIFF")) == [RED]
    (colour,) = pixels(in_format(cmyk, "JPEG", quality=100))
    assert np.abs(np.subtract(colour, RED)).max() <= 3
    assert pixels(in_format(Image.new("1", (1, 1), 1), "PNG")) == [WHITE]
    assert pixels(in_format(Image.new("L", (1, 1), 7), "PNG")) == [[7, 7, 7]]


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = in_format(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(content) == [RED] * 4, kind


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 2)), (4, (0, 2)), (5, (0, 0)), (6, (2, 0)), (8, (0, 1))],
)
def test_photographs_are_turned_upright(orientation, corner):
    """A red pixel at the top left of a file of 2×3 pixels, and where (x, y) EXIF says it belongs."""
    image = Image.new("RGB", (2, 3), "lime")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = opened(in_format(image, "PNG", exif=exif))
    assert turned.size == ((2, 3) if orientation < 5 else (3, 2))
    assert turned.getpixel(corner) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_make_an_image_unreadable(kind):
    """The pixels are sound. Where the tag can still be read it counts."""
    image, read = Image.new("RGB", (2, 3), "red"), 0
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    sound = bytes(exif.tobytes())
    for position in range(6, len(sound)):
        for value in (0, 1, 77, 255):
            damaged = sound[:position] + bytes([value]) + sound[position + 1 :]
            content = in_format(image, kind, exif=damaged)
            size = opened(content).size
            assert size in ((2, 3), (3, 2))
            assert image_size(io.BytesIO(content)) == size
            read += size == (3, 2)
    assert read > 50


def test_an_image_is_turned_once():
    image = Image.new("RGB", (2, 3), "lime")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = in_format(image, "PNG", exif=exif)
    turned = opened(content)
    assert upright(turned).size == turned.size == (3, 2)
    rows = Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    assert read_row(rows, 0)["image"].size == (3, 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (4, 1), (1, 4), (20000, 2), (2, 20000), (20000, 1)])
def test_tiny_narrow_and_wide_images_keep_their_colours(size, tmp_path):
    """Three rows or columns are not mistaken for three channels."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = tiny_processor(bert_tokenizer()).image_processor
    actual = processor(opened(in_format(image, "PNG")), do_normalize=False, return_tensors="pt")["pixel_values"][0]
    expected = np.asarray(image.resize((16, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


def test_the_processor_alone_does_the_same():
    """Images that a user opens go the same way as those of a data set."""
    processor = tiny_processor(bert_tokenizer()).image_processor
    contents = [
        png(4, 4, 16, 0, (b"\0" + struct.pack(">4H", 0, 0x0100, 0x8000, 0xFFFF)) * 4),
        in_format(Image.new("RGBA", (4, 4), (0, 255, 0, 0)), "PNG"),
        in_format(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"),
    ]
    for content in contents:
        values = [
            processor(image, return_tensors="pt") for image in (opened(content), Image.open(io.BytesIO(content)))
        ]
        assert torch.equal(values[0]["pixel_values"], values[1]["pixel_values"])
    with pytest.raises(ValueError, match="floating-point numbers, which say not what is white"):
        processor(Image.new("F", (4, 4)), return_tensors="pt")
    with pytest.raises(ValueError, match="NaN"):
        processor(np.full((4, 4, 3), np.nan), return_tensors="pt")


BAD_IMAGES = {
    "nothing": (b"", "it is no JPEG"),
    "text": (b"not an image", "it is no JPEG"),
    "zeros": (bytes(1000), "it is no JPEG"),
    "floating-point numbers": (in_format(Image.new("F", (2, 2), 0.5), "TIFF"), "floating-point numbers"),
    "whole numbers of 32 bits": (in_format(Image.new("I", (2, 2), 70000), "TIFF"), "32-bit whole numbers"),
    "bomb": (png(50_000, 50_000, 8, 2, b"\0"), "exceeds limit of .* decompression bomb"),
    "very large": (png(10_000, 9_001, 8, 0, b"\0"), "10000×9001 pixels, more than 90,000,000"),
    # Pillow would start Ghostscript.
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch marker)(w)file\n", "it is no JPEG"),
    "text that unpacks to gigabytes": (
        png(1, 1, 8, 0, b"\0\0", png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "text chunk|Decompressed|decoded",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_is_said(case):
    content, message = BAD_IMAGES[case]
    with pytest.raises(CADAError, match=message):
        opened(content)


def test_the_ending_of_a_name_does_not_matter(tmp_path):
    (tmp_path / "person.jpg").write_bytes(in_format(Image.new("RGB", (1, 1), "red"), "PNG"))
    assert open_image({"path": str(tmp_path / "person.jpg"), "bytes": None}).getpixel((0, 0)) == (255, 0, 0)


def test_folders_pipes_and_devices_are_no_images(tmp_path):
    """A named pipe would be waited for, a device read without end."""
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "device.png")
    for name in ("pipe.png", "device.png", "."):
        with pytest.raises(CADAError, match="not a file but a folder or a device"):
            open_image({"path": str(tmp_path / name), "bytes": None})
    with pytest.raises(CADAError, match="there is no such file"):
        open_image({"path": str(tmp_path / "nowhere.png"), "bytes": None})
    with pytest.raises(CADAError, match="neither a file name nor content"):
        open_image({"path": None, "bytes": None})


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8))
FORMATS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "BMP": {},
    "GIF": {},
    "TIFF": {},
    "PPM": {},
    "TIFF packed": {"compression": "tiff_lzw"},
    "JPEG in steps": {"progressive": True},
}


def sound_file(name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    more = {"exif": exif} if name.split()[0] in ("JPEG", "PNG", "WEBP") else {}
    return in_format(PICTURE, name.split()[0], **FORMATS[name], **more)


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_gives_the_whole_image_or_an_error(name):
    """Cut at every byte. What follows the last pixel may be missing."""
    content = sound_file(name)
    whole, read = np.asarray(opened(content)), 0
    for length in range(len(content)):
        try:
            image = np.asarray(opened(content[:length]))
        except CADAError:
            continue
        read += 1
        assert np.array_equal(image, whole), f"{length} of {len(content)} bytes"
    assert read < len(content) / 4


@tried(150, 50_000)
def test_any_damage_gives_an_image_or_a_data_error(trials):
    files = {name: sound_file(name) for name in FORMATS}

    @settings(max_examples=trials)
    @given(st.data())
    def damage(data):
        content = bytearray(files[data.draw(st.sampled_from(sorted(files)))])
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(content) - 1))
            content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
            if not content:
                break
        try:
            image = opened(bytes(content))
        except CADAError as error:
            assert str(error)
            return
        assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS

    damage()


def test_every_bad_file_is_found_by_check(cuhk, capsys):
    records = json.loads((cuhk / "reid_raw.json").read_text())
    names = [record["file_path"] for record in records]
    problems = {}
    for number, (case, (content, _)) in enumerate(BAD_IMAGES.items()):
        (cuhk / "imgs" / names[number]).write_bytes(content)
        problems[names[number]] = "is empty" if case == "nothing" else "cannot be decoded"
    for number, make in ((-1, os.mkfifo), (-2, os.mkdir)):
        (cuhk / "imgs" / names[number]).unlink()
        make(cuhk / "imgs" / names[number])
        problems[names[number]] = "is not a file"
    assert cli.main(["check", "--dataset", "cuhk_pedes", "--data-dir", str(cuhk)]) == 1
    printed = capsys.readouterr().out
    for name, problem in problems.items():
        assert re.search(rf"{re.escape(name)} \(row \d+\) {problem}", printed), name
    assert f"{len(problems)} bad image file(s)." in printed


def test_an_image_without_a_defined_white_stops_training_with_its_row(cuhk):
    """In the data set's reader, where row and file are known, and not in the processor."""
    name = json.loads((cuhk / "reid_raw.json").read_text())[2]["file_path"]
    (cuhk / "imgs" / name).write_bytes(BAD_IMAGES["floating-point numbers"][0])
    rows = load_pairs_dataset("cuhk_pedes", cuhk)["train"]
    with pytest.raises(CADAError, match=f"image '{name}' in row 2 cannot be decoded: pixels are floating-point"):
        read_row(rows, 2)
