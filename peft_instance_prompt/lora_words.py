# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What a LoRA user means by a field that no config of this package has: the counterpart, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields


WEIGHTS = "it changes weight matrices, and a generated prompt leaves those alone: leave it out"
COUNTERPARTS = {
    "r": (
        "the size is set by `num_virtual_tokens`, the prompt vectors of an instance, and, where the method has a bottleneck, by "
        "`bottleneck_dim`, its width"
    ),
    "lora_alpha": "nothing is scaled by it, set the learning rate",
    "use_rslora": "nothing is scaled by it, set the learning rate",
    "bias": (
        "the base model's biases are never trained, as with `bias='none'`: leave it out, or train whole modules with "
        "`modules_to_save`"
    ),
    "lora_bias": "leave it out",
    "init_lora_weights": "use `init_weights`",
    "layers_pattern": "`target_modules` names the stack or its list of layers itself, by default the one that is found",
    "rank_pattern": "all layers have one size, and `layers_to_transform` chooses among them",
    "alpha_pattern": "all layers have one size, and `layers_to_transform` chooses among them",
    "target_parameters": "`target_modules` names the stack or its list of layers, by default the one that is found",
}


def refuse_lora_words(config_cls: type, names: Iterable[str]) -> None:
    """Raise a TypeError if a config is to be made with fields that only LoRA's config has.

    Args:
        config_cls (`type`): The config's class.
        names (`Iterable[str]`): The fields that it is to be made with. Fields that LoRA does not have either pass.
    """
    own = {field.name for field in fields(config_cls)}
    unknown = [name for name in names if name not in own]
    if not unknown:
        return
    from peft.tuners.lora import LoraConfig  # not above: PEFT may be in the midst of its own import

    counterparts = {
        **COUNTERPARTS,
        "lora_dropout": "use `dropout`" if "dropout" in own else "the method has no dropout, leave it out",
    }
    lora = {field.name for field in fields(LoraConfig)}
    words = [f"`{name}`: {counterparts.get(name, WEIGHTS)}" for name in unknown if name in lora]
    if words:
        raise TypeError(f"{config_cls.__name__} does not have these fields of LoRA's. {'. '.join(words)}.")
