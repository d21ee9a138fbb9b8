# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""On PYTHONPATH: Triton's kernels run in its interpreter, and vLLM believes that Triton has a CPU backend.

So vLLM's V2 model runner, which needs Triton, runs without a GPU: slowly, and for tests only.
"""

import os


os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton.backends
except ImportError:  # pip's own processes have no Triton
    pass
else:

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
