# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Wrappers of a module's methods: attributes of the object that hide a method of its class, as accelerate's hooks do.

Hooks of torch run in `module(...)` only. Tools such as sentence-transformers call `module.forward(...)`, and would silently get the base
model. A wrapper has the signature of its method, survives `copy.deepcopy`, pickle and `DataParallel` replicas, works above and beneath
other wrappers, and leaves the module's class alone.

A base model has one of `forward`, which notes each call, and one of `generate`, which notes its prompt, since later passes see longer rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from itertools import count
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from .cache import SlotCache
from .calls import cache_of, declared, named
from .request import (
    OWN_ARGUMENTS,
    Adapters,
    GrowingText,
    adapters_of,
    begin_call,
    check_kinds,
    end_call,
    forget,
    known_of,
    note,
    running_call,
)


# The attribute of a module that lists its wrappers. A wrapper beneath one of a different package can be found only here.
_KEY = "_instance_prompt_wrappers"
_REPLICATE = "_replicate_for_data_parallel"  # torch's name


class MethodWrapper:
    """Wraps a method of a module. A subclass names the method and defines `run`.

    Args:
        module (`nn.Module`): The module.

    Attributes:
        method (`str`): The name of the method.
    """

    method: str

    def __init__(self, module: nn.Module):
        self.module = module
        # accelerate's own wrapper of `forward` calls `_old_forward`, and accelerate replaces its wrapper each time it dispatches the
        # model. So ours goes beneath.
        beneath = self.method == "forward" and "_old_forward" in module.__dict__
        self.attribute = "_old_forward" if beneath else self.method
        # The attribute that hid the class's method before, if any. The class's method is looked up at each call: FSDP2 replaces the class.
        self.hidden = module.__dict__.get(self.attribute)
        self.removed = False
        self.__doc__ = self.__wrapped__.__doc__

    def install(self) -> None:
        """Put the wrapper into its module."""
        self.module.__dict__.setdefault(_KEY, []).append(self)
        self.module.__dict__.setdefault(_REPLICATE, Replicate(self.module))
        setattr(self.module, self.attribute, self)

    def remove(self) -> None:
        """Take the wrapper out of its module. Beneath a wrapper of a different package it stays, and only calls the method."""
        self.removed = True
        own = self.module.__dict__
        own[_KEY].remove(self)
        if not own[_KEY]:
            del own[_KEY], own[_REPLICATE]
        for attribute in ("_old_forward", self.method):
            while isinstance(top := own.get(attribute), MethodWrapper) and top.removed:
                if top.hidden is None and attribute == self.method:
                    delattr(self.module, attribute)
                else:
                    setattr(self.module, attribute, top.__wrapped__)

    def bound_to(self, replica: nn.Module) -> MethodWrapper:
        """The same wrapper for a replica of its module."""
        twin = copy.copy(self)
        twin.module, twin.hidden = replica, rebound(self.hidden, self.module, replica)
        return twin

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The wrapped method."""
        return self.hidden or getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    @property
    def __name__(self) -> str:
        return self.method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds a method beneath its own wrapper to the module again
            args = args[1:]
        return self.call_wrapped(*args, **kwargs) if self.removed else self.run(*args, **kwargs)

    def call_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped method."""
        if self.hidden is not None:
            return self.hidden(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)  # torch.compile binds no methods

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the wrapped method, which `call_wrapped` calls."""
        raise NotImplementedError


class Replicate:
    """Makes the replicas of a module for `torch.nn.DataParallel`.

    torch copies the module's `__dict__`, where methods are bound to the module itself: a replica would run the original's weights.

    Args:
        module (`nn.Module`): The module.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.module), _REPLICATE)(self.module)
        own = replica.__dict__
        own.update({name: rebound(value, self.module, replica) for name, value in own.items()})
        own[_KEY] = [rebound(wrapper, self.module, replica) for wrapper in own[_KEY]]
        return replica


def rebound(value: Any, module: nn.Module, replica: nn.Module) -> Any:
    """A value bound to a module, bound to its replica instead; any other value as it is."""
    if isinstance(value, MethodWrapper):
        return value.bound_to(replica)
    if isinstance(value, Replicate):
        return Replicate(replica)
    bound = isinstance(value, MethodType) and value.__self__ is module
    return MethodType(value.__func__, replica) if bound else value


Kind = TypeVar("Kind", bound=MethodWrapper)


def wrappers(module: nn.Module, kind: type[Kind]) -> list[Kind]:
    """The wrappers of a kind that a module has."""
    return [one for one in module.__dict__.get(_KEY, ()) if isinstance(one, kind)]


class NotedForward(MethodWrapper):
    """The forward of a base model, each call of which is noted and forgotten.

    Hooks do that, since TRL puts a forward of its own in the place of the base model's and calls the stack from there. The wrapper does
    it for `model.forward(...)`, for which torch runs no hooks.
    """

    method = "forward"

    def install(self) -> None:
        super().install()
        before = self.module.register_forward_pre_hook(begin_call, with_kwargs=True, prepend=True)
        self.handles = [before, self.module.register_forward_hook(end_call, always_call=True)]

    def remove(self) -> None:
        super().remove()
        for handle in self.handles:
            handle.remove()

    def bound_to(self, replica: nn.Module) -> MethodWrapper:
        known = known_of(self.module)
        if said := [name for name in (*OWN_ARGUMENTS, "adapter_names") if getattr(known, name) is not None]:
            raise ValueError(
                f"`{said[0]}` was set around the call, and does not reach the threads in which `DataParallel` runs replicas of the "
                f"model: pass `{said[0]}` to the model."
            )
        return super().bound_to(replica)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.call_wrapped(*args, **kwargs)
        call = running_call()
        direct = call is None or call.model is not self.module or call.entered
        if direct:
            args, kwargs = begin_call(self.module, args, kwargs)
            call = running_call()
        assert call is not None  # it has begun
        call.entered = True
        try:
            output = self.call_wrapped(*args, **declared(kwargs, self.module))
        except BaseException as error:
            if direct or not isinstance(error, Exception):  # torch runs no hooks after an interrupt
                forget(call)
            raise
        if direct:
            forget(call)
        else:
            call.entered = False  # hooks may call the model again
        return output


NUMBERS = count()  # of the calls of `generate` in this process


class Generate(MethodWrapper):
    """The base model's `generate`.

    Args:
        instruction_mask (`torch.Tensor`, *optional*): Shape (B, S), bool or 0/1. True for the tokens that the prompt is generated from.
            Default: by the adapter's `response_template` or `instruction_length`, else all tokens but padding.
        instance_embeds (`torch.Tensor`, *optional*): Shape (B, k). Instance vectors, for methods that take them. Default: none.
        task_ids (`torch.LongTensor`, *optional*): Shape (B,). The task of each row, for adapters over several tasks. Default: none.
        *args, **kwargs: As for the base model.

    Raises:
        ValueError: An argument and the input differ in their number of rows, or `prefill_chunk_size` is set and an adapter has slots.
    """

    method = "generate"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        given = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        call, adapters = named(model, self.method, args, kwargs), adapters_of(model)
        chunk = setting(model, call, "prefill_chunk_size")
        if chunk is not None and has_slots(adapters, known_of(model).adapter_names):
            raise ValueError(
                "Instance prompts cannot be used with `prefill_chunk_size`: they are generated from the whole instruction, "
                f"of which a chunk shows only a part. Set it to None, got {chunk!r}."
            )
        kwargs = declared(kwargs, model)
        name, cache = cache_of(kwargs)
        if name is not None and (cache := SlotCache.find(cache)) is not None:
            kwargs[name] = cache
        inputs, ids = prompt_of(call)
        # A call inside a call of `generate`, such as an assistant's, may continue the same prompt.
        known = known_of(model) if inputs is None else known_of(model).of_tokens(ids, inputs)
        fields = {name: getattr(known, name) if value is None else value for name, value in given.items()}
        if inputs is not None:
            check_rows(fields, known.adapter_names, inputs.shape[0])
        check_kinds(fields)
        texts = growing_texts(model, call, known.prompt_length if given["instruction_mask"] is None else None)
        with note(
            model,
            prompt_length=texts[0].shape[1] if texts else None,
            texts=texts,
            prompt_mask=fields["instruction_mask"],
            adapters=adapters,
            generate_call=next(NUMBERS),
            drafts=bool(setting(model, call, "is_assistant")),
            **fields,
        ):
            return self.call_wrapped(*args, **kwargs)


def has_slots(adapters: Adapters, names: Collection[str] | None) -> bool:
    """Whether one of the adapters that a call is for has slots: those with these `names`; None: those that are active."""
    used = [
        own[name] for active, own in adapters.values() for name in (active if names is None else names) if name in own
    ]
    return any(generator.num_slots for generator in used)


def setting(model: nn.Module, call: Mapping[str, Any], name: str) -> Any:
    """The value of a setting in a call of `generate`: the argument, even if None, else the caller's config, else the model's."""
    configs = (call.get("generation_config"), getattr(model, "generation_config", None))
    said = (value for config in configs if (value := getattr(config, name, None)) is not None)
    return call[name] if name in call else next(said, None)


def prompt_of(call: Mapping[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The prompt of a call of `generate`: token ids (B, P) or embeddings (B, P, e); and its ids, or None if they are not known."""
    ids = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
    inputs = ids if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if not isinstance(inputs, torch.Tensor) or inputs.dim() < 2:
        return None, None
    told = isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.shape[:2] == inputs.shape[:2]
    return inputs, ids if told else None


def growing_texts(model: nn.Module, call: Mapping[str, Any], bound: int | None) -> tuple[GrowingText, ...]:
    """The texts that a call of `generate` extends, its prompt first; none if the prompt is not known.

    Args:
        model (`nn.Module`): The model.
        call (`Mapping`): The arguments by name.
        bound (`int`, *optional*): The prompt length of the `generate` around this call: later columns were generated there. Default: P.
    """
    inputs, ids = prompt_of(call)
    if inputs is None:
        start = setting(model, call, "bos_token_id")
        if call.get(getattr(model, "main_input_name", "")) is not None or not isinstance(start, int):
            return ()
        inputs = ids = torch.tensor([[start]])  # (1, 1), whatever the number of rows
    B, P = inputs.shape[:2]
    length = P if bound is None else bound
    in_parts = setting(model, call, "prefill_chunk_size") is not None
    texts = [GrowingText((B, length), None if ids is None else ids[:, :length], P, in_parts)]
    unlike = call.get("negative_prompt_ids")  # (B, Q)
    if unlike is None and ids is not None and setting(model, call, "guidance_scale") not in (None, 1):
        unlike = ids[:, -1:]  # (B, 1)
    if isinstance(unlike, torch.Tensor) and unlike.dim() > 1:
        texts.append(GrowingText((unlike.shape[0], unlike.shape[1]), unlike, unlike.shape[1]))
    return tuple(texts)


def check_rows(fields: Mapping[str, Any], adapter_names: tuple[str, ...] | None, num_rows: int) -> None:
    """Raise a ValueError for a wrong number of rows: later, a row may be several beams, and a value with fewer rows would look right."""
    for name, value in fields.items():
        if isinstance(value, torch.Tensor) and value.shape[:1] != (num_rows,):
            raise ValueError(f"`{name}` must have {num_rows} row(s), as the input has; got {tuple(value.shape)}.")
    if adapter_names is not None and len(adapter_names) != num_rows:
        raise ValueError(
            f"`adapter_names` must name an adapter for each of the {num_rows} rows, got {len(adapter_names)}."
        )


class GenerateBatch(MethodWrapper):
    """Continuous batching, which is refused."""

    method = "generate_batch"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "Instance prompts cannot be used with continuous batching (`generate_batch`): it cuts prompts to fill its steps, and a "
            "prompt vector is generated from the whole instruction. Call `generate` with a padded batch, or serve with vLLM."
        )


class InitContinuousBatching(GenerateBatch):
    """The entry to continuous batching that `generate_batch`, its context manager and transformers' server share."""

    method = "init_continuous_batching"
