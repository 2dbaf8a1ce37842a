"""A tiny model by wllama in a real browser: the same answers as llama.cpp's, also on the bundle's
own page. Needs Chromium, and wllama in the cache or the npm registry."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import FakeTeacher
from tiny import tiny_student
from world import API_TEACHER, RECIPE, TARGET, make_world

from edgedistill.browser import (
    WllamaModel,
    find_browser,
    package_file,
    package_files,
    page_files,
    student_config,
)
from edgedistill.browser.chromium import Chromium
from edgedistill.browser.page import measuring_files
from edgedistill.browser.serving import JobServer
from edgedistill.errors import MissingTool, RuntimeFailure
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.fidelity import compare
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp, quantize_file
from edgedistill.student import TOKENIZER_GGUF

BROWSER = find_browser()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no browser of the Chromium family"),
]
PROMPTS = ("How many tickets?", "  count <b>these</b> {prompt}\n", "né 12 in ing")
MOST = 12
SHOWN = {
    "name": "tiny", "description": "Says things.", "language": "en", "megabytes": "1 MB",
    "example": "How many?", "facts": "a file",
}  # fmt: skip
# Same origin as the page in its frame: does with it what a visitor does.
DRIVE = """<!doctype html><iframe src="index.html"></iframe><script type="module">
const send = (what, body) => fetch(what, { method: 'POST', body });
const frame = document.querySelector('iframe');
const $ = (id) => frame.contentDocument.getElementById(id);
const until = async (what) => { while (!what()) await new Promise((go) => setTimeout(go, 50)); };
const told = () => { if (!$('error').hidden) throw new Error($('error').textContent); };
try {
  await until(() => frame.contentDocument.readyState === 'complete' && $('ask'));
  $('load').click();
  await until(() => { told(); return !$('ask').disabled; });
  for (;;) {
    const job = await fetch('job');
    if (job.status === 204) continue;
    $('prompt').value = (await job.json()).prompt;
    $('form').requestSubmit();
    await until(() => { told(); return $('stats').textContent.includes('first token'); });
    await send('done', JSON.stringify($('answer').textContent));
    $('stats').textContent = '';
  }
} catch (error) { await send('failed', String(error)); }
</script>"""

# A visitor who was here for an older model, and on another page of the site.
KEEP = """<!doctype html><script type="module">
import { openStudent, readConfig } from './web/student.js';
const send = (what, body) => fetch(what, { method: 'POST', body });
try {
  const store = await caches.open('edgedistill');
  for (const old of ['old.gguf?sha256=0', 'elsewhere/other.gguf?sha256=1']) {
    await store.put(new URL(old, location.href), new Response('x'));
  }
  await openStudent(await readConfig());
  const names = (await store.keys()).map(({ url }) => new URL(url).pathname.split('/').pop());
  await send('done', JSON.stringify(names.sort()));
} catch (error) { await send('failed', String(error)); }
</script>"""


@dataclass(frozen=True)
class Tiny:
    model: Path
    prompt: StudentPrompt
    config: dict[str, Any]
    runtime: dict[str, bytes]

    def open(self, **changed: Any) -> WllamaModel:
        assert BROWSER is not None
        return WllamaModel(
            BROWSER, self.model, {**self.config, **changed}, self.runtime, load_seconds=120
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    try:
        runtime = package_files(Silent())
    except MissingTool as error:
        pytest.skip(str(error))
    made = tiny_student(folder / "student")
    whole, model = folder / "tiny-f16.gguf", folder / "tiny-q8.gguf"
    made_from = Provenance("tiny", made.name, made.licence, made.digest)
    write_gguf(made.folder, made.folder / TOKENIZER_GGUF, whole, made_from, Silent())
    quantize_file(whole, model, "Q8_0", 1)
    prompt = StudentPrompt(
        made.folder, StudentSpec(weights="x", system="Be brief", max_tokens=MOST)
    )
    config = student_config(model, prompt, max_tokens=MOST, context_tokens=256)
    return Tiny(model, prompt, config, runtime)


@pytest.fixture(scope="module")
def native(tiny: Tiny) -> Iterator[LlamaCpp]:
    with LlamaCpp(tiny.model, threads=1, context_tokens=256) as model:
        yield model


def test_it_answers_as_llama_cpp_does(tiny: Tiny, native: LlamaCpp, tmp_path: Path) -> None:
    here, there = tmp_path / "native.f32", tmp_path / "browser.f32"
    with tiny.open() as model:
        for text in PROMPTS:
            ids = tiny.prompt.prompt_ids(text)
            assert model.render(text) == tiny.prompt.render(text)
            assert model.tokenize(tiny.prompt.render(text)) == ids
            made = model.generate(ids, MOST, tiny.prompt.stop_ids)
            expected = native.generate(ids, MOST, tiny.prompt.stop_ids)
            assert (made.ids, made.text) == (expected.ids, expected.text)
            whole = ids + tiny.prompt.answer_ids("SELECT count(*)")
            model.logits(whole, len(ids), there)
            native.logits(whole, len(ids), here)
        found = compare(here, there, int(model.facts["n_vocab"]))
    assert 0 < found.mean_kld < 1e-3  # the kernels differ, and are close


def test_the_page_of_the_bundle_answers_as_llama_cpp_does(tiny: Tiny, native: LlamaCpp) -> None:
    assert BROWSER is not None
    files = page_files(tiny.config, SHOWN, tiny.runtime)
    served = {**files, tiny.model.name: tiny.model, "drive.html": DRIVE.encode()}
    with JobServer(served) as server, Chromium(BROWSER, server.url + "drive.html"):
        for text in PROMPTS:
            server.put({"prompt": text})
            said = server.result(120)
            assert said is not None
            expected = native.generate(tiny.prompt.prompt_ids(text), MOST, tiny.prompt.stop_ids)
            assert json.loads(said) == expected.text.strip()


def test_a_page_keeps_its_model_and_leaves_other_pages_theirs(tiny: Tiny) -> None:
    assert BROWSER is not None
    files = page_files(tiny.config, SHOWN, tiny.runtime)
    served = {**files, tiny.model.name: tiny.model, "keep.html": KEEP.encode()}
    with JobServer(served) as server, Chromium(BROWSER, server.url + "keep.html"):
        said = server.result(120)
    assert said is not None
    assert json.loads(said) == ["other.gguf", tiny.model.name]


def damaged(tiny: Tiny, folder: Path) -> Path:
    file = folder / tiny.model.name
    body = bytearray(tiny.model.read_bytes())
    body[64:4096] = b"\xff" * (4096 - 64)
    file.write_bytes(body)
    return file


def test_a_damaged_model_is_an_error_with_the_pages_words(tiny: Tiny, tmp_path: Path) -> None:
    assert BROWSER is not None
    with pytest.raises(RuntimeFailure, match="cannot load: the model cannot be loaded"):
        WllamaModel(BROWSER, damaged(tiny, tmp_path), tiny.config, tiny.runtime, load_seconds=120)


def test_damaged_web_assembly_is_an_error(tiny: Tiny) -> None:
    assert BROWSER is not None
    runtime = {**tiny.runtime, "wllama.wasm": b"\0asm\1\0\0\0 and rubbish"}
    with pytest.raises(RuntimeFailure, match="cannot load"):
        WllamaModel(BROWSER, tiny.model, tiny.config, runtime, load_seconds=120)


def test_a_context_beyond_its_memory_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(RuntimeFailure, match="cannot load"):
        tiny.open(context_tokens=2**24)


def test_a_killed_browser_is_an_error_and_nothing_stays(tiny: Tiny) -> None:
    with tiny.open() as model:
        tree = [p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()]
        assert tree
        for process in tree:
            process.kill()
        with pytest.raises(RuntimeFailure, match="died while it should tokenize"):
            model.tokenize("a")
    until = time.monotonic() + 10
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in tree):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_browser_ends_when_the_program_that_started_it_is_gone(tiny: Tiny) -> None:
    assert BROWSER is not None
    files = {**measuring_files(tiny.config, tiny.runtime), tiny.model.name: tiny.model}
    server = JobServer(files)
    with Chromium(BROWSER, server.url + "measure.html") as browser:
        assert server.result(120) is not None
        server.close()  # as when that program was killed
        until = time.monotonic() + 60
        while browser.exit_code() is None:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_a_build_for_the_browser_is_measured_there_and_ships_its_page(
    tiny: Tiny, tmp_path: Path
) -> None:
    with FakeTeacher(answer=lambda prompt: prompt.rsplit(" ", 1)[-1]) as teacher:
        spoken = {**API_TEACHER, "base_url": teacher.base_url}
        world = make_world(tmp_path, spoken)
        recipe = {**RECIPE, "teacher": spoken}
        recipe["bench"] = {**RECIPE["bench"], "browser_prompts": 3}
        recipe["distill"] = {**RECIPE["distill"], "epochs": 1, "evaluations": 1}
        (world.home / "recipe" / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
        gates = {"max_agreement_drop": 1.0, "max_file_mb": 50}
        target = {**TARGET, "runtime": "wllama", "latency": "browser", "gates": gates}
        target |= {"formats": ["Q8_0"], "device_class": "browser"}
        world.target.write_text(json.dumps(target), "utf-8")
        kept = package_file(cache=world.home / "cache")
        kept.parent.mkdir(parents=True)
        shutil.copyfile(package_file(), kept)
        world.run()
    report = json.loads((world.bundle / "report.json").read_text("utf-8"))
    page = report["in_browser"]
    assert (page["measured"], page["prompts"], page["misread"]) == (True, 3, 0)
    assert page["kld"]["mean_kld"] < 1e-2
    assert [row["who"] for row in report["latencies"]] == ["student in the browser"]
    assert "In the browser" in (world.bundle / "report.html").read_text("utf-8")
    config = json.loads((world.bundle / "web" / "student.json").read_text("utf-8"))
    assert (world.bundle / config["model"]).stat().st_size == config["bytes"]
    listed = json.loads((world.bundle / "manifest.json").read_text("utf-8"))
    assert {"index.html", "web/wllama/wllama.wasm"} <= set(listed["outputs"])
    assert listed["tools"]["@wllama/wllama"]
