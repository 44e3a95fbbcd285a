"""Baselines of the paper: one network learns all games directly, by Q-learning, without experts.

MDQN has one output of 18 actions for all games, masked to each game's own. MCDQN (`--own-heads`)
shares the convolutions alone: each game has linear layers and an output of its own. The learner is
that of train_expert.py, on a rollout of every game.

    python -m extras.multitask_q --steps 5_000 --out runs/try-mdqn  # a minute or two
    python -m extras.multitask_q
    python -m extras.multitask_q --own-heads

Output: the folder --out with checkpoint.pt and log.csv. For evaluate.py MDQN writes mimic.pt, which
is measured as a mimic is, and MCDQN expert-<game>.pt, each measured as an expert is.
"""

import copy
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: it sets what torch reads when it loads

import numpy as np
import torch
from torch import nn

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
from train_mimic import load_expert


@dataclass
class Args:
    # Run
    experts: tuple = ()  # one per game: they name the games, and are what evaluate.py compares with
    own_heads: bool = False  # MCDQN: own linear layers and outputs on shared convolutions
    steps: int = 225_000  # decisions in each game, 4 frames each, as in train_mimic.py
    seed: int = 1  # of the weights, exploration, shuffling and emulators
    out: str = ""  # folder of the run (empty: runs/mdqn, or runs/mcdqn)
    # Network
    channels: tuple = (32, 64, 64)  # kernels 8, 4, 3, 3, strides 4, 2, 1, 1 (as paper)
    hidden: tuple = (512,)  # fully connected layers (as paper)
    norm: str = "linear"  # LayerNorm: after all layers but the last, linear ones, or none (paper)
    # Acting
    num_envs: int = 16  # emulators of each game
    rollout: int = 32  # steps of each environment between two rounds of learning
    epsilon: float = 0.05  # share of random actions, falls from 1
    explore: float = 0.1  # share of the run over which epsilon falls
    sticky: float = 0.0  # chance, in each frame, that the last action repeats
    # Learning
    epochs: int = 1  # passes over each rollout
    minibatch: int = 32  # observations of each game per gradient step
    lr: float = 5e-4  # of RAdam; Muon's, for the hidden weight matrices, is 40 times as large
    decay: float = 0.3  # share of the run, at its end, over which lr falls to zero
    gamma: float = 0.99  # discount
    lam: float = 0.85  # of Q(lambda) returns (0: one step, 1: to the rollout's end)
    target_rate: float = 0.1  # share of the way that target moves to net each round
    # Machine
    report_every: int = 20_000  # steps between two lines of the log, each with a checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        common.expand_paths(self, "experts", "out")
        common.require(len(self.channels) <= 4, "--channels takes at most 4 widths")
        common.require_one_of("--norm", self.norm, ("all", "linear", "none"))
        common.require_positive(self, "channels", "hidden", "steps", "rollout", "epochs")
        common.require_positive(self, "minibatch", "lr", "target_rate", "report_every")
        common.require_shares(self, "gamma", "lam", "epsilon", "explore", "decay", "target_rate")
        common.require_shares(self, "sticky")
        common.require_range(self, 1, 10_000, "num_envs")
        common.require_range(self, 0, 1e30, "lr")  # far beyond any that make sense
        common.require_range(self, 0, 2**31 - 1, "seed")
        fits = self.minibatch <= self.num_envs * self.rollout
        common.require(fits, "--minibatch is larger than the rollout (num_envs x rollout)")


class MultiNet(nn.Module):
    """A network for each of several games: the same one for all, or one that shares convolutions.

    obs (G, B, 4, 84, 84) uint8 -> Q-values (G, B, 18).
    """

    def __init__(self, games, own_heads, **net_args):
        super().__init__()
        first = AtariNet(**net_args)
        nets = [first] * games
        if own_heads:
            nets[1:] = [AtariNet(**net_args) for _ in nets[1:]]
            # Everything up to the first linear layer is the first network's.
            shared = next(i for i, layer in enumerate(first.body) if isinstance(layer, nn.Flatten))
            for net in nets[1:]:
                for i in range(shared):
                    net.body[i] = first.body[i]
        self.nets = nn.ModuleList(nets)

    def forward(self, obs):
        return torch.stack([net(own)[0] for net, own in zip(self.nets, obs)])


def train(args, run):
    """Learn all games; run: its folder, with checkpoint, log and Ctrl-C (common.Run)."""
    # Set up: networks, target, optimizer, and where the run was when it stopped.
    device = common.pick_device(args.device)
    autocast = common.pick_autocast(args.precision, device)
    paths = [str(Path(path)) for path in args.experts or sorted(Path("experts").glob("*.pt"))]
    if not paths:
        raise common.UserError("no experts/ here: name experts of the games with --experts")
    experts = [load_expert(path)[0] for path in paths]
    games = [expert["games"][0] for expert in experts]
    if len(set(games)) < len(games):
        raise common.UserError(f"two experts for one game: {', '.join(games)}")
    marks = [[expert["step"], expert["minutes"]] for expert in experts]
    net_args = {"channels": list(args.channels), "hidden": list(args.hidden), "norm": args.norm}
    G, T, N = len(games), args.rollout, args.num_envs
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)  # explores, shuffles and seeds the emulators
    legal = torch.stack([legal_actions(game) for game in games])[:, None]  # (G, 1, 18)
    legal_of_all = legal.expand(G, N, 18).flatten(0, 1)  # (G*N, 18), of all environments
    net = MultiNet(G, args.own_heads, **net_args)
    net.to(device, memory_format=common.memory_format(device))
    target = copy.deepcopy(net)
    optimizer = common.Muon(net, lr=args.lr, times=40, autocast=autocast)
    step, scores = 0, [deque(maxlen=30) for _ in games]  # of the last finished episodes
    if run.saved:
        if (run.saved["games"], run.saved["marks"]) != (games, marks):
            raise common.UserError(f"{run.folder} holds a run on other experts; name another --out")
        common.load_state(run.saved, target, optimizer, rng, run.folder)
        common.load_weights(net, run.saved, run.folder, "online")
        step = run.saved["step"]
        scores = [deque(recent, maxlen=30) for recent in run.saved["scores"]]
        if step >= args.steps:
            print(f"{run.folder} has finished; with more --steps it would resume")
            return

    # Set up: buffers and emulators.
    obs_buffer = torch.empty((G, T, N, 4, 84, 84), dtype=torch.uint8, device=device)
    actions, rewards = torch.empty((T, G * N), dtype=torch.int64), torch.empty((T, G * N))
    stops, max_q = torch.empty((T, G * N), dtype=torch.bool), torch.empty((T + 1, G * N))
    run.start(device, autocast, net, obs_buffer.nbytes)
    updates = args.epochs * math.ceil(T * N / args.minibatch)
    print(f"{G} games: {', '.join(games)}; {updates} updates every {T * N:,} steps of each")
    envs, obs, frame = [], [], []
    for game in games:
        common.show(f"starting emulators, {N} of each game: {len(envs)} of {G} games", keep=False)
        envs.append(make_envs(game, N, args.sticky))
        seeds = torch.randint(2**31 - 1, (N,), generator=rng).numpy()
        first, info = envs[-1].reset(seed=seeds)
        obs.append(first)
        frame.append(info["episode_frame_number"])
    obs, frame = torch.from_numpy(np.stack(obs)), np.concatenate(frame)  # (G, N, ...), (G*N,)
    returns, first_step = np.zeros(G * N), step

    def q_values_of(obs):  # (G, N, 4, 84, 84) -> (G*N, 18), on the CPU
        return target(obs.to(device)).flatten(0, 1).cpu()

    while step < args.steps:
        # As in train_expert.py: at first each round restarts an environment of every game.
        rounds = (step - first_step) // (T * N)
        if rounds < N:
            for g, env in enumerate(envs):
                first, info = env.reset(options={"reset_mask": np.arange(N) == rounds})
                obs[g] = torch.from_numpy(first)
                frame[g * N : (g + 1) * N] = info["episode_frame_number"]
            returns[rounds::N] = 0

        # Act: T steps in N environments of each game.
        progress = step / (args.explore * args.steps) if args.explore else 1
        epsilon = max(args.epsilon, 1 - (1 - args.epsilon) * progress)
        with torch.no_grad(), autocast:
            for t in range(T):
                obs_buffer[:, t] = obs
                q_values = q_values_of(obs_buffer[:, t])
                max_q[t] = greedy_value(q_values, legal_of_all)
                actions[t] = act(q_values, legal_of_all, epsilon, rng)
                for env, action in zip(envs, actions[t].view(G, N).numpy()):
                    env.send(action)
                # Received after all were sent: so the games step at the same time.
                next_obs, *ends, infos = zip(*(env.recv() for env in envs))
                obs = torch.from_numpy(np.stack(next_obs))  # (G, N, 4, 84, 84)
                reward, terminated, truncated = map(np.concatenate, ends)  # each (G*N,)
                cut_value = torch.zeros(G * N)
                if truncated.any():
                    last = [info.get("final_obs", own) for info, own in zip(infos, next_obs)]
                    cut_value = greedy_value(
                        q_values_of(torch.from_numpy(np.stack(last))), legal_of_all
                    )
                rewards[t], stops[t] = learner_view(
                    torch.from_numpy(reward),
                    torch.from_numpy(terminated),
                    torch.from_numpy(truncated),
                    cut_value,
                    args.gamma,
                )
                returns += reward
                last_frame = frame
                frame = np.concatenate([info["episode_frame_number"] for info in infos])
                began = new_episode(frame, last_frame)
                for g, recent in enumerate(scores):
                    own = slice(g * N, (g + 1) * N)
                    recent.extend(returns[own][began[own]].tolist())
                returns[began] = 0
            max_q[T] = greedy_value(q_values_of(obs), legal_of_all)

        # Learn, from equally many observations of each game.
        targets = q_lambda_targets(rewards, stops, max_q, args.gamma, args.lam)  # (T, G*N)
        by_game = (values.view(T, G, N).transpose(0, 1).flatten(1) for values in (targets, actions))
        targets, chosen = by_game  # (G, T*N), (G, T*N)
        lr = args.lr * min(1, (args.steps - step) / max(args.decay * args.steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(args.epochs):
            for batch in torch.randperm(T * N, generator=rng).split(args.minibatch):
                obs_batch = obs_buffer.flatten(1, 2).index_select(1, batch.to(device))
                with autocast:
                    q_values = net(obs_batch).flatten(0, 1)  # (G*B, 18)
                batch_actions = chosen[:, batch].flatten().to(device)
                loss = td_loss(q_values, batch_actions, targets[:, batch].flatten().to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            for slow, weight in zip(target.parameters(), net.parameters()):
                slow.lerp_(weight, args.target_rate)
        step += T * N
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in net.parameters()])
        common.check_finite(loss + grad_norm, step, run.folder)

        # Report, once in a while: save, then write to the log.
        run.progress(step, f"TD {loss:.4f}")
        if run.due(step):
            means = [common.mean(recent) for recent in scores]
            row = {f"{game}_score": mean for game, mean in zip(games, means)}
            row |= {
                "td_loss": loss.item(),
                "grad_norm": grad_norm.item(),
                "epsilon": epsilon,
                "lr": lr,
            }
            contents = {"step": step, "network": "AtariNet", "net_args": net_args}
            recent = {"score": means, "scores": [list(own) for own in scores]}
            ours = {"games": games, "experts": paths, "marks": marks, **recent, **contents}
            if args.own_heads:
                for g, game in enumerate(games):
                    own = {"games": [game], "score": means[g], "scores": recent["scores"][g]}
                    own |= {"legal": legal[g, 0].nonzero().flatten().tolist(), **contents}
                    run.save(
                        f"expert-{game}.pt", **own, stage="expert", net=common.half(target.nets[g])
                    )
            else:
                run.save("mimic.pt", **ours, stage="mimic", net=common.half(target.nets[0]))
            run.save(
                "checkpoint.pt",
                **ours | {"network": "MultiNet"},
                net=target.state_dict(),
                online=net.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
            )
            # A hint only, once every game has a score: a score in training against another.
            goals = [expert["score"] for expert in experts]
            percents = [100 * m / goal if goal > 0 else math.nan for m, goal in zip(means, goals)]
            run.report(
                step, row, f"TD {loss:.4f}  median {np.median(percents):.0f}% of the experts"
            )

    measured = f"{run.folder}/expert-*.pt" if args.own_heads else run.folder / "mimic.pt"
    print(f"done; python evaluate.py --runs {measured} measures it")


def main(args):
    out = args.out or ("runs/mcdqn" if args.own_heads else "runs/mdqn")
    with common.Run(out, "multitask", args) as run:
        train(args, run)


if __name__ == "__main__":
    common.cli(main, Args)
