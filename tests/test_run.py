"""Starting, running and ending: daemon, pid file, signals, user, syslog."""

import contextlib
import ctypes
import errno
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading

import pytest

from harness import (BAD, CLAMSMTPD, CLOSE, Faults, HEADER, Hold, LARGE, Names,
                     READ_AGAIN, Server, VIRUS, WAIT, build, connect, finish_file,
                     full_listener, has_ipv6, mounting, never, processes, sanitized,
                     turns, until, wait_file, wait_listener)

BODY = b"Subject: x\r\n\r\nhello\r\n"
SOME = b"Subject: x\r\n\r\nsome\r\n"


# ---------------------------------------------------------------- daemonising

@pytest.mark.covers("clamsmtpd.8 EXIT STATUS: 0", "clamsmtpd.8 OPTIONS: -d")
@pytest.mark.core
def test_it_becomes_a_daemon_and_the_parent_exits_with_0(site, background):
    one = background()
    assert one.status == 0
    assert re.fullmatch("(clamsmtpd: /dev/log: no syslog daemon; .*\n)?",
                        one.daemon.text())
    pid = one.pid()
    assert processes(one.daemon.mark) == [pid]
    client = site.session(address=one.socket)     # listens already
    client.mail()
    client.quit()
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    assert int(fields[3]) != os.getsid(0) and fields[4] == "0"   # no terminal
    for fd in "012":
        assert os.readlink("/proc/%d/fd/%s" % (pid, fd)) == "/dev/null"
    assert os.readlink("/proc/%d/cwd" % pid) == "/"
    one.end()
    assert not os.path.exists(one.pidfile) and not os.path.exists(one.socket)


@pytest.mark.covers("clamsmtpd.8 LOGGING: messages at start",
    "clamsmtpd.8 EXIT STATUS: 1")
@pytest.mark.parametrize("settings", [
    {"Listen": "127.0.0.1:PORT"}, {"PidFile": "/no/such/directory/pid"},
    {"Listen": "/no/such/directory/sock"}, {"Listen": "192.0.2.1:0"},
], ids=str)
def test_start_that_fails_gives_the_parent_status_1(site, background, settings):
    site.hop
    settings = {k: v.replace("PORT", str(site.hop.port))
                for k, v in settings.items()}
    one = background(**settings)
    assert one.status == 1
    assert list(settings.values())[0] in one.daemon.text()
    until(lambda: not processes(one.daemon.mark), "no process is left")


@pytest.mark.covers("clamsmtpd.8 LOGGING: messages at start")
def test_warning_of_a_daemon_that_starts_is_on_standard_error(background):
    one = background(TimeOut=["5", "6"])
    assert one.status == 0
    assert "TimeOut is set twice" in one.daemon.text()
    one.end()


def test_bad_configuration_is_reported_before_the_fork(site, background):
    one = background(TimeOut="x")
    assert one.status == 2 and '"x"' in one.daemon.text()
    assert processes(one.daemon.mark) == []


@pytest.mark.covers("clamsmtpd.conf.5 MaxConnections: descriptors")
def test_descriptor_limit_too_small_is_refused(open_site):
    """A user who may not raise the limit gets an error with both numbers."""
    def preexec():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        as_nobody()
    daemon = open_site.refused(binary=exposed(open_site), preexec=preexec,
                               MaxConnections="1000", MaxScans="20")
    assert daemon.log("^MaxConnections: 1000 needs %d descriptors, and the limit is 100: "
                      % (3 * 1000 + 20 + 64))


def as_nobody():
    """For preexec: change to the user nobody."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def exposed(site):
    """A copy of the binary that any user can run."""
    path = site.path("clamsmtpd")
    shutil.copy(CLAMSMTPD, path)
    os.chmod(path, 0o755)
    return path


# ---------------------------------------------------------------- what it inherits

def block(signals):
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def ignore(signals):
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.covers("clamsmtpd.8 SECURITY: signals and descriptors")
@pytest.mark.parametrize("how", [block, ignore])
def test_blocked_or_ignored_signals_inherited_are_obeyed(site, how):
    """A program that has blocked or ignored signals starts the daemon.  The daemon
    still obeys them, and reaps its children."""
    signals = {signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1,
               signal.SIGUSR2}
    ran = site.path("ran")
    site.start(VirusAction=": > " + ran, Listen=site.path("in.sock"),
               preexec=lambda: how(signals))
    for field in "SigBlk", "SigIgn":
        assert int(site.daemon.proc(field), 16) & 1 << signal.SIGUSR2 - 1 == 0
    site.session().mail(body=BAD, want="250 2.0.0 Virus")
    wait_file(ran)
    until(lambda: not site.daemon.children(), "the action is reaped")
    site.daemon.write(site.settings(Listen=site.path("in.sock")))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log(READ_AGAIN)


def inheriting(site, prepare, program=CLAMSMTPD):
    """A program that runs the shell commands and then becomes clamsmtpd."""
    script = site.path("starter")
    with open(script, "w") as file:
        file.write('#!/bin/sh\n%s\nexec "%s" "$@"\n' % (prepare, program))
    os.chmod(script, 0o755)
    return script


@pytest.mark.covers("clamsmtpd.8 SECURITY: signals and descriptors")
def test_descriptor_inherited_is_closed(site):
    """The daemon does not hold a lock of the program that started it."""
    paths = [site.path("lock%d" % fd) for fd in (3, 9)]
    site.start(binary=inheriting(site, 'exec 3>"%s" 9>"%s"' % tuple(paths)))
    assert not set(paths) & set(site.daemon.open_files())


def test_descriptor_inherited_without_close_range_is_closed(site, faulty_build):
    """Descriptors are also closed on a kernel before 5.9, which has no
    close_range(2)."""
    path = site.path("lock")
    site.start(binary=inheriting(site, 'exec 9>"%s"' % path, faulty_build),
               env={"FAULT": "syscall:1:1:38"})              # ENOSYS
    assert path not in site.daemon.open_files()


@pytest.mark.parametrize("pid, count, taken", [
    ("$$", "2", [3, 4]), ("1", "2", []), ("$$", "", []), ("$$", "-1", []),
    ("$$", "4294967297", [])], ids=str)
def test_descriptors_of_listen_fds_alone_are_used(site, pid, count, taken):
    """Only descriptors that systemd passes to this process become listeners.  A
    file is none: it is closed with a warning."""
    paths = {fd: site.path("passed%d" % fd) for fd in (3, 4, 5)}
    redirect = " ".join('%d>"%s"' % item for item in paths.items())
    site.start(binary=inheriting(
        site, "exec %s\nexport LISTEN_PID=%s LISTEN_FDS=%s" % (redirect, pid, count)))
    assert not set(paths.values()) & set(site.daemon.open_files())
    assert site.daemon.log("^LISTEN_FDS: ") == [
        "LISTEN_FDS: descriptor %d is not a listening stream socket; it is closed"
        % fd for fd in taken]


# ---------------------------------------------------------------- pid file

@pytest.mark.covers("clamsmtpd.8 SIGNALS: nothing left behind",
    "clamsmtpd.conf.5 PidFile", "clamsmtpd.conf.5 PidFile: removed")
@pytest.mark.core
def test_pid_file_has_the_pid_and_is_removed(site):
    path = site.path("pid")
    site.start(PidFile=path)
    with open(path) as file:
        assert file.read() == "%d\n" % site.daemon.pid
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o022 == 0
    site.daemon.stop()
    assert not os.path.exists(path)


@pytest.mark.covers("clamsmtpd.conf.5 PidFile: relative path")
def test_relative_paths_are_in_the_directory_of_the_start(site):
    """The daemon leaves that directory, but finds its pid file and TempDirectory
    there."""
    one = site.start(level=None, wait=False, preexec=lambda: os.chdir(site.dir),
                     Listen=site.path("in.sock"), PidFile="pid", TempDirectory="spool",
                     Quarantine="on")
    one.stopped = True
    assert one.wait_exit() == 0
    pid = int(wait_file(site.path("pid")))
    client = site.session(address=site.path("in.sock"))
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.quit()
    assert len(os.listdir(site.spool)) == 1
    os.kill(pid, signal.SIGTERM)
    until(lambda: not processes(one.mark), "the daemon ends")
    assert not os.path.exists(site.path("pid"))


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -p", "clamsmtpd.conf.5 PidFile")
def test_p_is_used_in_place_of_pidfile(site):
    site.start(PidFile=site.path("a"), args=["-p", site.path("b")])
    assert not os.path.exists(site.path("a"))
    assert os.path.exists(site.path("b"))


@pytest.mark.covers("clamsmtpd.conf.5 PidFile: locked")
@pytest.mark.core
def test_second_instance_with_the_same_pid_file_is_refused(site):
    path = site.path("pid")
    site.start(PidFile=path)
    second = site.refused(PidFile=path)
    assert path in second.text()
    with open(path) as file:
        assert int(file.read()) == site.daemons[0].pid
    site.daemon = site.daemons[0]
    client = site.session()
    client.quit()


def test_second_instance_refused_leaves_nothing(site):
    """The files of the first instance stay."""
    site.start(PidFile=site.path("pid"), Listen=site.path("first.sock"))
    site.refused(PidFile=site.path("pid"), Listen=site.path("second.sock"))
    assert not os.path.exists(site.path("second.sock"))
    assert os.path.exists(site.path("first.sock"))
    with open(site.path("pid")) as file:
        assert int(file.read()) == site.daemons[0].pid


@pytest.mark.parametrize("settings", [
    {"TempDirectory": "/no/such/directory"}, {"User": "no-such-user-here"},
    {"Listen": "192.0.2.1:0"}], ids=str)
@pytest.mark.parametrize("how", ["foreground", "background"])
def test_start_refused_leaves_nothing_behind(site, settings, how):
    """PROMISE 7: there is neither a pid file nor a socket."""
    names = {"PidFile": site.path("pid"), "Listen": [site.path("in.sock")]}
    names["Listen"].append(settings.get("Listen"))
    daemon = site.refused(level=4 if how == "foreground" else None,
                          **{**settings, **names})
    until(lambda: not processes(daemon.mark), "no process is left")
    assert not os.path.exists(site.path("pid"))
    assert not os.path.exists(site.path("in.sock"))


def test_pid_file_stale_is_overwritten(site):
    path = site.path("pid")
    with open(path, "w") as file:
        file.write("99999999 and more than the new text\n")
    site.start(PidFile=path)
    with open(path) as file:
        assert file.read() == "%d\n" % site.daemon.pid


def test_pid_file_that_is_a_link_is_refused(site):
    os.symlink(site.path("target"), site.path("pid"))
    site.refused(PidFile=site.path("pid"))
    assert not os.path.exists(site.path("target"))


# ---------------------------------------------------------------- listeners

@pytest.mark.covers("clamsmtpd.conf.5 Listen: stale socket")
@pytest.mark.core
def test_unix_listener_stale_is_replaced(site):
    path = site.path("in.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.listen(1)
    stale.close()                       # the file stays without a listener
    site.start(Listen=path)
    client = site.session()
    client.mail()
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Listen: socket removed", "clamsmtpd.conf.5 User")
def test_unix_listener_that_cannot_be_removed_is_logged(open_site):
    """The directory is root's and User is another user.  The socket stays, the log
    says so, and the next start replaces it."""
    site = open_site
    path = site.path("in.sock")
    for _ in range(2):
        site.start(User="nobody", Listen=path)
        site.daemon.own.clear()
        site.session(address=path).quit()
        site.daemon.settle()
        site.daemon.stop()
        assert site.daemon.log("^%s: cannot remove the socket: "
                               "Permission denied$" % path)


@pytest.mark.covers("clamsmtpd.conf.5 Listen: stale socket")
@pytest.mark.core
def test_unix_listener_live_is_not_replaced(site):
    path = site.path("in.sock")
    first = site.start(Listen=path)
    second = site.refused(Listen=path)
    assert path in second.text()
    client = site.session(address=first.address)
    client.mail()
    client.quit()


def test_port_in_use_is_an_error(site):
    first = site.start()
    second = site.refused(Listen=first.address)
    assert "Listen: %s: " % first.address in second.text()
    site.session(address=first.address).mail()


def test_unix_listener_path_that_is_a_file_is_not_removed(site):
    path = site.path("in.sock")
    with open(path, "w") as file:
        file.write("precious")
    site.refused(Listen=path)
    with open(path) as file:
        assert file.read() == "precious"


def test_connections_two_hundred_at_once_are_served(site):
    """ClamSMTP 1.10 stopped serving all clients when there were about fifty."""
    site.start(MaxConnections="300")
    clients = [site.client() for _ in range(200)]
    for client in clients:
        client.expect("220")
    for client in clients:
        client.cmd("QUIT", "221")


# ---------------------------------------------------------------- the end

@pytest.mark.covers("clamsmtpd.8 SIGNALS: SIGTERM, SIGINT",
    "clamsmtpd.8 EXIT STATUS: 0")
@pytest.mark.core
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_sigint_end_with_status_0(site, number):
    site.session().quit()
    site.daemon.settle()
    site.daemon.stop(number=number)


@pytest.mark.covers("clamsmtpd.8 SIGNALS: SIGTERM, SIGINT")
@pytest.mark.core
def test_sigterm_gives_idle_sessions_421(site):
    clients = [site.session() for _ in range(3)]
    site.daemon.send_signal(signal.SIGTERM)
    for client in clients:
        client.expect("421 4.3.2")
        client.eof()
        client.close()
    site.daemon.stop()


@pytest.mark.parametrize("way", ["idle", "lingering", "in a message"])
def test_sigterm_waits_a_second_for_a_client_that_does_not_close(site, clock, way):
    """A client that does not close after its last reply delays the end by one
    second, whether that reply was sent before or after the signal."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(**clock.settings())
    client = site.session()
    if way == "lingering":
        client.cmd("QUIT", "221")
        client.eof()
    elif way == "in a message":
        client.submit(BODY)
        hold.reached()
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.wait_log("^stopping")
    if way == "in a message":
        hold.go()
        client.expect("250 2.0.0 queued")
    if way != "lingering":
        client.expect("421 4.3.2")
        client.eof()
    assert site.daemon.alive()
    clock.go(site.daemon, 1)
    site.daemon.wait_exit()


@pytest.mark.covers("clamsmtpd.8 Restart and upgrade")
@pytest.mark.core
def test_sigterm_lets_a_message_under_way_finish(site):
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    client = site.session()
    client.submit(BODY)
    hold.reached()
    site.daemon.send_signal(signal.SIGTERM)
    idle = site.daemon.address

    def refused():
        try:
            site.client(address=idle).close()
        except OSError:
            return True
        return False
    until(refused, "no new connections")
    hold.go()
    client.expect("250 2.0.0 queued")
    client.expect("421 4.3.2")
    client.eof()
    client.close()
    site.daemon.stop()
    assert len(site.hop.messages) == 1


@pytest.mark.parametrize("how", ["DATA", "BDAT"])
def test_sigterm_within_a_transaction_lets_it_finish(site, how):
    """After an accepted RCPT, or the first chunk, the message belongs to the
    transaction."""
    site.hop = site.new_hop(chunking=True)
    client = site.session()
    client.envelope()
    if how == "BDAT":
        client.chunk(BODY)
        client.expect("250")
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.wait_log("^stopping")
    if how == "BDAT":
        client.chunk(b"the rest\r\n", last=True)
        client.expect("250 2.0.0 queued")
    else:
        client.data(BODY, "250 2.0.0 queued")
    client.expect("421 4.3.2")
    client.eof()
    client.close()
    site.daemon.wait_exit()
    site.daemon.stop()
    assert len(site.hop.messages) == 1


@pytest.mark.covers("clamsmtpd.8 SIGNALS: second signal")
@pytest.mark.core
def test_sigterm_twice_ends_at_once(site, clock):
    """The second signal ends the daemon within the eight seconds of the first."""
    site.clamd.verdict = Hold("OK")
    site.start(**clock.settings())
    client = site.session()
    client.submit(BODY)
    site.clamd.verdict.reached()
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.send_signal(signal.SIGTERM)

    def ended():
        if site.daemon.alive():
            site.daemon.send_signal(signal.SIGTERM)
        return not site.daemon.alive()
    until(ended, "the end")
    site.daemon.stop()
    assert site.hop.messages == []


@pytest.mark.covers("clamsmtpd.8 SIGNALS: SIGTERM, SIGINT",
    "clamsmtpd.8 Restart and upgrade")
def test_sigterm_waits_eight_seconds(site, clock):
    """All clients have 8 seconds, and then get a reply in place of the one they
    wait for."""
    site.start(**clock.settings())
    verdict, final = Hold("OK"), Hold("451 4.3.0 not now")
    site.clamd.verdict = [None, verdict]
    site.hop.on(".", [final])
    taken, scanned, body, between = (site.session() for _ in range(4))
    taken.submit(BODY)
    final.reached()
    scanned.submit(BODY)
    verdict.reached()
    body.begin(SOME)
    between.envelope()
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.wait_log("^stopping")
    with pytest.raises(ConnectionRefusedError):
        connect(site.daemon.address)
    clock.go(site.daemon, 7)
    never(lambda: any(client.stream.more() for client in (taken, scanned, body, between)),
          "a reply before the eight seconds are over")
    clock.go(site.daemon, 1)
    for client in (taken, scanned, body, between):
        assert client.reply().code in ("421", "451")
        client.rest()
        client.close()
    site.daemon.wait_exit()
    site.daemon.stop()
    assert site.hop.messages == []
    assert site.daemon.log("^100000: from=a@example.com, to=b@example.com, status=")


def test_sigterm_leaves_no_spool_files(site):
    clients = [site.session() for _ in range(3)]
    for client in clients:
        client.begin(SOME)
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.send_signal(signal.SIGINT)
    site.daemon.wait_exit()
    site.daemon.stop()
    assert os.listdir(site.spool) == []


@pytest.mark.core
def test_sigterm_with_new_clients_in_one_turn_ends(site):
    """A listener with waiting clients is closed in the same turn of the loop."""
    site.start(Listen=[site.path("in.sock"), "127.0.0.1:0"],
               PidFile=site.path("pid"))
    site.daemon.pause()
    clients = [site.client(address=a) for a in site.daemon.addresses * 3]
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.resume()
    for client in clients:
        client.rest()
        client.close()
    site.daemon.wait_exit()
    site.daemon.stop()
    assert not os.path.exists(site.path("pid"))
    assert not os.path.exists(site.path("in.sock"))


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_standard_error_unread_or_closed_blocks_nothing(open_site, user):
    """PROMISE 5: the log neither blocks nor ends the daemon.  The pipe is root's:
    another user cannot open it again to make it non-blocking."""
    site, sock = open_site, os.path.join(open_site.spool, "in.sock")
    read, write = os.pipe()

    def preexec():
        os.dup2(write, 2)
        if user == "nobody":
            as_nobody()
    site.start(binary=exposed(site), preexec=preexec, wait=False, Listen=sock)
    os.close(write)
    with open(read, "rb") as pipe:
        until(lambda: b"listening on" in os.read(pipe.fileno(), 65536), "it listens")
        client = site.session(address=sock)
        for _ in range(20):               # some 64 KiB of log: the pipe is full
            client.mail(to=["%s%d@example.com" % ("x" * 60, i) for i in range(20)])
    client.mail()
    client.quit()
    assert len(site.hop.messages) == 21


# ---------------------------------------------------------------- SIGHUP

@pytest.mark.covers("clamsmtpd.8 SIGNALS: SIGHUP",
    "clamsmtpd.8 SIGNALS: open connections")
@pytest.mark.core
def test_sighup_gives_new_sessions_the_new_settings(site):
    site.start(Listen=site.path("in.sock"))
    old = site.session()
    site.reload(Listen=site.path("in.sock"), Header="X-New: yes")
    new = site.session()
    old.mail(body=BODY)
    new.mail(body=BODY)
    assert HEADER in site.hop.messages[0].body
    assert b"X-New: yes\r\n" in site.hop.messages[1].body
    old.quit()
    new.quit()
    assert site.daemon.alive()


@pytest.mark.covers("clamsmtpd.8 SIGNALS: file with an error",
    "clamsmtpd.8 SIGNALS: only a restart can change")
@pytest.mark.core
@pytest.mark.parametrize("change, why", [
    ({"TimeOut": "x"}, r"conf:6: .*TimeOut"), ({"Nonsense": "1"}, r"conf:6: .*Nonsense"),
    ({"User": "nobody"}, "conf: User cannot be changed without a restart$"),
    ({"PidFile": "/run/xyz"}, "conf: PidFile cannot be changed without a restart$"),
    ({"VirusAction": "/bin/true"}, "conf: VirusAction cannot be changed without a restart$"),
    ({"TempDirectory": "/tmp"}, "conf: TempDirectory cannot be changed without a restart$"),
    ({"Listen": None}, r"Listen: 127\.0\.0\.1:\d+: "),
], ids=["TimeOut", "Nonsense", "User", "PidFile", "VirusAction", "TempDirectory",
          "Listen"])
def test_sighup_with_a_bad_file_changes_nothing_and_logs_why(site, change, why):
    """An error in a line is logged with the file and the number of the line."""
    site.start(Listen=site.path("in.sock"))
    if "Listen" in change:              # a port that is taken
        change = {"Listen": [site.path("in.sock"), site.path("new.sock"),
                             site.hop.address]}
    site.daemon.write(site.settings(**{
        "Listen": site.path("in.sock"), "Header": "X-New: yes", **change}))
    before = len(site.daemon.log())
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("clamsmtpd.conf: reload failed, keeping the old settings")
    assert [l for l in site.daemon.log()[before:] if re.search(why, l)]
    assert not os.path.exists(site.path("new.sock"))
    client = site.session()
    client.mail(body=BODY)
    assert HEADER in site.hop.messages[0].body
    client.quit()


@pytest.mark.covers("clamsmtpd.8 SIGNALS: only a restart can change")
@pytest.mark.parametrize("setting", ["Listen", "StatusListen"])
@pytest.mark.parametrize("where", ["new directory", "127.0.0.77:1023"])
def test_sighup_with_a_listener_that_needs_a_restart_says_so(open_site, setting, where):
    """The sandbox forbids a unix socket in a new directory, and User a port below
    1024.  The log says why, and that a restart can open the listener."""
    if where == "new directory" and not has_landlock():
        pytest.skip("no Landlock here")
    site = open_site
    listen, other = os.path.join(site.spool, "in.sock"), site.path("other")
    os.mkdir(other)
    os.chmod(other, 0o777)
    if where == "new directory":
        where = other + "/new.sock"
    site.start(User="nobody", Listen=listen)
    before = len(site.daemon.log())
    change = {"Listen": [listen, where]} if setting == "Listen" else {
        "Listen": listen, "StatusListen": where}
    site.daemon.write(site.settings(User="nobody", **change))
    site.daemon.own = {listen}
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("reload failed")
    if other in where and not site.daemon.log("^sandbox: .* files are written only"):
        pytest.skip("no Landlock here")
    assert site.daemon.log()[before] == (
        "%s: %s: only a restart can open it, since root privileges are dropped, and the "
        "sandbox allows only directories of the old settings: Permission denied"
        % (setting, where))
    assert not os.listdir(other)
    site.session(address=listen).quit()


@pytest.mark.covers("clamsmtpd.8 SIGNALS: only a restart can change")
def test_sighup_with_more_connections_than_descriptors_says_how_to_go_on(open_site):
    """Without root's rights a reload cannot raise the limit, but a restart can."""
    site, listen = open_site, os.path.join(open_site.spool, "in.sock")
    site.start(User="nobody", Listen=listen, preexec=lambda: resource.setrlimit(
        resource.RLIMIT_NOFILE, (300, 300)))
    site.daemon.write(site.settings(User="nobody", Listen=listen, MaxConnections="9999"))
    site.daemon.send_signal(signal.SIGHUP)
    line, = site.daemon.wait_log("^MaxConnections: 9999 needs ")
    assert line.endswith(" and the limit is 300: restart clamsmtpd or lower MaxConnections")
    site.daemon.wait_log("reload failed")


def test_sighup_with_an_unreadable_file_logs_only_that(open_site):
    """The daemon has lost the right to read its file.  The content is unknown, so
    no setting is reported as missing."""
    site = open_site
    site.start(User="nobody", Listen=os.path.join(site.spool, "in.sock"))
    os.chmod(site.daemon.file, 0o600)
    before = len(site.daemon.log())
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("reload failed")
    assert site.daemon.log()[before:] == [
        site.daemon.file + ": Permission denied",
        site.daemon.file + ": reload failed, keeping the old settings"]


@pytest.mark.covers("clamsmtpd.8 SIGNALS: unchanged listeners")
def test_sighup_opens_new_listeners_and_keeps_the_old(site):
    a, b, c = (site.path(n) for n in "abc")
    site.start(Listen=[a, b])
    inode = os.stat(a).st_ino
    site.reload(Listen=[a, c])
    until(lambda: os.path.exists(c), "the new listener")
    for path in (a, c):
        client = site.session(address=path)
        client.quit()
    assert os.stat(a).st_ino == inode
    assert not os.path.exists(b)
    site.daemon.idle = site.daemon.fds()


def served(site, *addresses):
    """For each of the addresses, whether a daemon serves it."""
    def serves(address):
        try:
            client = site.client(address=address)
        except OSError:
            return False
        client.expect("220")
        client.quit()
        return True
    return [serves(address) for address in addresses]


@pytest.fixture
def places(site):
    """places(text): PORT is a port that IPv4 and IPv6 have free."""
    if not has_ipv6():
        pytest.skip("no IPv6 loopback here")
    port = str(site.port("::"))
    return lambda text: [one.replace("PORT", port) for one in text.split()]


@pytest.mark.covers("clamsmtpd.conf.5 Listen: IPv6")
@pytest.mark.parametrize("listen, v4, v6", [
    ("[::]:PORT", True, True), ("[::]:PORT 0.0.0.0:PORT", True, True),
    ("0.0.0.0:PORT [::]:PORT", True, True), ("[::]:PORT 127.0.0.2:PORT", False, True),
])
def test_listener_of_ipv6_includes_ipv4_unless_a_line_has_it(site, places, listen, v4, v6):
    site.start(Listen=places(listen))
    assert served(site, *places("127.0.0.1:PORT [::1]:PORT")) == [v4, v6]


@pytest.mark.covers("clamsmtpd.8 SIGNALS: overlapping listeners")
@pytest.mark.parametrize("before, after, v4, v6", [
    ("127.0.0.1:PORT", "0.0.0.0:PORT", True, False),
    ("0.0.0.0:PORT", "127.0.0.1:PORT", True, False),
    ("[::]:PORT", "0.0.0.0:PORT", True, False),
    ("0.0.0.0:PORT", "[::]:PORT", True, True),
    ("[::]:PORT 0.0.0.0:PORT", "[::]:PORT", True, True),
    ("[::]:PORT", "[::]:PORT 0.0.0.0:PORT", True, True),
    ("[::]:PORT", "[::]:PORT 127.0.0.2:PORT", False, True),
    ("[::1]:PORT 127.0.0.1:PORT", "[::1]:PORT", False, True),
])
def test_sighup_with_overlapping_listeners_is_as_a_start(site, places, before, after,
                                                         v4, v6):
    """After a reload the same listeners serve as after a start with the same file,
    although an old listener keeps the port from a new one."""
    site.start(Listen=places(before))
    site.reload(Listen=places(after))
    assert served(site, *places("127.0.0.1:PORT [::1]:PORT")) == [v4, v6]
    site.daemon.idle = site.daemon.fds()


@pytest.mark.covers("clamsmtpd.8 SIGNALS: overlapping listeners")
@pytest.mark.parametrize("before, after, v4, v6", [
    ("127.0.0.1:PORT", "0.0.0.0:PORT", True, False),
    ("[::]:PORT 0.0.0.0:PORT", "[::]:PORT", True, True),
    ("[::]:PORT", "[::]:PORT 0.0.0.0:PORT", True, True),
])
def test_sighup_that_fails_opens_overlapping_listeners_again(site, places, before, after,
                                                          v4, v6):
    """If a later line cannot be opened, the listener that was closed for another
    one is opened again, and a second reload finds it."""
    site.start(Listen=places(before))
    idle = site.daemon.fds()
    site.daemon.write(site.settings(Listen=places(after) + [site.hop.address]))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("reload failed")
    assert served(site, *places("127.0.0.1:PORT [::1]:PORT")) == [v4, v6]
    site.reload(Listen=places(before))
    assert site.daemon.fds() == idle
    assert served(site, *places("127.0.0.1:PORT [::1]:PORT")) == [v4, v6]


def test_sighup_with_lines_that_overlap_each_other_is_refused(site):
    """As at a start, a listener that the new file keeps is not closed for another
    one."""
    port = site.port("0.0.0.0")
    both = ["127.0.0.1:%d" % port, "0.0.0.0:%d" % port]
    site.start(Listen=both[0])
    site.daemon.write(site.settings(Listen=both))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("reload failed")
    assert served(site, both[0], "127.0.0.2:%d" % port) == [True, False]
    port = site.port("0.0.0.0")
    site.refused(Listen=["127.0.0.1:%d" % port, "0.0.0.0:%d" % port])


def test_sighup_that_names_an_open_address_keeps_the_listener(site):
    """A client that waits to be accepted is served, even if the line writes the
    same address in another way."""
    port = site.port("0.0.0.0")
    site.start(Listen=str(port))
    site.daemon.pause()
    client = site.client(address="127.0.0.1:%d" % port)
    site.daemon.write(site.settings(Listen="0.0.0.0:%d" % port))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.resume()
    site.daemon.wait_log(READ_AGAIN)
    client.expect("220")
    client.quit()


def test_sighup_exchanges_listen_and_statuslisten(site):
    """Each socket stays open and then serves the other protocol."""
    a, b = site.path("a.sock"), site.path("b.sock")
    site.start(Listen=a, StatusListen=b)
    inodes = [os.stat(path).st_ino for path in (a, b)]
    site.reload(Listen=b, StatusListen=a)
    site.session(address=b).quit()
    with connect(a) as visitor:
        visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert visitor.recv(4096).startswith(b"HTTP/1.0 200")
    assert [os.stat(path).st_ino for path in (a, b)] == inodes


def test_one_address_for_listen_and_statuslisten_is_refused(site):
    """The address is in use for the second setting, at the start and at a
    reload."""
    path = site.path("a.sock")
    daemon = site.refused(Listen=path, StatusListen=path)
    assert daemon.log("^StatusListen: %s: Address (already )?in use$" % path)
    site.start(Listen=path)
    site.daemon.write(site.settings(Listen=path, StatusListen=path))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("reload failed")
    site.session(address=path).quit()


def option_of(daemon, address, level, option):
    """A socket option of the daemon's listener."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = libc.syscall(434, daemon.pid, 0)            # pidfd_open()
    if pidfd == -1:
        pytest.skip("no pidfd_open() here")
    try:
        for name in os.listdir("/proc/%d/fd" % daemon.pid):
            fd = libc.syscall(438, pidfd, int(name), 0)     # pidfd_getfd()
            if fd == -1:
                continue
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
                continue
            with socket.socket(fileno=fd) as sock:
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and \
                        sock.getsockname()[:2] == address:
                    return sock.getsockopt(level, option)
    finally:
        os.close(pidfd)
    pytest.skip("no pidfd_getfd() here")


IP_TRANSPARENT = socket.IPPROTO_IP, 19
IPV6_TRANSPARENT = socket.IPPROTO_IPV6, 75


@pytest.mark.skipif("TEST_QEMU" in os.environ, reason="qemu has no IP_TRANSPARENT")
def test_sighup_with_transparentproxy_changes_the_listeners(site, as_root):
    """Listeners that stay open get IP_TRANSPARENT when the setting is turned on,
    and lose it when it is turned off."""
    port = site.port()
    other = site.port("::1" if has_ipv6() else "127.0.0.1")
    listen = ["127.0.0.1:%d" % port] + ["[::1]:%d" % other] * has_ipv6()

    def transparent():
        got = [option_of(site.daemon, ("127.0.0.1", port), *IP_TRANSPARENT)]
        if has_ipv6():
            got.append(option_of(site.daemon, ("::1", other), *IPV6_TRANSPARENT))
        return got
    site.start(Listen=listen)
    assert not any(transparent())
    site.reload(Listen=listen, TransparentProxy="on")
    assert all(transparent())
    site.reload(Listen=listen, TransparentProxy="off")
    assert not any(transparent())
    assert not site.daemon.log("IP_TRANSPARENT")


@pytest.mark.skipif("TEST_QEMU" in os.environ, reason="qemu has no IP_TRANSPARENT")
def test_transparentproxy_without_the_right_is_a_warning(open_site):
    """Without CAP_NET_ADMIN no connection can come by TPROXY.  The log says so at
    the start, and at a reload after User."""
    site = open_site
    warning = (r"^TransparentProxy: 127\.0\.0\.1:\d+: "
               r"TPROXY connections are not accepted \(REDIRECT ones are\): "
               r"IP_TRANSPARENT: Operation not permitted$")
    one = site.start(binary=exposed(site), preexec=as_nobody, TransparentProxy="on")
    assert one.log(warning)
    one.stop()
    two = site.start(User="nobody")
    assert not two.log(warning)
    site.reload(User="nobody", TransparentProxy="on")
    two.wait_log(warning)


@pytest.mark.core
def test_sighup_removes_a_listener_with_waiting_clients(site):
    """A listener with waiting clients is closed in the same turn of the loop."""
    a, b = site.path("a"), site.path("b")
    site.start(Listen=a)
    site.daemon.pause()
    for _ in range(3):
        site.client(address=a)
    site.daemon.write(site.settings(Listen=b))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.resume()
    site.daemon.wait_log(READ_AGAIN)
    client = site.session(address=b)
    client.mail()
    client.quit()
    assert not os.path.exists(a)


def test_sighup_with_a_new_next_hop_uses_it(site):
    other = site.new_hop()
    site.start(Listen=site.path("in.sock"))
    site.session().quit()
    site.reload(Listen=site.path("in.sock"), OutAddress=other.address)
    client = site.session()
    client.mail()
    client.quit()
    assert (len(site.hop.messages), len(other.messages)) == (0, 1)


def test_sighup_with_another_clamd_while_scans_wait_keeps_both(site):
    """Old sessions keep the old clamd, and new sessions need not wait for it."""
    other, hold = site.new_clamd(), Hold("OK")
    site.clamd.verdict = [hold]
    site.start(Listen=site.path("in.sock"), MaxScans="1")
    old = [site.session() for _ in range(2)]
    for client in old:
        client.submit(BODY)
    hold.reached()
    site.reload(Listen=site.path("in.sock"), MaxScans="1",
           ClamAddress=other.address)
    new = site.session()
    new.mail()
    assert len(other.scans) == 1
    hold.go()
    for client in old:
        client.expect("250 2.0.0 queued")
    assert len(site.clamd.scans) == 2
    for client in old + [new]:
        client.quit()


def test_sighup_with_another_temp_directory_uses_it(site):
    """Messages after a message that was under way use the new directory."""
    final, scan = Hold(), Hold("OK")
    site.hop.on(".", [final])
    site.clamd.verdict = [None, scan]
    other, listen = site.path("other"), site.path("in.sock")
    os.mkdir(other)
    site.start(Listen=listen, VirusAction="true")       # then there is no sandbox
    old = site.session()
    old.submit(LARGE)
    final.reached()
    site.reload(Listen=listen, VirusAction="true", TempDirectory=other)
    final.go()
    old.expect("250 2.0.0 queued")
    new = site.session()
    new.submit(LARGE)
    scan.reached()
    files = site.daemon.open_files()
    assert [name for name in files if name.startswith(other)]
    scan.go()
    new.expect("250 2.0.0 queued")
    for client in old, new:
        client.quit()


def test_sighup_with_a_temp_directory_that_cannot_be_written_to_changes_nothing(site):
    """The reload fails also without a sandbox, as with a VirusAction."""
    settings = {"Listen": site.path("in.sock"), "VirusAction": "true"}
    site.start(**settings)
    site.daemon.write(site.settings(TempDirectory="/no/such/directory", **settings))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("^TempDirectory: /no/such/directory is not writable")
    site.daemon.wait_log("reload failed, keeping the old settings")
    site.session().mail()


@pytest.mark.covers("clamsmtpd.8 SIGNALS: open connections")
def test_sighup_lets_a_message_under_way_finish(site):
    """A message keeps its settings at every stage."""
    scan, final = Hold("OK"), Hold()
    site.clamd.verdict = [None, scan]
    site.hop.on(".", [final])
    other_hop, other_clamd = site.new_hop(), site.new_clamd()
    listen = site.path("in.sock")
    site.start(Listen=listen)
    at_the_hop, at_clamd, in_body = (site.session() for _ in range(3))
    at_the_hop.submit(BODY)
    final.reached()
    at_clamd.submit(BODY)
    scan.reached()
    in_body.begin(SOME)
    site.reload(Listen=listen, OutAddress=other_hop.address,
           ClamAddress=other_clamd.address, MaxScanSize="10", TimeOut="100")
    in_body.send(b".\r\n")
    in_body.expect("250 2.0.0 queued")
    scan.go()
    final.go()
    for client in at_the_hop, at_clamd:
        client.expect("250 2.0.0 queued")
    assert len(site.hop.messages) == 3 and other_hop.messages == []
    new = site.session()
    new.cmd("MAIL FROM:<a@b> SIZE=20", "552")
    for client in at_the_hop, at_clamd, in_body, new:
        client.quit()


# ---------------------------------------------------------------- SIGUSR1

@pytest.mark.covers("clamsmtpd.8 SIGNALS: SIGUSR1")
@pytest.mark.core
def test_sigusr1_writes_the_counters(site):
    """Each counter has its own number of messages."""
    site.start(MaxConnections="2", MaxScanSize="1000")
    client, other = site.session(), site.session()
    site.client().expect("421")
    for _ in range(6):
        client.mail(body=BODY)
    for _ in range(5):
        client.mail(body=BAD, want="250 2.0.0 Virus")
    site.clamd.verdict = ["sick ERROR"] * 4
    for _ in range(4):
        client.mail(body=BODY, want="451")
    for _ in range(2):
        client.mail(body=LARGE, want="552")
    site.hop.on(".", [CLOSE])
    client.mail(body=BODY, want="451")
    client.eof()
    client.close()

    def counters():
        site.daemon.send_signal(signal.SIGUSR1)
        return site.daemon.log("^sessions=1 of 2 ")
    line = until(counters, "the first session has ended")[-1]
    found = re.fullmatch(r"sessions=1 of 2 refused=1 messages=18 bytes=(\d+) clean=6 "
                         "virus=5 clamd_error=4 unscanned=0 oversize=2 error=1", line)
    assert found and int(found[1]) >= 11 * len(BODY) + 5 * len(BAD)
    other.quit()


# ---------------------------------------------------------------- the user

def ids(site, name):
    return [int(x) for x in site.daemon.proc(name).split()]


@pytest.mark.covers("clamsmtpd.conf.5 User", "clamsmtpd.conf.5 User: groups")
@pytest.mark.core
def test_user_has_its_groups_and_no_way_back(open_site):
    site = open_site
    user = pwd.getpwnam("nobody")
    site.start(User="nobody",
               preexec=lambda: os.setgroups([0, 4, 12345]))
    assert ids(site, "Uid") == [user.pw_uid] * 4
    assert ids(site, "Gid") == [user.pw_gid] * 4
    assert sorted(ids(site, "Groups")) == sorted(
        set(os.getgrouplist("nobody", user.pw_gid)))
    for caps in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(site.daemon.proc(caps), 16) == 0
    client = site.session()
    client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.quit()
    assert not site.daemon.log("running as root")


@pytest.mark.covers("clamsmtpd.conf.5 User: number without an entry")
def test_user_number_without_an_entry_is_its_own_group(open_site):
    site = open_site
    site.start(User="54321", preexec=lambda: os.setgroups([0, 4]))
    assert ids(site, "Uid") == [54321] * 4
    assert ids(site, "Gid") == [54321] * 4
    assert set(ids(site, "Groups")) <= {54321}
    client = site.session()
    client.mail()
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 User", "clamsmtpd.conf.5 User: groups")
def test_user_number_with_an_entry_has_its_groups(open_site):
    site = open_site
    user = pwd.getpwnam("nobody")
    site.start(User=str(user.pw_uid))
    assert ids(site, "Uid") == [user.pw_uid] * 4
    assert ids(site, "Gid") == [user.pw_gid] * 4
    assert sorted(ids(site, "Groups")) == sorted(
        set(os.getgrouplist("nobody", user.pw_gid)))


@pytest.mark.covers("clamsmtpd.conf.5 TempDirectory")
@pytest.mark.parametrize("user, name", [("nobody", "nobody"), ("65534", None),
                                        ("54321", "54321")])
def test_unwritable_temp_directory_names_the_user(open_site, user, name):
    """The error at the start has the name of the user, or the number of a user
    without a name."""
    os.chmod(open_site.spool, 0o700)
    daemon = open_site.refused(User=user)
    assert "TempDirectory: %s is not writable by user %s; " % (
        open_site.spool, name or pwd.getpwuid(int(user)).pw_name) in daemon.text()


def test_unwritable_clamd_socket_names_the_user(open_site):
    """The error about clamd has the name of the user who may not connect."""
    site = open_site
    os.chmod(site.clamd.address, 0o600)
    site.start(User="nobody")
    site.session().mail(want="451")
    assert site.daemon.log("^clamd %s: connect: Permission denied for user nobody$"
                           % site.clamd.address)


def test_user_that_started_it_is_no_error(open_site):
    user = pwd.getpwuid(65534).pw_name
    open_site.start(binary=exposed(open_site), preexec=as_nobody, User=user)
    open_site.session().mail()


@pytest.mark.parametrize("user", ["no-such-user-here", "-1", "4294967295",
                                  "4294967296", "1x", "99999999999999999999"])
def test_user_that_does_not_exist_is_refused(site, as_root, user):
    daemon = site.refused(User=user)
    assert user in daemon.text()


def test_temp_directory_missing_is_an_error_at_start(site):
    """The error does not wait for the first mail."""
    daemon = site.start(TempDirectory="/no/such/directory", wait=False)
    until(lambda: daemon.log("/no/such/directory") or not daemon.alive(),
          "a word about it")
    assert daemon.log("/no/such/directory")
    daemon.kill()


def test_user_other_without_root_is_refused(open_site):
    daemon = open_site.refused(binary=exposed(open_site), preexec=as_nobody, User="root")
    assert "root" in daemon.text()


@pytest.mark.covers("clamsmtpd.conf.5 User")
@pytest.mark.core
def test_user_unset_is_the_user_who_started_it(site, as_root):
    """root as the user is a warning."""
    site.start(level=1, wait=False, Listen=site.path("in.sock"))
    site.daemon.wait_log("^running as root is NOT recommended$")
    assert ids(site, "Uid") == [0] * 4


@pytest.mark.covers("clamsmtpd.conf.5 PidFile: removed", "clamsmtpd.conf.5 User")
def test_pid_file_that_cannot_be_removed_is_emptied(open_site):
    site = open_site
    path = site.path("pid")
    site.start(User="nobody", PidFile=path)
    with open(path) as file:
        assert int(file.read()) == site.daemon.pid
    site.daemon.stop()
    assert os.stat(path).st_size == 0


def test_user_owns_quarantine_and_action(open_site):
    """The action cannot become root again."""
    site = open_site
    out = os.path.join(site.spool, "out")
    site.start(User="nobody", Quarantine="on", VirusAction=finish_file(
        "id -u; %s -c 'import os; os.setuid(0)' 2>&1" % sys.executable, out))
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    text = wait_file(out).decode().split("\n")
    assert text[0] == str(pwd.getpwnam("nobody").pw_uid)
    assert text[-2] == "PermissionError: [Errno 1] Operation not permitted"
    names = os.listdir(site.spool)
    assert len(names) == 2
    for name in names:
        assert os.stat(os.path.join(site.spool, name)).st_uid == \
            pwd.getpwnam("nobody").pw_uid
    site.daemon.allowed.update(names)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 SECURITY: no core")
def test_core_is_never_dumped(open_site):
    """A core file would contain mail.  If cores are piped into a program, the
    kernel ignores any limit except 1.  So the limit is 1, or it is 0 and the
    process is not dumpable, which makes its files in /proc root's."""
    open_site.start(binary=exposed(open_site), preexec=as_nobody)
    proc = "/proc/%d/" % open_site.daemon.pid
    with open(proc + "limits") as file:
        limit = re.search(r"Max core file size +(\d+) +(\d+) ", file.read()).groups()
    assert limit == ("1", "1") or \
        limit == ("0", "0") and os.stat(proc + "maps").st_uid == 0


@pytest.mark.core
def test_descriptors_are_closed_on_exec(site):
    """This holds for listeners, pid file, pipes, log, sessions, spools and
    clamd."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(Listen=["127.0.0.1:0", site.path("in.sock")], PidFile=site.path("pid"))
    clients = [site.session(address=a) for a in site.daemon.addresses]
    clients[0].submit(BODY)
    clients[1].begin(SOME)
    hold.reached()
    left = []
    for fd in os.listdir("/proc/%d/fd" % site.daemon.pid):
        with open("/proc/%d/fdinfo/%s" % (site.daemon.pid, fd)) as file:
            flags = int(re.search(r"flags:\s*(\d+)", file.read()).group(1), 8)
        if not flags & os.O_CLOEXEC:
            left.append(int(fd))
    assert sorted(left) == [0, 1, 2]
    hold.go()
    clients[0].expect("250")


def read_only_but(*directories):
    """For preexec: mount everything read-only except these directories."""
    binds = mounting(*((path, path, "", 4096, "") for path in directories))
    libc = ctypes.CDLL(None)

    def set_read_only(path, on, recursive=0):
        attr = struct.pack("QQQQ", on, 1, 0, 0)         # MOUNT_ATTR_RDONLY
        if libc.syscall(442, -100, path.encode(), recursive, attr,
                        ctypes.c_size_t(len(attr))):    # mount_setattr(), 5.12
            raise OSError

    def preexec():
        binds()
        set_read_only("/", 1, 0x8000)
        for path in directories:
            set_read_only(path, 0)
    return preexec


def test_sandbox_writes_only_in_its_directories(open_site, mounts):
    """The daemon writes only to TempDirectory and the directory of pid file and
    listener.  It has a VirusAction, since the sandbox would hide an attempt to
    write elsewhere."""
    site, run = open_site, open_site.path("run")
    os.mkdir(run)
    out = os.path.join(site.spool, "out")
    try:
        site.start(Listen=os.path.join(run, "in.sock"), Quarantine="on",
                   PidFile=os.path.join(run, "pid"), DebugFiles="on",
                   VirusAction=finish_file(": > " + site.path("elsewhere"), out),
                   preexec=read_only_but(site.spool, run))
    except subprocess.SubprocessError:
        pytest.skip("no mount_setattr() here")
    client = site.session()
    client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.quit()
    assert b"Read-only file system" in wait_file(out), "it was not read-only"
    assert not site.daemon.log("(?i)read-only")
    site.daemon.allowed.update(os.listdir(site.spool))
    site.daemon.stop()
    assert os.listdir(run) == []


# ---------------------------------------------------------------- sandbox

@pytest.mark.covers("clamsmtpd.8 SECURITY: sandbox")
def test_sandbox_has_no_new_privs_without_a_virus_action(site):
    site.start()
    assert site.daemon.proc("NoNewPrivs") == "1"
    line, = site.daemon.log("^sandbox: ")
    assert line == ("sandbox: no new privileges; files are written only in %s and "
                    "next to PidFile and unix listeners" % site.spool if has_landlock()
                    else "sandbox: no new privileges (kernel without Landlock)")


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: no sandbox")
def test_sandbox_off_with_a_virus_action_lets_setgid_programs_work(site):
    site.start(VirusAction="/bin/true")
    assert site.daemon.proc("NoNewPrivs") == "0"
    assert site.daemon.log("^sandbox: none because of VirusAction$")


def test_sandbox_built_with_headers_without_landlock_makes_no_call(site, tmp_path):
    """A program that was built with headers older than Landlock makes no system call
    for it: Linux on 32-bit ARM ends a program that calls number -1."""
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys" / "syscall.h").write_text("""
        #include_next <sys/syscall.h>
        #include <unistd.h>
        #undef SYS_landlock_create_ruleset
        #undef SYS_landlock_add_rule
        #undef SYS_landlock_restrict_self
        #define syscall(number, ...) \\
            ((number) < 0 ? __builtin_trap(), -1L : syscall(number, __VA_ARGS__))
        """)
    program = build(site.path("old-headers"), CPPFLAGS="-I" + str(tmp_path))
    site.start(binary=program)
    assert site.daemon.log("^sandbox: no new privileges .kernel without Landlock.$")


def has_landlock():
    """Whether the kernel has Landlock, by landlock_create_ruleset(VERSION).  Qemu
    does not pass the call on."""
    return "TEST_QEMU" not in os.environ and \
        ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0


@pytest.fixture
def landlock():
    if not has_landlock():
        pytest.skip("no Landlock in this kernel")


@pytest.mark.covers("clamsmtpd.8 SECURITY: sandbox")
@pytest.mark.parametrize("debug", ["on", "off"])
def test_sandbox_writes_files_in_temp_directory_only(site, landlock, debug):
    """After the start the name of the directory leads elsewhere.  No file is
    written there."""
    site.start(Quarantine="on", DebugFiles=debug)
    other = site.path("elsewhere")
    os.mkdir(other, 0o777)
    client = site.session()
    os.rename(site.spool, site.spool + ".away")
    os.symlink(other, site.spool)
    client.mail(body=BAD, want="451 4.3.0 Local Error")
    assert os.listdir(other) == [] and site.hop.messages == []
    os.unlink(site.spool)
    os.rename(site.spool + ".away", site.spool)
    client.mail()
    client.quit()
    site.daemon.allowed.update(os.listdir(site.spool))


def test_sandbox_writes_copies_in_temp_directory_only(site, landlock):
    """The sandbox of the daemon holds for its child, too."""
    hold = Hold(VIRUS + " FOUND")
    site.clamd.verdict = [hold]
    site.start(Quarantine="on")
    other = site.path("elsewhere")
    os.mkdir(other, 0o777)
    client = site.session()
    client.submit(BODY)
    hold.reached()
    os.rename(site.spool, site.spool + ".away")
    os.symlink(other, site.spool)
    hold.go()
    client.expect("451 4.3.0 Local Error")
    assert os.listdir(other) == []
    client.quit()


@pytest.mark.covers("clamsmtpd.8 SECURITY: re-created directory")
def test_sandbox_temp_directory_re_created_needs_a_restart(site, landlock):
    """The rule of the sandbox is for the directory that existed at the start."""
    site.start()
    os.rmdir(site.spool)
    os.mkdir(site.spool)
    client = site.session()
    client.mail(body=LARGE, want="451 4.3.0 Local Error")
    site.daemon.write(site.settings())
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("^TempDirectory: %s is not writable by user .*; if it was "
                         "re-created .* restart clamsmtpd .*: Permission denied$"
                         % site.spool)
    site.daemon.wait_log("reload failed, keeping the old settings")
    assert not site.daemon.log(READ_AGAIN)
    client.quit()
    site.daemon.stop()
    site.start()
    site.session().mail(body=LARGE)


@pytest.mark.covers("clamsmtpd.8 SIGNALS: only a restart can change")
def test_sandbox_refuses_a_unix_listener_elsewhere_at_sighup(site, landlock):
    """The log has a reason, and the old settings stay in effect."""
    os.mkdir(site.path("here"))
    a, b = site.path("here/a"), site.path("b")
    site.start(Listen=a)
    site.daemon.write(site.settings(Listen=[a, b], Header="X-New: yes"))
    before = len(site.daemon.log())
    site.daemon.send_signal(signal.SIGHUP)
    until(lambda: [l for l in site.daemon.log()[before:] if b in l],
          "a word about " + b)
    assert not os.path.exists(b)
    client = site.session()
    client.mail(body=BODY)
    assert HEADER in site.hop.messages[0].body
    client.quit()


@pytest.mark.covers("clamsmtpd.8 LOOPBACK FEATURE: warning of an open relay")
def test_outaddress_port_alone_beyond_loopback_is_a_warning(site):
    """A listener beyond loopback with a port alone as OutAddress relays mail of any
    client."""
    site.start(Listen=["0.0.0.0:0", "127.0.0.1:0"], OutAddress=str(site.hop.port))
    line, = site.daemon.log("can be reached from other hosts")
    assert re.match(r"0\.0\.0\.0:\d+ can be reached from other hosts, "
                    "and OutAddress has no host", line)


# ---------------------------------------------------------------- names

@pytest.fixture
def names(site, mounts):
    """A name server that does not answer before go()."""
    try:
        names = Names(site.dir)
    except OSError as error:
        pytest.skip("no name server of our own here: %s" % error)
    yield names
    names.close()


def start_named(site, names, **settings):
    site.start(preexec=names.preexec, **settings)
    assert names.asked.wait(60), "it asks for the name"


@pytest.mark.parametrize("late", [False, True], ids=["running", "stopping"])
def test_name_of_clamd_unresolved_makes_its_messages_wait(site, names, late):
    """PROMISE 5: other sessions continue meanwhile, and the session may finish."""
    site.clamd = site.new_clamd(tcp=True)
    start_named(site, names, ClamAddress="clamd.example.org:%d" % site.clamd.port)
    client = site.session()
    client.submit(BODY)
    other = site.session()
    other.cmd("NOOP", "250")
    if late:
        site.daemon.send_signal(signal.SIGTERM)
        other.expect("421 4.3.2")
        other.close()
    else:
        other.quit()
    names.go()
    client.expect("250 2.0.0 queued")
    assert len(site.hop.messages) == 1
    client.close()
    if late:
        site.daemon.wait_exit()
        site.daemon.stop()


def test_name_of_the_next_hop_unresolved_makes_its_sessions_wait(site, names):
    """PROMISE 5: other clients are accepted meanwhile."""
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port)
    clients = [site.client() for _ in range(3)]
    site.daemon.wait_log("accepted connection", 3)
    names.go()
    for client in clients:
        client.expect("220")
        client.cmd("QUIT", "221")


def listen_named(site, names, *addresses, **settings):
    """Start a daemon that listens on a name with these addresses, and on a free
    port."""
    names.addresses = addresses
    names.go()
    port = site.port()
    settings.setdefault("Listen", "filter.example.org:%d" % port)
    site.start(preexec=names.preexec, **settings)
    return "127.0.0.1:%d" % port


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -n opens nothing")
def test_n_opens_no_address_and_resolves_no_name(site, names, run):
    paths = [site.path(name) for name in ("pid", "in.sock", "status.sock")]
    with open(site.path("conf"), "w") as file:
        file.write("OutAddress: hop.example.org\nClamAddress: clamd.example.org\n"
                   "Listen: filter.example.org\nListen: %s\nPidFile: %s\n"
                   "StatusListen: %s\nListen: %s\n" % (
                       site.hop.address, paths[0], paths[2], paths[1]))
    result = run("-n", "-f", site.path("conf"), preexec_fn=names.preexec)
    assert (result.returncode, result.stderr) == (0, "")
    assert not names.asked.is_set() and site.hop.accepted == 0
    assert not [path for path in paths if os.path.exists(path)]


def test_name_to_listen_on_with_a_doubled_address_is_opened_once(site, names):
    """/etc/hosts often has two lines for localhost."""
    address = listen_named(site, names, "127.0.0.1", "127.0.0.1")
    assert site.daemon.listening() == [address]
    site.session(address=address).quit()
    assert not site.daemon.log("Listen")


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: names to listen on",
    "clamsmtpd.conf.5 ADDRESSES: no address of a name works")
@pytest.mark.parametrize("reload", [False, True])
def test_name_to_listen_on_needs_one_working_address(site, names, reload):
    """An address that is not this machine's is a warning.  A reload leaves the name
    at its addresses."""
    address = listen_named(site, names, "192.0.2.1", "127.0.0.1")
    assert site.daemon.log(r"^Listen: 192\.0\.2\.1:\d+: (Cannot assign requested "
                           "address|Address not available)$")
    if reload:
        before = site.daemon.fds()
        names.asked.clear()
        site.reload(Listen="filter.example.org:%s" % address.split(":")[1])
        assert site.daemon.fds() == before and not names.asked.is_set()
    site.session(address=address).quit()


@pytest.mark.covers("clamsmtpd.8 SIGNALS: only a restart can change",
    "clamsmtpd.conf.5 ADDRESSES: names to listen on")
def test_sighup_with_a_new_name_to_listen_on_changes_nothing(site, names):
    """A look-up would stop the loop."""
    listen = site.path("in.sock")
    site.start(Listen=listen, preexec=names.preexec)
    name = "filter.example.org:%d" % site.port()
    site.daemon.write(site.settings(Listen=[listen, name], Header="X-New: yes"))
    site.daemon.send_signal(signal.SIGHUP)
    site.daemon.wait_log("^Listen: %s: " % name)
    site.daemon.wait_log("reload failed, keeping the old settings")
    assert not names.asked.is_set()
    site.session().mail()
    assert HEADER in site.hop.messages[0].body


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: name that cannot be resolved")
def test_name_that_cannot_be_resolved_gives_4xx_until_it_can(site, names, clock):
    """A clamd's name gives 451, and a next hop's name 421."""
    names.addresses = []
    names.go()
    clamd = site.new_clamd(tcp=True)
    where = "clamd.example.org:%d" % clamd.port
    start_named(site, names, ClamAddress=where, Listen=site.path("in.sock"),
                **clock.settings())
    client = site.session()
    client.mail(want="451 4.3.0")
    names.addresses = ["127.0.0.1"]
    clock.go(site.daemon, 5)
    client.mail(want="250 2.0.0 queued")
    names.addresses = []
    hop = "hop.example.org:%d" % site.hop.port
    site.reload(ClamAddress=where, Listen=site.path("in.sock"), OutAddress=hop)
    site.client().expect("421 4.4.1")
    names.addresses = ["127.0.0.1"]
    clock.go(site.daemon, 5)
    until(lambda: site.client().reply().code == "220", "a session")


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: no address of a name works")
def test_name_to_listen_on_without_a_working_address_is_refused(site, names):
    """The error comes after a warning for each address."""
    names.addresses = ["192.0.2.1", "198.51.100.1"]
    names.go()
    daemon = site.refused(Listen="filter.example.org:10025", preexec=names.preexec)
    assert len(daemon.log(r"^Listen: (192\.0\.2|198\.51\.100)\.1:10025: ")) == 2
    assert daemon.log("^Listen: filter.example.org:10025: none of its addresses "
                      "can be used$")


def test_name_beside_its_address_is_opened_once(site, names):
    """The address that a name shares with another line is no error."""
    port = site.port()
    listen_named(site, names, "127.0.0.1", Listen=[
        "127.0.0.1:%d" % port, "filter.example.org:%d" % port], wait=False)
    until(lambda: served(site, "127.0.0.1:%d" % port) == [True], "it serves")
    assert len(site.daemon.listening()) == 1
    site.daemon.idle = site.daemon.fds()


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: several addresses")
def test_name_with_several_addresses_is_tried_at_all(site, names):
    names.addresses = ["127.0.0.99", "127.0.0.98", "127.0.0.1"]
    names.go()
    site.clamd = site.new_clamd(tcp=True)
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port,
                ClamAddress="clamd.example.org:%d" % site.clamd.port)
    site.session().mail()
    assert len(site.hop.messages) == len(site.clamd.scans) == 1


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: names of other hosts")
def test_name_is_resolved_again_after_a_failed_connect(site, names, clock):
    """There is at most one look-up every five seconds."""
    names.addresses = ["127.0.0.99"]
    names.go()
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port,
                **clock.settings())
    site.client().expect("421 4.4.1")
    names.addresses = ["127.0.0.1"]
    site.client().expect("421 4.4.1")
    clock.go(site.daemon, 5)
    until(lambda: site.client().reply().code == "220", "the new address")


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: names of other hosts")
def test_name_in_use_is_resolved_again_after_a_minute(site, names, clock):
    """The old address is used until there is a new one."""
    other = site.new_hop(host="127.0.0.98", port=site.hop.port)
    names.go()
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port,
                **clock.settings())
    site.session().mail()
    names.addresses = ["127.0.0.98"]
    clock.go(site.daemon, 50)
    site.session().mail()
    assert len(site.hop.messages) == 2
    clock.go(site.daemon, 10)

    def moved():
        site.session().mail()
        return other.messages
    until(moved, "the new address")
    names.addresses = []
    clock.go(site.daemon, 60)
    until(lambda: moved() and site.daemon.log("no address found .*keeping the old one"),
          "a look-up in vain")
    site.session().mail()


DEAD, GOOD = "127.0.0.1", "127.0.0.98"      # any libc puts them in this order


def address_lines(site):
    return site.daemon.log(r"^\w+\.example\.org:\d+: .* is tried first")


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: several addresses")
def test_hop_address_that_worked_is_tried_first(site, names, clock):
    """The first address of a name is dead.  After the first session, sessions begin
    with the address that accepted it, also after another look-up."""
    names.addresses = [DEAD, GOOD]
    names.go()
    site.hop = site.new_hop(host=GOOD, port=site.port(DEAD))
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port,
                **clock.settings())
    site.session().mail()
    back = site.new_hop(host=DEAD, port=site.hop.port)
    site.session().mail()
    names.asked.clear()
    clock.go(site.daemon, 60)
    site.session().mail()
    assert names.asked.wait(WAIT)
    until(lambda: not site.daemon.children(), "the look-up ends")
    site.session().mail()
    assert (len(site.hop.messages), back.accepted) == (4, 0)
    assert address_lines(site) == [
        "hop.example.org:%d: 127.0.0.98 works and is tried first from now on"
        % site.hop.port]


def test_hop_address_that_fails_later_gives_way_to_the_other(site, names):
    """When the address that worked dies, the other one is used."""
    names.addresses = [DEAD, GOOD]
    names.go()
    site.hop = site.new_hop(host=GOOD, port=site.port(DEAD))
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port)
    site.session().mail()
    other = site.new_hop(host=DEAD, port=site.hop.port)
    site.hop.down()
    site.session().mail()
    site.hop.up()
    site.session().mail()
    assert (len(site.hop.messages), len(other.messages)) == (1, 2)
    assert len(address_lines(site)) == 2


def test_hop_address_that_does_not_greet_stays_last(site, names):
    """An address that accepts a connection but sends no greeting does not count as
    working.  The order of the name server stays."""
    names.addresses = [DEAD, GOOD]
    names.go()
    site.hop = site.new_hop(host=GOOD, port=site.port(DEAD))
    silent = site.new_hop(host=DEAD, port=site.hop.port)
    silent.on("greeting", CLOSE)
    silent.down()
    start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port)
    site.hop.on("greeting", [CLOSE])
    site.client().expect("421")
    silent.up()
    site.client().expect("421")
    assert (len(site.hop.sessions), len(silent.sessions)) == (1, 1)
    assert not address_lines(site)


def test_hop_address_is_not_tried_twice_when_the_order_changes(site, names, clock):
    """Two sessions wait for the same dead address.  The first of them finds the
    address that works.  The second one then tries that one, and not the dead one
    again."""
    def connecting():
        with open("/proc/net/tcp") as table:        # 02: SYN_SENT
            return len(re.findall(r":%04X 02 " % site.hop.port, table.read()))
    with full_listener(host=DEAD) as dead:
        site.hop = site.new_hop(host=GOOD, port=int(dead.rpartition(":")[2]))
        full = connecting()             # its own
        names.addresses = [DEAD, GOOD]
        names.go()
        start_named(site, names, OutAddress="hop.example.org:%d" % site.hop.port,
                    TimeOut="60", **clock.settings())
        first = site.client()
        until(lambda: connecting() == full + 1, "the first one connects")
        clock.go(site.daemon, 1)
        second = site.client()
        until(lambda: connecting() == full + 2, "the second one connects")
        clock.go(site.daemon, 29)
        first.expect("220")
        clock.go(site.daemon, 1)
        second.expect("220")


def is_ready(status):
    with connect(status) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return probe.makefile("rb").read().endswith(b"\r\nok\n")


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: several addresses")
def test_clamd_address_that_worked_is_tried_first(site, names):
    """The next scan and the next health check begin with the address of the last
    successful scan."""
    names.addresses = [DEAD, GOOD]
    names.go()
    site.clamd = site.new_clamd(tcp=True, host=GOOD, port=site.port(DEAD))
    site.clamd.down()
    status = site.path("status")
    start_named(site, names, StatusListen=status,
                ClamAddress="clamd.example.org:%d" % site.clamd.port)
    site.daemon.wait_log("no clamd answers")
    site.clamd.up()
    site.session().mail()
    back = site.new_clamd(tcp=True, host=DEAD, port=site.clamd.port)
    site.session().mail()
    until(lambda: is_ready(status), "it is ready")
    assert (len(site.clamd.scans), back.accepted) == (2, 0)
    assert address_lines(site) == [
        "clamd.example.org:%d: 127.0.0.98 works and is tried first from now on"
        % site.clamd.port]


def test_clamd_name_being_resolved_at_start_is_no_warning(site, names):
    """The health check at the start waits for the address."""
    site.clamd = site.new_clamd(tcp=True)
    start_named(site, names, ClamAddress="clamd.example.org:%d" % site.clamd.port)
    turns(site)
    names.go()
    until(lambda: site.clamd.pings, "a health check")
    assert not site.daemon.log("no clamd answers")


def test_clamd_address_that_answers_a_ping_is_tried_first(site, names):
    """The health check has found the dead address, so no message waits for it."""
    names.addresses = [DEAD, GOOD]
    names.go()
    site.clamd = site.new_clamd(tcp=True, host=GOOD, port=site.port(DEAD))
    status = site.path("status")
    start_named(site, names, StatusListen=status,
                ClamAddress="clamd.example.org:%d" % site.clamd.port)
    until(lambda: is_ready(status), "it is ready")
    back = site.new_clamd(tcp=True, host=DEAD, port=site.clamd.port)
    site.session().mail()
    assert (len(site.clamd.scans), back.accepted) == (1, 0)


def test_sigterm_during_a_look_up_logs_no_failure(site, names):
    start_named(site, names, ClamAddress="clamd.example.org:3310")
    until(lambda: site.daemon.children(), "the child that looks it up")
    site.daemon.stop()
    assert not site.daemon.log("address")


# ---------------------------------------------------------------- syslog

@pytest.mark.covers("clamsmtpd.8 LOGGING: syslog", "clamsmtpd.8 FILES: /dev/log",
    "clamsmtpd.8 OPTIONS: -d")
@pytest.mark.core
def test_syslog_lines_have_facility_severity_and_name(site, background, syslog):
    log, preexec = syslog
    one = background(preexec=preexec, Quarantine="on")
    client = site.session(address=one.socket)
    client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.quit()
    one.daemon.allowed.update(os.listdir(site.spool))
    one.end()
    log.setblocking(False)
    lines = []
    while True:
        try:
            lines.append(log.recv(65536).rstrip(b"\n\0").decode())
        except BlockingIOError:
            break
    found = []
    for line in lines:
        match = re.fullmatch(
            r"<(\d+)>(?:[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d )?clamsmtpd: (.*)", line)
        assert match, line
        assert int(match.group(1)) >> 3 == 2, "facility mail: " + line
        assert int(match.group(1)) & 7 <= 6, "nothing above info: " + line
        found.append((int(match.group(1)) & 7, match.group(2)))
    text = [t for _, t in found]
    assert "100000: accepted connection from: local" in text
    assert "100000: from=a@example.com, to=b@example.com, status=CLEAN" in text
    assert (6, "100000: from=a@example.com, to=b@example.com, status=VIRUS:%s"
            % VIRUS) in found
    assert [p for p, t in found if t.startswith("100000: quarantined virus file as: ")
            ] == [5]
    assert (4, "running as root is NOT recommended") in found or \
        "running as root is NOT recommended" in one.daemon.text()
    assert not [t for t in text if "CLIENT <" in t]


def clean_lines(client, count, done=0):
    """Send mails, and return their expected lines in the log."""
    senders = ["%s%d@example.com" % ("x" * 60, n) for n in range(done, done + count)]
    for sender in senders:
        client.mail(sender=sender)
    return ["from=%s, to=b@example.com, status=CLEAN" % sender for sender in senders]


def next_line(log):
    """The text of the next line at this /dev/log, without severity and session."""
    return re.fullmatch(rb"<2[0-3]>clamsmtpd: (?:[0-9A-F]{6}: )?(.*)",
                        log.recv(65536)).group(1).decode()


@pytest.mark.covers("clamsmtpd.8 LOGGING: slow reader")
def test_log_burst_for_a_slow_syslog_arrives_whole(site, background, syslog):
    """Lines that a slow syslog daemon does not take at once wait, in their order,
    and none is lost."""
    log, preexec = syslog
    one = background(preexec=preexec)
    client = site.session(address=one.socket)
    want = clean_lines(client, 100)     # the other end is not read
    while next_line(log) != want[0]:
        pass
    assert [next_line(log) for _ in want[1:]] == want[1:]
    client.quit()
    one.end()
    assert next_line(log).startswith("stopping") and next_line(log) == "stopped"


def test_log_line_that_waits_at_the_end_is_in_order(site, background, syslog):
    """At its end the daemon writes as many lines as there is room for, in order."""
    log, preexec = syslog
    one = background(preexec=preexec)
    client = site.session(address=one.socket)
    want = clean_lines(client, 20)
    client.quit()
    one.end()
    lines = [text for _, text in received(log)]
    first = [i for i, line in enumerate(lines) if line.endswith(want[0])][0]
    assert [line[8:] for line in lines[first:]] == want[:len(lines) - first]


@pytest.mark.covers("clamsmtpd.8 LOGGING: slow reader")
def test_syslog_that_is_full_blocks_nobody(site, background, syslog):
    """PROMISE 5: lines beyond the backlog are lost.  A later line has their
    number."""
    log, preexec = syslog
    one = background(preexec=preexec)
    client = site.session(address=one.socket)
    want = clean_lines(client, 600)     # the other end is not read
    assert len(site.hop.messages) == 600
    while next_line(log) != want[0]:
        pass
    got = want[:1] + [next_line(log) for _ in range(50)]
    want += clean_lines(client, 1, 600)         # there is room, but too late
    while not re.search(r"^\d+ lines of the log were lost$", got[-1]):
        got.append(next_line(log))
    assert 200 < len(got) and got[:-1] == want[:len(got) - 1]
    assert int(got[-1].split()[0]) == len(want) - len(got) + 1
    more = clean_lines(client, 100, 601)
    assert [next_line(log) for _ in more] == more
    client.quit()
    one.end()


def received(log):
    """The severities and texts of the lines that can be read from this /dev/log."""
    log.setblocking(False)
    lines = []
    with contextlib.suppress(BlockingIOError):
        while True:
            lines.append(re.fullmatch(rb"<(\d+)>clamsmtpd: (.*)", log.recv(65536)))
    assert all(int(line[1]) >> 3 == 2 for line in lines), "facility mail"
    return [(int(line[1]) & 7, line[2].decode()) for line in lines]


def in_foreground(site, preexec, *args, **settings):
    sock = site.path("in.sock")
    daemon = site.start(args=["-F", *args], level=None, wait=False, preexec=preexec,
                        Listen=sock, **settings)
    return daemon, sock


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -F")
@pytest.mark.core
def test_foreground_with_syslog_has_severities_and_a_silent_standard_error(
        site, syslog):
    """-F is for a supervisor: the daemon does not fork, and logs as in the
    background."""
    log, preexec = syslog
    daemon, sock = in_foreground(site, preexec, Quarantine="on")
    wait_listener(sock)
    client = site.session(address=sock)
    client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.cmd("XCLIENT ADDR=192.0.2.1", "554")
    lines = received(log)           # the socket holds no more than ten
    client.quit()
    daemon.allowed.update(os.listdir(site.spool))
    assert processes(daemon.mark) == [daemon.pid]
    daemon.stop()
    assert (6, "100000: from=a@example.com, to=b@example.com, status=CLEAN") in lines
    assert (4, "100000: client attempted use of privileged XCLIENT feature") in lines
    assert [n for n, text in lines if "quarantined" in text] == [5]
    assert not [text for n, text in lines if n == 7]
    assert daemon.text() == ""


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -F")
@pytest.mark.parametrize("args, most", [(["-d", "0"], 3), (["-d", "2"], 5),
                                        (["-d", "4"], 7)], ids=str)
def test_foreground_with_syslog_and_a_level_logs_as_much(site, syslog, args, most):
    """-F sets where the log goes, and -d how much is logged."""
    log, preexec = syslog
    daemon, sock = in_foreground(site, preexec, *args, ClamAddress="/no/such/socket")
    wait_listener(sock)
    site.session(address=sock).mail(want="451")
    daemon.send_signal(signal.SIGTERM)
    site.clients[-1].rest()
    daemon.stop()
    assert max(n for n, _ in received(log)) == most
    assert not daemon.log("^1000")


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -F")
@pytest.mark.parametrize("settings, status, why", [
    ({"MaxScans": "many"}, 2, '"many" is not'),
    ({"PidFile": "/no/such/directory/pid"}, 1, "PidFile: /no/such/directory/pid: ")],
    ids=["configuration", "pid file"])
def test_foreground_with_syslog_that_cannot_start_logs_to_both(
        site, syslog, settings, status, why):
    """A supervisor may discard standard error."""
    log, preexec = syslog
    daemon, _ = in_foreground(site, preexec, **settings)
    assert daemon.wait_exit() == status
    daemon.stopped = True
    assert [text for n, text in received(log) if n == 3 and why in text]
    assert len(daemon.log(re.escape(why))) == 1


def test_foreground_check_of_the_configuration_is_reported_once(site, run):
    """Init scripts use -n with -F."""
    with open(site.path("conf"), "w") as file:
        file.write("OutAddress: 25\nMaxScans: many\n")
    done = run("-F", "-n", "-f", site.path("conf"))
    assert done.returncode == 2 and done.stderr.count("many") == 1


class StreamSyslog(Server):
    """A syslogd whose /dev/log is a stream socket.  It reads only when the test
    says so."""

    family = "syslogd"
    commands = scans = ()           # for a report; it has none

    def __init__(self, dev):
        self.data = []              # of each connection
        self.reads = threading.Event()
        self.reads.set()
        super().__init__(path=os.path.join(dev, "log"))

    def serve(self, sock):
        data = bytearray()
        self.data.append(data)
        while self.reads.wait(WAIT):
            got = sock.recv(65536)
            if not got:
                return
            data += got

    def lines(self):
        """The lines that have ended with a NUL."""
        return [line for data in self.data for line in bytes(data).split(b"\0")[:-1]]

    def wait_line(self, text):
        until(lambda: [line for line in self.lines() if text in line],
              "a line with %r in %r" % (text, self.lines()[-5:]))

    def stop(self):
        """End as a syslogd does that is stopped.  up() starts it again."""
        self.down()
        self.hang_up()
        until(lambda: not self.socks, "it is gone")


@pytest.fixture
def stream_syslog(site, own_dev):
    preexec, dev = own_dev
    syslogd = StreamSyslog(dev)
    site.servers.append(syslogd)
    return syslogd, preexec


@pytest.fixture
def stream_logged(site, background, stream_syslog):
    """A stream_syslog that has received a line of a daemon, and a client of this
    daemon."""
    syslogd, preexec = stream_syslog
    one = background(preexec=preexec)
    client = site.session(address=one.socket)
    client.mail()
    syslogd.wait_line(b"status=CLEAN")
    yield syslogd, client
    client.quit()


def all_whole(lines):
    for line in lines:
        assert re.fullmatch(rb"<2[0-3]>clamsmtpd: [^<>\n\0]*", line), line


@pytest.mark.covers("clamsmtpd.8 FILES: /dev/log")
@pytest.mark.parametrize("fault", ["", "send:1:2:0", "send:1:3:0 send:2:3:11"],
                         ids=["whole", "pieces", "halves"])
def test_syslog_with_a_stream_socket_gets_whole_lines(
        site, background, stream_syslog, faulty_build, fault):
    """Each line ends in a NUL, even if it is written in pieces or in two turns."""
    syslogd, preexec = stream_syslog
    one = background(preexec=preexec, binary=faulty_build, env={"FAULT": fault})
    assert "/dev/log" not in one.daemon.text()
    client = site.session(address=one.socket)
    for _ in range(5):
        client.mail()
    client.quit()
    one.end()
    if ":11" not in fault:          # then no line is lost
        syslogd.wait_line(b"stopped")
        assert len([line for line in syslogd.lines() if b"status=CLEAN" in line]) == 5
        assert not [line for line in syslogd.lines() if b"were lost" in line]
    syslogd.wait_line(b"status=CLEAN")
    all_whole(syslogd.lines())


def test_syslog_with_a_stream_socket_that_breaks_in_a_line_gets_whole_lines(
        site, background, stream_syslog, faulty_build):
    """The rest of a line is not sent on a new connection.  The line is lost."""
    syslogd, preexec = stream_syslog
    background(preexec=preexec, binary=faulty_build,
               env={"FAULT": "send:1:0:0 send:2:0:104"})
    syslogd.wait_line(b"listening on ")
    syslogd.wait_line(b" 1 lines of the log were lost")
    all_whole(syslogd.lines())


def test_syslog_with_a_stream_socket_has_the_last_line_when_it_is_quiet(
        site, background, stream_syslog, faulty_build):
    """The second half of a line does not wait for the next line."""
    syslogd, preexec = stream_syslog
    one = background(preexec=preexec, binary=faulty_build,
                     env={"FAULT": "send:1:3:0 send:2:3:11"})
    client = site.session(address=one.socket)
    client.mail()
    syslogd.wait_line(b"status=CLEAN")
    client.quit()


def test_syslog_with_a_stream_socket_that_is_full_blocks_nobody(
        site, background, stream_syslog):
    """PROMISE 5: whole lines are lost, and counted."""
    syslogd, preexec = stream_syslog
    syslogd.reads.clear()
    one = background(preexec=preexec)
    client = site.session(address=one.socket)
    to = ["%s%d@example.com" % ("x" * 60, i) for i in range(10)]
    for _ in range(600):
        client.mail(to=to)
    syslogd.reads.set()
    syslogd.wait_line(b"lines of the log were lost")
    client.mail(to=to)
    client.quit()
    one.end()
    syslogd.wait_line(b"stopped")
    all_whole(syslogd.lines())


def test_syslog_with_a_stream_socket_may_restart(stream_logged):
    """The lines after a restart go to the new syslogd."""
    syslogd, client = stream_logged
    syslogd.stop()
    syslogd.up()
    client.mail(sender="after@example.com")
    syslogd.wait_line(b"from=after@example.com")


def test_log_for_a_syslog_that_is_away_waits(stream_logged):
    """When a syslog daemon that was down is up again, it gets the lines, even if no
    new ones follow."""
    syslogd, client = stream_logged
    syslogd.stop()
    want = clean_lines(client, 50)
    syslogd.up()
    syslogd.wait_line(want[-1].encode())
    lines = [line.split(b": ", 2)[-1].decode() for line in syslogd.lines()]
    assert lines[-len(want):] == want


def test_syslog_missing_at_start_is_reported_on_standard_error(site, background, own_dev):
    """There is one line about it.  A syslogd that starts later gets the log."""
    preexec, dev = own_dev
    one = background(preexec=preexec)
    line, = [line for line in one.daemon.log() if "running as root" not in line]
    assert line == ("/dev/log: no syslog daemon; up to 32 KiB of log lines are kept "
                    "until one starts: No such file or directory")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(os.path.join(dev, "log"))
        log.settimeout(WAIT)
        client = site.session(address=one.socket)
        client.mail()
        client.quit()
        while b"status=CLEAN" not in log.recv(65536):
            pass
        one.end()


def test_syslog_missing_is_tried_once_a_second(
        site, background, own_dev, faulty_clock):
    """Without a syslog daemon the lines cost no connect(2) each, and a syslogd that
    starts gets the log after a second."""
    preexec, dev = own_dev
    settings = faulty_clock.settings()
    faults = Faults(site.path("faults"), "")
    settings["env"].update(faults.env)
    one = background(preexec=preexec, **settings)

    def connects():
        """The calls of connect(2) during ten sessions, without their own."""
        before, peers = faults.calls("connect"), site.hop.accepted + site.clamd.accepted
        for _ in range(10):
            client = site.session(address=one.socket)
            client.mail()
            client.quit()
        return faults.calls("connect") - before - (
            site.hop.accepted + site.clamd.accepted - peers)

    def wait():
        """Move the clock to the next second."""
        faulty_clock.monotonic += 1
        faulty_clock.set()

    connects()                  # the health check at the start
    assert connects() == 0
    wait()
    assert connects() == 1
    assert connects() == 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(os.path.join(dev, "log"))
        log.settimeout(WAIT)
        wait()
        assert connects() == 1
        while b"status=CLEAN" not in log.recv(65536):
            pass


def test_standard_error_that_is_a_file_is_shared_with_the_starter(site):
    """The file is not open for appending.  Still no line overwrites another."""
    path, sock = site.path("log"), site.path("in.sock")
    with open(path, "wb", buffering=0) as file:
        site.start(wait=False, Listen=sock,
                   preexec=lambda: os.dup2(file.fileno(), 2))
        wait_listener(sock)
        site.session(address=sock).mail()
        file.write(b"a line of the starter's\n")
        site.session(address=sock).mail()
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    assert lines.pop() == b""
    assert lines.count(b"a line of the starter's") == 1
    assert len([line for line in lines if line.endswith(b"status=CLEAN")]) == 2
    assert all(line.startswith((b"clamsmtpd: ", b"a line")) for line in lines)


# ---------------------------------------------------------------- what it takes

def test_daemon_idle_uses_no_cpu(site):
    clients = [site.session() for _ in range(20)]
    clients[0].cmd("NOOP", "250")
    site.daemon.rests()
    for client in clients:
        client.quit()


@pytest.mark.skipif("TEST_QEMU" in os.environ,
                    reason="memory and CPU time are qemu's, too")
def test_out_of_memory_waits_and_uses_no_cpu(site):
    """There is no busy loop, and the sessions continue when there is memory
    again."""
    clients = [site.session() for _ in range(6)]
    for client in clients:
        client.begin()
    size = int(site.daemon.proc("VmSize").split()[0]) * 1024
    resource.prlimit(site.daemon.pid, resource.RLIMIT_AS,
                     (size, resource.RLIM_INFINITY))
    site.daemon.pause()
    for client in clients:
        client.sock.setblocking(False)
        try:
            client.sock.send((b"." * 98 + b"\r\n") * 3000 + b".\r\n" +
                             b"NOOP\r\n" * 3000)
        except BlockingIOError:
            pass
        client.sock.settimeout(WAIT)
    site.daemon.resume()
    site.daemon.rests()
    resource.prlimit(site.daemon.pid, resource.RLIMIT_AS,
                     (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for client in clients:
        client.close()
    client = site.session()
    client.mail()
    client.quit()


@pytest.mark.skipif("TEST_QEMU" in os.environ or bool(os.environ.get("TEST_BYTES")),
                    reason="qemu has memory of its own, and single bytes need no buffer")
def test_out_of_memory_for_commands_after_a_message_leaks_no_buffer(site, faulty_build):
    """Commands after a message need a buffer of four times the usual size.  Without
    memory for it the session ends, and no other buffer stays in use."""
    faults = Faults(site.path("faults"), "malloc:1:1:%d" % errno.ENOMEM, on=False)
    site.start(Listen=site.path("in.sock"), binary=faulty_build, env=faults.env)

    def memory_after(sessions):
        """The size of the daemon's data in KiB after so many such sessions."""
        for _ in range(sessions):
            client = site.session()
            client.begin()
            site.daemon.pause()                 # it reads all in one turn
            client.send(b"Subject: x\r\n\r\nx\r\n.\r\n" + b"NOOP\r\n" * 8000)
            faults.switch(on=True)
            site.daemon.resume()
            client.rest()
            faults.switch(on=False)
        return int(site.daemon.proc("VmData").split()[0])
    before = memory_after(5)
    grown = memory_after(15) - before
    assert sanitized() or grown < 8 * 32        # 15 buffers would be 480 KiB
    assert len(site.daemon.log("out of memory: session ends")) == 20


def test_next_hop_that_answers_no_connect_delays_nobody(site):
    """PROMISE 5: the backlog of the next hop is full, so that the connect() stays
    pending."""
    with full_listener() as address:
        site.start(TimeOut="1", OutAddress=address)
        clients = [site.client() for _ in range(5)]
        site.daemon.wait_log("accepted connection", 5)
        for client in clients:
            client.expect("421 4.4.1")


def test_buffers_of_idle_sessions_are_given_back(site):
    """A busy time leaves little memory in use."""
    site.start(MaxConnections="100")
    client = site.session()
    client.mail()
    before = site.daemon.rss()
    clients = [site.session() for _ in range(60)]
    for one in clients:
        one.mail(body=b"A: b\r\n\r\n" + b"x" * 20000 + b"\r\n")
    held = site.daemon.grown(before)
    assert held < 60 * 16, "%d KiB for 60 idle sessions" % held
    for one in clients:
        one.quit()
    client.quit()
