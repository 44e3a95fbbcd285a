"""The mimic, trained by several processes that average their gradients: data parallelism.

Every process runs the loop of train_mimic.py, on its share of the environments of every game, of
the replay and of each minibatch. What makes one run of them is below: they start with the same
weights, and before each step of the optimizer they average their gradients. So they hold the same
weights ever after, and learn what one process would learn from the whole minibatch.

    torchrun --nproc-per-node 2 -m extras.train_mimic_ddp --steps 10_000 --out runs/try-ddp
    torchrun --nproc-per-node 4 -m extras.train_mimic_ddp  # on GPUs: one for each process

The flags are those of train_mimic.py, and count for all processes together. Output: the folder
--out as of train_mimic.py, written by the first process. The same command resumes. The lines
before the first report count what one process holds.
"""

import contextlib
import dataclasses
import math
import os

import common  # before torch: it sets what torch reads when it loads

import torch
import torch.distributed as dist

import train_mimic


@dataclasses.dataclass
class Args(train_mimic.Args):
    out: str = "runs/mimic-ddp"  # folder of the run


@contextlib.contextmanager
def talking():
    """Around what all processes do together: says so if another one no longer answers."""
    try:
        yield
    except RuntimeError:
        message = "another process has ended; the same command resumes from the last checkpoint"
        raise common.UserError(message) from None


def average(tensor):
    """Replace a tensor by its mean over all processes."""
    with talking():
        dist.all_reduce(tensor)
    tensor /= dist.get_world_size()


class SharedMuon(common.Muon):
    """Muon and RAdam on the mean of all processes' gradients."""

    def __init__(self, *modules, **settings):
        super().__init__(*modules, **settings)
        self.weights = [weight for group in self.param_groups for weight in group["params"]]
        for weight in self.weights:  # all begin with those of the first process
            with talking():
                dist.broadcast(weight.detach(), 0)

    @torch.no_grad()
    def step(self):
        # In one tensor: sending many small ones takes longer.
        gradients = torch.cat([weight.grad.flatten() for weight in self.weights])
        average(gradients)
        sizes = [weight.numel() for weight in self.weights]
        for weight, gradient in zip(self.weights, gradients.split(sizes)):
            weight.grad.copy_(gradient.view_as(weight))
        super().step()


Q_SPREAD, MEAN = train_mimic.q_spread, common.mean  # as they are for one process


def shared_spread(expert_q, legal):
    """q_spread, mean over the processes: all divide an expert's Q-values by one temperature."""
    spread = Q_SPREAD(expert_q, legal)
    average(spread)
    return spread


def shared_mean(values):
    """Mean of the values of all processes, which are few: the scores of finished episodes."""
    parts = [None] * dist.get_world_size()
    with talking():
        dist.all_gather_object(parts, list(values))
    return MEAN([value for part in parts for value in part])


class SharedRun(common.Run):
    """A run's folder, read by all processes and written by the first.

    Steps in it are those of all processes together; each counts its own.
    """

    def __init__(self, folder, args):
        super().__init__(folder, "mimic", args)
        self.processes, self.first = dist.get_world_size(), dist.get_rank() == 0
        if self.saved:
            self.saved["step"] //= self.processes
            if not self.first and "rng" in self.saved:  # or it would draw what the first one draws
                rng = torch.Generator().manual_seed(self.first_step + dist.get_rank())
                self.saved["rng"] = rng.get_state()

    def start(self, *setup):
        if self.first:
            super().start(*setup)
        with talking():
            dist.barrier()  # the others go on once the first one has the folder

    def due(self, step):
        asked = torch.tensor(float(self.stop.asked))  # of any process: then all stop together
        with talking():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.stop.asked = bool(asked)
        return super().due(self.processes * step)

    def progress(self, step, text, keep=False):
        if self.first:  # report() has multiplied the step of a line that is kept
            super().progress(step if keep else self.processes * step, text, keep)

    def save(self, name, **contents):
        if self.first:
            super().save(name, **contents | {"step": self.processes * contents["step"]})

    def report(self, step, row, text):
        if self.first:
            super().report(self.processes * step, row, text)
        elif self.stopping and self.processes * step < self.args.steps:
            raise SystemExit(130)


def main(args):
    processes = int(os.environ.get("WORLD_SIZE", 0))
    if not processes:
        raise common.UserError(
            "start it with torchrun --nproc-per-node 2 -m ..., or train_mimic.py"
        )
    if args.num_envs % processes or args.minibatch % processes:
        message = f"--num-envs and --minibatch must be multiples of the {processes} processes"
        raise common.UserError(message)
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank = dist.get_rank()
    # What train() is to use instead of its own.
    train_mimic.q_spread, common.mean, common.Muon = shared_spread, shared_mean, SharedMuon
    share = {
        "steps": math.ceil(args.steps / processes),
        "num_envs": args.num_envs // processes,
        "minibatch": args.minibatch // processes,
        "replay": args.replay // processes,
        "seed": (args.seed + rank * 1_000_003) % 2**31,  # of exploration, draws and emulators
        "device": f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device,
    }
    with SharedRun(args.out, args) as run, contextlib.ExitStack() as stack:
        if rank:  # the first process alone prints
            stack.enter_context(contextlib.redirect_stdout(open(os.devnull, "w")))
        train_mimic.train(dataclasses.replace(args, **share), run)
    dist.destroy_process_group()


if __name__ == "__main__":
    common.cli(main, Args)
