# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`InstanceConfig`, the fields that all methods have, and `InstancePromptConfig`, those of methods with slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType
from torch import nn

from .checks import check_choice, check_int, check_layers, check_names, check_text
from .engine.stack import StackInfo
from .files import read_kind, staged
from .lora_words import refuse_unknown_fields
from .model_card import write_card
from .template import find_separator, tokenize_init_text, tokenize_template, tokenize_text


FORMAT_VERSION = 2  # of a config file; those of 0.2.0 do not say theirs, and count as 0
PLAIN_POSITIONS = ("before", "after_first", "end")
PAIR_POSITIONS = ("before_separator", "after_separator")  # of rows that hold two sentences


@dataclass
class InstanceConfig(PeftConfig):
    """Base class of the methods' configs: the fields that all methods have.

    Args:
        layers_to_transform (`int` or `list[int]`, *optional*):
            The layers at whose input the adapter writes, counted from 0. In the other layers slots keep the states that the
            layer before gave them. Defaults to all layers.
        response_template (`str` or `list[int]`, *optional*):
            The token ids that stand between instruction and response in every row; the adapter keeps them. The instruction of a
            prompt then ends with their first occurrence, in training, evaluation and generation alike; a method that edits the
            instruction's states edits all tokens but answers, see `response_end`. Set it wherever a causal model scores given
            continuations (evaluation harnesses, preference training): without it and without labels, the whole row counts as the
            instance. The tokenizer `tokenizer_name_or_path` turns a text into ids once, when the adapter is made. `"chat"` stands
            for the ids that its chat template writes before an answer.
        response_end (`str` or `list[int]`, *optional*):
            The token ids that end an answer, which begins behind `response_template`. In chats of several turns, methods that edit
            the instruction's states edit every turn but the answers. `response_template="chat"` finds it in the chat template. Other
            methods generate the prompt from the text before the first answer, and do not read this field.
        missing_template (`str`):
            What happens to a row without the `response_template`: `"error"`, the default, refuses it; `"all"` takes the whole row
            as the instruction, for training rows that were cut off and for plain text that a harness scores.
        instruction_length (`int`, *optional*):
            For plain text, which has no instruction: the number n of tokens at the start that count as the instruction. Slots then
            stand behind them (`prompt_position="end"`), so that a prompt reads none of the tokens that are predicted from it.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer for fields that are given as text. Defaults to the base model's.
        target_modules (`str` or `list[str]`, *optional*):
            The transformer stacks, or their lists of layers. In a list: names or the ends of names, e.g. `"decoder"` or
            `"model.layers"`. A string is a regular expression that the whole name must match. Defaults to the text stack, in
            an encoder-decoder model its encoder.
        exclude_modules (`str` or `list[str]`, *optional*):
            Stacks to leave out, in the same form.
        modules_to_save (`list[str]`, *optional*):
            Modules of the base model that are trained and saved in full, e.g. a classification head.
        hidden_size (`int`, *optional*):
            The width of the layers. Filled in from the base model; a later base model must agree.
        num_layers (`int`, *optional*):
            The number of layers. Filled in from the base model; a later base model must agree.
        saved_embedding_layers (`list[str]`, *optional*):
            Written into the file when an adapter is saved: the names of the base model's embeddings and head, if PEFT saved
            them with the adapter (`save_embedding_layers`, which a resized vocabulary switches on). Loading takes no other tensor
            of the base model from an adapter's file.
        weights_digest (`str`, *optional*):
            Written into the file when an adapter is saved: the digest of its weights. Loading compares it, and refuses a config
            and weights of two different saves. If it is None, loading compares nothing.
        format_version (`int`):
            Filled in: the form of the config file, 2. A field that a file of an older form lacks gets the default that it had
            then, see `old_defaults`.
        import_first (`str`, *optional*):
            Filled in: the package that registers the method, for readers of a saved config. Import it before loading the
            adapter.

    Raises:
        ValueError: A field has a value that is not allowed; the message names the field, the value and what is allowed.
        TypeError: A field is unknown, or a number or a list of names has the wrong type. The message names the counterpart of a
            field of LoRA's or PEFT's soft prompts, and the right spelling of a misspelt field.
    """

    method: ClassVar[Optional[str]] = None  # set by `register_method`
    paper: ClassVar[Optional[tuple[str, str]]] = None  # title and arXiv number, for the model card
    sized_by: ClassVar[tuple[str, ...]] = ()  # the fields that set an adapter's size, for messages
    # By `format_version`: the defaults that the class's fields had up to that form, if they have changed since.
    old_defaults: ClassVar[dict[int, dict[str, Any]]] = {}
    # Trainers read this field of LoRA's from any config, and set it when a chat template adds tokens.
    trainable_token_indices: ClassVar[Any] = None

    layers_to_transform: Optional[Union[list[int], int]] = None
    response_template: Optional[Union[list[int], str]] = None
    response_end: Optional[Union[list[int], str]] = None
    missing_template: Literal["error", "all"] = "error"
    instruction_length: Optional[int] = None
    tokenizer_name_or_path: Optional[str] = None
    target_modules: Optional[Union[list[str], str]] = None
    exclude_modules: Optional[Union[list[str], str]] = None
    modules_to_save: Optional[list[str]] = None
    hidden_size: Optional[int] = None
    num_layers: Optional[int] = None
    saved_embedding_layers: Optional[list[str]] = None
    weights_digest: Optional[str] = None
    format_version: int = FORMAT_VERSION
    import_first: Optional[str] = None

    def __new__(cls, *args: Any, **kwargs: Any):
        version = kwargs.get("format_version", 0)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {version}, and this release reads config files up to {FORMAT_VERSION}: install a newer "
                "release of peft-instance-prompt to load the adapter."
            )
        refuse_unknown_fields(cls, kwargs)
        self = super().__new__(cls)
        if isinstance(version, int) and "peft_type" in kwargs:  # from a file: who makes a config by hand leaves it out
            self.__dict__.update(_old={k: v for k, v in defaults_of(cls, version).items() if k not in kwargs})
        return self

    def __post_init__(self):
        super().__post_init__()
        check_int(self, "format_version", minimum=0)
        for name, value in {**self.__dict__.pop("_old", {}), "format_version": FORMAT_VERSION}.items():
            setattr(self, name, value)
        if self.method is None:
            raise TypeError(
                f"{type(self).__name__} is the config of no method: register it with `register_method(name, "
                f"{type(self).__name__}, Generator)`."
            )
        self.peft_type = PeftType[self.method.upper()]
        self.import_first = type(self).__module__.partition(".")[0]
        self._fill_in()
        self._check_fields()
        self._check_combinations()

    def _fill_in(self) -> None:
        """Set the fields whose default depends on other fields."""

    def _check_fields(self) -> None:
        """Raise a ValueError or a TypeError if a field has a value that is not allowed."""
        for name in ("instruction_length", "hidden_size", "num_layers"):
            check_int(self, name, minimum=1, optional=True)
        check_choice(self, "missing_template", ("error", "all"))
        for name in ("target_modules", "exclude_modules", "modules_to_save", "saved_embedding_layers"):
            check_names(self, name, pattern=name in ("target_modules", "exclude_modules"))
        if "" in (self.modules_to_save or ()):
            raise ValueError(f"`modules_to_save` must be names that are not empty, got {self.modules_to_save!r}.")
        check_layers(self, "layers_to_transform")
        for name in ("response_template", "response_end"):
            check_text(self, name)
        if not isinstance(self.weights_digest, (str, type(None))):
            raise TypeError(f"`weights_digest` must be a text or None, got {self.weights_digest!r}.")

    def _check_combinations(self) -> None:
        """Raise a ValueError if two fields, each with a value that is allowed, do not fit together."""
        if self.instruction_length is not None and self.response_template is not None:
            raise ValueError(
                "`instruction_length` is for plain text and `response_template` for rows with a response: give one of them, got "
                f"{self.instruction_length} and {self.response_template!r}."
            )
        if self.response_end is not None and self.response_template in (None, self.response_end):
            raise ValueError(
                f"`response_end` ends an answer, which begins behind a different `response_template`; got {self.response_end!r} with "
                f"{self.response_template!r}."
            )

    def complete(self, model: nn.Module, infos: Sequence[StackInfo]) -> None:
        """Fill in what the config leaves to the base model `model`, whose targeted stacks are `infos`.

        Raises:
            ValueError: A field needs a tokenizer that is not known, or a text in it fits neither tokenizer nor base model.
        """
        if isinstance(self.response_template, str):
            self.response_template, end = tokenize_template(self, model)
            self.response_end = end if self.response_end is None else self.response_end
        if isinstance(self.response_end, str):
            self.response_end = tokenize_text(self, model, "response_end")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any):
        """Load a config as [`~peft.PeftConfig.from_pretrained`] does.

        Raises:
            ValueError: A local folder's `adapter_config.json` is no JSON object with a `peft_type`.
        """
        read_kind(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config as [`~peft.PeftConfig.save_pretrained`] does, and write into the model card how to load the adapter."""
        self.weights_digest = self.saved_embedding_layers = None  # whoever saves the weights fills them in
        with staged(save_directory, "README.md") as folder:
            super().save_pretrained(str(folder), **kwargs)
            write_card(folder, self)


@dataclass
class InstancePromptConfig(InstanceConfig):
    """Base class of the configs of methods that generate prompt vectors into slots.

    Args:
        num_virtual_tokens (`int`):
            The number l of prompt vectors per instance, at least 1.
        bottleneck_dim (`int`):
            The width m of the generator's bottleneck, at least 1. Defaults to 16.
        prompt_position (`str`):
            Where the slots stand. `"before"`, the default: before the first token that is not padding. `"after_first"`: behind
            that token (BOS or [CLS]). `"end"`: in a causal model behind the last instruction token, so that the next token
            is predicted at the last slot; in an encoder before the last token that is not padding ([SEP] or </s>). In rows
            that hold two sentences also `"before_separator"`, before the first separator between them, and
            `"after_separator"`, before the first token of the second sentence.
        separator_id (`int`, *optional*):
            The id of the token between the two sentences, for these two positions. Filled in when the adapter is made: the
            tokenizer's `sep_token`, or its `eos_token` if it has no `sep_token`.
        init_weights (`bool` or `"paper"`):
            `True`, the default, starts as a near no-op, as LoRA does: each prompt vector begins as a copy of the state of
            the row's first token at that depth, the attention sink, and the generated part is added in units of that state's
            root mean square. `False` has the same form and starts from random weights (used by tests). `"paper"` has the
            paper's own form and start, which disturbs a pretrained causal model badly. The form belongs to the trained
            adapter: do not change this field afterwards. (At the `"end"` of a causal model, where the next token is
            predicted at the last slot, the copies are of the last instruction token, and no start is a near no-op.)
        init_text (`str` or `list[int]`, *optional*):
            A text, or its token ids. The prompt begins, depth by depth, as the states that these tokens have in the frozen base
            model, instead of copies of the first token. At most `num_virtual_tokens` tokens; a shorter text is repeated. The
            tokenizer `tokenizer_name_or_path` turns a text into ids, without special tokens. The states are computed once, when
            the adapter is made; they are saved with it and not trained. In a causal model, a fresh adapter whose slots stand
            before the text then acts as these tokens would, so it is no near no-op. Not for `init_weights="paper"`, whose
            prompts have no such part.
        condition (`str`):
            `"instance"`, the default, or `"constant"` for the control experiment: the same generator reads a learned
            constant, so that the generated part is the same for all instances. With `init_weights="paper"` the whole prompt
            is; otherwise the generated part is added to the state of the instance's own first token.

    All fields of [`InstanceConfig`] are inherited.
    """

    conditions: ClassVar[tuple[str, ...]] = ("instance", "constant")
    sized_by = ("num_virtual_tokens", "bottleneck_dim")

    num_virtual_tokens: int = 4
    bottleneck_dim: int = 16
    prompt_position: Literal["before", "after_first", "end", "before_separator", "after_separator"] = "before"
    separator_id: Optional[int] = None
    init_weights: Union[bool, Literal["paper"]] = True
    init_text: Optional[Union[list[int], str]] = None
    condition: Literal["instance", "constant"] = "instance"

    def _check_fields(self) -> None:
        super()._check_fields()
        check_int(self, "num_virtual_tokens", minimum=1)
        check_int(self, "bottleneck_dim", minimum=1)
        check_int(self, "separator_id", minimum=0, optional=True)
        positions = (*PLAIN_POSITIONS, *PAIR_POSITIONS)
        decided = type(self).prompt_position is not None  # otherwise filled in when the stack is known
        check_choice(self, "prompt_position", positions if decided else (None, *positions))
        check_choice(self, "init_weights", (True, False, "paper"))
        check_choice(self, "condition", type(self).conditions)
        check_text(self, "init_text")

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.separator_id is not None and self.prompt_position not in PAIR_POSITIONS:
            raise ValueError(
                f"`separator_id` is for `prompt_position` in {list(PAIR_POSITIONS)}, got {self.separator_id} with "
                f"{self.prompt_position!r}."
            )
        self._check_instruction_length()
        if self.init_text is not None and self.init_weights == "paper":
            raise ValueError(
                f"`init_text` must be None with `init_weights='paper'`, got {self.init_text!r}: the paper's prompts have no part "
                "that could begin as a text."
            )

    def _check_instruction_length(self) -> None:
        if self.instruction_length is not None and self.prompt_position not in ("end", None):
            raise ValueError(
                f"`instruction_length` needs `prompt_position='end'`, got {self.prompt_position!r}: slots before the text would "
                "let its first tokens be predicted from a prompt that has read them."
            )

    def default_position(self, infos: Sequence[StackInfo]) -> str:
        """`prompt_position` in these stacks, for methods whose default is to be filled in."""
        return "after_first" if infos[0].begins_with_special else "before"

    def complete(self, model: nn.Module, infos: Sequence[StackInfo]) -> None:
        if self.prompt_position is None:
            self.prompt_position = self.default_position(infos)
            self._check_instruction_length()
        super().complete(model, infos)
        if self.init_text is not None:
            if any(info.decoder_of_pair for info in infos):
                raise ValueError(
                    f"`init_text` must be None in the decoder of an encoder-decoder model, whose states depend on the encoder's "
                    f"text, got {self.init_text!r}."
                )
            self.init_text = tokenize_init_text(self, model, infos[0].vocab_size)
        if self.prompt_position in PAIR_POSITIONS and self.separator_id is None:
            self.separator_id = find_separator(self, model)


def defaults_of(cls: type, version: int) -> dict[str, Any]:
    """The defaults of a config's fields in files of the form `version`, if they have changed since."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        old = vars(base).get("old_defaults", {})
        for number in sorted((number for number in old if number >= version), reverse=True):
            found.update(old[number])
    return found
