"""evaluate.py: scores, tables, intervals, curves and films."""

import importlib
import math
import os
import re
import resource
import shutil
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from common import Stop, UserError, load_checkpoint
from evaluate import MEDIAN, bootstrap, compare_arms, group_curves, interquartile_mean, print_curves
from helpers import EXPERT, MIMIC, TRANSFER, call, call_all, call_here, refused, rows, run
from train_expert import make_envs


def test_evaluate_measures_draws_and_films(copy, short_episodes):
    log = copy / "runs/expert-pong/log.csv"
    log.write_text(log.read_text().replace("nan", "1"))  # as if episodes had ended
    for seed in (1, 2):
        run(copy, f"{TRANSFER} --seed {seed}")
    said = run(
        copy,
        "evaluate.py --runs runs/mimic --random --episodes 2 --gif --film 5 --device cpu "
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
    experts = [f"runs/expert-{game}/expert.pt" for game in ("pong", "boxing")]
    networks = list(dict.fromkeys(row["network"] for row in table))
    assert networks == ["runs/mimic", *experts, "random"]  # not as their episodes ended
    for row in table:
        if row["game"] == "pong":
            assert -21 <= float(row["mean"]) <= 21 and float(row["max"]) >= float(row["mean"])
        if "expert-" in row["network"]:
            assert row["expert"] == row["% expert"] == row["low"] == "nan"
            continue
        (expert,) = (
            float(other["mean"])
            for other in table
            if "expert-" in other["network"] and other["game"] == row["game"]
        )
        assert float(row["expert"]) == expert
        if row["% expert"] != "nan":
            percent = 100 * float(row["mean"]) / expert
            assert float(row["% expert"]) == pytest.approx(percent, rel=1e-4)
        else:  # a ratio that would mean nothing
            assert row["low"] == "nan" and expert < 21
    # A line for each game of the network that was named and of chance, each in 100 columns.
    lines = said.splitlines()
    shown = [line.split()[:2] for line in lines[1:5]]
    assert sorted(shown) == sorted(
        [game, network] for game in ("pong", "boxing") for network in ("runs/mimic", "random")
    )
    assert all(len(line) <= 100 for line in lines)
    assert "runs/mimic: % of human" in said
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
    assert (copy / "results/table-curves.png").read_bytes().startswith(b"\x89PNG")
    known = any(row["% expert"] != "nan" for row in table)
    assert (copy / "results/table.png").exists() == known
    assert (copy / "results/table.gif").read_bytes().startswith(b"GIF8")


def test_curves_are_summed_up_with_an_interval_over_seeds(tmp_path, capsys):
    # From the first score on: 1 rises to 3 in 10 steps and stays 30 more, so its mean is 2.75.
    for seed, more in ((1, 0), (2, 1), (3, 5)):
        lines = "5,1,nan", f"10,2,{1 + more}", f"20,3,{3 + more}", f"50,4,{3 + more}"
        text = "\n".join(["step,minutes,pong_score", *lines])
        (tmp_path / f"a-s{seed}.csv").write_text(text)
    (tmp_path / "b-s1.csv").write_text("step,minutes,pong_score\n5,1,nan\n")  # too short
    (tmp_path / "c-s1.csv").write_text("step,minutes,pong_score\n10,1,4\n20,2,6\n")
    (tmp_path / "c-s2.csv").write_text("step,minutes,pong_score\n20,1,6\n1000,2,6\n")
    print_curves(group_curves(sorted(tmp_path.glob("*.csv"))))
    half = 4.30 * statistics.stdev([0, 1, 5]) / 3**0.5
    over, end = 4.75, 5.0
    said = capsys.readouterr()
    assert "b-s1.csv has no pong_score yet" in said.err
    assert said.out == (
        f"pong, a (3 seeds): {over:.1f} ({over - half:.1f} to {over + half:.1f}) over the run, "
        f"{end:.1f} ({end - half:.1f} to {end + half:.1f}) at its end\n"
        "pong, c (2 seeds), after 20 to 1,000 steps: 5.5 over the run, 6.0 at its end\n"
    )


def write_arms(folder, arms):
    """Write logs of transfer.py: {(game, arm): each seed's scores after 100, 200, 400 steps}."""
    for (game, arm), seeds in arms.items():
        for seed, scores in enumerate(seeds, 1):
            text = "".join(f"{s},1,{y}\n" for s, y in zip((100, 200, 400), scores))
            path = folder / f"transfer-{game}-{arm}-s{seed}.csv"
            path.write_text(f"step,minutes,{game}_score\n{text}")


def test_steps_to_the_controls_last_score(copy, tmp_path):
    control = [("nan", 2, 9), ("nan", 2, 11)]  # a mean of 10 after 400 steps
    arms = {("pong", "control"): control, ("krull", "control"): control}
    arms |= {("pong", "amn-policy"): [("nan", 5, 12), ("nan", 5, 18)]}  # 10 half way from 5 to 15
    arms |= {("krull", "amn-policy"): [(10, 20, 0), (10, 20, 0)]}  # at once
    arms |= {("pong", "amn-feature"): [(1, 2, 9.9), (1, 2, 9.9)]}  # not, on the average
    write_arms(tmp_path, arms)
    compared = compare_arms(group_curves(sorted(tmp_path.glob("*.csv"))))
    policy, feature = compared["amn-policy"], compared["amn-feature"]
    assert compared.keys() == {"amn-policy", "amn-feature"}
    assert policy["pong"][0] == pytest.approx(300 / 400)
    assert policy["krull"] == pytest.approx((0.25, 0.25, 0.275))  # a goal of 11 takes longer
    assert policy[MEDIAN][0] == pytest.approx((0.75 + 0.25) / 2)
    # Goals of 9, 10 and 11 meet means of 12, 15 and 18.
    low, high = 0.5 + 0.5 * (9 - 5) / (18 - 5), 0.5 + 0.5 * (11 - 5) / (12 - 5)
    assert policy["pong"][1:] == pytest.approx((low, high))
    assert feature["pong"] == pytest.approx((math.inf, 0.5 + 0.5 * 7 / 7.9, math.inf))
    assert MEDIAN not in feature  # of one game
    # What still runs, or is a single seed, is not passed off as a result.
    running = tmp_path / "running"
    running.mkdir()
    lone = {("pong", "control"): [(1, 2, 3)], ("pong", "lone"): [(2, 3, 4)]}
    write_arms(running, lone | {("pong", "late"): [(0, 1)], ("krull", "control"): [(1, 2, 3)]})
    write_arms(running, {("krull", "mixed"): [(1, 2, 3), (3, 4)]})
    compared = compare_arms(group_curves(sorted(running.glob("*.csv"))))
    assert compared.keys() == {"lone"} and compared["lone"]["pong"][0] == 200 / 400
    assert all(map(math.isnan, compared["lone"]["pong"][1:]))
    write_arms(running, {("krull", "control"): [(1, 2, 3), (1, 2)]})  # they share 200 steps
    compared = compare_arms(group_curves(sorted(running.glob("*.csv"))))
    assert compared["mixed"]["krull"][0] == 100 / 200
    said = run(copy, f"evaluate.py --curves {tmp_path}/*.csv --device cpu")
    assert "pong, amn-feature: steps to the control's last score never (0.94 to never)" in said
    assert f"{MEDIAN}, amn-policy: steps to the control's last score 0.50" in said
    assert (copy / "results/table-arms.png").exists()


def test_the_mean_of_curves_is_drawn_where_all_seeds_have_a_score(tmp_path, monkeypatch):
    for seed, first in ((1, 10), (2, 20)):
        rows = "".join(f"{step},1,{seed}\n" for step in range(first, 31, 10))
        (tmp_path / f"a-s{seed}.csv").write_text("step,minutes,pong_score\n" + rows)
    module, figures = importlib.import_module("evaluate"), []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    module.draw_curves(group_curves(sorted(tmp_path.glob("*.csv"))), "unused")
    thick = figures[0].axes[0].lines[0].get_ydata().tolist()
    assert math.isnan(thick[0]) and thick[1:] == [1.5, 1.5]


def test_films_of_several_networks_and_of_whole_episodes(copy, short_episodes, monkeypatch):
    films = {}
    monkeypatch.setattr(evaluate, "write_gif", lambda film, path: films.setdefault(path.name, film))
    monkeypatch.setattr(evaluate, "SKIPPED", 10)
    flags = "--episodes 0 --gif --film 3 --device cpu"
    said = run(copy, f"evaluate.py --runs runs/mimic runs/expert-pong/expert.pt {flags}")
    # The experts of the mimic that nobody named are not filmed.
    assert set(films) == {"table-runs-mimic.gif", "table-runs-expert-pong-expert.gif"}
    assert "of memory" in said and not (copy / "results/table.csv").exists()
    assert set(films["table-runs-mimic.gif"]) == {"pong", "boxing"}
    for film in films.values():
        for pictures, scores in film.values():
            assert len(pictures) == len(scores) == 3 and pictures[0].shape == (210, 160, 3)
    films.clear()
    run(copy, "evaluate.py --runs runs/mimic --episodes 0 --gif --film 0 --device cpu")
    for pictures, _ in films["table.gif"].values():  # 1,000 frames, less up to 30 no-ops
        assert 240 <= len(pictures) <= 250


def test_a_film_shows_the_game_that_is_played(copy):
    """Colour and grey emulators stay together: the last grey picture is the colour one's."""
    args = evaluate.Args(runs=(str(copy / "runs/mimic"),), film=20, precision="float32")
    (player, *_) = evaluate.load_players(args, torch.device("cpu"))
    seen = []
    plain = evaluate.choose

    def choose(player, obs, *others):
        seen.append(obs[0, -1])
        return plain(player, obs, *others)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(evaluate, "choose", choose)
        patch.setattr(evaluate, "SKIPPED", 0)
        film = evaluate.record(player, args, torch.device("cpu"), Stop())
    pictures, _ = film["pong"]
    for picture, grey in zip(pictures, seen[1:]):
        light = (picture @ np.array([0.299, 0.587, 0.114])).mean()
        assert light == pytest.approx(grey.mean(), abs=1.5)


def test_evaluate_is_repeatable_and_sticky_actions_change_it(copy):
    run(copy, EXPERT + " --game breakout --steps 32")  # its games are short
    command = "evaluate.py --runs runs/expert-breakout/expert.pt --episodes 2 --device cpu --out "
    for out in ("a", "c --sticky 0.25", "d --sticky 0 0.25"):
        run(copy, command + out)
    call_all(copy, [command + "b"])  # in a process of its own, too
    tables = {name: rows(copy / name / "table.csv") for name in "abcd"}
    assert tables["a"] == tables["b"] and tables["a"][0]["scores"] != tables["c"][0]["scores"]
    # Several values in one call: a row for each.
    assert sorted(row["sticky"] for row in tables["d"]) == ["0", "0.25"]
    (row,) = tables["c"]
    scores = [float(score) for score in row["scores"].split()]
    assert len(scores) == 2 and sum(scores) / 2 == float(row["mean"])
    assert max(scores) == float(row["max"])
    assert (row["epsilon"], row["sticky"], row["seed"]) == ("0.05", "0.25", "1")
    run(copy, command + "e --random --epsilon 0.2 --seed 2")
    epsilons = {row["network"]: row["epsilon"] for row in rows(copy / "e/table.csv")}
    assert epsilons == {"runs/expert-breakout/expert.pt": "0.2", "random": "1"}
    assert all(row["seed"] == "2" for row in rows(copy / "e/table.csv"))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", ["--runs"]),
        ("--runs nothing", ["nothing"]),
        ("--runs common.py", ["common.py"]),
        ("--curves common.py", ["common.py"]),
        ("--runs runs/mimic --episodes 0", ["--episodes"]),
        ("--runs runs/mimic --games 3", ["--games", "--episodes"]),
        ("--runs runs/mimic --games pongg", ["pongg", "pong"]),
        ("--runs runs/mimic --episodes 0 --gif --random", ["--episodes"]),
        ("--runs runs/mimic --gif --film 30_000", ["--film"]),
        ("--runs runs/mimic --name a/b", ["--name"]),
        ("--runs runs/mimic --sticky 0 2", ["--sticky"]),
        ("--runs random --random", ["named random"]),
        ("--curves runs/mimic/log.csv --random", ["--random"]),
    ],
)
def test_evaluate_refuses(studio, flags, words):
    refused(studio, f"evaluate.py {flags}", *words)


def test_evaluate_does_not_write_over_a_log(copy):
    refused(
        copy, "evaluate.py --runs runs/mimic --episodes 1 --out runs/mimic --name log", "log.csv"
    )


def test_evaluate_finds_out_before_the_games_that_it_may_not_write(copy):
    command = "evaluate.py --runs runs/mimic --episodes 1 --device cpu"
    status, said, errors = call_here(copy, f"{command} --name {'x' * 250}")
    assert status == 2 and not said and "Traceback" not in errors


def test_full_disk_keeps_the_old_table(copy):
    log = copy / "runs/mimic/log.csv"
    log.write_text(log.read_text().replace("nan", "1"))  # as if episodes had ended
    command = "evaluate.py --curves runs/mimic/log.csv"
    run(copy, command)
    refused(
        copy,
        command,
        "results",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )


def test_interval_and_interquartile_mean():
    assert interquartile_mean(np.array([[0, 1, 2, 100]])) == 1.5
    rng = np.random.default_rng(0)
    scores = rng.normal(10, 2, (1, 1, 400))
    value, low, high = bootstrap(np.mean, scores, np.full((1, 1, 1), 100.0))
    assert value == pytest.approx(scores.mean())
    # The textbook interval of a mean; one of 90% would be 0.84 of it.
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)


def summary(capsys, scores):
    """What print_summary says of {label: scores (episodes,)} in two games; "teacher" is the expert.

    {label: (median, low, high)} in % of the expert.
    """
    games = ["pong", "krull"]
    results = {(label, game, 0.0): own for label, own in scores.items() for game in games}
    experts = dict.fromkeys(games, "teacher")
    players = [evaluate.Player(label, None, games, experts) for label in scores]
    players[-1].experts = {}
    evaluate.print_summary(players, results, 0.0)
    said = capsys.readouterr().out
    line = r"(.*): % of expert\n  median ([\d.]+) \(([\d.]+) to ([\d.]+)\)"
    return {name: tuple(map(float, numbers)) for name, *numbers in re.findall(line, said)}, said


def test_intervals_hold_the_noise_of_the_experts_episodes_too(capsys):
    def width(expert_scores):
        numbers, _ = summary(capsys, {"mimic": np.full(30, 10.0), "teacher": expert_scores})
        median, low, high = numbers["mimic"]
        assert median == 50
        return high - low

    assert width(np.full(30, 20.0)) == 0
    assert width(20 + 10 * np.linspace(-1, 1, 30)) > 5


def test_one_episode_has_no_interval():
    value, low, high = bootstrap(np.mean, np.full((1, 1, 1), 30.0), np.full((1, 1, 4), 60.0))
    assert value == 50 and math.isnan(low) and math.isnan(high)
    assert evaluate.show_interval((value, low, high)) == "50.0"


def test_intervals_hold_the_seeds_too(capsys):
    def interval(*labels):
        scores = {label: np.full(30, mean) for label, mean in zip(labels, (4.0, 10.0, 16.0))}
        return summary(capsys, scores | {"teacher": np.full(30, 20.0)})

    numbers, said = interval("runs/mimic-s1", "runs/mimic-s2", "runs/mimic-s3")
    # The seeds have 20, 50 and 80%, each in both games: the median is no surer than a game.
    median, low, high = numbers["runs/mimic (3 seeds)"]
    assert median == 50 and low < 35 and high > 65
    low, high = re.search(r"  pong 50.0 \(([\d.]+) to ([\d.]+)\)", said).groups()
    assert float(low) < 35 and float(high) > 65
    numbers, _ = interval("runs/mimic-s1", "runs/warm-s1", "runs/cold-s1")
    assert numbers["runs/warm-s1"] == (50, 50, 50) and len(numbers) == 3


def test_percentages_of_an_expert_near_zero_are_not_shown(capsys):
    near_zero = np.array([-20.0, 21.0, -19.0, 20.0])
    numbers, _ = summary(capsys, {"mimic": np.full(4, 10.0), "teacher": near_zero})
    assert not numbers


def test_every_episode_that_begins_is_counted_to_its_end():
    """The scores are those of whole episodes, replayed one by one with the same actions."""
    args = evaluate.Args(runs=("",), episodes=10, seed=3)
    players = [evaluate.Player(label, None, ["breakout"], {}) for label in ("one", "two")]
    actions, seeds, plain = {}, {}, evaluate.Game.send

    def send(game, action):
        actions.setdefault(id(game), []).append(int(action))
        plain(game, action)

    plain_init = evaluate.Game.__init__

    def init(game, name, sticky, seed):
        seeds[id(game)] = name, seed
        plain_init(game, name, sticky, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "AT_ONCE", 8)  # fewer than there are episodes
        patch.setattr(evaluate.common, "cores", lambda: 2)
        patch.setattr(evaluate.Game, "send", send)
        patch.setattr(evaluate.Game, "__init__", init)
        found = dict(evaluate.play(players, args, torch.device("cpu"), Stop()))
    expected = []
    for key, taken in actions.items():
        name, seed = seeds[key]
        env = make_envs(name, 1)
        frame, score = env.reset(seed=seed)[1]["episode_frame_number"], 0.0
        for action in taken:
            _, reward, _, _, info = env.step(np.array([action]))
            score += float(reward[0])
            if info["episode_frame_number"] < frame:
                expected.append(score)
                score = 0.0
            frame = info["episode_frame_number"]
    assert [len(scores) for scores in found.values()] == [10, 10]
    assert sorted(np.concatenate(list(found.values()))) == sorted(expected)


def test_the_figure_has_a_bar_for_each_group_of_seeds(monkeypatch):
    figures, games = [], ["pong", "krull"]
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: figures.append(figure))
    means = {"mimic-s1": 4.0, "mimic-s2": 8.0, "warm": 15.0, "teacher": 20.0}
    results = {(label, game, 0.0): np.full(3, means[label]) for label in means for game in games}
    experts = dict.fromkeys(games, "teacher")
    players = [
        evaluate.Player(label, None, games, experts if label != "teacher" else {})
        for label in means
    ]
    args = evaluate.Args(runs=("unused",))
    rows = [evaluate.make_row((p.label, g, 0.0), p, results, args) for p in players for g in games]
    assert evaluate.draw_bars(rows, evaluate.group_seeds(players, results, 0.0), "unused")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["Pong", "Krull"]
    names = [text.get_text() for text in panels[0].get_yticklabels()]
    assert names == ["mimic (2 seeds)", "warm"]
    for panel in panels:
        assert [bar.get_width() for bar in panel.patches] == [30, 75]  # % of the teacher
        dots = [line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 2][0]
        assert list(dots) == [20, 40]
    assert not evaluate.draw_bars(rows[-2:], [], "unused")  # the teacher alone


def test_seeds_of_an_expert_are_not_measured_by_the_first(copy, capsys):
    for seed in (1, 2):
        shutil.copy(copy / "runs/expert-pong/expert.pt", copy / f"pong-s{seed}.pt")
    args = evaluate.Args(runs=(str(copy / "pong-s*.pt"),), random=True)
    players = evaluate.load_players(args, torch.device("cpu"))
    # They are copies: someone has forgotten --seed 2.
    assert "have the same seed" in capsys.readouterr().err
    assert len(players) == 3 and not any(player.experts for player in players)
    args = evaluate.Args(runs=(str(copy / "pong-s1.pt"),), random=True)
    expert, random = evaluate.load_players(args, torch.device("cpu"))
    assert not expert.experts and random.experts == {"pong": expert.label}


def test_an_expert_is_known_by_its_mark_wherever_it_lies(copy, tmp_path):
    (tmp_path / "far").mkdir()
    shutil.move(copy / "runs/mimic/mimic.pt", tmp_path / "far/m.pt")
    for game in ("pong", "boxing"):
        shutil.move(copy / f"runs/expert-{game}/expert.pt", tmp_path / f"far/my-{game}.pt")
    shutil.rmtree(copy / "runs")
    runs = tuple(f"{tmp_path}/far/{name}.pt" for name in ("m", "my-pong", "my-boxing"))
    mimic, *experts = evaluate.load_players(evaluate.Args(runs=runs), torch.device("cpu"))
    assert mimic.experts == {"pong": runs[1], "boxing": runs[2]}
    assert [player.games for player in experts] == [["pong"], ["boxing"]]


def test_the_games_that_are_measured_can_be_chosen(copy, monkeypatch):
    monkeypatch.chdir(copy)

    def games(*runs, chosen):
        args = evaluate.Args(runs=runs, games=chosen)
        players = evaluate.load_players(args, torch.device("cpu"))
        return [(p.label, p.games, set(p.experts)) for p in players]

    # A game that a mimic never learned, and those that it did.
    mimic, pong, boxing = "runs/mimic", "runs/expert-pong/expert.pt", "runs/expert-boxing/expert.pt"
    assert games(mimic, chosen=("Breakout",)) == [(mimic, ["breakout"], set())]
    assert games(mimic, boxing, chosen=("pong", "boxing")) == [
        (mimic, ["pong", "boxing"], {"pong", "boxing"}),
        (boxing, ["boxing"], set()),
        (pong, ["pong"], set()),
    ]


def test_a_stop_keeps_what_has_been_measured(copy, short_episodes, monkeypatch):
    plain, made = evaluate.make_row, []

    def make_row(*details):
        made.append(plain(*details))
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    monkeypatch.setattr(evaluate, "make_row", make_row)
    monkeypatch.setattr(evaluate, "AT_ONCE", 8)
    status, said, _ = call_here(copy, "evaluate.py --runs runs/mimic --episodes 8 --device cpu")
    assert status == 130 and "stopped; " in said and f"wrote {Path('results/table.csv')}" in said
    table = rows(copy / "results/table.csv")
    assert 1 <= len(table) == len(made)


def test_another_student_trains_and_is_measured_with_one_file_changed(copy, short_episodes):
    """In a copy of the project; transfer refuses such a mimic."""
    script = copy / "train_mimic.py"
    source = script.read_text()
    assert source.count("\nStudent = AtariNet\n") == 1
    own = """

class Student(nn.Module):
    def __init__(self, channels, hidden, norm):
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * 21 * 21, 7))
        self.logits = nn.Linear(7, 18)

    def forward(self, obs):
        features = self.body(obs / 255).relu()
        return self.logits(features), features

"""
    script.write_text(source.replace("\nStudent = AtariNet\n", own))
    mine = MIMIC + " --out runs/mine"
    measure = "evaluate.py --runs runs/mine runs/mimic --episodes 1 --gif --film 2 --device cpu"
    for said in (call(copy, mine), call(copy, measure + " --games pong")):
        assert said.returncode == 0, said.stderr
    table = {row["network"]: row for row in rows(copy / "results/table.csv")}
    # The mimic from before is still read with the class that made it.
    assert table.keys() == {"runs/mine", "runs/mimic", "runs/expert-pong/expert.pt"}
    assert table["runs/mine"]["expert"] == table["runs/mimic"]["expert"] != "nan"
    mimic = load_checkpoint(copy / "runs/mine", ("mimic",))
    assert mimic["network"] == "Student" and mimic["regressors"]["0.weight"].shape == (16, 7)
    refused(copy, TRANSFER + " --mimic runs/mine", "runs/mine is a Student")
    # Without the class the network cannot be built, nor its run resumed.
    script.write_text(source)
    refused(copy, measure, "runs/mine is a Student, which train_mimic.py does not have")
    refused(copy, mine + " --steps 640", "another Student")


def test_sticky_actions_that_training_did_not_have_are_noted(copy, capsys):
    for sticky, noted in ((0.25, True), (0.0, False)):
        args = evaluate.Args(runs=(str(copy / "runs/mimic"),), sticky=(sticky,))
        evaluate.load_players(args, torch.device("cpu"))
        said = capsys.readouterr().err
        assert ("trained with --sticky 0, measured with 0.25" in said) == noted
