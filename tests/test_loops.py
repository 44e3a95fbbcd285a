"""What the learner gets in the loops of the three stages."""

import functools
import importlib
import sys

import pytest
import torch

from common import load_checkpoint
from helpers import EXPERT, MIMIC, TRANSFER, call_here, run, same


@pytest.mark.parametrize("actor", ["student", "both", "expert"])
def test_each_expert_judges_what_its_own_game_shows(copy, monkeypatch, actor):
    module = importlib.import_module("train_mimic")
    added, acted, N = {}, [], 4

    def add(replay, *entry):  # in the order in which the loop adds: steps of one game at a time
        added.setdefault(id(replay), []).append([part.clone() for part in entry])

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


def test_an_environment_goes_over_to_the_student_between_two_episodes(copy, monkeypatch):
    module = importlib.import_module("train_mimic")
    short = functools.partial(module.make_envs, max_frames=400)  # episodes of 93 to 100 steps
    monkeypatch.setattr(module, "make_envs", short)
    experts = (str(copy / "runs/expert-pong/expert.pt"),)
    flags = {"num_envs": 4, "rollout": 8, "updates": 1, "actor": "both", "steps": 4 * 320}
    module.main(module.Args(experts=experts, out=str(copy / "runs/new"), **flags))
    # Of the three episodes of every environment the experts have the first, the student the second
    # in two environments and the third in three.
    (scores,) = load_checkpoint(copy / "runs/new", ("mimic",))["scores"]
    assert len(scores) == 5


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
