"""A Vagrant box for libvirt: Debian 13, and all that scripts/setup would fetch.

The disk has one partition, made and filled by mke2fs without a mount, and GRUB, put where the BIOS
looks for it by the few lines below: grub-install would want a disk that is attached here.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

from scripts.vm_image import KERNELS, Root, fingerprint, keep, make_root, quietly
from scripts.vm_machine import VmError, say

NAME = "crtrace/debian-13"
PACKAGES = (
    "systemd-sysv", "systemd-resolved", "dbus", "udev", "openssh-server", "sudo", "rsync",
    "grub-pc-bin",
)  # fmt: skip
KEYS = (
    "usr/share/rubygems-integration/all/gems/vagrant-*/keys/vagrant.pub*",
    "opt/vagrant/embedded/gems/gems/vagrant-*/keys/vagrant.pub*",
)
"""Vagrant's well-known public keys, which everybody has the other half of."""

GIB = 1 << 30
SIZE = 10 * GIB
SECTOR = 512
START = 2048 * SECTOR
"""Where the partition begins. GRUB has the room before it."""
ROOM = START - SECTOR
LINUX = 0x83
ACTIVE = 0x80
BOOT_CODE = 440

GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "normal", "linux", "search", "search_label")
GRUB = """\
search --no-floppy --label crtrace --set=root
linux /vmlinuz root=LABEL=crtrace ro console=tty0 console=ttyS0 net.ifnames=0 quiet
initrd /initrd.img
boot
"""
# With the address as identity, a machine that is made again is given its old lease.
NETWORK = """\
[Match]
Name=eth*
[Network]
DHCP=ipv4
[DHCPv4]
ClientIdentifier=mac
"""


def vagrant_keys() -> str:
    """The public keys, from Vagrant as it is installed here."""
    found = [path for pattern in KEYS for path in sorted(Path("/").glob(pattern))]
    if not found:
        raise VmError(f"Vagrant's public keys are in none of {', '.join(KEYS)}: install vagrant")
    return "".join(path.read_text() for path in found)


def fit_for_vagrant(root: Root) -> None:
    """A user that Vagrant can be, the network, and what GRUB starts."""
    root.run("useradd", "--create-home", "--shell", "/bin/bash", "vagrant")
    root.write("etc/sudoers.d/vagrant", "vagrant ALL=(ALL) NOPASSWD: ALL\n", 0o440)
    root.write("home/vagrant/.ssh/authorized_keys", vagrant_keys(), 0o600)
    root.run("chown", "-R", "vagrant:", "/home/vagrant/.ssh")
    root.write("etc/systemd/network/eth.network", NETWORK)
    root.run("systemctl", "enable", "systemd-networkd", "systemd-resolved", "ssh")
    root.write("etc/fstab", "LABEL=crtrace / ext4 defaults 0 1\n")
    root.write("boot/grub/grub.cfg", GRUB)
    root.run("grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub",
             "-o", "/boot/grub/core.img", *GRUB_MODULES)  # fmt: skip


def boot_sectors(boot: bytes, core: bytes) -> bytes:
    """What stands before the partition: GRUB's first sector with the table, then its core.

    Both images expect each other where they are put here, so no block list has to be written.
    """
    if len(core) > ROOM:
        raise VmError(f"GRUB's core image has {len(core)} bytes and there is room for {ROOM}")
    partition = struct.pack(
        "<B3sB3sII", ACTIVE, b"\xfe\xff\xff", LINUX, b"\xfe\xff\xff",
        START // SECTOR, (SIZE - START) // SECTOR,
    )  # fmt: skip
    first = boot[:BOOT_CODE].ljust(446, b"\0") + partition.ljust(64, b"\0") + b"\x55\xaa"
    return first + core


def make_disk(root: Root, disk: Path) -> None:
    """A disk that boots by itself."""
    with disk.open("wb") as raw:
        raw.truncate(SIZE)
    quietly(
        "mke2fs", "-q", "-t", "ext4", "-L", "crtrace", "-O", "^metadata_csum_seed,^orphan_file",
        "-E", f"offset={START}", "-d", root.path, disk, f"{(SIZE - START) // 1024}k",
    )  # fmt: skip
    grub = root.path / "usr/lib/grub/i386-pc/boot.img"
    with disk.open("r+b") as raw:
        core = (root.path / "boot/grub/core.img").read_bytes()
        raw.write(boot_sectors(grub.read_bytes(), core))


def _make(source: str | None, work: Path, final: Path) -> None:
    root = make_root(work / "root", KERNELS[0], source, PACKAGES)
    fit_for_vagrant(root)
    say("making the box")
    make_disk(root, work / "raw")
    shutil.rmtree(root.path)
    quietly("qemu-img", "convert", "-c", "-o", "compression_type=zstd", "-O", "qcow2",
            work / "raw", work / "box.img")  # fmt: skip
    facts = {"provider": "libvirt", "format": "qcow2", "virtual_size": SIZE // GIB}
    (work / "metadata.json").write_text(json.dumps(facts))
    quietly("tar", "-c", "-C", work, "-f", work / "crtrace.box", "metadata.json", "box.img")
    for name in ("raw", "box.img", "metadata.json"):
        (work / name).unlink()
    # Vagrant takes what has another version for another box, and does not use an old copy.
    provider = {"name": "libvirt", "url": f"file://{final}/crtrace.box"}
    version = {"version": time.strftime("%Y%m%d.%H%M%S"), "providers": [provider]}
    (work / "crtrace.json").write_text(json.dumps({"name": NAME, "versions": [version]}))


def get_box(source: str | None, cache: Path) -> Path:
    """The box's catalogue, for ``vagrant box add``."""
    directory = cache / "box"
    recipe = fingerprint(KERNELS[0], "scripts/vm_box.py")
    keep(directory, recipe, lambda work: _make(source, work, directory))
    return directory / "crtrace.json"
