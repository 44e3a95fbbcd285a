"""Measure checkpoints of any stage on whole episodes, and make the tables, curves and films.

A score is the raw return of a whole episode, played with epsilon 0.05 after 0 to 29 no-ops, and cut
at 108,000 frames. Every episode that begins is counted, however long it takes.

    python evaluate.py --runs runs/mimic                     # the mimic next to its experts
    python evaluate.py --runs experts/*.pt --sticky 0 0.25   # with and without sticky actions
    python evaluate.py --runs mimics/without-breakout.pt --games breakout --random
    python evaluate.py --curves runs/transfer-*              # learning curves
    python evaluate.py --runs runs/mimic --episodes 0 --gif  # only a film of all its games

Output: a line for each network and game, and a summary; everything as results/table.csv, bars in
table.png, learning curves in table-curves.png, those of transfer.py compared in table-arms.png,
films in table.gif. --out and --name choose another folder and another name. Ctrl-C keeps what has
been measured.
Networks and logs whose names differ only in -s<seed> are seeds of one thing, and get an interval
over seeds (curves: of three or more).
"""

import csv
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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

try:
    import train_expert
    import train_mimic
    import transfer
except ModuleNotFoundError as error:
    print(f"evaluate.py: {error.name}.py is missing; it builds its networks", file=sys.stderr)
    sys.exit(2)
from train_expert import act, legal_actions, make_envs, new_episode, rom_name

SCRIPTS = {"expert": train_expert, "mimic": train_mimic, "transfer": transfer}
# Scores of a random player and a human (no-op starts; the set of DQN Zoo and most papers since
# 2016), of DQN (Mnih et al., 2015), and the paper's Table 1: {game: {column: score, or nan}}.
PUBLISHED = {}
if (published := Path(__file__).parent / "results/published.csv").exists():
    for row in csv.DictReader(published.read_text().splitlines()):
        game = row.pop("game")
        PUBLISHED[game] = {name: float(score or "nan") for name, score in row.items()}
NOTHING = dict.fromkeys(("random", "human", "dqn_2015", "paper_dqn", "paper_amn"), math.nan)
PAPER = {game for game, row in PUBLISHED.items() if not math.isnan(row["paper_amn"])}
rcParams["text.parse_math"] = False  # a $ in the name of a run is no formula

# Half-widths of a 95% interval of a mean, in standard errors, by number of seeds (Student's t).
# That of two would be 12.7: too wide to be of use.
STUDENT_T = [math.nan] * 3 + [4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]
COLOURS = "C0", "C2", "C3", "C4", "C5", "C6", "C8", "C9"  # C1: the paper's, C7: the control
LINE = "{:15} {:36} {:>9} {:>9} {:>7} {:>14}"
HEADING = LINE.format("game", "network", "score", "expert", "%", "95% interval")
MEDIAN = "Median of all games"  # a panel of the curves, beside those of games
PAPERS = "the paper's network"  # a bar of each game
AT_ONCE = 48  # episodes played at a time, or four for each core
SKIPPED = 300  # steps of each episode before a film begins


@dataclass
class Args:
    # What is measured
    runs: tuple = ()  # checkpoints, folders of runs, or patterns, of any stage
    games: tuple = ()  # which games (none: those the network learned); an expert plays its own
    episodes: int = 30  # of each game by each network; 0: no table
    random: bool = False  # also measure a random policy on every game
    curves: tuple = ()  # logs, or folders of runs; names that differ only in -s<seed> are one curve
    # How it plays
    epsilon: float = 0.05  # share of random actions (as paper)
    sticky: tuple = (0.0,)  # chance, in each frame, that the last action repeats; several: each
    seed: int = 1  # of exploration and emulators
    # Output
    gif: bool = False  # also film each network of --runs, all its games side by side
    film: int = 160  # steps in a film, 15 a second; 0: a whole episode
    out: str = "results"  # folder of tables and pictures
    name: str = "table"  # their names begin with this
    # Machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps
    precision: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        numbers = any(game.isdigit() for game in self.games)
        common.require(not numbers, "--games takes names of games; --episodes is their number")
        self.games = tuple(dict.fromkeys(map(rom_name, self.games)))
        common.expand_paths(self, "runs", "curves", "out")
        self.runs = tuple(dict.fromkeys(str(Path(path)) for path in self.runs))  # a/ is a
        common.require(self.runs or self.curves, "name checkpoints in --runs or logs in --curves")
        common.require(self.runs or not (self.random or self.gif), "--random and --gif need --runs")
        common.require(
            not (self.random and "random" in self.runs),
            "the row of --random would hide the run named random: rename it",
        )
        common.require_range(self, 0, 10_000, "episodes")
        idle = self.random or (self.runs and not self.gif)
        common.require(self.episodes or not idle, "--episodes 0 plays none: it needs --gif alone")
        common.require_range(self, 0, 27_000, "film")
        plain = self.out and self.name.strip(".") and Path(self.name).name == self.name
        common.require(plain, "--out must name a folder, and --name a file without its folder")
        common.require_shares(self, "epsilon")
        shares = self.sticky and 0 <= min(self.sticky) and max(self.sticky) <= 1
        common.require(shares, "--sticky must lie between 0 and 1")
        self.sticky = tuple(dict.fromkeys(self.sticky))
        common.require_range(self, 0, 2**31 - 1, "seed")


@dataclass
class Player:
    """A network, or the random policy (net is None), with its games and their experts."""

    label: str  # its path
    net: nn.Module
    games: list  # that it plays
    experts: dict  # {game: label of the expert that it is compared with}


# Which networks


def load_network(checkpoint, path, device):
    """Build a checkpoint's network with the class of the script that made it."""
    script, name = SCRIPTS[checkpoint["stage"]], checkpoint["network"]
    cls = getattr(script, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__name__ == name):
        raise common.UserError(f"{path} is a {name}, which {script.__name__}.py does not have")
    net = common.make_network(cls, checkpoint, path)
    net = net.to(device, memory_format=common.memory_format(device))
    common.check_device(net, torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8))
    return net


def load_players(args, device):
    """Read --runs, and the experts of each mimic; returns the players, those of --runs first."""
    read = {path: common.load_checkpoint(path, tuple(SCRIPTS)) for path in args.runs}
    warn_of_same_seeds(read)
    # Of several experts of one game none is the measure: seeds would be in % of the first.
    named = [(c["games"][0], path) for path, c in read.items() if c["stage"] == "expert"]
    count = Counter(game for game, _ in named)
    only = {game: path for game, path in named if count[game] == 1}
    players = []
    for path, checkpoint in list(read.items()):
        learned = checkpoint["games"]
        games = list(args.games or learned)
        if len(learned) == 1 and learned[0] in games:
            games = learned
        experts = {game: only[game] for game in games if only.get(game, path) != path}
        if checkpoint["stage"] == "mimic":
            experts |= find_experts(checkpoint, games, read)
        net = load_network(checkpoint, path, device)
        players.append(Player(path, net, games, experts))
    for label in dict.fromkeys(label for p in players for label in p.experts.values()):
        if label not in args.runs:
            net = load_network(read[label], label, device)
            players.append(Player(label, net, read[label]["games"], {}))
    if args.random:
        games = list(dict.fromkeys(game for player in players for game in player.games))
        experts = {game: p.experts[game] for p in players for game in p.experts} | only
        players.append(Player("random", None, games, experts))
    trained = {checkpoint["args"].get("sticky", 0.0) for checkpoint in read.values()}
    if len(trained | set(args.sticky)) > 1:
        was, now = (", ".join(f"{p:g}" for p in sorted(ps)) for ps in (trained, args.sticky))
        print(f"note: trained with --sticky {was}, measured with {now}", file=sys.stderr)
    return players


def find_experts(mimic, games, read):
    """Return {game: path} of a mimic's experts; those that read lacks are added to it.

    An expert is known by its mark (step and minutes), wherever it lies: among the checkpoints of
    the call, at the path that the mimic has stored, or there beside this script.
    """
    experts = {}
    for game, path, mark in zip(mimic["games"], mimic["experts"], mimic["marks"]):
        if game not in games:
            continue
        for place in (*read, path, str(Path(__file__).parent / path)):
            try:
                expert = read.get(place) or common.load_checkpoint(place, ("expert", "transfer"))
            except common.UserError:
                continue
            if expert["games"] == [game] and [expert["step"], expert["minutes"]] == mark:
                experts[game] = place
                read[place] = expert
                break
        else:
            why = f"{path} is not in this folder, or has changed since"
            print(f"{why}: {game} has no expert to be compared with", file=sys.stderr)
    return experts


def warn_of_same_seeds(read):
    """Seeds of one thing get an interval, which of one run twice would mean nothing."""
    seeds = {}
    for path, checkpoint in read.items():
        other = seeds.setdefault((without_seed(path), checkpoint["args"].get("seed")), path)
        if other != path:
            print(f"warning: {other} and {path} have the same seed", file=sys.stderr)


def without_seed(name):
    """Cut the -s<seed> off the name of a run: seeds of the same thing get the same name."""
    return re.sub(r"-s\d+(?=$|[./\\])", "", name)


# Play


class Game:
    """An emulator of one game, and the episode that it is in."""

    def __init__(self, game, sticky, seed):
        self.env = make_envs(game, 1, sticky)
        self.obs, info = self.env.reset(seed=seed)  # (1, 4, 84, 84)
        self.frame, self.steps, self.score = info["episode_frame_number"], 0, 0.0
        self.sent = False

    def send(self, action):
        """Begin a step."""
        self.env.send(np.array([action]))
        self.sent = True

    def receive(self):
        """Finish the step that was begun, if any; returns whether it ended the episode."""
        if not self.sent:
            return False
        self.obs, reward, _, _, info = self.env.recv()
        self.sent = False
        began = new_episode(info["episode_frame_number"], self.frame)[0]
        self.frame = info["episode_frame_number"]
        self.steps, self.score = self.steps + 1, self.score + float(reward[0])
        return began


def start_games(wanted):
    """Start emulators, as many side by side as there are cores: [(game, sticky, seed)] -> [Game].

    The threads have a lower priority, which the emulators' own threads take over, so that the
    networks, for which many emulators wait, come first.
    """
    linux = sys.platform == "linux"  # elsewhere it is the priority of the whole process
    lower = {"initializer": os.nice, "initargs": (10,)} if linux else {}
    games = []
    with ThreadPoolExecutor(common.cores(), **lower) as pool:
        for game in pool.map(lambda one: Game(*one), wanted):
            games.append(game)
            common.show(f"starting emulators: {len(games)} of {len(wanted)}", keep=False)
    return games


def choose(player, obs, legal, args, device, rng):
    """Actions of a player: obs (N, 4, 84, 84), legal (N, 18) bool -> (N,) int64 array."""
    if player.net is None:
        return act(torch.zeros(len(obs), 18), legal, 1.0, rng).numpy()
    values = player.net(torch.from_numpy(obs).to(device))[0].cpu()
    return act(values, legal, args.epsilon, rng).numpy()


def play(players, args, device, stop):
    """Play all episodes; yields ((label, game, sticky), scores) as soon as all of these are over.

    The episodes wait in one queue, and as many are played at a time as keep the cores busy. Next is
    one of those that have lasted longest so far, so that no long one runs alone at the end.
    """
    keys = [(p.label, game, sticky) for p in players for game in p.games for sticky in args.sticky]
    waiting, longest = dict.fromkeys(keys, args.episodes), dict.fromkeys(keys, 0)
    scores = {key: [] for key in keys}
    legal = {game: legal_actions(game) for game in {game for _, game, _ in keys}}
    running = {player.label: [] for player in players}  # (key, Game) of the episodes that it is in
    idle = {key[1:]: [] for key in keys}  # Games between two episodes
    rng = torch.Generator().manual_seed(args.seed)
    free, total = max(AT_ONCE, 4 * common.cores()), args.episodes * len(keys)
    started, over, steps = time.monotonic(), 0, 0
    while over < total and not stop.asked:
        new = []  # keys of episodes for which no emulator is idle
        while free and any(waiting.values()):
            key = max((k for k in waiting if waiting[k]), key=lambda k: (longest[k], waiting[k]))
            waiting[key] -= 1
            free -= 1
            if idle[key[1:]]:
                running[key[0]].append((key, idle[key[1:]].pop()))
            else:
                new.append(key)
        if new:
            seeds = torch.randint(2**31 - 1, (len(new),), generator=rng).tolist()
            games = start_games([(*key[1:], seed) for key, seed in zip(new, seeds)])
            for key, game in zip(new, games):
                running[key[0]].append((key, game))
        # One network after the other, all its episodes at once; meanwhile others' emulators work.
        for player in players:
            for key, game in list(running[player.label]):
                ended = game.receive()
                longest[key] = max(longest[key], game.steps)
                if ended:
                    scores[key].append(game.score)
                    game.steps, game.score = 0, 0.0
                    running[player.label].remove((key, game))
                    idle[key[1:]].append(game)
                    free, over = free + 1, over + 1
                    if len(scores[key]) == args.episodes:
                        yield key, np.array(scores[key])
            if own := running[player.label]:
                obs = np.concatenate([game.obs for _, game in own])  # (N, 4, 84, 84)
                masks = torch.stack([legal[key[1]] for key, _ in own])  # (N, 18)
                actions = choose(player, obs, masks, args, device, rng)
                for (_, game), action in zip(own, actions):
                    game.send(action)
                steps += len(own)
        seconds = time.monotonic() - started
        left = f"  {seconds / over * (total - over) / 60:.0f} min left" if over else ""
        text = f"{over} of {total} episodes  {over / total:.0%}  {steps / seconds:,.0f} steps/s"
        common.show(text + left, keep=False)


# Sum up


def interquartile_mean(values):
    """Mean of the middle half of the values."""
    values = np.sort(np.ravel(values))
    cut = len(values) // 4
    return values[cut : len(values) - cut].mean()


def percent(own, base):
    """Scores in % of a mean: (games, seeds, episodes), (games, 1, episodes) -> shape of own."""
    return 100 * own / base.mean((1, 2), keepdims=True)


def resample(scores, rng):
    """Draw with replacement the seeds, for all games alike, and the episodes of each.

    (games, seeds, episodes) -> the same shape.
    """
    games, seeds, episodes = scores.shape
    seed = rng.integers(seeds, size=(1, seeds, 1))
    episode = rng.integers(episodes, size=scores.shape)
    return scores[np.arange(games)[:, None, None], seed, episode]


def bootstrap(statistic, own, base, resamples=2_000):
    """Return statistic(percent(own, base)) and the two ends of its 95% interval.

    The interval is a bootstrap that resamples both. Of fewer than some ten seeds it is too narrow.
    A single episode has none: its ends are nan.
    """
    if own[0].size == 1:
        return statistic(percent(own, base)), math.nan, math.nan
    rng = np.random.default_rng(0)
    draws = [statistic(percent(resample(own, rng), resample(base, rng))) for _ in range(resamples)]
    return statistic(percent(own, base)), *np.percentile(draws, [2.5, 97.5])


def well_above_zero(base):
    """Whether % of these means mean something: (games, 1, episodes) -> bool.

    All scores are above 0, or their mean is four standard errors above it: so next to no resample
    has a mean of 0 or less.
    """
    error = base.std((1, 2)) / math.sqrt(base.shape[2])
    return bool(((base > 0).all((1, 2)) | (base.mean((1, 2)) > 4 * error)).all())


def make_row(key, player, results, args):
    """One row of the table, a dict, for the scores that results holds under (label, game, sticky).

    Networks without an expert to compare them with have nan for it.
    """
    label, game, sticky = key
    scores, expert = results[key], results.get((player.experts.get(game), game, sticky))
    published = PUBLISHED.get(game, NOTHING)
    random, human = published["random"], published["human"]
    interval = (math.nan,) * 3
    if expert is not None and well_above_zero(expert[None, None]):
        interval = bootstrap(np.mean, scores[None, None], expert[None, None])
    return {
        "network": label,
        "game": game,
        "mean": scores.mean(),
        "expert": math.nan if expert is None else expert.mean(),
        "% expert": interval[0],
        "low": interval[1],
        "high": interval[2],
        "std": scores.std(),
        "max": scores.max(),
        "episodes": len(scores),
        "% human": 100 * (scores.mean() - random) / (human - random),
        **published,
        "epsilon": 1.0 if player.net is None else args.epsilon,
        "sticky": sticky,
        "seed": args.seed,
        "scores": " ".join(f"{score:.0f}" for score in scores),
    }


def print_row(row):
    """Print a row of the table in at most 100 columns, under HEADING."""
    label = row["network"] + (f" sticky {row['sticky']:g}" if row["sticky"] else "")
    label = label if len(label) <= 36 else "..." + label[-33:]
    values = [row[column] for column in ("mean", "expert", "% expert")]
    cells = [f"{v:,.0f}" if abs(v) >= 1_000 else f"{v:.1f}" for v in values]
    cells.append("" if math.isnan(row["low"]) else f"{row['low']:.0f} to {row['high']:.0f}")
    common.show(LINE.format(row["game"], label, *(cell.replace("nan", "-") for cell in cells)))


def group_seeds(players, results, sticky):
    """Return [(name, players)]: those whose names differ only in -s<seed> are one group.

    They have to play the same games, to their end, and to be compared with the same experts.
    """
    groups = {}
    for player in players:
        if all((player.label, game, sticky) in results for game in player.games):
            key = without_seed(player.label), tuple(player.games), tuple(player.experts.items())
            groups.setdefault(key, []).append(player)
    return [
        (f"{key[0]} ({len(seeds)} seeds)" if len(seeds) > 1 else seeds[0].label, seeds)
        for key, seeds in groups.items()
    ]


def print_summary(players, results, sticky):
    """Print the median and interquartile mean of each group of several seeds or games.

    Scores are in % of the experts' mean scores, or normalised with random and human scores:
    100 * (score - random) / (human - random). The median is over the games' means, the
    interquartile mean over all single scores. Intervals resample the seeds, their episodes and
    those of the experts.
    """
    for name, seeds in group_seeds(players, results, sticky):
        games, experts = seeds[0].games, seeds[0].experts
        if len(games) * len(seeds) < 2:
            continue
        own = np.array([[results[p.label, game, sticky] for p in seeds] for game in games])
        name += f", sticky {sticky:g}" if sticky else ""
        if all((experts.get(game), game, sticky) in results for game in games):
            base = np.array([[results[experts[game], game, sticky]] for game in games])
            if well_above_zero(base):
                print_middle(f"{name}: % of expert", own, base)
                for g, game in enumerate(games if len(seeds) > 1 else []):
                    interval = bootstrap(np.mean, own[g : g + 1], base[g : g + 1])
                    print(f"  {game} {show_interval(interval)}")
        if all(game in PUBLISHED for game in games):
            ends = [(PUBLISHED[game]["random"], PUBLISHED[game]["human"]) for game in games]
            random, human = np.array(ends).T[:, :, None, None]  # (games, 1, 1) each
            print_middle(f"{name}: % of human", own - random, human - random)


def print_middle(title, own, base):
    """Print median and interquartile mean of percent(own, base), with 95% intervals."""
    median = bootstrap(lambda scores: np.median(scores.mean((1, 2))), own, base)
    middle = bootstrap(interquartile_mean, own, base)
    print(title)
    print(f"  median {show_interval(median)}, interquartile mean {show_interval(middle)}")


def show_interval(interval, digits=1):
    """Write a value and its interval, if it has one: (value, low, high) -> text."""
    value, low, high = (f"{x:.{digits}f}".replace("inf", "never") for x in interval)
    return value if low == "nan" else f"{value} ({low} to {high})"


def write_csv(rows, path):
    """Write the rows, numbers to six digits."""
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with common.whole_file(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())


# Draw


def draw_bars(rows, groups, path):
    """Draw what each network reaches in each game, in % of its expert: bars, and a dot per seed.

    groups: as of group_seeds. Where all the paper's games are there, its network is shown next to
    them. Returns False, and draws nothing, if no network has an expert.
    """
    rows = [row for row in rows if not math.isnan(row["% expert"])]
    if not rows:
        return False
    games = list(dict.fromkeys(row["game"] for row in rows))
    for game in PAPER if PAPER <= set(games) else ():
        dqn, amn = PUBLISHED[game]["paper_dqn"], PUBLISHED[game]["paper_amn"]
        rows.append({"network": PAPERS, "game": game, "mean": amn, "% expert": 100 * amn / dqn})
    name_of = {player.label: name for name, seeds in groups for player in seeds}
    bars = {}  # {name: {game: rows of its seeds}}
    for row in rows:
        by_game = bars.setdefault(name_of.get(row["network"], row["network"]), {})
        by_game.setdefault(row["game"], []).append(row)
    words = [name.removeprefix("runs/") for name in bars]
    if len(words) == 2 and words[1] == PAPERS:
        words[0] = "one network for all games"
    height = 0.4 + math.ceil(len(games) / 2) * (0.4 + 0.28 * len(bars))
    figure, panels = make_panels(len(games), 2, (8.5, height), sharex=True, sharey=True)
    for panel, game in zip(panels, games):
        for place, (name, by_game) in enumerate(bars.items()):
            if game not in by_game:
                continue
            percents = [row["% expert"] for row in by_game[game]]
            mean = np.mean([row["mean"] for row in by_game[game]])
            score = f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.1f}"
            panel.barh(place, np.mean(percents), color="C1" if name == PAPERS else "C0")
            text = f"  {np.mean(percents):.0f}% ({score})"
            panel.text(max(0, *percents), place, text, fontsize=9, verticalalignment="center")
            if len(percents) > 1:
                panel.plot(percents, [place] * len(percents), ".", color="black", markersize=4)
        panel.axvline(100, color="grey", linewidth=0.8)
        panel.set_title(game.replace("_", " ").title(), fontsize=10)
        panel.set_yticks(range(len(bars)), words)
        panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.4)
    panel.invert_yaxis()
    figure.supxlabel("% of the expert (score)", fontsize=10)
    save_figure(figure, path)
    return True


def make_panels(count, columns, size, **more):
    """Make a figure of a size in inches with some panels; returns it and the list of them."""
    columns = min(count, columns)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False, **more).flat)
    for panel in panels[count:]:
        panel.axis("off")
    return figure, panels[:count]


def save_figure(figure, path):
    """Write a figure, whole or not at all."""
    with common.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def read_log(path):
    """Read a log as {column: (rows,) float array}; raises UserError if it is missing or no log."""
    try:
        with open(path, newline="") as file:
            columns, *rows = filter(None, csv.reader(file))  # without blank lines
        log = dict(zip(columns, np.array(rows, dtype=float).T))
    except (OSError, ValueError, csv.Error):
        log = {}
    whole = {"step", "minutes"} <= log.keys() and (np.diff(log["step"]) > 0).all()
    if not whole or not any(name.endswith("_score") for name in log):
        raise common.UserError(f"{path} is missing, empty, or no log of this project")
    return log


def group_curves(paths):
    """Read logs as {game: {label: [(steps, scores, goal), ...]}}, with one label for all seeds.

    goal is the training score of a mimic's expert, and nan in the logs of other stages. MEDIAN
    holds (minutes, % of the expert in a mimic's median game, 100).
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
            if np.isnan(log[column]).all():
                print(f"note: {path} has no {column} yet: no episode has ended", file=sys.stderr)
                continue
            game = column.removesuffix("_score")
            percent = log.get(f"{game}_percent", [0])[-1]  # of the expert; 0: there is none
            goal = 100 * log[column][-1] / percent if percent else math.nan
            curve = log["step"], log[column], goal
            groups.setdefault(game, {}).setdefault(label, []).append(curve)
        percents = [values for column, values in log.items() if column.endswith("_percent")]
        if len(percents) > 1:
            curve = log["minutes"], np.median(percents, 0), 100.0  # nan until each has a score
            groups.setdefault(MEDIAN, {}).setdefault(label, []).append(curve)
    return groups


def half_width(values):
    """Half the 95% interval (Student's t) of a mean over seeds: (seeds, ...) -> (...).

    It is nan for fewer than three seeds.
    """
    seeds = len(values)
    return STUDENT_T[min(seeds, 10)] * values.std(0) / math.sqrt(max(1, seeds - 1))


def mean_over_run(steps, scores):
    """Mean of a curve over its steps, from its first score on: (T,), (T,) -> float, or nan."""
    known = ~np.isnan(scores)
    steps, scores = steps[known], scores[known]
    return np.trapezoid(scores, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else math.nan


def arm_name(arm):
    """Name an arm of transfer.py in a figure."""
    words = {"control": "from random weights", "mimic": "from the mimic"}
    return words.get(arm, f"from {arm}")


def align(seeds):
    """Put the curves of several seeds on common steps: (T,), (seeds, T), nan where one has none."""
    steps = max((steps for steps, _, _ in seeds), key=len)
    return steps, np.stack([np.interp(steps, x, y, np.nan, np.nan) for x, y, _ in seeds])


def steps_to_control(steps, scores, control_steps, control_scores):
    """Steps until the mean of an arm's seeds reaches the last score of the control's mean.

    In shares of the control's steps, and inf if it is not reached. Between two rows of a log the
    score changes in a straight line. steps: (T,); scores: (seeds, T); the control's likewise.
    """
    goal, mean = control_scores[:, -1].mean(), scores.mean(0)
    reached = np.flatnonzero(mean >= goal)
    if not len(reached):
        return math.inf
    pair = slice(max(0, reached[0] - 1), reached[0] + 1)  # the rows before and after
    return np.interp(goal, mean[pair], steps[pair]) / control_steps[-1]


def compare_arms(groups):
    """Compare the arms of transfer.py with its control: {arm: {game: (ratio, low, high)}}.

    groups: as of group_curves. The ratio is that of steps_to_control, at the steps at which all
    seeds have a score: one may be shorter, or still run. MEDIAN has the median of several games.
    The intervals resample the seeds of both; single seeds have none, but nan.
    """
    ratios, rng = {}, np.random.default_rng(0)  # {arm: {game: the ratio, and those of resamples}}
    for game, curves in groups.items():
        arms = {}
        for label, seeds in curves.items():
            steps, scores = align(seeds)
            known = ~np.isnan(scores).any(0)
            if label.startswith(f"transfer-{game}-") and known.any():
                arms[label.removeprefix(f"transfer-{game}-")] = steps[known], scores[:, known]
        if "control" not in arms:
            continue
        control_steps, base = arms.pop("control")
        for arm, (steps, own) in arms.items():
            if steps[-1] < control_steps[-1]:
                why = "shorter than the control, not compared"
                print(f"note: {game}, {arm}: {why}", file=sys.stderr)
                continue
            shares = [steps_to_control(steps, own, control_steps, base)]
            for _ in range(2_000):
                drawn = rng.choice(own, len(own)), rng.choice(base, len(base))
                shares.append(steps_to_control(steps, drawn[0], control_steps, drawn[1]))
            ratios.setdefault(arm, {})[game] = shares
    compared = {arm: {} for arm in ratios}
    for arm, by_game in ratios.items():
        if len(by_game) > 1:
            by_game[MEDIAN] = np.median(list(by_game.values()), 0)
        for game, (ratio, *resampled) in by_game.items():
            # No value between two of them, since some are infinite.
            ends = np.percentile(resampled, [2.5, 97.5], method="inverted_cdf")
            compared[arm][game] = ratio, *(ends if len(set(resampled)) > 1 else [math.nan] * 2)
    return compared


def print_arms(compared):
    """Print when each arm of transfer.py reaches what the control reaches in the end."""
    for arm, by_game in compared.items():
        for game, interval in by_game.items():
            share = show_interval(interval, digits=2)
            print(f"{game}, {arm}: steps to the control's last score {share}")


def draw_arms(compared, path):
    """Draw the steps to the control's last score, with intervals: a line per game and arm."""
    games = list(dict.fromkeys(game for by_game in compared.values() for game in by_game))
    figure, (panel,) = make_panels(1, 1, (6.5, 0.9 + 0.45 * len(games)))
    for n, (arm, by_game) in enumerate(compared.items()):
        places = [games.index(game) + 0.25 * (n - (len(compared) - 1) / 2) for game in by_game]
        ratio, low, high = np.minimum(np.array(list(by_game.values())), 1.2).T  # beyond: never
        panel.hlines(places, low, high, color=COLOURS[n % len(COLOURS)])
        panel.plot(ratio, places, "o", color=COLOURS[n % len(COLOURS)], label=arm_name(arm))
    panel.axvline(1, color="C7")
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1, 1.2], ["0", "25%", "50%", "75%", "control", "never"])
    names = [game if game == MEDIAN else game.replace("_", " ").title() for game in games]
    panel.set_yticks(range(len(games)), names)
    panel.set_xlabel("steps to the control's last score")
    panel.invert_yaxis()
    panel.legend(fontsize=8)
    save_figure(figure, path)


def print_curves(groups):
    """Print each curve's mean over the run, more where learning is early, and its last score.

    groups: as of group_curves. Three seeds or more have 95% intervals.
    """
    for game, curves in groups.items():
        for label, seeds in curves.items() if game != MEDIAN else ():  # that one is over minutes
            ends = np.array([(mean_over_run(x, y), y[-1]) for x, y, _ in seeds])
            if np.isnan(ends).any():
                continue  # a seed that has no two scores yet
            means, half = ends.mean(0), half_width(ends)
            over, end = map(show_interval, zip(means, means - half, means + half))
            name = f"{label} ({len(seeds)} seeds)" if len(seeds) > 1 else label
            last = [x[-1] for x, _, _ in seeds]
            if min(last) < max(last):  # they do not compare
                name += f", after {min(last):,.0f} to {max(last):,.0f} steps"
            print(f"{game}, {name}: {over} over the run, {end} at its end")


def draw_curves(groups, path):
    """Draw score against steps, a panel per game; seeds are thin lines, their mean is a thick one.

    Three seeds or more have its 95% interval, too. The mean is drawn where all seeds have a score.
    """
    size = 3.4 * min(3, len(groups)), 2.7 * math.ceil(len(groups) / 3)
    figure, panels = make_panels(len(groups), 3, size)
    for panel, (game, curves) in zip(panels, groups.items()):
        colours = iter(COLOURS)
        for label, seeds in curves.items():
            steps, scores = align(seeds)
            arm = label.removeprefix(f"transfer-{game}-")
            name = arm_name(arm) if arm != label else label.removesuffix(f"-{game}")
            colour = "C7" if arm == "control" else next(colours, "black")
            name = f"{name} ({len(seeds)} seeds)" if len(seeds) > 1 else name
            mean, half = scores.mean(0), half_width(scores)
            panel.plot(steps, mean, color=colour, label=name)
            for x, y, _ in seeds:
                panel.plot(x, y, color=colour, linewidth=0.5)
            panel.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2)
        goals = [goal for seeds in curves.values() for _, _, goal in seeds if not math.isnan(goal)]
        paper = PUBLISHED.get(game, NOTHING)["paper_dqn"]
        if goals or paper < 3 * panel.dataLim.y1:  # not far above
            whose = "its expert, in training" if goals else "paper's expert, at its end"
            goal = max(goals, default=paper)
            panel.axhline(goal, color="grey", linestyle="dashed", label=whose)
        x, y = ("minutes", "% of the expert") if game == MEDIAN else ("steps", "score in training")
        title = MEDIAN if game == MEDIAN else game.replace("_", " ").title()
        panel.set(title=title, xlabel=x, ylabel=y)
        panel.locator_params(nbins=5)
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 100k, 2M
    same = len({tuple(curves) for curves in groups.values()}) == 1  # one legend says it for all
    for panel in panels[:1] if same else panels:
        panel.legend(fontsize=7)
    save_figure(figure, path)


# Film


def record(player, args, device, stop):
    """Film one episode of each game, or --film steps of it: {game: (pictures, scores)}."""
    names, sticky = player.games, args.sticky[0]
    legal = torch.stack([legal_actions(name) for name in names])  # (G, 18)
    rng = torch.Generator().manual_seed(args.seed)
    games = start_games([(name, sticky, args.seed) for name in names])
    # A second emulator with the same seed and the same actions shows the same game in colour.
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    colour |= {"full_action_space": True, "autoreset_mode": AutoresetMode.SAME_STEP}
    envs = [AtariVectorEnv(n, 1, repeat_action_probability=sticky, **colour) for n in names]
    for env in envs:
        env.reset(seed=args.seed)
    films, t = {name: ([], []) for name in names}, 0
    playing = set(names)
    while playing and not stop.asked and (not args.film or t < SKIPPED + args.film):
        obs = np.concatenate([game.obs for game in games])  # (G, 4, 84, 84)
        for game, env, action in zip(games, envs, choose(player, obs, legal, args, device, rng)):
            game.send(action)
            env.send(np.array([action]))
        for name, game, env in zip(names, games, envs):
            ended, picture = game.receive(), env.recv()[0][0, 0]  # (210, 160, 3)
            if name in playing and (t >= SKIPPED or not args.film):
                films[name][0].append(picture)
                films[name][1].append(game.score)
            if ended and not args.film:
                playing.discard(name)
            elif ended:
                game.score = 0.0
        t += 1
    return films


def write_gif(films, path):
    """Write a GIF of several games side by side; films: {game: (pictures, scores)}."""
    columns = min(len(films), 4)
    lines = math.ceil(len(films) / columns)
    width, height = 160 * columns, 230 * lines  # pixels: pictures of 160 x 210, and a line of text
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    screen = np.full((height, width, 3), 255, dtype=np.uint8)
    image, texts = figure.figimage(screen), []
    for n in range(len(films)):
        place = (n % columns * 160 + 80) / width, 1 - (n // columns * 230 + 15) / height
        texts.append(figure.text(*place, "", fontsize=8, horizontalalignment="center"))
    writer = animation.PillowWriter(fps=15)
    with common.whole_file(path) as temporary, writer.saving(figure, temporary, dpi=100):
        for t in range(max(len(pictures) for pictures, _ in films.values())):
            for n, (game, (pictures, scores)) in enumerate(films.items()):
                now = min(t, len(pictures) - 1)  # its episode may be over before others'
                top, left = n // columns * 230 + 20, n % columns * 160
                screen[top : top + 210, left : left + 160] = pictures[now]
                texts[n].set_text(f"{game.replace('_', ' ')} {scores[now]:.0f}")
            image.set_data(screen)
            writer.grab_frame()


def main(args):
    device, out = common.pick_device(args.device), Path(args.out)
    autocast = common.pick_autocast(args.precision, device)
    players = load_players(args, device)  # mistakes show before the episodes, not after
    curves = group_curves(args.curves)
    table = out / f"{args.name}.csv"
    if players and table.exists() and not table.read_text(errors="replace").startswith("network,"):
        raise common.UserError(f"{table} is no table of scores: choose another --name")
    out.mkdir(parents=True, exist_ok=True)
    # May we write there, and is the longest of the names not too long?
    tempfile.NamedTemporaryFile(dir=out, prefix=args.name, suffix="-curves.png").close()

    # Inside one autocast and no_grad the weights are rounded to bfloat16 only once.
    with common.Stop() as stop, torch.no_grad(), autocast:
        if players and args.episodes:
            measure(players, args, device, stop, table)
        if curves and not stop.asked:
            print_curves(curves)
            draw_curves(curves, out / f"{args.name}-curves.png")
            print(f"wrote {out / args.name}-curves.png")
            if compared := compare_arms(curves):
                print_arms(compared)
                draw_arms(compared, out / f"{args.name}-arms.png")
                print(f"wrote {out / args.name}-arms.png")
        filmed = [player for player in players if player.label in args.runs]
        names = [re.sub(r"\W+", "-", p.label.removesuffix(".pt")).strip("-") for p in filmed]
        if len(set(names)) < len(names):  # a-b and a/b
            names = [f"{name}-{n}" for n, name in enumerate(names, 1)]
        for player, name in zip(filmed, names) if args.gif else []:
            if not stop.asked:
                path = out / (args.name + (f"-{name}" if len(filmed) > 1 else "") + ".gif")
                steps, games = args.film or 27_000, len(player.games)
                # Bytes: a frame of the GIF has 230 rows for each game, a picture 210.
                size = steps * games * (3 * 160 * 230 + 3 * 160 * 210)
                most = "" if args.film else "at most "
                common.show(f"filming {player.label}: {most}{size / 1e9:.1f} GB of memory")
                film = record(player, args, device, stop)
                if not stop.asked:
                    write_gif(film, path)
                    print(f"wrote {path}")
        if stop.asked:
            raise SystemExit(130)


def measure(players, args, device, stop, table):
    """Play, print a line as soon as a game's episodes are over, and sum up what was measured."""
    by_label = {player.label: player for player in players}
    results, rows = {}, {}  # {(label, game, sticky): scores}, {the same: row of the table}
    order = [(p.label, game, sticky) for p in players for game in p.games for sticky in args.sticky]

    def in_order(rows):
        return [rows[key] for key in order if key in rows]

    def add_rows(all_of_them):
        new = []
        for key in [key for key in results if key not in rows]:
            label, game, sticky = key
            expert = by_label[label].experts.get(game)
            if expert is None or (expert, game, sticky) in results or all_of_them:
                rows[key] = make_row(key, by_label[label], results, args)
                new += [key] if label in ("random", *args.runs) else []
        try:
            if rows:
                write_csv(in_order(rows), table)  # before printing: `| head` may have left
        except common.UserError as error:  # on Windows, while a spreadsheet shows it
            if all_of_them:
                raise
            common.show(str(error))
        for key in new:
            print_row(rows[key])

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # the other cores are for the emulators
    common.show(HEADING)
    try:
        for key, scores in play(players, args, device, stop):
            results[key] = scores
            add_rows(all_of_them=False)
    finally:
        torch.set_num_threads(threads)
    if results:
        add_rows(all_of_them=True)  # after a stop, without experts whose episodes are not over
    if stop.asked:
        common.show(f"stopped; {table} has {len(rows)} rows that are complete")
    for sticky in args.sticky if rows else ():
        print_summary(players, results, sticky)
    shown = [row for row in in_order(rows) if row["sticky"] == args.sticky[0]]
    groups = group_seeds(players, results, args.sticky[0])
    if shown:
        drawn = draw_bars(shown, groups, table.with_suffix(".png"))
        why = " and .png" if drawn else "; no bars: no scores of an expert to compare with"
        common.show(f"wrote {table}{why}")


if __name__ == "__main__":
    common.cli(main, Args)
