"""The directory of a chain: files opened relative to it, no link followed, errors explained."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self

from crtrace.errors import CrtraceError, ImageDamaged, NotPermitted, UsageError
from crtrace.faults import point

INDEX_NAME = "chain.idx"
LOCK_NAME = "lock"
PART = ".part"
SAFE = os.O_NOFOLLOW | os.O_CLOEXEC

_HINTS = {
    errno.ENOSPC: "free some space or use another file system; committed epochs are whole",
    errno.EDQUOT: "the disk quota is used up; committed epochs are whole",
    errno.EIO: "the storage reports a fault: see the kernel log; committed epochs are whole",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "run as root, or as the owner: sudo chown -R hands a chain over",
    errno.ELOOP: "symbolic links are not followed here: name the real directory",
}


def no_space() -> OSError:
    """Of a write that has written nothing."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def image_name(epoch: int, generation: int = 0) -> str:
    """The file name of an epoch's image."""
    return f"{epoch:08d}.{generation}.img" if generation else f"{epoch:08d}.img"


def is_image_name(name: str) -> bool:
    """Whether the name is that of the image of some epoch."""
    return re.fullmatch(r"\d{8,}(\.[1-9]\d*)?\.img", name) is not None


def explain(error: OSError, doing: str, path: object) -> NoReturn:
    """Raise the ``CrtraceError`` for a failed system call: "no space left … while writing X"."""
    reason = (error.strerror or str(error)).lower()
    kind = NotPermitted if error.errno in (errno.EACCES, errno.EPERM) else CrtraceError
    hint = _HINTS.get(error.errno or 0, "")
    raise kind(f"{reason} while {doing} {path}", hint=hint) from error


@contextmanager
def explained(doing: str, path: object) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``CrtraceError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        explain(error, doing, path)


class ChainDir:
    """An open chain directory. Paths in messages are those the user gave."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Raises ``UsageError`` when there is no such directory, or a link in its place."""
        # Path() also drops trailing slashes, which would make the kernel follow a link.
        where = Path(path)
        try:
            return cls(os.open(where, os.O_RDONLY | os.O_DIRECTORY | SAFE), where)
        except (FileNotFoundError, NotADirectoryError) as error:
            link = where.is_symlink()
            hint = _HINTS[errno.ELOOP] if link else "a chain is the directory that watch -o made"
            raise UsageError(f"{where} is no directory", hint=hint) from error
        except OSError as error:
            explain(error, "opening", where)

    @classmethod
    def make(cls, path: str | os.PathLike[str]) -> Self:
        """Open the directory, made with mode 0700 if it is not there.

        Raises ``UsageError`` for one that others may write, or with files but no chain in it.
        """
        where = Path(path)
        with explained("making", where):
            try:
                point("mkdir")
                os.mkdir(where, 0o700)
            except FileExistsError:
                pass
        directory = cls.open(where)
        try:
            directory._check_ours()
            if INDEX_NAME not in directory.names():
                # Also when it was there: who made it may have been killed before this.
                with explained("making", where):
                    sync_parent(where)
        except BaseException:
            directory.close()
            raise
        return directory

    def _check_ours(self) -> None:
        if os.fstat(self.fd).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(
                f"{self.path} can be written by other users",
                hint=f"chmod go-w {self.path}, or let crtrace make the directory",
            )
        names = self.names()
        ours = {name for name in names if name == LOCK_NAME or name.endswith(PART)}
        if INDEX_NAME not in names and set(names) - ours:
            raise UsageError(
                f"{self.path} has files in it and is no chain",
                hint="name a new or an empty directory",
            )

    def close(self) -> None:
        """Close the directory; harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def names(self) -> list[str]:
        """The names in the directory, sorted."""
        return sorted(os.listdir(self.fd))

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a regular file. ``FileNotFoundError`` is left to the caller."""
        path = self.path / name
        try:
            # Not blocking: a FIFO in place of the file must not hang us.
            fd = os.open(name, flags | SAFE | os.O_NONBLOCK, 0o600, dir_fd=self.fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ImageDamaged(f"{path} is a symbolic link, expected a file") from error
            if error.errno in (errno.ENXIO, errno.ENODEV):
                raise ImageDamaged(f"{path} is no regular file") from error
            explain(error, "opening", path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageDamaged(f"{path} is no regular file")
        return fd

    def create(self, name: str) -> int:
        """A descriptor of the new, empty file ``name``, mode 0600."""
        with explained("making", self.path / name):
            point("create")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE
            return os.open(name, flags, 0o600, dir_fd=self.fd)

    def publish(self, fd: int, name: str) -> None:
        """Give the finished ``name.part`` its name: on disk when this returns."""
        with explained("writing", self.path / name):
            point("fdatasync")
            os.fdatasync(fd)
            point("rename")
            os.rename(name + PART, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            point("fsync of the directory")
            os.fsync(self.fd)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        try:
            point("unlink")
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return
        except OSError as error:
            explain(error, "removing", self.path / name)

    def remove_parts(self) -> None:
        """Remove what a killed writer left unfinished, and bring to disk what it renamed."""
        for name in self.names():
            if name.endswith(PART):
                self.remove(name)
        with explained("writing", self.path):
            point("fsync of the directory")
            os.fsync(self.fd)

    def lock(self) -> int:
        """A descriptor that holds the chain's lock until it is closed.

        Raises ``CrtraceError`` naming the process that has it.
        """
        fd = self.open_file(LOCK_NAME, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except BlockingIOError as error:
            owner = _holder(fd)
            os.close(fd)
            raise CrtraceError(
                f"chain {self.path} is being written by {owner}",
                hint="end that crtrace first, or write to another directory",
            ) from error
        except OSError as error:
            os.close(fd)
            explain(error, "locking", self.path / LOCK_NAME)
        return fd


def _holder(fd: int) -> str:
    """Who holds the lock of a file: as the kernel says, if it can, or as the file does."""
    lock = os.fstat(fd)
    file = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    with suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            # "1: FLOCK ADVISORY WRITE PID DEVICE:INODE 0 EOF"; PID as our PID namespace has it.
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == file:
                return f"pid {fields[4]}"
    text = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
    if not text.isdecimal():
        return "an unknown process"
    elsewhere = "" if os.path.exists(f"/proc/{text}") else " of another PID namespace"
    return f"pid {text}{elsewhere}"


def sync_parent(path: Path) -> None:
    """Bring the name of a file or directory to disk."""
    try:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it need not be readable
        os.sync()
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
