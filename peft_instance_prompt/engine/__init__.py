# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Opens slots inside a transformer stack, has the adapters fill them, and closes them again.

From bottom to top: `calls` (transformers' names), `probe` and `stack` (facts about a stack), `slots` (where slots stand), `cache`,
`tokens` (which tokens are whose), `request` (what is said of a call), `wrap` (methods of modules), `intercept`, `adapters` (adapter
groups), `edits` and `scope` (which tokens are the instruction), `widen`, `forward` (one pass), `open`, `layer` (the hooks).
"""
