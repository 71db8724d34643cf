"""compare: curves over each other, what differs, the published points; bad input in one line; no torch."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from vavae_fast.cli import main
from vavae_fast.commands import compare

CONFIG = "model: {{model_type: {model}}}\ntrain: {{global_batch_size: {batch}, max_steps: 80000}}\noptimizer: {{lr: {lr}}}\n"


def made_run(folder, model="LightningDiT-B/1", batch=256, lr=2.0e-4, steps=(100, 200, 300), scale=1.0, **extra):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(model=model, batch=batch, lr=lr))
    (folder / "manifest.json").write_text(json.dumps({"kind": "run", "device": "cuda:0", "processes": 8}))
    lines = [dict(step=n, loss=scale * 90 / n, mse=scale * 70 / n, grad_norm=1.0, images_per_second=400.0, seconds=1800.0, memory_gb=20.0, **extra)
             for n in steps]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(HTMLParser):
    """Plots by title: their numbers of lines and their legends; table rows by first cell; all text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.plots, self.rows, self.text, self.cells = {}, {}, "", None
        self.html = html
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe") and attributes.get("src", "data:").startswith("data:")
        if tag == "svg":
            self.plots[attributes["aria-label"]] = self.lines = []
        elif tag == "polyline":
            self.lines.append(attributes)
        elif tag == "tr":
            self.cells = []
        elif tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag == "tr":
            self.rows[self.cells[0]] = self.cells[1:]
            self.cells = None

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def compared(tmp_path, capsys):
    """compared(*words) -> (page, what was printed)"""

    def run(*words):
        assert main(["compare", *map(str, words), "--out", str(tmp_path / "page.html")]) == 0, capsys.readouterr().err
        return Page((tmp_path / "page.html").read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def height(line):
    return np.array([point.split(",")[1] for point in line["points"].split()], float)


def test_curves_lie_over_each_other_on_one_scale(tmp_path, compared):
    page, said = compared(made_run(tmp_path / "a"), made_run(tmp_path / "b", scale=2.0))
    assert list(page.plots) == ["loss", "mse", "gradient norm", "images a second", "peak memory, GB"]
    first, second = page.plots["loss"]
    assert (height(second) < height(first)).all(), "twice the loss is higher up"
    assert height(second)[1] == pytest.approx(height(first)[0], abs=0.11), "2 x 90 / 200 is 90 / 100"
    assert said.strip() == f"compare  {tmp_path / 'page.html'}"
    assert page.rows["loss, last"] == ["0.3", "0.6"] and page.rows["hours in training"] == ["1.5", "1.5"] and page.rows["steps"] == ["300", "300"]


def test_only_what_differs_is_in_the_table_of_settings(tmp_path, compared):
    page, _ = compared(made_run(tmp_path / "a"), made_run(tmp_path / "b", lr=1.0e-4, batch=512))
    assert page.rows["optimizer.lr"] == ["0.0002", "0.0001"] and page.rows["train.global_batch_size"] == ["256", "512"]
    assert "model.model_type" not in page.rows and "processes" not in page.rows
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({"processes": 16}))
    page, _ = compared(tmp_path / "a", tmp_path / "b")
    assert page.rows["processes"] == ["8", "16"] and page.rows["device"] == ["cuda:0", "–"]


def test_published_points_are_drawn_when_asked_or_when_a_run_is_that_model(tmp_path, compared):
    small, large = made_run(tmp_path / "small"), made_run(tmp_path / "xl", model="LightningDiT-XL/1")
    assert "published" not in compared(small)[0].text
    for words in ((small, "--reference"), (large,)):
        page, _ = compared(*words)
        assert "published LightningDiT-XL/1, batch 1,024" in page.text and len(page.plots["mse"]) == 2
        line = page.plots["mse"][1]
        assert "dashed" in line["class"] and len(line["points"].split()) == 5 and (np.diff(height(line)) > 0).all(), "falling"
        assert all(len(lines) == 1 for title, lines in page.plots.items() if title != "mse")
    assert compare.PUBLISHED_MSE == {10_000: 0.3270, 20_000: 0.3175, 40_000: 0.3109, 60_000: 0.3073, 80_000: 0.3045}


def ticks(page, title):
    """The largest number on the horizontal axis of a plot."""
    svg = re.search(rf'aria-label="{title}".*?</svg>', page.html, re.DOTALL)[0]
    return max(float(text.replace(",", "")) for text in re.findall(r'text-anchor="middle">([\d,.e]+)<', svg))


def test_curves_over_images_and_hours(tmp_path, compared):
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", batch=512)
    page, _ = compared(a, b, "--x", "images")
    assert "images seen" in page.text and 120_000 <= ticks(page, "loss") <= 300 * 512
    page, _ = compared(a, b, "--x", "hours")
    assert "hours in training" in page.text and 1 <= ticks(page, "loss") <= 1.5


def test_the_first_steps_may_be_left_out(tmp_path, compared):
    page, _ = compared(made_run(tmp_path / "a", steps=range(100, 1100, 100)), "--skip", "500")
    assert len(page.plots["loss"][0]["points"].split()) == 5 and ticks(page, "loss") == 1000


def test_values_between_others_are_joined(tmp_path, compared):
    """A held-out loss at every third line is a line, not dots."""
    run = made_run(tmp_path / "a", steps=range(100, 1000, 100))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[::3]:
        line["valid_mse"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, _ = compared(run)
    assert len(page.plots["held-out mse, averaged weights"][0]["points"].split()) == 3


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, compared):
    page, _ = compared(made_run(tmp_path / "x" / "run"), made_run(tmp_path / "y" / "run"))
    assert page.rows[""] == ["x/run", "y/run"]


def test_hostile_names_and_values_stay_text(tmp_path, compared):
    page, _ = compared(made_run(tmp_path / "<script>alert(1)<"), made_run(tmp_path / "b", model="'<b onload=x>'"))
    assert "<script>alert(1)<" in page.text and "<b onload=x>" in page.text


def test_lines_that_a_kill_cut_short_are_left_out_and_said_in_one_line(tmp_path, compared):
    run = made_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 400, "lo')
    page, said = compared(run)
    assert "compare  a: 1 line(s) of metrics.jsonl could not be read and are left out\n" in said and "a: 1 line(s)" in page.text
    assert page.rows["steps"] == ["300"]


@pytest.mark.parametrize("words, said", [
    (["{root}/absent"], "absent: no such run folder"), (["{root}"], "not a run folder"),
    (["{root}/empty"], "metrics.jsonl: no logged step in it; compare runs that have begun"),
    (["{root}/damaged"], "metrics.jsonl: no logged step in it"), (["{root}/a", "{root}/../{name}/a"], "given twice"),
    (["{root}/a", "{root}/broken"], "config.yaml"), (["{root}/bare", "--x", "images"], "images cannot be counted; take --x step"),
    (["{root}/a", "--x", "hours", "--reference"], "--reference"), (["{root}/a", "--skip", "-1"], "--skip: must be 0 or more"),
    (["{root}/a", "--out", "{root}"], "--out: "), ([], "required: RUN"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "a")
    for name, text in (("empty", ""), ("damaged", "{]\nnothing\n"), ("bare", '{"step": 1, "loss": 2.0}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (made_run(tmp_path / "broken") / "config.yaml").write_text("a: [1\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *(word.format(root=tmp_path, name=tmp_path.name) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(made_run(tmp_path / "a")), "--dry-run"]) == 0
    assert "a: 3 logged steps" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_runs_that_are_trained_here_compare(tiny, compared):
    page, _ = compared(tiny.dit_run, tiny.tokenizer_run)
    assert len(page.plots["loss"]) == 2 and len(page.plots["mse"]) == 1 and page.rows["stage"] == ["LightningDiT", "tokenizer"]


def test_compare_needs_no_torch(tmp_path):
    run = made_run(tmp_path / "a")
    code = f"import sys; from vavae_fast.cli import main; main(['compare', {str(run)!r}, '--out', {str(tmp_path / 'c.html')!r}])"
    assert subprocess.run([sys.executable, "-c", code + "; sys.exit('torch' in sys.modules)"]).returncode == 0
