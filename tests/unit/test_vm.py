"""What scripts/vm decides before it starts anything, and what it makes of results."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from scripts import vm, vm_box, vm_image, vm_machine, vm_matrix

ROOT = Path(__file__).resolve().parents[2]
SIZE = vm_machine.Size(2, 1024)
IMAGE = vm_machine.Image(Path("disk"), Path("kernel"), Path("initrd"))


# --- The command line ---------------------------------------------------------------------------


def test_all_after_the_dashes_belongs_to_the_command() -> None:
    command, options = vm.parse(["run", "--kernel", "6.1", "--", "ls", "--kernel", "--", "-l"])
    assert command == "run"
    assert options.kernels == ["6.1"]
    assert options.words == ["ls", "--kernel", "--", "-l"]


def test_the_first_kernel_is_the_default_and_the_matrix_has_all() -> None:
    assert vm.parse(["test"])[1].kernels == [vm_image.KERNELS[0].version]
    everywhere = [*(kernel.version for kernel in vm_image.KERNELS), "host"]
    assert vm.parse(["matrix"])[1].kernels == everywhere
    assert vm.parse(["matrix", "--kernel", "host"])[1].kernels == ["host"]


def test_directories_do_not_depend_on_where_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = vm.parse(["test", "--cache", "here"])[1]
    assert (options.cache, options.results) == (tmp_path / "here", tmp_path / "here/results")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        ["run", "--"],
        ["run", "--kernel", "2.4", "--", "true"],
        ["test", "--kernel", "6.1", "--kernel", "6.12"],
        ["run", "--kernel", "host", "--", "true"],
        ["box", "--kernel", "6.1"],
        ["test", "tests/unit"],
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        vm.parse(arguments)
    assert refused.value.code == 2
    assert "usage: scripts/vm" in capsys.readouterr().err


def test_only_what_is_ours_goes_into_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name in ("CRTRACE_ARMER", "CI", "CIRCUS", "AWS_SECRET"):
        monkeypatch.setenv(name, "x")
    assert vm.variables() == {"CRTRACE_ARMER": "x", "CI": "x"}


# --- Images -------------------------------------------------------------------------------------


def test_each_kernel_has_a_name_of_its_own() -> None:
    assert len({kernel.version for kernel in vm_image.KERNELS}) == len(vm_image.KERNELS)
    assert vm_image.find_kernel("6.1").suite == "bookworm"
    with pytest.raises(vm_machine.VmError, match="no kernel 5"):
        vm_image.find_kernel("5")


def test_the_mirror_is_debians_own_archive() -> None:
    targets = (
        "Other\thttp://other.example/debian/\n"
        "Debian-Security\thttp://security.example/debian-security/\n"
        "Debian\tfile:/media/cdrom/\n"
        "Debian\thttps://mirror.example/debian/\n"
        "Debian\thttp://second.example/debian/\n"
    )
    assert vm_image.debian_mirror(targets) == "https://mirror.example/debian"


def test_without_a_mirror_none_is_made_up() -> None:
    assert vm_image.debian_mirror("Ubuntu\thttp://mirror.example/ubuntu/\n") is None
    assert vm_image.debian_mirror("") is None


def test_wheels_are_fetched_for_all_that_setup_asks_pip_for() -> None:
    project = """
        [build-system]
        requires = ["builder>=1"]
        [project]
        dependencies = ["needed>=2"]
        [project.optional-dependencies]
        test = ["tester==3.*"]
        """
    expected = {"builder>=1", "needed>=2", "tester==3.*", vm_image.EDITABLE}
    assert set(vm_image.requirements(project)) == expected


@pytest.fixture
def recipe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files that a recipe is made of, in a tree that takes the place of ours."""
    for name in ("scripts/vm_image.py", "scripts/setup", "pyproject.toml", "scripts/vm_box.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(vm_image, "TREE", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["scripts/vm_image.py", "scripts/setup", "pyproject.toml"])
def test_a_recipe_changes_with_each_of_its_files(recipe_files: Path, name: str) -> None:
    kernel = vm_image.KERNELS[0]
    before = vm_image.fingerprint(kernel)
    assert vm_image.fingerprint(kernel) == before
    with (recipe_files / name).open("a") as file:
        file.write("# another\n")
    assert vm_image.fingerprint(kernel) != before


def test_a_recipe_is_of_one_kernel_and_of_what_else_is_named(recipe_files: Path) -> None:
    kernel = vm_image.KERNELS[0]
    assert len({vm_image.fingerprint(each) for each in vm_image.KERNELS}) == len(vm_image.KERNELS)
    assert vm_image.fingerprint(kernel, "scripts/vm_box.py") != vm_image.fingerprint(kernel)


def test_an_image_is_made_once_for_each_recipe(tmp_path: Path) -> None:
    directory, made = tmp_path / "cache/6.12", []

    def make(work: Path) -> None:
        made.append(work)
        (work / "disk").write_text(str(len(made)))

    for recipe in ("a", "a", "b"):
        vm_image.keep(directory, recipe, make)
    assert len(made) == 2
    assert (directory / "disk").read_text() == "2"
    assert sorted(path.name for path in directory.parent.iterdir()) == ["6.12", "lock"]


def test_an_image_that_could_not_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    directory = tmp_path / "6.12"
    vm_image.keep(directory, "a", lambda work: (work / "disk").touch())

    def fail(work: Path) -> None:
        (work / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vm_image.keep(directory, "b", fail)
    assert (directory / "disk").exists()
    assert vm_image.up_to_date(directory, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6.12", "lock"]


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".new-killed/made/root").mkdir(parents=True)
    vm_image.keep(tmp_path / "6.12", "a", lambda work: None)
    assert not (tmp_path / ".new-killed").exists()


# --- Machines -----------------------------------------------------------------------------------


def test_the_tree_goes_in_as_it_is_without_what_was_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    for name in ("scripts/vm_guest", "crtrace/cli.py", ".ci/run", "tests/targets/tiny.c",
                 ".git/HEAD", ".venv/bin/python", "crtrace/__pycache__/cli.pyc",
                 "tests/targets/build/tiny", ".mypy_cache/x", "dist/x.whl"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "crtrace/bpf").symlink_to("../bpf")
    monkeypatch.setattr(vm_machine, "TREE", tree)
    vm_machine.pack(tmp_path / "job.tar", "exec true\n")
    with tarfile.open(tmp_path / "job.tar") as archive:
        assert archive.getnames() == [
            "job/guest", "job/command", "tree/.ci/run", "tree/crtrace/bpf", "tree/crtrace/cli.py",
            "tree/scripts/vm_guest", "tree/tests/targets/tiny.c",
        ]  # fmt: skip
        command = archive.extractfile("job/command")
        assert command is not None
        assert command.read() == b"exec true\n"
        assert archive.getmember("tree/crtrace/bpf").issym()


def test_a_command_keeps_its_words() -> None:
    words = ["printf", "%s|", "a b", "$HOME", "'", "*"]
    text = vm_machine.command_text(words, {"CRTRACE_X": "it's"})
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "a b|$HOME|'|*|"
    text = vm_machine.command_text(["sh", "-c", 'echo "$CRTRACE_X"'], {"CRTRACE_X": "it's"})
    assert subprocess.check_output(["bash", "-c", text], text=True) == "it's\n"


def test_a_disk_is_only_written_while_it_is_made() -> None:
    def disk(writable: bool) -> str:
        command = vm_machine.qemu_command(
            IMAGE, SIZE, "tcg", Path("job"), Path("log"), {"out": 7}, writable
        )
        (drive,) = (word for word in command if word.startswith("file=disk,"))
        return drive

    assert "snapshot=on" in disk(writable=False)
    assert "snapshot=off" in disk(writable=True)


def test_kvm_is_not_tried_again_until_the_next_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: True)
    monkeypatch.setattr(vm_machine, "_boot_id", lambda: "this boot")
    assert vm_machine.accelerators(tmp_path) == ["kvm", "tcg"]
    (tmp_path / "kvm-failed").write_text("the last boot")
    assert vm_machine.accelerators(tmp_path) == ["kvm", "tcg"]
    (tmp_path / "kvm-failed").write_text("this boot")
    assert vm_machine.accelerators(tmp_path) == ["tcg"]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert vm_machine.accelerators(tmp_path / "other") == ["tcg"]


def test_the_guest_is_ready_and_ends_when_it_says_so() -> None:
    out = io.BytesIO()
    guest = vm_machine.Conversation({"out": out})
    guest.heard("status", b"rea")
    assert not guest.ready
    guest.heard("status", b"dy\n")
    guest.heard("out", b"some")
    assert guest.ready
    assert guest.code is None
    guest.heard("status", b"exit 7\n")
    assert guest.code == 7
    assert out.getvalue() == b"some"


# --- Results ------------------------------------------------------------------------------------

MACHINE = {
    "name": "machine", "importance": "required", "ok": True,
    "found": "x86_64, pages of 4096 bytes, Linux 6.1.0-test",
}  # fmt: skip
JUNIT = """<testsuites><testsuite>
    <testcase classname="tests.a" name="good"/>
    <testcase classname="tests.a" name="bad"><failure message="no">no</failure></testcase>
    <testcase classname="tests.a" name="worse"><error message="no">no</error></testcase>
    <testcase classname="tests.b" name="b[1]"><skipped message="cannot run here: no x"/></testcase>
    <testcase classname="tests.b" name="b[2]"><skipped message="cannot run here: no x"/></testcase>
    <testcase classname="tests.b" name="b[3]"><skipped message="cannot run here: no y"/></testcase>
    </testsuite></testsuites>"""


def report(folder: Path, armer: str, *probes: dict[str, object], works: bool = True) -> Path:
    """Leave what ``crtrace check --json`` says; the directory of that armer."""
    directory = folder / armer
    directory.mkdir()
    found = {"works": works, "armer": armer if works else None, "probes": [MACHINE, *probes]}
    (directory / "check.json").write_text(json.dumps(found))
    return directory


def test_results_are_counted_for_each_armer_that_works(tmp_path: Path) -> None:
    covered = {"name": "BPF coverage", "importance": "better", "ok": True, "found": "all"}
    report(tmp_path, "soft-dirty", works=False)
    (report(tmp_path, "userfaultfd", covered) / "junit.xml").write_text(JUNIT)
    (report(tmp_path, "compare") / "junit.xml").write_text("<testsuite><testcase/></testsuite>")
    outcomes = vm_matrix.outcomes_in(tmp_path, "a VM", 0)
    assert outcomes[0].skipped == {"no x": 2, "no y": 1}
    assert vm_matrix.table(outcomes).splitlines()[2:] == [
        "| Linux 6.1, a VM | userfaultfd | all | 1 | 3 | 2 |",
        "| Linux 6.1, a VM | compare | page faults | 1 | 0 | 0 |",
        "",
        "- Linux 6.1, a VM, userfaultfd, skipped: 2 × no x; 1 × no y",
        "- Linux 6.1, a VM, userfaultfd, failed: tests.a::bad",
        "- Linux 6.1, a VM, userfaultfd, failed: tests.a::worse",
    ]


def test_where_watching_cannot_work_that_is_a_failed_row(tmp_path: Path) -> None:
    lacking = {"name": "BPF programs", "importance": "required", "ok": False}
    for armer in vm_matrix.ARMERS:
        report(tmp_path, armer, lacking, works=False)
    (outcome,) = vm_matrix.outcomes_in(tmp_path, "a VM", 0)
    assert (outcome.armer, outcome.failed) == ("none", ["crtrace check: BPF programs"])


def test_a_run_that_left_no_report_has_failed(tmp_path: Path) -> None:
    assert vm_matrix.outcomes_in(tmp_path, "here", 0)[0].failed == ["crtrace check: no report"]
    (outcome,) = vm_matrix.outcomes_in(tmp_path, "here", 125)
    assert outcome.failed == ["the run as a whole, exit code 125"]
    report(tmp_path, "compare")
    (outcome,) = vm_matrix.outcomes_in(tmp_path, "here", 0)
    assert outcome.failed == ["pytest as a whole: it left no report"]


def test_a_machine_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise vm_machine.VmError("it burns\nand the console said much")

    monkeypatch.setattr(vm, "in_guest", fail)
    monkeypatch.setattr(vm, "SCRIPT", 'mkdir "$CRTRACE_RESULTS/compare"; exit 3')
    kernels = ["--kernel", "6.1", "--kernel", "host"]
    options = vm.parse(["matrix", *kernels, "--cache", str(tmp_path)])[1]
    assert vm.command_matrix(options) == 1
    printed = capfd.readouterr().out
    assert "| Debian bookworm in a VM | none |  | 0 | 0 | 1 |" in printed
    assert "failed: the machine: it burns\n" in printed
    assert "the host, none, failed: the run as a whole, exit code 3" in printed


def test_the_matrix_runs_tests_that_there_are() -> None:
    assert [name for name in vm_matrix.TESTS if not (ROOT / name.split("::")[0]).exists()] == []
    for armer in vm_matrix.ARMERS:
        assert armer in vm_matrix.SCRIPT


# --- Vagrant ------------------------------------------------------------------------------------


def test_the_boot_sectors_hold_the_partition_and_fit_before_it() -> None:
    boot, core = b"\xeb" * 512, b"\xc0" * 1000
    data = vm_box.boot_sectors(boot, core)
    assert data[:440] == boot[:440]
    assert data[510:512] == b"\x55\xaa"
    assert data[512:] == core
    active, kind, start, count = struct.unpack("<B3xB3xII", data[446:462])
    assert (active, kind, start * 512) == (0x80, 0x83, vm_box.START)
    assert (start + count) * 512 == vm_box.SIZE
    with pytest.raises(vm_machine.VmError, match="room"):
        vm_box.boot_sectors(boot, bytes(vm_box.START))


@pytest.mark.parametrize("driver", ["kvm", "qemu"])
def test_the_vagrantfile_is_valid(tmp_path: Path, driver: str) -> None:
    if not shutil.which("vagrant"):
        pytest.skip("cannot run here: vagrant is not installed")
    homes = {name: str(tmp_path) for name in ("VAGRANT_HOME", "VAGRANT_DOTFILE_PATH")}
    done = subprocess.run(
        ["vagrant", "validate"],
        cwd=ROOT, env={**os.environ, **homes, "CRTRACE_DRIVER": driver},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
