"""Streets with drawn pedestrians whose boxes are known: photos and videos."""

import random
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cada.data.drawn import _Figure, draw_persons


WIDTH, HEIGHT = 320, 160


def pedestrian(person: dict, seed: int) -> Image.Image:
    """A person of 40×80 pixels or less, without background: RGBA, as large as what is visible."""
    key = (1, 254, 3)  # a colour that nobody wears
    canvas = Image.new("RGB", (160, 320), key)
    _Figure(canvas, person, random.Random(seed)).draw()
    pixels = np.asarray(canvas)
    visible = Image.fromarray((np.abs(pixels.astype(int) - key).sum(-1) > 0).astype(np.uint8) * 255)
    canvas.putalpha(visible)
    return canvas.crop(visible.getbbox()).reduce(4)


def draw_street(people: list[dict], seed: int, places: list[tuple[int, int]] | None = None):
    """
    A photo of a street (320×160) with `people`, and their boxes (x, y, width, height); `places` are their upper left
    corners, by default one beside the other.
    """
    rng = random.Random(seed)
    image = Image.new("RGB", (WIDTH, HEIGHT), tuple(rng.randint(150, 200) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for x in range(0, WIDTH, 40):  # houses with a window each
        draw.rectangle((x, rng.randint(0, 30), x + 38, 90), fill=tuple(rng.randint(110, 210) for _ in range(3)))
        draw.rectangle((x + 8, 36, x + 24, 56), fill=(90, 110, 130))
    draw.rectangle((0, 90, WIDTH, HEIGHT), fill=(120, 118, 115))
    boxes = []
    slot = WIDTH // max(1, len(people))
    for number, person in enumerate(people):
        figure = pedestrian(person, rng.randrange(10**6))
        free = (number * slot + rng.randint(0, max(0, slot - figure.width)), rng.randint(50, HEIGHT - figure.height))
        x, y = free if places is None else places[number]
        image.paste(figure, (x, y), figure)
        boxes.append((x, y, *figure.size))
    return image, boxes


def draw_people(count: int, seed: int) -> list[dict]:
    return draw_persons(count, random.Random(seed))


def write_video(file: Path, pictures: list[Image.Image], times: list[float] | None = None, **options) -> Path:
    """
    A video of pictures, shown from `times` on (by default one each second).

    Args:
        options: `codec`; `rotation`, by which the player turns it counter-clockwise; `container`, options of FFmpeg.
    """
    import av

    turn = {90: Image.Transpose.ROTATE_270, -90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180}
    rotation = options.get("rotation")
    with av.open(str(file), "w", options=options.get("container", {})) as container:
        video = container.add_stream(options.get("codec") or "libx264", rate=25)
        video.codec_context.time_base = Fraction(1, 25)
        video.pix_fmt = "yuv444p" if options.get("codec") is None else "yuv420p"
        if rotation:
            video.set_display_rotation(rotation)
        shown = [picture.transpose(turn[rotation]) if rotation else picture for picture in pictures]
        video.width, video.height = shown[0].size if shown else (WIDTH, HEIGHT)
        for picture, time in zip(shown, times or range(len(pictures))):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = round(time * 25), Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return file


def save_streets(folder: Path, count: int, seed: int = 0) -> None:
    """`count` photos of streets in `folder/photos`, and the boxes of their people in `folder/boxes.csv`."""
    (folder / "photos").mkdir(parents=True)
    people, rows = draw_people(4 * count, seed), ["path,x,y,width,height"]
    for number in range(count):
        image, boxes = draw_street(people[4 * number : 4 * number + 4], seed + number)
        image.save(folder / "photos" / f"street_{number}.png")
        rows += [f"street_{number}.png,{','.join(map(str, box))}" for box in boxes]
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    save_streets(Path(sys.argv[1]), count=6)
