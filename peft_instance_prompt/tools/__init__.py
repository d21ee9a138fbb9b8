# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What looks at prompts, measures them, stores what they are made from, or hands them to other engines."""
