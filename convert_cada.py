"""Checkpoints of the authors' code, renamed to this format."""

import re

import torch


# Order matters: the first pattern that matches renames the key. Both text attentions share their inner names.
_CADA_ORIGINAL = [
    (r"^visual_encoder\.cls_token$", "cada.vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "cada.vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "cada.vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"cada.vision_model.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"cada.vision_model.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"cada.vision_model.layers.\1.self_attn.out_proj."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"cada.vision_model.layers.\1.mlp."),
    (r"^visual_encoder\.norm\.", "cada.vision_model.post_layernorm."),
    (r"^text_encoder\.embeddings\.LayerNorm\.", "cada.text_model.embeddings.layer_norm."),
    (r"^text_encoder\.embeddings\.", "cada.text_model.embeddings."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.attention\.", r"cada.text_model.layers.\1.self_attn."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.crossattention\.", r"cada.text_model.layers.\1.cross_attn."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"cada.text_model.layers.\1.mlp.fc1."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.output\.dense\.", r"cada.text_model.layers.\1.mlp.fc2."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"cada.text_model.layers.\1.mlp_layer_norm."),
    (r"^vision_proj\.", "cada.visual_projection."),
    (r"^text_proj\.", "cada.text_projection."),
    (r"^itm_head\.", "match_head."),
    (r"^itm_local_head\.", "group_match_head."),
    (r"^text_decoder\.cls\.predictions\.transform\.dense\.", "vocabulary_head.dense."),
    (r"^text_decoder\.cls\.predictions\.transform\.LayerNorm\.", "vocabulary_head.layer_norm."),
    (r"^text_decoder\.cls\.predictions\.decoder\.weight$", "vocabulary_head.decoder.weight"),
    (r"^text_decoder\.cls\.predictions\.bias$", "vocabulary_head.bias"),
]
_ATTENTION = [
    (r"\.self\.query\.", ".q_proj."),
    (r"\.self\.key\.", ".k_proj."),
    (r"\.self\.value\.", ".v_proj."),
    (r"_attn\.output\.dense\.", "_attn.out_proj."),
    (r"_attn\.output\.LayerNorm\.", "_attn_layer_norm."),
]
# The decoder's bias is stored twice in BERT's head; `predictions.bias` is the one that counts.
_LEFT_OUT = re.compile(r"^text_decoder\.cls\.predictions\.decoder\.bias$|\.position_ids$|^text_decoder\.bert\.")


def convert_state_dict(state_dict: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """
    Rename the tensors of a checkpoint to those of [`CADAForTextToImageRetrieval`].

    Args:
        state_dict: the checkpoint's tensors.
        source: `"cada_original"`, the authors' CADA code. Their separate ARA stack (`text_decoder.bert.*`) is left
            out: retrieval never uses it.

    Raises:
        ValueError: for an unknown source, or a key that no rule knows.
    """
    if source != "cada_original":
        raise ValueError(f"Unknown source {source!r}. Known: 'cada_original'.")
    converted = {}
    for key, tensor in state_dict.items():
        if _LEFT_OUT.search(key):
            continue
        for pattern, replacement in _CADA_ORIGINAL:
            name, hits = re.subn(pattern, replacement, key)
            if hits:
                break
        else:
            raise ValueError(f"No rule for the key {key!r} of a {source!r} checkpoint.")
        for pattern, replacement in _ATTENTION:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:  # timm's ViT keeps query, key and value in one matrix
            for part, chunk in zip("qkv", tensor.chunk(3)):
                converted[name.replace(".qkv.", f".{part}_proj.")] = chunk.clone()
        else:
            converted[name] = tensor
    return converted
