"""What ``crtrace check`` tells on machines that lack something: the lack is real, by seccomp,
namespaces, limits and what can be imported."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from crtrace.track import probes
from crtrace.track.headers import ASSEMBLED
from tests.live.conftest import Spawn
from tests.live.harness import compile_target
from tests.live.runner import CRTRACE, TIMEOUT, as_nobody, fake_bcc, run

REQUIRED = [
    "machine", "privileges", "ptrace", "process memory", "tracefs", "BPF programs", "armer",
]  # fmt: skip
ORDER = ["required", "better", "nice"]
FIELDS = {"name", "importance", "ok", "found", "consequence", "remedy"}


@pytest.fixture(autouse=True)
def nobody_asks_for_an_armer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRTRACE_ARMER", raising=False)


Probes = dict[str, dict[str, Any]]


def check(
    code: int = 0, before: Sequence[object] = (), env: dict[str, str] | None = None
) -> tuple[dict[str, Any], Probes]:
    """The report, whose promises to scripts are held, and its probes by name."""
    words = [str(each) for each in before]
    result = run("check", "--json", before=words, env=env, timeout=3 * TIMEOUT)
    (report,) = result.expect(code).events
    assert set(report) == {"schema_version", "works", "armer", "probes"}
    found = {each["name"]: each for each in report["probes"]}
    assert len(found) == len(report["probes"])
    for each in found.values():
        assert set(each) == FIELDS
        assert each["found"]
        assert each["consequence"]
        assert bool(each["remedy"]) != each["ok"]
    ranks = [ORDER.index(each["importance"]) for each in report["probes"]]
    assert ranks == sorted(ranks)
    works = all(each["ok"] for each in found.values() if each["importance"] == "required")
    assert (report["works"], code) == (works, 0 if works else 12)
    assert (report["armer"] is not None) == works
    return report, found


def lacking(found: Probes) -> set[str]:
    """Names of what does not work."""
    return {name for name, each in found.items() if not each["ok"]}


def without(feature: str) -> list[str]:
    """What to put before a command so that the kernel has not got this."""
    return [str(compile_target("without")), feature]


def apart(*commands: str) -> list[str]:
    """What to put before a command so that it sees other mounts."""
    script = "; ".join([*commands, 'exec "$@"'])
    return ["unshare", "--mount", "sh", "-ec", script, "sh"]


# --- what is printed ---


def test_check_tries_everything_the_most_important_first() -> None:
    report, found = check()
    assert list(found)[: len(REQUIRED)] == REQUIRED
    assert {each["importance"] for each in found.values()} == set(ORDER)
    assert found["armer"]["found"].split(",")[0] == report["armer"]


def test_people_read_what_was_found_what_follows_and_what_to_do() -> None:
    result = run("check", before=without("userfaultfd")).expect(0)
    report, found = check(before=without("userfaultfd"))
    lines = result.stdout.splitlines()
    assert "\033" not in result.stdout
    assert result.stderr == ""
    at = 0
    for name, each in found.items():
        mark = "ok" if each["ok"] else "no"
        at = next(n for n in range(at, len(lines)) if lines[n].startswith(f" {mark}  {name}: "))
        assert lines[at + 1] == f"     {each['consequence']}"
        assert each["ok"] or lines[at + 2] == f"     → {each['remedy']}"
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Required:", "Better to have:", "Nice to have:"]
    assert lines[-1].startswith(f"watch works here, with {report['armer']}: ")


def on_a_terminal(*before: str, env: dict[str, str] | None = None) -> str:
    """What check prints on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*before, *CRTRACE, "check"], stdin=subprocess.DEVNULL, stdout=theirs,
        stderr=subprocess.DEVNULL, cwd="/", env=os.environ | (env or {}),
    ) as process:  # fmt: skip
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 4096):
                said += data
        except OSError:  # the other end is closed
            pass
        finally:
            os.close(ours)
        process.wait(TIMEOUT)
    return said.decode()


def test_colour_is_for_terminals_that_may_have_it() -> None:
    coloured = on_a_terminal(*without("userfaultfd"), env={"NO_COLOR": ""})
    assert "\033[32m ok\033[0m  machine: " in coloured
    assert "\033[33m no\033[0m  userfaultfd" in coloured
    assert "\033[31m no\033[0m  privileges" in on_a_terminal(*as_nobody(), env={"NO_COLOR": ""})
    assert "\033" not in on_a_terminal(env={"NO_COLOR": "1"})


# --- privileges ---


def test_a_user_is_told_which_privileges_are_missing() -> None:
    _, found = check(12, before=as_nobody())
    assert "CAP_SYS_PTRACE" in found["privileges"]["found"]
    assert "run as root" in found["privileges"]["remedy"]
    last = run("check", before=as_nobody()).expect(12).stdout.splitlines()[-1]
    assert last.startswith("watch cannot work here for want of: privileges, ")


def test_root_of_a_container_is_told_how_to_start_it() -> None:
    nothing = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    _, found = check(12, before=nothing)
    assert "CAP_BPF" in found["privileges"]["found"]
    assert "--privileged" in found["privileges"]["remedy"]


def test_capabilities_of_a_user_namespace_do_not_count(spawn: Spawn, tmp_path: Path) -> None:
    inside = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot run here: no user namespaces")
    _, found = check(12, before=inside)
    assert "user namespace" in found["privileges"]["found"]
    result = run("watch", spawn("threads").pid, "-o", tmp_path / "chain", before=inside)
    result.expect(11, "user namespace")


def test_a_pid_namespace_costs_only_the_events() -> None:
    before = ["unshare", "--pid", "--fork", "--mount-proc"]
    _, found = check(before=before)
    assert "process events" in lacking(found)
    assert found["process events"]["importance"] == "better"


@pytest.mark.parametrize(
    ("feature", "probe"),
    [("ptrace", "ptrace"), ("process_vm_readv", "process memory"), ("bpf", "BPF programs")],
)
def test_what_a_container_forbids_is_found_by_trying(feature: str, probe: str) -> None:
    _, found = check(12, before=without(feature))
    assert probe in lacking(found)
    assert "privileges" not in lacking(found)


# --- the kernel and what is installed ---


def test_without_tracefs_the_mount_is_named() -> None:
    gone = "umount -l /sys/kernel/tracing /sys/kernel/debug 2>/dev/null || true"
    _, found = check(12, before=apart(gone))
    assert {"tracefs", "BPF programs"} <= lacking(found)
    assert "mount -t tracefs" in found["tracefs"]["remedy"]


NO_BCC = """raise ModuleNotFoundError("No module named 'bcc'")"""


def test_code_that_was_kept_needs_no_bcc(tmp_path: Path) -> None:
    check()  # keeps it
    _, found = check(env=fake_bcc(tmp_path, NO_BCC))
    assert "BPF compiler" in lacking(found)
    assert "No module named 'bcc'" in found["BPF compiler"]["found"]


def test_without_bcc_and_kept_code_nothing_can_work(tmp_path: Path) -> None:
    fresh = {"BCC_KERNEL_SOURCE": str(tmp_path)}
    _, found = check(12, env=fake_bcc(tmp_path, NO_BCC) | fresh)
    assert {"BPF programs", "BPF compiler"} <= lacking(found)
    assert "No module named 'bcc'" in found["BPF programs"]["found"]


def test_code_that_was_kept_needs_no_headers() -> None:
    if Path("/sys/kernel/kheaders.tar.xz").exists():
        pytest.skip("cannot run here: the kernel carries its headers")
    check()  # keeps it
    hidden = [f"mount -t tmpfs none {path}" for path in ("/lib/modules", ASSEMBLED)
              if Path(path).is_dir()]  # fmt: skip
    _, found = check(before=apart(*hidden))
    assert "BPF compiler" in lacking(found)
    assert "no kernel headers" in found["BPF compiler"]["found"]
    assert found["BPF programs"]["ok"]


def test_what_no_probe_thought_of_is_one_more_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("half of it is gone")

    monkeypatch.setattr(probes, "open_accounting", broken)
    (found,) = (each for each in probes.run_probes().probes if each.name == "taskstats")
    assert not found.ok
    assert found.found == "ImportError: half of it is gone"


# --- the armer ---


@pytest.mark.parametrize("feature", ["userfaultfd", "pagemap_scan"])
def test_the_armer_is_the_one_that_watch_takes(spawn: Spawn, tmp_path: Path, feature: str) -> None:
    report, found = check(before=without(feature))
    assert report["armer"] == ("soft-dirty" if found["soft-dirty bits"]["ok"] else "compare")
    assert "in another way" in found["userfaultfd write protection"]["consequence"]
    run("dump", spawn("threads").pid, "-o", tmp_path / "chain", before=without(feature)).expect(0)
    (shown,) = run("show", tmp_path / "chain", "--json").expect(0).events
    assert shown["armer"] == report["armer"]


def test_the_environment_names_the_armer() -> None:
    report, found = check(env={"CRTRACE_ARMER": "compare"})
    assert report["armer"] == "compare"
    assert found["armer"]["found"] == "compare, as CRTRACE_ARMER asks"


def test_an_armer_that_is_asked_for_and_does_not_work_is_what_is_missing() -> None:
    asked = {"CRTRACE_ARMER": "userfaultfd"}
    _, found = check(12, before=without("userfaultfd"), env=asked)
    assert "armer" in lacking(found)
    assert "CRTRACE_ARMER" in found["armer"]["remedy"]


def test_an_armer_that_nobody_knows_is_said_to_be_none() -> None:
    _, found = check(12, env={"CRTRACE_ARMER": "magic"})
    assert "magic" in found["armer"]["found"]
    assert "compare" in found["armer"]["remedy"]
