# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared. A method of this package is one line of `OURS`, and brings its `constant` control with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)

from peft_instance_prompt import (
    DynamicPromptConfig,
    IAPTConfig,
    IDPGConfig,
    IDSPAMConfig,
    IPTConfig,
    LPTConfig,
    PreFTConfig,
)


TEXT = "Read the text that follows and answer with the one word that is right for it, and nothing else."


@dataclass(frozen=True)
class Setting:
    """What a config may depend on: `"SEQ_CLS"` or `"CAUSAL_LM"`, the number of steps, and the tokenizer with its folder."""

    task_type: str
    steps: int
    tokenizer: object
    folder: str


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        attach: Takes the base model and the setting, returns the model to train.
        rates: The learning rates to try, the likeliest first. As many for each method.
        ours: Whether it is one of this package's, which takes an `instruction_mask`.
        exchanged: Whether it is tested with the prompt of another instance, too.
        factors: What the learning rate of parameters is multiplied by, by the last part of their names.
    """

    attach: Callable[[torch.nn.Module, Setting], torch.nn.Module]
    rates: tuple[float, ...]
    ours: bool = False
    exchanged: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)


def _peft(make: Callable[[Setting], PeftConfig]) -> Callable:
    return lambda base, setting: get_peft_model(base, make(setting))


def _full(base: torch.nn.Module, setting: Setting) -> torch.nn.Module:
    return base.requires_grad_(True)


def _head(base: torch.nn.Module, setting: Setting) -> torch.nn.Module:
    base.requires_grad_(False)
    base.classifier.requires_grad_(True)
    return base


def _prefix(base: torch.nn.Module, setting: Setting) -> torch.nn.Module:
    config = PrefixTuningConfig(task_type=setting.task_type, num_virtual_tokens=16)
    model = get_peft_model(base, config)
    if setting.task_type == "CAUSAL_LM":
        initialize_kv_prefix_from_text(model, setting.tokenizer, text=TEXT, use_chat_template=False)
    return model


def _prompt_tuning(setting: Setting) -> PeftConfig:
    return PromptTuningConfig(
        task_type=setting.task_type,
        num_virtual_tokens=16,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=setting.folder,
    )


def _p_tuning(setting: Setting) -> PeftConfig:
    return PromptEncoderConfig(task_type=setting.task_type, num_virtual_tokens=16, encoder_hidden_size=128)


def _lora(r: int, targets: str | None) -> Callable[[Setting], PeftConfig]:
    return lambda setting: LoraConfig(task_type=setting.task_type, r=r, lora_alpha=2 * r, target_modules=targets)


def _preft(r: int) -> Callable[[Setting], PeftConfig]:
    return lambda setting: PreFTConfig(task_type=setting.task_type, r=r)


# IAPT as release 0.2.0 had it.
IAPT_0_2: dict[str, Any] = {
    "prompt_position": "before",
    "activation": "rational",
    "slot_vectors": False,
    "accumulate": False,
    "down_factor": 1.0,
}

OURS: dict[str, Callable[..., PeftConfig]] = {
    "iapt": IAPTConfig,
    "iapt-0.2": lambda **kw: IAPTConfig(**IAPT_0_2, **kw),
    "m-idpg": lambda **kw: IDPGConfig.preset("m-phm", **kw),
    "s-idpg": lambda **kw: IDPGConfig.preset("s-phm", **kw),
    "lpt": LPTConfig,
    "ipt": IPTConfig,
    "dp": DynamicPromptConfig,
    "idspam": IDSPAMConfig,
    # In all-MiniLM-L6-v2 the state of the first token, which IDPG and LPT read, hardly depends on the text below the last layer.
    "m-idpg-mean": lambda **kw: IDPGConfig.preset("m-phm", instance_pooling="mean", **kw),
    "lpt-appg": lambda **kw: LPTConfig(generator_type="appg", **kw),
}
# A control, whose generator reads a learned constant, is the same however the states would have been pooled.
CONTROLS = {name: "m-idpg-constant" if name == "m-idpg-mean" else f"{name}-constant" for name in OURS}
# IPT and dynamic prompting learn vectors themselves, which want a rate as high as PEFT's prompt tuning does: of the others' rates the
# highest was best by far on dev.
RATES = {
    "ipt": (3e-2, 1e-2, 1e-1),
    "ipt-deep": (3e-2, 1e-2, 1e-1),
    "dp": (3e-1, 1e-1, 1.0),
    "iapt": (1e-2, 3e-3, 3e-2),
}
# One thing is changed in each. They have no control, and are tested with their own prompts only.
VARIANTS: dict[str, Callable[..., PeftConfig]] = {
    "iapt-paper": lambda **kw: IAPTConfig(init_weights="paper", **kw),
    "iapt-before": lambda **kw: IAPTConfig(prompt_position="before", **kw),
    "ipt-deep": lambda **kw: IPTConfig(host="deep", instance_scale=0.5, **kw),
}


# As many weights as LoRA of rank 8 on q and v has, in the encoder and in the causal model, and as LoRA of rank 16 in the encoder. Edits
# have no control: there is nothing that could read a constant.
EDITS = {"preft-r16": 16, "preft-r13": 13, "preft-r146": 146}


# Of which method each of these is a different setting.
SETTING_OF = {
    **{name: name.partition("-")[0] for name in VARIANTS},
    "m-idpg-mean": "m-idpg",
    "lpt-appg": "lpt",
}


def _ours(name: str, condition: str, exchanged: bool = False) -> Method:
    make = {**OURS, **VARIANTS}[name]

    def config(setting: Setting) -> PeftConfig:
        made = make(task_type=setting.task_type, condition=condition)
        if hasattr(made, "anneal_steps"):
            made.anneal_steps = setting.steps  # dynamic prompting's temperature falls during all of the training
        return made

    rates = RATES.get(name, RATES["iapt"] if SETTING_OF.get(name) == "iapt" else (3e-3, 1e-3, 1e-2))
    return Method(_peft(config), rates, ours=True, exchanged=exchanged)


METHODS: dict[str, Method] = {
    # No step is taken: see the suites.
    "zero-shot": Method(lambda base, setting: base, ()),
    "head": Method(_head, (2e-2, 5e-3, 5e-2)),
    "full": Method(_full, (1e-4, 3e-5, 3e-4)),
    # PEFT's own choice of modules is q and v
    "lora-r8-qv": Method(_peft(_lora(8, None)), (3e-3, 1e-3, 1e-2)),
    "lora-r16": Method(_peft(_lora(16, "all-linear")), (3e-3, 1e-3, 1e-2)),
    "prompt-tuning": Method(_peft(_prompt_tuning), (3e-2, 1e-2, 1e-1)),
    "p-tuning": Method(_peft(_p_tuning), (3e-3, 1e-3, 1e-2)),
    "prefix-tuning": Method(_prefix, (1e-2, 3e-3, 3e-2)),
    **{name: Method(_peft(_preft(r)), (3e-3, 1e-3, 1e-2), ours=True) for name, r in EDITS.items()},
    **{name: _ours(name, "instance", exchanged=True) for name in OURS},
    **{name: _ours(name, "instance") for name in VARIANTS},
    **{control: _ours(control.removesuffix("-constant"), "constant") for control in CONTROLS.values()},
}
