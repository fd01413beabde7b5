"""Define the options of training, `train` in a run file, and how training on the text alone differs."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from fuselm.runs.options.base import NotNegative, OneOf, Options, Positive
from fuselm.training.choices import (
    CONFIDENCES,
    DECAYS,
    DIVERGENCES,
    LEARNED,
    PRECISIONS,
    QUANTIZERS,
    SCHEDULES,
    TAILS,
    TRACKERS,
)

Rates = Annotated[list[Positive], Field(min_length=1)]
Average = Literal[False] | Positive
Schedule = Annotated[str, OneOf(SCHEDULES)]
OLDER = ("learning_rate", "lr_schedule", "passes", "average")  # options of the baseline that are always written down


class BaselineOptions(Options):
    """Say how training on the text alone, `clm`, differs from `train`.

    The defaults are what was best for it on few texts, where a third pass is already too many.
    """

    learning_rate: Positive | Rates | None = Field(
        None, description="Train `clm` at this learning rate, or at the best of several; at `train`'s if null."
    )
    lr_schedule: Schedule | None = Field(
        "cosine", description="Change the learning rate of `clm` like this after the warm-up; like `train`'s if null."
    )
    passes: int | None = Field(
        2, ge=1, description="Train `clm` for this many passes over the training documents; for `train`'s if null."
    )
    average: Average | None = Field(
        False,
        description="Keep the mean of the weights of `clm` since this many passes; false keeps the last weights, and "
        "null does as `train`.",
    )
    weight_decay: NotNegative | None = Field(
        None, description="Decay the weights of `clm` with this factor; with `train`'s if null."
    )
    decay_towards: Annotated[str, OneOf(DECAYS)] | None = Field(
        None, description="Pull the weights of `clm` towards this; towards what `train` says if null."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Drop this share of what each layer adds while `clm` is trained; `train`'s if null."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Smooth the labels of `clm` by this share; by `train`'s if null."
    )
    lora_rank: int | None = Field(
        None, ge=1, description="Train `clm` by low-rank adapters of this rank; as `train` says if null."
    )

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out newer options without a value, as there were none when older runs were written down."""
        return {name: value for name, value in write(self).items() if name in OLDER or value is not None}


class TrainOptions(Options):
    """Say how the target is trained on the fused rows."""

    lambda_clm: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Give the causal-LM loss this weight, the paper's λ; the divergence from the fused rows gets the "
        "rest, 1 - λ.",
    )
    lambda_final: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Change λ linearly over the steps until it has this value; 1 lets the divergence decay to nothing. "
        "If nothing is given, λ is constant.",
    )
    confidence: Annotated[str, OneOf(CONFIDENCES)] = Field(
        "none",
        description="Multiply the divergence's weight, 1 - λ, by how far each fused row is trusted; the causal-LM loss "
        "gets the rest.",
    )
    divergence: Annotated[str, OneOf(DIVERGENCES)] = Field(
        "forward_kl", description="Compare the target's distributions with the fused rows by this divergence."
    )
    jsd_beta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Give the fused row this share of the mixture in `jsd`; 0.5 if nothing is given.",
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="Flatten by this temperature what the divergence compares; 1 leaves it as it is."
    )
    tail: Annotated[str, OneOf(TAILS)] = Field(
        "bucket", description="Treat the ids that a fused row does not hold in this way."
    )
    learning_rate: Positive | Rates = Field(
        1e-4,
        description="Train at this learning rate. A list trains once at each, and keeps the best on the development "
        "split.",
    )
    lr_schedule: Schedule = Field("constant", description="Change the learning rate like this after the warm-up.")
    warmup: float = Field(
        0.05, ge=0, lt=1, description="Raise the learning rate linearly from 0 over this share of the steps."
    )
    passes: int = Field(
        4,
        ge=1,
        description="Train for this many passes over the training documents. The baseline has a number of its own, "
        "`clm.passes`.",
    )
    average: Average | None = Field(
        None,
        description="Keep the mean of the weights since this many passes instead of the last weights; false keeps the "
        "last. If nothing is given, the mean begins after the first pass, or after half of a single one.",
    )
    clm: BaselineOptions = Field(
        BaselineOptions(), description="Train the baseline, on the text alone, with these differences."
    )
    batch_documents: int | None = Field(
        None,
        ge=1,
        description="Put this many documents into one batch of one process; 4 if nothing is given, unless documents "
        "are packed.",
    )
    pack_tokens: int | None = Field(
        None,
        ge=1,
        description="Pack documents without padding into one row of at most this many tokens, which is then a batch. "
        "Documents do not see each other.",
    )
    gradient_accumulation: int = Field(1, ge=1, description="Add up the gradients of this many batches in one step.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, about a third more time."
    )
    evaluations_per_pass: int = Field(
        2,
        ge=1,
        description="Evaluate on the development split this many times in each pass, and write a checkpoint each time.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations without a better one. If nothing is given, all passes are made.",
    )
    on: Annotated[str, OneOf(LEARNED)] = Field("assistant", description="Train on this part of conversations.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Give this share of what the causal-LM loss asks of the token that comes to all ids alike.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Drop this share of what each of the target's layers adds, while it is trained."
    )
    weight_decay: NotNegative = Field(0.1, description="Decay the weights by AdamW with this factor.")
    decay_towards: Annotated[str, OneOf(DECAYS)] = Field(
        "zero",
        description="Let `weight_decay` pull weights towards this. `start` needs far greater factors, because a step "
        "pulls by the learning rate times the factor: 30 and more.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the norm of the gradient to this.")
    precision: Annotated[str, OneOf(PRECISIONS)] = Field("auto", description="Train in this precision.")
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="Train low-rank adapters (LoRA) of this rank and merge them at the end. If nothing is given, all "
        "weights are trained. This needs `pip install 'fuselm[lora]'`.",
    )
    lora_alpha: Positive | None = Field(
        None, description="Multiply what adapters add by alpha / rank; twice the rank if nothing is given."
    )
    lora_dropout: float | None = Field(
        None, ge=0, lt=1, description="Drop this share of the adapters' inputs in training; 0 if nothing is given."
    )
    lora_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Add adapters to the layers with these names; to all linear layers except the output layer if "
        "nothing is given.",
    )
    quantize: Annotated[str, OneOf(QUANTIZERS)] | None = Field(
        None,
        description="Quantize the target's weights beside the adapters (QLoRA). This needs "
        "`pip install 'fuselm[qlora]'`.",
    )
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="Let so many processes beside each that trains read batches ahead; 0 reads them between steps. If "
        "nothing is given, 2 do with `fuse.when: load`, 1 on a GPU, and none otherwise.",
    )
    trackers: list[Annotated[str, OneOf(TRACKERS)]] = Field(
        ["tensorboard"], description="Report every term of the loss to these trackers."
    )

    @model_validator(mode="after")
    def _check_use(self) -> "TrainOptions":
        """Raise `ValueError` on an option that would do nothing, and on options that exclude each other."""
        without_lora = self.lora_rank is None and self.clm.lora_rank is None and "lora_rank is not set"
        unused = {
            "jsd_beta": self.divergence != "jsd" and "divergence is not jsd",
            "batch_documents": self.pack_tokens is not None and "pack_tokens says what a batch is",
            **dict.fromkeys(("lora_alpha", "lora_dropout", "lora_modules", "quantize"), without_lora),
        }
        for name, why in unused.items():
            if why and getattr(self, name) is not None:
                raise ValueError(f"train.{name}: does nothing here, because {why}; drop one or set the other")
        for where, options in (("train", self.for_method("fused")), ("train.clm", self.for_method("clm"))):
            if options.decay_towards == "start" and options.weight_decay == 0:
                raise ValueError(f"{where}.decay_towards: does nothing here, because weight_decay is 0; drop one")
            if options.average >= options.passes:
                raise ValueError(f"{where}.average: must be below passes, {options.passes} (got {options.average:g})")
        if self.divergence == "reverse_kl" and self.tail == "renormalise":
            raise ValueError(
                "train.tail: renormalise gives ids that are not kept nothing, so reverse_kl is infinite; take bucket"
            )
        return self

    def for_method(self, method: str) -> "TrainOptions":
        """Return the options of one method, `clm` or `fused`, with every default filled in."""
        changes = self.clm.model_dump(exclude_none=True) if method == "clm" else {}
        options = self.model_copy(update={**changes, "clm": BaselineOptions()})
        if options.average is not None:
            return options
        return options.model_copy(update={"average": min(1.0, options.passes / 2)})

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out newer options at their defaults: what was trained before they existed keeps its key."""
        written = write(self)
        for name in ("on", "loader_workers", "label_smoothing", "dropout", "decay_towards"):
            if getattr(self, name) == type(self).model_fields[name].default:
                written.pop(name, None)
        return written

    @property
    def learning_rates(self) -> list[float]:
        """Return all learning rates to train at."""
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
