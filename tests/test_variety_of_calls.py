# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Calls of `forward` and `generate` as users write them, against the same call with keywords: arguments by position, empty lists,
tuples as outputs, modules around the model, tools after other features."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel
from tiny import PAIRS, adapted, assert_same, batch, causal_lm, encoder, pair, perturb, vlm
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from peft_instance_prompt import instance_report


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TASKS = ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"]


def prompted(method: str, task: str = "CAUSAL_LM") -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model of a task, and a padded batch with labels for it."""
    inputs = batch(9, 6, side="left" if task == "CAUSAL_LM" else "right")
    if task == "CAUSAL_LM":
        base = causal_lm()
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(9) < 6, -100)
    elif task == "SEQ_2_SEQ_LM":
        base = pair()
        inputs["decoder_input_ids"] = batch(4, 4, seed=3)["input_ids"]
    else:
        base = encoder(auto=tf.AutoModelForSequenceClassification if task == "SEQ_CLS" else tf.AutoModel)
        inputs["token_type_ids"] = (torch.arange(9) > 3).long().repeat(2, 1)
        if task == "SEQ_CLS":
            inputs["labels"] = torch.tensor([1, 0])
    return adapted(base, METHODS[method](task_type=task)), inputs


def results(output: Any) -> list[torch.Tensor]:
    """The tensors of an output: loss and logits, or states."""
    names = ("loss", "logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state")
    return [output[name] for name in names if output.get(name) is not None]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def defaults_of(method: Callable) -> dict[str, Any]:
    """The parameters that a method takes by position, with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}


def in_order(defaults: dict[str, Any], call: dict[str, Any], count: int) -> tuple[list[Any], dict[str, Any]]:
    """The call with its first `count` parameters by position, and the rest by keyword."""
    first = list(defaults)[:count]
    return [call.get(name, defaults[name]) for name in first], {n: v for n, v in call.items() if n not in first}


# ------------------------------------------------------------------------------------------------ arguments by position


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_each_parameter_of_forward_by_position(kind: str, task: str) -> None:
    """Of PEFT's model and of the base model: the first n parameters by position, for each n."""
    model, inputs = prompted(kind, task)
    base = model.get_base_model()
    own = {"instruction_mask": inputs["attention_mask"] * (torch.arange(9) < 5)}
    for callee in (model, base):
        names, call = defaults_of(callee.forward), {**inputs, **own}
        assert {"input_ids", "attention_mask", "inputs_embeds"} <= names.keys()
        expected = results(callee(**call))
        for count in range(1, len(names) + 1):
            args, kwargs = in_order(names, call, count)
            assert_equal(results(callee(*args, **kwargs)), expected)
    with model.disable_adapter():
        assert not torch.equal(results(base(**inputs))[-1], expected[-1])


@pytest.mark.parametrize("family", ["llama", "bert", *PAIRS])
@torch.no_grad()
def test_each_parameter_of_the_stack_by_position(kind: str, family: str) -> None:
    if family == "llama":
        model, inputs = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")), batch(9, 6)
        stack = model.get_base_model().model
    elif family == "bert":
        model, inputs = adapted(encoder(), METHODS[kind]()), batch(9, 6, side="right")
        stack = model.get_base_model()
    else:
        model = adapted(pair(family), METHODS[kind](task_type="SEQ_2_SEQ_LM"))
        inputs, stack = batch(9, 6, side="right"), model.get_base_model().get_encoder()
    names = defaults_of(stack.forward)
    expected = results(stack(**inputs))
    for count in range(1, len(names) + 1):
        args, kwargs = in_order(names, inputs, count)
        assert_equal(results(stack(*args, **kwargs)), expected)
    ids = inputs["input_ids"]
    for call in (lambda: stack(ids, input_ids=ids + 1), lambda: stack(*[None] * len(names), ids)):
        with pytest.raises(TypeError, match=r"multiple values for argument 'input_ids'|positional arguments"):
            call()
    assert_equal(results(stack(**inputs)), expected)


class Forbid(LogitsProcessor):
    """Forbids the token that is written twice in a row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class After(StoppingCriteria):
    """Stops after some tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 13)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


@pytest.mark.parametrize("own", [False, True])
def test_each_parameter_of_generate_by_position(kind: str, own: bool) -> None:
    """Of PEFT's model and of the base model, alone and beside our own arguments."""
    model, inputs = prompted(kind)[0], batch(9)
    config = GenerationConfig(**GREEDY, guidance_scale=1.5, pad_token_id=0)
    unlike = batch(12, seed=3)
    call = {
        "inputs": inputs["input_ids"],
        "generation_config": config,
        "logits_processor": LogitsProcessorList([Forbid()]),
        "stopping_criteria": StoppingCriteriaList([After()]),
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(3, 90)),
        "synced_gpus": False,
        "streamer": None,
        "negative_prompt_ids": unlike["input_ids"],
        "negative_prompt_attention_mask": unlike["attention_mask"],
    }
    ours = {"instruction_mask": torch.arange(9)[None] < 5} if own else {}
    for callee in (model, model.get_base_model()):
        names = defaults_of(model.get_base_model().generate)
        assert list(names)[:2] == ["inputs", "generation_config"] and names.keys() >= call.keys()
        named = {"input_ids" if name == "inputs" else name: value for name, value in call.items()}
        expected = callee.generate(**named, **ours, attention_mask=inputs["attention_mask"])
        assert expected.shape == (1, 13)
        for count in range(len(names) + 1):
            streamer = Collector()
            args, kwargs = in_order(names, {**call, "streamer": streamer}, count)
            found = callee.generate(*args, **kwargs, **ours, attention_mask=inputs["attention_mask"])
            assert torch.equal(found, expected), count
            assert streamer.tokens == expected[0].tolist()
        for use_cache in (True, False):
            config.use_cache = use_cache
            assert torch.equal(callee.generate(*in_order(names, call, len(names))[0], **ours), expected)
        config.use_cache = True


def test_assistant_by_position(kind: str) -> None:
    model, inputs = prompted(kind)[0], batch(9)
    config = GenerationConfig(**GREEDY, pad_token_id=0)
    expected = model.generate(**inputs, generation_config=config)
    assistant = causal_lm(seed=1)
    assert torch.equal(model.generate(inputs["input_ids"], config, None, None, None, None, assistant), expected)


def test_config_is_not_taken_for_the_input(kind: str) -> None:
    model, inputs = prompted(kind)[0], batch(9, 6)
    config, mask = GenerationConfig(**GREEDY, pad_token_id=0), inputs["attention_mask"]
    ours = {"instruction_mask": mask * (torch.arange(9) < 6)}
    expected = model.generate(**inputs, **ours, generation_config=config)
    ids = inputs["input_ids"]
    for callee in (model, model.get_base_model()):
        for use_cache in (True, False):
            config.use_cache = use_cache
            how = {**ours, "attention_mask": mask}
            assert torch.equal(callee.generate(None, config, input_ids=ids, **how), expected)
            assert torch.equal(callee.generate(inputs=ids, generation_config=config, **how), expected)
            assert torch.equal(callee.generate(ids, config, input_ids=None, inputs_embeds=None, **how), expected)
    with pytest.raises(ValueError, match=r"`instruction_mask` must have 2 row\(s\), as the input has; got \(1, 9\)"):
        model.generate(None, config, input_ids=ids, instruction_mask=torch.ones(1, 9))
    with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
        model.generate(ids, config, generation_config=config)


@pytest.mark.parametrize("where", ["position", "keyword", "argument", "model"])
@pytest.mark.parametrize("callee", ["peft", "tuner", "base"])
@pytest.mark.slots
def test_chunked_prefill_is_refused_wherever_it_is_said(kind: str, where: str, callee: str) -> None:
    model, inputs = prompted(kind)[0], batch(9)
    called = {"peft": model, "tuner": model.base_model, "base": model.get_base_model()}[callee]
    config, ids = GenerationConfig(**GREEDY, prefill_chunk_size=4), inputs["input_ids"]
    call: dict[str, Callable[[], torch.Tensor]] = {
        "position": lambda: called.generate(ids, config, instruction_mask=inputs["attention_mask"]),
        "keyword": lambda: called.generate(ids, generation_config=config),
        "argument": lambda: called.generate(ids, prefill_chunk_size=4, **GREEDY),
        "model": lambda: called.generate(ids, **GREEDY),
    }
    if where == "model":
        model.generation_config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match=r"`prefill_chunk_size`: .* Set it to None, got 4\."):
        call[where]()
    expected = prompted(kind)[0].generate(**inputs, **GREEDY)
    assert torch.equal(called.generate(ids, prefill_chunk_size=None, **GREEDY), expected), "the cure"


def test_task_ids_by_position() -> None:
    """PEFT's forward has a place for them."""
    tasks = torch.tensor([2, 0])
    for task in ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"):
        _, inputs = prompted("iapt", task)
        inputs.pop("token_type_ids", None)
        base = {"CAUSAL_LM": causal_lm, "SEQ_2_SEQ_LM": pair}.get(
            task, lambda: encoder(auto=tf.AutoModelForSequenceClassification)
        )()
        fields = {"num_tasks": 3, "position": "task", "init_weights": "paper"}
        model = adapted(base, METHODS["dynamic_prompt"](task_type=task, **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "logits" in name:
                    parameter.copy_(torch.randn_like(parameter) * 5)
            names = defaults_of(model.forward)
            call = {**inputs, "task_ids": tasks}
            args, kwargs = in_order(names, call, list(names).index("task_ids") + 1)
            expected = results(model(**call))
            assert_equal(results(model(*args, **kwargs)), expected)
            other = results(model(**{**call, "task_ids": tasks.flip(0)}))
            assert not torch.equal(other[-1], expected[-1])
            with pytest.raises(ValueError, match="needs `task_ids`"):
                model(*args[:-1], **kwargs)
            with pytest.raises(TypeError, match="multiple values for argument 'task_ids'"):
                model(*args, **kwargs, task_ids=tasks)


# ------------------------------------------------------------------------------------------------------- empty lists


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_no_adapter_names(kind: str, task: str) -> None:
    model, inputs = prompted(kind, task)
    expected = results(model(**inputs))
    for names in ([], ()):
        with pytest.raises(ValueError, match=r"`adapter_names` must name an adapter for each of the 2 rows, got 0\."):
            model(**inputs, adapter_names=names)
        if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            with pytest.raises(ValueError, match=r"`adapter_names` must name .* each of the 2 rows, got 0\."):
                model.generate(input_ids=inputs["input_ids"], adapter_names=names, **GREEDY)
    assert_equal(results(model(**inputs)), expected)


def test_empty_lists_of_generate(kind: str) -> None:
    model, inputs = prompted(kind)[0], batch(9, 6)
    expected = model.generate(**inputs, **GREEDY)
    nothing = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()}
    assert torch.equal(model.generate(**inputs, **GREEDY, **nothing), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, stopping_criteria=[], logits_processor=[]), expected)


# ----------------------------------------------------------------------------------------------------- tuples, wrappers


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_tuples(kind: str, task: str) -> None:
    model, inputs = prompted(kind, task)
    for callee in (model, model.get_base_model()):
        output = callee(**inputs)
        args, kwargs = in_order({"input_ids": None}, inputs, 1)
        for found in (callee(**inputs, return_dict=False), callee(*args, **kwargs, return_dict=False)):
            assert isinstance(found, tuple)
            tensors = [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]
            assert_equal([value for value in found if isinstance(value, torch.Tensor)], tensors)
            assert len(found) == len(output.to_tuple())


class Around(nn.Module):
    """A module that hands its arguments on, as wrappers of users do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_module_around_the_model(kind: str, task: str) -> None:
    model, inputs = prompted(kind, task)
    mask = inputs["attention_mask"] * (torch.arange(9) < 5)
    expected = [results(model(**inputs)), results(model(**inputs, instruction_mask=mask))]
    ids, rest = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
    for wrapped in (Around(model), Around(Around(model.get_base_model()))):
        assert_equal(results(wrapped(**inputs)), expected[0])
        assert_equal(results(wrapped(ids, **rest)), expected[0])
        assert_equal(results(wrapped(ids, instruction_mask=mask, **rest)), expected[1])
        assert_equal(results(wrapped.inner.forward(ids, **rest)), expected[0])


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_generate_of_each_object(kind: str, task: str) -> None:
    model, inputs = prompted(kind, task)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, **GREEDY)
    positional = {"attention_mask": inputs["attention_mask"], **GREEDY}
    for callee in (model, model.base_model, model.get_base_model()):
        assert torch.equal(callee.generate(**inputs, **GREEDY), expected)
        if callee is not model or task == "CAUSAL_LM":  # PEFT's own for pairs takes keywords only
            assert torch.equal(callee.generate(inputs["input_ids"], **positional), expected)
    with model.disable_adapter():
        bare = model.generate(**inputs, **GREEDY)
    assert not torch.equal(bare, expected)


# ------------------------------------------------------------------------------------- a tool after another feature


@pytest.mark.parametrize("task", ["CAUSAL_LM", "TOKEN_CLS"])
@pytest.mark.slots
def test_report_after_calls_of_other_kinds(kind: str, task: str) -> None:
    """Calls of several adapters, of `generate` and without adapter leave nothing that a report would count."""
    if task == "TOKEN_CLS":
        model = adapted(encoder(auto=tf.AutoModelForTokenClassification), METHODS[kind](task_type=task))
        inputs = batch(9, 6, 8, 7, side="right")
    else:
        model, inputs = prompted(kind)[0], batch(9, 6, 8, 7)
    labels = (inputs["input_ids"] % 2 if task == "TOKEN_CLS" else inputs["input_ids"]).clone()
    examples = {**inputs, "labels": labels.masked_fill(torch.arange(9) < 6, -100)}
    data = [{name: value[row] for name, value in examples.items()} for row in range(4)]
    expected = instance_report(model, data, batch_size=4, resamples=20).to_json()
    model.add_adapter("b", METHODS[kind](task_type=task))
    perturb(model, seed=5, adapter="b").eval()
    with torch.no_grad():
        model(**inputs, adapter_names=["default", "b", "__base__", "b"])
        if task == "CAUSAL_LM":
            model.generate(**inputs, **GREEDY, adapter_names=["b", "default", "b", "__base__"])
            with pytest.raises(ValueError, match="adapter_names"):
                model(**inputs, adapter_names=[])
        with model.disable_adapter():
            model(**inputs)
    assert instance_report(model, data, batch_size=4, resamples=20).to_json() == expected


# ------------------------------------------------------------------------------- a vision-language model's plain pass


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3_vlm"])
@pytest.mark.parametrize("where", ["call", "generate", "wrapper", "positional"])
@torch.no_grad()
def test_vlm_that_reads_the_plain_pass(family: str, where: str) -> None:
    """However it is called, the prompts are made from the states that the bare model has of text and image."""
    base, inputs = vlm(family)
    names = defaults_of(base.forward)
    plain = base.model(**inputs).last_hidden_state  # (B, S, d)
    seen: list[torch.Tensor] = []
    model = adapted(base, METHODS["idpg"](task_type="CAUSAL_LM", instance_source="frozen"))
    (generator,) = (m for n, m in model.named_modules() if n.endswith("idpg_generator.default"))
    encode = generator.encode

    def look(source: Any) -> torch.Tensor:
        seen.append(source.frozen_states())
        return encode(source)

    generator.encode = look
    expected = model(**inputs).logits
    if where == "generate":
        model.generate(**inputs, **GREEDY)
    elif where == "wrapper":
        assert torch.equal(Around(model)(**inputs).logits, expected)
    elif where == "positional":
        args, kwargs = in_order(names, inputs, 2)
        assert torch.equal(model.get_base_model()(*args, **kwargs).logits, expected)
    assert len(seen) == (1 if where == "call" else 2)
    for states in seen:
        assert_same(states, plain)
