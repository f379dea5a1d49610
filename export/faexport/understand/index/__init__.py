# SPDX-License-Identifier: Apache-2.0
"""Tensors as functions of their indices, and the algebra of these functions."""
