# SPDX-License-Identifier: Apache-2.0
"""Prove what a site computes: sizes, views, the chain between scores and softmax, heads, masks."""
