"""Define the options of training, `train` in a run file, and what differs for training on the text alone."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fuselm.runs.options.files import Options, Positive

Rates = Annotated[list[Positive], Field(min_length=1)]
Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt"]
Average = Literal[False] | Positive


class Baseline(Options):
    """Say what differs from `train` when training on the text alone, which is to be at its best; None: nothing.

    The defaults are what was best for it on few texts, the second pass of them being too many already.
    """

    learning_rate: Positive | Rates | None = None
    lr_schedule: Schedule | None = "cosine"
    passes: int | None = Field(2, ge=1)
    average: Average | None = False


class Train(Options):
    lambda_clm: float = Field(0.3, ge=0, le=1)  # weight of the causal-LM loss; the paper's lambda
    lambda_final: float | None = Field(None, ge=0, le=1)  # change linearly to this; 1: the divergence decays to nothing
    # Of a fused row, by which the divergence's weight, 1 - lambda, is multiplied; the causal-LM loss gets the rest.
    # expected: the probability that it expects the token that comes to have; gold: the one that that has.
    confidence: Literal["none", "expected", "gold"] = "none"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"  # of the target from the fused rows
    jsd_beta: float | None = Field(None, gt=0, lt=1)  # share of the fused row in jsd's mixture; None: 0.5
    temperature: float = Field(1.0, gt=0, le=100)  # flattens what the divergence compares
    tail: Literal["bucket", "renormalise"] = "bucket"  # ids not kept: one outcome, or none, as the paper has it
    learning_rate: Positive | Rates = 1e-4  # of several, the best on the development split is kept
    lr_schedule: Schedule = "constant"  # after the warm-up
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    passes: int = Field(4, ge=1)  # over the training documents
    # Keep the mean of the weights since so many passes, in place of the last; None: since the first, or half of fewer
    # than two.
    average: Average | None = None
    clm: Baseline = Baseline()
    batch_documents: int | None = Field(None, ge=1)  # of one process; None: 4, unless documents are packed
    pack_tokens: int | None = Field(None, ge=1)  # documents go into one row of so many tokens at most, without padding
    gradient_accumulation: int = Field(1, ge=1)  # batches of one step
    gradient_checkpointing: bool = False  # less memory, a third more time
    evaluations_per_pass: int = Field(2, ge=1)  # on the development split, each with a checkpoint
    patience: int | None = Field(None, ge=1)  # end after so many evaluations without a better one
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)
    # bf16: autocast, with weights in float32; auto: the faster of the two on the machine where the run began.
    precision: Literal["auto", "bf16", "float32"] = "auto"
    lora_rank: int | None = Field(None, ge=1)  # train adapters of this rank, then merge them; None: all weights
    lora_alpha: Positive | None = None  # adapters count alpha / rank times; None: twice the rank
    lora_dropout: float | None = Field(None, ge=0, lt=1)  # None: 0
    lora_modules: list[str] | None = Field(None, min_length=1)  # None: all linear layers but the output layer
    quantize: Literal["nf4"] | None = None  # keep the target's weights in 4 bits beside the adapters (QLoRA)
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"])  # who hears of every term of the loss

    @model_validator(mode="after")
    def _check(self) -> "Train":
        """No option may do nothing."""
        unused = {
            "jsd_beta": self.divergence != "jsd" and "divergence is not jsd",
            "batch_documents": self.pack_tokens is not None and "pack_tokens says what a batch is",
            "lora_alpha": self.lora_rank is None and "lora_rank is not set",
            "lora_dropout": self.lora_rank is None and "lora_rank is not set",
            "lora_modules": self.lora_rank is None and "lora_rank is not set",
            "quantize": self.lora_rank is None and "lora_rank is not set",
        }
        for name, why in unused.items():
            if why and getattr(self, name) is not None:
                raise ValueError(f"train.{name}: does nothing here, for {why}; drop one or set the other")
        for where, of in (("train", self.of("fused")), ("train.clm", self.of("clm"))):
            if of.average >= of.passes:
                raise ValueError(f"{where}.average: must be below passes, {of.passes} (got {of.average:g})")
        if self.divergence == "reverse_kl" and self.tail == "renormalise":
            raise ValueError(
                "train.tail: renormalise gives ids that are not kept nothing, so reverse_kl is infinite; take bucket"
            )
        return self

    def of(self, method: str) -> "Train":
        """Return the options of one method, with nothing left to be worked out."""
        its_own = self.clm.model_dump(exclude_none=True) if method == "clm" else {}
        of = self.model_copy(update={**its_own, "clm": Baseline()})
        return of if of.average is not None else of.model_copy(update={"average": min(1.0, of.passes / 2)})

    @property
    def learning_rates(self) -> list[float]:
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
