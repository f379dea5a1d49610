# SPDX-License-Identifier: Apache-2.0
# The tool, the operator with its GPU kernels, and onnxruntime for NVIDIA GPUs:
#   docker build -t faexport .
#   docker run --rm --gpus all -v "$PWD:/models" faexport model.onnx
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ make python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN make -C /source wheels FA_CUDA=ON && rm /source/dist/faplugin-*.whl

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /source/dist /wheels
RUN python3 -m venv /opt/faexport \
 && /opt/faexport/bin/pip install --no-cache-dir /wheels/*.whl onnxruntime-gpu cuda-bindings \
 && rm -r /wheels
WORKDIR /models
ENTRYPOINT ["/opt/faexport/bin/faexport"]
