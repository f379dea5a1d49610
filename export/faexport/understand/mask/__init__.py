# SPDX-License-Identifier: Apache-2.0
"""What the mask of an attention site is, proven and in the operator's words."""
