# SPDX-License-Identifier: Apache-2.0
"""What do onnxruntime, onnxruntime-genai, TensorRT and Triton want of a model?"""
