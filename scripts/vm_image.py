"""Disk images with one kernel each, made by debootstrap and kept until their recipe changes.

All that ``scripts/setup test`` would fetch is put in: Debian packages from the mirror that this
machine's apt uses, Python packages as wheels that pip finds without a network. At the end the
image is booted once and ``scripts/setup test`` is run in it, so that later boots find everything
in place.

Whatever runs in a root being made has mount and process namespaces of its own, which end with it:
nothing is mounted on the host, and nothing needs a loop device.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.vm_machine import TREE, Image, Size, VmError, command_text, run, say


@dataclass(frozen=True)
class Kernel:
    """A kernel to run on: its version, the Debian release of the guest, and the one that the kernel
    is taken from where that is another: older ones have no Python that is new enough."""

    version: str
    suite: str
    taken_from: str = ""
    packages: tuple[str, ...] = ()
    """What it has besides: peers to measure beside us, which not every release has."""


KERNELS = (
    Kernel("6.12", "trixie", packages=("criu",)),
    Kernel("6.1", "bookworm"),
    Kernel("5.10", "bookworm", taken_from="bullseye"),
)
"""The first is the default."""

LINUX = ("linux-image-amd64", "linux-headers-amd64")
SYSTEM = ("initramfs-tools", "zstd", "kmod", "iproute2", "procps")
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "ext4")
WHEELS = "usr/share/crtrace/wheels"
EDITABLE = "editables"
"""What hatchling asks for besides itself when an install is editable."""
DISK = "8G"

INIT = """\
#!/bin/bash
# The first process. What it has to do is on the second disk: see scripts/vm_guest of crtrace.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
tar -x -C /run -f /dev/vdb job && exec bash /run/job/guest
"""
NO_SERVICES = "#!/bin/sh\nexit 101\n"
PIP = f"[global]\nno-index = true\nfind-links = /{WHEELS}\n"


# --- What an image depends on -------------------------------------------------------------------


def fingerprint(kernel: Kernel, *more: str) -> str:
    """Changes when the image has to be made again, or what also depends on more of our files."""
    digest = hashlib.sha256(repr(kernel).encode())
    for name in ("scripts/vm_image.py", "scripts/setup", "pyproject.toml", *more):
        digest.update((TREE / name).read_bytes())
    return digest.hexdigest()


def find_kernel(version: str) -> Kernel:
    """The row of the list."""
    for kernel in KERNELS:
        if kernel.version == version:
            return kernel
    known = ", ".join(kernel.version for kernel in KERNELS)
    raise VmError(f"there is no kernel {version} in the list, which has {known}")


def debian_mirror(targets: str) -> str | None:
    """Debian's main archive among the lines that apt has on its sources: label, tab, URI."""
    for line in targets.splitlines():
        label, _, uri = line.partition("\t")
        if label == "Debian" and uri.startswith(("http://", "https://")):
            return uri.rstrip("/")
    return None


def mirror() -> str:
    """Where this machine's own apt gets Debian from."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL)\t$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if found := debian_mirror(targets):
        return found
    raise VmError("apt knows no Debian mirror that is reached by http: after `apt-get update`, its "
                  "sources must have one, or name one with --mirror")  # fmt: skip


def requirements(project: str) -> list[str]:
    """All that pip is asked for by ``scripts/setup test``, from the text of pyproject.toml."""
    facts = tomllib.loads(project)
    return [
        *facts["project"]["dependencies"],
        *facts["project"]["optional-dependencies"]["test"],
        *facts["build-system"]["requires"],
        EDITABLE,
    ]


# --- Making one ---------------------------------------------------------------------------------


def quietly(*command: str | Path) -> str:
    """Run a command, whose output is of interest only when it fails."""
    # Whatever happens to us, it ends with us, and its mounts with it.
    alone = shlex.split("setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child")
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        [*alone, *command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-40:])
        raise VmError(f"{end}\nthis failed: {' '.join(map(str, command))}")
    return done.stdout


class Root:
    """The tree of a guest's disk while it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str) -> str:
        """Run a command inside."""
        return quietly(
            "sh", "-c",
            'mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" && exec chroot "$@"',
            "sh", self.path, "env", "-i", *_proxies(), "HOME=/root", "LC_ALL=C",
            "DEBIAN_FRONTEND=noninteractive", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *command,
        )  # fmt: skip

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        """Make a file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def install(self, packages: Sequence[str]) -> None:
        """Install Debian packages, and keep no archives."""
        self.run("apt-get", "-qq", "update")
        self.run("apt-get", "-qq", "--yes", "--no-install-recommends", "install", *packages)
        self.run("apt-get", "clean")


def _proxies() -> list[str]:
    names = ("http_proxy", "https_proxy", "no_proxy")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def make_root(path: Path, kernel: Kernel, source: str | None, more: Sequence[str] = ()) -> Root:
    """Everything that a guest needs before it is booted, and packages that not all need."""
    source = source or mirror()
    say(f"making a root of Debian {kernel.suite} from {source}")
    minimal = ("--variant=minbase", "--include=ca-certificates")
    quietly("debootstrap", *minimal, kernel.suite, path, source)
    root = Root(path)
    root.write("usr/sbin/policy-rc.d", NO_SERVICES, 0o755)
    root.write("etc/hostname", "crtrace\n")
    root.write("etc/hosts", "127.0.0.1 localhost crtrace\n")
    root.write("etc/initramfs-tools/conf.d/crtrace", "MODULES=list\n")
    root.write("etc/initramfs-tools/modules", "\n".join([*MODULES, ""]))
    root.write("sbin/crtrace-init", INIT, 0o755)
    say("installing packages, the kernel among them")
    linux = LINUX
    if older := kernel.taken_from:
        root.write("etc/apt/sources.list.d/kernel.list", f"deb {source} {older} main\n")
        linux = tuple(f"{name}/{older}" for name in LINUX)
    root.install([*linux, *SYSTEM, *setup_packages(), *kernel.packages, *more])
    add_wheels(root)
    (path / "usr/sbin/policy-rc.d").unlink()
    return root


def setup_packages() -> list[str]:
    """The Debian packages that ``scripts/setup test`` makes sure of."""
    return quietly(TREE / "scripts/setup", "packages", "test").split()


def add_wheels(root: Root) -> None:
    """What pip will need, for the guest's Python and libc, fetched as pip is configured here."""
    say("fetching Python packages")
    python = root.run("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    libc = int(root.run("getconf", "GNU_LIBC_VERSION").rpartition(".")[2])
    platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in range(17, libc + 1))]
    quietly(
        sys.executable, "-m", "pip", "download", "--quiet", "--dest", root.path / WHEELS,
        "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
        *(f"--platform={platform}" for platform in platforms),
        *requirements((TREE / "pyproject.toml").read_text()),
    )  # fmt: skip
    root.write("etc/pip.conf", PIP)


def _make(kernel: Kernel, source: str | None, size: Size, cache: Path, work: Path) -> None:
    root = make_root(work / "root", kernel, source)
    for name, where in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (path,) = (root.path / "boot").glob(where)
        shutil.copy(path, work / name)
    quietly("mke2fs", "-q", "-t", "ext4", "-d", root.path, work / "disk", DISK)
    shutil.rmtree(root.path)
    say("booting it for the first time, to run scripts/setup test")
    code = run(
        image_in(work), size, command_text(["scripts/setup", "test"], {}), cache,
        out=sys.stderr.buffer, err=sys.stderr.buffer, writable=True,
    )  # fmt: skip
    if code != 0:
        raise VmError(f"scripts/setup test failed in the new guest ({code})")


def image_in(directory: Path) -> Image:
    """The files of an image."""
    return Image(directory / "disk", directory / "vmlinuz", directory / "initrd")


# --- Keeping them -------------------------------------------------------------------------------


def up_to_date(directory: Path, recipe: str) -> bool:
    """Whether what the directory has was made by this recipe."""
    stamp = directory / "recipe"
    return stamp.exists() and stamp.read_text() == recipe


def keep(directory: Path, recipe: str, make: Callable[[Path], None]) -> None:
    """Have the directory filled by ``make``, now if there is none or its recipe has changed.

    One is made at a time. What was being made when somebody was killed is removed by the next.
    """
    if up_to_date(directory, recipe):
        return
    cache = directory.parent
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(".new-*"):
            shutil.rmtree(left)
        if up_to_date(directory, recipe):
            return
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as work:
            made = Path(work) / "made"
            made.mkdir()
            make(made)
            (made / "recipe").write_text(recipe)
            shutil.rmtree(directory, ignore_errors=True)
            made.rename(directory)


def get_image(kernel: Kernel, source: str | None, size: Size, cache: Path) -> Image:
    """The image with this kernel."""
    directory = cache / kernel.version
    keep(directory, fingerprint(kernel), lambda work: _make(kernel, source, size, cache, work))
    return image_in(directory)
