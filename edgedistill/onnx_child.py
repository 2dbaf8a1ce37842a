"""onnxruntime-genai in a process of its own: `python -m edgedistill.onnx_child`, started by
onnx_runtime.py. How it is asked and answers: answering.py.

Everything runs through genai's own Generator, which is what apps use. Token by token, as an app
decodes: kernels for one row and for many round differently (4-bit MatMulNBits with int8
activations: logits of the same text were more than 1 apart).
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

from edgedistill.answering import Refused, answer_requests, holds_any, peak_memory_bytes

BATCH = 512  # prompt tokens a call: genai keeps the logits of all of them
CONFIG, TOKENIZER_CONFIG = "genai_config.json", "tokenizer_config.json"
MODEL = "model.onnx"

Json = dict[str, Any]


class Native:
    """One loaded model folder with its tokenizer."""

    def __init__(self, path: str, threads: int, context_tokens: int) -> None:
        started = time.perf_counter()
        self.folder = Path(path)
        self.config: Json = _read(self.folder / CONFIG)
        self.tokens: Json = _read(self.folder / TOKENIZER_CONFIG)
        self.n_ctx = min(context_tokens, int(self.config["model"]["context_length"]))
        self.threads = threads
        config = genai.Config(path)
        config.overlay(json.dumps(_overlay(threads, self.n_ctx)))
        self.model = genai.Model(config)
        self.tokenizer = genai.Tokenizer(self.model)
        # Text goes in and comes out as it is: no BOS is added, no special token is hidden.
        self.tokenizer.update_options(add_special_tokens="false", skip_special_tokens="false")
        self.n_vocab = int(self.config["model"]["vocab_size"])
        # What `logits` was asked last: its prompt, that prompt's cache, and the row behind it.
        self.held: tuple[list[int], Any, Any] | None = None
        self.load_seconds = time.perf_counter() - started

    def facts(self) -> Json:
        model = self.config["model"]
        ends = self.end_ids()
        count, looked_up = parameters(self.folder / MODEL)
        return {
            "n_vocab": self.n_vocab,
            "n_ctx": self.n_ctx,
            "description": f"ONNX {model['type']} {self.folder.name}",
            "size": sum(file.stat().st_size for file in self.folder.glob(f"{MODEL}*")),
            "parameters": count,
            "lookup_parameters": looked_up,
            "threads": self.threads,
            "load_seconds": self.load_seconds,
            "bos": int(model.get("bos_token_id", -1)),
            "eos": ends[0],
            "add_bos": bool(self.tokens.get("add_bos_token", False)),
            "add_eos": bool(self.tokens.get("add_eos_token", False)),
        }

    def end_ids(self) -> list[int]:
        """Every token at which genai's own loop stops."""
        return [int(token) for token in self.tokenizer.eos_token_ids]

    def metadata(self) -> dict[str, str]:
        found = _flat(self.config)
        template = self.folder / "chat_template.jinja"
        if template.is_file():
            found["chat_template"] = template.read_bytes().decode()
        return found

    def tokenize(self, text: str) -> list[int]:
        try:
            return [int(token) for token in self.tokenizer.encode(text)] if text else []
        except (RuntimeError, IndexError) as error:
            raise Refused(f"onnxruntime-genai cannot tokenize {text[:40]!r}: {error}") from error

    def detokenize(self, ids: list[int]) -> str:
        self._known(ids)
        return str(self.tokenizer.decode(np.array(ids, np.int32)))

    def apply_chat_template(self, messages: list[Json], add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    json.dumps(messages), add_generation_prompt=add_generation_prompt
                )
            )
        except RuntimeError as error:
            raise Refused(f"onnxruntime-genai cannot render the chat template: {error}") from error

    def generate(
        self, ids: list[int], max_tokens: int, stop_ids: list[int], stop_texts: Sequence[str] = ()
    ) -> Json:
        """Greedy: the most likely token each time, no penalties. Times in seconds."""
        self._fits(len(ids) + max_tokens)
        self._known(ids)
        self.held = None  # a cache of the whole context: two would be twice the memory
        stop, made, ticks = frozenset(stop_ids), list[int](), list[float]()
        started = time.perf_counter()
        tokens = self._most_likely(ids, stop)
        token = next(tokens)
        first = time.perf_counter()
        while token not in stop:
            made.append(token)
            if len(made) >= max_tokens or holds_any(self.detokenize, made, stop_texts):
                break
            token = next(tokens)
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

    def _most_likely(self, ids: list[int], stop: frozenset[int]) -> Iterator[int]:
        """The token behind these, the one behind that, and so on."""
        generator = self._generator()
        _feed(generator, ids)
        row = self._row(generator)  # which is as wide as the vocabulary, or this is no sound model
        # genai's own step is 4 to 8 % faster than a token that is fed. It does not go past its end
        # tokens: where one of them is no end for the caller, tokens are fed.
        if stop.issuperset(self.end_ids()):
            while True:
                generator.generate_next_token()
                yield int(generator.get_next_tokens()[0])
        while True:
            token = int(row.argmax())
            yield token
            _feed(generator, [token])
            row = self._row(generator)

    def logits(self, ids: list[int], first: int, into: str) -> list[int]:
        """Append rows [len(ids)-first, n_vocab]: row j predicts ids[first+j]. The most likely token
        of each row."""
        self._fits(len(ids))
        self._known(ids)
        if not 0 < first < len(ids):
            raise Refused(f"cannot give logits from position {first} of {len(ids)} tokens")
        generator, row = self._behind(ids[:first])
        likely = []
        with Path(into).open("ab") as stream:
            for j in range(first, len(ids)):
                stream.write(row.tobytes())
                likely.append(int(row.argmax()))
                if j < len(ids) - 1:
                    _feed(generator, [ids[j]])
                    row = self._row(generator)
        return likely

    def _behind(self, ids: list[int]) -> tuple[Any, Any]:
        """The cache of exactly these tokens and the row behind it: the answers to one question
        share it. A cache that forgets (a window) is not gone back in."""
        if self.held is not None and self.held[0] == ids and not self._window:
            _, generator, row = self.held
            generator.rewind_to(len(ids))
            return generator, row
        self.held, generator = None, self._generator()
        _feed(generator, ids)
        self.held = (ids, generator, self._row(generator).copy())
        return generator, self.held[2]

    @property
    def _window(self) -> bool:
        return "sliding_window" in self.config["model"]["decoder"]

    def bench(self, pp: int, tg: int, runs: int, depth: int = 0) -> dict[str, list[float]]:
        """llama-bench's convention (llama.cpp, tools/llama-bench): random tokens, an empty cache
        each run or one of `depth` tokens (its -d), one warm-up, no tokenization. Decoding goes on
        from one of them by genai's own step, as an app does, which takes the most likely token.
        Tokens a second of each run."""
        self._fits(depth + max(pp, tg + 1 if tg else 0))  # one is fed, and so many are made
        self.held = None
        chance = random.Random(0)
        before = [chance.randrange(self.n_vocab) for _ in range(depth)]
        ids = [chance.randrange(self.n_vocab) for _ in range(max(pp, tg))]

        def prompt(generator: Any) -> None:
            _feed(generator, ids[:pp])

        def decode(generator: Any) -> None:
            _feed(generator, ids[:1])
            for _ in range(tg):  # the first of them only takes what is behind the token fed
                generator.generate_next_token()

        generator = self._generator(at_least=self.n_ctx)  # it does not end on the way
        _feed(generator, before)
        return {
            "pp": self._rates(generator, depth, prompt, pp, runs),
            "tg": self._rates(generator, depth, decode, tg, runs),
        }

    def _rates(
        self, generator: Any, depth: int, work: Callable[[Any], None], tokens: int, runs: int
    ) -> list[float]:
        rates = []
        for _ in range(runs + 1 if tokens else 0):
            if generator.token_count() > depth:
                generator.rewind_to(depth)
            started = time.perf_counter()
            work(generator)
            rates.append(tokens / (time.perf_counter() - started))
        return rates[1:]  # the first run warms up

    def _generator(self, at_least: int = 0) -> Any:
        """An empty cache of the whole context, as an app gets it; no end token is taken before so
        many tokens."""
        options = genai.GeneratorParams(self.model)
        options.set_search_options(
            max_length=self.n_ctx, min_length=at_least, do_sample=False, num_beams=1,
            repetition_penalty=1.0, no_repeat_ngram_size=0,
        )  # fmt: skip
        return genai.Generator(self.model, options)

    def _row(self, generator: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The last row of logits, float32 [n_vocab]."""
        found = np.asarray(generator.get_logits(), np.float32).reshape(-1)
        if len(found) != self.n_vocab:
            raise Refused(f"the model gives {len(found)} logits for {self.n_vocab} tokens")
        return found

    def _fits(self, tokens: int) -> None:
        if tokens > self.n_ctx:
            raise Refused(f"{tokens} tokens do not fit into the context of {self.n_ctx} tokens")

    def _known(self, ids: list[int]) -> None:
        if not ids:
            raise Refused("there are no tokens")
        if min(ids) < 0 or max(ids) >= self.n_vocab:
            raise Refused(f"a token ID is outside the vocabulary of {self.n_vocab} tokens")


def _feed(generator: Any, ids: list[int]) -> None:
    for start in range(0, len(ids), BATCH):
        generator.append_tokens(np.array(ids[start : start + BATCH], np.int32))


def _overlay(threads: int, context_tokens: int) -> Json:
    # Threads that spin while they wait take the cores of whatever else runs (shared with the app).
    session = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0"}
    return {
        "model": {"decoder": {"session_options": session}},
        "search": {"max_length": context_tokens},
    }


def parameters(file: Path) -> tuple[int, int]:
    """Weights of a model.onnx, and how many of them are only looked up (an embedding that is not
    the head). Float initializers count with their size, 4- and 8-bit matrices with what they stand
    for; tables of sines are no weights."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    packed, count, looked_up = set[str](), 0, 0
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            count += sizes["K"] * sizes["N"]
            packed.update(node.input[1:])
        elif node.op_type == "GatherBlockQuantized":
            packed.update(node.input)
    for tensor in graph.initializer:
        known = tensor.name in packed or "_cache" in tensor.name
        if tensor.data_type == onnx.TensorProto.FLOAT and not known:
            size = int(np.prod(tensor.dims, dtype=np.int64))
            count += size
            looked_up += size if tensor.name in gathered else 0
    return count, looked_up


def _read(file: Path) -> Json:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise Refused(f"{file.name} cannot be read: {error}") from error


def _flat(values: Json, before: str = "") -> dict[str, str]:
    """Nested keys joined by dots."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value if isinstance(value, str) else json.dumps(value)
    return found


def _answer(native: list[Native], do: str, given: Json) -> Any:
    try:
        if do == "load":
            native.append(Native(**given))
            return native[0].facts()
        if do == "peak_memory_bytes":
            return peak_memory_bytes()
        return getattr(native[0], do)(**given)
    except (
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:  # what genai's C++ throws arrives as these
        raise Refused(f"onnxruntime-genai: {error}") from error


def main() -> None:
    native: list[Native] = []
    answer_requests(lambda do, given: _answer(native, do, given))


if __name__ == "__main__":
    main()
