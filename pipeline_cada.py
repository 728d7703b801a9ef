"""
Text-to-image person retrieval as a pipeline of transformers: sentences and images in, ranked images out.

It reads model and processor through their public methods alone and imports nothing of CADA. The configuration names it
and imports it, so every saved checkpoint brings it along.
"""

import itertools
import os

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.pipelines import Pipeline
from transformers.utils import logging


_ARGUMENTS = "text, images, top_k, rerank, batch_size, timeout, num_workers"
_BATCH_SIZE = 16
_IMAGES_AT_ONCE = 32  # images whose keys and values of all layers are in memory


class CADAPipeline(Pipeline):
    r"""
    Ranks images by how well they show the person whom a sentence describes.

    Global matching ranks all images, then local matching ranks the best `rerank` of them again. Images are encoded
    once per call, for all its sentences. For a gallery that is searched again and again, store the features instead.

    ```python
    >>> from transformers import pipeline
    >>> search = pipeline("text-to-image-person-retrieval", model="demo/model", trust_remote_code=True)
    >>> search("a man in a red coat", images=["first.png", "second.png"], top_k=1)
    [{'index': 1, 'score': 1.31, 'global_score': 0.42, 'local_score': 0.89}]
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self,
        text: str | list[str],
        images: list,
        top_k: int | None = None,
        rerank: int | None = None,
        batch_size: int | None = None,
        timeout: float | None = None,
        **kwargs,
    ) -> list[dict] | list[list[dict]]:
        r"""
        Rank `images` for one sentence or for many.

        Args:
            text (`str` or `list[str]`):
                What is looked for.
            images (list):
                Paths, addresses (`http://`, `https://`), contents of files (bytes), PIL images, or a column of
                `datasets`. With local matching their patch states stay in memory: 0.6 MB each for ViT-B/16.
            top_k (`int`, *optional*, defaults to 10):
                Number of images returned for a sentence.
            rerank (`int`, *optional*):
                Number of images that local matching ranks again; 0 for global matching only. By default `rerank_k` of
                the configuration, or 0 for a model without match head.
            batch_size (`int`, *optional*, defaults to 16):
                Images, and sentences, that are encoded at once.
            timeout (`float`, *optional*):
                Seconds to wait for an image from the web. By default no limit.
            kwargs:
                `num_workers`, of the data loader that prepares the sentences.

        Returns:
            For a sentence a list, best image first, of

            - **index** (`int`): place of the image in `images`.
            - **score** (`float`): S_G + S_L of a candidate of local matching, S_G of the others, which rank behind.
            - **global_score** (`float`): S_G, the cosine of sentence and image, -1 to 1.
            - **local_score**, **probability** (`float` or `None`): S_L, and that the image shows the person described;
              `None` where local matching did not look, the latter also where the model is not calibrated.

            For a list of sentences a list of these lists.

        Raises:
            ValueError: for no image, an image that cannot be read (named), no sentence or an empty one, numbers out of
                range, or `rerank` with a model that has no match head.
        """
        images = _listed(images)
        text = list(text) if isinstance(text, tuple) else text
        if text == []:
            raise ValueError("`text` is empty. Give a sentence, or a list of sentences.")
        if batch_size is None:
            batch_size = _BATCH_SIZE if self._batch_size is None else self._batch_size
        _check_number("batch_size", batch_size, 1, "the number of images to encode at once")
        if rerank is None:
            default = self.model.config.rerank_k if self._has_match_head() else 0
            rerank = self._forward_params.get("rerank", default)
        self._sanitize_parameters(top_k, rerank)  # what is wrong shows before the images are encoded
        gallery = self._encode_images(images, batch_size, timeout, keep_states=rerank > 0)
        options = {"batch_size": batch_size, "gallery": gallery, "rerank": rerank, "top_k": top_k, **kwargs}
        return super().__call__(text, **{name: value for name, value in options.items() if value is not None})

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save a whole checkpoint: model, processor, and the code of both and of this pipeline."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _has_match_head(self) -> bool:
        return self.model.config.use_atp and hasattr(self.model, "match")

    def _sanitize_parameters(self, top_k=None, rerank=None, gallery=None, local_files_only=None, **unknown):
        # `pipeline` hands its own `local_files_only` on.
        if unknown:
            raise TypeError(f"There is no argument {', '.join(unknown)}. Known: {_ARGUMENTS}.")
        if top_k is not None:
            _check_number("top_k", top_k, 1, "the number of images to return")
        if rerank is not None:
            _check_number("rerank", rerank, 0, "the number of images to rank again")
        if rerank and not self._has_match_head():
            raise ValueError("This model has no match head, so it ranks by global matching only. Pass `rerank=0`.")
        forward = {"rerank": rerank, "gallery": gallery}
        forward = {name: value for name, value in forward.items() if value is not None}
        return {}, forward, {} if top_k is None else {"top_k": top_k}

    @torch.no_grad()
    def _encode_images(self, images, batch_size: int, timeout: float | None, keep_states: bool) -> dict:
        """Features `(images, d)` and, if asked for, patch states `(images, 1 + patches, hidden)`, on the CPU."""
        embeds, states = [], []
        starts = range(0, len(images), batch_size)
        for start in logging.tqdm(starts, desc="Encoding images", leave=False, disable=len(starts) < 2):
            stop = min(start + batch_size, len(images))
            pixel_values = torch.cat([self._pixel_values(images, index, timeout) for index in range(start, stop)])
            outputs = self.model.get_image_features(pixel_values.to(self.model.device, self.model.dtype))
            embeds.append(F.normalize(outputs.pooler_output.float(), dim=-1).cpu())
            if keep_states:
                states.append(outputs.last_hidden_state.cpu())
        return {"embeds": torch.cat(embeds), "states": torch.cat(states) if keep_states else None}

    def _pixel_values(self, images, index: int, timeout: float | None) -> torch.Tensor:
        """What the processor, which has its own way to colours, makes of image `index`, `(1, 3, height, width)`."""
        image = None
        try:
            image = images[index]
            if not isinstance(image, (str, bytes, os.PathLike, Image.Image)):
                raise ValueError(f"{type(image).__name__} is no path, no address, no bytes and no PIL image")
            image = self.processor.image_processor.fetch_images(image, timeout=timeout)
            return self.processor(images=image, return_tensors="pt")["pixel_values"]
        except Exception as error:  # Pillow, the HTTP client and transformers raise their own
            name = f", {os.fspath(image)[:200]}," if isinstance(image, (str, os.PathLike)) else ""
            raise ValueError(f"Image {index}{name} cannot be read: {error}. Repair it or leave it out.") from error

    def preprocess(self, text: str):
        """Word pieces of a sentence."""
        if not isinstance(text, str):
            raise ValueError(f"`text` holds {text!r}. Give a sentence, or a list of sentences.")
        inputs = self.processor(text=[text], return_tensors="pt")
        if inputs["input_ids"].shape[1] <= self.processor.tokenizer.num_special_tokens_to_add():
            raise ValueError(f"The sentence {text!r} is empty. Describe a person.")
        return dict(inputs)

    def _forward(self, model_inputs, gallery: dict, rerank: int) -> dict:
        """The order of the images `(texts, images)`, S_G `(texts, images)`, S_L of the first `(texts, rerank)`."""
        text_embeds = self.model.get_text_features(**model_inputs).pooler_output.float()
        global_scores = F.normalize(text_embeds, dim=-1).cpu() @ gallery["embeds"].t()
        order = global_scores.argsort(dim=1, descending=True, stable=True)
        candidates = order[:, :rerank]
        local_scores = torch.empty(candidates.shape)
        used = candidates.unique()
        for start in range(0, len(used), _IMAGES_AT_ONCE):
            images = used[start : start + _IMAGES_AT_ONCE]
            chosen = torch.isin(candidates, images)
            text_index, image_index = chosen.nonzero()[:, 0], torch.searchsorted(images, candidates[chosen])
            logits = self.model.match(
                **model_inputs,
                image_states=gallery["states"][images].to(self.model.device),
                text_index=text_index,
                image_index=image_index,
            )
            local_scores[chosen] = self.model.local_score(logits).float().cpu()
        known = global_scores.gather(1, candidates)
        best = (known + local_scores).argsort(dim=1, descending=True, stable=True)
        outputs = {
            "order": torch.cat([candidates.gather(1, best), order[:, rerank:]], dim=1),
            "global_scores": global_scores,
            "local_scores": local_scores.gather(1, best),
        }
        probabilities = self.model.config.match_probability(known, local_scores) if rerank else None
        return outputs if probabilities is None else {**outputs, "probabilities": probabilities.gather(1, best)}

    def postprocess(self, model_outputs, top_k: int = 10) -> list[dict]:
        """The ranking of one sentence."""
        names = ("order", "global_scores", "local_scores")
        order, global_scores, local_scores = (model_outputs[name][0].tolist() for name in names)
        probabilities = model_outputs["probabilities"][0].tolist() if "probabilities" in model_outputs else []
        rows = itertools.zip_longest(order, local_scores, probabilities)  # `None` where local matching did not look
        return [
            {
                "index": index,
                "score": global_scores[index] + (local_score or 0),
                "global_score": global_scores[index],
                "local_score": local_score,
                "probability": probability,
            }
            for index, local_score, probability in itertools.islice(rows, top_k)
        ]


def _listed(images):
    """One image as a list; anything else that keeps no places, by which the results name images, is refused."""
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, dict) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise ValueError(f"`images` is of the type {type(images).__name__}. Give a list of images.")
    if len(images) == 0:
        raise ValueError("`images` is empty. Give the images to search.")
    return images


def _check_number(name: str, value, least: int, what: str) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"`{name}` is {value!r}. Give {what}, a whole number of {least} or more.")


__all__ = ["CADAPipeline"]
