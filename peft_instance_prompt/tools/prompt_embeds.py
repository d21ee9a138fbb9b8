# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Prompts for engines that know nothing of adapters but take prompt embeddings, such as vLLM's `prompt_embeds`."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..engine.request import note
from ..generator import INPUT
from .inspection import active_generator


class _Opened(Exception):
    """Ends a forward pass where the stack would begin its work."""


def to_prompt_embeds(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> list[torch.Tensor]:
    """The input embeddings of each request, with the generated prompt vectors in their places and without padding.

    The bare base model continues them as the model with the adapter continues the tokens. The stack runs only if the
    method itself needs a pass.

    Args:
        model (`nn.Module`): The model with the active adapter, in evaluation mode.
        input_ids (`torch.LongTensor`): Shape (B, S). The whole prompts, as `generate` takes them.
        attention_mask (`torch.Tensor`, *optional*): Shape (B, S). 0 where there is padding.
        kwargs: Other arguments of the model that bear on the prompts: `instruction_mask`, `instance_embeds`, `task_ids`.

    Returns:
        `list[torch.Tensor]`: One of shape (positions, e) for each row, in the dtype of the base model.

    Raises:
        ValueError: The adapter's vectors do not enter at the input alone, or the model is in training mode.

    Example:

    ```py
    >>> embeds = to_prompt_embeds(model, **tokenizer("What is the capital of France?", return_tensors="pt"))
    >>> llm.generate({"prompt_embeds": embeds[0]})  # vLLM with `enable_prompt_embeds=True`
    ```
    """
    generator = active_generator(model)[1]
    if generator.depths != (INPUT,) or generator.first_visible_layer > 0:
        where = ", ".join("the input" if depth == INPUT else f"layer {depth}" for depth in generator.depths)
        raise ValueError(
            f"{type(generator).__name__} generates prompt vectors at {where}, from what the layers below have made of the "
            "text; an engine that takes prompt embeddings gives access to the input only. Methods that can be served so are "
            "those that enter at the input: dynamic prompting, IPT with the host `prompt`, IDPG with `multi_layer=False`."
        )
    if model.training:
        raise ValueError("The model is in training mode, in which prompts may be sampled; call `model.eval()` first.")
    opened: dict[str, Any] = {}

    def stop(call: dict[str, Any]) -> None:
        opened.update(call)
        raise _Opened

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        with torch.no_grad(), note(base, opened=stop):
            model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    except _Opened:
        pass
    embeds, mask = opened["inputs_embeds"], opened["attention_mask"]  # (B, N, e), (B, N)
    return list(embeds) if mask is None else [row[seen] for row, seen in zip(embeds, mask.bool())]


def encode_prompt_embeds(embeds: torch.Tensor) -> str:
    """Prompt embeddings as vLLM's server takes them in `prompt_embeds`.

    Args:
        embeds (`torch.Tensor`): Shape (positions, e), as [`to_prompt_embeds`] returns them.

    Returns:
        `str`: The tensor as `torch.save` writes it, in base64.

    Raises:
        ValueError: The tensor has another shape.

    Example:

    ```py
    >>> (embeds,) = to_prompt_embeds(model, **tokenizer("What is the capital of France?", return_tensors="pt"))
    >>> client.completions.create(model=BASE, prompt="", extra_body={"prompt_embeds": encode_prompt_embeds(embeds)})
    ```
    """
    if embeds.dim() != 2 or not embeds.is_floating_point():
        raise ValueError(
            f"`embeds` must be the embeddings (positions, e) of one prompt, got a tensor of {embeds.dtype} and shape "
            f"{tuple(embeds.shape)}."
        )
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # a view would be saved with all that it is a view of
    return base64.b64encode(buffer.getvalue()).decode()
