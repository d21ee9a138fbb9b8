# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Tools that look at prompts, measure them, store their inputs, or hand them to other engines."""
