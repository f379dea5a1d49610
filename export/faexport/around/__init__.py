# SPDX-License-Identifier: Apache-2.0
"""What else can be written better, around attention?"""
