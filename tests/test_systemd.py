"""Features of systemd: its store for listeners, socket units, readiness, watchdog,
journal, capabilities.  The test plays systemd's end of NOTIFY_SOCKET."""

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from harness import (CLAMSMTPD, Hold, WAIT, connect, has_ipv6, never,
                     own_host, until)
from test_run import (IP_TRANSPARENT, as_nobody, exposed, option_of, places,  # noqa: F401
                      served)

BODY = b"Subject: x\r\n\r\nhello\r\n"
SOME = b"Subject: x\r\n\r\nsome\r\n"
OURS = "clamsmtpd_"

# Takes the descriptors from the test and becomes the daemon, as systemd's child
# does between fork() and exec().
LAUNCHER = """#!%s
import os, socket, sys
hand = socket.socket(socket.AF_UNIX)
hand.connect(%r)
names, fds, _, _ = socket.recv_fds(hand, 65536, 64)
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)),
                      LISTEN_FDNAMES=names.decode()[1:])
os.execv(%r, [%r] + sys.argv[1:])
"""


class Systemd:
    """systemd's end of one unit: the stored descriptors by name, and all that the
    daemon has sent."""

    def __init__(self, site, store=True):
        self.site = site
        self.said = []
        self.fds = []                   # [(name, descriptor)], in their order
        self.env = {"NOTIFY_SOCKET": site.path("notify")}
        if store:
            self.env["FDSTORE"] = "64"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(site.path("notify"))
        self.hand = socket.socket(socket.AF_UNIX)
        self.hand.bind(site.path("hand"))
        self.hand.listen()
        self.hand.settimeout(WAIT)
        self.launcher = site.path("launcher")
        self.launch(CLAMSMTPD)

    def launch(self, program):
        """Set the program that start() runs from now on."""
        with open(self.launcher, "w") as file:
            file.write(LAUNCHER % (sys.executable, self.site.path("hand"), program,
                                   program))
        os.chmod(self.launcher, 0o755)

    def change_launcher(self, old, new):
        with open(self.launcher, "r+") as file:
            text = file.read()
            assert old in text
            file.seek(0)
            file.truncate()
            file.write(text.replace(old, new))

    def launch_with(self, clock):
        """The same, with a clock that the test moves."""
        settings = clock.settings()
        self.launch(settings["binary"])
        self.env.update(settings["env"])

    def start(self, env=(), **settings):
        """Start the daemon with the stored descriptors, and wait until it is
        ready."""
        self.read()
        ready = self.said.count("READY=1")
        passing = threading.Thread(target=self.pass_on)
        passing.start()
        one = self.site.start(binary=self.launcher, wait=False,
                              env={**self.env, **dict(env)}, **settings)
        passing.join()
        until(lambda: self.read().count("READY=1") > ready or not one.alive(),
              "it is ready")
        assert one.alive(), one.text()
        one.wait_listening()
        one.own.clear()                 # a socket that is stored keeps its path
        return one

    def pass_on(self):
        child, _ = self.hand.accept()
        socket.send_fds(child, [b":" + ":".join(n for n, _ in self.fds).encode()],
                        [fd for _, fd in self.fds])
        child.close()

    def read(self):
        """Do what the daemon has asked for.  Returns all that it has sent so
        far."""
        while select.select([self.sock], [], [], 0)[0]:
            data, fds, _, _ = socket.recv_fds(self.sock, 4096, 64)
            lines = data.decode().split("\n")
            self.said += lines
            name = "".join(l[7:] for l in lines if l.startswith("FDNAME="))
            assert re.fullmatch("[!-9;-~]{0,255}", name)
            if "FDSTOREREMOVE=1" in lines:
                self.remove(lambda n, _: n == name)
            elif "FDSTORE=1" in lines:
                assert len(fds) == 1
                self.fds += [(name, fd) for fd in fds]
            else:
                assert not fds
        return self.said

    def names(self):
        self.read()
        return sorted(name for name, _ in self.fds)

    def remove(self, which):
        for name, fd in [one for one in self.fds if which(*one)]:
            self.fds.remove((name, fd))
            os.close(fd)

    def sockets(self, *socks, name="clamsmtpd.socket"):
        """Add these sockets, as a socket unit does."""
        for sock in socks:
            self.fds.append((name, os.dup(sock.fileno())))

    def close(self):
        self.remove(lambda *_: True)
        self.sock.close()
        self.hand.close()


@pytest.fixture
def systemd(site):
    systemd = Systemd(site)
    yield systemd
    for daemon in site.daemons:
        daemon.kill()
    systemd.close()


def end(daemon, number=signal.SIGTERM):
    daemon.send_signal(number)
    daemon.wait_exit()
    daemon.stopped = True
    daemon.check_report()


# ---------------------------------------------------------------- a restart

@pytest.mark.covers("clamsmtpd.8 Restart and upgrade", "clamsmtpd.8 SIGNALS: FDSTORE",
    "clamsmtpd.8 ENVIRONMENT: FDSTORE")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_restart_refuses_no_connection(site, systemd, number):
    """Clients that connect while the daemon drains, or while none runs, wait.  The
    next daemon serves them on each of its listeners."""
    path, port = site.path("in.sock"), site.port()
    other = site.port("::" if has_ipv6() else "127.0.0.1")
    listen = [path, "127.0.0.1:%d" % port] + ["[::]:%d" % other] * has_ipv6()
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    one = systemd.start(Listen=listen)
    inode = os.stat(path).st_ino
    busy = site.session(address=path)
    busy.submit(BODY)
    hold.reached()
    waiting = []
    if number == signal.SIGTERM:
        one.send_signal(number)
        until(lambda: "STOPPING=1" in systemd.read(), "it stops")
        one.wait_log("^stopping")
        waiting = [site.client(address=address) for address in listen]
        never(lambda: any(c.stream.more() for c in waiting), "they are answered")
        hold.go()
        busy.expect("250 2.0.0 queued")
        busy.rest()
        one.wait_exit()
        one.stopped = True
    else:
        end(one, number)
        hold.go()
    assert not one.log("refused")
    waiting += [site.client(address=address) for address in listen]
    stored = systemd.names()
    two = systemd.start(Listen=listen)
    for client in waiting:
        client.hello()
        client.mail()
        client.quit()
    assert os.stat(path).st_ino == inode
    assert systemd.names() == stored and len(stored) == len(listen)
    assert all(name.startswith(OURS) for name in stored)
    assert not two.log("in use|stays")
    end(two)
    assert os.path.exists(path)


@pytest.mark.covers("clamsmtpd.8 SIGNALS: busy client")
def test_restart_busy_session_sends_its_mail(site, systemd, clock):
    """A client that is about to send MAIL at SIGTERM sends its mail and then gets
    the 421.  This holds before the next hop's greeting and after EHLO."""
    hold = Hold("220 next.hop ESMTP ready")
    site.hop.on("greeting", [hold, None])
    systemd.launch_with(clock)
    one = systemd.start()
    early = site.client()
    hold.reached()
    talking = site.session()
    one.send_signal(signal.SIGTERM)
    one.wait_log("^stopping")
    hold.go()
    early.hello()
    for client in early, talking:
        client.mail()
    never(lambda: talking.stream.more(), "the session gets 421")
    clock.go(one, 1)
    for client in early, talking:
        client.expect("421 4.3.2")
        client.eof()
        client.close()
    one.wait_exit()
    one.stopped = True


@pytest.mark.covers("clamsmtpd.8 SIGNALS: busy client")
def test_restart_idle_session_gets_421(site, systemd, clock):
    """An idle session gets 421 at once.  A session that was busy at SIGTERM and
    begins no mail gets it after a second."""
    systemd.launch_with(clock)
    one = systemd.start()
    idle = site.session()
    clock.go(one, 1)
    busy = site.session()
    one.send_signal(signal.SIGTERM)
    idle.expect("421 4.3.2")
    idle.eof()
    never(lambda: busy.stream.more(), "the busy session gets 421")
    clock.go(one, 1)
    busy.expect("421 4.3.2")
    busy.eof()
    clock.go(one, 1)
    one.wait_exit()
    one.stopped = True


def test_restart_keeps_a_port_of_the_kernels_choice(site, systemd):
    """Listen: 127.0.0.1:0 takes the stored listener of that address."""
    first = systemd.start().address
    end(site.daemon)
    assert systemd.start().address == first
    assert len(systemd.names()) == 1
    end(site.daemon)


def test_restart_with_other_settings_closes_old_listeners(site, systemd):
    """A stored listener that no line has is removed from the store, with its path,
    and does not keep an overlapping listener from opening."""
    port, path = site.port("0.0.0.0"), site.path("in.sock")
    systemd.start(Listen=["127.0.0.1:%d" % port, path])
    assert len(systemd.names()) == 2
    end(site.daemon)
    two = systemd.start(Listen="0.0.0.0:%d" % port)
    assert two.log("^%s: systemd passed this listener, but no Listen line asks "
                   "for it; it is closed$" % path)
    assert served(site, "127.0.0.2:%d" % port) == [True]
    assert systemd.names() == [OURS + "0.0.0.0_%d" % port]
    assert not os.path.exists(path)
    end(two)


def test_stored_ipv6_listener_is_opened_again_for_ipv4(site, systemd, places):  # noqa: F811
    """IPV6_V6ONLY of a stored listener counts.  If the file has no line for IPv4, a
    socket without IPv4 is opened again."""
    systemd.start(Listen=places("[::]:PORT 0.0.0.0:PORT"))
    end(site.daemon)
    two = systemd.start(Listen=places("[::]:PORT"))
    assert served(site, *places("127.0.0.1:PORT [::1]:PORT")) == [True, True]
    assert len(systemd.names()) == 1
    end(two)
    systemd.start(Listen=places("[::]:PORT"))
    assert len(systemd.names()) == 1 and systemd.said.count("FDSTORE=1") == 3
    end(site.daemon)


@pytest.mark.skipif("TEST_QEMU" in os.environ, reason="qemu has no IP_TRANSPARENT")
def test_stored_listener_gets_ip_transparent(site, systemd, as_root):
    """A stored listener gets or loses IP_TRANSPARENT with TransparentProxy."""
    port = site.port()
    listen = "127.0.0.1:%d" % port
    for on in "off", "on", "off":
        systemd.start(Listen=listen, TransparentProxy=on)
        assert option_of(site.daemon, ("127.0.0.1", port),
                         *IP_TRANSPARENT) == (on == "on")
        end(site.daemon)
    assert systemd.said.count("FDSTORE=1") == 1


def test_stored_unix_listener_without_its_path_is_opened_again(site, systemd):
    """systemd may have removed its directory, so that no client could connect."""
    path = site.path("in.sock")
    systemd.start(Listen=path)
    end(site.daemon)
    os.unlink(path)
    two = systemd.start(Listen=path)
    assert served(site, path) == [True]
    assert len(systemd.names()) == 1 and not two.log("Listen")
    end(two)


@pytest.mark.parametrize("name", ["in.sock", "a:b c\xe9.sock"])
def test_reload_changes_the_store(site, systemd, name):
    """A listener that is closed is removed from the store, and a new one is added,
    whatever its name."""
    path, other = site.path(name), site.path("other.sock")
    one = systemd.start(Listen=path)
    first = systemd.names()
    site.reload(Listen=[path, other])
    assert systemd.names() == sorted(first + [OURS + other])
    site.reload(Listen=other)
    assert systemd.names() == [OURS + other]
    end(one)


def test_reload_that_fails_leaves_the_store_as_it_was(site, systemd):
    """New listeners are removed, and those that were closed for them are stored
    again."""
    port = site.port("0.0.0.0")
    listen, more = ("127.0.0.1:%d" % p for p in (port, site.port()))
    one = systemd.start(Listen=listen)
    before = systemd.names()
    one.write(site.settings(Listen=["0.0.0.0:%d" % port, more, site.hop.address]))
    one.send_signal(signal.SIGHUP)
    one.wait_log("reload failed")
    assert systemd.names() == before and systemd.said.count("FDSTORE=1") == 4
    end(one)
    waiting = site.client(address=listen)
    systemd.start(Listen=listen)
    waiting.expect("220")
    waiting.quit()
    end(site.daemon)


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: FDSTORE")
@pytest.mark.parametrize("fdstore", [None, "0"])
def test_without_a_store_nothing_is_stored_or_left(site, fdstore):
    """Only $FDSTORE above 0 means that there is a store.  OpenRC has NOTIFY_SOCKET
    alone."""
    systemd = Systemd(site, store=False)
    one = systemd.start(env={"FDSTORE": fdstore} if fdstore else (),
                        Listen=site.path("in.sock"))
    end(one)
    assert systemd.read() == ["READY=1", "STOPPING=1"]
    assert not os.path.exists(site.path("in.sock"))
    systemd.close()


# ---------------------------------------------------------------- socket units

def listener(family, address):
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen()
    return sock


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID")
@pytest.mark.parametrize("store", [True, False])
def test_sockets_of_a_unit_are_used_and_left_to_it(site, store):
    """The sockets are matched by address and never stored.  At the end they are
    neither shut down nor removed, since they are systemd's."""
    path, systemd = site.path("in.sock"), Systemd(site, store)
    with listener(socket.AF_INET, ("127.0.0.1", 0)) as inet, \
            listener(socket.AF_INET, ("127.0.0.1", 0)) as status, \
            listener(socket.AF_UNIX, path) as unix:
        addresses = ["127.0.0.1:%d" % inet.getsockname()[1], path]
        status_address = "127.0.0.1:%d" % status.getsockname()[1]
        early = [site.client(address=address) for address in addresses]
        systemd.sockets(inet, unix, status)
        for _ in range(2):
            systemd.start(Listen=addresses, StatusListen=status_address)
            for client in early:
                client.expect("220")
                client.quit()
            with connect(status_address) as visitor:
                visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert visitor.recv(13) == b"HTTP/1.0 200 "
            end(site.daemon)
            early = [site.client(address=address) for address in addresses]
    assert "FDSTORE=1" not in systemd.read() and os.path.exists(path)
    systemd.close()


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID")
def test_sockets_for_another_process_are_not_used(site, systemd):
    """With another LISTEN_PID the descriptors are closed like all that are
    inherited."""
    systemd.change_launcher("LISTEN_PID=str(os.getpid())", "LISTEN_PID='1'")
    with listener(socket.AF_INET, ("127.0.0.1", 0)) as inet:
        address = "127.0.0.1:%d" % inet.getsockname()[1]
        systemd.sockets(inet)
        one = systemd.start(Listen=site.path("in.sock"))
        assert not one.log(address)
        inode = "socket:[%d]" % os.fstat(inet.fileno()).st_ino
        fds = "/proc/%d/fd" % one.pid
        assert inode not in [os.readlink(os.path.join(fds, fd)) for fd in os.listdir(fds)]
        end(one)


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID")
def test_socket_of_a_unit_that_no_line_has_is_left_to_it(site, systemd):
    """We close our descriptor, and the log says so; the socket still listens."""
    with listener(socket.AF_INET, ("127.0.0.1", 0)) as inet:
        address = "127.0.0.1:%d" % inet.getsockname()[1]
        systemd.sockets(inet)
        one = systemd.start(Listen=site.path("in.sock"))
        assert one.log("^%s: systemd passed this listener, but" % address)
        site.client(address=address).close()
        end(one)


def test_descriptor_passed_that_is_no_listener_is_closed_with_a_warning(site, systemd):
    """The descriptors are a datagram socket, a socket that does not listen, and a
    file."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, \
            socket.socket() as stream, open(os.devnull) as file:
        datagram.bind(("127.0.0.1", 0))
        systemd.sockets(datagram, stream, file)
        one = systemd.start()
    assert one.log("^LISTEN_FDS: descriptor") == [
        "LISTEN_FDS: descriptor %d is not a listening stream socket; it is closed"
        % fd for fd in (3, 4, 5)]
    site.session().quit()
    end(one)


def test_virus_actions_have_no_variables_of_systemd(site, systemd):
    """The variables are for the daemon's process alone."""
    out = site.path("out")
    with listener(socket.AF_INET, ("127.0.0.1", 0)) as inet:
        systemd.sockets(inet)
        systemd.start(VirusAction="env >%s.new; mv %s.new %s" % (out, out, out))
    site.session().mail(body=b"Subject: x\r\n\r\nEICAR\r\n", want="250 2.0.0 Virus")
    until(lambda: os.path.exists(out), "the action has run")
    with open(out) as file:
        assert "LISTEN_" not in file.read()
    end(site.daemon)


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: NOTIFY_SOCKET")
def test_notify_socket_gets_ready_after_listening_and_the_log_is_syslog(
        site, systemd, syslog):
    """READY=1 comes when clients can connect, and STOPPING=1 at the end.  The
    daemon stays in the foreground, and logs to syslog."""
    log, preexec = syslog
    path = site.path("in.sock")
    one = site.start(level=None, wait=False, env=systemd.env, preexec=preexec, Listen=path)
    until(lambda: "READY=1" in systemd.read(), "it is ready")
    client = site.session(address=path)
    client.mail()
    client.quit()
    want = b"<22>clamsmtpd: 100000: from=a@example.com, to=b@example.com, status=CLEAN"
    until(lambda: log.recv(4096).rstrip(b"\n\0") == want, "the line of the mail")
    assert one.alive() and one.text() == ""
    end(one)
    assert "STOPPING=1" in systemd.read()


def test_notify_socket_gets_no_ready_when_the_address_is_in_use(site, systemd):
    one = site.refused(env=systemd.env, Listen=site.hop.address)
    assert one.log("in use") and systemd.read() == []


# ---------------------------------------------------------------- NOTIFY_SOCKET

def test_notify_socket_of_roots_works_after_user(open_site):
    """The socket is connected before the daemon changes its user, so that READY=1,
    the watchdog and STOPPING=1 all arrive."""
    os.chmod(open_site.dir, 0o755)
    systemd = Systemd(open_site)
    os.chmod(open_site.path("notify"), 0o700)
    one = systemd.start(User="nobody")
    end(one)
    systemd.read()
    assert {"FDSTORE=1", "READY=1", "STOPPING=1"} <= set(systemd.said)
    assert not one.log("NOTIFY_SOCKET")
    systemd.close()


def test_notify_socket_that_is_gone_after_ready_is_no_warning(site, systemd):
    """OpenRC reads READY=1 and closes the socket."""
    one = systemd.start()
    systemd.sock.close()
    systemd.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end(one)
    assert one.log("^stopped$") and not one.log("NOTIFY_SOCKET")


def test_notify_socket_without_a_reader_is_a_warning(site):
    """The daemon still starts."""
    site.start(env={"NOTIFY_SOCKET": site.path("nobody")})
    assert site.daemon.log("^NOTIFY_SOCKET: %s: No such file" % site.path("nobody"))
    site.session().quit()


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: WATCHDOG_USEC, WATCHDOG_PID")
@pytest.mark.parametrize("own", [None, True, False])
def test_watchdog_is_fed_twice_in_its_time(site, clock, own):
    """WATCHDOG=1 is sent at half of WATCHDOG_USEC, unless the variable is for
    another process."""
    systemd = Systemd(site)
    systemd.launch_with(clock)
    if own is not None:
        systemd.change_launcher("if fds:", "os.environ['WATCHDOG_PID'] = str(%s)"
                                "\nif fds:" % ("os.getpid()" if own else "1"))
    one = systemd.start(env={"WATCHDOG_USEC": "20000000"})

    def fed():
        return systemd.read().count("WATCHDOG=1")
    if own is False:
        clock.go(one, 60)
        site.session().quit()
        assert fed() == 0
    else:
        for _ in range(3):
            before = fed()
            clock.go(one, 9)
            site.session().quit()
            assert fed() == before
            clock.go(one, 1)
            until(lambda: fed() == before + 1, "the watchdog is fed")
    end(one)
    systemd.close()


# ---------------------------------------------------------------- the journal

def journal(path):
    stat = os.stat(path)
    return {"JOURNAL_STREAM": "%d:%d" % (stat.st_dev, stat.st_ino)}


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: JOURNAL_STREAM")
@pytest.mark.parametrize("here", [True, False])
def test_journal_gets_levels_and_no_second_tag(tmp_path, here):
    """If standard error is the journal, a line begins with its level, which
    journald removes.  It has no name, since journald adds it."""
    err = tmp_path / "err"
    err.write_text("")
    env = dict(os.environ, **journal(str(err if here else tmp_path)))
    with open(err, "w") as file:
        subprocess.run([CLAMSMTPD, "-f", "/no/such/file"], stderr=file, env=env)
    tags = ["<4>", "<3>"] if here else ["clamsmtpd: "] * 2
    lines = err.read_text().splitlines()
    assert [line[:line.index("/")] for line in lines] == tags, lines


# ---------------------------------------------------------------- capabilities

@pytest.mark.skipif("TEST_QEMU" in os.environ, reason="qemu has no IP_TRANSPARENT")
@pytest.mark.covers("clamsmtpd.8 SECURITY: capabilities",
    "clamsmtpd.8 TRANSPARENT PROXY FEATURE: TPROXY")
def test_capabilities_of_a_unit_are_given_up(open_site):
    """The capabilities are for ports below 1024, and are dropped when those are
    open."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv here")
    site, host = open_site, own_host(25)
    binary = site.path("launcher")
    with open(binary, "w") as file:
        file.write("#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups"
                   " --inh-caps +net_bind_service,+net_admin"
                   " --ambient-caps +net_bind_service,+net_admin %s \"$@\"\n"
                   % exposed(site))
    os.chmod(binary, 0o755)
    site.start(binary=binary, Listen=host + ":25", TransparentProxy="on")
    assert site.daemon.address == host + ":25"
    assert not site.daemon.log("IP_TRANSPARENT|capabilities")
    for caps in "CapPrm", "CapEff", "CapInh", "CapAmb":
        assert int(site.daemon.proc(caps), 16) == 0, caps


def test_capabilities_that_cannot_be_given_up_are_a_warning(open_site, faulty_build):
    """A filter of system calls may refuse capset().  The daemon still starts."""
    site = open_site
    binary = site.path("faulty")
    shutil.copy(faulty_build, binary)
    site.start(binary=binary, preexec=as_nobody, env={"FAULT": "syscall:1:1:1"})
    assert site.daemon.log("^cannot drop capabilities: Operation not")
    site.session().quit()
