# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The vectors that an adapter generates, the tokens that they read, and the places where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..engine.adapters import in_place
from ..engine.intercept import Generated, intercept
from ..engine.layer import InstancePromptLayer
from ..engine.slots import take
from ..generator import INPUT, PromptGenerator
from ..nn.pooling import rms


def active_generator(model: nn.Module) -> tuple[InstancePromptLayer, PromptGenerator]:
    """The layer and the generator of a model's active adapter.

    Raises:
        ValueError: There is no active adapter, it is on several stacks, or it has no prompt vectors.
    """
    layers = [
        module for module in model.modules() if isinstance(module, InstancePromptLayer) and not module.disable_adapters
    ]
    found = [
        (layer, layer.generators[name])
        for layer in layers
        for name in layer.active_adapters
        if name in layer.generators
    ]
    if len(found) != 1:
        names = [layer.info.layers_name for layer, _ in found]
        raise ValueError(
            f"The model must have an active instance-prompt adapter on one stack, it has them on {names}."
        )
    if not isinstance(generator := found[0][1], PromptGenerator):
        raise ValueError(
            f"{type(generator).__name__} generates no prompt vectors, which this tool looks at: it edits the instruction's own states. Compare "
            "with `disable_adapter()`."
        )
    return found[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and with the model in evaluation mode; at the end, restore each module's mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def recording() -> Iterator[dict[int | None, Generated]]:
    """Collect what is generated inside the context, by depth; under None, the output of the method's `encode`."""
    made: dict[int | None, Generated] = {}
    with intercept(lambda generated: made.__setitem__(generated.depth, generated)):
        yield made


def record(model: nn.Module, batch: Mapping[str, Any]) -> dict[int | None, Generated]:
    """Everything that the active adapter generates for a batch, as [`recording`] collects it.

    Args:
        model (`nn.Module`): The model with the adapter, e.g. a [`~peft.PeftModel`].
        batch (`Mapping`): The arguments of the model's forward.

    Raises:
        ValueError: There is no active adapter.
    """
    active_generator(model)
    with evaluating(model), recording() as made:
        model(**on_device_of(model, batch))
    return made


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the model's device. For an offloaded model accelerate moves it."""
    device = next(model.parameters()).device
    return dict(batch) if device.type == "meta" else send_to_device(dict(batch), device)


def prompt_vectors(model: nn.Module, batches: Iterable[Mapping[str, Any]], depth: int | None = None) -> torch.Tensor:
    """The prompt vectors of many instances at one depth.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        depth (`int`, *optional*): The layer, or -1 for the input embeddings. Defaults to the middle of the depths at which the
            method generates.

    Returns:
        `torch.Tensor`: Shape (instances, l, d), in float32 on the CPU.

    Raises:
        ValueError: There is no active adapter, or it generates nothing at this depth.
    """
    depth = check_depth(active_generator(model)[1], depth)
    return torch.cat([record(model, batch)[depth].values.float().cpu() for batch in batches])


def generated_parts(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], depths: Sequence[int] | None = None
) -> dict[int, torch.Tensor]:
    """The generated part of many instances' prompt vectors: without the start state, in units of its root mean square.

    With the default `init_weights=True` a prompt vector is `p = start + rms(start) * generated` (see
    [`PromptGenerator.forward`]). In a causal model the start is an attention sink, hundreds of times as large as other states and
    often the same for all instances, so only the generated parts of instances can be compared.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        depths (`Sequence[int]`, *optional*): The depths. Defaults to all at which the method generates.

    Returns:
        `dict[int, torch.Tensor]`: By depth, shape (instances, l, d), in float32 on the CPU.

    Raises:
        ValueError: There is no active adapter, or it generates nothing at one of the depths.
    """
    generator = active_generator(model)[1]
    depths = generator.depths if depths is None else [check_depth(generator, depth) for depth in depths]
    found: dict[int, list[torch.Tensor]] = {depth: [] for depth in depths}
    for batch in batches:
        made = record(model, batch)
        for depth, parts in found.items():
            parts.append(generated_part(generator, made[depth]).cpu())
    return {depth: torch.cat(parts) for depth, parts in found.items()}


def start_of(generator: PromptGenerator, made: Generated) -> torch.Tensor | None:
    """The start (l, d) or (B, 1, d) to which the generated part of one depth of a batch is added. None: there is none."""
    with in_place(generator):
        text = generator.text_state(generator.weights(made.depth))  # (l, d) or None
    start = generator.start(made.instances, made.depth) if text is None else text.detach()
    return None if start is None else start.float()


def generated_part(generator: PromptGenerator, made: Generated) -> torch.Tensor:
    """The generated part (B, l, d) of one depth of a batch; see [`generated_parts`]."""
    values, start = made.values.detach().float(), start_of(generator, made)  # (B, l, d)
    if start is not None:
        values = (values if generator.adds_at(made.depth) else values - start) / rms(start)
    return values


def with_part(generator: PromptGenerator, made: Generated, part: torch.Tensor) -> torch.Tensor:
    """The prompt vectors (B, l, d) of one depth of a batch with a different generated part (B, l, d) or (l, d)."""
    values, start = part.to(made.values.device).float(), start_of(generator, made)
    if start is not None:
        values = rms(start) * values if generator.adds_at(made.depth) else start + rms(start) * values
    return values.to(made.values.dtype).expand_as(made.values)


def token_weights(model: nn.Module, batch: Mapping[str, Any], depth: int | None = None) -> torch.Tensor:
    """Each token's share in each prompt vector: the pooling weights of IAPT, the pooling bins of LPT.

    Args:
        model (`nn.Module`): The model with the adapter.
        batch (`Mapping`): The arguments of the model's forward.
        depth (`int`, *optional*): As for [`prompt_vectors`].

    Returns:
        `torch.Tensor`: Shape (B, l, S), in float32 on the CPU. The S shares of a vector sum to 1, and are 0 outside the
            instruction.

    Raises:
        ValueError: The method's prompt vectors are no weighted means over tokens, or it generates nothing at this depth.
    """
    generator = active_generator(model)[1]
    weights = _token_weights(generator, record(model, batch)[check_depth(generator, depth)])
    if weights is None:
        raise ValueError(f"The prompt vectors of {type(generator).__name__} are no weighted means over tokens here.")
    return weights


def _token_weights(generator: PromptGenerator, made: Generated) -> torch.Tensor | None:
    check_rows(made)
    with torch.no_grad(), in_place(generator):
        weights = generator.token_weights(made.instances, made.depth, generator.weights(made.depth))  # (B, l, n)
    return None if weights is None else _at_tokens(made, weights)


def _at_tokens(made: Generated, values: torch.Tensor) -> torch.Tensor:
    """The instruction's `values` (B, l, n), moved to the columns of the batch: (B, l, S), 0 elsewhere."""
    columns = made.selection.columns  # of the stack's positions; at the input, of the tokens
    num_columns = made.layout.num_tokens + (0 if made.depth == INPUT else made.layout.num_slots)
    whole = values.new_zeros(*values.shape[:2], num_columns)  # (B, l, N)
    whole[:, :, columns] = values
    if made.depth != INPUT:
        whole = take(whole, made.layout.token_index, dim=2)  # (B, l, S)
    return whole.float().cpu()


@dataclass(frozen=True)
class Reading:
    """The shares of one row's S tokens, without padding, in its l prompt vectors.

    Attributes:
        tokens (`list[str]`): The text of each token; joined, they are the text of the row.
        columns (`torch.LongTensor`): Shape (S,). Each token's column in the batch.
        inside (`torch.BoolTensor`): Shape (S,). Whether a token belongs to the instruction.
        weights (`dict[int, torch.Tensor]`): By depth, shape (l, S): the share of each token in each prompt vector. Empty if the
            method's vectors are no weighted means over tokens.
    """

    tokens: list[str]
    columns: torch.Tensor
    inside: torch.Tensor
    weights: dict[int, torch.Tensor]

    def ratios(self, depth: int) -> torch.Tensor:
        """Each token's share over its share in a uniform reading: shape (l, S); 1 everywhere in a uniform reading."""
        return self.weights[depth] * self.inside.sum()

    def tokens_read(self, depth: int) -> torch.Tensor:
        """The number of tokens that each vector reads, the exponential of its weights' entropy: shape (l,), from 1 to S."""
        return torch.special.entr(self.weights[depth]).sum(dim=-1).exp()  # (l,)


def readings(model: nn.Module, batch: Mapping[str, Any], tokenizer: Any) -> list[Reading]:
    """A [`Reading`] of each row of a batch.

    Args:
        model (`nn.Module`): The model with the adapter.
        batch (`Mapping`): The arguments of the model's forward, `input_ids` among them.
        tokenizer: An object whose `decode` turns a list of ids into text. None shows the ids.

    Raises:
        ValueError: There is no active adapter, or rows hold several sequences.
    """
    generator = active_generator(model)[1]
    made = {depth: m for depth, m in record(model, batch).items() if depth is not None}
    weights = {depth: w for depth, m in made.items() if (w := _token_weights(generator, m)) is not None}  # (B, l, S)
    first = next(iter(made.values()))
    inside = _at_tokens(first, first.instances.mask[:, None].float())[:, 0] > 0  # (B, S)
    ids = batch["input_ids"].cpu()  # (B, S)
    mask = batch.get("attention_mask")
    kept = torch.ones_like(inside) if mask is None else mask.bool().cpu()  # (B, S)
    return [
        Reading(
            token_texts(tokenizer, ids[row][kept[row]].tolist()),
            kept[row].nonzero().flatten(),
            inside[row][kept[row]],
            {depth: w[row][:, kept[row]] for depth, w in weights.items()},
        )
        for row in range(len(ids))
    ]


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token with the spaces before it, which some tokenizers drop when they decode a token alone."""
    if tokenizer is None:
        return [str(token) for token in ids]
    texts, before = [], ""
    for n, token in enumerate(ids, 1):
        whole = tokenizer.decode(ids[:n])
        texts.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([token]))
        before = whole
    return texts


def placements(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each instance's used prompt vectors, and how many of them stand behind its text.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: Both of shape (instances,). A vector stands behind the text if more than
            half of the instruction's tokens stand before it.

    Raises:
        ValueError: There is no active adapter, or rows hold several sequences.
    """
    lengths, behind = [], []
    for batch in batches:
        made = [generated for depth, generated in record(model, batch).items() if depth is not None][0]
        check_rows(made)
        layout, instances = made.layout, made.instances.mask.sum(dim=1, keepdim=True)  # (B, 1)
        column = made.selection.last[:, None]  # (B, 1)
        at_layer = (layout.token_index == column).int().argmax(dim=1, keepdim=True)  # (B, 1)
        last = column if made.depth == INPUT else at_layer  # (B, 1)
        after = (last + 1 - layout.before_token).clamp(min=0)  # (B, L), the instruction's tokens behind each slot
        later = layout.used & (2 * after < instances)  # (B, L)
        lengths.append(layout.used.sum(dim=1).cpu())
        behind.append(later.sum(dim=1).cpu())
    return torch.cat(lengths), torch.cat(behind)


def check_rows(made: Generated) -> None:
    """Raise a ValueError if rows of a batch hold several sequences: a row would then be several instances."""
    if made.layout is not None and made.layout.segment_ids is not None:
        raise ValueError("The rows of this batch hold several sequences: give it padded, with a row per sequence.")


def check_depth(generator: PromptGenerator, depth: int | None) -> int:
    """`depth`, or the middle of a generator's depths. Raises a ValueError if it generates nothing at `depth`."""
    if depth is None:
        return generator.depths[len(generator.depths) // 2]
    if depth not in generator.depths:
        raise ValueError(
            f"`depth` must be one of those at which vectors are generated, {generator.depths}, got {depth}."
        )
    return depth
