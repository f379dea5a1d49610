# SPDX-License-Identifier: Apache-2.0
"""Products, views and the layouts in which operands can be read in place."""
