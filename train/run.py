"""What lives as long as a run: data, model, optimizer, where it is; one update, one fetch, one validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from curriculum.adaptive import Calm
from curriculum.batch import Batch
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError, RunError
from pipeline.packing import Packed
from pipeline.reader import Store
from train.checkpoint import Saved
from train.clipping import Clipping
from train.compile import Compiler
from train.config import Config
from train.data import InFlight, MicroBatch, allocate_pinned, flat_of, micro_batches, row_parts
from train.distributed import Ranks, device_of, digest
from train.faults import Faults, Guard, is_bad, step_unless
from train.model import GPT2
from train.optimizer import learning_rate, make_optimizer
from train.parallel import Parallel, local, recompute_blocks, same_number
from train.pending import Done, Pending
from train.recovery import bad_step
from train.saver import Saver
from train.stability import AdamVariance, LossRatio, first_row, largest_attention_logit
from train.start import shape_to_begin_with
from train.state import Progressed
from train.trained import load_hf_weights
from train.utilisation import flops_per_token, parameters, peak_tflops, utilisation
from train.validation import validation_loss
from train.warmup import CPU_TOKENS, warm_up
from train.watch import Watch, sentence, told


class Run:
    """Everything that lives as long as a run."""

    bad: dict[str, Any] | None = None
    """Figures of a step that was not finite, after which no update was applied."""
    asked_to_stop: Callable[[], bool] = staticmethod(lambda: False)
    """Called between micro-batches, by all ranks the same number of times."""

    def __init__(
        self,
        config: Config,
        warn: Callable[[str], None],
        saved: Saved | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.warn = warn
        self.ranks = ranks or Ranks()
        self.device = device_of(config.run.device, self.ranks)
        self.store = Store.open(config.store)
        self.loader = config.loader(
            self.store,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            allocate=allocate_pinned if self.device.type == "cuda" else None,
        )
        self.schedule: Schedule = self.loader.schedule
        torch.manual_seed(config.run.seed)
        source = None if saved else config.run.init_from_hf
        given = (
            shape_to_begin_with(source, config.model, self.store, self.schedule.max_seqlen, warn) if source else None
        )
        positions = saved[1]["positions"] if saved else given.positions if given else self.schedule.max_seqlen
        if config.model.positions == "rope":
            positions = max(positions, self.schedule.max_seqlen)
        elif self.schedule.max_seqlen > positions:
            raise RunError(
                "the schedule is longer than the model that was begun",
                where=config.run.dir,
                found=f"sequences of {self.schedule.max_seqlen} tokens",
                allowed=f"{positions} tokens: so many positions it has",
                remedy="keep the longest length, or begin another run",
            )
        self.model = GPT2(config.model, self.store.manifest.vocab_size, positions)
        if source and given:
            load_hf_weights(source, given, self.model)
        cuda = self.device.type == "cuda"
        self.compiler = Compiler(self.model) if config.run.compile is True or (config.run.compile and cuda) else None
        if config.run.activation_checkpointing:
            recompute_blocks(self.model)
        dtype = config.run.dtype
        self.half = dtype == "bfloat16" or (dtype == "auto" and cuda)
        self.flat = flat_of(self.store, config.model, self.device, self.half)
        self.in_flight = InFlight()
        asked = config.batch.micro_batch_tokens
        self.micro_batch_tokens = asked if isinstance(asked, int) else CPU_TOKENS
        self.weights = parameters(config.model, self.model.vocab_size)
        self.peak_tflops = config.run.peak_tflops or peak_tflops(self.device)
        self.parallel = Parallel(self.model, self.ranks, self.device, config.run.parallel, self.half)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.at = Progressed()
        self.clipping = Clipping(config.optimizer)
        self.variance = AdamVariance(self.model, self.optimizer)
        self.ratio = LossRatio(config.run.spike_ratios)
        self.watch = Watch()
        self.nothing = torch.full((), math.nan, device=self.device)
        self.pending = Pending(self.ranks)
        self.faults = Faults()
        self.guard = Guard(config.run.on_nonfinite, self.device)
        self.saver = Saver(config.run)
        held_out = Store.open(config.store, "validation")
        self.held_out = held_out if held_out.documents else None
        if self.held_out is None:
            warn("the store has no held-out documents: no validation (slw-prep build --validation-fraction 0.01)")
        self.notches = self.schedule.notches
        self.calm = Calm()
        if self.notches and self.held_out is None:
            raise ConfigError("an adaptive length follows validation", found="no held-out documents")

    @property
    def log_every_steps(self) -> int:
        """How many steps one fetch takes; a device of its own should not be asked at each."""
        every = self.config.run.log_every_steps
        return every if isinstance(every, int) else 10 if self.device.type == "cuda" else 1

    def step(self, batch: Batch) -> bool:
        """One update; its figures stay on the device until `fetch`. False where it was given up before any change."""
        at = self.at
        agreed = (batch.step, batch.seqlen) == (at.step, self.schedule.seqlen(at.step))
        assert agreed, "batch and schedule disagree"
        rate = learning_rate(self.config.optimizer, at.step, at.tokens_seen, self.schedule.total_tokens or 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logit, figures = self.attention_logit(batch), self.update(batch)
        if figures is None:
            return False
        at.step += 1
        at.tokens_seen += batch.targets
        facts = {
            "step": at.step,
            "tokens_seen": at.tokens_seen,
            "seqlen": batch.seqlen,
            "sequences": self.schedule.sequences(batch.step),
            **({"attention_window": batch.attention_window} if batch.attention_window is not None else {}),
            "lr": rate,
        }
        self.pending.add(Done(facts, batch.targets, {"attention_logit_max": logit, **figures}))
        return True

    def update(self, batch: Batch) -> dict[str, Tensor] | None:
        """One optimizer step, left out where it is not finite; asks the device for nothing.

        None where `asked_to_stop` came before its last micro-batch. Returns [] each: `loss` (nats a token),
        `grad_norm` before and `clipped` by `Clipping`, `AdamVariance`'s.
        """
        total = torch.zeros((), device=self.device)
        most_rows = -(-self.schedule.sequences(batch.step) // self.ranks.world_size)
        count = len(row_parts(most_rows, batch.seqlen, self.micro_batch_tokens))
        for index, (part, last) in enumerate(same_number(self.parts(batch, self.micro_batch_tokens), count)):
            if index and self.asked_to_stop():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            with self.parallel.gradient_sync(last):
                with self.autocast():
                    loss = self.parallel.loss(part) / batch.targets
                (loss * self.ranks.world_size).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        gradients = [local(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        norm, clipped = self.clipping.apply(gradients, batch.step, self.parallel.norms)
        # On several ranks a loss is a rank's own share; what it does to the gradients all of them see.
        step_unless(self.optimizer, self.guard.judge(norm, *([] if self.ranks.several else [total])))
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "grad_norm": norm, "clipped": clipped, **self.variance.measure()}

    def parts(self, batch: Batch, most_tokens: int) -> Iterator[MicroBatch]:
        """`micro_batches` in the layout of this device; copied while it computes."""
        for part in micro_batches(batch, most_tokens, self.device, self.config.model.mask, self.flat):
            if self.device.type == "cuda":  # before it is handed out: nobody may ask what comes after the last
                self.in_flight.hold(batch)
            yield part

    def warm_up(self) -> None:
        """Find the micro-batch and compile, where that is asked for: see `train.warmup`. Leaves no trace."""
        warm_up(self)

    def agree(self) -> None:
        """Raise RunError where ranks are not at the same place of the same run."""
        if not self.ranks.several:
            return
        at = self.at
        seqlen = self.schedule.seqlen(min(at.step, self.schedule.total_steps - 1))
        here = {"step": at.step, "tokens": at.tokens_seen, "seqlen": seqlen, "micro_batch": self.micro_batch_tokens}
        self.ranks.agree(here | {"loader": digest(self.loader.state_dict())})

    def fetch(self) -> list[dict[str, Any]]:
        """Lines of metrics of the steps since the last fetch, none after a step that is not finite, as `bad` tells.

        A checkpoint follows a fetch, so none holds what became of such a step.
        """
        self.agree()
        lines: list[dict[str, Any]] = []
        for done in self.pending.fetch():
            figures = self.parallel.combined(done.figures)
            variance = self.variance.named(figures)
            if is_bad(figures):
                lines.append(bad_step(self, done, {**figures, **variance}))
                if self.bad:
                    break
                continue
            self.faults.in_a_row = 0
            ratio = self.ratio.update(figures["loss"], done.facts["seqlen"])
            self.at.elapsed_s += done.took_s
            self.at.clipped += figures["clipped"] > 0
            times = {"elapsed_s": self.at.elapsed_s, "tokens_per_s": done.targets / done.took_s}
            logit = figures["attention_logit_max"]
            flops = flops_per_token(self.config.model, self.weights, done.facts["seqlen"])
            mfu = utilisation(times["tokens_per_s"], flops, self.peak_tflops, self.ranks.world_size)
            lines.append(
                {
                    **done.facts,
                    **{name: round(value, 4) for name, value in times.items()},
                    "loss": figures["loss"],
                    "loss_ratio": ratio.own,
                    "loss_ratio_overall": ratio.overall,
                    "grad_norm": figures["grad_norm"],
                    "clipped": figures["clipped"],
                    **variance,
                    **({} if mfu is None else {"mfu": round(mfu, 4)}),
                    **({} if math.isnan(logit) else {"attention_logit_max": logit}),
                }
            )
            if alarms := self.alarms(lines[-1]):
                lines[-1]["watch"] = alarms
        return lines

    def alarms(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """What the watch says of a step, told to `warn` too."""
        step, found = line["step"], self.watch.update(line["seqlen"], line)
        if not found:
            return []
        where = (str(self.config.run.dir), step, line["variance_argmax"], self.dealt(step - 1))
        alarms = [told(alarm, *where, self.store) for alarm in found]
        for alarm in alarms:
            self.warn(sentence(alarm))
        return alarms

    def dealt(self, batch: int) -> Packed:
        """The pieces of a global batch, counted from 0, on all ranks; planned anew, which reads no token."""
        return next(packed for step, packed in self.loader.planned(batch) if step == batch)

    def attention_logit(self, batch: Batch) -> Tensor:
        """The largest attention logit of the batch's first row before the update, where it is asked for; else NaN."""
        every = self.config.run.attention_logits_every_steps
        if not every or batch.step % every:
            return self.nothing
        row = first_row(batch)
        (part,) = micro_batches(row, row.seqlen, self.device, self.config.model.mask)

        def forward() -> None:
            with self.autocast():
                self.model(part.input_ids, part.position_ids, part.sight)

        return largest_attention_logit(self.model, forward)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products where configured."""
        if self.half and not self.parallel.half_by_sharding:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def validate(self) -> float | None:
        """Loss in nats a token at full length on held-out documents, always the same ones; None without any."""
        if self.held_out is None:
            return None
        seqlen, most = self.schedule.max_seqlen, self.config.run.validation_tokens
        return validation_loss(self._loss, self.held_out, seqlen, self.validation_rows, most, self.ranks)

    @property
    def validation_rows(self) -> int:
        """Rows of a micro-batch of validation: no more than there are tokens for."""
        tokens = min(self.config.run.validation_tokens, self.held_out.tokens if self.held_out else 1)
        seqlen = self.schedule.max_seqlen
        return max(1, min(self.micro_batch_tokens // seqlen, -(-tokens // seqlen)))

    def _loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch that is one micro-batch."""
        (part,) = self.parts(batch, batch.labels.size)
        with self.autocast():
            return self.parallel.loss(part)

    def adapt(self, validation: float) -> int | None:
        """The length from the next step on, where `validation` has raised it."""
        if self.notches is None or self.at.step >= self.schedule.total_steps:
            return None
        seqlen = self.schedule.seqlen(self.at.step)
        raised = self.calm.observe(validation, seqlen, self.notches)
        if raised == seqlen:
            return None
        self.loader.change_schedule(self.loader.order.asked[-1][1].raised_to(raised))
        self.schedule = self.loader.schedule
        return raised
