"""What several test files share: command lines at small scale, and ways to run and compare them."""

import contextlib
import csv
import importlib
import io
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from common import load_checkpoint

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_expert", "train_mimic", "transfer", "evaluate")
TINY = "--num-envs 2 --rollout 16 --device cpu --precision float32"
SHORT = "--steps 320 --report-every 64"
EXPERT = f"train_expert.py {TINY} {SHORT} --minibatch 16 --channels 4 8 --hidden 16"
MIMIC = (
    f"train_mimic.py {TINY} {SHORT} --minibatch 8 --updates 8 --channels 4 8 --hidden 24 "
    "--replay 400 --experts runs/expert-pong/expert.pt runs/expert-boxing/expert.pt"
)
TRANSFER = f"transfer.py --game breakout --mimic runs/mimic {TINY} {SHORT} --minibatch 16"


def outputs(path):
    """A checkpoint's network on noise: scores (16, 18), features (16, F), and its layers' sizes."""
    checkpoint = load_checkpoint(path, ("mimic", "transfer"))
    net = importlib.import_module("transfer").AtariNet(**checkpoint["net_args"])
    net.load_state_dict({name: weight.float() for name, weight in checkpoint["net"].items()})
    obs = torch.randint(256, (16, 4, 84, 84), generator=torch.Generator().manual_seed(0))
    layers = [layer for layer in net.body if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    with torch.no_grad():
        return *net(obs.byte()), [layer.weight.norm().item() for layer in layers]


def call(folder, command, **more):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


def call_all(folder, commands, status=0):
    """Run commands in processes side by side: their outputs, or errors where the status is not 0.

    Most of each is the start of Python, on one core.
    """
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(call, [folder] * len(commands), commands))
    for done in ended:
        assert done.returncode == status and not (status and done.stdout), done.stdout + done.stderr
    return [done.stderr if status else done.stdout for done in ended]


def call_here(folder, command):
    """Run a command line in this process, as Python starts slowly: status, output, errors."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    argv, status = shlex.split(command), 0
    module = importlib.import_module(argv[0].removesuffix(".py"))
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch("sys.argv", argv),
    ):
        try:
            module.common.cli(module.main, module.Args)
        except SystemExit as ended:
            status = ended.code
    return status, *(stream.buffer.getvalue().decode() for stream in (output, errors))


def run(folder, command):
    """Run a command line that succeeds: its output."""
    status, said, errors = call_here(folder, command)
    assert status == 0, said + errors
    return said


def refused(folder, command, *words, **more):
    """The command ends with status 2 and one line that holds all words, and changes no file.

    With more, flags of a process, it runs in its own.
    """
    before = contents(folder)
    if more:
        done = call(folder, command, **more)
        status, said = done.returncode, done.stderr
    else:
        status, _, said = call_here(folder, command)
    assert status == 2 and "Traceback" not in said, said
    assert said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert contents(folder) == before


def contents(folder):
    return {
        path: path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and "__pycache__" not in str(path)
    }


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Two checkpoints hold the same numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("minutes", "command")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def start(folder, command, lines):
    """Start a long run, and wait until its log has some lines."""
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored here
    )
    log, deadline = folder / "runs/long/log.csv", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > lines):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.02)
    return process


def agrees(cell, number):
    """A cell of a table, such as 59,080 or 19.8, is the number, rounded to as many digits.

    A little more than half a digit, since the files hold six digits, rounded once before.
    """
    digits = len(cell.partition(".")[2])
    return abs(float(cell.replace(",", "")) - float(number)) <= 0.51 * 10**-digits


def table_line(text, game):
    """The cells of a README's table, in the line of a game."""
    (line,) = re.findall(rf"^\| {game.replace('_', ' ').title()} \| (.*) \|$", text, re.M)
    return line.split(" | ")
