import json
import re
import shutil
import subprocess

import pytest
from synthetic_run import EVIL, TASKS, rows_of, write_run

from remanence.errors import DataError
from remanence.ledger import Ledger, to_frame
from remanence.report import write_report
from remanence.report.curves import panels
from remanence.report.figures import STORE_COLOURS
from remanence.report.html import render

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    return write_report(run)


@pytest.fixture(scope="module")
def text(page):
    return page.read_text(encoding="utf-8")


def pictures_of(text):
    return json.loads(re.search(r'<script type="application/json" id="pictures">(.*?)</script>', text, re.DOTALL).group(1))


def body_of(text):
    return text[text.index("<body>") : text.index("</main>")]


def test_page_is_one_file_without_anything_to_fetch(page, text):
    assert page.name == "report.html"
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", body_of(text))
    assert "<script src" not in text
    assert '<meta name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_page_says_what_the_run_is(text):
    body = body_of(text)
    for fact in (
        "Five times two digits &lt;tasks&gt;",
        "remanence run synthetic --set epochs=2",
        "c42d75d",
        "Replay keeps more than FineTune.",
    ):
        assert fact in body


def test_names_are_escaped_everywhere(text):
    assert EVIL not in text
    assert "&lt;i&gt;Mine&lt;/i&gt; &amp; &#34;co&#34;&lt;/script&gt;" in body_of(text)
    assert len(pictures_of(text)) == 6 + 6 + 1 + 1 + 5  # matrices, retention, cost, erasure, relearning of the five that forget


def test_every_store_has_one_colour(text):
    pictures = pictures_of(text)
    retention = [pictures[f"retention-{index}"]["data"][0]["line"]["color"] for index in range(6)]
    stores = ["weights", "weights", "weights", "tokens", "context", "peers"]
    assert retention == [STORE_COLOURS[store] for store in stores]
    scatter = [trace["marker"]["color"] for trace in pictures["cost-0"]["data"]]
    assert scatter == retention
    assert len({trace["marker"]["symbol"] for trace in pictures["cost-0"]["data"]}) == 6


def test_curves_are_means_over_seeds_by_hand(run):
    panel = next(panel for panel in panels(Ledger.open(run)) if panel.label == "Prototypes")
    frame = Ledger.open(run).query("learner == 'Prototypes' and metric == 'accuracy' and probe == 'accuracy'")
    end = frame[(frame["event"] == 4) & frame["step"].isna() & (frame["subject"] == TASKS[0])]
    assert len(end) == 3
    assert panel.matrix[4, 0] == pytest.approx(end["value"].mean())
    assert dict(panel.curves[0])[300.0] == pytest.approx(end["value"].mean())
    # task 2 begins at the end of event 1: 120 steps
    assert panel.curves[2][0][0] == 120.0
    assert panel.forgets == (300.0,)
    assert panel.names == tuple(TASKS)


def test_seeds_with_other_class_orders_are_averaged_by_position():
    turned = dict(zip(TASKS, TASKS[::-1], strict=True))
    rows = rows_of("Replay", 0)
    other = [
        row.__class__(**{**vars(row), "seed": 1, "task": turned.get(row.task, ""), "subject": turned.get(row.subject, row.subject)})
        for row in rows
    ]
    (panel,) = panels(to_frame([*rows, *other]))
    assert panel.names == ("task 1", "task 2", TASKS[2], "task 4", "task 5")
    (alone,) = panels(to_frame(rows))
    assert panel.matrix == pytest.approx(alone.matrix)


def test_reasons_for_missing_numbers_are_listed(text):
    assert "LoRA cannot take" in body_of(text)
    assert "What was not measured, and why" in text


def test_an_unfinished_run_still_has_a_page(tmp_path):
    manifest = {"name": "begun", "run": "r", "command": "c", "cells": [], "seeds": [], "environment": {}}
    assert "Nothing was measured yet." in render(to_frame([]), manifest)
    begun = [row for row in rows_of("Replay", 0) if row.event <= 0]
    assert "retention-0" in pictures_of(render(to_frame(begun), manifest))


def test_report_goes_where_it_is_told_and_refuses_a_folder_that_is_no_run(run, tmp_path):
    assert write_report(run, tmp_path / "deep" / "page.html") == tmp_path / "deep" / "page.html"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    with pytest.raises(DataError, match="is not a run folder"):
        write_report(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page was not opened in a browser")
def test_browser_draws_every_plot_without_a_script_error(page, text, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}",
        "--virtual-time-budget=20000",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--window-size=1280,2400", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    root = re.search(r"<html[^>]*>", done.stdout).group(0)
    assert "data-script-errors" not in root, root
    n_plots = len(pictures_of(text))
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="([a-z]+-\d+)"', done.stdout)
    assert sorted(drawn) == sorted(pictures_of(text))
    assert len(re.findall(r'<svg class="main-svg"', done.stdout)) >= n_plots
