"""Triggers on disk, for those that do not fit in memory."""

import hashlib
import io
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np

from moth_jax.errors import InputError
from moth_jax.parallel.processes import on_main
from moth_jax.triggers import Trigger


class TriggerStore:
    """A folder of triggers, each written once under the digest of its own bytes.

    What a digest names never changes, so that whoever holds digests (another copy of a bank, a
    checkpoint of an earlier moment, another process) still finds what they meant. Of several
    processes the writer alone has the folder, so it alone reads.

    Args:
      folder: where the triggers are; None makes a temporary folder, of this process, that lives as
        long as the store.

    Attributes:
      lasts: whether other processes will find what is stored.
    """

    def __init__(self, folder: Path | None = None):
        self._folder, self._files = folder, None
        self.lasts = folder is not None

    def write(self, trigger: Trigger) -> bytes:
        """Keep `trigger`; return its name, a digest of 32 bytes.

        Raises:
          InputError: it cannot be written, as on a full disk.
        """
        file = io.BytesIO()
        np.save(file, np.concatenate([trigger.pattern, trigger.mask], axis=-1))
        content = file.getvalue()
        digest = hashlib.sha256(content).digest()
        if self.lasts:
            on_main(self._write, digest, content)
        else:
            self._write(digest, content)
        return digest

    def read(self, digest: bytes) -> Trigger:
        """Return the trigger of this name.

        Raises:
          InputError: it is missing or damaged.
        """
        both = np.load(io.BytesIO(self._read(digest)), allow_pickle=False)
        return Trigger(both[..., -1:], both[..., :-1])

    def _write(self, digest: bytes, content: bytes) -> None:
        try:
            self._open().write(digest.hex(), content).result()
        except ValueError as error:  # TensorStore reports a full disk as one
            raise InputError(
                f"cannot write a trigger to {self._folder}: {error}; free some space or check the "
                "permissions, then run the same command again"
            ) from error

    def _read(self, digest: bytes) -> bytes:
        content = self._open().read(digest.hex()).result().value
        if hashlib.sha256(content).digest() != digest:
            raise InputError(
                f"the trigger {digest.hex()[:12]} in {self._folder} is missing or damaged; "
                "--overwrite starts afresh"
            )
        return content

    def _open(self):
        if self._files is None:
            import tensorstore

            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="moth_jax_triggers_"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            address = {"driver": "file", "path": f"{self._folder.absolute()}/"}
            self._files = tensorstore.KvStore.open(address).result()
        return self._files
