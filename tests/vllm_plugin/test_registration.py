# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A real engine with adapters: each answer is that of transformers with the adapter alone."""

from __future__ import annotations

import shutil

import pytest
from served import BASE, CHAT, CHATS, CONFIGS, NEW_TOKENS

from peft_instance_prompt.vllm import front_calls, points, registration, worker


pytestmark = pytest.mark.slow
NAMES = [BASE, CHAT, *CONFIGS]
LONG = 2  # the prompt that is longer than two blocks of the cache


@pytest.fixture
def plans(monkeypatch):
    """The plans of the steps that run in the test."""
    made = []
    make = worker.make_plan

    def record(*args):
        plan = make(*args)
        made.append(plan.rows)
        return plan

    monkeypatch.setattr(worker, "make_plan", record)
    return made


def test_all_adapters_in_one_batch(engine, served, plans) -> None:
    for name in CONFIGS:
        plain = served.answers[CHAT if name in CHATS else BASE]
        assert served.answers[name] != plain, f"{name} changes nothing, so that nothing would be tested"
    assert engine.llm.llm_engine.vllm_config.lora_config is None
    assert engine.answers(NAMES) == served.answers_of(NAMES)
    together = [[len(rows.group.generators) for rows in plan] for plan in plans if len(plan) > 1]
    # `iapt` and `iapt_too` differ in their weights only; `iapt_end` and `iapt_template`, and PreFT's two, in their template, too.
    assert sorted(max(together, key=len), reverse=True)[:4] == [2, 2, 2, 1]
    # None of it in a step that decodes.
    assert plans[-1] == [] and len(plans) >= NEW_TOKENS


def test_prefix_cache_is_shared_by_equal_instructions_of_one_adapter_only(engine, served) -> None:
    """`iapt_end` has slots behind the text, and `ipt` more slots than a block has tokens, before it."""
    names = ["iapt", "iapt_too", BASE, "iapt_end", "ipt"]
    engine.llm.reset_prefix_cache()
    prompt = served.prompts["iapt"][LONG]
    cached = []
    for _ in range(2):
        for name in names:
            (output,) = engine.ask([prompt], [engine.named(name)])
            assert list(output.outputs[0].token_ids) == served.answers[name][LONG], name
            cached.append(output.num_cached_tokens)
    assert cached[:5] == [0] * 5
    assert all(number >= 32 for number in cached[5:8]) and cached[8:] == [0, 32]


def test_other_instruction_does_not_get_the_cached_blocks(engine, served) -> None:
    """Both prompts begin alike, longer than a block, and their slots stand before what differs."""
    long = served.prompts["iapt"][LONG]
    other = [*long[:-8], *served.prompts["iapt"][0]]
    named = engine.named("iapt")
    engine.llm.reset_prefix_cache()
    (alone,) = engine.ask([other], [named])
    engine.llm.reset_prefix_cache()
    engine.ask([long], [named])
    (after,) = engine.ask([other], [named])
    assert after.num_cached_tokens == 0
    assert after.outputs[0].token_ids == alone.outputs[0].token_ids


def test_new_weights_under_an_old_name_do_not_get_its_blocks(engine, served, tmp_path) -> None:
    from vllm.lora.request import LoRARequest

    named, prompt = LoRARequest("swapped", 400, str(tmp_path / "swapped")), served.prompts["iapt"][LONG]
    for name in ("iapt", "iapt_too"):
        shutil.copytree(served.folders[name], tmp_path / "swapped", dirs_exist_ok=True)
        (output,) = engine.ask([prompt], [named])
        assert list(output.outputs[0].token_ids) == served.answers[name][LONG]
        assert engine.llm.llm_engine.remove_lora(400)


def test_several_samples_of_a_request(engine, served) -> None:
    (output,) = engine.ask([served.prompts["idpg"][0]], [engine.named("idpg")], n=2, temperature=1e-6)
    assert [list(o.token_ids) for o in output.outputs] == [served.answers["idpg"][0]] * 2


def store_of(engine):
    """The adapters of the engine's only worker."""
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.instance_prompts


def test_mismatch_fails_the_request_and_nothing_else(engine, served) -> None:
    """An adapter that a worker has lost: no answer leaves without its prompt, and none of its blocks stays in the prefix cache. The second
    request takes the first one's blocks from there in the same step."""
    engine.answers([BASE, "iapt"])
    engine.llm.reset_prefix_cache()
    store, prompt = store_of(engine), served.prompts["iapt"][LONG]
    key = (
        front_calls.front_end(engine.llm.llm_engine.vllm_config)
        .residents[engine.named("iapt").lora_int_id]
        .adapter.key
    )
    lost = store.generators.pop(key)
    names = ["iapt", "iapt", BASE, "iapt_too"]
    outputs = engine.ask([prompt] * 4, [engine.named(name) for name in names])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error", "length", "length"]
    assert [list(output.outputs[0].token_ids) for output in outputs[:2]] == [[], []]
    for name, output in list(zip(names, outputs))[2:]:
        assert list(output.outputs[0].token_ids) == served.answers[name][LONG]
    store.generators[key] = lost
    (output,) = engine.ask([prompt], [engine.named("iapt")])
    assert output.num_cached_tokens == 0
    assert list(output.outputs[0].token_ids) == served.answers["iapt"][LONG]


def test_vectors_that_are_not_written_fail_the_request(engine, served) -> None:
    """As if a graph had been replayed, which runs no hook."""
    engine.answers(["iapt"])
    writer = store_of(engine).writer
    hooks = {handle.id: handle.hooks_dict_ref().pop(handle.id) for handle in writer._handles[3:]}
    try:
        (output,) = engine.ask([served.prompts["iapt"][0]], [engine.named("iapt")])
        assert output.outputs[0].finish_reason == "error"
    finally:
        for handle in writer._handles[3:]:
            handle.hooks_dict_ref()[handle.id] = hooks[handle.id]
    assert engine.answers(["iapt"]) == served.answers_of(["iapt"])


def test_unloaded_while_requests_wait(engine, served) -> None:
    from vllm import SamplingParams

    llm, named = engine.llm.llm_engine, engine.named("iapt_first")
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    for number, ids in enumerate(served.prompts["iapt_first"]):
        llm.add_request(f"waits-{number}", {"prompt_token_ids": ids}, params, lora_request=named)
    store, front = store_of(engine), front_calls.front_end(llm.vllm_config)
    key = front.residents[named.lora_int_id].adapter.key
    assert llm.remove_lora(named.lora_int_id) and named.lora_int_id not in llm.list_loras()
    assert key in store.generators
    found = {}
    while llm.has_unfinished_requests():
        found.update({out.request_id: list(out.outputs[0].token_ids) for out in llm.step()})
    assert [found[f"waits-{number}"] for number in range(len(found))] == served.answers["iapt_first"]
    assert not llm.remove_lora(named.lora_int_id)
    engine.answers(["iapt"])
    assert llm.add_lora(engine.named("iapt_too"))  # adding and removing drop what is not used any more
    assert key not in store.generators
    assert engine.answers(["iapt_first"]) == served.answers_of(["iapt_first"])  # asked for, and loaded again


def test_one_folder_under_two_names(engine, served) -> None:
    from vllm.lora.request import LoRARequest

    twin = LoRARequest("twin", 100, str(served.folders["idpg"]))
    prompts = served.prompts["idpg"]
    outputs = engine.ask(prompts, [twin] * len(prompts))
    assert [list(out.outputs[0].token_ids) for out in outputs] == served.answers["idpg"]
    engine.answers(["idpg"])
    assert engine.llm.llm_engine.remove_lora(100)
    assert engine.answers(["idpg"]) == served.answers_of(["idpg"])


def test_registering_again_changes_nothing(engine) -> None:
    found = [points.find(where) for table in (points.DOORS, points.FRONT) for where, _ in table.values()]
    before = [getattr(owner, name) for owner, name in found]
    registration.register()
    points.extend(front_calls.FUNCTIONS, points.FRONT)
    assert [getattr(owner, name) for owner, name in found] == before
