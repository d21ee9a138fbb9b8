# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The model types that the sweep runs over, and their tiny models with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as tf
from sweep_checks import CLASSIFIER, LM, MASKED, PAIR, Checks, Subject
from sweep_configs import tiny_config
from transformers.models.auto import modeling_auto


AUTOS: dict[str, tuple[type, str]] = {
    "CausalLM": (tf.AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "Seq2SeqLM": (tf.AutoModelForSeq2SeqLM, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "SpeechSeq2Seq": (tf.AutoModelForSpeechSeq2Seq, "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "ImageTextToText": (tf.AutoModelForImageTextToText, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "SequenceClassification": (
        tf.AutoModelForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "MaskedLM": (tf.AutoModelForMaskedLM, "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
}
LARGEST = 30_000_000  # weights: more means that the config was not made small


class NotBuilt(Exception):
    """Why there is no tiny model of a class, in a sentence."""


def classes() -> dict[str, dict[str, type]]:
    """By model type: `{name of the auto class: the model's class}`, each class once."""
    found: dict[str, dict[str, type]] = {}
    for auto, (_, table) in AUTOS.items():
        for model_type, names in getattr(modeling_auto, table).items():
            name = names if isinstance(names, str) else names[0]
            own = found.setdefault(model_type, {})
            if name not in own.values():
                own[auto] = name
    return dict(sorted(found.items()))


def build(model_type: str, auto: str) -> torch.nn.Module:
    """A tiny model in eval mode whose weights are large enough for its prompts to matter.

    Raises:
        NotBuilt: There is none.
    """
    try:
        config = tiny_config(model_type)
        config.use_cache = True
        config.num_labels = 3
        if config.is_encoder_decoder and isinstance(getattr(config, "decoder", None), tf.PreTrainedConfig):
            config.decoder.is_decoder = config.decoder.add_cross_attention = True  # two models that are put together
        if auto == "CausalLM" and not config.is_encoder_decoder and hasattr(config, "is_decoder"):
            config.is_decoder = True
        for name, value in {"pad_token_id": 0, "decoder_start_token_id": 1}.items():
            if getattr(config, name, None) is None and (name == "pad_token_id" or config.is_encoder_decoder):
                setattr(config, name, value)
        with torch.device("meta"):
            size = sum(p.numel() for p in AUTOS[auto][0].from_config(config).parameters())
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    if size > LARGEST:
        raise NotBuilt(f"its tiny config still has {size / 1e6:.0f} million weights")
    torch.manual_seed(0)
    try:
        model = AUTOS[auto][0].from_config(config)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name or "wte" in name else 0.25)
            else:  # scales, biases, and what a mixer chooses by: all equal, they would leave its choice to chance
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def subject(model_type: str, auto: str) -> Subject:
    """A model and how it is called.

    Raises:
        NotBuilt: There is no tiny model, or no way of calling it is known.
    """
    model = build(model_type, auto)
    if auto in ("SequenceClassification", "MaskedLM"):
        kind = CLASSIFIER if auto == "SequenceClassification" else MASKED
    else:
        kind = PAIR if model.config.is_encoder_decoder else LM
    why = ""
    for extra, source in ways(model, kind):
        made = Subject(model, kind, source, extra)
        try:
            checks = Checks(made, model)
            with torch.no_grad():
                model.train()
                model(**checks.labelled())
                model.eval()
                loss = model(**checks.labelled())
                if kind in (LM, PAIR):
                    checks.probe.steps(**checks.texts("right"))
        except Exception as error:
            why = why or f"its plain call fails, {type(error).__name__}: {error}"
            continue
        if getattr(loss, "loss", None) is None:
            why = why or "it computes no loss from `labels`"
            continue
        return made
    raise NotBuilt(why)


def ways(model: torch.nn.Module, kind: str | None) -> Iterator[tuple[Callable, dict[str, torch.Tensor]]]:
    """Ways in which the model may want to be called, the plain one first: further arguments, and what an encoder reads."""
    if kind != PAIR or model.main_input_name == "input_ids":
        yield (lambda ids: {}), {}
        for names in (("token_type_ids",), ("mm_token_type_ids",), ("token_type_ids", "mm_token_type_ids")):
            yield (lambda ids, names=names: {name: torch.zeros_like(ids) for name in names}), {}
        yield (lambda ids: {"bbox": torch.zeros(*ids.shape, 4, dtype=torch.long)}), {}
    generator = torch.Generator().manual_seed(5)
    name = model.main_input_name

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    configs: list[Any] = [
        model.config,
        *(v for v in vars(model.config).values() if isinstance(v, tf.PreTrainedConfig)),
    ]

    def number(*names: str, default: int) -> int:
        values = (getattr(c, n, None) for c in configs for n in names)
        return next((v for v in values if isinstance(v, int)), default)

    if kind == PAIR and name != "input_ids":
        bins = number("num_mel_bins", "input_feat_per_channel", "feature_size", default=16)
        frames = 2 * number("max_source_positions", default=32)
        side = number("image_size", default=32)
        for shape in ((bins, frames), (frames, bins), (64, bins), (bins, 64), (3200,), (1, 3200), (3, side, side)):
            yield (lambda ids: {}), {name: random(*shape)}
        width = number("patch_embed_hidden_size", "hidden_size", default=32)
        patches = torch.cat([torch.ones(2, 9, 2), random(9, width)], -1)  # (2, patches, 2 + width)
        yield (lambda ids: {}), {name: patches, "attention_mask": torch.ones(2, 9)}
