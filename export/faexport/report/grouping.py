# SPDX-License-Identifier: Apache-2.0
"""Equal layers of a report as one: sites of which the same is known and the same came out. Called by what shows reports
to people; the JSON keeps each site."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from faexport.report.data import (
    Dim,
    Float8,
    Float8Site,
    HalfPrecision,
    OutputDifference,
    SiteComparison,
    SiteReport,
    VerificationRun,
)

# In place of a fused node, where none takes part: what was joined around attention, and numbers made of sizes.
AROUND = "(around attention)"

# What a matcher looks for, by the name that it has in the JSON.
_FORMS = {
    "softmax_core": "a Softmax between two products",
    "onnx_attention": "ONNX's own Attention",
    "ort_contrib": "an attention operator of onnxruntime",
    "unread": "an operator of onnxruntime that is not read",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Sites that differ in nothing but the names of their nodes."""

    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        return self.sites[0]

    @property
    def name(self) -> str:
        return common_name([site.name for site in self.sites])

    @property
    def form(self) -> str:
        return _FORMS[self.first.source]

    @property
    def proven(self) -> list[str]:
        return list(dict.fromkeys(fact.text for fact in self.first.facts if not fact.assumed))

    @property
    def assumed(self) -> list[str]:
        return list(dict.fromkeys(fact.text for fact in self.first.facts if fact.assumed))

    @property
    def found(self) -> str:
        """The sentence of sites that are fused: how they were found, and what is known of them."""
        assumed = f"; assumed: {'; '.join(self.assumed)}" if self.assumed else ""
        return f"found as {self.form}; proven: {'; '.join(self.proven) or 'nothing more'}{assumed}"

    @property
    def reason(self) -> str:
        """Why the sites are left, with the node only where that is not the site's own; "" where they are fused."""
        refusal = self.first.refusal
        if refusal is None:
            return ""
        return refusal.reason if refusal.node == self.first.name else str(refusal)


def group_sites(sites: Sequence[SiteReport]) -> list[Group]:
    """The groups in the order of their first sites."""
    groups: dict[object, list[SiteReport]] = {}
    for site in sites:
        groups.setdefault(_what_is_known(site), []).append(site)
    return [Group(tuple(members)) for members in groups.values()]


def _share(row: SiteComparison) -> float:
    return row.share


def group_comparisons(
    rows: Sequence[SiteComparison], badness: Callable[[SiteComparison], float] = _share
) -> list[tuple[str, SiteComparison]]:
    """(name, worst row) of each group: all that were compared in the same way and agree are one; each that does not
    agree is one of its own."""
    worst: dict[tuple[str, bool], SiteComparison] = {}
    for row in rows:
        key = (row.site, row.by_stand_in)
        worst[key] = max(worst.get(key, row), row, key=lambda row: (not row.ok, badness(row)))
    groups: dict[object, list[SiteComparison]] = {}
    for row in worst.values():
        alike = (_without_numbers(row.site), row.by_stand_in, row.dtype, row.num_sets)
        groups.setdefault(alike if row.ok else id(row), []).append(row)
    return [(common_name([row.site for row in members]), max(members, key=badness)) for members in groups.values()]


def percent(error: float | None) -> str:
    return f"{100 * (error or 0):.2g} %"


QUANTIZED = "Quantized sites: distance from the same without any quantization, relative to its root mean square"


def quantization_rows(rows: Sequence[SiteComparison]) -> list[tuple[str, str, str, str]]:
    """(name, what ran it, distance of the rewritten model, of the original) of quantized sites, of equal ones the one
    that loses most."""
    quantized = [row for row in rows if row.quantization_error is not None]
    return [
        (
            name or AROUND,
            "stand-in" if row.by_stand_in else "library",
            percent(row.quantization_error),
            percent(row.original_quantization_error),
        )
        for name, row in group_comparisons(quantized, lambda row: row.quantization_error or 0)
    ]


FLOAT8 = "Attention in float8: distance from the same in the model's precision, relative to its root mean square"


def float8_rows(said: Float8) -> list[tuple[str, str, str]]:
    """(name, whose factors, distance or why it is left) of the sites that were to be computed in float8, equal ones as
    one: that which loses most."""
    groups: dict[tuple[str, str, bool], list[Float8Site]] = {}
    for site in said.sites:
        groups.setdefault((_without_numbers(site.name), site.left, site.own_factors), []).append(site)
    rows = []
    for (_, left, own), members in groups.items():
        error = max(site.error or 0.0 for site in members)
        name, factors = common_name([site.name for site in members]), "the model's" if own else "measured"
        rows.append((name, "" if left else factors, left or percent(error)))
    return rows


def group_outputs(runs: Sequence[VerificationRun]) -> list[tuple[str, OutputDifference]]:
    """(name, the worst of all runs) of each output of the model; those that agree, and whose names differ in their
    numbers only, like a cache's, are one."""
    worst: dict[str, OutputDifference] = {}
    for output in (output for run in runs for output in run.outputs):
        worst[output.name] = max(worst.get(output.name, output), output, key=lambda one: one.badness)
    groups: dict[object, list[OutputDifference]] = {}
    for output in worst.values():
        groups.setdefault((_without_numbers(output.name), output.dtype) if output.ok else output.name, []).append(
            output
        )
    return [
        (common_name([output.name for output in members]), max(members, key=lambda one: one.badness))
        for members in groups.values()
    ]


def common_name(names: Sequence[str]) -> str:
    """Of names that differ in their numbers only "/layer.0…5/Softmax"; else the first, and how many there are more."""
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({tuple(parts[::2]) for parts in pieces}) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    columns = zip(*pieces, strict=True)
    return "".join(column[0] if len(set(column)) == 1 else f"{column[0]}…{column[-1]}" for column in columns)


def kept_sentence(half: HalfPrecision) -> str:
    """What of a model in half precision is float32: nodes of one reason together, numbers in the reasons aside."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, why in half.kept.items():
        groups.setdefault(re.sub(r"[\d.e+-]*\d", "0", why), []).append((name, why))
    parts = ["inputs and outputs"] if half.keep_io_types else []
    for members in groups.values():
        name, why = members[0]
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        parts.append(f"'{name}'{more} ({why})")
    return ", ".join(parts) or "nothing"


def sizes_text(first: Dim, second: Dim) -> str:
    """Both where they differ, e.g. query and key/value heads as "8/2"; "?" for what is unknown."""
    shown = ["?" if dim is None else str(dim) for dim in (first, second)]
    return shown[0] if second is None or first == second else "/".join(shown)


def _without_numbers(name: str) -> str:
    """The same for all of a series, the first of which PyTorch gives no number: "matmul", "matmul_1", …"""
    return re.sub(r"_?\d+", "", name)


def _what_is_known(site: SiteReport) -> object:
    """All of a site but the names of its own nodes. A refusal may speak of another node: then that counts."""
    sizes = (site.batch_size, site.num_q_heads, site.num_kv_heads, site.seqlen_q, site.seqlen_kv)
    refusal = None
    if site.refusal is not None:
        same = site.refusal.node == site.name
        node = "" if same else _without_numbers(site.refusal.node)
        refusal = (site.refusal.reason, node, site.refusal.kind)
    facts = tuple((fact.text, fact.assumed) for fact in site.facts)
    return site.source, sizes, site.head_dim, site.head_dim_v, site.dtype, facts, refusal
