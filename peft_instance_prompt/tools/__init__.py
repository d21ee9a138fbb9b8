# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Tools: the report, inspection and pictures, promises, the doctor, bi-level training, stored instance vectors, other engines' prompts."""
