"""Measure the speed of training and evaluation against what this machine could do at best.

    python tests/benchmark.py                # all of them, about twelve minutes
    python tests/benchmark.py transfer       # one of: expert, mimic, transfer, evaluate, dqn
    python tests/benchmark.py mimic 2        # the mimic of the first 2 experts (without: of all)

First the bare figures: the emulator with random actions, the network acting, the network learning,
each alone, with the environments and minibatches of the stage's own recipe. Together they give the
steps/s that a loop without any overhead would reach. Then the stage itself, with the share of
its time in each part, and its ratio to that limit. Each stage runs in a process of its own, so
that the memory is its own as well. `evaluate` is the table of an included mimic and its eight
experts, 30 episodes of each, cut at 4,000 frames. `dqn` is what the experts' stage is compared
with: the replay DQN that many single-file codes share.
"""

import contextlib
import functools
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # before torch: it sets what torch reads when it loads

import torch

import evaluate
import train_expert
import train_mimic
import transfer
from train_expert import AtariNet, act, legal_actions, make_envs

SECONDS = 5  # of each bare measurement
STEPS = {"expert": 40_960, "mimic": 16_128, "transfer": 40_960}  # of each stage, whole rounds


def rate(work, amount):
    """Call work() for some seconds after a warm-up; returns amount per call and second."""
    for _ in range(3):
        work()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        work()
        calls += 1
    return amount * calls / (time.perf_counter() - start)


def bare_emulator(games, num_envs):
    """Steps per second over all games, with random legal actions, all games stepping at once."""
    envs, rng = [make_envs(game, num_envs) for game in games], torch.Generator().manual_seed(0)
    for env in envs:
        env.reset(seed=1)
    legal = [legal_actions(game) for game in games]

    def step():
        for env, mask in zip(envs, legal):
            env.send(act(torch.zeros(num_envs, 18), mask, 1.0, rng).numpy())
        for env in envs:
            env.recv()

    return rate(step, len(games) * num_envs)


def bare_network(args, batch, learning, autocast, regressors=()):
    """Observations per second, acting on a batch or learning from it.

    regressors: the widths of the experts' features, one linear map for each, which learn as well.
    """
    net = AtariNet(args.channels, args.hidden, args.norm).to(memory_format=torch.channels_last)
    maps = torch.nn.ModuleList(torch.nn.Linear(args.hidden[-1], width) for width in regressors)
    obs = torch.randint(256, (batch, 4, 84, 84), dtype=torch.uint8)
    optimizer = common.Muon(net, maps, lr=1e-5, times=10, autocast=autocast)

    def forward():
        with torch.inference_mode(), autocast:
            net(obs)

    def learn():
        with autocast:
            values, features = net(obs)
        loss = values.square().mean()
        for regressor, part in zip(maps, features.chunk(max(len(maps), 1))):
            loss = loss + regressor(part).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return rate(learn if learning else forward, batch)


class Timer:
    """Seconds spent in the functions that it wraps; calls among them are not counted twice."""

    def __init__(self):
        self.seconds, self.busy, self.first = {}, False, None

    def wrap(self, owner, name, part):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            key = part() if callable(part) else part
            start = time.perf_counter()
            if self.first is None and key == "emulator":
                self.first = start  # the loop begins
            if self.busy:
                return function(*args, **kwargs)
            self.busy = True
            try:
                return function(*args, **kwargs)
            finally:
                self.busy = False
                self.seconds[key] = self.seconds.get(key, 0) + time.perf_counter() - start

        setattr(owner, name, timed)


def run_stage(stage, module, **flags):
    """Run a stage with its default recipe and print where its time goes; returns its steps/s."""
    timer = Timer()
    for name in ("step", "send", "recv"):
        timer.wrap(module.AtariVectorEnv, name, "emulator")
    timer.wrap(module, "act", "acting")
    timer.wrap(
        module.AtariNet,
        "forward",
        lambda: "learning" if torch.is_grad_enabled() else "acting",
    )
    timer.wrap(torch.Tensor, "backward", "learning")
    timer.wrap(common.Muon, "step", "learning")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        module.main(module.Args(steps=STEPS[stage], out=f"{folder}/run", **flags))
    total = time.perf_counter() - timer.first
    parts = {key: timer.seconds[key] / total for key in ("emulator", "acting", "learning")}
    shares = ", ".join(f"{key} {share:.2f}" for key, share in parts.items())
    print(f"  share of time: {shares}, rest {1 - sum(parts.values()):.2f}")
    return STEPS[stage] / total


def full_table():
    """Print the steps/s of evaluate.py and their share of the limit: a mimic and its eight experts.

    The limit has as many emulators as evaluate.py, half of them with the mimic and half with the
    experts, an eighth of that half each.
    """
    device, half = torch.device("cpu"), evaluate.AT_ONCE // 2
    autocast = common.pick_autocast("auto", device)
    args = evaluate.Args(runs=(str(ROOT / "mimics/mimic-s1.pt"),))
    players = evaluate.load_players(args, device)
    games = players[0].games
    emulator = bare_emulator(games, evaluate.AT_ONCE // len(games))
    mimic = bare_network(train_mimic.Args(), half, False, autocast)
    experts = bare_network(train_expert.Args(), half // len(games), False, autocast)
    limit = 1 / (1 / emulator + 0.5 / mimic + 0.5 / experts)
    bare = f"mimic acting {mimic:,.0f}, experts {experts:,.0f} observations/s"
    print(f"  bare: emulator {emulator:,.0f} steps/s, {bare}")
    evaluate.make_envs = functools.partial(make_envs, max_frames=4_000)
    steps, receive = 0, evaluate.Game.receive

    def count(game):
        nonlocal steps
        steps += game.sent
        return receive(game)

    evaluate.Game.receive = count
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # as evaluate.py does
    start = time.perf_counter()
    with torch.no_grad(), autocast:
        list(evaluate.play(players, args, device, common.Stop()))
    speed = steps / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"  {speed:,.0f} steps/s, {speed / limit:.2f} of the limit {limit:,.0f}; {peak:.2f} GB")


def replay_dqn():
    """Print the steps/s of replay DQN: one environment, Adam 1e-4, float32.

    It learns from 32 observations every 4 steps. Its published curve (CleanRL's) reaches 18 in
    Pong after some 3.2M steps. The network is Nature's, the replay holds frames. It is filled with
    20,000 steps here, where it would hold a million: what more memory costs in time is not in the
    figure.
    """
    Conv, Linear, ReLU = torch.nn.Conv2d, torch.nn.Linear, torch.nn.ReLU

    def make_network():
        convolutions = (Conv(4, 32, 8, 4), ReLU(), Conv(32, 64, 4, 2), ReLU(), Conv(64, 64, 3))
        head = (ReLU(), torch.nn.Flatten(), Linear(3136, 512), ReLU(), Linear(512, 18))
        return torch.nn.Sequential(*convolutions, *head)

    net, target = make_network(), make_network()
    optimizer, rng = torch.optim.Adam(net.parameters(), lr=1e-4), torch.Generator().manual_seed(0)
    envs, legal = make_envs("pong", 1), legal_actions("pong")
    replay, age = train_mimic.FrameReplay(20_000, 1, 1), torch.full((1,), 3)
    obs = torch.from_numpy(envs.reset(seed=1)[0])

    def step(epsilon=0.1):
        nonlocal obs
        with torch.inference_mode():
            action = act(net(obs / 255), legal, epsilon, rng)
        replay.add(obs, age, torch.zeros(1, 18), torch.zeros(1, 1))
        obs = torch.from_numpy(envs.step(action.numpy())[0])

    def four_steps():
        for _ in range(4):
            step()
        # What is drawn need not belong together: it is the time that counts.
        (now, _, _), (following, _, _) = replay.draw(32, rng), replay.draw(32, rng)
        with torch.no_grad():
            goal = 0.99 * target(following / 255).amax(1)
        loss = train_expert.td_loss(net(now / 255), torch.zeros(32, dtype=torch.int64), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    while replay.added < 20_000:
        step(epsilon=1.0)
    speed = rate(four_steps, 4)
    hours = 3.2e6 / speed / 3600
    print(f"  {speed:,.0f} steps/s: {hours:.1f} hours to the 3.2M steps at which it has 18 in Pong")


def main(stage, count=None):
    games_fit = count is None or (stage == "mimic" and count > 0)
    if stage not in (*STEPS, "evaluate", "dqn") or not games_fit:
        sys.exit(__doc__)
    common.keep_freed_memory()
    autocast = common.pick_autocast("auto", torch.device("cpu"))
    print(f"{stage}: {common.machine()}, {torch.get_num_threads()} threads")
    if stage in ("evaluate", "dqn"):
        full_table() if stage == "evaluate" else replay_dqn()
        return
    experts = sorted((ROOT / "experts").glob("*.pt"))[:count]
    if stage == "mimic":
        args, expert = train_mimic.Args(), train_expert.Args()
        games = [path.stem for path in experts]
        G, N = len(games), args.num_envs
        emulator = bare_emulator(games, N)
        acting = bare_network(args, G * N, False, autocast)
        labelling = bare_network(expert, args.rollout * N, False, autocast)
        widths = G * [expert.hidden[-1]]
        learning = bare_network(args, G * args.minibatch, True, autocast, widths)
        reuse = args.updates * args.minibatch / (args.rollout * N)
        limit = 1 / (1 / emulator + 1 / acting + 1 / labelling + reuse / learning)
        bare = f"acting {acting:,.0f}, experts {labelling:,.0f}, learning {learning:,.0f}"
    else:
        args = train_expert.Args()
        widths = args if stage == "expert" else train_mimic.Args()
        script = train_expert if stage == "expert" else transfer
        emulator = bare_emulator([script.Args().game], args.num_envs)
        acting = bare_network(widths, args.num_envs, False, autocast)
        learning = bare_network(widths, args.minibatch, True, autocast)
        limit = 1 / (1 / emulator + 1 / acting + args.epochs / learning)
        bare = f"acting {acting:,.0f}, learning {learning:,.0f}"
    print(f"  bare: emulator {emulator:,.0f} steps/s, {bare} observations/s")
    if stage == "expert":
        speed = run_stage(stage, train_expert)
    elif stage == "mimic":
        # The student plays: that costs more than if its experts do.
        paths = tuple(map(str, experts))
        speed = run_stage(stage, train_mimic, experts=paths, actor="student") * len(experts)
    else:
        speed = run_stage(stage, transfer, mimic=str(ROOT / transfer.Args.mimic))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"  {speed:,.0f} steps/s, {speed / limit:.2f} of the limit {limit:,.0f}; {peak:.2f} GB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        for stage in (*STEPS, "evaluate", "dqn"):
            subprocess.run([sys.executable, __file__, stage], check=True)
