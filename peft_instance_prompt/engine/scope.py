# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Scope: which tokens are the instance that a prompt is generated from, or whose states are edited.

In a causal model, instruction and response stand in the same row. A prompt that reads the response leaks what is to be predicted. So
the first of these rules that applies gives the scope:

1. `instruction_mask`, an argument of `forward`, `generate` or [`instruction_scope`].
2. The adapter's `response_template`: all tokens up to the end of its first occurrence. Or its `instruction_length`: the first n tokens.
3. In `generate`, its prompt, for the whole call. Rule 2 searches the prompt only.
4. `labels` (or TRL's `shift_labels`) of a causal model: the tokens before the first label that is not -100. Without them, the prefix
   that the mask of a prefix-LM shows to all of itself.
5. A causal model in training to which no rule applies has no scope: ValueError.
6. Otherwise all tokens but padding. A causal model warns once if it gets several rows: if the ends of the rows are scored, the prompt has
   read them. No warning if the call asks for the logits of the last position only, since nothing in the rows can be scored then.

One instruction block per row: tokens in a gap would be predicted from a prompt that has read what follows them. So a mask with a gap is
refused if tokens in the gap are, or may be, predicted.

A causal stack whose use is unknown (`stack.py`) counts as a causal model, unless the call has one label per row.

A method that edits the instruction's states follows the same rules, but for two. With a `response_template` all tokens are edited that
lie in no answer: an answer begins behind the template and goes on to the end of `response_end`. So a chat of several turns has the same
edits whether its text comes at once or, with a KV cache, turn by turn. And a gap in the `instruction_mask` leaks nothing: an edit reads the
token's own state only. What `generate` samples is an answer and is not edited.

In an encoder-decoder model the instruction stands in the encoder. The instance of a decoder is its start token, the only token that its
rows share in training and generation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ..config import InstanceConfig
from ..template import find_text, find_tokenizer
from .edits import clipped, ends_of, from_length, numbers, outside_answers
from .request import Request
from .stack import StackInfo


CURE = (
    "Mark the instruction: by -100 in `labels`, by `instruction_mask`, or in the config by `response_template` (chats: 'chat') or, in "
    "plain text, `instruction_length`."
)
WRAPPED = (
    "Packing that cuts texts anywhere makes such rows of any data (TRL: `packing_strategy='wrapped'`): use 'bfd'."
)


def all_scored(rows: torch.Tensor, but: str, some: bool) -> str:
    """The message for rows (B,) without -100 in their labels, except on the tokens that `but` names; `some` rows of a batch, or all."""
    why = " (BOS is masked)" if but else ""
    cut = " (`packing_strategy='wrapped'` cuts texts.)" if some and not but else ""  # other rows have an instruction
    return f"All tokens of row(s) {numbers(rows)}{but} are scored{why}: a prompt would read what it is to predict. {CURE}{cut}"


def no_instruction(rows: torch.Tensor, but: str) -> str:
    """The message for rows (B,) that begin in a response, apart from the tokens that `but` names."""
    return (
        f"No token{but} is left for the prompt to be generated from in row(s) {numbers(rows)}: they begin in a response, since -100 "
        f"comes later in their `labels`. {WRAPPED}"
    )


def without_template(
    template: list[int], input_ids: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, tokenizer: str | None
) -> str:
    """The message for rows (B,) in which the template does not occur: in text if the tokenizer is on this machine, else in token ids.

    Args:
        template (`list[int]`): The template.
        input_ids (`torch.LongTensor`): Shape (B, S).
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        rows (`torch.BoolTensor`): Shape (B,).
        tokenizer (`str`, *optional*): The tokenizer's name.
    """
    row = int(rows.nonzero()[0])
    ids = input_ids[row][tokens[row].to(input_ids.device)].tolist()
    known = find_tokenizer(tokenizer)
    if known is None:
        wanted, end = clipped(template), f"the tokens {clipped(ids, end=True)}"
    else:
        text = known.decode(template)
        wanted, end = repr(text[:30]), repr(known.decode(ids[-16:])[-30:])
        if (own := find_text(text.strip(), ids, known)) is not None:
            return (
                f"`response_template` {wanted} does not occur in row(s) {numbers(rows)} as the tokens {clipped(template)}: row "
                f"{row} has its text as {own}, since a space at its end, or what stands beside it, changes tokens. Give these ids."
            )
    return (
        f"`response_template` {wanted} does not occur in row(s) {numbers(rows)}: row {row} ends in {end}. Write it as the data do, "
        "spaces included; for rows that were cut off before the response, set `missing_template='all'`."
    )


UNDECLARED = (
    "Nothing in the adapted module says whether tokens of its causal stack are predicted, which a prompt must not read. If some "
    "are, pass their `labels`, or call the model within `instruction_scope(mask)`, a mask of the instruction; if none are, set "
    "`task_type`, such as 'FEATURE_EXTRACTION'."
)


@dataclass(frozen=True)
class Rules:
    """What decides the scope of an adapter's rows beside the call: fields of its config, and the use of its stack.

    Attributes:
        edits (`bool`): Whether the adapter edits the states of the instruction's tokens.
        template (`list[int]`, *optional*): The adapter's `response_template`, as token ids.
        end (`list[int]`, *optional*): The adapter's `response_end`, as token ids.
        missing_template (`str`): The adapter's field: what a row without the template is, `"error"` or `"all"`.
        instruction_length (`int`, *optional*): The adapter's field: how many tokens of plain text are its instruction.
        tokenizer (`str`, *optional*): The name of a tokenizer, for messages.
        special_ids (`tuple[int]`): The ids of the model's special tokens.
        causal_lm (`bool`): Whether instruction and response stand in the same row.
        undeclared (`bool`): Whether the use of a causal stack is unknown. It counts as a causal model, unless the call has a label per
            row.
        pair_decoder (`bool`): Whether the stack is the decoder of an encoder-decoder model.
    """

    edits: bool = False
    template: list[int] | None = None
    end: list[int] | None = None
    missing_template: Literal["error", "all"] = "error"
    instruction_length: int | None = None
    tokenizer: str | None = None
    special_ids: tuple[int, ...] = ()
    causal_lm: bool = False
    undeclared: bool = False
    pair_decoder: bool = False

    @classmethod
    def of(cls, config: InstanceConfig, info: StackInfo | None = None, edits: bool = False) -> Rules:
        """The rules of an adapter.

        Args:
            config (`InstanceConfig`): Its config, with the template as token ids.
            info (`StackInfo`, *optional*): Facts about its stack. Defaults to those of a causal language model.
            edits (`bool`): Whether it edits the states of the instruction's tokens. Defaults to False.
        """
        template, end = config.response_template, config.response_end
        assert not (isinstance(template, str) or isinstance(end, str))  # attaching the adapter turned them into ids
        rules = cls(
            edits,
            template,
            end,
            config.missing_template,
            config.instruction_length,
            tokenizer=config.tokenizer_name_or_path or config.base_model_name_or_path,
            causal_lm=True,
        )
        if info is None:
            return rules
        return replace(
            rules,
            special_ids=info.special_ids,
            causal_lm=info.causal_lm or (info.undeclared and config.task_type == "CAUSAL_LM"),
            undeclared=info.undeclared and config.task_type is None,
            pair_decoder=info.decoder_of_pair,
        )


def from_mask(instruction_mask: torch.Tensor, tokens: torch.Tensor, prompt_length: int | None = None) -> torch.Tensor:
    """Rule 1.

    Args:
        instruction_mask (`torch.Tensor`): Shape (B, S), bool or 0/1.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        prompt_length (`int`, *optional*): In `generate`, P: the rows grow, and the mask may keep the shape (B, P).

    Returns:
        `torch.BoolTensor`: Shape (B, S).

    Raises:
        ValueError: The mask has a wrong shape, or a row without an instruction token.
    """
    (B, S), shape = tokens.shape, tuple(instruction_mask.shape)
    whole = prompt_length is not None and shape == (B, prompt_length)  # of a prompt that has grown, or comes in parts
    if shape != (B, S) and not whole:
        raise ValueError(f"`instruction_mask` must have the shape of the tokens, {(B, S)}, got {shape}.")
    mask = instruction_mask.to(tokens.device, torch.bool)[:, :S]
    mask = nn.functional.pad(mask, (0, S - mask.shape[1])) & tokens  # (B, S)
    if (empty := ~mask.any(dim=1) & tokens.any(dim=1)).any():  # a row of nothing but padding may be empty
        raise ValueError(
            f"`instruction_mask` is all false in row(s) {numbers(empty)}; mark at least one token of each that is not padding."
        )
    return mask


def check_no_gap(
    mask: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor | None, training: bool, shifted: bool
) -> None:
    """Refuse an instruction mask (B, S) with predicted tokens in a gap.

    Raises:
        ValueError: Between instruction tokens of a row stands a label that is not -100; or, in training without labels, any token.
    """
    later = mask.flip(1).cumsum(dim=1).flip(1) > 0  # (B, S), an instruction token follows
    gap = ~mask & tokens & later & (mask.cumsum(dim=1) > 0)  # (B, S)
    if labels is not None and labels.shape == mask.shape:
        gap = gap & asked_of(labels.to(mask.device), shifted)  # (B, S)
        what = "labels that are not -100 between their instruction tokens"
    elif training:
        what = "tokens between their instruction tokens, which are predicted in training"
    else:
        return
    if (rows := gap.any(dim=1)).any():
        raise ValueError(
            f"`instruction_mask` lets a response be predicted from a prompt that has read it: row(s) "
            f"{numbers(rows)} have {what}. Mark what stands before the first response only."
        )


def from_template(
    template: list[int],
    input_ids: torch.Tensor | None,
    tokens: torch.Tensor,
    missing: Literal["error", "all"] = "error",
    unlabelled: torch.Tensor | None = None,
    tokenizer: str | None = None,
) -> torch.Tensor:
    """Rule 2: all tokens up to the end of the first occurrence of `template` in each row, (B, S).

    Args:
        template (`list[int]`): The token ids to search for, k of them.
        input_ids (`torch.LongTensor`, *optional*): Shape (B, S).
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        missing (`str`): The scope of a row without the template. `"error"`, the default: none. `"all"`: its `unlabelled` tokens, or all of
            its tokens if there are none.
        unlabelled (`torch.BoolTensor`, *optional*): Shape (B, S). The tokens before the first label. Default: labels are not known.
        tokenizer (`str`, *optional*): The name of a tokenizer, for the message.

    Raises:
        ValueError: There are no `input_ids`; or, with `"error"`, a row with labels lacks the template. A row without labels may lack it:
            a maximum length has cut the conversation off before the answer, and nothing in the row is predicted.
    """
    if input_ids is None:
        raise ValueError(
            "`response_template` is searched for in `input_ids`, but the model got `inputs_embeds`; "
            "pass `instruction_mask`."
        )
    hit = ends_of(template, input_ids, tokens)  # (B, S)
    found = hit.any(dim=1, keepdim=True)  # (B, 1)
    allowed = found | found.new_full(found.shape, missing == "all")  # (B, 1)
    if unlabelled is not None:
        allowed = allowed | (unlabelled | ~tokens).all(dim=1, keepdim=True)  # (B, 1)
    if (rows := ~allowed[:, 0] & tokens.any(dim=1)).any():
        raise ValueError(without_template(template, input_ids, tokens, rows, tokenizer))
    scope = ((hit.cumsum(dim=1) == 0) | hit & (hit.cumsum(dim=1) == 1)) & tokens  # (B, S)
    unlabelled = scope if unlabelled is None else unlabelled
    return torch.where(found | ~unlabelled.any(dim=1, keepdim=True), scope, unlabelled)  # (B, S)


def check_no_response(scope: torch.Tensor, labels: torch.Tensor, shifted: bool) -> None:
    """Refuse rows that begin in a response: in their scope (B, S), a token without a label follows a token with one.

    Raises:
        ValueError: There is such a row.
    """
    asked = asked_of(labels, shifted)  # (B, S)
    later = (scope & ~asked).flip(1).cumsum(dim=1).flip(1) > 0  # (B, S), an instruction token without label follows
    if (rows := (scope & asked & later).any(dim=1)).any():
        raise ValueError(
            f"The tokens up to the first `response_template` in row(s) {numbers(rows)} begin with a response, "
            f"which would be predicted from a prompt that has read it. {WRAPPED}"
        )


def asked_of(labels: torch.Tensor, shifted: bool) -> torch.Tensor:
    """The tokens (B, S) that have a label. `shifted` labels (B, S) stand one column earlier."""
    return (labels != -100).roll(1, dims=1) if shifted else labels != -100


def before_labels(labels: torch.Tensor, tokens: torch.Tensor, shifted: bool) -> torch.Tensor:
    """The tokens (B, S) before the first label that is not -100. `shifted` labels stand one column earlier."""
    asked = labels != -100  # (B, S)
    start = torch.where(asked.any(dim=1), asked.long().argmax(dim=1) + int(shifted), tokens.shape[1])  # (B,)
    return (torch.arange(tokens.shape[1], device=tokens.device) < start[:, None]) & tokens  # (B, S)


def from_labels(
    labels: torch.Tensor,
    tokens: torch.Tensor,
    shifted: bool,
    input_ids: torch.Tensor | None = None,
    special_ids: tuple[int, ...] = (),
    packed: bool = False,
) -> torch.Tensor:
    """Rule 4: the tokens before the first label that is not -100, (B, S). `shifted` labels stand one column earlier.

    In a packed batch, the first token of each sequence never has a label, since no token before it can predict it. So the instruction of
    plain text is its first token there.

    Raises:
        ValueError: No token stands before the first label, or only `special_ids` do: a collator that masks padding also masks BOS if
            both are the same token.
    """
    asked, mask = labels != -100, before_labels(labels, tokens, shifted)  # (B, S) each
    # By what else a complaint must name: the tokens (B, S) of which an instruction has one at least.
    words = {"": tokens}
    if input_ids is not None and special_ids:
        special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device)).to(tokens.device)  # (B, S)
        alone = packed & (mask.sum(dim=1, keepdim=True) == 1)  # (B, 1)
        words[" but special ones"] = tokens & (~special | alone)  # (B, S)
    real = tokens.any(dim=1)  # (B,), a row of nothing but padding may be empty
    empty = {but: ~(mask & own).any(dim=1) & real for but, own in words.items()}  # (B,) each
    continued = asked.any(dim=1) & (mask.sum(dim=1) == 1)  # (B,)
    turns = asked.diff(dim=1).sum(dim=1) + asked[:, 0].long() > 2  # (B,)
    # The host waits for the device once.
    *bad, continued, turns = torch.stack([one.any() for one in (*empty.values(), continued, turns)]).tolist()
    for (but, rows), wrong in zip(empty.items(), bad):
        if wrong:
            whole = rows & (asked | ~words[but]).all(dim=1)  # (B,)
            some = bool((mask & words[but]).any())
            raise ValueError(all_scored(whole, but, some) if whole.any() else no_instruction(rows, but))
    if packed and continued and not _SAID["continuation"]:
        _SAID["continuation"] = True
        warnings.warn(
            "Packed sequences have labels from their second token on, as in plain text and in what `packing_strategy='bfd_split'` cuts "
            "off: their prompts are generated from their first token alone. For plain text, set `instruction_length`."
        )
    if turns and not _SAID["turns"]:
        _SAID["turns"] = True
        warnings.warn(
            "The rows have several labelled spans, as chats of several turns do: in training prompts are generated from the text before the "
            "first, in `generate` from earlier answers, too. With `response_template` (chats: 'chat') both read the text before the first "
            "answer."
        )
    return mask


# Which warnings were given: each is given once.
_SAID = {"turns": False, "plain": False, "continuation": False}


def _is_one_per_row(labels: torch.Tensor | None, tokens: torch.Tensor) -> bool:
    """Whether labels (B,) or (B, 1) ask for one answer per row of `tokens` (B, S): then no token is predicted."""
    B, S = tokens.shape
    return isinstance(labels, torch.Tensor) and labels.dim() > 0 and labels.numel() == len(labels) == B and S > 1


def find_scope(
    tokens: torch.Tensor,
    request: Request,
    rules: Rules | None = None,
    input_ids: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    training: bool = False,
    packed: bool = False,
) -> torch.Tensor:
    """Which tokens are the instance, by the rules at the head of this file.

    Args:
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        request (`Request`): The request, for these rows.
        rules (`Rules`, *optional*): Those of the rows' adapter. Defaults to `Rules()`.
        input_ids (`torch.LongTensor`, *optional*): Shape (B, S).
        prefix (`torch.BoolTensor`, *optional*): Shape (B, S). The prefix that the caller's mask gives to a prefix-LM.
        training (`bool`): Whether the model is in training mode. Defaults to False.
        packed (`bool`): Whether the rows are the sequences of a packed batch. Defaults to False.

    Returns:
        `torch.BoolTensor`: Shape (B, S).

    Raises:
        ValueError: The scope cannot be told, or mask, template or labels do not fit.
        TypeError: `instruction_mask` is not a tensor of bools or whole numbers.
    """
    rules = Rules() if rules is None else rules
    if rules.pair_decoder:
        return tokens & (tokens.cumsum(dim=1) == 1)  # (B, S)
    if rules.undeclared and not _is_one_per_row(request.labels, tokens):
        rules = replace(rules, causal_lm=True)
    if request.instruction_mask is not None:
        mask = from_mask(request.instruction_mask, tokens, request.prompt_length)  # (B, S)
        if rules.causal_lm and request.prompt_length is None and not rules.edits:
            check_no_gap(mask, tokens, request.labels, training, request.shifted)
        return mask
    # A text that may go on need not hold an answer yet: the first part of a prompt, or of a chat whose cache is kept.
    part = rules.edits and request.keeps_cache and request.prompt_length is None
    if request.second_text or part or (request.prompt_length or 0) > tokens.shape[1]:
        rules = replace(rules, missing_template="all")
    # Without a KV cache `generate` calls the stack with the tokens that it has generated, too.
    S = tokens.shape[1]
    P = S if request.prompt_length is None else min(S, request.prompt_length)
    input_ids, prefix = (given if given is None else given[:, :P] for given in (input_ids, prefix))  # (B, P) each
    scope = _by_rules(tokens[:, :P], request, rules, input_ids, prefix, training, packed)  # (B, P)
    return nn.functional.pad(scope, (0, S - P))  # (B, S)


def _by_rules(
    tokens: torch.Tensor,
    request: Request,
    rules: Rules,
    input_ids: torch.Tensor | None,
    prefix: torch.Tensor | None,
    training: bool,
    packed: bool,
) -> torch.Tensor:
    """Rules 2 to 6, for tokens (B, S) of which `generate` has generated none."""
    labels = request.labels if rules.causal_lm else None  # (B, S)
    labels = labels.to(tokens.device) if labels is not None and labels.shape == tokens.shape else None
    if rules.template is not None:
        before = None if labels is None else before_labels(labels, tokens, request.shifted)  # (B, S)
        scope = from_template(
            rules.template, input_ids, tokens, rules.missing_template, before, rules.tokenizer
        )  # (B, S)
        if rules.edits:
            assert input_ids is not None  # the template was searched for in them
            asked = None if labels is None else asked_of(labels, request.shifted)  # (B, S)
            return outside_answers(rules.template, rules.end, input_ids, tokens, scope, asked, rules.special_ids)
        if labels is not None:
            check_no_response(scope, labels, request.shifted)
        return scope
    if rules.instruction_length is not None:
        return from_length(rules.instruction_length, tokens)
    if request.prompt_length is not None:
        return tokens
    if labels is not None:
        return from_labels(labels, tokens, request.shifted, input_ids, rules.special_ids, packed)
    if rules.causal_lm and prefix is not None:
        return prefix
    if rules.causal_lm and training and rules.undeclared:
        raise ValueError(UNDECLARED)
    if rules.causal_lm and training:
        raise ValueError(
            "A causal language model in training mode cannot tell instruction from response without `labels`. Pass "
            "`instruction_mask`, or set it around the call with `instruction_scope(mask)`; where neither can be done, give the "
            "config a `response_template`."
        )
    if rules.causal_lm and not request.last_only and not _SAID["plain"] and len(tokens) > 1:
        _SAID["plain"] = True
        what = (
            "the states of whole rows are edited, and in generation those of responses are not"
            if rules.edits
            else "prompts are generated from whole rows. If responses in them are scored, the prompt has read them"
        )
        warnings.warn(
            f"A causal {'stack' if rules.undeclared else 'language model'} got several rows and was not told which of their tokens are "
            f"the instruction: {what}: set `response_template`, or pass `instruction_mask`."
        )
    return tokens
