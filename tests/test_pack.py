from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_report import browser_report, phone_report, sample_report
from sample_tuning import sample_sweep

from edgedistill.artifacts import (
    Allocation,
    Bundle,
    Checkpoint,
    Exported,
    Quantized,
    Report,
    Student,
    Variant,
    digest_of_file,
)
from edgedistill.errors import ArtifactError
from edgedistill.methods import DistillSpec, ProxySpec
from edgedistill.pack import pack, shipped_student
from edgedistill.pack.makeup import makeup
from edgedistill.pack.optimum import pack_optimum
from edgedistill.pack.publishing import reduced
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Recipe, StudentSpec
from edgedistill.report.card import Card, licence, ollama_template
from edgedistill.student import Key, write_tokenizer
from edgedistill.target import Target

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH = 32
MODEL = "Tiny-1M-support-sql-v1.0-Q5_K_M.gguf"
CHAIN: dict[str, Any] = {
    "distill": {
        "stage": "distill", "version": 1, "key": "0" * 16, "digest": "ab" * 32,
        "spec": {"distill": {"rank": 32, "seed": 7}}, "inputs": {"dataset": "cd" * 32},
        "tools": {"torch": "2.13.0"}, "facts": {"steps": 78}, "started": "2026-01-01T00:00:00Z",
        "outputs": {"adapter_model.safetensors": {"sha256": "ef" * 32, "bytes": 39_000_000}},
        "wall_seconds": 398.5, "peak_memory_bytes": 2_600_000_000,
    }
}  # fmt: skip

STOCK = {"numbers": "Q5_K (180), Q6_K (31)", "fit": None, "left_unfitted": None,
         "vocabulary": None, "drop_layers": None, "converter": None}  # fmt: skip
PROVENANCE = {"edgedistill": "0", "makeup": STOCK}


@dataclass
class Listener(Silent):
    reused: list[bool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self.reused.append(reused)

    def note(self, text: str) -> None:
        self.notes.append(text)


def tokenizer_keys() -> list[Key]:
    """A byte-level vocabulary without merges, and ChatML's two control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    tokens = [*alphabet, "aa", "<|im_start|>", "<|im_end|>"]
    return [
        Key("tokenizer.ggml.model", "STRING", None, "gpt2"),
        Key("tokenizer.ggml.pre", "STRING", None, "smollm"),
        Key("tokenizer.ggml.tokens", "ARRAY", "STRING", tokens),
        Key("tokenizer.ggml.token_type", "ARRAY", "INT32", [1] * 257 + [3, 3]),
        Key("tokenizer.ggml.merges", "ARRAY", "STRING", ["a a"]),
        Key("tokenizer.ggml.bos_token_id", "UINT32", None, 257),
        Key("tokenizer.ggml.eos_token_id", "UINT32", None, 258),
        Key("tokenizer.ggml.add_bos_token", "BOOL", None, False),
        Key("tokenizer.chat_template", "STRING", None, CHATML),
    ]


def write_tiny_model(path: Path, keys: list[Key]) -> None:
    """A llama of one layer with random weights, which llama.cpp loads and runs."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 2)
    for key in keys:
        element = gguf.GGUFValueType[key.element] if key.element else None
        writer.add_key_value(key.key, key.value, gguf.GGUFValueType[key.type], element)
    draw = np.random.default_rng(0)
    vocabulary = len(keys[2].value)
    matrices = {"token_embd": vocabulary, "output": vocabulary}
    matrices |= {f"blk.0.{name}": WIDTH for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    )}  # fmt: skip
    for name, rows in matrices.items():
        weights = draw.normal(0, 0.5, (rows, WIDTH)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weights)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_recipe(**student: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "support-sql",
            "description": "Turns a question into one SQLite query.",
            "prompts": "prompts.jsonl",
            "data_licence": "CC0-1.0",
            "teacher": {
                "kind": "api", "base_url": "http://localhost:9/v1", "model": "big-model",
                "licence": "Vendor terms 2026", "system": "the schema",
            },
            "check": {"kind": "exact"},
            "student": {"weights": "tiny.gguf", "system": "SQL", "max_tokens": 8} | student,
        }
    )  # fmt: skip


def make_target(name: str = "laptop") -> Target:
    return Target(
        name=name, description="a laptop", device_class="laptop", runtime="llama.cpp",
        formats=("Q5_K_M",), latency="measured", memory_budget_mb=1000, context_tokens=256,
    )  # fmt: skip


@dataclass
class Parts:
    """What pack is handed, in a workspace of its own."""

    root: Path
    student: Student
    quantized: Quantized
    exported: Exported
    report: Report

    def pack(self, listener: Listener | None = None, **changes: Any) -> Bundle:
        given: dict[str, Any] = {"recipe": make_recipe(), "target": make_target()}
        given |= {"report": self.report, "chain": CHAIN} | changes
        return pack(
            **given, quantized=self.quantized, exported=self.exported, student=self.student,
            out=self.root / "dist", progress=listener or Silent(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    root = tmp_path_factory.mktemp("workspace")
    keys = tokenizer_keys()
    folders = {name: root / name for name in ("student", "quantize", "export", "bench")}
    for folder in folders.values():
        folder.mkdir()
    write_tokenizer(folders["student"], keys)
    model = folders["quantize"] / MODEL
    write_tiny_model(model, keys)
    shutil.copyfile(model, folders["export"] / "Tiny-F16.gguf")
    figures = replace(sample_report(), model_file=MODEL, model_bytes=model.stat().st_size)
    file = folders["bench"] / "report.json"
    file.write_text(json.dumps(figures.to_json()), "utf-8")
    (folders["bench"] / "fidelity.json").write_text("{}", "utf-8")
    return Parts(
        root,
        Student(folders["student"], "1" * 64, "org/Tiny-1M", "Apache-2.0", "tiny.gguf"),
        Quantized(folders["quantize"], "2" * 64, model, "Q5_K_M"),
        Exported(folders["export"], "3" * 64, folders["export"] / "Tiny-F16.gguf"),
        Report(folders["bench"], "4" * 64, file),
    )


@pytest.fixture(scope="module")
def bundle(parts: Parts) -> Bundle:
    return parts.pack()


@pytest.fixture
def fresh(parts: Parts, bundle: Bundle, tmp_path: Path) -> Parts:
    """The same parts with a bundle of their own, to be changed."""
    shutil.copytree(bundle.folder, tmp_path / "dist" / bundle.folder.name)
    return replace(parts, root=tmp_path)


def test_bundle_holds_what_ships_under_a_plain_name(bundle: Bundle) -> None:
    assert bundle.folder.name == "support-sql-laptop"
    assert bundle.model == bundle.folder / MODEL
    assert {path.name for path in bundle.folder.iterdir()} == {
        MODEL, "manifest.json", "MODEL_CARD.md", "Modelfile", "README.md", "report.html",
        "report.json", "fidelity.json",
    }  # fmt: skip
    assert [path.name for path in bundle.folder.parent.iterdir()] == [bundle.folder.name]


def test_manifest_lists_every_file_and_every_step(bundle: Bundle) -> None:
    manifest = json.loads((bundle.folder / "manifest.json").read_text("utf-8"))
    files = {p for p in bundle.folder.iterdir() if p.name != "manifest.json"}
    assert set(manifest["outputs"]) == {path.name for path in files}
    for path in files:
        assert manifest["outputs"][path.name]["sha256"] == digest_of_file(path)
        assert manifest["outputs"][path.name]["bytes"] == path.stat().st_size
    assert manifest["provenance"] == {"distill": reduced(CHAIN["distill"])}
    assert manifest["provenance"]["distill"]["seed"] == 7
    assert "outputs" not in manifest["provenance"]["distill"]
    assert manifest["digest"] == bundle.digest


def test_model_is_a_copy(bundle: Bundle, parts: Parts) -> None:
    assert not bundle.model.samefile(parts.quantized.model)
    assert bundle.model.read_bytes() == parts.quantized.model.read_bytes()


def test_same_bundle_is_reused_and_a_changed_recipe_is_not(fresh: Parts) -> None:
    listener = Listener()
    fresh.pack(listener)
    fresh.pack(listener, recipe=make_recipe().model_copy(update={"description": "Other words."}))
    assert listener.reused == [True, False]
    card = fresh.root / "dist" / "support-sql-laptop" / "MODEL_CARD.md"
    assert "Other words." in card.read_text("utf-8")


def test_a_bundle_is_made_anew_where_a_fitting_left_the_student_for_another_reason(
    fresh: Parts,
) -> None:
    listener = Listener()
    for steps, said in ((0, "the student was close"), (43, "none of 43 steps")):
        facts = {"start_stays": True, "steps": steps, "start_kld": None}
        name = f"fit of {fresh.quantized.format}"
        fit = {**CHAIN["distill"], "stage": "fit", "facts": facts}
        fresh.pack(listener, chain={**CHAIN, name: fit})
        for file in ("MODEL_CARD.md", "report.html"):
            text = fresh.root / "dist" / "support-sql-laptop" / file
            assert said in text.read_text("utf-8")
    assert listener.reused == [False, False]


def edit(folder: Path) -> None:
    (folder / "README.md").write_text("mine", "utf-8")


def add(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine", "utf-8")
    (folder / "MODEL_CARD.md").unlink()


@pytest.mark.parametrize(("change", "name"), [(edit, "README.md"), (add, "notes.txt")])
def test_a_users_change_is_kept_beside(
    fresh: Parts, change: Callable[[Path], None], name: str
) -> None:
    folder = fresh.root / "dist" / "support-sql-laptop"
    change(folder)
    listener = Listener()
    fresh.pack(listener)
    assert listener.reused == [False]
    assert (folder.parent / "support-sql-laptop.changed-1" / name).read_text("utf-8") == "mine"
    assert (folder / "MODEL_CARD.md").is_file()
    assert name in listener.notes[0]


def test_a_folder_of_someone_else_is_left_alone(parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "dist" / "support-sql-laptop"
    folder.mkdir(parents=True)
    edit(folder)
    with pytest.raises(ArtifactError, match="something else"):
        replace(parts, root=tmp_path).pack()
    assert [path.name for path in folder.parent.rglob("*")] == [folder.name, "README.md"]


def test_a_file_of_someone_else_is_left_alone(parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "dist" / "support-sql-laptop"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(ArtifactError, match="something else"):
        replace(parts, root=tmp_path).pack()
    assert file.read_text() == "mine"


def test_a_pack_that_dies_leaves_the_old_bundle(fresh: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "dist" / "support-sql-laptop"
    before = (folder / "manifest.json").read_bytes()
    broken = replace(fresh, quantized=replace(fresh.quantized, model=tmp_path / "gone.gguf"))
    with pytest.raises(ArtifactError, match=r"gone\.gguf"):
        broken.pack(target=make_target().model_copy(update={"context_tokens": 512}))
    assert (folder / "manifest.json").read_bytes() == before
    fresh.pack(target=make_target().model_copy(update={"context_tokens": 512}))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "manifest.json").read_bytes() != before


def test_a_sweep_is_shown_without_measuring_again(fresh: Parts) -> None:
    before, (folder,) = fresh.report.file.read_bytes(), (fresh.root / "dist").iterdir()
    assert "sweep" not in json.loads((folder / "report.json").read_text("utf-8"))
    made = {**CHAIN["distill"], "stage": "sweep", "facts": sample_sweep().to_json()}
    fresh.pack(chain={"sweep": made, **CHAIN})
    shown = json.loads((folder / "report.json").read_text("utf-8"))
    assert shown["sweep"]["winner"] == 3
    assert "How the values were found" in (folder / "report.html").read_text("utf-8")
    assert fresh.report.file.read_bytes() == before
    assert {n: v for n, v in shown.items() if n != "sweep"} == json.loads(before)


def test_readme_lines_run(bundle: Bundle) -> None:
    readme = (bundle.folder / "README.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[0]
    assert len(code.splitlines()) == 3
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bundle.folder, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.strip()


def test_readme_lines_prompt_as_in_training(bundle: Bundle, parts: Parts) -> None:
    readme = (bundle.folder / "README.md").read_text("utf-8")
    asked = sample_report().examples[0].prompt
    prompt = StudentPrompt(parts.student.folder, make_recipe().student)
    assert repr(prompt.messages(asked)) in readme
    assert f"-sys SQL -p '{asked}'" in readme


def test_model_card_is_one_the_hub_reads(bundle: Bundle) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(bundle.folder / "MODEL_CARD.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "org/Tiny-1M"
    assert card.data.language == "en"
    assert card.data.pipeline_tag == "text-generation"
    assert "gguf" in card.data.tags
    for expected in (
        "big-model", "Vendor terms 2026", "CC0-1.0", "rank 32", "87.3", "## Limits",
        "<|im_start|>user\n{prompt}<|im_end|>", "not compared with right answers",
    ):  # fmt: skip
        assert expected in card.text


def test_model_card_of_an_unmeasured_device_says_estimate(parts: Parts) -> None:
    report = json.loads(json.dumps(phone_report().to_json()))
    card = Card(make_recipe(), make_target("phone"), parts.student, report, PROVENANCE)
    text = card.model_card()
    assert "**estimate**" in text
    assert "never run on the device" in text
    assert "| aarch64 (emulated, 24 prompts) | " in text
    assert "on the kernels of a phone, emulated" in text
    assert "Timed on" not in text


def test_where_the_files_of_a_recipe_lie_is_not_in_the_bundle(parts: Parts, tmp_path: Path) -> None:
    proxy = ProxySpec(weights=str(tmp_path / "p.gguf"), prompts=tmp_path / "more.jsonl")
    recipe = make_recipe(weights=str(tmp_path / "s.gguf"))
    recipe = recipe.model_copy(update={"distill": DistillSpec(method="proxy", proxy=proxy)})
    made = replace(parts, root=tmp_path).pack(recipe=recipe)
    told = (made.folder / "manifest.json").read_text("utf-8")
    assert str(tmp_path) not in told
    assert all(f'"{name}"' in told for name in ("p.gguf", "more.jsonl", "s.gguf"))


def test_model_card_does_not_call_unseen_what_further_prompts_have(parts: Parts) -> None:
    report = json.loads(json.dumps(sample_report().to_json()))
    given = {"edgedistill": "0", "makeup": STOCK}
    plain, further = (
        Card(make_recipe(), make_target(), parts.student, figures, given).model_card()
        for figures in (report, report | {"unseen_met": 3})
    )
    assert "For phrasings that training did not have, count on" in plain
    assert "For phrasings that training did not have, count on" not in further
    assert "3 of the held-out prompts with phrasings called unseen have one of further" in further


def test_model_card_says_how_a_fitted_file_was_made(parts: Parts) -> None:
    fit = {"method": "full", "rank": 32, "epochs": 2.5, "learning_rate": 3e-5, "batch_size": 16,
           "seed": 0, "kl_weight": 1.0, "hidden_weight": 60.0}  # fmt: skip
    stages = {"trim": {"vocabulary": 8192, "drop_layers": 0}, "trim 2": {"drop_layers": 2},
              "allocate": {"types": ["Q4_0"]}, "fit": {"fit": fit}}  # fmt: skip
    chain: dict[str, Any] = {
        f"{n} of mine": {"stage": n.split()[0], "spec": s} for n, s in stages.items()
    }
    facts = {"start_stays": False, "steps": 0, "start_kld": 0.00199}
    chain["fit of mine"]["facts"] = facts
    chain["trim of mine"]["facts"] = {"tokens": 8683}  # more than asked: the prompts' own, too
    mine = replace(parts.quantized, format="mine")
    made = makeup(mine, {**CHAIN, **chain})
    assert made == {**STOCK, "numbers": "F32 (9)", "fit": fit, "vocabulary": 8683, "drop_layers": 2}
    figures = json.loads(json.dumps(replace(sample_report(), fitted_step=86).to_json()))
    given = {"edgedistill": "0", "makeup": made}
    card = Card(make_recipe(), make_target(), parts.student, figures, given).model_card()
    assert "Number formats of its matrices: F32 (9)." in card
    assert (
        "- Trimmed to this token mix: 8,683 tokens of the vocabulary are left, layers dro" in card
    )
    assert "- Fitted: trained on in all its matrices while" in card
    assert "the weights are those of step 86)" in card
    assert "- Written as GGUF f32 by edgedistill, quantized by llama.cpp." in card
    facts["start_stays"] = True
    left = {"edgedistill": "0", "makeup": makeup(mine, {**CHAIN, **chain})}
    unfitted = Card(make_recipe(), make_target(), parts.student, figures, left).model_card()
    assert "- Not fitted, though its allocation asks for it: rounded to its" in unfitted
    assert "as it was (KL divergence 0.002 nats a token on altered prompts)." in unfitted
    assert "- Written as GGUF f16 by edgedistill, quantized by llama.cpp." in unfitted
    assert "- It was cut down to this token mix" in card
    stock = Card(make_recipe(), make_target(), parts.student, figures, PROVENANCE).model_card()
    assert "- Written as GGUF f16 by edgedistill, quantized by llama.cpp." in stock
    assert not any(word in stock for word in ("Fitted", "Trimmed", "cut down"))


def test_model_card_says_which_converter_wrote_the_file(parts: Parts) -> None:
    path = "llama.cpp converter 0123456789abcdef"
    ours = {"export": {"stage": "export", "facts": {"path": "edgedistill"}}}
    theirs = {"export of mine": {"stage": "export", "facts": {"path": path}}}
    assert makeup(parts.quantized, {**CHAIN, **ours, **theirs})["converter"] is None
    made = makeup(replace(parts.quantized, format="mine"), {**CHAIN, **ours, **theirs})
    assert made["converter"] == path
    figures = json.loads(json.dumps(sample_report().to_json()))
    given = {"edgedistill": "0", "makeup": made}
    card = Card(make_recipe(), make_target(), parts.student, figures, given).model_card()
    assert f"- Written as GGUF f16 by {path}, quantized by llama.cpp." in card


def test_texts_of_a_browser_bundle_name_the_page_and_the_runtimes_licence(parts: Parts) -> None:
    target = make_target("browser").model_copy(update={"runtime": "wllama"})
    figures = json.loads(json.dumps(browser_report().to_json()))
    card = Card(make_recipe(), target, parts.student, figures, PROVENANCE)
    readme, model_card, page = card.readme(), card.model_card(), card.page()
    assert "python -m http.server" in readme
    assert "`web/`" in readme
    assert re.search(r"@wllama/wllama \S+ \(MIT\)", model_card)
    assert "letter by letter on 95.8" in model_card
    assert page["example"] in {row["prompt"] for row in figures["examples"]}


def test_a_page_names_the_tokens_of_the_vocabulary_that_ships(parts: Parts, tmp_path: Path) -> None:
    """A trimmed one numbers them anew."""
    keys = {key.key: key for key in tokenizer_keys()}
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    kept = [*range(100), *range(200, len(tokens.value))]
    for key in (tokens, kinds):
        keys[key.key] = replace(key, value=[key.value[i] for i in kept])
    keys["tokenizer.ggml.merges"] = replace(keys["tokenizer.ggml.merges"], value=[])
    for name in ("bos", "eos"):
        key = keys[f"tokenizer.ggml.{name}_token_id"]
        keys[key.key] = replace(key, value=key.value - 100)
    trimmed = tmp_path / "trimmed"
    trimmed.mkdir()
    write_tokenizer(trimmed, list(keys.values()))
    allocation = Allocation(tmp_path, "5" * 64, {}, None)
    checkpoint = Checkpoint(trimmed, "6" * 64)
    variant = Variant("few", checkpoint, None, allocation, None, False, kept)
    shipped = shipped_student(parts.student, variant)
    spec = make_recipe().student
    stops = [StudentPrompt(made.folder, spec).stop_ids for made in (parts.student, shipped)]
    assert stops == [{258}, {158}]
    assert replace(shipped, folder=parts.student.folder) == parts.student
    assert shipped_student(parts.student, None) == parts.student


def test_modelfile_prompts_as_in_training(bundle: Bundle, parts: Parts) -> None:
    text = (bundle.folder / "Modelfile").read_text("utf-8")
    template = re.findall(r'TEMPLATE """(.*?)"""', text, flags=re.DOTALL)[0]
    filled = template.replace("{{ .System }}", "SQL").replace("{{ .Prompt }}", "how many?")
    prompt = StudentPrompt(parts.student.folder, make_recipe().student)
    assert filled == prompt.render("how many?") + "{{ .Response }}"
    for line in (
        f"FROM ./{MODEL}", 'SYSTEM """SQL"""', "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1", "PARAMETER num_ctx 256", "PARAMETER num_predict 8",
        'PARAMETER stop "<|im_end|>"',
    ):  # fmt: skip
        assert line in text.splitlines()


def test_ollama_template_keeps_the_students_wrapping_and_braces(parts: Parts) -> None:
    spec = StudentSpec(weights="tiny.gguf", prompt="Answer as {{json}}: {prompt}")
    template = ollama_template(parts.student, spec)
    assert 'user\nAnswer as {{ "{{" }}json}}: {{ .Prompt }}<|im_end|>' in template
    assert ".System" not in template


def test_ollama_template_does_not_double_the_bos(parts: Parts, tmp_path: Path) -> None:
    keys = {key.key: key for key in tokenizer_keys()}
    keys["tokenizer.ggml.add_bos_token"] = Key("tokenizer.ggml.add_bos_token", "BOOL", None, True)
    keys["tokenizer.ggml.bos_token_id"] = Key("tokenizer.ggml.bos_token_id", "UINT32", None, 256)
    source = "{{ bos_token }}" + CHATML
    keys["tokenizer.chat_template"] = Key("tokenizer.chat_template", "STRING", None, source)
    write_tokenizer(tmp_path, list(keys.values()))
    spec = StudentSpec(weights="tiny.gguf")
    assert StudentPrompt(tmp_path, spec).render("x").startswith("aa<|im_start|>")
    template = ollama_template(replace(parts.student, folder=tmp_path), spec)
    assert template.startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Gemma terms", {"license": "other", "license_name": "Gemma terms"}),
        ("unknown", {"license": "other", "license_name": "unknown"}),
    ],
)
def test_licence_in_the_hubs_words(name: str, expected: dict[str, str]) -> None:
    assert licence(name) == expected


def test_optimum_layout_is_copied_whole_and_says_what_each_file_loses(
    parts: Parts, tmp_path: Path
) -> None:
    folder = tmp_path / "export-optimum-1"
    (folder / "onnx").mkdir(parents=True)
    contents = {"onnx/model.onnx": b"fp32", "onnx/model_q4.onnx": b"q4", "config.json": b"{}"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    kld = {"mean_kld": 0.0123, "p99_kld": 0.4, "top1": 0.975}
    facts = {"files": {"q4": {"file": "model_q4.onnx", "bytes": 100_488_989}}}
    outputs = {name: {"sha256": "", "bytes": 0} for name in contents}
    step = CHAIN["distill"]
    chain = {
        "export-optimum": {**step, "facts": facts, "outputs": outputs},
        "verify-optimum": {**step, "facts": {"kld": {"q4": kld}}},
    }
    exported = Exported(folder, "5" * 64, folder / "onnx" / "model.onnx")
    given = (make_recipe(), exported, parts.student, chain, tmp_path / "dist")
    listener = Listener()
    made = pack_optimum(*given, listener)
    assert made.folder == tmp_path / "dist" / "support-sql-optimum"
    said = (made.folder / "README.md").read_text("utf-8")
    assert '[{"role": "system", "content": "SQL"}, {"role": "user", "content": "WORDS"}]' in said
    assert "max_new_tokens: 8, do_sample: false" in said
    assert {name: (made.folder / name).read_bytes() for name in contents} == contents
    assert made.model == made.folder / "onnx" / "model.onnx"
    readme = (made.folder / "README.md").read_text("utf-8")
    assert "| q4 | `onnx/model_q4.onnx` | 100.5 | 0.012 | 0.4 | 97.5% |" in readme
    manifest = json.loads((made.folder / "manifest.json").read_text("utf-8"))
    assert set(manifest["provenance"]) == set(chain)
    pack_optimum(*given, listener)
    assert listener.reused == [False, True]
