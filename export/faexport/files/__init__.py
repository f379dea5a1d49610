# SPDX-License-Identifier: Apache-2.0
"""How does a model get in, and a result out?"""
