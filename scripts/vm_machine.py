"""One boot of a virtual machine: the tree goes in, a command runs, and what it says comes out.

QEMU boots the image's kernel directly. The second disk is a tar archive with the tree and the
command (see ``scripts/vm_guest``), and virtio serial ports bring out stdout, stderr, the exit
code and files, each through a socket that QEMU inherits. Nothing of that needs a network, a server
or a file system that the guest's kernel might lack, and nothing is left when QEMU has ended.
"""

from __future__ import annotations

import io
import os
import selectors
import shlex
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TREE = Path(__file__).resolve().parents[1]
NOT_SENT = ("__pycache__", "build", "dist", "fuzz-findings")
SENT_HIDDEN = (".ci", ".gitignore")
PORTS = ("out", "err", "results", "status")

READY_WITHIN = {"kvm": 60, "tcg": 900}
"""Seconds until the guest must have said that it is there. An emulator's host may be busy."""

# In a thread for each processor, one may run code that another is just patching, as kernels do with
# their tracepoints: they crash.
ACCELERATOR = {"kvm": "kvm", "tcg": "tcg,thread=single"}

# QEMU 7.2 emulates AVX2 wrongly: numpy then finds what is not there, and misses what is.
CPU = {"kvm": "host", "tcg": "max,-avx2"}
CMDLINE = "root=/dev/vda rw console=ttyS0 quiet panic=-1 net.ifnames=0 secretmem.enable=1"
# Unknown variables become the environment of the first process. Emulated, a test takes longer than
# its limits allow for, and page tables that are switched in each system call cost most.
CMDLINE_OF = {
    "kvm": "",
    "tcg": "mitigations=off PYTEST_TIMEOUT=3600 CRTRACE_SLOWNESS=20",
}


class VmError(Exception):
    """A machine could not be made or run; the text says what to do."""


class NotReady(VmError):
    """The guest ended or kept silent before it had begun with its command."""


@dataclass(frozen=True)
class Image:
    """What QEMU boots."""

    disk: Path
    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Size:
    """How much of the host a machine gets."""

    cpus: int
    mib: int


def say(text: str) -> None:
    """Tell what is going on, on stderr."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


# --- What goes in -------------------------------------------------------------------------------


def is_sent(path: Path) -> bool:
    """Whether a file or directory of the tree is source, and not made from it or for tools."""
    if path.name.startswith("."):
        return path.name in SENT_HIDDEN
    return path.name not in NOT_SENT


def sources(directory: Path) -> Iterator[Path]:
    """All files of the tree as it is now, committed or not."""
    for path in sorted(directory.iterdir()):
        if not is_sent(path):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from sources(path)
        else:
            yield path


def command_text(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """The shell script that runs this command."""
    # Python would keep what it prints until there are pages of it.
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    return "\n".join(["export PYTHONUNBUFFERED=1", *lines, f"exec {shlex.join(command)}", ""])


def pack(to: Path, command: str) -> None:
    """Write the second disk."""
    with tarfile.open(to, "w") as archive:
        for name, data in (("guest", (TREE / "scripts/vm_guest").read_bytes()),
                           ("command", command.encode())):  # fmt: skip
            member = tarfile.TarInfo(f"job/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for path in sources(TREE):
            archive.add(path, f"tree/{path.relative_to(TREE)}", filter=_owned_by_root)


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


# --- How it runs --------------------------------------------------------------------------------


def accelerators(cache: Path) -> list[str]:
    """What to try, in this order. Where KVM has failed, it is not tried again until a reboot."""
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    failed = _verdict(cache).exists() and _verdict(cache).read_text() == _boot_id()
    return ["kvm", "tcg"] if usable and not failed else ["tcg"]


def _verdict(cache: Path) -> Path:
    return cache / "kvm-failed"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def qemu_command(
    image: Image, size: Size, accelerator: str, job: Path, log: Path, ports: Mapping[str, int],
    writable: bool,
) -> list[str]:  # fmt: skip
    """The command line; ``ports`` are descriptors of sockets."""
    snapshot = "off" if writable else "on"
    command = [
        "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64",
        "-accel", ACCELERATOR[accelerator], "-cpu", CPU[accelerator],
        "-smp", str(size.cpus), "-m", f"{size.mib}M",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-serial", f"file:{log}",
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", f"{CMDLINE} init=/sbin/crtrace-init {CMDLINE_OF[accelerator]}",
        "-drive", f"file={image.disk},format=raw,if=virtio,snapshot={snapshot},cache=unsafe",
        "-drive", f"file={job},format=raw,if=virtio,readonly=on",
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
    ]  # fmt: skip
    for name, descriptor in ports.items():
        command += ["-chardev", f"socket,id={name},fd={descriptor}"]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    return command


@contextmanager
def _started(
    command: Sequence[str], descriptors: Sequence[int], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU, until the end of the block. Ctrl-C reaches it through us, in a group of its own."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=descriptors,
        process_group=0,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Conversation:
    """What the guest says on its ports, as it comes."""

    def __init__(self, sinks: Mapping[str, IO[bytes]]) -> None:
        self._sinks = sinks
        self._status = b""

    def heard(self, port: str, data: bytes) -> None:
        if port == "status":
            self._status += data
        else:
            self._sinks[port].write(data)
            self._sinks[port].flush()

    @property
    def ready(self) -> bool:
        return b"\n" in self._status

    @property
    def code(self) -> int | None:
        words = self._status.decode().split()
        return int(words[-1]) if "exit" in words[:-1] else None

    def listen(self, sockets: Mapping[str, socket.socket], patience: float) -> None:
        """Until all ports are closed, which is when QEMU has ended."""
        deadline = time.monotonic() + patience
        with selectors.DefaultSelector() as selector:
            for port, end in sockets.items():
                selector.register(end, selectors.EVENT_READ, port)
            while selector.get_map():
                left = None if self.ready else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise NotReady(f"the guest has said nothing for {patience:.0f} s")
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        self.heard(key.data, data)
                    else:
                        selector.unregister(key.fileobj)


def _boot(
    image: Image, size: Size, accelerator: str, job: Path, sinks: Mapping[str, IO[bytes]],
    writable: bool,
) -> int:  # fmt: skip
    conversation = Conversation(sinks)
    log = job.with_name("console")
    with ExitStack() as stack:
        sockets, theirs = {}, {}
        for port in PORTS:
            ours, qemus = map(stack.enter_context, socket.socketpair())
            sockets[port], theirs[port] = ours, qemus
        descriptors = {port: end.fileno() for port, end in theirs.items()}
        command = qemu_command(image, size, accelerator, job, log, descriptors, writable)
        with log.with_name("qemu").open("wb") as complaints:
            stack.enter_context(_started(command, list(descriptors.values()), complaints))
            for end in theirs.values():
                end.close()
            try:
                conversation.listen(sockets, READY_WITHIN[accelerator])
            except NotReady as error:
                raise NotReady(f"{error}\n{_last_words(log)}") from None
    if conversation.code is not None:
        return conversation.code
    failure = VmError if conversation.ready else NotReady
    raise failure(f"the guest has ended before its command did\n{_last_words(log)}")


def _last_words(log: Path) -> str:
    """The ends of what QEMU and the guest's kernel have said."""
    texts = [path.read_text(errors="replace") for path in (log.with_name("qemu"), log)
             if path.exists()]  # fmt: skip
    return "\n".join(line for text in texts for line in text.splitlines()[-25:])


def run(
    image: Image, size: Size, command: str, cache: Path, *,
    out: IO[bytes], err: IO[bytes], results: Path | None = None, writable: bool = False,
) -> int:  # fmt: skip
    """Boot, run the command in the tree, and switch off; the exit code is the command's.

    What it left in ``$CRTRACE_RESULTS`` is put into ``results``. Unless ``writable``, the image
    stays as it is.
    """
    with tempfile.TemporaryDirectory(prefix="crtrace-vm-") as directory:
        job = Path(directory) / "job.tar"
        pack(job, command)
        archive = job.with_name("results.tar")
        for accelerator in accelerators(cache):
            with archive.open("wb") as written:
                sinks = {"out": out, "err": err, "results": written}
                try:
                    code = _boot(image, size, accelerator, job, sinks, writable)
                except NotReady as error:
                    if accelerator != "kvm":
                        raise
                    _verdict(cache).write_text(_boot_id())
                    say(f"KVM does not run the guest here, so it is emulated: {error}")
                    continue
            if results:
                unpack = ["tar", "-x", "--no-same-owner", "-C", str(results), "-f", str(archive)]
                subprocess.run(unpack, check=True)
            return code
    raise AssertionError("emulation is always tried")
