# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters served by vLLM: a plugin that vLLM loads itself, by the entry point `vllm.general_plugins`.

    registration   which calls of vLLM's are extended; those of the front end
    front_end      a request that names an adapter gets its slots, or is refused
    core           the engine core and its workers: adapters come and go, steps run
    adapters       a folder becomes a generator
    plan           which rows of a step's flat batch are whose instruction and slots
    hooks          the layers' inputs: read the instruction's rows, write the slots' rows
    internals      vLLM's names, by release; no other file knows them

Nothing here is imported unless vLLM loads the plugin.
"""
