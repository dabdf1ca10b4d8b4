"""Settings of a lab: environment variables with the prefix NETASSAY_, nothing else."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from netassay.errors import UserError


def _place(value: Any) -> Any:
    """A folder or a URL; the URL of a folder of this host is that folder."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    scheme, separator, rest = value.partition("://") if isinstance(value, str) else ("", "", "")
    if not separator or scheme not in ("file", "local"):
        return value
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError("a file:// URL has three slashes and the whole path: file:///srv/artifacts")
    return "/" + unquote(path)


def _verified(value: Any) -> Any:
    """A URL with TLS that has the certificate looked at: redis-py does so by itself, Celery has to be told."""
    if not isinstance(value, str) or not value.startswith("rediss://") or "ssl_cert_reqs=" in value:
        return value
    return f"{value}{'&' if '?' in value else '?'}ssl_cert_reqs=required"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="NETASSAY_", extra="ignore", frozen=True)

    home: Path = Field(default=Path(".netassay"), description="folder of the embedded lab")
    broker: Annotated[str, BeforeValidator(_verified)] = Field(
        default="", description="redis:// or rediss:// URL; empty: a private Redis of the embedded lab"
    )
    store: str = Field(default="", description="SQLAlchemy URL of the records; empty: SQLite in the home folder")
    artifacts: Annotated[str, BeforeValidator(_place)] = Field(
        default="",
        description="folder of the artifacts, or a URL for fsspec (s3://bucket/prefix); empty: in the home folder",
    )
    methods: str = Field(default="", description=f"folders of your own methods, separated by '{os.pathsep}'")
    slots: int = Field(default=0, ge=0, description="compute children of a worker; 0: one per core")
    lost_after: float = Field(
        default=10.0, gt=0, description="seconds without a sign of life after which a worker is lost"
    )
    grace: float = Field(
        default=5.0, ge=0, description="seconds that running jobs may still take after a worker was told to end"
    )
    submitter: str = Field(default="", description="whose batches those are that are submitted; empty: the user's")
    memory: int = Field(default=0, ge=0, description="bytes all slots of a worker may use; 0: 0.8 x the host's")
    monitor: str = Field(default="", description="host:port at which the monitor listens; empty: on loopback")
    logs: Literal["text", "json"] = Field(default="text", description="how services write their logs")

    @property
    def root(self) -> Path:
        return self.home.absolute()

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{self.root / 'store.sqlite'}"

    @property
    def artifacts_url(self) -> str:
        """Where the artifacts are: a URL, or a folder of this host as an absolute path."""
        return self.artifacts if "://" in self.artifacts else str(self.artifacts_folder)

    @property
    def artifacts_folder(self) -> Path:
        """The artifacts on this host: their folder, or the cache of those that lie behind a URL."""
        if "://" in self.artifacts:
            digest = hashlib.sha256(self.artifacts.rstrip("/").encode()).hexdigest()
            return self.root / "cache" / digest[:12]
        return Path(self.artifacts or self.root / "artifacts").absolute()


#: Passwords in addresses: as a parameter; and `//user:password@`, up to the last @, for some hold one, or a slash.
_IN_PARAMETERS = re.compile(r"(?<=[?&])(password|sslpassword|secret|token)=[^\s&]*", re.IGNORECASE)
_BEFORE_HOST = re.compile(r"(?<=://)([^\s/@:]*):\S*@")


def masked(address: str) -> str:
    """An address, or text that holds some, as it may be shown: `***` in place of every password."""
    return _BEFORE_HOST.sub(r"\1:***@", _IN_PARAMETERS.sub(r"\1=***", address))


class BadSettings(UserError):
    """A variable of the environment holds what it cannot; the message names it."""


@functools.cache
def settings() -> Settings:
    """The settings of this process, read once. Raises BadSettings."""
    try:
        return Settings()
    except ValidationError as error:
        told = [f"NETASSAY_{'.'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors()]
        raise BadSettings("; ".join(told)) from None
