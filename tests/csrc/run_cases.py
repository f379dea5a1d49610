# SPDX-License-Identifier: Apache-2.0
"""python -m tests.csrc.run_cases MODULE [backward]: a sample of the cases on a compiled fa_csrc.

A process of its own, used where an instruction set (FA_CPU_ISA) or a sanitizer must be there from the start. Exit 1
where one is wrong.
"""

from __future__ import annotations

import pathlib
import sys

from tests import cases, reference_backward, tolerances
from tests.csrc import conftest, test_attention_cpu, test_backward_cpu


def check_forward(fa_csrc, case) -> None:
    problem = case.problem()
    tolerances.check(test_attention_cpu.run(fa_csrc, problem, num_threads=2, corrupt=True), problem)


def check_backward(fa_csrc, case) -> None:
    problem = case.problem()
    status, results, d_out, d_lse = test_backward_cpu.run(fa_csrc, problem, True, num_threads=2, corrupt=True)
    assert status == (0, ""), status
    reference_backward.check(results, problem, d_out, d_lse)


def main(path: str, direction: str = "forward") -> int:
    fa_csrc = conftest.load(pathlib.Path(path))
    wrong = 0
    forward = (check_forward, cases.quick()[::7] + test_attention_cpu.LARGE)
    backward = (check_backward, test_backward_cpu.CASES[::7] + test_backward_cpu.LARGE)
    check, sample = backward if direction == "backward" else forward
    for case in sample:
        try:
            check(fa_csrc, case)
        except AssertionError as error:
            wrong += 1
            print(f"{case}: {error}")
    if direction == "forward":
        test_attention_cpu.test_wild_lengths_and_offsets_stay_in_their_tensors(fa_csrc)
    print(f"{len(sample) - wrong} of {len(sample)} cases right")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
