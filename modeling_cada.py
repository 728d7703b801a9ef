"""PyTorch CADA: Cross-Modal Adaptive Dual Association for text-to-image person retrieval (arXiv 2312.01745)."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


try:
    from .configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig
    from .losses_cada import ara_loss, atp_loss, check_parts, contrastive_loss, gather_batch, group_states, match_pairs
except ImportError:
    if __package__:
        raise
    from configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig
    from losses_cada import ara_loss, atp_loss, check_parts, contrastive_loss, gather_batch, group_states, match_pairs


@dataclass
class CADAOutput(ModelOutput):
    r"""
    Output of [`CADAModel`] and [`CADAForTextToImageRetrieval`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `person_ids`):
            Equation (8): `loss_ndf + loss_atp + ara_weight * loss_ara`.
        loss_ndf, loss_atp (`torch.FloatTensor` of shape `()`, *optional*, returned with `person_ids`):
            Contrastive loss, equation (2), and association of text tokens to image patches, equation (5).
        loss_ara (`torch.FloatTensor` of shape `()`, *optional*, returned with `masked_input_ids` and `labels`):
            Association of image regions to text attributes, equation (7).
        logits_per_image, logits_per_text (`torch.FloatTensor` of shape `(images, texts)` and `(texts, images)`):
            Cosine similarity of equation (1), divided by the temperature.
        image_embeds, text_embeds (`torch.FloatTensor` of shape `(images, projection_dim)`, `(texts, projection_dim)`):
            Normalised features.
        vision_model_output, text_model_output (`BaseModelOutputWithPooling` and `...AndCrossAttentions`):
            Outputs of the vision tower (patch states, v_cls) and of the text stack as encoder (token states, t_cls).
    """

    loss: torch.FloatTensor | None = None
    loss_ndf: torch.FloatTensor | None = None
    loss_atp: torch.FloatTensor | None = None
    loss_ara: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None

    def to_tuple(self) -> tuple[Any]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def blocks_of_pairs(image_index: torch.LongTensor) -> torch.LongTensor | None:
    """
    Pairs `(blocks, size)` that read one image each; pair p reads `image_index[p]` `(pairs,)`, which is on the CPU. A
    last block of an image that is short repeats its first pair. `None` if blocks would have one pair.
    """
    counts = image_index.unique(return_counts=True)[1]
    size = min(8, len(image_index) // max(1, len(counts)))
    if size < 2:
        return None
    pairs = image_index.argsort(stable=True)
    number = torch.arange(len(pairs)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within its image
    place, first = number % size, number % size == 0
    blocks = pairs[first][:, None].repeat(1, size)
    blocks[first.cumsum(0) - 1, place] = pairs
    return blocks


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting, where that is safe: other accelerators than CUDA may read the memory when it is gone."""
    return tensor.to(device, non_blocking=device.type == "cuda")


class CADAImages:
    """
    The images that the decoder's texts read. Text i reads image i; [`for_pairs`] chooses others.

    Args:
        states (`torch.FloatTensor` of shape `(images, 1 + patches, hidden)`):
            Patch states.
        share (`bool`, *optional*, defaults to `True`):
            Whether the keys and values of every layer are kept from their first use for all later texts, in `2 *
            layers` times the memory. Not with gradient checkpointing: a recomputation would take another path.
    """

    def __init__(self, states: torch.FloatTensor, share: bool = True):
        self.states = states
        self.keys_and_values: dict[int, tuple[Tensor, Tensor]] | None = {} if share else None
        self.image_index: torch.LongTensor | None = None  # of every text, or of every block
        self.blocks: tuple[torch.LongTensor, torch.LongTensor] | None = None  # their pairs; the place of each pair

    def for_pairs(self, image_index: torch.LongTensor, side_by_side: bool = False) -> "CADAImages":
        """
        The same images for other texts: text p reads image `image_index[p]` `(pairs,)`. With `side_by_side`, pairs of
        one image read it together, which is faster for many; then the index is best left on the CPU.
        """
        chosen, device = copy.copy(self), self.states.device
        chosen.blocks = None
        blocks = blocks_of_pairs(image_index.cpu()) if side_by_side else None
        if blocks is not None:
            pairs = blocks.flatten()
            places = torch.empty(len(image_index), dtype=torch.long)
            places[pairs] = torch.arange(len(pairs))
            chosen.blocks = to_device(pairs, device), to_device(places, device)
            image_index = image_index.cpu()[blocks[:, 0]]
        chosen.image_index = to_device(image_index, device)
        return chosen


def eager_attention_forward(module, query, key, value, attention_mask, scaling: float, dropout: float = 0.0, **kwargs):
    """Plain attention over `(batch, heads, length, head_dim)`; also returns the probabilities."""
    weights = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    if dropout > 0:  # a dropout of 0 would still draw a mask and multiply
        weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CADAAttention(nn.Module):
    """What self-attention and cross-attention share: four projections, and the attention interface of transformers."""

    def __init__(self, config: CADAVisionConfig | CADATextConfig, key_value_size: int, dropout: float):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.is_causal = False  # read by the attention interface where a call does not say otherwise
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(key_value_size, config.hidden_size)
        self.v_proj = nn.Linear(key_value_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def attend(self, query, key, value, attention_mask=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention over `(batch, length, hidden)`, before the last projection, and its probabilities."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads = (states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(self, *heads, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return output.flatten(2), weights


class CADASelfAttention(CADAAttention):
    """Patches read patches, or tokens read tokens."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, num_queries: int | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """The first `num_queries` positions, by default all, read all positions of `(batch, length, hidden)`."""
        query = self.q_proj(hidden_states[:, :num_queries])
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.out_proj(output), weights


class CADACrossAttention(CADAAttention):
    """Tokens read the patches of their image."""

    def __init__(self, config: CADATextConfig, layer_idx: int):
        super().__init__(config, config.encoder_hidden_size, config.attention_probs_dropout_prob)
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, patches: Tensor, images: CADAImages, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Texts `(texts, length, hidden)` read patches `(images, 1 + patches, vision hidden)`."""
        query = self.q_proj(hidden_states)
        if images.keys_and_values is None:
            key, value = self.k_proj(patches), self.v_proj(patches)
        else:
            if self.layer_idx not in images.keys_and_values:
                images.keys_and_values[self.layer_idx] = self.k_proj(patches), self.v_proj(patches)
            key, value = images.keys_and_values[self.layer_idx]
        if images.image_index is not None:
            key, value = key.index_select(0, images.image_index), value.index_select(0, images.image_index)
        if images.blocks is not None:  # the queries of a block are one long query
            query = query.index_select(0, images.blocks[0]).reshape(key.shape[0], -1, query.shape[-1])
        output, weights = self.attend(query, key, value, **kwargs)
        if images.blocks is not None:
            output = output.reshape(-1, *hidden_states.shape[1:]).index_select(0, images.blocks[1])
        return self.out_proj(output), weights


class CADAMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: CADAVisionConfig | CADATextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


def resize_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions `(1, 1 + rows * columns, hidden)` for another grid, bicubic; that of the class token stays."""
    if old_grid == new_grid:
        return positions
    grid = positions[:, 1:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new_grid, mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class CADAVisionEmbeddings(nn.Module):
    """Patches, class token and learned positions."""

    def __init__(self, config: CADAVisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, config.sequence_length, config.hidden_size))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        height, width = pixel_values.shape[-2:]
        if interpolate_pos_encoding:
            grid = height // self.config.patch_size, width // self.config.patch_size
            positions = resize_positions(self.position_embedding, self.config.grid_size, grid)
        elif (height, width) != self.config.image_height_width:
            raise ValueError(
                f"`pixel_values` are {height}×{width}, but the model takes images of "
                f"{'×'.join(map(str, self.config.image_height_width))}. Set the image processor's `size`, "
                "or pass `interpolate_pos_encoding=True`."
            )
        else:
            positions = self.position_embedding
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(patches.shape[0], -1, -1), patches], dim=1) + positions


class CADAVisionLayer(GradientCheckpointingLayer):
    """A ViT layer: the norms come before attention and MLP."""

    def __init__(self, config: CADAVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CADASelfAttention(config, config.hidden_size, config.attention_dropout)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CADAMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class CADATextEmbeddings(nn.Module):
    """Words and learned positions."""

    def __init__(self, config: CADATextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"A text of {length} tokens is longer than `max_position_embeddings` "
                f"({self.position_embeddings.num_embeddings}). Let the processor truncate it."
            )
        positions = torch.arange(length, device=input_ids.device)
        embeddings = self.word_embeddings(input_ids) + self.position_embeddings(positions)[None]
        return self.dropout(self.layer_norm(embeddings))


class CADATextLayer(GradientCheckpointingLayer):
    """A BERT layer: the norms come after self-attention, cross-attention (decoder only) and MLP."""

    def __init__(self, config: CADATextConfig, layer_idx: int):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CADASelfAttention(config, size, config.attention_probs_dropout_prob)
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=eps)
        if config.add_cross_attention:
            self.cross_attn = CADACrossAttention(config, layer_idx)
            self.cross_attn_layer_norm = nn.LayerNorm(size, eps=eps)
        self.mlp = CADAMLP(config)
        self.mlp_layer_norm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        patches=None,
        images=None,
        num_queries=None,
        is_causal=False,
        **kwargs,
    ) -> Tensor:
        # `patches` are the states of `images`: checkpointing and sharding look for tensors among the arguments.
        output, _ = self.self_attn(hidden_states, attention_mask, num_queries, is_causal=is_causal, **kwargs)
        hidden_states = self.self_attn_layer_norm(self.dropout(output) + hidden_states[:, :num_queries])
        if images is not None:
            output, _ = self.cross_attn(hidden_states, patches, images, **kwargs)
            hidden_states = self.cross_attn_layer_norm(self.dropout(output) + hidden_states)
        return self.mlp_layer_norm(self.dropout(self.mlp(hidden_states)) + hidden_states)


class CADAPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading."""

    config: CADAConfig
    base_model_prefix = "cada"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CADAVisionEmbeddings", "CADATextEmbeddings", "CADAVisionLayer", "CADATextLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CADAVisionEmbeddings):
            std = module.config.initializer_range
            init.trunc_normal_(module.class_embedding, std=std)
            init.trunc_normal_(module.position_embedding, std=std)


class CADAVisionModel(CADAPreTrainedModel):
    """The vision tower: a ViT with a class token."""

    config: CADAVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": CADAVisionLayer, "attentions": CADASelfAttention}

    def __init__(self, config: CADAVisionConfig):
        super().__init__(config)
        self.embeddings = CADAVisionEmbeddings(config)
        self.layers = nn.ModuleList([CADAVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`):
                Normalised images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to accept another image size than the configured one.

        Returns:
            `last_hidden_state` `(images, 1 + patches, hidden)`: v_cls, v_1..v_N; `pooler_output`: v_cls.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.post_layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class CADATextModel(CADAPreTrainedModel):
    """The text stack: text encoder, and with `encoder_hidden_states` the cross-attention decoder. Same weights."""

    config: CADATextConfig
    input_modalities = ("text",)
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {
        "hidden_states": CADATextLayer,
        "attentions": CADASelfAttention,
        "cross_attentions": CADACrossAttention,
    }

    def __init__(self, config: CADATextConfig):
        super().__init__(config)
        self.embeddings = CADATextEmbeddings(config)
        self.layers = nn.ModuleList([CADATextLayer(config, number) for number in range(config.num_hidden_layers)])
        self.post_init()

    def _attention_mask(self, hidden_states, attention_mask, num_queries, is_causal):
        """The mask of self-attention, in the form that the attention implementation takes."""
        if is_causal:  # the cache goes by position: transformers 5.24 gave the argument another name
            return create_causal_mask(self.config, hidden_states, attention_mask, None)
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states[:, :num_queries],
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_states,
            # To look whether there is padding at all would wait for an accelerator.
            allow_is_bidirectional_skip=attention_mask is None or attention_mask.device.type == "cpu",
        )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | CADAImages | None = None,
        num_queries: int | None = None,
        is_causal: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`):
                Word pieces.
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*):
                1 for real tokens, 0 for padding.
            encoder_hidden_states (`torch.FloatTensor` of shape `(texts, 1 + patches, hidden)`, *optional*):
                Patch states that the tokens read, or [`CADAImages`]. With them the stack is the decoder.
            num_queries (`int`, *optional*):
                How many first positions the last layer computes. By default all. Not with `is_causal`.
            is_causal (`bool`, *optional*, defaults to `False`):
                Whether a token reads itself and earlier tokens only.

        Returns:
            `last_hidden_state` `(texts, num_queries or length, hidden)`; `pooler_output`, its first position.
        """
        if is_causal and num_queries is not None:
            raise ValueError("`num_queries` does not go with `is_causal`. Give the first tokens alone instead.")
        images, patches = encoder_hidden_states, None
        if images is not None:
            if not self.config.add_cross_attention:
                raise ValueError("This text stack has no cross-attention. Set `use_atp` or `use_ara` in CADAConfig.")
            images = CADAImages(images, share=False) if torch.is_tensor(images) else images
            patches = images.states
        hidden_states = self.embeddings(input_ids)
        mask = self._attention_mask(hidden_states, attention_mask, None, is_causal)
        for number, layer in enumerate(self.layers):
            queries = num_queries if number + 1 == len(self.layers) else None
            if queries is not None:
                mask = self._attention_mask(hidden_states, attention_mask, queries, is_causal)
            hidden_states = layer(hidden_states, mask, patches, images, queries, is_causal=is_causal, **kwargs)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0]
        )


class CADAModel(CADAPreTrainedModel):
    """Both towers and their projections to the shared space: global matching, equation (1)."""

    def __init__(self, config: CADAConfig):
        super().__init__(config)
        self.vision_model = CADAVisionModel._from_config(config.vision_config)
        self.text_model = CADATextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Output of the text encoder; `pooler_output` is projected, not normalised `(texts, projection_dim)`."""
        outputs = self.text_model(input_ids, attention_mask, return_dict=True, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Output of the vision tower; `pooler_output` is projected, not normalised `(images, projection_dim)`."""
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CADAOutput:
        """[`CADAOutput`] without losses; arguments as in [`CADAForTextToImageRetrieval`]. Numbers may be unequal."""
        vision_outputs = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        text_outputs = self.text_model(input_ids, attention_mask, return_dict=True, **kwargs)
        image_embeds = F.normalize(self.visual_projection(vision_outputs.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text_outputs.pooler_output), dim=-1)
        logits_per_text = text_embeds @ image_embeds.t() / self.config.temperature
        return CADAOutput(
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision_outputs,
            text_model_output=text_outputs,
        )


class CADAVocabularyHead(nn.Module):
    """BERT's head of masked language modelling. Its output weights are the word embeddings."""

    def __init__(self, config: CADATextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))


class CADAForTextToImageRetrieval(CADAPreTrainedModel):
    """CADA with its three losses for training, and with global and local matching for retrieval."""

    _tied_weights_keys = {"vocabulary_head.decoder.weight": "cada.text_model.embeddings.word_embeddings.weight"}
    accepts_loss_kwargs = False  # of the Trainer: the losses are means over pairs, no number of tokens scales them

    def __init__(self, config: CADAConfig):
        super().__init__(config)
        self.cada = CADAModel(config)
        hidden_size = config.text_config.hidden_size
        # A switched-off loss leaves no weights behind: the ablation counts parameters, and DDP wants all of them used.
        if config.use_atp:
            self.match_head = nn.Linear(hidden_size, 2)
            self.group_match_head = nn.Linear(hidden_size, 2)
        if config.use_ara:
            self.vocabulary_head = CADAVocabularyHead(config.text_config)
        else:
            self._tied_weights_keys = {}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.vocabulary_head.decoder if self.config.use_ara else None

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.vocabulary_head.decoder = new_embeddings

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As [`CADAModel.get_text_features`]."""
        return self.cada.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """As [`CADAModel.get_image_features`]."""
        return self.cada.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)

    def load_adapter(self, *args, **kwargs):
        """As in every model; the calibration, which is that of the weights without the adapter, goes."""
        self.config.calibration = None
        return super().load_adapter(*args, **kwargs)

    def encode_images(self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """Patch states `(images, 1 + patches, hidden)` of `pixel_values`, the input of [`match`]."""
        return self.cada.vision_model(pixel_values, return_dict=True, **kwargs).last_hidden_state

    def _decode(self, input_ids, attention_mask, images, **kwargs) -> Tensor:
        """Decoder states of the matching task, whose input begins with [ENC] in place of [CLS]."""
        input_ids = F.pad(input_ids[:, 1:], (1, 0), value=self.config.text_config.enc_token_id)
        return self.cada.text_model(input_ids, attention_mask, images, return_dict=True, **kwargs).last_hidden_state

    def match(
        self,
        input_ids: torch.LongTensor,
        attention_mask: Tensor,
        image_states: torch.FloatTensor | CADAImages,
        text_index: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        r"""
        Local matching of the listed pairs, equation (4) with e_cls. Keys and values are computed once per image of
        `image_states`, and once for all calls with the same [`CADAImages`]. Texts are cut to the longest of the listed
        ones, the last layer computes e_cls only. Texts and indices are best left on the CPU: then it does not wait for
        an accelerator.

        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`):
                Word pieces.
            attention_mask (`torch.Tensor` of shape `(texts, length)`):
                1 for real tokens, which come first.
            image_states (`torch.FloatTensor` of shape `(images, 1 + patches, hidden)`):
                From [`encode_images`], or [`CADAImages`] of it.
            text_index, image_index (`torch.LongTensor` of shape `(pairs,)`, *optional*):
                The pairs. Without them text i is paired with image i.

        Returns:
            `torch.FloatTensor` of shape `(pairs, 2)`: logits of "no match" and "match".
        """
        if not self.config.use_atp:
            raise ValueError("This model has no match head (`use_atp=False`): it ranks by global matching only.")
        if (text_index is None) != (image_index is None):
            raise ValueError("Give both `text_index` and `image_index`, or neither.")
        images = CADAImages(image_states, share=False) if torch.is_tensor(image_states) else image_states
        if text_index is not None:
            listed = text_index.to(input_ids.device)
            input_ids, attention_mask = input_ids[listed], attention_mask[listed]
            images = images.for_pairs(image_index, side_by_side=True)
        if len(input_ids) == 0:
            return self.match_head.weight.new_zeros(0, 2)
        shortest, longest = map(int, attention_mask.sum(dim=1).aminmax())
        device = images.states.device
        mask = None if shortest == longest else to_device(attention_mask[:, :longest], device)
        states = self._decode(to_device(input_ids[:, :longest], device), mask, images, num_queries=1)
        return self.match_head(states[:, 0])

    def local_score(self, match_logits: torch.FloatTensor) -> torch.FloatTensor:
        """The local score S_L `(pairs,)` of match logits `(pairs, 2)`, in the form that `match_score` names."""
        if self.config.match_score == "logit":
            return match_logits[:, 1]
        return match_logits.float().softmax(dim=-1)[:, 1]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: Tensor | None = None,
        person_ids: torch.LongTensor | None = None,
        masked_input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        negative_temperature: float | None = None,
        caption_ids: torch.LongTensor | None = None,
        label_noise_robust: bool = False,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CADAOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`):
                Word pieces of the captions.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`):
                Normalised images.
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*):
                1 for real tokens, 0 for padding.
            person_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                The person of pair i, for the losses: text i describes image i. Several processes compute the losses
                together, over all their pairs, so all of them have to call, with equally many.
            masked_input_ids, labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                For ARA: the captions with masked attributes; the ids that were masked, -100 elsewhere.
            return_loss (`bool`, *optional*):
                `False` computes no losses; `True` demands `person_ids`. By default losses follow from `person_ids`.
            negative_temperature (`float`, *optional*):
                `None` takes the hardest negatives for ATP, as the paper does; a number T draws by softmax(S / T).
            caption_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Equal for equal captions: then ATP takes none as a negative of the other's image.
            label_noise_robust (`bool`, *optional*, defaults to `False`):
                Whether pairs whose text seems to describe another person count less.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to accept another image size than the configured one.
        """
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True, **kwargs}
        outputs = self.cada(input_ids, pixel_values, attention_mask, **options)
        if return_loss is False or (person_ids is None and return_loss is None):
            return outputs
        self._check_pairs(input_ids, pixel_values, person_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features, all_ids = self._gather_features(outputs), gather_batch(person_ids)
        loss_ndf, weights = self._ndf_loss(features, all_ids, label_noise_robust)
        loss, loss_atp, loss_ara = loss_ndf, None, None
        # Both passes of the decoder share keys and values.
        share = not (self.training and self.is_activation_checkpointing)
        images = CADAImages(outputs.vision_model_output.last_hidden_state, share)
        if self.config.use_atp:
            images, pairs = self._match_pairs(features, all_ids, images, negative_temperature, caption_ids)
            loss_atp = self._atp_loss(input_ids, attention_mask, images, *pairs, weights)
            loss = loss + loss_atp
        if self.config.use_ara and masked_input_ids is not None and labels is not None:
            loss_ara = self._ara_loss(masked_input_ids, attention_mask, labels, images, weights, **kwargs)
            loss = loss + self.config.ara_weight * loss_ara
        losses = {"loss": loss, "loss_ndf": loss_ndf, "loss_atp": loss_atp, "loss_ara": loss_ara}
        return CADAOutput(**{**outputs, **losses})

    def _check_pairs(self, input_ids, pixel_values, person_ids) -> None:
        if person_ids is None:
            raise ValueError("`return_loss=True` needs `person_ids`, the person of each pair.")
        if not len(person_ids) == len(input_ids) == len(pixel_values):
            raise ValueError(
                f"The losses need pairs: {len(input_ids)} texts, {len(pixel_values)} images and {len(person_ids)} "
                "`person_ids` have to be equally many."
            )
        if input_ids.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"The texts have {input_ids.shape[1]} tokens, above `max_text_length` "
                f"({self.config.max_text_length}). Truncate them in the processor, or raise `max_text_length`."
            )
        check_parts(len(person_ids), person_ids.device)

    def _gather_features(self, outputs: CADAOutput) -> tuple[Tensor, Tensor]:
        """Unnormalised features of images and texts `(batch, projection_dim)`, of all processes."""
        image_features = self.cada.visual_projection(outputs.vision_model_output.pooler_output)
        text_features = self.cada.text_projection(outputs.text_model_output.pooler_output)
        # In float32, also under autocast: divided by τ = 0.02, half precision would leave steps of 0.2 in the logits.
        return gather_batch(image_features.float()), gather_batch(text_features.float())

    def _ndf_loss(self, features, all_ids, label_noise_robust) -> tuple[Tensor, Tensor]:
        """Equation (2), or what takes its place; and how much each pair of this process counts."""
        with torch.autocast(all_ids.device.type, enabled=False):
            kind, temperature = self.config.contrastive_loss, self.config.temperature
            return contrastive_loss(kind, *features, all_ids, temperature, label_noise_robust)

    def _match_pairs(self, features, all_ids, images, temperature, caption_ids):
        """
        The images that the pairs of equation (5) read, and of each pair text (of all processes), image and label. Text
        i of this process reads image i of its own.
        """
        rows = len(images.states)
        if self.config.hard_negative_similarity == "cosine":
            features = tuple(F.normalize(values, dim=-1) for values in features)
        caption_ids = None if caption_ids is None else gather_batch(caption_ids)
        text_index, image_index, match_labels = match_pairs(*features, all_ids, rows, temperature, caption_ids)
        if rows < len(all_ids):  # of other processes' images, those that are a negative here
            used, image_index = image_index.unique(return_inverse=True)
            states, share = gather_batch(images.states)[used], images.keys_and_values is not None
            images = CADAImages(states, share).for_pairs(image_index[:rows])
        return images, (text_index, image_index, match_labels)

    def _atp_loss(self, input_ids, attention_mask, images, text_index, image_index, match_labels, weights) -> Tensor:
        """Equation (5) for pairs of a text of all processes and an image of `images`."""
        config = self.config
        if config.pool_padding and is_flash_attention_requested(config.text_config):
            raise ValueError(
                "`pool_padding=True` averages states at padding positions, which flash attention does not compute. "
                'Train with `attn_implementation="sdpa"`, or set `pool_padding=False`.'
            )
        missing = config.max_text_length - input_ids.shape[1]
        padded = F.pad(input_ids, (0, missing), value=config.text_config.pad_token_id or 0)
        texts, masks = gather_batch(padded)[text_index], gather_batch(F.pad(attention_mask, (0, missing)))[text_index]
        longest = texts.shape[1] if config.pool_padding else int(masks.sum(dim=1).max())  # nobody reads the padding
        images = images.for_pairs(image_index)
        states = self._decode(texts[:, :longest], masks[:, :longest], images)
        # The same groups are cut from every batch, so states are as many as equation (4) has.
        states = F.pad(states, (0, 0, 0, texts.shape[1] - longest))
        groups, group_mask = group_states(states, masks, config.group_size, config.group_stride, config.pool_padding)
        match_logits, group_logits = self.match_head(states[:, 0]), self.group_match_head(groups)
        weights = F.pad(weights, (0, len(text_index) - len(weights)), value=1.0)  # the negatives count in full
        return atp_loss(match_logits, group_logits, group_mask, match_labels, weights)

    def _ara_loss(self, masked_input_ids, attention_mask, labels, images, weights, **kwargs) -> Tensor:
        """Equation (7)."""
        options = {"is_causal": self.config.ara_causal, "return_dict": True, **kwargs}
        states = self.cada.text_model(masked_input_ids, attention_mask, images, **options).last_hidden_state
        masked = labels != -100
        weights = weights[:, None].expand_as(labels)[masked]
        return ara_loss(self.vocabulary_head(states[masked]), labels[masked], weights)


CADAModel.register_for_auto_class("AutoModel")
CADAForTextToImageRetrieval.register_for_auto_class("AutoModel")

__all__ = ["CADAForTextToImageRetrieval", "CADAModel", "CADAPreTrainedModel", "CADATextModel", "CADAVisionModel"]
