# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny models whose text stack has a use that its class does not tell: decoders behind audio or images, prefix-LMs, own modules."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from tiny import PAIRS, VOCAB, configure


_ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 3}
_audio = {**_ids, **_heads, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0}
_small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_image = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 4,
}


def build(cls: type, config: Any, attn_implementation: str | None = None) -> Any:
    """A model in eval mode whose weights are large enough for its prompts to matter."""
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def whisper() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
    config = tf.WhisperConfig(**_audio, **sizes, begin_suppress_tokens=None)
    return build(tf.WhisperForConditionalGeneration, config), {"input_features": noise(2, 8, 24)}


def moonshine() -> tuple[Any, dict[str, torch.Tensor]]:
    halves = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 3}
    heads = {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
    config = tf.MoonshineConfig(
        **_ids, **halves, **heads, hidden_size=32, intermediate_size=48, max_position_embeddings=64
    )
    return build(tf.MoonshineForConditionalGeneration, config), {"input_values": noise(2, 4000)}


def seamless() -> tuple[Any, dict[str, torch.Tensor]]:
    speech = {f"speech_encoder_{name}": n for name, n in (("layers", 2), ("attention_heads", 4))}
    conv = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "adaptor_kernel_size": 2}
    sizes = {**{k: v for k, v in _audio.items() if k not in ("d_model", "dropout")}, **speech, **conv}
    sizes.update(hidden_size=32, speech_encoder_intermediate_size=48, feature_projection_input_dim=16)
    sizes.update(adaptor_stride=2, num_adapter_layers=1, max_position_embeddings=64, t2u_vocab_size=VOCAB)
    model = build(tf.SeamlessM4TForSpeechToText, tf.SeamlessM4TConfig(**sizes, activation_dropout=0.0, dropout=0.0))
    model.generation_config.text_decoder_lang_to_code_id = {"eng": 1}
    return model, {"input_features": noise(2, 12, 16)}


def _behind_images(decoder: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    vision = tf.ViTConfig(**_image, image_size=16)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return build(tf.VisionEncoderDecoderModel, config), {"pixel_values": noise(2, 3, 16, 16)}


def trocr() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {k: v for k, v in _audio.items() if not k.startswith("encoder")}
    return _behind_images(tf.TrOCRConfig(**sizes, max_position_embeddings=64, cross_attention_hidden_size=32))


def images_to_gpt2() -> tuple[Any, dict[str, torch.Tensor]]:
    return _behind_images(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64))


def images_to_bert() -> tuple[Any, dict[str, torch.Tensor]]:
    return _behind_images(tf.BertConfig(vocab_size=VOCAB, **_small, max_position_embeddings=64))


def images_to_mbart() -> tuple[Any, dict[str, torch.Tensor]]:
    """Like Donut."""
    return _behind_images(PAIRS["mbart"]())


def speech_to_bert() -> tuple[Any, dict[str, torch.Tensor]]:
    conv = {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
    sizes = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    audio = tf.Wav2Vec2Config(**_small, **conv, **sizes)
    decoder = tf.BertConfig(vocab_size=VOCAB, **_small, max_position_embeddings=64)
    config = tf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(audio, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return build(tf.SpeechEncoderDecoderModel, config), {"input_values": noise(2, 400)}


# Each with what its encoder gets.
SPOKEN_OR_SHOWN = {
    "whisper": whisper,
    "moonshine": moonshine,
    "seamless": seamless,
    "trocr": trocr,
    "images_to_gpt2": images_to_gpt2,
    "images_to_bert": images_to_bert,
    "images_to_mbart": images_to_mbart,
    "speech_to_bert": speech_to_bert,
}


def paligemma(text: str = "gemma", attn_implementation: str = "eager") -> Any:
    """A prefix-LM, with an image of four tokens (90)."""
    own = {"model_type": text, **configure("gemma2" if text == "gemma2" else "llama").to_diff_dict()}
    own = {k: v for k, v in own.items() if k not in ("architectures", "model_type", "tie_word_embeddings")}
    vision = {"model_type": "siglip_vision_model", **_image, "image_size": 8, "vision_use_head": False}
    config = tf.PaliGemmaConfig(
        text_config={**own, "model_type": text, "head_dim": 8},
        vision_config=vision,
        image_token_index=90,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCAB,
    )
    return build(tf.PaliGemmaForConditionalGeneration, config, attn_implementation)


def blip() -> Any:
    """Its text stack is causal because the language model around it says so in each call."""
    text = {**_small, "vocab_size": VOCAB, "max_position_embeddings": 64, "encoder_hidden_size": 32}
    text.update(projection_dim=16, bos_token_id=1, pad_token_id=0, eos_token_id=2, sep_token_id=2)
    config = tf.BlipConfig(text_config=text, vision_config={**_image, "image_size": 8})
    return build(tf.BlipForConditionalGeneration, config)


def git() -> Any:
    """Its stack puts the states of an image before those of the tokens."""
    vision = {**_image, "num_hidden_layers": 1, "image_size": 8}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return build(tf.GitForCausalLM, tf.GitConfig(vision_config=vision, **_small, **ids, max_position_embeddings=64))


class Around(torch.nn.Module):
    """A module of the user's own around a language model, which passes everything on."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return self.inner(input_ids=input_ids, labels=labels, **kwargs).logits


class AroundBatch(Around):
    """One that takes a batch as a whole."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return self.inner(**batch).logits


class OwnLoss(Around):
    """One that keeps the labels to itself."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return self.inner(input_ids, **kwargs).logits


class OwnHead(Around):
    """One with a head of its own on a stack: tokens, or classes of rows."""

    def __init__(self, inner: torch.nn.Module, pools: bool = False):
        super().__init__(inner)
        self.pools = pools
        with torch.random.fork_rng():  # an adapter begins as it does on the language model alone
            self.head = torch.nn.Linear(inner.config.hidden_size, VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        states = self.inner(input_ids).last_hidden_state
        return self.head(states[:, -1] if self.pools else states)
