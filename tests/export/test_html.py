# SPDX-License-Identifier: Apache-2.0
"""The report as a page: what it says, that it asks for nothing over the network, and, where Chromium is installed, what
axe-core says of its accessibility and that nothing is cut off on a narrow screen."""

from __future__ import annotations

import html
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from faexport import pipeline
from faexport.commands import bench_view
from faexport.commands.bench_data import Measured, Row, Timing
from faexport.files import model_io
from faexport.report import advice, blocks, html_page
from faexport.report.data import Report
from faexport.spec import Refusal, RefusalKind

from tests import packages
from tests.export import big_model
from tests.export.commands import assert_bad_input, here
from tests.export.test_report import example, layers

AXE = "axe-core@4.10.3"
EMPTY = {"meta", "br", "link", "img", "input", "hr", "path", "rect"}  # have no end tag, or close themselves in SVG
PAGE = pathlib.Path(__file__).parents[2] / "docs/not-fused.md"


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order; collects text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def drawn() -> tuple[Report, dict]:
    """A report of a real model of three equal layers, and its drawings."""
    proto = big_model.encoder(big_model.EncoderSize(3, 4, 16))
    fused, report = pipeline.run(model_io.load(proto))
    return report, blocks.find_blocks(model_io.load(proto), fused)


def test_a_block_is_what_went_and_what_came() -> None:
    report, found = drawn()
    for site in report.sites:
        before, after = found[site.name]
        names = [box.op_type for box in before.boxes]
        assert names.count("Softmax") == 1
        assert names.count("MatMul") == 6, "with the projections, which became one, and the output's, of another bias"
        assert [box.op_type for box in after.boxes if box.op_type].count("faexport::FlashAttention") == 1
        assert after.num_nodes < before.num_nodes
        for block in (before, after):
            assert all(0 <= end < len(block.boxes) for arrow in block.arrows for end in arrow)
            reached = {start for start, _ in block.arrows}
            assert reached | {0} == set(range(len(block.boxes))), "every box leads to the result, the first"


def test_a_block_ends_at_the_sum_in_front_of_a_normalization() -> None:
    """Which one node computes with it, where they were joined."""
    original, fused = (
        ir.from_proto(onnx.parser.parse_model(f"""
            <ir_version: 9, opset_import: ["": 17, "com.microsoft": 1, "faexport": 1]>
            g (float[2,4,8,16] q, float[2,4,16,8] k, float[2,4,8,16] x, float[16] scale) => (float[2,4,8,16] z) {{
              {body} z = Add(total, y)
            }}"""))
        for body in (
            "s = MatMul(q, k) w = Softmax(s) o = MatMul(w, x) total = Add(x, o) y = LayerNormalization(total, scale)",
            "a = faexport.FlashAttention(q, k, x) "
            "y, mean, deviation, total = com.microsoft.SkipLayerNormalization(x, a, scale)",
        )
    )  # fmt: skip
    (before, after), *_ = blocks.find_blocks(original, fused).values()
    assert [box.op_type for box in before.boxes if box.op_type] == ["Add", "MatMul", "Softmax", "MatMul"]
    assert after.num_nodes == 2


def test_the_page_has_everything_and_asks_for_nothing() -> None:
    report, found = drawn()
    text = html_page.page(report, found)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("svg") == 2, "one block of three equal ones"
    assert "3 equal layers" in page.text and "3 of 3 attention sites fused" in page.text
    for site in report.sites:
        assert site.name in page.text
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not any(name in ("src", "href", "srcset", "action") for _, attrs in page.tags for name in attrs)
    assert "url(" not in text and "@import" not in text
    assert set(re.findall(r"\w+://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}, "a name, which nothing loads"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": html_page.POLICY}) in page.tags


def test_refusals_say_what_to_do_and_the_verification_is_shown() -> None:
    page = Page(html_page.page(layers()))
    assert "21 equal layers" in page.text and "22 of 24 attention sites fused" in page.text
    for site in (3, 20):
        refusal = layers().sites[site].refusal
        kind, reason = advice.advice(refusal), refusal.reason
        assert reason in page.text and kind.meaning in page.text and kind.action in page.text
    assert "/layers.0/Trilu" in page.text, "from which nodes a fact was proven"
    assert "present.0…23.key" in page.text and "Passed" in page.text and "2.3e-05" in page.text
    failed = Page(html_page.page(example()))
    assert "Failed: why" in failed.text and "what was not compared" in failed.text and "inf" in failed.text


def test_names_can_t_break_the_page() -> None:
    proto = big_model.encoder(big_model.EncoderSize(1, 4, 16))
    for node in proto.graph.node:
        node.name = f"{node.name}<script>alert('&\"')</script>"
    fused, report = pipeline.run(model_io.load(proto))
    page = Page(html_page.page(report, blocks.find_blocks(model_io.load(proto), fused)))
    assert "script" not in {tag for tag, _ in page.tags} and "<script>" in page.text


def test_each_kind_of_reason_has_its_advice_and_its_row_in_the_page() -> None:
    text = PAGE.read_text()
    assert [kind.kind for kind in advice.KINDS] == list(RefusalKind)
    for kind in advice.KINDS:
        assert advice.advice(Refusal("said in other words", "n", kind.kind)) is kind
        assert f"| {kind.example} | {kind.meaning} | {kind.action} | `{kind.kind}` |" in text, kind.example


def test_the_command_writes_the_page_over_nothing_but_a_page(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(big_model.encoder(big_model.EncoderSize(1, 4, 16)), model)
    page = tmp_path / "report.html"
    for _ in range(2):
        assert here("inspect", model, "--html", page).returncode == 0
    assert "1 of 1 attention site fused" in Page(page.read_text()).text
    assert here(model, "--no-verify", "--html", page, "-q").returncode == 0
    assert "model.fa.onnx" in Page(page.read_text()).text
    for other in ("{}", "<svg/>"):
        page.write_text(other)
        assert_bad_input(here("inspect", model, "--html", page), "is there already and is not a report", "--html")
        assert_bad_input(here("bench", model, "--html", page), "is there already and is not a report", "--html")
    assert_bad_input(here("bench", model, "--svg", page), "is there already and is not a report", "--svg")
    assert page.read_text() == "<svg/>"
    assert_bad_input(here("inspect", model, "--html", model), "overwrite", "--html")


def chromium(*arguments: str) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def axe() -> str:
    """axe-core's source, from npm; skips where it can't be had."""
    folder = packages.CACHE / "axe"
    source = folder / "node_modules/axe-core/axe.min.js"
    if not source.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        command = ["npm", "install", "--silent", "--prefix", os.fspath(folder), AXE]
        if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode:
            pytest.skip("npm can't install axe-core")
    return source.read_text()


def in_chromium(page: str, script: str, tmp_path: pathlib.Path, width: int) -> dict:
    """What a script, an expression that may be a promise, finds on the page in a window of this width."""
    (tmp_path / "page.html").write_text(page.replace(html_page.POLICY, ""))  # which forbids scripts
    end = f"""<script>Promise.resolve({script}).then(found => {{
        document.body.innerHTML = ''; document.body.dataset.found = JSON.stringify(found)}})</script>"""
    (tmp_path / "frame.html").write_text((tmp_path / "page.html").read_text().replace("</body>", f"{end}</body>"))
    url = (tmp_path / "frame.html").as_uri()
    dom = chromium(f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", url)
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_and_nothing_is_cut_off(width: int, tmp_path: pathlib.Path) -> None:
    report, found = drawn()
    report.sites += layers().sites
    report.verification = layers().verification
    rules = "['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']"
    script = f"""(() => {{ {axe()} }})() || axe.run(document, {{runOnly: {rules}}}).then(result => ({{
        violations: result.violations.map(one => [one.id, one.nodes[0].html]), passes: result.passes.length,
        overflow: document.documentElement.scrollWidth - innerWidth}}))"""
    half = Timing(0.1, 0.09, 0.11, 20), Timing(0.05, 0.04, 0.06, 20)
    rows = [Row({"ids": [1, length]}, *(Measured(one, 10**6 * length, 0.3) for one in half)) for length in (64, 128)]
    measured = html_page.bench(bench_view.picture(rows, "model.onnx"), ["it pays from ids 1x64 on"])
    result = in_chromium(html_page.page(report, found, measured), script, tmp_path, width)
    assert result["violations"] == [] and result["passes"] > 10
    assert result["overflow"] <= 0, "wide tables and drawings scroll by themselves"
