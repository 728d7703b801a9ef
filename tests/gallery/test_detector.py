"""Persons that a detector of transformers finds: small detectors, random or trained on drawn streets."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_start
from street import HEIGHT, WIDTH, draw_people, draw_street, write_video
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from cada.files import CADAError
from cada.gallery.detector import Detector
from cada.gallery.index import build_index, open_index
from cada.gallery.regions import Region


def small_detector(*labels: str) -> RTDetrForObjectDetection:
    """An RT-DETR of 300,000 parameters."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {"encoder_hidden_dim": 64, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[32, 48, 64],
        decoder_in_channels=[64, 64, 64],
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=20,
        num_denoising=10,
        freeze_backbone_batch_norms=False,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **sizes,
    )
    torch.manual_seed(0)
    return RTDetrForObjectDetection(config)


def save(detector, folder: Path) -> str:
    detector.save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": HEIGHT, "width": WIDTH}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> str:
    detector = small_detector("bicycle", "Person")
    for name, weights in detector.named_parameters():
        if "bbox" in name and weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.2)  # boxes of all sizes
    return save(detector, tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_tiny_start(tmp_path_factory.mktemp("checkpoint") / "model"))


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(11):
        draw_street(draw_people(2, number), number)[0].save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


@pytest.fixture
def frames(monkeypatch) -> list[int]:
    """The number of frames in every batch that the detector looks at."""
    sizes, find = [], Detector.find

    def counting(self, images):
        sizes.append(len(images))
        return find(self, images)

    monkeypatch.setattr(Detector, "find", counting)
    return sizes


def build(source, index, model=None, **options):
    return build_index(source, index, model, progress=False, **options)


def test_persons_are_those_that_the_model_finds(detector, checkpoint, photos, tmp_path):
    """Label, scores, heights and margins by hand, from what the model says of each image alone."""
    limits = {"min_score": 0.2, "min_height": 8, "margin": 0.25}
    changes = build(photos, tmp_path / "index", checkpoint, detector=detector, **limits)
    model, processor = RTDetrForObjectDetection.from_pretrained(detector).eval(), RTDetrImageProcessorPil()
    expected, lower = {}, 0
    for number in range(11):
        image = draw_street(draw_people(2, number), number)[0]
        pixels = processor(image, size={"height": HEIGHT, "width": WIDTH}, return_tensors="pt")
        with torch.inference_mode():
            out = model(**pixels)
        assert out.logits[0, :, 0].sigmoid().max() < 0.2  # no bicycle
        for score, (x, y, width, height) in zip(out.logits[0, :, 1].sigmoid(), out.pred_boxes[0].double().numpy()):
            if score <= 0.2:
                continue
            lower += height * HEIGHT < 8
            if height * HEIGHT >= 8:
                left, right = (max(0, min(WIDTH, round(WIDTH * (x + side * width * 0.75)))) for side in (-1, 1))
                top, bottom = (max(0, min(HEIGHT, round(HEIGHT * (y + side * height * 0.75)))) for side in (-1, 1))
                box = (left, top, right - left, bottom - top)
                expected.setdefault(Region(f"{number:02}.png", box).name, float(score))
    assert lower > 0 and len(expected) > 20
    table = open_index(tmp_path / "index").store.tables(["path", "score"])
    found = {row["path"]: row["score"] for part in table for row in part.to_pylist()}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=0.02)  # of equal boxes the best score counts
    assert changes.added == len(expected)


def test_what_was_found_is_not_looked_for_again(detector, checkpoint, photos, tmp_path, frames):
    options = {"detector": detector, "min_score": 0.05, "min_height": 0}
    (photos / "zz.png").write_bytes((photos / "00.png").read_bytes()[:100])
    first = build(photos, tmp_path / "index", checkpoint, **options)
    persons = first.added
    assert frames == [8, 3] and persons > 11
    ((name, problem),) = first.unreadable
    assert name == "zz.png" and problem.startswith("cannot be decoded: ")
    (photos / "zz.png").unlink()
    assert build(photos, tmp_path / "index").unchanged == persons  # the index knows its detector
    assert frames == [8, 3]
    draw_street(draw_people(2, 99), 99)[0].save(photos / "03.png")
    draw_street(draw_people(2, 98), 98)[0].save(photos / "new.png")
    build(photos, tmp_path / "index")
    assert frames == [8, 3, 2]
    build(photos, tmp_path / "index", min_score=0.06)  # other persons
    assert frames[3:] == [8, 4]
    photos.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        path.touch()
    build(tmp_path / "moved", tmp_path / "index", moved_source=True)
    assert frames[5:] == []
    save(small_detector("person", "bicycle"), Path(detector))  # other weights in the same folder
    try:
        build(tmp_path / "moved", tmp_path / "index")
        assert frames[5:] == [8, 4]
    finally:
        save(small_detector("bicycle", "Person"), Path(detector))


def test_an_interrupted_search_for_persons_goes_on(detector, checkpoint, photos, tmp_path, monkeypatch, frames):
    find = Detector.find

    def dies(self, images):
        if len(images) < 8:
            raise KeyboardInterrupt
        return find(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Detector, "find", dies)
        build(photos, tmp_path / "index", checkpoint, detector=detector, min_score=0.3, min_height=0)
    assert frames == [8]
    build(photos, tmp_path / "index", checkpoint, detector=detector, min_score=0.3, min_height=0)
    assert frames == [8, 4]  # the last of the eight may not have been done


def test_wrong_detectors_are_explained(detector, checkpoint, photos, tmp_path):
    def problem(**options) -> str:
        with pytest.raises(CADAError) as error:
            build(photos, tmp_path / "index", checkpoint, **options)
        return str(error.value)

    strange = save(small_detector("cat", "dog"), tmp_path / "strange")
    assert problem(detector=strange) == (
        f"--detector {strange} has no label `person`, but cat, dog. Give a detector that knows persons."
    )
    assert "cannot be loaded" in problem(detector=checkpoint)
    assert problem(detector=detector, boxes="b.csv") == (
        "--boxes and --detector both say where persons are. Give one of them."
    )
    assert problem(min_height=9) == "--min-height is for a --detector, and there is none. Leave it out."
    assert "--min-score is 1.5" in problem(detector=detector, min_score=1.5)
    for value in (0, math.inf, math.nan):
        assert f"--fps is {value}. Give a number from 0.001 to 1000." in problem(fps=value)
    assert "--min-height is -5. Give a number from 0" in problem(detector=detector, min_height=-5)
    assert "The detector ./nope is not there." in problem(detector="./nope")
    assert problem(detector=detector, min_score=1) == (
        "Nobody was found in 11 files. Lower --min-score or --min-height, or take another --detector."
    )


def train(detector: RTDetrForObjectDetection, streets: list, steps: int) -> None:
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image, _ in streets])
    labels = []
    for _, boxes in streets:
        corners = torch.tensor(boxes, dtype=torch.float32)
        corners[:, :2] += corners[:, 2:] / 2  # their middles
        boxes = corners / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
        labels.append({"class_labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": boxes})
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    rng = random.Random(0)
    for _ in range(steps):
        rows = rng.sample(range(len(streets)), 16)
        loss = detector(pixel_values=pixels[rows], labels=[labels[row] for row in rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def overlap(first, second) -> float:
    """Intersection over union of two boxes."""
    sides = [min(first[n] + first[n + 2], second[n] + second[n + 2]) - max(first[n], second[n]) for n in (0, 1)]
    common = max(0, sides[0]) * max(0, sides[1])
    return common / (first[2] * first[3] + second[2] * second[3] - common)


def crowd(seed: int) -> tuple:
    """A street with one to four people."""
    return draw_street(draw_people(random.Random(seed).randint(1, 4), seed), seed)


@pytest.mark.slow
def test_a_trained_detector_finds_nine_of_ten(checkpoint, tmp_path):
    """On photos and in a video; what is not a person is at most one in ten of what it finds."""
    pytest.importorskip("av", reason='videos need PyAV: pip install -e ".[video]"')
    trained = small_detector("person")
    train(trained, [crowd(seed) for seed in range(400)], steps=450)
    detector = save(trained, tmp_path / "detector")
    streets = {Region(f"{number:02}.png"): crowd(10_000 + number) for number in range(20)}
    streets |= {Region("walk.mp4", None, float(number)): crowd(20_000 + number) for number in range(20)}
    (tmp_path / "files").mkdir()
    for number in range(20):
        streets[Region(f"{number:02}.png")][0].save(tmp_path / "files" / f"{number:02}.png")
    write_video(tmp_path / "files" / "walk.mp4", [streets[Region("walk.mp4", None, float(n))][0] for n in range(20)])
    changes = build(tmp_path / "files", tmp_path / "index", checkpoint, detector=detector)
    assert changes.unreadable == []
    gallery = open_index(tmp_path / "index")
    found = [Region.of(row["path"]) for table in gallery.store.tables(["path"]) for row in table.to_pylist()]
    there = [(frame, box) for frame, (_, boxes) in streets.items() for box in boxes]
    hit = [any(each.frame == frame and overlap(each.box, box) > 0.5 for each in found) for frame, box in there]
    right = [any(overlap(each.box, box) > 0.5 for box in streets[each.frame][1]) for each in found]
    print(f"{sum(hit)} of {len(hit)} persons found; {sum(right)} of {len(right)} boxes show one")
    for kind in ("00.png", "walk.mp4"):
        part = [one for one, (frame, _) in zip(hit, there) if (frame.time is None) == (kind == "00.png")]
        assert np.mean(part) >= 0.9, kind
    assert np.mean(right) >= 0.9
    result = gallery.search("a man in a red coat", top=1)[0][0]
    x, y, width, height = result.box
    frame = streets[Region(result.path, None, result.time)][0].crop((x, y, x + width, y + height))
    shown = np.asarray(gallery.image(result.name), int)
    assert np.abs(shown - np.asarray(frame, int)).mean() < 12
