# A worker with the example shop, for docker-compose.yml. Your own image needs only
# `pip install pgqueue` and your code.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY pgqueue pgqueue
COPY migrations migrations
COPY examples examples

# The lock pins the versions; its hashes are taken out because pip cannot hash a local directory.
RUN sed -e 's/ *\\$//' -e '/--hash=/d' requirements.lock > constraints.txt \
 && pip install --constraint constraints.txt ".[demo]" \
 && rm -rf build constraints.txt \
 && useradd --system --no-create-home --home-dir /nonexistent pgqueue

USER pgqueue
ENV PYTHONPATH=/app/examples
# Exec form: SIGTERM must reach pgqueue itself, which then drains.
ENTRYPOINT ["pgqueue"]
CMD ["--help"]
