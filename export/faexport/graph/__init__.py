# SPDX-License-Identifier: Apache-2.0
"""What stands in a graph, and how is it changed? Nodes are read, made, inserted and removed here."""
