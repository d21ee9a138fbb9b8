# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tensor maths of the prompt generators. It imports neither PEFT nor transformers."""
