# SPDX-License-Identifier: Apache-2.0
"""Times whole models in onnxruntime: those of FlashAttention's claims, and what people export beside them.

BERT-large, ViT-L, CLIP's text, Whisper-large, SAM, SDXL, Flux, Swin, a long-range encoder, GPT-3 and Mistral
(model_table.CLAIMS), in the files of encoders.py and as it times them; decode steps are llm.py's. `--layers 2` tries
it out.
"""

from __future__ import annotations

import sys

from encoders import main

if __name__ == "__main__":
    sys.exit(main("models", __doc__.splitlines()[0]))
