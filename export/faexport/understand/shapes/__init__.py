# SPDX-License-Identifier: Apache-2.0
"""What is known of sizes, element types and constants. Imports nothing else of understand/."""
