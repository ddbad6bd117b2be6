"""A bucket that is a folder: gs:// for every process that registers it, without a network."""

import os
from pathlib import Path

import fsspec
from etils.epath import backend
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

FOLDER = "FOLDER_OF_BUCKETS"  # the environment's name for it, which child processes inherit


class FolderBucket(DirFileSystem):
    protocol = ("gs", "gcs")

    def __init__(self, **options):
        super().__init__("/", LocalFileSystem(auto_mkdir=True))

    @property
    def path(self) -> str:
        return os.environ[FOLDER]  # of this test: instances are kept

    @path.setter
    def path(self, value: str) -> None:
        pass


def register(bucket: type[AbstractFileSystem] = FolderBucket) -> None:
    """Put `bucket` behind gs:// in this process."""
    os.environ["EPATH_USE_TF"] = "false"
    for name in bucket.protocol:
        fsspec.register_implementation(name, bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()  # of another test's bucket


def variables_for_processes(scratch: Path, folder: Path) -> dict[str, str]:
    """Return environment variables by which a Python process, and each that it starts, registers the bucket."""
    scratch.mkdir(exist_ok=True)
    (scratch / "sitecustomize.py").write_text("from support.buckets import register\nregister()\n")
    paths = scratch, Path(__file__).parents[1]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), FOLDER: str(folder), "TMPDIR": str(scratch)}
