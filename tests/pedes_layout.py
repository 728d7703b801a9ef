"""Small copies of the sets of the field in their authors' layout, drawn, with the quirks of the real ones."""

import json
import random
from pathlib import Path

import numpy as np
from street import draw_street

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


def draw_long_caption(person: dict, rng: random.Random, words: int = 80) -> str:
    """As many captions of a person as make up `words` words or more."""
    text = ""
    while len(text.split()) < words:
        text += draw_caption(person, rng).text + " "
    return text.strip()


def lay_out_ufine(root: Path, seed: int = 3) -> Path:
    """No val; ids from 1; two captions of 80 words and more; the paths begin with the folder of the images."""
    people, rng = _people(9, seed)
    records = []
    (root / "images").mkdir()
    for index, person in enumerate(people):
        for _ in range(3):
            name = f"images/{len(records) + 1}.jpg"
            draw_image(person, rng).save(root / name)
            captions = [draw_long_caption(person, rng) for _ in range(2)]
            split = "train" if index < 6 else "test"
            records.append({"split": split, "id": index + 1, "file_path": name, "captions": captions})
    (root / "UFine6926_Annotations.json").write_text(json.dumps(records), encoding="utf-8")
    return root


def lay_out_prw(root: Path, seed: int = 4) -> Path:
    """
    Six frames of train show three of the persons 1 to 6 each, with one description, and the first also somebody whom
    nobody knows. Three frames of the test show the persons 7 and 8, whom two descriptions in two frames look for, one
    of train, and somebody unknown. A box reaches beyond its frame; a description is in pieces.
    """
    from scipy.io import savemat

    people, rng = _people(9, seed)  # the last one is nobody
    frames = {
        f"c{1 + number % 6}s1_{number:06}": [1 + (number + step) % 6 for step in range(3)] for number in range(6)
    }
    frames["c1s1_000000"].append(-2)
    tested = {f"c{camera}s2_000100": [7, 8, 1, -2] for camera in (1, 2, 3)}
    texts = {"train": [], "test": []}
    for folder in ("frames", "annotations"):
        (root / folder).mkdir()
    for number, (frame, persons) in enumerate({**frames, **tested}.items()):
        image, boxes = draw_street(
            [people[person - 1 if person > 0 else 8] for person in persons], rng.randrange(10**6)
        )
        image.save(root / "frames" / f"{frame}.jpg")
        if number == 0:
            boxes[0] = (-4, *boxes[0][1:])
        table = np.array([(person, *box) for person, box in zip(persons, boxes)], dtype=float)
        savemat(root / "annotations" / f"{frame}.jpg.mat", {("box_new", "anno_file")[number % 2]: table})
        count = (2 if frame != "c3s2_000100" else 0) if frame in tested else 1
        for person in persons if count else ():
            if person != -2 and (frame in frames or person in (7, 8)):
                own = [draw_caption(people[person - 1], rng).text for _ in range(count)]
                text = {"pic_path": f"{frame}.jpg", "id": person, "desrciption": own}
                texts["test" if frame in tested else "train"].append(text)
    texts["test"][0]["desrciption"] = ["A man in red.", "", "He wears a hat.", "It is blue."]
    for split, rows in texts.items():
        (root / f"PRW-TBPS_{split}").write_text(json.dumps(rows), encoding="utf-8")
    names = np.empty((len(tested), 1), dtype=object)
    names[:, 0] = list(tested)
    savemat(root / "frame_test.mat", {"img_index_test": names})
    return root


LAYOUTS = {
    "cuhk_pedes": lay_out_cuhk,
    "icfg_pedes": lay_out_icfg,
    "rstp_reid": lay_out_rstp,
    "ufine6926": lay_out_ufine,
    "prw_tbps": lay_out_prw,
}
ANNOTATIONS = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstp_reid": "data_captions.json"}
