"""
The demo: train a small CADA on drawn pedestrians, evaluate it on persons never seen, search with three sentences.

    python demo_cada.py

Needs no download. Takes a few minutes on two CPU cores.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor, BertTokenizer, set_seed

import train_cada
from configuration_cada import CADAConfig
from drawn_cada import IMAGE_SIZE, ideal_scores, load_drawn
from evaluation_cada import (
    METRICS,
    encode_gallery,
    encode_queries,
    match_candidates,
    rerank_scores,
    retrieval_metrics,
    top_candidates,
)
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor, clean_caption


SENTENCES = (
    "A woman with long blond hair in a red coat and black trousers.",
    "A man wearing a striped blue t-shirt and white shorts. He carries a black backpack.",
    "A man in a black jacket and blue trousers, with a red cap on the head.",
)
MAX_TEXT_LENGTH = 49


def build_start(splits: DatasetDict, folder: Path, seed: int) -> None:
    """Save a small model with random weights and its processor; the tokenizer learns its words from the captions."""
    captions = [clean_caption(caption) for row in splits["train"]["captions"] for caption in row]
    tokenizer = BertTokenizer().train_new_from_iterator(captions, vocab_size=500, show_progress=False)
    tokenizer.model_max_length = MAX_TEXT_LENGTH
    height, width = IMAGE_SIZE
    image_processor = CADAImageProcessor(
        size={"height": height, "width": width}, crop_padding=4, erase_probability=0.0
    )
    processor = CADAProcessor(image_processor, tokenizer)
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CADAConfig(
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 12},
        text_config={
            **tower,
            "vocab_size": len(processor.tokenizer),
            "enc_token_id": processor.enc_token_id,
            "max_position_embeddings": MAX_TEXT_LENGTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        projection_dim=128,
        max_text_length=MAX_TEXT_LENGTH,
        group_size=24,
        group_stride=24,
    )
    set_seed(seed)
    CADAForTextToImageRetrieval(config).save_pretrained(folder)
    processor.save_pretrained(folder)
