# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Compute the instance vectors of a data set once, store them as a column, and pass them to the model in training."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engine.open import run_plain
from ..engine.stack import describe
from ..methods.instance_vector import POOLINGS, find_pooling


def add_instance_embeds(
    dataset: Any,
    encoder: Any,
    text_column: str = "text",
    column: str = "instance_embeds",
    batch_size: int = 64,
    pooling: str = "auto",
) -> Any:
    """Store a vector of each text of a data set as a column.

    Training with `instance_source="instance_embeds"` (IDPG, dynamic prompting) then needs no plain pass of the base model.

    Args:
        dataset (`datasets.Dataset` or `datasets.DatasetDict`): The data.
        encoder: A callable from a list of N texts to an array or tensor (N, k); an object with a method `encode` of that
            kind, such as a `SentenceTransformer`; or a pair `(model, tokenizer)` of transformers. The model may be the
            `PeftModel` that is trained: it runs without prompts, and with `pooling="auto"` the vectors are those that
            `instance_source="frozen"` computes.
        text_column (`str`): The column with the texts. Defaults to `"text"`. For `(model, tokenizer)` it should hold the
            whole instruction, as it will stand before the response.
        column (`str`): The new column. Defaults to `"instance_embeds"`.
        batch_size (`int`): How many texts are encoded at a time. Defaults to 64.
        pooling (`str`): For `(model, tokenizer)`: the `"first"` or the `"last"` token's last hidden state, the `"mean"` over
            the tokens, or `"auto"`, the default: the last in a causal model, the mean in the encoder of an encoder-decoder
            model, otherwise the first.

    Returns:
        `datasets.Dataset` or `datasets.DatasetDict`: The data with the new column, lists of k 32-bit floats.

    Raises:
        TypeError: The data set or the encoder is of none of these types.
        ValueError: `text_column` is missing, `column` exists already, `pooling` is none of these, or the encoder returns a
            shape other than (N, k).

    Example:

    ```py
    >>> dataset = add_instance_embeds(dataset, SentenceTransformer("all-MiniLM-L6-v2"))
    >>> config = IDPGConfig(task_type="CAUSAL_LM", instance_source="instance_embeds", instance_embeds_dim=384)
    >>> trainer = Trainer(
    ...     model=get_peft_model(model, config),
    ...     train_dataset=dataset,
    ...     data_collator=InstanceEmbedsCollator(collator),
    ...     args=TrainingArguments(remove_unused_columns=False),
    ... )
    ```
    """
    if pooling not in ("auto", *POOLINGS):
        raise ValueError(f"`pooling` must be one of {['auto', *POOLINGS]}, got {pooling!r}.")
    parts = dataset if isinstance(dataset, Mapping) else {"": dataset}  # of a DatasetDict, or the data set
    for part in parts.values():
        check_columns(part, text_column, column)
    encode = as_function(encoder, pooling)
    done = {name: add_column(part, encode, text_column, column, batch_size) for name, part in parts.items()}
    kind: Any = type(dataset)
    return kind(done) if isinstance(dataset, Mapping) else done[""]


def check_columns(dataset: Any, text_column: str, column: str) -> None:
    """Raise a TypeError if this is no `datasets.Dataset`, a ValueError if it lacks the texts or has the new column already."""
    if not hasattr(dataset, "map") or not hasattr(dataset, "column_names"):
        raise TypeError(f"`dataset` must be a `datasets.Dataset` or a `DatasetDict`, got {type(dataset).__name__}.")
    if text_column not in dataset.column_names:
        raise ValueError(f"`text_column` {text_column!r} is not in the data set, which has {dataset.column_names}.")
    if column in dataset.column_names:
        raise ValueError(f"`column` {column!r} is in the data set already; remove it first or choose another name.")


def add_column(
    dataset: Any, encode: Callable[[list[str]], Any], text_column: str, column: str, batch_size: int
) -> Any:
    """A `datasets.Dataset` with the vectors that `encode` makes of its texts, as a new column."""

    def of_batch(texts: list[str]) -> dict[str, Any]:
        vectors = torch.as_tensor(encode(texts)).detach().to("cpu", torch.float32)  # (N, k)
        if vectors.dim() != 2 or len(vectors) != len(texts):
            raise ValueError(
                f"`encoder` must make a vector of each of {len(texts)} texts, got {tuple(vectors.shape)}."
            )
        return {column: vectors.numpy()}

    # A fingerprint of our own: otherwise `datasets` pickles the encoder with all its weights to compute one.
    extra = {"new_fingerprint": uuid.uuid4().hex[:16], "desc": f"Computing {column}"}
    taken = inspect.signature(dataset.map).parameters  # an IterableDataset's `map` takes neither
    extra = {name: value for name, value in extra.items() if name in taken}
    return dataset.map(of_batch, batched=True, batch_size=batch_size, input_columns=text_column, **extra)


def as_function(encoder: Any, pooling: str) -> Callable[[list[str]], Any]:
    """Each kind of encoder that [`add_instance_embeds`] takes, as a function from N texts to vectors (N, k)."""
    if isinstance(encoder, (tuple, list)) and len(encoder) == 2 and isinstance(encoder[0], nn.Module):
        model, tokenizer = encoder
        return lambda texts: encode_with_model(model, tokenizer, texts, pooling)
    if callable(getattr(encoder, "encode", None)):
        return encoder.encode
    if callable(encoder):
        return encoder
    raise TypeError(
        "`encoder` must be a callable, an object with a method `encode`, or a pair (model, tokenizer), got "
        f"{type(encoder).__name__}."
    )


def encode_with_model(model: nn.Module, tokenizer: Any, texts: Sequence[str], pooling: str = "auto") -> torch.Tensor:
    """The vectors (N, d) of N texts: pooled last hidden states of a plain pass, without prompts, gradient and dropout."""
    info = next((info for info in describe(model) if not info.decoder_of_pair), None)
    if info is None:
        raise ValueError(f"No transformer stack was found in {type(model).__name__}.")
    stack: PreTrainedModel = model.get_submodule(info.name)
    # Padding on the right: causal tokens do not attend to it, and it shifts no position.
    inputs = tokenizer(list(texts), padding=True, truncation=True, padding_side="right", return_tensors="pt")
    inputs = inputs.to(stack.get_input_embeddings().weight.device)
    wanted = {name: value for name, value in inputs.items() if name in info.forward_args}
    states = run_plain(stack, wanted)  # (N, S, d)
    return find_pooling(pooling, info)(states, inputs["attention_mask"].bool().to(states.device))  # (N, d)


class InstanceEmbedsCollator:
    """A data collator that stacks the stored vectors as `instance_embeds` (B, k) and leaves the other columns to `collator`.

    The trainer must keep the column: `TrainingArguments(remove_unused_columns=False)`.

    Args:
        collator (`Callable`): From a list of examples to a batch, a dict of tensors.
        column (`str`): The column with the vectors, see [`add_instance_embeds`]. Defaults to `"instance_embeds"`.

    Raises:
        ValueError: When called, if an example has no vector, or they differ in width.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], column: str = "instance_embeds"):
        self.collator = collator
        self.column = column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        missing = [i for i, example in enumerate(examples) if self.column not in example]
        if missing:
            raise ValueError(
                f"Example(s) {missing} of the batch have no column {self.column!r}, but {sorted(examples[missing[0]])}. Add it "
                "with `add_instance_embeds`, and keep it with `TrainingArguments(remove_unused_columns=False)`."
            )
        vectors = [torch.as_tensor(example[self.column], dtype=torch.float32) for example in examples]  # each (k,)
        if len({vector.shape for vector in vectors}) > 1:
            raise ValueError(f"The vectors in {self.column!r} differ in width: {[tuple(v.shape) for v in vectors]}.")
        rest = [{name: x for name, x in example.items() if name != self.column} for example in examples]
        batch = self.collator(rest)
        batch["instance_embeds"] = torch.stack(vectors)  # (B, k)
        return batch
