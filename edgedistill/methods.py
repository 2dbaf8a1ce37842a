"""How the student learns: the part `distill` of a recipe. Each method names its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from edgedistill.strict import SEEDS, Strict
from edgedistill.yamlfile import FieldError

# What says how a run is watched or fitted into memory, not what is learnt.
SILENT = {"report_to", "gradient_checkpointing", "compile", "processes", "shard"}
METHODS = {"method", "logits", "proxy", "on_policy"}


class LoraSpec(Strict):
    """LoRA on all linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(32, ge=1, le=512, description="rank of the update")
    alpha: float = Field(
        64, gt=0, description="the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the update left out at random")


class LogitsSpec(Strict):
    """The teacher's own probabilities, where its API gives them (teacher.sampling.top_logprobs):
    KL divergence over its likeliest tokens and one bucket for all others, beside the likelihood of
    its text (Anshumann et al. 2025, arXiv 2503.16870)."""

    kl_weight: float = Field(1.0, gt=0, description="weight of the KL divergence beside the NLL")
    min_coverage: float = Field(
        0.5,
        ge=0,
        le=1,
        description="lowest share of the answers' tokens with probabilities that fit the student's "
        "tokens; below it the build ends",
    )


class ProxySpec(Strict):
    """Proxy-KD (Chen et al. 2024, arXiv 2401.07013): a white-box model between teacher and student
    is aligned to the teacher, and the student learns its probabilities, too."""

    weights: str = Field(description="as student.weights; larger than the student's")
    prompt: Literal["student", "teacher"] = Field(
        "student",
        description="how it is asked: as the student is, or with the teacher's system prompt, "
        "which a proxy that is not trained needs (warm_up_epochs: 0, rounds: 0)",
    )
    warm_up_epochs: float = Field(2, ge=0, description="passes over the teacher's text first")
    rounds: int = Field(
        1,
        ge=0,
        le=10,
        description="most alignment rounds: NLL and DPO, the teacher's answer against the proxy's "
        "own; the first that does not raise its agreement is the last, and not kept",
    )
    round_epochs: float = Field(1, gt=0, description="passes over the rows in a round")
    learning_rate: float = Field(2e-4, gt=0, description="highest one of the warm-up")
    round_learning_rate: float = Field(5e-5, gt=0, description="highest one of a round")
    batch_size: int = Field(8, ge=1, description="rows a step")
    beta: float = Field(0.1, gt=0, description="of DPO: how far the proxy may leave its last round")
    tuning: Literal["lora", "qlora"] = Field("lora", description="as distill.tuning")
    lora: LoraSpec = LoraSpec()
    seed: int = Field(
        0, ge=0, lt=SEEDS, description="its own, so that one proxy serves students of many seeds"
    )
    min_agreement: float = Field(
        0.7,
        ge=0,
        le=1,
        description="lowest agreement of the proxy with the teacher on validation prompts; below "
        "it the build ends, since an unaligned proxy is worse than none",
    )
    top_k: int = Field(10, ge=1, le=1024, description="of its probabilities, so many are kept")
    prompts: Path | None = Field(
        None,
        description="further prompts, a file as the recipe's, that the teacher is never asked: the "
        "aligned proxy answers them, and the student learns these answers, too (pseudo-labels: "
        "Xie et al. 2020, arXiv 1911.04252)",
    )
    keep: float = Field(
        0.8,
        gt=0,
        le=1,
        description="share of its valid answers to these that is learnt: those it finds likeliest",
    )
    kl_weight: float = Field(
        1.0, gt=0, description="weight of the KL divergence beside the NLL (the paper's alpha)"
    )
    min_coverage: float = Field(
        0.5, ge=0, le=1, description="as distill.logits.min_coverage, with the proxy's tokens"
    )

    @model_validator(mode="after")
    def _answers_as_the_student(self) -> ProxySpec:
        if self.prompts is not None and self.prompt == "teacher":
            raise FieldError(
                "prompts are answered by a proxy that is asked as the student is: leave prompt out",
                "prompt",
            )
        return self


class OnPolicySpec(Strict):
    """After a start, rounds in which the student answers training prompts itself and learns from
    where it disagrees with the teacher."""

    start: Literal["sft", "logits", "proxy"] = Field("sft", description="the method before it")
    feedback: Literal["check", "judge", "preferred"] = Field(
        "check",
        description="what the check finds right is right; of the rest, check: all is wrong, no "
        "calls; judge: the teacher compares it with its own answer, in both orders (2 calls a "
        "prompt), and it is wrong where that loses both; preferred: the teacher answers anew, "
        "having seen it (1 call a prompt)",
    )
    learn: Literal["dpo", "rejection"] = Field(
        "dpo",
        description="dpo: where they disagree, the better answer against the worse (Rafailov et "
        "al. 2023, arXiv 2305.18290); rejection: the student's right answers as text to learn, "
        "and the teacher's where none is (Yuan et al. 2023, arXiv 2308.01825)",
    )
    rounds: int = Field(
        3, ge=1, le=20, description="most rounds; fewer when validation agreement stops rising"
    )
    samples: int = Field(4, ge=1, le=64, description="answers of the student to a prompt")
    temperature: float = Field(0.8, gt=0, le=2, description="of the student's answers")
    max_calls: int = Field(
        500, ge=0, description="most teacher calls over all rounds, kept answers counted, too"
    )
    epochs: float = Field(1, gt=0, description="passes over a round's rows")
    learning_rate: float = Field(5e-5, gt=0, description="highest one of a round")
    beta: float = Field(0.1, gt=0, description="of DPO: how far a round may leave the last one")

    @model_validator(mode="after")
    def _may_call(self) -> OnPolicySpec:
        if self.feedback != "check" and self.max_calls == 0:
            raise FieldError(
                f"feedback {self.feedback} asks the teacher; allow calls, or take feedback: check",
                "max_calls",
            )
        return self


class DistillSpec(Strict):
    """How the student learns."""

    method: Literal["sft", "logits", "proxy", "on-policy"] = Field(
        "sft",
        description="sft: likelihood of the teacher's text (SeqKD: Kim and Rush 2016, arXiv "
        "1606.07947); logits: also its probabilities; proxy: also an aligned proxy's; on-policy: "
        "then from its own mistakes",
    )
    logits: LogitsSpec = LogitsSpec()
    proxy: ProxySpec | None = Field(None, description="the proxy, for method proxy")
    on_policy: OnPolicySpec = OnPolicySpec()
    tuning: Literal["lora", "dora", "rslora", "qlora", "full"] = Field(
        "lora",
        description="what is trained: lora, an update of low rank; dora, with magnitudes of its "
        "own (Liu et al. 2024, arXiv 2402.09353); rslora, scaled for high ranks (Kalajdzievski "
        "2023, arXiv 2312.03732); qlora, over 4-bit weights (Dettmers et al. 2023, arXiv "
        "2305.14314), for GPUs that the weights would fill; full, every weight",
    )
    lora: LoraSpec = LoraSpec()
    learning_rate: float = Field(4e-4, gt=0, description="highest one; it falls to 0 linearly")
    epochs: float = Field(3, gt=0, description="passes over the training rows")
    batch_size: int = Field(16, ge=1, description="rows a step, over all processes")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of steps with a rising rate")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_length: int = Field(512, ge=16, description="longest row, in tokens; longer is an error")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="in which is trained, fitting included; auto: the faster one on this machine, "
        "measured once",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute activations twice instead of keeping them; auto: by need"
    )
    compile: bool = Field(
        False,
        description="compile the MLP of each layer (torch.compile): some time before the first "
        "step, then faster on some machines; needs a C++ compiler, on a GPU Triton",
    )
    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="on one machine, each with a GPU of its own or a share of the cores, started "
        "by torchrun; --processes overrides it",
    )
    shard: bool = Field(
        False,
        description="of several processes each holds a share of the frozen weights instead of all "
        "(FSDP: Zhao et al. 2023, arXiv 2304.11277), for students that would fill a GPU; with "
        "lora, dora or rslora",
    )
    evaluations: int = Field(3, ge=1, description="validation agreement is measured this often")
    samples: int = Field(4, ge=0, description="validation answers kept from each evaluation")
    checkpoints: int = Field(6, ge=1, description="resumable checkpoints over the run")
    seed: int = Field(
        0, ge=0, lt=SEEDS, description="of the fresh LoRA weights and the order of rows"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="experiment trackers that are told of every step; they must be installed"
    )

    @model_validator(mode="after")
    def _has_proxy(self) -> DistillSpec:
        if self.proxy is None and self.begins_with == "proxy":
            field = ("method",) if self.method == "proxy" else ("on_policy", "start")
            raise FieldError("proxy needs distill.proxy with the proxy's weights", *field)
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> DistillSpec:
        if self.shard and self.tuning in ("full", "qlora"):
            raise FieldError(
                f"is of frozen 16- or 32-bit weights, and distill.tuning is {self.tuning}; take "
                "lora, dora or rslora, or leave shard out",
                "shard",
            )
        if self.shard and self.proxy and self.proxy.tuning == "qlora":
            raise FieldError(
                "holds for the proxy, too, and distill.proxy.tuning is qlora, whose 4-bit weights "
                "are not shared out; take lora there, or leave shard out",
                "shard",
            )
        if self.shard and self.compile:
            raise FieldError("does not go with compile; leave one of them out", "shard")
        return self

    @property
    def begins_with(self) -> Literal["sft", "logits", "proxy"]:
        """The method that makes the first adapter."""
        return self.on_policy.start if self.method == "on-policy" else self.method

    @property
    def kl_weight(self) -> float | None:
        """Weight of the KL divergence in the first adapter's loss; None where there is none."""
        if self.begins_with == "logits":
            return self.logits.kl_weight
        return self.proxy.kl_weight if self.proxy and self.begins_with == "proxy" else None

    def shaping(self) -> dict[str, Any]:
        """What shapes the first adapter, as JSON: an identity's part. Targets have their own."""
        made = self.model_dump(mode="json", exclude=SILENT | METHODS) | {"method": self.begins_with}
        return made if self.kl_weight is None else {**made, "kl_weight": self.kl_weight}
