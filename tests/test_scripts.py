"""All four scripts through their command lines, on real games at small scale.

What they hand over, what a stop or a crash loses, what bad input gets, and the house rules.
"""

import ast
import contextlib
import csv
import functools
import importlib
import io
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import pytest
import torch

import common
from common import UserError, load_checkpoint, load_state, parse_args, save_checkpoint
from evaluate import MEDIAN, PAPER, group_curves, mean_over_run, print_curves, read_log

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_expert", "train_mimic", "transfer", "evaluate")
TINY = "--lanes 2 --rollout 16 --device cpu --precision float32"
SHORT = "--steps 320 --report-every 64"
EXPERT = f"train_expert.py {TINY} {SHORT} --minibatch 16 --channels 4 8 --hidden 16"
MIMIC = (
    f"train_mimic.py {TINY} {SHORT} --minibatch 8 --updates 8 --channels 4 8 --hidden 24 "
    "--replay 400 --experts runs/expert-pong/expert.pt runs/expert-boxing/expert.pt"
)
TRANSFER = f"transfer.py --game breakout --mimic runs/mimic {TINY} {SHORT} --minibatch 16"


def outputs(path):
    """A checkpoint's network on noise: scores (16, 18), features (16, F), and its layers' sizes."""
    checkpoint = load_checkpoint(path, ("mimic", "transfer"))
    net = importlib.import_module("transfer").AtariNet(**checkpoint["net_args"])
    net.load_state_dict({name: weight.float() for name, weight in checkpoint["net"].items()})
    obs = torch.randint(256, (16, 4, 84, 84), generator=torch.Generator().manual_seed(0))
    layers = [layer for layer in net.body if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    with torch.no_grad():
        return *net(obs.byte()), [layer.weight.norm().item() for layer in layers]


def call(folder, command, **more):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


def call_all(folder, commands, status=0):
    """Run commands in processes side by side: their outputs, or errors where the status is not 0.

    Most of each is the start of Python, on one core.
    """
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(call, [folder] * len(commands), commands))
    for done in ended:
        assert done.returncode == status and not (status and done.stdout), done.stdout + done.stderr
    return [done.stderr if status else done.stdout for done in ended]


def call_here(folder, command):
    """Run a command line in this process, as Python starts slowly: status, output, errors."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    argv, status = shlex.split(command), 0
    module = importlib.import_module(argv[0].removesuffix(".py"))
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch("sys.argv", argv),
        mock.patch.object(module.common, "Stop", lambda: False),  # leaves pytest's Ctrl-C alone
    ):
        try:
            module.common.run(module.main, module.Args)
        except SystemExit as ended:
            status = ended.code
    return status, *(stream.buffer.getvalue().decode() for stream in (output, errors))


def run(folder, command):
    """Run a command line that succeeds: its output."""
    status, said, errors = call_here(folder, command)
    assert status == 0, said + errors
    return said


def refused(folder, command, *words, **more):
    """The command ends with status 2 and one line that holds all words, and changes no file.

    With more, flags of a process, it runs in its own.
    """
    before = contents(folder)
    if more:
        done = call(folder, command, **more)
        status, said = done.returncode, done.stderr
    else:
        status, _, said = call_here(folder, command)
    assert status == 2 and "Traceback" not in said, said
    assert said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert contents(folder) == before


def contents(folder):
    return {
        path: path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and "__pycache__" not in str(path)
    }


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Two checkpoints hold the same numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("minutes", "command")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with all scripts, two small experts and a mimic of them."""
    folder = tmp_path_factory.mktemp("studio")
    for name in (*SCRIPTS, "common"):
        shutil.copy(ROOT / f"{name}.py", folder)
    for command in (EXPERT + " --game pong", EXPERT + " --game boxing --hidden 16 20", MIMIC):
        run(folder, command)
    return folder


@pytest.fixture
def copy(studio, tmp_path):
    return Path(shutil.copytree(studio, tmp_path / "copy"))


@pytest.fixture
def short_games(monkeypatch):
    """Let evaluate.py's games end after 1,000 frames: whole ones of Boxing have 7,100."""
    module = importlib.import_module("evaluate")
    short = functools.partial(module.make_envs, max_frames=1_000)
    monkeypatch.setattr(module, "make_envs", short)


# The four stages


def test_experts_hand_over_their_weights(studio):
    full, small = (
        load_checkpoint(studio / f"runs/expert-pong/{name}.pt", ("expert",))
        for name in ("checkpoint", "expert")
    )
    assert full["step"] == small["step"] == 320 and full["games"] == ["pong"]
    assert "optimizer" in full and "optimizer" not in small
    for name, weight in full["net"].items():
        assert small["net"][name].dtype == torch.half
        torch.testing.assert_close(small["net"][name].float(), weight, atol=1e-3, rtol=1e-3)
    assert small["command"] and small["machine"] and small["minutes"] > 0
    assert small["legal"] == [0, 1, 3, 4, 11, 12]  # no-op, fire, right, left, and both firing
    log = rows(studio / "runs/expert-pong/log.csv")
    assert [int(row["step"]) for row in log] == [32, 64, 128, 192, 256, 320]
    assert small["max_q"] == pytest.approx(float(log[-1]["max_q"]), rel=1e-4)
    assert float(log[0]["epsilon"]) > float(log[-1]["epsilon"]) and float(log[-1]["lr"]) < float(
        log[0]["lr"]
    )


def test_an_expert_may_play_without_exploring_first(copy):
    run(copy, EXPERT + " --game pong --steps 32 --explore 0 --out runs/calm")
    (row,) = rows(copy / "runs/calm/log.csv")
    assert float(row["epsilon"]) == 0.05


def test_mimic_log_and_checkpoint(studio):
    mimic = load_checkpoint(studio / "runs/mimic", ("mimic",))
    assert mimic["games"] == ["pong", "boxing"] and len(mimic["experts"]) == 2
    assert mimic["regressors"]["0.weight"].shape == (16, 24) and mimic["regressors"][
        "1.weight"
    ].shape == (20, 24)
    small = load_checkpoint(studio / "runs/mimic/mimic.pt", ("mimic",))
    assert small["step"] == mimic["step"] == 320 and small["marks"] == mimic["marks"]
    assert not {"optimizer", "rng", "regressors"} & small.keys()
    for name, weight in mimic["net"].items():
        assert small["net"][name].dtype == torch.half
        torch.testing.assert_close(small["net"][name].float(), weight, atol=1e-3, rtol=1e-3)
    last = rows(studio / "runs/mimic/log.csv")[-1]
    for game in ("pong", "boxing"):
        assert float(last[f"{game}_policy_loss"]) > 0 and float(last[f"{game}_feature_loss"]) > 0
        assert 0 <= float(last[f"{game}_agreement"]) <= 1 and f"{game}_percent" in last


@pytest.mark.parametrize(
    "flags",
    ["--objective q", "--actor expert", "--actor student", "--feature-weight 0", "--temperature 1"],
)
def test_ideas_of_the_mimic_can_be_switched(copy, flags):
    run(copy, MIMIC.replace("--steps 320", "--steps 64") + f" --out runs/other {flags}")
    one, other = (
        load_checkpoint(copy / f"runs/{name}", ("mimic",))["net"] for name in ("mimic", "other")
    )
    assert not same(one, other)


@pytest.mark.parametrize("actor", ["student", "both", "expert"])
def test_each_expert_judges_what_its_own_game_shows(copy, monkeypatch, actor):
    module = importlib.import_module("train_mimic")
    added, acted, N = {}, [], 4

    def add(replay, *entry):  # in the order in which the loop adds: steps of one game at a time
        added.setdefault(id(replay), []).append([part.clone() for part in entry])

    def send(env, actions):
        acted.append(actions.copy())
        plain_send(env, actions)

    monkeypatch.setattr(module.common, "Stop", lambda: False)  # leaves pytest's Ctrl-C alone
    paths = [f"{copy}/runs/expert-{game}/expert.pt" for game in ("pong", "boxing")]
    flags = {"lanes": N, "rollout": 8, "epsilon": 0.0, "precision": "float32", "actor": actor}
    flags |= {"experts": tuple(paths), "out": str(copy / "runs/new"), "updates": 2}
    module.main(module.Args(steps=8 * N, **flags))  # one round: then both have half of the lanes
    plain_send = module.AtariVectorEnv.send
    monkeypatch.setattr(module.AtariVectorEnv, "send", send)
    monkeypatch.setattr(module.FrameReplay, "add", add)
    monkeypatch.setattr(module, "q_spread", lambda *_: sys.exit("the labels are there"))
    with pytest.raises(SystemExit, match="the labels"):
        module.main(module.Args(steps=16 * N, **flags))
    student = module.AtariNet()
    student.load_state_dict(load_checkpoint(copy / "runs/new/checkpoint.pt", ("mimic",))["net"])
    student_lanes = {"student": N, "both": N // 2, "expert": 0}[actor]
    for g, (path, entries) in enumerate(zip(paths, added.values(), strict=True)):
        expert, net = module.load_expert(path)
        legal = torch.zeros(18, dtype=torch.bool)
        legal[expert["legal"]] = True
        assert len(entries) == 8
        for t, (obs, age, q_values, features) in enumerate(entries):
            with torch.no_grad():
                wanted_q, wanted_features = net(obs)
                values = torch.cat([student(obs)[0][:student_lanes], wanted_q[student_lanes:]])
            torch.testing.assert_close(q_values, wanted_q)
            torch.testing.assert_close(features, wanted_features)
            if t > 0:  # no game ends this early: the stack moves on by one frame
                assert torch.equal(obs[:, :3], entries[t - 1][0][:, 1:])
            assert age.tolist() == N * [min(t, 3)]
            greedy = values.masked_fill(~legal, -torch.inf).argmax(1)
            assert acted[2 * t + g].tolist() == greedy.tolist()


def test_a_lane_goes_over_to_the_student_between_two_games(copy, monkeypatch):
    module = importlib.import_module("train_mimic")
    short = functools.partial(module.make_envs, max_frames=400)  # games of 93 to 100 steps
    monkeypatch.setattr(module, "make_envs", short)
    monkeypatch.setattr(module.common, "Stop", lambda: False)  # leaves pytest's Ctrl-C alone
    experts = (str(copy / "runs/expert-pong/expert.pt"),)
    flags = {"lanes": 4, "rollout": 8, "updates": 1, "actor": "both", "steps": 4 * 320}
    module.main(module.Args(experts=experts, out=str(copy / "runs/new"), **flags))
    # Of the three games of every lane the experts have the first, the student the second in two
    # lanes and the third in three.
    (scores,) = load_checkpoint(copy / "runs/new", ("mimic",))["scores"]
    assert len(scores) == 5


def test_the_readme_shows_one_picture_under_the_mask_of_each_game(copy):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    (copy / "masks.py").write_text(code + "    print(logits.tolist())\n")
    (copy / "mimics").mkdir()
    shutil.copy(copy / "runs/mimic/mimic.pt", copy / "mimics/mimic-s1.pt")
    (said,) = call_all(copy, ["masks.py"])
    pong, first, boxing, second = said.splitlines()
    assert first == second and pong.startswith("pong ") and boxing.startswith("boxing ")
    scores = ast.literal_eval(first)[0]
    legal = load_checkpoint(copy / "runs/expert-pong/expert.pt", ("expert",))["legal"]
    assert int(pong.split()[1]) == max(legal, key=lambda action: scores[action])
    assert int(boxing.split()[1]) == max(range(18), key=lambda action: scores[action])


def test_feature_weight_zero_leaves_the_regressors_alone(copy):
    command = MIMIC + " --feature-weight 0 --out runs/"
    run(copy, command.replace("--steps 320", "--steps 32") + "a")
    run(copy, command + "b")
    a, b = (load_checkpoint(copy / f"runs/{name}", ("mimic",)) for name in "ab")
    assert same(a["regressors"], b["regressors"]) and not same(a["net"], b["net"])
    assert math.isnan(float(rows(copy / "runs/b/log.csv")[-1]["pong_feature_loss"]))


def test_transfer_starts_from_the_mimic_and_the_control_does_not(copy):
    frozen = TRANSFER.replace("--steps 320", "--steps 32") + " --lr 1e-12"
    for start in ("mimic", "control", "mimic --keep-head --out runs/kept"):
        run(copy, f"{frozen} --arm {start}")
    scores, features, before = outputs(copy / "runs/mimic")
    kept_scores, kept_features, kept_sizes = outputs(copy / "runs/kept")
    _, _, new_sizes = outputs(copy / "runs/transfer-breakout-mimic-s1")
    _, _, sizes = outputs(copy / "runs/transfer-breakout-control-s1")
    # Layers have the control's size, and yet features and scores may stay the mimic's.
    assert kept_sizes == new_sizes == pytest.approx(sizes, rel=1e-5)
    assert before != pytest.approx(sizes, rel=1e-5)
    assert torch.allclose(kept_scores, scores, atol=1e-3)
    assert torch.allclose(kept_features, features, atol=1e-3)
    # The last LayerNorm and the output layer are the control's, unless they are kept; all before
    # is the mimic's, and the widths are the same.
    new, control, kept = (
        load_checkpoint(copy / f"runs/{name}", ("transfer",))
        for name in ("transfer-breakout-mimic-s1", "transfer-breakout-control-s1", "kept")
    )
    *body, norm, norm_bias, head, head_bias = list(new["net"])
    for name in new["net"]:
        source = kept if name in body else control
        torch.testing.assert_close(new["net"][name], source["net"][name], atol=1e-6, rtol=0)
    for name in (body[0], norm, norm_bias, head, head_bias):
        assert not torch.allclose(kept["net"][name], control["net"][name], atol=1e-3)
    assert new["net_args"] == control["net_args"] == kept["net_args"]


def test_mimic_without_norms_after_its_convolutions_goes_on_and_starts_a_transfer(copy):
    plain = MIMIC + " --no-conv-norm --out runs/plain"
    run(copy, plain.replace("--steps 320", "--steps 32"))
    run(copy, plain)
    refused(copy, MIMIC + " --out runs/plain", "--conv-norm")
    run(copy, TRANSFER.replace("runs/mimic", "runs/plain"))
    run(copy, "evaluate.py --runs runs/plain --games 0 --gif --name plain")
    mimic, transfer = (
        load_checkpoint(copy / "runs" / name, (stage,))
        for name, stage in (("plain", "mimic"), ("transfer-breakout-mimic-s1", "transfer"))
    )
    assert mimic["net_args"] == transfer["net_args"] and not mimic["net_args"]["conv_norm"]
    assert mimic["net"].keys() == transfer["net"].keys()
    # The biases of four layers, and the scale and shift of LayerNorm after the linear one.
    assert sum(weight.dim() == 1 for weight in mimic["net"].values()) == 4 + 2


def test_transfer_to_a_source_game_is_a_warning(copy):
    assert "warning" in run(copy, TRANSFER.replace("breakout", "pong"))


def test_evaluate_measures_draws_and_films(copy, short_games):
    for seed in (1, 2):
        run(copy, f"{TRANSFER} --seed {seed}")
    said = run(
        copy,
        "evaluate.py --runs runs/mimic --random --games 2 --gif --film 5 --device cpu "
        "--curves runs/transfer-breakout-mimic-s1/log.csv runs/transfer-breakout-mimic-s2/log.csv "
        "runs/mimic/log.csv runs/expert-pong/log.csv",
    )
    table = rows(copy / "results/table.csv")
    assert {(row["network"], row["game"]) for row in table} == {
        (network, game)
        for network, games in (
            ("runs/mimic", ("pong", "boxing")),
            ("runs/expert-pong/expert.pt", ("pong",)),
            ("runs/expert-boxing/expert.pt", ("boxing",)),
            ("random", ("pong", "boxing")),
        )
        for game in games
    }
    for row in table:
        if row["game"] == "pong":
            assert -21 <= float(row["mean"]) <= 21 and float(row["max"]) >= float(row["mean"])
        expert = next(
            float(r["mean"])
            for r in table
            if "expert-" in r["network"] and r["game"] == row["game"]
        )
        assert float(row["expert"]) == expert
        if expert > 0:
            percent = 100 * float(row["mean"]) / expert
            assert float(row["% expert"]) == pytest.approx(percent, rel=1e-4)
        else:  # such a ratio would mean nothing
            assert row["% expert"] == "nan"
        if row["network"] == "runs/mimic":
            assert 0 < float(row["% agreement"]) < 100 and 0 < float(row["% value lost"])
        else:
            assert row["% agreement"] == row["% value lost"] == "nan"
    assert "per cent of human: median" in said
    log = copy / "runs/expert-pong/log.csv"
    assert set(group_curves([log, log.parent])) == {"pong"}  # a folder stands for its log
    assert len(group_curves([log, log.parent])["pong"]["expert-pong"]) == 1
    shutil.copytree(log.parent, copy / "other/expert-pong")  # would pass for a second seed
    with pytest.raises(UserError, match="both named expert-pong"):
        group_curves([log, copy / "other/expert-pong/log.csv"])
    log = copy / "results/two.csv"
    head = "step,minutes,pong_score,pong_percent,krull_score,krull_percent,lynx_score,lynx_percent"
    log.write_text(f"{head}\n10,1,3,20,4,30,5,nan\n20,2,3,60,5,40,6,50\n")
    ((minutes, percent, goal),) = group_curves([log])[MEDIAN]["two"]
    assert minutes.tolist() == [1, 2] and goal == 100
    assert math.isnan(percent[0]) and percent[1] == 50  # not before each game has a score
    for name in ("table.png", "table-curves.png"):
        assert (copy / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert (copy / "results/table.gif").read_bytes().startswith(b"GIF8")


def test_curves_are_summed_up_with_an_interval_over_seeds(tmp_path, capsys):
    # From the first score on: 1 rises to 3 in 10 steps and stays 30 more, so its mean is 2.75.
    for seed, more in ((1, 0), (2, 1), (3, 5)):
        lines = "5,1,nan", f"10,2,{1 + more}", f"20,3,{3 + more}", f"50,4,{3 + more}"
        text = "\n".join(["step,minutes,pong_score", *lines])
        (tmp_path / f"a-s{seed}.csv").write_text(text)
    (tmp_path / "b-s1.csv").write_text("step,minutes,pong_score\n5,1,nan\n")  # too short: no line
    (tmp_path / "c-s1.csv").write_text("step,minutes,pong_score\n10,1,4\n20,2,6\n")
    (tmp_path / "c-s2.csv").write_text("step,minutes,pong_score\n20,1,6\n1000,2,6\n")
    print_curves(group_curves(sorted(tmp_path.glob("*.csv"))))
    half = 4.30 * statistics.stdev([0, 1, 5]) / 3**0.5
    over, end = 4.75, 5.0
    assert capsys.readouterr().out == (
        f"pong, a (3 seeds): {over:.1f} (95 % interval {over - half:.1f} to {over + half:.1f}) "
        f"over the run, {end:.1f} (95 % interval {end - half:.1f} to {end + half:.1f}) at its end\n"
        "pong, c (2 seeds), after 20 to 1,000 steps: 5.5 over the run, 6.0 at its end\n"
    )


def test_the_mean_of_curves_is_drawn_where_all_seeds_have_a_score(tmp_path, monkeypatch):
    for seed, first in ((1, 10), (2, 20)):
        rows = "".join(f"{step},1,{seed}\n" for step in range(first, 31, 10))
        (tmp_path / f"a-s{seed}.csv").write_text("step,minutes,pong_score\n" + rows)
    module, figures = importlib.import_module("evaluate"), []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    module.draw_curves(group_curves(sorted(tmp_path.glob("*.csv"))), "unused")
    thick = figures[0].axes[0].lines[0].get_ydata().tolist()
    assert math.isnan(thick[0]) and thick[1:] == [1.5, 1.5]


def test_a_table_holds_a_name_of_any_bytes(tmp_path):
    importlib.import_module("evaluate").write_csv([{"network": "é\udcff"}], tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "network\né\\udcff\n"


def test_a_film_alone_begins_after_some_steps(copy):
    films = {}
    for after in (0, 40):
        flags = f"--games 0 --gif --film 3 --film-after {after} --name film{after} --device cpu"
        said = run(copy, f"evaluate.py --runs runs/mimic {flags}")
        assert "plays" not in said and not (copy / f"results/film{after}.csv").exists()
        films[after] = (copy / f"results/film{after}.gif").read_bytes()
    assert films[0] != films[40]


def test_evaluate_is_repeatable_and_sticky_actions_change_it(copy):
    run(copy, EXPERT + " --game breakout --steps 32")  # its games are short
    command = "evaluate.py --runs runs/expert-breakout/expert.pt --games 2 --device cpu --out "
    for out in ("a", "c --sticky 0.25", "d --sticky 0 0.25"):
        run(copy, command + out)
    call_all(copy, [command + "b"])  # in a process of its own, too
    tables = {name: rows(copy / name / "table.csv") for name in "abcd"}
    assert tables["a"] == tables["b"] and tables["a"][0]["plays"] != tables["c"][0]["plays"]
    # Several values in one call: the first one's table, and the means of the others.
    (mean,) = (row["mean"] for row in tables["c"])
    for row, other in zip(tables["a"], tables["d"], strict=True):
        assert other == row | {"sticky 0.25": mean}
    (row,) = tables["c"]
    plays = [float(score) for score in row["plays"].split()]
    assert len(plays) == 2 and sum(plays) / 2 == float(mean) and max(plays) == float(row["max"])
    assert (row["epsilon"], row["sticky"], row["seed"]) == ("0.05", "0.25", "1")
    run(copy, command + "e --random --epsilon 0.2 --seed 2")
    epsilons = {row["network"]: row["epsilon"] for row in rows(copy / "e/table.csv")}
    assert epsilons == {"runs/expert-breakout/expert.pt": "0.2", "random": "1"}
    assert all(row["seed"] == "2" for row in rows(copy / "e/table.csv"))


# One run, stopped and continued


@pytest.mark.parametrize("command", [EXPERT + " --game boxing", MIMIC])
def test_same_seed_same_run(copy, command):
    for flags in ("a", "c --seed 2"):
        run(copy, f"{command} --out runs/{flags}")
    call_all(copy, [command + " --out runs/b"])  # in a process of its own, too
    a, b, c = (load_checkpoint(copy / f"runs/{name}", ("expert", "mimic")) for name in "abc")
    for checkpoint in (a, b):
        del checkpoint["args"]["out"]
    assert same(a, b) and not same(a["net"], c["net"])


@pytest.mark.parametrize("command", [EXPERT + " --game pong", MIMIC, TRANSFER])
def test_same_command_goes_on_and_steps_may_grow(copy, command):
    # Exact in weights, optimizer, random generator and log. The emulators begin new games, since
    # their state cannot be saved, and the mimic fills its replay anew: so two continuations equal
    # each other, and not the run that never stopped.
    run(copy, f"{command} --out runs/one")
    finished = contents(copy / "runs/one")
    shutil.copytree(copy / "runs/one", copy / "saved")
    ends = []
    for _ in range(2):
        said = run(copy, f"{command} --out runs/one --steps 640")
        assert "goes on at step 320" in said
        ends.append(load_checkpoint(copy / "runs/one", ("expert", "mimic", "transfer")))
        assert [int(row["step"]) for row in rows(copy / "runs/one/log.csv")] == [32] + list(
            range(64, 321, 64)
        ) + list(range(352, 353)) + list(range(384, 641, 64))
        shutil.rmtree(copy / "runs/one")
        shutil.copytree(copy / "saved", copy / "runs/one")
    assert same(*ends)
    assert (copy / "runs/one/log.csv").read_bytes() == next(
        v for k, v in finished.items() if k.name == "log.csv"
    )


def test_a_run_goes_on_with_another_interval_between_reports(copy):
    command = EXPERT + " --game pong --out runs/one"
    run(copy, command.replace("--steps 320", "--steps 32"))
    assert "goes on at step 32" in run(copy, command + " --report-every 160")
    assert [int(row["step"]) for row in rows(copy / "runs/one/log.csv")][-3:] == [160, 288, 320]


def test_expert_goes_on_from_its_weights_alone(copy):
    (copy / "runs/more").mkdir()
    shutil.copy(copy / "runs/expert-pong/expert.pt", copy / "runs/more/checkpoint.pt")
    expert = torch.load(copy / "runs/more/checkpoint.pt")
    del expert["args"]["lam"]  # as if that flag were newer than the run, which had its default
    torch.save(expert, copy / "runs/more/checkpoint.pt")
    command = EXPERT + " --game pong --out runs/more --steps 352"
    refused(copy, command + " --lam 0.5", "holds a run with --lam 0.85, but this command says 0.5")
    said = run(copy, command)
    assert "weights alone" in said and "goes on at step 320" in said
    before, after = (
        load_checkpoint(copy / f"runs/{name}/expert.pt", ("expert",))
        for name in ("expert-pong", "more")
    )
    assert after["step"] == 352 and after["minutes"] > before["minutes"]
    for name, weight in before["net"].items():  # two gradient steps away, not new
        torch.testing.assert_close(after["net"][name], weight, atol=0.01, rtol=0.01)


def test_a_mimics_weights_alone_serve_every_stage(copy, short_games):
    (copy / "runs/more").mkdir()
    shutil.copy(copy / "runs/mimic/mimic.pt", copy / "runs/more/checkpoint.pt")
    said = run(copy, MIMIC + " --out runs/more --steps 336")
    assert "weights alone" in said and "goes on at step 320" in said
    before, after = (
        load_checkpoint(copy / f"runs/{name}/mimic.pt", ("mimic",))["net"]
        for name in ("mimic", "more")
    )
    for name, weight in before.items():  # some small gradient steps away, not new
        torch.testing.assert_close(after[name], weight, atol=0.02, rtol=0)
    command = TRANSFER + " --mimic runs/mimic/mimic.pt --keep-head --steps 32 --lr 1e-12"
    run(copy, command + " --out runs/other")
    scores, _, _ = outputs(copy / "runs/mimic")
    moved, _, _ = outputs(copy / "runs/other/expert.pt")
    assert torch.allclose(moved, scores, atol=2e-3)  # rounded to half precision twice
    said = run(copy, "evaluate.py --runs runs/mimic/mimic.pt --games 1 --device cpu")
    assert "runs/expert-pong/expert.pt" in said  # it still knows its experts


def test_what_ships_is_the_moving_average_of_the_weights_that_learn(copy):
    command = EXPERT.replace("--steps 320", "--steps 32") + " --game pong"  # one round of learning
    for rate in ("1 --out runs/copied", "0.25 --out runs/slow"):
        run(copy, f"{command} --target-rate {rate}")
    copied, slow = (
        load_checkpoint(copy / f"runs/{name}", ("expert",)) for name in ("copied", "slow")
    )
    torch.manual_seed(1)
    first = importlib.import_module("train_expert").AtariNet((4, 8), (16,)).state_dict()
    assert same(copied["net"], copied["online"]) and not same(copied["net"], first)
    assert same(slow["online"], copied["online"])  # the first round is played alike
    for name, weight in slow["net"].items():
        torch.testing.assert_close(weight, 0.75 * first[name] + 0.25 * slow["online"][name])
    # Both are there when the run goes on: it is another run from other weights that learn.
    ends = []
    for online in (slow["online"], slow["net"]):
        torch.save(slow | {"online": online}, copy / "runs/slow/checkpoint.pt")
        longer = command.replace("--steps 32", "--steps 64")
        run(copy, f"{longer} --target-rate 0.25 --out runs/slow")
        ends.append(load_checkpoint(copy / "runs/slow", ("expert",))["net"])
    assert not same(*ends)


def test_stop_and_continue_equals_never_stopped_on_the_same_data(tmp_path):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 2)
        return net, torch.optim.RAdam(net.parameters(), lr=0.1), torch.Generator().manual_seed(0)

    def learn(net, optimizer, rng, updates):
        for _ in range(updates):
            loss = net(torch.randn(8, 4, generator=rng)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    straight, stopped, continued = make(), make(), make()
    learn(*straight, 20)
    learn(*stopped, 12)
    net, optimizer, rng = stopped
    save_checkpoint(
        tmp_path / "c.pt",
        importlib.import_module("train_expert").Args(),
        stage="expert",
        games=["pong"],
        step=12,
        minutes=0.0,
        score=0.0,
        scores=[],
        net_args={},
        net=net.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=rng.get_state(),
    )
    load_state(load_checkpoint(tmp_path / "c.pt", ("expert",)), *continued, tmp_path)
    learn(*continued, 8)
    assert same(straight[0].state_dict(), continued[0].state_dict())


@pytest.mark.parametrize("name", ["train_expert", "transfer"])
def test_one_lane_after_the_other_begins_anew(copy, monkeypatch, name):
    script, options = importlib.import_module(name), []
    reset = script.AtariVectorEnv.reset

    def spy(envs, **flags):
        options.append(flags.get("options"))
        return reset(envs, **flags)

    monkeypatch.setattr(script.AtariVectorEnv, "reset", spy)
    monkeypatch.setattr(script.common, "Stop", lambda: False)  # leaves pytest's Ctrl-C alone
    source = {"mimic": str(copy / "runs/mimic")} if name == "transfer" else {"channels": (4,)}
    flags = {"lanes": 3, "rollout": 4, "minibatch": 4, "steps": 60, "device": "cpu", **source}
    script.main(script.Args(game="breakout", out=str(copy / "runs/new"), **flags))
    assert options[0] is None  # the start of all lanes; then three of the five rounds
    masks = [option["reset_mask"].tolist() for option in options[1:]]
    assert masks == torch.eye(3, dtype=torch.bool).tolist()


def start(folder, command, lines):
    """Start a long run, and wait until its log has some lines."""
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log, deadline = folder / "runs/long/log.csv", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > lines):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("command", [EXPERT + " --game pong", MIMIC, TRANSFER])
def test_ctrl_c_saves_and_says_how_to_go_on(copy, command):
    command += " --out runs/long --steps 100_000 --report-every 1_000"
    process = start(copy, command, 1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 130
        and "the same command goes on from step" in said
        and "Traceback" not in said
    )
    step = load_checkpoint(copy / "runs/long", ("expert", "mimic", "transfer"))["step"]
    assert int(rows(copy / "runs/long/log.csv")[-1]["step"]) == step > 0
    assert f"goes on at step {step:,}" in run(copy, command.replace("100_000", str(step + 32)))


def test_ctrl_c_saves_although_it_has_ended_the_reader_and_a_second_process_is_refused(copy):
    command = EXPERT + " --game pong --out runs/long --steps 1_000_000 --report-every 1_000"
    process = start(copy, command, 1)
    second = call(copy, command)  # at work in the same folder: the first one's files would suffer
    assert second.returncode == 2 and "another process" in second.stderr
    process.stdout.close()  # as `| tee log.txt` does
    before = load_checkpoint(copy / "runs/long", ("expert",))["step"]
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert load_checkpoint(copy / "runs/long", ("expert",))["step"] > before


def test_kill_at_any_moment_loses_no_file(copy):
    command = (
        EXPERT + " --game pong --out runs/long --steps 100_000 --report-every 32"
    )  # saves all the time
    for lines in (1, 30, 60):
        process = start(copy, command, lines)
        process.kill()
        process.wait()
        step = load_checkpoint(copy / "runs/long", ("expert",))["step"]
        assert step > 0
    with open(copy / "runs/long/log.csv", "a") as log:
        log.write("\n999999,0.1,3")  # a row beyond the checkpoint, cut off by the kill
    run(copy, command.replace("100_000", str(step + 64)))
    steps = [int(row["step"]) for row in rows(copy / "runs/long/log.csv")]
    assert steps == sorted(set(steps)) and steps[-1] == step + 64


# Bad input


def test_the_shell_sees_one_line_and_status_2(studio):
    said = call_all(studio, [f"{name}.py --seeed 3" for name in SCRIPTS], status=2)
    unknown = "unrecognized arguments: --seeed 3 (--help lists all flags)"
    assert said == [f"{name}.py: {unknown}\n" for name in SCRIPTS]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--game pongg", ["pongg", "pong"]),
        ("--game combat", ["combat"]),
        ("--steps 0", ["--steps"]),
        ("--rollout 1e12", ["memory"]),
        ("--rollout 1e30", ["--rollout"]),
        ("--lanes -1", ["--lanes"]),
        ("--minibatch 33", ["--minibatch"]),
        ("--epsilon 1.5", ["--epsilon"]),
        ("--explore 100_000", ["--explore"]),
        ("--device tpu", ["--device"]),
        ("--precision int8", ["--precision"]),
        ("--hidden 0", ["--hidden"]),
        ("--channels 4 4 4 4 4", ["--channels"]),
        ("--lr 0", ["--lr"]),
        ("--lr 1e38", ["--lr"]),
        ("--seed -1", ["--seed"]),
        ("--stepz 3", ["--stepz"]),
        ("--ste 3", ["--ste"]),
        ("--steps 1.5", ["--steps"]),
        ("--gamma nan", ["--gamma"]),
        ("--lr inf", ["--lr"]),
        ("--out train_expert.py", ["train_expert.py"]),
    ],
)
def test_expert_refuses_flags_out_of_range(studio, flags, words):
    refused(studio, f"{EXPERT} --out runs/none {flags}", *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--temperature 0", ["--temperature"]),
        ("--feature-weight -1", ["--feature-weight"]),
        ("--actor me", ["--actor"]),
        ("--objective v", ["--objective"]),
        ("--replay 3", ["--replay"]),
        ("--updates 0", ["--updates"]),
        ("--updates 1e15 --minibatch 1e15", ["--updates", "--minibatch"]),
        (
            "--experts runs/expert-pong/expert.pt runs/expert-pong/checkpoint.pt",
            ["two experts", "pong"],
        ),
        ("--experts runs/nothing.pt", ["runs/nothing.pt"]),
        ("--experts", ["no experts"]),
        ("--experts runs/mimic", ["stage mimic", "expert"]),
        ("--experts common.py", ["common.py"]),
    ],
)
def test_mimic_refuses(studio, flags, words):
    refused(studio, f"{MIMIC} --out runs/none {flags}", *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mimic runs/expert-pong", ["stage expert", "mimic"]),
        ("--mimic nowhere", ["nowhere"]),
        ("--arm both", ["--arm"]),
        ("--arm control --keep-head", ["--keep-head"]),
    ],
)
def test_transfer_refuses(studio, flags, words):
    refused(studio, f"{TRANSFER} {flags}", *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", ["--runs"]),
        ("--runs nothing", ["nothing"]),
        ("--runs common.py", ["common.py"]),
        ("--curves common.py", ["common.py"]),
        ("--runs runs/mimic --games 0", ["--games"]),
        ("--runs runs/mimic --games 0 --curves runs/mimic", ["--games"]),
        ("--runs runs/mimic --games 0 --gif --random", ["--games", "--random"]),
        ("--runs runs/mimic --name a/b", ["--name"]),
        ("--runs runs/mimic --sticky 0 2", ["--sticky"]),
        ("--runs random --random", ["named random"]),
        ("--curves runs/mimic/log.csv --random", ["--random"]),
    ],
)
def test_evaluate_refuses(studio, flags, words):
    refused(studio, f"evaluate.py {flags}", *words)


def test_damaged_and_foreign_checkpoints_are_refused(copy):
    good = (copy / "runs/mimic/checkpoint.pt").read_bytes()
    mimic = load_checkpoint(copy / "runs/mimic", ("mimic",))
    weight = good.index(mimic["net"]["head.weight"].numpy().tobytes()) + 7
    for name, content in (
        ("cut", good[: len(good) // 2]),
        ("empty", b""),
        ("noise", os.urandom(500)),
        ("flipped", good[:2000] + bytes(200) + good[2200:]),
        ("one-bit", good[:weight] + bytes([good[weight] ^ 1]) + good[weight + 1 :]),
    ):
        (copy / f"{name}.pt").write_bytes(content)
        refused(copy, f"evaluate.py --runs {name}.pt", f"{name}.pt")
    torch.save({"net": {}}, copy / "foreign.pt")
    refused(copy, "evaluate.py --runs foreign.pt", "foreign.pt", "not a checkpoint of this project")
    for part in ("net_args", "marks"):
        torch.save({k: v for k, v in mimic.items() if k != part}, copy / "part.pt")
        refused(copy, "evaluate.py --runs part.pt", "part.pt", f"lacks {part}")
    torch.save(mimic | {"args": None}, copy / "part.pt")
    refused(copy, "evaluate.py --runs part.pt", "part.pt", "args")


def test_checkpoint_whose_weights_do_not_fit_is_refused(copy):
    mimic = load_checkpoint(copy / "runs/mimic", ("mimic",))
    mimic["net_args"]["hidden"] = [25]
    torch.save(mimic, copy / "wide.pt")
    for command in ("evaluate.py --runs wide.pt", TRANSFER + " --mimic wide.pt"):
        refused(copy, command, "wide.pt", "widths")


@pytest.mark.parametrize("stage", ["mimic", "expert"])
def test_checkpoint_whose_weights_are_not_finite_is_refused(copy, stage):
    folder = {"mimic": "mimic", "expert": "expert-pong"}[stage]
    spoiled = load_checkpoint(copy / "runs" / folder, (stage,))
    spoiled["net"]["head.bias"][3] = math.nan
    torch.save(spoiled, copy / "spoiled.pt")
    other = TRANSFER + " --mimic spoiled.pt --out runs/no"
    if stage == "expert":
        other = MIMIC.replace("runs/expert-pong/expert.pt", "spoiled.pt") + " --out runs/no"
    for command in ("evaluate.py --runs spoiled.pt", other):
        refused(copy, command, "spoiled.pt", "not finite")


def test_malicious_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    for save in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        save(Bomb(), tmp_path / "bomb.pt")
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "bomb.pt", ("expert",))
    assert not (tmp_path / "exploded").exists()


def test_folder_of_another_run_is_left_alone(copy):
    refused(copy, EXPERT + " --game pong --lr 1e-3", "--lr", "runs/expert-pong")
    refused(copy, EXPERT + " --game pong --steps 64", "--steps")
    refused(copy, EXPERT + " --game pong --out runs/mimic", "stage mimic")
    refused(copy, MIMIC.replace(" runs/expert-boxing/expert.pt", ""), "runs/mimic")
    (copy / "runs/mimic/checkpoint.pt").unlink()
    refused(copy, MIMIC, "without its checkpoint")
    (copy / "runs/kept").mkdir()
    for name in ("expert-boxing/expert.pt", "mimic/mimic.pt"):
        shutil.copy(copy / "runs" / name, copy / "runs/kept")
        file = Path(name).name
        refused(copy, EXPERT + " --game pong --out runs/kept", f"{file} without its checkpoint")
        (copy / "runs/kept" / file).unlink()


def test_mimic_does_not_go_on_with_other_experts(copy, short_games):
    path = copy / "runs/expert-pong/expert.pt"
    expert = load_checkpoint(path, ("expert",))
    torch.save(expert | {"minutes": expert["minutes"] + 1}, path)  # trained once more
    refused(copy, MIMIC + " --steps 640", "other experts")
    status, _, errors = call_here(copy, "evaluate.py --runs runs/mimic --games 2 --device cpu")
    assert status == 0 and "pong has no expert" in errors
    experts = {row["game"]: row["expert"] for row in rows(copy / "results/table.csv")}
    assert experts["pong"] == "nan" and experts["boxing"] != "nan"


def test_mimic_knows_its_experts_by_other_paths(copy):
    same_experts = MIMIC.replace("runs/expert", f"{copy}/runs/expert")
    assert "goes on at step 320" in run(copy, same_experts + " --steps 352")


def test_evaluate_does_not_write_over_a_log(copy):
    refused(copy, "evaluate.py --runs runs/mimic --games 1 --out runs/mimic --name log", "log.csv")


def test_a_reader_of_the_output_may_leave(copy):
    command = f"{EXPERT} --game pong --steps 3_000 --out runs/left"
    options = {"cwd": copy, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *shlex.split(command)], **options)
    for line in process.stdout:
        if "score" in line:  # a report, which follows a save
            break
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(300) == 2 and error.count("\n") == 1 and "nobody reads" in error
    step = load_checkpoint(copy / "runs/left", ("expert",))["step"]
    assert f"goes on at step {step:,}" in run(copy, command.replace("3_000", str(step + 32)))


def test_mimic_bears_an_expert_that_never_scored(copy):
    path = copy / "runs/expert-pong/expert.pt"
    torch.save(load_checkpoint(path, ("expert",)) | {"score": 0.0}, path)
    run(copy, MIMIC + " --steps 64 --out runs/zero")
    assert rows(copy / "runs/zero/log.csv")[-1]["pong_percent"] == "nan"


def test_log_that_a_crash_or_a_hand_has_spoiled(copy):
    command, log = EXPERT + " --game pong", copy / "runs/expert-pong/log.csv"
    good = log.read_bytes()
    log.write_bytes(good + b"\xc2\xb2,1\n" + b"9" * 5_000 + b",1\n\xff\xfe\n32,\xff,1\n")
    run(copy, command + " --steps 352")
    assert log.read_bytes().startswith(good)
    assert [int(row["step"]) for row in rows(log)][-2:] == [320, 352]
    log.write_bytes(good[:20])  # a full disk had room for half a header
    run(copy, command + " --steps 384")
    assert [int(row["step"]) for row in rows(log)] == [384]
    text = log.read_text().replace("max_q", "frames,max_q")
    log.write_text(text)  # as if someone had added a column for a while
    status, _, errors = call_here(copy, command + " --steps 416")
    assert status == 2 and "has other columns" in errors and log.read_text() == text
    log.write_bytes(b"my,own,notes\n1,2,3\n")
    refused(copy, command + " --steps 448", "log.csv", "not a log")


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    args = importlib.import_module("train_expert").Args()
    save_checkpoint(tmp_path / "c.pt", args, net={"weight": torch.ones(2)})
    good = (tmp_path / "c.pt").read_bytes()
    for weight in (torch.tensor([1.0, torch.nan]), torch.tensor([1e6]).half()):
        with pytest.raises(UserError, match="not finite"):
            save_checkpoint(tmp_path / "c.pt", args, net={"weight": weight})
    assert contents(tmp_path) == {tmp_path / "c.pt": good}


def test_evaluate_finds_out_before_the_games_that_it_may_not_write(copy):
    command = "evaluate.py --runs runs/mimic --games 1 --device cpu"
    status, said, errors = call_here(copy, f"{command} --name {'x' * 250}")
    assert status == 2 and "plays" not in said and "Traceback" not in errors


def test_full_disk_keeps_the_old_table(copy):
    command = "evaluate.py --curves runs/mimic/log.csv"
    run(copy, command)
    refused(
        copy,
        command,
        "results",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )


def test_full_disk_is_one_line_and_keeps_the_old_checkpoint(copy):
    command = EXPERT + " --game pong --steps 640"
    limit = 8_000  # bytes per file: the checkpoint does not fit
    refused(
        copy,
        command,
        "could not write",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "goes on at step 320" in run(copy, command)


@pytest.mark.parametrize("command", [EXPERT + " --game pong", MIMIC, TRANSFER])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(copy, command):
    status, _, errors = call_here(copy, f"{command} --out runs/wild --lr 1e30")
    assert status == 2 and "not finite" in errors and "Traceback" not in errors
    if (copy / "runs/wild/checkpoint.pt").exists():
        net = load_checkpoint(copy / "runs/wild", ("expert", "mimic", "transfer"))["net"]
        assert all(weight.isfinite().all() for weight in net.values())


# The house rules


def test_one_script_and_common_are_enough(tmp_path):
    for name in SCRIPTS:
        (tmp_path / name).mkdir()
        for file in (name, "common"):
            shutil.copy(ROOT / f"{file}.py", tmp_path / name)
    for said in call_all(tmp_path, [f"{name}/{name}.py --help" for name in SCRIPTS]):
        assert "--seed" in said


def test_same_name_same_source():
    seen = {}
    for name in SCRIPTS:
        source = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in (
                "Args",
                "main",
            ):
                seen.setdefault(node.name, {})[name] = ast.get_source_segment(source, node)
    copies = {name for name, sources in seen.items() if len(sources) > 1}
    assert {"make_envs", "legal_actions", "AtariNet", "act"} <= copies
    for name in copies:
        assert len(set(seen[name].values())) == 1, f"{name} differs between {', '.join(seen[name])}"
    for name in ("make_envs", "legal_actions", "AtariNet", "act"):
        assert len(seen[name]) == len(SCRIPTS)


def test_transfer_differs_from_train_expert_by_a_screen():
    diff = subprocess.run(
        ["diff", "train_expert.py", "transfer.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert sum(line[0] in "<>" for line in diff.splitlines()) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_used_and_explained(name):
    module = importlib.import_module(name)
    body = (ROOT / f"{name}.py").read_text().split("__post_init__")[1].split("\n\n\n", 1)[1]
    for field in fields(module.Args):
        assert re.search(rf"\bargs\.{field.name}\b", body), f"--{field.name} does nothing"
        line = rf"^    {field.name}: .*  # ."
        assert re.search(line, (ROOT / f"{name}.py").read_text(), re.M), f"--{field.name}: no help"


@pytest.mark.parametrize(
    "path", ["README.md", "results/README.md", *(f"{name}.py" for name in SCRIPTS)]
)
def test_every_command_that_is_written_down_parses(path):
    text = (ROOT / path).read_text()
    commands = re.findall(
        r'python ((?:train_expert|train_mimic|transfer|evaluate)\.py[^#\n&`;"]*)', text
    )
    assert commands
    for command in commands:
        command = re.sub(r"\$\w+", "1", command)  # a shell's loop variable
        script, *flags = shlex.split(command.rstrip(" |.,)"))
        shipped = "experts/", "mimics/", "results/"
        files = [f for f in flags if f.startswith(shipped) and "*" not in f]
        assert all((ROOT / file).exists() for file in files), command
        parse_args(importlib.import_module(script.removesuffix(".py")).Args, flags)


def agrees(cell, number):
    """A cell of a table, such as 59,080 or 19.8, is the number, rounded to as many digits.

    A little more than half a digit, since the files hold six digits, rounded once before.
    """
    digits = len(cell.partition(".")[2])
    return abs(float(cell.replace(",", "")) - float(number)) <= 0.51 * 10**-digits


def table_line(text, game):
    """The cells of a README's table, in the line of a game."""
    (line,) = re.findall(rf"^\| {game.replace('_', ' ').title()} \| (.*) \|$", text, re.M)
    return line.split(" | ")


def test_the_tables_of_the_readme_say_what_the_files_in_results_hold():
    mimics, rest = (ROOT / "README.md").read_text().split("## The files")
    experts = rest.split("\n**2. ")[0]
    table = [row for row in rows(ROOT / "results/mimic.csv") if "mimic-s" in row["network"]]
    for game, (paper_expert, paper_amn) in PAPER.items():
        seeds = [row for row in table if row["game"] == game]
        expert, mean, percent, interval, each, *paper = table_line(mimics, game)
        assert agrees(expert, seeds[0]["expert"]), game
        assert agrees(mean, sum(float(row["mean"]) for row in seeds) / len(seeds)), game
        assert agrees(percent, sum(float(row["% expert"]) for row in seeds) / len(seeds)), game
        for cell, row in zip(each.split(", "), seeds, strict=True):
            assert agrees(cell, row["% expert"]), game
        # The interval is in no file, but in what evaluate.py printed.
        ends = re.search(rf"  {game}: .* interval (.*) to (.*)\)", mimics).groups()
        assert all(map(agrees, interval.split(" to "), ends)), game
        wanted = paper_expert, paper_amn, 100 * paper_amn / paper_expert
        assert len(paper) == 3 and all(map(agrees, paper, wanted)), game
    table = rows(ROOT / "results/experts.csv")
    assert len(table) == len(PAPER)
    for row in table:
        *_, score, paper, percent, sticky = table_line(experts, row["game"])
        assert agrees(score, row["mean"]) and agrees(sticky, row["sticky 0.25"]), row["game"]
        assert agrees(paper, row["paper_dqn"]), row["game"]
        assert agrees(percent, 100 * float(row["mean"]) / float(row["paper_dqn"])), row["game"]


def test_what_the_readmes_say_of_transfer_is_in_its_files(capsys):
    print_curves(group_curves(sorted((ROOT / "results").glob("transfer-*.csv"))))
    number, interval = r"(-?[\d.]+)", r"(?: \(95 % interval ([\d.]+) to ([\d.]+)\))?"
    line = rf"(\w+), .*-(mimic|control).*: {number}{interval} over the run, {number}{interval} at"
    printed = {(game, arm): said for game, arm, *said in re.findall(line, capsys.readouterr().out)}
    table = (ROOT / "README.md").read_text().split("| 400,000 steps |")[1]
    for game in {game for game, _ in printed}:
        seeds, *cells = table_line(table, game)
        assert seeds == ("3" if printed[game, "mimic"][1] else "1")
        for arm, written in (("mimic", cells[::2]), ("control", cells[1::2])):
            written = re.findall(r"[\d.,]+", " ".join(written))
            said = [said for said in printed[game, arm] if said]
            assert len(written) == len(said) and all(map(agrees, written, said)), (game, arm)
    assert len(printed) == 10
    text = (ROOT / "results/README.md").read_text().split("## Transfer")[1].split("\n\n")[2]
    written = [line.split("|")[3:-1] for line in text.split("\n")[2:]]
    starts = {}  # {how the weights begin: {game: row}}
    for row in rows(ROOT / "results/transfer_recipe.csv"):
        starts.setdefault(row["start"], {})[row["game"]] = row
    default = "rescaled, a new last LayerNorm and output layer"
    for start, arm in (("random weights", "control"), (default, "mimic")):
        log = read_log(ROOT / f"results/transfer-breakout-{arm}-s1.csv")
        row, scores = starts[start]["breakout"], log["breakout_score"]
        assert agrees(row["score"], scores[-1]) and float(row["steps"]) == log["step"][-1]
        assert agrees(row["mean_over_run"], mean_over_run(log["step"], scores))
    for by_game, cells in zip(starts.values(), written, strict=True):
        games = "assault", "demon_attack", "breakout"
        for game, over, end in zip(games, cells[::2], cells[1::2], strict=True):
            assert bool(over.strip()) == bool(end.strip()) == (game in by_game)
            if game in by_game:
                assert agrees(over.strip(), by_game[game]["mean_over_run"]), (game, over)
                assert agrees(end.strip(), by_game[game]["score"]), (game, end)


def test_the_table_of_the_last_norm_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text().split("### A new last LayerNorm")[1]
    table = text.split("\n### ")[0]
    games = {}  # {game: {whose LayerNorm: rows}}
    for row in rows(ROOT / "results/transfer_last_norm.csv"):
        games.setdefault(row["game"], {}).setdefault(row["last_norm"], []).append(row)
        if row["last_norm"] == "new" and float(row["steps"]) > 200_000:  # those logs are included
            log = read_log(ROOT / f"results/transfer-{row['game']}-mimic-s{row['seed']}.csv")
            scores = log[f"{row['game']}_score"]
            assert agrees(row["mean_over_run"], mean_over_run(log["step"], scores)), row
            assert agrees(row["score"], scores[-1]) and agrees(row["dead"], log["dead"][-1]), row
    for game, norms in games.items():
        steps, seeds, *cells = table_line(table, game)
        kept, new = norms["the mimic's"], norms["new"]
        assert len(kept) == len(new) == int(seeds)
        for row in kept + new:
            assert abs(float(row["steps"]) - float(steps.replace(",", ""))) < 1024
        wanted = []
        for column, scale in (("mean_over_run", 1), ("score", 1), ("dead", 100)):
            for each in (kept, new):
                wanted.append(scale * sum(float(row[column]) for row in each) / len(each))
        assert len(cells) == 6 and all(map(agrees, cells, wanted)), game


def test_the_table_of_the_experts_choices_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text().split("### What a choice is worth")[1]
    table, length = text.split("\n### ")[0], "--steps 300_000"
    runs = [row for row in rows(ROOT / "results/expert_recipe.csv") if length in row["flags"]]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"][2:]
    for choice, *scores, dead in lines:
        flags, note = re.search(r"`(.*)`", choice), re.fullmatch(r"\(none, (.*)\)", choice)
        same = f"{length} {flags[1] if flags else ''}".strip(), note[1] if note else ""
        seeds = [row for row in runs if (row["flags"], row["note"]) == same]
        for game, cell in zip(("breakout", "seaquest", "space_invaders"), scores, strict=True):
            own = [row["score"] for row in seeds if row["game"] == game]
            assert all(map(agrees, cell.split(", "), own)) and len(own) == cell.count(",") + 1 == 2
        ends = [100 * extreme(float(row["dead"]) for row in seeds) for extreme in (min, max)]
        assert all(map(agrees, dead.removesuffix(" %").split(" to "), ends)), choice
    assert len(lines) * 6 == len(runs) >= 24


def test_the_table_of_ablations_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text()
    table = {}  # {name of the row: {game: rows of its seeds}}
    for row in rows(ROOT / "results/mimic_ablations.csv"):
        if row["network"].startswith("runs/ablation/"):
            name = row["network"].removeprefix("runs/ablation/").rpartition("-s")[0]
            table.setdefault(name, {}).setdefault(row["game"], []).append(row)

    def mean(seeds, column):
        return sum(float(row[column]) for row in seeds) / len(seeds)

    for name, by_game in table.items():
        (line,) = re.findall(rf"^\| {re.escape(name)} \| .*", text, re.M)
        *_, breakout, seaquest, agreement, lost = line.split("|")[:-1]
        cells = zip((breakout, seaquest), agreement.split(", "), lost.split(", "), strict=True)
        for game, (score, agreed, valued) in zip(("breakout", "seaquest"), cells, strict=True):
            seeds = by_game[game]
            assert len(seeds) == 2
            score, percent = re.match(r" ([\d,]+) \((\d+) %, ", score).groups()
            assert agrees(score, mean(seeds, "mean")), (name, game)
            assert agrees(percent, mean(seeds, "% expert")), (name, game)
            assert agrees(agreed, mean(seeds, "% agreement")), (name, game)
            assert agrees(valued, mean(seeds, "% value lost")), (name, game)
    assert len(table) >= 10


def test_the_table_of_other_lengths_says_what_its_files_hold():
    text = (ROOT / "results/README.md").read_text().split("### Other lengths and flags")[1]
    lines = re.findall(r"^\| `--.* \|$", text.split("\n### ")[0], re.M)
    for line in lines:
        percents = {}  # {network: {game: per cent of the expert}}
        for row in rows(ROOT / "results" / re.search(r"\]\((.*?\.csv)\)", line)[1]):
            percents.setdefault(row["network"], {})[row["game"]] = float(row["% expert"])
        seeds = [by_game for by_game in percents.values() if len(by_game) == 8]
        assert len(seeds) == 1 + ("two seeds" in line), line
        means = {game: sum(seed[game] for seed in seeds) / len(seeds) for game in PAPER}
        median, *cells = (cell.removesuffix(" %") for cell in line.strip("| ").split(" | ")[2:6])
        assert agrees(median, statistics.median(means.values())), line
        for game, cell in zip(("breakout", "seaquest", "space_invaders"), cells, strict=True):
            assert agrees(cell, means[game]), (line, game)
    assert len(lines) >= 8


def test_the_table_of_numbers_of_games_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text()
    percents = {}  # {number of games: {game: per cent of the expert, of each seed}}
    for row in rows(ROOT / "results/mimic_games.csv"):
        if match := re.match(r"runs/games/(\d)-games?-s\d$", row["network"]):
            by_game = percents.setdefault(int(match[1]), {})
            by_game.setdefault(row["game"], []).append(float(row["% expert"]))
    for count, by_game in percents.items():
        assert len(by_game) == count
        means = {game: sum(seeds) / len(seeds) for game, seeds in by_game.items()}
        (line,) = re.findall(rf"^\| {count} \| (.*) \|$", text, re.M)
        minutes, per_game, *cells, median = [cell.strip() for cell in line.split("|")]
        assert abs(float(minutes) / count - float(per_game)) <= 0.05
        assert agrees(median.split()[0], statistics.median(means.values())), count
        columns = "breakout", "seaquest", "pong", "space_invaders"
        for game, cell in zip(columns, cells, strict=True):
            assert (game in means) == bool(cell), (count, game)
            assert not cell or agrees(cell.split()[0], means[game]), (count, game)
    assert list(percents) == [1, 2, 4, 8]


def test_numbers_may_be_written_in_three_ways():
    cls = importlib.import_module("train_expert").Args
    assert {
        parse_args(cls, ["--steps", text]).steps for text in ("10_000_000", "1e7", "10000000")
    } == {10_000_000}


@dataclass(frozen=True)
class NewArgs:
    rate: float = 1  # a default that looks like an int
    bare: int = 3
    on: bool = True  # a switch that is on
    off: bool = False  # and one that is off


def test_a_flag_that_a_student_adds_does_what_the_dataclass_says():
    assert parse_args(NewArgs, []) == NewArgs()
    flags = "--rate 0.5 --bare 4 --no-on --off".split()
    assert parse_args(NewArgs, flags) == NewArgs(0.5, 4, False, True)


def test_a_script_runs_although_its_output_is_closed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_expert.py"])
    monkeypatch.setattr("sys.stdout", None)  # as with `>&-`
    common.run(print, NewArgs)


@pytest.mark.parametrize(
    "message, is_memory",
    [
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("more than one element refers to a single memory location. Please clone()", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_want_of_memory_is_called_so(capsys, monkeypatch, message, is_memory):
    def main(args):
        raise RuntimeError(message)

    monkeypatch.setattr("sys.argv", ["train_expert.py"])
    with pytest.raises(SystemExit if is_memory else RuntimeError):
        common.run(main, NewArgs)
    assert ("not enough memory" in capsys.readouterr().err) == is_memory


def test_experts_that_ship_are_whole():
    shipped = sorted((ROOT / "experts").glob("*.pt"))
    assert len(shipped) >= 3
    for path in shipped:
        expert = load_checkpoint(path, ("expert",))
        assert expert["games"] == [path.stem] and path.stat().st_size < 4e6
        assert {"command", "step", "minutes", "score", "machine"} <= expert.keys()
        assert all(
            weight.dtype == torch.half and weight.isfinite().all()
            for weight in expert["net"].values()
        )


def test_mimics_that_ship_are_whole_and_know_their_experts():
    shipped = sorted((ROOT / "mimics").glob("*.pt"))
    assert shipped
    for path in shipped:
        mimic = load_checkpoint(path, ("mimic",))
        assert path.stat().st_size < 4e6
        assert all(weight.dtype == torch.half for weight in mimic["net"].values())
        experts = [load_checkpoint(ROOT / expert, ("expert",)) for expert in mimic["experts"]]
        assert [expert["games"] for expert in experts] == [[game] for game in mimic["games"]]
        assert [[expert["step"], expert["minutes"]] for expert in experts] == mimic["marks"]


def test_wrong_stage_and_garbage_never_reach_the_network(tmp_path):
    for content in ({"format": "actor-mimic-1", "stage": "mimic"}, ["a list"], torch.zeros(3)):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "x.pt", ("expert",))
