# SPDX-License-Identifier: Apache-2.0
"""What may be typed: each command, and what the commands share."""
