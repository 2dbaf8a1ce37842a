"""A target: a device profile. Read from YAML, frozen, unknown fields refused.

Each field's description holds its unit; `sources` in the file says where its value comes from.
`edgedistill targets` prints both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from edgedistill.errors import ConfigError
from edgedistill.recipe import Strict
from edgedistill.yamlfile import load, parse

GGUF_FORMATS = (
    "F16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M "
    "Q3_K_S Q2_K"
).split()


class Roofline(Strict):
    """What bounds decoding: tokens/s = efficiency x bandwidth / bytes read a token."""

    bandwidth_gb_s: float = Field(gt=0, description="memory bandwidth, GB/s (1e9 bytes)")
    efficiency: float = Field(gt=0, le=1, description="share of it that decoding reaches")
    compute_gflops: float = Field(gt=0, description="usable compute for prefill, GFLOP/s")


class TargetGates(Strict):
    """Bounds on a quantized file. Agreement and KLD are against the exported file before it."""

    max_file_mb: float | None = Field(None, gt=0, description="largest model file, MB (1e6 bytes)")
    max_agreement_drop: float = Field(
        0.02, ge=0, le=1, description="largest loss of agreement with the teacher, as a share"
    )
    max_mean_kld: float | None = Field(None, gt=0, description="highest mean KLD, nats a token")
    max_p99_kld: float | None = Field(None, gt=0, description="highest 99th percentile KLD, nats")
    min_tokens_per_second: float | None = Field(
        None, gt=0, description="slowest decode (tg128), tokens/s; only where it is measured"
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
    runtime: Literal["llama.cpp"] = Field(description="what runs the model there")
    formats: tuple[str, ...] = Field(
        min_length=1, description="candidate quantization types; each is made and measured"
    )
    latency: Literal["measured", "roofline"] = Field(
        description="measured: timed on the building machine; roofline: estimated, never timed"
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

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        unknown = [name for name in self.formats if name not in GGUF_FORMATS]
        if unknown:
            known = " ".join(GGUF_FORMATS)
            raise ValueError(f"unknown formats {', '.join(unknown)}; llama.cpp takes {known}")
        if self.latency == "roofline" and self.roofline is None:
            raise ValueError("latency: roofline needs the field roofline")
        return self


def load_target(path: Path, shown: str | None = None) -> Target:
    """Read one target file.

    Raises:
        ConfigError: every problem in the file.
    """
    target, problems = parse(Target, load(path, shown))
    if target is None:
        raise ConfigError(problems)
    return target
