# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plugin for vLLM, which serves adapters. vLLM loads it by the entry point `vllm.general_plugins`.

    registration   the doors: looks whether a folder of ours is named, and prepares the engine's configuration
    complaints     which settings serve instance prompts, and which are refused before anything is loaded
    front_calls    extensions of the front end's calls
    front_end      the adapters that requests can name; gives a request its slots or edits, or refuses it
    places         where the instruction and the slots of a prompt stand, or which of its tokens are edited
    adapters       reads a generator from an adapter's folder, and packs it for the workers
    scheduler      keeps an instruction and its slots in one step, takes from the prefix cache all slots or none, tells slots and edited
                   tokens apart there, and fails requests whose prompt was not written
    worker         holds the adapters; makes and runs each step's plan
    plan           says which rows of a step's flat batch are whose instruction and slots, and which are edited
    hooks          reads the instruction's rows of a layer's input, writes the slots' rows and edits others
    points         vLLM's methods that are extended or called, and their parameters
    internals      vLLM's names, by release
    release        the tested releases of vLLM
    package        what the plugin uses of the package; no other file imports from outside the plugin

Nothing here is imported before vLLM loads the plugin.
"""
