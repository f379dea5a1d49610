# SPDX-License-Identifier: Apache-2.0
"""What stands in a graph: small questions about nodes and values, new nodes, and the form in which a graph is read."""
