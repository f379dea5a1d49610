# SPDX-License-Identifier: Apache-2.0
"""The conformance host on the compiled plugin: by dlopen alone, through real registries of TensorRT, and on a GPU."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest

from tests import cases, tolerances
from tests.plugin.trt import case_file
from tests.plugin.trt.conftest import registry_library

NUM_GPU_CASES = 600


def drive(host: pathlib.Path, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [os.fspath(host / "fa_trt_host"), *map(os.fspath, map(str, args))]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def assert_passed(done: subprocess.CompletedProcess[str], least_checks: int) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    num_checks = int(done.stdout.split()[-4])
    assert num_checks > least_checks, done.stdout[-300:]


def test_build_phase(host, plugin, quick_cases):
    assert_passed(drive(host, "--plugin", plugin, "--cases", quick_cases), 100_000)


def test_an_engine_of_hopper_reserves_memory_for_other_gpus_too(host, plugin, tmp_path):
    """Of a fixed shape, so many splits of the keys that Ampere's kernel needs more than Hopper's."""
    path = tmp_path / "decoding.cases"
    case_file.write(path, [cases.Case("float16", 1, 8, 8, 1, 8192, 64)])
    done = drive(host, "--plugin", plugin, "--cases", path)
    assert_passed(done, 100)


@pytest.mark.parametrize("version", ["11.4", "10.15"])
def test_build_phase_through_a_real_registry(host, plugin, quick_cases, version):
    done = drive(host, "--plugin", plugin, "--cases", quick_cases, "--tensorrt", registry_library(version))
    assert_passed(done, 100_000)
    assert f"registry of TensorRT {version}." in done.stdout


@pytest.mark.parametrize("version", ["11.4", "10.15"])
def test_build_phase_after_the_registrar(host, plugin, quick_cases, version):
    registrar = pathlib.Path(plugin).with_name("libfa_trt_registrar.so")
    library = registry_library(version)
    done = drive(host, "--plugin", registrar, "--cases", quick_cases, "--tensorrt", library, "--registrar")
    assert_passed(done, 100_000)


def test_the_registrar_without_tensorrt_says_so(plugin):
    registrar = pathlib.Path(plugin).with_name("libfa_trt_registrar.so")
    script = f"import ctypes; ctypes.CDLL({os.fspath(registrar)!r})"
    done = subprocess.run(["python3", "-c", script], capture_output=True, text=True, check=True)
    assert "no TensorRT library is loaded" in done.stderr


FAULTS = {
    "wrong_cast": "capability PLUGIN_V3ONE_BUILD",
    "shape_off_by_one": "getOutputShapes of output 0",
    "kept_pointer": "serialised attribute",
    "reads_later_formats": "supportsFormatCombination reads later entries",
}


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_the_host_finds_a_deliberate_fault(host, plugin, quick_cases, fault):
    faulty = host / "libfa_trt_faulty.so"
    done = drive(host, "--plugin", faulty, "--cases", quick_cases, FA_FAULT=fault, FA_PLUGIN=plugin)
    if fault == "none":
        assert_passed(done, 100_000)
    else:
        assert done.returncode == 1
        assert FAULTS[fault] in done.stdout


def test_a_refused_field_is_told_on_stderr(host, plugin, quick_cases):
    done = drive(host, "--plugin", plugin, "--cases", quick_cases)
    assert "[faplugin] FlashAttention 'probe': alignment is 'left'" in done.stderr
    assert "there is no attribute 'no_such_attribute'; expected some of q_num_heads, kv_num_heads" in done.stderr
    assert "the engine has a field 'later_attribute' that this version of the plugin doesn't know" in done.stderr


def gpu_cases() -> list[cases.Case]:
    """Decoding, wide heads, float8, then kinds, dtypes and head sizes of the enumeration, then random ones; none large
    to compare."""
    decode = [
        cases.Case(dtype, 2, 8, 2, rows, 2048, head_dim, is_causal=True, alignment="bottom_right")
        for dtype in cases.DTYPES
        for rows in (1, 2, 4)
        for head_dim in (64, 128)
    ]
    wide = [
        cases.Case(dtype, 1, 2, 1, rows, 200, head_dim, is_causal=rows > 100)
        for dtype in ("float16", "bfloat16")
        for rows in (64, 129, 150)
        for head_dim in (264, 384, 512)
    ]
    float8 = [case for case in cases.float8() if cases.fits_float8_kernel(case) and case.work <= 2_000_000]
    small = [case for case in cases.systematic() if case.work <= 2_000_000]
    step = max(1, 2 * len(small) // NUM_GPU_CASES)
    return [*decode, *wide, *float8, *small[::step], *cases.randomized(NUM_GPU_CASES // 2, seed=3)]


def drive_gpu(
    host: pathlib.Path, plugin: object, folder: pathlib.Path, chosen: list[cases.Case], prefix=(), **environment: str
) -> tuple[subprocess.CompletedProcess[str], pathlib.Path]:
    path, data, output = (folder / name for name in ("gpu.cases", "inputs.bin", "outputs.bin"))
    case_file.write(path, chosen, data)
    args = ["--plugin", plugin, "--cases", path, "--gpu", "--data", data, "--output", output]
    command = [*prefix, os.fspath(host / "fa_trt_host"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done, output


def compare(item: tuple[cases.Case, dict[int, bytes]]) -> list[str]:
    """What is wrong with the outputs of one case; equal outputs of two tactics are looked at once."""
    case, outputs = item
    problem = case.problem()
    problem.attributes = {"float32_precision": "tf32"} | problem.attributes  # TensorRT's default
    expected = tolerances.expectation(problem, float8_weights=True)
    wrong = []
    for content in set(outputs.values()):
        tactics = [tactic for tactic, other in outputs.items() if other == content]
        try:
            tolerances.check(case_file.split_outputs(content, case, problem), expected)
        except AssertionError as error:
            wrong.append(f"{case.id}, tactics {tactics}: {error}")
    return wrong


def run_and_compare(
    host: pathlib.Path, plugin: str, folder: pathlib.Path, chosen: list[cases.Case]
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The host on some cases, and what is wrong with its outputs."""
    folder.mkdir()
    done, output = drive_gpu(host, plugin, folder, chosen)
    wrong = itertools.chain(*map(compare, case_file.read_outputs(output, chosen))) if done.returncode == 0 else []
    return done, list(wrong)


def run_in_parallel(
    host: pathlib.Path, plugin: str, folder: pathlib.Path, chosen: list[cases.Case]
) -> tuple[collections.Counter[int], int, list[str]]:
    """Cases run by each tactic, checks made by the host, and what is wrong. Several hosts share the GPU."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for the children: one process for each core instead
    num_parts = min(os.cpu_count() or 1, 12)
    parts = [(host, plugin, folder / str(part), chosen[part::num_parts]) for part in range(num_parts)]
    with concurrent.futures.ProcessPoolExecutor(num_parts, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_and_compare, *zip(*parts, strict=True)))
    num_run, num_checks, num_short, wrong = collections.Counter(), 0, 0, []
    for done, found in results:
        if done.returncode:
            wrong.append(done.stdout[-1000:] + done.stderr[-500:])
        for tactic, count in re.findall(r"tactic (\d+) ran (\d+) cases", done.stdout):
            num_run[int(tactic)] += int(count)
        num_short += int((re.findall(r"refused (\d+) workspaces", done.stdout) or [0])[0])
        num_checks += int((re.findall(r"(\d+) checks", done.stdout) or [0])[-1])
        wrong += found
    assert num_short > 0, "no workspace was offered that is short by a byte"
    return num_run, num_checks, wrong


@pytest.mark.gpu
def test_runtime_phase(host, plugin, tmp_path):
    chosen = gpu_cases()
    assert len(chosen) >= 500
    num_run, num_checks, wrong = run_in_parallel(host, plugin, tmp_path, chosen)
    print(
        f"cases by tactic {dict(num_run)}, {num_checks} checks, all outputs compared with float64, {len(wrong)} wrong"
    )
    assert not wrong, "\n".join(wrong[:20])
    assert num_run[0] == len(chosen)
    assert all(count >= 30 for count in num_run.values()), "every kernel ran"


@pytest.mark.gpu
def test_the_host_finds_a_workspace_that_is_short_by_a_byte(host, plugin, tmp_path):
    faulty = host / "libfa_trt_faulty.so"
    environment = {"FA_FAULT": "workspace_short", "FA_PLUGIN": os.fspath(plugin)}
    done, _ = drive_gpu(host, faulty, tmp_path, gpu_cases()[:9], **environment)
    assert done.returncode == 1
    assert "canaries round outputs and workspace" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("tool", "count"), [("memcheck", 60), ("racecheck", 6)])
def test_compute_sanitizer(host, plugin, tmp_path, tool, count):
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        pytest.skip("compute-sanitizer is not installed")
    smallest = sorted(gpu_cases(), key=lambda case: case.work)[: NUM_GPU_CASES // 3]
    chosen = smallest[:: len(smallest) // count]
    start = time.perf_counter()
    done, _ = drive_gpu(host, plugin, tmp_path, chosen, prefix=[sanitizer, "--tool", tool, "--error-exitcode", "9"])
    print(f"{tool}: {len(chosen)} cases in {time.perf_counter() - start:.0f} s\n{done.stdout[-1000:]}")
    assert done.returncode == 0, done.stdout[-3000:]
