# trtune on a CPU: every stage with onnxruntime, and TensorRT-RTX, which builds engines without a GPU.
# Written beside the project and not built where it was written.
#
#   docker build -t trtune .
#   docker run --rm -v "$PWD:/work" trtune run model.yaml
FROM python:3.12-slim

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[rtx,detection]' \
    && rm -rf /src \
    && useradd --create-home trtune
USER trtune
WORKDIR /work
ENTRYPOINT ["trtune"]
CMD ["--help"]
