"""Recorded traffic of OpenAI's own API (go-vcr files), as pairs of request and response."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

DIRECTORY = Path(__file__).parent / "openai-recordings"


class Recording(NamedTuple):
    name: str
    path: str
    request_body: bytes
    content_type: str
    status: int
    response_content_type: str
    response_body: bytes


def load() -> list[Recording]:
    found: list[Recording] = []
    for path in sorted(DIRECTORY.glob("*.yaml")):
        for interaction in yaml.safe_load(path.read_text())["interactions"]:
            request, response = interaction["request"], interaction["response"]
            found.append(
                Recording(
                    path.stem,
                    request["url"].removeprefix("https://api.openai.com"),
                    request["body"].encode(),
                    request["headers"]["Content-Type"][0],
                    response["code"],
                    response["headers"]["Content-Type"][0],
                    response["body"].encode(),
                )
            )
    return found
