# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The transformer stacks of a model, and facts about each: its layers, its arguments, how it numbers tokens, what it is used for.

A stack does not know its head. The modules around it tell whether its prompt may read whole rows: a class that generates predicts the
tokens of its rows, a class with a classifier's loss predicts none of them, and the config of an encoder-decoder model says that it is one.
The head may also lie outside the adapted module (`model.model = get_peft_model(model.model, ...)`), or in a module of the user's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .calls import CACHE_ARGUMENTS, forward_args
from .probe import Attention, Positions, num_elements, read_attention, read_positions


@dataclass(frozen=True)
class StackInfo:
    """Facts about a stack. It holds no module, so that it can be copied and pickled.

    Attributes:
        name (`str`): The stack's name in the base model; `""` if the base model is the stack.
        layers_name (`str`): The name of its list of layers in the base model.
        hidden_size (`int`): d, the width of the layers' input.
        embedding_size (`int`): e, the width of the input embeddings; not d in a few models.
        output_size (`int`): The width of the states that the stack returns; OPT projects them back to e.
        vocab_size (`int`): V.
        num_layers (`int`): The number of depths: how many layers run in a pass. If layers are shared, the list holds fewer.
        forward_args (`frozenset[str]`): The names of the arguments that the stack's forward takes.
        causal (`bool`): Whether a token sees only what stands before it.
        true_hides (`bool`): Whether True in a bool attention mask hides a key.
        causal_lm (`bool`): Whether instruction and response stand in the same row.
        undeclared (`bool`): Whether the stack is causal and no module of the base model tells if they do.
        prefix_lm (`bool`): Whether a caller may let a prefix of each row see all of itself.
        encoder_of_pair (`bool`): Whether the stack is the encoder of an encoder-decoder model.
        decoder_of_pair (`bool`): Whether it is the decoder of one.
        max_positions (`int`, *optional*): The number of positions that have learned embeddings. None: positions are not learned.
        position_offset (`int`): The position id of the first token.
        absolute_column_positions (`bool`): Whether it gives each column of its input the position of its number, whatever position ids
            say, and adds that to the states: BART.
        distance_by_column (`bool`): Whether the stack reads distances off the columns of its input and not off `position_ids`.
        positions_from_mask (`bool`): Whether it counts the tokens that its mask shows, if it gets no `position_ids`, and not columns.
        rotates_by_length (`bool`): Whether its rotary frequencies depend on the largest position of a batch (LongRoPE, dynamic
            NTK). Slots then have positions before those of the tokens, for nothing but the distance of positions counts there,
            and the frequencies switch where the base model's do.
        padding_by_id (`bool`): Whether it tells padding from tokens by ids, which embeddings do not show, where it counts tokens.
        sliding_window (`int`, *optional*): The width of its sliding attention window.
        special_ids (`tuple[int]`): The ids of the first, last and padding tokens, as the model's config has them.
        begins_with_special (`bool`): Whether texts begin with a special token, as far as the config tells: T5 has none.
        recurrent_layers (`tuple[int]`): The layers without attention, from which no position can be hidden by a mask.
        no_slots (`str`): Why slots cannot stand among its tokens; empty if they can. Edits need no slots.
        mixing_layer (`str`, *optional*): The name of a module that mixes neighbouring tokens without attention, if there is one.
        twin_layers (`str`, *optional*): Another list of layers of the same class, which the states pass as well: HRM runs two in turns.
        attention_kinds (`frozenset[str]`): The kinds of attention in its layers, where the config says so.
        image_layers (`tuple[int]`): The layers that attend to an image and not to the text, where the config says so.
        decoders (`tuple[str]`): The names of the decoders that attend to the stack's output, if it is the encoder of a pair.
    """

    name: str
    layers_name: str
    hidden_size: int
    embedding_size: int
    output_size: int
    vocab_size: int
    num_layers: int
    forward_args: frozenset[str]
    causal: bool
    true_hides: bool
    prefix_lm: bool
    max_positions: int | None
    position_offset: int
    absolute_column_positions: bool
    distance_by_column: bool
    positions_from_mask: bool
    rotates_by_length: bool
    sliding_window: int | None
    causal_lm: bool = False
    undeclared: bool = False
    encoder_of_pair: bool = False
    decoder_of_pair: bool = False
    padding_by_id: bool = False
    recurrent_layers: tuple[int, ...] = ()
    no_slots: str = ""
    special_ids: tuple[int, ...] = ()
    begins_with_special: bool = True
    mixing_layer: str | None = None
    twin_layers: str | None = None
    attention_kinds: frozenset[str] = frozenset()
    image_layers: tuple[int, ...] = ()
    decoders: tuple[str, ...] = ()


# The modules of a model by their names, each under all that it has, without those inside adapters, which hold no stack and may be many.
Tree = dict[str, nn.Module]


def tree_of(module: nn.Module, name: str = "") -> Tree:
    """The modules of a model by their names. Attaching an adapter makes one, from which all facts about the model are read.

    A different thread may add an adapter meanwhile.
    """
    found = {name: module}
    if not isinstance(module, BaseTunerLayer):
        for child_name, child in list(module._modules.items()):
            if child is not None:
                found.update(tree_of(child, f"{name}.{child_name}" if name else child_name))
    return found


def below(tree: Tree, name: str) -> Tree:
    """The modules from `name` on, by their names from there, each under its first."""
    start = f"{name}." if name else ""
    first: dict[nn.Module, str] = {}
    for path, module in tree.items():
        if path == name or path.startswith(start):
            first.setdefault(module, "" if path == name else path.removeprefix(start))
    return {path: module for module, path in first.items()}


def find_stacks(tree: Tree) -> dict[str, str]:
    """The stacks of a model: `{name of the list of layers: name of the stack}`, in the model's order.

    A stack is a module that takes `input_ids` or `inputs_embeds`, holds a list of layers, and holds no other stack.
    """
    takers = [name for name, module in below(tree, "").items() if _takes_tokens(module)]
    stacks = {}
    for name in takers:
        inside = name + "." if name else ""
        if any(other != name and other.startswith(inside) for other in takers):
            continue
        layers_name = _find_layers(below(tree, name))
        if layers_name is not None:
            stacks[inside + layers_name] = name
    return stacks


def _takes_tokens(module: nn.Module) -> bool:
    if not hasattr(module, "get_input_embeddings"):
        return False
    args = forward_args(module)
    # SeamlessM4T's encoder of units takes the states of the decoder before it, and no tokens.
    return "input_ids" in args and "inputs_embeds" in args and embedding_of(module) is not None


def _find_layers(modules: Tree) -> str | None:
    """The list of layers is the module list that holds most of the parameters and lies in no other. Lists whose modules take a cache
    go before: Phi-4 and Chameleon hold an encoder of sounds or images in their text stack."""
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(o + ".") for o in lists)}
    caching = {n: m for n, m in outer.items() if len(m) > 0 and {*CACHE_ARGUMENTS} & {*forward_args(m[0])}}
    outer = caching or outer
    sizes = {name: sum(map(num_elements, module.parameters())) for name, module in outer.items()}
    return max(sizes, key=sizes.__getitem__) if sizes and max(sizes.values()) > 0 else None


def _embedding(stack: PreTrainedModel) -> nn.Embedding:
    """The table of input embeddings, beside whose rows the slots stand.

    Raises:
        ValueError: It is a module of another kind: I-BERT's is quantised.
    """
    embedding = embedding_of(stack)
    if not (hasattr(embedding, "embedding_dim") and hasattr(embedding, "num_embeddings")):
        raise ValueError(
            f"Instance prompts need a table of input embeddings, with `num_embeddings` and `embedding_dim`; "
            f"{type(stack).__name__} has a {type(embedding).__name__} in its place."
        )
    return embedding


def embed(stack: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The `inputs_embeds` (B, S, e) with which a stack computes the same as with `input_ids` (B, S)."""
    embeds = stack.get_input_embeddings()(input_ids)  # (B, S, e)
    # The encoders of Pegasus and Marian scale embeddings that they look up, but not `inputs_embeds`.
    unscaled = "encoder_hidden_states" not in forward_args(stack)
    return (
        embeds * stack.embed_scale if unscaled and isinstance(getattr(stack, "embed_scale", None), float) else embeds
    )


@torch.no_grad()
def embed_ids(stack: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The `inputs_embeds` (n, e) for token ids (n,), which may lie on any device."""
    return embed(stack, ids[None].to(stack.get_input_embeddings().weight.device))[0]  # (n, e)


def embed_per_layer(
    stack: PreTrainedModel, input_ids: torch.Tensor | None, embeds: torch.Tensor
) -> torch.Tensor | None:
    """The per-layer embeddings (B, S, layers, width) of Gemma 3n and 4 for ids (B, S); None for other stacks, or without ids."""
    if input_ids is None or getattr(stack, "embed_tokens_per_layer", None) is None:
        return None
    known = {"input_ids": input_ids, "inputs_embeds": embeds}
    names = inspect.signature(stack.get_per_layer_inputs).parameters
    return stack.get_per_layer_inputs(**{name: value for name, value in known.items() if name in names})


def describe(model: PreTrainedModel, tree: Tree | None = None) -> list[StackInfo]:
    """The facts about each stack of a base model, in the model's order.

    Args:
        model (`PreTrainedModel`): The base model.
        tree (`dict`, *optional*): Its [`tree_of`].
    """
    tree = tree_of(model) if tree is None else tree
    stacks = find_stacks(tree)
    return [_describe(tree, layers_name, stacks) for layers_name in stacks]


def _describe(tree: Tree, layers_name: str, stacks: dict[str, str]) -> StackInfo:
    stack_name = stacks[layers_name]
    stack: Any = tree[stack_name]
    layers: Any = tree[layers_name]
    modules = below(tree, stack_name)
    config = stack.config.get_text_config()
    embedding = _embedding(stack)
    inside = _inside(layers_name, stack_name)
    attention, use = read_use(tree, layers_name, stacks)
    pair = "encoder_of_pair" in use or "decoder_of_pair" in use
    max_positions, positions = _positions(stack, inside, modules)
    kinds = list(getattr(config, "layer_types", None) or ())
    recurrent = tuple(n for n, kind in enumerate(kinds) if "attention" not in kind or kind.startswith("linear"))
    no_slots = attention.no_slots
    if kinds and len(recurrent) == len(kinds):
        no_slots = f"slots need layers that are known to attend, and {type(stack).__name__} has {kinds[0]!r} only"
    mixing = [f"{layers_name}.{n}" for n in recurrent[:1]]
    mixing += [f"{layers_name}.{name}" for name, one in below(tree, layers_name).items() if isinstance(one, nn.Conv1d)]
    return StackInfo(
        name=stack_name,
        layers_name=layers_name,
        hidden_size=config.hidden_size,
        embedding_size=embedding.embedding_dim,
        output_size=getattr(getattr(stack, "project_out", None), "out_features", config.hidden_size),
        vocab_size=embedding.num_embeddings,
        num_layers=_num_layers(layers, config, "decoder_of_pair" in use),
        forward_args=frozenset(forward_args(stack)),
        causal=attention.causal,
        true_hides=attention.true_hides,
        prefix_lm=attention.prefix,
        max_positions=max_positions,
        position_offset=positions.offset,
        absolute_column_positions=positions.absolute_column_positions,
        distance_by_column=_distance_by_column(modules, config, positions),
        positions_from_mask=positions.positions_from_mask,
        padding_by_id=positions.padding_by_id,
        rotates_by_length=_rotates_by_length(modules),
        sliding_window=getattr(config, "sliding_window", None),
        begins_with_special=getattr(config, "bos_token_id", None) is not None or not (pair or attention.causal),
        special_ids=tuple(sorted(_special_ids(config))),
        recurrent_layers=recurrent,
        no_slots=no_slots,
        mixing_layer=mixing[0] if mixing else None,
        twin_layers=_twin_layers(modules, inside),
        attention_kinds=frozenset(kinds),
        image_layers=tuple(getattr(config, "cross_attention_layers", None) or ()),
        **use,
    )


def _special_ids(config) -> set[int]:
    ids = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    return {one for value in ids for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}


def _num_layers(layers: nn.ModuleList, config, decoder: bool) -> int:
    names = ("decoder_layers", "num_decoder_layers") if decoder else ()
    # ALBERT: groups of layers, each run several times.
    shared = any(isinstance(child, nn.ModuleList) for layer in layers for child in layer.children())
    for name in (*names, "num_hidden_layers") if shared else ():
        count = getattr(config, name, None)
        if isinstance(count, int) and count > len(layers) and count % len(layers) == 0:
            return count
    return len(layers)


def _twin_layers(modules: Tree, layers_name: str) -> str | None:
    """The first other list of the stack whose modules have the class of its layers."""
    own = next(modules[layers_name].children(), None)
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and name != layers_name:
            if type(next(module.children(), None)) is type(own):
                return name
    return None


def _positions(stack: PreTrainedModel, layers_name: str, modules: Tree) -> tuple[int | None, Positions]:
    """The number of learned positions (None: rotary, relative or ALiBi), and how the stack numbers its tokens.

    If the stack cannot be called, positions come from the mask if they begin behind the padding id (RoBERTa), or if the module that
    embeds positions takes the mask (OPT).
    """
    size, offset = _learned_positions(modules)
    found = read_positions(stack, layers_name, offset, partial(_in_place_of_ids, stack))
    if found is None:
        by_id, by_mask = "position_ids" in forward_args(stack), "attention_mask"
        counts = any(by_mask in forward_args(m) for name, m in modules.items() if name.endswith("embed_positions"))
        found = Positions(offset, by_id, size is not None and not by_id, counts or offset != 0)
    return None if size is None else size + offset - found.offset, found


def _in_place_of_ids(stack: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    embeds = embed(stack, input_ids)  # (B, S, e)
    per_layer = embed_per_layer(stack, input_ids, embeds)  # (B, S, layers, width)
    return {"inputs_embeds": embeds, **({} if per_layer is None else {"per_layer_inputs": per_layer})}


def _distance_by_column(modules: Tree, config, positions: Positions) -> bool:
    """Whether distances between tokens go by column.

    No position id reaches the layers of T5, Bloom and MPT. In others it does, but ALiBi (Falcon), a table of relative distances
    (DeBERTa, MPNet) or a sliding window (Mistral, Gemma 3) does not read it.
    """
    relative = any(name.endswith("relative_attention_bias") for name in modules)
    declared = any(getattr(config, name, False) for name in ("alibi", "relative_attention"))
    kinds = getattr(config, "layer_types", None)
    windows = getattr(config, "sliding_window", None) and (kinds is None or any("sliding" in kind for kind in kinds))
    return bool(declared or relative or windows or not (positions.reads_ids or positions.absolute_column_positions))


def _rotates_by_length(modules: Tree) -> bool:
    """Whether rotary frequencies depend on the largest position id. A rotary embedding has one type, or one per layer type."""
    types = [getattr(module, "rope_type", None) for module in modules.values()]
    each = {kind for known in types for kind in (known.values() if isinstance(known, dict) else [known]) if kind}
    return any("dynamic" in kind or kind == "longrope" for kind in each)


def _learned_positions(modules: Tree) -> tuple[int | None, int]:
    """The number of learned positions (None: rotary, relative or ALiBi), and the id of the first."""
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in (
            "position_embeddings",
            "wpe",
            "embed_positions",
        ):
            # OPT and BART skip the head of the table by themselves; RoBERTa and MPNet count on from the padding id.
            if (skipped := getattr(module, "offset", None)) is not None:
                return module.num_embeddings - skipped, 0
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset, offset
    return None, 0


# The losses of transformers, by their `loss_type`, that predict no next token of the row.
WHOLE_ROW_LOSSES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def read_use(tree: Tree, layers_name: str, stacks: Mapping[str, str]) -> tuple[Attention, dict[str, Any]]:
    """How one of a base model's stacks attends, and what it is used for: the fields of its [`StackInfo`] that are not their defaults.

    Args:
        tree (`dict`): The base model's [`tree_of`].
        layers_name (`str`): The name of the stack's list of layers.
        stacks (`Mapping[str, str]`): All stacks of the base model, as `{name of the list of layers: name of the stack}`.

    Raises:
        ValueError: Whether the stack is causal cannot be told.
    """
    model, stack = tree[""], tree[stacks[layers_name]]
    pair = _pair_of(model, stacks[layers_name])
    if pair is not None:
        if _is_decoder(tree, layers_name, stacks):
            return Attention(causal=True), {"decoder_of_pair": True}
        others = [name for name in stacks if name != layers_name and _pair_of(model, stacks[name]) is pair]
        if decoders := tuple(stacks[name] for name in others if _is_decoder(tree, name, stacks)):
            return Attention(causal=False), {"encoder_of_pair": True, "decoders": decoders}
    around = _around(model, stacks[layers_name])
    # The innermost language model whose token embedding is the stack's.
    depths = [n for n, m in enumerate(around) if generates(m) and embedding_of(m) is embedding_of(stack)]
    language_model = around[depths[-1]] if depths else None
    name_there = ".".join(layers_name.split(".")[depths[-1] :]) if depths else ""
    inside = _inside(layers_name, stacks[layers_name])
    attention = read_attention(stack, inside, flags_of(tree, layers_name), language_model, name_there)
    if not attention.causal or (generates(model) and pair is not None):
        return attention, {}
    losses = [getattr(module, "loss_type", None) for module in around]
    classifies = any(loss in WHOLE_ROW_LOSSES for loss in losses)
    return attention, {"causal_lm": generates(model), "undeclared": not (generates(model) or classifies)}


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


def flags_of(tree: Tree, layers_name: str) -> list[bool]:
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


def _is_decoder(tree: Tree, layers_name: str, stacks: Mapping[str, str]) -> bool:
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
