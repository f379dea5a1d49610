# SPDX-License-Identifier: Apache-2.0
"""How is what was understood written into the graph, together with what feeds it?"""
