"""The rules of the house."""

import ast
import importlib
import re
import shutil
import subprocess
from dataclasses import fields

import pytest

from helpers import ROOT, SCRIPTS, call, call_all

STAGES = SCRIPTS[:3]


def test_one_script_and_common_are_enough(tmp_path):
    for name in STAGES:
        (tmp_path / name).mkdir()
        for file in (name, "common"):
            shutil.copy(ROOT / f"{file}.py", tmp_path / name)
    for said in call_all(tmp_path, [f"{name}/{name}.py --help" for name in STAGES]):
        assert "--seed" in said
    # evaluate.py builds its networks with the scripts that made them: it names one that is missing.
    (tmp_path / "three").mkdir()
    for name in ("evaluate", "common", "train_expert", "transfer"):
        shutil.copy(ROOT / f"{name}.py", tmp_path / "three")
    done = call(tmp_path / "three", "evaluate.py --help")
    assert done.returncode == 2 and done.stderr.startswith("evaluate.py: train_mimic.py is missing")
    assert done.stderr.count("\n") == 1


def test_same_name_same_source():
    seen = {}
    for name in SCRIPTS:
        source = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in (
                "Args",
                "train",
                "main",
            ):
                seen.setdefault(node.name, {})[name] = ast.get_source_segment(source, node)
    copies = {name for name, sources in seen.items() if len(sources) > 1}
    assert {"make_envs", "legal_actions", "AtariNet", "act", "new_episode"} <= copies
    for name in copies:
        assert len(set(seen[name].values())) == 1, f"{name} differs between {', '.join(seen[name])}"
    for name in ("make_envs", "legal_actions", "AtariNet", "act"):
        assert seen[name].keys() == set(STAGES)
    # evaluate.py holds no copy.
    assert not [
        name for name, sources in seen.items() if "evaluate" in sources and len(sources) > 1
    ]


def test_transfer_differs_from_train_expert_by_a_screen():
    diff = subprocess.run(
        ["diff", "train_expert.py", "transfer.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert sum(line[0] in "<>" for line in diff.splitlines()) <= 72


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_used_and_explained(name):
    module = importlib.import_module(name)
    body = (ROOT / f"{name}.py").read_text().split("__post_init__")[1].split("\n\n\n", 1)[1]
    for field in fields(module.Args):
        used = re.search(rf"\bargs\.{field.name}\b", body + (ROOT / "common.py").read_text())
        assert used, f"--{field.name} does nothing"
        line = rf"^    {field.name}: .*  # ."
        assert re.search(line, (ROOT / f"{name}.py").read_text(), re.M), f"--{field.name}: no help"
