# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`python -m peft_instance_prompt run` and `env`: how Python is started, what is started, and TRL's own config."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from methods import METHODS
from trl import ModelConfig

from peft_instance_prompt import IAPTConfig, commands
from peft_instance_prompt.__main__ import main


# ------------------------------------------------------------------------------------------------- how Python is started


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages that are called like PEFT, TRL and ours, and tell in which order they are imported."""
    body = {
        "peft.py": "import os; print('peft', os.environ.get('SET_BY_THE_SCRIPT'))",
        "trl.py": "print('trl')",
        "peft_instance_prompt/__init__.py": "import peft; print('ours')",
        "peft_instance_prompt/commands.py": "import peft, sys\n"
        "def import_methods(): print('methods')\ndef choose_config(): print('config', sys.modules['trl'].__name__)",
        "other.py": "",
    }
    for name, text in body.items():
        file = tmp_path / "packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "packages"


def python(code: str, *folders: Path, **env: str) -> tuple[str, str]:
    path = os.pathsep.join(map(str, (commands.STARTUP, *folders)))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],  # -P: without this folder
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_package_follows_peft(packages: Path) -> None:
    """At its first import and not at the start: what the script sets before still counts, and a probe imports nothing."""
    code = "import os, sys, importlib.util as u\nu.find_spec('peft')\nprint('peft' in sys.modules, 'torch' in sys.modules)\n"
    code += "os.environ['SET_BY_THE_SCRIPT'] = '1'\nimport other, peft, trl, peft_instance_prompt\nprint(peft.__spec__.name)"
    assert python(code, packages)[0].split("\n") == ["False False", "peft 1", "ours", "methods", "trl", "peft", ""]


def test_a_process_without_peft_is_left_alone(packages: Path) -> None:
    code = "import sys; print([n for n in ('torch', 'peft', 'peft_instance_prompt') if n in sys.modules], sys.path[0])"
    assert python(code, packages)[0] == f"[] {packages}\n", "the folder stays on nobody's sys.path"


def test_the_package_that_comes_first(packages: Path) -> None:
    assert python("import peft_instance_prompt", packages)[0] == "peft None\nmethods\nours\n"


def test_a_config_waits_for_trl(packages: Path) -> None:
    assert python("import trl, peft", packages)[0] == "trl\npeft None\nours\nmethods\n"
    found = python("import trl, peft", packages, PEFT_INSTANCE_PROMPT_CONFIG="x.yaml")[0]
    assert found == "trl\npeft None\nmethods\nours\nconfig trl\n"


def test_the_environments_own_sitecustomize_runs(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys; print('own', __name__, sys.modules[__name__].__file__)"
    )
    own = f"own sitecustomize {tmp_path / 'site' / 'sitecustomize.py'}\n"
    assert python("import peft", tmp_path / "site", packages)[0] == own + "peft None\nours\nmethods\n"


def test_a_folder_of_pefts_name_is_no_package(tmp_path: Path) -> None:
    """A Python that has no PEFT imports it as it would without us."""
    code = (
        "import sys\nsys.path = [one for one in sys.path if 'packages' not in one]\nimport peft; print(peft.__path__)"
    )
    (tmp_path / "peft").mkdir()
    assert python(code, tmp_path)[0] == f"_NamespacePath(['{tmp_path / 'peft'}'])\n"


def test_a_python_without_the_package_says_so(packages: Path) -> None:
    missing = "raise ModuleNotFoundError(name='peft_instance_prompt')"
    (packages / "peft_instance_prompt" / "__init__.py").write_text(missing)
    out, err = python("import peft; print('goes on')", packages)
    assert (
        out == "peft None\ngoes on\n"
        and err.startswith("peft_instance_prompt is not installed for")
        and err.count("\n") == 1
    )


def test_an_error_of_the_package_is_not_hidden(packages: Path) -> None:
    (packages / "peft_instance_prompt" / "__init__.py").write_text("import nonesuch")
    with pytest.raises(AssertionError, match="No module named 'nonesuch'"):
        python("import peft", packages)
    with pytest.raises(AssertionError, match="(?s)nonesuch.*nonesuch"):  # nor is it at a second attempt
        python(
            "try: import peft\nexcept ImportError as error: print(error, file=__import__('sys').stderr)\nimport peft",
            packages,
        )


# ------------------------------------------------------------------------------------------------------- what is started


def test_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").touch()
    python, scripts = sys.executable, Path(sys.executable).parent
    assert commands.find_tool([str(script), "--a"], None) == [python, str(script), "--a"]
    assert commands.find_tool([str(tmp_path / "app")], None) == [python, str(tmp_path / "app")]
    assert commands.find_tool([], ["trl.scripts.sft", "-m", "x"]) == [python, "-m", "trl.scripts.sft", "-m", "x"]
    monkeypatch.setenv("PATH", "/bin")  # an environment that was not activated
    assert commands.find_tool(["lm_eval", "--tasks", "x"], None) == [str(scripts / "lm_eval"), "--tasks", "x"]
    assert commands.find_tool(["sh", "train.sh"], None) == ["/bin/sh", "train.sh"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["run"], "Name a tool to run: a script"),
        (["run", "-m"], "Name a module after `-m`"),
        (["run", "nonesuch.py"], "There is no script 'nonesuch.py'"),
        (["run", "nonesuch"], "There is no command 'nonesuch'"),
        (
            ["run", "--import", "nonesuch", "sh"],
            "`--import` names a module that cannot be imported: No module named 'nonesuch'",
        ),
        (["run", "--import", ".rel", "sh"], "`--import` names a module that cannot be imported"),
        (["run", "x" * 5000], "There is no tool of the name 'xxx"),
        (["env", "--peft-config", "x" * 5000], "xxx cannot be read as the config of an adapter: File name too long"),
        (
            ["env", "--peft-config", "/dev/zero"],
            "/dev/zero must be a file with the config of an adapter; it is no regular",
        ),
        (["x" * 5000], "xxx cannot be read: File name too long"),
        (["env", "--peft-config", "nonesuch.yaml"], "nonesuch.yaml cannot be read as the config of an adapter"),
    ],
)
def test_what_cannot_be_started(line: list[str], says: str, capsys) -> None:
    assert main(line) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and says in said.err and said.err.count("\n") == 1


def test_env_prints_what_run_sets(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my config.yaml"
    file.write_text("peft_type: IAPT")
    monkeypatch.setenv("PYTHONPATH", f"{commands.STARTUP}{os.pathsep}/x y")
    monkeypatch.chdir(tmp_path)
    assert main(["env", "--peft-config", "my config.yaml", "--import", "json", "--import", "mean_prompt"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"export PYTHONPATH='{commands.STARTUP}{os.pathsep}/x y'",
        "export PEFT_INSTANCE_PROMPT_IMPORT=json,mean_prompt",
        f"export PEFT_INSTANCE_PROMPT_CONFIG='{file}'",
    ]
    done = []
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(os, "execv", lambda *call: done.append((call, os.environ["PYTHONPATH"])))
    main(["run", "sh", "-c", "true"])
    assert done == [(("/bin/sh", ["/bin/sh", "-c", "true"]), f"{commands.STARTUP}{os.pathsep}/x y")]


# ------------------------------------------------------------------------------------------------------ TRL's own config


@pytest.mark.slots
def test_config_of_a_fresh_adapter(kind: str, tmp_path: Path) -> None:
    config = METHODS[kind](num_virtual_tokens=3, response_template=[4, 5])
    config.save_pretrained(tmp_path)
    assert commands.read_config(tmp_path, task_type="CAUSAL_LM").num_virtual_tokens == 3
    fields = {"peft_type": config.peft_type.value.lower(), "num_virtual_tokens": 3, "response_template": [4, 5]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    found = commands.read_config(tmp_path / "config.yaml", task_type="CAUSAL_LM")
    assert type(found) is type(config) and found.response_template == [4, 5] and found.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "cannot be read as the config of an adapter"),
        ("- 1", "a `peft_type` among .*IAPT.*; got None"),
        ("peft_type: IAPTS", "got 'IAPTS'"),
        ("peft_type: IAPT\nr: 8", "holds no config of IAPT: IAPTConfig does not have these fields. `r`: use"),
        (
            "peft_type: IAPT\nnum_virtual_token: 8",
            "unexpected keyword argument. `num_virtual_token`: did you mean `num_virtual_tokens`",
        ),
        ("peft_type: IDPG\nnum_virtual_tokens: 0", "`num_virtual_tokens` must be at least 1, got 0"),
    ],
)
def test_files_that_are_no_config(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"c.yaml .*{says}"):
        commands.read_config(tmp_path / "c.yaml")


def test_trl_gets_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Whatever `use_peft` says: to train all weights in silence is not what `--peft-config` is typed for."""
    trl = SimpleNamespace(get_peft_config=None)
    monkeypatch.setitem(sys.modules, "trl", trl)
    (tmp_path / "c.yaml").write_text("peft_type: IAPT\nnum_virtual_tokens: 3")
    monkeypatch.setenv(commands.CONFIG, str(tmp_path / "c.yaml"))
    commands.choose_config()
    for args in (ModelConfig(), ModelConfig(use_peft=True, lora_task_type="SEQ_CLS")):
        config = trl.get_peft_config(args)
        assert isinstance(config, IAPTConfig) and config.num_virtual_tokens == 3
        assert (
            config.task_type == args.lora_task_type and "the adapter is a IAPTConfig from" in capsys.readouterr().err
        )
    with pytest.raises(ValueError, match="--lora_r, --use_dora would have no effect"):
        trl.get_peft_config(ModelConfig(lora_r=4, use_dora=True))
    del trl.get_peft_config
    with pytest.raises(RuntimeError, match="which this TRL does not have"):
        commands.choose_config()
