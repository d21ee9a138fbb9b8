# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Register methods with PEFT."""

from __future__ import annotations

import warnings
from dataclasses import is_dataclass

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .config import InstanceConfig
from .files import RENAMED
from .generator import EditGenerator, InstanceGenerator, PromptGenerator
from .model import InstancePromptModel


# The docstring of a tuner class.
TUNER_DOC = """{doc}

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`{config}`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from {package} import {config}

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, {config}(task_type="CAUSAL_LM"))
    ```
    """


def add_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`; added if it is missing. An enum has no other way to be extended from outside."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)  # without this, Python >= 3.12 does not find PeftType.<name>
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


def register_method(
    name: str, config_cls: type[InstanceConfig], generator_cls: type[InstanceGenerator], doc: str | None = None
) -> type[InstancePromptModel]:
    """Register a method with PEFT. If PEFT itself has a method of that name, warn, leave PEFT's in place, and register `instance_NAME`.

    Args:
        name (`str`): The method's name in lower case, e.g. `"iapt"`. Configs carry it as `peft_type`, in upper case.
        config_cls (`type`): Its config, a dataclass derived from [`InstanceConfig`].
        generator_cls (`type`): Its generator, derived from [`InstanceGenerator`].
        doc (`str`, *optional*): The first paragraph of the tuner class's docstring. Defaults to the generator's first
            paragraph.

    Returns:
        `type`: The tuner class, which `get_peft_model` makes for such a config. Registering the same config class again
            returns the same tuner class.

    Raises:
        TypeError: The config or the generator is not derived from its base class, the config is no dataclass, or the
            generator defines no `generate`.
        ValueError: The name is no lower-case identifier, or a different method of this package has it.

    Example:

    ```py
    >>> @dataclass
    ... class MeanPromptConfig(InstancePromptConfig): ...
    >>> class MeanPromptGenerator(PromptGenerator):
    ...     def __init__(self, config, info):
    ...         super().__init__(config, info)
    ...         L, d = len(self.depths), info.hidden_size
    ...         self.up = nn.Parameter(torch.zeros(L, d, self.num_slots * d))  # the first dimension is the layer's
    ...
    ...     def generate(self, instances, depth, weights):
    ...         mean = mean_pool(instances.states, instances.mask)  # (G, d)
    ...         return (mean @ weights["up"]).view(len(mean), self.num_slots, -1)  # (G, l, d)
    >>> MeanPromptModel = register_method("mean_prompt", MeanPromptConfig, MeanPromptGenerator)
    ```
    """
    check_classes(name, config_cls, generator_cls)
    if not (name.isidentifier() and name.islower()):
        raise ValueError(f"A method's name must be an identifier in lower case, as in 'mean_prompt', got {name!r}.")
    prefix, name = f"{name}_", free_name(name, config_cls)
    member = add_peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and full_name(known) == full_name(config_cls):  # its module was imported again
        return PEFT_TYPE_TO_TUNER_MAPPING[member]
    if known is not None:
        raise ValueError(
            f"The method {name!r} is registered already, with the config {full_name(known)}: choose another name."
        )
    model_cls = make_tuner(prefix, config_cls, generator_cls, doc)
    config_cls.method = name
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    return model_cls


def free_name(name: str, config_cls: type[InstanceConfig]) -> str:
    """The name under which a method is registered: its own, or `instance_NAME` where PEFT itself has a method of that name.

    Folders that were saved under the method's own name are then read as adapters of `instance_NAME`, and PEFT's as PEFT's: a config
    file says which package saved it. The names of the tensors do not change.
    """
    theirs = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
    if theirs is None or issubclass(theirs, InstanceConfig):
        return name
    free, package = f"instance_{name}", config_cls.__module__.partition(".")[0]
    RENAMED[name.upper(), package] = free.upper()
    warnings.warn(
        f"PEFT has a method named '{name}' of its own ({full_name(theirs)}), which stays in place. The one of "
        f"{package} is '{free}', and folders that it saved as '{name}' load as that."
    )
    return free


def check_classes(name: str, config_cls: type[InstanceConfig], generator_cls: type[InstanceGenerator]) -> None:
    """Raise a TypeError if the classes of a method cannot be its config and its generator."""
    for what, cls, base, usual in (
        ("config", config_cls, InstanceConfig, "InstancePromptConfig"),
        ("generator", generator_cls, InstanceGenerator, "PromptGenerator"),
    ):
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise TypeError(
                f"The {what} of the method {name!r} must be a class derived from `{base.__name__}`, got {cls!r}: write "
                f"`class {name.title().replace('_', '')}{what.title()}({usual})`."
            )
    if not is_dataclass(config_cls) or "__dataclass_fields__" not in vars(config_cls):
        raise TypeError(
            f"{config_cls.__name__}, the config of the method {name!r}, must be a dataclass: put `@dataclass` above it."
        )
    defined = {generator_cls.defines, "forward"}
    bases = (InstanceGenerator, PromptGenerator, EditGenerator)
    if all(getattr(generator_cls, one) in [getattr(base, one, None) for base in bases] for one in defined):
        raise TypeError(
            f"{generator_cls.__name__}, the generator of the method {name!r}, defines no "
            f"`{generator_cls.defines}(instances, depth, weights)`."
        )


def full_name(cls: type) -> str:
    """A class's module and name, which stay the same if its definition runs twice."""
    return f"{cls.__module__}.{cls.__qualname__}"


def make_tuner(
    prefix: str, config_cls: type[InstanceConfig], generator_cls: type[InstanceGenerator], doc: str | None
) -> type[InstancePromptModel]:
    """The tuner class of a method. It is named after the generator and belongs to its module, so that it can be pickled."""
    doc = doc or (generator_cls.__doc__ or prefix.removesuffix("_")).split("\n\n")[0]
    fields = {
        "prefix": prefix,
        "generator_cls": generator_cls,
        "__module__": generator_cls.__module__,
        "__doc__": TUNER_DOC.format(doc=doc, config=config_cls.__name__, package=config_cls.__module__.split(".")[0]),
    }
    return type(f"{generator_cls.__name__.removesuffix('Generator')}Model", (InstancePromptModel,), fields)
