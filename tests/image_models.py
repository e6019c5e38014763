"""Tiny image classifiers of each family, their blocks, and pixels for them."""

from copy import deepcopy

import torch
from conftest import SPREAD
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
    "initializer_range": SPREAD,
}


IMAGE_MODELS = {
    "vit": (ViTForImageClassification, ViTConfig(**COMMON, intermediate_size=48)),
    "deit": (DeiTForImageClassification, DeiTConfig(**COMMON, intermediate_size=48)),
    "dinov2": (Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig(**COMMON, mlp_ratio=2)),
}


BLOCKS = {
    "vit": "vit.layers",
    "deit": "deit.layers",
    "dinov2": "dinov2_with_registers.encoder.layer",
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "roberta": "roberta.encoder.layer",
    "electra": "electra.encoder.layer",
}


def build_image_classifier(architecture, seed=0):
    torch.manual_seed(seed)
    model_class, config = IMAGE_MODELS[architecture]
    model = model_class._from_config(deepcopy(config), attn_implementation="eager")
    return model.eval().requires_grad_(False)


def pixels(count, seed=0):
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}
