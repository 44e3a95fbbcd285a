"""What the learner gets in the loops of the three stages, and what evaluate.py makes of scores."""

import contextlib
import functools
import importlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import evaluate
from common import load_checkpoint, pick_autocast
from helpers import EXPERT, MIMIC, TRANSFER, call_here, rows, run, same


@pytest.mark.parametrize("actor", ["student", "both", "expert"])
def test_each_expert_judges_what_its_own_game_shows(copy, monkeypatch, actor):
    module = importlib.import_module("train_mimic")
    added, acted, N = {}, [], 4

    def add(replay, *entry):  # in the order in which the loop adds: steps of one game at a time
        added.setdefault(id(replay), []).append([part.clone() for part in entry])
        replay.added += 1

    def send(env, actions):
        acted.append(actions.copy())
        plain_send(env, actions)

    paths = [f"{copy}/runs/expert-{game}/expert.pt" for game in ("pong", "boxing")]
    flags = {"num_envs": N, "rollout": 8, "epsilon": 0.0, "precision": "float32", "actor": actor}
    flags |= {"experts": tuple(paths), "out": str(copy / "runs/new"), "updates": 2}
    module.main(
        module.Args(steps=8 * N, **flags)
    )  # one round: then both have half of the environments
    plain_send = module.AtariVectorEnv.send
    monkeypatch.setattr(module.AtariVectorEnv, "send", send)
    monkeypatch.setattr(module.FrameReplay, "add", add)
    monkeypatch.setattr(module, "q_spread", lambda *_: sys.exit("the labels are there"))
    with pytest.raises(SystemExit, match="the labels"):
        module.main(module.Args(steps=16 * N, **flags))
    student = module.AtariNet()
    student.load_state_dict(load_checkpoint(copy / "runs/new/checkpoint.pt", ("mimic",))["net"])
    students = {"student": N, "both": N // 2, "expert": 0}[actor]
    for g, (path, entries) in enumerate(zip(paths, added.values(), strict=True)):
        expert, net = module.load_expert(path)
        legal = torch.zeros(18, dtype=torch.bool)
        legal[expert["legal"]] = True
        assert len(entries) == 8
        for t, (obs, age, q_values, features) in enumerate(entries):
            with torch.no_grad():
                wanted_q, wanted_features = net(obs)
                values = torch.cat([student(obs)[0][:students], wanted_q[students:]])
            torch.testing.assert_close(q_values, wanted_q)
            torch.testing.assert_close(features, wanted_features)
            if t > 0:  # no game ends this early: the stack moves on by one frame
                assert torch.equal(obs[:, :3], entries[t - 1][0][:, 1:])
            assert age.tolist() == N * [min(t, 3)]
            greedy = values.masked_fill(~legal, -torch.inf).argmax(1)
            assert acted[2 * t + g].tolist() == greedy.tolist()


def test_an_environment_goes_over_to_the_student_with_a_new_episode(copy, monkeypatch):
    module = importlib.import_module("train_mimic")
    short = functools.partial(module.make_envs, max_frames=400)  # episodes of 93 to 100 steps
    monkeypatch.setattr(module, "make_envs", short)
    experts = (str(copy / "runs/expert-pong/expert.pt"),)
    flags = {"num_envs": 4, "rollout": 8, "updates": 1, "actor": "both", "steps": 4 * 320}
    module.main(module.Args(experts=experts, out=str(copy / "runs/new"), **flags))
    # The student has the environments from steps 8, 88, 168 and 248 of 320 on: time for 3, 2, 1 and
    # no whole episodes.
    (scores,) = load_checkpoint(copy / "runs/new", ("mimic",))["scores"]
    assert len(scores) == 3 + 2 + 1


@pytest.mark.parametrize("name", ["train_expert", "transfer"])
def test_one_environment_after_the_other_restarts(copy, monkeypatch, name):
    script, options = importlib.import_module(name), []
    reset = script.AtariVectorEnv.reset

    def spy(envs, **flags):
        options.append(flags.get("options"))
        return reset(envs, **flags)

    monkeypatch.setattr(script.AtariVectorEnv, "reset", spy)
    source = {"mimic": str(copy / "runs/mimic")} if name == "transfer" else {"channels": (4,)}
    flags = {"num_envs": 3, "rollout": 4, "minibatch": 4, "steps": 60, "device": "cpu", **source}
    script.main(script.Args(game="breakout", out=str(copy / "runs/new"), **flags))
    assert options[0] is None  # the start of all; then three of the five rounds
    masks = [option["reset_mask"].tolist() for option in options[1:]]
    assert masks == torch.eye(3, dtype=torch.bool).tolist()


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


@pytest.mark.parametrize("command", [EXPERT + " --game pong", MIMIC, TRANSFER])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(copy, command):
    status, _, errors = call_here(copy, f"{command} --out runs/wild --lr 1e30")
    assert status == 2 and "not finite" in errors and "Traceback" not in errors
    if (copy / "runs/wild/checkpoint.pt").exists():
        net = load_checkpoint(copy / "runs/wild", ("expert", "mimic", "transfer"))["net"]
        assert all(weight.isfinite().all() for weight in net.values())


class ScriptedEnvs:
    """Two environments with random screens, whose rewards and ends stand in tables of 8 steps."""

    rewards = np.array([[5, 1], [0, 40], [-3, 0], [1, 9], [1, 7], [0, 0], [2, -2], [0, 1]])
    # A lost life in steps 0 and 5, game over in 2 and 6, once as the time runs out.
    terminated = np.array([[1, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 1], [1, 1], [0, 0]], bool)
    truncated = np.array([[0, 0], [0, 0], [0, 1], [0, 0], [0, 0], [0, 0], [1, 0], [0, 0]], bool)
    over = np.array([[0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [1, 1], [0, 0]], bool)

    def __init__(self, *args):
        self.args, self.rng = args, np.random.default_rng(len(args[0]))  # by the game's name
        self.obs, self.frame = self.screens(), np.ones(2, int)
        self.seen, self.actions, self.shown, self.final = [], [], [], []  # one entry per step

    def screens(self):
        # Noise, each frame of another brightness, so that networks choose different actions.
        bright = self.rng.integers(2, 256, size=(2, 4, 1, 1))
        return self.rng.integers(bright, size=(2, 4, 84, 84)).astype(np.uint8)

    def reset(self, seed=None, options=None):
        mask = options["reset_mask"] if options else np.array([True, True])
        self.obs = np.where(mask[:, None, None, None], self.screens(), self.obs)
        self.frame = np.where(mask, 1, self.frame)
        return self.obs, {"episode_frame_number": self.frame}

    def step(self, actions):
        t = len(self.actions) % 8
        self.seen.append(self.obs)
        self.actions.append(actions.copy())
        self.obs = self.screens()
        self.shown.append(self.obs)
        self.final.append(self.screens())
        self.frame = np.where(self.over[t], 3, self.frame + 4)
        info = {"episode_frame_number": self.frame, "final_obs": self.final[-1]}
        reward = self.rewards[t].astype(np.int32)
        return self.obs, reward, self.terminated[t], self.truncated[t], info

    def send(self, actions):
        self.result = self.step(actions)

    def recv(self):
        return self.result


@pytest.fixture
def scripted(copy, monkeypatch):
    """Return a function that runs a script on ScriptedEnvs, and returns these."""

    def go(module, **flags):
        made = []

        def make_envs(*args):
            made.append(ScriptedEnvs(*args))
            return made[-1]

        usual = {"num_envs": 2, "rollout": 4, "out": str(copy / "runs/new")}
        usual |= {"device": "cpu", "precision": "float32"}
        usual |= {
            "train_expert": {"game": "breakout", "channels": (4,), "hidden": (8,)},
            "train_mimic": {"experts": (str(copy / "runs/expert-pong/expert.pt"),)},
            "transfer": {"game": "breakout", "mimic": str(copy / "runs/mimic"), "arm": "control"},
        }[module.__name__]
        with monkeypatch.context() as patch:
            patch.setattr(module, "make_envs", make_envs)
            module.main(module.Args(**(usual | flags)))
        return made

    return go


def spy(monkeypatch, owner, name):
    """Record the arguments and the result of every call of owner.name."""
    plain, calls = getattr(owner, name), []

    def recorded(*args, **flags):
        calls.append((args, plain(*args, **flags)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, recorded)
    return calls


@contextlib.contextmanager
def each_update(seen):
    """Call seen(optimizer) before each update of any optimizer."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen(optimizer))
    try:
        yield
    finally:
        handle.remove()


def random_weights(weights):
    """Random weights in the shapes of a state_dict, so large that scores lie far apart."""
    return {name: torch.randn(weight.shape) for name, weight in weights.items()}


def slow_targets(envs, steps, net, legal, gamma, lam):
    """Q(lambda) targets of a range of steps, one environment after the other: (T, 2)."""
    targets = torch.zeros(len(steps), 2)
    for t in reversed(steps):
        value, cut = (
            net(torch.from_numpy(obs[t]))[0][:, legal].amax(1) for obs in (envs.shown, envs.final)
        )
        for n in range(2):
            if envs.terminated[t, n]:
                later = 0
            elif envs.truncated[t, n]:
                later = cut[n]
            elif t == steps[-1]:
                later = value[n]
            else:
                later = lam * targets[t + 1 - steps[0], n] + (1 - lam) * value[n]
            reward = np.clip(envs.rewards[t, n], -1, 1)
            targets[t - steps[0], n] = reward + gamma * later
    return targets


@pytest.mark.parametrize("name", ["train_expert", "transfer"])
def test_q_learning_learns_from_what_the_emulator_showed(copy, scripted, monkeypatch, name):
    module, gamma, lam = importlib.import_module(name), 0.8, 0.6
    flags = {"epsilon": 0.0, "explore": 0.0, "sticky": 0.25, "gamma": gamma, "lam": lam}
    flags |= {"minibatch": 3, "epochs": 2, "lr": 1e-12, "target_rate": 0.25}
    scripted(module, steps=8, **flags)
    # Resume with other weights in both networks. The rate is so small that they stay.
    torch.manual_seed(0)
    path = copy / "runs/new/checkpoint.pt"
    saved = torch.load(path)
    saved |= {part: random_weights(saved[part]) for part in ("net", "online")} | {"scores": []}
    torch.save(saved, path)
    learned = spy(monkeypatch, module, "td_loss")
    (envs,) = scripted(module, steps=24, **flags)
    assert envs.args == ("breakout", 2, 0.25)
    assert len(learned) == 2 * 2 * 3  # rounds, epochs, minibatches of 3, 3 and 2
    assert len(np.unique(envs.actions)) > 1
    legal = module.legal_actions("breakout")
    target, online = (module.AtariNet(**saved["net_args"]) for _ in range(2))
    online.load_state_dict(saved["online"])
    average = saved["net"]
    for steps, updates in ((range(4), learned[:6]), (range(4, 8), learned[6:])):
        obs = torch.from_numpy(np.concatenate([envs.seen[t] for t in steps]))  # (8, 4, 84, 84)
        taken = torch.from_numpy(np.concatenate([envs.actions[t] for t in steps]))  # (8,)
        target.load_state_dict(average)
        with torch.no_grad():
            online_q, target_q = online(obs)[0], target(obs)[0]
            targets = slow_targets(envs, steps, target, legal, gamma, lam).flatten()  # (8,)
        # The average plays, and its weights alone are in the targets.
        assert torch.equal(taken, target_q.masked_fill(~legal, -torch.inf).argmax(1))
        order = []
        for (q_values, actions, wanted), _ in updates:
            distance, index = (wanted[:, None] - targets).abs().min(1)  # which they are
            assert (distance < 1e-5).all()
            assert torch.equal(actions, taken[index])
            torch.testing.assert_close(q_values, online_q[index])
            order += index.tolist()
        # Two epochs, each over the whole rollout, in another order.
        assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))
        assert order[:8] != order[8:]
        average = {k: 0.75 * average[k] + 0.25 * saved["online"][k] for k in average}
    after, expert = (
        load_checkpoint(copy / f"runs/new/{file}.pt", (saved["stage"],))
        for file in ("checkpoint", "expert")
    )
    for key, weight in average.items():
        torch.testing.assert_close(after["net"][key], weight)
        torch.testing.assert_close(expert["net"][key], weight.half())
        torch.testing.assert_close(after["online"][key], saved["online"][key])
    # Raw returns of whole episodes; the 9 of step 3 belongs to an episode that was restarted.
    assert after["scores"] == [5 + 0 - 3, 1 + 40 + 0, 1 + 1 + 0 + 2, 7 + 0 - 2]


@pytest.mark.parametrize("name", ["train_expert", "transfer", "train_mimic"])
def test_exploration_and_learning_rate_over_a_run(copy, scripted, monkeypatch, name):
    module, rates, norms = importlib.import_module(name), [], []
    mimic = name == "train_mimic"

    def seen(optimizer):
        if isinstance(optimizer, module.common.Muon) and len(optimizer.param_groups) == 1:
            return  # RAdam's part of a step that was seen
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in weights]).item())
        (rate,) = {group["lr"] for group in optimizer.param_groups}  # of all groups alike
        rates.append(rate)

    acted = spy(monkeypatch, module, "act")
    flags = {"steps": 10 * 8, "epsilon": 0.2, "decay": 0.4, "lr": 1e-3, "minibatch": 8}
    flags |= {"updates": 1} if mimic else {"epochs": 1, "explore": 0.5}
    with each_update(seen):
        scripted(module, **flags)
    epsilons = [args[2] for args, _ in acted][::4]
    falling = [0.2] * 10 if mimic else [1, 0.84, 0.68, 0.52, 0.36] + [0.2] * 5
    assert epsilons == pytest.approx(falling)
    rates = [rate for i, rate in enumerate(rates) if i % (len(rates) // 10) == 0]
    assert rates == pytest.approx([1e-3] * 7 + [0.75e-3, 0.5e-3, 0.25e-3])
    if not mimic:
        logged = [float(row["grad_norm"]) for row in rows(copy / "runs/new/log.csv")]
        assert logged[-1] == pytest.approx(norms[-1], rel=1e-3)


@pytest.mark.parametrize("actor", ["student", "expert", "both"])
def test_the_mimics_scores_and_replay_follow_the_episodes(copy, scripted, monkeypatch, actor):
    module = importlib.import_module("train_mimic")
    added = spy(monkeypatch, module.FrameReplay, "add")
    flags = {"actor": actor, "updates": 1, "minibatch": 4, "replay": 16, "sticky": 0.25}
    (envs,) = scripted(module, steps=2 * 8, **flags)
    assert envs.args == ("pong", 2, 0.25)
    ages = np.array([args[2].tolist() for args, _ in added])
    # With both, the student takes over the first environment after a round of 4 steps.
    first = [0, 1, 2, 0, 0, 1, 2, 0] if actor == "both" else [0, 1, 2, 0, 1, 2, 3, 0]
    assert ages.T.tolist() == [first, [0, 1, 2, 0, 1, 2, 3, 0]]
    for ((replay, obs, *_), _), shown in zip(added, envs.seen, strict=True):
        assert len(replay.frames) == 16 // 2
        assert torch.equal(obs, torch.from_numpy(shown))
    # Raw returns of the student's whole episodes.
    (scores,) = load_checkpoint(copy / "runs/new", ("mimic",))["scores"]
    student = [5 + 0 - 3, 1 + 40 + 0, 1 + 1 + 0 + 2, 9 + 7 + 0 - 2]
    assert scores == {"student": student, "both": [1 + 0 + 2], "expert": []}[actor]


@pytest.mark.parametrize("replay, refilled", [(80, 24), (16, 16)])
def test_a_mimic_refills_its_replay_before_it_learns_again(scripted, monkeypatch, replay, refilled):
    module, held = importlib.import_module("train_mimic"), []
    draw = module.FrameReplay.draw

    def seen(own, *args):
        held.append(2 * own.added)  # observations so far, of two environments
        return draw(own, *args)

    flags = {"updates": 1, "minibatch": 4, "replay": replay}
    scripted(module, steps=24, **flags)
    monkeypatch.setattr(module.FrameReplay, "draw", seen)
    scripted(module, steps=40, **flags)
    assert held == [refilled, refilled + 8]


@pytest.mark.parametrize("objective", ["policy", "q"])
def test_the_gradient_of_the_mimic_is_that_of_equation_4(copy, scripted, monkeypatch, objective):
    module, B, updates = importlib.import_module("train_mimic"), 5, 3
    games = "pong", "boxing"
    paths = tuple(f"{copy}/runs/expert-{game}/expert.pt" for game in games)
    flags = {"experts": paths, "objective": objective, "updates": updates, "minibatch": B}
    flags |= {"feature_weight": 0.5, "temperature": 0.7, "lr": 1e-12, "replay": 80}
    flags |= {"channels": (4,), "hidden": (8,)}
    scripted(module, steps=8, **flags)
    torch.manual_seed(0)
    saved = torch.load(copy / "runs/new/checkpoint.pt")
    torch.save(saved | {"net": random_weights(saved["net"])}, copy / "runs/new/checkpoint.pt")
    loaded = spy(monkeypatch, module.common, "load_weights")
    drawn = spy(monkeypatch, module.FrameReplay, "draw")
    gradients, optimized = [], set()

    def networks():  # the student and the linear maps, which are loaded after the two experts
        (student, *_), (regressors, *_) = (args for args, _ in loaded[2:4])
        return student, regressors, [*student.parameters(), *regressors.parameters()]

    def seen(optimizer):
        optimized.update(id(w) for group in optimizer.param_groups for w in group["params"])
        gradient = [weight.grad for weight in networks()[2]]
        if not gradients or gradient[0] is not gradients[-1][0]:  # once for all optimizers
            gradients.append(gradient)

    with each_update(seen):
        scripted(module, steps=16, **flags)
    student, regressors, weights = networks()
    assert optimized == {id(weight) for weight in weights}
    assert len(drawn) == 2 and len(gradients) == updates
    masks = [module.legal_actions(game) for game in games]
    for u, gradient in enumerate(gradients):
        loss = 0
        for g, (((replay, *_), entries), legal) in enumerate(zip(drawn, masks)):
            obs, q_values, expert_features = (part[u * B : (u + 1) * B] for part in entries)
            logits, features = student(obs)
            own, expert = logits[:, legal], q_values[:, legal]
            in_replay = replay.q_values[:4].flatten(0, 1)[:, legal]  # 4 steps, of room for 40
            temperature = 0.7 * in_replay.std(1, correction=0).mean()
            imitation = (own - expert).square().mean()
            if objective == "policy":
                imitation = F.cross_entropy(own, torch.softmax(expert / temperature, 1))
            distance = (regressors[g](features) - expert_features).square().sum() / B
            loss += (imitation + 0.5 * distance) / 2
        for found, wanted in zip(gradient, torch.autograd.grad(loss, weights)):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_the_one_that_was_asked_for(precision):
    with pick_autocast(precision, torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, precision)


def test_evaluate_explores_as_asked_and_the_random_policy_always(monkeypatch):
    acted = spy(monkeypatch, evaluate, "act")
    args, obs = evaluate.Args(runs=("",), epsilon=0.3), np.zeros((2, 4, 84, 84), np.uint8)
    net, legal = importlib.import_module("transfer").AtariNet((4,), (8,)), torch.ones(2, 18) > 0
    with torch.no_grad():
        for network in (net, None):
            player = evaluate.Player("any", network, ["pong"], {})
            rng = torch.Generator()
            evaluate.choose(player, obs, legal, args, torch.device("cpu"), rng)
    assert [args[2] for args, _ in acted] == [0.3, 1.0]


def test_scores_between_a_random_player_and_a_human(capsys):
    args, ends = evaluate.Args(runs=("",)), {"krull": (1598.0, 2665.5), "pong": (-20.7, 14.6)}
    player, results = evaluate.Player("any", None, list(ends), {}), {}
    for game, (random, human) in ends.items():
        for score, wanted in ((random, 0), (human, 100), ((random + human) / 2, 50)):
            results["any", game, 0.0] = np.full(3, score)
            row = evaluate.make_row(("any", game, 0.0), player, results, args)
            assert row["% human"] == pytest.approx(wanted, abs=1e-6)
    evaluate.print_summary([player], results, 0.0)
    assert "median 50.0" in capsys.readouterr().out


def test_the_median_is_over_the_means_of_the_games(capsys):
    # Means of 10, 20 and 90%; the median of all episodes is 30%, the mean of the games 40%.
    own = np.array([[[0, 0, 30]], [[0, 0, 60]], [[90, 90, 90]]])
    evaluate.print_middle("title", own, np.full((3, 1, 3), 100.0))
    assert "median 20.0" in capsys.readouterr().out


def test_an_interval_leaves_out_as_much_at_each_end_as_it_should():
    own, base = np.arange(100.0)[None, None], np.full((1, 1, 1), 100.0)
    mean, low, high = evaluate.bootstrap(np.mean, own, base, resamples=5_000)
    error = 1.96 * own.std() / 10  # a normal distribution has 2.5% beyond 1.96 standard errors
    assert (mean - low, high - mean) == pytest.approx((error, error), rel=0.06)


def test_a_resample_takes_the_same_seeds_in_all_games_and_other_episodes():
    seeds = np.broadcast_to(np.arange(5)[:, None], (3, 5, 4))  # each score is the seed's number
    drawn = evaluate.resample(seeds, np.random.default_rng(0))
    assert (drawn == drawn[:1, :, :1]).all() and set(drawn.flat) < set(range(5))
    episodes = np.broadcast_to(np.arange(4), (3, 5, 4))
    drawn = evaluate.resample(episodes, np.random.default_rng(0))
    assert not (drawn == drawn[:1]).all() and not (drawn == drawn[:, :1]).all()


def test_a_measured_score_is_not_clipped_nor_ended_by_a_lost_life(monkeypatch):
    monkeypatch.setattr(evaluate, "make_envs", ScriptedEnvs)
    game, ended = evaluate.Game("pong", 0.25, seed=1), []
    for _ in range(3):
        game.send(0)
        ended.append(bool(game.receive()))
    assert game.env.args == ("pong", 1, 0.25)
    assert ended == [False, False, True] and game.score == 5 + 0 - 3
