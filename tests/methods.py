# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The methods that every shared test runs over. A new method adds a line to `METHODS`, and a line to `SKIPS` per exception."""

from __future__ import annotations

from collections.abc import Callable

from mean_prompt import MeanPromptConfig

from peft_instance_prompt import (
    DynamicPromptConfig,
    IAPTConfig,
    IDPGConfig,
    IDSPAMConfig,
    IPTConfig,
    LPTConfig,
    PreFTConfig,
)


# Each makes a config for a tiny model; `kw` are the fields that all methods have.
METHODS: dict[str, Callable] = {
    # With a learned activation it has every weight that it can have. In a causal model it stands at the end, and adds.
    "iapt": lambda **kw: IAPTConfig(**{"bottleneck_dim": 8, "activation": "rational", **kw}),
    "iapt_after_first": lambda **kw: IAPTConfig(**{"bottleneck_dim": 8, "prompt_position": "after_first", **kw}),
    "iapt_paper": lambda **kw: IAPTConfig(**{"bottleneck_dim": 8, "init_weights": "paper", **kw}),
    "lpt": lambda **kw: LPTConfig(**{"bottleneck_dim": 8, "dropout": 0.0, **kw}),
    "lpt_pooled": lambda **kw: LPTConfig(
        **{
            "bottleneck_dim": 8,
            "dropout": 0.0,
            "generator_type": "appg",
            "insertion_layer": 2,
            **kw,
        }
    ),
    "idpg": lambda **kw: IDPGConfig(**{"num_virtual_tokens": 4, "phm_n": 4, "dropout": 0.0, **kw}),
    "idpg_single": lambda **kw: IDPGConfig(
        **{
            "num_virtual_tokens": 4,
            "multi_layer": False,
            "phm_n": 4,
            "bottleneck_dim": 8,
            "dropout": 0.0,
            "instance_source": "embeddings",
            **kw,
        }
    ),
    "idpg_paper": lambda **kw: IDPGConfig(
        **{
            "num_virtual_tokens": 4,
            "projection": "dense",
            "dropout": 0.0,
            "depth_input": "instance",
            "layer_sharing": "none",
            "init_weights": "paper",
            **kw,
        }
    ),
    "idspam": lambda **kw: IDSPAMConfig(
        **{"num_virtual_tokens": 4, "bottleneck_dim": 8, "attention_dim": 8, "dropout": 0.0, **kw}
    ),
    "ipt": lambda **kw: IPTConfig(**{"num_virtual_tokens": 4, "table_rank": 4, **kw}),
    "ipt_encoder": lambda **kw: IPTConfig(
        **{
            "num_virtual_tokens": 4,
            "strategy": "encoder",
            "bottleneck_dim": 4,
            "dropout": 0.0,
            "table_rank": None,
            **kw,
        }
    ),
    "ipt_deep": lambda **kw: IPTConfig(
        **{
            "num_virtual_tokens": 4,
            "strategy": "encoder",
            "encoder": "lstm",
            "host": "deep",
            "bottleneck_dim": 4,
            "dropout": 0.0,
            **kw,
        }
    ),
    "dynamic_prompt": lambda **kw: DynamicPromptConfig(**{"num_virtual_tokens": 4, **kw}),
    "dynamic_prompt_all": lambda **kw: DynamicPromptConfig(
        **{
            "num_virtual_tokens": 5,
            "length": "instance",
            "representation": "instance",
            "order": "dpt",
            "instance_source": "embeddings",
            **kw,
        }
    ),
    "mean_prompt": lambda **kw: MeanPromptConfig(**kw),
    # The shared tests call what sets an adapter's size `num_virtual_tokens`.
    "preft": lambda num_virtual_tokens=4, **kw: PreFTConfig(**{"r": num_virtual_tokens, **kw}),
}

# The methods that span what the engine sees of one: vectors that are added to the slots' states in every layer, behind the instruction
# of a causal model, or replace them, before it; late slots; a vector of the instance, read at the input; slots that are not used, with
# places that are chosen per instance and their gradient; and no slots, but edits of the instruction's own states.
# A shared test runs over these (see `surplus` in conftest.py); with `--all-methods`, as in `make test-methods`, over all.
SPANNING: list[str] = ["iapt", "iapt_after_first", "lpt_pooled", "ipt", "dynamic_prompt_all", "preft"]
# The three ways of writing: slots in every layer, late slots, and edits. An older release of transformers or PEFT can break these, and
# does not know one generator from another: CI runs them on the oldest.
FEW: list[str] = ["iapt", "lpt_pooled", "preft"]

# The methods that edit the instruction's states and have no slots: a test that is marked `slots` does not run for them.
WITHOUT_SLOTS: frozenset[str] = frozenset({"preft"})

# Which shared test (the name of its function) does not hold for which method, and why.
SKIPS: dict[tuple[str, str], str] = {
    ("ipt", "test_whole_row_is_the_instance_of_a_plain_call"): "it looks up the first tokens only",
    (
        "dynamic_prompt",
        "test_whole_row_is_the_instance_of_a_plain_call",
    ): "it chooses in steps, the same one for these rows",
    ("ipt", "test_embeds_in_place_of_ids"): "it looks token ids up",
    ("ipt", "test_inputs_embeds"): "it looks token ids up",
    ("ipt_encoder", "test_inputs_embeds"): "it looks token ids up",
    ("ipt_deep", "test_inputs_embeds"): "it looks token ids up",
    ("ipt", "test_template_that_does_not_occur"): "it looks token ids up",
    ("ipt", "test_ranges_and_tuples_become_lists"): "`layers_to_transform` is refused",
    ("lpt", "test_attentions_are_those_among_tokens"): "the layers below the prompt do not attend to it",
    ("lpt", "test_model_with_positions_for_no_slots"): "late slots take no positions",
    ("lpt", "test_ranges_and_tuples_become_lists"): "`layers_to_transform` is refused",
    ("idspam", "test_attentions_are_those_among_tokens"): "the layers below the prompt do not attend to it",
    ("idspam", "test_model_with_positions_for_no_slots"): "late slots take no positions",
    ("idspam", "test_ranges_and_tuples_become_lists"): "`layers_to_transform` is refused",
    ("dynamic_prompt", "test_ranges_and_tuples_become_lists"): "`layers_to_transform` is refused",
    (
        "dynamic_prompt",
        "test_fresh_adapter_copies_the_first_token",
    ): "its vectors begin as the opposite of the first token",
    (
        "dynamic_prompt_all",
        "test_fresh_adapter_copies_the_first_token",
    ): "its vectors begin as the opposite of the first token",
    ("dynamic_prompt", "test_no_leak"): "its choices are discrete: another instruction need not get another prompt",
}

# One method per kind, the first of each: for tests whose outcome depends on the kind only, and for slow ones.
KINDS: list[str] = list({type(make()): name for name, make in reversed(METHODS.items())}.values())[::-1]


def at_the_first_layer(method: str) -> dict[str, int]:
    """The field that lets late prompts enter where nothing is below them: in BART's decoder they are refused otherwise."""
    return {"insertion_layer": 0} if hasattr(METHODS[method](), "insertion_layer") else {}
