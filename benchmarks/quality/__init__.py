# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What the two quality suites share: tasks, methods, training, cells of results, and intervals.

A cell is one task with one number of examples, one method and one seed. Seed 0 tries the learning rates, each on the development
split, and touches the test split with the best; the other seeds take that learning rate.
"""
