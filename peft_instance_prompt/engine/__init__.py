# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Opens slots inside a transformer stack, has the adapters fill them, and closes them again.

From bottom to top: `calls` (transformers' names), `sharded`, `attention`, `positions`, `use` and `stack` (facts about a stack), `layout`
(where slots stand), `packing` (several sequences per row), `cache`, `masks`, `wrap` (methods of modules), `request`, `scope` and
`complaints` (which tokens are the instruction), `instances` (which tokens are whose), `intercept`, `batch` (adapter groups), `text`,
`place`, `widen`, `passes`, `plain`, `open`, `resume`, `fill`, `close`, `generation`, `layer` (the hooks).
"""
