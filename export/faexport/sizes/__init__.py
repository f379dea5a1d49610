# SPDX-License-Identifier: Apache-2.0
"""What is a size, and what is known of sums, products and quotients of sizes?"""
