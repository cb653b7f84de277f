"""The configuration of a run: every key of its TOML, with types, defaults and what it means."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from curriculum.batch import Allocate
from curriculum.loader import CurriculumLoader
from curriculum.mixture import Mixture
from curriculum.resolve import check_first_batch
from curriculum.schedule import Schedule
from pipeline.reader import Store

PRESETS: dict[str, dict[str, int]] = {
    "gpt2-nano": {"layers": 3, "width": 128, "heads": 4},
    "gpt2-micro": {"layers": 6, "width": 256, "heads": 8},
    "gpt2-124m": {"layers": 12, "width": 768, "heads": 12},
    "gpt2-350m": {"layers": 24, "width": 1024, "heads": 16},
    "gpt2-774m": {"layers": 36, "width": 1280, "heads": 20},
    "gpt2-1.5b": {"layers": 48, "width": 1600, "heads": 25},
    "gpt3-125m": {"layers": 12, "width": 768, "heads": 12},
    "gpt3-350m": {"layers": 24, "width": 1024, "heads": 16},
    "gpt3-760m": {"layers": 24, "width": 1536, "heads": 16},
    "gpt3-1.3b": {"layers": 24, "width": 2048, "heads": 16},
}
"""Shapes of GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020, arXiv 2005.14165, table 2.1).

The table gives the 1.3B model 24 heads of 128 in a width of 2048, which do not fit: 16 do. A model has as many
positions as the longest length of its schedule; GPT-2 was published with 1024, GPT-3 with 2048: for that write
`curriculum.seqlen_end = 2048`. GPT-3's alternating sparse attention is not there.
"""


class Bare(str):
    """Text without quotes, from the command line: there `lr=.5` and `compile=yes` may be what no TOML is."""

    __slots__ = ()


class Section(BaseModel):
    """Unknown keys are errors, and numbers that are not finite; 2e6 is a whole number too, true and "2" are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_other_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kinds, given = _kinds(cls.model_fields[info.field_name or ""].annotation), _leaves(value)
        if bool not in kinds and any(isinstance(one, bool) for one in given):
            raise ValueError("neither true nor false has a meaning here")
        if str in kinds and isinstance(value, str):
            return value
        quoted = [one for one in given if isinstance(one, str) and not isinstance(one, Bare) and one not in kinds]
        if quoted and any(kind in kinds for kind in (bool, int, float)):
            known = [f'"{kind}"' for kind in kinds if isinstance(kind, str)]
            what = "true or false" if bool in kinds else "a number"
            raise ValueError(f'found "{quoted[0]}"; allowed: {" or ".join([f"{what}, without quotes", *known])}')
        return value


def _leaves(value: Any) -> list[Any]:
    """`value`, or what is in it where it is a list of lists."""
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, list | tuple) else [value]


def _kinds(annotation: Any) -> list[Any]:
    """The types and literal values that an annotation is made of."""
    return [kind for part in get_args(annotation) for kind in _kinds(part)] or [annotation]


class ModelConfig(Section):
    """[model]: a preset, then single values."""

    preset: str = "gpt2-124m"
    layers: int = Field(0, ge=0)
    width: int = Field(0, ge=0)
    heads: int = Field(0, ge=0)
    mask: Literal["document", "causal"] = "document"
    """"document": attention stays within a piece of a document. "causal": it sees the whole row before it."""
    positions: Literal["learned", "rope"] = "learned"
    """"learned": as many as the longest length, as in GPT-2 and GPT-3. "rope": rotary, without parameters."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of rotary angles."""
    init: Literal["gpt2", "small", "scaled_embedding"] = "gpt2"
    """Deviation of the weights, and whether embeddings are scaled up: `train.model.GPT2`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name = data.get("preset", "gpt2-124m")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return {**PRESETS[name], **data}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.layers, self.width, self.heads) < 1:
            raise ValueError("layers, width and heads must be positive")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.positions == "rope" and self.width // self.heads % 2:
            raise ValueError(f'positions "rope" need heads of even size, found {self.width // self.heads}')
        return self

    @property
    def embedding_scale(self) -> float:
        """What the embedding layer's output is multiplied by."""
        return math.sqrt(self.width) if self.init == "scaled_embedding" else 1.0


PacingName = Literal[
    "constant", "linear", "root", "sine", "exponential", "staged", "table", "skyladder", "buckets", "adaptive"
]


class CurriculumConfig(Section):
    """[curriculum]: which of these a pacing uses, `Schedule` checks. See docs/schedules.md."""

    pacing: PacingName = "constant"
    seqlen: int | None = None
    seqlen_start: int | None = None
    seqlen_end: int | None = None
    duration_steps: int | None = None
    duration_tokens: int | None = None
    seqlen_multiple: int | None = None
    degree: int | None = None
    seqlens: list[int] | None = None
    boundaries: list[int] | None = None
    boundaries_tokens: list[int] | None = None
    table: list[list[int]] | None = None
    table_unit: Literal["steps", "tokens"] | None = None
    attention_window_start: int | None = None
    attention_window_end: int | None = None
    attention_window_shape: Literal["linear", "stepwise", "sine", "exponential"] | None = None
    attention_window_rate: float | str | None = None
    """Positions a step, 0.125 or "1/8"."""
    attention_window_multiple: int | None = None
    attention_window_positions: Literal["kept", "restart"] | None = None
    tolerance: float | None = None
    patience: int | None = None
    odds: str | list[int] | None = None
    """Odds of the buckets: a name ("grow-p2", ...), or one number for each, shortest first."""
    cycles: int | None = None
    order_seed: int | None = None
    carry: bool | None = None
    dealing: Literal["pack", "truncate"] | None = None
    """"truncate": rows are cut out of full-length ones, as the SLW paper did it; loses tokens and says how many."""
    first_piece: Literal["random", "beginning"] | None = None
    """Where a document is first read: at any of its pieces (the default), or from its beginning to its end."""
    control: Literal["batch_warmup"] | None = None
    """"batch_warmup": as many tokens a step as this curriculum, all at its full length: the arm to compare with."""


class BatchConfig(Section):
    """[batch]: one of the two global sizes."""

    global_batch_sequences: int | None = Field(None, ge=1)
    global_batch_tokens: int | None = Field(None, ge=1)
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Most tokens of one forward and backward; at least one sequence. "auto": 16,384 on a CPU; on cuda as many as
    fit, found before the first step and kept for the rest of the run (docs/speed.md)."""


class OptimizerConfig(Section):
    """[optimizer]: AdamW. The learning rate warms up by steps and decays by tokens."""

    lr: float = Field(6e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    decay_tokens: int | None = Field(None, ge=1)
    """Where the decay ends; default: with the run."""
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    clipping: Literal["norm", "adagc"] = "norm"
    """"norm": all gradients together by `clip`. "adagc": each tensor by its own history, `clip` while that begins."""
    clipping_warmup_steps: int = Field(100, ge=1)
    """Steps after which "adagc" leaves `clip` for the history."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, found {list(self.betas)}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class RunConfig(Section):
    """[run]: where it is kept and when it ends."""

    dir: Path
    total_tokens: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    max_epochs: int = Field(1, ge=1)
    seed: int = Field(1, ge=0, lt=1 << 63)
    init_from_hf: Path | None = None
    """A Hugging Face folder with a GPT-2 of [model]'s shape and the store's tokens: weights to begin with."""
    window_tokens: int | None = Field(None, ge=1)
    """Tokens of the documents that are dealt together: docs/dealing.md, "Windows"."""
    checkpoint_every_steps: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Those at multiples of this are kept for good, too."""
    validate_every_steps: int = Field(250, ge=1)
    validation_tokens: int = Field(200_000, ge=1)
    """Most held-out tokens of one validation, rounded up to whole batches."""
    log_every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Figures leave the device once in so many steps; a line a step all the same. "auto": cuda 10, cpu 1."""
    spike_ratios: list[Annotated[float, Field(gt=1)]] = [1.2]
    """Loss ratios above which a step is counted as a spike: docs/stability.md."""
    attention_logits_every_steps: int = Field(0, ge=0)
    """The largest attention logit once in so many steps, on a forward of its own; 0: never."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go besides metrics.jsonl; each needs its extra: slw[tensorboard], slw[wandb]."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Where a loss or gradient is not finite: docs/checkpoints.md. Its update is never applied."""
    max_skips: int = Field(10, ge=1)
    """"skip": more in a row stop the run."""
    rollback_steps: int = Field(100, ge=1)
    """"rollback": weights of a checkpoint at least so many steps before."""
    max_rollbacks: int = Field(3, ge=1)
    """One more stops the run."""
    deterministic: bool = False
    """Kernels that add in one order always: a resume is to the bit on a GPU too, for some speed."""
    device: str = "auto"
    """"auto": cuda where there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of matrix products; "auto": bfloat16 on cuda, else float32. Weights are float32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile, once for all lengths (docs/speed.md); "auto": on cuda."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in bfloat16, for `mfu` in the metrics; common GPUs are known by name."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Several ranks: the model whole on each, or sharded. "auto": sharded where it would fill a GPU."""
    activation_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: a third more work, memory for longer batches."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (every := self.keep_every_steps) and every % self.checkpoint_every_steps:
            raise ValueError(
                f"keep_every_steps {every} is no multiple of checkpoint_every_steps {self.checkpoint_every_steps}: "
                "most of those would never be written"
            )
        return self


class SourceConfig(Section):
    """[mixture.NAME]: one named source of the store."""

    weight: float = Field(ge=0)
    """Its share of the tokens served, of the sum of all weights."""
    max_epochs: int = Field(1, ge=1)


class Config(Section):
    """A whole run."""

    store: Annotated[str, BeforeValidator(str)]
    """A folder, or a URL such as s3://bucket/books."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    curriculum: CurriculumConfig
    batch: BatchConfig
    mixture: dict[str, SourceConfig] | None = None
    """Every named source of the store, weighted; without it the store is served as one."""
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig.model_validate({}))
    run: RunConfig

    def schedule(self) -> Schedule:
        """The run's schedule. Raises ConfigError where [curriculum], [batch] and [run] do not fit together."""
        batch = self.batch.model_dump(exclude={"micro_batch_tokens"})
        return Schedule.from_settings(
            self.curriculum.model_dump(exclude_none=True),
            batch,
            total_tokens=self.run.total_tokens,
            epochs=self.run.epochs,
            max_epochs=self.run.max_epochs,
        )

    def loader(
        self, store: Store, *, rank: int = 0, world_size: int = 1, allocate: Allocate | None = None
    ) -> CurriculumLoader:
        """The run's batches from its beginning; Raises ConfigError as `schedule` does.

        Also where the data do not suffice or fill no batch, or [mixture] does not fit the store.
        """
        mixture = None
        if self.mixture is not None:
            mixture = Mixture.from_settings({name: source.model_dump() for name, source in self.mixture.items()})
        run = self.run
        loader = CurriculumLoader(
            store,
            self.schedule(),
            seed=run.seed,
            mixture=mixture,
            rank=rank,
            world_size=world_size,
            window_tokens=run.window_tokens,
            allocate=allocate,
        )
        check_first_batch(loader.schedule, store.tokens)
        return loader
