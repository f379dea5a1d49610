# SPDX-License-Identifier: Apache-2.0
"""The command `faexport deploy`: a model, its configuration and the operator's library as a Triton model repository.

cli.py adds it; triton.py knows the configuration. What is slow to import is imported when the command runs.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
from collections.abc import Iterator

import click

from faexport.commands import terminal
from faexport.commands.shared_options import FOLDER, model_argument, quiet_option
from faexport.errors import ModelError
from faexport.files.output import check_input, model_stem, write_file, writing
from faexport.files.signals import uninterrupted

EXAMPLES = """\b
Examples:
  faexport deploy model.fa.onnx --triton repository
  faexport deploy model.fa.onnx --triton repository --mounted-at /models
"""
MOST = 2**31 - 1  # the numbers of config.pbtxt are int32


@click.command(
    epilog=EXAMPLES, context_settings=terminal.CONTEXT_SETTINGS, short_help="Write a Triton model repository."
)
@model_argument
@click.option(
    "--triton",
    "folder",
    metavar="DIR",
    type=FOLDER,
    required=True,
    help="Folder of the repository; it is made where it is missing.",
)
@click.option("--name", metavar="NAME", help="Name of the model in the server; default: that of the file.")
@click.option(
    "--mounted-at",
    metavar="PATH",
    help="Where the server sees the repository, e.g. /models in a container; default: where it is.",
)
@click.option(
    "--max-batch",
    metavar="N",
    type=click.IntRange(0, MOST),
    help="How many requests the server may run as one batch; 0: none. Default: 8 where axis 0 of all tensors allows "
    "it.",
)
@click.option(
    "--instances",
    metavar="N",
    type=click.IntRange(1, MOST),
    default=1,
    show_default=True,
    help="Instances of the model.",
)
@click.option("--gpu", is_flag=True, help="Serve on GPUs, not on the CPU.")
@quiet_option
def deploy(
    model: pathlib.Path,
    folder: pathlib.Path,
    name: str | None,
    mounted_at: str | None,
    max_batch: int | None,
    instances: int,
    gpu: bool,
    quiet: bool,
) -> None:
    """Write MODEL (an output of faexport, or any ONNX model) as a model of a Triton repository: its files, the
    operator's library if the model needs it, and config.pbtxt with the model's own inputs and outputs."""
    from faexport.commands.build import count_operators
    from faexport.files import model_io
    from faexport.runtimes import operator_library, triton

    check_input(model)
    name = name or re.sub(r"[^\w.-]", "_", model_stem(model))
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ModelError(f"--name {name}: letters, digits, '_', '-' and '.' make the name of a model")
    place = folder / name
    if place.exists():
        raise ModelError(f"{place}: is there already; remove it, or choose another --name")
    loaded = model_io.load(model)
    library = operator_library.path() if count_operators(loaded) else None
    if gpu and library is not None and (lacking := operator_library.without_cuda_kernels()):
        raise ModelError(f"--gpu: {lacking}")
    seen = f"{(mounted_at or str(folder.resolve())).rstrip('/')}/{name}/{operator_library.NAME}" if library else ""
    text = triton.config(loaded, triton.Serving(name, seen, max_batch, instances, gpu))
    with _making(place):
        with writing(place):
            (place / "1").mkdir()
            if library is not None:
                shutil.copyfile(library, place / operator_library.NAME)
        model_io.save(loaded, place / "1" / "model.onnx", source=model)
        write_file(place / "config.pbtxt", text.encode())
    if not quiet:
        click.echo(f"wrote {place}; start it with: tritonserver --model-repository={mounted_at or folder}")


@contextlib.contextmanager
def _making(place: pathlib.Path) -> Iterator[None]:
    """Makes the folder for the body, and removes what was made, those above it too, if the body fails: half a model
    would be served by a server that looks at the repository, and refused as there by the next try. Raises ModelError.
    """
    made: list[pathlib.Path] = []  # the innermost last
    try:
        with writing(place):
            for folder in reversed([one for one in (place, *place.parents) if not one.exists()]):
                with uninterrupted():
                    folder.mkdir()
                    made.append(folder)
        yield
    except BaseException:
        if place in made:
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is in it by now
            for folder in reversed(made):
                if folder != place:
                    folder.rmdir()
        raise
