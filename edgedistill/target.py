"""A target: a device profile. Read from YAML, frozen, unknown fields refused.

Each field's description holds its unit; `sources` in the file says where its value comes from.
`edgedistill targets` prints both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from edgedistill import onnx_formats
from edgedistill.errors import ConfigError
from edgedistill.number_formats import FORMATS, MIXED_NAME
from edgedistill.recipe import Strict
from edgedistill.yamlfile import FieldError, load, parse

GGUF_FORMATS = (
    "F16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M "
    "Q3_K_S Q2_K"
).split()
WLLAMA_FILE_MB = 2147  # 2^31 bytes


def _is_gguf_format(name: str) -> bool:
    return name.removesuffix(":imatrix") in GGUF_FORMATS


_GGUF = (_is_gguf_format, " ".join(GGUF_FORMATS))
# Runtime: whether it takes a format, and those it takes in words.
TAKES: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "llama.cpp": _GGUF,
    "wllama": _GGUF,
    "onnxruntime-genai": (onnx_formats.is_format, onnx_formats.GRAMMAR),
}


def is_stock(name: str) -> bool:
    """Whether a candidate of that name is a format of whole files, and not an allocation."""
    return any(takes(name) for takes, _ in TAKES.values())


class Roofline(Strict):
    """What bounds decoding: tokens/s = efficiency x bandwidth / bytes read a token."""

    bandwidth_gb_s: float = Field(gt=0, description="memory bandwidth, GB/s (1e9 bytes)")
    efficiency: float = Field(gt=0, le=1, description="share of it that decoding reaches")
    compute_gflops: float = Field(gt=0, description="usable compute for prefill, GFLOP/s")


class TargetGates(Strict):
    """Bounds on a quantized file. Agreement and KLD are against the exported file before it; a
    fitted file, which was trained on, is held to the NLL of the teacher's answers, not to KLD."""

    max_file_mb: float | None = Field(None, gt=0, description="largest model file, MB (1e6 bytes)")
    max_agreement_drop: float = Field(
        0.02, ge=0, le=1, description="largest loss of agreement with the teacher, as a share"
    )
    max_mean_kld: float | None = Field(
        None, gt=0, description="highest mean KLD, nats a token; not for fitted files"
    )
    max_p99_kld: float | None = Field(
        None, gt=0, description="highest 99th percentile KLD, nats; not for fitted files"
    )
    max_nll_rise: float | None = Field(
        0.05,
        ge=0,
        description="fitted files, instead of KLD: largest rise of the NLL of the teacher's text, "
        "nats a token",
    )
    min_tokens_per_second: float | None = Field(
        None,
        gt=0,
        description="slowest decode, tokens/s (tg128, or the median answer in a browser); only "
        "where it is measured",
    )


# From merged, the fitted figures of docs/few-bytes.md are at these (full 2e-5 and lora 2e-4 end
# alike there, without the KL term); no search chose them. From student the first answers are
# learnt, so they are higher.
RATES = {
    ("merged", "full"): 3e-5,
    ("merged", "lora"): 2e-4,
    ("student", "full"): 3e-4,
    ("student", "lora"): 4e-4,
}


BUDGETS = (
    "budget_mb", "budget_bits_per_weight", "budget_memory_mb", "budget_tokens_per_second",
)  # fmt: skip


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
    batch_size: int = Field(16, ge=1, description="rows a step")
    kl_weight: float = Field(
        1.0, ge=0, description="weight of KL(unquantized student || this one) beside the NLL"
    )
    perturbed_share: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="share of rows that are training prompts with altered words (KL alone, so none "
        "where kl_weight is 0)",
    )
    general_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of rows that are general text (KL alone, too)",
    )
    evaluations: int = Field(6, ge=1, description="validation agreement is measured this often")
    patience: int | None = Field(
        3, ge=1, description="so many evaluations without a better one end the fitting"
    )
    checkpoints: int = Field(2, ge=1, description="resumable checkpoints over the run")
    seed: int = Field(0, description="of the LoRA weights, the order of rows and the general text")

    @model_validator(mode="after")
    def _rows_are_left(self) -> FitSpec:
        if self.perturbed_share + self.general_share >= 1:
            said = "perturbed_share and general_share leave no row that the teacher answered"
            raise FieldError(said, "general_share")
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATES[self.start, self.method]


def _is_type(name: str) -> bool:
    return name in FORMATS or MIXED_NAME.fullmatch(name) is not None


def _unknown_types(names: Sequence[str]) -> str:
    """A format of whole files, such as Q4_K_M, is not a type of one matrix."""
    meant = {name: kind for name in names for kind in FORMATS if name.upper().startswith(kind)}
    hints = "".join(f" (did you mean {kind}?)" for kind in dict.fromkeys(meant.values()))
    return (
        f"unknown types {', '.join(names)}{hints}; known are {' '.join(FORMATS)}, and for ONNX "
        "int4-b<16|32|64|128> and int8-b<...>"
    )


class AllocationSpec(Strict):
    """One way to store the student: a number format for each matrix, chosen within a budget, and
    what is done so that little is lost in it. Each is made and measured like a stock format."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$",
        description="shown in the report and part of the file's name",
    )
    types: tuple[str, ...] = Field(
        min_length=1,
        description="number formats a matrix may get; one: every matrix gets it; not given: the "
        "target's kernels. For onnxruntime-genai int4-b<n> and int8-b<n>, with one n",
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
        True,
        description="quantize with the importance matrix of the token mix (GGUF types only)",
    )
    vocabulary: int | None = Field(
        None, ge=256, description="keep so many of the most common tokens, and the token mix's"
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
        named = self.named_types
        mixed = [name for name in named if MIXED_NAME.fullmatch(name)]
        if unknown := [name for name in named if not _is_type(name)]:
            raise FieldError(_unknown_types(unknown), "types")
        if mixed and (len(mixed) < len(named) or len({n.split("-")[1] for n in mixed}) > 1):
            raise FieldError("ONNX types go with ONNX types of the same block alone", "types")
        self._one_budget()
        return self

    def _one_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(self.types) == 1 and given:
            raise FieldError("one type leaves nothing to choose, so it takes no budget", given[0])
        if len(given) > 1:
            raise FieldError(
                f"there are two budgets, {given[0]} and {given[1]}: leave one", given[1]
            )
        if len(self.types) > 1 and not given:
            raise FieldError(
                f"{len(self.types)} types need a budget to choose by: one of {', '.join(BUDGETS)}",
                "types",
            )


class Target(Strict):
    """A device profile."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]*$", description="the file's name; also the bundle's"
    )
    description: str = Field(description="the device in words")
    device_class: Literal["laptop", "desktop", "phone", "board", "browser"] = Field(
        description="kind of device"
    )
    runtime: Literal["llama.cpp", "wllama", "onnxruntime-genai"] = Field(
        description="what runs the model there"
    )
    formats: tuple[str, ...] = Field(
        min_length=1,
        description="candidate quantization types, with an importance matrix where the name ends "
        "in :imatrix; each is made and measured",
    )
    kernels: tuple[str, ...] = Field(
        (),
        description="number formats of single matrices that the runtime computes fast with there; "
        "allocations choose among them",
    )
    allocations: tuple[AllocationSpec, ...] = Field(
        (), description="candidates of our own beside them; the smallest inside the gates wins"
    )
    latency: Literal["measured", "roofline", "browser"] = Field(
        description="measured: timed on the building machine; browser: timed in a browser on the "
        "building machine; roofline: estimated, never timed"
    )
    threads: int | None = Field(
        None, ge=1, description="threads; none: the physical cores of the machine that measures"
    )
    context_tokens: int = Field(1024, ge=64, description="context window to plan for, tokens")
    memory_budget_mb: float = Field(
        gt=0, description="memory for weights, KV cache and buffers, MB (1e6 bytes)"
    )
    roofline: Roofline | None = Field(None, description="figures for the estimate")
    gates: TargetGates = TargetGates()
    sources: dict[str, str] = Field(
        default_factory=dict, description="field: where its value comes from"
    )

    @model_validator(mode="before")
    @classmethod
    def _types_of_kernels(cls, given: Any) -> Any:
        """An allocation that names no types may take all that are fast."""
        if not isinstance(given, dict) or not given.get("kernels"):
            return given
        listed = given.get("allocations")
        if not isinstance(listed, (list, tuple)):
            return given
        filled = [
            {"types": given["kernels"], **each} if isinstance(each, dict) else each
            for each in listed
        ]
        return {**given, "allocations": filled}

    @field_validator("allocations", mode="before")
    @classmethod
    def _a_list(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            raise ValueError("must be a list: begin each allocation with `- name:`")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        takes, known = TAKES[self.runtime]
        if unknown := [name for name in self.formats if not takes(name)]:
            meant = [f for f in GGUF_FORMATS if f.startswith(f"{unknown[0].upper()}_")]
            hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
            said = f"unknown formats {', '.join(unknown)}{hint}; {self.runtime} takes {known}"
            raise FieldError(said, "formats")
        if unknown := [name for name in self.kernels if not _is_type(name)]:
            raise FieldError(_unknown_types(unknown), "kernels")
        names = [*self.formats, *(each.name for each in self.allocations)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            place = "allocations" if self.allocations else "formats"
            raise FieldError(f"two candidates are called {', '.join(twice)}", place)
        for at, each in enumerate(self.allocations):
            if is_stock(each.name):
                said = f"{each.name} is a format's name; choose another"
                raise FieldError(said, "allocations", at, "name")
            self._require_types(at, each)
        if self.latency == "roofline" and self.roofline is None:
            raise FieldError("latency: roofline needs the field roofline", "latency")
        if self.runtime == "wllama":
            self._in_a_browser()
        elif self.latency == "browser":
            raise FieldError("latency: browser needs runtime: wllama", "latency")
        return self

    def _require_types(self, at: int, spec: AllocationSpec) -> None:
        place = ("allocations", at, "types")
        if spec.onnx != (self.runtime == "onnxruntime-genai"):
            raise FieldError(f"{self.runtime} has no {spec.types[0]}", *place)
        if self.kernels and (slow := sorted({*spec.named_types} - {*self.kernels})):
            raise FieldError(
                f"no fast kernels for {', '.join(slow)} (this target's kernels: "
                f"{', '.join(self.kernels)})",
                *place,
            )
        if spec.budget_tokens_per_second and self.roofline is None:
            said = "needs the target's field roofline, which the rate is reckoned by"
            raise FieldError(said, "allocations", at, "budget_tokens_per_second")

    def _in_a_browser(self) -> None:
        if self.latency == "measured":
            said = "latency: measured times llama.cpp itself; for wllama write browser"
            raise FieldError(said, "latency")
        most = self.gates.max_file_mb
        if most is None or most > WLLAMA_FILE_MB:
            raise FieldError(
                "runtime: wllama needs gates.max_file_mb, what a visitor may have to download, of "
                f"at most {WLLAMA_FILE_MB} (wllama reads no larger file)",
                "gates",
            )


def load_target(path: Path, shown: str | None = None) -> Target:
    """Read one target file.

    Raises:
        ConfigError: every problem in the file.
    """
    target, problems = parse(Target, load(path, shown))
    if target is None:
        raise ConfigError(problems)
    return target
