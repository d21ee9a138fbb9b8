# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tuner that all methods share: it attaches an `InstancePromptLayer` to each targeted transformer stack."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, Optional, Union

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .adapter_files import check_arrived
from .attaching import check_adapter_name, prepare
from .config import InstanceConfig
from .engine.layer import InstancePromptLayer
from .engine.open import states_of_text
from .engine.probe import whole
from .engine.request import adapters_of, current_request, note
from .engine.stack import embed_ids, tree_of
from .generator import InstanceGenerator
from .guards import check_free, is_loading, is_taken, remove_layer, taken_out_on_error
from .text_start import repeat_to


class InstancePromptModel(BaseTuner):
    """Base class of the tuners. A method is a config and a generator; its tuner only names them.

    Attributes:
        generator_cls (`type[InstanceGenerator]`): The method's generator.
    """

    generator_cls: type[InstanceGenerator]
    tuner_layer_cls = InstancePromptLayer
    target_module_mapping: dict[str, list[str]] = {}  # stacks are found by their structure, not by the model's type

    # -------------------------------------------------------------------------------------------------- injection

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        check_free(model, adapter_name)
        with taken_out_on_error(model, adapter_name):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter as PEFT does."""
        check_adapter_name(adapter_name)
        # A copy keeps the facts about this model: the caller may use the config for another model.
        if not is_taken(self.peft_config[adapter_name]):
            self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        config = self.peft_config[adapter_name]
        if not is_loading(config):
            config.weights_digest = config.saved_embedding_layers = None  # they describe a file
        if "transformers.trainer" in sys.modules:
            from .trainers import guard_trainers

            guard_trainers()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for module in tree_of(model).values():
            hooks = module._forward_pre_hooks
            if isinstance(module, AuxiliaryTrainingWrapper) and name_rows not in hooks.values():
                module.register_forward_pre_hook(name_rows, with_kwargs=True)

    def _prepare_adapter_config(self, peft_config: InstanceConfig, model_config: dict) -> InstanceConfig:
        self.infos = {info.layers_name: info for info in prepare(peft_config, self.model, self.peft_config).infos}
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: InstanceConfig, key: str):
        # `find_targets` has applied `exclude_modules`, and the generator applies `layers_to_transform`. PEFT would apply the first
        # to parts of stacks, and would leave out a stack because of the second.
        if key in (peft_config.target_modules or ()):
            return True
        if peft_config.exclude_modules is None:
            return False
        plain = SimpleNamespace(target_modules=[], exclude_modules=peft_config.exclude_modules)
        return check_target_module_exists(plain, key)

    def _create_and_replace(
        self,
        peft_config: InstanceConfig,
        adapter_name: str,
        target: nn.ModuleList,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        """Nothing is replaced: the layer becomes a submodule of the stack, next to its list of layers."""
        info = self.infos[current_key]
        stack = self.model.get_submodule(info.name)
        name = self.prefix.removesuffix("_")
        layer = getattr(stack, name, None)
        # In the mode of the stack: an adapter of a model in evaluation must not apply dropout.
        generator: Any = self.generator_cls(peft_config, info).train(stack.training)
        weight = stack.get_input_embeddings().weight
        in_memory = weight.device.type != "meta" and not any(p.is_meta for p in generator.parameters())
        if in_memory:
            generator.to(weight.device, weight.dtype if weight.is_floating_point() else None)
            with whole([weight]):
                generator.begin(partial(embed_ids, stack))
        if layer is None:
            layer = InstancePromptLayer(info, self.prefix)
            stack.add_module(name, layer)
            layer.register_hooks(self.model, stack, target)
        if generator.from_text and not is_loading(peft_config):  # a saved adapter brings the states along
            if not in_memory:
                raise ValueError(
                    "`init_text` needs the base model's weights in memory, and some are on the device 'meta'."
                )
            ids = repeat_to(peft_config.init_text, generator.num_slots)
            with whole(stack.parameters()):
                generator.begin_from_text(states_of_text(stack, layer.info, ids))
        layer.update_layer(adapter_name, generator)
        if adapter_name not in self.active_adapters:
            generator.requires_grad_(False)

    def _layers(self) -> Iterator[tuple[str, InstancePromptLayer]]:
        own = self.prefix + "generator"
        for name, module in self.model.named_modules():
            if isinstance(module, InstancePromptLayer) and own in module.adapter_layer_names:
                yield name, module

    # ----------------------------------------------------------------------------------------------------- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT handles `adapter_names` before this call, except for MPT.
        with self._enable_peft_forward_hooks(adapter_names=kwargs.pop("adapter_names", None)):
            return super().forward(*args, **kwargs)

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
        adapters = adapters_of(self.model)
        present = {name for _, generators in adapters.values() for name in generators}
        unexpected = {name for name in names if name != "__base__"} - present
        if unexpected:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(map(str, unexpected)))}"
            )
        with note(self.model, adapter_names=tuple(names), adapters=adapters):
            yield

    # --------------------------------------------------------------------------------------------------- switching

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Activate an adapter; one at a time."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"Only one instance-prompt adapter can be active at a time, got {list(adapter_name)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "Prompts that are generated from the instance cannot be merged into the base weights, which are the same for "
            "all instances. Keep the adapter loaded, or call `unload()` to get the base model back. (TRL merges to send weights to "
            "vLLM: set `use_vllm=False`.)"
        )

    def unload(self) -> nn.Module:
        """The base model without any trace of the adapters."""
        for name, layer in list(self._layers()):
            remove_layer(self.model, name, layer)
        base = super().unload()
        if not any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            vars(base).pop("peft_config", None)
        return base

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "`add_weighted_adapter` is for LoRA, whose weights can be averaged: the mean of two generators' weights does not "
            "generate the mean of their prompts. Train one adapter on the data of both."
        )

    # --------------------------------------------------------------------------------------------- saving, loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the adapter's name next to last in a key; a generator has modules of its own below it.
        return re.sub(rf"(\.{cls.prefix}generator)\.{re.escape(adapter_name)}\.", r"\1.", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: dict) -> dict:
        if is_loading(config):
            check_arrived(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def name_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a head that each adapter has a copy of (`modules_to_save`): name the adapter of each row.

    The names come from the request, so that calls in several threads do not see each other's. One row may be several beams.
    """
    request = current_request()
    if request.adapter_names is None:
        return None
    repeats = request.rows_per_name(args[0].shape[0], beams=True)
    return args, {**kwargs, "adapter_names": [name for name in request.adapter_names for _ in range(repeats)]}
