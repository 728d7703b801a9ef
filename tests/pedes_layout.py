"""Small copies of the three PEDES sets in their authors' layout, with drawn images and the quirks of the real ones."""

import json
import random
from pathlib import Path

from cada.data.drawn import draw_caption, draw_image, draw_persons


CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")


def _people(count: int, seed: int):
    rng = random.Random(seed)
    return draw_persons(count, rng), rng


def _save(root: Path, name: str, person: dict, rng: random.Random) -> None:
    path = root / "imgs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = draw_image(person, rng)
    # The real images are of all sizes.
    image.resize((rng.randint(24, 80), rng.randint(48, 160))).save(path)


def lay_out_cuhk(root: Path, seed: int = 0) -> Path:
    """`reid_raw.json`; ids from 1; png and jpg; two captions, but one image has three, one test image ten; one person
    with a single image."""
    people, rng = _people(10, seed)
    records = []
    for index, person in enumerate(people):
        split = "train" if index < 6 else "val" if index < 8 else "test"
        for number in range(1 if index == 9 else 3):
            folder = CUHK_FOLDERS[(index + number) % len(CUHK_FOLDERS)]
            name = f"{folder}/{index:04d}{number:03d}.{'png' if number else 'jpg'}"
            _save(root, name, person, rng)
            count = 10 if (index, number) == (8, 0) else 3 if (index, number) == (0, 0) else 2
            captions = [draw_caption(person, rng).text for _ in range(count)]
            records.append(
                {
                    "split": split,
                    "captions": captions,
                    "file_path": name,
                    "processed_tokens": [caption.lower().split() for caption in captions],
                    "id": index + 1,
                }
            )
    (root / "reid_raw.json").write_text(json.dumps(records), encoding="utf-8")
    return root


def lay_out_icfg(root: Path, seed: int = 1, file_name: str = "ICFG-PEDES.json") -> Path:
    """No val; ids from 0; one caption; the folders train and test hold images of either split."""
    people, rng = _people(9, seed)
    records = []
    for index, person in enumerate(people):
        split = "train" if index < 6 else "test"
        for number in range(3):
            name = f"{('train', 'test')[number % 2]}/{index:04d}/{index:04d}_{number:03d}.jpg"
            _save(root, name, person, rng)
            caption = draw_caption(person, rng).text
            records.append(
                {
                    "split": split,
                    "captions": [caption],
                    "file_path": name,
                    "processed_tokens": [caption.lower().split()],
                    "id": index,
                }
            )
    (root / file_name).write_text(json.dumps(records), encoding="utf-8")
    return root


def lay_out_rstp(root: Path, seed: int = 2) -> Path:
    """`img_path`; flat folder; ids from 0; no space after a full stop, CJK characters, code fragments, and the same
    captions for several persons."""
    people, rng = _people(10, seed)
    records = []
    for index, person in enumerate(people):
        split = "train" if index < 6 else "val" if index < 8 else "test"
        for number in range(3):
            name = f"{index:04d}_c{number + 1}_{rng.randint(0, 9999):04d}.jpg"
            _save(root, name, person, rng)
            captions = [draw_caption(person, rng).text.replace(". ", ".") for _ in range(2)]
            if (index, number) == (0, 0):
                captions[0] += "他穿着红色外套<br>&nbsp;function(){}"
            if number == 2:
                captions[1] = (
                    "The man is a strong man who is in a grey jacket.His shirt is blue and his trousers is black."
                )
            records.append({"id": index, "img_path": name, "captions": captions, "split": split})
    (root / "data_captions.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return root


LAYOUTS = {"cuhk_pedes": lay_out_cuhk, "icfg_pedes": lay_out_icfg, "rstp_reid": lay_out_rstp}
ANNOTATIONS = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstp_reid": "data_captions.json"}
