"""Gallery and queries, encoded once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from cada.data.images import undecoded
from cada.data.pairs import outlive_sigterm, read_row
from cada.files import CADAError
from losses_cada import rank_and_size


RERANK_MEMORY = 4.0  # GB


@dataclass
class Gallery:
    """
    Encoded images.

    Args:
        embeds: normalised features `(images, d)`.
        states: patch states `(kept, 1 + patches, hidden)` of the images from `first` on, as many as the memory allows.
        first: number of the first image whose states are kept; with several processes each keeps its own part.
        own: images whose pairs this process matches; by default all.
        batch_size, encode: the size of batches, and a function that gives the patch states of batches by their number,
            for images whose states were not kept.
    """

    embeds: torch.Tensor
    states: torch.Tensor
    first: int = 0
    own: range | None = None
    batch_size: int = 1
    encode: Callable[[list[int]], Iterable[torch.Tensor]] | None = None

    def states_of(self, groups: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Patch states `(images, 1 + patches, hidden)` of each group; all indices together are ascending."""
        kept = range(self.first, self.first + len(self.states))
        missing = sorted(
            {image // self.batch_size for images in groups for image in images.tolist() if image not in kept}
        )
        encoded, number, states = zip(missing, self.encode(missing)) if missing else iter(()), -1, self.states
        for images in groups:
            if int(images[0]) in kept and int(images[-1]) in kept:
                yield self.states[images - self.first]
                continue
            rows = []
            for image in images.tolist():
                if image not in kept:
                    while number < image // self.batch_size:
                        number, states = next(encoded)
                        states = states.to(self.states)
                rows.append(self.states[image - self.first] if image in kept else states[image % self.batch_size])
            yield torch.stack(rows)


@dataclass
class Queries:
    """Encoded texts: normalised features `(texts, d)`, word pieces and their mask `(texts, length)`."""

    embeds: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class _Images(torch.utils.data.Dataset):
    """The images of a data set as pixel values, so that data loader workers decode them."""

    def __init__(self, dataset, processor):
        self.dataset, self.processor = undecoded(dataset), processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = read_row(self.dataset, index, self.processor.image_size)["image"]
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def sum_over_processes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum, on the CPU. Where every entry but one is 0 it is that one, exactly."""
    if rank_and_size()[1] == 1:
        return tensor.cpu()
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return tensor.cpu()


@torch.inference_mode()
def encode_gallery(
    model,
    processor,
    dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    memory: float = RERANK_MEMORY,
) -> Gallery:
    """
    Encode the column `image` of a data set. Patch states are kept for half of `memory` (GB); images beyond that are
    encoded again where local matching needs them, in the same batches. Several processes share the batches, and each
    keeps the patch states of its part. Results are on the CPU, and in the precision of the weights, also under
    autocast: which images are candidates does not depend on it.
    """
    images, device = _Images(dataset, processor), model.device
    vision = model.config.vision_config
    bytes_per_image = vision.sequence_length * vision.hidden_size * model.dtype.itemsize
    starts = list(range(0, len(images), batch_size))
    rank, size = rank_and_size()
    own = np.array_split(range(len(starts)), size)[rank].tolist()
    first, last = (starts[own[0]], min(starts[own[-1]] + batch_size, len(images))) if own else (0, 0)
    kept = min(last - first, int(memory / 2 * 1e9 / bytes_per_image)) if model.config.use_atp else 0

    def load(batches: list[int]) -> Iterator[torch.Tensor]:
        indices = [list(range(starts[batch], min(starts[batch] + batch_size, len(images)))) for batch in batches]
        # A generator of its own: an evaluation leaves the random numbers of a training as they were.
        loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=indices,
            num_workers=num_workers,
            generator=torch.Generator(),
            worker_init_fn=outlive_sigterm,
        )
        return (pixel_values.to(device) for pixel_values in loader)

    states = torch.empty(kept, vision.sequence_length, vision.hidden_size, dtype=model.dtype)
    embeds = torch.zeros(len(images), model.config.projection_dim)
    start = first
    bar = tqdm(load(own), total=len(own), desc="Encoding images", unit="batch", disable=not progress, leave=False)
    for pixel_values in bar:
        with torch.autocast(device.type, enabled=False):
            outputs = model.get_image_features(pixel_values)
        end = start + len(pixel_values)
        embeds[start:end] = F.normalize(outputs.pooler_output.float(), dim=-1)
        states[start - first : end - first] = outputs.last_hidden_state[: max(0, first + kept - start)]
        start = end

    def encode(batches: list[int]) -> Iterator[torch.Tensor]:
        for pixel_values in load(batches):
            with torch.autocast(device.type, enabled=False):
                yield model.encode_images(pixel_values).cpu()

    embeds = sum_over_processes(embeds, device)
    return Gallery(embeds, states, first, range(first, last), batch_size, encode)


@torch.inference_mode()
def encode_queries(model, processor, captions: list[str], batch_size: int = 256, progress: bool = True) -> Queries:
    """
    Encode captions, in batches of similar length, which several processes share. Results are on the CPU, in the order
    of `captions`, and in the precision of the weights, also under autocast.

    Raises:
        CADAError: for one caption in place of a list.
    """
    if isinstance(captions, str):
        raise CADAError(f"`captions` is the text {captions!r:.80}. Give a list, also of one caption.")
    inputs = processor(text=captions, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(dim=1)
    embeds = torch.zeros(len(captions), model.config.projection_dim)
    rank, size = rank_and_size()
    batches = lengths.argsort(stable=True).split(batch_size)[rank::size]
    for rows in tqdm(batches, desc="Encoding captions", unit="batch", disable=not progress, leave=False):
        cut = slice(int(lengths[rows].max()))
        input_ids, attention_mask = inputs["input_ids"][rows, cut], inputs["attention_mask"][rows, cut]
        with torch.autocast(model.device.type, enabled=False):
            outputs = model.get_text_features(input_ids.to(model.device), attention_mask.to(model.device))
        embeds[rows] = F.normalize(outputs.pooler_output.float(), dim=-1).cpu()
    return Queries(sum_over_processes(embeds, model.device), inputs["input_ids"], inputs["attention_mask"])
