# SPDX-License-Identifier: Apache-2.0
"""What is a model run on?"""
