# SPDX-License-Identifier: Apache-2.0
"""How does a model get in, and how does a result get out?"""
