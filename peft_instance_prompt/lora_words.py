# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The error for a field that a config does not have.

It names the counterpart of a field of LoRA's or of PEFT's soft prompts, or the field that was misspelt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

from peft.tuners.lora import LoraConfig


WEIGHTS = "leave it out, weight matrices are not changed"
SIZES = "leave it out, it is read off the base model"
COUNTERPARTS = {
    # LoRA
    "r": "use `num_virtual_tokens` and `bottleneck_dim`",
    "lora_alpha": "leave it out, tune the learning rate",
    "use_rslora": "leave it out, tune the learning rate",
    "bias": "leave it out, or train modules with `modules_to_save`",
    "lora_bias": "leave it out",
    "init_lora_weights": "use `init_weights`",
    "layers_pattern": "leave it out, or name the stack in `target_modules`",
    "rank_pattern": "use `layers_to_transform`, all layers have one size",
    "alpha_pattern": "use `layers_to_transform`, all layers have one size",
    "target_parameters": "leave it out, or name the stack in `target_modules`",
    # prompt tuning, for one task or several
    "prompt_tuning_init": "use `init_text` for a text, else leave it out",
    "prompt_tuning_init_text": "use `init_text`",
    "prompt_tuning_init_state_dict_path": "leave it out, a generator starts from no table of vectors",
    "prompt_tuning_init_task": "leave it out, a generator starts from no table of vectors",
    "tokenizer_kwargs": "leave it out, or give `init_text` as token ids",
    "num_ranks": "leave it out, a generator has no table to factorise",
    "num_tasks": "use it with `DynamicPromptConfig`",
    # P-tuning and prefix tuning
    "encoder_hidden_size": "use `bottleneck_dim`",
    "encoder_num_layers": "leave it out, `bottleneck_dim` sets the generator's size",
    "encoder_reparameterization_type": "leave it out, the method is the generator",
    "prefix_projection": "leave it out, there is always a generator",
    "token_dim": SIZES,
    "num_attention_heads": SIZES,
    "num_transformer_submodules": SIZES,
}
LONGEST = 300  # characters of a message


def refuse_unknown_fields(config_cls: type, names: Iterable[str]) -> None:
    """Raise a TypeError that names the counterpart of each field of LoRA's or PEFT's soft prompts, and the nearest field of a misspelt one.

    Args:
        config_cls (`type`): The config's class.
        names (`Iterable[str]`): The fields that the caller gave. Unknown ones that resemble no field pass: the class itself
            refuses them.
    """
    own = {field.name for field in fields(config_cls)}
    unknown = [name for name in names if name not in own]
    if not unknown:
        return
    dropout = "use `dropout`" if "dropout" in own else "leave it out, the method has no dropout"
    known = {field.name: WEIGHTS for field in fields(LoraConfig)}
    known = {**known, **COUNTERPARTS, "lora_dropout": dropout, "encoder_dropout": dropout}
    meant = {name: f"{known[name]}." for name in unknown if name in known}
    close = {name: get_close_matches(name, own, n=1, cutoff=0.7) for name in unknown if name not in known}
    slips = {name: f"did you mean `{names[0]}`?" for name, names in close.items() if names}
    if not meant and not slips:
        return
    # PEFT searches an error for "got an unexpected keyword argument", takes the field for one of a newer release, and loads the
    # config without it. A field of another method's is no such field, so the message avoids these words.
    text = f"{config_cls.__name__} " + (
        "does not have these fields." if meant else "got an unexpected keyword argument."
    )
    told = [f" `{name}`: {word}" for name, word in {**meant, **slips}.items()]
    shown, rest = list(told), ""
    while len(shown) > 1 and len(text + "".join(shown) + rest) >= LONGEST:
        shown.pop()
        rest = f" And {len(told) - len(shown)} more."
    raise TypeError(text + "".join(shown) + rest)
