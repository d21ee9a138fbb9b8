# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the code's structure promises: imports, sizes, and what attaching, a training pass and a step of decoding do to a model."""

from __future__ import annotations

import ast
import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from methods import METHODS
from peft import get_peft_model
from tiny import batch, causal_lm, perturb
from torch.utils._python_dispatch import TorchDispatchMode

import peft_instance_prompt
from peft_instance_prompt.engine import stack
from peft_instance_prompt.engine.calls import CHECKPOINTS_HOOKS


ROOT = Path(peft_instance_prompt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


# ------------------------------------------------------------------------------------------------------------ the text


def imports_of(file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in it, those for types included."""
    name = next(name for name, path in modules.items() if path == file)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            base = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{one.name}" if f"{source}.{one.name}" in modules else source for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return {one for one in found if one in modules and one != name}


def test_no_circle_of_imports() -> None:
    """Those within functions and for types count: what needs each other belongs together."""
    modules = {}
    for file in FILES:
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    left = {name: imports_of(file, modules) for name, file in modules.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or upon one: {sorted(left)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_maths_knows_no_library() -> None:
    for file in ROOT.glob("nn/*.py"):
        names = {
            word
            for line in file.read_text().splitlines()
            if line.startswith(("import", "from"))
            for word in line.split()
        }
        assert names.isdisjoint({"peft", "transformers"}), file


def test_no_method_is_named_in_shared_code() -> None:
    """`peft_type` and class names of methods stand in their own files, and in the lists of what the package exports."""
    names = [name.stem for name in ROOT.glob("methods/*.py") if not name.stem.startswith("_")]
    allowed = {"__init__.py", "tuners.py", "methods/__init__.py", "tools/choices.py", "tools/bilevel.py"}
    for file in FILES:
        where = str(file.relative_to(ROOT))
        if where.startswith("methods/") or where in allowed:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        literals = {
            one.value.lower()
            for node in compared
            for one in ast.walk(node)
            if isinstance(one, ast.Constant) and isinstance(one.value, str)
        }
        assert literals.isdisjoint(names), where


# ------------------------------------------------------------------------------------------------------------ attaching


@contextmanager
def counted_walks(monkeypatch: pytest.MonkeyPatch, root: torch.nn.Module) -> Iterator[list[str]]:
    """Notes each walk of the package's own over `root`, or over a part of it that holds all of its layers."""
    layers = next(module for module in root.modules() if isinstance(module, torch.nn.ModuleList))
    large = [module for module in root.modules() if any(inside is layers for inside in module.modules())]
    walks: list[str] = []

    def noting(real: Callable) -> Callable:
        def walk(module, *args, **kwargs):
            caller = sys._getframe(1)
            own = str(ROOT) in caller.f_code.co_filename and caller.f_code.co_name != real.__name__  # no recursion
            if own and any(module is one for one in large):
                walks.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} {real.__name__}")
            return real(module, *args, **kwargs)

        return walk

    for name in ("modules", "named_modules"):
        monkeypatch.setattr(torch.nn.Module, name, noting(getattr(torch.nn.Module, name)))
    for real in (stack.tree_of,):
        fake = noting(real)
        for name, module in list(sys.modules.items()):
            if name.startswith("peft_instance_prompt") and getattr(module, real.__name__, None) is real:
                monkeypatch.setattr(module, real.__name__, fake)
    yield walks


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "head"])
def test_walks_of_the_module_tree(monkeypatch: pytest.MonkeyPatch, kind: str, fields: dict) -> None:
    """One to find out all facts about the model, and one, when the adapter is in it, for heads that PEFT has copied."""
    base = causal_lm()
    with counted_walks(monkeypatch, base) as walks:
        model = get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM", **fields))
        assert 1 <= len(walks) <= 2, walks
        attaching = len(walks)
        model.eval()(**batch(7))
        # A plain pass walks over its stack, to switch dropout off.
        assert not [where for where in walks[attaching:] if not where.startswith("open.py")], walks


def test_context_variables_of_the_engine() -> None:
    """Two hold the state of a call: what was said of it, and the pass of the stack that runs."""
    trees = [ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES if file.parent.name == "engine"]
    made = [node for tree in trees for node in tree if isinstance(node, ast.Call)]
    assert sum(isinstance(node.func, ast.Name) and node.func.id == "ContextVar" for node in made) == 2


# ------------------------------------------------------------------------------------------------------------- decoding


class Operators(TorchDispatchMode):
    """Counts the operators that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def decoding_step(model: torch.nn.Module, names: list[str] | None = None) -> Counter[str]:
    """The operators of the second step of decoding, of eight rows."""
    ids, named = batch(12)["input_ids"].repeat(8, 1), {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        cache = model(ids, use_cache=True, **named).past_key_values
        for _ in range(2):
            with Operators() as operators:
                cache = model(ids[:, :1], past_key_values=cache, use_cache=True, **named).past_key_values
    return operators.names


# What a slot costs a step: the positions of its tokens are shifted by an addition, in place of a view; and late slots are hidden from
# the first layers by a mask, made once a step.
SHIFT = Counter({"aten.arange.start": 1, "aten.add.Tensor": 1})


def test_operators_of_a_step_of_decoding(kind: str) -> None:
    """With one adapter and with eight in a batch they are the bare model's, but for the shift of positions where there are slots."""
    make = METHODS[kind]
    bare = decoding_step(causal_lm())
    model = perturb(get_peft_model(causal_lm(), make(task_type="CAUSAL_LM"))).eval()
    names = ["default", *(f"a{number}" for number in range(7))]
    for name in names[1:]:
        model.add_adapter(name, make(task_type="CAUSAL_LM"))
    one, eight = decoding_step(model), decoding_step(model, names)
    generator = model.base_model.model.model.get_submodule(f"{make().method}.{make().method}_generator.default")
    if generator.num_slots == 0:
        assert one == eight == bare
    elif generator.first_visible_layer == 0:
        assert one - bare == SHIFT and sum((bare - one).values()) <= 2
        assert eight - bare == SHIFT
    else:  # a mask for the layers below the prompt, whatever the number of tenants
        assert eight == one or sum((eight - one).values()) <= 8


# ------------------------------------------------------------------------------------------------------------- training


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes where the package asks a tensor for its values, for which the host waits for the device."""
    found: list[str] = []

    def note(name):
        real = getattr(torch.Tensor, name)

        def asking(self, *args, **kwargs):
            frame = sys._getframe(1)
            if str(ROOT) in frame.f_code.co_filename:
                found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, asking)

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
        note(name)
    yield found


@pytest.mark.parametrize("method", ["iapt", "idpg_single", "preft"])
def test_the_host_waits_twice_in_a_training_pass(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Once for the checks of the labels and once for the columns of the instruction, beside what the bare model does."""
    model = get_peft_model(causal_lm(), METHODS[method](task_type="CAUSAL_LM")).train()
    inputs = batch(9, 9)
    labels = inputs["input_ids"].where(torch.arange(9) > 4, -100)
    model(**inputs, labels=labels)  # what is found out once
    with waits(monkeypatch) as found:
        model(**inputs, labels=labels)
    assert 1 <= len(found) <= 2, found


@pytest.mark.skipif(
    CHECKPOINTS_HOOKS, reason="these releases need a wrapper around the checkpoints of a training pass"
)
def test_a_call_leaves_nothing_on_the_modules(kind: str) -> None:
    """No attribute, hook or wrapper of any module comes, goes or changes in a call: evaluation, training, generation, checkpointing."""
    model = get_peft_model(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", init_weights=False))
    model.get_base_model().gradient_checkpointing_enable()
    inputs = batch(7, 5)
    labels = inputs["input_ids"].where(torch.arange(7) > 4, -100)

    def picture() -> dict[str, dict]:
        seen = {}
        for name, module in stack.tree_of(model).items():  # without adapters, which belong to this package alone
            # PEFT itself puts `prepare_inputs_for_generation` in its place.
            own = {
                key: value
                for key, value in vars(module).items()
                if key not in ("_parameters", "_buffers", "training", "prepare_inputs_for_generation")
            }
            seen[name] = {
                key: copy.copy(value) if isinstance(value, (dict, list)) else value for key, value in own.items()
            }
        return seen

    before = picture()
    model.train()(**inputs, labels=labels, use_cache=False).loss.backward()
    model.eval()(**inputs)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    after = picture()
    for name in before:
        changed = {
            key
            for key in before[name].keys() | after[name].keys()
            if before[name].get(key) is not after[name].get(key)
        }
        changed = {key for key in changed if before[name].get(key) != after[name].get(key)}
        assert not changed, (name, changed)


def test_names_of_test_files_are_unique() -> None:
    """pytest imports test files by their bare names: of two with one name, the second cannot be collected."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
