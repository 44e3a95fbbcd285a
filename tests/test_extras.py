"""The extras: they run from the project's root, and what they write serves the three stages."""

import copy as copying
import re
import shutil

import pytest
import torch

from common import load_checkpoint
from extras.multitask_q import MultiNet
from helpers import ROOT, TINY, call, rows, run, same

MULTITASK = (
    f"-m extras.multitask_q {TINY} --steps 64 --report-every 32 --minibatch 16 --channels 4 8 "
    "--hidden 16 --experts runs/expert-pong/expert.pt runs/expert-boxing/expert.pt"
)


@pytest.fixture
def with_extras(copy):
    shutil.copytree(ROOT / "extras", copy / "extras", ignore=lambda *_: ["__pycache__"])
    return copy


def call_well(folder, command):
    done = call(folder, command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_heads_share_the_convolutions_alone():
    net_args = {"channels": (4, 8), "hidden": (16,), "norm": "all"}
    obs = torch.randint(256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    for own_heads in (False, True):
        net = MultiNet(2, own_heads, **net_args)
        q_values = net(obs)
        assert q_values.shape == (2, 3, 18)
        q_values[0].sum().backward()  # the first game's alone
        first, second = net.nets
        assert first.body[0].weight is second.body[0].weight
        assert first.body[1].weight is second.body[1].weight  # the norm behind a convolution
        assert (first.head.weight is second.head.weight) == (not own_heads)
        assert second.head.weight.grad.any() == (not own_heads)
        again = copying.deepcopy(net)
        assert again.nets[0].body[0].weight is again.nets[1].body[0].weight
    same_obs = net(obs[:1].expand(2, -1, -1, -1, -1))  # to both networks
    assert not torch.equal(*same_obs)


def test_mdqn_is_measured_as_a_mimic_and_resumes(with_extras):
    said = call_well(with_extras, MULTITASK)
    assert "2 games: pong, boxing" in said and "runs/mdqn/mimic.pt measures it" in said
    mimic = load_checkpoint(with_extras / "runs/mdqn/mimic.pt", ("mimic",))
    assert mimic["games"] == ["pong", "boxing"] and mimic["step"] == 64
    assert "resumes at step 64 of 96" in call_well(with_extras, MULTITASK + " --steps 96")
    log = rows(with_extras / "runs/mdqn/log.csv")
    assert [row["step"] for row in log] == ["32", "64", "96"]
    other = call(with_extras, MULTITASK.replace(" runs/expert-boxing/expert.pt", ""))
    assert other.returncode == 2 and other.stderr.count("\n") == 1


def test_mcdqn_writes_an_expert_for_each_game(with_extras, short_episodes):
    assert "runs/mcdqn/expert-*.pt measures it" in call_well(
        with_extras, MULTITASK + " --own-heads"
    )
    nets = [
        load_checkpoint(with_extras / f"runs/mcdqn/expert-{game}.pt", ("expert",))["net"]
        for game in ("pong", "boxing")
    ]
    shared = [name for name in nets[0] if torch.equal(nets[0][name], nets[1][name])]
    convolutions = [name for name in nets[0] if re.match(r"body\.[0-5]\.", name)]
    assert set(convolutions) <= set(shared)
    assert "head.weight" not in shared and not same(*nets)
    run(with_extras, "evaluate.py --runs runs/mcdqn/expert-*.pt --episodes 1 --device cpu")
    table = rows(with_extras / "results/table.csv")
    assert [row["game"] for row in table] == ["boxing", "pong"]
