# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A tiny config of any model type: the defaults of its class, with every field that is a size made small, nested configs too."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


VOCAB = 128
WIDTH = 32
# Ids of images, sounds and other marks are dealt out from the end of the vocabulary; texts are made of ids below this.
MARKS = 96

# The first pattern that a field's name contains decides; a number stands for the least of it and the default, a pair for
# (at most, otherwise).
RULES: list[tuple[str, int]] = [
    (r"chunk_size_feed_forward|pretraining_tp|num_logits_to_keep|conv_kernel|kernel|stride|expand|ratio|mult", 10**9),
    (
        r"d_conv|scale_factor|_factor$|sampling_rate|sample_rate|type_vocab|feature_layer|num_channels|in_channels",
        10**9,
    ),
    (r"vocab|codebook_size|num_hash_buckets|composer", VOCAB),
    (r"(n|num|index_n)_?(routed_|local_)?experts$|moe_num_experts|zero_expert_num", 4),
    (r"n_group|topk_group", 1),
    (r"index_topk", 16),  # more than a row has: below, keys tie at a score of 0, and which of them count is chance
    (r"per_tok|top_?k|moe_k$|moe_top", 2),
    (r"shared_experts$|first_k_dense|num_dense_layers|n_groups$|ngroups|moe_layer_start", 1),
    (r"mamba_(n|num)_heads|linear_num_(key|value)_heads|mamba_d_head|mamba_head_dim", 8),
    (r"(max|num).*position|n_positions|n_ctx|max_seq_len|max_sequence|seq_len|context_length|max_length", VOCAB),
    (r"head_dim|d_kv|d_head|dim_head|attention_head_size|kv_channels|head_size", 8),
    (r"heads?$|heads_ipa", 4),
    (r"(^|_)(n_|num_)?(hidden_|encoder_|decoder_|conv_)?layers?$|^depth$|_depth$|num_blocks|num_sparse_.*layers", 2),
    (r"lora_rank", 16),
    (r"rank$|gate_rank", 8),
    (r"rotary_dim", 4),
    (r"^sliding_window$", 12),  # late slots at the start of a row must not lie outside of it everywhere
    (r"window|block_size|local_radius", 8),
    (r"chunk_size|chunk_length", 8),
    (r"d_state|state_size|num_mel_bins|n_mel_bins|feat_size|feature_size|feat_per_channel", 16),
    (r"intermediate|ffn|d_ff|mlp_dim|dff|dim_ff|d_inner|feed_forward|ffn_hidden", 64),
    (r"image_size|resolution|crop_size|canvas", 32),
    (r"patch_size", 8),
    (r"latents|query_tokens|num_queries|landmarks|global_tokens|mm_tokens|image_seq_length|num_image_tokens", 4),
    (r"hidden|d_model|d_embd|n_embd|embed|dim$|width|dims$|projection|channels$|_size$|input_size|units", WIDTH),
]

# What the rules cannot know: fields that must agree with each other. By the name of the config class, without "Config".
_mrope = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "mrope_section": [1, 1, 2],
    }
}
_swa = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
_swa |= {"head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Glm4vText", "Glm46VText", "GlmOcrText", "Glm4vMoeText", "GlmgaText"), _mrope),
    **dict.fromkeys(("HunYuanDenseV1", "HunYuanMoEV1", "HunYuanVLText", "Ministral"), {"head_dim": 8}),
    **dict.fromkeys(("Dots3NoteText",), {f"swa_{name}": value for name, value in _swa.items()}),
    **dict.fromkeys(("DeepseekV2",), {"num_experts_per_tok": 2}),
    # Late slots at the start of a row must not lie outside of the last layer's window.
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 16},
    "Moshi": {"sliding_window": 64},  # the bare model's cache has a window, and its mask has none
    "Mamba2": {"num_heads": 8, "head_dim": 8},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "Esmc": {"vocab_size": VOCAB},
    "MarkupLM": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "LayoutLMv3": {"coordinate_size": 4, "shape_size": 8},
    "Lilt": {"hidden_size": 48},
    "Gemma4Text": {"global_head_dim": 8},
    "Gemma4UnifiedText": {"global_head_dim": 8},
    "DiffusionGemmaText": {"global_head_dim": 8},
    "CohereCompassText": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "DeepseekOcr2Text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "Ernie4_5_VLMoeText": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "Dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 4},
    "Apertus1p5": {"image_token_offset": VOCAB, "audio_token_offset": 2 * VOCAB},
    "Apertus1p5Text": {"vocab_size": 4 * VOCAB},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "ChameleonVQVAE": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 8},
    "Emu3VQVAE": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 8},
    "MobileBert": {"classifier_activation": False},  # its states are not normed, and tanh would leave no gradient
    "Nystromformer": {"segment_means_seq_len": 8, "num_landmarks": 8},
    "Xmod": {"default_language": "en_XX"},
    "Neomme": {"head_dim": 16},
    "NeommeText": {"head_dim": 16},
    "RecurrentGemma": {"num_hidden_layers": 3, "lru_width": WIDTH},
    "Reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
    "Florence2Vision": {
        "embed_dim": (8, 16, 32, 32),
        "num_heads": (1, 2, 4, 4),
        "num_groups": (1, 2, 4, 4),
        "depths": (1, 1, 1, 1),
    },
    "Bamba": {"attn_layer_indices": [1]},
    "Chameleon": {"vocabulary_map": {"<image>": 100}},
    "Emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}},
}


class Marks:
    """New ids for the marks of a model: the same for the same id, wherever it stands in the nested configs."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def __call__(self, name: str, value: int) -> int:
        if value < 10:
            return value
        plain = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        if name in plain:
            return plain[name]
        return self.known.setdefault(value, VOCAB - 1 - len(self.known))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny config of a model type."""
    return _tiny(CONFIG_MAPPING[model_type](), Marks())


def _tiny(default: PreTrainedConfig, marks: Marks) -> PreTrainedConfig:
    cls = type(default)
    nested = {
        name: _tiny(value, marks) for name, value in vars(default).items() if isinstance(value, PreTrainedConfig)
    }
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = vars(default).get(field.name)  # some are refused to `getattr`, because they differ between layers
        if field.name not in nested and (field.default is not None or field.name == "rope_parameters"):
            small = _small(field.name, value, default, marks)
            if small != value:
                fields[field.name] = small
    return cls(**{**nested, **fields, **_layers(default), **OVERRIDES.get(cls.__name__.removesuffix("Config"), {})})


def _layers(default: PreTrainedConfig) -> dict[str, Any]:
    """Each kind of layer that the default has, once, where the config lists the layers' kinds; at least two layers."""
    try:
        number = default.num_hidden_layers
    except (AttributeError, NotImplementedError):
        return {}
    own = {field.name for field in dataclasses.fields(default)}
    lists = {
        name: value
        for name, value in vars(default).items()
        if name in own and isinstance(value, (list, tuple)) and len(value) == number and "token" not in name
    }
    count = next((n for n in ("num_hidden_layers", "num_layers", "n_layer") if n in own), None)
    if not lists:
        return {}
    first: dict[Any, int] = {}
    for place, kinds in enumerate(zip(*lists.values())):
        first.setdefault(str(kinds), place)
    chosen = sorted(first.values())[:4]
    chosen = chosen * 2 if len(chosen) == 1 else chosen
    return {
        **({count: len(chosen)} if count else {}),
        **{name: [value[n] for n in chosen] for name, value in lists.items()},
    }


def _small(name: str, value: Any, default: PreTrainedConfig, marks: Marks) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return 0.0 if re.search(r"drop|jitter|layerdrop", name) else value
    if name == "rope_parameters":
        return _rope(value)
    if re.search(r"token_(id|index)s?$|_id$|_index$|_ids$", name) and "layer" not in name:
        if isinstance(value, (list, tuple)):
            return type(value)(marks(name, one) for one in value)
        return marks(name, value) if isinstance(value, int) else value
    if not isinstance(value, int) or value <= 0:
        return value
    if re.search(r"(key_value|kv).*heads|kv_n_heads", name):
        heads = vars(default).get("num_attention_heads")
        return min(value, 4 if heads == value else 2)
    for pattern, most in RULES:
        if re.search(pattern, name):
            return min(value, most)
    return value


def _rope(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    rope = {key: _rope(one) for key, one in value.items()}
    if (section := rope.get("mrope_section")) is not None:
        rope["mrope_section"] = [1, 1, 2] if len(section) == 3 else [1] * len(section)
    return rope
