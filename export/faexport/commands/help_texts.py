# SPDX-License-Identifier: Apache-2.0
"""What `faexport --help` says beside the options, and the examples of `fuse` and `inspect`."""

SUMMARY = """Put flash attention into an ONNX model: find its attention, prove what it computes, fuse it, check the
result.

faexport model.onnx writes model.fa.onnx beside the model, for onnxruntime with the library of the faplugin package; it
runs without the library too (slower) unless --no-fallback is given. For TensorRT: --target tensorrt, or faexport build.

Exit codes: 0 done, or nothing to fuse; 1 not verified, nothing written; 2 bad input; 3 internal error; 4 with
--strict: a site is left, or nothing was fused."""
EXAMPLES_OF_FUSE = """\b
Examples:
  faexport model.onnx                     write model.fa.onnx, verified
  faexport model.onnx -o fast.onnx        write elsewhere
  faexport models/llama                   rewrite a copy of a genai folder
  faexport a.onnx b.onnx -o fast          several models, or all of a folder
  faexport model.onnx --inputs real.npz   verify on your own inputs as well
  faexport model.onnx --fp16              the whole model in half precision
  faexport model.onnx --dtype fp16        attention alone in half precision
  faexport model.onnx --json --dry-run    a report for programs
"""
EXAMPLES_OF_INSPECT = """\b
Examples:
  faexport inspect model.onnx                      what would be fused
  faexport inspect model.onnx --html report.html   the same as a page
  faexport inspect model.onnx --json --strict      for a build to check
"""
EXAMPLES = f"""{EXAMPLES_OF_FUSE}  faexport inspect model.onnx             only show what would be fused

\b
Completion of names and options, for bash (or zsh):
  eval "$(faexport --completion bash)"
"""
