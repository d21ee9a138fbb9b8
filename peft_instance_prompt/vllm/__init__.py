# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plugin for vLLM, which serves adapters. vLLM loads it by the entry point `vllm.general_plugins`.

    registration   extends vLLM's calls; holds the extensions of the front end
    front_end      gives a request that names an adapter its slots, or refuses it
    core           the engine core and its workers: load and unload adapters, run steps
    adapters       reads a generator from an adapter's folder
    plan           says which rows of a step's flat batch are whose instruction and slots
    hooks          reads the instruction's rows of a layer's input and writes the slots' rows
    internals      vLLM's names, by release; no other file knows them

Nothing here is imported before vLLM loads the plugin.
"""
