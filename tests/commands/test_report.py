"""Pages: well nested, self-contained, hostile text harmless, numbers where they belong; and `report` on whole, short and broken runs."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vavae_fast.commands import _html, report
from vavae_fast.errors import BadInput

HOSTILE = "</style></script><script>alert(1)</script>\"' onload='x & <b>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects elements and their text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return "".join(self.texts)


def checked(html: str) -> Page:
    """The page, after what holds for every page: nesting, no script, no event handler, nothing from elsewhere."""
    parsed = Page(html)
    assert not {"script", "link", "iframe", "object", "b"} & {tag for tag, _ in parsed.elements}
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?://", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert "@import" not in html and "url(" not in html
    return parsed


def made_run(folder, steps=40, **extra):
    folder.mkdir()
    (folder / "config.yaml").write_text("train:\n  max_steps: 40\n")
    (folder / "manifest.json").write_text(json.dumps({"kind": "run", "stage": "LightningDiT", "versions": {"torch": "2.13"}, "command": ["a", "b"]}))
    lines = [
        dict(step=n, loss=1 / n, mse=0.8 / n, cos=0.2 / n, lr=1e-3, grad_norm=3.0 / n, images_per_second=100.0 + n, data_wait=0.01,
             memory_gb=1.5, seconds=2.0, skipped=0.0, **extra) for n in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page_of(folder) -> str:
    return report.run(report.plan(None, Namespace(run_dir=folder))).read_text(encoding="utf-8")


def image_sizes(parsed: Page) -> list[tuple[int, int]]:
    datas = [attributes["src"].removeprefix("data:image/png;base64,") for attributes in parsed.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(data))).size for data in datas]


# -- pieces ----------------------------------------------------------------------------------------------------------


def test_every_piece_escapes_its_text():
    series = {HOSTILE: [(1, 2.0), (2, 3.0)]}
    body = "".join([
        _html.paragraph(HOSTILE), _html.preformatted(HOSTILE, HOSTILE), _html.table([(HOSTILE, HOSTILE), (HOSTILE, HOSTILE)]),
        _html.svg_lines(series, HOSTILE, x_label=HOSTILE), _html.scatter(np.eye(2), [HOSTILE, "1"], HOSTILE),
        _html.figure(_html.png_grid(np.zeros((1, 2, 2), np.uint8), 1, alt=HOSTILE), HOSTILE),
        _html.svg_lines({}, HOSTILE),
    ])  # fmt: skip
    parsed = checked(_html.page(HOSTILE, [(HOSTILE, body)]))
    assert parsed.text.count("alert(1)") == 17
    assert parsed.all("svg")[0]["aria-label"] == HOSTILE and parsed.all("img")[0]["alt"] == HOSTILE


def test_table_right_aligns_numbers_and_shows_what_is_missing():
    parsed = checked(_html.page("t", [("h", _html.table([("what", "a", "b"), ("row", 0.00123456, None), ("other", 12345.6, True)]))]))
    assert [cell.get("class") for cell in parsed.all("td")] == ["n", None, "n", None]
    for text in ("0.001235", "–", "12,346", "True"):
        assert text in parsed.texts


def test_line_goes_where_its_values_are():
    """A straight line in the data is one on the page; higher values are higher up; the ends are inside the axes."""
    svg = _html.svg_lines({"a": [(x, 2.0 * x) for x in range(11)]}, "t")
    points = np.array([p.split(",") for p in re.search(r'points="([^"]*)"', svg)[1].split()], float)
    steps = np.diff(points, axis=0)
    assert np.allclose(steps, steps.mean(0), atol=0.11) and (steps[:, 0] > 0).all() and (steps[:, 1] < 0).all()
    assert 62 < points[0, 0] and points[-1, 0] < 508 and 10 < points[-1, 1] and points[0, 1] < 238


def test_logarithmic_axis_makes_a_power_of_ten_one_length():
    svg = _html.svg_lines({"a": [(0, 1e-3), (1, 1e-2), (2, 1e-1), (3, 1.0)]}, "t", log=True)
    y = np.array([p.split(",")[1] for p in re.search(r'points="([^"]*)"', svg)[1].split()], float)
    assert np.allclose(np.diff(y), np.diff(y).mean(), atol=0.11)


@pytest.mark.parametrize("log, gap", [(False, None), (False, math.nan), (False, math.inf), (True, 0.0), (True, -1.0)])
def test_values_that_cannot_be_drawn_break_the_line(log, gap):
    svg = _html.svg_lines({"a": [(1, 1.0), (2, 2.0), (3, gap), (4, 2.0), (5, 1.0)]}, "t", log=log)
    assert svg.count("<polyline") == 2
    assert "nan" not in svg and "inf" not in svg


def test_a_single_value_is_a_dot_and_none_is_said():
    assert '<circle class="dot' in _html.svg_lines({"a": [(5, 0.25)]}, "t")
    assert "no values" in _html.svg_lines({"a": [(1, None)], "b": []}, "t")


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7), (0.1001, 0.1002), (1e-9, 3e-9), (0, 4.0e6), (250, 250.5)])
@pytest.mark.parametrize("log", [False, True])
def test_axes_have_a_few_round_ticks_inside(low, high, log):
    if log and low <= 0:
        low = high / 1e4
    axis = _html._Axis([low, high], log, 0.0, 100.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 16
    assert ticks == sorted(set(ticks)) and all(-0.01 <= axis.place(t) <= 100.01 for t in ticks)


def test_long_runs_stay_small_and_keep_their_spikes():
    values = [(n, 1.0) for n in range(100_000)]
    values[77_777] = (77_777, 50.0)
    svg = _html.svg_lines({"a": values}, "t")
    points = re.search(r'points="([^"]*)"', svg)[1].split()
    assert len(points) <= 700
    heights = [float(p.split(",")[1]) for p in points]
    assert min(heights) < 30 < 210 < max(heights)


def test_grid_places_images_row_by_row_and_enlarges_without_smoothing():
    images = np.arange(5, dtype=np.uint8).repeat(12).reshape(5, 2, 2, 3) * 40
    (image,) = checked(_html.page("t", [("h", _html.png_grid(images, columns=3, scale=4))])).all("img")
    assert (image["width"], image["height"], image["class"]) == ("24", "16", "exact")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
    assert sheet.shape == (4, 6, 3)
    assert [[int(sheet[r, c, 0]) for c in (0, 2, 4)] for r in (0, 2)] == [[0, 40, 80], [120, 160, 0]]


def test_wrong_arrays_are_named():
    with pytest.raises(ValueError, match="uint8"):
        _html.png_grid(np.zeros((1, 2, 2, 3)), 1)
    with pytest.raises(ValueError, match="2 labels|and 3"):
        _html.scatter(np.zeros((2, 2)), [1, 2, 3], "t")


def test_scatter_has_a_dot_a_point_and_a_name_a_class():
    html = _html.scatter(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 3, "latents")
    assert len(checked(_html.page("t", [("h", html)])).all("circle")) == 30
    assert re.findall(r"</i>(.*?)</span>", html) == ["0", "1", "2"]


# -- report ----------------------------------------------------------------------------------------------------------


def test_report_shows_curves_samples_scores_manifest_and_config(tmp_path):
    folder = made_run(tmp_path / "xl", extra_value=2.0)
    (folder / "samples").mkdir()
    for step in (10, 20):
        Image.new("RGB", (48, 32), (step, 0, 0)).save(folder / "samples" / f"step_{step:08d}.png")
    (folder / "metrics.json").write_text(json.dumps({"fid": 2.11, "sampler": {"steps": 250}}))
    parsed = checked(page_of(folder))
    titles = [svg["aria-label"] for svg in parsed.all("svg")]
    assert titles[:1] == ["loss"] and {"gradient norm", "learning rate", "peak memory, GB", "extra_value"} <= set(titles)
    assert image_sizes(parsed) == [(48, 32), (48, 32)]
    assert parsed.text.index("step_00000020") < parsed.text.index("step_00000010")
    for text in ("LightningDiT: xl", "2.11", "sampler.steps", "versions.torch", "max_steps: 40", "0.02222"):
        assert text in parsed.text
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "manifest.json", "metrics.json", "metrics.jsonl", "report.html", "samples"]


def test_report_of_a_tokenizer_run_draws_its_losses(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    keys = "loss nll rec perceptual kl g_loss d_loss mdms mcos vf_weight d_weight".split()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n} | dict.fromkeys(keys, 1.0 / n)) + "\n" for n in (20, 40)))
    titles = [svg["aria-label"] for svg in checked(page_of(folder)).all("svg")]
    assert titles == ["loss", "negative log-likelihood, per image", "reconstruction", "KL to the prior, nats an image", "alignment (VF)",
                      "adversary", "adaptive weights"]  # fmt: skip


@pytest.mark.parametrize(
    "name, text", [("config.yaml", ""), ("metrics.jsonl", ""), ("metrics.jsonl", '{"step": 1, "loss": null}\n'), ("manifest.json", "{}")]
)
def test_report_of_a_run_that_has_hardly_begun(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "Summary" in checked(page_of(tmp_path)).text


def test_lines_that_a_kill_cut_short_are_left_out_and_counted(tmp_path):
    folder = made_run(tmp_path / "run", steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1, 2]\n{"step": 4, "lo')
    text = checked(page_of(folder)).text
    assert "2 line(s) of metrics.jsonl could not be read" in text


def test_a_step_logged_twice_counts_once_and_the_last_time_wins(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(dict(step=n, loss=v)) + "\n" for n, v in ((1, 9.0), (2, 9.0), (2, 4.5), (1, 7.0))))
    plan = report.plan(None, Namespace(run_dir=tmp_path))
    assert [(s["step"], s["loss"]) for s in plan.steps] == [(1, 7.0), (2, 4.5)]


def test_hostile_run_contents_stay_text(tmp_path):
    folder = made_run(tmp_path / "<img src=x onerror=alert(1)>", **{HOSTILE: 1.0})
    (folder / "config.yaml").write_text(f"a: {HOSTILE}\n")
    (folder / "manifest.json").write_text(json.dumps({"stage": HOSTILE, HOSTILE: [HOSTILE]}))
    (folder / "metrics.json").write_text(json.dumps([HOSTILE, {HOSTILE: None}]))
    (folder / "samples").mkdir()
    (folder / "samples" / "<b>.png").write_bytes(b"<script>alert(1)</script>")
    parsed = checked(page_of(folder))
    assert not parsed.all("img") and "is not a readable image" in parsed.text


def test_of_many_samples_the_first_and_the_newest_are_among_the_few_shown(tmp_path):
    folder = made_run(tmp_path / "run")
    (folder / "samples").mkdir()
    for step in range(1, 31):
        Image.new("RGB", (4, 4)).save(folder / "samples" / f"step_{step:08d}.png")
    text = checked(page_of(folder)).text
    assert text.count("step_000000") == report._MOST_PICTURES and "step_00000001" in text and "step_00000030" in text


def test_what_is_no_run_folder_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadInput, match="no such run folder"):
        report.plan(None, Namespace(run_dir=tmp_path / "absent"))
    with pytest.raises(BadInput, match="not a run folder"):
        report.plan(None, Namespace(run_dir=tmp_path))
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"manifest\.json"):
        report.plan(None, Namespace(run_dir=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_command_line(tmp_path):
    folder = made_run(tmp_path / "run")
    run = [sys.executable, "-m", "vavae_fast", "report", str(folder)]
    dry = subprocess.run([*run, "--dry-run"], capture_output=True, text=True)
    assert (dry.returncode, (folder / "report.html").exists()) == (0, False) and "40 logged steps" in dry.stdout
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "report.html").is_file(), done.stderr
    wrong = subprocess.run([*run[:-1], str(tmp_path / "absent")], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


def test_report_needs_no_torch():
    code = "import sys; from vavae_fast.commands import _html, report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
