# SPDX-License-Identifier: Apache-2.0
"""python -m tests.csrc.run_cases MODULE: a sample of the cases on a compiled fa_csrc, in a process of its own.

Used where an instruction set (FA_CPU_ISA) or a sanitizer must be there from the start. Exit 1 where one is wrong.
"""

from __future__ import annotations

import pathlib
import sys

from tests import cases, tolerances
from tests.csrc import conftest, test_attention_cpu


def main(path: str) -> int:
    fa_csrc = conftest.load(pathlib.Path(path))
    wrong = 0
    sample = cases.quick()[::7] + test_attention_cpu.LARGE
    for case in sample:
        problem = case.problem()
        try:
            tolerances.check(test_attention_cpu.run(fa_csrc, problem, num_threads=2, corrupt=True), problem)
        except AssertionError as error:
            wrong += 1
            print(f"{case}: {error}")
    test_attention_cpu.test_wild_lengths_and_offsets_stay_in_their_tensors(fa_csrc)
    print(f"{len(sample) - wrong} of {len(sample)} cases right")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
