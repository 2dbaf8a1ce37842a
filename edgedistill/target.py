"""A target: a device profile. Read from YAML, frozen, unknown fields refused.

Each field's description holds its unit; `sources` in the file says where its value comes from.
`edgedistill targets` prints both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from edgedistill import onnx_formats
from edgedistill.allocations import ONNX_TYPES, AllocationSpec, FitSpec, is_type, unknown_types
from edgedistill.errors import ConfigError, did_you_mean
from edgedistill.number_formats import FORMATS
from edgedistill.strict import Strict
from edgedistill.yamlfile import FieldError, load, parse, refuse

GGUF_FORMATS = (
    "F16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M "
    "Q3_K_S Q2_K"
).split()
WLLAMA_FILE_MB = 2147  # 2^31 bytes


def _is_gguf_format(name: str) -> bool:
    plain, _, more = name.partition(":")
    return plain in GGUF_FORMATS and (name == plain or (more == "imatrix" and plain != "F16"))


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
        None,
        gt=0,
        description="highest mean KLD of quantizing, nats a token (docs/few-bytes.md: what it "
        "holds for in a fitted file)",
    )
    max_p99_kld: float | None = Field(
        None, gt=0, description="highest 99th percentile KLD, nats; for the same"
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
        types = given["kernels"]
        if isinstance(types, (list, tuple)):
            types = list(dict.fromkeys(map(str, types)))
        filled = [{"types": types, **each} if isinstance(each, dict) else each for each in listed]
        return {**given, "allocations": filled}

    @field_validator("allocations", mode="before")
    @classmethod
    def _a_list(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            raise ValueError("must be a list: begin each allocation with `- name:`")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[FieldError]:
        yield from self._about_formats()
        for at, each in enumerate(self.allocations):
            if is_stock(each.name) or each.name == onnx_formats.UNQUANTIZED:
                said = f"{each.name} is a format's name; choose another"
                yield FieldError(said, "allocations", at, "name")
        names = [*self.formats, *(each.name for each in self.allocations)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            place = "allocations" if self.allocations else "formats"
            yield FieldError(f"two candidates are called {', '.join(twice)}", place)
        for at, each in enumerate(self.allocations):
            yield from self._about_types(at, each)
            yield from self._about_budget(at, each)
        yield from self._about_sources()
        yield from self._about_latency()

    def _about_formats(self) -> Iterator[FieldError]:
        takes, known = TAKES[self.runtime]
        if unknown := [name for name in self.formats if not takes(name)]:
            written, _, more = unknown[0].upper().partition(":")
            near = [f for f in GGUF_FORMATS if f == written or f.startswith(f"{written}_")]
            meant = [f"{f}:imatrix" if more and f != "F16" else f for f in near]
            meant = [name for name in meant if takes(name)]
            hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
            said = f"unknown formats {', '.join(unknown)}{hint}; {self.runtime} takes {known}"
            yield FieldError(said, "formats")
        if unknown := [name for name in self.kernels if not is_type(name)]:
            yield FieldError(unknown_types(unknown), "kernels")

    def _about_latency(self) -> Iterator[FieldError]:
        if self.latency == "roofline" and self.roofline is None:
            yield FieldError("latency: roofline needs the field roofline", "latency")
        if self.runtime == "wllama":
            yield from self._in_a_browser()
        elif self.latency == "browser":
            yield FieldError("latency: browser needs runtime: wllama", "latency")
        elif self.device_class == "phone" and self.latency == "measured":
            said = "a phone is not the machine that builds: nothing is timed there; write roofline"
            yield FieldError(said, "latency")

    def _about_sources(self) -> Iterator[FieldError]:
        """A source is of a field: what a typing error names would look proven, and not be."""
        within: dict[str, type[Strict]] = {"gates": TargetGates, "roofline": Roofline}
        for each in self.allocations:
            within[f"allocations.{each.name}"] = AllocationSpec
            within[f"allocations.{each.name}.fit"] = FitSpec
        known = {*Target.model_fields} - {"sources"} | {
            f"{name}.{field}" for name, model in within.items() for field in model.model_fields
        }
        for name in self.sources:
            if name not in known:
                hint = did_you_mean(name, sorted(known))
                said = f"there is no field {name}" + (f" ({hint})" if hint else "")
                yield FieldError(said, "sources", name)

    def _about_types(self, at: int, spec: AllocationSpec) -> Iterator[FieldError]:
        place = ("allocations", at)
        if spec.onnx != (self.runtime == "onnxruntime-genai"):
            known = ONNX_TYPES if self.runtime == "onnxruntime-genai" else " ".join(FORMATS)
            said = f"{self.runtime} has no {spec.types[0]}; it has {known}"
            yield FieldError(said, *place, "types")
            return  # its kernels are those of the other runtime, too
        named = {"types": {*spec.types}, "embedding": {*spec.named_types} - {*spec.types}}
        for field, names in named.items():
            if slow := sorted(names - {*self.kernels}) if self.kernels else []:
                said = f"no fast kernels for {', '.join(slow)} (this target's kernels: "
                yield FieldError(f"{said}{', '.join(self.kernels)})", *place, field)
        if spec.budget_tokens_per_second and self.roofline is None:
            said = "needs the target's field roofline, which the rate is reckoned by"
            yield FieldError(said, *place, "budget_tokens_per_second")

    def _about_budget(self, at: int, spec: AllocationSpec) -> Iterator[FieldError]:
        """What is planned for must be allowed to ship."""
        for name, bound, limit in (
            ("budget_mb", self.gates.max_file_mb, "gates.max_file_mb"),
            ("budget_mb", self.memory_budget_mb, "memory_budget_mb"),
            ("budget_memory_mb", self.memory_budget_mb, "memory_budget_mb"),
        ):
            planned = getattr(spec, name)
            if planned is not None and bound is not None and planned > bound:
                said = f"{planned:g} is more than {limit} allows: {bound:g}"
                yield FieldError(said, "allocations", at, name)

    def _in_a_browser(self) -> Iterator[FieldError]:
        if self.latency == "measured":
            said = "latency: measured times llama.cpp itself; for wllama write browser"
            yield FieldError(said, "latency")
        most = self.gates.max_file_mb
        if most is None or most > WLLAMA_FILE_MB:
            yield FieldError(
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
