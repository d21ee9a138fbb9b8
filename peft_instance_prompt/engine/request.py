# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of the running call that the stack does not receive. One context variable holds them.

The way of an argument, such as the `instruction_mask` of `generate`: `Generate.run` (`wrap`) takes it out of the call and notes it
([`note`]); the base model's hook begins a call with what is noted ([`begin_call`]); the stack's hook (`layer`) asks for the
[`current_request`]; [`Request.of_rows`] gives each row of the batch its own; `find_scope` (`scope`) reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..generator import InstanceGenerator
from .calls import PACKED_ARGUMENTS, cache_of, named


# Arguments that this package adds to `forward` and `generate`: tensors with a row for each row of the batch, and of what.
OWN_ARGUMENTS = {"instruction_mask": "bools or 0/1 integers", "instance_embeds": "floats", "task_ids": "integers"}
# The attribute of a base model that lists the names of its layers with adapters. Names are valid in copies and replicas, too.
LAYERS = "_instance_prompt_layers"
# The attribute of a base model that lists the names of the language models inside it, around a stack with adapters.
CALLERS = "_instance_prompt_callers"
# {layer: (names of the active adapters, {name: generator})}
Adapters = dict[nn.Module, tuple[list[str], dict[str, InstanceGenerator]]]


@dataclass
class GrowingText:
    """A text that `generate` extends: its prompt, or the second text of classifier-free guidance.

    Without a KV cache, the model gets the whole text at each step.

    Attributes:
        shape (`tuple[int, int]`): B and P, its rows and columns at the start.
        ids (`torch.LongTensor`, *optional*): Shape (B, P). Its tokens at the start; None if the caller gave embeddings only.
        next_length (`int`): Its number of columns in the model's next call.
        in_parts (`bool`): Whether the prompt may come in parts: `prefill_chunk_size`.
    """

    shape: tuple[int, int]
    ids: torch.Tensor | None
    next_length: int
    in_parts: bool = False

    def goes_on_in(self, tokens: torch.Tensor) -> bool:
        """Whether token ids (B, S) or embeddings (B, S, e) continue this text. A row may have become several beams."""
        (B, P), (num_rows, S) = self.shape, tokens.shape[:2]
        if B == 0 or num_rows % B or (S < P and not self.in_parts):
            return False
        if tokens.is_floating_point() or self.ids is None:
            return tokens.is_floating_point()
        own = self.ids.to(tokens.device).repeat_interleave(num_rows // B, dim=0)  # (num_rows, P)
        return torch.equal(tokens[:, :P], own[:, :S])


@dataclass(frozen=True)
class Request:
    """Arguments of a call of `forward` or `generate` that the stack does not receive.

    Attributes:
        instruction_mask (`torch.Tensor`, *optional*): Shape (B, S).
        instance_embeds (`torch.Tensor`, *optional*): Shape (B, k).
        task_ids (`torch.LongTensor`, *optional*): Shape (B,).
        input_ids (`torch.LongTensor`, *optional*): Shape (B, S).
        labels (`torch.LongTensor`, *optional*): Shape (B, S).
        shifted (`bool`): Whether the labels are TRL's `shift_labels`, which stand one column earlier.
        last_only (`bool`): Whether the caller wants the logits of the last position only.
        keeps_cache (`bool`): Whether the caller asked for a cache or gave one, so that the text may go on in a later call.
        generate_call (`int`, *optional*): In `generate`, the number of the call.
        drafts (`bool`): In `generate`, whether the model is the assistant of assisted decoding.
        prompt_length (`int`, *optional*): In `generate`, P, the number of columns of its prompt.
        texts (`tuple[GrowingText]`): In `generate`, the texts that grow, its prompt first.
        prompt_mask (`torch.Tensor`, *optional*): In `generate`, the `instruction_mask` of its prompt.
        second_text (`bool`): Whether this is the second text of guidance, which need not hold the adapter's `response_template`.
        adapter_names (`tuple[str]`, *optional*): One name per row.
        adapters (`dict`, *optional*): By layer: the names of the active adapters and all adapters when the call began, since the caller
            may add and delete adapters during the call.
        packed (`dict`): `position_ids` and the packing arguments, which some base models do not pass to their stack.
        encoder_slots (`tuple`, *optional*): The `order` (B, N) and `used` (B, L) of the slots in the encoder's output, to which the
            decoder attends.
        opened (`Callable`, *optional*): Called with the arguments of the stack when its slots are open.
    """

    instruction_mask: torch.Tensor | None = None
    instance_embeds: torch.Tensor | None = None
    task_ids: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    shifted: bool = False
    last_only: bool = False
    keeps_cache: bool = False
    generate_call: int | None = None
    drafts: bool = False
    prompt_length: int | None = None
    texts: tuple[GrowingText, ...] = ()
    prompt_mask: torch.Tensor | None = None
    second_text: bool = False
    adapter_names: tuple[str, ...] | None = None
    adapters: Adapters | None = None
    packed: dict[str, Any] = field(default_factory=dict)
    encoder_slots: tuple[torch.Tensor, torch.Tensor] | None = None
    opened: Callable[[dict[str, Any]], None] | None = None

    def of_tokens(self, input_ids: torch.Tensor | None, embeds: torch.Tensor | None = None) -> Request:
        """The request for the text with these token ids (B, S) or embeddings (B, S, e).

        Inside `generate` this may be a different text than the prompt: classifier-free guidance extends a text of its own, and stopping
        criteria may call the model with any text.
        """
        # A vision-language model gives its stack embeddings only.
        tokens = next((given for given in (input_ids, self.input_ids, embeds) if given is not None), None)
        if not self.texts or tokens is None:
            return self
        found = [text for text in self.texts if text.goes_on_in(tokens)]
        S = tokens.shape[1]
        found.sort(key=lambda text: text.next_length != S)  # of two that begin alike, the one of this length
        for text in found[:1]:
            text.next_length = S + 1
            if text is self.texts[0]:
                return self
        return replace(
            self,
            texts=(),
            prompt_length=found[0].shape[1] if found else None,
            instruction_mask=None if self.instruction_mask is self.prompt_mask else self.instruction_mask,
            second_text=bool(found),
        )

    def of_rows(self, num_rows: int, rows: torch.Tensor | None) -> Request:
        """The request for some rows of a batch with `num_rows`, or all for None. In `generate`, a row may have become several beams."""
        picked: dict[str, Any] = {}
        for name in (*OWN_ARGUMENTS, "labels"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] > 0:
                if self.prompt_length is not None and num_rows % value.shape[0] == 0:
                    value = value.repeat_interleave(num_rows // value.shape[0], dim=0)  # (num_rows, ...)
                # A value with a wrong number of rows stays as it is: its own check complains.
                if rows is not None and value.shape[0] == num_rows:
                    value = value[rows.to(value.device)]  # (len(rows), ...)
                picked[name] = value
        return replace(self, **picked)

    def rows_per_name(self, num_rows: int, beams: bool) -> int:
        """How many rows of a batch each of `adapter_names` is for: more than one if rows may have become several `beams`.

        Raises:
            ValueError: The names are those of another number of rows.
        """
        names = self.adapter_names or ()
        repeats, rest = divmod(num_rows, max(len(names), 1))
        if not names or rest or (repeats != 1 and not beams):
            raise ValueError(
                f"`adapter_names` must name an adapter for each of the {num_rows} rows, got {len(names)}."
            )
        return repeats


def check_kinds(said: Mapping[str, Any]) -> None:
    """Refuse own arguments that are no tensors of the right kind, whether or not a method reads them.

    Raises:
        TypeError: One is something else.
    """
    for name, kind in OWN_ARGUMENTS.items():
        value = said.get(name)
        fits = isinstance(value, torch.Tensor) and value.is_floating_point() == (kind == "floats")
        if value is not None and not (fits and (kind != "integers" or value.dtype != torch.bool)):
            raise TypeError(
                f"`{name}` must be a tensor of {kind}, got {getattr(value, 'dtype', type(value).__name__)}."
            )


@dataclass(eq=False)
class Note:
    """An entry of `notes`: what was said around calls, an interceptor, or, with a `request`, a running call.

    Attributes:
        model (`nn.Module`, *optional*): The base model that it is about. None: any.
        fields (`dict`): What was said of calls of the model: fields of their requests.
        interceptor (`Callable`, *optional*): See `intercept`.
        request (`Request`, *optional*): The request of a running call.
        entered (`bool`): Whether the running call is in the model's own forward; the model's hooks run before.
    """

    model: nn.Module | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    interceptor: Callable | None = None
    request: Request | None = None
    entered: bool = False


# What holds for the running call, outermost first. A context variable and not an attribute of some module: threads that share a model must
# not share a request. Entries leave by identity and not by `ContextVar.reset`: contexts of two generators that take turns end in any order,
# and torch calls a hook at the end of a call that cannot hand on the token of the hook at its start.
notes: ContextVar[tuple[Note, ...]] = ContextVar("instance_prompt_notes", default=())


@contextmanager
def noted(**attributes: Any) -> Iterator[None]:
    """Add a [`Note`] with these attributes to `notes`, within the context."""
    entry = Note(**attributes)
    notes.set((*notes.get(), entry))
    try:
        yield
    finally:
        notes.set(tuple(other for other in notes.get() if other is not entry))


def note(model: nn.Module | None = None, **fields: Any) -> AbstractContextManager[None]:
    """Add `fields` to the request for calls of `model`, within the context; None: of any model.

    Contexts may overlap without nesting, as those of two generators that take turns do: each takes back only its own fields.
    """
    return noted(model=model, fields=fields)


def running_call() -> Note | None:
    """The innermost running call of a base model in `notes`; None outside of one."""
    return next((entry for entry in reversed(notes.get()) if entry.request is not None), None)


def current_request() -> Request:
    """The request of the running call."""
    return known_of(None, running=True)


def known_of(model: nn.Module | None, running: bool = False) -> Request:
    """What was said around the next call of `model`, or of any model for None; or with `running`, the request of the running call."""
    known = Request()
    for entry in notes.get():
        within = is_within(model, entry.model)
        if entry.request is not None:
            # A call may be running, or an interrupt ended it. Only a language model inside the running base model, which its forward calls,
            # gets the fields of that call.
            known = entry.request if running or (entry.entered and within) else known
        # While a model generates, the next call may be of a different model, such as the assistant of assisted decoding.
        elif model is None or entry.model in (None, model) or within:
            known = replace(known, **entry.fields)
        else:
            known = Request()
    return known


def is_within(model: nn.Module | None, base: nn.Module | None) -> bool:
    """Whether `model` is a language model inside the base model `base` whose calls are noted, too."""
    return base is not None and any(base.get_submodule(name) is model for name in vars(base).get(CALLERS, ()))


def adapters_of(model: nn.Module) -> Adapters:
    """A base model's adapters at this moment."""
    layers: list[Any] = [model.get_submodule(path) for path in list(vars(model).get(LAYERS, ()))]
    return {layer: (list(layer.active_adapters), dict(layer.generators._modules)) for layer in layers}


@torch.compiler.disable
def begin_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: note the arguments of a base model that decide the scope, and take this package's own out of the call."""
    known, kwargs = known_of(model), dict(kwargs)
    own = {name: value for name in OWN_ARGUMENTS if (value := kwargs.pop(name, None)) is not None}
    call = named(model, "forward", args, kwargs)
    shifted = call.get("labels") is None and call.get("shift_labels") is not None
    labels = call.get("shift_labels" if shifted else "labels")
    packed = {name: call[name] for name in ("position_ids", *PACKED_ARGUMENTS) if call.get(name) is not None}
    # A call inside a call of the base model, whose arguments this module may not receive, keeps those that are known.
    told: dict[str, Any] = {
        "input_ids": call.get("input_ids"),
        "labels": labels,
        "shifted": None if labels is None else shifted,
        "packed": packed or None,
        "encoder_slots": slots_of(call.get("encoder_outputs")),
    }
    request = replace(
        known,
        keeps_cache=call.get("use_cache") is True or cache_of(call)[1] is not None,
        last_only=type(kept := call.get("logits_to_keep")) is int and kept == 1,
        prompt_mask=None if "instruction_mask" in own else known.prompt_mask,
        **{name: value for name, value in told.items() if value is not None},
        **own,
    )
    notes.set((*notes.get(), Note(model, request=request)))
    return args, kwargs


@torch.compiler.disable
def end_call(model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook: forget the call."""
    call = running_call()
    if call is not None and call.model is model:
        forget(call)


def forget(call: Note | None) -> None:
    """Take a call out of `notes`, and what was left of calls within it."""
    if call in (known := notes.get()):
        notes.set(known[: known.index(call)])


def slots_of(encoder_outputs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The slots in an encoder's output; None if it has none. `generate` repeats them for beams like the rest of the output."""
    order = encoder_outputs.get("slot_order") if isinstance(encoder_outputs, dict) else None
    return None if order is None else (order, encoder_outputs["slot_used"])


def note_encoder_slots(order: torch.Tensor, used: torch.Tensor) -> None:
    """Note the slots in an encoder's output, for the decoder that runs next."""
    call = running_call()
    # Else the encoder runs alone, and the caller passes its output to the decoder.
    if call is not None and call.request is not None:
        call.request = replace(call.request, encoder_slots=(order, used))


def instruction_scope(mask: torch.Tensor) -> AbstractContextManager[None]:
    """Set which tokens are the instruction, around trainers and tools that cannot pass on `instruction_mask`.

    Args:
        mask (`torch.Tensor`): Shape (B, S), bool or 0/1. It applies to every forward pass inside the
            context, in this thread. Threads of an executor need `contextvars.copy_context().run`.

    Example:

    ```py
    >>> with instruction_scope(batch["instruction_mask"]):
    ...     loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    ```
    """
    return note(instruction_mask=mask)
