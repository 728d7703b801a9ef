"""CADA configuration: the vision tower, the text stack, and the two together with the losses."""

import copy
import difflib
import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging


try:
    from .pipeline_cada import CADAPipeline
except ImportError:
    if __package__:
        raise
    from pipeline_cada import CADAPipeline

logger = logging.get_logger(__name__)

# What `transformers.pipeline` reads in config.json. Its file is saved with this one, which imports it.
TASK = "text-to-image-person-retrieval"
PIPELINES = {TASK: {"impl": f"pipeline_cada.{CADAPipeline.__name__}", "pt": ["AutoModel"], "type": "multimodal"}}


def _reject_typing_errors(config: PreTrainedConfig, unknown: dict) -> None:
    """`@strict` accepts unknown keys, so `hiden_size=64` would be ignored without a word. Name it instead."""
    fields = list(type(config).__dataclass_fields__)
    for key in unknown:
        if key.startswith("_") or hasattr(type(config), key):
            continue
        close = difflib.get_close_matches(key, fields, n=1, cutoff=0.8)
        if not close:
            continue
        message = f"{type(config).__name__} has no field `{key}`. Did you mean `{close[0]}`?"
        # A saved configuration names its `model_type`. It holds whatever somebody once set on it, and has to load.
        if "model_type" not in unknown:
            raise ValueError(message)
        logger.warning(message)


def _require(config: PreTrainedConfig, positive: tuple[str, ...], shares: tuple[str, ...]) -> None:
    for name in (*positive, *shares):
        value = getattr(config, name)
        if not (value > 0 if name in positive else 0 <= value <= 1):  # also where it is NaN
            remedy = "a number above 0" if name in positive else "a share from 0 to 1"
            raise ValueError(f"{type(config).__name__}: `{name}` is {value}. Give {remedy}.")


def _require_sizes(config: PreTrainedConfig) -> None:
    _require(config, ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), ())
    if config.hidden_size % config.num_attention_heads != 0:
        raise ValueError(
            f"{type(config).__name__}: `hidden_size` ({config.hidden_size}) is not a multiple of "
            f"`num_attention_heads` ({config.num_attention_heads}). Change one of the two."
        )


@strict
class CADAVisionConfig(PreTrainedConfig):
    r"""
    The vision tower, a ViT with a class token. The defaults are ViT-B/16 at 224×224.

    Args:
        hidden_size, intermediate_size (`int`, *optional*, default to 768 and 3072):
            Width of the patch states, and inside the MLP.
        num_hidden_layers, num_attention_heads (`int`, *optional*, default to 12):
            Number of layers, and of attention heads, which has to divide `hidden_size`.
        image_size (`int` or `(height, width)`, *optional*, defaults to 224):
            Size of the input image in pixels. Pedestrian crops are often taller than wide: `(384, 128)`.
        num_channels, patch_size (`int`, *optional*, default to 3 and 16):
            Number of image channels, and side of a patch in pixels, which has to divide both sides of the image.
        hidden_act, attention_dropout (`str` and `float`, *optional*, default to `"gelu"` and 0.0):
            Activation of the MLP, and dropout on the attention probabilities.
        layer_norm_eps, initializer_range (`float`, *optional*, default to 1e-6 and 0.02):
            Epsilon of the layer norms, and standard deviation of the random weights.

    ```python
    >>> from configuration_cada import CADAVisionConfig
    >>> CADAVisionConfig(image_size=(384, 128)).grid_size
    (24, 8)
    ```
    """

    model_type = "cada_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _reject_typing_errors(self, kwargs)
        super().__post_init__(**kwargs)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Input size as (height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return tuple(self.image_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches as (rows, columns)."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def sequence_length(self) -> int:
        """Number of states of an image: the class token and the patches."""
        rows, columns = self.grid_size
        return 1 + rows * columns

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        _require_sizes(self)
        _require(self, ("num_channels", "patch_size"), ("attention_dropout",))
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(
                f"CADAVisionConfig: `image_size` is {self.image_size}. Give one number or (height, width)."
            )
        height, width = self.image_height_width
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"CADAVisionConfig: `patch_size` ({self.patch_size}) does not divide `image_size` "
                f"({height}×{width}). Choose sides that are multiples of the patch."
            )


@strict
class CADATextConfig(PreTrainedConfig):
    r"""
    The text stack, a BERT. It is the text encoder and, with cross-attention to the image, the decoder.

    Args:
        vocab_size, max_position_embeddings (`int`, *optional*, default to 30524 and 512):
            Word pieces (`bert-base-uncased` plus `[DEC]` and `[ENC]`, as in BLIP), and longest text in tokens.
        hidden_size, intermediate_size (`int`, *optional*, default to 768 and 3072):
            Width of the token states, and inside the MLP.
        num_hidden_layers, num_attention_heads (`int`, *optional*, default to 12):
            Number of layers, and of attention heads, which has to divide `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, *optional*, default to 0.1):
            Dropout on embeddings and on the output of attention and MLP, and on the attention probabilities.
        layer_norm_eps, initializer_range (`float`, *optional*, default to 1e-12 and 0.02):
            Epsilon of the layer norms, and standard deviation of the random weights.
        pad_token_id, enc_token_id (`int`, *optional*, default to 0 and 30523):
            Ids of `[PAD]`, and of `[ENC]`, which takes the place of `[CLS]` when the stack works as decoder.
        add_cross_attention, encoder_hidden_size (`bool` and `int`, *optional*, default to `True` and 768):
            Whether the layers have cross-attention, and the width of the patch states that it reads. [`CADAConfig`]
            sets both: a model without ATP and ARA has none.
    """

    model_type = "cada_text_model"
    base_config_key = "text_config"

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    enc_token_id: int = 30523
    add_cross_attention: bool = True
    encoder_hidden_size: int = 768

    def __post_init__(self, **kwargs):
        _reject_typing_errors(self, kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        _require_sizes(self)
        dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        _require(self, ("vocab_size", "max_position_embeddings"), dropouts)
        for name in ("enc_token_id", "pad_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"CADATextConfig: `{name}` ({token_id}) is outside the vocabulary of `vocab_size` "
                    f"{self.vocab_size}. Use the id that your tokenizer gives, and its length as `vocab_size`."
                )


@strict
class CADAConfig(PreTrainedConfig):
    r"""
    Configuration of [`CADAModel`] and [`CADAForTextToImageRetrieval`] (CADA, arXiv 2312.01745). The defaults are the
    paper's; `contrastive_loss="ndf_reference"`, `hard_negative_similarity="dot"`, `match_score="logit"`,
    `mask_unit="word"`, `mask_rate=0.4` and `ara_causal=True` give the authors' published code, which differs from it.

    Args:
        vision_config, text_config (`dict`, or `CADAVisionConfig` and `CADATextConfig`, *optional*):
            The vision tower and the text stack.
        projection_dim, temperature (`int` and `float`, *optional*, default to 256 and 0.02):
            Width d of the shared space of equation (1), and its temperature τ.
        max_text_length (`int`, *optional*, defaults to 73):
            Longest text in tokens: the first token and M = 72 others, which equation (4) cuts in groups. For longer
            captions add whole strides, as in 109 or 145.
        group_size, group_stride (`int`, *optional*, default to 36):
            Number s of token states in a group of equation (4), and step from one group to the next.
        pool_padding (`bool`, *optional*, defaults to `True`):
            Whether the mean of a group counts padding positions, as the paper's code does. `False` takes real tokens
            only and leaves empty groups out of the loss.
        contrastive_loss (`"ndf"`, `"ndf_reference"` or `"cmpm"`, *optional*, defaults to `"ndf"`):
            Equation (2), its form in the authors' code, or the baseline of the ablation (Zhang and Lu, ECCV 2018).
        hard_negative_similarity (`"cosine"` or `"dot"`, *optional*, defaults to `"cosine"`):
            Similarity that chooses the negatives of ATP: of normalised, or of unnormalised features.
        match_score (`"probability"` or `"logit"`, *optional*, defaults to `"probability"`):
            Form of the local score S_L: probability, or logit, of the class "match".
        mask_unit, mask_rate (`"phrase"` or `"word"`, and `float`, *optional*, default to `"phrase"` and 0.8):
            What ARA masks: whole attribute phrases, or single adjectives and nouns; and which share of them.
        use_atp, use_ara (`bool`, *optional*, default to `True`):
            Whether the model has the match heads and the loss of equation (5); the vocabulary head and that of (7).
        ara_weight (`float`, *optional*, defaults to 0.1):
            Weight β of equation (8).
        ara_causal (`bool`, *optional*, defaults to `False`):
            Whether a masked token reads earlier tokens only, as in the authors' code, whose ARA stack is a causal
            decoder. The paper's decoder reads the whole text.
        rerank_k (`int`, *optional*, defaults to 32):
            Number K of candidates of global matching that local matching ranks again.
        calibration (`dict`, *optional*):
            `weights` of S_G, of the logit of S_L and of 1, which give the probability that an image shows the person,
            see [`CADAConfig.match_probability`]; and what they were fitted on. `cada calibrate` and a
            training with a validation set write it.

    ```python
    >>> from configuration_cada import CADAConfig
    >>> config = CADAConfig(vision_config={"image_size": (384, 128)}, projection_dim=256)
    >>> config.num_groups
    2
    ```
    """

    model_type = "cada"
    sub_configs_defaults = {"vision_config": CADAVisionConfig, "text_config": CADATextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    temperature: float | int = 0.02
    max_text_length: int = 73
    group_size: int = 36
    group_stride: int = 36
    pool_padding: bool = True
    contrastive_loss: str = "ndf"
    hard_negative_similarity: str = "cosine"
    match_score: str = "probability"
    mask_unit: str = "phrase"
    mask_rate: float | int = 0.8
    use_atp: bool = True
    use_ara: bool = True
    ara_weight: float | int = 0.1
    ara_causal: bool = False
    rerank_k: int = 32
    calibration: dict | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        _reject_typing_errors(self, kwargs)
        super().__post_init__(**kwargs)
        # The decoder reads the patch states, so these two fields follow from the rest.
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size
        self.text_config.add_cross_attention = self.use_atp or self.use_ara

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in every configuration, but fields in `kwargs` are checked, and fields that follow from them, follow."""
        config_dict = dict(config_dict)
        if not __package__:
            # Not a checkpoint's copy of this file. `import cada` registers the pipeline beside it; with this entry,
            # `pipeline` would ask to trust the checkpoint's own.
            config_dict.pop("custom_pipelines", None)
        for name in set(kwargs) & set(cls.__annotations__):
            value = kwargs.pop(name)
            is_part = isinstance(value, dict) and isinstance(config_dict.get(name), dict)
            config_dict[name] = {**config_dict[name], **value} if is_part else value
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict:
        """As in every configuration, with the pipeline that travels along."""
        return {**super().to_dict(), "custom_pipelines": copy.deepcopy(PIPELINES)}

    @property
    def num_groups(self) -> int:
        """Number of groups of token states in equation (4)."""
        return (self.max_text_length - 1 - self.group_size) // self.group_stride + 1

    def local_logits(self, local_scores):
        """The logits, in float64, of local scores S_L (a tensor), which `match_score` gives another form."""
        is_probability = self.match_score == "probability"
        return local_scores.double().logit(eps=1e-7) if is_probability else local_scores.double()

    def match_probability(self, global_scores, local_scores):
        """
        The probability that an image shows the person described, from S_G and S_L (tensors of one shape), by logistic
        regression (Platt, 1999) with the weights in `calibration`; `None` without these.
        """
        if self.calibration is None:
            return None
        of_global, of_local, bias = self.calibration["weights"]
        return (of_global * global_scores.double() + of_local * self.local_logits(local_scores) + bias).sigmoid()

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        choices = {
            "contrastive_loss": ("ndf", "ndf_reference", "cmpm"),
            "hard_negative_similarity": ("cosine", "dot"),
            "match_score": ("probability", "logit"),
            "mask_unit": ("phrase", "word"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"CADAConfig: `{name}` is {getattr(self, name)!r}. Choose one of {allowed}.")
        _require(self, ("projection_dim", "temperature", "group_size", "group_stride", "rerank_k"), ("mask_rate",))
        if not self.ara_weight >= 0:
            raise ValueError(f"CADAConfig: `ara_weight` is {self.ara_weight}. Give 0 or more.")
        weights = [0.0, 0.0, 0.0] if self.calibration is None else self.calibration.get("weights")
        if not isinstance(weights, list) or len(weights) != 3 or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"CADAConfig: `calibration` is {self.calibration!r}. Give what `cada calibrate` writes, or `None`."
            )
        states = self.max_text_length - 1
        missing = self.group_size - states
        missing = missing if missing > 0 else missing % self.group_stride
        if missing:
            raise ValueError(
                f"CADAConfig: groups of `group_size` {self.group_size} at `group_stride` {self.group_stride} do not "
                f"fit the {states} token states (`max_text_length` - 1). Choose them so that group_size + "
                f"n * group_stride = {states} for a whole n, or raise `max_text_length` to "
                f"{self.max_text_length + missing}."
            )
        positions = self.text_config.max_position_embeddings
        if self.max_text_length > positions:
            raise ValueError(
                f"CADAConfig: `max_text_length` ({self.max_text_length}) is above the text stack's "
                f"`max_position_embeddings` ({positions}). Lower the first or raise the second."
            )


CADAVisionConfig.register_for_auto_class()
CADATextConfig.register_for_auto_class()
CADAConfig.register_for_auto_class()

__all__ = ["CADAConfig", "CADATextConfig", "CADAVisionConfig"]
