"""An allocation of a target: number formats for each matrix, and what is done so that little is
lost in them. `target.py` has the file that it stands in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from edgedistill.number_formats import FORMATS, MIXED_NAME
from edgedistill.strict import SEEDS, Strict
from edgedistill.yamlfile import FieldError, refuse

# From merged, full: better than 1e-5 and 1e-4 in a short course, and what the fitted figures of
# docs/few-bytes.md are at; lora at 2e-4 ended like full at 2e-5 there, without the KL term. From
# student the first answers are learnt, so they are higher; no search chose them.
RATES = {
    ("merged", "full"): 3e-5,
    ("merged", "lora"): 2e-4,
    ("student", "full"): 3e-4,
    ("student", "lora"): 4e-4,
}


STEPS = 200

BUDGETS = (
    "budget_mb", "budget_bits_per_weight", "budget_memory_mb", "budget_tokens_per_second",
)  # fmt: skip


ONNX_TYPES = "int4-b<16|32|64|128> and int8-b<...>"


class FitSpec(Strict):
    """Quantization-aware fitting: the merged student is trained on while it computes with the
    values that its number formats can hold; gradients pass straight through the rounding."""

    start: Literal["merged", "student"] = Field(
        "merged",
        description="merged: from the distilled student; student: from the base student, which is "
        "then distilled in these formats from its first step on (a higher learning_rate, more "
        "epochs)",
    )
    method: Literal["full", "lora"] = Field(
        "full", description="what is trained: every matrix, or a LoRA update of it"
    )
    rank: int = Field(32, ge=1, le=512, description="lora: rank of the update")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="highest one; it falls to 0 linearly. None: 3e-5 for full, 2e-4 for lora, and "
        "ten times and twice that with start: student",
    )
    epochs: float = Field(2.5, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="no more steps than this, however many rows there are. None: 200, and with "
        "start: student as many as the epochs have. Assumption: half an hour for 135M on two "
        "cores; 108 and 145 were measured to be enough",
    )
    batch_size: int = Field(16, ge=1, description="rows a step")
    kl_weight: float = Field(
        1.0, ge=0, description="weight of KL(unquantized student || this one) beside the NLL"
    )
    hidden_weight: float = Field(
        60.0,
        ge=0,
        description="weight of the hidden states' squared error beside the NLL: as a share of the "
        "unquantized student's square, the mean over layers (only the last one with drop_layers)",
    )
    min_kld: float = Field(
        0.005,
        ge=0,
        description="nothing is trained where the quantized student is closer to the unquantized "
        "one than this, by the KL divergence on altered validation prompts in nats a token: there "
        "is nothing to win back, and other text to lose. 0: train whatever it is, as with start: "
        "student and where both weights are 0. Assumption: fitting helped all students at "
        "0.025 and above, and harmed one at 0.002 (at 0.009 no step was better than the start)",
    )
    perturbed_share: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="share of rows that are training prompts with altered words, which are only "
        "compared with the unquantized student (none where both weights are 0)",
    )
    general_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of rows that are general text (only compared, too)",
    )
    evaluations: int = Field(6, ge=1, description="validation agreement is measured this often")
    patience: int | None = Field(
        3, ge=1, description="so many evaluations without a better one end the fitting"
    )
    checkpoints: int = Field(2, ge=1, description="resumable checkpoints over the run")
    seed: int = Field(
        0,
        ge=0,
        lt=SEEDS,
        description="of the LoRA weights, the order of rows, the altered and the general text",
    )

    @model_validator(mode="after")
    def _rows_are_left(self) -> FitSpec:
        if self.perturbed_share + self.general_share >= 1:
            said = "perturbed_share and general_share leave no row that the teacher answered"
            raise FieldError(said, "general_share")
        return self

    @property
    def compares(self) -> bool:
        """Whether being like the unquantized student is part of the loss."""
        return bool(self.kl_weight or self.hidden_weight)

    @property
    def steps(self) -> int | None:
        """The most steps; None: no bound but the epochs."""
        return STEPS if self.max_steps is None and self.start == "merged" else self.max_steps

    @property
    def may_stay(self) -> bool:
        """Whether the start may be near enough, so that nothing is trained."""
        return self.start == "merged" and self.min_kld > 0 and self.compares

    def resolved(self) -> dict[str, Any]:
        """All fields as plain JSON, with the rate and the steps that hold."""
        held = {"learning_rate": self.rate, "max_steps": self.steps}
        return {**self.model_dump(mode="json"), **held}

    def least_bytes(self, weights: int, *, trained: bool) -> int:
        """Memory that fitting so many weights takes at least, in fp32: the latent ones, those that
        compute, and the student that they are compared with; for training all of them their
        gradients and Adam's two moments, too."""
        return weights * (24 if trained and self.method == "full" else 12)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATES[self.start, self.method]


def is_type(name: str) -> bool:
    """Whether one matrix can have this number format somewhere."""
    return name in FORMATS or MIXED_NAME.fullmatch(name) is not None


def unknown_types(names: Sequence[str]) -> str:
    """What to say of names that are none. A format of whole files, such as Q4_K_M, is not a type
    of one matrix."""
    meant = {name: kind for name in names for kind in FORMATS if name.upper().startswith(kind)}
    hints = "".join(f" (did you mean {kind}?)" for kind in dict.fromkeys(meant.values()))
    return (
        f"unknown types {', '.join(names)}{hints}; known are {' '.join(FORMATS)}, and for ONNX "
        f"{ONNX_TYPES}"
    )


class AllocationSpec(Strict):
    """One way to store the student: a number format for each matrix, chosen within a budget, and
    what is done so that little is lost in it. Each is made and measured like a stock format."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$",
        description="shown in the report and part of the file's name: letters, digits and _",
    )
    types: tuple[str, ...] = Field(
        min_length=1,
        description="number formats a matrix may get; one: every matrix gets it; not given: the "
        "target's `kernels`, and required where that field is empty. For onnxruntime-genai "
        "int4-b<n> and int8-b<n>, with one n",
    )
    embedding: str | None = Field(
        None, description="format of the token embedding (and a tied head); none: one of types"
    )
    budget_mb: float | None = Field(
        None, gt=0, description="largest file to plan for, MB (1e6 bytes); the smallest loss wins"
    )
    budget_bits_per_weight: float | None = Field(
        None,
        gt=0,
        description="instead: size of the file for each weight of the (trimmed) student, in bits",
    )
    budget_memory_mb: float | None = Field(
        None,
        gt=0,
        description="instead: memory while it runs (weights, KV cache, buffers), MB (1e6 bytes)",
    )
    budget_tokens_per_second: float | None = Field(
        None, gt=0, description="instead: decode rate to plan for, by the target's roofline"
    )
    importance: bool = Field(
        False,
        description="quantize with the importance matrix of the token mix (GGUF types only)",
    )
    vocabulary: int | None = Field(
        None,
        ge=0,
        description="keep so many of the most common tokens, and those of the training prompts and "
        "their answers",
    )
    drop_layers: int = Field(0, ge=0, description="leave out so many layers, the least missed")
    fit: FitSpec | None = Field(None, description="train the student for these formats")

    @property
    def onnx(self) -> bool:
        """Whether its types are those of an ONNX model."""
        return MIXED_NAME.fullmatch(self.types[0]) is not None

    @property
    def named_types(self) -> list[str]:
        """Those that its matrices may get, the embedding's last."""
        return [*self.types, *([self.embedding] if self.embedding else [])]

    @field_validator("fit", mode="before")
    @classmethod
    def _fit_is_a_mapping(cls, given: Any) -> Any:
        if given is None or isinstance(given, bool):
            raise ValueError("write `fit: {}` for the defaults, or leave the field out")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> AllocationSpec:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[FieldError]:
        for field, names in (
            ("types", self.types),
            ("embedding", self.named_types[len(self.types) :]),
        ):
            if unknown := [name for name in names if not is_type(name)]:
                yield FieldError(unknown_types(unknown), field)
        if twice := sorted({name for name in self.types if self.types.count(name) > 1}):
            yield FieldError(f"{', '.join(twice)} is given twice", "types")
        named = self.named_types
        mixed = [name for name in named if MIXED_NAME.fullmatch(name)]
        if mixed and (len(mixed) < len(named) or len({n.split("-")[1] for n in mixed}) > 1):
            said = "ONNX types go with ONNX types of the same block alone (where none are given, "
            yield FieldError(f"{said}all of the target's kernels are taken)", "types")
        if mixed and self.importance:
            said = "ONNX types have no search that an importance matrix could weigh; leave it out"
            yield FieldError(said, "importance")
        yield from self._about_budgets()

    def _about_budgets(self) -> Iterator[FieldError]:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(self.types) == 1 and given:
            yield FieldError("one type leaves nothing to choose, so it takes no budget", given[0])
        elif len(given) > 1:
            said = f"there are two budgets, {given[0]} and {given[1]}: leave one"
            yield FieldError(said, given[1])
        elif len(self.types) > 1 and not given:
            yield FieldError(
                f"{len(self.types)} types need a budget to choose by: one of {', '.join(BUDGETS)}",
                "types",
            )
