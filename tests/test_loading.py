# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Loading by each of the ways that there are: an adapter's folder is loaded whole, or refused whole, and nothing else is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from folders import CONFIG, WEIGHTS, assert_unchanged, change_config, change_weights, picture
from methods import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from tiny import VOCAB, adapted, batch, causal_lm, encoder

from peft_instance_prompt import adapter_files
from peft_instance_prompt.adapter_files import digest
from peft_instance_prompt.attaching import expected_for, expected_tensors, make_generator
from peft_instance_prompt.engine.stack import describe
from peft_instance_prompt.guards import is_loading


PREFIX = "base_model.model."


def config(kind: str = "iapt", **fields: Any):
    return METHODS[kind](**{"task_type": "CAUSAL_LM", **fields})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(9, 6)).logits


def plain(kind: str) -> torch.nn.Module:
    return causal_lm()


def with_adapter(kind: str) -> torch.nn.Module:
    return adapted(causal_lm(), config(kind), "resident")


def with_native_adapter(kind: str) -> torch.nn.Module:
    model = causal_lm()
    model.add_adapter(config(kind), adapter_name="resident")
    return model


class Route(NamedTuple):
    """A way to load: the model that a folder gets into, how, and the name of the adapter that comes of it."""

    model: Callable[[str], torch.nn.Module]
    load: Callable[[torch.nn.Module, Path], Any]
    name: str

    def refuses(self, folder: Path, says: str, kind: str = "iapt") -> None:
        model = self.model(kind)
        before = picture(model)
        with pytest.raises(ValueError, match=says):
            self.load(model, folder)
        assert_unchanged(model, before)


ROUTES = {
    "from_pretrained": Route(plain, lambda model, folder: PeftModel.from_pretrained(model, folder), "default"),
    "load_adapter": Route(with_adapter, lambda model, folder: model.load_adapter(folder, "loaded"), "loaded"),
    "same name": Route(with_adapter, lambda model, folder: model.load_adapter(folder, "resident"), "resident"),
    "native": Route(plain, lambda model, folder: model.load_adapter(str(folder)), "default"),
    "native second": Route(with_native_adapter, lambda model, folder: model.load_adapter(folder, "loaded"), "loaded"),
}


NATIVE = {"native second": pytest.mark.native}  # it calls transformers' own `add_adapter` first


@pytest.fixture(params=[pytest.param(name, marks=NATIVE.get(name, ())) for name in ROUTES])
def route(request: pytest.FixtureRequest) -> Route:
    return ROUTES[request.param]


def save(folder: Path, kind: str = "iapt") -> Path:
    """A saved adapter, `good`, and a copy of it that the test makes worse, `bad`."""
    adapted(causal_lm(), config(kind)).save_pretrained(folder / "good")
    shutil.copytree(folder / "good", folder / "bad")
    return folder / "bad"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return save(tmp_path)


# -------------------------------------------------------------------------------------------------------------- tensors


def largest(weights: dict[str, torch.Tensor]) -> str:
    return max(weights, key=lambda name: weights[name].numel())


def add(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda weights: weights.update({name: torch.full(shape, 7.0)})


OTHERS = {
    "layer": add(f"{PREFIX}model.layers.0.self_attn.q_proj.weight", 32, 32),
    "head": add(f"{PREFIX}lm_head.weight", VOCAB, 32),
    "embeddings": add(f"{PREFIX}model.embed_tokens.weight", VOCAB, 32),
    "without a prefix": add("model.layers.0.self_attn.q_proj.weight", 32, 32),
    "another adapter": lambda w: w.update(
        {largest(w).replace("generator.", "generator.resident."): w[largest(w)] * 2}
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_tensors_that_are_not_the_adapters(bad: Path, route: Route, what: str) -> None:
    change_weights(bad, OTHERS[what])
    route.refuses(bad, "hold 1 tensor.s. that the config does not know, such as '.*(weight|iapt_generator.resident)")


MISFITS = {
    "lack 1 tensor.s. that the config asks for": lambda w: w.pop(largest(w)),
    "lack 2 tensor.s.": lambda w: (w.pop(largest(w)), w.pop(largest(w))),
    "hold 1 tensor.s. that the config does not know": lambda w: w.update({f"{largest(w)}.more": torch.ones(2)}),
    "of another shape, such as .* where .* is asked for": lambda w: w.update({largest(w): w[largest(w)][:-1]}),
    "hold 1 tensor.s. with NaN or infinity": lambda w: w[largest(w)].view(-1)[3].fill_(torch.nan),
    "lack .* does not know.* with NaN or infinity": lambda w: w.update(
        {"more": torch.tensor([torch.inf]), **{f"{name}x": w.pop(name) for name in [*w]}}
    ),
    "under two names": lambda w: w.update({largest(w).removeprefix(PREFIX): w[largest(w)] * 2}),
}


@pytest.mark.parametrize("says", MISFITS)
def test_tensors_that_do_not_fit(bad: Path, route: Route, says: str) -> None:
    change_weights(bad, MISFITS[says])
    if says == "under two names" and route.load not in (ROUTES["native"].load, ROUTES["native second"].load):
        says = "does not know"  # within a PeftModel, all names have the prefix
    route.refuses(bad, f"The weights in .*({says})")


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_numbers_of_another_type(bad: Path, route: Route, dtype: torch.dtype, sealed: bool) -> None:
    """Copied into the adapter, they would be cut, or lose a part, in silence."""
    change_weights(bad, lambda w: w.update({largest(w): w[largest(w)].to(dtype)}))
    if not sealed:
        change_config(bad, weights_digest=None)
    name = str(dtype).removeprefix("torch.")
    route.refuses(bad, f"hold 1 tensor.s. of another type of numbers, such as '.*' {name}")


def test_every_method(kind: str, route: Route, tmp_path: Path) -> None:
    bad = save(tmp_path, kind)
    change_weights(bad, lambda weights: (weights.pop(largest(weights)), OTHERS["head"](weights)))
    route.refuses(bad, "lack 1 tensor.*hold 1 tensor.*lm_head", kind)
    model = route.model(kind)
    loaded = route.load(model, tmp_path / "good")
    model = loaded if isinstance(loaded, PeftModel) else model
    if route.model is not plain:
        model.set_adapter(route.name)
    assert torch.equal(logits(model), logits(adapted(causal_lm(), config(kind))))
    assert all(c.weights_digest is None and c.saved_embedding_layers is None for c in model.peft_config.values())


def test_a_good_folder_after_a_bad_one(bad: Path, route: Route, tmp_path: Path) -> None:
    change_weights(bad, lambda weights: weights.pop(largest(weights)))
    model = route.model("iapt")
    with pytest.raises(ValueError, match="lack"):
        route.load(model, bad)
    loaded = route.load(model, tmp_path / "good")
    model = loaded if isinstance(loaded, PeftModel) else model
    if route.model is not plain:
        model.set_adapter(route.name)
    assert torch.equal(logits(model), logits(adapted(causal_lm(), config())))


def test_weights_of_another_method(bad: Path, route: Route, tmp_path: Path) -> None:
    adapted(causal_lm(), config("lpt")).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, bad)
    route.refuses(bad, f"{bad} is being rewritten.* lack .* hold .*lpt_generator")
    change_config(bad, weights_digest=None)
    route.refuses(bad, "lack .* hold .*lpt_generator")


@pytest.mark.parametrize("other", ["lora", "lpt"])
def test_an_adapter_of_another_type(other: str, tmp_path: Path) -> None:
    made = LoraConfig(target_modules=["q_proj"]) if other == "lora" else config("lpt")
    get_peft_model(causal_lm(), made).save_pretrained(tmp_path)
    ROUTES["same name"].refuses(tmp_path, "holds no adapter of the type IAPT, as 'resident' is")
    ROUTES["load_adapter"].refuses(tmp_path, "Cannot combine adapters")


def test_other_methods_are_loaded_as_before(tmp_path: Path) -> None:
    lora = get_peft_model(causal_lm(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / WEIGHTS), f"{PREFIX}more.weight": torch.ones(2)}, tmp_path / WEIGHTS)
    native = causal_lm()
    native.load_adapter(str(tmp_path))
    for model in (PeftModel.from_pretrained(causal_lm(), tmp_path), native):
        assert torch.equal(logits(model), logits(lora))


@pytest.mark.parametrize("name", ["from_pretrained", "load_adapter", "same name"])
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("what", ["head", "lack", "values"])
def test_weights_that_are_replaced_between_two_readings(
    bad: Path, name: str, sealed: bool, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared before anything is changed, and once more as PEFT has read them."""
    edits = {"head": OTHERS["head"], "lack": lambda w: w.pop(largest(w)), "values": lambda w: largest_times_two(w)}
    change_weights(bad, edits[what])
    good = tmp_path / "good"
    if not sealed:
        change_config(good, weights_digest=None)
    read = adapter_files.read_weights

    def read_and_replace(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = {key: tensor.clone() for key, tensor in read(*args, **kwargs).items()}
        shutil.copy(bad / WEIGHTS, good / WEIGHTS)
        return found

    monkeypatch.setattr(adapter_files, "read_weights", read_and_replace)
    if sealed:
        ROUTES[name].refuses(good, "the folder of '.*' is being rewritten")
    elif what != "values":  # without a digest, nobody can tell
        ROUTES[name].refuses(good, "The weights in the folder of '.*' (lack|hold) 1 tensor")
    monkeypatch.undo()
    shutil.copytree(bad, good, dirs_exist_ok=True)
    if what == "values":  # and what is whole again is loaded into a model of which one was refused
        model = ROUTES[name].model("iapt")
        loaded = ROUTES[name].load(model, good)
        assert not is_loading((loaded if isinstance(loaded, PeftModel) else model).peft_config[ROUTES[name].name])


def largest_times_two(weights: dict[str, torch.Tensor]) -> None:
    weights[largest(weights)] = weights[largest(weights)] * 2


def test_a_bad_folder_never_reaches_the_model(bad: Path, route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    change_weights(bad, OTHERS["head"])
    model = route.model("iapt")
    monkeypatch.setattr(BaseTuner, "inject_adapter", lambda *_, **__: pytest.fail("an adapter was attached"))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="hold 1 tensor"):
        route.load(model, bad)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_given_config_without_the_head_that_peft_adds(task: str, tmp_path: Path) -> None:
    auto = {"SEQ_CLS": tf.AutoModelForSequenceClassification, "TOKEN_CLS": tf.AutoModelForTokenClassification}[task]
    saved, ids = adapted(encoder(auto=auto), config(task_type=task)), batch(9, 6, side="right")
    saved.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(encoder(auto=auto, seed=0), tmp_path, config=config(task_type=task))
    with torch.no_grad():
        assert torch.equal(again.eval()(**ids).logits, saved.eval()(**ids).logits)
    assert config(task_type=task).modules_to_save is None
    change_weights(tmp_path, lambda w: w.pop(next(name for name in w if "classifier" in name)))
    Route(
        lambda kind: encoder(auto=auto),
        lambda model, folder: PeftModel.from_pretrained(model, folder, config=config(task_type=task)),
        "",
    ).refuses(tmp_path, "lack 1 tensor.*classifier")


def test_expected_tensors_are_those_that_peft_saves(kind: str, tmp_path: Path) -> None:
    """One definition for loading, the command line and vLLM: against the names and shapes in a file, with a head and embeddings."""
    made = config(kind, modules_to_save=["lm_head", "layers.1.mlp"])
    model = adapted(causal_lm(), made)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    file = load_file(tmp_path / WEIGHTS)
    saved = type(made).from_pretrained(tmp_path)
    assert saved.saved_embedding_layers == ["model.embed_tokens"]
    for base in (causal_lm(), model.get_base_model()):
        expected = expected_for(saved, base)
        assert {name: tuple(e.shape) for name, e in expected.items()} == {n: tuple(t.shape) for n, t in file.items()}
    info = describe(causal_lm())[0]
    wide = [make_generator(saved, replace(info, hidden_size=32 * n, embedding_size=32 * n)) for n in (1, 2)]
    guessed = expected_tensors(saved, {info.name: wide})
    assert guessed.keys() == {name for name in file if "generator" in name}
    for name, e in guessed.items():
        assert [size in (None, known) for size, known in zip(e.shape, file[name].shape)] == [True] * file[name].dim()
    assert any(None in e.shape for e in guessed.values())


def test_what_fails_for_another_reason_is_undone(bad: Path, route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    model = route.model("iapt")
    before = picture(model)
    monkeypatch.setattr("peft_instance_prompt.adapter_files.check_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        route.load(model, bad)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["from_pretrained", "native"])
def test_a_model_that_lies_on_disk_in_part(
    bad: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes the hooks away that fetch its layers, before it loads anything."""
    causal_lm().save_pretrained(tmp_path / "base")
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.1": "disk", **dict.fromkeys(parts, "cpu")}
    base = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    good = load_file(bad / WEIGHTS)
    change_weights(bad, OTHERS["head"])
    with pytest.raises(ValueError, match="hold 1 tensor"):
        ROUTES[name].load(base, bad)
    if name == "native":  # transformers reads the file itself: here another one than was checked
        change_config(bad, weights_digest=digest(good))
        answers = iter([good, load_file(bad / WEIGHTS)])
        monkeypatch.setattr("peft_instance_prompt.adapter_files.load_peft_weights", lambda *_, **__: next(answers))
        with pytest.raises(ValueError, match="is being rewritten"):
            ROUTES[name].load(base, tmp_path / "good")
    assert torch.equal(logits(base), logits(causal_lm()))
    assert base.model.layers[1].mlp.up_proj.weight.is_meta and not hasattr(base, "peft_config")


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "dir", "device"]
)
def test_what_is_no_regular_file_is_not_read(bad: Path, route: Route, make: Callable, name: str) -> None:
    (bad / WEIGHTS).unlink()
    make(bad / name)
    # A pipe that is open here does not stop the test for ever if it should be read.
    pipe = os.open(bad / name, os.O_RDWR | os.O_NONBLOCK) if make is os.mkfifo else None
    route.refuses(bad, f"{name} are no regular file")
    if pipe is not None:
        os.close(pipe)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "not a readable"), (b"no tensors here", "not a readable"), (-8, "not a readable"), (None, "is missing")],
)
def test_weights_that_cannot_be_read(bad: Path, route: Route, content: bytes | int | None, says: str) -> None:
    whole = (bad / WEIGHTS).read_bytes()
    (bad / WEIGHTS).unlink()
    if content is not None:
        (bad / WEIGHTS).write_bytes(content if isinstance(content, bytes) else whole[:content])
    route.refuses(bad, f"{WEIGHTS}.*{says}")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"peft_type": ["IAPT"]}', "{"], ids=lambda text: text[:22])
def test_configs_that_cannot_be_read(bad: Path, route: Route, text: str) -> None:
    (bad / CONFIG).write_text(text)
    route.refuses(bad, f"{CONFIG} is no adapter's config")


def test_a_pickle_is_checked_as_well(bad: Path, route: Route) -> None:
    weights = load_file(bad / WEIGHTS)
    (bad / WEIGHTS).unlink()
    torch.save(weights, bad / "adapter_model.bin")
    route.load(route.model("iapt"), bad)
    torch.save({**weights, f"{PREFIX}lm_head.weight": torch.ones(VOCAB, 32)}, bad / "adapter_model.bin")
    change_config(bad, weights_digest=None)
    route.refuses(bad, "hold 1 tensor")


# ------------------------------------------------------------------------------------------------ given by the caller


def test_a_config_that_is_given(bad: Path) -> None:
    model = PeftModel.from_pretrained(causal_lm(), bad, config=type(config()).from_pretrained(bad))
    assert torch.equal(logits(model), logits(adapted(causal_lm(), config())))
    change_weights(bad, OTHERS["head"])
    for given in (type(config()).from_pretrained(bad), config()):
        Route(plain, lambda m, folder: PeftModel.from_pretrained(m, folder, config=given), "").refuses(bad, "hold 1")


def test_a_state_dict_that_is_given(bad: Path) -> None:
    weights, model = load_file(bad / WEIGHTS), causal_lm()
    before = picture(model)
    for wrong in ({**weights, f"{PREFIX}lm_head.weight": torch.ones(VOCAB, 32)}, dict([*weights.items()][1:])):
        with pytest.raises(ValueError, match="The weights in the state dict (hold|lack) 1 tensor"):
            model.load_adapter(peft_config=config(), adapter_state_dict=wrong)
        assert_unchanged(model, before)
    model.load_adapter(peft_config=config(), adapter_state_dict=weights)
    assert torch.equal(logits(model), logits(adapted(causal_lm(), config())))
