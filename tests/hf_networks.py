"""Tiny untrained networks of the transformers library, saved as their owners save them; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

KINDS = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "hubert": (HubertConfig, HubertModel),
    "wavlm": (WavLMConfig, WavLMModel),
}
HIDDEN, LAYERS, CHANNELS = 32, 2, 16


def put_network(folder: Path, kind: str = "wav2vec2", *, norm: str = "layer", normalises: bool = True) -> str:
    """`hf:FOLDER` of a network of two layers. `norm`: layer has a mask and a last normalisation, group neither."""
    config_class, model_class = KINDS[kind]
    config = config_class(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=[CHANNELS] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        # Its owners trained it so; here it would make the gradient depend on how a batch is split.
        layerdrop=0.9,
        mask_time_prob=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model_class(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalises).save_pretrained(folder)
    return f"hf:{folder}"
