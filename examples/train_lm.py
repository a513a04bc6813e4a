"""Train a byte-level language model on Python's own documentation.

    python examples/train_lm.py --config examples/configs/alibi.yaml

The attention is described in the config, as a value: a mask, a bias, heads, a layout. The script
prints the plan that attnkit made for it, trains on packed documents, compares the result with what
counting bytes achieves on the same held-out text, and leaves in runs/<config>/:

    checkpoint.pt   the whole state of the run; `--resume` goes on from it, bit for bit
    loss.png        the loss curve
    sample.txt      what the model writes
    metrics.json    the figures

Ctrl-C finishes the step, writes the checkpoint and stops.

`--context-parallel 4` spreads the tokens of every batch over four processes, which it starts (under
torchrun it takes those that are there). The run is the same: its losses, and its checkpoint, from
which another number of processes can go on.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import nn

from attnkit.errors import AttnkitError
from lm import baselines, checkpoint
from lm.config import RunConfig, RunError, TrainingConfig, load_config
from lm.data import Batch, Corpus, held_out_batches, load_corpus, training_batches
from lm.model import LanguageModel, bits_per_byte, write_on
from lm.ranks import BACKENDS, PATIENCE, Ranks, launch
from lm.report import plot_losses

OK, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130

console = Console(highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments, count = parse_arguments(argv), 1
    try:
        count = number_of_processes(arguments)
    except RunError as error:
        return complain(error, WRONG_REQUEST)
    if dist.is_initialized():
        return run_as_rank(arguments)
    if count == 1:
        return run_here(arguments, Ranks())
    given = [*(sys.argv[1:] if argv is None else argv)]
    return launch(start_rank, count, given)


def number_of_processes(arguments: argparse.Namespace) -> int:
    """Return how many processes the run is spread over."""
    count: int = arguments.context_parallel
    if count < 1:
        raise RunError(f"--context-parallel {count}: it is a number of processes, at least 1")
    if dist.is_torchelastic_launched():
        dist.init_process_group(BACKENDS[pick_device(arguments.device).type], timeout=PATIENCE)
        there = dist.get_world_size()
        if there != count:
            dist.destroy_process_group()
            raise RunError(f"--context-parallel {count}, but torchrun started {there} processes")
    return count


def start_rank(argv: Sequence[str], store: str, rank: int, count: int) -> int:
    """Run the command line as one of the processes that `launch` starts."""
    arguments = parse_arguments(argv)
    try:
        backend = BACKENDS[pick_device(arguments.device).type]
    except RunError as error:
        return complain(error, WRONG_REQUEST) if rank == 0 else WRONG_REQUEST
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    where = dist.FileStore(store, count)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=where, rank=rank, world_size=count, timeout=PATIENCE)
    return run_as_rank(arguments)


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Run the command line as one of the processes of the default group."""
    try:
        world = dist.group.WORLD
        return run_here(arguments, Ranks.of(world) if world is not None else Ranks())
    finally:
        dist.destroy_process_group()


def run_here(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Run what the command line asks for in this process; return the exit code."""
    console.quiet = not ranks.first
    try:
        run = prepare(arguments, ranks)
    except (RunError, AttnkitError) as error:  # alike on all of them
        return complain(error, WRONG_REQUEST) if ranks.first else WRONG_REQUEST
    try:
        train(run)
        step = run.progress.step
        if step < run.config.training.steps:
            console.print(f"stopped after step {step}; the same command with --resume goes on")
            return OK if step >= run.last_step else INTERRUPTED
        if ranks.first:
            report(run)
    except (RunError, AttnkitError, OSError) as error:  # a disk may be full by now
        return complain(error, FAILED)
    return OK


def complain(error: Exception, code: int) -> int:
    """Say what was wrong in one line; return the exit code."""
    print(f"train_lm: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a file of examples/configs/")
    parser.add_argument("--steps", type=int, help="train this long instead")
    parser.add_argument("--seed", type=int, help="another initialisation, data order and dropout")
    parser.add_argument("--out", type=Path, help="where to write (default: runs/<config name>)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or npu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--context-parallel",
        type=int,
        default=1,
        metavar="N",
        help="spread the tokens of every batch over N processes",
    )
    parser.add_argument("--stop-at", type=int, help="stop after this step, as Ctrl-C would")
    return parser.parse_args(argv)


@dataclass
class Run:
    """Everything that training needs, ready to start or to go on."""

    config: RunConfig
    name: str
    out: Path
    device: torch.device
    corpus: Corpus
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    progress: checkpoint.Progress
    last_step: int
    ranks: Ranks

    @property
    def checkpoint_path(self) -> Path:
        """Where the state of the run is kept."""
        return self.out / "checkpoint.pt"

    def batches(self) -> Iterator[Batch]:
        """Yield the training batches that the run has not seen yet."""
        training = self.config.training
        return training_batches(
            self.corpus.train,
            max_len=training.max_len,
            tokens_per_batch=training.tokens_per_batch,
            seed=training.seed,
            start=self.progress.step,
        )

    def validate(self) -> float:
        """Return the bits per byte on the held-out topics, and note them."""
        training = self.config.training
        batches = held_out_batches(
            self.corpus.held_out,
            max_len=training.max_len,
            tokens_per_batch=training.tokens_per_batch,
        )
        there = [batch.to(self.device) for batch in batches]
        bits = bits_per_byte(self.model, there, self.ranks)
        self.progress.held_out_bits[self.progress.step] = bits
        return bits

    def save(self) -> None:
        """Write the checkpoint: that of one process, however many there are."""
        if not self.ranks.first:
            return
        checkpoint.save(
            self.checkpoint_path,
            self.config,
            self.progress,
            self.model,
            self.optimizer,
            self.device,
        )


def prepare(arguments: argparse.Namespace, ranks: Ranks) -> Run:
    """Build the run that the command line asks for, and say how its attention will be computed."""
    config = load_config(arguments.config, steps=arguments.steps, seed=arguments.seed)
    training = config.training
    device = pick_device(arguments.device, ranks)
    name = arguments.config.stem
    out = arguments.out or Path("runs") / name
    if arguments.stop_at is not None and arguments.stop_at < 1:
        raise RunError(f"--stop-at {arguments.stop_at}: the first step is 1")

    if training.threads is not None:
        torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)  # alike in all processes, and so they draw alike
    corpus = load_corpus()
    try:
        model = LanguageModel(config.model, config.attention).to(device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"there is no room for this model on {device}: {reason}") from None
    optimizer = build_optimizer(model, training)
    last_step = training.steps
    if arguments.stop_at is not None:
        last_step = min(arguments.stop_at, last_step)
    run = Run(
        config=config,
        name=name,
        out=out,
        device=device,
        corpus=corpus,
        model=model,
        optimizer=optimizer,
        progress=checkpoint.Progress(),
        last_step=last_step,
        ranks=ranks,
    )
    if arguments.resume:
        run.progress = checkpoint.load(run.checkpoint_path, config, model, optimizer, device)
    first = next(run.batches()).to(device)
    console.print(model.explain_attention(first, ranks.spread), markup=False)
    make_room(run)
    return run


def make_room(run: Run) -> None:
    """Make the directory of the run, and find out now whether files can be written there."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.out):
            pass
        if run.checkpoint_path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "its checkpoint.pt is a directory")
    except OSError as error:
        raise RunError(f"cannot write to --out {run.out}: {error.strerror}") from None


def pick_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """Return the device called `name`; "auto" takes the fastest one that is there.

    Where there are several processes, each takes one of a kind.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "npu": has_npu()}
    if name == "auto":
        name = next(kind for kind in ("npu", "cuda", "cpu") if available[kind])
    kind = name.partition(":")[0]
    if not available.get(kind):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise RunError(f"--device {name} is not available here; there is: {there}")
    try:
        if ranks is not None and ranks.spread is not None and name not in ("cpu", "meta"):
            count = torch.get_device_module(kind).device_count()
            device = torch.device(kind, ranks.spread.rank % count)
            torch.get_device_module(kind).set_device(device)
            return device
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"--device {name} is not available here: {reason}") from None


def has_npu() -> bool:
    """Tell whether torch_npu is installed and finds a device."""
    try:
        import torch_npu  # noqa: F401  # importing it is what registers torch.npu
    except ImportError:
        return False
    return bool(torch.get_device_module("npu").is_available())


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and leaves gains alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Return the rate of a step: a short warm-up, then half a cosine down to the final rate."""
    warm = min(1.0, (step + 1) / (training.warmup + 1))
    done = max(0.0, (step - training.warmup) / max(1, training.steps - training.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    floor = training.final_learning_rate
    return training.learning_rate * warm * (floor + (1 - floor) * cosine)


def train(run: Run) -> None:
    """Train to the end, to `--stop-at` or to Ctrl-C, and leave a checkpoint in each case."""
    training, progress = run.config.training, run.progress
    batches = run.batches()
    run.model.train()
    with interrupts() as interrupted, training_bar(run.name) as bar:
        task = bar.add_task("", total=training.steps, completed=progress.step, loss="", rate="")
        stops = 0.0
        while progress.step < run.last_step and not stops:
            started = time.perf_counter()
            batch = next(batches).to(run.device)
            loss = take_step(run, batch)
            # Of several processes all stop after the step in which one was interrupted.
            loss, stops = run.ranks.added(loss, interrupted.is_set())
            rate = f"{len(batch.targets) / (time.perf_counter() - started):,.0f} tokens/s"

            progress.step += 1
            progress.train_bits.append(loss)
            bar.update(task, advance=1, loss=f"{loss:.3f} bits/byte", rate=rate)
            if progress.step % training.validate_every == 0 or progress.step == training.steps:
                bar.console.print(
                    f"step {progress.step:4d}   training {loss:.3f}   "
                    f"held out {run.validate():.3f} bits per byte   {rate}"
                )
            if progress.step % training.checkpoint_every == 0:
                run.save()
    run.save()


def take_step(run: Run, batch: Batch) -> float:
    """Learn from one batch; return its cost in bits per byte, or this process's share of it."""
    training = run.config.training
    rate = learning_rate(run.progress.step, training)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss = run.model.loss(batch, spread=run.ranks.spread)
    torch.autograd.backward(loss)
    run.ranks.add_gradients(run.model)
    nn.utils.clip_grad_norm_(run.model.parameters(), training.clip_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss.item()


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that the loop looks at between steps.

    An optimizer step that is torn in the middle is no state to resume from. A second Ctrl-C does
    what it always does.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread may handle signals
        return

    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def training_bar(name: str) -> Progress:
    """Return the progress bar: steps, loss, speed and the time that is left."""
    return Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )


def report(run: Run) -> None:
    """Compare the model with the baselines, let it write, and put the figures on paper."""
    corpus, sample = run.corpus, run.config.sample
    counted = {
        "unigram": baselines.unigram(corpus.train, corpus.held_out),
        "bigram": baselines.bigram(corpus.train, corpus.held_out),
    }
    bits = run.progress.held_out_bits[run.progress.step]
    console.print(f"\nheld-out topics, {sum(len(d.text) for d in corpus.held_out):,} bytes:")
    for name, value in {**counted, run.name: bits}.items():
        console.print(f"  {name:<12} {value:.3f} bits per byte")

    prompt = sample.prompt.encode()
    written = write_on(
        run.model,
        prompt,
        length=sample.bytes,
        temperature=sample.temperature,
        seed=run.config.training.seed,
    )
    text = (prompt + written).decode(errors="replace")
    console.rule("what the model writes")
    console.print(text, markup=False)
    console.rule()

    (run.out / "sample.txt").write_text(text, encoding="utf-8")
    plot_losses(run.out / "loss.png", run.name, run.progress, counted)
    figures = {"steps": run.progress.step, "held_out_bits_per_byte": {**counted, "model": bits}}
    (run.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {', '.join(sorted(p.name for p in run.out.iterdir()))} to {run.out}")


if __name__ == "__main__":
    sys.exit(main())
