"""A detector of `transformers` that finds the persons in a frame."""

import os
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from cada.data.images import Box, box_within
from cada.files import CADAError, file_digest, one_line
from cada.gallery.images import content_digest
from cada.hub.loading import commit_of


def detector_version(name: str, revision: str | None) -> str | None:
    """What tells the version of a detector: the commit on the Hub, or a digest of the files in a folder."""
    folder_like = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1
    if folder_like and not os.path.isdir(name):
        raise CADAError(f"The detector {name} is not there. Say where it is: --detector NAME.")
    if not Path(name).is_dir():
        return commit_of(name, revision)
    files = sorted(path for path in Path(name).iterdir() if path.suffix in (".json", ".safetensors"))
    return content_digest(" ".join(map(file_digest, files)).encode())


class Detector:
    """
    A checkpoint of `AutoModelForObjectDetection` with a label `person`, and its own processor.

    Raises:
        CADAError: where it cannot be loaded, or has no such label.
    """

    def __init__(self, settings: dict, device: torch.device):
        """`settings` are those of [`cada.gallery.persons.person_settings`]."""
        name, self.settings, self.device = settings["detector"], settings, device
        options = {"trust_remote_code": False}
        if not Path(name).is_dir():
            options["revision"] = settings["detector_version"] or "main"
        try:
            options["config"] = AutoConfig.from_pretrained(name, **options)  # one file tells whether it is there
            self.processor = AutoImageProcessor.from_pretrained(name, **options)
            self.model = AutoModelForObjectDetection.from_pretrained(name, use_safetensors=True, **options)
            self.model.to(device).eval()
        except Exception as error:  # transformers raises many kinds, also where a package is missing
            raise CADAError(
                f"--detector {name} cannot be loaded. Give a checkpoint of AutoModelForObjectDetection, such as "
                f"hustvl/yolos-tiny. {one_line(error)}"
            ) from error
        labels = self.model.config.id2label
        self.person = next((number for number, label in labels.items() if str(label).lower() == "person"), None)
        if self.person is None:
            raise CADAError(
                f"--detector {name} has no label `person`, but {one_line(', '.join(map(str, labels.values())))}. Give "
                "a detector that knows persons."
            )

    @torch.inference_mode()
    def find(self, images: list[Image.Image]) -> list[list[tuple[Box, float]]]:
        """For each of the images (RGB) the boxes of its persons with their scores, the best first."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        sizes = torch.tensor([image.size[::-1] for image in images])
        found = self.processor.post_process_object_detection(outputs, self.settings["min_score"], sizes)
        return [self._persons(image.size, each) for image, each in zip(images, found, strict=True)]

    def _persons(self, size: tuple[int, int], found: dict[str, torch.Tensor]) -> list[tuple[Box, float]]:
        persons = {}
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist())
        for (left, top, right, bottom), score, label in sorted(rows, key=lambda row: -row[1]):
            width, height = right - left, bottom - top
            if label != self.person or height < self.settings["min_height"]:
                continue
            across, along = width * self.settings["margin"], height * self.settings["margin"]
            box = box_within((left - across, top - along, width + 2 * across, height + 2 * along), size)
            if box is not None:
                persons.setdefault(box, score)
        return list(persons.items())
