"""Flags, bad input, and how the scripts behave in other surroundings than a terminal."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass

import pytest
import torch

import common
import evaluate
import train_expert
import train_mimic
import transfer
from common import parse_args
from helpers import EXPERT, MIMIC, SCRIPTS, TRANSFER, call_all, refused


def test_the_shell_sees_one_line_and_status_2(studio):
    said = call_all(studio, [f"{name}.py --seeed 3" for name in SCRIPTS], status=2)
    unknown = "unrecognized arguments: --seeed 3 (--help lists all flags)"
    assert said == [f"{name}.py: {unknown}\n" for name in SCRIPTS]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--game pongg", ["pongg", "pong"]),
        ("--game ALE/Pongg-v5", ["pongg", "pong"]),
        ("--game combat", ["combat"]),
        ("--steps 0", ["--steps"]),
        ("--rollout 1e12", ["memory"]),
        ("--rollout 1e30", ["--rollout"]),
        ("--num-envs -1", ["--num-envs"]),
        ("--minibatch 33", ["--minibatch"]),
        ("--epsilon 1.5", ["--epsilon"]),
        ("--explore 100_000", ["--explore"]),
        ("--device tpu", ["--device", "this machine has cpu"]),
        ("--device cuda:7", ["--device cuda:7", "this machine has cpu"]),
        ("--norm some", ["--norm", "none"]),
        ("--sticky 2", ["--sticky"]),
        ("--lanes 3", ["--lanes"]),
        ("--precision int8", ["--precision"]),
        ("--hidden 0", ["--hidden"]),
        ("--channels 4 4 4 4 4", ["--channels"]),
        ("--lr 0", ["--lr"]),
        ("--lr 1e38", ["--lr"]),
        ("--seed -1", ["--seed"]),
        ("--stepz 3", ["--stepz"]),
        ("--ste 3", ["--ste"]),
        ("--steps 1.5", ["--steps"]),
        ("--gamma nan", ["--gamma"]),
        ("--lr inf", ["--lr"]),
        ("--out train_expert.py", ["train_expert.py"]),
    ],
)
def test_expert_refuses_flags_out_of_range(studio, flags, words):
    refused(studio, f"{EXPERT} --out runs/none {flags}", *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--temperature 0", ["--temperature"]),
        ("--feature-weight -1", ["--feature-weight"]),
        ("--actor me", ["--actor"]),
        ("--objective v", ["--objective"]),
        ("--replay 3", ["--replay"]),
        ("--updates 0", ["--updates"]),
        ("--updates 1e15 --minibatch 1e15", ["--updates", "--minibatch"]),
        (
            "--experts runs/expert-pong/expert.pt runs/expert-pong/checkpoint.pt",
            ["two experts", "pong"],
        ),
        ("--experts runs/nothing.pt", ["runs/nothing.pt"]),
        ("--experts", ["no experts"]),
        ("--experts runs/mimic", ["stage mimic", "expert"]),
        ("--experts common.py", ["common.py"]),
    ],
)
def test_mimic_refuses(studio, flags, words):
    refused(studio, f"{MIMIC} --out runs/none {flags}", *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mimic runs/expert-pong", ["stage expert", "mimic"]),
        ("--mimic nowhere", ["nowhere"]),
        ("--arm both", ["--arm"]),
        ("--arm control --keep-head", ["--keep-head"]),
    ],
)
def test_transfer_refuses(studio, flags, words):
    refused(studio, f"{TRANSFER} {flags}", *words)


@pytest.mark.parametrize(
    "spelled, name",
    [
        ("ALE/Pong-v5", "pong"),
        ("PongNoFrameskip-v4", "pong"),
        ("Pong-ramDeterministic-v0", "pong"),
        ("MsPacman", "ms_pacman"),
        ("ms-pacman", "ms_pacman"),
        ("ALE/MsPacman-v5", "ms_pacman"),
        ("Qbert", "qbert"),
    ],
)
def test_games_may_be_spelled_as_gymnasium_does(spelled, name):
    for script in (train_expert, transfer):
        assert parse_args(script.Args, ["--game", spelled]).game == name
    assert parse_args(evaluate.Args, ["--runs", "x", "--games", spelled]).games == (name,)


def test_every_path_may_begin_with_a_tilde_and_every_list_be_a_pattern(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.pt", "b.pt", "c[1].pt"):
        (tmp_path / name).touch()
    both = (f"{tmp_path}/a.pt", f"{tmp_path}/b.pt")
    assert parse_args(train_expert.Args, ["--out=~/runs/x"]).out == f"{tmp_path}/runs/x"
    args = parse_args(train_mimic.Args, ["--out=~/m", "--experts", "~/[ab].pt"])
    assert (args.out, args.experts) == (f"{tmp_path}/m", both)
    args = parse_args(transfer.Args, ["--out=~/t", "--mimic=~/m.pt"])
    assert (args.out, args.mimic) == (f"{tmp_path}/t", f"{tmp_path}/m.pt")
    args = parse_args(evaluate.Args, ["--runs", "~/?.pt", "~/c[1].pt", "no*", "--out=~/r"])
    assert (args.runs, args.out) == ((*both, f"{tmp_path}/c[1].pt", "no*"), f"{tmp_path}/r")
    assert parse_args(evaluate.Args, ["--curves", "~/[ab].pt"]).curves == both


def test_help_shows_the_flags_in_their_groups(capsys):
    for script, group in ((train_expert, "Learning:"), (evaluate, "How it plays:")):
        with pytest.raises(SystemExit):
            parse_args(script.Args, ["--help"])
        said = capsys.readouterr().out
        assert f"\n{group}\n  --e" in said and all(len(line) <= 100 for line in said.splitlines())


def test_a_script_runs_where_the_output_is_no_file(copy, monkeypatch):
    """As in a notebook, whose stdout cannot be reconfigured and may lack what files have."""

    class Output:
        text = ""

        def write(self, text):
            Output.text += text

        def flush(self):
            pass

        def isatty(self):
            return False

    monkeypatch.chdir(copy)
    monkeypatch.setattr("sys.stdout", Output())
    monkeypatch.setattr("sys.argv", shlex.split(EXPERT + " --game pong --out runs/cell"))
    common.cli(train_expert.main, train_expert.Args)
    assert "done: no episode over; " in Output.text


def test_a_terminal_shows_the_progress_of_every_round_in_its_last_line(copy):
    def lines(command):
        """What a terminal of 100 columns gets."""
        screen, tty = pty.openpty()
        fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=copy, stdout=tty)
        os.close(tty)
        said = b""
        while True:
            try:
                said += os.read(screen, 10_000)
            except OSError:  # the process has ended
                break
        assert process.wait(60) == 0
        return said.decode().replace("\r\n", "\n").split("\r\033[K")

    shown = lines(EXPERT + " --game pong --out runs/tty")
    assert "starting 2 emulators of pong ..." in shown
    rounds = [line for line in shown if re.match(r" +\d+ +\d+%", line)]
    # All ten rounds are shown; the six reports stay.
    assert len(rounds) == 10 + 6 and sum(line.endswith("\n") for line in rounds) == 6
    assert re.search(r"320 100%  score \S+  max Q .*  \d+ steps/s  0 min left\n", rounds[-1])
    assert all(len(line.split("\n")[0]) < 100 for line in rounds)
    shown = lines("evaluate.py --runs runs/expert-pong --episodes 1 --device cpu")
    assert "starting emulators: 1 of 1" in shown
    assert any(re.match(r"0 of 1 episodes  0%  [\d,]+ steps/s", line) for line in shown)


def test_cores_are_those_that_the_process_may_use(copy):
    show = "import common, train_expert; print(common.cores())"
    one = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", show],
        cwd=copy,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )
    assert done.stdout == "1\n", done.stderr


def test_a_container_may_use_fewer_cores_than_the_machine_has(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(common, "Path", lambda path: quota)
    for text, cores in (("max 100000", 64), ("250000 100000", 3), ("50000 100000", 1)):
        quota.write_text(text)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
        assert common.cores() == cores


def test_a_device_that_computes_something_else_is_refused():
    class OnDevice(torch.nn.Linear):
        """On its device it is off by a factor; a copy for the CPU is right."""

        factor = 1.0

        def __deepcopy__(self, memo):
            right = torch.nn.Linear(3, 3)
            right.load_state_dict(self.state_dict())
            return right

        def parameters(self):
            return iter([torch.empty(1, device="meta")])  # not the CPU

        def forward(self, x):
            return (super().forward(torch.ones(2, 3)) * self.factor,)

    net, example = OnDevice(3, 3), torch.ones(2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "__call__", lambda self, x: [self.forward(x)])
        net.__class__.__call__ = lambda self, x: self.forward(x)
        common.check_device(net, example)
        net.factor = 1.1
        with pytest.raises(common.UserError, match="--device cpu"):
            common.check_device(net, example)


def test_a_device_that_does_not_work_is_named(monkeypatch):
    def no_kernel(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(common.UserError, match="no kernel image .*; use --device cpu$"):
            common.pick_device(name)
    with pytest.raises(common.UserError, match="this machine has cpu, cuda:0, cuda:1$"):
        common.pick_device("cuda:2")


def test_channels_last_is_not_used_on_apples_gpus():
    assert common.memory_format(torch.device("mps")) == torch.contiguous_format
    assert common.memory_format(torch.device("cpu")) == torch.channels_last


@pytest.mark.parametrize("versions", [{"ale-py": "0.10.2"}, {"matplotlib": None}])
def test_a_package_that_is_missing_or_too_old_is_one_line(copy, versions):
    """In a process of its own, before torch and ale-py are imported."""
    ((package, version),) = versions.items()
    fake = f"""
from importlib import metadata
real, known = metadata.version, {versions}
def version(name):
    if name in known and known[name] is None:
        raise metadata.PackageNotFoundError(name)
    return known.get(name) or real(name)
metadata.version = version
import train_expert
"""
    done = subprocess.run([sys.executable, "-c", fake], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert package in done.stderr and "requirements.txt" in done.stderr
    assert version is None or "0.12.1 or newer" in done.stderr and version in done.stderr


def test_numbers_may_be_written_in_three_ways():
    cls = train_expert.Args
    assert {
        parse_args(cls, ["--steps", text]).steps for text in ("10_000_000", "1e7", "10000000")
    } == {10_000_000}


@dataclass(frozen=True)
class NewArgs:
    rate: float = 1  # a default that looks like an int
    bare: int = 3
    on: bool = True  # a switch that is on
    off: bool = False  # and one that is off


def test_a_flag_that_a_student_adds_does_what_the_dataclass_says():
    assert parse_args(NewArgs, []) == NewArgs()
    flags = "--rate 0.5 --bare 4 --no-on --off".split()
    assert parse_args(NewArgs, flags) == NewArgs(0.5, 4, False, True)


def test_a_script_runs_although_its_output_is_closed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_expert.py"])
    monkeypatch.setattr("sys.stdout", None)  # as with `>&-`
    common.cli(print, NewArgs)


@pytest.mark.parametrize(
    "message, is_memory",
    [
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("more than one element refers to a single memory location. Please clone()", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_want_of_memory_is_called_so(capsys, monkeypatch, message, is_memory):
    def main(args):
        raise RuntimeError(message)

    monkeypatch.setattr("sys.argv", ["train_expert.py"])
    with pytest.raises(SystemExit if is_memory else RuntimeError):
        common.cli(main, NewArgs)
    assert ("not enough memory" in capsys.readouterr().err) == is_memory
