# SPDX-License-Identifier: Apache-2.0
"""What a user may choose when a model is fused. Set by the command line, read by the passes and matchers."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from faexport.errors import ModelError, NotVerifiedError

if TYPE_CHECKING:  # slow to import, and the command line reads this file
    import onnx_ir as ir

TARGETS = ("onnxruntime", "cuda", "tensorrt")  # cuda: onnxruntime with its CUDA provider
DEVICES = ("cpu", "cuda")  # where onnxruntime can compare the models
FP8 = "fp8"
DTYPES = {"fp16": "FLOAT16", "bf16": "BFLOAT16", FP8: "FLOAT8E4M3FN"}  # of --dtype: the names in onnx_ir.DataType
VERIFY_TIMEOUT = 600.0  # seconds for one run of a model, and for loading it


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose. The command line's options of the same names set them."""

    assume_right_padding: bool = False  # a padding mask from an input masks a tail: it becomes lengths
    fallback: bool = True  # carry the operator as a function of standard ops, so that the file runs without our library
    # Run the attention core in this type; None keeps the model's. float8e4m3fn: a run from file to file only, since its
    # factors are measured.
    dtype: ir.DataType | None = None
    float32: str = ""  # how GPUs multiply float32 attention: "tf32", "tf32x3"; empty: as the runtime is set
    opset: int | None = None  # convert the model to this opset of ONNX first; None keeps the model's
    target: str = "onnxruntime"  # one of TARGETS: the runtime that the file is written for
    # Join what stands around attention into onnxruntime's operators; None: where that is the target.
    rest: bool | None = None
    fp16: bool = False  # the whole model in float16; a run from file to file only, since it takes measuring
    bf16: bool = False  # likewise in bfloat16
    keep_io_types: bool = True  # with fp16 or bf16: inputs and outputs of the model stay float32
    assume_full_rows: bool = False  # each query attends a key, or what it yields is never used
    assume_zeros_and_ones: bool = False  # masks made of numbers hold 0 and 1: the comparison draws nothing else
    assume_scores_unquantized: bool = False  # attention that was quantized inside may be computed without that

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target is '{self.target}'; expected {' or '.join(TARGETS)}")
        if self.float32 not in ("", "tf32", "tf32x3"):
            raise ValueError(f"float32 is '{self.float32}'; expected tf32, tf32x3, or nothing")
        if self.opset is not None and not isinstance(self.opset, int):
            raise ValueError(f"opset is {self.opset!r}; expected a number, or None")
        if isinstance(self.dtype, str):
            raise ValueError(f"dtype is '{self.dtype}'; expected an onnx_ir.DataType, such as DataType.FLOAT16")
        dtype = None if self.dtype is None else self.dtype.name
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype is {dtype}; expected {', '.join(DTYPES.values())}, or None")
        if why := contradiction(self, dtype, lambda name, value: f"{name}={value}"):
            raise ValueError(why)

    @property
    def half(self) -> str:
        """What the whole model becomes, as the name of an onnx_ir.DataType; "" where it keeps its types."""
        return "FLOAT16" if self.fp16 else "BFLOAT16" if self.bf16 else ""

    @property
    def float8(self) -> bool:
        """Is attention computed in float8?"""
        return self.dtype is not None and self.dtype.name == "FLOAT8E4M3FN"

    @property
    def joins_rest(self) -> bool:
        """Are operators of onnxruntime written for what stands around attention?"""
        return self.target != "tensorrt" if self.rest is None else self.rest

    @property
    def joins_cuda(self) -> bool:
        """Also those that have CUDA kernels only? They know float32 and float16."""
        return self.target == "cuda" and self.joins_rest and not self.bf16


def contradiction(chosen: Any, dtype: str | None, spell: Callable[[str, Any], str]) -> str:
    """Which options exclude one another, or need another that is missing, in a sentence; "" where all fit.

    Args:
        chosen: Options, or the command line's, with fields of the same names.
        dtype: the precision of attention alone, as the caller calls it.
        spell: how the caller writes an option, given its name and its value.
    """
    half = {name: spell(name, True) for name in ("fp16", "bf16")}
    given = [spell("dtype", dtype)] if dtype else []
    given += [text for name, text in half.items() if getattr(chosen, name)]
    if len(given) > 1:
        why = f"; {spell('dtype', dtype)} is of attention alone, the others of the whole model" if dtype else ""
        return f"{' and '.join(given)} exclude one another, give one of them{why}"
    if not chosen.keep_io_types and not (chosen.fp16 or chosen.bf16):
        return f"{spell('keep_io_types', False)} needs {' or '.join(half.values())}"
    if chosen.float32 and dtype and dtype not in (FP8, DTYPES[FP8]):
        return (
            f"{spell('float32', chosen.float32)} is of attention in float32, and {spell('dtype', dtype)} asks for "
            "another precision; give one of them"
        )
    if chosen.rest and chosen.target == "tensorrt":
        return (
            f"{spell('rest', True)} writes operators of onnxruntime, which {spell('target', chosen.target)} doesn't "
            "run; leave one of them out"
        )
    return ""


# optimize()'s arguments that the command line calls otherwise.
_ARGUMENTS = {"o": "out", "verify_timeout": "timeout"}
_VALUES = "|".join([*TARGETS, *DEVICES, *DTYPES, r"\d+", "SECONDS", r"(?i:file)\.npz"])
_TYPED = re.compile(
    rf"(?<![^\s(])(?:--assume (?P<assumed>[a-z-]+)|--?(?P<name>[a-z][a-z0-9-]*)(?: (?P<value>{_VALUES})\b)?)"
)


@contextlib.contextmanager
def named_as_in_python() -> Iterator[None]:
    """Errors of the body name options as arguments of optimize() and fields of Options, not by what is typed."""
    try:
        yield
    except (ModelError, NotVerifiedError) as error:
        error.args = (as_in_python(str(error)),)
        raise


def as_in_python(sentence: str) -> str:
    """A sentence that names options of the command line: "choose another place with out", "verify=False would …"."""
    return _TYPED.sub(_argument, sentence)


def _argument(found: re.Match[str]) -> str:
    if found["assumed"]:
        return f"assume_{found['assumed'].replace('-', '_')}=True"
    name, value = found["name"].replace("-", "_"), found["value"]
    if name.startswith("no_"):
        name, value = name.removeprefix("no_"), "False"
    elif name == "dtype" and value:
        value = f"DataType.{DTYPES[value]}"
    elif value and not value.isdigit() and value != "SECONDS":
        value = f'"{value}"'
    return _ARGUMENTS.get(name, name) + (f"={value}" if value else "")
