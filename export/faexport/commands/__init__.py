# SPDX-License-Identifier: Apache-2.0
"""What may be typed behind `faexport`: the commands, and what they share."""
