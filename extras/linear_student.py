"""Section 4 of the paper: a linear student with weight decay converges, wherever it starts.

Two students without hidden layers, pixels straight to logits, begin with different random weights.
Each plays, and learns by policy regression on the states that it meets itself. The theory says that
both end with the same weights.

    python -m extras.linear_student --steps 4_000 --out runs/try-linear  # a minute
    python -m extras.linear_student

Output, at the end or after Ctrl-C: log.csv and linear.png in the folder --out, with the loss above
its floor, the entropy of the expert's policy, and the distance between the two students' weights.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: it sets what torch reads when it loads

import torch
from matplotlib import ticker
from matplotlib.figure import Figure
from torch import nn

from train_expert import act, legal_actions, make_envs
from train_mimic import load_expert, policy_loss, q_spread


@dataclass
class Args:
    expert: str = "experts/pong.pt"  # checkpoint of train_expert.py
    steps: int = 200_000  # decisions of each student, 4 frames each
    seed: int = 1  # of exploration and emulators
    out: str = "runs/linear-student"  # folder of the log and the figure
    num_envs: int = 16  # emulators of each student
    epsilon: float = 0.1  # share of random actions
    temperature: float = 0.3  # of the expert's softmax, in units of q_spread
    minibatch: int = 64  # observations per gradient step, the last ones that were met
    lr: float = 2.0  # of plain gradient descent
    weight_decay: float = 1e-3  # lambda of the theory

    def __post_init__(self):
        common.expand_paths(self, "expert", "out")
        common.require_positive(self, "steps", "num_envs", "temperature", "minibatch", "lr")
        common.require_shares(self, "epsilon", "weight_decay")
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require(self.steps >= self.minibatch, "--steps is less than a minibatch")
        common.require(
            self.minibatch % self.num_envs == 0, "--minibatch must be a multiple of --num-envs"
        )


class LinearStudent(nn.Module):
    """Pixels to logits: obs (B, 4, 84, 84) uint8 -> (B, 18).

    Each observation is scaled to length 1, which bounds the curvature of the loss and so the rate.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4 * 84 * 84, 18)
        nn.init.normal_(self.layer.weight, std=0.1)

    def forward(self, obs):
        return self.layer(nn.functional.normalize(obs.flatten(1).float(), dim=1))


class Learner:
    """A student with its emulators, which plays and learns."""

    def __init__(self, args, expert, game, seed):
        self.args, self.expert, self.legal = args, expert, legal_actions(game)
        torch.manual_seed(seed)
        self.student = LinearStudent()
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )
        self.rng = torch.Generator().manual_seed(seed)
        self.envs = make_envs(game, args.num_envs)
        self.obs = torch.from_numpy(self.envs.reset(seed=seed)[0])

    def learn(self):
        """Play a minibatch of states and learn from it: loss, and its floor."""
        met = []
        for _ in range(self.args.minibatch // self.args.num_envs):
            met.append(self.obs)
            with torch.no_grad():
                logits = self.student(self.obs)
            actions = act(logits, self.legal, self.args.epsilon, self.rng)
            self.obs = torch.from_numpy(self.envs.step(actions.numpy())[0])
        obs = torch.cat(met)  # (B, 4, 84, 84)
        with torch.no_grad():
            expert_q, _ = self.expert(obs)
        temperature = self.args.temperature * q_spread(expert_q, self.legal)
        loss = policy_loss(self.student(obs), expert_q, self.legal, temperature).mean()
        # The student's policy at its best is the expert's: logits of Q / temperature.
        floor = policy_loss(expert_q / temperature, expert_q, self.legal, temperature).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), floor.item()


def main(args):
    checkpoint, expert = load_expert(args.expert)
    game, folder = checkpoint["games"][0], Path(args.out)
    learners = [Learner(args, expert, game, seed) for seed in (args.seed, args.seed + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    rows, rounds = [], args.steps // args.minibatch
    with common.Stop() as stop:
        for n in range(1, rounds + 1):
            (loss, floor), (other_loss, other_floor) = [learner.learn() for learner in learners]
            ours, theirs = (learner.student.layer.weight for learner in learners)
            distance, size = (ours - theirs).norm().item(), ours.norm().item()
            row = {"step": n * args.minibatch, "loss_1": loss, "floor_1": floor}
            row |= {
                "loss_2": other_loss,
                "floor_2": other_floor,
                "distance": distance,
                "norm": size,
            }
            rows.append(row)
            if n & (n - 1) == 0 or n % max(1, rounds // 20) == 0:
                above = f"{loss - floor:.3f}, {other_loss - other_floor:.3f}"
                common.show(
                    f"{row['step']:>9,}  above the floor {above}  "
                    f"distance {distance:.2f} of {size:.2f}"
                )
            if stop.asked:
                break
    with common.whole_file(folder / "log.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    draw(rows, game, folder / "linear.png")
    print(f"wrote {folder}/log.csv and linear.png")


def draw(rows, game, path):
    """Draw each student's loss above its floor, and the distance between their weights."""
    figure = Figure(figsize=(8.5, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for n in (1, 2):
        above = [row[f"loss_{n}"] - row[f"floor_{n}"] for row in rows]
        left.plot(steps, above, linewidth=0.8, label=f"student {n}")
    left.set(title=f"Loss above its floor, {game}", xlabel="steps", ylim=(0, None))
    left.legend()
    right.plot(steps, [row["norm"] for row in rows], color="C7", label="length of one's weights")
    right.plot(steps, [row["distance"] for row in rows], color="C2", label="distance of the two")
    right.set(title="Weights", xlabel="steps", ylim=(0, None))
    right.legend()
    for panel in (left, right):
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 100k
    with common.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    common.cli(main, Args)
