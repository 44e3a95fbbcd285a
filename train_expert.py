"""Stage 1 of Actor-Mimic: train an expert, a Q-network that plays one Atari game.

The paper's experts are DQNs. This is Q-learning in the form that suits today's machines (PQN:
Gallici et al., 2025, arXiv 2407.04811): many emulators side by side replace the replay buffer, and
Q(lambda) returns look several steps ahead. A moving average of the weights acts and gives targets.
The optimizer is Muon (common.py).

    python train_expert.py --game pong --steps 50_000 --out runs/try-expert  # a minute
    python train_expert.py --game breakout  # one core: about two hours
    python train_expert.py --game breakout --steps 25e6 --out runs/long-expert  # the paper's length

Output: the folder --out with checkpoint.pt (the same command resumes from it), log.csv, and
expert.pt, the weights alone in half precision, for the next stage.
"""

import copy
import math
import re
from collections import deque
from dataclasses import dataclass

import common  # before torch: it sets what torch reads when it loads

import numpy as np
import torch
import torch.nn.functional as F
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import nn

# The emulator refuses these with one player.
TWO_PLAYER_GAMES = {"combat", "joust", "maze_craze", "warlords"}


@dataclass
class Args:
    # Run
    game: str = "pong"  # name of the game: ms_pacman, MsPacman or ALE/MsPacman-v5
    steps: int = 5_000_000  # decisions of all environments, 4 frames each (paper: 25M)
    seed: int = 1  # of the weights, exploration, shuffling and emulators
    out: str = ""  # folder of the run (empty: runs/expert-<game>)
    # Network
    channels: tuple = (32, 64, 64)  # kernels 8, 4, 3, 3, strides 4, 2, 1, 1 (as paper)
    hidden: tuple = (512,)  # fully connected layers (as paper)
    norm: str = "linear"  # LayerNorm: after all layers but the last, linear ones, or none (paper)
    # Acting
    num_envs: int = 32  # emulators side by side (paper: 1)
    rollout: int = 32  # steps of each environment between two rounds of learning
    epsilon: float = 0.05  # share of random actions, falls from 1 (paper: 0.1)
    explore: float = 0.1  # share of the run over which epsilon falls (paper: 1M steps)
    sticky: float = 0.0  # chance, in each frame, that the last action repeats (as paper)
    # Learning
    epochs: int = 1  # passes over each rollout
    minibatch: int = 256  # observations per gradient step (paper: 32)
    lr: float = 5e-4  # of RAdam; Muon's, for the hidden weight matrices, is 40 times as large
    decay: float = 0.3  # share of the run, at its end, over which lr falls to zero
    gamma: float = 0.99  # discount (as paper)
    lam: float = 0.85  # of Q(lambda) returns (0: one step, 1: to the rollout's end)
    target_rate: float = 0.1  # share of the way that target moves to net each round
    # Machine
    report_every: int = 50_000  # steps between two lines of the log, each with a checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        self.game = rom_name(self.game)
        common.expand_paths(self, "out")
        common.require(len(self.channels) <= 4, "--channels takes at most 4 widths")
        common.require_positive(self, "channels", "hidden")
        common.require_one_of("--norm", self.norm, ("all", "linear", "none"))
        common.require_positive(self, "steps", "rollout", "epochs", "minibatch", "lr")
        common.require_positive(self, "target_rate", "report_every")
        common.require_shares(self, "gamma", "lam", "epsilon", "explore", "decay", "target_rate")
        common.require_shares(self, "sticky")
        common.require_range(self, 1, 10_000, "num_envs")
        common.require_range(self, 0, 1e30, "lr")  # far above, float32 overflows
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require(
            self.minibatch <= self.num_envs * self.rollout,
            "--minibatch is larger than the rollout (num_envs x rollout)",
        )


# The environment


def rom_name(game):
    """Return ale-py's name of a game: ms_pacman for MsPacman, ALE/MsPacman-v5 and the like.

    Raises ValueError with the nearest names if no such game is for one player.
    """
    games = {
        name.replace("_", ""): name
        for name in roms.get_all_rom_ids()
        if name not in TWO_PLAYER_GAMES
    }
    short = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?-v\d+$", "", game)
    short = re.sub(r"[^a-z0-9]", "", short.lower())
    common.require_one_of("--game", games.get(short, short), games.values())
    return games[short]


def make_envs(game, num_envs, sticky=0.0, max_frames=108_000):
    """Start emulators of one game; observations are (num_envs, 4, 84, 84) uint8, newest last.

    A step repeats its action for 4 frames and shows each pixel's maximum over the last two, in
    grey, resized to 84x84. Rewards are raw. A lost life sets `terminated`, but the episode
    continues. Game over, or the time limit (`truncated`), starts the next episode within the same
    step, with up to 29 no-ops and, where the game needs it, FIRE.
    """
    return AtariVectorEnv(
        game,
        num_envs,
        num_threads=min(num_envs, common.cores()),
        full_action_space=True,
        reward_clipping=False,
        life_loss_info=True,
        autoreset_mode=AutoresetMode.SAME_STEP,
        repeat_action_probability=sticky,
        max_num_frames_per_episode=max_frames,
    )


def legal_actions(game):
    """Return the (18,) bool mask of the game's minimal action set within the full ALE set."""
    legal = torch.zeros(18, dtype=torch.bool)
    # Without full_action_space, as here, an emulator offers the minimal set.
    legal[[action.value for action in AtariVectorEnv(game, 1).ale.get_action_set()]] = True
    return legal


def new_episode(frame, last_frame):
    """Where a new episode began: the emulator's count of frames fell; (N,), (N,) -> (N,) bool.

    `terminated` does not tell, since it may be a lost life alone.
    """
    return frame < last_frame


# The network, and how it acts


class AtariNet(nn.Module):
    """The paper's network: convolutions, linear layers, a value for each action; with LayerNorm.

    obs (B, 4, 84, 84) uint8 -> values (B, 18), features (B, F), the activations that feed the
    output layer. Values are logits in a mimic, and Q-values elsewhere (also with --objective q).
    norm: LayerNorm after "all" layers but the last, after "linear" ones alone, or "none" (paper).
    """

    def __init__(self, channels=(32, 64, 64), hidden=(512,), norm="linear"):
        super().__init__()
        layers, width, size = [], 4, 84
        for out, kernel, stride in zip(channels, (8, 4, 3, 3), (4, 2, 1, 1)):
            # GroupNorm with one group is LayerNorm over channels and positions.
            layer_norm = nn.GroupNorm(1, out) if norm == "all" else nn.Identity()
            # PixelConv2d computes what nn.Conv2d would from pixels / 255, but faster.
            conv = nn.Conv2d if layers else common.PixelConv2d
            layers += [conv(width, out, kernel, stride), layer_norm, nn.ReLU()]
            width, size = out, (size - kernel) // stride + 1
        layers.insert(-1, nn.Flatten())  # before the ReLU, whose gradient is faster when flat
        width *= size * size
        for out in hidden:
            layer_norm = nn.Identity() if norm == "none" else nn.LayerNorm(out)
            layers += [nn.Linear(width, out), layer_norm, nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 18)
        for layer in self.body:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))  # keeps the scale through a ReLU
                nn.init.zeros_(layer.bias)
        # Small, not zero: of equal values argmax always picks the no-op.
        nn.init.orthogonal_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, obs):
        features = self.body(obs).float()
        # In bfloat16 rounding would be larger than what tells good actions from bad ones.
        with torch.autocast(obs.device.type, enabled=False):
            return self.head(features), features


def act(values, legal, epsilon, rng):
    """Choose epsilon-greedily: the best legal action, or with probability epsilon any legal one.

    values: (N, 18); legal: (18,) or (N, 18) bool; returns (N,) int64. All on the CPU.
    """
    greedy = values.masked_fill(~legal, -torch.inf).argmax(1)
    random = torch.multinomial(legal.float().expand_as(values), 1, generator=rng).squeeze(1)
    return torch.where(torch.rand(len(values), generator=rng) < epsilon, random, greedy)


# Targets and loss


def greedy_value(q_values, legal):
    """Return the value of the best legal action: (N, 18), (18,) bool -> (N,)."""
    return q_values.masked_fill(~legal, -torch.inf).amax(1)


def learner_view(reward, terminated, truncated, cut_value, gamma):
    """Return what Q-learning sees of a step: reward (N,) float, and stop (N,) bool.

    Rewards are clipped to -1 ... 1 (paper). A lost life or game over stops the return. So does the
    time limit, but there the return would have had more to come: its value is added.
    reward, terminated, truncated: (N,); cut_value: (N,) max_a Q of the observation cut off.
    """
    cut = truncated & ~terminated
    return reward.clamp(-1, 1) + gamma * cut_value * cut, terminated | truncated


def q_lambda_targets(rewards, stop, max_q, gamma, lam):
    """Compute the Q(lambda) returns of a rollout, backwards (Peng's Q(lambda), as in PQN).

    G_t = r_t + gamma * (lam * G_{t+1} + (1 - lam) * max_a Q(s_{t+1}, a)), and r_t at a stop.
    rewards: (T, N); stop: (T, N) bool; max_q: (T+1, N), of the T observations and the next;
    returns (T, N).
    """
    targets = torch.empty_like(rewards)
    following = max_q[-1]
    for t in reversed(range(len(rewards))):
        following = lam * following + (1 - lam) * max_q[t + 1]
        targets[t] = following = rewards[t] + gamma * following * ~stop[t]
    return targets


def td_loss(q_values, actions, targets):
    """Huber loss of the chosen actions' Q-values: (B, 18), (B,) int64, (B,) -> scalar.

    Its gradient is the error cut to -1 ... 1, as in DQN.
    """
    return F.huber_loss(q_values.gather(1, actions[:, None]).squeeze(1), targets)


# Training


def train(args, run):
    """Learn one game; run: its folder, with checkpoint, log and Ctrl-C (common.Run)."""
    # Set up: network, target, optimizer, and where the run was when it stopped.
    device = common.pick_device(args.device)
    autocast = common.pick_autocast(args.precision, device)
    net_args = {"channels": list(args.channels), "hidden": list(args.hidden), "norm": args.norm}
    T, N = args.rollout, args.num_envs
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)  # explores, shuffles and seeds the emulators
    legal = legal_actions(args.game)  # (18,)
    net = AtariNet(**net_args).to(device, memory_format=common.memory_format(device))
    common.check_device(net, torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8))
    # Paper: a copy made every 10,000 steps, which gives targets only. Here the moving average of
    # net's weights, which also plays, and is what is saved.
    target = copy.deepcopy(net)
    optimizer = common.Muon(net, lr=args.lr, times=40, autocast=autocast)
    step, scores = 0, deque(maxlen=100)  # scores of the last finished episodes
    if run.saved:
        common.load_state(run.saved, target, optimizer, rng, run.folder)
        common.load_weights(net, run.saved, run.folder, "online")
        step, scores = run.saved["step"], deque(run.saved["scores"], maxlen=100)
        if step >= args.steps:
            print(f"{run.folder} has finished; with more --steps it would resume")
            return

    # Set up: buffers and emulators.
    obs_buffer = torch.empty((T, N, 4, 84, 84), dtype=torch.uint8, device=device)
    actions, rewards = torch.empty((T, N), dtype=torch.int64), torch.empty((T, N))
    stops = torch.empty((T, N), dtype=torch.bool)
    max_q = torch.empty((T + 1, N))  # max_a Q(s, a)
    run.start(device, autocast, net, obs_buffer.nbytes)
    updates = args.epochs * math.ceil(T * N / args.minibatch)
    print(f"{args.game} has {legal.sum()} actions; {updates} updates every {T * N:,} steps")
    common.show(f"starting {N} emulators of {args.game} ...", keep=False)
    envs = make_envs(args.game, N, args.sticky)
    obs, info = envs.reset(seed=torch.randint(2**31 - 1, (N,), generator=rng).numpy())
    frame, returns = info["episode_frame_number"], np.zeros(N)
    first_step = step

    def q_values_of(obs):  # (N, 4, 84, 84) -> (N, 18), on the CPU
        return target(obs.to(device))[0].cpu()

    while step < args.steps:
        # Where episodes are equally long, environments begun together stay in step, and a rollout
        # would hold one part of the game only. So each round restarts another one, until all have.
        rounds = (step - first_step) // (T * N)
        if rounds < N:
            obs, info = envs.reset(options={"reset_mask": np.arange(N) == rounds})
            frame = info["episode_frame_number"]
            returns[rounds] = 0  # an episode that was cut has no score

        # Act: T steps in N environments.
        progress = step / (args.explore * args.steps) if args.explore else 1
        epsilon = max(args.epsilon, 1 - (1 - args.epsilon) * progress)
        # One autocast for all steps: it rounds the weights to bfloat16 only once.
        with torch.no_grad(), autocast:
            for t in range(T):
                obs_buffer[t] = torch.from_numpy(obs)
                q_values = q_values_of(obs_buffer[t])  # (N, 18)
                max_q[t] = greedy_value(q_values, legal)
                actions[t] = act(q_values, legal, epsilon, rng)
                obs, reward, terminated, truncated, info = envs.step(actions[t].numpy())
                cut_value = torch.zeros(N)
                if truncated.any():
                    cut_value = greedy_value(
                        q_values_of(torch.from_numpy(info["final_obs"])), legal
                    )
                rewards[t], stops[t] = learner_view(
                    torch.from_numpy(reward),
                    torch.from_numpy(terminated),
                    torch.from_numpy(truncated),
                    cut_value,
                    args.gamma,
                )

                # A score is of a whole episode: not clipped, and not ended by a lost life.
                returns += reward
                began = new_episode(info["episode_frame_number"], frame)
                frame = info["episode_frame_number"]
                scores.extend(returns[began].tolist())
                returns[began] = 0
            max_q[T] = greedy_value(q_values_of(torch.from_numpy(obs)), legal)

        # Learn from them. The rate is constant and then falls; more --steps make it rise again.
        targets = q_lambda_targets(rewards, stops, max_q, args.gamma, args.lam).flatten()  # (T*N,)
        lr = args.lr * min(1, (args.steps - step) / max(args.decay * args.steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(args.epochs):
            for batch in torch.randperm(T * N, generator=rng).split(args.minibatch):
                # index_select is much faster on a CPU than indexing with [batch].
                obs_batch = obs_buffer.flatten(0, 1).index_select(0, batch.to(device))
                with autocast:
                    q_values, features = net(obs_batch)  # (B, 4, 84, 84) -> (B, 18), (B, F)
                batch_actions = actions.flatten()[batch].to(device)  # (B,)
                loss = td_loss(q_values, batch_actions, targets[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            for slow, weight in zip(target.parameters(), net.parameters()):
                slow.lerp_(weight, args.target_rate)  # slow += target_rate * (weight - slow)
        step += T * N
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in net.parameters()])
        common.check_finite(loss + grad_norm, step, run.folder)

        # Report, once in a while: save, then write to the log.
        score = common.mean(scores)
        run.progress(step, f"score {score:.1f}")
        if run.due(step):
            row = {
                f"{args.game}_score": score,
                "max_q": max_q.mean().item(),  # mean over the rollout of max_a Q(s, a)
                "td_loss": loss.item(),
                "grad_norm": grad_norm.item(),
                # Share of the features that are 0 on all of the last minibatch.
                "dead": (features == 0).all(0).float().mean().item(),
                "epsilon": epsilon,
                "lr": lr,
            }
            contents = {
                "games": [args.game],
                "legal": legal.nonzero().flatten().tolist(),
                "step": step,
                "network": "AtariNet",
                "net_args": net_args,
                "score": score,
                "scores": list(scores),
                "max_q": row["max_q"],
            }
            # Weights first: where checkpoint.pt says that all is done, they exist.
            run.save("expert.pt", **contents, net=common.half(target))
            run.save(
                "checkpoint.pt",
                **contents,
                net=target.state_dict(),
                online=net.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
            )
            text = f"score {score:.1f}  max Q {row['max_q']:.2f}  TD {row['td_loss']:.4f}"
            run.report(step, row, text)

    last = f"score {score:.1f} in the last {len(scores)} episodes" if scores else "no episode over"
    print(f"done: {last}; {run.folder}/expert.pt")


def main(args):
    with common.Run(args.out or f"runs/expert-{args.game}", "expert", args) as run:
        train(args, run)


if __name__ == "__main__":
    common.cli(main, Args)
