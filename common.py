"""Plumbing that would serve any training script: command line, device, checkpoint, log, Ctrl-C.

A checkpoint is one plain dict, written by `torch.save` and read with `weights_only=True`:

    format      "actor-mimic-1"
    stage       "expert", "mimic" or "transfer"
    games       the games that the network plays, as ale-py spells them
    step        agent decisions so far (per game in the mimic), 4 emulator frames each
    minutes     wall time so far
    args        the flags of the run
    command     the command line, and `machine`, where it ran
    network     name of the network's class, in the script of its stage
    net_args    {"channels": [...], "hidden": [...], "norm": "all", "linear" or "none"}
    net         its state_dict; in expert.pt and mimic.pt in half precision
    score       mean score of the last finished episodes, and `scores`, each (mimic: of each game)
    legal       expert, transfer: the game's legal actions, of 18 (for the reader, as max_q)
    max_q       expert, transfer: mean over the last rollout of max_a Q(s, a)
    experts     mimic: paths of its experts, and `marks`, step and minutes of each

and in checkpoint.pt alone, which a run resumes from:

    online      expert, transfer: the weights that learn, of which net is the moving average
    regressors  mimic: state_dict of the linear maps of feature regression
    optimizer   its state_dict
    rng         state of the generator that explores and draws
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import glob
import inspect
import io
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from importlib import metadata
from pathlib import Path


def check_packages():
    """Stop in one line if a package is missing, or if ale-py is too old, which hangs or crashes."""
    for package in ("torch", "gymnasium", "ale-py", "numpy", "matplotlib"):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "none"
        older = package == "ale-py" and [int(n) for n in re.findall(r"\d+", found)] < [0, 12, 1]
        if found == "none" or older:
            needed = "ale-py 0.12.1 or newer" if package == "ale-py" else package
            message = f"{needed} is needed here, installed: {found}"
            mend = "activate your environment, or pip install -r requirements.txt"
            print(f"{message}; {mend}", file=sys.stderr)
            sys.exit(2)


check_packages()

# Torch's idle threads wait in a loop for their next work, and take the emulators' cores meanwhile:
# let them sleep after 1,000 turns of it, some microseconds (GNU's OpenMP: 300,000, milliseconds).
# It reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F
from torch import nn

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None

FORMAT = "actor-mimic-1"
NEEDED = {"games", "step", "minutes", "args", "net_args", "net", "score", "scores"}
NEEDED_OF_MIMIC = {"experts", "marks"}  # besides
# Flags that may change when a run resumes; an expert is known by its mark, whatever its path.
MAY_CHANGE = {"out", "steps", "report_every", "device", "precision", "experts"}
# What ends a process politely: Ctrl-C, kill, a closed terminal, a batch system's warnings.
SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGBREAK"


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
    values, a bool becomes `--flag` and `--no-flag`, and a comment on a line of its own is the
    heading of the flags below it. A ValueError of the class's own `__post_init__` (a flag out of
    range) is a UserError.
    """
    source = inspect.getsource(cls)
    parser = Parser(
        description=inspect.getmodule(cls).__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {}
    for field in dataclasses.fields(cls):
        above, _, line = source.partition(f"\n    {field.name}: ")
        comment = re.match(r".*?  # (.*)", line)
        comment = comment[1].replace("%", "%%") if comment else ""
        heading = ([""] + re.findall(r"^    # (.*)", above, re.MULTILINE))[-1]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading) if heading else parser
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            either = argparse.BooleanOptionalAction  # --flag and --no-flag
            groups[heading].add_argument(flag, action=either, default=default, help=comment)
            continue
        several = isinstance(default, tuple)
        kind = type(default[0] if default else "") if several else field.type
        shown = " ".join(map(str, default)) if several else str(default)
        groups[heading].add_argument(
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


def expand_paths(args, *names):
    """Replace `~` in the named flags, and patterns in those that take several paths.

    A shell does so itself, but not after `--out=`, not inside quotes, and not on Windows.
    """
    for name in names:
        value = getattr(args, name)
        one = isinstance(value, (str, os.PathLike))
        if one and isinstance(getattr(type(args), name), str):
            setattr(args, name, os.path.expanduser(value))
        else:
            paths = [os.path.expanduser(path) for path in ([value] if one else value)]
            found = [sorted(glob.glob(p)) if not os.path.exists(p) else [p] for p in paths]
            setattr(args, name, tuple(p for path, ps in zip(paths, found) for p in ps or [path]))


def cli(main, cls):
    """Parse the command line and call main(args); a UserError is one line and exit status 2."""
    try:
        keep_freed_memory()
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
        sys.stdout = sys.stdout or open(os.devnull, "w")  # the shell has closed it: `>&-`
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # a path that it cannot show
        main(parse_args(cls))
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # `| head`, or Ctrl-C has ended `| tee`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        message = "the output was closed; what was saved or written is kept"
    except OSError as error:  # a full disk, a folder that may not be written
        message = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    except (MemoryError, RuntimeError) as error:
        no_memory = "out of memory|allocate memory|enough memory|Storage size"
        if isinstance(error, RuntimeError) and not re.search(no_memory, str(error)):
            raise
        message = (
            "not enough memory: lower the largest of --num-envs, --rollout, --replay, --updates, "
            "--minibatch, --channels and --hidden (evaluate.py: --film)"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def show(text, keep=True):
    """Print a line. Unless keep, it is the terminal's last line, which the next one replaces.

    Where the output is no terminal, a line that is not kept is not printed.
    """
    terminal = sys.stdout.isatty()
    clear = "\r\033[K" if terminal else ""
    if keep:
        print(clear + text, flush=True)
    elif terminal:
        with contextlib.suppress(OSError):  # a closed terminal: what is kept tells
            width = shutil.get_terminal_size().columns - 1
            print(clear + text[:width], end="", flush=True)


# Machine


def keep_freed_memory():
    """Tell Linux's allocator to keep what is freed: the next batch needs buffers as large.

    By default it hands each large buffer back and pays for it page by page at the next use.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # an older one: 32 MB


def cores():
    """How many cores this process may use: of the machine, a batch job or a container."""
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def pick_device(name):
    """Turn --device auto, cpu, cuda, cuda:1 or mps into a torch.device that works here.

    Raises UserError if it does not.
    """
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here += ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        name = here[-1].split(":")[0]
    if name not in [*here, *(device.split(":")[0] for device in here)]:
        raise UserError(f"--device {name} is not available; this machine has {', '.join(here)}")
    try:
        (torch.ones(1, device=name) + 1).item()
    except RuntimeError as error:  # a driver that is too old, a GPU without kernels in this torch
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} does not work ({reason}); use --device cpu") from None
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


def memory_format(device):
    """The layout in which convolutions are fast: channels_last, but not on Apple's GPUs.

    There PyTorch computes convolutions with channels_last weights wrongly on macOS 15 and newer.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class PixelConv2d(nn.Conv2d):
    """What nn.Conv2d computes from pixels / 255, faster, for a stride of 4 without padding.

    pixels: (B, C, H, W) uint8; returns (B, out, ...). Each block of 4x4 pixels becomes one pixel
    of 16C channels, so that a kernel of 8x8 with stride 4 is one of 2x2 with stride 1: processors
    are better at many channels. H and W, and those of the kernel, must be multiples of 4.
    """

    def forward(self, pixels):
        if (pixels.dtype, self.stride, self.padding) != (torch.uint8, (4, 4), (0, 0)):
            wanted = "pixels must be uint8, the stride (4, 4) and the padding (0, 0)"
            raise TypeError(f"{wanted}, not {pixels.dtype}, {self.stride} and {self.padding}")
        B, C, H, W = pixels.shape
        # Four neighbours in a line travel as one int32, which is faster than one after the other.
        lines = pixels.contiguous().view(torch.int32).view(B, C, H // 4, 4, W // 4)
        blocks = lines.permute(0, 2, 4, 1, 3).contiguous()  # (B, H/4, W/4, C, 4) int32
        blocks = blocks.view(torch.uint8).view(B, H // 4, W // 4, 16 * C).permute(0, 3, 1, 2)
        # (B, 16C, H/4, W/4) uint8, channels_last
        device, dtype = pixels.device, torch.float32
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)  # 0 to 255 are exact in bfloat16
        blocks = blocks.to(dtype).contiguous(memory_format=memory_format(device))
        return F.conv2d(blocks, F.pixel_unshuffle(self.weight, 4) / 255, self.bias)


@torch.no_grad()
def check_device(net, example):
    """Raise UserError if net, on its device, computes something else than on the CPU.

    example: a small input of net, on the CPU. Of what net returns, the first tensor is compared.
    """
    device = next(net.parameters()).device
    if device.type == "cpu":
        return
    there = net(example.to(device))[0].cpu()
    here = copy.deepcopy(net).cpu()(example)[0]
    # GPUs may round the inputs of a product to 10 bits (TF32).
    if (there - here).abs().max() > 0.03 * here.abs().max():
        raise UserError(
            f"--device {device} computes other numbers than the CPU, beyond rounding; use "
            "--device cpu, or another version of torch"
        )


def machine():
    """Describe this machine in a few words."""
    gpu = torch.cuda.get_device_name() + ", " if torch.cuda.is_available() else ""
    return f"{gpu}{cores()} cores, {platform.system()} {platform.machine()}"


# Optimizer


def orthogonal(matrix, dtype):
    """Set the singular values of a matrix to about 1, and keep its singular vectors.

    Five Newton-Schulz iterations in dtype, with the coefficients of Muon (Jordan et al., 2024),
    bring singular values of more than 1/500 of the matrix's norm to between 0.6 and 1.3.
    (rows, columns) -> the same shape, float32.
    """
    rows, columns = matrix.shape
    x = matrix / (matrix.norm() + 1e-7)
    x = (x.T if rows > columns else x).to(dtype)
    identity = torch.eye(len(x), dtype=dtype, device=x.device)

    def polynomial(gram):
        return 3.4445 * identity - 4.7750 * gram + 2.0315 * (gram @ gram)

    # An iteration multiplies x by a polynomial of x @ x.T, which is smaller than x. So it is
    # cheaper to multiply these factors first. Not all five: bfloat16 rounds too much away.
    for iterations in (2, 3):
        gram = x @ x.T
        factor = polynomial(gram)
        product = factor
        for _ in range(iterations - 1):
            gram = factor @ gram @ factor  # that of the next x
            factor = polynomial(gram)
            product = factor @ product
        x = product @ x
    return (x.T if rows > columns else x).float()


class Muon(torch.optim.RAdam):
    """Muon for the weight matrices of a network but the head's; RAdam for all other weights.

    Muon (Jordan et al., 2024) makes the momentum orthogonal, so that all directions move equally
    far; in a plain gradient a few dominate. A convolution counts as a matrix (out, in * height *
    width).
    """

    def __init__(self, net, *others, lr, times, autocast):
        """net: its output layer is called head; others: modules that RAdam updates as well.

        lr: RAdam's rate. times: Muon's is times * lr, usually 0.02: 40 * 5e-4, or 10 * 2e-3.
        autocast: if it is enabled, matrices are multiplied in bfloat16, as in the network.
        """
        self.times = times
        matrices, rest = [], []
        for name, weight in net.named_parameters():
            hidden = weight.ndim > 1 and "head" not in name.split(".")
            (matrices if hidden else rest).append(weight)
        for module in others:
            rest += module.parameters()
        # foreach: one call for all weights, not one for each, which is faster.
        super().__init__([{"params": rest}, {"params": matrices}], lr=lr, foreach=True)
        self.dtype = torch.bfloat16 if autocast._enabled else torch.float32

    @torch.no_grad()
    def step(self):
        matrices = self.param_groups.pop()  # which RAdam must not step
        super().step()
        self.param_groups.append(matrices)
        for weight in matrices["params"]:
            gradient, state = weight.grad.flatten(1), self.state[weight]
            if not state:  # step: unused, but RAdam asks for one when it loads a state
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(gradient)}
            momentum = state["momentum"].lerp_(gradient, 0.05)  # keeps 0.95 of what it was
            update = orthogonal(gradient.lerp(momentum, 0.95), self.dtype)  # Nesterov's
            rows, columns = update.shape
            # As published: a matrix with more outputs than inputs moves further.
            lr = self.times * matrices["lr"] * math.sqrt(max(1, rows / columns))
            weight.add_(update.reshape(weight.shape), alpha=-lr)


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


def half(net):
    """Return net's state_dict in half precision, on the CPU: what is handed to the next stage."""
    return {name: weight.half().cpu() for name, weight in net.state_dict().items()}


def without_wrappers(weights):
    """Drop what torch.compile and DistributedDataParallel put before the names of a state_dict."""
    return {re.sub(r"(^|\.)((_orig_mod|module)\.)+", r"\1", k): v for k, v in weights.items()}


def save_checkpoint(path, args, **contents):
    """Write a checkpoint, whole or not at all.

    contents: as the module's docstring says; format, args, command and machine are added here.
    Raises UserError if it cannot be written, or if a weight is infinite or nan.
    """
    weights = without_wrappers(contents["net"])
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"the weights are not finite: try a smaller --lr; {path} is not written")
    checkpoint = {
        "format": FORMAT,
        "args": plain(args),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        **contents,
        "net": weights,
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


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
    kinds = {"args": dict, "net_args": dict, "net": dict, "games": list, "scores": list}
    kinds |= {"step": int, "minutes": (int, float), "experts": list, "marks": list}
    for part, kind in kinds.items():
        if part in checkpoint and not isinstance(checkpoint[part], kind):
            raise UserError(f"{path} is damaged: its {part} cannot be read")
    games = checkpoint["games"]
    if not games or not all(isinstance(game, str) for game in games) or checkpoint["step"] < 0:
        raise UserError(f"{path} is damaged: its games or step cannot be read")
    # The first edition's networks all had LayerNorm, unless conv_norm said otherwise.
    conv_norm = checkpoint["net_args"].pop("conv_norm", True)
    checkpoint["net_args"].setdefault("norm", "all" if conv_norm else "linear")
    checkpoint.setdefault("network", "AtariNet")
    return checkpoint


def run_name(path):
    """Name what a checkpoint is of: mimics/amn.pt, runs/amn and runs/amn/mimic.pt are all amn."""
    path = Path(path).resolve()
    in_its_folder = path.name in ("checkpoint.pt", "expert.pt", "mimic.pt")
    return path.parent.name if in_its_folder else path.name.removesuffix(".pt")


def make_network(cls, checkpoint, path):
    """Build a checkpoint's network and load its weights; raises UserError, naming path."""
    try:
        net = cls(**checkpoint["net_args"])
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"{path} cannot be built: its net_args do not fit {cls.__name__}") from None
    load_weights(net, checkpoint, path)
    return net


def load_weights(net, checkpoint, path, part="net"):
    """Put a checkpoint's weights into net.

    Raises UserError, naming path, if they do not fit, or are not finite.
    """
    try:
        getattr(net, "_orig_mod", net).load_state_dict(without_wrappers(checkpoint[part]))
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError(f"the weights in {path} do not fit: other widths, or layers") from None
    if not all(weight.isfinite().all() for weight in net.parameters()):
        raise UserError(f"the weights in {path} are not finite")


def load_state(checkpoint, net, optimizer, rng, path):
    """Put a checkpoint's weights, optimizer and random generator back, in place.

    Raises UserError, naming path, if something does not fit.
    """
    load_weights(net, checkpoint, path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        rng.set_state(checkpoint["rng"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"the optimizer's state in {path} is damaged; name another --out") from None


def check_finite(loss, step, folder):
    """Raise UserError if a loss is infinite or nan: the run has diverged.

    loss: scalar tensor, the gradient's norm added, since a finite loss may still spoil the weights.
    """
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss is not finite at step {step:,}: try a smaller --lr and another --out; "
            f"what {folder} holds is from before"
        )


# A run


class Stop:
    """Notices Ctrl-C and its relatives: `with Stop() as stop: ... if stop.asked: ...`.

    The same signal, sent again, ends the process at once. The handlers go with the block. Outside
    the main thread there are none, and a signal that is ignored (nohup, `&`) stays so.
    """

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in SIGNALS):
                if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])
        with contextlib.suppress(OSError, RuntimeError):  # a closed output, or amid another print
            print("\nstopping after this round; once more to stop at once", flush=True)


class Run:
    """The folder of a training run: checkpoint, log.csv and lock, and how far the run is.

    `with Run(out, stage, args) as run:` reads what the folder holds; run.saved is the checkpoint to
    resume from, or None. run.start() takes the folder, and nothing is written before. From then on
    run.due() says when to report, run.save() writes a checkpoint, and run.report() a line.
    """

    def __init__(self, folder, stage, args):
        """Raises UserError if the folder holds another run: nothing is written over."""
        self.folder, self.stage, self.args = Path(folder), stage, args
        self.started = time.monotonic()
        self.saved = self.read()
        self.first_step = self.saved["step"] if self.saved else 0
        self.minutes_before = self.saved["minutes"] if self.saved else 0.0
        self.next_report, self.clock, self.lock = self.first_step, None, None
        self.rows, self.stop, self.stopping = [], Stop(), False

    def __enter__(self):
        self.stop.__enter__()
        return self

    def __exit__(self, *error):
        show("", keep=False)
        self.stop.__exit__()
        if self.lock:
            self.lock.close()

    def read(self):
        """Return the checkpoint that the run resumes from, or None for a new run."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; name a folder")
        if not (folder / "checkpoint.pt").exists():
            for file in [*folder.glob("log.csv"), *sorted(folder.glob("*.pt"))]:
                lone = f"{folder} holds {file.name} without its checkpoint"
                raise UserError(f"{lone}: delete that file, or name another --out")
            return None
        saved = load_checkpoint(folder, (self.stage,))
        flags, before = plain(self.args), saved["args"]
        if unknown := sorted(before.keys() - flags.keys()):
            names = ", ".join("--" + name.replace("_", "-") for name in unknown)
            older = f"{folder} holds a run of another version, with {names}"
            raise UserError(f"{older}; name another --out for a new run")
        # A flag that is newer than the run has its default: so new flags don't strand old runs.
        before = plain(type(self.args)()) | before
        for name, now in flags.items():
            if name not in MAY_CHANGE and before[name] != now:
                flag = name.replace("_", "-")
                raise UserError(
                    f"{folder} holds a run with --{flag} {before[name]}, but this command says "
                    f"{now}; name another --out for a new run"
                )
        steps, done = self.args.steps, saved["step"]
        if done > steps and before["steps"] != steps:
            raise UserError(f"{folder} holds {done:,} steps, more than --steps {steps:,}")
        return saved

    def start(self, device, autocast, net, buffer_bytes):
        """Take the folder, and print what follows from the flags before anything is spent on it.

        What the log holds from after the checkpoint goes, so that every step is there once. Raises
        UserError if another process works in the folder: whoever does holds its empty file `lock`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl:
            self.lock = open(self.folder / "lock", "a")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"another process works in {self.folder}; name another --out"
                raise UserError(message) from None
            except OSError:
                pass  # a file system without locks
        now = self.read()
        if (now["step"] if now else 0) != self.first_step:
            raise UserError(f"another process has just worked in {self.folder}; start again")
        self.trim_log()
        parameters = sum(weight.numel() for weight in net.parameters())
        begins = f"resumes at step {self.first_step:,} of" if self.first_step else "starts:"
        show(
            f"{self.folder} {begins} {self.args.steps:,} steps ({4 * self.args.steps:,} frames)\n"
            f"{parameters:,} parameters in {'bfloat16' if autocast._enabled else 'float32'} on "
            f"{device}, {torch.get_num_threads()} threads, {buffer_bytes / 1e6:,.0f} MB of "
            "observations"
        )

    def trim_log(self):
        """Drop rows of the log that are later than the checkpoint, cut off, or no rows."""
        path = self.folder / "log.csv"
        if not path.exists():
            return
        lines = path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n")]  # not cut off by a crash
        if lines and not (lines[0].startswith("step,") and lines[0].isascii()):
            raise UserError(f"{path} is not a log of this project; move it away")
        rows = [line for line in lines[1:] if re.fullmatch("[0-9]{1,18},[-+.,0-9a-z]+\n", line)]
        kept = [row for row in rows if int(row.split(",")[0]) <= self.first_step]
        with whole_file(path) as temporary:
            temporary.write_text("".join(lines[:1] + kept), encoding="ascii")

    def minutes(self):
        """Return the run's wall time so far, in minutes, earlier stretches included."""
        return self.minutes_before + (time.monotonic() - self.started) / 60

    def due(self, step):
        """Whether to report: after 1, 2, 4 ... rounds, so that the time left is soon known, then
        every --report-every steps, at the end, and when the run is to stop."""
        self.stopping = self.stop.asked
        if step < min(self.next_report, self.args.steps) and not self.stopping:
            return False
        every = self.args.report_every
        self.next_report = min(2 * step - self.first_step, (step // every + 1) * every)
        return True

    def save(self, name, **contents):
        """Write a checkpoint into the folder."""
        contents = {"stage": self.stage, "minutes": self.minutes()} | contents
        save_checkpoint(self.folder / name, self.args, **contents)

    def report(self, step, row, text):
        """Write a row of numbers to the log and print a line; ends the run if that was asked for.

        Raises UserError if the log has other columns, or cannot be written.
        """
        path = self.folder / "log.csv"
        self.rows.append({"step": step, "minutes": self.minutes(), **row})
        try:
            with open(path, "a+", newline="") as file:
                file.seek(0)
                columns = next(csv.reader(file), [])
                if columns and columns != list(self.rows[0]):
                    raise UserError(f"{path} has other columns; name another --out")
                writer = csv.writer(file, lineterminator="\n")
                if not columns:
                    writer.writerow(self.rows[0])
                for values in (row.values() for row in self.rows):
                    writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
            self.rows = []
        except PermissionError:  # on Windows, while a spreadsheet shows it
            late = "with the next report" if step < self.args.steps else "not at all"
            show(f"{path} is open elsewhere; this row follows {late}")
        except OSError as error:
            raise UserError(f"could not write {path} ({error})") from None
        self.progress(step, text, keep=True)
        if self.stopping and step < self.args.steps:
            show(f"saved; the same command resumes at step {step:,}")
            raise SystemExit(130)  # ended by Ctrl-C: what follows it after && does not start

    def progress(self, step, text, keep=False):
        """Show step, share done, text, speed and time left; the first call sets the clock."""
        now, pace = time.monotonic(), ""
        self.clock = self.clock or (step, now)
        if step > self.clock[0] and now > self.clock[1]:
            speed = (step - self.clock[0]) / (now - self.clock[1])
            left = round(max(0, self.args.steps - step) / speed / 60)
            pace = f"  {speed:,.0f} steps/s  {left} min left"
        text = text.replace("nan", "-")  # a mean of nothing yet
        show(f"{step:>11,} {min(1, step / self.args.steps):4.0%}  {text}{pace}", keep)


def mean(values):
    """Mean of a collection; nan if it is empty."""
    return sum(values) / len(values) if values else math.nan
