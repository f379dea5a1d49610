# SPDX-License-Identifier: Apache-2.0
"""Two GPUs in one process: each call runs where its tensors are, and the caller's current device stays what it was."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import onnxruntime as ort
import pytest

from tests import cases, tolerances
from tests.plugin import nodes
from tests.problems import Problem

torch = pytest.importorskip("torch")
from tests.gpu import arrays  # noqa: E402

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.two_gpus,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
CASES = [
    cases.Case("float16", 2, 8, 2, 1, 4096, 128),  # split keys, in a workspace
    cases.Case("float16", 12, 11, 11, 250, 330, 64, is_causal=True),  # a tile counter
    cases.Case("float16", 2, 4, 2, 17, 65, 64, past=31, is_causal=True),
    cases.Case("float32", 2, 4, 2, 17, 65, 64, mask="B1QK", empty=True, empty_row="mean"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("current", (0, 1))
def test_arrays_on_both(case: cases.Case, current: int) -> None:
    problem = case.problem()
    torch.cuda.set_device(current)
    results = []
    for device in (0, 1, 0, 1):
        inputs = {name: arrays.to_cuda(array).to(f"cuda:{device}") for name, array in problem.inputs.items()}
        for kernel in arrays.kernels_for(inputs, problem.attributes):
            outputs = arrays.run(problem, inputs, kernel)
            torch.cuda.synchronize(device)
            tolerances.check({name: arrays.to_numpy(t) for name, t in outputs.items()}, problem)
            assert all(t.device.index == device for t in outputs.values())
        results.append(outputs)
        assert torch.cuda.current_device() == current
    for name in results[0]:
        assert arrays.same_bits(results[0][name].cpu(), results[1][name].cpu()), name


@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider")
def test_sessions_on_both() -> None:
    """Which device is current afterwards is onnxruntime's affair: making a session makes its device current."""
    problems = [case.problem() for case in CASES]
    torch.cuda.set_device(0)
    work = []
    for problem in problems:
        model = nodes.make_model(problem.inputs, problem.attributes, problem.outputs)
        for device in ("0", "1"):
            made = nodes.session(model, [(CUDA, {"device_id": device, "use_tf32": "0"})])
            assert made.get_providers()[0] == CUDA
            work.append((problem, made))

    def run(item: tuple[Problem, ort.InferenceSession]) -> dict[str, np.ndarray]:
        problem, made = item
        names = [output.name for output in made.get_outputs()]
        return dict(zip(names, made.run(None, nodes.feeds(problem.inputs)), strict=True))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for (problem, _), outputs in zip(work * 10, pool.map(run, work * 10), strict=True):
            tolerances.check(outputs, problem)
