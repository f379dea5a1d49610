# SPDX-License-Identifier: Apache-2.0
"""Memory of a call on CUDA arrays: results and workspace where the arrays' framework is unknown."""

from __future__ import annotations

import pytest

from tests import cases, tolerances
from tests.dlpack_only import DLPackOnly

torch = pytest.importorskip("torch")
from tests.gpu import arrays  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [
    cases.Case("float16", 2, 8, 2, 1, 4096, 128, lse=False),  # split keys need a workspace
    cases.Case("float32", 2, 4, 2, 17, 65, 64, mask="B1QK", empty=True, empty_row="mean", lse=False),
], ids=str)  # fmt: skip
def test_results_with_out_need_no_framework(case: cases.Case) -> None:
    import faplugin

    problem = case.problem()
    inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
    attributes = {name: x for name, x in problem.attributes.items() if not name.startswith("optional_")}
    out = torch.full_like(faplugin.attention(**inputs, **attributes), float("nan"))
    foreign = {name: DLPackOnly(tensor) for name, tensor in inputs.items()}
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        faplugin.attention(**foreign, **attributes, out={"output": DLPackOnly(out)}, stream=stream.cuda_stream)
        torch.cuda.synchronize()
        tolerances.check({"output": arrays.to_numpy(out)}, problem)
        out.fill_(float("nan"))
