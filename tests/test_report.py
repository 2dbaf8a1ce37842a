from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from sample_report import browser_report, missed_report, phone_report, sample_report
from sample_tuning import sample_curve, sample_sweep

from edgedistill.report import render_html
from edgedistill.report.html import sentence
from edgedistill.report.tuning import curve_page, sweep_page
from edgedistill.report.units import NBSP, duration, figure, percent, relation, small
from edgedistill.results import BenchResult
from edgedistill.tuning_results import LearningCurve, Sweep

PROVENANCE: dict[str, Any] = {
    "edgedistill": "0.1.0",
    "teacher": {"model": "big-model", "licence": "Apache-2.0"},
    "student": {"base": "org/small-135M", "licence": "Apache-2.0"},
    "data": {"prompts": "prompts.jsonl", "licence": "CC0-1.0"},
    "makeup": {"numbers": "Q5_K (180), Q6_K (31)", "fit": None, "left_unfitted": None,
               "vocabulary": None, "drop_layers": None, "converter": None},
    "prompt_template": "<|im_start|>user\n{prompt}<|im_end|>\n",
    "sizes": {"exported": 270_900_000, "quantized": 112_104_448},
    "stages": {
        "distill": {
            "digest": "ab" * 32, "wall_seconds": 398.5, "peak_memory_bytes": 2_600_000_000,
            "seed": 0, "tools": {"torch": "2.13.0"},
        }
    },
}  # fmt: skip
ATTACK = "<script>alert('a & b')</script>"


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def render(result: BenchResult) -> str:
    return render_html(json.loads(json.dumps(result.to_json())), PROVENANCE)


@pytest.fixture(scope="module")
def laptop() -> str:
    return render(sample_report())


def test_everything_measured_is_shown(laptop: str) -> None:
    text = re.sub(r"\s+", " ", Page(laptop).text.replace("\u2060", ""))
    for expected in (
        "87.3 %", "81.7–92.9 %", "8.8 times faster", "8.8 ×", "112.1 MB", "1.5 × 10⁻⁶",  # noqa: RUF001
        "99.43 %", "loses 16.1 points", "742.3 ± 11.2 tokens/s", "invalid", "sql-0020",
        "org/small-135M", "6 min 38 s", "2.60 GB", "abababababab", "torch 2.13.0",
        "bf16 was 1.5 times", "nats", "✓ every gate passed", "20 held-out examples",
    ):  # fmt: skip
        assert expected in text


def test_sections_come_in_order(laptop: str) -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", laptop)
    assert heads == [
        "How closely it follows the teacher", "What each step cost",
        "Which number format, and why", "Speed", "Training", "20 held-out examples",
        "What it was made from", "Gates", "Notes",
    ]  # fmt: skip


def test_nothing_is_fetched_or_run(laptop: str) -> None:
    loading = {"src", "srcset", "action", "data", "poster", "background"}
    for tag, attributes in Page(laptop).tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not loading & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in laptop
    assert not re.search(r"url\((?!#)", laptop)


def test_ids_are_unique_and_every_reference_has_one(laptop: str) -> None:
    ids = [a["id"] for _, a in Page(laptop).tags if "id" in a]
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', laptop)
    assert len(ids) == len(set(ids))
    assert used
    assert set(used) <= set(ids)


def test_the_same_report_gives_the_same_bytes(laptop: str) -> None:
    assert render(sample_report()) == laptop


def test_charts_follow_the_page_colours_and_fonts(laptop: str) -> None:
    drawings = re.findall(r"<svg .*?</svg>", laptop, flags=re.DOTALL)
    assert len(drawings) == 12  # six charts, wide and narrow
    for drawing in drawings:
        assert "var(--" in drawing
        assert not re.search(r"(?:fill|stroke): #", drawing)
        assert "font:" not in drawing


def test_hostile_text_is_shown_not_run() -> None:
    sample = sample_report()
    example = replace(sample.examples[0], prompt=ATTACK, teacher=ATTACK, student=ATTACK)
    candidate = replace(sample.candidates[-1], format=ATTACK, why_not=ATTACK)
    agreement = replace(sample.agreements[0], model=ATTACK)
    html = render(
        replace(
            sample, recipe=ATTACK, description=ATTACK, check=ATTACK, notes=[ATTACK],
            examples=[example], candidates=[sample.candidates[0], candidate],
            agreements=[agreement], rejected={ATTACK: 3}, machine={ATTACK: ATTACK},
        )
    )  # fmt: skip
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(ATTACK) >= 12


def test_a_roofline_target_says_estimate_at_every_figure() -> None:
    html = render(phone_report())
    assert "Nothing here was timed on phone" in html
    assert "76.8" not in sentence(phone_report().to_json())
    assert "times faster" not in html
    assert "end_to_end" not in html
    for place in re.findall(r"<tr>.*?</tr>|<div><dt>.*?</div>", html, flags=re.DOTALL):
        if "≈" in place:
            assert "estimate" in place
    assert "an estimate, not measured" in sentence(phone_report().to_json())


def test_an_emulated_step_says_so_and_on_how_many_prompts() -> None:
    html = render(phone_report())
    assert "emulated aarch64<small>87.5" in html
    assert '<dt>prompts</dt><dd class="wraps">24 (before: 91.7' in html
    assert "emulated aarch64" not in render(sample_report())


def test_a_browser_target_shows_what_the_browser_changed() -> None:
    text = re.sub(r"\s+", " ", Page(render(browser_report())).text)
    assert "48 of 48" in text
    assert "95.8 %" in text
    assert "teacher and student in turn" not in text
    assert "student in the browser" in text


def test_a_browser_that_was_not_there_is_said_twice() -> None:
    html = render(browser_report(measured=False))
    assert "NOT MEASURED" in html
    assert html.count("no Chromium here") == 2


def test_how_the_file_was_made_is_said() -> None:
    made = {
        "vocabulary": 8683, "drop_layers": 2, "converter": "llama.cpp converter 0123456789abcdef",
        "fit": {"method": "full", "max_steps": 200},
    }  # fmt: skip
    provenance = {**PROVENANCE, "makeup": {**PROVENANCE["makeup"], **made}}
    page = render_html(json.loads(json.dumps(sample_report().to_json())), provenance)
    assert "<dt>exported by</dt><dd>llama.cpp converter 0123456789abcdef</dd>" in page
    assert "<dd>8,683 tokens of the vocabulary are left, layers dropped: 2</dd>" in page
    assert re.search(r"<dt>fitted</dt><dd>method: full · max.steps: 200</dd>", page)


def test_a_report_of_before_there_were_browsers_still_renders() -> None:
    report = json.loads(json.dumps(sample_report().to_json()))
    del report["in_browser"]
    assert "In the browser" not in render_html(report, PROVENANCE)


def test_phrasings_that_further_prompts_have_are_counted(laptop: str) -> None:
    report = json.loads(json.dumps(sample_report().to_json())) | {"unseen_met": 3}
    told = "3 have a phrasing of further prompts"
    assert told in render_html(report, PROVENANCE)
    assert told not in laptop


def tuned(curve: LearningCurve, sweep: Sweep | None = None) -> str:
    report = sample_report().to_json() | {"learning_curve": curve.to_json()}
    report |= {"sweep": (sweep or sample_sweep()).to_json()}
    return render_html(json.loads(json.dumps(report)), PROVENANCE)


def test_sweep_and_curve_are_drawn_where_there_are_some(laptop: str) -> None:
    html = tuned(sample_curve())
    text = re.sub(r"\s+", " ", Page(html).text.replace("\u2060", ""))
    for expected in (
        "How the values were found", "after 33 %, 48 %, 69 % of each", "★ best", "92 %",
        "number 4 of 5 behind 33 %", "the recipe's own values", "diverged: the loss is nan",
        "What more traces would buy", "836forecast", "87.0–95.0 %", "error = a + b n^-c",  # noqa: RUF001
    ):  # fmt: skip
        assert expected in text
        assert expected not in laptop
    assert html.count("<svg") == laptop.count("<svg") + 4
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_refused_forecast_is_no_point_of_the_curve() -> None:
    html = tuned(sample_curve("there is no trend"))
    assert "No forecast: there is no trend." in html
    assert "836" not in html.split("What more traces would buy")[1]


def test_pages_of_their_own_fetch_and_run_nothing() -> None:
    hostile = replace(sample_sweep(), recipe=ATTACK, said=ATTACK)
    pages = sweep_page(plain(hostile)), curve_page(plain(replace(sample_curve(), recipe=ATTACK)))
    for page in pages:
        assert "<script" not in page
        assert not [t for t, a in Page(page).tags if t == "link" or "src" in a or "href" in a]
        assert page.count("<svg") == 2
        assert "var(--student)" in page
    assert "learning_rate: 0.0008" in pages[0]


def plain(value: Sweep | LearningCurve) -> Any:
    return json.loads(json.dumps(value.to_json()))


def test_a_missed_gate_is_seen_at_the_top_and_at_its_step() -> None:
    html = render(missed_report())
    assert html.count("✗ gate missed") == 1
    assert "a gate was missed" in html.split("</header>")[0]
    assert "must not ship" in html.split("</header>")[0]


def test_training_tells_how_it_ran_and_what_was_answered_on_the_way() -> None:
    html = render(sample_report())
    assert "57 steps on cpu in 2 processes in fp32, 211 tokens/s, at most 2.1" in html
    shown = html.split("Answers during training")[1].split("</section>")[0]
    assert [f"step {step}" in shown for step in (26, 52, 78)] == [True] * 3
    assert (shown.count("≠ differs"), shown.count("= same")) == (1, 2)
    assert "&lt;open&gt;" in shown


def test_a_report_with_little_in_it_still_renders() -> None:
    bare = replace(
        sample_report(), training=[], trained={}, fitting=[], latencies=[], llama_bench=[],
        speedup_p50=None, examples=[], notes=[], rejected={}, gates=[],
        candidates=sample_report().candidates[:1],
        agreements=[replace(a, seen=None, unseen=None) for a in sample_report().agreements],
    )  # fmt: skip
    html = render(bare)
    assert "None: every answer of the teacher was usable" in html
    assert html.count("<figure>") == 1


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(1.0), "100 %"),
        (percent(0.8734), "87.3 %"),
        (small(0.0), "0"),
        (small(0.00749), "0.00749"),
        (small(1.5e-6), "1.5 × 10⁻⁶"),  # noqa: RUF001
        (duration(None), "—"),
        (duration(0.1417), "142 ms"),
        (duration(1.306), "1.31 s"),
        (duration(398.5), "6 min 38 s"),
        (figure(0.02, "agreement_drop"), "2.0 points"),
        (figure(0.85, "merged_agreement"), "85 %"),
        (figure(1e-4, "mean_kld"), "1.0 × 10⁻⁴ nats"),  # noqa: RUF001
        (figure(150, "file_mb"), "150.0 MB"),
        (relation("merged_agreement"), "≥"),
        (relation("tokens_per_second"), "≥"),
        (relation("agreement_drop"), "≤"),
        (relation("p99_kld"), "≤"),
    ],
)
def test_figures_carry_their_units(shown: str, expected: str) -> None:
    assert shown.replace(NBSP, " ") == expected
