# SPDX-License-Identifier: Apache-2.0
"""Folders of onnxruntime-genai: a copy whose decoder has its attention fused, with the operator's library beside it.

The folder that is given stays as it is. The decoder keeps its inputs and outputs, and genai_config.json names the
library (custom_ops_library), so the same program runs the copy. jobs.py calls it, and rewrites the decoder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from faexport.errors import ModelError
from faexport.files import model_io, scratch
from faexport.files.graph_checks import external_tensors
from faexport.files.output import check_input, is_model_name, writing
from faexport.files.signals import uninterrupted
from faexport.runtimes import operator_library

CONFIG = "genai_config.json"
LIBRARY_OPTION = "custom_ops_library"
PROVIDERS = ("cpu", "cuda")  # as genai_config.json names them


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of onnxruntime-genai with a decoder that can be rewritten."""

    path: pathlib.Path
    config: dict[str, Any]
    decoder: pathlib.Path  # its file
    on_cuda: bool


def default_target(folder: pathlib.Path) -> pathlib.Path:
    """models/llama -> models/llama.fa"""
    if folder.name in ("", "..") or folder.is_symlink():
        folder = folder.resolve()
    return folder.with_name(f"{folder.name}.fa")


def read(path: pathlib.Path) -> Folder:
    """Raises ModelError where the folder isn't one of onnxruntime-genai, or can't be rewritten for it."""
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path}: is a folder without {CONFIG}; give the name of a model, or a folder of genai")
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
        decoder = config["model"]["decoder"]
        name, options = decoder.get("filename"), decoder.setdefault("session_options", {})
        providers = [name for entry in options.get("provider_options", []) for name in entry]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path / CONFIG}: can't be read as a configuration of genai ({error}); check it") from error
    if not isinstance(name, str) or decoder.get("pipeline"):
        raise ModelError(f"{path / CONFIG}: the decoder is no single file; rewrite its models one by one")
    if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
        raise ModelError(f"{path / CONFIG}: names a decoder outside of the folder, {name}; move the file into it")
    if others := sorted(name for name in providers if name.lower() not in PROVIDERS):
        raise ModelError(
            f"{path / CONFIG}: runs on {', '.join(others)}, for which the operator has no kernels; build the model for "
            "the CPU or for CUDA"
        )
    if options.get(LIBRARY_OPTION) == operator_library.NAME:
        raise ModelError(
            f"{path}: is rewritten already, its {CONFIG} names {operator_library.NAME}; give the one it was made from"
        )
    if options.get(LIBRARY_OPTION):
        raise ModelError(f"{path / CONFIG}: loads {options[LIBRARY_OPTION]} already, and genai takes one library only")
    check_input(path / name, f"{CONFIG} names it")
    return Folder(path, config, path / name, any(name.lower() == "cuda" for name in providers))


def check_target(folder: Folder, target: pathlib.Path) -> None:
    """Raises ModelError where the copy can't be made."""
    operator_library.path()
    if folder.on_cuda and (lacking := operator_library.without_cuda_kernels()):
        raise ModelError(f"{folder.path / CONFIG}: runs on CUDA, and {lacking}")
    source, place = folder.path.resolve(), target.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise ModelError(f"{target}: is the folder that is read, or in it; choose another place with -o")
    if target.exists() or target.is_symlink():
        raise ModelError(f"{target}: is there already; remove it, or choose another place with -o")
    if not target.parent.is_dir():
        raise ModelError(f"{target}: the folder {target.parent} does not exist; create it or choose another with -o")


@contextlib.contextmanager
def copied(folder: Folder, target: pathlib.Path, on_step: Callable[[str], None]) -> Iterator[pathlib.Path]:
    """Makes the copy without its decoder, and gives the place where that is to be written; once the body has written
    it, the copy gets its name. Without a decoder there is none. Raises ModelError."""
    own = _files_of_decoder(folder)

    def left_out(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if (pathlib.Path(parent) / name).resolve() in own]

    with writing(target), scratch.folder(target.parent) as place:
        on_step(f"copying {folder.path.name}")
        made = place / target.name
        shutil.copytree(folder.path, made, ignore=left_out)
        decoder = made / folder.decoder.relative_to(folder.path)
        yield decoder
        if not decoder.exists():
            return
        library = operator_library.path()
        shutil.copyfile(library, decoder.parent / library.name)
        folder.config["model"]["decoder"]["session_options"][LIBRARY_OPTION] = library.name
        (made / CONFIG).write_text(json.dumps(folder.config, indent=4, ensure_ascii=False) + "\n", "utf-8")
        with uninterrupted():
            made.rename(target)


def _files_of_decoder(folder: Folder) -> set[pathlib.Path]:
    """The model and the files of its weights, where no other model of the folder may share them."""
    own = {folder.decoder.resolve()}
    if all(path.resolve() in own for path in folder.path.rglob("*") if is_model_name(path)):
        own |= {pathlib.Path(tensor.path).resolve() for tensor in external_tensors(model_io.load(folder.decoder))}
    return own
