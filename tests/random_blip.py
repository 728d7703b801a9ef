"""BLIP of transformers with random weights, shared by the tests."""

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def random_blip(kind=BlipForImageTextRetrieval, tower=TINY, image_size=32, patch_size=8, vocab_size=30524):
    """BLIP of transformers with every weight random and large enough to matter."""
    config = BlipConfig(
        vision_config={**tower, "image_size": image_size, "patch_size": patch_size},
        text_config={**tower, "vocab_size": vocab_size, "encoder_hidden_size": tower["hidden_size"]},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1 / tower["hidden_size"] ** 0.5 if parameter.ndim == 2 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model
