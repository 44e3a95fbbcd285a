"""Stage 3 of Actor-Mimic: start a new game from the mimic's weights.

Section 3.4 of the paper: train_expert.py from a mimic's weights, rescaled, with a new output layer
and LayerNorm before it. The control starts from random ones of the same widths; all else is equal.

    python transfer.py --steps 50_000 --out runs/try-transfer  # a minute or two
    python transfer.py  # two cores: 5 to 15 minutes, 24 points in training
    python transfer.py --arm control  # what it is measured against: 13 points

Output: the folder --out with checkpoint.pt (the same command goes on from it), log.csv, and
expert.pt, the weights alone in half precision. In experts/ are such files, of stage 1.
"""

import copy
import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: it sets what torch reads when it loads

import numpy as np
import torch
import torch.nn.functional as F
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import nn

FOR_TWO = {"combat", "joust", "maze_craze", "warlords"}  # the emulator refuses these for one player


@dataclass(frozen=True)
class Args:
    game: str = "breakout"  # ROM name, as ale-py spells it
    mimic: str = "mimics/without-breakout.pt"  # of train_mimic.py; gives both arms their widths
    arm: str = "mimic"  # mimic, or control: the same network with random first weights
    keep_head: bool = False  # keep the output layer (paper: yes) and the norm before it
    steps: int = 400_000  # decisions over all lanes, 4 frames each (paper: 10M)
    seed: int = 1  # of the weights, exploration, shuffling and emulators
    out: str = ""  # folder of the run (empty: runs/transfer-<game>-<arm>-s<seed>)
    lanes: int = 32  # emulators side by side (paper: 1)
    rollout: int = 32  # steps of each lane between two rounds; 16 with 64 lanes were no better
    epochs: int = 2  # passes over each rollout; 1: half the score in Breakout, level in equal time
    minibatch: int = 128  # observations per gradient step; 256 was no better (paper: 32)
    lr: float = 5e-4  # of RAdam; Breakout: 2.5e-4 slower, 1e-3 ahead at first; Pong: 2.5e-4 faster
    decay: float = 0.3  # share of the run over which lr falls to zero, at its end; 1 was no better
    gamma: float = 0.99  # discount (as paper)
    lam: float = 0.85  # of Q(lambda) returns (0: one step, 1: to the rollout's end); 0.65: slower
    epsilon: float = 0.05  # share of random actions, falls from 1; as in evaluate.py (paper: 0.1)
    explore: float = 0.1  # share of the run over which epsilon falls; 0.3: level (paper: 1M steps)
    target_rate: float = 0.1  # share of the way target moves to net each round; 0.02 is too slow
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this (paper: errors to 1)
    report_every: int = 50_000  # steps between two lines of the log, each with a checkpoint
    device: str = "auto"  # auto, cpu, cuda or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        common.require_one_of("--game", self.game, set(roms.get_all_rom_ids()) - FOR_TWO)
        common.require_one_of("--arm", self.arm, ("mimic", "control"))
        common.require(self.arm == "mimic" or not self.keep_head, "--keep-head needs --arm mimic")
        common.require_positive(self, "steps", "rollout", "epochs")
        common.require_positive(self, "minibatch", "lr", "target_rate", "max_grad_norm")
        common.require_positive(self, "report_every")
        common.require_shares(self, "gamma", "lam", "epsilon", "explore", "decay", "target_rate")
        common.require_range(self, 1, 10_000, "lanes")
        common.require_range(self, 0, 1e30, "lr")  # far beyond any that make sense
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require(
            self.minibatch <= self.lanes * self.rollout,
            "--minibatch is larger than the rollout (lanes x rollout)",
        )


def make_envs(game, lanes, sticky=0.0, max_frames=108_000):
    """Start `lanes` emulators of one game; observations are (lanes, 4, 84, 84) uint8, newest last.

    A step repeats its action for 4 frames and shows each pixel's maximum over the last two, in
    grey, resized to 84x84. Rewards are raw. A lost life sets `terminated`, and the game goes on;
    game over, or the time limit (`truncated`), starts the next game within the same step, with up
    to 29 no-ops and, where the game needs it, FIRE.
    """
    return AtariVectorEnv(
        game,
        lanes,
        num_threads=min(lanes, os.cpu_count()),
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


class AtariNet(nn.Module):
    """The paper's network with LayerNorm: convolutions, linear layers, a score for each action.

    obs (B, 4, 84, 84) uint8 -> scores (B, 18), features (B, F), the activations that feed the
    output layer. Scores are Q-values in an expert and in transfer, and logits in the mimic.
    conv_norm: whether LayerNorm follows the convolutions, too, or the linear layers alone.
    """

    def __init__(self, channels=(32, 64, 64), hidden=(512,), conv_norm=True):
        super().__init__()
        layers, width, size = [], 4, 84
        for out, kernel, stride in zip(channels, (8, 4, 3, 3), (4, 2, 1, 1)):
            # One group: LayerNorm over channels and positions (paper: none). In short runs
            # experts without it were ahead in Breakout and behind in Seaquest.
            norm = nn.GroupNorm(1, out) if conv_norm else nn.Identity()
            layers += [nn.Conv2d(width, out, kernel, stride), norm, nn.ReLU()]
            width, size = out, (size - kernel) // stride + 1
        layers.append(nn.Flatten())
        width *= size * size
        for out in hidden:
            layers += [nn.Linear(width, out), nn.LayerNorm(out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 18)
        # In short runs of experts torch's own first weights did as well as these.
        for layer in self.body:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))  # keeps the scale through a ReLU
                nn.init.zeros_(layer.bias)
        # Small, not zero: of equal scores argmax takes the no-op, and then Enduro never scores.
        nn.init.orthogonal_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, obs):
        device, dtype = obs.device.type, torch.float32
        if torch.is_autocast_enabled(device):
            # 0 to 255 are exact in bfloat16: the same result as from float32, and faster.
            dtype = torch.get_autocast_dtype(device)
        # In two steps, because `to` with both at once is slower.
        obs = obs.to(dtype).to(memory_format=torch.channels_last) / 255
        features = self.body(obs).float()
        # In bfloat16 rounding would be larger than what tells good actions from bad ones.
        with torch.autocast(device, enabled=False):
            return self.head(features), features


def act(scores, legal, epsilon, rng):
    """Choose epsilon-greedily: the best legal action, or with probability epsilon any legal one.

    scores: (N, 18); legal: (18,) or (N, 18) bool; returns (N,) int64. All on the CPU.
    """
    greedy = scores.masked_fill(~legal, -torch.inf).argmax(1)
    random = torch.multinomial(legal.float().expand_as(scores), 1, generator=rng).squeeze(1)
    return torch.where(torch.rand(len(scores), generator=rng) < epsilon, random, greedy)


def greedy_value(q_values, legal):
    """Return the value of the best legal action: (N, 18), (18,) bool -> (N,)."""
    return q_values.masked_fill(~legal, -torch.inf).amax(1)


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
    """Mean squared error of the chosen actions' Q-values: (B, 18), (B,) int64, (B,) -> scalar."""
    return F.mse_loss(q_values.gather(1, actions[:, None]).squeeze(1), targets)


@torch.no_grad()
def rescale(net, fresh):
    """Give net's layers that LayerNorm follows the size of fresh's.

    LayerNorm cancels the size, so no output changes. But a mimic's weights have grown, 1.5 to 15
    times, and the optimizer's steps, which have not, would turn them slowly.
    """
    for layer, after, new in zip(net.body, net.body[1:], fresh.body):
        if isinstance(after, (nn.GroupNorm, nn.LayerNorm)):
            factor = new.weight.norm() / layer.weight.norm()
            layer.weight *= factor
            layer.bias *= factor


def main(args):
    out = Path(args.out or f"runs/transfer-{args.game}-{args.arm}-s{args.seed}")
    device = common.pick_device(args.device)
    autocast = common.pick_autocast(args.precision, device)
    mimic = common.load_checkpoint(args.mimic, ("mimic",))
    net_args = mimic["net_args"]
    if args.game in mimic["games"]:
        print(f"warning: the mimic knows {args.game}; transfer means a new game")
    T, N = args.rollout, args.lanes
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)  # explores, shuffles and seeds the emulators

    legal = legal_actions(args.game)
    net = AtariNet(**net_args).to(device, memory_format=torch.channels_last)
    if args.arm == "mimic":
        fresh = copy.deepcopy(net)
        common.load_weights(net, mimic, args.mimic)
        rescale(net, fresh)
        if not args.keep_head:
            # The mimic's logits are no Q-values; under its last norm, body[-2], features may die.
            net.body[-2], net.head = fresh.body[-2], fresh.head
    # Paper: a copy made every 10,000 steps, which gives targets only. Here the moving average of
    # net's weights, which also plays, and is what is saved.
    target = copy.deepcopy(net)
    # foreach: one call for all weights, not one for each, which is faster.
    optimizer = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)
    step, scores = 0, deque(maxlen=100)  # scores of the last finished games
    saved = common.open_run(out, "transfer", args)
    if saved:
        common.load_state(saved, target, optimizer, rng, out)
        # An expert.pt holds the average alone: then learning begins again from it.
        common.load_weights(net, saved, out, "online" if "optimizer" in saved else "net")
        step, scores = saved["step"], deque(saved["scores"], maxlen=100)
        if step >= args.steps:
            return print(f"{out} has finished; more --steps would go on from step {step:,}")

    # The stack of 4 frames is the last axis. As (B, 4, 84, 84), which permute makes of it without a
    # copy, that is channels_last, on which convolutions are faster.
    obs_buffer = torch.empty((T, N, 84, 84, 4), dtype=torch.uint8, device=device)
    actions, rewards = torch.empty((T, N), dtype=torch.int64), torch.empty((T, N))
    stops = torch.empty((T, N), dtype=torch.bool)
    values = torch.empty((T + 1, N))  # max_a Q(s, a)
    log = common.Log(out, saved)
    log.header(args, device, autocast, net, obs_buffer.nbytes)
    updates = args.epochs * math.ceil(T * N / args.minibatch)
    print(f"{args.game} has {legal.sum()} actions; {updates} updates every {T * N:,} steps")

    def save(name, **more):
        common.save_checkpoint(
            out / name,
            args,
            stage="transfer",
            games=[args.game],
            legal=legal.nonzero().flatten().tolist(),
            step=step,
            minutes=log.minutes(),
            net_args=net_args,
            score=common.mean(scores),
            scores=list(scores),
            max_q=values.mean().item(),
            **more,
        )

    @torch.inference_mode()
    def q_values_of(obs):  # (N, 4, 84, 84) -> (N, 18), on the CPU
        with autocast:
            return target(obs.to(device))[0].cpu()

    envs = make_envs(args.game, N)
    obs, info = envs.reset(seed=torch.randint(2**31 - 1, (N,), generator=rng).numpy())
    frame, returns = info["episode_frame_number"], np.zeros(N)
    stop_asked, start, next_report = common.Stop(), step, step

    while step < args.steps:
        # Where games are equally long, lanes begun together stay in step, and a rollout would
        # hold one part of the game only. So each round one lane restarts, until all have.
        lane = (step - start) // (T * N)
        if lane < N:
            obs, info = envs.reset(options={"reset_mask": np.arange(N) == lane})
            frame, returns[lane] = info["episode_frame_number"], 0  # a game cut off has no score

        # Play T steps on N lanes.
        explored = step / (args.explore * args.steps) if args.explore else 1
        epsilon = max(args.epsilon, 1 - (1 - args.epsilon) * explored)
        for t in range(T):
            obs_buffer[t] = torch.from_numpy(obs).permute(0, 2, 3, 1)
            q_values = q_values_of(obs_buffer[t].permute(0, 3, 1, 2))
            values[t] = greedy_value(q_values, legal)
            actions[t] = act(q_values, legal, epsilon, rng)

            obs, reward, terminated, truncated, info = envs.step(actions[t].numpy())
            rewards[t] = torch.from_numpy(reward).clamp(-1, 1)
            # A lost life ends the return that is learned from, but not the game that is scored.
            stops[t] = torch.from_numpy(terminated | truncated)
            # A new game, if the emulator's counter fell; terminated may be a lost life alone.
            game_over = info["episode_frame_number"] < frame
            frame = info["episode_frame_number"]
            if truncated.any():
                # A time limit ends the game, but not the return: add the value of what it cut off.
                cut = torch.from_numpy(truncated & ~terminated)
                final_q = q_values_of(torch.from_numpy(info["final_obs"]))
                rewards[t, cut] += args.gamma * greedy_value(final_q, legal)[cut]
            returns += reward
            scores.extend(returns[game_over].tolist())
            returns[game_over] = 0
        values[T] = greedy_value(q_values_of(torch.from_numpy(obs)), legal)

        # Learn from them. The rate is constant and then falls; more --steps make it rise again.
        targets = q_lambda_targets(rewards, stops, values, args.gamma, args.lam).flatten()
        lr = args.lr * min(1, (args.steps - step) / max(args.decay * args.steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(args.epochs):
            for batch in torch.randperm(T * N, generator=rng).split(args.minibatch):
                # Ten times as fast on a CPU as indexing with [batch].
                obs_batch = obs_buffer.flatten(0, 1).index_select(0, batch.to(device))
                with autocast:
                    q_values, features = net(obs_batch.permute(0, 3, 1, 2))
                chosen, wanted = actions.flatten()[batch].to(device), targets[batch].to(device)
                loss = td_loss(q_values, chosen, wanted)
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
                optimizer.step()
        with torch.no_grad():
            for slow, weight in zip(target.parameters(), net.parameters()):
                slow.lerp_(weight, args.target_rate)  # slow += target_rate * (weight - slow)
        step += T * N

        common.check_finite(loss + grad_norm, step, out)

        # Once in a while: look, save, report.
        if step >= min(next_report, args.steps) or stop_asked:
            # First after 1, 2, 4 ... rounds, so that the time left is soon known.
            regular = (step // args.report_every + 1) * args.report_every
            next_report = min(2 * step - start, regular)
            row = {
                f"{args.game}_score": common.mean(scores),
                "max_q": values.mean().item(),  # mean over the rollout of max_a Q(s, a)
                "td_loss": loss.item(),
                "grad_norm": grad_norm.item(),  # before it is clipped
                # Share of the features that are 0 on all of the last minibatch.
                "dead": (features == 0).all(0).float().mean().item(),
                "epsilon": epsilon,
                "lr": lr,
            }
            half = {name: weight.half().cpu() for name, weight in target.state_dict().items()}
            save("expert.pt", net=half)  # before the checkpoint, which may say that all is done
            save(
                "checkpoint.pt",
                net=target.state_dict(),
                online=net.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
            )
            log.write(step, row)
            text = f"max Q {row['max_q']:.2f}  TD {row['td_loss']:.4f}"
            log.line(step, args.steps, f"score {common.mean(scores):.1f}  {text}")
            if stop_asked and step < args.steps:
                print(f"saved; the same command goes on from step {step:,}")
                raise SystemExit(130)  # ended by Ctrl-C: what follows it after && does not start

    print(f"done: score {common.mean(scores):.1f} in the last {len(scores)} games; {out}/expert.pt")


if __name__ == "__main__":
    common.run(main, Args)
