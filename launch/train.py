"""Train the model of `launch.model` with one of the optimizers of `launch.contenders`.

    torchrun --standalone --nproc-per-node 2 launch/train.py --steps 100     (what scripts/train.sh does)
    python launch/train.py                                                   (one rank)
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 launch/train.py    (goes on by itself when ranks die)
    python launch/train.py --resume                                          (goes on with the latest run)
    torchrun ... launch/train.py --run-dir runs/mine --requeue               (begins or goes on, for schedulers)

gloo on CPU; NCCL and bfloat16 autocast where every rank has a GPU of its own. launch/recipes has it on several hosts.
SIGTERM, or a signal named by --checkpoint-signal, that comes to any rank ends all of them after the step, with a
checkpoint and exit code 75.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

if not __package__:
    # Run as a script: import from the checkout that holds this file, whatever the working directory.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.cluster import START_AGAIN, join, listen_for, signals_to_stop
from launch.contenders import contender_for, largest_over_ranks
from launch.data import Corpus, share
from launch.model import GPT, generate
from launch.options import Settings, fail, read_settings
from launch.report import Report, StepRecord, Summary
from launch.run_folder import RunFolder
from sharded_dadamw.checkpoint import Resumed, Saving, load_checkpoint, save_checkpoint

NUM_HELD_OUT_ROWS = 64
PROMPT = b"\n\ndef "


def main() -> None:
    """Join the other ranks, train, and leave the process group however training ended."""
    settings = read_settings(sys.argv[1:])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.ranks != world_size:
        fail(f"expected --ranks {world_size}, the ranks that were started, got {settings.ranks}; use scripts/train.sh")
    if settings.max_restarts and "TORCHELASTIC_MAX_RESTARTS" not in os.environ:
        fail(f"expected --max-restarts 0 without torchrun, got {settings.max_restarts}; use scripts/train.sh")
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        fail(f"WORLD_SIZE is {world_size}, and MASTER_ADDR is not set: start all ranks by torchrun")
    device = join(settings.process_group_timeout)
    if settings.checkpoint and settings.can_resume:
        # Who still waits for others has nothing to save, and ends at once.
        listen_for(("TERM", settings.checkpoint_signal))
    try:
        train(settings, device)
    except KeyboardInterrupt:
        # Whoever stops a run knows where; a trace from every rank would bury what it had to say.
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        dist.destroy_process_group()


def train(settings: Settings, device: torch.device) -> None:
    """Train on the ranks of the default process group, which is there."""
    # The other ranks looked for a run to go on with at other moments.
    agreed = [settings]
    dist.broadcast_object_list(agreed, src=0)
    try:
        corpus = Corpus.read_once_per_host(agreed[0].data, agreed[0].model.context)
    except ValueError as error:
        fail(error)
    Training(agreed[0], corpus, device).run()


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine that ends at a tenth of the peak."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Training:
    """One run on this rank."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device) -> None:
        self.settings = settings
        self.corpus = corpus
        self.device = device
        self.rank = dist.get_rank()
        self.model = GPT(settings.model, settings.seed).to(device, getattr(torch, settings.precision))
        self.contender = contender_for(settings, self.model, device)
        self.mine = share(range(settings.num_micro_batches), self.rank, settings.ranks)
        num_parameters = sum(p.numel() for p in self.model.parameters())
        self.folder = RunFolder.open(settings, corpus, num_parameters, device)
        self.report = Report(settings, self.folder if self.rank == 0 else None)
        self.report.open(corpus, num_parameters, device)
        if settings.resume and settings.micro_batches not in (None, settings.num_micro_batches):
            self.report.say(
                f"{settings.ranks} ranks cannot share the run's {settings.micro_batches} micro-batches: a step has "
                f"{settings.num_micro_batches} here, so weights are not those of other numbers of ranks any more"
            )
        self.saving: Saving | None = None
        self.is_to_stop = False

    def run(self) -> None:
        """Train from the first step, or from a checkpoint, to a written run folder.

        Leaves by SystemExit, on every rank after the same step, if one of them has been sent a signal to stop.
        """
        settings, contender, report = self.settings, self.contender, self.report
        resumed = self.load() if settings.resume else None
        first = resumed.step if resumed else 0
        if first == settings.steps:
            report.say(f"all {first} steps were done: nothing to go on with in {self.folder.path}")
            return
        before = resumed.data["held_out_before"] if resumed else self.held_out_loss()
        report.say(f"held-out loss before training: {before:.3f} nats per byte")
        with report.progress():
            for step in range(first, settings.steps):
                record = self.train_step(step)
                with self.forgiven():
                    report.record(record, log=(step + 1) % settings.log_every == 0)
                if step + 1 == settings.steps:
                    break
                if self.is_to_stop:
                    self.save(step + 1, before, is_last=True)
                    report.say(f"asked to stop, after {step + 1} of {settings.steps} steps: start again to go on")
                    raise SystemExit(START_AGAIN)
                if (step + 1) % settings.checkpoint_every == 0:
                    self.save(step + 1, before)
        after = self.held_out_loss()
        self.save(settings.steps, before, is_last=True)  # before anything that can fail on one rank
        summary = Summary(
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            held_out_before=before,
            held_out_after=after,
            state_bytes=largest_over_ranks(contender.state_bytes, self.device),
            wire_bytes=contender.wire_bytes,
            hidden=contender.hidden,
        )
        with self.forgiven():
            report.close(summary)
        if settings.sample_bytes and self.rank == 0:
            report.sample(PROMPT + generate(self.model, PROMPT, settings.sample_bytes, 0.6, settings.seed))
        dist.barrier()
        report.say(f"written to {self.folder.path}")

    def load(self) -> Resumed | None:
        """Take over the newest sound checkpoint of the run folder, if there is one; a collective."""
        try:
            resumed = load_checkpoint(
                self.folder.checkpoints, model=self.model, optimizer=self.contender.optimizer, fall_back=True
            )
        except (OSError, ValueError) as error:
            fail(error)
        self.report.go_on(resumed.step if resumed else 0, resumed.path if resumed else None)
        return resumed

    def save(self, step: int, held_out_before: float, *, is_last: bool = False) -> None:
        """Write a checkpoint, or begin to, which a full disk does not end unless it is the last one; a collective.

        Batches depend on the step alone, so there is no other place in the data.
        """
        settings = self.settings
        if not (settings.checkpoint and settings.can_resume):
            if settings.checkpoint and is_last:
                self.report.say(f"no checkpoint: {settings.optimizer} gathers its whole state on one rank to save it")
            return
        under_way, self.saving = self.saving, None
        with self.forgiven():
            if under_way is not None:
                under_way.wait()
        with self.forgiven():  # the others are on their way to the checkpoint
            if self.rank == 0:
                self.folder.sync_metrics()
        with self.forgiven(unless=is_last):
            self.saving = save_checkpoint(
                self.folder.checkpoints,
                step=step,
                model=self.model,
                optimizer=self.contender.optimizer,
                data={"held_out_before": held_out_before},
                keep_last=settings.keep_last,
                asynchronous=settings.background and not is_last,
            )

    @contextlib.contextmanager
    def forgiven(self, *, unless: bool = False) -> Iterator[None]:
        """Within it, what cannot be written is a warning: a checkpoint, of which every rank hears, or a metric."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if unless:
                fail(error)
            self.report.say(f"warning: {error}; training goes on")

    def train_step(self, step: int) -> StepRecord:
        """One optimizer step on this rank's rows of the global batch."""
        settings, contender = self.settings, self.contender
        lr = learning_rate(step, settings)
        for group in contender.optimizer.param_groups:
            group["lr"] = lr
        started = self.now()
        losses = torch.zeros(settings.num_micro_batches, device=self.device)
        num_terms = settings.num_micro_batches if contender.averages_micro_batches else settings.ranks
        for number in self.mine:
            rows = share(range(settings.global_batch), number, settings.num_micro_batches)
            tokens, targets = self.corpus.batch(
                settings.seed, step, rows, settings.global_batch, settings.model.context, self.device
            )
            last = number == self.mine[-1]
            with contextlib.nullcontext() if last else contender.no_sync(), self.autocast():
                # The mean over as many terms is then the mean over rows, however many rows a pass has.
                part = contender.model(tokens, targets) * (len(rows) * num_terms / settings.global_batch)
                part.backward()
            losses[number] = part.detach()
        after_backward = self.now()
        norm = contender.clip_grad_norm_(settings.clip) if settings.clip else None
        contender.optimizer.step()
        after_step = self.now()
        contender.zero_grad()
        ended = self.now()
        every, parts = settings.fingerprint_every, contender.parts(after_step - after_backward)
        return StepRecord(
            step=step,
            loss=self.sum_of(losses) / num_terms,
            lr=lr,
            grad_norm=None if norm is None else float(norm),
            fingerprint=contender.fingerprint() if every and (step + 1) % every == 0 else None,
            tokens_per_s=settings.global_batch * settings.model.context / (ended - started),
            seconds={"step": ended - started, "forward_backward": after_backward - started, **parts},
        )

    def now(self) -> float:
        """Seconds; on a GPU, once it has finished what it was given, so that a part's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; plain fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def sum_of(self, terms: Tensor) -> float:
        """The sum of terms [n], of which each rank has some and 0 for others, the same bits whoever has which.

        A collective, in which ranks also hear whether one of them is to stop.
        """
        found = torch.cat((terms, torch.full_like(terms[:1], bool(signals_to_stop))))
        dist.all_reduce(found)
        *terms_of_all, num_sent = found.tolist()
        self.is_to_stop = num_sent > 0
        return math.fsum(terms_of_all)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss over windows of the held-out text, which the ranks share out; a collective."""
        number_of_all = self.settings.num_micro_batches
        losses = torch.zeros(number_of_all, device=self.device)
        for number in self.mine:
            if rows := share(range(NUM_HELD_OUT_ROWS), number, number_of_all):
                tokens, targets = self.corpus.held_out_batch(
                    rows, NUM_HELD_OUT_ROWS, self.settings.model.context, self.device
                )
                with self.autocast():
                    losses[number] = self.model(tokens, targets) * len(rows)
        return self.sum_of(losses) / NUM_HELD_OUT_ROWS


if __name__ == "__main__":
    main()
