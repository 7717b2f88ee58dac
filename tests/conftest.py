"""Fixtures: `site` is a daemon with scripted peers around it (harness.py)."""

import fcntl
import glob
import os
import socket
import stat
import subprocess
import sys
import tempfile

import pytest

import harness
import real


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "core: the small part that every special build is run with")
    config.addinivalue_line(
        "markers", "covers(clause...): what the manual pages say that the test checks")
    config.addinivalue_line(
        "markers", "long: only run by ./test.sh full")
    config.addinivalue_line(
        "markers", "postfix: needs an installed Postfix")
    if harness.localhost() != "localhost" and os.geteuid() == 0:
        own_hosts()


def own_hosts():
    """Give the tests a copy of /etc with a hosts file, which a machine made by
    debootstrap does not have.  Only these processes see the copy."""
    try:
        harness.mounting(harness.tmpfs("/mnt", "mode=755"))()
        subprocess.run(["cp", "-a", "/etc", "/mnt"], check=True)
        with open("/mnt/etc/hosts", "a") as file:
            file.write("127.0.0.1 localhost\n")
        harness.mounting(harness.bind("/mnt/etc", "/etc"))()
    except OSError:
        pass


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """If a core test has many cases, only the first one is core."""
    seen = set()
    for item in items:
        name = (item.module.__name__, getattr(item, "originalname", item.name))
        if item.get_closest_marker("core") and name in seen:
            item.own_markers[:] = [m for m in item.own_markers
                                   if m.name != "core"]
        seen.add(name)


def pytest_report_header(config):
    return "clamsmtpd: %s" % harness.CLAMSMTPD


def pytest_sessionstart(session):
    if not os.access(harness.CLAMSMTPD, os.X_OK):
        pytest.exit("no binary %s (make, or set CLAMSMTPD)" % harness.CLAMSMTPD,
                    returncode=2)


@pytest.fixture
def site(tmp_path):
    site = harness.Site(tmp_path)
    yield site
    site.finish()


@pytest.fixture
def run(tmp_path):
    """Run clamsmtpd to its end: run("-v") gives status, out, err."""
    def run(*args, **kw):
        kw.setdefault("timeout", harness.WAIT)
        return subprocess.run([harness.CLAMSMTPD, *args], capture_output=True,
                              text=True, errors="backslashreplace",
                              stdin=subprocess.DEVNULL, **kw)
    return run


@pytest.fixture
def real_clamd():
    """A real clamd, which the test may kill."""
    if not real.find("clamd"):
        pytest.skip("no clamd installed")
    clamd = real.RealClamd()
    yield clamd
    clamd.close()


@pytest.fixture(scope="session")
def debian_package(tmp_path_factory):
    """debian_package(name, other name...): a directory with the files of the first of
    these packages that the distribution has.  The package is not installed.  Skips
    if there is none."""
    def debian_package(*names):
        directory = str(tmp_path_factory.mktemp(names[0]))
        if not real.find("apt-get"):
            pytest.skip("no %s here" % names[0])
        for name in names:
            got = subprocess.run(["apt-get", "-q", "download", name], cwd=directory,
                                 capture_output=True, text=True)
            for package in glob.glob(os.path.join(directory, name + "_*.deb")):
                subprocess.run(["dpkg", "-x", package, directory], check=True)
                return directory
        pytest.skip("%s is not to be had: %s"
                    % (" or ".join(names), got.stderr.strip()[-200:]))
    return debian_package


@pytest.fixture(scope="session")
def python_with(tmp_path_factory):
    """python_with(name): a Python that has the package of PyPI, in a temporary
    environment.  Skips if the package cannot be installed."""
    def python_with(name):
        directory = str(tmp_path_factory.mktemp("venv"))
        for command in ([sys.executable, "-m", "venv", directory],
                        [directory + "/bin/python", "-m", "pip", "-q", "install",
                         "--disable-pip-version-check", name]):
            got = subprocess.run(command, capture_output=True, text=True)
            if got.returncode != 0:
                why = (got.stdout + got.stderr).strip().splitlines()[-1]
                pytest.skip("%s is not to be had: %s" % (name, why))
        return directory + "/bin/python"
    return python_with


@pytest.fixture
def as_root():
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def open_site(as_root):
    """A site whose directories all users can enter."""
    with tempfile.TemporaryDirectory(prefix="clamsmtpd-test.") as home:
        os.chmod(home, 0o755)
        site = harness.Site(home)
        os.chmod(site.spool, 0o777)
        yield site
        site.finish()


@pytest.fixture
def mounts(as_root):
    """Skip the test if it cannot use harness.mounting()."""
    try:
        subprocess.run(["true"], preexec_fn=harness.mounting(), check=True)
    except subprocess.SubprocessError:
        pytest.skip("no mount namespace of our own here")


def build(tmp_path_factory, name, **make):
    """Build a program once; the first worker builds it for all workers."""
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    program = str(top / name)
    with open(program + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(program):
            harness.build(program, **make)
    return program


@pytest.fixture(scope="session")
def clock_build(tmp_path_factory):
    return build(tmp_path_factory, "clamsmtpd-clock", CC="cc", CFLAGS="-O0",
                 LDFLAGS="tests/clock.c")


@pytest.fixture(scope="session")
def faulty_build(tmp_path_factory):
    """A build whose system calls can fail or halt (faults.h)."""
    return build(tmp_path_factory, "clamsmtpd-faulty",
                 CPPFLAGS="-include tests/faults.h")


@pytest.fixture
def clock(tmp_path, clock_build):
    """Clocks that the test moves: site.start(**clock.settings()), clock.go()."""
    return harness.Clock(tmp_path, clock_build)


@pytest.fixture
def faulty_clock(tmp_path, tmp_path_factory):
    """Clocks that the test moves, of a build whose system calls can fail or halt."""
    return harness.Clock(tmp_path, build(
        tmp_path_factory, "clamsmtpd-faulty-clock", CC="cc", CFLAGS="-O0",
        LDFLAGS="tests/clock.c", CPPFLAGS="-include tests/faults.h"))


@pytest.fixture
def background(site):
    made = []

    def background(**settings):
        made.append(harness.Background(site, **settings))
        return made[-1]
    yield background
    for one in made:
        for client in site.clients:
            client.close()
        if harness.processes(one.daemon.mark):
            one.end()
        assert not one.daemon.spooled() and not one.daemon.left()


@pytest.fixture
def own_dev(site, mounts):
    """A function for preexec that mounts a private /dev, and the path of this /dev."""
    dev = site.path("dev")
    os.mkdir(dev)
    try:
        os.mknod(os.path.join(dev, "null"), 0o666 | stat.S_IFCHR,
                 os.makedev(1, 3))
        open(os.path.join(dev, "null"), "w").close()
    except OSError:
        pytest.skip("no device files here")
    return harness.mounting(harness.bind(dev, "/dev")), dev


@pytest.fixture
def syslog(own_dev):
    """A /dev/log of our own."""
    preexec, dev = own_dev
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(os.path.join(dev, "log"))
    sock.settimeout(harness.WAIT)
    yield sock, preexec
    sock.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Add the daemon's log and what its peers received to a failure."""
    outcome = yield
    report = outcome.get_result()
    for site in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(site, harness.Site) and \
                os.path.exists(site.dir):
            for title, text in site.report():
                report.sections.append((title, text))
