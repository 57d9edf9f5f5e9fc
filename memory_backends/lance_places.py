"""Where a Lance dataset lies: a folder of this machine, or an address of an object store; and what may be said of it.

Credentials come from the environment, or from options that are handed on and kept nowhere: what is told of a place,
in errors too, holds none of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from recollect.memory_backends.errors import InvalidInput

SCHEMES = ("s3", "s3+ddb", "gs", "az", "abfs", "abfss", "oss", "cos", "memory", "file")
PATIENCE = {"connect_timeout": "5s", "timeout": "60s", "client_max_retries": "4", "client_retry_timeout": "20"}
"""For an object store, unless the options or the environment say otherwise: Lance alone retries for minutes."""
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_SECRET = re.compile(r"secret|token|password|key|credential|signature|sas", re.IGNORECASE)
_PROVIDERS = ("AWS_", "AZURE_", "GOOGLE_", "GCS_", "OSS_", "COS_")
SHORTEST_SECRET = 4
"""Characters; what is shorter is left in a message, since hiding it would eat words and hide nothing."""


@dataclass(frozen=True)
class Place:
    """Where a dataset lies.

    Attributes:
        address: what Lance is given.
        folder: the same on this machine; None on an object store or in memory.
        options: for the object store.
        shown: what is told of it.
    """

    address: str
    folder: Path | None
    options: Mapping[str, str] = field(repr=False)
    shown: str

    @property
    def path(self) -> Path | str:
        """What a caller opens it by: the folder as it was named, or the address."""
        if self.folder is None:
            return self.address
        return self.folder if _ADDRESS.match(self.shown) else Path(self.shown).expanduser()

    @property
    def remote(self) -> bool:
        """Whether it is reached over a network, and may not answer."""
        return self.folder is None and not self.address.startswith("memory://")

    @property
    def storage_options(self) -> dict[str, str] | None:
        """The options as Lance takes them."""
        if not self.remote:
            return dict(self.options) or None
        patience = {name: value for name, value in PATIENCE.items() if name.upper() not in os.environ}
        return {**patience, **self.options}

    def hide(self, text: str) -> str:
        """`text` without the credentials of this place and of the environment."""
        secrets = [value for name, value in self.options.items() if _SECRET.search(name)]
        secrets += [value for name, value in os.environ.items() if name.startswith(_PROVIDERS) and _SECRET.search(name)]
        for secret in sorted(set(secrets), key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:
                text = text.replace(secret, "***")
        text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text)
        return re.sub(r"(?<=[?&])([\w-]*(?:sig|token|key|credential)[\w-]*)=[^&\s)\"']+", r"\1=***", text, flags=re.I)

    def __str__(self) -> str:
        return self.shown


def is_address(place: str | Path) -> bool:
    """Whether a string names an object store (`s3://...`) rather than a folder of this machine."""
    found = _ADDRESS.match(str(place)) if isinstance(place, str) else None
    return found is not None and found[1].lower() != "file"


def place_of(uri: str | Path, storage_options: Mapping[str, str] | None = None) -> Place:
    """The place that a path or an address names; nothing is looked up.

    Raises:
        InvalidInput: Lance knows no such address, or credentials stand in it.
    """
    options = {str(name): str(value) for name, value in (storage_options or {}).items()}
    found = _ADDRESS.match(uri) if isinstance(uri, str) else None
    if found is None:
        if not str(uri):
            raise InvalidInput("the store's address is empty: give a folder, or an address such as s3://bucket/store")
        folder = Path(uri).expanduser().absolute()
        return Place(str(folder), folder, options, str(uri))
    text, scheme = str(uri), found[1].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidInput(f"{scheme}:// is no address that a store can lie at: give a folder, or one of {known}")
    parts = urlsplit(text)
    named = parts.username and not scheme.startswith("abfs")  # of these it is the container
    if named or parts.password or parts.query:
        raise InvalidInput(
            f"the address {scheme}://{parts.hostname or ''}{parts.path} holds more than a place: leave user, password "
            "and query out and give credentials by the environment, such as AWS_ACCESS_KEY_ID, or by storage_options"
        )
    if scheme == "file":
        folder = Path(url2pathname(parts.path))
        return Place(str(folder), folder, options, text)
    return Place(text.rstrip("/"), None, options, text)
