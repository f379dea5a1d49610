# SPDX-License-Identifier: Apache-2.0
"""The arguments and options that several commands share. Imports nothing heavy: `faexport --help` reads this file."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import click

from faexport.options import Options


class _Named(click.Path):
    """The name of a file or folder."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not str(value):  # as of a shell's variable that isn't set; it would be the folder that we are in
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


class _File(_Named):
    """The name of a file. A path loses the slash at its end, which says that a folder is meant."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if str(value).endswith(("/", os.sep)):
            self.fail(f"{value} is a folder; give the name of a file", param, ctx)
        return super().convert(value, param, ctx)


class _FileOrFolder(_File):
    """The name of a file, or of a folder that is there."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        folder = os.path.isdir(value)
        return _Named.convert(self, value, param, ctx) if folder else super().convert(value, param, ctx)


class Seconds(click.ParamType):
    """A length of time that clocks can count."""

    name = "seconds"
    most = 1e7

    def __init__(self, least: float) -> None:
        self.least = least

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = click.FLOAT.convert(value, param, ctx)
        if not self.least <= seconds <= self.most:  # NaN is neither
            self.fail(f"{value} is no number of seconds from {self.least:g} to {self.most:g}", param, ctx)
        return seconds


FILE = _File(path_type=pathlib.Path)  # what a file must be is checked by output.py, whose errors say what to do
FILE_OR_FOLDER = _FileOrFolder(path_type=pathlib.Path)
FOLDER = _Named(path_type=pathlib.Path)  # which may be new
PLACE = _Named(path_type=str)  # a file or a folder, which may be new: as it was given, since a slash says which

model_argument = click.argument("model", type=FILE)
models_argument = click.argument("models", metavar="MODEL...", type=FILE_OR_FOLDER, nargs=-1, required=True)
model_or_folder_argument = click.argument("model", type=FILE_OR_FOLDER)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
report_option = click.option(
    "--report", "report_file", metavar="FILE", type=FILE, help="Also write the report as JSON to this file."
)
html_option = click.option(
    "--html", "html_file", metavar="FILE", type=FILE, help="Also write the report as one HTML page to this file."
)
strict_option = click.option(
    "--strict", is_flag=True, help="Exit with 4 where a site is left as it is or nothing can be fused."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
opset_option = click.option(
    "--opset", metavar="N", type=click.IntRange(min=7), help="Convert the model to this ONNX opset first."
)
assume_option = click.option(
    "--assume",
    type=click.Choice(["right-padding", "full-rows", "zeros-and-ones", "scores-unquantized"]),
    metavar="WHAT",
    multiple=True,
    help="What a model can't tell; may be repeated. right-padding: every mask input keeps the first tokens of a row. "
    "full-rows: each query sees a key, or its output is never used. zeros-and-ones: mask inputs of numbers hold "
    "0 and 1 only, so that nothing else is compared. scores-unquantized: attention whose scores, masks or weights are "
    "quantized may be computed without that rounding, nearer to the model before it was quantized.",
)


def assumed(what: tuple[str, ...]) -> Options:
    """The defaults, with what --assume names."""
    return Options(
        assume_right_padding="right-padding" in what,
        assume_full_rows="full-rows" in what,
        assume_zeros_and_ones="zeros-and-ones" in what,
        assume_scores_unquantized="scores-unquantized" in what,
    )


def gathered(**groups: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command those of its options that belong together as one argument: a dataclass with a field for each."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathering(**given: Any) -> None:
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            command(**given)

        return gathering

    return decorate
