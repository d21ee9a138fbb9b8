# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Saving: a reader finds the old adapter, the new one, or a refusal, whenever it reads and whenever the writer is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import CONFIG, WEIGHTS, assert_unchanged, picture
from methods import METHODS
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import adapted, batch, causal_lm

from peft_instance_prompt import adapter_files
from peft_instance_prompt.adapter_files import digest, find_config
from peft_instance_prompt.files import LEFT_OVER, STAGE, staged


FILES = {CONFIG, WEIGHTS, "README.md"}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def config(**fields):
    return METHODS["iapt"](**{"task_type": "CAUSAL_LM", **fields})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(9, 6)).logits


def native(seed: int, position: str) -> torch.nn.Module:
    model = causal_lm()
    model.load_adapter(peft_config=config(prompt_position=position), adapter_state_dict=weights_of(seed, position))
    return model


def weights_of(seed: int, position: str) -> dict[str, torch.Tensor]:
    model = adapted(causal_lm(), config(prompt_position=position), seed=seed)
    return {name.replace(".default.", "."): p for name, p in model.state_dict().items() if "generator" in name}


# An old and a new adapter with tensors of the same names and shapes: a mixture would load.
OLD, NEW = (0, "before"), (7, "end")
SAVERS: dict[str, Callable] = {
    "PeftModel": lambda seed, position: adapted(causal_lm(), config(prompt_position=position), seed=seed),
    "transformers": native,
}
LOADS: dict[str, Callable] = {
    "from_pretrained": lambda folder: PeftModel.from_pretrained(causal_lm(), folder),
    "load_adapter": lambda folder: load_into(adapted(causal_lm(), config(), "other"), folder),
    "native": lambda folder: load_into(causal_lm(), str(folder)),
}


def load_into(model: torch.nn.Module, folder: Path | str) -> torch.nn.Module:
    model.load_adapter(folder, adapter_name="new")
    if isinstance(model, PeftModel):
        model.set_adapter("new")
    return model


@pytest.fixture(params=["PeftModel", pytest.param("transformers", marks=pytest.mark.native)])
def saver(request: pytest.FixtureRequest) -> Callable:
    return SAVERS[request.param]


@pytest.fixture
def two(saver: Callable) -> tuple[torch.nn.Module, torch.nn.Module, dict[str, torch.Tensor]]:
    """Models with the old and with the new adapter, and what they compute."""
    old, new = saver(*OLD), saver(*NEW)
    expected = {"old": logits(old), "new": logits(new)}
    assert not torch.equal(expected["old"], expected["new"])
    return old, new, expected


def read(folder: Path, expected: dict[str, torch.Tensor], load: Callable = LOADS["from_pretrained"]) -> str:
    """Which adapter a reader finds, or "refused"; an error if it is neither of those expected."""
    try:
        found = logits(load(folder))
    except ValueError as error:
        assert "is being rewritten" in str(error), error
        return "refused"
    return next(name for name, value in expected.items() if torch.equal(found, value))


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_the_config_has_the_digest(saver: Callable, tmp_path: Path) -> None:
    model = saver(*OLD)
    model.save_pretrained(tmp_path)
    assert {name for name in files(tmp_path) if name != "generation_config.json"} == FILES
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert saved["weights_digest"] == digest(load_file(tmp_path / WEIGHTS)) and saved["saved_embedding_layers"] is None
    assert model.peft_config["default"].weights_digest is None
    assert (tmp_path / CONFIG).read_text() == json.dumps(saved, indent=2, sort_keys=True)  # as PEFT writes it


def test_the_digest_is_of_types_shapes_and_bytes() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(0)}
    same = {"x": weights["c"], "y": weights["b"].clone(), "z": weights["a"].t().contiguous().t()}
    assert digest(weights) == digest(same)
    others = [
        {**weights, "a": weights["a"] + 1e-6},
        {**weights, "a": weights["a"].view(3, 2)},
        {**weights, "b": weights["b"].to(torch.float16)},
        {"a": weights["a"], "b": weights["b"]},
        {**weights, "d": weights["c"]},
    ]
    assert len({digest(weights), *map(digest, others)}) == 6


@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
def test_config_and_weights_of_two_saves(two: tuple, load: Callable, tmp_path: Path) -> None:
    old, new, expected = two
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / name)
        assert read(tmp_path / name, expected, load) == name
    (tmp_path / "old" / WEIGHTS).write_bytes((tmp_path / "new" / WEIGHTS).read_bytes())
    assert read(tmp_path / "old", expected, load) == "refused"
    resident = adapted(causal_lm(), config(), "resident")
    before = picture(resident)
    with pytest.raises(ValueError, match="is being rewritten"):
        resident.load_adapter(tmp_path / "old", "resident")
    assert_unchanged(resident, before)


def test_stopped_at_each_file(two: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each file that takes another's place: the old one, then a refusal, then the new one."""
    old, new, expected = two
    replace, seen = os.replace, []
    for stop in range(5):
        old.save_pretrained(tmp_path / "again")
        for folder in (tmp_path / "again", tmp_path / f"first{stop}"):
            calls = count()

            def replace_some(
                source: str, target: Path, folder: Path = folder, stop: int = stop, calls: count = calls
            ) -> None:
                if target.parent == folder and next(calls) == stop:
                    raise KeyboardInterrupt
                replace(source, target)

            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr("peft_instance_prompt.adapter_files.os.replace", replace_some)
                new.save_pretrained(folder)
        seen.append(read(tmp_path / "again", expected))
        assert (tmp_path / f"first{stop}" / WEIGHTS).exists() or not (tmp_path / f"first{stop}" / CONFIG).exists()
        assert not [name for name in files(tmp_path) if STAGE in name]
    assert sorted(seen, key=["old", "refused", "new"].index) == seen and set(seen) == {"old", "refused", "new"}


@pytest.mark.parametrize("saver", ["PeftModel"], indirect=True)
def test_a_config_that_is_replaced_between_two_readings(
    two: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_adapter` reads the config, and then PEFT reads it again to make the adapter."""
    old, new, expected = two
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")

    def find_and_replace(*args: Any, **kwargs: Any) -> Any:
        found = find_config(*args, **kwargs)
        (tmp_path / "old" / CONFIG).write_bytes((tmp_path / "new" / CONFIG).read_bytes())
        return found

    monkeypatch.setattr("peft_instance_prompt.adapter_files.find_config", find_and_replace)
    assert read(tmp_path / "old", expected, LOADS["load_adapter"]) == "refused"


def writer(two: tuple, folder: Path, pause: float) -> int:
    """A child process that saves the new and the old adapter in turns, until it is killed."""
    if pid := os.fork():
        return pid
    try:
        for number in range(100_000):
            two[1 - number % 2].save_pretrained(folder)
            time.sleep(pause)
    finally:
        os._exit(0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@needs_fork
def test_killed_while_saving(two: tuple, tmp_path: Path) -> None:
    old, new, expected = two
    old.save_pretrained(tmp_path)
    for number in range(30):
        pid = writer(two, tmp_path, 0)
        time.sleep(0.02 + 0.0017 * number)
        kill(pid)
        json.loads((tmp_path / CONFIG).read_text())
        read(tmp_path, expected)
    new.save_pretrained(tmp_path)
    assert read(tmp_path, expected) == "new"


@needs_fork
@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
def test_a_reader_beside_a_writer(two: tuple, load: Callable, tmp_path: Path) -> None:
    two[0].save_pretrained(tmp_path)
    pid = writer(two, tmp_path, 0.03)  # without a pause, no reader comes to an end between two saves
    try:
        seen = {read(tmp_path, two[2], load) for _ in range(60)}
    finally:
        kill(pid)
    assert {"old", "new"} & seen


# ------------------------------------------------------------------------------------------------------ beside the files


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / f"{STAGE}{name}" / "files").mkdir(parents=True)
        (tmp_path / f"{STAGE}{name}" / "files" / WEIGHTS).write_bytes(b"")
    past = time.time() - LEFT_OVER - 60
    os.utime(tmp_path / f"{STAGE}old", (past, past))
    adapted(causal_lm(), config()).save_pretrained(tmp_path)
    assert files(tmp_path) == FILES | {f"{STAGE}new/files/{WEIGHTS}"}  # it may be another writer's


def test_several_adapters_and_what_others_wrote(tmp_path: Path) -> None:
    model = adapted(causal_lm(), config())
    model.add_adapter("second", config(prompt_position="end"))
    (tmp_path / "second").mkdir()
    for card in (tmp_path / "README.md", tmp_path / "second" / "README.md"):
        card.write_text("---\ntags: [mine]\n---\n\nMy words.\n")
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == {"optimizer.pt", *FILES, *(f"second/{name}" for name in FILES)}
    for folder in (tmp_path, tmp_path / "second"):
        assert (
            "My words." in (folder / "README.md").read_text() and "pip install" in (folder / "README.md").read_text()
        )
        assert json.loads((folder / CONFIG).read_text())["weights_digest"] == digest(load_file(folder / WEIGHTS))
    model.save_pretrained(tmp_path / "only", selected_adapters=["second"])
    assert {name for name in files(tmp_path / "only") if "README" not in name} == {
        f"second/{CONFIG}",
        f"second/{WEIGHTS}",
    }


def test_as_a_pickle(tmp_path: Path) -> None:
    model = adapted(causal_lm(), config())
    model.save_pretrained(tmp_path, safe_serialization=False)
    weights = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    assert json.loads((tmp_path / CONFIG).read_text())["weights_digest"] == digest(weights)
    assert torch.equal(logits(PeftModel.from_pretrained(causal_lm(), tmp_path)), logits(model))


def test_a_config_alone(tmp_path: Path) -> None:
    """It is read by its own class as by PEFT's, has no digest, and is replaced at once."""
    adapted(causal_lm(), config()).save_pretrained(tmp_path / "whole")
    loaded = PeftConfig.from_pretrained(tmp_path / "whole")
    assert loaded.weights_digest is not None
    loaded.save_pretrained(tmp_path / "alone")
    assert files(tmp_path / "alone") == {CONFIG, "README.md"}
    assert json.loads((tmp_path / "alone" / CONFIG).read_text())["weights_digest"] is None
    assert type(loaded).from_pretrained(tmp_path / "alone") == PeftConfig.from_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="has no weights"):
        PeftModel.from_pretrained(causal_lm(), tmp_path / "alone")


def test_where_nothing_can_be_saved(saver: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        saver(*OLD).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "folder") as stage:
        (stage / CONFIG).write_text("{}")
        raise ZeroDivisionError
    assert not files(tmp_path / "folder")


@pytest.mark.parametrize("owner", ["PeftModel", "PreTrainedModel"])
def test_what_is_saved_beside_ours_has_no_keys_of_ours(owner: str, tmp_path: Path) -> None:
    """A LoRA of the same model: PEFT knows no field of ours, and warns of them."""
    ours, other = adapted(causal_lm(), config()), get_peft_model(causal_lm(), LoraConfig(task_type="CAUSAL_LM"))
    both = SimpleNamespace(
        peft_config={"ours": ours.peft_config["default"], "lora": other.peft_config["default"]},
        get_base_model=ours.get_base_model,
        _hf_peft_config_loaded=True,
        get_input_embeddings=ours.get_input_embeddings,
        named_modules=ours.named_modules,
    )

    def save(self, save_directory):
        ours.save_pretrained(save_directory)
        PeftModel.save_pretrained.__wrapped__(other, f"{save_directory}/lora")

    adapter_files._guarded(save, native=owner == "PreTrainedModel")(both, tmp_path)
    PeftModel.save_pretrained.__wrapped__(other, tmp_path / "alone")
    assert json.loads((tmp_path / CONFIG).read_text())["weights_digest"] == digest(load_file(tmp_path / WEIGHTS))
    assert (tmp_path / "lora" / CONFIG).read_text() == (tmp_path / "alone" / CONFIG).read_text()


def test_what_is_not_ours_is_saved_as_before(tmp_path: Path) -> None:
    model = adapted(causal_lm(), config())
    model.get_base_model().save_pretrained(tmp_path / "base")  # it holds our layers, but is saved as a whole
    assert "model.safetensors" in files(tmp_path / "base") and WEIGHTS not in files(tmp_path / "base")
    get_peft_model(causal_lm(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert "weights_digest" not in json.loads((tmp_path / "lora" / CONFIG).read_text())
