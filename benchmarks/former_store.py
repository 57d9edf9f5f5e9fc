"""The memory store as it was before Lance, for comparison: a safetensors file a document, and a JSON manifest.

Only what `lance_store.py` times: adding a document, opening, and reading a layer.

Letters: H heads, n tokens of a document, N of all documents, D head dimension.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from recollect.memory_backends.atomic import write_bytes, write_json

SECONDS_BETWEEN_MANIFESTS = 2.0


class FormerStore:
    """Documents in files of their own, each with its size and sha256 in one manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents: dict[str, dict[str, Any]] = {}
        self._written = 0.0

    @classmethod
    def open(cls, path: Path, *, verify: bool) -> FormerStore:
        """Reads the manifest, and with `verify` every file's checksum."""
        store = cls(path)
        store.documents = json.loads((path / "manifest.json").read_text())["documents"]
        for document in store.documents.values():
            file = store._file(document)
            if file.stat().st_size != document["size"]:
                raise ValueError(f"{file} is cut short")
            if verify:
                with file.open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != document["sha256"]:
                        raise ValueError(f"{file} was altered")
        return store

    def add(self, name: str, digest: str, token_ids: Tensor, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        """As `MemoryStore.add`; the manifest follows within two seconds, or with `flush`."""
        tensors = {"token_ids": token_ids.to(torch.int32)}
        for layer, pair in layers.items():
            for kind, tensor in zip(("keys", "values"), pair, strict=True):
                assert bool(torch.isfinite(tensor).all())
                tensors[f"{kind}.{layer}"] = tensor.contiguous()
        content = safetensors.torch.save(tensors)
        document = {"text_digest": digest, "tokens": len(token_ids), "size": len(content)}
        write_bytes(self._file(document), content)
        self.documents[name] = {**document, "sha256": hashlib.sha256(content).hexdigest()}
        if time.monotonic() - self._written > SECONDS_BETWEEN_MANIFESTS:
            self.flush()

    def flush(self) -> None:
        """Writes the manifest."""
        write_json(self.path / "manifest.json", {"documents": self.documents})
        self._written = time.monotonic()

    def layer(self, kind: str, layer: int) -> Tensor:
        """Keys or values (H, N, D) of a layer."""
        parts = []
        for document in self.documents.values():
            with safetensors.safe_open(self._file(document), framework="pt") as opened:
                parts.append(opened.get_tensor(f"{kind}.{layer}"))
        return torch.cat(parts, dim=1)

    def _file(self, document: dict[str, Any]) -> Path:
        return self.path / "documents" / f"{document['text_digest']}.safetensors"
