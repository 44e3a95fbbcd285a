"""Every loss and target against a closed form or a slow second way."""

import math

import common

import numpy as np
import pytest
import torch

from train_expert import (
    AtariNet,
    act,
    greedy_value,
    learner_view,
    legal_actions,
    make_envs,
    new_episode,
    q_lambda_targets,
    td_loss,
)
from train_mimic import feature_loss, policy_loss, q_loss, q_spread
from transfer import rescale


def test_q_lambda_targets_are_the_weighted_sum_of_n_step_returns():
    torch.manual_seed(0)
    T, N, gamma, lam = 6, 5, 0.9, 0.7
    rewards, max_q, stop = torch.randn(T, N), torch.randn(T + 1, N), torch.rand(T, N) < 0.3
    targets = q_lambda_targets(rewards, stop, max_q, gamma, lam)
    for env in range(N):
        for t in range(T):
            end = next(
                (i for i in range(t, T) if stop[i, env]), None
            )  # the step that ends the return
            last = T - 1 if end is None else end

            def n_step(n):  # n rewards and then the best Q-value, or all up to the stop
                total = sum(gamma**i * rewards[t + i, env].item() for i in range(n))
                return total if t + n - 1 == end else total + gamma**n * max_q[t + n, env].item()

            longest = last - t + 1
            expected = sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, longest))
            expected += lam ** (longest - 1) * n_step(longest)
            assert targets[t, env].item() == pytest.approx(expected, abs=1e-5)


def test_q_lambda_targets_at_both_ends_of_lambda():
    rewards, stop = torch.tensor([[1.0], [0.0], [2.0]]), torch.zeros(3, 1, dtype=torch.bool)
    max_q = torch.tensor([[9.0], [5.0], [7.0], [3.0]])
    assert q_lambda_targets(rewards, stop, max_q, 0.5, 0.0).flatten().tolist() == [3.5, 3.5, 3.5]
    assert q_lambda_targets(rewards, stop, max_q, 0.5, 1.0).flatten().tolist() == [1.875, 1.75, 3.5]


def test_what_the_learner_sees_of_a_step():
    #                   plain, large, negative, lost life, time limit, both at once
    reward = torch.tensor([0, 400, -7, 1, 20, 1], dtype=torch.int32)
    terminated = torch.tensor([False, False, False, True, False, True])
    truncated = torch.tensor([False, False, False, False, True, True])
    cut_value = torch.full((6,), 3.0)
    seen, stop = learner_view(reward, terminated, truncated, cut_value, 0.5)
    assert seen.tolist() == [0, 1, -1, 1, 1 + 0.5 * 3, 1]
    assert stop.tolist() == [False, False, False, True, True, True]


def test_a_new_episode_begins_where_the_count_of_frames_falls():
    began = new_episode(np.array([8, 3, 108_000, 12]), np.array([4, 107_999, 107_996, 400]))
    assert began.tolist() == [False, True, False, True]


def test_td_loss_and_its_gradient():
    q = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = td_loss(q, torch.tensor([0, 1]), torch.tensor([0.0, 7.0]))
    assert loss.item() == pytest.approx((1 / 2 + (3 - 1 / 2)) / 2)  # of errors of 1 and -3
    loss.backward()
    assert q.grad.tolist() == [[1 / 2, 0.0], [0.0, -1 / 2]]  # each cut to -1 ... 1; their mean


def test_policy_loss_is_the_cross_entropy_and_its_gradient_the_difference_of_the_policies():
    torch.manual_seed(0)
    B, temperature, legal = 7, 0.3, torch.rand(18) < 0.5
    logits, q = torch.randn(B, 18, requires_grad=True), torch.randn(B, 18)
    loss = policy_loss(logits, q, legal, temperature).mean()
    actions = [a for a in range(18) if legal[a]]
    expected, gradient, scores = 0.0, torch.zeros(B, 18), logits.tolist()
    for b in range(B):
        z_expert = sum(math.exp(q[b, a] / temperature) for a in actions)
        z_student = sum(math.exp(scores[b][a]) for a in actions)
        for a in actions:
            expert = math.exp(q[b, a] / temperature) / z_expert
            student = math.exp(scores[b][a]) / z_student
            expected -= expert * math.log(student) / B
            gradient[b, a] = (student - expert) / B
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, gradient)
    assert (logits.grad[:, ~legal] == 0).all()


def test_imitation_losses_of_games_side_by_side_are_those_of_each_alone():
    torch.manual_seed(0)
    logits, q = torch.randn(3, 7, 18), torch.randn(3, 7, 18)
    legal, temperature = torch.rand(3, 1, 18) < 0.5, torch.rand(3, 1, 1) + 0.1
    policy, values = policy_loss(logits, q, legal, temperature), q_loss(logits, q, legal)
    assert policy.shape == values.shape == (3, 7)
    for g in range(3):
        for b in range(7):
            own, expert = logits[g, b, legal[g, 0]], q[g, b, legal[g, 0]]
            probabilities = torch.softmax(expert / temperature[g].item(), 0)
            expected = torch.nn.functional.cross_entropy(own, probabilities)
            torch.testing.assert_close(policy[g, b], expected)
            torch.testing.assert_close(values[g, b], (own - expert).square().mean())


def test_q_loss_sees_legal_actions_only():
    legal = torch.zeros(18, dtype=torch.bool)
    legal[[2, 5]] = True
    student, expert = torch.zeros(1, 18, requires_grad=True), torch.full((1, 18), 3.0)
    loss = q_loss(student, expert, legal)
    assert loss.item() == 9.0
    loss.backward()
    assert student.grad[0].nonzero().flatten().tolist() == [2, 5]


def test_feature_loss_sums_over_features_and_averages_over_the_batch():
    assert (
        feature_loss(torch.ones(2, 3), torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 3.0]])).item()
        == (3 + 4) / 2
    )


def test_act_explores_legal_actions_only_and_as_often_as_asked():
    rng, n = torch.Generator().manual_seed(0), 40_000
    legal = legal_actions("pong")  # 6 of 18
    scores = torch.arange(18.0).expand(n, 18)  # the best of all, 17, is not legal
    best = max(a for a in range(18) if legal[a])
    assert (act(scores, legal, 0.0, rng) == best).all()
    actions = act(scores, legal, 0.3, rng)
    share = torch.bincount(actions, minlength=18) / n
    assert (share[~legal] == 0).all()
    expected = torch.where(legal, 0.3 / 6, 0.0)
    expected[best] += 0.7
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)


def test_act_with_a_mask_for_each_row():
    legal = torch.eye(18, dtype=torch.bool)
    actions = act(torch.zeros(18, 18), legal, 0.5, torch.Generator().manual_seed(0))
    assert actions.tolist() == list(range(18))


def test_same_picture_with_another_mask_is_the_only_way_the_network_can_tell_games_apart():
    torch.manual_seed(0)
    logits = torch.randn(1, 18).expand(500, 18)
    rng = torch.Generator().manual_seed(0)
    chosen = {
        game: set(act(logits, legal_actions(game), 1.0, rng).tolist())
        for game in ("pong", "freeway")
    }
    for game, actions in chosen.items():
        assert actions == set(legal_actions(game).nonzero().flatten().tolist())


def test_greedy_value_ignores_illegal_actions():
    legal = torch.tensor([True, False, True])
    assert greedy_value(torch.tensor([[1.0, 9.0, 2.0]]), legal).tolist() == [2.0]


@pytest.mark.parametrize("norm", ["all", "linear", "none"])
@pytest.mark.parametrize(
    "channels, hidden, parameters",
    [((32, 64, 64), (512,), 1_693_362), ((256, 512, 512, 512), (2048, 1024), 35_216_146)],
)
def test_network_has_the_papers_size(channels, hidden, parameters, norm):
    with torch.device("meta"):  # shapes without numbers: first weights of 35M take seconds
        net = AtariNet(channels, hidden, norm)
    # A scale and a shift: what LayerNorm adds.
    norms = 2 * (sum(channels) * (norm == "all") + sum(hidden) * (norm != "none"))
    assert sum(p.numel() for p in net.parameters()) == parameters + norms


@pytest.mark.parametrize("norm", ["all", "linear", "none"])
def test_a_network_gives_values_and_features(norm):
    net = AtariNet((8, 8, 8, 8), (32, 16), norm)
    values, features = net(torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8))
    assert values.shape == (2, 18) and features.shape == (2, 16) and (features >= 0).all()
    assert (values.std(1) > 0).all()  # of equal ones argmax would take the no-op for ever


@pytest.mark.parametrize("norm", ["all", "linear", "none"])
def test_rescaled_layers_have_the_size_of_new_ones_and_give_the_same_outputs(norm):
    torch.manual_seed(0)
    net, fresh = (AtariNet((4, 8, 8), (16, 16), norm) for _ in range(2))
    with torch.no_grad():
        for weight in net.parameters():  # as if trained: larger, each by another factor
            weight.add_(torch.randn_like(weight), alpha=weight.std().item() + 0.1)
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8)
    before = net(obs)
    rescale(net, fresh)
    scores, features = net(obs)
    torch.testing.assert_close(scores, before[0], atol=1e-3, rtol=1e-3)
    if norm == "none":  # then the head alone cancels the size
        features = features * (before[1].norm() / features.norm())
    torch.testing.assert_close(features, before[1], atol=1e-3, rtol=1e-3)
    for layer, new in zip(net.body, fresh.body, strict=True):
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.testing.assert_close(layer.weight.norm(), new.weight.norm())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_convolution_of_pixels_is_one_of_numbers_from_0_to_1(bfloat16):
    torch.manual_seed(0)
    net = AtariNet((8,), (16,)).to(memory_format=torch.channels_last)
    frames = torch.randint(256, (5, 6, 84, 84), dtype=torch.uint8)
    fast, slow = net.body[0], torch.nn.Conv2d(4, 8, 8, 4)
    torch.nn.init.normal_(fast.bias)
    slow.load_state_dict(fast.state_dict())
    for obs in (frames[:, :4].contiguous(), frames[:, 1:5]):  # and one that is not contiguous
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            seen = fast(obs).float()
        known = slow(obs / 255)
        weights = torch.randn(known.shape)
        for layer, result in ((fast, seen), (slow, known)):
            layer.zero_grad()
            (result * weights).sum().backward()
        for a, b in (
            (seen, known),
            *((x.grad, getattr(slow, n).grad) for n, x in fast.named_parameters()),
        ):
            assert (a - b).abs().max() < (0.02 if bfloat16 else 1e-5) * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8])
def test_pixels_of_another_type_are_refused(dtype):
    with pytest.raises(TypeError, match="pixels must be uint8"):
        AtariNet((4,), (8,))(torch.zeros((2, 4, 84, 84), dtype=dtype))


@pytest.mark.parametrize("stride, padding", [(2, 0), (4, 2)])
def test_a_convolution_of_pixels_has_a_stride_of_4_and_no_padding(stride, padding):
    obs = torch.zeros((2, 4, 84, 84), dtype=torch.uint8)
    seen = rf"the stride \(4, 4\) .* {stride}\) and \({padding}, {padding}\)"
    with pytest.raises(TypeError, match=seen):
        common.PixelConv2d(4, 8, 8, stride, padding)(obs)


def test_scores_are_not_rounded_to_bfloat16():
    net, obs = AtariNet((4,), (8,)), torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    torch.nn.init.normal_(net.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        scores, features = net(obs)
    assert torch.equal(scores, net.head(features)) and scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_q_learning_reaches_the_known_values_of_a_small_world():
    # Five rooms in a row; action 1 goes right, 0 stays; leaving the last room pays 1 and ends.
    torch.manual_seed(0)
    gamma, rooms, T, N = 0.8, 5, 8, 16
    q = torch.zeros(rooms, 2, requires_grad=True)
    optimizer = torch.optim.SGD([q], lr=10.0)
    room = torch.zeros(N, dtype=torch.int64)
    for _ in range(400):
        visited, actions = torch.empty(T, N, dtype=torch.int64), torch.randint(2, (T, N))
        rewards, stop, values = (
            torch.zeros(T, N),
            torch.zeros(T, N, dtype=torch.bool),
            torch.empty(T + 1, N),
        )
        for t in range(T):
            visited[t], values[t] = room, q[room].detach().amax(1)
            room = room + actions[t]
            stop[t] = room == rooms
            rewards[t] = stop[t].float()
            room[stop[t]] = 0
        values[T] = q[room].detach().amax(1)
        targets = q_lambda_targets(rewards, stop, values, gamma, 0.0)
        optimizer.zero_grad()
        td_loss(q[visited.flatten()], actions.flatten(), targets.flatten()).backward()
        optimizer.step()
    right = torch.tensor([gamma ** (rooms - 1 - s) for s in range(rooms)])
    torch.testing.assert_close(
        q.detach(), torch.stack([gamma * right, right], 1), atol=0.01, rtol=0
    )


def test_q_spread_sees_legal_actions_only_and_not_what_all_share():
    q, legal = torch.full((2, 18), 1e9), torch.zeros(18, dtype=torch.bool)
    legal[[2, 5, 11]] = True
    q[0, legal], q[1, legal] = torch.tensor([7.0, 7.0, 10.0]), torch.tensor([-5.0, -5.0, -8.0])
    assert q_spread(q, legal).item() == pytest.approx(math.sqrt(2))  # both states: 3 * sqrt(2) / 3
    policy = torch.softmax(q[:, legal] / (0.3 * q_spread(q, legal)), 1)
    scaled = torch.softmax(50 * q[:, legal] / (0.3 * q_spread(50 * q, legal)), 1)
    torch.testing.assert_close(policy, scaled)  # the scale of Q does not matter
    assert q_spread(torch.zeros(2, 18), legal) > 0  # an expert that has learned nothing


def test_student_reaches_the_policy_of_a_frozen_expert():
    torch.manual_seed(0)
    legal, rng = legal_actions("breakout"), torch.Generator().manual_seed(0)
    envs = make_envs("breakout", 16)
    pictures, _ = envs.reset(seed=1)
    seen = []
    for _ in range(6):
        pictures = envs.step(act(torch.zeros(16, 18), legal, 1.0, rng).numpy())[0]
        seen.append(torch.from_numpy(pictures))
    obs = torch.cat(seen)
    expert, student = AtariNet((8, 8), (32,)), AtariNet((8, 8), (32,))
    torch.nn.init.orthogonal_(expert.head.weight)
    with torch.no_grad():
        expert_q = expert(obs)[0]
        expert_q[:, legal] -= expert_q[:, legal].mean(0)  # otherwise one action is best everywhere
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(300):
        loss = policy_loss(student(obs)[0], expert_q, legal, 0.02).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        agree = student(obs)[0][:, legal].argmax(1) == expert_q[:, legal].argmax(1)
    assert len(set(expert_q[:, legal].argmax(1).tolist())) > 1
    assert agree.float().mean() > 0.9
