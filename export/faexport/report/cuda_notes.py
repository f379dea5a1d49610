# SPDX-License-Identifier: Apache-2.0
"""Notes of a report about CUDA: which fused sites no kernel takes, those with wide heads, and which none reads in
place."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from faexport.cuda_heads import widest
from faexport.graph.nodes import dtype_name
from faexport.report.data import SiteReport
from faexport.spec import AttentionSpec, Candidate


def cpu_only_note(candidates: Iterable[Candidate]) -> str:
    """A sentence that names the fused sites which run on CPUs only, "" where there are none.

    Sites whose sizes the model does not tell are not judged by these.
    """
    found: dict[str, list[str]] = collections.defaultdict(list)
    for candidate in candidates:
        if isinstance(candidate.outcome, AttentionSpec) and (why := _why_cpu_only(candidate, candidate.outcome)):
            found[why].append(f"'{candidate.name}'")
    if not found:
        return ""
    sites = (f"{', '.join(names[:2])}{_more(len(names) - 2)} ({why})" for why, names in found.items())
    return f"no CUDA kernel takes {', '.join(sites)}: our library runs the rewritten model on CPUs only"


def gathered_note(candidates: Iterable[Candidate]) -> str:
    """A sentence where fused sites have caches in pages, which CUDA kernels do not always read where they are."""
    outcomes = (candidate.outcome for candidate in candidates)
    paged = [x for x in outcomes if isinstance(x, AttentionSpec) and x.further_attributes.get("cache") == "paged"]
    if not paged:
        return ""
    return (
        "on a GPU the pages of a cache are gathered first for prompts, and before compute capability 9.0 for every "
        "step, which takes longer than onnxruntime's PagedAttention does; other steps, and CPUs, read them in place"
    )


def is_float32(candidate: Candidate) -> bool:
    """Is a site fused that a CUDA kernel computes in float32, as far as the model tells?"""
    spec = candidate.outcome
    if not isinstance(spec, AttentionSpec) or _why_cpu_only(candidate, spec):
        return False
    return _dtype_of(SiteReport.from_candidate(candidate), spec) == "float32"


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""


def _dtype_of(site: SiteReport, spec: AttentionSpec) -> str:
    """What the core is computed in: another type than the model's, where it has its own."""
    return dtype_name(spec.query.value.dtype) or site.dtype or ""


def _why_cpu_only(candidate: Candidate, spec: AttentionSpec) -> str:
    """What a site has that no CUDA kernel takes, "" for nothing."""
    site = SiteReport.from_candidate(candidate)
    name = _dtype_of(site, spec)
    columns = max((d for d in (site.head_dim, site.head_dim_v) if isinstance(d, int)), default=0)
    if name in widest() and columns > widest()[name]:
        return f"head_dim {columns} in {name}, at most {widest()[name]}"
    return ""
