"""llama.cpp in a process of its own: `python -m edgedistill.runtime_child`, started by runtime.py.

How it is asked and answers: answering.py.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from edgedistill.answering import Refused, answer_requests, holds_any, peak_memory_bytes
from edgedistill.importance import Importance, read_importance

BATCH = 512  # prompt tokens a call of llama_decode (llama.cpp's n_batch and n_ubatch)
OUTPUTS = 64  # logit rows a call: 64 x 152k x 4 B is 39 MB, BATCH of them would be 311 MB
QUANTIZE_BUFFER = 256 << 20  # bytes of tensor rows in memory at once; llama.cpp's default is 8 GiB
MAX_TEXT = 127  # bytes of an overriding key's text
LOG_DEBUG, LOG_CONTINUED = 1, 5  # ggml_log_level


class Native:
    """One loaded model with one context."""

    def __init__(
        self, path: str, threads: int, context_tokens: int, adapter: str | None = None
    ) -> None:
        started = time.perf_counter()
        options = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(os.fsencode(path), options)
        if not self.model:
            raise Refused("llama.cpp cannot load this file")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        # Before the context: it counts the graph's nodes by the adapters the model has.
        lora = None if adapter is None else self._adapter(adapter)
        self.context = lib.llama_init_from_model(self.model, _context(threads, context_tokens))
        if not self.context:
            raise Refused(f"llama.cpp cannot make a context of {context_tokens} tokens")
        if lora is not None:
            self._apply(lora)
        self.n_ctx = int(lib.llama_n_ctx(self.context))
        self.memory = lib.llama_get_memory(self.context)
        self.held: list[int] = []  # what the cache begins with, where `logits` filled it
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.load_seconds = time.perf_counter() - started

    def _adapter(self, path: str) -> Any:
        lora = lib.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not lora:
            raise Refused(f"llama.cpp cannot use the adapter {Path(path).name} with this model")
        return lora

    def _apply(self, lora: Any) -> None:
        adapters, scales = (lib.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
        if lib.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise Refused("llama.cpp cannot apply the adapter")

    def facts(self) -> dict[str, Any]:
        text = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.model, text, len(text))
        vocab = self.vocab
        return {
            "n_vocab": self.n_vocab,
            "n_ctx": self.n_ctx,
            "description": text.value.decode("utf-8", "replace"),
            "size": int(lib.llama_model_size(self.model)),
            "parameters": int(lib.llama_model_n_params(self.model)),
            "threads": int(lib.llama_n_threads(self.context)),
            "load_seconds": self.load_seconds,
            "bos": int(lib.llama_vocab_bos(vocab)),
            "eos": int(lib.llama_vocab_eos(vocab)),
            "add_bos": bool(lib.llama_vocab_get_add_bos(vocab)),
            "add_eos": bool(lib.llama_vocab_get_add_eos(vocab)),
            "kernels": lib.llama_print_system_info().decode(),
        }

    def end_ids(self) -> list[int]:
        """Every token that ends a generation in llama.cpp's own programs."""
        return [i for i in range(self.n_vocab) if lib.llama_vocab_is_eog(self.vocab, i)]

    def metadata(self) -> dict[str, str]:
        found = {}
        for i in range(lib.llama_model_meta_count(self.model)):
            key = _text(lib.llama_model_meta_key_by_index, self.model, i)
            found[key] = _text(lib.llama_model_meta_val_str_by_index, self.model, i)
        return found

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 8  # no tokenizer makes more tokens than bytes, bar a few specials
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(self.vocab, data, len(data), ids, room, False, True)
        if count < 0:
            raise Refused(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        return list(ids[:count])

    def detokenize(self, ids: list[int]) -> str:
        self._known(ids)
        given = (lib.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 64
        text = ctypes.create_string_buffer(room)
        count = lib.llama_detokenize(self.vocab, given, len(ids), text, room, False, True)
        if count < 0:
            text = ctypes.create_string_buffer(-count)
            count = lib.llama_detokenize(self.vocab, given, len(ids), text, -count, False, True)
        return text.raw[:count].decode("utf-8", "replace")

    def generate(
        self, ids: list[int], max_tokens: int, stop_ids: list[int], stop_texts: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Greedy: the most likely token each time, no penalties. Times in seconds."""
        self._fits(len(ids) + max_tokens)
        self._known(ids)
        stop, made, ticks = frozenset(stop_ids), list[int](), list[float]()
        started = time.perf_counter()
        self._clear()
        self._prefill(ids, len(ids) - 1)
        token = int(self._row().argmax())
        first = time.perf_counter()
        while token not in stop:
            made.append(token)
            if len(made) >= max_tokens or holds_any(self.detokenize, made, stop_texts):
                break
            self._step(token, len(ids) + len(made) - 1)
            token = int(self._row().argmax())
            ticks.append(time.perf_counter())
        ended = time.perf_counter()
        return {
            "ids": made,
            "text": self.detokenize(made) if made else "",
            "stopped": token in stop,
            "time_to_first_token": first - started,
            "total_seconds": ended - started,
            "decode_seconds": ended - first,
            "token_seconds": [late - early for early, late in itertools.pairwise([first, *ticks])],
        }

    def logits(self, ids: list[int], first: int, into: str) -> list[int]:
        """Append rows [len(ids)-first, n_vocab]: row j predicts ids[first+j]. The most likely token
        of each row."""
        self._fits(len(ids))
        self._known(ids)
        if not 0 < first < len(ids):
            raise Refused(f"cannot give logits from position {first} of {len(ids)} tokens")
        self._hold(ids[: first - 1])
        likely = []
        with Path(into).open("ab") as stream:
            for start in range(first - 1, len(ids) - 1, OUTPUTS):
                chunk = ids[start : min(start + OUTPUTS, len(ids) - 1)]
                self._decode(chunk, start, range(len(chunk)))
                for j in range(len(chunk)):
                    row = self._row(j)
                    stream.write(row.tobytes())
                    likely.append(int(row.argmax()))
        return likely

    def bench(self, pp: int, tg: int, runs: int, depth: int = 0) -> dict[str, list[float]]:
        """llama-bench's convention (tools/llama-bench): random tokens, an empty cache each run or
        one of `depth` tokens (its -d), one warm-up, neither tokenization nor sampling. Tokens a
        second of each run."""
        self._fits(depth + max(pp, tg))
        chance = random.Random(0)
        before = self._filled([chance.randrange(self.n_vocab) for _ in range(depth)])

        def prompt() -> None:
            ids = [chance.randrange(self.n_vocab) for _ in range(pp)]
            self._prefill(ids, pp - 1, depth)

        def decode() -> None:
            for position in range(depth, depth + tg):
                self._step(chance.randrange(self.n_vocab), position)
                lib.llama_synchronize(self.context)

        return {
            "pp": self._rates(prompt, pp, runs, before),
            "tg": self._rates(decode, tg, runs, before),
        }

    def _rates(self, work: Callable[[], None], tokens: int, runs: int, before: Any) -> list[float]:
        rates = []
        for _ in range(runs + 1 if tokens else 0):
            self._restore(before)
            started = time.perf_counter()
            work()
            lib.llama_synchronize(self.context)
            rates.append(tokens / (time.perf_counter() - started))
        return rates[1:]  # the first run warms up

    def _filled(self, ids: list[int]) -> Any:
        """The cache's state behind these tokens, to be restored: they are computed once, however
        many runs there are. None for no tokens."""
        if not ids:
            return None
        self._clear()
        self._prefill(ids, len(ids) - 1)
        size = lib.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self.context, state, size, 0) != size:
            raise Refused(f"llama.cpp cannot keep its state behind {len(ids)} tokens")
        return state

    def _restore(self, state: Any) -> None:
        self._clear()
        if state is not None and not lib.llama_state_seq_set_data(
            self.context, state, len(state), 0
        ):
            raise Refused("llama.cpp cannot take back the state that it gave")

    def _clear(self) -> None:
        lib.llama_memory_clear(self.memory, False)
        self.held = []

    def _hold(self, ids: list[int]) -> None:
        """Have exactly these tokens in the cache: the answers to one question share it. A cache
        that forgets (a window, a state) is filled anew."""
        again = bool(ids) and ids == self.held and not lib.llama_model_n_swa(self.model)
        if not (again and lib.llama_memory_seq_rm(self.memory, 0, len(ids), -1)):
            self._clear()
            self._prefill(ids, len(ids))
        self.held = ids

    def _prefill(self, ids: list[int], wanted: int, behind: int = 0) -> None:
        """Decode `ids` from position `behind`; logits are computed for the one at `wanted` in `ids`
        alone."""
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            self._decode(chunk, behind + start, [wanted - start])

    def _decode(self, chunk: list[int], start: int, rows: Any) -> None:
        batch, wanted = self.batch, frozenset(rows)
        batch.n_tokens = len(chunk)
        for j, token in enumerate(chunk):
            batch.token[j] = token
            batch.pos[j] = start + j
            batch.n_seq_id[j] = 1
            batch.seq_id[j][0] = 0
            batch.logits[j] = j in wanted
        self._run()

    def _step(self, token: int, position: int) -> None:
        batch = self.batch
        batch.n_tokens = 1
        batch.token[0] = token
        batch.pos[0] = position
        batch.n_seq_id[0] = 1
        batch.seq_id[0][0] = 0
        batch.logits[0] = True
        self._run()

    def _run(self) -> None:
        code = lib.llama_decode(self.context, self.batch)
        if code != 0:
            raise Refused(f"llama_decode failed with code {code}")

    def _row(self, index: int = -1) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A view of one logit row; it holds until the next decode."""
        row = lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(row, shape=(self.n_vocab,))

    def _fits(self, tokens: int) -> None:
        if tokens > self.n_ctx:
            raise Refused(f"{tokens} tokens do not fit into the context of {self.n_ctx} tokens")

    def _known(self, ids: list[int]) -> None:
        if not ids:
            raise Refused("there are no tokens")
        if min(ids) < 0 or max(ids) >= self.n_vocab:
            raise Refused(f"a token ID is outside the vocabulary of {self.n_vocab} tokens")


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, data: Any) -> None:
    # Unbuffered: what was said last is there when the process aborts.
    if level not in (LOG_DEBUG, LOG_CONTINUED):
        os.write(2, text)


def _context(threads: int, context_tokens: int) -> Any:
    options = lib.llama_context_default_params()
    options.n_ctx = context_tokens
    options.n_batch = options.n_ubatch = BATCH
    options.n_outputs_max = OUTPUTS
    options.n_threads = options.n_threads_batch = threads
    return options


def _text(read: Callable[..., int], model: Any, index: int) -> str:
    size = read(model, index, ctypes.create_string_buffer(1), 1)
    text = ctypes.create_string_buffer(size + 1)
    read(model, index, text, size + 1)
    return text.value.decode("utf-8", "replace")


def quantize(
    source: str,
    destination: str,
    format: str,
    threads: int,
    importance: str | None,
    types: dict[str, int],
    pure: bool,
) -> None:
    """llama.cpp's quantization to the file type LLAMA_FTYPE_MOSTLY_<format>, or F32."""
    name = "ALL_F32" if format == "F32" else f"MOSTLY_{format}"
    number = getattr(lib, f"LLAMA_FTYPE_{name}", None)
    if number is None:
        raise Refused(f"llama.cpp has no format {format}")
    options = lib.llama_model_quantize_default_params()
    options.ftype = number
    options.nthread = threads
    options.max_buf_size = QUANTIZE_BUFFER
    options.pure = pure
    if types:
        options.tt_overrides = _overrides(types)
    if importance is not None:
        found = read_importance(Path(importance))
        # llama.cpp copies the values, and only within the call, so they are held until then.
        means = {name: found.mean(name) for name in found.sums}
        options.imatrix = _means(means)
        options.kv_overrides = _origin(Path(importance), found)
    code = lib.llama_model_quantize(
        os.fsencode(source), os.fsencode(destination), ctypes.byref(options)
    )
    if code != 0:
        raise Refused(f"llama_model_quantize to {format} failed with code {code}")


def _overrides(types: dict[str, int]) -> Any:
    row = lib.llama_model_tensor_override
    # The names are searched for as regular expressions, and the first that is found counts.
    rows = [row(f"^{re.escape(name)}$".encode(), number) for name, number in types.items()]
    return (row * (len(rows) + 1))(*rows, row(None, lib.GGML_TYPE_COUNT))


def _means(means: dict[str, Any]) -> Any:
    row, pointer = lib.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
    rows = [row(name.encode(), m.ctypes.data_as(pointer), m.size) for name, m in means.items()]
    return (row * (len(rows) + 1))(*rows, row(None, None, 0))


def _origin(file: Path, found: Importance) -> Any:
    """The keys that llama-quantize leaves in a file about its importance matrix."""
    texts = {"file": file.name, "dataset": found.datasets[0] if found.datasets else ""}
    numbers = {"entries_count": len(found.sums), "chunks_count": found.chunk_count}
    kept = {name: value for name, value in {**texts, **numbers}.items() if value}
    rows = (lib.llama_model_kv_override * (len(kept) + 1))()  # the last one has an empty key
    for row, (name, value) in zip(rows, kept.items(), strict=False):
        row.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, str):
            row.tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
            row.value.val_str = value.encode()[:MAX_TEXT].decode("utf-8", "ignore").encode()
        else:
            row.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
            row.value.val_i64 = value
    return rows


def _answer(native: list[Native], do: str, given: dict[str, Any]) -> Any:
    if do == "load":
        native.append(Native(**given))
        return native[0].facts()
    if do == "quantize":
        return quantize(**given)
    if do == "peak_memory_bytes":
        return peak_memory_bytes()
    return getattr(native[0], do)(**given)


def main() -> None:
    native: list[Native] = []

    def start() -> None:
        lib.llama_log_set(_log, ctypes.c_void_p(0))
        lib.llama_backend_init()

    answer_requests(lambda do, given: _answer(native, do, given), start)


if __name__ == "__main__":
    main()
