# The service and every other command of `cada`, on a CPU. Written with care, but built and run nowhere yet.
#   docker build -t cada .
#   docker run -p 8000:8000 -e CADA_API_KEY -v "$PWD/data:/data" cada serve /data/index --host 0.0.0.0
FROM python:3.12-slim

WORKDIR /cada
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    --constraint constraints.txt ".[app,milvus,serve]"

ENV HF_HOME=/data/cache
EXPOSE 8000
ENTRYPOINT ["cada"]
CMD ["serve", "/data/index", "--host", "0.0.0.0"]
