# SPDX-License-Identifier: Apache-2.0
"""From a softmax up to the product of queries and keys and down to the product with the values."""
