# SPDX-License-Identifier: Apache-2.0
"""Builds TensorRT engines from ONNX files, with the package `tensorrt` or `tensorrt_rtx`: nearly the same API.

Called by build.py. Whatever a user can have done wrong, or TensorRT refuses, is a ModelError: one line.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import importlib
import os
import pathlib
import re
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from faexport.errors import ModelError
from faexport.files.output import write_file

Shape = tuple[int, ...]


class Runtime(enum.StrEnum):
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


# Import names, in order: the package, and the bindings that its wheels carry.
MODULES = {
    Runtime.TENSORRT: ("tensorrt",),
    Runtime.TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
LARGEST_SIZE = 2**31 - 1  # of an axis
OLDEST_RTX_TARGET = 80  # without a GPU we build for every one from Ampere on: fp32 models don't compile for Turing


@dataclasses.dataclass(frozen=True)
class Range:
    """Shapes of one input that an engine must serve, and the one it is tuned for."""

    min: Shape
    opt: Shape
    max: Shape


Profile = Mapping[str, Range]  # by input name


@dataclasses.dataclass(frozen=True)
class Options:
    """How to build. Each of the `profiles` names all inputs with sizes that the model leaves open."""

    profiles: Sequence[Profile] = ()
    workspace_bytes: int | None = None  # None: what the GPU has
    timing_cache: pathlib.Path | None = None  # read if it exists, written afterwards
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: Sequence[int] = ()  # TensorRT-RTX: 89 for 8.9; empty: this GPU's, or all if there is none
    on_log: Callable[[str], None] = lambda line: None


@dataclasses.dataclass
class EngineReport:
    """What was built."""

    runtime: str
    version: str
    num_layers: int  # of the network that TensorRT got; it fuses them further
    seconds: float = 0.0
    engine_bytes: int = 0
    profiles: list[dict[str, Range]] = dataclasses.field(default_factory=list)
    compute_capabilities: list[int] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def find_runtime(wanted: Runtime | None = None) -> tuple[Runtime, types.ModuleType]:
    """The TensorRT asked for, else `tensorrt`, else `tensorrt_rtx`. Raises ModelError where there is none."""
    broken = ""
    for runtime in [wanted] if wanted else list(Runtime):
        for name in MODULES[runtime]:
            try:
                return runtime, importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    broken = broken or f"{name} can't be imported: {error}"
            except (ImportError, OSError, RuntimeError) as error:
                broken = broken or f"{name} can't be imported: {error}"
    if broken:
        raise ModelError(f"TensorRT is not usable: {broken}")
    what = {
        None: "pip install tensorrt, or tensorrt-rtx-cu13, which takes no plugins and builds attention as it was",
        Runtime.TENSORRT: "pip install tensorrt",
        Runtime.TENSORRT_RTX: "pip install tensorrt-rtx-cu13",
    }
    raise ModelError(
        f"no {'TensorRT-RTX' if wanted is Runtime.TENSORRT_RTX else 'TensorRT'} is installed: {what[wanted]}"
    )


def has_gpu() -> bool:
    """Is there a driver and at least one GPU?"""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


class Monitor:
    """What is told of a build's progress. Phases are named by TensorRT and lie inside each other."""

    def start(self, phase: str, parent: str | None, num_steps: int) -> None: ...

    def step(self, phase: str, step: int) -> bool:
        """False stops the build."""
        return True

    def finish(self, phase: str) -> None: ...


class EngineBuilder:
    """One build: a network parsed from a file, then an engine.

    Args:
        runtime, module: from find_runtime().
        options: how to build.
    """

    def __init__(self, runtime: Runtime, module: types.ModuleType, options: Options) -> None:
        self._runtime, self._trt, self._options = runtime, module, options
        self._logger = _make_logger(module, options.on_log)
        if runtime is Runtime.TENSORRT and not has_gpu():
            raise ModelError("TensorRT's builder needs a GPU, and there is none here; TensorRT-RTX builds without one")
        self._builder = module.Builder(self._logger)
        if not self._builder:
            raise ModelError(f"TensorRT's builder does not start: {self._reason()}")
        self._network = self._builder.create_network(_network_flags(module))

    def parse(self, model: pathlib.Path) -> None:
        """Reads the ONNX file. Raises ModelError that names the nodes which TensorRT doesn't take."""
        parser = self._trt.OnnxParser(self._network, self._logger)
        if parser.parse_from_file(os.fspath(model)):
            return
        errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ModelError(f"{model}: TensorRT's parser refuses {'; '.join(errors[:3]) or self._reason()}{more}")

    def build(self, monitor: Monitor) -> tuple[bytes | Any, EngineReport]:
        """The serialized engine and its report. Raises ModelError, or KeyboardInterrupt where monitor stopped it."""
        report = EngineReport(self._runtime.value, self._trt.__version__, self._network.num_layers)
        config = self._configure(report)
        config.progress_monitor = watcher = _make_watcher(self._trt, monitor)
        start = time.perf_counter()
        engine = self._builder.build_serialized_network(self._network, config)
        report.seconds = time.perf_counter() - start
        if watcher.stopped:
            raise KeyboardInterrupt
        if engine is None:
            raise ModelError(f"TensorRT can't build the engine: {self._reason()}")
        report.engine_bytes = engine.nbytes
        self._write_timing_cache(config)
        return engine, report

    def _reason(self) -> str:
        return self._logger.errors[0] if self._logger.errors else "it gives no reason"

    def _configure(self, report: EngineReport) -> Any:
        trt, options = self._trt, self._options
        config = self._builder.create_builder_config()
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if self._runtime is Runtime.TENSORRT_RTX:
            self._configure_rtx(config, report)
        elif options.compute_capabilities:
            raise ModelError(
                "--compute-capability is TensorRT-RTX's; TensorRT builds for its own GPU, see --hardware-compatible"
            )
        elif options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        self._read_timing_cache(config)
        self._add_profiles(config, report)
        return config

    def _configure_rtx(self, config: Any, report: EngineReport) -> None:
        if self._options.timing_cache:
            raise ModelError("--timing-cache: TensorRT-RTX has none, it tunes kernels when the engine is loaded")
        if self._options.hardware_compatible:
            raise ModelError(
                "--hardware-compatible is TensorRT's; with TensorRT-RTX name the GPUs with --compute-capability"
            )
        known = {
            value.value: value
            for name, value in self._trt.ComputeCapability.__members__.items()
            if name.startswith("SM")
        }
        chosen = list(self._options.compute_capabilities)
        if unknown := [number for number in chosen if number not in known]:
            names = ", ".join(_dotted(number) for number in known)
            raise ModelError(
                f"--compute-capability {_dotted(unknown[0])}: TensorRT-RTX {self._trt.__version__} builds for {names}"
            )
        if not chosen and has_gpu():
            return
        if not chosen:
            chosen = [number for number in known if number >= OLDEST_RTX_TARGET]
            names = ", ".join(_dotted(number) for number in chosen)
            report.notes.append(f"no GPU here: built for compute capabilities {names} (--compute-capability chooses)")
        config.num_compute_capabilities = len(chosen)
        for index, number in enumerate(chosen):
            config.set_compute_capability(known[number], index)
        report.compute_capabilities = chosen

    def _add_profiles(self, config: Any, report: EngineReport) -> None:
        inputs = [self._network.get_input(index) for index in range(self._network.num_inputs)]
        names = [tensor.name for tensor in inputs]
        for profile in self._options.profiles:
            if unknown := sorted(profile.keys() - set(names)):
                raise ModelError(f"the model has no input '{unknown[0]}'; its inputs are {', '.join(names)}")
        for profile in self._options.profiles or [{}]:
            _check_all_are_named(profile, inputs)
            added = self._builder.create_optimization_profile()
            ranges = {}
            for tensor in inputs:
                shape = tuple(tensor.shape)
                ranges[tensor.name] = _range(tensor, profile.get(tensor.name))
                if -1 in shape:
                    set_shape = added.set_shape_input if tensor.is_shape_tensor else added.set_shape
                    set_shape(tensor.name, *dataclasses.astuple(ranges[tensor.name]))
            if config.add_optimization_profile(added) < 0:
                raise ModelError(f"TensorRT refuses the shapes: {self._reason()}")
            report.profiles.append(ranges)

    def _read_timing_cache(self, config: Any) -> None:
        path = self._options.timing_cache
        if path is None:
            return
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ModelError(f"{path}: the timing cache can't be read: {error.strerror}") from error
        self._cache = config.create_timing_cache(content)
        if not config.set_timing_cache(self._cache, False):
            raise ModelError(f"{path}: the timing cache is of another TensorRT or GPU; delete it or name another file")

    def _write_timing_cache(self, config: Any) -> None:
        path = self._options.timing_cache
        if path is None:
            return
        write_file(path, config.get_timing_cache().serialize())


def parse_shape(text: str) -> tuple[str, Shape]:
    """ "ids:1x128" -> ("ids", (1, 128)). Names may hold colons; the last one counts. Raises ModelError."""
    name, colon, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.lower().replace(",", "x").split("x"))
    except ValueError:
        shape = (-1,)
    if not colon or not name or min(shape) < 0:
        raise ModelError(f"'{text}' is not a shape: expected NAME:D0xD1x…, e.g. input_ids:1x128")
    return name, shape


def parse_shapes(text: str) -> list[tuple[str, Shape]]:
    """One shape, or several as trtexec takes them: "ids:1x128,mask:1x128". Raises ModelError."""
    return [parse_shape(part) for part in re.split(r",(?=[^,]*:)", text)]


def make_profile(least: Sequence[str], best: Sequence[str], most: Sequence[str]) -> Profile:
    """Ranges from --min, --opt and --max: one that is not given is the nearest that is. Raises ModelError."""
    given = [dict(pair for text in texts for pair in parse_shapes(text)) for texts in (least, best, most)]
    profile = {}
    for name in dict.fromkeys(name for shapes in given for name in shapes):
        low, middle, high = (shapes.get(name) for shapes in given)
        near = next(shape for shape in (middle, high, low) if shape is not None)
        profile[name] = check_range(name, Range(low or near, near, high or near))
    return profile


def check_range(name: str, given: Range) -> Range:
    """`given`, where its shapes have one rank and sizes that TensorRT takes, in order; else raises ModelError."""
    for shape in dataclasses.astuple(given):
        if any(not 0 <= size <= LARGEST_SIZE for size in shape):
            raise ModelError(f"input '{name}': {shape_text(shape)}; sizes are from 0 to {LARGEST_SIZE}")
    if not len(given.min) == len(given.opt) == len(given.max):
        raise ModelError(f"input '{name}': min, opt and max have different ranks")
    if any(not low <= middle <= high for low, middle, high in zip(given.min, given.opt, given.max, strict=True)):
        shown = ", ".join(shape_text(shape) for shape in dataclasses.astuple(given))
        raise ModelError(f"input '{name}': min, opt and max are not in order: {shown}")
    return given


def shape_text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _dotted(compute_capability: int) -> str:
    return f"{compute_capability // 10}.{compute_capability % 10}"


def _check_all_are_named(profile: Profile, inputs: Sequence[Any]) -> None:
    """Raises ModelError where an input with open sizes (-1) is not in the profile: only the user knows which ones the
    engine is to serve."""
    missing = [tensor for tensor in inputs if -1 in tuple(tensor.shape) and tensor.name not in profile]
    if not missing:
        return
    asked = ", ".join(f"'{tensor.name}' ({_model_shape(tensor)})" for tensor in missing)
    name, shape = missing[0].name, tuple(missing[0].shape)
    small, large = (f"{name}:{shape_text(tuple(n if size < 0 else size for size in shape))}" for n in (1, 8))
    raise ModelError(
        f"which sizes shall the engine serve? The model leaves them open for {asked}; say so for each, e.g. "
        f"--min {small} --opt {large} --max {large}"
    )


def _model_shape(tensor: Any) -> str:
    """Of a network's input: its sizes, the names that the model gives to open ones, or "any" where it gives none."""
    sizes = enumerate(tensor.shape)
    return declared(size if size >= 0 else tensor.get_dimension_name(axis) for axis, size in sizes)


def declared(sizes: Iterable[int | str | None]) -> str:
    """A shape as a model declares it, e.g. "[batch, any, 64]"; None: it says nothing of a size."""
    return f"[{', '.join(str(size) if isinstance(size, int) else size or 'any' for size in sizes)}]"


def _range(tensor: Any, given: Range | None) -> Range:
    """The range of a network's input, in whose shape -1 is a size that is open."""
    shape = tuple(tensor.shape)
    if given is None:
        return Range(shape, shape, shape)
    for corner in dataclasses.astuple(given):
        if len(corner) != len(shape) or any(
            size not in (-1, wanted) for size, wanted in zip(shape, corner, strict=True)
        ):
            wanted_shape = _model_shape(tensor)
            raise ModelError(f"input '{tensor.name}': {shape_text(corner)} does not fit the model's {wanted_shape}")
    return given


def _network_flags(trt: types.ModuleType) -> int:
    """Strongly typed: tensors keep the model's types. TensorRT 11 knows nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _describe(error: Any) -> str:
    """A parser error as "node 'name' (op type): reason"."""
    name = error.node_name() or f"number {error.node()}"
    reason = " ".join(error.desc().split())
    if quoted := re.search(r'"(.+)"$', reason):  # an assertion with its text: creator && "Plugin not found, …"
        reason = quoted.group(1)
    if reason in ("", "false"):
        reason = "this operator is not supported"
    return f"node '{name}' ({error.node_operator() or 'unknown'}): {reason}"


def _make_logger(trt: types.ModuleType, on_log: Callable[[str], None]) -> Any:
    """A logger of this TensorRT that keeps the errors and passes everything on."""

    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(message.split())
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(line)
            on_log(f"[{severity.name.lower()}] {line}")

    return Logger()


def _make_watcher(trt: types.ModuleType, monitor: Monitor) -> Any:
    """A progress monitor of this TensorRT. Ctrl-C in a callback stops the build at its next step."""

    base: Any = trt.IProgressMonitor

    class Watcher(base):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._guard(monitor.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._guard(monitor.step, phase_name, step) is not False and not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            self._guard(monitor.finish, phase_name)

        def _guard(self, call: Callable[..., Any], *args: Any) -> Any:
            try:
                return call(*args)
            except KeyboardInterrupt:
                self.stopped = True
                return False

    return Watcher()
