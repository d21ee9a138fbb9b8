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

"""Scope: which tokens are the instance that a prompt is generated from.

In a causal model the response stands in the same row as the instruction. A prompt that saw it would leak what is to be
predicted, so the scope is found, in this order, from

1. `instruction_mask`, given to `forward`, `generate` or [`instruction_scope`];
2. the adapter's `response_template`: everything up to and including its first occurrence;
3. in `generate`, the tokens that `generate` was called with, for the whole call;
4. `labels` (or TRL's `shift_labels`) of a causal model: the tokens before the first label that is not -100;
5. a causal model in training with none of these has no scope: ValueError;
6. otherwise all tokens that are not padding.

The decoder of an encoder-decoder model is another matter: its instruction stands in the encoder. Its own instance is its
start token, which is all that its rows have in common in training and generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .calls import forward_args
from .wrap import StandIn


CURES = (
    "Give the model data in which the instruction can be told from the response: labels that are -100 on the "
    "instruction (prompt-completion data, completion-only loss), or `instruction_mask`, a bool tensor of the shape of "
    "`input_ids`, passed to `forward` or set with `instruction_scope(mask)`, or a config with `response_template`."
)


@dataclass(frozen=True)
class Request:
    """What is known of a call of `forward` or `generate` beyond what reaches the transformer stack.

    Attributes:
        model (`nn.Module`, *optional*): The base model that is called; None stands for any.
        instruction_mask (`torch.Tensor`, *optional*): Shape (B, S).
        instance_embeds (`torch.Tensor`, *optional*): Shape (B, k).
        input_ids (`torch.LongTensor`, *optional*): Shape (B, S).
        labels (`torch.LongTensor`, *optional*): Shape (B, S).
        shifted (`bool`): Whether the labels are TRL's `shift_labels`, which stand one place earlier.
        prompt_length (`int`, *optional*): In `generate`, the number of columns that it was called with.
        prompt_ids (`torch.LongTensor`, *optional*): In `generate`, the tokens (B, S) that it was called with.
        adapter_names (`tuple[str]`, *optional*): One name per row.
        encoder_slots (`tuple`, *optional*): The `order` (B, N) and `live` (B, L) of the slots in the encoder's output that
            a decoder attends to.
        entered (`bool`): Whether the base model's own forward runs, after its hooks.
        outer (`Request`, *optional*): What stands again when the forward pass is over.
    """

    model: nn.Module | None = None
    instruction_mask: torch.Tensor | None = None
    instance_embeds: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    shifted: bool = False
    prompt_length: int | None = None
    prompt_ids: torch.Tensor | None = None
    adapter_names: tuple[str, ...] | None = None
    encoder_slots: tuple[torch.Tensor, torch.Tensor] | None = None
    entered: bool = False
    outer: Request | None = None

    def of_tokens(self, input_ids: torch.Tensor | None) -> Request:
        """The request without what `generate` was told of its prompt, if these are the tokens (B, S) of another text: within
        `generate`, classifier-free guidance and stopping criteria that judge by a model call it with such."""
        if self.prompt_ids is None or input_ids is None:
            return self
        P = self.prompt_ids.shape[1]
        repeats, rest = divmod(input_ids.shape[0], self.prompt_ids.shape[0])
        if rest == 0 and input_ids.shape[1] >= P:
            own = self.prompt_ids.to(input_ids.device).repeat_interleave(repeats, dim=0)  # (B, P)
            if torch.equal(input_ids[:, :P], own):
                return self
        return replace(self, prompt_length=None, prompt_ids=None, instruction_mask=None)

    def of_rows(self, num_rows: int, rows: torch.Tensor | None) -> Request:
        """The request for some rows of a batch of `num_rows`; in `generate`, one row may have become several beams."""
        picked = {}
        for name in ("instruction_mask", "instance_embeds", "labels"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] > 0:
                if self.prompt_length is not None and num_rows % value.shape[0] == 0:
                    value = value.repeat_interleave(num_rows // value.shape[0], dim=0)  # (num_rows, ...)
                # One of another size is left as it is, for its own check to complain about.
                if rows is not None and value.shape[0] == num_rows:
                    value = value[rows.to(value.device)]  # (len(rows), ...)
                picked[name] = value
        return replace(self, **picked)


# A context variable and not an attribute of some module: threads that share a model must not share a request.
latest_request: ContextVar[Request] = ContextVar("instance_prompt_request", default=Request())


def current_request() -> Request:
    """What is known of the call that is going on."""
    return latest_request.get()


def known_of(model: nn.Module | None) -> Request:
    """What was said of calls of `model` by those who are about to call it."""
    # While a model generates, another may be called, as the assistant of assisted decoding is.
    request = latest_request.get()
    # What was said of a call that is going on, or that an interrupt broke off, is not said of the next one.
    while request.outer is not None:
        request = request.outer
    return Request() if model is not None and request.model not in (None, model) else request


@contextmanager
def note(model: nn.Module | None = None, **fields: Any) -> Iterator[None]:
    """Add `fields` to what is known of calls of `model` for the time of the context."""
    known = known_of(model)
    token = latest_request.set(replace(known, model=known.model if model is None else model, **fields))
    try:
        yield
    finally:
        latest_request.reset(token)


class CallNote:
    """The hooks of a base model that note what it is called with, and forget it when the call is over.

    They are hooks and no stand-in for `forward`, since TRL puts one of its own over the base model's that calls the stack itself.
    """

    def register(self, model: nn.Module) -> None:
        before = model.register_forward_pre_hook(self, with_kwargs=True, prepend=True)
        self.handles = [before, model.register_forward_hook(end_call, always_call=True)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return note_call(model, args, kwargs)


class NotedForward(StandIn):
    """The forward of a base model, which notes a call as the hooks do, unless they have done so."""

    method = "forward"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.__wrapped__(*args, **kwargs)
        request = before = latest_request.get()
        by_hooks = request.model is self.module and request.outer is not None and not request.entered
        if not by_hooks:
            args, kwargs = note_call(self.module, args, kwargs)
            request = latest_request.get()
        latest_request.set(replace(request, entered=True))
        try:
            output = self.__wrapped__(*args, **kwargs)
        except Exception:
            latest_request.set(before)
            raise
        except BaseException:  # after an interrupt torch runs no hooks, which would forget the call
            latest_request.set(request.outer if by_hooks else before)
            raise
        latest_request.set(before)
        return output


def note_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Take out of a call of a base model what only this package understands, and note what tells the scope."""
    known = known_of(model)
    kwargs = dict(kwargs)
    fields = {name: kwargs.pop(name) for name in ("instruction_mask", "instance_embeds") if name in kwargs}
    fields = {name: value for name, value in fields.items() if value is not None}
    named = {**dict(zip(forward_args(model), args)), **kwargs} if args else kwargs
    shifted = named.get("labels") is None and named.get("shift_labels") is not None
    latest_request.set(
        replace(
            known,
            model=model,
            input_ids=named.get("input_ids"),
            labels=named.get("shift_labels" if shifted else "labels"),
            shifted=shifted,
            encoder_slots=slots_of(named.get("encoder_outputs")),
            entered=False,
            outer=latest_request.get(),
            **fields,
        )
    )
    return args, kwargs


def slots_of(encoder_outputs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The slots that an encoder's output says it holds. `generate` repeats them for beams like the rest of it."""
    order = encoder_outputs.get("slot_order") if isinstance(encoder_outputs, dict) else None
    return None if order is None else (order, encoder_outputs["slot_live"])


def note_encoder_slots(order: torch.Tensor, live: torch.Tensor) -> None:
    """Tell the decoder that is run after the encoder."""
    request = latest_request.get()
    if request.outer is not None:  # else nobody but the caller runs the decoder, with what the encoder returns
        latest_request.set(replace(request, encoder_slots=(order, live)))


@torch.compiler.disable
def end_call(model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the base model."""
    latest_request.set(latest_request.get().outer or Request())


@contextmanager
def instruction_scope(mask: torch.Tensor) -> Iterator[None]:
    """Say which tokens are the instruction, around trainers and tools that cannot pass `instruction_mask` on.

    Args:
        mask (`torch.Tensor`): Shape (B, S), bool or 0/1. It stands for every forward pass inside the context.

    Example:

    ```py
    >>> with instruction_scope(batch["instruction_mask"]):
    ...     loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    ```
    """
    with note(instruction_mask=mask):
        yield


def from_mask(instruction_mask: torch.Tensor, tokens: torch.Tensor, prompt_length: int | None = None) -> torch.Tensor:
    """Rule 1.

    Args:
        instruction_mask (`torch.Tensor`): Shape (B, S), bool or 0/1.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        prompt_length (`int`, *optional*): In `generate`, the length that the mask may have beside that of the rows, which
            grow.

    Returns:
        `torch.BoolTensor`: Shape (B, S).

    Raises:
        TypeError: It is not a tensor of bools or whole numbers.
        ValueError: It has another shape, or a row without a single instruction token.
    """
    if not isinstance(instruction_mask, torch.Tensor) or instruction_mask.is_floating_point():
        kind = getattr(instruction_mask, "dtype", type(instruction_mask).__name__)
        raise TypeError(f"`instruction_mask` must be a tensor of bools or 0/1 integers, got {kind}.")
    (B, S), shape = tokens.shape, tuple(instruction_mask.shape)
    if shape != (B, S) and not (shape == (B, prompt_length) and prompt_length < S):
        raise ValueError(f"`instruction_mask` must have the shape of the tokens, {(B, S)}, got {shape}.")
    mask = instruction_mask.to(tokens.device, torch.bool)
    mask = nn.functional.pad(mask, (0, S - shape[1])) & tokens  # (B, S)
    _check_no_empty_row(
        mask,
        tokens,
        "`instruction_mask` is all false in row(s) {}; mark at least one token of each that is not padding.",
    )
    return mask


def from_template(template: list[int], input_ids: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Rule 2: everything up to and including the first occurrence of `template` in each row, (B, S)."""
    if input_ids is None:
        raise ValueError(
            "`response_template` is searched for in `input_ids`, but the model got `inputs_embeds`; "
            "pass `instruction_mask`."
        )
    S, k = tokens.shape[1], len(template)
    wanted = torch.tensor(template, device=input_ids.device)
    if S >= k:
        hit = (input_ids.unfold(1, k, 1) == wanted).all(dim=-1) & tokens[:, : S - k + 1]  # (B, S - k + 1)
    else:
        hit = tokens.new_zeros(tokens.shape[0], 1)  # (B, 1)
    _check_no_empty_row(
        hit,
        tokens,
        f"`response_template` {template} does not occur in row(s) {{}}. It must stand between instruction and response in "
        "each row, as the tokenizer writes it there: its ids can depend on the text around it, so compare them with the "
        "row's `input_ids`.",
    )
    end = hit.long().argmax(dim=1, keepdim=True) + k  # (B, 1)
    return (torch.arange(S, device=tokens.device) < end) & tokens  # (B, S)


def from_labels(labels: torch.Tensor, tokens: torch.Tensor, shifted: bool) -> torch.Tensor:
    """Rule 4: the tokens before the first label that is not -100, (B, S); `shifted` labels stand one place earlier."""
    S = tokens.shape[1]
    asked = labels != -100  # (B, S)
    start = torch.where(asked.any(dim=1), asked.long().argmax(dim=1) + int(shifted), S)  # (B,)
    mask = (torch.arange(S, device=tokens.device) < start[:, None]) & tokens  # (B, S)
    _check_no_empty_row(
        mask,
        tokens,
        "No token is left for the prompt to be generated from in row(s) {}: their labels begin with the first token, so "
        f"the prompt would see what is to be predicted. {CURES}",
    )
    return mask


def _check_no_empty_row(mask: torch.Tensor, tokens: torch.Tensor, complaint: str) -> None:
    empty = ~mask.any(dim=1) & tokens.any(dim=1)  # (B,); a row of nothing but padding may be empty
    if empty.any():
        raise ValueError(complaint.format(empty.nonzero().flatten().tolist()))


def find_scope(
    tokens: torch.Tensor,
    request: Request,
    template: list[int] | None = None,
    input_ids: torch.Tensor | None = None,
    causal_lm: bool = False,
    pair_decoder: bool = False,
    training: bool = False,
) -> torch.Tensor:
    """Which tokens are the instance, by the rules at the head of this file.

    Args:
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        request (`Request`): What is known of the call, for these rows.
        template (`list[int]`, *optional*): The adapter's `response_template`.
        input_ids (`torch.LongTensor`, *optional*): Shape (B, S).
        causal_lm (`bool`): Whether instruction and response stand in the same row.
        pair_decoder (`bool`): Whether the stack is the decoder of an encoder-decoder model.
        training (`bool`): Whether the model is in training mode.

    Returns:
        `torch.BoolTensor`: Shape (B, S).

    Raises:
        ValueError: The scope cannot be told, or what it is told by does not fit.
    """
    if pair_decoder:
        return tokens & (tokens.cumsum(dim=1) == 1)  # (B, S)
    if request.instruction_mask is not None:
        return from_mask(request.instruction_mask, tokens, request.prompt_length)
    if template is not None:
        return from_template(template, input_ids, tokens)
    if request.prompt_length is not None:
        return tokens & (torch.arange(tokens.shape[1], device=tokens.device) < request.prompt_length)  # (B, S)
    if causal_lm and request.labels is not None and request.labels.shape == tokens.shape:
        return from_labels(request.labels.to(tokens.device), tokens, request.shifted)
    if causal_lm and training:
        raise ValueError(f"A causal language model in training mode cannot tell instruction from response. {CURES}")
    return tokens
