# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Opens slots inside a transformer stack, has them filled by the adapters, and closes them again.

From bottom to top: `calls` (transformers' names), `stack` (facts about a stack), `layout` (where slots stand), `packing` (rows of
several sequences), `cache`, `masks`, `request` and `scope` (what the caller said), `instances` (which tokens are whose), `passes`,
`plain`, `intercept`, `batch` (adapters by row), `text`, `widen`, `open`, `fill`, `close`, `generation`, `layer` (the hooks).
"""
