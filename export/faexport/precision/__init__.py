# SPDX-License-Identifier: Apache-2.0
"""In which number types is it computed, and what does that cost?"""
