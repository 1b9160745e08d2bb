"""The training run: prepare, plan, loop, checkpoint; interrupted at any time, continued with --resume."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import numpy as np

from . import checkpoint as checkpoints
from . import runfolder, sample
from .arena import Arena
from .blas import hints
from .budget import Budget, change
from .comm import same_everywhere, together
from .config import model_config_from_json
from .device import Machine
from .energy import EnergyMeter, add_joules
from .errors import CheckpointError, ConfigError, Interrupted, NotFiniteError
from .files import atomic_directory
from .model import Worker
from .plan import batch_hint, estimated_step_seconds, format_seconds, make_plan, warnings
from .plot import plot_losses
from .run import Run, open_run
from .scale import state_bytes
from .signals import signals
from .threads import Beside
from .validation import PairValidation, Validation


class Loop:
    """The loop over steps with everything around it. Use :func:`run_training`."""

    def __init__(self, run: Run, machine: Machine, tensorboard: bool = False) -> None:
        self.run, self.config, self.comm, self.tensorboard = run, run.config, machine.comm, tensorboard
        self.leads = self.comm.rank == 0  # writes files and talks; the other ranks only compute
        # before memory is taken: it knows whether the text is long enough
        self.source = run.source()
        self.trainer = machine.trainer(run.model, run.config, run.teacher, run.lora)
        self.held_out = run.validations(self.trainer.backend.shard_rows)
        self.log = runfolder.Log(run.folder / "log.txt", speaks=self.leads)
        self.metrics_path = run.folder / "metrics.jsonl"
        self.sampler = Worker(run.model, 1, min(run.config.seq_len, 128), training=False) if self.leads else None
        self.received: list[int] = []
        self.energy = EnergyMeter()
        self._saved_step, self._saved_at = -1, monotonic()
        self.writer, self.samples = (Beside(), Beside()) if machine.waits_for_host else (None, None)
        self.budget = Budget.of(run.config, run.reader.step)
        self.fits_more: bool | None = None  # by the last change of the number of steps

    def start(self, parent: Path | None) -> None:
        """Newest checkpoint of the run, else the parent's (a trunk to branch from), else the given or fresh weights."""
        own = checkpoints.checkpoints(self.run.folder)
        if own:
            self._restore(own[-1])
            self._saved_step = self.trainer.state.step
        elif parent is not None:
            self._restore(parent)
        elif self.config.extra.get("init_from"):
            folder = Path(self.config.extra["init_from"])
            checkpoints.load_parameters(folder, self.trainer.params, self.run.model)
            if self.trainer.backend.adapters:
                self.trainer.backend.adapters.begin(self.config.seed)
            self.log.say(f"weights from {folder}")
        else:
            self.trainer.initialize()
        self.in_decay = self.trainer.state.step >= self.config.decay_start
        if self.leads:
            step = self.trainer.state.step
            self.metrics = runfolder.Metrics(self.metrics_path, step, tensorboard=self.tensorboard)

    def _restore(self, folder: Path) -> None:
        values = self.trainer.restore(folder)
        if model_config_from_json(values["model"]) != self.run.model:
            raise CheckpointError(f"{folder}: a checkpoint of another architecture")
        if values["data_fingerprint"] != self.run.fingerprint():
            raise CheckpointError(f"{folder}: the training data has changed since this checkpoint")
        here = checkpoints.environment()
        changed = [k for k, v in here.items() if values["environment"].get(k) != v]
        if changed:
            self.log.say(
                f"warning: the checkpoint was made with another {', '.join(changed)}: the run continues, "
                "but not with the bits it would have had there"
            )
        self.log.say(f"continuing from {folder.name} (step {self.trainer.state.step})")

    # ---- pieces of the loop --------------------------------------------------------------------------------------

    def save(self, *, trunk: bool = False) -> None:
        """Write a checkpoint and drop old ones; beside the steps where these run elsewhere. trunk: keep it as that, too."""
        step = self.trainer.state.step
        if step == self._saved_step:
            return
        folder = self.run.folder / "checkpoints" / f"step_{step:08d}"
        if self.leads:
            folder.parent.mkdir(exist_ok=True)

        def then() -> None:
            if trunk:
                self._keep_trunk(folder)
            checkpoints.prune(self.run.folder, self.config.keep_checkpoints)

        write_model = self._model_writer(copied=self.leads and self.writer is not None)  # only rank 0 calls it
        self.trainer.save(folder, self.run.fingerprint(), write_model, then=then, beside=self.writer)
        self._saved_step, self._saved_at = step, monotonic()

    def _model_writer(self, copied: bool) -> Callable[[Path], None]:
        """What writes the Hugging Face files, and the adapters' own where there are some; of copies: of what they hold now."""
        params, adapters = self.trainer.params, self.trainer.backend.adapters
        values = adapters.values if adapters else None
        if copied:
            params, values = params.copy(), values and values.copy()

        def write(folder: Path) -> None:
            self.run.write_model(folder, params)
            if adapters and values:
                adapters.save_state(folder, values)

        return write

    def validate(self, quantize: bool) -> Validation | PairValidation:
        """Validate on each text, log, plot; returns the first text's result. Raises NotFiniteError where there is none."""
        self.log.progress(f"step {self.trainer.state.step}: validating")
        results = [part.result(self.trainer.backend.validation_sums(part.batches, quantize)) for part in self.held_out]
        result = results[0]
        state = self.trainer.state
        for part, found in zip(self.held_out, results, strict=True):
            if not math.isfinite(found.loss):
                error = NotFiniteError(
                    f"step {state.step}: the held-out loss of {part.name} is {found.loss}. "
                    "Lower the learning rate or warm up longer."
                )
                error.on_all_ranks = True  # they all have the same sums
                raise error
        if state.best_validation is None or result.loss < state.best_validation:
            state.best_validation = result.loss
        if not self.leads:
            return result
        others = {part.name: r.metrics() for part, r in zip(self.held_out[1:], results[1:], strict=True)}
        entry = {**result.metrics(), "int8": quantize, **({"others": others} if others else {})}
        self.metrics.write({"step": state.step, "tokens": state.tokens, **entry})
        for part, found in zip(self.held_out, results, strict=True):
            of = f" of {part.name}" if others else ""
            self.log.say(f"step {state.step}: validation{of} {found} ({'int8' if quantize else 'float32'})")
        plot_losses([runfolder.read_metrics(self.metrics_path)], self.run.folder / "loss.png")
        return result

    def show_sample(self, quantize: bool) -> None:
        """One sample with a fixed seed."""
        if self.sampler is None:
            return
        weights, step = self.trainer.backend.weights(quantize), self.trainer.state.step
        if self.samples is None:
            self.log.progress(f"step {step}: writing a sample")
            self._sample(weights, step, quantize)
        else:
            self.samples.start(partial(self._sample, weights.copy(), step, quantize))

    def _sample(self, weights: Arena, step: int, quantize: bool) -> None:
        c, worker = self.config, self.sampler
        assert worker is not None
        ids = self.run.tokenizer.encode(c.sample_prompt).ids[: worker.seq_len - 1]
        if not ids:  # no prompt, and a tokenizer that begins a text with no token of its own
            return
        ends = {"eos": self.run.eos, "seed": c.seed, "quantize": quantize}
        new = sample.generate(worker, weights, ids, c.sample_tokens, **ends)
        self.log.say(f"step {step} sample: {self.run.tokenizer.decode(ids + new)}")

    def steps(self) -> None:
        """All steps that are left."""
        trainer, c = self.trainer, self.config  # of these only the number of steps may change
        first, first_ended = trainer.state.step, None
        began = monotonic()
        self.log.progress(f"step {first + 1}: the first one ever compiles the kernels, which takes up to a minute")
        before = trainer.state.seconds
        while trainer.state.step < self.config.steps:
            step_began, cpu_began = monotonic(), process_time()
            result = trainer.step(*self.source.batch(trainer.state.step))
            now, cpu_now = monotonic(), process_time()
            state = trainer.state
            state.seconds = before + now - began
            state.joules = add_joules(state.joules, self.energy.joules())
            rate = c.batch_size * c.seq_len / (now - step_began)
            self._write_metrics(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr_factor": result.lr_factor,
                    "quantized": result.quantized,
                    "tokens_per_second": round(rate),
                    "seconds": round(state.seconds, 3),
                    "cpu_seconds": round(cpu_now - cpu_began, 4),  # of this step, all threads
                }
            )
            self._keep_to_budget()
            done, mean = state.step - first - 1, None
            if first_ended is None:  # that step may have compiled kernels, and says nothing of the others' speed
                first_ended = now
            else:
                mean = done * c.batch_size * c.seq_len / (now - first_ended)
            self.log.report(self._progress(result.loss, mean))
            self._milestones(result.quantized)
            signs = self.comm.gather((self.received[:1], self._is_due()))
            if signs[0][1]:  # by the clock of rank 0
                self.save()
            stop = next((number for number, _ in signs if number), None)
            if stop:  # on whichever rank it arrived
                self.save()
                self.finish_beside()
                raise Interrupted(stop[0])
            for beside in self._beside():
                beside.check()

    def _keep_to_budget(self) -> None:
        """Another number of steps, by the clock of rank 0, where the machine is not as fast as when it was decided."""
        if self.budget is None:
            return
        state = self.trainer.state
        mine = self.budget.steps(self.config, state.step, state.seconds - self.budget.before)
        steps = self.comm.gather(mine)[0]
        if steps == self.config.steps:
            return
        more = steps > self.config.steps
        if more != self.fits_more:  # others may follow, one step after the other
            self.fits_more = more
            self.log.say(f"step {state.step}: {change(self.config.steps, steps)}")
        self.config = self.run.config = self.trainer.config = dataclasses.replace(self.config, steps=steps)
        self.source = self.run.source()
        if self.leads:
            runfolder.replace_config(self.run.folder, self.config)

    def _is_due(self) -> bool:
        """Whether --checkpoint-minutes have passed."""
        minutes = self.config.checkpoint_minutes
        return minutes > 0 and monotonic() - self._saved_at >= 60 * minutes

    def _beside(self) -> list[Beside]:
        return [beside for beside in (self.writer, self.samples) if beside is not None]

    def finish_beside(self) -> None:
        """Wait for what is written and sampled beside the steps, and raise what went wrong there."""
        for beside in self._beside():
            beside.finish()

    def _write_metrics(self, entry: dict[str, Any]) -> None:
        if self.leads:
            self.metrics.write(entry)

    def _progress(self, loss: float, tokens_per_second: float | None) -> str:
        c, step = self.config, self.trainer.state.step
        if tokens_per_second is None:
            return f"step {step}/{c.steps} loss {loss:.4f}"
        left = (c.steps - step) * c.batch_size * c.seq_len / tokens_per_second
        adapters = self.run.lora is not None
        flops = self.run.model.flops_per_token(c.seq_len, adapters=adapters) * tokens_per_second
        return (
            f"step {step}/{c.steps} loss {loss:.4f} {tokens_per_second:,.0f} tokens/s "
            f"{flops / 1e9:.0f} GFLOP/s {format_seconds(left)} left"
        )

    def _milestones(self, quantized: bool) -> None:
        c, step = self.config, self.trainer.state.step
        is_last = step == c.steps
        if is_last or (c.eval_every and step % c.eval_every == 0):
            self.validate(quantized)
        if c.sample_every and (is_last or step % c.sample_every == 0):
            self.show_sample(quantized)
        trunk_end = not self.in_decay and step >= c.decay_start and c.decay_steps > 0
        self.in_decay = self.in_decay or trunk_end
        every = 0 if c.checkpoint_minutes else c.checkpoint_every
        if is_last or trunk_end or (every and step % every == 0):
            self.save(trunk=trunk_end)

    def _keep_trunk(self, checkpoint: Path) -> None:
        """The last checkpoint before the decay is kept as ``trunk``: longer runs can continue from it."""
        with atomic_directory(self.run.folder / "trunk") as temporary:
            shutil.copytree(checkpoint, temporary, dirs_exist_ok=True)

    def finish(self) -> Path:
        """final/: the Hugging Face folder to freeze."""
        self.finish_beside()
        target = self.run.folder / "final"
        if self.leads:
            with atomic_directory(target) as temporary:
                self.run.write_model(temporary, self.trainer.params)
            if self.trainer.backend.adapters:
                with atomic_directory(self.run.folder / "adapter") as temporary:
                    self.trainer.backend.adapters.export(temporary)
        if self.config.quantize != "never":
            self.validate(False)  # both arithmetics, for the record
            self.validate(True)
        return target

    def close(self) -> None:
        for beside in self._beside():
            beside.close()
        self.trainer.close()
        self.log.close()
        if hasattr(self, "metrics"):
            self.metrics.close()


def run_training(folder: Path, machine: Machine, parent: Path | None = None, *, tensorboard: bool = False) -> Path:
    """Run, or continue, the run in ``folder``; returns the folder of the final model. tensorboard: write event files.

    Raises Interrupted after a checkpoint when SIGINT, SIGTERM or SIGHUP came, NotFiniteError when the loss
    blew up (the last checkpoint stays), OSError when the disk is full (likewise).
    """
    with together(machine.comm):
        run = open_run(folder)
    same_everywhere(machine.comm, {"text": run.fingerprint()})
    with together(machine.comm):
        loop = Loop(run, machine, tensorboard)
    try:
        with together(machine.comm):
            loop.start(parent)
        final = run.folder / "final"
        if machine.comm.gather(loop.trainer.state.step >= run.config.steps and final.exists())[0]:
            loop.log.say(f"already finished: {final}")
            return final
        if loop.trainer.state.step == 0:
            _say_plan(loop, machine)
        if loop.leads:
            runfolder.begun(folder)
        if machine.comm.size > 1:
            for rank, (host, pid) in enumerate(machine.comm.gather((socket.gethostname(), os.getpid()))):
                loop.log.say(f"rank {rank}: process {pid} on {host}, {threads_text(loop)}")
        with signals(loop.received, machine.comm.size):
            loop.steps()
        final = loop.finish()
        loop.log.say(f"done in {format_seconds(loop.trainer.state.seconds)}: {final}")
        return final
    finally:
        loop.close()


def threads_text(loop: Loop) -> str:
    count = loop.trainer.backend.threads
    return f"{count} thread{'s' * (count > 1)}"


def _say_plan(loop: Loop, machine: Machine) -> None:
    run, threads = loop.run, loop.trainer.backend.threads
    cores = threads * machine.comm.size
    on_cpu = machine.device.name == "cpu"
    seconds = estimated_step_seconds(run.model, run.config, cores, run.lora) if on_cpu else None
    ranks = machine.comm.size, machine.shard_optimizer
    memory = machine.device.memory_bytes(run.model, run.config, threads, *ranks, run.lora)
    epochs = loop.source.epochs(run.config.steps)
    plan = make_plan(run.model, run.config, epochs, cores, seconds, memory, run.lora)
    more = []
    if run.pairs:
        more.append(f"pairs       {len(run.pairs.train):,} to learn from, {len(run.pairs.held_out):,} held out")
    else:
        held_out, text = run.corpora[0].validation.n_tokens, run.corpora[0].train.n_tokens
        more += warnings(epochs, held_out, held_out + text)
        more += [] if run.config.extra.get("init_from") else batch_hint(run.config)
    more += hints() if on_cpu and loop.leads else []
    for line in [*plan.lines(run.model, run.config), *more]:
        loop.log.say(line)
    if machine.comm.size > 1:
        moments = state_bytes(run.model, run.config, *ranks)
        loop.log.say(f"ranks       {ranks[0]}; of the memory {moments / 2**20:.1f} MiB are a rank's moments")


def measure_step_seconds(run: Run, machine: Machine) -> tuple[float, float]:
    """Median seconds of a step without and with fake-quantization, on a throwaway trainer."""
    config = dataclasses.replace(run.config, quantize="always", steps=10)
    source = run.source()
    with together(machine.comm):  # too little memory is told once
        trainer = machine.trainer(run.model, config, run.teacher, run.lora)
    try:
        trainer.initialize()
        if trainer.backend.adapters:
            trainer.backend.adapters.begin(0)
        batch = source.batch(0)
        results = []
        for quantize in (False, True):
            trainer.config = dataclasses.replace(config, quantize="always" if quantize else "never")
            times = []
            for _ in range(4):  # the first one compiles
                began = monotonic()
                trainer.step(*batch)
                times.append(monotonic() - began)
            results.append(float(np.median(times[1:])))
        return results[0], results[1]
    finally:
        trainer.close()


def measured_budget(run: Run, minutes: float, machine: Machine, before: float) -> tuple[Budget, int]:
    """A budget of so many minutes on this machine, by rank 0's measurement, after ``before`` seconds of a parent; and how many
    steps fit into it."""
    budget = Budget(60 * minutes, *machine.comm.gather(measure_step_seconds(run, machine))[0], before)
    steps = budget.steps_at_first(run.config)
    if steps < 1:
        error = ConfigError(f"{minutes} minutes are not enough for one step of {budget.plain:.1f} s")
        error.on_all_ranks = True
        raise error
    return budget, steps
