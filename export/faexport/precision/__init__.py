# SPDX-License-Identifier: Apache-2.0
"""In which number types is it computed, and what is lost by them?"""
