# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The front end: where slots stand, what is edited, and what is refused. After each refusal the engine answers as before."""

from __future__ import annotations

import shutil

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from served import BASE, LORA, OTHERS

from peft_instance_prompt import IAPTConfig, IPTConfig, PreFTConfig
from peft_instance_prompt.vllm.adapters import describe_base, read_adapter
from peft_instance_prompt.vllm.places import place, widen


@pytest.mark.parametrize(
    "fields, ids, num_read, slots",
    [
        ({"prompt_position": "before"}, [5, 6, 7], 3, [0, 1, 2, 3]),
        ({"prompt_position": "after_first"}, [5, 6, 7], 3, [1, 2, 3, 4]),
        ({}, [5, 6, 7], 3, [3, 4, 5, 6]),
        ({"response_template": [8, 9], "prompt_position": "before"}, [5, 8, 9, 7], 3, [0, 1, 2, 3]),
        ({"response_template": [8, 9]}, [5, 8, 9, 7, 8, 9], 3, [3, 4, 5, 6]),
        ({"instruction_length": 2, "prompt_position": "end"}, [5, 6, 7], 2, [2, 3, 4, 5]),
        ({"separator_id": 9, "prompt_position": "before_separator"}, [9, 5, 9, 7], 4, [2, 3, 4, 5]),
        ({"separator_id": 9, "prompt_position": "after_separator"}, [9, 5, 9, 7], 4, [3, 4, 5, 6]),
    ],
)
def test_places(fields, ids, num_read, slots, tmp_path) -> None:
    placed = place(adapter(IAPTConfig(bottleneck_dim=8, **fields), tmp_path), ids, None)
    assert (placed.num_read, placed.slots, placed.vectors) == (num_read, slots, [0, 1, 2, 3])
    wide = widen(ids, slots)
    assert [wide[at] for at in range(len(wide)) if at not in slots] == ids
    assert all(wide[at] == ids[0] for at in slots)


def test_only_as_many_slots_as_are_used(tmp_path) -> None:
    placed = place(adapter(IPTConfig(num_virtual_tokens=4, table_rank=4), tmp_path), [5, 6], None)
    assert (placed.slots, placed.vectors) == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    "fields, ids, wanted",
    [
        ({}, [5, 6, 7], [[0, 3]]),
        ({"instruction_length": 2}, [5, 6, 7], [[0, 2]]),
        ({"response_template": [8, 9]}, [5, 8, 9], [[0, 3]]),
        ({"response_template": [8, 9]}, [5, 8, 9, 6, 7], [[0, 3]]),
        ({"response_template": [8, 9], "response_end": [4]}, [5, 8, 9, 6, 4, 7, 8, 9, 6], [[0, 3], [5, 8]]),
        ({"response_template": [8, 9], "missing_template": "all"}, [5, 6, 7], [[0, 3]]),
    ],
)
def test_edits(fields, ids, wanted, tmp_path) -> None:
    assert place(adapter(PreFTConfig(r=4, **fields), tmp_path), ids, None).ranges == wanted


def test_prompts_without_what_is_edited_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not occur"):
        place(adapter(PreFTConfig(r=4, response_template=[8, 9]), tmp_path), [5, 6], None)


def adapter(config, folder):
    config.task_type = "CAUSAL_LM"
    tiny.adapted(tiny.causal_lm(), config).save_pretrained(folder)
    return read_adapter(folder, describe_base(tiny.configure("llama")))


# ------------------------------------------------------------------------------------------------------ a real engine


@pytest.fixture
def alive(engine, served):
    """The engine, which is asked after the test whether it still answers."""
    yield engine
    assert engine.answers([BASE, "iapt"]) == served.answers_of([BASE, "iapt"])


def refused(words: str):
    from vllm.exceptions import VLLMValidationError

    return pytest.raises(VLLMValidationError, match=words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "params, words",
    [({"prompt_logprobs": 1}, "prompt_logprobs"), ({"extra_args": {"instance_prompt": {}}}, "set by the server")],
)
def test_parameters(alive, served, params, words) -> None:
    with refused(words):
        alive.ask([served.prompts["iapt"][0]], [alive.named("iapt")], **params)


@pytest.mark.slow
def test_forged_slots_without_an_adapter(alive, served) -> None:
    with refused("set by the server"):
        alive.ask([served.prompts[BASE][0]], [None], extra_args={"instance_prompt": {"key": "x"}})


@pytest.mark.slow
def test_prompts(alive, served) -> None:
    long = (served.prompts["iapt"][2] * 20)[:252]
    with refused("252 tokens and needs 4 slots.*256"):
        alive.ask([long], [alive.named("iapt")])
    with refused("does not occur"):
        alive.ask([served.prompts["iapt"][0]], [alive.named("iapt_template")])
    (output,) = alive.ask([long[:248]], [alive.named("iapt")], max_tokens=20, min_tokens=0, ignore_eos=True)
    assert len(output.outputs[0].token_ids) == 256 - 252


@pytest.mark.slow
def test_beam_search(alive, served) -> None:
    from vllm.sampling_params import BeamSearchParams

    with refused("Beam search"):
        alive.llm.beam_search(
            [{"prompt_token_ids": served.prompts["iapt"][0]}],
            BeamSearchParams(beam_width=2, max_tokens=2),
            lora_request=alive.named("iapt"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name != LORA])
def test_methods_that_need_more_than_the_tokens(alive, served, name) -> None:
    with refused("cannot be served"):
        alive.ask([served.prompts[BASE][0]], [alive.named(name)])


@pytest.mark.slow
def test_folders(alive, served, tmp_path) -> None:
    from vllm.lora.request import LoRARequest

    adapter(IAPTConfig(bottleneck_dim=8), tmp_path / "tiny")
    lora = get_peft_model(tiny.causal_lm(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    shutil.copytree(served.folders["iapt"], tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"broken")
    for name, words in (
        ("tiny", "made for a base model with `hidden_size` 32"),
        ("lora", "holds a LORA adapter"),
        ("broken", "not a readable safetensors file"),
        ("missing", "There is no adapter folder"),
    ):
        with refused(words):
            alive.ask([served.prompts[BASE][0]], [LoRARequest(name, 200, str(tmp_path / name))])
    with refused("has the number 1"):
        alive.answers(["iapt"])
        alive.ask([served.prompts[BASE][0]], [LoRARequest("other", 1, str(served.folders["idpg"]))])
