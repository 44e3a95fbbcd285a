"""Flags, bad input, and how the scripts behave in other surroundings than a terminal."""

import importlib
from dataclasses import dataclass

import pytest

import common
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
        ("--game combat", ["combat"]),
        ("--steps 0", ["--steps"]),
        ("--rollout 1e12", ["memory"]),
        ("--rollout 1e30", ["--rollout"]),
        ("--num-envs -1", ["--num-envs"]),
        ("--minibatch 33", ["--minibatch"]),
        ("--epsilon 1.5", ["--epsilon"]),
        ("--explore 100_000", ["--explore"]),
        ("--device tpu", ["--device"]),
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


def test_numbers_may_be_written_in_three_ways():
    cls = importlib.import_module("train_expert").Args
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
