# SPDX-License-Identifier: Apache-2.0
"""What was found and done: as data, on a terminal, as a page."""
