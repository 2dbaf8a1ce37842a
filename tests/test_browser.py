from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny import TEMPLATE, tiny_student

from edgedistill.browser import WLLAMA, page_files, student_config
from edgedistill.browser.chromium import BROWSER_VARIABLE, find_browser
from edgedistill.browser.model import WllamaModel
from edgedistill.browser.serving import JobServer, PageFailed
from edgedistill.browser.wllama import NpmPackage, fetch_url, package_file, package_files
from edgedistill.errors import MissingTool, RuntimeFailure
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec

SHOWN = {
    "name": "tiny", "description": "Says <things>.", "language": "en", "megabytes": "1 MB",
    "example": "How many?", "facts": "a file",
}  # fmt: skip


def tarball(text: bytes = b"code") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        info = tarfile.TarInfo("package/index.js")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    return stream.getvalue()


def package(body: bytes) -> NpmPackage:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(body).digest()).decode()
    return NpmPackage("@some/thing", "1.2.3", integrity, "MIT", {"a.js": "package/index.js"})


class Registry:
    """Serves one body; counts and remembers what was asked."""

    def __init__(self, body: bytes | None) -> None:
        self.body, self.asked = body, list[str]()

    def __call__(self, url: str) -> bytes:
        self.asked.append(url)
        if self.body is None:
            raise OSError("no network")
        return self.body


def test_a_package_is_fetched_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://mirror/npm/")
    body = tarball()
    registry = Registry(body)
    for _ in range(2):
        files = package_files(Silent(), package(body), cache=tmp_path, fetch=registry)
        assert files == {"a.js": b"code"}
    assert registry.asked == ["http://mirror/npm/@some/thing/-/thing-1.2.3.tgz"]


def test_a_kept_package_that_went_bad_is_fetched_again(tmp_path: Path) -> None:
    body = tarball()
    kept = package_file(package(body), tmp_path)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(body[:-9])
    package_files(Silent(), package(body), cache=tmp_path, fetch=Registry(body))
    assert kept.read_bytes() == body


@pytest.mark.parametrize(
    ("given", "said"),
    [(tarball(b"other code"), "this registry gives sha512-"), (None, "no network")],
)
def test_other_bytes_and_no_network_are_errors_of_ours(
    given: bytes | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(MissingTool, match=said) as caught:
        package_files(Silent(), package(tarball()), cache=tmp_path, fetch=Registry(given))
    assert "thing-1.2.3.tgz" in str(caught.value)
    assert not package_file(package(tarball()), tmp_path).exists()


def test_a_registry_that_is_not_there() -> None:
    with pytest.raises(OSError, match=r"refused|resolve|reached|not a web"):
        fetch_url("http://127.0.0.1:9/x.tgz")
    with pytest.raises(OSError, match="not a web address"):
        fetch_url("file:///etc/hostname")


def student(folder: Path, template: str = TEMPLATE, **spec: str) -> StudentPrompt:
    made = tiny_student(folder)
    file = made.folder / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8")) | {"chat_template": template}
    file.write_text(json.dumps(config), "utf-8")
    return StudentPrompt(made.folder, StudentSpec(weights="x", **spec))


def model_file(folder: Path) -> Path:
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_the_page_gets_the_prompt_of_training(tmp_path: Path) -> None:
    prompt = student(tmp_path, system="Be {prompt} brief", prompt="Q: {prompt}; again {prompt}")
    config = student_config(model_file(tmp_path), prompt, max_tokens=12, context_tokens=256)
    for text in ("a", " spaced\n", "{prompt} <|im_end|>"):
        assert text.join(config["parts"]) == prompt.render(text)
    assert (config["trim"], config["bos"]) == (False, None)
    assert config["stop"] == sorted(prompt.stop_ids)


def test_a_template_that_trims_is_repeated_and_one_that_shouts_is_refused(tmp_path: Path) -> None:
    trims = TEMPLATE.replace("message['content']", "message['content'] | trim")
    prompt = student(tmp_path / "a", trims)
    config = student_config(model_file(tmp_path), prompt, max_tokens=12, context_tokens=256)
    assert config["trim"]
    assert "x y".join(config["parts"]) == prompt.render("  x y\n")
    pads = TEMPLATE.replace("message['content']", "message['content'].replace('  ', ' ')")
    with pytest.raises(RuntimeFailure, match="cannot repeat"):
        student_config(
            model_file(tmp_path), student(tmp_path / "b", pads), max_tokens=1, context_tokens=256
        )


def test_a_model_too_large_for_a_browser_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    with file.open("wb") as stream:
        stream.truncate(2**31)  # sparse: it takes no room
    with pytest.raises(RuntimeFailure, match="too much for a browser"):
        student_config(file, student(tmp_path), max_tokens=1, context_tokens=256)


def test_the_page_asks_no_other_host(tmp_path: Path) -> None:
    config = {"model": "m.gguf"}
    files = page_files(config, SHOWN, dict.fromkeys(WLLAMA.members, b""))
    assert {"index.html", "web/student.json", "web/wllama/wllama.wasm"} <= set(files)
    ours = [body.decode() for name, body in files.items() if "wllama/" not in name]
    assert not any("http://" in text or "https://" in text for text in ours)
    assert "Says &lt;things&gt;." in files["index.html"].decode()


def test_jobs_go_out_and_results_come_back() -> None:
    with JobServer({"a.html": b"hello"}) as server:
        assert urllib.request.urlopen(server.url + "a.html").read() == b"hello"
        server.put({"do": "say"})
        job = json.loads(urllib.request.urlopen(server.url + "job").read())
        urllib.request.urlopen(server.url + "done", data=json.dumps(job).encode())
        assert server.result(5) == b'{"do": "say"}'
        urllib.request.urlopen(server.url + "failed", data=b"wasm trap")
        with pytest.raises(PageFailed, match="wasm trap"):
            server.result(5)


def test_another_pages_address_is_not_answered() -> None:
    with JobServer({"a.html": b"hello"}) as server:
        root = server.url.rsplit("/", 2)[0]
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{root}/a.html")
        assert server.result(0.01) is None


def test_the_variable_names_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BROWSER_VARIABLE, sys.executable)
    assert find_browser() == sys.executable
    monkeypatch.setenv(BROWSER_VARIABLE, "no-such-browser")
    assert find_browser() is None


def test_a_browser_that_dies_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    file, program = model_file(tmp_path), tmp_path / "browser.py"
    program.write_text("import sys; sys.exit('no display')", "utf-8")
    shell = tmp_path / "browser"
    shell.write_text(f"#!/bin/sh\nexec {sys.executable} {program}\n", "utf-8")
    shell.chmod(0o755)
    if sys.platform == "win32":
        pytest.skip("a program of one line needs a shell script")
    with pytest.raises(RuntimeFailure, match=r"died while it should load(.|\n)*no display"):
        WllamaModel(str(shell), file, {"model": file.name}, {})
    with pytest.raises(RuntimeFailure, match="does not start"):
        WllamaModel(str(tmp_path / "none"), file, {"model": file.name}, {})


def test_a_silent_browser_is_given_up(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("a program of one line needs a shell script")
    file, shell = model_file(tmp_path), tmp_path / "browser"
    shell.write_text("#!/bin/sh\nexec sleep 60\n", "utf-8")
    shell.chmod(0o755)
    with pytest.raises(RuntimeFailure, match="no answer to load within 1 s"):
        WllamaModel(str(shell), file, {"model": file.name}, {}, load_seconds=1)
