# SPDX-License-Identifier: Apache-2.0
"""Standard streams that are closed, full, or no place for a model."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import onnx
import pytest
from faexport.runtimes import ort_session

from tests.export import big_model, commands
from tests.export.commands import assert_bad_input, faexport

SIZE = big_model.EncoderSize(2, 4, 16)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    onnx.save(big_model.encoder(SIZE), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_input_of_this_process_is_no_model(model: pathlib.Path) -> None:
    """Verification reads the model in other processes, which have another input."""
    with model.open("rb") as file:
        command = [sys.executable, "-m", "faexport", "/dev/stdin"]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=False, timeout=60)
    assert_bad_input(done, "/dev/stdin: is another file in each process", "give the file's name")
    assert_bad_input(faexport("-", cwd=model.parent), "-: a model is read more than once, so not from stdin")


@pytest.mark.skipif(not ort_session.has_library(), reason="the operator's library was not built")
@pytest.mark.parametrize("streams", [">&-", ">&- 2>&- <&-"])
def test_closed_streams_lead_nowhere(streams: str, model: pathlib.Path) -> None:
    """Nothing that is opened takes their place, where native code would print into it."""
    target = model.with_name("fused.onnx")
    command = f'exec "{sys.executable}" -m faexport "$0" -o "$1" {streams}'
    done = subprocess.run(["sh", "-c", command, model, target], env=commands.environment(), capture_output=True)
    assert done.returncode == 0 and b"rror" not in done.stderr, done.stderr
    assert sum(node.op_type == "FlashAttention" for node in onnx.load(target).graph.node) == SIZE.layers


def test_a_full_disk_behind_stdout_is_no_defect_of_ours() -> None:
    for argument in ("--help", "--version"):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "faexport", argument]
            done = subprocess.run(
                command, env=commands.environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
            )
        assert done.returncode == 2
        assert done.stderr == "error: cannot be written: No space left on device; free some space\n"
