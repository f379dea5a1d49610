# SPDX-License-Identifier: Apache-2.0
"""Does the rewritten model compute what the original does?"""
