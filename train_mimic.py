"""Stage 2 of Actor-Mimic: train one network to play the games of all experts, by imitating them.

Section 3 of the paper. The student plays all games at once. On each screen that comes up, that
game's expert says how good every action is (Q-values). A softmax turns these into a policy, and the
student learns to hold the same policy (policy regression) and features from which a linear map
predicts the expert's (feature regression; --feature-weight 0 leaves it out). Here the experts play
first, and the student takes over in the course of the run; in the paper it plays throughout
(--actor student).

    python train_mimic.py --steps 10_000 --out runs/try-mimic  # 1 to 5 minutes
    python train_mimic.py  # two cores: 30 to 45 minutes, without bfloat16 an hour or two;
                           # 87% of the expert in the median game
    python train_mimic.py --out runs/paper-mimic --actor student --feature-weight 0 --steps 25e6
                           # the paper's length and player: three days or more

Output: runs/mimic/ with checkpoint.pt (the same command resumes from it), log.csv, and mimic.pt,
the student's weights alone in half precision. mimics/ holds trained ones.
"""

import math
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


@dataclass
class Args:
    # Run
    experts: tuple = ()  # checkpoints of train_expert.py, one per game (none: all of experts/)
    steps: int = 225_000  # agent decisions in each game, 4 frames each (paper: 25M)
    seed: int = 1  # of the weights, exploration, replay and emulators
    out: str = "runs/mimic"  # folder of the run
    # Network
    channels: tuple = (32, 64, 64)  # kernels 8, 4, 3, 3, strides 4, 2, 1, 1 (as paper)
    hidden: tuple = (512,)  # fully connected layers (as paper)
    norm: str = "linear"  # LayerNorm: after all layers but the last, linear ones, or none (paper)
    # Acting
    num_envs: int = 16  # emulators of each game
    rollout: int = 16  # steps of each environment between two rounds of learning
    actor: str = "both"  # who plays: student (paper), expert (no scores then), both: expert first
    epsilon: float = 0.1  # share of random actions of whoever plays (as paper)
    sticky: float = 0.0  # chance, in each frame, that the last action repeats (as paper)
    # Learning
    objective: str = "policy"  # policy, or q: squared error on Q-values (no temperature)
    temperature: float = 0.3  # of the experts' softmax, in units of q_spread (paper: 1, without it)
    feature_weight: float = 0.03  # of feature regression (paper: 0 with eight games, else 0.01)
    updates: int = 16  # gradient steps per round: each observation is drawn twice (as paper)
    minibatch: int = 32  # observations of each game per gradient step (paper: 8)
    replay: int = 20_000  # observations kept of each game, 0.15 GB (paper: 100_000)
    lr: float = 2e-3  # of RAdam; Muon's, for the hidden weight matrices, is 10 times as large
    decay: float = 0.5  # share of the run, at its end, over which lr falls to zero
    # Machine
    report_every: int = 10_000  # steps between two lines of the log, each with a checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        common.expand_paths(self, "experts", "out")
        common.require(self.out, "--out must name a folder")
        common.require(len(self.channels) <= 4, "--channels takes at most 4 widths")
        common.require_positive(self, "channels", "hidden")
        common.require_one_of("--norm", self.norm, ("all", "linear", "none"))
        common.require_one_of("--objective", self.objective, ("policy", "q"))
        common.require_one_of("--actor", self.actor, ("student", "expert", "both"))
        common.require_positive(self, "steps", "rollout", "updates", "minibatch", "lr")
        common.require_positive(self, "report_every")
        common.require_shares(self, "epsilon", "sticky", "decay")
        common.require_range(self, 1, 10_000, "num_envs")
        common.require_range(self, 0, 1e30, "lr")  # far above, float32 overflows
        common.require_range(self, 1e-6, 1e6, "temperature")  # outside, the softmax is not finite
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require_range(self, 0, 1_000_000, "feature_weight")
        common.require(
            self.updates * self.minibatch <= 100_000,  # 2.8 GB of each game
            "--updates times --minibatch must be at most 100,000",
        )
        common.require(
            self.replay >= 4 * self.num_envs,
            "--replay must hold four observations of every environment",
        )


# The environment


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


# Losses (Section 3 of the paper)


def q_spread(expert_q, legal):
    """How far the Q-values of a state lie apart: (B, 18), (18,) bool -> scalar, at least 1e-6.

    It is the standard deviation over the legal actions, mean over the states. The temperature is a
    multiple of it, because in some games an action matters little and in others much.
    """
    return expert_q[:, legal].std(1, correction=0).mean().clamp(min=1e-6)


def policy_loss(student_logits, expert_q, legal, temperature):
    """Cross-entropy from the expert's softened policy to the student's (eq. 2).

    student_logits, expert_q: (..., 18); legal: bool, and temperature: above 0, broadcast to them;
    returns (...). In train() these are (G, B, 18), (G, 1, 18) and (G, 1, 1). Only the expert's
    Q-values are divided by the temperature (eq. 1). The loss cannot be less than the entropy of
    the expert's policy, so losses of different games or temperatures do not compare.
    """
    expert_policy = F.softmax(expert_q.masked_fill(~legal, -torch.inf) / temperature, -1)
    # Not -inf, as 0 * -inf is not a number.
    log_policy = F.log_softmax(student_logits.masked_fill(~legal, -1e9), -1)
    return -(expert_policy * log_policy).sum(-1)


def q_loss(student_q, expert_q, legal):
    """Mean squared error of the legal Q-values: (..., 18), (..., 18), bool -> (...)."""
    return ((student_q - expert_q).square() * legal).sum(-1) / legal.sum(-1)


def feature_loss(predicted, expert_features):
    """Squared distance of a regressor's output from the expert's features, batch mean (eq. 3).

    predicted, expert_features: (B, F of the expert), summed over F; returns a scalar.
    """
    return (predicted - expert_features).square().sum(1).mean()


# The replay


class FrameReplay:
    """The last steps of num_envs environments of one game, with what the expert said of them.

    Each frame is kept once, in (steps, num_envs, 84, 84) uint8. A stack of four is rebuilt when it
    is drawn, with black frames before the first of an episode, as the emulator has it.
    """

    def __init__(self, steps, num_envs, features):
        self.frames = torch.zeros((steps, num_envs, 84, 84), dtype=torch.uint8)
        # How many earlier frames of its episode a frame has, at most 3.
        self.age = torch.zeros((steps, num_envs), dtype=torch.int64)
        self.q_values = torch.zeros((steps, num_envs, 18))
        self.features = torch.zeros((steps, num_envs, features), dtype=torch.half)  # less memory
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
        env = torch.randint(self.frames.shape[1], (count,), generator=rng)
        slot = step % len(self.frames)
        back = torch.arange(3, -1, -1)  # the newest frame comes last
        slots = (step[:, None] - back) % len(self.frames)  # (count, 4)
        # Rows of the flattened buffer. Those before an episode's first frame are blacked out below.
        rows = slots * self.frames.shape[1] + env[:, None]  # (count, 4)
        # index_select is faster on a CPU than indexing with [slots, env].
        obs = self.frames.flatten(0, 1).index_select(0, rows.flatten()).view(count, 4, 84, 84)
        obs *= (back <= self.age[slot, env][:, None])[:, :, None, None]
        return obs, self.q_values[slot, env], self.features[slot, env].float()


# Training


# The network that learns. For another architecture write `class MyNet(nn.Module)` above this line,
# and `Student = MyNet` here: the experts are still read with AtariNet, and evaluate.py finds your
# class by its name. It takes net_args of train(), and maps obs (B, 4, 84, 84) uint8 to logits
# (B, 18) and features (B, F): return both with .float(), since autocast may compute in bfloat16.
Student = AtariNet


def load_expert(path):
    """Return an expert's checkpoint, a dict, and its network; raises UserError if path has none."""
    expert = common.load_checkpoint(path, ("expert", "transfer"))
    return expert, common.make_network(AtariNet, expert, path)


def train(args, run):
    """Train the mimic; run: its folder, with checkpoint, log and Ctrl-C (common.Run)."""
    # Set up: experts, student, optimizer, and where the run was when it stopped.
    device = common.pick_device(args.device)
    autocast = common.pick_autocast(args.precision, device)
    paths = [str(Path(path)) for path in args.experts or sorted(Path("experts").glob("*.pt"))]
    if not paths:
        raise common.UserError(
            "no experts/ here: name checkpoints of train_expert.py with --experts"
        )
    experts, expert_nets = zip(*[load_expert(path) for path in paths])
    games = [expert["games"][0] for expert in experts]
    if len(set(games)) < len(games):
        raise common.UserError(f"two experts for one game: {', '.join(games)}")
    # An expert that was trained again has other steps or minutes.
    marks = [[expert["step"], expert["minutes"]] for expert in experts]
    net_args = {"channels": list(args.channels), "hidden": list(args.hidden), "norm": args.norm}
    G, T, N = len(games), args.rollout, args.num_envs
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)  # explores, draws and seeds the emulators
    legal = torch.stack([legal_actions(game) for game in games])[:, None]  # (G, 1, 18)
    legal_of_all = legal.expand(G, N, 18).flatten(0, 1)  # (G*N, 18), of all environments
    masks = legal.to(device)
    memory_format = common.memory_format(device)
    expert_nets = [net.to(device, memory_format=memory_format) for net in expert_nets]
    student = Student(**net_args).to(device, memory_format=memory_format)
    example = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    common.check_device(student, example)
    # One linear map per game, from the student's features to the expert's.
    with torch.no_grad():
        width = student(example.to(device))[1].shape[1]
    expert_widths = [expert["net_args"]["hidden"][-1] for expert in experts]
    regressors = nn.ModuleList(nn.Linear(width, expert_width) for expert_width in expert_widths)
    regressors.to(device)
    weights = [*student.parameters(), *regressors.parameters()]
    # Paper: a variant of Adam. Here Muon, whose loss is lower after as many steps.
    optimizer = common.Muon(student, regressors, lr=args.lr, times=10, autocast=autocast)
    step, scores = 0, [deque(maxlen=30) for _ in games]  # of the student's last finished episodes
    if run.saved:
        saved_setup = run.saved["games"], run.saved["marks"], run.saved["network"]
        if saved_setup != (games, marks, Student.__name__):
            raise common.UserError(
                f"{run.folder} holds a mimic of other experts, or another Student, for "
                f"{', '.join(saved_setup[0])}; name another --out"
            )
        common.load_state(run.saved, student, optimizer, rng, run.folder)
        common.load_weights(regressors, run.saved, run.folder, "regressors")
        step = run.saved["step"]
        scores = [deque(recent, maxlen=30) for recent in run.saved["scores"]]
        if step >= args.steps:
            print(f"{run.folder} has finished; with more --steps it would resume")
            return

    # Set up: replays and emulators.
    replays = [FrameReplay(args.replay // N, N, expert_width) for expert_width in expert_widths]
    run.start(device, autocast, student, sum(replay.frames.nbytes for replay in replays))
    print(f"{G} games: {', '.join(games)}; {args.updates} updates every {T * N:,} steps of each")
    envs, resets = [], []
    for game in games:
        common.show(f"starting emulators, {N} of each game: {len(envs)} of {G} games", keep=False)
        envs.append(make_envs(game, N, args.sticky))
        seeds = torch.randint(2**31 - 1, (N,), generator=rng).numpy()
        resets.append(envs[-1].reset(seed=seeds))
    obs = torch.stack([torch.from_numpy(first) for first, _ in resets])  # (G, N, 4, 84, 84)
    frame = np.stack([info["episode_frame_number"] for _, info in resets])  # (G, N)
    age, returns = torch.zeros((G, N), dtype=torch.int64), np.zeros((G, N))
    K = 0  # environments of each game that the student plays

    while step < args.steps:
        # Who plays. The student has the first environments of each game, by and by more of them.
        # Paper: it has all; here its share grows from 0 to 1, as in DAgger (Ross et al., 2011).
        share = {"student": 1, "both": step / args.steps, "expert": 0}[args.actor]
        last_K, K = K, math.ceil(N * share)
        if K > last_K:  # A new episode begins where it takes over: so every score is of one player.
            taken = (np.arange(N) >= last_K) & (np.arange(N) < K)
            for g, env in enumerate(envs):
                new_obs, info = env.reset(options={"reset_mask": taken})
                obs[g], frame[g] = torch.from_numpy(new_obs), info["episode_frame_number"]
            age[:, taken], returns[:, taken] = 0, 0

        # Act, T steps in all environments of all games, and ask the experts about each observation.
        # One autocast for all steps: it rounds the weights to bfloat16 only once. It would round
        # those of frozen networks (requires_grad_(False)) at each call.
        with torch.no_grad(), autocast:
            for t in range(T):
                device_obs = obs.to(device)
                # Q-values of the experts, and logits instead where the student plays: (G, N, 18).
                values = torch.zeros(G, N, 18, device=device)
                for g, net in enumerate(expert_nets):
                    values[g], expert_features = net(device_obs[g])  # (N, 18), (N, F of the expert)
                    replays[g].add(obs[g], age[g], values[g].cpu(), expert_features.cpu())
                if K:
                    logits, _ = student(device_obs[:, :K].flatten(0, 1))  # (G*K, 18)
                    values[:, :K] = logits.view(G, K, 18)
                actions = act(values.flatten(0, 1).cpu(), legal_of_all, args.epsilon, rng)  # (G*N,)
                for env, action in zip(envs, actions.view(G, N).numpy()):
                    env.send(action)
                # Receive only after all are sent, so that the games step at the same time.
                next_obs, reward, _, _, infos = zip(*(env.recv() for env in envs))
                obs = torch.from_numpy(np.stack(next_obs))  # (G, N, 4, 84, 84)
                last_frame = frame
                frame = np.stack([info["episode_frame_number"] for info in infos])
                began = new_episode(frame, last_frame)
                age = torch.where(torch.from_numpy(began), 0, (age + 1).clamp(max=3))
                returns += np.stack(reward)
                for g in range(G):
                    scores[g].extend(returns[g, :K][began[g, :K]].tolist())
                returns[began] = 0

        # After a resume, first refill the replays (all hold as much), without counting steps: a few
        # beginnings of episodes would mislead.
        if N * replays[0].added < min(step, N * len(replays[0].frames)) and not run.stop.asked:
            common.show(f"refilling the replay: {N * replays[0].added:,} of each game", keep=False)
            continue

        # Learn to agree with the experts, from equally many observations of each game.
        # Paper: a constant rate, and 10,000 steps are played before the first update.
        lr = args.lr * min(1, (args.steps - step) / max(args.decay * args.steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # From all of the replay: of one minibatch alone the temperature would be noisy.
        spreads = [
            q_spread(replay.q_values[: replay.added].flatten(0, 1), game_legal[0]).item()
            for replay, game_legal in zip(replays, legal)
        ]
        # (G, 1, 1)
        temperature = args.temperature * torch.tensor(spreads, device=device).view(G, 1, 1)
        # All minibatches at once, 28 KB an observation, which is faster than one by one.
        samples = [replay.draw(args.updates * args.minibatch, rng) for replay in replays]
        sample_obs, sample_q, sample_features = zip(*samples)  # each holds a tensor of every game
        # (G, 3): imitation loss, feature loss and agreement, means over the updates.
        averages = torch.zeros(G, 3, device=device)
        for first in range(0, args.updates * args.minibatch, args.minibatch):
            batch = slice(first, first + args.minibatch)
            with autocast:
                logits, features = student(torch.cat([x[batch] for x in sample_obs]).to(device))
            logits = logits.view(G, args.minibatch, 18)
            expert_q = torch.stack([q[batch] for q in sample_q]).to(device)  # (G, minibatch, 18)
            if args.objective == "policy":
                imitation = policy_loss(logits, expert_q, masks, temperature).mean(1)  # (G,)
            else:
                imitation = q_loss(logits, expert_q, masks).mean(1)
            distances = []
            for g, own_features in enumerate(features.chunk(G)):  # (minibatch, F)
                expert_features = sample_features[g][batch].to(device)
                distances.append(feature_loss(regressors[g](own_features), expert_features))
            distance = torch.stack(distances)  # (G,)
            # Paper: the sum over the games; here the mean, easier to compare; Muon ignores scale.
            loss = (imitation + args.feature_weight * distance).mean()  # eq. 4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            student_choice = logits.masked_fill(~masks, -torch.inf).argmax(2)  # (G, minibatch)
            expert_choice = expert_q.masked_fill(~masks, -torch.inf).argmax(2)
            agreement = (student_choice == expert_choice).float().mean(1)
            averages += torch.stack([imitation, distance, agreement], 1).detach() / args.updates
        step += T * N
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in weights])
        common.check_finite(loss + grad_norm, step, run.folder)

        # Report, once in a while: save, then write to the log.
        round_loss = (averages[:, 0] + args.feature_weight * averages[:, 1]).mean()
        run.progress(step, f"loss {round_loss:.3f}")
        if run.due(step):
            row, percents = {"lr": lr}, []
            for g, game in enumerate(games):
                recent, goal = common.mean(scores[g]), experts[g]["score"]
                imitation, distance, agreement = averages[g].tolist()
                # A hint only: both are scores of training, with its random actions.
                percents.append(100 * recent / goal if goal > 0 else math.nan)
                row |= {
                    f"{game}_score": recent,
                    f"{game}_percent": percents[g],
                    # Share of the last round's draws on which both prefer the same action.
                    f"{game}_agreement": agreement,
                    f"{game}_{args.objective}_loss": imitation,
                    # With weight 0 the linear maps never learn: how far off they are says nothing.
                    f"{game}_feature_loss": distance if args.feature_weight else math.nan,
                    f"{game}_spread": spreads[g],
                }
            contents = {
                "games": games,
                "experts": paths,
                "marks": marks,
                "step": step,
                "network": Student.__name__,
                "net_args": net_args,
                "score": [common.mean(recent) for recent in scores],
                "scores": [list(recent) for recent in scores],
            }
            # Weights first: where checkpoint.pt says that all is done, they exist.
            run.save("mimic.pt", **contents, net=common.half(student))
            run.save(
                "checkpoint.pt",
                **contents,
                net=student.state_dict(),
                regressors=regressors.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
            )
            scored = {game: p for game, p in zip(games, percents) if not math.isnan(p)}
            text = f"loss {round_loss:.3f}"
            if scored:
                worst, median = min(scored, key=scored.get), np.median(list(scored.values()))
                text += f"  {len(scored)} of {G} games: median {median:.0f}%, "
                text += f"worst {worst} {scored[worst]:.0f}%"
            run.report(step, row, text)

    print(f"done: {run.folder}/mimic.pt; python evaluate.py --runs {run.folder} measures it")


def main(args):
    with common.Run(args.out, "mimic", args) as run:
        train(args, run)


if __name__ == "__main__":
    common.cli(main, Args)
