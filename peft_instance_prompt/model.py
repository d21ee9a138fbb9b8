# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The tuner that all methods share: it attaches an `InstancePromptLayer` to each targeted transformer stack."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, TaskType
from torch import nn

from .attaching import check_adapter_name, check_memory, check_modules_to_save, check_tensor_names, undone_on_error
from .calls import check_release, check_understood
from .config import InstancePromptConfig
from .generator import PromptGenerator
from .layer import InstancePromptLayer
from .loading import check_arrival, names_of, take_config
from .passes import no_trace
from .scope import note
from .stack import StackInfo, describe, find_stacks


# What a config may keep of the stack that the adapter was made for.
SIZES = ("hidden_size", "num_layers", "vocab_size")


class InstancePromptModel(BaseTuner):
    """Base class of the tuners. A method is a config and a generator; its tuner only names them.

    Attributes:
        generator_cls (`type[PromptGenerator]`): The method's generator.
    """

    generator_cls: type[PromptGenerator]
    tuner_layer_cls = InstancePromptLayer
    target_module_mapping: dict[str, list[str]] = {}  # stacks are found by looking, not by the name of the model

    # -------------------------------------------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter as PEFT does, or raise and leave the model as it was."""
        try:
            check_adapter_name(adapter_name)
            take_config(self.peft_config[adapter_name])
            with undone_on_error(self):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                check_tensor_names(self.peft_config, names_of(type(self), model, adapter_name).values())
                check_arrival(type(self), model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            if not self.peft_config:  # transformers says so beforehand
                vars(model).pop("_hf_peft_config_loaded", None)
            raise

    def _prepare_adapter_config(self, peft_config: InstancePromptConfig, model_config: dict) -> InstancePromptConfig:
        """Find the stacks, and refuse what does not fit before anything of the model is changed."""
        check_release()
        infos = self._find_targets(peft_config)
        for info in infos:
            check_understood(self.model.get_submodule(info.name), info.name, info.causal)
        check_task(peft_config, infos)
        for info in infos:
            check_sizes(peft_config, info)
            self.generator_cls.check(peft_config, info)
            check_modules_to_save(peft_config, self.model, self.model.get_submodule(info.layers_name))
            check_memory(partial(self.generator_cls, peft_config, info), peft_config, info.hidden_size)
        if isinstance(peft_config.response_template, str):
            peft_config.response_template = tokenize_template(peft_config, self.model)
        for name in SIZES:
            if hasattr(peft_config, name):
                setattr(peft_config, name, getattr(infos[0], name))
        peft_config.target_modules = [info.layers_name for info in infos]
        return peft_config

    def _find_targets(self, peft_config: InstancePromptConfig) -> list[StackInfo]:
        stacks = find_stacks(self.model)
        infos = [describe(self.model, layers, stack) for layers, stack in stacks.items()]
        known = {info.layers_name: info.name for info in infos}
        if peft_config.target_modules is None:
            infos = [info for info in infos if not info.decoder_of_pair]
            how = "Name it with `target_modules`: a module that takes `input_ids` and `inputs_embeds`, or its list of layers."
        else:
            infos = [info for info in infos if matches(peft_config.target_modules, info)]
            how = f"`target_modules` {peft_config.target_modules!r} matches none of the stacks that this model has: {known}."
        if peft_config.exclude_modules is not None:
            infos = [info for info in infos if not matches(peft_config.exclude_modules, info)]
            how += f" Mind `exclude_modules` {peft_config.exclude_modules!r}."
        if not infos:
            raise ValueError(
                f"No transformer stack to put a prompt into was found in {type(self.model).__name__}. {how}"
            )
        return infos

    @staticmethod
    def _check_target_module_exists(peft_config: InstancePromptConfig, key: str):
        # `exclude_modules` and `layers_to_transform` have been heeded; PEFT would take the one for names of stacks' parts
        # and the other for a reason to pass over a stack.
        if key in peft_config.target_modules:
            return True
        if peft_config.exclude_modules is None:
            return False
        plain = type(peft_config)(**{"target_modules": [], "exclude_modules": peft_config.exclude_modules})
        return check_target_module_exists(plain, key)

    def _create_and_replace(
        self,
        peft_config: InstancePromptConfig,
        adapter_name: str,
        target: nn.ModuleList,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        """Nothing is replaced: the layer becomes a submodule of the stack, next to its list of layers."""
        stack_name = find_stacks(self.model)[current_key]
        stack = self.model.get_submodule(stack_name)
        name = self.prefix.removesuffix("_")
        layer = getattr(stack, name, None)
        info = layer.info if layer is not None else describe(self.model, current_key, stack_name)
        # In the mode of the stack: what is added to a model in evaluation must not drop anything out.
        generator = self.generator_cls(peft_config, info).train(stack.training)
        weight = stack.get_input_embeddings().weight
        if weight.device.type != "meta" and not any(p.is_meta for p in generator.parameters()):
            generator.to(weight.device, weight.dtype if weight.is_floating_point() else None)
            generator.begin(weight.detach())
        if layer is None:
            layer = InstancePromptLayer(info, self.prefix)
            stack.add_module(name, layer)
            layer.attach(self.model, stack, target)
        layer.update_layer(adapter_name, generator)
        if adapter_name not in self.active_adapters:
            generator.requires_grad_(False)

    def _layers(self) -> Iterator[tuple[str, InstancePromptLayer]]:
        own = self.prefix + "generator"
        for name, module in self.model.named_modules():
            if isinstance(module, InstancePromptLayer) and own in module.adapter_layer_names:
                yield name, module

    # ------------------------------------------------------------------------------------------ forward, generate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT deals with `adapter_names` before it comes here, but not for MPT.
        with self._enable_peft_forward_hooks(adapter_names=kwargs.pop("adapter_names", None)):
            if torch.compiler.is_compiling():  # it cannot part a graph within a context
                return super().forward(*args, **kwargs)
            with no_trace():
                return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, which takes `instruction_mask` and `instance_embeds`, see [`Generate`]."""
        return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate_batch(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        unexpected = {name for name in names if name != "__base__"} - set(self.peft_config)
        if unexpected:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")
        # Heads that are trained beside the prompts (`modules_to_save`) take the names as an argument.
        heads = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        handles = [head.register_forward_pre_hook(partial(name_rows, names), with_kwargs=True) for head in heads]
        try:
            with note(self.model, adapter_names=tuple(names)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    # --------------------------------------------------------------------------------------------------- switching

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Activate an adapter; one at a time."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"Only one instance-prompt adapter can be active at a time, got {list(adapter_name)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "Prompts that are generated from the instance cannot be merged into the base weights, which are the same for "
            "all instances. Keep the adapter loaded, or call `unload()` to get the base model back."
        )

    def unload(self) -> nn.Module:
        """The base model without any trace of the adapters."""
        for name, layer in list(self._layers()):
            stack = self.model.get_submodule(name.rpartition(".")[0])
            layer.detach(self.model, stack, self.model.get_submodule(layer.info.layers_name))
            delattr(stack, name.rpartition(".")[2])
        return super().unload()

    # --------------------------------------------------------------------------------------------- saving, loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the adapter's name next to last in a key; a generator has modules of its own below it.
        return re.sub(rf"(\.{cls.prefix}generator)\.{re.escape(adapter_name)}\.", r"\1.", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: dict) -> dict:
        check_arrival(cls, model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def name_rows(names: Sequence[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Forward pre-hook of a head of which each adapter has its own: which row is whose. One row may be several beams."""
    repeats = args[0].shape[0] // len(names)
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}


def matches(names: Union[str, Sequence[str]], info: StackInfo) -> bool:
    """Whether a stack is meant by `names`: a regular expression, or names or ends of names of it or its layers."""
    own = (info.name, info.layers_name)
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in own)
    return any(name == wanted or name.endswith("." + wanted) for name in own for wanted in names)


def check_sizes(config: InstancePromptConfig, info: StackInfo) -> None:
    """Raise a ValueError if the adapter was made for a stack of another size."""
    for name in SIZES:
        wanted, found = getattr(config, name, None), getattr(info, name)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"The adapter was made for a base model with `{name}` {wanted}, but this one has {found}: "
                f"it does not fit {info.layers_name!r}."
            )
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers or []
    if outside := [number for number in layers if number >= info.num_layers]:
        raise ValueError(f"`layers_to_transform` must lie in 0..{info.num_layers - 1} for this model, got {outside}.")


def check_task(config: InstancePromptConfig, infos: Sequence[StackInfo]) -> None:
    """Raise a ValueError if the task is not one that the model is for."""
    task = config.task_type
    pair = any(info.encoder_of_pair or info.decoder_of_pair for info in infos)
    causal_lm = any(info.causal_lm for info in infos)
    wrong = {
        TaskType.CAUSAL_LM: not causal_lm,
        TaskType.SEQ_2_SEQ_LM: not pair,
        TaskType.SEQ_CLS: causal_lm,
        TaskType.TOKEN_CLS: causal_lm,
        TaskType.QUESTION_ANS: causal_lm,
    }
    if wrong.get(task, False):
        kind = (
            "a causal language model"
            if causal_lm
            else "an encoder-decoder model"
            if pair
            else "an encoder or a classifier"
        )
        raise ValueError(f"`task_type` {task!s} does not fit the base model, which is {kind}.")


def tokenize_template(config: InstancePromptConfig, model: nn.Module) -> list[int]:
    """The ids of a `response_template` that was given as text."""
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            "`response_template` is a text, and no tokenizer is known to turn it into token ids: give "
            "`tokenizer_name_or_path`, or the ids themselves."
        )
    ids = AutoTokenizer.from_pretrained(name)(config.response_template, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"`response_template` {config.response_template!r} has no tokens in the tokenizer {name!r}.")
    return list(ids)
