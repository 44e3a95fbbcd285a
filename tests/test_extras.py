"""The extras: they run from the project's root, and what they write serves the three stages."""

import copy as copying
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch

from common import load_checkpoint
from extras.multitask_q import MultiNet
from extras.replay_dqn import Replay
from helpers import MIMIC, ROOT, TINY, call, rows, run, same, start
from train_expert import make_envs, new_episode

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


DQN = (
    "-m extras.replay_dqn --device cpu --precision float32 --steps 128 --report-every 64 "
    "--warmup 32 --replay 64 --channels 4 8 --hidden 16"
)


def test_the_replay_rebuilds_transitions():
    envs, replay, shown, starts = make_envs("breakout", 1), Replay(50), [], []
    obs, info = envs.reset(seed=1)
    frame, age, step = info["episode_frame_number"], 0, 0
    while len(starts) < 3 or step < starts[-1] + 20:  # the last episode begins in the buffer
        shown.append(torch.from_numpy(obs[0]))
        obs, _, _, _, info = envs.step(np.array([step % 2]))
        replay.add(shown[-1][-1], age, step % 2, float(step), step % 3 == 0)
        began = new_episode(info["episode_frame_number"], frame)[0]
        frame, age, step = info["episode_frame_number"], 0 if began else min(age + 1, 3), step + 1
        starts += [step] if began else []
    drawn = replay.draw(500, torch.Generator().manual_seed(0))
    steps = [int(step) for step in drawn[2]]
    assert set(steps) == set(range(step - 47, step - 1))  # neither the oldest three nor the last
    for obs, action, stop, following, step in zip(drawn[0], drawn[1], drawn[3], drawn[4], steps):
        assert torch.equal(obs, shown[step]) and torch.equal(following, shown[step + 1])
        assert action == step % 2 and stop == (step % 3 == 0)


def test_a_mimic_learns_from_a_dqn(with_extras):
    assert "runs/dqn-pong/expert.pt" in call_well(with_extras, DQN)
    expert = load_checkpoint(with_extras / "runs/dqn-pong/expert.pt", ("expert",))
    assert expert["net_args"]["norm"] == "none" and expert["step"] == 128
    command = MIMIC.replace("expert-pong", "dqn-pong") + " --out runs/of-dqn"
    assert "2 games: pong, boxing" in run(with_extras, command)
    assert "resumes at step 128 of 160" in call_well(with_extras, DQN.replace("128", "160"))


def test_two_linear_students_come_closer(with_extras):
    command = "-m extras.linear_student --expert runs/expert-pong/expert.pt --steps 4_096"
    said = call_well(with_extras, f"{command} --minibatch 16 --num-envs 4 --weight-decay 0.01")
    assert "wrote runs/linear-student/log.csv" in said
    log = rows(with_extras / "runs/linear-student/log.csv")
    first, last = ({name: float(value) for name, value in row.items()} for row in (log[0], log[-1]))
    assert last["distance"] < 0.02 * first["distance"]
    assert 0 < last["distance"] < 0.5 * last["norm"]
    for row in log:
        assert float(row["loss_1"]) >= float(row["floor_1"]) > 0
    assert (with_extras / "runs/linear-student/linear.png").read_bytes().startswith(b"\x89PNG")


TORCHRUN = "-m torch.distributed.run --nproc-per-node 2"
DDP = f"{MIMIC.removeprefix('train_mimic.py')} --num-envs 4 --replay 800 --out runs/long"
SCRIPT = """
import os
import common, torch
from extras import train_mimic_ddp as ddp
save = ddp.SharedRun.save

def save_each(run, name, **contents):  # the weights of every process, not of the first alone
    torch.save(contents["net"], f"{name}-{ddp.dist.get_rank()}")
    save(run, name, **contents)

ddp.SharedRun.save = save_each
open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
common.cli(ddp.main, ddp.Args)
"""


def test_two_processes_train_one_mimic_and_resume(with_extras):
    (with_extras / "each.py").write_text(SCRIPT)
    said = call_well(with_extras, f"{TORCHRUN} each.py {DDP}")
    assert said.count("done: ") == 1
    nets = [torch.load(with_extras / f"checkpoint.pt-{rank}") for rank in (0, 1)]
    assert same(*nets)
    mimic = load_checkpoint(with_extras / "runs/long", ("mimic",))
    assert mimic["step"] == 320 and same(mimic["net"], nets[0])
    log = rows(with_extras / "runs/long/log.csv")
    assert [int(row["step"]) for row in log] == [64, 128, 192, 256, 320]
    said = call_well(with_extras, f"{TORCHRUN} each.py {DDP} --steps 448")
    assert "resumes at step 320 of 448" in said
    nets = [torch.load(with_extras / f"checkpoint.pt-{rank}") for rank in (0, 1)]
    assert same(*nets) and not same(mimic["net"], nets[0])


def test_two_processes_average_gradients_spreads_and_scores(with_extras):
    (with_extras / "gradient.py").write_text("""
import copy
import common, torch, torch.distributed as dist
from extras.train_mimic_ddp import SharedMuon, shared_mean, shared_spread
from train_mimic import AtariNet, q_spread

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
obs, alone = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8), AtariNet((4, 8), (16,))
torch.manual_seed(rank)
net = copy.deepcopy(alone) if rank == 0 else AtariNet((4, 8), (16,))
float32 = torch.autocast("cpu", torch.bfloat16, enabled=False)
settings = {"lr": 1e-3, "times": 10, "autocast": float32}
both = [
    (alone, common.Muon(alone, **settings), obs),
    (net, SharedMuon(net, **settings), obs.chunk(2)[rank]),
]
for _ in range(3):
    for own, optimizer, batch in both:
        optimizer.zero_grad()
        own(batch)[0].square().mean().backward()
        optimizer.step()
for one, two in zip(alone.parameters(), net.parameters()):
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
torch.manual_seed(0)
q_values, legal = torch.randn(2, 64, 18), torch.ones(18) > 0
q_values[1] *= 3
mean = sum(q_spread(own, legal) for own in q_values) / 2
torch.testing.assert_close(shared_spread(q_values[rank], legal), mean)
assert shared_mean([1.0, 2.0] if rank else []) == 1.5
print("equal")
""")
    assert call_well(with_extras, f"{TORCHRUN} gradient.py").count("equal") == 2


def test_a_killed_process_ends_the_others_and_damages_no_file(with_extras):
    (with_extras / "each.py").write_text(SCRIPT)
    process = start(with_extras, f"{TORCHRUN} each.py {DDP} --steps 100_000", 2)
    os.kill(int((with_extras / "pid-1").read_text()), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "each.py: another process has ended; the same command resumes" in said
    assert load_checkpoint(with_extras / "runs/long", ("mimic",))["step"] > 0


def test_a_run_of_several_processes_needs_torchrun(with_extras):
    done = call(with_extras, f"-m extras.train_mimic_ddp {DDP}")
    assert done.returncode == 2 and "torchrun" in done.stderr and "Traceback" not in done.stderr
