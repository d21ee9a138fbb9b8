# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Wrappers of a module's methods: attributes of the object that hide a method of its class, as accelerate's hooks do.

Hooks of torch run in `module(...)` only. Tools such as sentence-transformers call `module.forward(...)`, and would silently get the base
model. A wrapper has the signature of its method, survives `copy.deepcopy`, pickle and `DataParallel` replicas, works above and beneath
other wrappers, and leaves the module's class alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from torch import nn


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
        if (
            args and args[0] is self.module
        ):  # accelerate binds a method beneath its own wrapper to the module once more
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
