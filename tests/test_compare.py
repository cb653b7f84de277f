"""Runs side by side: seeds together, targets, tables, picture and page, from the command line."""

import html.parser
import json
import random
import shutil
import statistics
import subprocess
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner
from curves import lines_of, write_run
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from runs import config_of

from pipeline.errors import RunError
from train.cli import main
from train.compare import compare
from train.compare_tables import losses, notes, stability
from train.figures import figures, reached, read_curves
from train.folder import flat
from train.panels import _bands, _spikes, picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "img", "hr", "link"}


@pytest.fixture
def runs(tmp_path):
    """Three seeds of slw, two of constant, one still running with attention windows."""
    made = []
    for arm, seeds in (("constant", (1, 2)), ("slw", (1, 2, 3))):
        for seed in seeds:
            lines = lines_of(random.Random(f"{arm}{seed}"), 60, growing=arm == "slw")
            folder = tmp_path / "runs" / arm / f"seed-{seed}"
            made.append(write_run(folder, lines, run__seed=seed, curriculum__pacing=arm, run__total_tokens=7000))
    lines = lines_of(random.Random(5), 20, growing=False)
    for line in lines[1:]:
        line["attention_window"] = min(32, line["step"])
    made.append(
        write_run(tmp_path / "runs/sky", lines, run__seed=1, curriculum__pacing="sky", run__total_tokens=9000)
    )
    return made


def call(*arguments, status=0):
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_runs_that_differ_in_their_seed_alone_are_one_arm(runs):
    found = compare(runs)
    assert [(arm.name, len(arm.curves)) for arm in found.arms] == [("constant", 2), ("slw", 3), ("sky", 1)]
    assert [arm.name for arm in compare(runs, each=True).arms] == [
        *("constant/seed-1", "constant/seed-2", "slw/seed-1", "slw/seed-2", "slw/seed-3", "sky")
    ]
    assert [len(arm.curves) for arm in compare([*runs, *runs]).arms] == [2, 3, 1]
    (runs[1] / "config.json").unlink()
    assert [len(arm.curves) for arm in compare(runs).arms] == [1, 1, 3, 1]


def test_a_second_run_of_a_seed_is_no_further_sample(runs):
    again = shutil.copytree(runs[0], runs[0].with_name("again"))
    found = compare([runs[0], again, runs[1]])
    assert [[curves.run for curves in arm.curves] for arm in found.arms] == [[runs[0], runs[1]], [again]]


def test_losses_on_different_tokens_are_told(tmp_path):
    lines = lines_of(random.Random(1), 20, growing=False)
    made = [write_run(tmp_path / str(i), lines, run__seed=i, store=name) for i, name in enumerate("aab")]
    assert "same tokens" not in str(notes(compare(made[:2])))
    assert notes(compare(made))[-1].endswith("same tokens, so losses do not compare: store is a, b.")


def test_losses_at_different_full_lengths_are_told(tmp_path):
    lines = lines_of(random.Random(1), 20, growing=False)
    made = []
    for number, (start, end) in enumerate([(8, 32), (16, 32), (8, 64)]):
        config = config_of("s", tmp_path, curriculum__seqlen_start=start, curriculum__seqlen_end=end)
        named = {key.replace(".", "__"): value for key, value in flat(config).items()}
        made.append(write_run(tmp_path / str(number), lines, **named))
    assert "same length" not in str(notes(compare(made[:2])))
    assert notes(compare(made))[-1].endswith("losses do not compare: full length is 32, 64.")


@given(st.integers(0, 10**6), st.floats(4.0, 6.5))
def test_targets_and_means_are_plain_arithmetic_over_the_runs(tmp_path_factory, seed, target):
    folder = tmp_path_factory.mktemp("x")
    drawn = random.Random(seed)
    paths = [
        write_run(folder / f"{arm}-{s}", lines_of(drawn, 50, growing=arm == "b"), run__seed=s, model__init=arm)
        for arm in "ab"
        for s in (1, 2)
    ]
    found = compare(paths, target=target)
    assert [arm.name for arm in found.arms] == ["a", "b"]
    at = [[reached(read_curves(path), target) for path in paths[i : i + 2]] for i in (0, 2)]
    seconds = [[reached(read_curves(path), target, "elapsed_s") for path in paths[i : i + 2]] for i in (0, 2)]
    for arm, values, group in zip(found.arms, at, (paths[:2], paths[2:]), strict=True):
        assert (arm.tokens_to_target is None) == (None in values)
        if None not in values:
            assert arm.tokens_to_target.mean == pytest.approx(statistics.fmean(values))
        last = [read_curves(path).validations[-1]["validation_loss"] for path in group]
        assert arm.mean("validation_loss").mean == pytest.approx(statistics.fmean(last))
        assert arm.mean("validation_loss").half == pytest.approx(12.7062 * statistics.stdev(last) / 2**0.5, rel=1e-4)
    if None not in at[0] and None not in at[1]:
        assert found.arms[1].fewer_tokens == pytest.approx(sum(at[0]) / sum(at[1]))
        assert found.arms[0].fewer_tokens == 1
        assert found.arms[1].less_time == pytest.approx(sum(seconds[0]) / sum(seconds[1]))
    default = compare(paths)
    assert all(arm.tokens_to_target is not None for arm in default.arms)
    assert default.target == max(read_curves(path).validations[-1]["validation_loss"] for path in paths)


def test_a_row_of_stability_holds_the_largest_and_the_mean_of_its_seeds(runs):
    heads, rows = stability(compare(runs))
    row, seeds = dict(zip(heads, rows[1], strict=True)), [figures(read_curves(run)) for run in runs[2:5]]
    assert row["arm"] == "slw"
    assert row["max ratio"] == f"{max(seed.loss_ratio_max for seed in seeds):.2f}"
    assert row["max variance"] == f"{max(seed.variance_max for seed in seeds):.2e}"
    assert row["max variance norm"] == f"{max(seed.variance_l1_max for seed in seeds):.3g}"
    for head, name in (("r(ratio, norm)", "ratio_with_variance_l1"), ("r(ratio, max)", "ratio_with_variance_max")):
        assert row[head].split(" ± ")[0] == f"{statistics.fmean(getattr(seed, name).r for seed in seeds):.2f}"


def test_bands_are_over_the_steps_that_all_runs_have_and_thinning_loses_no_peak():
    drawn = random.Random(1)
    long, short = lines_of(drawn, 3000)[1:], lines_of(drawn, 2500)[1:]
    xs, low, mean, high = _bands([long, short], "tokens_seen", "loss_ratio", lambda a, axis: a.max(axis))
    assert len(xs) == 1000
    peaks = [max(line["loss_ratio"] for line in lines[:2500]) for lines in (long, short)]
    assert high.max() == max(peaks)
    assert (low <= mean).all() and (mean <= high).all()
    xs, low, mean, high = _bands([long[:9], short[:5]], "step", "loss", None)
    assert xs.tolist() == [1, 2, 3, 4, 5]
    assert mean.tolist() == pytest.approx(
        [(a["loss"] + b["loss"]) / 2 for a, b in zip(long, short[:5], strict=False)]
    )


def test_the_command_writes_table_picture_page_and_json(runs, tmp_path):
    names = [tmp_path / f"out.{form}" for form in ("svg", "html", "md")]
    done = call(*runs, "--out", names[0], "--html", names[1], "--table", names[2], "--json")
    said = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [arm["arm"] for arm in said["arms"]] == ["constant", "slw", "sky"]
    assert len(said["runs"]) == 6
    assert said["arms"][1]["validation_loss"]["n"] == 3
    assert [said["picture"], said["page"], said["table"]] == [str(name) for name in names]
    ET.fromstring(names[0].read_text())
    rows = [line for line in names[2].read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + 3)
    assert len({line.count("|") for line in rows[:5]}) == len({line.count("|") for line in rows[5:]}) == 1
    text = call(*runs).stdout
    assert "sky (28% done)" in text
    assert "fewer" in text


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and gathers cells and links."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.outside, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_stands_alone_and_holds_every_number_of_the_tables(runs, tmp_path):
    odd = runs[0].parent.parent / "a <b>&amp; c"
    shutil.copytree(runs[-1], odd)
    (odd / "config.json").unlink()
    call(*runs, odd, "--html", tmp_path / "page.html")
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    page.close()
    assert page.open == []
    assert page.outside == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 1
    found = compare([*runs, odd])
    rows = [row for _, table in (losses(found), stability(found)) for row in table]
    assert page.cells == [cell for row in rows for cell in row]
    assert "a <b>&amp; c" in page.cells


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_the_page(runs, tmp_path):
    call(*runs, "--html", tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (tmp_path / "page.html").as_uri()
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    assert "<td>slw</td>" in done.stdout
    assert "<svg" in done.stdout


def test_the_same_runs_give_the_same_picture(runs):
    assert picture(compare(runs), "svg") == picture(compare(runs), "svg")


@pytest.mark.parametrize("spikes", [9, 49, 80, 3000], ids="{} spikes".format)
def test_the_numbers_above_the_bars_of_spikes_are_within_their_panel(tmp_path, spikes):
    lines = lines_of(random.Random(1), spikes, growing=False)
    found = compare([write_run(tmp_path / "run", [line | {"loss_ratio": 3.0} for line in lines])])
    figure, panel = pyplot.subplots(figsize=(4, 3))  # as large as one of nine
    _spikes(panel, found)
    figure.draw_without_rendering()
    assert [text.get_text() for text in panel.texts] == [str(spikes)] * 4
    top = panel.get_window_extent().y1
    assert all(text.get_window_extent().y1 < top for text in panel.texts)
    pyplot.close(figure)


def test_one_step_no_validation_and_many_arms_are_drawn(tmp_path):
    drawn = random.Random(1)
    paths = [write_run(tmp_path / f"run{i}", lines_of(drawn, 1 + i)[1:]) for i in range(9)]
    bare = [{k: v for k, v in line.items() if k != "validation_loss"} for line in lines_of(drawn, 4)[1:]]
    paths.append(write_run(tmp_path / "bare", bare))
    found = compare(paths)
    assert len(found.arms) == 10
    assert picture(found, "png").startswith(b"\x89PNG")
    assert picture(compare(paths[-1:]), "png").startswith(b"\x89PNG")
    assert compare(paths[-1:]).target is None


def test_what_cannot_be_compared_or_written_is_said(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"not a run[\s\S]*empty"):
        compare([*runs, tmp_path / "empty"])
    assert "not a kind of picture" in call(*runs, "--out", tmp_path / "x.bmp", status=2).stderr
    assert "cannot write" in call(*runs, "--out", runs[0] / "metrics.jsonl/x.png", status=1).stderr
    assert "cannot write the page" in call(*runs, "--html", tmp_path / "no/x.html", status=1).stderr
    assert "rror: " in call(*runs, "--table", tmp_path / "no/x.md", status=1).stderr
