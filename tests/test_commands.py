"""test.sh and demo.sh, mostly with stubs for their slow parts."""

import os
import re
import shutil
import subprocess
import tempfile

import pytest

import real
from harness import TOP, bind, mounting, tmpfs

REPORT = '<testsuite tests="%d" failures="%d" errors="0" skipped="%d"/>'


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def shell(text, *mounts, **env):
    return subprocess.run(["sh", "-c", ". tests/install.sh\n" + text], cwd=TOP,
                          env=dict(os.environ, **env), capture_output=True, text=True,
                          preexec_fn=mounting(*mounts) if mounts else None)


@pytest.fixture
def test_sh(tmp_path):
    """test_sh(arguments, status, counts): runs test.sh.  make does nothing, nothing
    is installed, and pytest ends with this status and these counts."""
    home = tmp_path / "home"
    (home / "tests").mkdir(parents=True)
    shutil.copy(os.path.join(TOP, "test.sh"), home)
    with open(os.path.join(TOP, "tests/install.sh")) as file:
        install = file.read()
    (home / "tests/install.sh").write_text(
        install + "install_missing() { MISSING=; }\nPYTHON=$PWD/python\n")
    (home / "clamsmtpd").touch()
    (home / "Makefile").write_text("all:\n")

    def test_sh(arguments, status=0, counts=None):
        script(home / "python", """
            [ "$1" = -m ] || exec /usr/bin/python3 "$@"
            for a; do
                case $a in --junitxml=*) report=${a#*=} ;; esac
            done
            [ ! "$REPORT" ] || echo "$REPORT" >"$report"
            exit $STATUS""")
        env = dict(os.environ, STATUS=str(status),
                   REPORT=REPORT % counts if counts else "")
        done = subprocess.run(["./test.sh", *arguments], cwd=home, env=env,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith("files of what failed: "):
                shutil.rmtree(line.split()[-1])
        return done
    return test_sh


@pytest.mark.parametrize("arguments", [["nosuch"], ["full", "nosuch"], ["nosuch", "-x"]])
def test_unknown_word_prints_the_usage(test_sh, arguments):
    """An argument that is no word, option or file of test.sh ends it with status 2."""
    done = test_sh(arguments)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: ./test.sh [full | cross]")


@pytest.mark.parametrize("status, counts, last", [
    (0, (7, 0, 0), "8 passed, 0 failed"),
    (0, (7, 0, 2), "6 passed, 0 failed, 2 skipped"),
    (1, (7, 3, 0), "5 passed, 3 failed"),
    (0, (2, 0, 2), "1 passed, 0 failed, 2 skipped"),
    (5, (0, 0, 0), "1 passed, 1 failed"),       # none was selected
    (5, None, "1 passed, 1 failed"),
    (3, (7, 0, 0), "8 passed, 1 failed"),       # pytest itself failed
])
def test_last_line_counts_the_cases(test_sh, status, counts, last):
    """The last line counts the build and the cases.  A run that selected no case
    has failed."""
    done = test_sh(["-k", "something"], status, counts)
    assert done.stdout.splitlines()[-1] == last
    assert done.returncode == (0 if ", 0 failed" in last else 1)


@pytest.mark.parametrize("prefix, mode", [("c", 0o700), ("longer-than-this", 0o755)])
def test_scratch_directory_is_open_and_its_path_short(prefix, mode):
    """A TMPDIR that other users cannot enter, or whose path is too long for sockets
    below it, is not used."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix=prefix) as tmpdir:
        os.chmod(tmpdir, mode)
        done = shell("scratch test", TMPDIR=tmpdir)
        made = done.stdout.strip()
        assert os.path.dirname(made) in ("/tmp", "/var/tmp", "/dev/shm"), done.stderr
        assert os.stat(made).st_mode & 0o777 == 0o755
        os.rmdir(made)


def test_scratch_directory_is_not_mounted_noexec(mounts):
    """If /tmp and /var/tmp are mounted noexec, /dev/shm is used.  If that is
    mounted noexec, too, the message says what to set."""
    flag = 8                                                    # MS_NOEXEC
    noexec = [("tmpfs", path, "tmpfs", flag, "mode=1777")
              for path in ("/tmp", "/var/tmp", "/dev/shm")]
    made = shell("scratch test", *noexec[:2]).stdout.strip()
    assert os.path.dirname(made) == "/dev/shm"
    os.rmdir(made)
    done = shell("scratch test", *noexec)
    assert done.returncode != 0 and "Set\nTMPDIR to one" in done.stderr


@pytest.fixture
def demo(tmp_path):
    """demo(): runs demo.sh after an installation of some-package with some-service.
    Files of tools/ come first in its PATH."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "tools").mkdir()
    subprocess.run(["sh", "-c", 'cp -r ./*.[ch] Makefile demo.sh tests "$1" && '
                    'mkdir "$1/bench" && cp -r bench/results "$1/bench"', "sh", home],
                   cwd=TOP, check=True)
    with open(home / "tests/install.sh", "a") as file:
        file.write("install_missing() { MISSING=; INSTALLED=' some-package'; "
                   "OFF=some-service; }\n")
    env = {name: value for name, value in os.environ.items()
           if name not in ("CC", "CPPFLAGS", "CFLAGS", "LDFLAGS")}
    path = "%s:%s:/usr/sbin" % (tmp_path / "tools", os.environ["PATH"])
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="d") as tmpdir:
        os.chmod(tmpdir, 0o755)

        def demo():
            done = subprocess.run(["./demo.sh"], cwd=home, capture_output=True, text=True,
                                  env=dict(env, PATH=path, TMPDIR=tmpdir),
                                  stdin=subprocess.DEVNULL)
            assert os.listdir(tmpdir) == []
            return done
        yield demo


@pytest.mark.skipif(not real.find("clamd"), reason="no clamd installed")
def test_demo_ends_with_what_it_showed(demo):
    """The last screen counts the mails, has three figures, and names what was
    installed.  No file remains."""
    done = demo()
    assert (done.returncode, done.stderr) == (0, "")
    end = done.stdout.partition("== one clean mail was delivered, two infected")[2]
    assert len(re.findall(r"(?m)^  (CPU|memory) .*  \d[\d.]* [mu]?\w+( \(.* x\))?$", end)) == 3
    assert "FAILED" not in done.stdout
    assert "installed for this: some-package\n" in end
    assert "not enabled, that is yours to do: some-service\n" in end


def test_demo_stops_when_a_process_has_ended(demo, tmp_path):
    """If clamd ends instead of listening, the demo shows its last output at
    once."""
    script(tmp_path / "tools/clamd", "echo last words; exit 1\n")
    done = demo()
    assert done.returncode == 1
    assert "clamd has ended" in done.stderr and "last words\n" in done.stderr


def test_services_that_packages_bring_stay_off(mounts, tmp_path):
    """During an installation policy-rc.d forbids starting services.  Services that
    the packages enable are disabled again and named.  A unit that was enabled
    before stays enabled."""
    if not os.path.isdir("/etc/rc2.d"):
        pytest.skip("no Debian here")
    tools, sbin = tmp_path / "tools", tmp_path / "sbin"
    tools.mkdir()
    sbin.mkdir()
    script(tools / "apt-get", """
        for a; do [ "$a" != install ] || set -- install; done
        [ "$1" = install ] || exit 0
        /usr/sbin/policy-rc.d
        echo "policy $?" >>"$LOG"
        cd /etc/systemd/system && ln -s /lib/x clamav-freshclam-once.timer
        mkdir -p multi-user.target.wants && ln -s /lib/x multi-user.target.wants/haproxy.service
        ln -s /lib/x getty.service
        ln -s ../init.d/x /etc/rc2.d/S01clamav-test""")
    for tool in "systemctl", "update-rc.d":
        script(tools / tool, 'echo "%s $*" >>"$LOG"' % tool)
    log = tmp_path / "log"
    done = shell("""
        PATH=$TOOLS:/usr/bin:/bin
        ln -s /lib/x /etc/systemd/system/clamav-daemon.socket
        install_missing "$LOG.apt" haproxy
        echo "off: "$OFF
        ls /usr/sbin""", tmpfs("/etc/systemd/system", ""), tmpfs("/etc/rc2.d", ""),
        bind(str(sbin), "/usr/sbin"), TOOLS=str(tools), LOG=str(log))
    assert log.read_text().splitlines() == [
        "policy 101", "systemctl disable clamav-freshclam-once.timer",
        "update-rc.d clamav-test disable",
        "systemctl disable haproxy.service"]
    assert done.stdout.splitlines()[-1] == "off: clamav-freshclam-once clamav-test haproxy"
