# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Prompts for engines that cannot run adapters but take prompt embeddings, such as vLLM's `prompt_embeds`."""

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
    """Ends a forward pass before the stack's layers run."""


def to_prompt_embeds(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> list[torch.Tensor]:
    """The input embeddings of each row with the generated prompt vectors in their slots, without padding.

    The bare base model continues them as the model with the adapter continues the tokens. The layers run only if the method needs a
    plain pass.

    Args:
        model (`nn.Module`): The model with the active adapter, in evaluation mode.
        input_ids (`torch.LongTensor`): Shape (B, S). The whole prompts, as `generate` takes them.
        attention_mask (`torch.Tensor`, *optional*): Shape (B, S). The padding mask, 0 at padding.
        kwargs: Other arguments of `forward` that the prompts depend on: `instruction_mask`, `instance_embeds`, `task_ids`.

    Returns:
        `list[torch.Tensor]`: For each row a tensor (positions, e) in the dtype of the base model.

    Raises:
        ValueError: The adapter generates vectors elsewhere than at the input, or the model is in training mode.

    Example:

    ```py
    >>> embeds = to_prompt_embeds(model, **tokenizer("What is the capital of France?", return_tensors="pt"))
    >>> llm.generate({"prompt_embeds": embeds[0]})  # vLLM with `enable_prompt_embeds=True`
    ```
    """
    generator = active_generator(model)[1]
    if generator.depths != (INPUT,) or generator.first_visible_layer > 0:
        places = ["the input" if depth == INPUT else f"layer {depth}" for depth in generator.depths]
        where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        raise ValueError(
            f"{type(generator).__name__} generates prompt vectors at {where}, and prompt embeddings reach the input only. Use a "
            "method that generates at the input: dynamic prompting, IPT with `host='prompt'`, IDPG with `multi_layer=False`."
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
    """Prompt embeddings in the form that vLLM's server takes as `prompt_embeds`.

    Args:
        embeds (`torch.Tensor`): Shape (positions, e), as [`to_prompt_embeds`] returns them.

    Returns:
        `str`: The tensor as `torch.save` writes it, in base64.

    Raises:
        ValueError: The tensor has a different number of dimensions, or no floats.

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
    torch.save(embeds.detach().cpu().clone(), buffer)  # a copy: a view would be saved with its whole base tensor
    return base64.b64encode(buffer.getvalue()).decode()
