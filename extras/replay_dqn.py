"""The paper's expert as it was: DQN (Mnih et al., 2015), which learns from a replay.

One emulator plays, each fourth step is followed by an update from a replay of a million frames,
and a copy of the network, renewed now and then, gives the targets. Settings are DQN's.

    python -m extras.replay_dqn --steps 3_000 --warmup 1_000 --out runs/try-dqn  # a minute
    python -m extras.replay_dqn --game pong --replay 200_000

Output: as of train_expert.py, so that train_mimic.py can learn from it. The replay is not saved: a
run that resumes fills it again before it goes on learning.
"""

import copy
from collections import deque
from dataclasses import dataclass

import common  # before torch: it sets what torch reads when it loads

import torch

from train_expert import (
    AtariNet,
    act,
    greedy_value,
    learner_view,
    legal_actions,
    make_envs,
    new_episode,
    rom_name,
    td_loss,
)


@dataclass
class Args:
    # Run
    game: str = "pong"  # name of the game: ms_pacman, MsPacman or ALE/MsPacman-v5
    steps: int = 5_000_000  # decisions, 4 frames each (paper: 25M)
    seed: int = 1  # of the weights, exploration, replay and emulator
    out: str = ""  # folder of the run (empty: runs/dqn-<game>)
    # Network
    channels: tuple = (32, 64, 64)  # kernels 8, 4, 3, 3, strides 4, 2, 1, 1
    hidden: tuple = (512,)  # fully connected layers
    norm: str = "none"  # LayerNorm: after all layers but the last, linear ones, or none
    # Acting
    epsilon: float = 0.1  # share of random actions, falls from 1
    explore: int = 1_000_000  # steps over which epsilon falls
    sticky: float = 0.0  # chance, in each frame, that the last action repeats
    # Learning
    replay: int = 1_000_000  # frames kept, 7 KB each
    warmup: int = 50_000  # random steps before the first update
    update_every: int = 4  # steps between two updates
    minibatch: int = 32  # observations per update
    copy_every: int = 10_000  # steps between two copies, which give the targets
    lr: float = 2.5e-4  # of RMSProp
    gamma: float = 0.99  # discount
    # Machine
    report_every: int = 50_000  # steps between two lines of the log, each with a checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        self.game = rom_name(self.game)
        common.expand_paths(self, "out")
        common.require(len(self.channels) <= 4, "--channels takes at most 4 widths")
        common.require_one_of("--norm", self.norm, ("all", "linear", "none"))
        common.require_positive(self, "channels", "hidden", "steps", "explore", "update_every")
        common.require_positive(self, "minibatch", "copy_every", "lr", "report_every")
        common.require_shares(self, "gamma", "epsilon", "sticky")
        common.require_range(self, 0, 1e30, "lr")  # far beyond any that make sense
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require(8 <= self.warmup <= self.replay, "--warmup must lie between 8 and --replay")


class Replay:
    """The last steps of one environment. Each frame is kept once; stacks of four are rebuilt."""

    def __init__(self, size):
        self.frames = torch.zeros((size, 84, 84), dtype=torch.uint8)
        self.age = torch.zeros(size, dtype=torch.int64)  # earlier frames of its episode, at most 3
        self.actions = torch.zeros(size, dtype=torch.int64)
        self.rewards, self.stops = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        self.added = 0  # steps so far; step i lies in slot i % size

    def add(self, frame, age, action, reward, stop):
        """Append a step: frame (84, 84), what was done there, and what the learner sees of it."""
        slot = self.added % len(self.frames)
        self.frames[slot], self.age[slot], self.actions[slot] = frame, age, action
        self.rewards[slot], self.stops[slot] = reward, stop
        self.added += 1

    def obs(self, steps):
        """Rebuild observations: (B,) -> (B, 4, 84, 84), black before an episode's first frame."""
        back = torch.arange(3, -1, -1)  # the newest frame comes last
        slots = (steps[:, None] - back) % len(self.frames)  # (B, 4)
        stacks = self.frames.index_select(0, slots.flatten()).view(len(steps), 4, 84, 84)
        return stacks * (back <= self.age[slots[:, -1]][:, None])[:, :, None, None]

    def draw(self, count, rng):
        """Draw transitions uniformly: obs, actions, rewards, stops, and the obs one step later."""
        # The oldest three steps of a full buffer have lost the frames before them.
        oldest = max(0, self.added - len(self.frames) + 3)
        steps = torch.randint(oldest, self.added - 1, (count,), generator=rng)
        slots = steps % len(self.frames)
        done = self.actions[slots], self.rewards[slots], self.stops[slots]
        return self.obs(steps), *done, self.obs(steps + 1)


def train(args, run):
    """Learn one game; run: its folder, with checkpoint, log and Ctrl-C (common.Run)."""
    # Set up: network, its copy, optimizer, and where the run was when it stopped.
    device = common.pick_device(args.device)
    autocast = common.pick_autocast(args.precision, device)
    net_args = {"channels": list(args.channels), "hidden": list(args.hidden), "norm": args.norm}
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)  # explores, draws and seeds the emulator
    legal = legal_actions(args.game)  # (18,)
    net = AtariNet(**net_args).to(device, memory_format=common.memory_format(device))
    target = copy.deepcopy(net)
    # DQN has 0.01 under the root, where torch adds it to the root.
    optimizer = torch.optim.RMSprop(
        net.parameters(), lr=args.lr, alpha=0.95, eps=0.01, centered=True, foreach=True
    )
    step, scores = 0, deque(maxlen=100)  # scores of the last finished episodes
    if run.saved:
        common.load_state(run.saved, net, optimizer, rng, run.folder)
        common.load_weights(target, run.saved, run.folder, "target")
        step, scores = run.saved["step"], deque(run.saved["scores"], maxlen=100)
        if step >= args.steps:
            print(f"{run.folder} has finished; with more --steps it would resume")
            return
    replay = Replay(args.replay)
    run.start(device, autocast, net, replay.frames.nbytes)
    envs = make_envs(args.game, 1, args.sticky)
    obs, info = envs.reset(seed=int(torch.randint(2**31 - 1, (1,), generator=rng)))
    frame, age, score = info["episode_frame_number"], 0, 0.0
    loss, max_q, grad_norm = torch.zeros(()), torch.zeros(1), torch.zeros(())
    resumed = step > 0

    def q_values_of(network, obs):  # (B, 4, 84, 84) -> (B, 18), on the CPU
        with torch.no_grad(), autocast:
            return network(obs.to(device))[0].cpu()

    while step < args.steps:
        # Act: one step.
        warm = replay.added >= args.warmup
        epsilon = max(args.epsilon, 1 - (1 - args.epsilon) * step / args.explore)
        if not warm and not resumed:  # a run that resumes fills its replay with its own play
            epsilon = 1.0
        obs = torch.from_numpy(obs)
        q_values = q_values_of(net, obs)
        max_q = greedy_value(q_values, legal)
        action = act(q_values, legal, epsilon, rng)
        next_obs, reward, terminated, truncated, info = envs.step(action.numpy())
        cut_value = torch.zeros(1)
        if truncated.any():
            last = torch.from_numpy(info["final_obs"])
            cut_value = greedy_value(q_values_of(target, last), legal)
        ends = torch.from_numpy(terminated), torch.from_numpy(truncated)
        seen, stop = learner_view(torch.from_numpy(reward), *ends, cut_value, args.gamma)
        replay.add(obs[0, -1], age, action[0], seen[0], stop[0])
        score += float(reward[0])
        began = new_episode(info["episode_frame_number"], frame)[0]
        frame, obs, age = info["episode_frame_number"], next_obs, min(age + 1, 3)
        if began:
            scores.append(score)
            age, score = 0, 0.0
        step += 1

        # Learn from a minibatch of the replay.
        if warm and step % args.update_every == 0:
            obs_batch, actions, rewards, stops, following = replay.draw(args.minibatch, rng)
            next_value = greedy_value(q_values_of(target, following), legal)
            targets = rewards + args.gamma * next_value * ~stops  # (B,)
            with autocast:
                q_values, features = net(obs_batch.to(device))
            loss = td_loss(q_values, actions.to(device), targets.to(device))
            optimizer.zero_grad()
            (args.minibatch * loss).backward()  # DQN sums over the minibatch
            optimizer.step()
        if step % args.copy_every == 0:
            target.load_state_dict(net.state_dict())

        # Report, once in a while: save, then write to the log.
        if step % 256 == 0 or step == args.steps:
            mean = common.mean(scores)
            run.progress(step, f"score {mean:.1f}")
            if run.due(step):
                if warm:
                    grad_norm = torch.nn.utils.get_total_norm([w.grad for w in net.parameters()])
                common.check_finite(loss + grad_norm, step, run.folder)
                row = {f"{args.game}_score": mean, "max_q": max_q.item(), "td_loss": loss.item()}
                row |= {"grad_norm": grad_norm.item(), "epsilon": epsilon}
                contents = {
                    "games": [args.game],
                    "legal": legal.nonzero().flatten().tolist(),
                    "step": step,
                    "network": "AtariNet",
                    "net_args": net_args,
                    "score": mean,
                    "scores": list(scores),
                    "max_q": row["max_q"],
                }
                run.save("expert.pt", **contents, net=common.half(net))
                run.save(
                    "checkpoint.pt",
                    **contents,
                    net=net.state_dict(),
                    target=target.state_dict(),
                    optimizer=optimizer.state_dict(),
                    rng=rng.get_state(),
                )
                run.report(step, row, f"score {mean:.1f}  TD {row['td_loss']:.4f}")

    print(f"done: {run.folder}/expert.pt")


def main(args):
    with common.Run(args.out or f"runs/dqn-{args.game}", "expert", args) as run:
        train(args, run)


if __name__ == "__main__":
    common.cli(main, Args)
