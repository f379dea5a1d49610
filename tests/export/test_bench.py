# SPDX-License-Identifier: Apache-2.0
"""`faexport bench`: its figures are those that one measures by hand, and what it says of them is so."""

from __future__ import annotations

import html
import json
import pathlib
import statistics
import time
import xml.etree.ElementTree

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from faexport.commands import bench, bench_view, terminal
from faexport.commands.bench_data import Measured, Row, Timing
from faexport.feeds import inputs
from faexport.runtimes import operator_library, ort_session
from onnx import TensorProto, helper

from tests.export import big_model
from tests.export.commands import assert_bad_input, here

pytestmark = pytest.mark.skipif(not ort_session.has_library(), reason="the operator's library was not built")
SIZE = big_model.EncoderSize(1, 4, 16)
LENGTH = 384
SHAPE = f"hidden_states:2x{LENGTH}x{SIZE.hidden}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("bench") / "model.onnx"
    onnx.save(big_model.encoder(SIZE), path)
    return path


def by_hand(model: pathlib.Path) -> float:
    """Median seconds of a run of the original."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {"hidden_states": np.random.default_rng(1).standard_normal((2, LENGTH, SIZE.hidden), np.float32)}
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def test_figures_are_those_of_an_independent_timing(model: pathlib.Path) -> None:
    """Within a factor of the range that the timing by hand gives before and after: other tests run beside this one."""
    before = by_hand(model)
    found = bench.measure(model, [SHAPE], bench.Limits(runs=10))
    after = by_hand(model)
    (row,) = found.rows
    assert found.notes == [] and row.sizes == {"hidden_states": [2, LENGTH, SIZE.hidden]}
    assert min(before, after) / 2.5 <= row.original.seconds.median <= 2.5 * max(before, after)
    for measured in (row.original, row.fused):
        assert 0 < measured.seconds.low <= measured.seconds.median <= measured.seconds.high
        assert measured.seconds.num_runs >= 5 and 0.1 < measured.rewritten < 1
    scores = 2 * SIZE.heads * LENGTH * LENGTH * 4
    assert scores <= row.original.bytes < 20 * scores, "the original makes the scores"
    assert row.original.bytes - row.fused.bytes > scores / 2, "the fused one does not"


def test_the_command_prints_json_and_draws(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = here("bench", model, "--shape", SHAPE, "--shape", SHAPE.replace("2x", "1x"), "--runs", "5", "--json",
                "--svg", tmp_path / "b.svg", "--html", tmp_path / "b.html")  # fmt: skip
    data = json.loads(done.stdout)
    assert done.returncode == 0 and [row["sizes"]["hidden_states"][0] for row in data["rows"]] == [2, 1]
    assert data["device"] == "cpu"
    assert {"sizes", "original", "fused", "times_as_fast", "gained"} == set(data["rows"][0])
    root = xml.etree.ElementTree.parse(tmp_path / "b.svg").getroot()
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(circles) == 8 and "hidden_states 2x384" in root.attrib["aria-label"]
    page = html.unescape((tmp_path / "b.html").read_text())
    assert page.count("<circle") == 8 and data["conclusion"] in page and "1 of 1 attention site fused" in page


@pytest.mark.gpu
@pytest.mark.skipif(ort_session.CUDA not in onnxruntime.get_available_providers(), reason="no CUDA provider")
def test_a_gpu_is_measured_where_there_is_one(model: pathlib.Path) -> None:
    done = here("bench", model, "--shape", SHAPE.replace("2x", "8x"), "--json")
    (row,) = json.loads(done.stdout)["rows"]
    assert json.loads(done.stdout)["device"] == "cuda" and row["original"]["rewritten"] is None
    assert all(1e-5 < row[name]["seconds"]["median"] < 1 for name in ("original", "fused"))
    # Which is larger isn't compared: so small a model takes no more than what others allocate on the GPU meanwhile.
    assert all(row[name]["bytes"] is None or row[name]["bytes"] >= 0 for name in ("original", "fused"))


@pytest.mark.skipif(ort_session.CUDA in onnxruntime.get_available_providers(), reason="there is a CUDA provider")
def test_a_gpu_that_is_not_there_is_one_line(model: pathlib.Path) -> None:
    done = here("bench", model, "--shape", SHAPE, "--device", "cuda")
    assert_bad_input(done, "error: onnxruntime can't use a GPU here; --device cpu measures on the CPU")


def test_a_gpu_is_not_measured_by_kernels_of_the_cpu(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would run the node on the CPU, between copies."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort_session.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(operator_library, "has_cuda_kernels", lambda: False)
    said = "was built without CUDA kernels; install the wheel faplugin_cu13"
    assert_bad_input(here("bench", model), said, "--device cpu measures on the CPU")
    with pytest.raises(ort_session.CannotRun, match=said):
        ort_session.SessionHere(ort_session.Job(str(model), device="cuda"))


@pytest.mark.parametrize("padded", [False, True])
def test_entries_are_padded_where_it_is_asked(padded: bool) -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("ids", "attention_mask", "y")]
    add = helper.make_node("Add", ["ids", "attention_mask"], ["y"])
    model = ir.from_proto(helper.make_model(helper.make_graph([add], "g", values[:2], values[2:]), ir_version=9))
    specs = inputs.input_specs(model)
    (tensors,) = bench._settings(specs, ["ids:8x64"], bench._drawing(specs, padded))
    lengths = tensors["attention_mask"].sum(1)
    assert lengths[0] == 64 and (lengths.min() < 64) == padded
    assert (np.diff(tensors["attention_mask"]) <= 0).all(), "padding is on the right"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [("float[b,s,8]", [(1, n, 8) for n in bench.LENGTHS]), ("float[b,3,8]", [(n, 3, 8) for n in bench.BATCHES]),
     ("float[2,3,8]", [(2, 3, 8)])],
)  # fmt: skip
def test_the_ladder_has_each_size_once(shape: str, sizes: list[tuple[int, ...]]) -> None:
    """Of lengths; of batches where there is one length; or the one size that the model has."""
    text = f'<ir_version: 9, opset_import: ["": 17]> g ({shape} x) => ({shape} y) {{ y = Identity(x) }}'
    specs = inputs.input_specs(ir.from_proto(onnx.parser.parse_model(text)))
    found = bench._settings(specs, [], bench._drawing(specs, padded=False))
    assert [tensors["x"].shape for tensors in found] == sizes


def timing(median: float, spread: float = 0.001) -> Timing:
    return Timing(median, median - spread, median + spread, 20)


def row(length: int, original: float, fused: float, spread: float = 0.001) -> Row:
    measured = [Measured(timing(seconds, spread), 10**6, 0.3) for seconds in (original, fused)]
    return Row({"ids": [1, length]}, *measured)


def test_a_row_is_told_as_soon_as_it_is_measured(model: pathlib.Path) -> None:
    shapes = ("--shape", f"hidden_states:1x4x{SIZE.hidden}", "--shape", f"hidden_states:1x8x{SIZE.hidden}")
    done = here("bench", model, *shapes, "--runs", "5", "--device", "cpu", "--json")
    rows = json.loads(done.stdout)["rows"]
    for row, line in zip(rows, done.stderr.splitlines(), strict=True):
        sizes = "x".join(map(str, row["sizes"]["hidden_states"]))
        assert line.startswith(f"hidden_states {sizes}: {row['original']['seconds']['median'] * 1e3:.3g} ±")
        assert f" ms, fused {row['fused']['seconds']['median'] * 1e3:.3g} ±" in line
        assert f"{row['times_as_fast']:.2f} ×" in line
    assert here("bench", model, *shapes[:2], "--runs", "5", "--device", "cpu", "--quiet").stderr == ""


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    odd = Row({"ids[/b]": [1, 64]}, *(Measured(timing(0.1), None, None) for _ in range(2)))
    terminal.console().print(bench_view.table([odd]))
    assert "ids[/b] 1x64" in capsys.readouterr().out


def test_the_conclusion_says_where_it_pays_or_that_it_does_not() -> None:
    even, slower, faster, much = row(64, 0.1, 0.099), row(128, 0.1, 0.2), row(256, 0.1, 0.05), row(512, 0.4, 0.1)
    assert bench.conclusion([even, faster, much]) == "it pays from ids 1x256 on: 4.00 times as fast at ids 1x512"
    assert bench.conclusion([faster, much]) == "4.00 times as fast at ids 1x512"
    assert "nothing is gained at ids 1x64" in bench.conclusion([faster, even])
    wide = row(128, 0.1, 0.02, spread=0.09)
    assert not wide.gained and wide.times_as_fast > faster.times_as_fast
    assert bench.conclusion([wide, faster]) == "it pays from ids 1x256 on: 2.00 times as fast at ids 1x256"
    assert (
        "no time is gained at these sizes, where what is rewritten takes up to 30% of the original's time"
        in bench.conclusion([even, slower])
    )
    unknown = Row({"ids": [1, 64]}, *(Measured(timing(0.1), None, None) for _ in range(2)))
    assert bench.conclusion([unknown]).startswith("no time is gained at this size; less than")
    assert [column.header for column in bench_view.table([unknown]).columns][-1] == "memory MB"
    assert bench_view.picture([unknown], "m").count("<circle") == 2, "no memory is drawn where none was measured"
    assert not row(64, 0.1, 0.05, spread=0.03).gained, "the runs' spread is as wide as the gain"


def test_what_can_t_be_measured_is_one_line(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert_bad_input(here("bench", model, "--shape", "ids:1x2"), "no input 'ids'", "hidden_states")
    assert_bad_input(
        here("bench", model, "--shape", "hidden_states:1x2x3"), "does not fit the model's [batch, sequence, 64]"
    )
    assert_bad_input(here("bench", model, "--shape", "hidden_states"), "is not a shape")
    assert_bad_input(here("bench", model, "--padded"), "the model has no mask", "hidden_states")
    assert_bad_input(here("bench", tmp_path / "nowhere.onnx"), "no such file")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, ir_version=9), tmp_path / "plain.onnx")
    assert_bad_input(here("bench", tmp_path / "plain.onnx"), "nothing is fused")
    del values[0].type.tensor_type.shape.dim[0]
    values[0].type.tensor_type.shape.dim.add()  # a size without a name
    onnx.save(
        helper.make_model(helper.make_graph(graph.node, "g", values[:1], []), ir_version=9), tmp_path / "any.onnx"
    )
    assert_bad_input(here("bench", tmp_path / "any.onnx", "--shape", "x:5x7"), "does not fit the model's [4, any]")
    assert here(model, "-o", tmp_path / "fused.onnx", "--no-verify", "-q").returncode == 0
    assert_bad_input(here("bench", tmp_path / "fused.onnx"), "is fused already; give the model that it was made from")


@pytest.mark.parametrize("command", (["bench", "{}"], ["build", "{}"], ["run", "{}", "--inputs", "{}"]))
def test_bad_input_ends_in_json_too(command: list[str], tmp_path: pathlib.Path) -> None:
    """Whatever stops it first: a file that isn't there, or TensorRT that isn't installed."""
    missing = str(tmp_path / "missing")
    done = here(*(word.format(missing) for word in command), "--json")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(json.loads(done.stdout)["error"].splitlines()[-1])
