# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A real engine with adapters that edit tokens, and some with slots: in chunks, in chats whose blocks are cached, and preempted.

Slots stand behind the instruction, where IAPT has them by default, or are more than the first block of a small kernel holds.

The model is small and random. Steps have 64 tokens and the KV cache 13 blocks of 32, so that prompts are cut and blocks are evicted.
"""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from peft import get_peft_model
from served import BASE, Engine, Served, scored, watch_chunks

from peft_instance_prompt import IAPTConfig, PreFTConfig


pytestmark = pytest.mark.slow

BLOCK, LONG = 32, 40  # tokens of a block, and of a long answer
END, TEMPLATE = 4, [5, 6]
CONFIGS = {
    "whole": lambda: PreFTConfig(r=8),
    "whole_too": lambda: PreFTConfig(r=8),
    "some": lambda: PreFTConfig(r=4, layers_to_transform=[1], instruction_length=20),
    "chat": lambda: PreFTConfig(r=8, response_template=TEMPLATE, response_end=[END]),
    "iapt": lambda: IAPTConfig(bottleneck_dim=8),
    "iapt_chat": lambda: IAPTConfig(bottleneck_dim=8, response_template=TEMPLATE),
    "iapt_many": lambda: IAPTConfig(
        bottleneck_dim=8, response_template=TEMPLATE, prompt_position="before", num_virtual_tokens=20
    ),
}
SLOTS = 4  # of IAPT, unless there are many
LENGTHS = {"iapt": (5, 20, 50), "iapt_chat": (5, 20, 50), "iapt_many": (5, 20, 40)}  # which must fit into a step


def tokens(number: int, seed: int) -> list[int]:
    """Words of a text: none ends an answer or belongs to the template."""
    return tiny.batch(number, seed=seed, tokens=(10, tiny.VOCAB))["input_ids"][0].tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The adapters in transformers by name, and what is served."""
    folder = tmp_path_factory.mktemp("edits")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    changes = {**sizes, "head_dim": 32, "eos_token_id": None, "max_position_embeddings": 256}
    base = tiny.causal_lm(**changes).float()
    base.save_pretrained(folder / "base")
    made, adapted = Served(folder / "base"), {BASE: base}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        config = config()
        config.task_type = "CAUSAL_LM"
        adapted[name] = tiny.perturb(get_peft_model(tiny.causal_lm(**changes).float(), config), seed).eval()
        adapted[name].save_pretrained(folder / name)
        made.folders[name] = folder / name
    for name, model in adapted.items():
        prompts = [tokens(n, seed) for seed, n in enumerate(LENGTHS.get(name, (5, 50, 150)))]
        made.prompts[name] = [[*ids, *TEMPLATE] for ids in prompts]
        made.answers[name], made.firsts[name] = scored(model, made.prompts[name])
    return adapted, made


@pytest.fixture(scope="module")
def engine(models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        small = {"block_size": BLOCK, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 64, "max_num_seqs": 16}
        yield Engine(models[1], enforce_eager=True, skip_tokenizer_init=True, **small)


def scheduler_of(engine: Engine):
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def ask(engine: Engine, name: str, ids: list[int], **params):
    """The output of one request, with the largest log-probabilities of each token."""
    (output,) = engine.ask(
        [ids], [engine.named(name)], **{"max_tokens": LONG, "min_tokens": LONG, "logprobs": 20, **params}
    )
    return output


@torch.no_grad()
def difference(output, prompt: list[int], model: torch.nn.Module) -> float:
    """How far the log-probabilities of an output's first token are from those of transformers for the whole prompt."""
    ids = torch.tensor([prompt])  # (1, S)
    kept = {"return_dict_in_generate": True, "output_logits": True}
    logits = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **kept
    )
    wanted = logits.logits[0][0].log_softmax(-1)  # (V,)
    return max(abs(float(wanted[token]) - one.logprob) for token, one in output.outputs[0].logprobs[0].items())


def answer(output) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_answers_are_those_of_transformers(engine, models) -> None:
    served, names = models[1], [BASE, *CONFIGS]
    chunks = watch_chunks(engine)
    assert engine.answers(names) == served.answers_of(names)
    assert chunks["cut"] > 0 and chunks["held"] > 0
    differences = engine.first_differences(names)
    print(differences)
    assert max(differences.values()) < 1e-4
    assert all(served.answers[name] != served.answers[BASE] for name in CONFIGS)


@pytest.fixture
def offers(engine, monkeypatch):
    """What the prefix cache offers each request: how many tokens, in which blocks, and whether it was preempted."""
    manager, seen = scheduler_of(engine).kv_cache_manager, []
    look_up = manager.get_computed_blocks

    def watched(request, *args):
        blocks, number, *rest = look_up(request, *args)
        seen.append((number, blocks.get_block_ids()[0], request.num_preemptions > 0))
        return blocks, number, *rest

    monkeypatch.setattr(manager, "get_computed_blocks", watched)
    return seen


@pytest.mark.parametrize("name, first", [("chat", 11), ("iapt_chat", 11), ("iapt_chat", 45), ("iapt_many", 11)])
def test_chat_of_three_turns_goes_on_from_its_blocks(engine, models, name, first) -> None:
    """Those of generated tokens among them, whose hashes were made token by token. The slots are in the first block or the second."""
    history: list[int] = []
    words = {"logit_bias": {token: -100.0 for token in (END, *TEMPLATE)}}
    computed = 0
    for turn in range(3):
        prompt = [*history, *tokens(11 if turn else first, seed=turn), *TEMPLATE]
        found = ask(engine, name, prompt, **words)
        assert found.num_cached_tokens == computed // BLOCK * BLOCK
        assert answer(ask(engine, name, prompt, skip_reading_prefix_cache=True, **words)) == answer(found)
        assert difference(found, prompt, models[0][name]) < 1e-4
        history = [*prompt, *answer(found), END]
        computed = len(found.prompt_token_ids) + LONG - 1  # with slots; the last token is sampled, and not computed
    assert computed > 4 * BLOCK


@pytest.mark.parametrize("end, taken", [(BLOCK, BLOCK), (BLOCK + 1, 0), (BLOCK + 6, 0)])
def test_slots_that_are_not_all_in_full_blocks_are_computed_anew(engine, models, offers, end, taken) -> None:
    """The last slot is the last token of a block, or the next one's first, or it stands with all others behind it."""
    prompt = [*tokens(end - len(TEMPLATE) - SLOTS, seed=100 + end), *TEMPLATE, *tokens(5, seed=12)]
    cold, warm = (ask(engine, "iapt_chat", prompt, max_tokens=8, min_tokens=8) for _ in range(2))
    assert [number for number, *_ in offers] == [0, BLOCK]
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, taken)
    assert answer(cold) == answer(warm)
    assert max(difference(output, prompt, models[0]["iapt_chat"]) for output in (cold, warm)) < 1e-4


def test_blocks_before_an_evicted_one_are_not_taken_without_all_slots(engine, models, offers) -> None:
    prompt = [*tokens(45, seed=10), *TEMPLATE, *tokens(30, seed=11)]
    cold, warm = (ask(engine, "iapt_chat", prompt) for _ in range(2))
    assert warm.num_cached_tokens == offers[-1][0] == 2 * BLOCK
    scheduler_of(engine).kv_cache_manager.evict_blocks({offers[-1][1][1]})
    gap = ask(engine, "iapt_chat", prompt)
    assert offers[-1][0] == BLOCK and gap.num_cached_tokens == 0
    assert answer(cold) == answer(warm) == answer(gap)
    assert difference(gap, prompt, models[0]["iapt_chat"]) < 1e-4


@pytest.mark.parametrize("name, words", [("chat", {"allowed_token_ids": [END]}), ("whole", {})])
def test_what_was_generated_is_not_what_the_next_turn_edits(engine, models, name, words) -> None:
    """An answer that goes on behind its end, and a text without roles: the next turn's prompt edits tokens that were generated."""
    first = [*tokens(38, seed=7), *TEMPLATE]
    answered = answer(ask(engine, name, first, **words))
    second = [*first, *answered, *tokens(8, seed=8), *TEMPLATE]
    found = ask(engine, name, second)
    print(found.num_cached_tokens, difference(found, second, models[0][name]))
    assert difference(found, second, models[0][name]) < 1e-4
    assert found.num_cached_tokens == BLOCK  # and not the next, in which the answer begins
    assert answer(ask(engine, name, second, skip_reading_prefix_cache=True)) == answer(found)


def test_adapters_share_no_blocks(engine, models) -> None:
    prompt = [*tokens(70, seed=9), *TEMPLATE]
    names = ["whole", "whole_too", BASE]
    cached = [[ask(engine, name, prompt).num_cached_tokens for name in names] for _ in range(2)]
    assert cached == [[0] * 3, [2 * BLOCK] * 3]


def test_preempted_requests_take_all_of_their_slots_or_none(engine, offers) -> None:
    requests = [[*tokens(45, seed=20 + number), *TEMPLATE] for number in range(6)]
    alone = [answer(ask(engine, "iapt_chat", ids, skip_reading_prefix_cache=True)) for ids in requests]
    offers.clear()
    together = engine.ask(requests, [engine.named("iapt_chat")] * 6, **{"max_tokens": LONG, "min_tokens": LONG})
    print(offers)
    assert any(number == BLOCK for number, _, preempted in offers if preempted)
    assert [answer(output) for output in together] == alone


def test_preempted_requests_do_not_edit_what_they_generated(engine, models, monkeypatch) -> None:
    scheduler, preempted = scheduler_of(engine), Counter()
    preempt = scheduler._preempt_request

    def count(request, *args, **kwargs):
        preempted[len(request.output_token_ids) > 0] += 1
        return preempt(request, *args, **kwargs)

    requests = [(name, [*tokens(50, seed=number), *TEMPLATE]) for number in range(3) for name in ("whole", "chat")]
    alone = [answer(ask(engine, name, ids, skip_reading_prefix_cache=True)) for name, ids in requests]
    monkeypatch.setattr(scheduler, "_preempt_request", count)
    together = engine.ask(
        [ids for _, ids in requests],
        [engine.named(name) for name, _ in requests],
        **{"max_tokens": LONG, "min_tokens": LONG, "skip_reading_prefix_cache": True},
    )
    assert preempted[True] > 0
    assert [answer(output) for output in together] == alone
