# SPDX-License-Identifier: Apache-2.0
"""How do onnxruntime, onnxruntime-genai, TensorRT and Triton take a model?"""
