"""Settings of a lab: environment variables with the prefix NETASSAY_, nothing else."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="NETASSAY_", extra="ignore", frozen=True)

    home: Path = Field(default=Path(".netassay"), description="folder of the embedded lab")
    broker: str = Field(default="", description="redis:// or rediss:// URL; empty: a private Redis of the embedded lab")
    store: str = Field(default="", description="SQLAlchemy URL of the records; empty: SQLite in the home folder")
    artifacts: Path | None = Field(default=None, description="folder of the artifacts; empty: in the home folder")
    methods: str = Field(default="", description=f"folders of your own methods, separated by '{os.pathsep}'")
    slots: int = Field(default=0, ge=0, description="compute children of a worker; 0: one per core")
    lost_after: float = Field(
        default=10.0, gt=0, description="seconds without a sign of life after which a worker is lost"
    )
    memory: int = Field(default=0, ge=0, description="bytes all slots of a worker may use; 0: 0.8 x the host's")

    @property
    def root(self) -> Path:
        return self.home.absolute()

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{self.root / 'store.sqlite'}"

    @property
    def artifacts_folder(self) -> Path:
        return (self.artifacts or self.root / "artifacts").absolute()


@functools.cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
