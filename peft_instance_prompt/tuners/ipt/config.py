# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from ...checks import check_choice, check_dropout, check_int, check_number
from ...config import InstancePromptConfig


@dataclass
class IPTConfig(InstancePromptConfig):
    """Configuration of [`IPTModel`], instance-wise prompt tuning (https://arxiv.org/abs/2206.01958).

    The prompt is made from the instance's token ids by a second embedding table, of shape (vocab_size, width): either each
    of the first P instruction tokens looks up its prompt vector, P being `num_virtual_tokens` (`strategy="lookup"`), or a
    small network turns the vectors of the first tokens into P prompt vectors (`strategy="encoder"`).

    The table makes up nearly all of the adapter. In full it is 14 to 29 % of a model, though the paper states 0.5 to 1.5 %,
    so by default it is the product of a (vocab_size, 64) and a (64, width) matrix. With the vocabulary of 128,256 and the
    width of 2,048 of a Llama 3.2 1B, that is 8.3 M parameters, 0.67 % of the model: 33 MB in float32 and 133 MB in training
    with AdamW (weight, gradient and two moments); the full table is 263 M, 1.05 GB and 4.2 GB. The rest is small there
    (the CNN 0.4 M and 0.1 M per prompt vector), so that any strategy with P up to 20 stays between 0.5 and 1.5 %.

    Deviations from the paper: by default the adapter starts as a near no-op, and what is looked up is divided by its root
    mean square (`init_weights`; `"paper"` does neither); fewer prompt vectors (5 and not 100); the low-rank table; the
    encoders' inner width is `bottleneck_dim` (the released CNN has 1, the LSTM 64, and the MLP is one matrix from the mean to
    all prompt vectors, 105 M weights); padding is never looked up; dropout is active in training only.

    Args:
        num_virtual_tokens (`int`): The number P of prompt vectors. Defaults to 5. With `strategy="lookup"`, a row with fewer
            instruction tokens gets as many prompt vectors as it has tokens (but all, if there is a task prompt).
        strategy (`str`): `"lookup"` (the default) or `"encoder"`.
        encoder (`str`): The network of `strategy="encoder"`: `"cnn"`, the default, a TextCNN with kernels 3, 4 and 5 and the
            maximum over time; `"mlp"`, on the mean over tokens; `"lstm"`, a bidirectional LSTM of two layers.
        bottleneck_dim (`int`): The inner width m of the encoder: features per kernel, hidden units, or units per direction.
            Defaults to 16.
        max_instance_tokens (`int`): How many instruction tokens the encoder reads. Defaults to 100, the paper's.
        host (`str`): `"prompt"`, the default: the prompt stands at the input. `"deep"`: a learned task prompt at every layer,
            and the instance's part is added to the one at the first layer.
        task_prompt (`bool`, *optional*): Whether there is a learned task prompt that the instance's part is added to.
            Defaults to the paper's: `False` for `host="prompt"`, `True` for `"deep"`. A `"deep"` host without one writes to the
            first layer only.
        instance_scale (`float`): The factor of the instance's part with `host="deep"`. Defaults to 0.05.
        table_rank (`int`, `None` or `"auto"`): The rank of the table; `None` for a full one. Defaults to `"auto"`: 64, and a
            full table with `init="embeddings"`.
        init (`str`): The start of the table: `"random"`, the default, uniform in [-0.5, 0.5] (of a
            low-rank table, the first factor); `"pretrained"`, the table (and the encoder) in `init_file`; `"embeddings"`, a
            copy of the base model's input embeddings. With the last and `trainable=False`, the base model's embeddings are
            read and no copy is made.
        init_file (`str`, *optional*): A safetensors file with `table.*` (and `encoder_*`), as `examples/methods/pretrain_ipt.py` in
            the project's repository writes it. It is not needed any more to load the saved adapter, and not kept in it.
        trainable (`bool`): Whether the table is trained. Defaults to `True`.
        dropout (`float`): The dropout on the encoder's features, in training only. Defaults to 0.1.
        vocab_size (`int`, *optional*): The number of the base model's embeddings. Filled in; a later base model must agree.

    The fields that all methods have are those of [`InstancePromptConfig`].
    """

    paper = ("Instance-wise Prompt Tuning for Pretrained Language Models", "2206.01958")

    num_virtual_tokens: int = field(default=5, metadata={"help": "The number of prompt vectors per instance."})
    strategy: Literal["lookup", "encoder"] = field(
        default="lookup", metadata={"help": "A prompt vector per token ('lookup'), or a small network ('encoder')."}
    )
    encoder: Literal["cnn", "mlp", "lstm"] = field(
        default="cnn", metadata={"help": "The network: 'cnn', 'mlp', 'lstm'."}
    )
    max_instance_tokens: int = field(default=100, metadata={"help": "How many tokens the encoder reads."})
    host: Literal["prompt", "deep"] = field(
        default="prompt", metadata={"help": "Prompt at the input ('prompt') or at every layer ('deep')."}
    )
    task_prompt: Optional[bool] = field(
        default=None, metadata={"help": "Whether there is a task prompt as well; None: only with the host 'deep'."}
    )
    instance_scale: float = field(default=0.05, metadata={"help": "The factor of the instance's part if 'deep'."})
    table_rank: Optional[Union[int, Literal["auto"]]] = field(
        default="auto", metadata={"help": "The rank of the table; None: full; 'auto': 64 where that is possible."}
    )
    init: Literal["random", "pretrained", "embeddings"] = field(
        default="random", metadata={"help": "What the table starts from: 'random', 'pretrained' or 'embeddings'."}
    )
    init_file: Optional[str] = field(default=None, metadata={"help": "The safetensors file for init='pretrained'."})
    trainable: bool = field(default=True, metadata={"help": "Whether the table is trained."})
    dropout: float = field(default=0.1, metadata={"help": "The dropout on the encoder's features, in training only."})
    vocab_size: Optional[int] = field(default=None, metadata={"help": "The number of embeddings; filled in."})

    def __post_init__(self):
        super().__post_init__()
        if self.task_prompt is None:
            self.task_prompt = self.host == "deep"
        if self.table_rank == "auto":
            self.table_rank = None if self.init == "embeddings" else 64
        check_choice(self, "strategy", ("lookup", "encoder"))
        check_choice(self, "encoder", ("cnn", "mlp", "lstm"))
        check_choice(self, "host", ("prompt", "deep"))
        check_choice(self, "init", ("random", "pretrained", "embeddings"))
        for name in ("task_prompt", "trainable"):
            check_choice(self, name, (True, False))
        check_int(self, "max_instance_tokens", minimum=1)
        check_number(self, "instance_scale")
        for name in ("table_rank", "vocab_size"):
            if getattr(self, name) is not None:
                check_int(self, name, minimum=1)
        check_dropout(self)
        if self.init == "embeddings" and self.table_rank is not None:
            raise ValueError(f"`table_rank` must be None with `init='embeddings'`, got {self.table_rank}.")
        loaded = self.hidden_size is not None  # a saved adapter does not keep the file
        if (self.init == "pretrained") != (self.init_file is not None) and not (loaded and self.init_file is None):
            raise ValueError(
                "`init_file` must name a safetensors file with `init='pretrained'` and be None otherwise, got "
                f"{self.init_file!r} with {self.init!r}."
            )
        nothing = self.strategy == "lookup" and not self.trainable and not self.task_prompt
        if nothing and self.init_weights == "paper" and self.condition == "instance":
            raise ValueError(
                "`trainable=False` leaves nothing to train with `strategy='lookup'`, `init_weights='paper'` and no "
                "`task_prompt`."
            )
        if self.host == "prompt" and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` must be None with `host='prompt'`, which writes to the input only, got "
                f"{self.layers_to_transform!r}."
            )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        # The adapter's weights are beside it; where it once started from may not exist where it is loaded.
        saved = copy.copy(self)
        saved.init_file = None
        super(IPTConfig, saved).save_pretrained(save_directory, **kwargs)
