"""The emulator's pictures, scores and ends against raw ALE, stepped frame by frame."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from ale_py import Action, ALEInterface, LoggerMode, roms

import evaluate
from common import load_checkpoint
from evaluate import bootstrap, interquartile_mean, print_summary
from train_expert import act, legal_actions, make_envs
from train_mimic import FrameReplay

ALEInterface.setLoggerMode(LoggerMode.Error)


def area_weights(source, target):
    """(target, source) matrix: each target pixel averages what it covers of the source."""
    weights = np.zeros((target, source))
    for i in range(target):
        low, high = i * source / target, (i + 1) * source / target
        for j in range(source):
            weights[i, j] = max(0, min(high, j + 1) - max(low, j)) / (high - low)
    return weights


def shrink(screen):
    """Resize (210, 160) to (84, 84) by area."""
    return area_weights(210, 84) @ screen.astype(float) @ area_weights(160, 84).T


def raw_game(game, frames, fire):
    """Start raw ALE as the vector emulator does: `frames` no-ops, the first of them FIRE if so."""
    ale = ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    ale.reset_game()
    for i in range(frames):
        ale.act(Action.FIRE if fire and i == 0 else Action.NOOP)
    return ale


@pytest.mark.parametrize("game, fire", [("pong", False), ("breakout", True), ("seaquest", False)])
def test_pictures_and_scores_equal_a_slow_pipeline_on_raw_frames(game, fire):
    envs, legal = make_envs(game, 1), legal_actions(game)
    rng = torch.Generator().manual_seed(0)
    obs, info = envs.reset(seed=np.array([5]))
    ale = raw_game(game, int(info["episode_frame_number"][0]), fire)
    stack = [np.zeros((84, 84))] * 3 + [shrink(ale.getScreenGrayscale())]
    score, ended = 0, False
    for step in range(3_000):
        if (
            step < 150 or step % 50 < 4
        ):  # the slow pipeline only now and then, in runs of a whole stack
            assert np.abs(obs[0][-1] - stack[-1]).max() <= 1  # one grey level of rounding
        if step < 150:
            assert np.abs(obs[0] - np.stack(stack)).max() <= 1
        action = int(act(torch.zeros(1, 18), legal, 1.0, rng))
        lives, frames = ale.lives(), []
        for _ in range(4):
            score += ale.act(Action(action))
            frames.append(ale.getScreenGrayscale())
        needed = step + 1 < 150 or (step + 1) % 50 < 4
        stack = stack[1:] + [shrink(np.maximum(frames[-1], frames[-2])) if needed else stack[-1]]
        obs, reward, terminated, truncated, new_info = envs.step(np.array([action]))
        score -= int(reward[0])
        assert score == 0  # so far, both have counted the same
        assert terminated[0] == (ale.game_over() or ale.lives() < lives) and not truncated[0]
        game_over = new_info["episode_frame_number"][0] < info["episode_frame_number"][0]
        assert game_over == ale.game_over()
        info = new_info
        if game_over:
            ended = True
            break
    assert ended, "no game ended: the test has seen no whole score"


def test_a_lane_that_is_restarted_leaves_the_others_alone():
    envs, restart = make_envs("boxing", 3), np.array([False, True, False])
    envs.reset(seed=np.array([1, 2, 3]))
    for _ in range(10):
        before, _, _, _, info = envs.step(np.zeros(3, int))
    obs, new_info = envs.reset(options={"reset_mask": restart})
    assert (obs[[0, 2]] == before[[0, 2]]).all()
    assert (obs[1, :3] == 0).all() and (obs[1, 3] != 0).any()  # black before the first picture
    fell = new_info["episode_frame_number"] < info["episode_frame_number"]
    assert (fell == restart).all()
    _, _, _, _, info = envs.step(np.zeros(3, int))
    assert (info["episode_frame_number"] == new_info["episode_frame_number"] + 4).all()


def test_three_ends_are_told_apart():
    envs, legal = make_envs("breakout", 4, max_frames=800), legal_actions("breakout")
    rng = torch.Generator().manual_seed(0)
    _, info = envs.reset(seed=3)
    seen = set()
    for _ in range(700):
        before = info
        obs, _, terminated, truncated, info = envs.step(
            act(torch.zeros(4, 18), legal, 1.0, rng).numpy()
        )
        restarted = info["episode_frame_number"] < before["episode_frame_number"]
        for i in range(4):
            if truncated[i]:
                seen.add("time limit")
                assert restarted[i] and info["final_obs"][i].any()
            elif terminated[i] and restarted[i]:
                seen.add("game over")
                # A life that is lost as time runs out comes as a lost life alone.
                assert before["lives"][i] == 1 or before["episode_frame_number"][i] >= 800 - 4
            elif terminated[i]:
                seen.add("lost life")
                assert info["lives"][i] == before["lives"][i] - 1 and obs[i, 0].any()
            else:
                assert not restarted[i]
            if restarted[i]:
                assert not obs[i, :3].any() and obs[i, 3].any()  # three black frames and the first
    assert seen == {"time limit", "game over", "lost life"}


def test_replay_rebuilds_the_stacks_that_the_emulator_showed():
    N, capacity = 3, 40
    envs, legal = make_envs("breakout", N), legal_actions("breakout")
    rng = torch.Generator().manual_seed(0)
    obs, info = envs.reset(seed=3)
    replay, age, shown = FrameReplay(capacity, N, 1), torch.zeros(N, dtype=torch.int64), {}
    restarts = 0
    for step in range(500):
        # The label says which observation this is.
        label = step * N + torch.arange(N)
        q_values = torch.zeros(N, 18)
        q_values[:, 0] = label
        replay.add(torch.from_numpy(obs), age, q_values, torch.zeros(N, 1))
        shown |= {int(i): torch.from_numpy(o) for i, o in zip(label, obs)}
        if step % 7 == 0:
            drawn, q_values, _ = replay.draw(64, rng)
            ids = q_values[:, 0].long().tolist()
            assert all(torch.equal(o, shown[i]) for o, i in zip(drawn, ids))
            assert min(ids) >= (step - capacity) * N
        before = info
        obs, _, _, _, info = envs.step(act(torch.zeros(N, 18), legal, 1.0, rng).numpy())
        over = torch.from_numpy(info["episode_frame_number"] < before["episode_frame_number"])
        restarts += int(over.sum())
        age = torch.where(over, 0, (age + 1).clamp(max=3))
    assert restarts > 2


def test_five_games_have_their_known_minimal_action_sets():
    sizes = {
        game: int(legal_actions(game).sum())
        for game in ("atlantis", "pong", "seaquest", "freeway", "enduro")
    }
    assert sizes == {"atlantis": 4, "pong": 6, "seaquest": 18, "freeway": 3, "enduro": 9}


def test_interval_and_interquartile_mean():
    assert interquartile_mean(np.array([[0, 1, 2, 100]])) == 1.5
    rng = np.random.default_rng(0)
    scores = rng.normal(10, 2, (1, 1, 400))
    value, low, high = bootstrap(np.mean, scores, np.full((1, 1, 1), 100.0))
    assert value == pytest.approx(scores.mean())
    assert high - low == pytest.approx(
        2 * 1.96 * scores.std() / 20, rel=0.15
    )  # the textbook interval of a mean


def test_intervals_hold_the_noise_of_the_experts_games_too(capsys):
    def width(expert_scores):
        results = {
            "mimic": {game: np.full(30, 10.0) for game in ("pong", "krull")},
            "teacher": {game: expert_scores for game in ("pong", "krull")},
        }
        print_summary(
            results, {label: dict.fromkeys(results[label], "teacher") for label in results}
        )
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith("mimic, per cent of expert: median 50.0 ")
        low, high = re.search(r"interval ([\d.]+) to ([\d.]+)", line).groups()
        return float(high) - float(low)

    assert width(np.full(30, 20.0)) == 0
    assert width(20 + 10 * np.linspace(-1, 1, 30)) > 5


def test_what_an_expert_says_of_a_networks_choices():
    torch.manual_seed(0)
    legal = torch.rand(18) < 0.5
    scores, q = torch.randn(9, 18), torch.randn(9, 18)
    agreed = lost = at_random = 0
    actions = [a for a in range(18) if legal[a]]
    for s in range(9):
        own = max(actions, key=lambda a: scores[s, a].item())
        best = max(actions, key=lambda a: q[s, a].item())
        losses = {a: (q[s, best] - q[s, a]).item() for a in actions}
        agreed += own == best
        lost += losses[own]
        at_random += sum(losses.values()) / len(actions)
    assert evaluate.judge(scores, q, legal).tolist() == pytest.approx([agreed, lost, at_random])


def test_a_network_agrees_with_itself_and_never_with_its_opposite():
    args, device = evaluate.Args(runs=("unused",), games=2), torch.device("cpu")
    torch.manual_seed(0)
    net, same, opposite = (evaluate.AtariNet((4,), (8,)) for _ in range(3))
    for other, factor in ((same, 3), (opposite, -1)):
        other.load_state_dict(net.state_dict())
        with torch.no_grad():
            other.head.weight *= factor
            other.head.bias[~legal_actions("breakout")] += 100  # beyond what counts

    def play(expert):
        scores, judged = evaluate.play(net, "breakout", 0.0, args, device, nullcontext(), expert)
        return scores, *judged.values()

    (scores, *alone), (again, agreed, lost) = play(None), play(same)
    _, never, much = play(opposite)
    assert np.isnan(alone).all()
    assert (agreed, lost) == (100, 0) and never == 0 and much > 100  # worse than random choices
    assert (scores == again).all()  # who watches does not change the games


def test_a_score_is_of_each_lanes_first_game_alone():
    args = evaluate.Args(runs=("",), games=5, seed=3)
    scores, _ = evaluate.play(None, "breakout", 0.0, args, torch.device("cpu"), nullcontext())
    # The same games on emulators that all play on until the last one's game is over.
    envs, legal, rng = make_envs("breakout", 5), legal_actions("breakout"), torch.Generator()
    rng.manual_seed(3)
    envs.reset(seed=torch.randint(2**31 - 1, (5,), generator=rng).numpy())
    first, lives_lost = np.zeros(5), np.zeros(5)
    while lives_lost.min() < 5:
        actions = act(torch.zeros(5, 18), legal, 1.0, rng)
        _, reward, terminated, _, _ = envs.step(actions.numpy())
        first += reward * (lives_lost < 5)
        lives_lost += terminated
    assert scores.tolist() == first.tolist() and len(set(scores)) > 1


def test_the_figure_has_a_bar_for_each_group_of_seeds(monkeypatch):
    figures = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: figures.append(figure))
    games = ("pong", "krull")
    results = {
        label: {game: np.full(3, mean) for game in games}
        for label, mean in (("mimic-s1", 4.0), ("mimic-s2", 8.0), ("warm", 15.0), ("teacher", 20.0))
    }
    expert_of = {label: dict.fromkeys(games, "teacher") for label in results}
    rows = evaluate.make_rows(results, expert_of)
    evaluate.draw_bars(rows, evaluate.group_seeds(results, expert_of), expert_of, "unused")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == list(games)
    names = [text.get_text() for text in panels[0].get_yticklabels()]
    assert names == ["mimic (2 seeds)", "warm"]
    for panel in panels:
        assert [bar.get_width() for bar in panel.patches] == [30, 75]  # per cent of the teacher
        dots = [line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 2][0]
        assert list(dots) == [20, 40]


def test_seeds_of_an_expert_are_not_measured_by_the_first_and_without_measure_no_bars(
    tmp_path, capsys
):
    expert = load_checkpoint(Path(__file__).parent.parent / "experts/breakout.pt", ("expert",))
    for game, seeds, percent in (("breakout", (1, 2), np.nan), ("alien", (1,), 100)):
        paths = [str(tmp_path / f"{game}-s{seed}.pt") for seed in seeds]
        for path in paths:
            torch.save({**expert, "games": [game]}, path)
        networks, expert_of = evaluate.load_networks(evaluate.Args(runs=tuple(paths)), "cpu")
        # They are copies: someone has forgotten --seed 2.
        assert ("have the same seed" in capsys.readouterr().err) == (len(seeds) > 1)
        results = {label: {game: np.array([20.0, 30.0])} for label in networks}
        rows, picture = evaluate.make_rows(results, expert_of), tmp_path / f"{game}.png"
        np.testing.assert_equal([row["% expert"] for row in rows], [percent] * len(seeds))
        groups = evaluate.group_seeds(results, expert_of)
        drawn = evaluate.draw_bars(rows, groups, expert_of, picture)
        # Of Alien no human's score is at hand.
        assert drawn == picture.exists() == (game == "breakout")


@pytest.mark.parametrize("games", [("pong", "krull"), ("pong",)])
def test_intervals_hold_the_seeds_too(capsys, games):
    def interval(labels):
        results = {
            label: {game: np.full(30, mean) for game in games}
            for label, mean in zip(labels, (4.0, 10.0, 16.0))
        }
        results["teacher"] = {game: np.full(30, 20.0) for game in games}
        print_summary(results, {label: dict.fromkeys(games, "teacher") for label in results})
        return capsys.readouterr().out

    said = interval(["runs/mimic-s1", "runs/mimic-s2", "runs/mimic-s3"])
    assert "runs/mimic (3 seeds), per cent of expert: median 50.0 (95 % interval " in said
    # The seeds have 20, 50 and 80 per cent, each in both games: the median is no surer than a game.
    for line in ("  pong: 50.0", r"per cent of expert: median 50.0"):
        low, high = re.search(line + r" \(95 % interval ([\d.]+) to ([\d.]+)\)", said).groups()
        assert float(low) < 35 and float(high) > 65
    apart = interval(["runs/mimic-s1", "runs/warm-s1", "runs/cold-s1"])
    alone = "runs/warm-s1, per cent of expert: median 50.0" in apart
    assert "seeds" not in apart and alone == (len(games) > 1)
