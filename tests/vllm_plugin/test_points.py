# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The doors: where no folder of ours is named, vLLM is vLLM's own. And vLLM's methods are known by their parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from served import LORA

from peft_instance_prompt.vllm import points, registration


@pytest.mark.parametrize(
    "found, wanted, fit",
    [
        (["self", "a"], "self a", True),
        (["self", "a", "b"], "self a", False),
        (["self", "a", "b"], "self a ...", True),
        (["self"], "self a", False),
        (["self", "x", "a", "y"], "self ... a ...", True),
        (["self", "x", "y"], "self ... a ...", False),
        (["b", "self"], "self b", False),
    ],
)
def test_parameters(found, wanted, fit) -> None:
    assert points.fits(found, wanted) == fit


def test_a_changed_method_is_refused_by_name(monkeypatch) -> None:
    assert points.changed(points.of_front_end()) is None
    owner, name = points.find(points.CORE["evict"][0])
    monkeypatch.setattr(owner, name, lambda self, ids, why: None)
    assert "takes (self, ids, why)" in points.changed(points.of_front_end())


def test_methods_of_both_runners() -> None:
    def methods(**signatures):
        space = SimpleNamespace()
        for name, text in signatures.items():
            setattr(space, name, eval(f"lambda {text}: None"))
        return space

    first = methods(
        sample_tokens="grammar_output",
        _model_forward="input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs",
    )
    assert points.changed(points.of_runner(first)) is None
    second = methods(sample_tokens="grammar_output", execute_model="scheduler_output, x=None, is_profile=False")
    second.model_state = methods(
        add_request="req_index, new_req_data", remove_request="req_id", prepare_inputs="batch, req_states"
    )
    assert "knows it with (input_batch, req_states)" in points.changed(points.of_runner(second))


# In a process of its own: an engine for instance prompts extends the classes of its process.
PLAIN = """
import json, sys
from vllm.plugins import load_general_plugins
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from argparse import Namespace

base, lora, own = sys.argv[1:]
load_general_plugins()
from peft_instance_prompt.vllm import points

def extended():
    found = [points.find(where) for table in (points.FRONT, points.CORE) for where, _ in table.values()]
    return sorted(f"{owner.__name__}.{name}" for owner, name in found if hasattr(getattr(owner, name), points.MARK))

def configure(*folders, **settings):
    args = Namespace(model=base, max_model_len=256, enable_lora=True, **settings)
    args.lora_modules = [LoRAModulePath(str(number), folder) for number, folder in enumerate(folders)]
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    scheduler = config.scheduler_config
    return [config.lora_config is None, scheduler.scheduler_cls, config.parallel_config.worker_extension_cls,
            config.additional_config, scheduler.enable_chunked_prefill]

said = {"plain": [configure(), extended()], "lora": [configure(lora), extended()]}
try:
    said["both"] = configure(own, lora)
except ValueError as error:
    said["both"] = str(error)
said["own"] = [configure(own), extended()]
print("said" + json.dumps(said))
"""


@pytest.mark.slow
def test_without_a_folder_of_ours_vllm_is_vllms_own(served) -> None:
    folders = [str(served.folders[name]) for name in (LORA, "iapt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, str(served.base), *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.split("said")[-1])
    untouched = [False, None, "", {}, True]  # with LoRA, and prompts in chunks
    assert said["plain"] == said["lora"] == [untouched, []]
    assert "a LoRA on the CPU" in said["both"]
    (without_lora, scheduler, extension, additional, chunked), extended = said["own"]
    assert without_lora and chunked and scheduler.endswith("PromptScheduler") and extension.endswith("WorkerExtension")
    assert additional == {"instance_prompt": {"folders": {"0": folders[1]}}} and len(extended) == len(points.FRONT)


@pytest.mark.slow
def test_named_folder_that_cannot_be_served_is_refused_before_the_weights_are_read(served) -> None:
    from vllm.engine.arg_utils import EngineArgs

    named = {"instance_prompt": {"folders": {"late": str(served.folders["lpt"])}}}
    with pytest.raises(ValueError, match="'late' cannot be served.*from layer"):
        EngineArgs(model=str(served.base), max_model_len=256, additional_config=named).create_engine_config()


def test_a_release_without_a_door_starts_all_the_same(monkeypatch) -> None:
    monkeypatch.setitem(
        points.DOORS, "from_local_dir", ("vllm.lora.peft_helper:PEFTHelper.moved_away", "lora_path ...")
    )
    registration.register()


@pytest.mark.slow
def test_loader_of_loras_refuses_our_folders_only(served, monkeypatch) -> None:
    import vllm
    from vllm.lora.peft_helper import PEFTHelper

    registration.register()
    assert PEFTHelper.from_local_dir(str(served.folders[LORA]), 2048).r == 4
    with pytest.raises(ValueError, match="was not started for.*--lora-modules"):
        PEFTHelper.from_local_dir(str(served.folders["iapt"]), 2048)
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99, 0))
    assert PEFTHelper.from_local_dir(str(served.folders[LORA]), 2048).r == 4
    with pytest.raises(ValueError, match="is tested with vLLM"):
        PEFTHelper.from_local_dir(str(served.folders["iapt"]), 2048)
