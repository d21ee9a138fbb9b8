# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What a PEFT user does with a model: make it, switch, save, load, mix, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from peft.utils import get_peft_model_state_dict
from tiny import adapted, assert_same, batch, causal_lm, configure, perturb

from peft_instance_prompt.engine.layer import InstancePromptLayer


INPUTS = batch(9, 6)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def config(method: str, **fields):
    return METHODS[method](**{"task_type": "CAUSAL_LM", **fields})


def prompted(method: str, family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    return adapted(causal_lm(family), config(method, **fields), seed=seed)


@torch.no_grad()
def logits(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits


def traces(model: torch.nn.Module) -> tuple:
    """All that an adapter could leave behind."""
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
    ]
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return hooks, attributes, sorted(model.config.to_dict()), sorted(model.state_dict())


# ------------------------------------------------------------------------------------------------ making and taking off


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_with_and_without_task_type(method: str, task_type: str | None) -> None:
    model = prompted(method, task_type=task_type)
    assert isinstance(model, PeftModelForCausalLM) == (task_type is not None)
    assert_same(logits(model), logits(prompted(method)), 0)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), prompted(method).generate(**INPUTS, **GREEDY))


def test_only_the_adapter_is_trained(method: str) -> None:
    base = causal_lm()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config(method))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = get_peft_model_state_dict(model)
    start = {name: tensor.clone() for name, tensor in start.items()}
    for step in range(2):
        model.train()(**INPUTS, labels=LABELS).loss.backward()
        if step == 1:
            missing = [
                n for n, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
            ]
            assert not missing, "no gradient reaches these at the second step"
        optimizer.step()
        optimizer.zero_grad()
    end = get_peft_model_state_dict(model)
    assert all(not torch.equal(end[name], start[name]) for name in start if start[name].is_floating_point())
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_fresh_adapter_copies_the_first_token(method: str) -> None:
    """What makes a fresh adapter nearly a no-op where the first token is an attention sink, as it is in trained models
    and not in these: whatever the random draw, each vector is a copy of that token's state, or adds nothing."""
    if config(method).init_weights is not True:
        pytest.skip(f"{method} starts otherwise")
    torch.manual_seed(1)
    model = get_peft_model(causal_lm(), config(method)).eval()
    (layer,) = (module for module in model.modules() if isinstance(module, InstancePromptLayer))
    generator = layer.generators["default"]
    forward, calls = generator.forward, []

    def watched(instances, depth: int, weights=None) -> torch.Tensor:
        prompts = forward(instances, depth, weights)
        copy_of = instances.base_state  # (G, 1, d)
        calls.append(depth)
        assert_same(
            prompts, torch.zeros_like(prompts) if generator.adds and depth >= 0 else copy_of.expand_as(prompts)
        )
        return prompts

    generator.forward = watched
    first = logits(model)
    assert sorted(calls) == sorted(generator.depths)
    torch.manual_seed(2)
    assert_same(logits(get_peft_model(causal_lm(), config(method)).eval()), first)


def test_random_start_is_no_no_op(kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(causal_lm(), config(kind, init_weights=False)).eval()
    fresh = get_peft_model(causal_lm(), config(kind)).eval()
    assert (logits(model) - logits(fresh)).abs().max() > 1e-2


def test_unload_leaves_nothing(method: str) -> None:
    base = causal_lm()
    before, plain = traces(base), logits(base)
    model = prompted(method)
    for _ in range(2):  # a second adapter after the first was taken off
        model = adapted(base, config(method))
        logits(model)
        model.generate(**INPUTS, **GREEDY)
        model.train()(**INPUTS, labels=LABELS).loss.backward()
        model.eval()
        again = model.unload()
        assert again is base
        assert [x for x in traces(base) if x not in before] == []
        assert torch.equal(logits(base), plain)


def test_merging_is_refused(kind: str) -> None:
    model = prompted(kind)
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged.*`unload\(\)`"):
            merge()
    assert torch.equal(logits(model), expected)


def test_switching(method: str) -> None:
    model = prompted(method)
    model.add_adapter("b", config(method, num_virtual_tokens=2))
    perturb(model, seed=1, adapter="b")
    a = logits(model)
    assert torch.equal(a, logits(prompted(method))), "a second adapter changes the first"
    model.set_adapter("b")
    b = logits(model)
    assert (a - b).abs().max() > 1e-2
    active = {name for name, p in model.named_parameters() if p.requires_grad}
    assert active and all(".b." in name for name in active)
    text = model.generate(**INPUTS, **GREEDY)
    model.set_adapter("default")
    assert torch.equal(logits(model), a)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(causal_lm()))
        assert torch.equal(model.generate(**INPUTS, **GREEDY), causal_lm().generate(**INPUTS, **GREEDY))
    assert torch.equal(logits(model), a)
    model.set_adapter("b")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["b"]
    assert not [name for name in model.state_dict() if ".default." in name]
    assert torch.equal(logits(model), b)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), text)
    with pytest.raises(ValueError, match="Only one"):
        model.base_model.set_adapter(["b", "default"])
    with pytest.raises((ValueError, KeyError), match="missing"):
        model.set_adapter("missing")


def test_deleting_the_last_adapter(kind: str) -> None:
    model = prompted(kind)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(causal_lm()))
    assert torch.equal(logits(model.base_model.unload()), logits(causal_lm()))


def test_status_and_counts(method: str, capsys) -> None:
    model = prompted(method)
    model.add_adapter("b", config(method))
    (layer,) = get_layer_status(model)
    assert layer.name == "model.model." + layer.name.rsplit(".", 1)[1] or layer.name.startswith("model.")
    assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["default"], [])
    assert layer.available_adapters == ["b", "default"]
    assert layer.requires_grad == {"default": True, "b": False}
    status = get_model_status(model)
    own = sum(p.numel() for name, p in model.named_parameters() if ".default." in name)
    assert (status.adapter_model_type, status.active_adapters) == ("PeftModel", ["default"]) or status.active_adapters
    assert (status.num_adapter_layers, status.trainable_params) == (1, own)
    model.print_trainable_parameters()
    assert f"trainable params: {own:,}" in capsys.readouterr().out
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


# ------------------------------------------------------------------------------------------------------ save and load

LOAD = """
import sys, torch, warnings
path, folder, methods = {path!r}, {folder!r}, {methods!r}
sys.path[:0] = path
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import batch, causal_lm
import mean_prompt, peft_instance_prompt  # a method of one's own is there when its file is imported
inputs, out = batch(9, 6), {{}}

def look(model):
    with torch.no_grad():
        return model.eval()(**inputs).logits

for method in methods:
    where, seen = folder + "/" + method, {{}}
    for name, kwargs in (
        ("default", {{}}),
        ("other_name", {{"adapter_name": "other"}}),
        ("trainable", {{"is_trainable": True}}),
        ("low_cpu", {{"low_cpu_mem_usage": True, "adapter_name": "a_b-c"}}),
    ):
        torch.manual_seed(len(name))
        model = PeftModel.from_pretrained(causal_lm(), where, **kwargs)
        assert any(p.requires_grad for p in model.parameters()) == (name == "trainable"), name
        seen[name] = look(model)
    model = PeftModel.from_pretrained(causal_lm(), where + "/second")
    model.load_adapter(where, adapter_name="late")
    seen["second"] = look(model)
    model.set_adapter("late")
    seen["late"] = look(model)
    native = causal_lm()
    native.load_adapter(where, adapter_name="n")
    seen["native"] = look(native)
    seen["auto"] = look(AutoPeftModelForCausalLM.from_pretrained(where))
    out[method] = seen
torch.save((look(causal_lm()), out), folder + "/out.pt")
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Logits of each method's adapters here, and what a new process makes of them, by each way to load; and of the base."""
    folder, here = tmp_path_factory.mktemp("saved"), {}
    causal_lm().save_pretrained(folder / "base")
    for method in METHODS:
        for seed, where in ((0, folder / method), (3, folder / method / "second")):
            base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
            model = adapted(base, config(method), seed=seed)
            model.save_pretrained(where)
            here[method, seed] = logits(model)
        files = {file.name for file in (folder / method).iterdir() if file.is_file() and file.name != "README.md"}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
    tests = Path(__file__).parent
    code = LOAD.format(folder=str(folder), methods=list(METHODS), path=[str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return here, *torch.load(folder / "out.pt")


def test_new_process(method: str, new_process) -> None:
    here, bare, out = new_process
    assert torch.equal(bare, logits(causal_lm()))
    assert not torch.equal(here[method, 0], here[method, 3])
    assert set(out[method]) == {"default", "other_name", "trainable", "low_cpu", "second", "late", "native", "auto"}
    for name, found in out[method].items():
        assert torch.equal(found, here[method, 3 if name == "second" else 0]), name


def test_training_goes_on_after_loading(method: str, tmp_path: Path) -> None:
    model = prompted(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(causal_lm(), tmp_path, is_trainable=True)
    grads = []
    for one in (model, again):
        torch.manual_seed(3)
        one.train()(**INPUTS, labels=LABELS).loss.backward()
        grads.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_state_dict_names_no_adapter(method: str) -> None:
    model = adapted(causal_lm(), config(method), name="somename")
    state = get_peft_model_state_dict(model, adapter_name="somename")
    weights = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(state) >= len(weights)
    assert not [name for name in state if "somename" in name]


def test_modules_to_save(kind: str, tmp_path: Path) -> None:
    model = prompted(kind, modules_to_save=["lm_head"])
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(causal_lm(), tmp_path, adapter_name="x")
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(prompted(kind))).abs().max() > 1e-2


def test_classification_head_is_saved(kind: str, tmp_path: Path) -> None:
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return tf.LlamaForSequenceClassification(configure("llama", num_labels=3)).eval()

    model = adapted(base(), METHODS[kind](task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert logits(model).shape == (2, 3)
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(base())).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- transformers' own adapters


@pytest.mark.native
def test_native_adapters(method: str, tmp_path: Path) -> None:
    peft_model = prompted(method)
    peft_model.save_pretrained(tmp_path / "peft")
    expected = logits(peft_model)
    model = causal_lm()
    model.add_adapter(config(method), adapter_name="own")
    perturb(model, adapter="own")
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), peft_model.generate(**INPUTS, **GREEDY))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(causal_lm()))
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "native")
    assert json.loads((tmp_path / "native" / "adapter_config.json").read_text())["peft_type"]
    # From one to the other, in both directions.
    assert torch.equal(logits(PeftModel.from_pretrained(causal_lm(), tmp_path / "native")), expected)
    model.add_adapter(config(method), adapter_name="second")
    perturb(model, seed=4, adapter="second")
    model.set_adapter("second")
    assert (logits(model) - expected).abs().max() > 1e-2
    model.load_adapter(tmp_path / "peft", adapter_name="third")
    model.set_adapter("third")
    assert torch.equal(logits(model), expected)
    model.set_adapter("own")
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert not [name for name in model.state_dict() if ".second." in name]


@pytest.mark.native
@pytest.mark.parametrize("template", [[90], None])
def test_native_generate(kind: str, template: list[int] | None) -> None:
    model = causal_lm()
    model.add_adapter(config(kind, response_template=template))
    perturb(model)
    ids = torch.tensor([[5, 6, 7, 8, 90], [9, 10, 11, 12, 90]])
    text = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), text)
    assert torch.equal(model.generate(ids[:1], **GREEDY, assistant_model=causal_lm(seed=1)), text[:1])


@pytest.mark.native
def test_native_instruction_mask(kind: str) -> None:
    model = causal_lm()
    model.add_adapter(config(kind))
    perturb(model)
    mask = (torch.arange(9) > 4).expand(2, -1) & INPUTS["attention_mask"].bool()
    assert_same(logits(model, instruction_mask=mask), logits(prompted(kind), instruction_mask=mask), 0)
    model.train()
    with pytest.raises(ValueError, match="cannot tell instruction from response"):
        model(**INPUTS)


@pytest.mark.native
def test_with_lora(kind: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    prompt = prompted(kind)
    prompt.save_pretrained(tmp_path)
    model = causal_lm()
    model.add_adapter(lora, adapter_name="lora")
    only_lora = logits(model)
    model.load_adapter(tmp_path, adapter_name="prompt")
    model.set_adapter("lora")
    assert torch.equal(logits(model), only_lora)
    model.set_adapter("prompt")
    assert torch.equal(logits(model), logits(prompt))
    model.set_adapter(["lora", "prompt"])
    both = logits(model)
    assert min((both - logits(prompt)).abs().max(), (both - only_lora).abs().max()) > 1e-2
    out = model.generate(**INPUTS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    scope = mask.masked_fill(torch.arange(15) >= 9, 0)
    with torch.no_grad():
        forced = model(out.sequences, attention_mask=mask, instruction_mask=scope).logits[:, 8:-1]
    assert_same(torch.stack(out.logits, dim=1), forced)
    with pytest.raises(ValueError, match="different peft types"):
        prompt.add_adapter("lora", lora)


# ------------------------------------------------------------------------------------------------------ mixed batches

MIX = batch(9, 6, 8, 5, 7, 9)
NAMES = ["b", "default", "__base__", "c", "default", "b"]


def of_several(method: str) -> PeftModel:
    model = prompted(method)
    model.add_adapter("b", config(method))
    model.add_adapter("c", config(method, num_virtual_tokens=2))
    perturb(model, seed=1, adapter="b")
    perturb(model, seed=2, adapter="c")
    return model


def alone(model: PeftModel, row: int, call):
    n = int(MIX["attention_mask"][row].sum())
    inputs = {"input_ids": MIX["input_ids"][row : row + 1, -n:]}
    if NAMES[row] == "__base__":
        with model.disable_adapter():
            return call(**inputs)
    model.set_adapter(NAMES[row])
    out = call(**inputs)
    model.set_adapter("default")
    return out


def test_mixed_batch_forward(method: str) -> None:
    model = of_several(method)
    with torch.no_grad():
        mixed = model(**MIX, adapter_names=NAMES, output_hidden_states=True)
        for row in range(6):
            own = alone(model, row, lambda **kw: model(**kw, output_hidden_states=True))
            n = own.logits.shape[1]
            assert_same(mixed.logits[row, -n:], own.logits[0])
            for together, states in zip(mixed.hidden_states, own.hidden_states):
                assert_same(together[row, -n:], states[0])
        same = model(**MIX, adapter_names=["b"] * 6).logits
        model.set_adapter("b")
        real = MIX["attention_mask"].bool()
        assert_same(same[real], model(**MIX).logits[real])
        bare = model(**MIX, adapter_names=["__base__"] * 6).logits
        assert torch.equal(bare, causal_lm()(**MIX).logits)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_mixed_batch_generate(method: str, how: dict) -> None:
    model = of_several(method)
    mixed = model.generate(**MIX, **GREEDY, **how, adapter_names=NAMES)
    copies = how.get("num_return_sequences", 1)
    for row in range(6):
        own = alone(model, row, lambda **kw: model.generate(**kw, **GREEDY, **how))
        assert torch.equal(mixed[row * copies : (row + 1) * copies, 9:], own[:, -6:]), NAMES[row]


def test_mixed_batch_with_instruction_mask(method: str) -> None:
    model = of_several(method)
    mask = MIX["attention_mask"].clone()
    mask[:, -2:] = 0
    mixed = model.generate(**MIX, **GREEDY, instruction_mask=mask, adapter_names=NAMES)
    with torch.no_grad():
        out = model(**MIX, instruction_mask=mask, adapter_names=NAMES).logits
    for row in range(6):
        own = mask[row, MIX["attention_mask"][row].bool()][None]
        text = alone(model, row, lambda **kw: model.generate(**kw, **GREEDY, instruction_mask=own))
        assert torch.equal(mixed[row, 9:], text[0, -6:])
        with torch.no_grad():
            expected = alone(model, row, lambda **kw: model(**kw, instruction_mask=own).logits[0])
        assert_same(out[row, -len(expected) :], expected)


def test_mixed_batch_with_templates_of_their_own(kind: str) -> None:
    model = prompted(kind, response_template=[90])
    model.add_adapter("b", config(kind, response_template=[91, 92]))
    perturb(model, seed=1, adapter="b")
    ids = torch.tensor([[5, 6, 90, 8, 9, 10], [5, 6, 7, 91, 92, 10]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        by_template = model(ids, adapter_names=["default", "b"]).logits
        assert_same(by_template, model(ids, adapter_names=["default", "b"], instruction_mask=mask).logits, 1e-6)
        with pytest.raises(ValueError, match=r"\[91, 92\] does not occur"):
            model(ids, adapter_names=["b", "b"])


def test_mixed_batch_of_different_sizes(kind: str) -> None:
    """Bottlenecks and layers of their own: adapters that cannot be stacked."""
    model = of_several(kind)
    fields = {n: v for n, v in (("bottleneck_dim", 4), ("num_virtual_tokens", 3)) if hasattr(config(kind), n)}
    model.add_adapter("small", config(kind, **fields))
    perturb(model, seed=5, adapter="small")
    names = ["small", "default", "b", "small", "__base__", "c"]
    with torch.no_grad():
        mixed = model(**MIX, adapter_names=names).logits
        for row in (0, 3):
            n = int(MIX["attention_mask"][row].sum())
            model.set_adapter("small")
            assert_same(mixed[row, -n:], model(MIX["input_ids"][row : row + 1, -n:]).logits[0])


def test_bad_adapter_names(kind: str) -> None:
    model = of_several(kind)
    expected = logits(model)
    with pytest.raises(ValueError, match="non-existing adapter.*: nobody, someone"):
        logits(model, adapter_names=["someone", "nobody"])
    with pytest.raises(ValueError, match="each of the 2 rows, got 3|rows, got 3|length of `adapter_names`"):
        logits(model, adapter_names=["b", "b", "c"])
    with pytest.raises(TypeError, match="expected a list"):
        logits(model, adapter_names="b")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**INPUTS, labels=LABELS, adapter_names=["b", "c"])
    assert torch.equal(logits(model.eval()), expected)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 64}, "`hidden_size` 32, but this one has 64"),
        ({"num_hidden_layers": 2, "layer_types": None}, "`num_layers` 3, but this one has 2"),
    ],
)
def test_adapter_for_another_size(method: str, changes: dict, says: str, tmp_path: Path) -> None:
    prompted(method).save_pretrained(tmp_path)
    base = causal_lm(**changes)
    before, plain = traces(base), logits(base)
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: get_peft_model(base, PeftConfig.from_pretrained(tmp_path)),
        lambda: base.load_adapter(tmp_path, adapter_name="x"),
    ):
        with pytest.raises(ValueError, match=says):
            load()
    assert torch.equal(logits(base), plain)
    hooks, _, _, state = traces(base)
    assert hooks == before[0] and state == before[3]
    assert not any(isinstance(module, InstancePromptLayer) for module in base.modules())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task_type": "SEQ_CLS"}, "does not fit the base model, which is a causal language model"),
        ({"task_type": "TOKEN_CLS"}, "does not fit"),
        ({"task_type": "QUESTION_ANS"}, "does not fit"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "does not fit"),
        ({"target_modules": ["encoder"]}, r"`target_modules` \['encoder'\] matches none .*'model.layers': 'model'"),
        ({"target_modules": ["q_proj"]}, "matches none"),
        ({"target_modules": ["odel"]}, "matches none"),
        ({"target_modules": "layers"}, "matches none"),  # a regular expression for the whole name
        ({"exclude_modules": ["model"]}, "Mind `exclude_modules`"),
        ({"layers_to_transform": [0, 3]}, r"`layers_to_transform` must .*3\]"),
        ({"layers_to_transform": 7}, "`layers_to_transform` must .*7"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(kind: str, fields: dict, says: str) -> None:
    if not all(hasattr(config(kind), name) for name in fields):
        pytest.skip(f"{kind} has no such field")
    base = causal_lm()
    before = traces(base)
    with pytest.raises(ValueError, match=says):
        get_peft_model(base, config(kind, **fields))
    assert traces(base)[0] == before[0] and traces(base)[3] == before[3]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["model"]},
        {"target_modules": ["layers"]},
        {"target_modules": ["model.layers"]},
        {"target_modules": r"model\.lay.*"},
        {"exclude_modules": ["vision_tower"]},
        {"exclude_modules": r".*\.mlp"},
    ],
    ids=str,
)
def test_ways_to_name_the_stack(kind: str, fields: dict) -> None:
    assert torch.equal(logits(prompted(kind, **fields)), logits(prompted(kind)))


def test_task_for_another_kind_of_model(kind: str) -> None:
    bert = tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match="which is an encoder or a classifier"):
        get_peft_model(tf.BertForSequenceClassification(bert), METHODS[kind](task_type="CAUSAL_LM"))


def test_model_without_a_stack(kind: str) -> None:
    with pytest.raises(ValueError, match="No transformer stack .* found in Sequential.*`target_modules`"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), METHODS[kind]())


def test_adapter_in_another_precision(kind: str) -> None:
    base = causal_lm().to(torch.bfloat16)
    model = adapted(base, config(kind))
    out = logits(model)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    low = get_peft_model(causal_lm().to(torch.bfloat16), config(kind), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in low.named_parameters() if ".default." in n} == {torch.bfloat16}
    assert logits(low.eval()).isfinite().all()
    assert model.generate(**INPUTS, **GREEDY).shape == (2, 15)


def test_auto_class_in_the_same_process(kind: str, tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = adapted(base, config(kind))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
