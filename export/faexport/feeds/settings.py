# SPDX-License-Identifier: Apache-2.0
"""The settings that a rewritten model is compared at: sizes and kinds of values that doubt what the exporter believes.

Two sizes that it takes to be equal differ here, one that a mask is broadcast along is 1, a cache is empty, scores are
large, an initializer that a caller may override is overridden. Which of these the model accepts, the original decides
by running. Called by model_check.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from faexport.feeds import inputs
from faexport.feeds.inputs import Drawing, InputSpec, MaskPattern, Role, Sizes

# The first settings, with which a model is as likely to run as with any. Where sizes are fixed only the mask differs.
PLANS = (
    (Sizes(batch=2, length=16, past=5), MaskPattern.RIGHT_PADDED),
    (Sizes(batch=2, length=16, past=5), MaskPattern.LEFT_PADDED),
    (Sizes(batch=3, length=33, past=8), MaskPattern.RANDOM),
    (Sizes(batch=1, length=7, past=12), MaskPattern.ONES),
)
FALLBACK_LENGTHS = (32, 64, 224, 400, 518)  # image sides, audio samples: where the original refuses shorter ones
LARGE = 12.0  # times the usual inputs: scores around 1e3
MOST_DOUBTS = 40
_BASE = Sizes(batch=2, length=6, past=3)


@dataclasses.dataclass(frozen=True)
class InputSet:
    """One set of inputs, and what it is called in messages."""

    label: str
    tensors: Mapping[str, np.ndarray]
    # The same with other numbers where nothing is to be read (a decoder's padding); None where there is no such place.
    other_padding: Mapping[str, np.ndarray] | None = None
    any_numbers: bool = False  # masks hold other numbers than 0 and 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the user says of the inputs (--assume); sets that break it are not drawn."""

    right_padding: bool = False
    full_rows: bool = False
    zeros_and_ones: bool = False

    @property
    def any_numbers(self) -> bool:
        """May masks that are made of numbers hold others than 0 and 1? What else is assumed is said of such masks."""
        return not (self.right_padding or self.full_rows or self.zeros_and_ones)


@dataclasses.dataclass(frozen=True)
class _Setting:
    sizes: Mapping[str, int]
    drawing: Drawing


def plans(
    specs: Sequence[InputSpec], assumed: Assumed, random: np.random.Generator, length: int | None = None
) -> list[InputSet]:
    """The first sets. With `length` this one instead of the plans' own."""
    dynamic, masked = bool(inputs.symbols(specs)), _is_masked(specs)
    chosen = PLANS if dynamic else PLANS[:2]
    made = []
    for sizes, pattern in chosen:
        sizes = dataclasses.replace(sizes, length=length) if length else sizes
        drawing = Drawing(_allowed(pattern, assumed))
        made.append(_draw(specs, _Setting(inputs.bind(specs, sizes), drawing), masked, random))
    return made


def doubts(
    specs: Sequence[InputSpec], assumed: Assumed, random: np.random.Generator, *, any_numbers: bool = True
) -> Iterator[InputSet]:
    """The sets after those: few of them suit a model with sizes of its own, and none is large. An input set that can't
    be drawn (a size below 0) is left out. `any_numbers`: masks hold other numbers than 0 and 1, too, of which what the
    user assumes of masks says nothing."""
    masked = _is_masked(specs)
    for setting in itertools.islice(_doubts(specs, random), MOST_DOUBTS):
        if setting.drawing.wild and not any_numbers:
            continue
        pattern = _allowed(setting.drawing.pattern, assumed)
        setting = dataclasses.replace(setting, drawing=dataclasses.replace(setting.drawing, pattern=pattern))
        try:
            yield _draw(specs, setting, masked, random)
        except inputs.UnsupportedInput:
            continue


def _doubts(specs: Sequence[InputSpec], random: np.random.Generator) -> Iterator[_Setting]:
    names, pasts = inputs.symbols(specs), inputs.past_symbols(specs)
    padded = Drawing(MaskPattern.RIGHT_PADDED)

    def sizes(**given: int) -> dict[str, int]:
        return inputs.bind(specs, _BASE, given)

    for pattern in (MaskPattern.RIGHT_PADDED, MaskPattern.FIRST):  # one key alone may have a score below a fill
        yield _Setting(inputs.bind(specs, PLANS[0][0]), Drawing(pattern, scale=LARGE))
    for kinds in ("fVb", "iu"):  # apart, since an integer may be a shape, which no other value suits; V is bfloat16
        if any(spec.default is not None and spec.dtype.kind in kinds for spec in specs):
            yield _Setting(sizes(), dataclasses.replace(padded, overrides=kinds))
    if any(spec.only_bool or spec.role is Role.WEIGHT for spec in specs):
        # Also where one key is all there is, so that what hides it leaves nothing.
        for chosen in (sizes(), sizes(), *(sizes(**{name: 1}) for name in names[:4])):
            yield _Setting(chosen, Drawing(MaskPattern.RANDOM, wild=True))
    if not names:
        return
    patterns = (MaskPattern.RIGHT_PADDED, MaskPattern.LEFT_PADDED, MaskPattern.RANDOM)
    yield _Setting(dict.fromkeys(names, 1), Drawing())
    if pasts:
        empty = dict.fromkeys(pasts, 0)
        yield _Setting(sizes(**empty), padded)
        yield _Setting(dict.fromkeys(names, 1) | empty, Drawing())
    for k, name in enumerate(names[:8]):
        yield _Setting(sizes(**{name: 1}), Drawing(patterns[k % 3]))
    for k, name in enumerate(names[:8]):
        yield _Setting(sizes(**{name: 0}), Drawing(patterns[k % 3]))
    for own in _own_names(specs):
        yield _Setting(sizes(**dict.fromkeys(own, 1)), padded)
    if len(names) > 1:
        yield _Setting({name: 2 + k for k, name in enumerate(names)}, padded)
    for _ in range(8 if 1 < len(names) <= 8 else 0):
        yield _Setting({name: int(random.choice((1, 3, 6, 0))) for name in names}, Drawing(MaskPattern.RANDOM))


def _own_names(specs: Sequence[InputSpec]) -> Iterator[list[str]]:
    """The sizes that one input has and no other, where it has several: a mask's, each of which may be 1 alone."""
    for spec in specs:
        others = inputs.symbols([other for other in specs if other is not spec])
        own = [name for name in inputs.symbols([spec]) if name not in others]
        if len(own) > 1:
            yield own


def _draw(specs: Sequence[InputSpec], setting: _Setting, masked: bool, random: np.random.Generator) -> InputSet:
    drawing = setting.drawing
    words = [f"{name}={size}" for name, size in setting.sizes.items()]
    words += [f"mask {drawing.pattern}"] if masked else []
    words += [f"inputs times {drawing.scale:g}"] if drawing.scale != 1 else []
    words += ["initializers overridden"] if drawing.overrides else []
    if drawing.wild:
        names = [f"'{spec.name}'" for spec in specs if spec.only_bool or spec.role is Role.WEIGHT]
        words.append(f"{', '.join(names)} not only 0 and 1")
    tensors = inputs.draw(specs, setting.sizes, drawing, random)
    return InputSet(", ".join(words) or "fixed sizes", tensors, any_numbers=drawing.wild)


def _is_masked(specs: Sequence[InputSpec]) -> bool:
    return any(spec.role in (Role.MASK, Role.WEIGHT) for spec in specs)


def _allowed(pattern: MaskPattern, assumed: Assumed) -> MaskPattern:
    """The pattern, or another one that the user's assumptions allow."""
    if assumed.full_rows and pattern is not MaskPattern.ONES:
        right_padded = assumed.right_padding or pattern is MaskPattern.RIGHT_PADDED
        return MaskPattern.LAST if right_padded else MaskPattern.SCATTERED
    if assumed.right_padding and pattern in (MaskPattern.LEFT_PADDED, MaskPattern.RANDOM):
        return MaskPattern.RIGHT_PADDED
    return pattern
