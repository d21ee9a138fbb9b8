# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The eleven invariants. Each draws a case and fails where it does not hold; its docstring is what docs/invariants.md says."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from invariants_outputs import (
    generate_with_cache_equals_without,
    logits_do_not_depend_on_later_response_tokens,
    mixed_batch_equals_each_adapter_alone,
    packed_sequence_equals_the_sequence_alone,
    row_of_a_padded_batch_equals_the_row_alone,
)
from invariants_state import (
    base_model_comes_back,
    config_is_refused_by_name_or_works,
    damaged_folder_is_refused_whole_or_loads_right,
    failing_call_changes_nothing_for_the_next,
    saved_and_loaded_gives_the_same,
    threads_get_right_texts_while_adapters_come_and_go,
)


INVARIANTS: dict[str, Callable[[st.DataObject], None]] = {
    function.__name__: function
    for function in (
        config_is_refused_by_name_or_works,
        row_of_a_padded_batch_equals_the_row_alone,
        packed_sequence_equals_the_sequence_alone,
        generate_with_cache_equals_without,
        mixed_batch_equals_each_adapter_alone,
        logits_do_not_depend_on_later_response_tokens,
        saved_and_loaded_gives_the_same,
        damaged_folder_is_refused_whole_or_loads_right,
        base_model_comes_back,
        failing_call_changes_nothing_for_the_next,
        threads_get_right_texts_while_adapters_come_and_go,
    )
}
