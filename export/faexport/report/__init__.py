# SPDX-License-Identifier: Apache-2.0
"""What was found, and how is it told: the data, a terminal's view, a page."""
