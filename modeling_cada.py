"""PyTorch CADA: Cross-Modal Adaptive Dual Association for text-to-image person retrieval (arXiv 2312.01745)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
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
    from .losses_cada import (
        ara_loss,
        atp_loss,
        contrastive_loss,
        count_rows,
        gather_batch,
        group_states,
        match_pairs,
        own_rows,
        run_in_chunks,
    )
except ImportError:
    if __package__:
        raise
    from configuration_cada import CADAConfig, CADATextConfig, CADAVisionConfig
    from losses_cada import (
        ara_loss,
        atp_loss,
        contrastive_loss,
        count_rows,
        gather_batch,
        group_states,
        match_pairs,
        own_rows,
        run_in_chunks,
    )


@dataclass
class CADAOutput(ModelOutput):
    r"""
    Output of [`CADAModel`] and [`CADAForTextToImageRetrieval`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `person_ids`):
            Equation (8): `loss_ndf + loss_atp + ara_weight * loss_ara`.
        loss_ndf (`torch.FloatTensor` of shape `()`, *optional*):
            Contrastive loss, equation (2).
        loss_atp (`torch.FloatTensor` of shape `()`, *optional*):
            Association of text tokens to image patches, equation (5).
        loss_ara (`torch.FloatTensor` of shape `()`, *optional*, returned with `masked_input_ids` and `labels`):
            Association of image regions to text attributes, equation (7).
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`):
            Cosine similarity of equation (1), divided by the temperature.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`):
            The same, transposed.
        image_embeds (`torch.FloatTensor` of shape `(images, projection_dim)`):
            Normalised image features.
        text_embeds (`torch.FloatTensor` of shape `(texts, projection_dim)`):
            Normalised text features.
        vision_model_output (`BaseModelOutputWithPooling`):
            Output of the vision tower: patch states, v_cls.
        text_model_output (`BaseModelOutputWithPoolingAndCrossAttentions`):
            Output of the text stack as encoder: token states, t_cls.
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


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over `(batch, heads, length, head_dim)`; also returns the probabilities."""
    weights = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    if dropout > 0:  # a dropout of 0 would still draw a mask and multiply
        weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CADAAttention(nn.Module):
    """Multi-head attention through the attention interface of transformers."""

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

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(batch, length, hidden)` of `states` `(batch, length, key_value_size)`."""
        return self.k_proj(states), self.v_proj(states)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        projected_values: torch.Tensor | None = None,
        key_value_index: torch.Tensor | None = None,
        blocks: tuple[torch.Tensor, torch.Tensor] | None = None,
        is_causal: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Queries from `hidden_states` `(batch, length, hidden)`; keys and values from `key_value_states`, by default the
        same; with `projected_values` both come ready from [`project`]. With `key_value_index` `(batch,)` row b reads
        row `key_value_index[b]` of them: computed once, copied for every row. With `blocks`, the rows of all blocks
        `(blocks * size,)` and the place of each row there `(batch,)`, it is `(blocks,)`, and no weights are returned.
        """
        source = hidden_states if key_value_states is None else key_value_states
        query = self.q_proj(hidden_states)
        key, value = self.project(source) if projected_values is None else (source, projected_values)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if query.shape[0] == 0:  # a process without rows in the last batch; kernels refuse that. Gradients are zero
            return self.out_proj(query + 0 * (key.sum() + value.sum())), None
        if blocks is not None:  # the queries of a block are one long query
            query = query.index_select(0, blocks[0]).reshape(len(key_value_index), -1, query.shape[-1])
        if key_value_index is not None:
            key, value = key.index_select(0, key_value_index), value.index_select(0, key_value_index)
        output, weights = attention(
            self,
            *map(self._heads, (query, key, value)),
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            **kwargs,
        )
        if blocks is not None:
            output, weights = output.reshape(-1, *hidden_states.shape[1:]).index_select(0, blocks[1]), None
        return self.out_proj(output.reshape(hidden_states.shape)), weights


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


class CADAVisionAttention(CADAAttention):
    """Patches read patches."""


class CADATextSelfAttention(CADAAttention):
    """Tokens read tokens."""


class CADATextCrossAttention(CADAAttention):
    """Tokens read image patches."""


class CADAMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: CADAVisionConfig | CADATextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


def resize_positions(positions: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
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

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
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
        self.self_attn = CADAVisionAttention(config, config.hidden_size, config.attention_dropout)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CADAMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
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

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"A text of {length} tokens is longer than `max_position_embeddings` "
                f"({self.position_embeddings.num_embeddings}). Let the processor truncate it."
            )
        positions = torch.arange(length, device=input_ids.device)
        return self.dropout(
            self.layer_norm(self.word_embeddings(input_ids) + self.position_embeddings(positions)[None])
        )


class CADATextLayer(GradientCheckpointingLayer):
    """A BERT layer: the norms come after self-attention, cross-attention (decoder only) and MLP."""

    def __init__(self, config: CADATextConfig):
        super().__init__()
        size, eps, dropout = config.hidden_size, config.layer_norm_eps, config.attention_probs_dropout_prob
        self.self_attn = CADATextSelfAttention(config, size, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=eps)
        if config.add_cross_attention:
            self.cross_attn = CADATextCrossAttention(config, config.encoder_hidden_size, dropout)
            self.cross_attn_layer_norm = nn.LayerNorm(size, eps=eps)
        self.mlp = CADAMLP(config)
        self.mlp_layer_norm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_values: torch.Tensor | None = None,
        encoder_index: torch.Tensor | None = None,
        encoder_blocks: tuple[torch.Tensor, torch.Tensor] | None = None,
        text_index: torch.Tensor | None = None,
        num_queries: int | None = None,
        is_causal: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if hidden_states is None:  # a call, so that sharding and offloading, which hook into calls, bring the weights
            return self.cross_attn.project(encoder_hidden_states)
        # `num_queries` first positions are computed, the others only serve as keys and values.
        queries = hidden_states[:, :num_queries]
        output, _ = self.self_attn(queries, attention_mask, hidden_states, is_causal=is_causal, **kwargs)
        hidden_states = self.self_attn_layer_norm(self.dropout(output) + queries)
        if text_index is not None:  # the image comes in only now: until here a text is computed once for all its pairs
            hidden_states = hidden_states.index_select(0, text_index)
        if encoder_hidden_states is not None:
            output, _ = self.cross_attn(
                hidden_states, None, encoder_hidden_states, encoder_values, encoder_index, encoder_blocks, **kwargs
            )
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
        elif isinstance(module, CADAVocabularyHead):
            init.zeros_(module.bias)


class CADAVisionModel(CADAPreTrainedModel):
    """The vision tower: a ViT with a class token."""

    config: CADAVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": CADAVisionLayer, "attentions": CADAVisionAttention}

    def __init__(self, config: CADAVisionConfig):
        super().__init__(config)
        self.embeddings = CADAVisionEmbeddings(config)
        self.layers = nn.ModuleList([CADAVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`):
                Normalised images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to accept another image size than the configured one.

        Returns:
            `last_hidden_state` `(images, 1 + patches, hidden)`: v_cls, v_1..v_N; `pooler_output` `(images, hidden)`:
            v_cls.
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
        "attentions": CADATextSelfAttention,
        "cross_attentions": CADATextCrossAttention,
    }

    def __init__(self, config: CADATextConfig):
        super().__init__(config)
        self.embeddings = CADATextEmbeddings(config)
        self.layers = nn.ModuleList([CADATextLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def project_images(self, image_states: torch.FloatTensor) -> list[tuple[torch.FloatTensor, torch.FloatTensor]]:
        """
        Keys and values `(images, 1 + patches, hidden)` of patch states in every layer: what several calls of the
        decoder for the same images share, in place of `encoder_hidden_states`. Of `2 * layers` times its memory.
        """
        return [layer(None, None, image_states) for layer in self.layers]

    def _attention_mask(self, hidden_states, attention_mask, num_queries, is_causal):
        """The mask of self-attention, in the form that the attention implementation takes."""
        if is_causal:
            return create_causal_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, past_key_values=None
            )
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
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | list[tuple[torch.FloatTensor, torch.FloatTensor]] | None = None,
        encoder_index: torch.LongTensor | None = None,
        text_index: torch.LongTensor | None = None,
        num_queries: int | None = None,
        is_causal: bool = False,
        encoder_blocks: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`):
                Word pieces.
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*):
                1 for real tokens, 0 for padding.
            encoder_hidden_states (`torch.FloatTensor` of shape `(images, 1 + patches, vision hidden)`, *optional*):
                Patch states that the tokens read, or what [`project_images`] made of them. With them the stack is the
                decoder.
            encoder_index, text_index (`torch.LongTensor` of shape `(pairs,)`, *optional*):
                The pairs that the decoder computes: text `text_index[p]` reads image `encoder_index[p]`. By default
                text i reads image i.
            num_queries (`int`, *optional*):
                How many first positions the last layer computes. By default all.
            is_causal (`bool`, *optional*, defaults to `False`):
                Whether a token reads itself and earlier tokens only.
            encoder_blocks (`torch.LongTensor` of shape `(blocks, size)`, *optional*):
                All pairs of `encoder_index` in blocks that read one image, from [`blocks_of_pairs`]: faster for many.

        Returns:
            `last_hidden_state` `(texts or pairs, num_queries or length, hidden)`; `pooler_output`, its first position.
        """
        if is_causal and num_queries is not None:  # later positions are read by nobody
            input_ids, num_queries = input_ids[:, :num_queries], None
            attention_mask = None if attention_mask is None else attention_mask[:, : input_ids.shape[1]]
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError("This text stack has no cross-attention. Set `use_atp` or `use_ara` in CADAConfig.")
        projected = isinstance(encoder_hidden_states, list)
        if encoder_blocks is not None:
            rows, places = encoder_blocks.flatten(), encoder_index.new_full(encoder_index.shape, -1)
            places[rows] = torch.arange(len(rows), device=rows.device)
            encoder_index, encoder_blocks = encoder_index[encoder_blocks[:, 0]], (rows, places)
        hidden_states = self.embeddings(input_ids)
        for number, layer in enumerate(self.layers):
            queries = num_queries if number + 1 == len(self.layers) else None
            if number == 0 or (number == 1 and text_index is not None) or queries is not None:
                mask = self._attention_mask(hidden_states, attention_mask, queries, is_causal)
            hidden_states = layer(
                hidden_states,
                mask,
                *(encoder_hidden_states[number] if projected else (encoder_hidden_states, None)),
                encoder_index,
                encoder_blocks,
                text_index if number == 0 else None,
                queries,
                is_causal=is_causal,
                **kwargs,
            )
            if number == 0 and text_index is not None and attention_mask is not None:
                attention_mask = attention_mask.index_select(0, text_index)  # pairs from here on
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
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        r"""
        Output of the text encoder with the projected, not normalised features `(texts, projection_dim)` as
        `pooler_output`.
        """
        outputs = self.text_model(input_ids, attention_mask, return_dict=True, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Output of the vision tower with the projected, not normalised features `(images, projection_dim)` as
        `pooler_output`.
        """
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        chunk_size: int | None = None,
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
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to accept another image size than the configured one.
            chunk_size (`int`, *optional*):
                Images and texts whose activations are in memory at once, see [`run_in_chunks`]. By default all.

        Returns:
            [`CADAOutput`] without losses.
        """

        def encode(tower, output_class, *inputs, **options):
            def run(*rows):
                return tower(*rows, return_dict=True, **options, **kwargs)

            if chunk_size is None:
                return run(*inputs)
            states = run_in_chunks(lambda *rows: run(*rows).last_hidden_state, chunk_size, *inputs)
            return output_class(last_hidden_state=states, pooler_output=states[:, 0])

        options = {"interpolate_pos_encoding": interpolate_pos_encoding}
        vision_outputs = encode(self.vision_model, BaseModelOutputWithPooling, pixel_values, **options)
        texts = (input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        text_outputs = encode(self.text_model, BaseModelOutputWithPoolingAndCrossAttentions, *texts)
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
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states)))) + self.bias


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

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in every model; the bias of the vocabulary head grows along."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.use_ara:
            bias = self.vocabulary_head.bias
            missing = embeddings.num_embeddings - len(bias)  # negative where the vocabulary shrinks
            self.vocabulary_head.bias = nn.Parameter(F.pad(bias.data, (0, missing)))
        return embeddings

    def get_text_features(self, *args, **kwargs) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As [`CADAModel.get_text_features`]."""
        return self.cada.get_text_features(*args, **kwargs)

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """As [`CADAModel.get_image_features`]."""
        return self.cada.get_image_features(*args, **kwargs)

    def encode_images(self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """Patch states `(images, 1 + patches, hidden)` of `pixel_values`, the input of [`match`]."""
        return self.cada.vision_model(pixel_values, return_dict=True, **kwargs).last_hidden_state

    def project_images(self, image_states: torch.FloatTensor) -> list[tuple[torch.FloatTensor, torch.FloatTensor]]:
        """As [`CADATextModel.project_images`]."""
        return self.cada.text_model.project_images(image_states)

    def _decode(self, input_ids, attention_mask, *pairs, **kwargs) -> torch.Tensor:
        """Decoder states of pairs in the matching task, whose input begins with [ENC] in place of [CLS]."""
        input_ids = F.pad(input_ids[:, 1:], (1, 0), value=self.config.text_config.enc_token_id)
        return self.cada.text_model(input_ids, attention_mask, *pairs, return_dict=True, **kwargs).last_hidden_state

    def match(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        image_states: torch.FloatTensor | list[tuple[torch.FloatTensor, torch.FloatTensor]],
        text_index: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        r"""
        Local matching of the listed pairs, equation (4) with e_cls. Keys and values are computed once per image of
        `image_states`, or given by [`project_images`] for several calls with the same images. Texts are cut to the
        longest of the listed ones, the first self-attention is computed once per text of `input_ids`, the last layer
        computes e_cls only. Texts and indices are best left on the CPU: then it does not wait for an accelerator.

        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`):
                Word pieces.
            attention_mask (`torch.Tensor` of shape `(texts, length)`):
                1 for real tokens, which come first.
            image_states (`torch.FloatTensor` of shape `(images, 1 + patches, hidden)`):
                From [`encode_images`], or what [`project_images`] made of it.
            text_index, image_index (`torch.LongTensor` of shape `(pairs,)`, *optional*):
                The pairs. Without them text i is paired with image i.

        Returns:
            `torch.FloatTensor` of shape `(pairs, 2)`: logits of "no match" and "match".
        """
        if not self.config.use_atp:
            raise ValueError("This model has no match head (`use_atp=False`): it ranks by global matching only.")
        if (text_index is None) != (image_index is None):
            raise ValueError("Give both `text_index` and `image_index`, or neither.")
        if len(input_ids if text_index is None else text_index) == 0:
            return self.match_head.weight.new_zeros(0, 2)
        listed = slice(None) if text_index is None else text_index.to(attention_mask.device)
        shortest, longest = map(int, attention_mask[listed].sum(dim=1).aminmax())
        mask = None if shortest == longest else attention_mask[:, :longest]
        blocks = None if image_index is None else blocks_of_pairs(image_index.cpu())
        device = (image_states[0][0] if isinstance(image_states, list) else image_states).device
        input_ids, mask, image_index, text_index, blocks = (
            # Other accelerators than CUDA may read the memory when it is no longer ours.
            None if tensor is None else tensor.to(device, non_blocking=device.type == "cuda")
            for tensor in (input_ids[:, :longest], mask, image_index, text_index, blocks)
        )
        states = self._decode(input_ids, mask, image_states, image_index, text_index, 1, encoder_blocks=blocks)
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
        attention_mask: torch.Tensor | None = None,
        person_ids: torch.LongTensor | None = None,
        masked_input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        negative_temperature: float | None = None,
        interpolate_pos_encoding: bool = False,
        chunk_size: int | None = None,
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
                together, over all their pairs, so all of them have to call.
            masked_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                The captions with masked attributes, for ARA.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                The masked ids, -100 elsewhere.
            return_loss (`bool`, *optional*):
                `False` computes no losses; `True` demands `person_ids`. By default losses follow from `person_ids`.
            negative_temperature (`float`, *optional*):
                `None` takes the hardest negatives for ATP, as the paper does; a number T draws them with probability
                softmax(S / T).
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to accept another image size than the configured one.
            chunk_size (`int`, *optional*):
                Pairs whose activations are in memory at once: a large batch on a small device, at the price of a
                second forward pass. Losses and gradients stay those of the whole batch. By default all.

        Returns:
            [`CADAOutput`].
        """
        outputs = self.cada(
            input_ids, pixel_values, attention_mask, interpolate_pos_encoding, chunk_size, return_dict=True, **kwargs
        )
        if return_loss and person_ids is None:
            raise ValueError("`return_loss=True` needs `person_ids`, the person of each pair.")
        if person_ids is None or return_loss is False:
            return outputs
        if not len(person_ids) == len(input_ids) == len(pixel_values):
            raise ValueError(
                f"The losses need pairs: {len(input_ids)} texts, {len(pixel_values)} images and {len(person_ids)} "
                "`person_ids` have to be equally many."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"The texts have {input_ids.shape[1]} tokens, above `max_text_length` "
                f"({self.config.max_text_length}). Truncate them in the processor, or raise `max_text_length`."
            )

        # In float32, also under autocast: divided by τ = 0.02, half precision would leave steps of 0.2 in the logits.
        rows = count_rows(len(person_ids), person_ids.device)
        vision, text = outputs.vision_model_output, outputs.text_model_output
        image_features = gather_batch(self.cada.visual_projection(vision.pooler_output).float(), rows)
        text_features = gather_batch(self.cada.text_projection(text.pooler_output).float(), rows)
        all_ids = gather_batch(person_ids, rows)
        images = vision.last_hidden_state
        with torch.autocast(image_features.device.type, enabled=False):
            kind, temperature = self.config.contrastive_loss, self.config.temperature
            loss = loss_ndf = contrastive_loss(kind, image_features, text_features, all_ids, temperature)
        loss_atp = loss_ara = image_index = None
        if self.config.use_atp:
            own = own_rows(rows, person_ids.device)
            features = image_features, text_features
            if self.config.hard_negative_similarity == "cosine":
                features = tuple(F.normalize(values, dim=-1) for values in features)
            text_of_pair, image_of_pair, match_labels = match_pairs(*features, all_ids, own, negative_temperature)
            if len(rows) > 1:  # of other processes' images, those that are a negative here
                used, image_of_pair = image_of_pair.unique(return_inverse=True)
                images, own = gather_batch(images, rows)[used], torch.searchsorted(used, own)
            if chunk_size is None:
                images = self.project_images(images)  # shared by both decoder passes
            pairs = text_of_pair, image_of_pair, match_labels
            loss_atp = self._atp(input_ids, attention_mask, images, pairs, rows, chunk_size)
            loss = loss + loss_atp
            if len(rows) > 1:
                images, image_index = (images, own) if chunk_size is None else (images[own], None)
        if self.config.use_ara and masked_input_ids is not None and labels is not None:
            masked = labels != -100

            def decode(input_ids, attention_mask, masked, images):
                options = {"is_causal": self.config.ara_causal, "return_dict": True, **kwargs}
                outputs = self.cada.text_model(input_ids, attention_mask, images, image_index, **options)
                return outputs.last_hidden_state[masked]

            inputs = (masked_input_ids, attention_mask, masked, images)
            states = decode(*inputs) if chunk_size is None else run_in_chunks(decode, chunk_size, *inputs)
            loss_ara = ara_loss(self.vocabulary_head(states), labels[masked])
            loss = loss + self.config.ara_weight * loss_ara
        return CADAOutput(
            **{**outputs, "loss": loss, "loss_ndf": loss_ndf, "loss_atp": loss_atp, "loss_ara": loss_ara}
        )

    def _atp(self, input_ids, attention_mask, images, pairs, rows, chunk_size) -> torch.Tensor:
        """
        Equation (5) for `pairs`: text (of all processes, which hold `rows` each), image (of `images`, which are states
        or projected) and label of each.
        """
        config = self.config
        text_index, image_index, match_labels = pairs
        if config.pool_padding and is_flash_attention_requested(config.text_config):
            raise ValueError(
                "`pool_padding=True` averages states at padding positions, which flash attention does not compute. "
                'Train with `attn_implementation="sdpa"`, or set `pool_padding=False`.'
            )
        texts, masks = input_ids, attention_mask
        if config.pool_padding or len(rows) > 1:
            missing = config.max_text_length - input_ids.shape[1]
            texts = gather_batch(F.pad(input_ids, (0, missing), value=config.text_config.pad_token_id or 0), rows)
            masks = gather_batch(F.pad(attention_mask, (0, missing)), rows)
        if not config.pool_padding and len(rows) > 1:  # nobody reads the padding
            longest = int(masks.sum(dim=1).max())
            texts, masks = texts[:, :longest], masks[:, :longest]

        def match(text_index, image_index, texts=texts, masks=masks, images=images):
            states = self._decode(texts, masks, images, image_index, text_index)
            # The same groups are cut from every batch, so states are as many as equation (4) has.
            missing = config.max_text_length - states.shape[1]
            padded = F.pad(states, (0, 0, 0, missing)), F.pad(masks[text_index], (0, missing))
            groups, group_mask = group_states(*padded, config.group_size, config.group_stride, config.pool_padding)
            return self.match_head(states[:, 0]), self.group_match_head(groups), group_mask

        def match_few(text_index, image_index):
            used, image_index = image_index.unique(return_inverse=True)
            read, text_index = text_index.unique(return_inverse=True)
            return match(text_index, image_index, texts[read], masks[read], images[used])

        if chunk_size is None:
            logits = match(text_index, image_index)
        else:
            order = image_index.argsort()  # so that few chunks project the same image
            match_labels = match_labels[order]
            logits = run_in_chunks(match_few, 3 * chunk_size, text_index[order], image_index[order])
        return atp_loss(*logits, match_labels)


CADAModel.register_for_auto_class("AutoModel")
CADAForTextToImageRetrieval.register_for_auto_class("AutoModel")

__all__ = [
    "CADAForTextToImageRetrieval",
    "CADAModel",
    "CADAOutput",
    "CADAPreTrainedModel",
    "CADATextModel",
    "CADAVisionModel",
]
