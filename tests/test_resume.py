"""What a stop, a crash or a full disk loses, and how a run resumes."""

import importlib
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import common
import train_expert
from common import load_checkpoint, load_state, save_checkpoint
from helpers import (
    EXPERT,
    MIMIC,
    TRANSFER,
    call,
    call_all,
    call_here,
    contents,
    outputs,
    refused,
    rows,
    run,
    same,
    start,
)


@pytest.mark.parametrize("command", [EXPERT + " --game boxing", MIMIC])
def test_same_seed_same_run(copy, command):
    for flags in ("a", "c --seed 2"):
        run(copy, f"{command} --out runs/{flags}")
    call_all(copy, [command + " --out runs/b"])  # in a process of its own, too
    a, b, c = (load_checkpoint(copy / f"runs/{name}", ("expert", "mimic")) for name in "abc")
    for checkpoint in (a, b):
        del checkpoint["args"]["out"]
    assert same(a, b) and not same(a["net"], c["net"])


@pytest.mark.parametrize("command", [EXPERT + " --game pong", MIMIC, TRANSFER])
def test_same_command_resumes_and_steps_may_grow(copy, command):
    # Exact in weights, optimizer, random generator and log. The emulators begin new games, since
    # their state cannot be saved, and the mimic refills its replay: so two continuations equal
    # each other, and not the run that never stopped.
    run(copy, f"{command} --out runs/one")
    finished = contents(copy / "runs/one")
    shutil.copytree(copy / "runs/one", copy / "saved")
    ends = []
    for _ in range(2):
        said = run(copy, f"{command} --out runs/one --steps 640")
        assert "resumes at step 320" in said
        ends.append(load_checkpoint(copy / "runs/one", ("expert", "mimic", "transfer")))
        assert [int(row["step"]) for row in rows(copy / "runs/one/log.csv")] == [32] + list(
            range(64, 321, 64)
        ) + list(range(352, 353)) + list(range(384, 641, 64))
        shutil.rmtree(copy / "runs/one")
        shutil.copytree(copy / "saved", copy / "runs/one")
    assert same(*ends)
    assert (copy / "runs/one/log.csv").read_bytes() == next(
        v for k, v in finished.items() if k.name == "log.csv"
    )


def test_a_run_resumes_with_another_interval_between_reports(copy):
    command = EXPERT + " --game pong --out runs/one"
    run(copy, command.replace("--steps 320", "--steps 32"))
    assert "resumes at step 32" in run(copy, command + " --report-every 160")
    assert [int(row["step"]) for row in rows(copy / "runs/one/log.csv")][-3:] == [160, 288, 320]


def test_a_run_that_is_older_than_a_flag_had_its_default(copy):
    (copy / "runs/more").mkdir()
    expert = torch.load(copy / "runs/expert-pong/checkpoint.pt")
    del expert["args"]["lam"]
    torch.save(expert, copy / "runs/more/checkpoint.pt")
    command = EXPERT + " --game pong --out runs/more --steps 352"
    refused(copy, command + " --lam 0.5", "holds a run with --lam 0.85, but this command says 0.5")
    assert "resumes at step 320" in run(copy, command)
    before, after = (
        load_checkpoint(copy / f"runs/{name}/expert.pt", ("expert",))
        for name in ("expert-pong", "more")
    )
    assert after["step"] == 352 and after["minutes"] > before["minutes"]
    for name, weight in before["net"].items():  # two gradient steps away, not new
        torch.testing.assert_close(after["net"][name], weight, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("command, name", [(EXPERT + " --game pong", "expert"), (MIMIC, "mimic")])
def test_weights_alone_are_no_run_to_resume(copy, command, name):
    (copy / "runs/more").mkdir()
    folder = {"expert": "expert-pong", "mimic": "mimic"}[name]
    shutil.copy(copy / f"runs/{folder}/{name}.pt", copy / "runs/more/checkpoint.pt")
    refused(copy, command + " --out runs/more --steps 352", "runs/more", "another --out")


def test_a_mimics_weights_alone_serve_transfer_and_evaluation(copy, short_episodes):
    command = TRANSFER + " --mimic runs/mimic/mimic.pt --keep-head --steps 32 --lr 1e-12"
    run(copy, command + " --out runs/other")
    scores, _, _ = outputs(copy / "runs/mimic")
    moved, _, _ = outputs(copy / "runs/other/expert.pt")
    assert torch.allclose(moved, scores, atol=2e-3)  # rounded to half precision twice
    run(copy, "evaluate.py --runs runs/mimic/mimic.pt --episodes 1 --device cpu")
    experts = {row["network"] for row in rows(copy / "results/table.csv") if row["expert"] == "nan"}
    assert "runs/expert-pong/expert.pt" in experts  # it still knows its experts


def test_stop_and_continue_equals_never_stopped_on_the_same_data(tmp_path):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 2)
        return net, torch.optim.RAdam(net.parameters(), lr=0.1), torch.Generator().manual_seed(0)

    def learn(net, optimizer, rng, updates):
        for _ in range(updates):
            loss = net(torch.randn(8, 4, generator=rng)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    straight, stopped, continued = make(), make(), make()
    learn(*straight, 20)
    learn(*stopped, 12)
    net, optimizer, rng = stopped
    save_checkpoint(
        tmp_path / "c.pt",
        importlib.import_module("train_expert").Args(),
        stage="expert",
        games=["pong"],
        step=12,
        minutes=0.0,
        score=0.0,
        scores=[],
        net_args={},
        net=net.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=rng.get_state(),
    )
    load_state(load_checkpoint(tmp_path / "c.pt", ("expert",)), *continued, tmp_path)
    learn(*continued, 8)
    assert same(straight[0].state_dict(), continued[0].state_dict())


@pytest.mark.parametrize("command", [EXPERT + " --game pong", MIMIC, TRANSFER])
def test_ctrl_c_saves_and_says_how_to_resume(copy, command):
    command += " --out runs/long --steps 100_000 --report-every 1_000"
    process = start(copy, command, 1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 130
        and "the same command resumes at step" in said
        and "Traceback" not in said
    )
    step = load_checkpoint(copy / "runs/long", ("expert", "mimic", "transfer"))["step"]
    assert int(rows(copy / "runs/long/log.csv")[-1]["step"]) == step > 0
    assert f"resumes at step {step:,}" in run(copy, command.replace("100_000", str(step + 32)))


def test_ctrl_c_saves_although_it_has_ended_the_reader_and_a_second_process_is_refused(copy):
    command = EXPERT + " --game pong --out runs/long --steps 1_000_000 --report-every 1_000"
    process = start(copy, command, 1)
    second = call(copy, command)  # at work in the same folder: the first one's files would suffer
    assert second.returncode == 2 and "another process" in second.stderr
    process.stdout.close()  # as `| tee log.txt` does
    before = load_checkpoint(copy / "runs/long", ("expert",))["step"]
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert load_checkpoint(copy / "runs/long", ("expert",))["step"] > before


def test_kill_at_any_moment_loses_no_file(copy):
    command = (
        EXPERT + " --game pong --out runs/long --steps 100_000 --report-every 32"
    )  # saves all the time
    for lines in (1, 30):
        process = start(copy, command, lines)
        process.kill()
        process.wait()
        step = load_checkpoint(copy / "runs/long", ("expert",))["step"]
        assert step > 0
    with open(copy / "runs/long/log.csv", "a") as log:
        log.write("\n999999,0.1,3")  # a row beyond the checkpoint, cut off by the kill
    run(copy, command.replace("100_000", str(step + 64)))
    steps = [int(row["step"]) for row in rows(copy / "runs/long/log.csv")]
    assert steps == sorted(set(steps)) and steps[-1] == step + 64


def test_folder_of_another_run_is_left_alone(copy):
    refused(copy, EXPERT + " --game pong --lr 1e-3", "--lr", "runs/expert-pong")
    refused(copy, EXPERT + " --game pong --steps 64", "--steps")
    refused(copy, EXPERT + " --game pong --out runs/mimic", "stage mimic")
    refused(copy, MIMIC.replace(" runs/expert-boxing/expert.pt", ""), "runs/mimic")
    (copy / "runs/mimic/checkpoint.pt").unlink()
    refused(copy, MIMIC, "without its checkpoint")
    (copy / "runs/kept").mkdir()
    for name in ("expert-boxing/expert.pt", "mimic/mimic.pt"):
        shutil.copy(copy / "runs" / name, copy / "runs/kept")
        file = Path(name).name
        refused(copy, EXPERT + " --game pong --out runs/kept", f"{file} without its checkpoint")
        (copy / "runs/kept" / file).unlink()


def test_mimic_does_not_resume_with_other_experts(copy, short_episodes):
    path = copy / "runs/expert-pong/expert.pt"
    expert = load_checkpoint(path, ("expert",))
    torch.save(expert | {"minutes": expert["minutes"] + 1}, path)  # trained once more
    refused(copy, MIMIC + " --steps 640", "other experts")
    status, _, errors = call_here(copy, "evaluate.py --runs runs/mimic --episodes 2 --device cpu")
    assert status == 0 and "pong has no expert" in errors
    table = [row for row in rows(copy / "results/table.csv") if row["network"] == "runs/mimic"]
    experts = {row["game"]: row["expert"] for row in table}
    assert experts["pong"] == "nan" and experts["boxing"] != "nan"


def test_mimic_knows_its_experts_by_other_paths(copy):
    same_experts = MIMIC.replace("runs/expert", f"{copy}/runs/expert")
    assert "resumes at step 320" in run(copy, same_experts + " --steps 352")


def test_a_reader_of_the_output_may_leave(copy):
    command = f"{EXPERT} --game pong --steps 3_000 --out runs/left"
    options = {"cwd": copy, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *shlex.split(command)], **options)
    for line in process.stdout:
        if "score" in line:  # a report, which follows a save
            break
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(300) == 2 and error.count("\n") == 1 and "the output was closed" in error
    step = load_checkpoint(copy / "runs/left", ("expert",))["step"]
    assert f"resumes at step {step:,}" in run(copy, command.replace("3_000", str(step + 32)))


def test_log_that_a_crash_or_a_hand_has_spoiled(copy):
    command, log = EXPERT + " --game pong", copy / "runs/expert-pong/log.csv"
    good = log.read_bytes()
    log.write_bytes(good + b"\xc2\xb2,1\n" + b"9" * 5_000 + b",1\n\xff\xfe\n32,\xff,1\n")
    run(copy, command + " --steps 352")
    assert log.read_bytes().startswith(good)
    assert [int(row["step"]) for row in rows(log)][-2:] == [320, 352]
    log.write_bytes(good[:20])  # a full disk had room for half a header
    run(copy, command + " --steps 384")
    assert [int(row["step"]) for row in rows(log)] == [384]
    text = log.read_text().replace("max_q", "frames,max_q")
    log.write_text(text)  # as if someone had added a column for a while
    status, _, errors = call_here(copy, command + " --steps 416")
    assert status == 2 and "has other columns" in errors and log.read_text() == text
    log.write_bytes(b"my,own,notes\n1,2,3\n")
    refused(copy, command + " --steps 448", "log.csv", "not a log")


def test_full_disk_is_one_line_and_keeps_the_old_checkpoint(copy):
    command = EXPERT + " --game pong --steps 640"
    limit = 8_000  # bytes per file: the checkpoint does not fit
    refused(
        copy,
        command,
        "could not write",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "resumes at step 320" in run(copy, command)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_every_signal_that_ends_a_process_saves_first(copy, name):
    command = EXPERT + " --game pong --out runs/long --steps 100_000 --report-every 100_000"
    process = start(copy, command, 1)
    before = load_checkpoint(copy / "runs/long", ("expert",))["step"]
    time.sleep(0.5)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command resumes at step" in said
    assert load_checkpoint(copy / "runs/long", ("expert",))["step"] > before


def test_a_closed_terminal_saves(copy):
    """The terminal is gone when the signal comes: printing fails, saving does not."""
    screen, tty = pty.openpty()
    command = EXPERT + " --game pong --out runs/long --steps 100_000 --report-every 100_000"
    argv = [sys.executable, *shlex.split(command)]
    streams = {"stdin": tty, "stdout": tty, "stderr": tty}
    process = subprocess.Popen(argv, cwd=copy, start_new_session=True, **streams)
    os.close(tty)
    said = b""
    while b"steps/s" not in said:
        said += os.read(screen, 10_000)
    before = load_checkpoint(copy / "runs/long", ("expert",))["step"]
    os.close(screen)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert load_checkpoint(copy / "runs/long", ("expert",))["step"] > before


def test_a_signal_that_is_ignored_stays_ignored(copy):
    """As under nohup."""
    command = EXPERT + " --game pong --steps 32 --out runs/nohup"
    code = f"""
import os, signal, shlex, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import common, train_expert
common.Stop.__exit__ = lambda *_: os.kill(os.getpid(), signal.SIGHUP)
sys.argv = shlex.split({command!r})
common.cli(train_expert.main, train_expert.Args)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and "stopping" not in done.stdout


def test_main_can_be_called_from_a_thread_and_again(tmp_path):
    """As in a notebook: handlers and the folder's lock go when main returns or raises."""
    flags = {"num_envs": 2, "rollout": 16, "minibatch": 16, "channels": (4,), "hidden": (8,)}
    args = train_expert.Args(steps=32, out=str(tmp_path / "t"), device="cpu", **flags)
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_expert.main, args).result()
    longer = train_expert.Args(steps=64, out=str(tmp_path / "t"), device="cpu", **flags)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_expert, "td_loss", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:  # the traceback holds on to main's variables
            train_expert.main(longer)
    train_expert.main(longer)
    assert load_checkpoint(tmp_path / "t", ("expert",))["step"] == 64 and kept
    assert signal.getsignal(signal.SIGINT) is before


def test_a_log_that_is_open_elsewhere_gets_its_rows_later(copy, monkeypatch, capsys):
    """Windows refuses to write to a file that a spreadsheet shows."""
    attempts = []

    def open_log(path, mode="r", **more):
        if mode == "a+":
            attempts.append(path)
            if len(attempts) in (2, 3):
                raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode, **more)

    monkeypatch.setattr(common, "open", open_log, raising=False)
    said = run(copy, EXPERT + " --game pong --out runs/sheet")
    assert said.count("log.csv is open elsewhere; this row follows with the next report") == 2
    steps = [int(row["step"]) for row in rows(copy / "runs/sheet/log.csv")]
    assert steps == [32, 64, 128, 192, 256, 320]


def test_a_clock_that_is_set_back_changes_nothing(copy, monkeypatch):
    hours = iter(range(10_000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    said = run(copy, EXPERT + " --game pong --out runs/back")
    minutes = [float(row["minutes"]) for row in rows(copy / "runs/back/log.csv")]
    assert 0 < minutes[0] and minutes == sorted(minutes) and "-" not in said.split("max Q")[-1]


def test_a_run_with_flags_of_another_version_is_not_resumed(copy):
    path = copy / "runs/expert-pong/checkpoint.pt"
    expert = torch.load(path)
    expert["args"]["lanes"] = expert["args"].pop("num_envs")
    torch.save(expert, path)
    words = "runs/expert-pong holds a run of another version", "--lanes", "name another --out"
    refused(copy, EXPERT + " --game pong --steps 640", *words)


def test_a_compiled_network_saves_and_resumes_under_its_plain_names(tmp_path):
    """As if a student had added `net = torch.compile(net)`."""
    plain = torch.nn.Linear(2, 2)
    compiled = torch.compile(plain, backend="eager")
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    save_checkpoint(tmp_path / "c.pt", train_expert.Args(), net=compiled.state_dict())
    saved = torch.load(tmp_path / "c.pt")
    assert saved["net"].keys() == plain.state_dict().keys()
    other = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    common.load_weights(other, saved, tmp_path)
    assert same(other.state_dict(), compiled.state_dict())


def test_work_that_another_process_has_just_saved_is_kept(copy, monkeypatch):
    """It was saved after this process had read the folder, and before it locked it."""
    command = EXPERT + " --game pong --steps 384"
    shutil.copytree(copy / "runs/expert-pong", copy / "runs/other")
    run(copy, command + " --out runs/other")
    plain = common.Run.start

    def start_late(*details):
        shutil.copy(copy / "runs/other/checkpoint.pt", copy / "runs/expert-pong")
        plain(*details)

    monkeypatch.setattr(common.Run, "start", start_late)
    status, _, said = call_here(copy, command)
    assert status == 2 and "another process has just worked in runs/expert-pong" in said
    assert load_checkpoint(copy / "runs/expert-pong", ("expert",))["step"] == 384
