"""Limits of the disk and the kernel.  A session that reaches a limit gets an error,
and all others continue.  When there is room again, new sessions work."""

import ctypes
import errno
import os
import platform
import re
import resource
import signal
import struct
import subprocess
import threading

import pytest

from harness import (BAD, GOOD, HEADER, Hold, LARGE, VIRUS, localhost, mounting, same, sanitized,
                     tmpfs, turns, until, wait_file)


def inside(site, name=""):
    """The daemon's own view of its TempDirectory."""
    return "/proc/%d/root%s/%s" % (site.daemon.pid, site.spool, name)


@pytest.fixture
def small(site, mounts):
    """TempDirectory is a file system of 256 KiB of its own."""
    def start(**settings):
        site.start(preexec=mounting(tmpfs(site.spool, "mode=0777,size=256k")),
                   **settings)
    return start


def fill(site):
    """Take all that is left of it; the file to be removed."""
    with open(inside(site, "fill"), "wb", buffering=0) as file:
        with pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)
        return file.name


# ---------------------------------------------------------------- no room

@pytest.mark.covers("clamsmtpd.8 When something fails: disk full")
@pytest.mark.parametrize("how", ["DATA", "BDAT"])
def test_disk_full_before_a_message_gives_452(site, small, how):
    """The client gets the error after the body, which is never read as commands."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.hop.ehlo.append("CHUNKING")
    small()
    early, late = site.session(), site.session()
    early.submit(GOOD)
    hold.reached()
    file = fill(site)
    late.envelope()
    if how == "DATA":
        late.cmd("DATA", "354")
        late.send(LARGE + b"NOOP\r\n")
        turns(site)
        site.daemon.rests()
        late.send(b"QUIT\r\n.\r\n")
    else:
        late.chunk(LARGE + b"QUIT\r\n", last=True)
    late.expect("452 4.3.1 Local Error")
    late.mail(body=GOOD)        # a small message needs no disk
    hold.go()
    early.expect("250 2.0.0 queued")
    os.unlink(file)
    late.mail(body=LARGE)
    assert len(site.hop.messages) == 3
    assert "NOOP" not in site.hop.commands and "QUIT" not in \
        site.hop.sessions[1].commands


def spool_files(site):
    """The number of open files that the daemon has in TempDirectory, including
    those without a name."""
    return sum(name.startswith(site.spool + "/")
               for name in site.daemon.open_files())


MEMORY = 32768 - 64 - len("Received: by smtp.passthru\r\n")


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: 32 KiB in memory",
    "clamsmtpd.conf.5 TempDirectory")
@pytest.mark.parametrize("how", ["DATA", "BDAT"])
@pytest.mark.parametrize("size, files", [(MEMORY - 1, 0), (MEMORY, 0),
                                         (MEMORY + 1, 1), (3 * MEMORY, 1)])
def test_message_up_to_a_buffer_needs_no_file(site, size, files, how):
    """A message has the same bytes in memory, in a file, and after the move to a
    file."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.hop.ehlo.append("CHUNKING")
    site.start()
    body = b"Subject: x\r\n\r\n.\0" + b"0123456789" * 10000
    body = body[:size - 2] + b"\r\n"
    client = site.session()
    client.envelope()
    if how == "DATA":
        client.cmd("DATA", "354")
        client.send(body.replace(b"\n.", b"\n..") + b".\r\n")
    else:
        client.chunk(body[:size // 2])
        client.expect("250")
        client.chunk(body[size // 2:], last=True)
    hold.reached()
    assert spool_files(site) == files and os.listdir(site.spool) == []
    hold.go()
    client.expect("250 2.0.0 queued")
    same(site.hop.messages[0].body.replace(HEADER, b""), body)
    same(site.clamd.scans[0].mail, body)
    client.quit()


def files_after(site, clients, body):
    """Have each of these clients send a message without its end.  Returns the number
    of files that all messages then use."""
    for client in clients:
        client.begin(body)
    turns(site)
    return spool_files(site)


def end_messages(clients):
    for client in clients:
        client.send(b".\r\n")
        client.expect("250 2.0.0 queued")


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: 32 KiB in memory")
def test_memory_for_messages_full_uses_files(site):
    """All messages have at most 4 MiB of memory.  The one that would pass the
    limit goes to a file, and so does each later one until a message ends."""
    site.start(MaxConnections="200", MaxScans="200")
    body = b"A: b\r\n\r\n" + b"x" * (MEMORY - 11) + b"\r\n"
    fit = (4 << 20) // (32768 - 64)
    clients = [site.session() for _ in range(fit + 3)]
    assert files_after(site, clients[:fit], body) == 0
    assert files_after(site, clients[fit:], body) == 3
    end_messages(clients)
    assert files_after(site, clients[:1], body) == 0
    end_messages(clients[:1])


def test_memory_for_messages_is_shared_by_their_sizes(site):
    """Small messages use no more of the memory than their bytes."""
    site.start(MaxConnections="400", MaxScans="400")
    clients = [site.session() for _ in range(300)]
    assert files_after(site, clients, GOOD) == 0
    end_messages(clients)


@pytest.mark.covers("clamsmtpd.8 When something fails: disk full",
    "clamsmtpd.8 DESCRIPTION: temporary error")
@pytest.mark.core
@pytest.mark.parametrize("how", ["DATA", "BDAT"])
def test_disk_full_in_a_message_gives_452(site, small, how):
    small()
    client = site.session()
    client.envelope()
    if how == "DATA":
        client.data(b"A: b\r\n\r\n" + (b"NOOP" * 100 + b"\r\n") * 2000,
                    "452 4.3.1 Local Error")
    else:
        client.chunk(b"A: b\r\n\r\n" + b"x" * 800000, last=True)
        client.expect("452 4.3.1 Local Error")
        client.cmd("RSET", "250")
    assert "NOOP" not in site.hop.commands and site.hop.messages == []
    client.mail(body=GOOD)
    assert len(site.hop.messages) == 1
    assert os.listdir(inside(site)) == []
    client.quit()


@pytest.mark.parametrize("action", ["drop", "bounce", "pass"])
def test_disk_full_for_the_quarantine_gives_451_and_leaves_nothing(site, small, action):
    """PROMISE 1: there is no partial copy, and no action runs."""
    ran = site.path("ran")
    small(Action=action, Quarantine="on", VirusAction=": >> %s" % ran)
    client = site.session()
    client.submit(BAD + b"x" * 180000 + b"\r\n")
    client.expect("451 4.3.0 Local Error")
    until(lambda: os.listdir(inside(site)) == [], "half of a copy is removed")
    assert site.hop.messages == []
    site.daemon.wait_log("status=ERROR$")
    assert site.daemon.log("quarantine in .*: copy: No space left on device$")
    client.mail(body=GOOD)
    assert not os.path.exists(ran)
    client.mail(body=BAD, want="" if action == "bounce" else "250")
    until(lambda: os.path.exists(ran), "the action for the one that was kept")
    assert len(os.listdir(inside(site))) == 1
    client.quit()


def test_temp_directory_read_only_gives_451(site, small):
    small()
    client = site.session()

    def remount(flags):
        subprocess.run(["true"], check=True, preexec_fn=mounting(
            ("none", site.spool, "", 0x20 | flags, ""), of=site.daemon.pid))
    remount(1)
    client.mail(body=LARGE, want="451 4.3.0 Local Error")
    client.mail()
    remount(0)
    client.mail(body=LARGE)
    client.quit()


def test_file_above_the_size_limit_gives_452(site):
    """SIGXFSZ, which would end the daemon and all its sessions, is not
    delivered."""
    site.start(Quarantine="on")
    client = site.session()
    resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE, (200000, 200000))
    client.mail(body=b"A: b\r\n\r\n" + b"x" * 400000 + b"\r\n",
                want="452 4.3.1 Local Error")
    client.mail()
    client.quit()


# ---------------------------------------------------------------- less of a kernel

# The architecture of a system call, its number, and which argument has the flags of
# open() and openat(): x86-64, i386 and arm64.
OPEN_CALLS = [(0xc000003e, 2, 1), (0xc000003e, 257, 2), (0x40000003, 5, 1),
              (0x40000003, 295, 2), (0xc00000b7, 56, 2)]


def no_tmpfile():
    """For preexec: a seccomp filter makes the file system one without O_TMPFILE."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no numbers of open() and openat() for this machine")
    load, is_equal, has_bits, ret = 0x20, 0x15, 0x45, 0x06
    program = []
    for architecture, number, flags in OPEN_CALLS:
        program += [(load, 0, 0, 4), (is_equal, 0, 6, architecture),
                    (load, 0, 0, 0), (is_equal, 0, 4, number),
                    (load, 0, 0, 16 + 8 * flags), (has_bits, 0, 1, 0o20000000),
                    (ret, 0, 0, 0x50000 | errno.EOPNOTSUPP),
                    (ret, 0, 0, 0x7fff0000)]        # allowed
    program.append((ret, 0, 0, 0x7fff0000))
    code = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", *line) for line in program))
    filter = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)

    def preexec():
        assert libc.prctl(38, 1, 0, 0, 0) == 0      # no_new_privs
        assert libc.prctl(22, 2, filter, 0, 0) == 0
        assert code
    return preexec


def all_works(site):
    """Send a clean message, and a virus that is quarantined."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    client = site.session()
    client.submit(LARGE)
    hold.reached()
    assert spool_files(site) == 1 and os.listdir(site.spool) == [], "it has no name"
    hold.go()
    client.expect("250 2.0.0 queued")
    same(site.clamd.scans[0].mail, LARGE)
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    name, = os.listdir(site.spool)
    with open(os.path.join(site.spool, name), "rb") as file:
        same(file.read(), BAD)
    site.daemon.allowed.add(name)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 FILES: /tmp/clamsmtpd.XXXXXX")
@pytest.mark.core
def test_file_system_without_o_tmpfile_serves(site):
    site.start(Quarantine="on", preexec=no_tmpfile())
    all_works(site)


@pytest.mark.covers("clamsmtpd.8 FILES: /tmp/clamsmtpd.XXXXXX")
def test_file_system_without_o_tmpfile_has_a_name_for_a_moment(site, faulty_build):
    """The daemon halts before it removes the name of the message's file.  At the start
    it made and removed another one."""
    site.start(preexec=no_tmpfile(), binary=faulty_build, env={"FAULT": "unlink:2:0:-1"})
    client = site.session()
    client.begin(LARGE)
    until(lambda: site.daemon.proc("State").startswith("T"), "the daemon halts")
    name, = os.listdir(site.spool)
    assert re.fullmatch(r"clamsmtpd\.\w{6}", name)
    site.daemon.resume()
    client.send(b".\r\n")
    client.expect("250 2.0.0 queued")
    assert os.listdir(site.spool) == []


def test_file_name_that_would_be_too_long_is_named(site):
    """The directory has a valid path, to which no file name can be added."""
    spool = site.spool
    while len(spool) < 4080:
        spool += "/" + "d" * min(250, 4079 - len(spool))
    os.makedirs(spool)
    site.start(TempDirectory=spool, DebugFiles="on")
    site.session().mail(want="451 4.3.0 Local Error (TempDirectory: ")
    assert site.daemon.log("TempDirectory: File ?name too long")


def test_start_without_proc_serves(site, mounts):
    if sanitized():
        pytest.skip("the address sanitizer cannot do without it")
    site.start(Quarantine="on", preexec=mounting(tmpfs("/proc", "")))
    all_works(site)


# ---------------------------------------------------------------- descriptors

def leave_descriptors(daemon, count):
    """Let the daemon open so many descriptors more."""
    used = {int(fd) for fd in os.listdir("/proc/%d/fd" % daemon.pid)}
    limit = 0
    while count or limit in used:
        count -= limit not in used
        limit += 1
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, 4096))


@pytest.mark.parametrize("left, want", [
    (0, "452 4.3.1 Local Error"), (1, "451 4.3.0 Local Error"), (2, "250")])
def test_out_of_descriptors_in_a_message_gives_452_or_451(site, left, want):
    """There is no descriptor for the spool, then none for clamd, then there are
    enough."""
    site.start()
    client, other = site.session(), site.session()
    leave_descriptors(site.daemon, left)
    client.mail(body=LARGE, want=want)
    other.cmd("NOOP", "250")
    leave_descriptors(site.daemon, 100)
    client.mail()
    assert len(site.hop.messages) == 1 + (want == "250")
    client.quit()


def test_out_of_descriptors_for_a_client_makes_it_wait(site):
    """The client waits, without a busy loop, and is served when there are
    descriptors again."""
    site.start()
    client = site.session()
    leave_descriptors(site.daemon, 0)
    waiting = [site.client() for _ in range(5)]
    site.daemon.wait_log("accept:.*descriptor|accept:.*files")
    site.daemon.rests()
    client.cmd("NOOP", "250")
    leave_descriptors(site.daemon, 100)
    for one in waiting:
        one.expect("220")
        one.cmd("QUIT", "221")
    assert len(site.daemon.log("accept:")) == 1


def test_out_of_descriptors_for_the_next_hop_gives_421(site):
    site.start()
    client = site.session()
    leave_descriptors(site.daemon, 1)
    other = site.client()
    other.expect("421 4.4.1")
    client.cmd("NOOP", "250")
    leave_descriptors(site.daemon, 100)
    site.session().quit()


def test_out_of_descriptors_for_a_quarantine_gives_451(site):
    hold = Hold(VIRUS + " FOUND")
    site.clamd.verdict = [hold]
    site.start(Quarantine="on")
    client = site.session()
    client.submit(GOOD)
    hold.reached()
    leave_descriptors(site.daemon, 0)       # the descriptor for clamd is free again by then
    hold.go()
    client.expect("451 4.3.0 Local Error")
    leave_descriptors(site.daemon, 100)
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    site.daemon.allowed.update(os.listdir(site.spool))
    assert len(os.listdir(site.spool)) == 1
    client.quit()


def test_out_of_descriptors_for_a_virus_action_runs_it(site):
    """Its output is discarded, even if no descriptor is left for /dev/null."""
    hold = Hold(VIRUS + " FOUND")
    site.clamd.verdict = [hold]
    ran = site.path("ran")
    site.start(VirusAction="echo this; touch " + ran)
    client = site.session()
    client.submit(GOOD)
    hold.reached()
    last = max(map(int, os.listdir("/proc/%d/fd" % site.daemon.pid)))
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, (last, 4096))
    hold.go()
    client.expect("250 2.0.0 Virus Detected")
    wait_file(ran)
    assert not site.daemon.log("^this$")
    client.quit()


# ---------------------------------------------------------------- processes

USER = 54321


def allow_children(site, count):
    """Make fork() fail when the daemon's user has as many processes already.  The
    limit is set as this user, since we may lack the right to set it otherwise."""
    subprocess.run(["true"], user=USER, group=USER, extra_groups=[], check=True,
                   preexec_fn=lambda: resource.prlimit(
                       site.daemon.pid, resource.RLIMIT_NPROC, (count, 1000)))


def test_out_of_processes_for_a_quarantine_gives_451(open_site):
    site = open_site
    site.start(User=USER, Quarantine="on")
    client = site.session()
    allow_children(site, 0)
    client.mail(body=BAD, want="451 4.3.0 Local Error")
    assert os.listdir(site.spool) == [] and site.hop.messages == []
    client.mail()
    allow_children(site, 1000)
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    site.daemon.allowed.update(os.listdir(site.spool))
    assert len(os.listdir(site.spool)) == 1
    client.quit()


def test_out_of_processes_for_a_virus_action_is_logged(open_site):
    site = open_site
    ran = os.path.join(site.spool, "ran")
    site.start(User=USER, VirusAction="echo x >> " + ran)
    client = site.session()
    allow_children(site, 0)
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    site.daemon.wait_log("^100000: VirusAction: fork: ")
    allow_children(site, 1000)
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    until(lambda: os.path.exists(ran) and os.path.getsize(ran), "the second action")
    site.daemon.allowed.add("ran")
    client.quit()


def test_out_of_processes_for_a_look_up_is_logged_and_repeated(open_site, clock):
    """The error is logged from time to time, and the look-up is done later."""
    site = open_site
    if localhost() != "localhost":
        pytest.skip("no localhost in /etc/hosts")
    site.start(User=USER, OutAddress="localhost:%d" % site.hop.port,
               preexec=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (0, 1000)),
               **clock.settings())
    for _ in range(3):
        site.client().expect("421 4.4.1")
    assert len(site.daemon.log("cannot start a child")) == 1
    site.daemon.rests()
    allow_children(site, 1000)
    clock.go(site.daemon, 5)
    site.session().mail()
    assert len(site.hop.messages) == 1


# ---------------------------------------------------------------- signals

def test_signals_without_end_interrupt_nothing(site):
    """Commands, bodies in both directions, scans and copies work while signals
    arrive."""
    site.clamd = site.new_clamd(tcp=True)
    site.start(level=3, Quarantine="on")
    over = threading.Event()

    def storm():
        while not over.wait(0.0002):
            site.daemon.send_signal(signal.SIGUSR1)
            site.daemon.send_signal(signal.SIGCHLD)
    thread = threading.Thread(target=storm)
    thread.start()
    good = b"Subject: x\r\n\r\n" + b"y" * 300000 + b"\r\n"
    rounds = 0
    try:
        while rounds < 5 or len(site.daemon.log("^sessions=")) < 100:
            client = site.session()
            client.mail(body=good)
            client.mail(body=BAD, want="250 2.0.0 Virus Detected")
            client.mail()
            client.quit()
            rounds += 1
    finally:
        over.set()
        thread.join()
    assert len(site.hop.messages) == 2 * rounds
    for message in site.hop.messages[::2]:
        same(message.body[-300000:], good[-300000:])
    site.daemon.allowed.update(os.listdir(site.spool))
    assert len(os.listdir(site.spool)) == rounds
