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

"""The layer that is attached to a transformer stack: it holds the adapters and works by hooks.

    stack forward             open:  embed the tokens, insert the slots, widen mask, positions and token types
    layer forward pre-hook    fill:  write the generated vectors into the slots of this layer's input
    stack forward             close: take the slots out of whatever the stack returns

No module of the base model is replaced. Hooks are bound methods, so that a deep copy of the model calls its own layer.
What one forward needs between its hooks lies in a context variable, so that threads do not see each other's.
`torch.compile` leaves the hooks out and compiles what lies between them: a graph for each of their cases would take long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import slots
from .cache import SlotCache, SlotTable, length, make_room
from .calls import FOREIGN_ARGUMENTS, PER_TOKEN_ARGUMENTS, by_name, cache_of
from .generation import Generate, GenerateBatch
from .generator import INPUT, Instance, PromptGenerator, Source
from .groups import group_rows, pick, put
from .intercept import intercepted
from .masks import beyond_causal, check_not_packed, pad_to_static_cache, padding_mask, see_beyond_causal
from .nn.pooling import first_index, last_index
from .passes import InContext, Pass, current_pass, frozen_stacks, hide_late_slots, keep_context, run_frozen
from .scope import CallNote, NotedForward, Request, current_request, find_scope, note_encoder_slots
from .stack import StackInfo, embed, embed_per_layer, find_stacks
from .wrap import StandIn, stand_ins


class StackForward(StandIn):
    """The forward of a stack with its slots: opens them, runs the stack, closes them."""

    method = "forward"

    def __init__(self, module: nn.Module, layer: InstancePromptLayer):
        super().__init__(module)
        self.layer = layer

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.module in frozen_stacks.get():
            return self.__wrapped__(*args, **kwargs)
        outer = current_pass.get()
        if torch.compiler.is_compiling():  # it cannot part a graph within `try`
            args, kwargs = self.layer.open(self.module, args, kwargs)
            output = self.layer.close(self.module, self.__wrapped__(*args, **kwargs))
            current_pass.set(outer)
            return output
        try:
            args, kwargs = self.layer.open(self.module, args, kwargs)
            return self.layer.close(self.module, self.__wrapped__(*args, **kwargs))
        finally:
            current_pass.set(outer)


class InstancePromptLayer(nn.Module, BaseTunerLayer):
    """Holds one generator per adapter and inserts what they make into a transformer stack.

    Args:
        info (`StackInfo`): The stack.
        prefix (`str`): The method's prefix, e.g. `"iapt_"`.
    """

    def __init__(self, info: StackInfo, prefix: str):
        super().__init__()
        self.info = info
        # PEFT and transformers find a method's weights by the prefix in the attribute's name.
        self.adapter_layer_names = (prefix + "generator",)
        self.add_module(prefix + "generator", nn.ModuleDict())
        self.handles: list[Any] = []

    @property
    def generators(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, generator: PromptGenerator) -> None:
        """Add an adapter. The tuner activates it, or the one that is active, when it is in all layers."""
        self.generators[adapter_name] = generator

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter. Names of other methods' adapters are let pass; of one's own only one can be active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(own := [name for name in names if name in self.generators]) > 1:
            raise ValueError(f"Only one instance-prompt adapter can be active at a time, got {own}.")
        super().set_adapter(names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("Prompts that are generated from the instance cannot be merged into the base weights.")

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[None, None]:
        # There is no base layer, and PEFT's search for its weight would not end: what is loaded stays where it is.
        return None, None

    # ------------------------------------------------------------------------------------------------------ hooks

    def attach(self, model: nn.Module, stack: nn.Module, layers: nn.ModuleList) -> None:
        """Register the hooks on the base model, the stack and its layers."""
        StackForward(stack, self).install()
        if not stand_ins(model, NotedForward):
            CallNote().register(model)
            for stand_in in (NotedForward, Generate, GenerateBatch):
                if hasattr(model, stand_in.method):
                    stand_in(model).install()
        if self.info.encoder_of_pair:
            for name in find_stacks(model).values():
                if "decoder" in name.split("."):
                    decoder = model.get_submodule(name)
                    self.handles.append(decoder.register_forward_pre_hook(_attend_to_slots, with_kwargs=True))
        runs = self.info.num_layers // len(layers)
        for number, layer in enumerate(layers):
            depths = range(number * runs, (number + 1) * runs)
            self.handles.append(layer.register_forward_pre_hook(partial(self._fill, depths), with_kwargs=True))

    def detach(self, model: nn.Module, stack: nn.Module, layers: nn.ModuleList) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        for stand_in in stand_ins(stack, StackForward):
            if stand_in.layer is self:
                stand_in.remove()
        if not any(isinstance(module, InstancePromptLayer) and module is not self for module in model.modules()):
            for hook in list(model._forward_pre_hooks.values()):
                if isinstance(hook, CallNote):
                    hook.remove()
            for stand_in in stand_ins(model, StandIn):
                stand_in.remove()
        for module in layers.modules():
            if isinstance(checkpoint := getattr(module, "_gradient_checkpointing_func", None), InContext):
                module._gradient_checkpointing_func = checkpoint.checkpoint

    @torch.compiler.disable
    def open(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the stack runs: insert the slots, or go on from a cache that holds some."""
        kwargs = by_name(stack, args, kwargs)
        tokens = (
            kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        )  # (B, S, ...)
        (name, given), as_dict = cache_of(kwargs), kwargs.get("return_dict")
        cache = SlotCache.find(given)
        if isinstance(given, SlotCache):
            kwargs[name] = given.inner
        step = Pass(
            self,
            attention=str(stack.config._attn_implementation),
            cache=cache,
            as_tuple=(stack.config.return_dict if as_dict is None else as_dict) is False,
        )
        current_pass.set(step)
        if cache is not None:
            self._continue(kwargs, step, tokens, counts_slots=given is not cache)
        else:
            request = current_request()
            step.groups = (
                []
                if self.disable_adapters
                else group_rows(self.generators, self.active_adapters, tokens.shape[0], request, tokens.device)
            )
            if not step.groups:
                return (), kwargs
            if not self.info.decoder_of_pair:
                request = request.of_tokens(kwargs.get("input_ids"))
            self._insert(stack, kwargs, step, request, tokens)
        if step.as_tuple:
            kwargs["return_dict"] = True
        return (), kwargs

    def _insert(
        self, stack: nn.Module, kwargs: dict[str, Any], step: Pass, request: Request, tokens: torch.Tensor
    ) -> None:
        """Open the slots: change what the stack is called with from S tokens to N = S + L positions."""
        B, S = tokens.shape[:2]
        if B == 0 or S == 0:
            raise ValueError(f"The batch is empty: {B} row(s) of {S} token(s).")
        name, cache = cache_of(kwargs)
        if cache is not None and length(cache) > 0:
            raise ValueError(
                f"`{name}` holds {length(cache)} tokens but no prompt slots: it was filled without an adapter. "
                "Start from an empty cache, or fill it with the adapter active."
            )
        check_not_packed(kwargs)
        static = cache is not None and cache.is_compileable
        mask = padding_mask(kwargs.get("attention_mask"), B, S, static)  # (B, S)
        is_token = torch.ones(B, S, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()  # (B, S)
        ids = request.input_ids if kwargs.get("input_ids") is None else kwargs["input_ids"]
        ids = ids if ids is not None and ids.shape == (B, S) else None
        embeds = kwargs.get("inputs_embeds")
        embeds = embed(stack, ids) if embeds is None else embeds  # (B, S, e)
        is_token, mask = is_token.to(embeds.device), None if mask is None else mask.to(embeds.device)
        first = first_index(is_token)  # (B,)

        if "position_ids" in self.info.forward_args and kwargs.get("position_ids") is None:
            # Counted over tokens and not over columns, so that padding on the left moves nothing.
            positions = (is_token.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
            kwargs["position_ids"] = positions + self.info.position_offset
        plain = {**kwargs, "attention_mask": mask, "use_cache": False}
        plain.pop(name, None)
        per_layer = kwargs.pop("per_layer_inputs", None)
        per_layer = embed_per_layer(stack, ids, embeds) if per_layer is None else per_layer  # (B, S, layers, width)
        frozen_pass = once(partial(run_frozen, stack, plain))

        scope, anchor, live, since = self._read(
            stack.training, step, request, ids, embeds, is_token, first, frozen_pass
        )
        L = anchor.shape[1]
        last = last_index(scope) if self.info.causal else None  # (B,)
        levels = tuple(sorted({group.visible_from for group in step.groups} - {0}))
        layout = step.layout = slots.arrange(anchor, S, live, last, since, levels, dead_at_end=not self.info.causal)
        step.table = SlotTable(layout.order, layout.live, layout.since, levels)

        # What no generator writes to begins as a copy of the first token, the least that a slot can disturb.
        vectors = slots.take(embeds, first[:, None]).detach().expand(-1, L, -1)  # (B, L, e)
        for group in step.groups:
            if INPUT in group.depths:
                vectors = put(vectors, group.rows, group.run(embeds, INPUT, layout))
        widened = slots.insert(embeds, vectors, layout)  # (B, N, e)
        for group in step.groups:
            if group.rows is None:
                widened = group.generators[0].attach(widened, vectors, embeds, group.instance, layout)
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, widened
        later = beyond_causal(kwargs.get("attention_mask"))  # (B, S, S)
        self._widen(kwargs, layout, mask, is_token, first)
        if per_layer is not None:  # the slots begin as copies of the first token, here too
            own = slots.take(per_layer, first[:, None]).expand(-1, L, -1, -1)  # (B, L, layers, width)
            kwargs["per_layer_inputs"] = slots.insert(per_layer, own, layout)  # (B, N, layers, width)
        if static:
            make_room(cache, L, self.info.sliding_window)
        mask = pad_to_static_cache(kwargs["attention_mask"], cache, B, S + L)
        if later is not None:
            for _ in range(2):  # rows, then columns
                later = slots.insert(later, later.new_zeros(B, L, later.shape[2]), layout).transpose(1, 2)
            mask = see_beyond_causal(stack.config, kwargs["inputs_embeds"], mask, cache, later)
        kwargs["attention_mask"] = mask

        # From here on positions count in the widened rows.
        scope = slots.insert(scope, torch.zeros_like(live), layout)  # (B, N)
        first = layout.token_index.gather(1, first[:, None])[:, 0]  # (B,)
        for group in step.groups:
            group.instance = group.instance._replace(mask=pick(scope, group.rows), first=pick(first, group.rows))
        if torch.is_grad_enabled() and stack.training:
            keep_context(stack)

    def _read(
        self,
        training: bool,
        step: Pass,
        request: Request,
        ids: torch.Tensor | None,
        embeds: torch.Tensor,
        is_token: torch.Tensor,
        first: torch.Tensor,
        frozen_pass: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find each row's instruction, encode it, and ask the adapters where they put their slots.

        Returns:
            The instruction tokens (B, S), and of each slot (B, L) its anchor, whether it is live, and its first layer.
        """
        B = is_token.shape[0]
        L = max(group.num_slots for group in step.groups)
        scope = is_token  # (B, S)
        anchor = first[:, None].expand(B, L)  # (B, L)
        everywhere = all(group.rows is None for group in step.groups)
        live = torch.full((B, L), everywhere, device=embeds.device)  # (B, L)
        since = torch.zeros_like(anchor)  # (B, L)
        for group in step.groups:
            vectors = []
            for generator, rows in group:
                own = find_scope(
                    pick(is_token, rows),
                    request.of_rows(B, rows),
                    generator.config.response_template,
                    pick(ids, rows),
                    causal_lm=self.info.causal_lm,
                    pair_decoder=self.info.decoder_of_pair,
                    training=training,
                )  # (G, S)
                source = Source(
                    pick(ids, rows),
                    pick(embeds, rows),
                    own,
                    pick(is_token, rows),
                    request.of_rows(B, rows).instance_embeds,
                    lambda rows=rows: pick(frozen_pass(), rows),
                    rows,
                )
                vectors.append(intercepted(generator.encode(source), depth=None, generators=[generator]))
                places, shown = generator.place(source, Instance(own, pick(first, rows), vectors[-1]))  # (G, l)
                scope, anchor = put(scope, rows, own), put(anchor, rows, places)
                live = put(live, rows, torch.ones_like(places) if shown is None else shown)
            vector = None if vectors[0] is None else torch.cat(vectors)  # (G, k)
            group.instance = Instance(pick(scope, group.rows), pick(first, group.rows), vector, pick(ids, group.rows))
            since = put(since, group.rows, torch.full_like(pick(since, group.rows), group.visible_from))
        counts_columns = self.info.max_positions is not None and "position_ids" not in self.info.forward_args
        full = sum(len(group.rows) for group in step.groups if group.rows is not None and group.num_slots == L)
        if self.info.causal and counts_columns and not everywhere and full < B:
            raise ValueError(
                f"The rows of a batch cannot have different numbers of prompt slots in {self.info.name!r}, which counts its "
                "positions itself: give all of them adapters with the same `num_virtual_tokens`."
            )
        return scope, anchor, live, since

    def _widen(
        self,
        kwargs: dict[str, Any],
        layout: slots.Layout,
        mask: torch.Tensor | None,
        is_token: torch.Tensor,
        first: torch.Tensor,
    ) -> None:
        """Give the slots a place in everything that the stack is called with per token."""
        B, S = is_token.shape
        for name, value in kwargs.items():
            unknown = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (B, S)
            if unknown and name not in PER_TOKEN_ARGUMENTS + FOREIGN_ARGUMENTS:
                raise ValueError(f"Instance prompts do not know how to give slots a place in `{name}` {(B, S)}.")
        kwargs["attention_mask"] = None
        # Without a mask, position ids that do not count on would be taken for those of several sequences in a row.
        if mask is not None or not layout.all_live or layout.levels:
            mask = is_token if mask is None else mask
            kwargs["attention_mask"] = slots.insert(mask, layout.live, layout)  # (B, N)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"].expand(B, S)  # (B, S)
            own = types.gather(1, layout.anchor.clamp(max=S - 1))  # (B, L)
            kwargs["token_type_ids"] = slots.insert(types, own, layout)  # (B, N)
        if "position_ids" in self.info.forward_args:
            positions = kwargs["position_ids"]
            positions = positions.expand(*positions.shape[:-2], B, S)  # (B, S) or (R, B, S)
            kwargs["position_ids"] = slots.insert_positions(positions, first, layout)  # (B, N) or (R, B, N)
        self._check_fits(kwargs.get("position_ids"), layout.order.shape[1], layout.num_slots)

    def _check_fits(self, position_ids: torch.Tensor | None, num_positions: int, num_slots: int) -> None:
        limit = self.info.max_positions
        if limit is None or num_positions <= limit:
            return
        if position_ids is not None:
            num_positions = int(position_ids.max()) + 1 - self.info.position_offset
        if num_positions > limit:
            raise ValueError(
                f"The sequence does not fit: the model has {limit} positions, and {num_positions - num_slots} tokens with "
                f"{num_slots} prompt slots need {num_positions}. Truncate the text or use fewer `num_virtual_tokens`."
            )

    def _continue(self, kwargs: dict[str, Any], step: Pass, tokens: torch.Tensor, counts_slots: bool) -> None:
        """Go on from a cache that holds slots: only what counts its positions changes."""
        table, seen = step.cache.table, step.cache.get_seq_length()
        step.table = table
        B, S = tokens.shape[:2]
        if counts_slots and not self._goes_on(kwargs.get("position_ids"), kwargs.get("attention_mask"), seen, S):
            raise ValueError(
                f"The cache holds {seen} tokens and {table.num_slots} prompt slots, but the text does not go on from these "
                f"{seen} tokens. Pass the cache that the model returned, which counts tokens only, and not "
                "the cache that went in first."
            )
        mask = padding_mask(kwargs.get("attention_mask"), B, seen + S, from_static_cache=False)  # (B, seen + S)
        mask_within = table.widen_mask(mask, seen + S)  # (B, seen + L + S)
        num_positions = seen + table.num_slots + S
        kwargs["attention_mask"] = pad_to_static_cache(mask_within, step.cache.inner, B, num_positions)
        if "position_ids" in self.info.forward_args:
            positions = kwargs.get("position_ids")
            if positions is None and mask is not None:
                positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[
                    :, seen:
                ] + self.info.position_offset  # (B, S)
            elif positions is None:
                positions = torch.arange(seen, seen + S, device=tokens.device) + self.info.position_offset  # (S,)
            kwargs["position_ids"] = positions + table.num_counted.to(positions.device)  # (B, S) or (R, B, S)
        self._check_fits(kwargs.get("position_ids"), seen + S + table.num_slots, table.num_slots)

    def _goes_on(self, positions: Any, mask: Any, seen: int, num_new: int) -> bool:
        """Whether positions (B, S) and mask (B, seen + S) go on from the tokens in a cache that counts slots as well.

        Whoever reads from it how far the text has come takes the slots for tokens. False if that can be told.
        """
        if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or (mask is not None and mask.dim() != 2):
            return True
        if mask is not None and mask.shape[1] != seen + num_new:
            return False
        before = seen if mask is None else mask[:, :seen].sum(dim=1).to(positions.device)  # (B,)
        return bool((positions[:, 0] == before + self.info.position_offset).all())

    @torch.compiler.disable
    def _fill(self, depths: range, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Before a layer runs: write this depth's vectors into the slots, and hide those that it does not see yet."""
        step = current_pass.get()
        if step is None or step.owner is not self or step.table is None:
            return None
        if step.layout is None and not step.table.levels:
            return None
        run = step.runs[id(layer)] = step.runs.get(id(layer), -1) + 1
        depth = depths[run % len(depths)] if len(depths) > 1 else depths[0]  # to compile, a count is no constant
        states = args[0] if args else kwargs["hidden_states"]  # (B, N, d)
        late = step.table.levels
        groups = [group for group in step.groups if depth in group.depths]
        if (groups or late) and step.layout is not None and states.shape[:2] != step.layout.order.shape:
            raise ValueError(
                f"The layers of {self.info.name!r} take states of shape {tuple(states.shape)} and not (rows, positions, width): "
                "prompts cannot be written between them. Use a method that writes to the input only."
            )
        if late and (depth < late[-1] or step.attention.startswith("flash_attention")):
            args, kwargs = hide_late_slots(step, layer, depth, states, args, kwargs)
        if not groups:
            return (args, kwargs) if late else None
        for group in groups:
            prompts = group.run(states, depth, step.layout)  # (G, l, d)
            if group.rows is not None:
                standing = slots.take(states, step.layout.slot_index)  # (B, L, d)
                prompts = put(torch.zeros_like(standing) if group.adds else standing, group.rows, prompts)  # (B, L, d)
            states = slots.fill(states, prompts, step.layout, add=group.adds)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    @torch.compiler.disable
    def close(self, stack: nn.Module, output: Any) -> Any:
        """After the stack ran: leave what the caller would have got, had there been no slots."""
        step = current_pass.get()
        if step.table is None:  # there was nothing to do
            return output
        cache, (name, filled) = step.cache, cache_of(output)
        if step.layout is not None:
            layout = step.layout
            last = slots.take(output.last_hidden_state, layout.read_index)  # (B, S, d)
            if output.get("hidden_states") is not None:
                inner = tuple(slots.take(states, layout.token_index) for states in output.hidden_states[:-1])
                output.hidden_states = (*inner, last)  # each (B, S, d)
            if output.get("pooler_output") is not None:
                output.pooler_output = _pool(stack, last)  # (B, d)
            if filled is not None:
                cache = SlotCache(filled, step.table)
            if self.info.encoder_of_pair:  # the decoder attends to the slots, so they stay
                output["slot_order"], output["slot_live"] = layout.order, layout.live
                note_encoder_slots(layout.order, layout.live)
            else:
                output.last_hidden_state = last
        if output.get("attentions") is not None:
            output.attentions = tuple(self._strip(maps, step) for maps in output.attentions)
        if filled is not None:
            output[name] = cache
        return output.to_tuple() if step.as_tuple else output

    def _strip(self, attention: torch.Tensor | None, step: Pass) -> torch.Tensor | None:
        """Attention maps (B, heads, queries, keys) without the slots among queries and keys."""
        if attention is None:
            return None
        if step.layout is not None:
            attention = slots.take(attention, step.layout.token_index, dim=2)  # (B, heads, S, keys)
        table = step.table
        keys = table.token_positions(max(attention.shape[-1], table.order.shape[1]))  # (B, keys - L)
        if attention.shape[-1] < table.order.shape[1]:
            raise ValueError(
                "`output_attentions` with a sliding-window cache that has dropped prompt slots is not known."
            )
        return slots.take(attention, keys, dim=3)  # (B, heads, S, keys - L)


def _pool(stack: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What the stack's pooler (B, d) makes of `states` (B, S, d), once more: it ran while the slots were there."""
    if isinstance(stack.pooler, nn.Linear):  # ALBERT
        return stack.pooler_activation(stack.pooler(states[:, 0]))
    return stack.pooler(states)


@torch.compiler.disable
def _attend_to_slots(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before the decoder of a pair runs: widen its mask over the encoder's output, which kept its slots."""
    if (
        found := current_request().encoder_slots
    ) is None or frozen_stacks.get():  # a frozen pass has the widened mask already
        return None
    kwargs = by_name(decoder, args, kwargs)
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if states is not None:
        num_tokens = states.shape[1] - found[1].shape[1]
        mask = padding_mask(mask, states.shape[0], num_tokens, from_static_cache=False)  # (B, S)
        kwargs["encoder_attention_mask"] = SlotTable(*found).widen_mask(mask, num_tokens)  # (B, N)
    return (), kwargs
