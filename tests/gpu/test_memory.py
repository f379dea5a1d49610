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


def appended(present: tuple[torch.Tensor, torch.Tensor], past: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The output of one step behind 40 rows of one head, written to `present`."""
    import faplugin

    torch.manual_seed(1)
    new = [torch.randn(1, 1, 1, 64, dtype=torch.float16, device="cuda") for _ in range(3)]
    out = {"present_key": present[0], "present_value": present[1]}
    output, *_ = faplugin.attention(*new, past_key=past[0], past_value=past[1], return_present=True, out=out)
    return output


def test_rows_may_be_appended_in_place_to_keys_and_values_alike() -> None:
    """Where those of the past keep their places."""
    torch.manual_seed(0)
    past = [torch.randn(1, 1, 40, 64, dtype=torch.float16, device="cuda") for _ in range(2)]
    memory = [torch.cat([x, torch.full_like(x[:, :, :1], float("nan"))], 2) for x in past]
    apart = [torch.full_like(x, float("nan")) for x in memory]
    expected = appended(tuple(apart), tuple(past))
    for wrong in ((memory[0], apart[1]), (memory[1], memory[0])):
        before = [x.clone() for x in memory]
        with pytest.raises(ValueError, match="present_(key|value) (is the memory of its past|shares memory with past)"):
            appended(wrong, tuple(x[:, :, :40] for x in memory))
        torch.cuda.synchronize()
        assert all(arrays.same_bits(x, y) for x, y in zip(memory, before, strict=True))
    assert arrays.same_bits(appended(tuple(memory), tuple(x[:, :, :40] for x in memory)), expected)
    assert all(arrays.same_bits(x, y) for x, y in zip(memory, apart, strict=True))
