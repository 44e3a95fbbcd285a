"""The emulator's pictures, scores and ends against raw ALE, stepped frame by frame."""

import numpy as np
import pytest
import torch
from ale_py import Action, ALEInterface, LoggerMode, roms

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
