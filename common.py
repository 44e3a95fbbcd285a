"""Plumbing that would serve any training script: command line, checkpoint, log, device, Ctrl-C.

A checkpoint is one plain dict, written by `torch.save` and read with `weights_only=True`:

    format      "actor-mimic-1"
    stage       "expert", "mimic" or "transfer"
    games       the games that the network plays, as ale-py spells them
    step        agent decisions so far (per game in the mimic), 4 emulator frames each
    minutes     wall time so far
    args        the flags of the run
    command     the command line, and `machine`, where it ran
    net_args    {"channels": [...], "hidden": [...]}: widths, and of a mimic conv_norm (older: true)
    net         its state_dict; half precision in what ships: expert.pt, mimic.pt
    online      expert, transfer: the weights that learn, of which net is the moving average (not in
                what ships)
    optimizer   its state_dict (not in what ships)
    rng         state of the generator that explores and draws (not in what ships)
    score       mean score of the last finished games, and `scores`, each of them (mimic: per game)
    legal       expert, transfer: the game's legal actions, of 18 (for the reader, as max_q)
    max_q       expert, transfer: mean over the last rollout of max_a Q(s, a)
    regressors  mimic: state_dict of the linear maps of feature regression (not in what ships)
    experts     mimic: paths of its experts, and `marks`, step and minutes of each
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import inspect
import io
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

# Torch's idle threads wait in a loop for their next work, and take the emulators' cores meanwhile:
# let them sleep after 1,000 turns of it, some microseconds (GNU's OpenMP: 300,000, milliseconds).
# It reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None

FORMAT = "actor-mimic-1"
NEEDED = {"games", "step", "minutes", "args", "net_args", "net", "score", "scores"}
NEEDED_OF_MIMIC = {"experts", "marks"}  # besides
# Flags that may change when a run goes on; an expert is known by its mark, whatever its path.
MAY_CHANGE = {"out", "steps", "report_every", "device", "precision", "experts"}


class UserError(Exception):
    """The user can mend this: it is printed as one line, and the exit status is 2."""


# Command line


def whole(text):
    """Read 10000000, 10_000_000 and 1e7 alike as an int; ValueError on 1.5, 1e30 or a word."""
    value = float(text)
    if not value.is_integer() or abs(value) > 1e15:
        raise ValueError(text)
    return int(value)


def finite(text):
    """Read a float; raises ValueError if it is infinite or nan."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line."""

    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def parse_args(cls, argv=None):
    """Make a command line from a dataclass of defaults; the comment behind a field is its help.

    `learning_rate: float = 0.1  # what it means` becomes `--learning-rate`. A tuple takes several
    values, a bool becomes `--flag` and `--no-flag`. A ValueError of the class's own `__post_init__`
    (a flag out of range) is a UserError.
    """
    source = inspect.getsource(cls)
    parser = Parser(
        description=inspect.getmodule(cls).__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(cls):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
        comment = comment.group(1).replace("%", "%%") if comment else ""
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            either = argparse.BooleanOptionalAction  # --flag and --no-flag
            parser.add_argument(flag, action=either, default=default, help=comment)
            continue
        several = isinstance(default, tuple)
        kind = type(default[0] if default else "") if several else field.type
        shown = " ".join(map(str, default)) if several else str(default)
        parser.add_argument(
            flag,
            type={int: whole, float: finite}.get(kind, kind),
            default=default,
            nargs="*" if several else None,
            metavar=kind.__name__.upper(),
            help=f"{comment} [{shown}]",
        )
    values = vars(parser.parse_args(argv))
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValueError as error:
        raise UserError(str(error)) from None


def require(ok, message):
    """Raise ValueError(message) unless ok; this and the next four check a class of flags."""
    if not ok:
        raise ValueError(message)


def require_one_of(flag, value, choices):
    """Raise ValueError with the nearest choices unless value is one of them."""
    near = difflib.get_close_matches(value, choices, cutoff=0.4) or sorted(choices)[:5]
    require(value in choices, f"{flag} {value} is unknown; did you mean {', '.join(near)}?")


def require_range(args, low, high, *names):
    """Raise ValueError unless the named flags lie between low and high."""
    for name in names:
        flag = "--" + name.replace("_", "-")
        require(low <= getattr(args, name) <= high, f"{flag} must lie between {low} and {high}")


def require_shares(args, *names):
    """Raise ValueError unless the named flags lie between 0 and 1."""
    require_range(args, 0, 1, *names)


def require_positive(args, *names):
    """Raise ValueError unless the named flags, or all entries of a tuple, are positive."""
    for name in names:
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else (value,)
        flag = "--" + name.replace("_", "-")
        require(values and min(values) > 0, f"{flag} must be positive")


def run(main, cls):
    """Parse the command line and call main(args); a UserError is one line and exit status 2."""
    try:
        keep_freed_memory()
        sys.stdout = sys.stdout or open(os.devnull, "w")  # the shell has closed it: `>&-`
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show
        main(parse_args(cls))
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # `| head`, or Ctrl-C has ended `| tee`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        message = "nobody reads the output; start again (training goes on from its last save)"
    except OSError as error:  # a full disk, a folder that may not be written
        message = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    except (MemoryError, RuntimeError) as error:
        no_memory = "out of memory|allocate memory|enough memory|Storage size"
        if isinstance(error, RuntimeError) and not re.search(no_memory, str(error)):
            raise
        message = (
            "not enough memory: lower the largest of --lanes, --rollout, --replay, --updates, "
            "--minibatch, --channels and --hidden (evaluate.py: --games)"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


# Machine


def keep_freed_memory():
    """Tell Linux's allocator to keep what is freed: the next batch needs buffers as large.

    As it stands it hands each large buffer back and pays for it page by page at the next use, which
    makes training 1 to 16 % slower (two runs each of stages 1 and 2).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # an older one: 32 MB


def pick_device(name):
    """Turn --device auto|cpu|cuda|mps into a torch.device; raises UserError if it is not here."""
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = "cuda" if here["cuda"] else "mps" if here["mps"] else "cpu"
    if not here.get(name):
        available = ", ".join(device for device in here if here[device])
        raise UserError(f"--device {name} is not to be had here; this machine has {available}")
    return torch.device(name)


def pick_autocast(precision, device):
    """Turn --precision auto|float32|bfloat16 into an autocast context for forward passes.

    auto is bfloat16 where it is fast: on NVIDIA's recent GPUs, and CPUs with AVX-512 BF16.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--precision {precision} is not one of auto, float32, bfloat16")
    if precision == "auto":
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def machine():
    """Describe this machine in a few words."""
    gpu = torch.cuda.get_device_name() + ", " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} cores, {platform.system()} {platform.machine()}"


# Checkpoint


def plain(args):
    """Turn flags into a dict with lists for tuples: what a checkpoint holds of them."""
    values = dataclasses.asdict(args)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@contextlib.contextmanager
def whole_file(path):
    """Give the name of a file to write beside path; it becomes path once it is written to the end.

    A crash or a full disk leaves the old file or the new one, never half of one. Raises UserError
    if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"tmp-{path.name}")  # same ending: it may tell the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file)  # else the power may fail between the new name and the contents
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not write {path} ({error}); an old one is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoint(path, args, **contents):
    """Write a checkpoint, whole or not at all.

    contents: as the module's docstring says; format, args, command and machine are added here.
    Raises UserError if it cannot be written, or if a weight is infinite or nan.
    """
    if not all(weight.isfinite().all() for weight in contents["net"].values()):
        raise UserError(f"the weights are not finite: try a smaller --lr; {path} is not written")
    checkpoint = {
        "format": FORMAT,
        "args": plain(args),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        **contents,
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with whole_file(path) as temporary:
        # A copy: if the disk is full, getbuffer's view stays in the error, and freeing it there
        # crashes Python 3.12.1.
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path, stages):
    """Read a checkpoint onto the CPU, without running any code that it may hold.

    path: the file, or the folder of a run; stages: the stages that are accepted. Raises UserError
    if it is missing, damaged, not ours, or of another stage.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: name a file, or the folder of a run")
    try:
        if zipfile.ZipFile(path).testzip():  # checksums, which torch does not look at
            raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception:  # on noise the unpickler may fail in any way
        raise UserError(f"{path} is damaged, or not a checkpoint of this project") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (of format {FORMAT})")
    if checkpoint.get("stage") not in stages:
        stage = checkpoint.get("stage")
        raise UserError(f"{path} is of stage {stage}; needed here: {' or '.join(stages)}")
    needed = NEEDED | NEEDED_OF_MIMIC if checkpoint["stage"] == "mimic" else NEEDED
    if missing := needed - checkpoint.keys():
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    if not isinstance(checkpoint["args"], dict):
        raise UserError(f"{path} is damaged: its args are no dict")
    return checkpoint


def load_weights(net, checkpoint, path, part="net"):
    """Put a checkpoint's weights into net.

    Raises UserError, naming path, if they do not fit, or are not finite.
    """
    try:
        net.load_state_dict(checkpoint[part])
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError(f"the weights in {path} do not fit: other widths, or layers") from None
    if not all(weight.isfinite().all() for weight in net.parameters()):
        raise UserError(f"the weights in {path} are not finite")


def load_state(checkpoint, net, optimizer, rng, path):
    """Put a checkpoint's weights, optimizer and random generator back, in place.

    What ships holds weights alone: optimizer and generator begin anew with them. Raises
    UserError, naming path, if something does not fit.
    """
    load_weights(net, checkpoint, path)
    if "optimizer" not in checkpoint:
        print(f"{path} holds weights alone: what else learns begins anew")
        return
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.set_state(checkpoint["rng"])
    except (RuntimeError, KeyError, TypeError, ValueError):
        raise UserError(f"the optimizer's state in {path} is damaged; name another --out") from None


def open_run(folder, stage, args):
    """Return the checkpoint that this command's run goes on from, or None for a new run.

    Flags of MAY_CHANGE may differ when a run is continued. Raises UserError if the folder
    holds a run of another stage or with other flags: nothing is written over.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if not (folder / "checkpoint.pt").exists():
        for name in ("log.csv", "expert.pt", "mimic.pt"):
            if (folder / name).exists():
                lone = f"{folder} holds {name} without its checkpoint"
                raise UserError(f"{lone}: delete that file, or name another --out")
        return None
    checkpoint = load_checkpoint(folder, (stage,))
    # A flag that is newer than the run has its default: so new flags don't strand old runs.
    before = plain(type(args)()) | checkpoint["args"]
    for name, now in plain(args).items():
        if name not in MAY_CHANGE and before[name] != now:
            flag = name.replace("_", "-")
            raise UserError(
                f"{folder} holds a run with --{flag} {before[name]}, but this command says {now}; "
                "name another --out for a new run"
            )
    if checkpoint["step"] > args.steps and before["steps"] != args.steps:
        done = checkpoint["step"]
        raise UserError(f"{folder} holds {done:,} steps, more than --steps {args.steps:,}")
    return checkpoint


def check_finite(loss, step, folder):
    """Raise UserError if a loss is infinite or nan: the run has diverged.

    loss: scalar tensor, the gradient's norm added, since a finite loss may still spoil the weights.
    """
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss is not finite at step {step:,}: try a smaller --lr and another --out; "
            f"what {folder} holds is from before"
        )


# Log


class Log:
    """One CSV per run and one console line per report.

    A continued run first drops what was written after its checkpoint, so that every step stands
    in the log once. `saved` is that checkpoint, or None. Raises UserError if another process writes
    to the folder: whoever does holds its empty file `lock`.
    """

    def __init__(self, folder, saved):
        self.path, self.started = Path(folder) / "log.csv", time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl:
            self.lock = open(self.path.parent / "lock", "a")  # held to the end of the process
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"another process is at work in {folder}; name another --out"
                raise UserError(message) from None
            except OSError:
                pass  # a file system without locks
        self.clock = None  # step and time of the first line
        self.first_step = saved["step"] if saved else 0
        self.minutes_before = saved["minutes"] if saved else 0.0
        if self.path.exists():
            text = self.path.read_text(encoding="ascii", errors="replace")
            lines = text.splitlines(keepends=True)
            whole_lines = [line for line in lines if line.endswith("\n")]  # not cut off by a crash
            if whole_lines and not whole_lines[0].startswith("step,"):
                raise UserError(f"{self.path} is not a log of this project; move it away")
            rows = [
                row for row in whole_lines[1:] if re.fullmatch("[0-9]{1,18},[-+.,0-9a-z]+\n", row)
            ]
            kept = [row for row in rows if int(row.split(",")[0]) <= self.first_step]
            with whole_file(self.path) as temporary:
                temporary.write_text("".join(whole_lines[:1] + kept), encoding="ascii")

    def minutes(self):
        """Return the run's wall time so far, in minutes, earlier stretches included."""
        return self.minutes_before + (time.time() - self.started) / 60

    def header(self, args, device, autocast, net, buffer_bytes):
        """Print what follows from the flags, before anything is spent on it."""
        parameters = sum(weight.numel() for weight in net.parameters())
        goes_on = f"goes on at step {self.first_step:,}" if self.first_step else "starts"
        print(
            f"{self.path.parent} {goes_on} of {args.steps:,} (x4 = {4 * args.steps:,} frames); "
            f"{parameters:,} parameters in {'bfloat16' if autocast._enabled else 'float32'} "
            f"on {device}; {buffer_bytes / 1e6:,.0f} MB of observations; "
            "now the emulators start; speed and time left follow with the second report",
            flush=True,
        )

    def write(self, step, row):
        """Append step, minutes and a dict of numbers, with the header if the file is new.

        Raises UserError if the file has other columns, or cannot be written.
        """
        row = {"step": step, "minutes": self.minutes(), **row}
        try:
            with open(self.path, "a+", newline="") as file:
                file.seek(0)
                columns = next(csv.reader(file), [])
                if columns and columns != list(row):
                    raise UserError(f"{self.path} has other columns; name another --out")
                writer = csv.writer(file, lineterminator="\n")
                if not columns:
                    writer.writerow(row)
                writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())
        except OSError as error:
            raise UserError(f"could not write {self.path} ({error})") from None

    def line(self, step, steps, text):
        """Print progress, text, speed and time left; the first line sets the clock for these."""
        pace = ""
        if self.clock:
            speed = (step - self.clock[0]) / (time.time() - self.clock[1])
            left = round(max(0, steps - step) / speed / 60)
            pace = f"  {speed:,.0f} steps/s  {left} min left"
        else:
            self.clock = step, time.time()
        print(f"{step:>11,} {min(1, step / steps):4.0%}  {text}{pace}", flush=True)


def mean(values):
    """Mean of a collection; nan if it is empty."""
    return sum(values) / len(values) if values else math.nan


# Ctrl-C


class Stop:
    """True once Ctrl-C was pressed, or a polite kill came; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        try:
            print("\nstopping after this round; once more to stop at once", flush=True)
        except (OSError, RuntimeError):
            pass  # the same Ctrl-C has ended `| tee`, or it came in the middle of a print

    def __bool__(self):
        return self.asked
