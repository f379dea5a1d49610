# SPDX-License-Identifier: Apache-2.0
"""What computes where an operator isn't there: functions and formulas of standard operators."""
