# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What a stack is used for, which decides whether its prompt may read whole rows.

A stack does not know its head. The modules around it tell: a class that generates predicts the tokens of its rows, a class with a
classifier's loss predicts none of them, and the config of an encoder-decoder model says that it is one. The head may also lie outside
the adapted module (`model.model = get_peft_model(model.model, ...)`), or in a module of the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .attention import Attention, read_attention
from .calls import forward_args


# The losses of transformers, by their `loss_type`, that predict no next token of the row.
WHOLE_ROW_LOSSES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class Use(NamedTuple):
    """What a stack is used for.

    Attributes:
        attention (`Attention`): How it attends.
        causal_lm (`bool`): Whether the base model generates, from instruction and response in one row.
        undeclared (`bool`): Whether the stack is causal and no class around it tells if it predicts the tokens of its rows.
        encoder_of_pair (`bool`): Whether it is the encoder of an encoder-decoder model.
        decoder_of_pair (`bool`): Whether it is the decoder of one, whose encoder may take audio or images.
        decoders (`tuple[str]`): The names of the decoders beside it, if it is an encoder.
    """

    attention: Attention
    causal_lm: bool = False
    undeclared: bool = False
    encoder_of_pair: bool = False
    decoder_of_pair: bool = False
    decoders: tuple[str, ...] = ()


def read_use(tree: Mapping[str, nn.Module], layers_name: str, stacks: Mapping[str, str]) -> Use:
    """Find out what one of a base model's stacks is used for.

    Args:
        tree (`Mapping[str, nn.Module]`): The base model's modules by name.
        layers_name (`str`): The name of the stack's list of layers.
        stacks (`Mapping[str, str]`): All stacks of the base model, as `{name of the list of layers: name of the stack}`.

    Raises:
        ValueError: Whether the stack is causal cannot be told.
    """
    model, stack = tree[""], tree[stacks[layers_name]]
    pair = _pair_of(model, stacks[layers_name])
    if pair is not None:
        if _is_decoder(tree, layers_name, stacks):
            return Use(Attention(causal=True), decoder_of_pair=True)
        others = [name for name in stacks if name != layers_name and _pair_of(model, stacks[name]) is pair]
        if decoders := tuple(stacks[name] for name in others if _is_decoder(tree, name, stacks)):
            return Use(Attention(causal=False), encoder_of_pair=True, decoders=decoders)
    around = _around(model, stacks[layers_name])
    # The innermost language model whose token embedding is the stack's.
    depths = [n for n, m in enumerate(around) if generates(m) and embedding_of(m) is embedding_of(stack)]
    language_model = around[depths[-1]] if depths else None
    name_there = ".".join(layers_name.split(".")[depths[-1] :]) if depths else ""
    inside = _inside(layers_name, stacks[layers_name])
    attention = read_attention(stack, inside, flags_of(tree, layers_name), language_model, name_there)
    if not attention.causal or (generates(model) and pair is not None):
        return Use(attention)
    losses = [getattr(module, "loss_type", None) for module in around]
    classifies = any(loss in WHOLE_ROW_LOSSES for loss in losses)
    return Use(attention, causal_lm=generates(model), undeclared=not (generates(model) or classifies))


def generates(module: nn.Module) -> bool:
    """Whether a module's class is a language model of transformers."""
    can_generate = getattr(type(module), "can_generate", None)
    return hasattr(module, "generate") and can_generate is not None and bool(can_generate())


def callers(model: nn.Module, stack_name: str) -> dict[str, nn.Module]:
    """The modules whose arguments decide the scope, by name: the base model, and the language models inside it around the stack."""
    parts = stack_name.split(".") if stack_name else []
    within = {
        ".".join(parts[:n]): module for n, module in enumerate(_around(model, stack_name)) if n and generates(module)
    }
    return {"": model, **within}


def flags_of(tree: Mapping[str, nn.Module], layers_name: str) -> list[bool]:
    """What the modules in a list of layers declare by `is_causal`."""
    declared = (getattr(m, "is_causal", None) for name, m in tree.items() if name.startswith(f"{layers_name}."))
    return [flag for flag in declared if isinstance(flag, bool)]


def _around(model: nn.Module, stack_name: str) -> list[nn.Module]:
    """The modules from the base model to a stack."""
    parts = stack_name.split(".") if stack_name else []
    return [model.get_submodule(".".join(parts[:length])) for length in range(len(parts) + 1)]


def _pair_of(model: nn.Module, stack_name: str) -> nn.Module | None:
    """The innermost encoder-decoder model around a stack, or the stack, by its config; None if there is none."""
    *outer, stack = _around(model, stack_name)
    return next((m for m in [*outer[::-1], stack] if _says(m, "is_encoder_decoder")), None)


def _says(module: nn.Module, name: str) -> bool:
    return bool(getattr(getattr(module, "config", None), name, False))


def _is_decoder(tree: Mapping[str, nn.Module], layers_name: str, stacks: Mapping[str, str]) -> bool:
    """Whether a stack of an encoder-decoder model is a decoder: causal, and it takes the encoder's states."""
    stack = tree[stacks[layers_name]]
    if "encoder_hidden_states" not in forward_args(stack):
        return False
    if _says(stack, "is_decoder"):
        return True
    twins = [tree[name] for name in stacks.values()]
    if any(type(twin) is type(stack) and _says(twin, "is_decoder") for twin in twins):  # T5's halves have one class
        return False
    return read_attention(stack, _inside(layers_name, stacks[layers_name]), flags_of(tree, layers_name)).causal


def embedding_of(module: Any) -> Any:
    """The module that looks up token ids for a module of transformers; None if it has none."""
    try:
        return module.get_input_embeddings()
    except NotImplementedError:
        return None


def _inside(layers_name: str, stack_name: str) -> str:
    return layers_name.removeprefix(f"{stack_name}." if stack_name else "")
