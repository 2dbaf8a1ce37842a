"""What the student is shown and what ends its answer: chat template, tokens, stop token.

One class for training, evaluation and the device's runtime, so that all of them see the same token
IDs. It needs only `tokenizers` and Jinja, never torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgedistill.errors import MissingTool, WeightsError
from edgedistill.recipe import StudentSpec
from edgedistill.vocabulary import Vocabulary

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Tokens at which llama.cpp stops beside the EOS token (src/llama-vocab.cpp); `verify` looks whether
# it does.
ENDS_OF_TURN = ("<end_of_turn>", "<|end|>", "<|eot_id|>", "<|im_end|>")
PROBE = "edgedistill-probe-answer"
Message = Mapping[str, str]


class StudentPrompt:
    """The prompt of a student (its folder holds `tokenizer.json` and `tokenizer_config.json`).

    `stop_id` is the token the chat template ends an assistant turn with; `stop_ids` holds it and
    the end-of-sequence token, which may be another (Gemma, Phi-3).

    Raises:
        WeightsError: no chat template, a template that does not render, or one whose assistant
            turn is not: generation prompt, answer, end-of-sequence or other special token.
    """

    def __init__(self, folder: Path, spec: StudentSpec) -> None:
        self._folder = folder
        self._spec = spec
        self._tokenizer = load_tokenizer(folder / TOKENIZER)
        config = json.loads((folder / TOKENIZER_CONFIG).read_text("utf-8"))
        self._bos: str = config.get("bos_token") or ""
        self._eos: str = config.get("eos_token") or ""
        self._adds_bos = bool(config.get("add_bos_token"))
        self._template = self._compile(config.get("chat_template"))
        stop = self._tokenizer.token_to_id(self._eos)
        if stop is None:
            self._refuse(f"its end-of-sequence token {self._eos!r} is not in its vocabulary")
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.stop_id: int = self._end_of_turn(stop)
        self.stop_ids: frozenset[int] = frozenset({stop, self.stop_id})

    def messages(self, prompt: str, history: Sequence[Message] = ()) -> list[dict[str, str]]:
        """The conversation the student sees for one prompt of the token mix and what was said
        before it. As for the teacher, an own system message stands instead of the recipe's."""
        before = [dict(message) for message in history]
        if self._spec.system is not None and (not before or before[0]["role"] != "system"):
            before = [{"role": "system", "content": self._spec.system}, *before]
        # str.replace, not str.format: braces in the user's text are the user's.
        return [*before, {"role": "user", "content": self._spec.prompt.replace("{prompt}", prompt)}]

    def render_messages(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The chat template's text for a conversation."""
        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
            )
            return text
        except (TemplateError, SecurityError, TypeError) as error:
            self._refuse(f"its chat template cannot be rendered: {error}", error)

    def render(self, prompt: str, history: Sequence[Message] = ()) -> str:
        """The text the student is given, up to where its answer begins."""
        return self.render_messages(self.messages(prompt, history), add_generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        """Token IDs; special tokens in the text are parsed, none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token IDs, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def prompt_ids(self, prompt: str, history: Sequence[Message] = ()) -> list[int]:
        """Token IDs of `render(...)`, with a BOS in front where the model wants one."""
        ids = self.encode(self.render(prompt, history))
        bos = self._tokenizer.token_to_id(self._bos) if self._adds_bos else None
        # The runtime adds one too; a template that writes its own must not give two.
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def answer_ids(self, answer: str) -> list[int]:
        """Token IDs of an answer and the stop token behind it."""
        return [*self.encode(answer), self.stop_id]

    def vocabulary(self) -> Vocabulary:
        """Which bytes its tokens write. Takes a second for a large one: make it once.

        Raises:
            WeightsError: a tokenizer whose tokens have no known bytes.
        """
        return Vocabulary(self._folder / TOKENIZER, self._tokenizer, self.stop_id)

    def _compile(self, source: str | None) -> Any:
        if not source:
            self._refuse("it has no chat template, so nobody knows how to prompt it")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(source)
        except TemplateError as error:
            self._refuse(f"its chat template is not valid Jinja: {error}", error)

    def _end_of_turn(self, eos: int) -> int:
        asked = self.messages("a question")
        begun = self.render_messages(asked, add_generation_prompt=True)
        answered = [*asked, {"role": "assistant", "content": PROBE}]
        whole = self.render_messages(answered, add_generation_prompt=False)
        if not whole.startswith(begun + PROBE):
            self._refuse(
                "its chat template does not put the answer right behind the generation prompt: "
                f"that prompt ends with {begun[-40:]!r}, the conversation with {whole[-80:]!r}"
            )
        end = whole[len(begun + PROBE) :].strip()
        if end == self._eos:
            return eos
        found = self._tokenizer.token_to_id(end) if end in ENDS_OF_TURN else None
        if found is None:
            self._refuse(
                f"its chat template ends an assistant turn with {end!r}, "
                f"but its end-of-sequence token is {self._eos!r}: it would never stop"
            )
        return int(found)

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise WeightsError(
            f"this model cannot be a student: {what}",
            where=str(self._folder),
            hint="use an instruction-tuned model with a sound chat template and EOS token",
        ) from cause


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        WeightsError: it cannot be read. MissingTool: the package is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingTool(
            "the package tokenizers is not installed",
            hint='in the checkout: pip install -e ".[build]"',
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise WeightsError(f"the tokenizer cannot be read: {error}", where=str(path)) from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which models are not trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)
