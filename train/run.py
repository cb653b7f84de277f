"""What lives as long as a run: data, model, optimizer, where it is; one update, one fetch, one validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curriculum.adaptive import Calm
from curriculum.batch import Batch
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.packing import Packed
from pipeline.reader import Store
from train.checkpoint import Saved
from train.clipping import Clipping
from train.compile import Compiler
from train.config import Config
from train.data import Feed, allocate_pinned, micro_batches, row_parts
from train.distributed import Ranks, device_of, digest
from train.faults import Faults, Guard, is_bad, step_unless
from train.optimizer import learning_rate, make_optimizer
from train.parallel import Parallel, local, recompute_blocks, same_number
from train.pending import Done, Fetched, Pending
from train.recovery import bad_step
from train.saver import Saver
from train.stability import AdamVariance, LossRatio, first_row, largest_attention_logit
from train.start import model_to_begin_with
from train.state import Progressed
from train.utilisation import flops_per_token, parameters, peak_tflops, utilisation
from train.validation import validation_loss
from train.warmup import CPU_TOKENS
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
        self._open_data()
        self._make_model(saved[1]["positions"] if saved else None)
        self._begin()

    def _open_data(self) -> None:
        self.store = Store.open(self.config.store)
        self.loader = self.config.loader(
            self.store,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            allocate=allocate_pinned if self.device.type == "cuda" else None,
        )
        held_out = Store.open(self.config.store, "validation")
        self.held_out = held_out if held_out.documents else None
        if self.held_out is None:
            self.warn(
                "the store has no held-out documents: no validation (slw-prep build --validation-fraction 0.01)"
            )
            if self.asked.notches:
                raise ConfigError("an adaptive length follows validation", found="no held-out documents")

    def _make_model(self, positions: int | None) -> None:
        """What a step changes, and how it is spread; `positions`: how many a checkpoint has, if there is one."""
        config, settings, cuda = self.config, self.config.run, self.device.type == "cuda"
        half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and cuda)
        torch.manual_seed(settings.seed)
        self.model = model_to_begin_with(config, self.store, self.schedule.max_seqlen, positions, self.warn)
        self.compiler = Compiler(self.model) if settings.compile is True or (settings.compile and cuda) else None
        if settings.activation_checkpointing:
            recompute_blocks(self.model)
        self.parallel = Parallel(self.model, self.ranks, self.device, settings.parallel, half)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.clipping = Clipping(config.optimizer)
        self.guard = Guard(settings.on_nonfinite, self.device)
        self.feed = Feed(self.store, config.model, self.device, half)
        asked = config.batch.micro_batch_tokens
        self.micro_batch_tokens = asked if isinstance(asked, int) else CPU_TOKENS

    def _begin(self) -> None:
        """Where the run is, as checkpoints keep it; and what tells and saves it."""
        settings = self.config.run
        self.at = Progressed()
        self.ratio = LossRatio(settings.spike_ratios)
        self.watch = Watch()
        self.calm = Calm()
        self.faults = Faults()
        self.variance = AdamVariance(self.model, self.optimizer)
        self.nothing = torch.full((), math.nan, device=self.device)
        self.pending = Pending(self.ranks)
        self.peak_tflops = settings.peak_tflops or peak_tflops(self.device)
        self.saver = Saver(settings)

    @property
    def schedule(self) -> Schedule:
        """The whole run's, with the changes so far."""
        return self.loader.schedule

    @property
    def asked(self) -> Schedule:
        """The schedule that was asked for last, its rule included; `schedule` is what it and those before became."""
        return self.loader.order.asked[-1][1]

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
        for index, (part, last) in enumerate(same_number(self.feed.parts(batch, self.micro_batch_tokens), count)):
            if index and self.asked_to_stop():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            with self.parallel.gradient_sync(last):
                loss = self.parallel.loss(part) / batch.targets
                (loss * self.ranks.world_size).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        gradients = [local(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        norm, clipped = self.clipping.apply(gradients, batch.step, self.parallel.norms)
        # On several ranks a loss is a rank's own share; what it does to the gradients all of them see.
        step_unless(self.optimizer, self.guard.judge(norm, *([] if self.ranks.several else [total])))
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "grad_norm": norm, "clipped": clipped, **self.variance.measure()}

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
            self.at.elapsed_s += done.took_s
            if is_bad(figures):
                lines.append(bad_step(self, done.facts, {**figures, **self.variance.named(figures)}))
                if self.bad:
                    break
            else:
                lines.append(self._line(done, figures))
        return lines

    def _line(self, done: Fetched, figures: dict[str, float]) -> dict[str, Any]:
        """The line of metrics of a step: docs/metrics.md."""
        self.faults.in_a_row = 0
        self.at.clipped += figures["clipped"] > 0
        seqlen, tokens_per_s, logit = done.facts["seqlen"], done.targets / done.took_s, figures["attention_logit_max"]
        ratio = self.ratio.update(figures["loss"], seqlen)
        flops = flops_per_token(self.config.model, parameters(self.config.model, self.model.vocab_size), seqlen)
        mfu = utilisation(tokens_per_s, flops, self.peak_tflops, self.ranks.world_size)
        line: dict[str, Any] = {
            **done.facts,
            "elapsed_s": round(self.at.elapsed_s, 4),
            "tokens_per_s": round(tokens_per_s, 4),
            "loss": figures["loss"],
            "loss_ratio": ratio.own,
            "loss_ratio_overall": ratio.overall,
            "grad_norm": figures["grad_norm"],
            "clipped": figures["clipped"],
            **self.variance.named(figures),
            **({} if mfu is None else {"mfu": round(mfu, 4)}),
            **({} if math.isnan(logit) else {"attention_logit_max": logit}),
        }
        if alarms := self.alarms(line):
            line["watch"] = alarms
        return line

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
            with self.parallel.autocast():
                self.model(part.input_ids, part.position_ids, part.sight)

        return largest_attention_logit(self.model, forward)

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
        (part,) = self.feed.parts(batch, batch.labels.size)
        return self.parallel.loss(part)

    def adapt(self, validation: float) -> int | None:
        """The length from the next step on, where `validation` has raised it."""
        notches = self.asked.notches
        if notches is None or self.at.step >= self.schedule.total_steps:
            return None
        seqlen = self.schedule.seqlen(self.at.step)
        raised = self.calm.observe(validation, seqlen, notches)
        if raised == seqlen:
            return None
        self.loader.change_schedule(self.asked.raised_to(raised))
        return raised
