"""The ruler: measure checkpoints of any stage on whole games, and make the tables and pictures.

A score is the raw return of a whole game, played with epsilon 0.05 after 0 to 29 no-ops, and cut at
108,000 frames. Each lane plays one game, or short games would count more often than long ones.

    python evaluate.py --runs runs/mimic                          # the mimic beside its experts
    python evaluate.py --runs experts/*.pt --sticky 0 0.25        # sticky actions beside none
    python evaluate.py --runs experts/*.pt --random               # chance beside them
    python evaluate.py --curves runs/transfer-*/log.csv           # learning curves
    python evaluate.py --runs runs/mimic --games 0 --gif          # only a film of all its games

Output: the table, also as results/table.csv; bars in table.png, learning curves in
table-curves.png, the film in table.gif. --out and --name choose another folder and another name.
Of each curve it prints the mean over the run, and the end.
Networks and logs whose names differ only in -s<seed> are seeds of one thing, and get an interval
over seeds (curves: of three or more).
"""

import csv
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: it sets what torch reads when it loads

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from matplotlib import animation, rcParams, ticker
from matplotlib.figure import Figure
from torch import nn

# Scores of a random player and of a human (no-op starts; the set of DQN Zoo and most papers since
# 2016, not that of DQN's own), and of DQN (Mnih et al., 2015).
REFERENCE = {
    "assault": (222.4, 742.0, 3359),
    "atlantis": (12850.0, 29028.1, 85641),
    "beam_rider": (363.9, 16926.5, 6846),
    "boxing": (0.1, 12.1, 71.8),
    "breakout": (1.7, 30.5, 401.2),
    "crazy_climber": (10780.5, 35829.4, 114103),
    "demon_attack": (152.1, 1971.0, 9711),
    "enduro": (0.0, 860.5, 301.8),
    "fishing_derby": (-91.7, -38.7, -0.8),
    "freeway": (0.0, 29.6, 30.3),
    "gopher": (257.6, 2412.5, 8520),
    "kangaroo": (52.0, 3035.0, 6740),
    "krull": (1598.0, 2665.5, 3805),
    "ms_pacman": (307.3, 6951.6, 2311),
    "name_this_game": (2292.3, 8049.0, 7257),
    "pong": (-20.7, 14.6, 18.9),
    "qbert": (163.9, 13455.0, 10596),
    "road_runner": (11.5, 7845.0, 18257),
    "robotank": (2.2, 11.9, 51.6),
    "seaquest": (68.4, 42054.7, 5286),
    "space_invaders": (148.0, 1668.7, 1976),
    "star_gunner": (664.0, 10250.0, 57997),
    "video_pinball": (16256.9, 17667.9, 42684),
}

# The paper's Table 1: mean score of its expert (DQN), and of its one network for all games (AMN).
PAPER = {
    "atlantis": (57279, 165065),
    "boxing": (81.47, 76.264),
    "breakout": (273.15, 347.01),
    "crazy_climber": (96189, 57070),
    "enduro": (457.60, 499.3),
    "pong": (19.581, 15.275),
    "seaquest": (4278.9, 1177.3),
    "space_invaders": (1669.2, 1142.4),
}

rcParams["text.parse_math"] = False  # a $ in the name of a run is no formula

# Half-widths of a 95 % interval of a mean, in standard errors, by number of seeds (Student's t).
STUDENT_T = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
MEDIAN = "median of all games"  # a panel of the curves, beside those of games
PAPERS = "paper's, of its own experts"  # a bar of each game


@dataclass(frozen=True)
class Args:
    runs: tuple = ()  # checkpoints, or folders of runs, of any stage
    curves: tuple = ()  # logs, or folders of runs; names that differ only in -s<seed> are one curve
    games: int = 30  # plays of each game by each network, one on each lane; 0: no table
    epsilon: float = 0.05  # share of random actions, as in the paper's tests
    sticky: tuple = (0.0,)  # chance per frame that the last action repeats; several: a column each
    seed: int = 1  # of exploration and emulators
    random: bool = False  # also measure a random policy on every game
    gif: bool = False  # also film the first network, all its games side by side
    film: int = 160  # steps in the film of --gif, 15 a second
    film_after: int = 300  # steps played before the film begins
    out: str = "results"  # folder of tables and pictures
    name: str = "table"  # their names begin with this
    device: str = "auto"  # auto, cpu, cuda or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        common.require(self.runs or self.curves, "name checkpoints in --runs or logs in --curves")
        common.require(self.runs or not (self.random or self.gif), "--random and --gif need --runs")
        taken = self.random and Path("random") in map(Path, self.runs)
        common.require(not taken, "the row of --random would hide the run named random: rename it")
        common.require_range(self, 0, 1_000, "games")  # an emulator for each takes 0.2 s to start
        idle = self.random or (self.runs and not self.gif)
        common.require(self.games or not idle, "--games 0 plays none: it needs --gif, not --random")
        common.require_range(self, 1, 2_000, "film")  # 0.3 MB of memory a step and game
        plain = self.out and self.name and Path(self.name).name == self.name
        common.require(plain, "--out must name a folder, and --name a file without its folder")
        common.require_shares(self, "epsilon")
        shares = self.sticky and 0 <= min(self.sticky) and max(self.sticky) <= 1
        common.require(shares, "--sticky must lie between 0 and 1")
        common.require_range(self, 0, 2**31 - 1, "seed")
        common.require_range(self, 0, 10_000, "film_after")


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


def play(net, game, sticky, args, device, autocast, expert=None):
    """Play `args.games` whole games side by side: scores, (games,) float64, and a dict of columns.

    net: an AtariNet, or None for a random policy. Columns, of the pictures that it meets, nan
    without an expert: the share on which both prefer the same action, and the value that its
    choices lose, as its expert's Q-values have it, in per cent of what random ones would lose.
    """
    # An emulator for each lane, so that those whose game is over rest while the others play on.
    envs, legal = [make_envs(game, 1, sticky) for _ in range(args.games)], legal_actions(game)
    rng = torch.Generator().manual_seed(args.seed)
    seeds = torch.randint(2**31 - 1, (args.games,), generator=rng).tolist()
    starts = [env.reset(seed=seed) for env, seed in zip(envs, seeds)]
    obs = np.concatenate([obs for obs, _ in starts])
    frame = np.concatenate([info["episode_frame_number"] for _, info in starts])
    scores, playing = np.zeros(args.games), np.ones(args.games, dtype=bool)
    logits = torch.zeros(args.games, 18)
    met, judged = 0, np.zeros(3)
    while playing.any():
        if net is not None:
            active = torch.from_numpy(playing)
            with torch.inference_mode(), autocast:
                pictures = torch.from_numpy(obs[playing]).to(device)
                logits[active] = net(pictures)[0].cpu()
                if expert is not None:
                    met += len(pictures)
                    judged += judge(logits[active], expert(pictures)[0].cpu(), legal)
        actions = act(logits, legal, args.epsilon if net is not None else 1.0, rng).numpy()
        lanes = np.flatnonzero(playing)
        for lane in lanes:
            envs[lane].send(actions[lane : lane + 1])
        # Received after all were sent: so the lanes step at the same time.
        for lane in lanes:
            obs[lane : lane + 1], reward, _, _, info = envs[lane].recv()
            scores[lane] += reward[0]
            next_frame = info["episode_frame_number"][0]
            playing[lane] = next_frame > frame[lane]  # it falls when the next game begins
            frame[lane] = next_frame
    agreed, lost, at_random = judged
    return scores, {
        "% agreement": 100 * agreed / met if met else math.nan,
        "% value lost": 100 * lost / at_random if at_random else math.nan,
    }


def judge(scores, expert_q, legal):
    """Compare a network's choices with its expert's: (B, 18), (B, 18), (18,) bool -> (3,) float64.

    Sums over the states: 1 where both choose the same action; of the expert's values
    Q(s, best) - Q(s, chosen); and the mean of that over all legal actions. Discounted and summed
    over a life, the second is on average the gap between the network's return of clipped rewards
    and the expert's, if the Q-values are right (performance difference lemma, Kakade and Langford,
    2002).
    """
    choice = scores.masked_fill(~legal, -torch.inf).argmax(1, keepdim=True)
    top, best = expert_q.masked_fill(~legal, -torch.inf).max(1, keepdim=True)
    lost, at_random = top - expert_q.gather(1, choice), top - expert_q[:, legal]
    figures = (choice == best).sum(), lost.sum(), at_random.mean(1).sum()
    return np.array([figure.item() for figure in figures])


def interquartile_mean(values):
    """Mean of the middle half of the values."""
    values = np.sort(np.ravel(values))
    cut = len(values) // 4
    return values[cut : len(values) - cut].mean()


def percent(own, base):
    """Scores in per cent of a mean: (games, seeds, plays), (games, 1, plays) -> shape of own."""
    return 100 * own / base.mean((1, 2), keepdims=True)


def resample(scores, rng):
    """Draw with replacement the seeds, for all games alike, and the plays of each game and seed.

    (games, seeds, plays) -> the same shape.
    """
    games, seeds, plays = scores.shape
    seed = rng.integers(seeds, size=(1, seeds, 1))
    play = rng.integers(plays, size=scores.shape)
    return scores[np.arange(games)[:, None, None], seed, play]


def bootstrap(statistic, own, base, resamples=2_000):
    """Return statistic(percent(own, base)) and the two ends of its 95 % interval.

    The interval is a bootstrap that resamples both. Of fewer than some ten seeds it is too narrow.
    """
    rng = np.random.default_rng(0)
    draws = [statistic(percent(resample(own, rng), resample(base, rng))) for _ in range(resamples)]
    return statistic(percent(own, base)), *np.percentile(draws, [2.5, 97.5])


def load_networks(args, device):
    """Read the checkpoints of `--runs`, and the experts of each mimic if they are still there.

    Returns {label: (net, games)}, net being None for the random policy, and {label: {game: label of
    the expert that this network is compared with}}: a mimic's own, for others the only one read.
    """
    networks, experts, own, seeds = {}, {}, {}, {}
    paths = list(dict.fromkeys(str(Path(path)) for path in args.runs))  # a/ is a, and read once
    for path in paths:  # grows: a mimic adds its experts
        checkpoint = common.load_checkpoint(path, ("expert", "mimic", "transfer"))
        net = AtariNet(**checkpoint["net_args"]).to(device, memory_format=torch.channels_last)
        common.load_weights(net, checkpoint, path)
        games = checkpoint["games"]
        networks[path] = net, games
        # Seeds of one thing get an interval, which of one run twice would mean nothing.
        other = seeds.setdefault((without_seed(path), checkpoint["args"].get("seed")), path)
        if other != path:
            print(f"warning: {other} and {path} have the same seed", file=sys.stderr)
        if checkpoint["stage"] == "expert":
            experts.setdefault(games[0], []).append(path)
        if checkpoint["stage"] == "mimic":
            own[path] = find_teachers(checkpoint)
            paths += [teacher for teacher in own[path].values() if teacher not in paths]
    if args.random:
        played = {game for _, games in networks.values() for game in games}
        networks["random"] = None, sorted(played)
    # Of several experts of one game none is the measure: seeds would be in per cent of the first.
    only = {game: labels[0] for game, labels in experts.items() if len(labels) == 1}
    return networks, {label: own.get(label, only) for label in networks}


def find_teachers(mimic):
    """Return {game: path} of a mimic's experts that are still there and have not changed since."""
    teachers = {}
    for game, path, mark in zip(mimic["games"], mimic["experts"], mimic["marks"]):
        try:
            expert = common.load_checkpoint(path, ("expert",))
            if [expert["step"], expert["minutes"]] == mark:
                teachers[game] = path
        except common.UserError:
            pass
        if game not in teachers:
            why = f"{path} is not in this folder, or has changed since"
            print(f"{why}: {game} has no expert to be compared with", file=sys.stderr)
    return teachers


def make_rows(results, expert_of):
    """Turn {label: {game: scores}} into the table: one dict per network and game."""
    rows = []
    for label, by_game in results.items():
        for game, scores in by_game.items():
            random, human, dqn = REFERENCE.get(game, (math.nan,) * 3)
            paper_dqn, paper_amn = PAPER.get(game, (math.nan,) * 2)
            teacher = expert_of[label].get(game)
            expert = results[teacher][game].mean() if teacher else math.nan
            rows.append(
                {
                    "network": label,
                    "game": game,
                    "mean": scores.mean(),
                    "expert": expert,
                    "% expert": 100 * scores.mean() / expert if expert > 0 else math.nan,
                    "std": scores.std(),
                    "max": scores.max(),
                    "games": len(scores),
                    "% human": 100 * (scores.mean() - random) / (human - random),
                    "random": random,
                    "human": human,
                    "dqn_2015": dqn,
                    "paper_dqn": paper_dqn,
                    "paper_amn": paper_amn,
                }
            )
    return rows


def print_table(rows):
    """Print the rows in columns."""

    def show(value):
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.1f}"
        return str(value)

    lines = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        print("  ".join(left + right))


def without_seed(name):
    """Cut the -s<seed> off the name of a run: seeds of the same thing get the same name."""
    return re.sub(r"-s\d+(?=$|[./\\])", "", name)


def group_seeds(results, expert_of):
    """Return [(name, labels)]: networks whose names differ only in -s<seed> are one group.

    They have to play the same games and to be compared with the same experts.
    """
    groups = {}
    for label, by_game in results.items():
        teachers = frozenset((game, expert_of[label].get(game)) for game in by_game)
        groups.setdefault((without_seed(label), teachers), []).append(label)
    return [
        (f"{name} ({len(labels)} seeds)" if len(labels) > 1 else labels[0], labels)
        for (name, _), labels in groups.items()
    ]


def print_summary(results, expert_of):
    """Print the median and interquartile mean of each group of several seeds or games.

    Scores are in per cent of the experts' mean scores, or normalised with random and human scores:
    100 * (score - random) / (human - random). The median is over the games' means, the
    interquartile mean over all single scores. Intervals resample the seeds, the games they played
    and those of the experts.
    """
    for name, labels in group_seeds(results, expert_of):
        games, teachers = list(results[labels[0]]), expert_of[labels[0]]
        own = np.array([[results[label][game] for label in labels] for game in games])
        if len(games) * len(labels) < 2 or own.shape[2] < 2:
            continue
        if all(game in teachers for game in games):
            experts = np.array([[results[teachers[game]][game]] for game in games])
            # Percentages of an expert near 0 are nonsense: four standard errors above it, next to
            # no resample of its games has a mean of 0 or less.
            error = experts.std((1, 2)) / math.sqrt(experts.shape[2])
            if (experts.mean((1, 2)) > 4 * error).all():
                print_middle(f"{name}, per cent of expert", own, experts)
                for g, game in enumerate(games if len(labels) > 1 else []):
                    interval = bootstrap(np.mean, own[g : g + 1], experts[g : g + 1])
                    print(f"  {game}: {show_interval(interval)}")
        if all(game in REFERENCE for game in games):
            low, high, _ = np.array([REFERENCE[game] for game in games]).T[:, :, None, None]
            print_middle(f"{name}, per cent of human", own - low, high - low)


def print_middle(title, own, base):
    """Print median and interquartile mean of percent(own, base)."""
    median = bootstrap(lambda scores: np.median(scores.mean((1, 2))), own, base)
    middle = bootstrap(interquartile_mean, own, base)
    text = f"median {show_interval(median)}, interquartile mean {show_interval(middle)}"
    print(f"{title}: {text}")


def show_interval(interval):
    """Write a value and its interval: (value, low, high) -> text."""
    return "{:.1f} (95 % interval {:.1f} to {:.1f})".format(*interval)


def write_csv(rows, path):
    """Write the rows, numbers to six digits."""
    text = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of runs may hold any byte
    with common.whole_file(path) as temporary, open(temporary, "w", newline="", **text) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())


def draw_bars(rows, groups, expert_of, path):
    """Draw the scores of all networks that are not experts in per cent of the expert, per game.

    Seeds of one thing are one bar, their mean, and a dot each; a dotted line goes on from the first
    bar, to compare the others with it. Where all the paper's games are there, its network stands
    beside them, in per cent of its own experts. Without such networks, or without experts to
    compare them with, scores are in per cent of a human's. Without those either, it draws nothing
    and returns False.
    """
    students = [row for row in rows if row["network"] != expert_of[row["network"]].get(row["game"])]
    if all(row["network"] == "random" for row in students):
        students = []  # then the experts themselves are what is shown
    unit = "% human" if all(math.isnan(row["% expert"]) for row in students) else "% expert"
    rows = [row for row in students or rows if not math.isnan(row[unit])]
    if not rows:
        return False
    games = list(dict.fromkeys(row["game"] for row in rows))
    if unit == "% expert" and PAPER.keys() <= set(games):
        for game, (dqn, amn) in PAPER.items():
            rows.append({"network": PAPERS, "game": game, "mean": amn, unit: 100 * amn / dqn})
    name_of = {label: name for name, labels in groups for label in labels}
    if not students:
        experts = {label for by_game in expert_of.values() for label in by_game.values()}
        name_of |= dict.fromkeys(experts, "its expert")
    bars = {game: {} for game in games}  # {game: {name: rows of its seeds}}
    for row in rows:
        name = name_of.get(row["network"], row["network"])
        bars[row["game"]].setdefault(name, []).append(row)
    names = list(dict.fromkeys(name for mine in bars.values() for name in mine))
    lines = math.ceil(len(games) / 4)
    columns = math.ceil(len(games) / lines)
    size = 3 + 2.3 * columns, lines * (0.7 + 0.22 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels[len(games) :]:
        panel.axis("off")
    for panel, game in zip(panels, games):
        for name, seeds in bars[game].items():
            place, percents = names.index(name), [row[unit] for row in seeds]
            panel.barh(place, np.mean(percents), color="C1" if name == PAPERS else "C0")
            if len(seeds) > 1:
                panel.plot(percents, [place] * len(seeds), ".", color="black", markersize=4)
            mean = np.mean([row["mean"] for row in seeds])
            score = f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.1f}"
            end, text = (max(0, *percents), place), f"{np.mean(percents):.0f} % ({score})"
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0}
            beside = {"xytext": (3, -2.5), "textcoords": "offset points"}
            panel.annotate(text, end, **beside, fontsize=7, bbox=white)
            if place == 0 and len(names) > 2:
                panel.axvline(np.mean(percents), color="C0", linewidth=0.8, linestyle="dotted")
        panel.axvline(100, color="grey", linewidth=0.8)
        panel.set_title(game.replace("_", " "), fontsize=10)
        panel.set_yticks(range(len(names)), [name.removeprefix("runs/") for name in names])
        panel.tick_params(labelsize=8)
    panel.margins(x=0.55)
    panel.invert_yaxis()
    figure.supxlabel(f"{unit} (score)", fontsize=9)
    save_figure(figure, path)
    return True


def save_figure(figure, path):
    """Write a figure, whole or not at all."""
    with common.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def read_log(path):
    """Read a log as {column: (rows,) float array}; raises UserError if it is missing or no log."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        log = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    except (OSError, ValueError, TypeError, IndexError, csv.Error):
        log = {}
    if not {"step", "minutes"} <= log.keys() or not any(name.endswith("_score") for name in log):
        raise common.UserError(f"{path} is missing, empty, or no log of this project")
    return log


def group_curves(paths):
    """Read logs as {game: {label: [(steps, scores, goal), ...]}}, with one label for all seeds.

    goal is the training score of a mimic's expert, and nan in the logs of other stages. What a
    mimic has of its experts in the median game stands under MEDIAN, as (minutes, per cent, 100).
    A run is named by its folder, or its file: expert-<game>, mimic, transfer-<game>-<arm>-s<seed>.
    """
    groups, named = {}, {}
    paths = [Path(path).resolve() for path in paths]
    for path in dict.fromkeys(path / "log.csv" if path.is_dir() else path for path in paths):
        log, name = read_log(path), path.parent.name if path.stem == "log" else path.stem
        name = name.removesuffix("-log")  # results/mimic-s1-log.csv is the log of mimic-s1
        if named.setdefault(name, path) != path:
            raise common.UserError(f"{path} and {named[name]} are both named {name}: rename one")
        label = without_seed(name)
        for column in [column for column in log if column.endswith("_score")]:
            game = column.removesuffix("_score")
            percent = log.get(f"{game}_percent", np.zeros(len(log[column])))
            known = percent > 0
            goal = 100 * log[column][known][-1] / percent[known][-1] if known.any() else math.nan
            curve = log["step"], log[column], goal
            groups.setdefault(game, {}).setdefault(label, []).append(curve)
        percents = [values for column, values in log.items() if column.endswith("_percent")]
        if len(percents) > 1:
            curve = log["minutes"], np.median(percents, 0), 100.0  # nan until each has a score
            groups.setdefault(MEDIAN, {}).setdefault(label, []).append(curve)
    return groups


def half_width(values):
    """Half the 95 % interval (Student's t) of a mean of 3 seeds or more: (seeds, ...) -> (...)."""
    return STUDENT_T.get(len(values), 2.26) * values.std(0, ddof=1) / math.sqrt(len(values))


def mean_over_run(steps, scores):
    """Mean of a curve over its steps, from its first score on: (T,), (T,) -> float, or nan."""
    known = ~np.isnan(scores)
    steps, scores = steps[known], scores[known]
    return np.trapezoid(scores, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else math.nan


def print_curves(groups):
    """Print each curve's mean over the run, more where learning is early, and its last score.

    groups: as of group_curves. Three seeds or more have 95 % intervals.
    """
    for game, curves in groups.items():
        for label, seeds in curves.items() if game != MEDIAN else ():  # that one is over minutes
            ends = np.array([(mean_over_run(x, y), y[-1]) for x, y, _ in seeds])
            if np.isnan(ends).any():
                continue  # a seed that has no two scores yet
            means = ends.mean(0)
            over, end = (f"{mean:.1f}" for mean in means)
            if len(seeds) > 2:
                half = half_width(ends)
                over, end = map(show_interval, zip(means, means - half, means + half))
            name = f"{label} ({len(seeds)} seeds)" if len(seeds) > 1 else label
            last = [x[-1] for x, _, _ in seeds]
            if min(last) < max(last):  # they do not compare
                name += f", after {min(last):,.0f} to {max(last):,.0f} steps"
            print(f"{game}, {name}: {over} over the run, {end} at its end")


def draw_curves(groups, path):
    """Draw score against steps, a panel per game; seeds are thin lines, their mean is a thick one.

    Three seeds or more have its 95 % interval, too. The mean is drawn where all seeds have a score.
    """
    lines = math.ceil(len(groups) / 4)
    columns = math.ceil(len(groups) / lines)
    figure = Figure(figsize=(4.5 * columns, 3.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(groups) :]:
        panel.axis("off")
    shown = []  # the legend of the panel before
    for panel, (game, curves) in zip(panels, groups.items()):
        for label, seeds in curves.items():
            steps = max((steps for steps, _, _ in seeds), key=len)
            scores = np.stack([np.interp(steps, x, y, np.nan, np.nan) for x, y, _ in seeds])
            name = label.removesuffix(f"-{game}")  # expert-pong: the title says pong
            name = f"{name} ({len(seeds)} seeds)" if len(seeds) > 1 else name
            (line,) = panel.plot(steps, scores.mean(0), label=name)
            if len(seeds) > 1:
                for x, y, _ in seeds:
                    panel.plot(x, y, color=line.get_color(), linewidth=0.5)
            if len(seeds) > 2:  # that of two seeds would be 13 standard errors wide
                half = half_width(scores)
                low, high = scores.mean(0) - half, scores.mean(0) + half
                panel.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
        goals = {goal for seeds in curves.values() for _, _, goal in seeds if not math.isnan(goal)}
        if goals:
            label = "its expert, in training"
            panel.axhline(max(goals), color="grey", linestyle="dotted", label=label)
        elif game in PAPER and PAPER[game][0] < 3 * panel.dataLim.y1:  # far above, it flattens all
            label = "paper's expert, at its end"
            panel.axhline(PAPER[game][0], color="grey", linestyle="dashed", label=label)
        x, y = ("minutes", "% of the expert") if game == MEDIAN else ("steps", "score in training")
        panel.set(title=game.replace("_", " "), xlabel=x, ylabel=y)
        _, names = panel.get_legend_handles_labels()
        if names != shown:  # else it would repeat that of the panel before
            panel.legend(fontsize=8)
        shown = names
        panel.locator_params(nbins=5)
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 100k, 2M
    save_figure(figure, path)


def record(net, game, args, device, autocast):
    """Film `args.film` steps after the first `args.film_after`: colour pictures and scores."""
    envs, legal = make_envs(game, 1, args.sticky[0]), legal_actions(game)
    # A second emulator with the same seed and the same actions shows the same game in colour.
    colour = AtariVectorEnv(
        game,
        1,
        full_action_space=True,
        autoreset_mode=AutoresetMode.SAME_STEP,
        repeat_action_probability=args.sticky[0],
        grayscale=False,
        img_height=210,
        img_width=160,
        stack_num=1,
    )
    rng = torch.Generator().manual_seed(args.seed)
    obs, info = envs.reset(seed=args.seed)
    colour.reset(seed=args.seed)
    pictures, scores, total = [], [], 0
    for t in range(args.film_after + args.film):
        with torch.inference_mode(), autocast:
            logits = net(torch.from_numpy(obs).to(device))[0].cpu()
        action = act(logits, legal, args.epsilon, rng).numpy()
        frame = info["episode_frame_number"]
        obs, reward, _, _, info = envs.step(action)
        picture, total = colour.step(action)[0][0, 0], total + int(reward[0])
        if t >= args.film_after:
            pictures.append(picture)
            scores.append(total)
        if info["episode_frame_number"] < frame:  # a new game begins
            total = 0
    return pictures, scores


def write_gif(films, path):
    """Write a GIF of several games side by side; films: {game: (pictures, scores)}."""
    columns = min(len(films), 4)
    lines = math.ceil(len(films) / columns)
    figure = Figure(figsize=(1.6 * columns, 2.3 * lines), dpi=100)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    figure.subplots_adjust(0, 0, 1, 1 - 0.2 / (2.3 * lines), 0.02, 0.1)
    for panel in panels:
        panel.axis("off")
    images = [panel.imshow(pictures[0]) for panel, (pictures, _) in zip(panels, films.values())]
    writer = animation.PillowWriter(fps=15)
    with common.whole_file(path) as temporary, writer.saving(figure, temporary, dpi=100):
        for t in range(len(next(iter(films.values()))[0])):
            for panel, image, (game, (pictures, scores)) in zip(panels, images, films.items()):
                image.set_data(pictures[t])
                panel.set_title(f"{game.replace('_', ' ')} {scores[t]}", fontsize=8, pad=2)
            writer.grab_frame()


def main(args):
    device, out = common.pick_device(args.device), Path(args.out)
    autocast = common.pick_autocast(args.precision, device)
    networks, expert_of = load_networks(args, device)  # mistakes show before the games, not after
    curves = group_curves(args.curves)
    table = out / f"{args.name}.csv"
    if networks and table.exists() and not table.read_text(errors="replace").startswith("network,"):
        raise common.UserError(f"{table} is no table of scores: choose another --name")
    out.mkdir(parents=True, exist_ok=True)
    # May we write there, and is the longest of the names not too long?
    tempfile.NamedTemporaryFile(dir=out, prefix=args.name, suffix="-curves.png").close()

    if networks and args.games > 0:
        results, columns = {}, {}  # {label: {game: scores}}, {(label, game): further columns}
        for label, (net, games) in networks.items():
            results[label] = {}
            for game in games:
                print(f"{label} plays {args.games} games of {game} ...", end=" ", flush=True)
                first, *others = dict.fromkeys(args.sticky)
                teacher = expert_of[label].get(game)
                expert = networks[teacher][0] if teacher not in (None, label) else None
                scores, judged = play(net, game, first, args, device, autocast, expert)
                results[label][game], columns[label, game] = scores, judged
                print(f"{scores.mean():.1f}")
                for p in others:
                    scores, _ = play(net, game, p, args, device, autocast)
                    columns[label, game][f"sticky {p:g}"] = scores.mean()
        for name in ("% agreement", "% value lost"):
            if all(math.isnan(further[name]) for further in columns.values()):
                for further in columns.values():  # no network has an expert to judge it
                    del further[name]
        rows = make_rows(results, expert_of)
        for row in rows:
            row |= columns[row["network"], row["game"]]
        whole_rows = []  # for the file: with what others need to check an interval
        for row in rows:
            label, scores = row["network"], results[row["network"]][row["game"]]
            epsilon = 1.0 if networks[label][0] is None else args.epsilon  # None: random
            more = {"epsilon": epsilon, "sticky": args.sticky[0], "seed": args.seed}
            more["plays"] = " ".join(f"{score:.0f}" for score in scores)
            whole_rows.append(row | more)
        write_csv(whole_rows, table)  # before it is printed: `| head` may have left
        print_table(rows)
        print_summary(results, expert_of)
        groups = group_seeds(results, expert_of)
        drawn = draw_bars(rows, groups, expert_of, out / f"{args.name}.png")
        print(f"wrote {table}" + (" and .png" if drawn else "; no bars: no score to compare with"))
    if curves:
        print_curves(curves)
        draw_curves(curves, out / f"{args.name}-curves.png")
        print(f"wrote {out / args.name}-curves.png")
    if args.gif:
        net, games = next(iter(networks.values()))
        films = {game: record(net, game, args, device, autocast) for game in games}
        write_gif(films, out / f"{args.name}.gif")
        print(f"wrote {out / args.name}.gif")


if __name__ == "__main__":
    common.run(main, Args)
