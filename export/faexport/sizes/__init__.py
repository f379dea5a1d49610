# SPDX-License-Identifier: Apache-2.0
"""What is a size or an index, and when are two the same? Integer expressions in one normal form, and their names."""
