"""Pack an export in optimum's layout: `dist/<recipe>-optimum/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.artifacts import Bundle, Exported, Identity, Student, write_atomic
from edgedistill.pack.publishing import STAGE, publish
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Recipe

Json = Mapping[str, Any]
USER = "WORDS"
# Where a folder in optimum's layout is used, and what is said of each of its model files.
OPTIMUM_README = """\
# {name}, for ONNX Runtime

{base} ({licence}), distilled by edgedistill for: {description}

{table}

KLD in nats, from the merged fp32 checkpoint, on validation prompts of the token mix. Agreement with
the teacher was not measured with these files.

transformers.js:

```js
const student = await pipeline("text-generation", "<this folder>", {{ dtype: "q8" }});
const messages = {messages_js};
await student(messages, {{ max_new_tokens: {max_tokens}, do_sample: false }});
```

Python:

```python
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
model = ORTModelForCausalLM.from_pretrained("<this folder>", file_name="model_quantized.onnx")
messages = {messages_python}
asked = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generate(**asked, max_new_tokens={max_tokens}, do_sample=False)
```

Give it these messages, with the user's words for {prompt}, and answer greedily without a repetition
penalty: it was trained and measured so.
`manifest.json` says what every file was made from.
"""


def pack_optimum(
    recipe: Recipe,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
    out: Path,
    progress: Progress,
) -> Bundle:
    """Make `out/<recipe>-optimum/`, the export in optimum's layout, or reuse it as `pack` does.

    Args:
        chain: the manifest of every stage so far; it holds "export-optimum" and "verify-optimum".

    Raises:
        ArtifactError: a folder of that name is there that edgedistill did not make.
        StorageError: no space or no permission.
    """
    files = chain["export-optimum"]["facts"]["files"]
    checked = chain["verify-optimum"]
    identity = Identity(
        stage=STAGE,
        version=2,
        spec={
            "layout": "optimum",
            "recipe": recipe.name,
            "description": recipe.description,
            "prompt": recipe.student.model_dump(mode="json", exclude={"weights", "prune"}),
        },
        inputs={"exported": exported.digest, "checked": checked["key"], "student": student.digest},
        tools={"edgedistill": __version__},
    )
    messages = StudentPrompt(student.folder, recipe.student).messages(USER)
    readme = OPTIMUM_README.format(
        name=recipe.name,
        base=student.title,
        licence=student.licence,
        description=recipe.description,
        table=_optimum_table(files, checked["facts"]["kld"]),
        messages_js=json.dumps(messages, ensure_ascii=False),
        messages_python=repr(messages),
        max_tokens=recipe.student.max_tokens,
        prompt=USER,
    )

    def fill(making: Path) -> None:
        names = (name for name in chain["export-optimum"]["outputs"])
        for name in names:
            (making / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(exported.folder / name, making / name)
        write_atomic(making / "README.md", readme.encode())

    facts = {"model": exported.model.relative_to(exported.folder).as_posix(), "format": "ONNX"}
    return publish(out / f"{recipe.name}-optimum", identity, facts, chain, fill, progress)


def _optimum_table(files: Json, kld: Json) -> str:
    lines = ["| dtype | file | MB | mean KLD | p99 KLD | same top token |", "|---" * 6 + "|"]
    for dtype, file in files.items():
        own = kld[dtype]
        lines.append(
            f"| {dtype} | `onnx/{file['file']}` | {file['bytes'] / 1e6:.1f} "
            f"| {own['mean_kld']:.2g} | {own['p99_kld']:.2g} | {own['top1']:.1%} |"
        )
    return "\n".join(lines)
