"""Boundary to torch: a Hugging Face causal model that answers greedily and gives its logits.

Used for the checkpoints a build trains and measures; what ships runs in `runtime.py`.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError, MissingTool
from edgedistill.machine import threads
from edgedistill.progress import SilentTask, Task

# Decoding reads all weights once a step, whatever the number of rows.
BATCH = 64
# Enough rows for a matrix product to keep a core busy; more only takes memory.
PART_TOKENS = 512
WORTH_SHARING = 64  # tokens that all prompts begin with
WHOLE = "model.safetensors"  # in an adapter's folder: every weight was trained
# peft imports it, and where a CPU has AVX512-BF16 it then asks for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class TorchModel:
    """A checkpoint folder, ready to evaluate: with an adapter folder on top or without, or
    with the weights of a quantized model that was made of it (`values`), dequantized.

    Raises:
        MissingTool: torch, transformers or peft is not installed.
        ArtifactError: the checkpoint or the adapter cannot be loaded.
    """

    def __init__(
        self, folder: Path, adapter: Path | None = None, values: Path | None = None
    ) -> None:
        whole = adapter is not None and (adapter / WHOLE).is_file()
        model = load_model(adapter if adapter is not None and whole else folder)
        if values is not None:
            _take_values(model, folder, values)
        if adapter is not None and not whole:
            model = _with_adapter(model, adapter)
        self._model = model.to(device()).eval()

    @classmethod
    def of(cls, model: Any) -> TorchModel:
        """A transformers model that is loaded already."""
        made = cls.__new__(cls)
        made._model = model.to(device()).eval()
        return made

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: frozenset[int],
        batch_size: int = BATCH,
        task: Task | None = None,
    ) -> list[list[int]]:
        """See `generate`."""
        return generate(self._model, prompts, max_tokens, stop_ids, batch_size, task)

    def logits(
        self, rows: Sequence[tuple[Sequence[int], int]]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """For each (ids, first) the rows [len(ids) - first, vocab] that predict ids[first:].

        `first` is at least 1. A few sequences go through the model at once, in the order given and
        padded on the right, where a causal model never looks.
        """
        for part in _parts(rows):
            yield from self._logits(part)

    def behind(self, cache: Any, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The rows [len(ids), vocab] that predict what follows each of `ids`, behind what `cache`
        holds (see `read_once`), which stays as it is. None: behind nothing."""
        import torch

        with torch.inference_mode():
            found = self._model(
                input_ids=torch.tensor([list(ids)], device=self._model.device),
                past_key_values=None if cache is None else repeated(cache, 1),
                use_cache=cache is not None,
            ).logits
        rows: npt.NDArray[np.float32] = found[0].float().cpu().numpy()
        return rows

    def read_once(self, ids: Sequence[int]) -> Any:
        """See `read_once`."""
        return read_once(self._model, ids)

    def _logits(
        self, rows: Sequence[tuple[Sequence[int], int]]
    ) -> Iterator[npt.NDArray[np.float32]]:
        import torch

        for ids, first in rows:
            if not 1 <= first < len(ids):
                raise ValueError(f"first must be in 1..{len(ids) - 1}, not {first}")
        start, longest = min(first for _, first in rows) - 1, max(len(ids) for ids, _ in rows) - 1
        given = torch.tensor([[*ids[:-1], *[0] * (longest - len(ids) + 1)] for ids, _ in rows])
        with torch.inference_mode():
            found = self._model(
                input_ids=given.to(self._model.device),
                use_cache=False,
                logits_to_keep=torch.arange(start, longest, device=self._model.device),
            ).logits
        for (ids, first), own in zip(rows, found, strict=True):
            wanted = own[first - 1 - start : len(ids) - 1 - start]
            yield wanted.float().cpu().numpy()


def _parts(rows: Sequence[tuple[Sequence[int], int]]) -> Iterator[list[tuple[Sequence[int], int]]]:
    """Consecutive rows in groups of at most PART_TOKENS tokens with padding, or of one row."""
    part: list[tuple[Sequence[int], int]] = []
    for row in rows:
        longest = max(len(ids) for ids, _ in [*part, row])
        if part and longest * (len(part) + 1) > PART_TOKENS:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def device() -> Any:
    """The CUDA device where there is one, else the CPU, with a thread for each physical core."""
    import torch

    if torch.cuda.is_available():
        # torch reads it at its first matrix product, and later refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return torch.device("cuda")
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's word for processes here
    torch.set_num_threads(max(1, threads() // together))
    return torch.device("cpu")


def deterministic(seed: int) -> None:
    """Seed this process, and have a GPU compute the same every time; a CPU does anyway.

    Not transformers' enable_full_determinism: that makes every kernel wait for the one before
    (CUDA_LAUNCH_BLOCKING), which CUDA has not needed since version 10.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    if device().type == "cuda":
        torch.use_deterministic_algorithms(True)
        # That would also write into memory that nobody reads, for debugging.
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """The causal model of a checkpoint folder, on the CPU; nothing is fetched, no code is run.

    Raises:
        MissingTool: torch or transformers is not installed.
        ArtifactError: the folder does not hold a loadable checkpoint.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as says
    except ImportError as error:
        raise _missing(error) from error
    says.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"this checkpoint cannot be loaded: {error}", where=str(folder)
        ) from error


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: frozenset[int],
    batch_size: int = BATCH,
    task: Task | None = None,
) -> list[list[int]]:
    """The greedy answer to each prompt, in the order given, without its stop token.

    Prompts of similar length share a batch. No penalties, no sampling. What all of them begin with,
    such as a long system prompt, goes through the model once.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    bar = task or SilentTask()
    answers: list[list[int]] = [[] for _ in prompts]
    begin = _sharing(model, prompts, max_tokens)
    cache = read_once(model, prompts[0][:begin]) if begin else None
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        made = _batch(model, [prompts[i] for i in chosen], max_tokens, stop_ids, begin, cache)
        for index, ids in zip(chosen, made, strict=True):
            answers[index] = ids
        bar.advance(len(chosen))
    return answers


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: frozenset[int],
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """An answer drawn at random to each prompt, all in one batch, without its stop token: from the
    model's whole distribution at `temperature`, and the same again for the same seed and batch."""
    import torch

    used = [model.device] if model.device.type == "cuda" else []
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=used):
        torch.manual_seed(seed)
        return _batch(model, list(prompts), max_tokens, stop_ids, drawn=drawn)


def _sharing(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """The tokens that all prompts share, where that changes no answer: padding behind them would
    take places in a sliding window."""
    window = getattr(model.config, "sliding_window", None)
    longest = max(map(len, prompts), default=0) + max_tokens
    return 0 if window and longest > window else shared_tokens(prompts)


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; 0 where that is too few to be worth it. Of each
    prompt one token at least is left."""
    if not prompts:
        return 0
    first, most = prompts[0], min(map(len, prompts)) - 1
    alike = (i for i in range(most) if any(prompt[i] != first[i] for prompt in prompts))
    begin = next(alike, most)
    return begin if len(prompts) > 1 and begin >= WORTH_SHARING else 0


def read_once(model: Any, ids: Sequence[int]) -> Any:
    """Keys and values of a beginning, for `repeated`."""
    import torch

    given = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        return model(input_ids=given, use_cache=True, logits_to_keep=1).past_key_values


def repeated(cache: Any, rows: int) -> Any:
    """A copy of keys and values for each of so many rows, since a model appends to what it gets."""
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    return own


def _batch(
    model: Any,
    prompts: list[Sequence[int]],
    max_tokens: int,
    stop_ids: frozenset[int],
    begin: int = 0,
    cache: Any = None,
    drawn: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """`cache`: of the first `begin` tokens, in which the prompts are alike. Padding is behind
    them."""
    import torch
    from transformers import GenerationConfig

    longest, pad = max(map(len, prompts)), min(stop_ids)
    gaps = [longest - len(prompt) for prompt in prompts]
    rows = [[*p[:begin], *[pad] * gap, *p[begin:]] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * begin + [0] * gap + [1] * (longest - begin - gap) for gap in gaps]
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        **(drawn or {"do_sample": False}),
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad,
        use_cache=True,
    )
    given = {} if cache is None else {"past_key_values": repeated(cache, len(prompts))}
    with torch.inference_mode():
        whole = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            **given,
        )
    return [_until_stop(row, stop_ids) for row in whole[:, longest:].tolist()]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def _with_adapter(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise _missing(error) from error
    try:
        return PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"this adapter cannot be loaded: {error}", where=str(adapter)
        ) from error


def _take_values(model: Any, folder: Path, file: Path) -> None:
    """Every matrix of the checkpoint as the quantized model holds it. The rest is fp32 in both."""
    import torch

    from edgedistill.quantized_values import read_matrices
    from edgedistill.tensors import read_layout

    layout, own = read_layout(folder), dict(model.named_parameters())
    held = read_matrices(file, layout)
    with torch.no_grad():
        for tensor in layout.tensors:
            if tensor.name in held:
                own[tensor.source].copy_(torch.from_numpy(held[tensor.name]()))


def _missing(error: ImportError) -> MissingTool:
    return MissingTool(
        f"the package {error.name} is not installed",
        hint='in the checkout: pip install -e ".[distill]"',
    )
