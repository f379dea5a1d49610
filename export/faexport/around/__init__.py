# SPDX-License-Identifier: Apache-2.0
"""What around attention can be written better for a runtime?"""
