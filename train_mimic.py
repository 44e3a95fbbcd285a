"""Stage 2 of Actor-Mimic: train one network to play the games of all experts, by imitating them.

Section 3 of the paper. In each game the student takes over from the expert, emulator by emulator,
in the course of the run (paper: it plays from the start, as with --actor student). On each picture
that comes up, that game's expert says how good every action is (Q-values). A softmax turns this
into a policy, and the student learns to hold the same policy (policy regression) and features from
which the expert's can be read off (feature regression; --feature-weight 0 leaves it out).

    python train_mimic.py --steps 10_000 --out runs/try-mimic  # 1 to 5 minutes
    python train_mimic.py                                  # all of experts/: 40 to 90 minutes on
                                                           # two cores with bfloat16, 2 to 3.3
                                                           # hours without; 98 % of its expert in
                                                           # the median game
    python train_mimic.py --actor student --feature-weight 0 --steps 25_000_000 --out runs/paper
                                                           # the paper's length and player, policies
                                                           # alone: 35 hours to 8 days

Output: runs/mimic/ with checkpoint.pt (the same command goes on from it), log.csv, and mimic.pt,
the student's weights alone in half precision. Those in mimics/ are such files.
"""

import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: it sets what torch reads when it loads

import numpy as np
import torch
import torch.nn.functional as F
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import nn


@dataclass(frozen=True)
class Args:
    experts: tuple = ()  # checkpoints of stage 1, each for another game (none: all of experts/)
    steps: int = 450_000  # agent decisions in each game, 4 frames each (paper: 25_000_000)
    seed: int = 1  # of the weights, exploration, replay and emulators
    out: str = "runs/mimic"  # folder of the run
    channels: tuple = (32, 64, 64)  # convolutions: kernels 8, 4, 3, 3 with strides 4, 2, 1, 1
    hidden: tuple = (512,)  # fully connected layers
    conv_norm: bool = True  # LayerNorm after convolutions (paper: none); off: behind in Seaquest
    objective: str = "policy"  # policy, or q: squared error on Q-values (no temperature)
    temperature: float = 0.3  # of the experts' softmax, in units of q_spread (paper: 1, plain)
    feature_weight: float = 0.1  # of feature regression; 0: none (paper: 0, and 0.01)
    actor: str = "both"  # who plays: student (paper), expert (no scores then), both: expert first
    epsilon: float = 0.1  # share of random actions of whoever plays (as paper)
    lanes: int = 16  # emulators of each game
    rollout: int = 16  # steps of each lane between two rounds of learning
    updates: int = 32  # gradient steps per round: each observation is learned from twice (as paper)
    minibatch: int = 16  # observations of each game per gradient step (paper: 8)
    replay: int = 20_000  # observations kept of each game, 0.15 GB (paper: 100_000)
    lr: float = 2e-3  # of Adam; 1e-3 and 4e-3 had a higher loss in short runs
    decay: float = 0.5  # share of the run over which lr falls to zero, at its end
    report_every: int = 20_000  # steps between two lines of the log, each with a checkpoint
    device: str = "auto"  # auto, cpu, cuda or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        common.require_one_of("--objective", self.objective, ("policy", "q"))
        common.require_one_of("--actor", self.actor, ("student", "expert", "both"))
        common.require(len(self.channels) <= 4, "--channels takes at most 4 widths")
        common.require_positive(self, "steps", "channels", "hidden")
        common.require_positive(self, "rollout", "updates", "minibatch", "lr", "report_every")
        common.require_shares(self, "epsilon", "decay")
        common.require_range(self, 1, 10_000, "lanes")
        common.require_range(self, 0, 1e30, "lr")  # far beyond any that make sense
        common.require_range(self, 1e-6, 1e6, "temperature")  # outside, the softmax is not finite
        common.require(self.out, "--out must name a folder")
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require_range(self, 0, 1_000_000, "feature_weight")
        drawn = self.updates * self.minibatch  # 28 KB each, in memory at once
        common.require(drawn <= 100_000, "--updates times --minibatch must be at most 100,000")
        enough = self.replay >= 4 * self.lanes
        common.require(enough, "--replay must hold four observations of every lane")


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


def q_spread(expert_q, legal):
    """How far the Q-values of a state lie apart: (B, 18), (18,) bool -> scalar, at least 1e-6.

    It is the standard deviation over the legal actions, mean over the states. In some games an
    action hardly matters and in others much, and the temperature has to keep step with that.
    """
    return expert_q[:, legal].std(1, correction=0).mean().clamp(min=1e-6)


def policy_loss(student_logits, expert_q, legal, temperature):
    """Cross-entropy from the expert's softened policy to the student's (eq. 2).

    student_logits, expert_q: (..., 18), in main (games, minibatch, 18); legal (bool, there
    (games, 1, 18)) and temperature (above 0) are broadcast to them; returns (...). Only the expert
    is divided by the temperature (eq. 1): it turns Q-values, whose scale differs from game to game,
    into a policy. The least that it can be is the entropy of the expert's policy, not 0: so losses
    of different games or temperatures do not compare.
    """
    expert_policy = F.softmax(expert_q.masked_fill(~legal, -torch.inf) / temperature, -1)
    log_policy = F.log_softmax(student_logits.masked_fill(~legal, -torch.inf), -1)
    # The masked logarithms are replaced because 0 * -inf is not a number.
    return -(expert_policy * log_policy.masked_fill(~legal, 0)).sum(-1)


def q_loss(student_q, expert_q, legal):
    """Mean squared error of the legal Q-values: (..., 18), (..., 18), bool -> (...)."""
    return ((student_q - expert_q).square() * legal).sum(-1) / legal.sum(-1)


def feature_loss(predicted, expert_features):
    """Squared distance of what a regressor reads off the student, mean over the batch (eq. 3).

    predicted, expert_features: (B, F of the expert), summed over F; returns a scalar.
    """
    return (predicted - expert_features).square().sum(1).mean()


class FrameReplay:
    """The last steps of N lanes of one game, with what the expert said of them.

    Each frame is kept once, in (steps, N, 84, 84) uint8. A stack of four is rebuilt when it is
    drawn, with black frames before the first of a game, as the emulator has it.
    """

    def __init__(self, steps, lanes, features):
        self.frames = torch.zeros((steps, lanes, 84, 84), dtype=torch.uint8)
        # How many earlier frames of its game a frame has, at most 3.
        self.age = torch.zeros((steps, lanes), dtype=torch.int64)
        self.q_values = torch.zeros((steps, lanes, 18))
        self.features = torch.zeros((steps, lanes, features), dtype=torch.half)
        self.added = 0  # steps so far; step i lies in slot i % steps

    def add(self, obs, age, q_values, features):
        """Append a step: obs (N, 4, 84, 84), age (N,); the expert's (N, 18) and (N, F)."""
        slot = self.added % len(self.frames)
        self.frames[slot], self.age[slot] = obs[:, -1], age
        self.q_values[slot], self.features[slot] = q_values, features
        self.added += 1

    def draw(self, count, rng):
        """Draw uniformly, with replacement: obs (count, 4, 84, 84), (count, 18), (count, F)."""
        # The oldest three steps of a full buffer have lost the frames before them.
        oldest = max(0, self.added - len(self.frames) + 3)
        step = torch.randint(oldest, self.added, (count,), generator=rng)
        lane = torch.randint(self.frames.shape[1], (count,), generator=rng)
        slot = step % len(self.frames)
        back = torch.arange(3, -1, -1)  # the newest frame comes last
        # Rows of the flattened buffer. Those before a game's first frame are blacked out below.
        index = (step[:, None] - back) % len(self.frames) * self.frames.shape[1] + lane[:, None]
        # index_select is twice as fast on a CPU as indexing with [slots, lanes].
        obs = self.frames.flatten(0, 1).index_select(0, index.flatten()).view(count, 4, 84, 84)
        obs *= (back <= self.age[slot, lane][:, None])[:, :, None, None]  # else black
        return obs, self.q_values[slot, lane], self.features[slot, lane].float()


def load_expert(path):
    """Read a checkpoint of stage 1: its dict, and its network, frozen."""
    expert = common.load_checkpoint(path, ("expert",))
    net = AtariNet(**expert["net_args"]).requires_grad_(False)
    common.load_weights(net, expert, path)
    return expert, net


def main(args):
    device, out = common.pick_device(args.device), Path(args.out)
    autocast = common.pick_autocast(args.precision, device)
    paths = [str(Path(path)) for path in args.experts or sorted(Path("experts").glob("*.pt"))]
    if not paths:
        raise common.UserError(
            "no experts/ here: name checkpoints of train_expert.py with --experts"
        )
    experts, expert_nets = zip(*map(load_expert, paths))
    games = [expert["games"][0] for expert in experts]
    if len(set(games)) < len(games):
        raise common.UserError(f"two experts for one game: {', '.join(games)}")
    # What tells an expert from the same one trained again.
    marks = [[expert["step"], expert["minutes"]] for expert in experts]
    net_args = {
        "channels": list(args.channels),
        "hidden": list(args.hidden),
        "conv_norm": args.conv_norm,
    }
    G, T, N = len(games), args.rollout, args.lanes
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)  # explores, draws and seeds the emulators

    legal = torch.stack([legal_actions(game) for game in games])  # (G, 18)
    masks = legal[:, None].to(device)  # (G, 1, 18)
    expert_nets = [net.to(device, memory_format=torch.channels_last) for net in expert_nets]
    # For another architecture give the student a class of its own (the experts need this one), and
    # build it in load_networks of evaluate.py, too.
    student = AtariNet(**net_args).to(device, memory_format=torch.channels_last)
    # One linear map per game, from the student's features to the expert's.
    widths = [expert["net_args"]["hidden"][-1] for expert in experts]
    regressors = nn.ModuleList(nn.Linear(args.hidden[-1], width) for width in widths).to(device)
    weights = [*student.parameters(), *regressors.parameters()]
    # fused: the whole update in one pass over the weights, which is faster.
    optimizer = torch.optim.Adam(weights, lr=args.lr, fused=True)
    step, scores = 0, [deque(maxlen=30) for _ in games]  # of the student's last finished games
    saved = common.open_run(out, "mimic", args)
    if saved:
        if saved["games"] != games or saved["marks"] != marks:
            before = ", ".join(saved["games"])
            raise common.UserError(
                f"{out} holds a mimic of other experts, for {before}; name another --out"
            )
        common.load_state(saved, student, optimizer, rng, out)
        if "optimizer" in saved:  # else it is a mimic.pt: the linear maps begin anew, too
            common.load_weights(regressors, saved, out, "regressors")
        step, scores = saved["step"], [deque(recent, maxlen=30) for recent in saved["scores"]]
        if step >= args.steps:
            return print(f"{out} has finished; more --steps would go on from step {step:,}")

    replays = [FrameReplay(args.replay // N, N, width) for width in widths]
    log = common.Log(out, saved)
    obs_buffer = torch.zeros((G, T, N, 4, 84, 84), dtype=torch.uint8)
    age_buffer = torch.zeros((G, T, N), dtype=torch.int64)
    buffers = [obs_buffer, *(replay.frames for replay in replays)]
    log.header(args, device, autocast, student, sum(buffer.nbytes for buffer in buffers))
    print(f"{G} games: {', '.join(games)}; {args.updates} updates every {T * N:,} steps of each")

    def save(name, **more):
        common.save_checkpoint(
            out / name,
            args,
            stage="mimic",
            games=games,
            experts=paths,
            marks=marks,
            step=step,
            minutes=log.minutes(),
            net_args=net_args,
            score=[common.mean(recent) for recent in scores],
            scores=[list(recent) for recent in scores],
            **more,
        )

    envs = [make_envs(game, N) for game in games]
    resets = [env.reset(seed=torch.randint(2**31 - 1, (N,), generator=rng).numpy()) for env in envs]
    obs = torch.stack([torch.from_numpy(first) for first, _ in resets])  # (G, N, 4, 84, 84)
    frame = np.stack([info["episode_frame_number"] for _, info in resets])  # (G, N)
    age, returns = torch.zeros((G, N), dtype=torch.int64), np.zeros((G, N))
    game_over = np.ones((G, N), dtype=bool)  # a game begins in every lane
    student_plays = np.zeros((G, N), dtype=bool)  # decided where one begins
    stop_asked, start, next_report = common.Stop(), step, step

    while step < args.steps:
        # Play T steps on all lanes of all games. The share is that of the lanes which the student
        # plays. Paper: 1; here it grows from 0 to 1, much as in DAgger (Ross et al., 2011), because
        # in short runs that had twice the score in Breakout (Seaquest: no clear difference).
        share = {"student": 1, "both": step / args.steps, "expert": 0}[args.actor]
        for t in range(T):
            # Whoever begins a game plays it to its end, so that every score is of one player.
            student_plays = np.where(game_over, np.arange(N) < N * share, student_plays)
            obs_buffer[:, t], age_buffer[:, t] = obs, age
            device_obs = obs.to(device)
            # Logits in the lanes that the student plays, Q-values in those of the experts.
            values = torch.zeros(G, N, 18, device=device)
            with torch.inference_mode(), autocast:
                if student_plays.any():
                    values[student_plays], _ = student(device_obs[student_plays])
                for g, net in enumerate(expert_nets):
                    others = ~student_plays[g]
                    if others.any():
                        values[g, others], _ = net(device_obs[g, others])
            values = values.flatten(0, 1).cpu()
            actions = act(values, legal.repeat_interleave(N, 0), args.epsilon, rng)
            for env, action in zip(envs, actions.view(G, N).numpy()):
                env.send(action)
            # Received after all were sent: so the games step at the same time.
            next_obs, reward, _, _, infos = zip(*(env.recv() for env in envs))
            obs = torch.from_numpy(np.stack(next_obs))
            next_frame = np.stack([info["episode_frame_number"] for info in infos])
            game_over = next_frame < frame  # the counter fell: a new game
            frame = next_frame
            age = torch.where(torch.from_numpy(game_over), 0, (age + 1).clamp(max=3))
            returns += np.stack(reward)
            for g in range(G):
                scores[g].extend(returns[g, game_over[g] & student_plays[g]].tolist())
            returns[game_over] = 0

        # Each game's expert judges what was met, once and all of it together, which is faster.
        for g, net in enumerate(expert_nets):
            with torch.inference_mode(), autocast:
                expert_q, expert_features = net(obs_buffer[g].flatten(0, 1).to(device))
            q_values, features = (x.cpu().view(T, N, -1) for x in (expert_q, expert_features))
            for t in range(T):
                replays[g].add(obs_buffer[g, t], age_buffer[g, t], q_values[t], features[t])

        # The student learns to agree with them, from equally many observations of each game.
        # Paper: a constant rate, and 10,000 steps are played before the first update.
        lr = args.lr * min(1, (args.steps - step) / max(args.decay * args.steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # From all of the replay: of one minibatch alone the temperature would be noisy.
        spreads = [
            q_spread(replay.q_values[: replay.added].flatten(0, 1), mask).item()
            for replay, mask in zip(replays, legal)
        ]
        temperature = args.temperature * torch.tensor(spreads, device=device).view(G, 1, 1)
        # All minibatches at once, 28 KB an observation, which is faster than one by one.
        drawn = [replay.draw(args.updates * args.minibatch, rng) for replay in replays]
        drawn_obs, drawn_q, drawn_features = zip(*drawn)  # each holds a tensor of every game
        # Of imitation loss, feature loss and share of equal choices, over the round's updates.
        means = torch.zeros(G, 3, device=device)
        for first in range(0, args.updates * args.minibatch, args.minibatch):
            batch = slice(first, first + args.minibatch)
            with autocast:
                logits, features = student(torch.cat([x[batch] for x in drawn_obs]).to(device))
            logits = logits.view(G, args.minibatch, 18)
            expert_q = torch.stack([q_values[batch] for q_values in drawn_q]).to(device)
            if args.objective == "policy":
                imitation = policy_loss(logits, expert_q, masks, temperature).mean(1)
            else:
                imitation = q_loss(logits, expert_q, masks).mean(1)
            distances = []
            for g, own_features in enumerate(features.chunk(G)):
                expert_features = drawn_features[g][batch].to(device)
                distances.append(feature_loss(regressors[g](own_features), expert_features))
            distance = torch.stack(distances)
            # Paper: the sum over the games; here the mean: the same to Adam, and easier to compare.
            loss = (imitation + args.feature_weight * distance).mean()  # eq. 4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            student_choice = logits.masked_fill(~masks, -torch.inf).argmax(2)
            expert_choice = expert_q.masked_fill(~masks, -torch.inf).argmax(2)
            agreement = (student_choice == expert_choice).float().mean(1)
            figures = torch.stack([imitation, distance, agreement], 1).detach()
            means += figures / args.updates
        step += T * N

        grad_norm = nn.utils.get_total_norm([weight.grad for weight in weights])
        common.check_finite(loss + grad_norm, step, out)

        # Once in a while: look, save, report.
        if step >= min(next_report, args.steps) or stop_asked:
            # First after 1, 2, 4 ... rounds, so that the time left is soon known.
            regular = (step // args.report_every + 1) * args.report_every
            next_report = min(2 * step - start, regular)
            row = {"lr": lr}
            for g, game in enumerate(games):
                recent, goal = common.mean(scores[g]), experts[g]["score"]
                imitation, distance, agreement = means[g].tolist()
                row |= {
                    f"{game}_score": recent,
                    # A hint only: both are scores of training, with its random actions.
                    f"{game}_percent": 100 * recent / goal if goal > 0 else math.nan,
                    # Share of the last round's draws on which both prefer the same action.
                    f"{game}_agreement": agreement,
                    f"{game}_{args.objective}_loss": imitation,
                    # With weight 0 the linear maps never learn: how far off they are says nothing.
                    f"{game}_feature_loss": distance if args.feature_weight else math.nan,
                    f"{game}_spread": spreads[g],
                }
            half = {name: weight.half().cpu() for name, weight in student.state_dict().items()}
            save("mimic.pt", net=half)  # before the checkpoint, which may say that all is done
            save(
                "checkpoint.pt",
                net=student.state_dict(),
                regressors=regressors.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
            )
            log.write(step, row)
            percents = "  ".join(f"{game} {row[f'{game}_percent']:.0f} %" for game in games)
            percents = percents.replace("nan %", "-")  # no score yet, or the expert's is 0
            loss = (means[:, 0] + args.feature_weight * means[:, 1]).mean()  # over the round
            log.line(step, args.steps, f"loss {loss:.3f}  {percents}")
            if stop_asked and step < args.steps:
                print(f"saved; the same command goes on from step {step:,}")
                raise SystemExit(130)  # ended by Ctrl-C: what follows it after && does not start

    print(f"done: {out}/mimic.pt; python evaluate.py --runs {out} measures it")


if __name__ == "__main__":
    common.run(main, Args)
