"""The page: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from qloralab.report.page import page, report
from qloralab.report.runs import read_runs
from qloralab.train.finetune import finetune

HTML = "<script>console.error('ran')</script><img src='https://example.org/x.png'>"


def rows(text: str) -> dict[str, str]:
    """The lines of the tables of settings, by their name."""
    found = re.findall(r'<tr( class="differs")?><th scope="row">(\w+)', text)
    return {name: mark for mark, name in found}


def test_the_settings_that_differ_come_first_and_are_marked(trained):
    marks = rows(page(read_runs([trained / "first", trained / "second"])))
    assert [name for name, mark in marks.items() if mark] == ["lr", "r"] == [*marks][:2]
    assert not any(rows(page(read_runs([trained / "first"]))).values())


def test_a_table_has_the_result_of_each_run(trained, metrics_of):
    text = page(read_runs([trained / "second"]))
    lines = metrics_of(trained / "second")
    before, after = lines[0]["val_loss"], lines[-1]["val_loss"]
    for number in (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}", f"{lines[-1]['tokens']:,}"):
        assert f'<td class="number">{number}</td>' in text
    assert '<td class="number">6 of 6<small>complete</small></td>' in text


def test_a_run_that_was_stopped_has_no_loss_after(runs):
    path = runs / "first" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    text = page(read_runs([runs / "first"]))
    assert "2 of 6" in text
    assert text.count('<td class="number">—</td>') == 2  # after, and change


def test_full_fine_tuning_has_no_adapters(settings, silent):
    text = page(read_runs([finetune(settings(method="full", steps=1), silent).path]))
    assert "What the adapters add" not in text
    assert "Held-out prompts" in text


def test_a_prompt_that_several_runs_answer_is_there_once(trained):
    text = page(read_runs([trained / "first", trained / "second"]))
    assert text.count('<article class="sample">') == 3
    assert text.count("second, after</dt>") == 3


def test_the_means_over_seeds(runs, watched):
    for seed in (0, 1):
        shutil.copytree(runs / "first", runs / "seeds" / f"seed-{seed}")
    interval = {"mean": 2.5, "low": 2.25, "high": 2.75}
    means = dict.fromkeys(("val_before", "val_after", "change"), interval)
    (runs / "seeds" / "seeds.json").write_text(json.dumps({"runs": {"0": {}, "1": {}}, **means}))
    display, printed = watched()
    report([runs / "seeds"], runs / "deep" / "r.html", display)
    text = (runs / "deep" / "r.html").read_text()
    assert "mean over 2 seeds with 95&nbsp;% interval: validation loss 2.5000 [2.2500, 2.7500] before" in text
    assert "r.html: 2 runs, " in printed()


def test_where_no_page_can_be_written_nothing_is(trained, tmp_path, refusal, full_disk):
    assert refusal(report, [trained / "first"], tmp_path) == f"{tmp_path} is a directory; give --out the name of a file"
    old = tmp_path / "old.html"
    old.write_text("old")
    with full_disk(1000):
        assert refusal(report, [trained / "first"], old).startswith(f"{old} cannot be written: ")
    assert old.read_text() == "old"
    assert [*tmp_path.iterdir()] == [old]


def test_the_command(program, trained, tmp_path):
    status, out, err = program("report", trained / "first", trained / "second")
    assert (status, err) == (0, "")
    assert out.startswith("   report  report.html: 2 runs, ")
    assert (tmp_path / "report.html").stat().st_size < 400_000
    status, out, err = program("report", "nowhere")
    assert (status, out) == (2, "")
    assert err == "qloralab: error: nowhere does not exist; give the directory of a run\n"


def test_a_browser_shows_the_page_and_loads_nothing(runs, tmp_path, browser, silent):
    samples = runs / "second" / "samples.md"
    text = samples.read_text()
    samples.write_text(text.replace("**after**\n\n    ", f"**after**\n\n    {HTML}"))
    (runs / "first").rename(runs / "<b>first")
    report([runs / "<b>first", runs / "second"], tmp_path / "page.html", silent)
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("document.title") == "qloralab report: <b>first, second"
    assert browser.evaluate("document.compatMode") == "CSS1Compat"
    curves = browser.evaluate("[...document.querySelectorAll('[id^=curve-]')].map(one => one.getBBox().width > 0)")
    assert curves == [True] * (2 * 3 + 2 * 4 + 2 * 7)
    sizes = browser.evaluate("[...document.querySelectorAll('figure svg')].map(one => one.clientHeight)")
    assert len(sizes) == 6
    assert min(sizes) > 100
    shown = browser.evaluate("[...document.querySelectorAll('pre')].map(one => one.innerText)")
    assert sum(text.startswith(HTML) for text in shown) == 3
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.told("Runtime.consoleAPICalled") == browser.told("Runtime.exceptionThrown") == []
    assert browser.told("Log.entryAdded") == []
    asked = [told["request"]["url"] for told in browser.told("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chart_has_the_colours_of_the_page(trained, tmp_path, browser, silent, scheme):
    report([trained / "first"], tmp_path / "page.html", silent)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(tmp_path / "page.html")
    colours = browser.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('figure svg text')).fill,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    light = ["rgb(29, 35, 41)"] * 2 + ["rgb(255, 255, 255)"]
    dark = ["rgb(227, 231, 235)"] * 2 + ["rgb(20, 24, 28)"]
    assert colours == {"light": light, "dark": dark}[scheme]
