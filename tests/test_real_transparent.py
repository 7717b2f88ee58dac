"""TransparentProxy behind real nftables rules, and the loopback feature.

Three network namespaces, held by nothing but our descriptors, so that they
are gone when we are, however we end:

    client  10.9.1.2  ---  10.9.1.1  gateway  10.9.2.1  ---  10.9.2.2  server
        fd09:1::2     ---  fd09:1::1          fd09:2::1 ---  fd09:2::2
"""

import ctypes
import os
import subprocess

import pytest

import harness
import real

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNET = 0x40000000
PORT = 10025            # in a namespace of its own it is free
SERVER = {4: "10.9.2.2", 6: "fd09:2::2"}
CLIENT = {4: "10.9.1.2", 6: "fd09:1::2"}
GATEWAY = {4: "10.9.1.1", 6: "fd09:1::1"}
BEHIND = {4: "10.9.2.1", 6: "fd09:2::1"}
ANY = ["0.0.0.0:%d" % PORT, "[::]:%d" % PORT]


def call(name, *args):
    if getattr(LIBC, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), name)


def here():
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Namespace:
    """with namespace: sockets and processes made now belong there."""

    def __init__(self):
        before = here()
        try:
            call("unshare", NEWNET)
            self.fd = here()
            call("setns", before, NEWNET)
        finally:
            os.close(before)
        self.before = []
        self.run("ip", "link", "set", "lo", "up")

    def __enter__(self):
        self.before.append(here())
        call("setns", self.fd, NEWNET)

    def __exit__(self, *_):
        before = self.before.pop()
        call("setns", before, NEWNET)
        os.close(before)

    def run(self, *command, stdin=None):
        with self:
            done = subprocess.run(command, input=stdin, text=True,
                                  capture_output=True)
        if done.returncode:
            raise OSError("%s: %s" % (" ".join(command), done.stderr.strip()))

    def ip(self, line):
        self.run("ip", *line.split())

    def sysctl(self, path, value):
        self.run("sh", "-c", "echo %s >/proc/sys/%s" % (value, path))


class Net:
    def __init__(self):
        self.client, self.gateway, self.server = [Namespace() for _ in range(3)]
        for number, end in (1, self.client), (2, self.server):
            self.gateway.ip("link add to%d type veth peer name gw" % number)
            self.gateway.ip("link set gw netns /proc/%d/fd/%d"
                            % (os.getpid(), end.fd))
            self.gateway.ip("addr add 10.9.%d.1/24 dev to%d" % (number, number))
            self.gateway.ip("addr add fd09:%d::1/64 dev to%d nodad"
                            % (number, number))
            self.gateway.ip("link set to%d up" % number)
            end.ip("addr add 10.9.%d.2/24 dev gw" % number)
            end.ip("addr add fd09:%d::2/64 dev gw nodad" % number)
            end.ip("link set gw up")
            end.ip("route add default via 10.9.%d.1" % number)
            end.ip("-6 route add default via fd09:%d::1" % number)
        self.gateway.sysctl("net/ipv4/ip_forward", 1)
        self.gateway.sysctl("net/ipv6/conf/all/forwarding", 1)

    def close(self):
        for space in self.client, self.gateway, self.server:
            os.close(space.fd)


@pytest.fixture
def net():
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        net = Net()
    except OSError as error:
        pytest.skip("no network namespaces to be had: %s" % error)
    yield net
    net.close()


def rules(net, text):
    try:
        net.gateway.run("nft", "-f", "-", stdin=text)
    except OSError as error:
        pytest.skip("rules refused: %s" % error)


def redirect(net, hook="prerouting", more='iifname "to1"'):
    rules(net, """
        table inet mail {
            chain nat {
                type nat hook %s priority -100
                %s tcp dport 25 redirect to :%d
            }
        }""" % (hook, more, PORT))


def tproxy(net):
    rules(net, """
        table inet mail {
            chain divert {
                type filter hook prerouting priority -150
                iifname "to1" meta nfproto ipv4 tcp dport 25 tproxy ip to :%d meta mark set 1 accept
                iifname "to1" meta nfproto ipv6 tcp dport 25 tproxy ip6 to :%d meta mark set 1 accept
            }
        }""" % (PORT, PORT))
    for family, everything in ("-4", "0.0.0.0/0"), ("-6", "::/0"):
        net.gateway.ip("%s rule add fwmark 1 lookup 100" % family)
        net.gateway.ip("%s route add local %s dev lo table 100"
                       % (family, everything))


def start(site, net, **settings):
    with net.gateway:
        site.start(TransparentProxy="on", OutAddress=None,
                   **dict(dict(Listen=ANY), **settings))


def listen(site, net, family, port=25):
    with net.server:
        site.hop = site.new_hop(host=SERVER[family], port=port)


def at(host, port=25):
    return "[%s]:%d" % (host, port) if ":" in host else "%s:%d" % (host, port)


def client(site, net, address):
    with net.client:
        return site.client(address=address)


BODY = b"Subject: hello\r\n\r\nworld\r\n"


def passes(site, net, family):
    """A mail to the server goes through us, a virus does not."""
    c = client(site, net, at(SERVER[family]))
    c.hello()
    c.mail(body=BODY)
    c.mail(body=b"Subject: sick\r\n\r\n" + harness.EICAR + b"\r\n",
           want="550 5.7.1 Virus Detected; Content Rejected")
    c.quit()
    message, = site.hop.messages
    assert harness.HEADER in message.body
    site.daemon.wait_log(r"^\w+: accepted connection from: %s$"
                         % CLIENT[family].replace(".", r"\."))
    assert len(site.hop.sessions) == 1


@pytest.mark.parametrize("family", [4, 6])
def test_redirect(site, net, family):
    """SO_ORIGINAL_DST tells where the client wanted to go."""
    redirect(net)
    listen(site, net, family)
    start(site, net, Action="bounce")
    passes(site, net, family)


def test_redirect_of_ipv4_to_a_listener_of_both_kinds(site, net):
    """There the client's address, and ours, are IPv4 in IPv6 clothes."""
    redirect(net)
    listen(site, net, 4)
    start(site, net, Action="bounce", Listen=["[::]:%d" % PORT])
    passes(site, net, 4)


@pytest.mark.parametrize("family", [4, 6])
def test_redirect_two_servers(site, net, family):
    """Each session goes to its own destination."""
    redirect(net)
    other = {4: "10.9.2.3", 6: "fd09:2::3"}[family]
    net.server.ip("addr add %s/%d dev gw%s" % (
        other, *((24, "") if family == 4 else (64, " nodad"))))
    listen(site, net, family)
    with net.server:
        second = site.new_hop(host=other, port=25)
    start(site, net)
    clients = [client(site, net, at(host)) for host in (SERVER[family], other)]
    for number, c in enumerate(clients):
        c.hello()
        c.mail("%d@example.com" % number, body=BODY)
    for c in clients:
        c.quit()
    assert [m.mail for m in site.hop.messages] == ["MAIL FROM:<0@example.com>"]
    assert [m.mail for m in second.messages] == ["MAIL FROM:<1@example.com>"]


@pytest.mark.parametrize("user", [None, "nobody"])
@pytest.mark.parametrize("family", [4, 6])
def test_tproxy(site, net, family, user):
    """The local address of the connection is where the client wanted to go;
    the listener can take such connections without being root, too."""
    tproxy(net)
    listen(site, net, family)
    if user:
        if not real.user(user):
            pytest.skip("no user nobody")
        # its TempDirectory must be reachable for it
        spool = real.public_directory("spool")
        os.chown(spool, real.user(user).pw_uid, real.user(user).pw_gid)
        sock = os.path.join(spool, "clamd")
        site.clamd = site.new_clamd(path=sock)
        try:
            start(site, net, Action="bounce", User=user, TempDirectory=spool)
            site.daemon.allowed.add("clamd")
            passes(site, net, family)
            site.daemon.stop()
        finally:
            site.clamd.down()
            os.rmdir(spool)
    else:
        start(site, net, Action="bounce")
        passes(site, net, family)


@pytest.mark.parametrize("family", [4, 6])
def test_nobody_there(site, net, family):
    redirect(net)
    start(site, net)
    c = client(site, net, at(SERVER[family]))
    c.expect("421 4.4.1")
    c.eof()


@pytest.mark.parametrize("family", [4, 6])
def test_loop(site, net, family):
    """Rules that lead our own connections back to us: refused, not repeated."""
    rules(net, """
        table inet mail {
            chain nat {
                type nat hook prerouting priority -100
                iifname "to1" tcp dport 25 redirect to :%d
            }
            chain own {
                type nat hook output priority -100
                tcp dport 25 redirect to :%d
            }
        }""" % (PORT, PORT))
    listen(site, net, family)
    start(site, net)
    for turn in range(1, 4):
        c = client(site, net, at(SERVER[family]))
        c.expect("421 ")
        c.eof()
        site.daemon.wait_log("(?i)loop", turn)
    assert site.hop.sessions == []
    assert len(site.daemon.log("accepted connection from: ")) <= 6


@pytest.mark.parametrize("family", [4, 6])
def test_loop_to_the_listener(site, net, family):
    """A client that was not redirected leads to ourselves as well."""
    redirect(net)
    start(site, net)
    c = client(site, net, at(GATEWAY[family], PORT))
    c.expect("421 ")
    c.eof()
    site.daemon.wait_log("(?i)loop")
    assert len(site.daemon.log("accepted connection from: ")) <= 2


# ---------------------------------------------------------------- loopback

def test_back_to_the_client(site):
    """A port alone as OutAddress: back to the address the client came from."""
    first = site.new_hop(host="127.0.0.2")
    second = site.new_hop(host="127.0.0.3", port=first.port)
    site.start(OutAddress=str(first.port))
    for hop, address in (first, "127.0.0.2"), (second, "127.0.0.3"):
        c = site.session(source=address)
        c.mail("from@%s.example" % address, body=BODY)
        c.quit()
        message, = hop.messages
        assert message.mail == "MAIL FROM:<from@%s.example>" % address
        site.daemon.wait_log("accepted connection from: %s$" % address)


def test_back_to_the_client_ipv6(site):
    if not harness.has_ipv6():
        pytest.skip("no IPv6 here")
    hop = site.new_hop(host="::1")
    site.start(Listen="[::1]:0", OutAddress=str(hop.port))
    c = site.session()
    c.mail(body=BODY)
    c.quit()
    assert len(hop.messages) == 1
    site.daemon.wait_log("accepted connection from: ::1$")


def test_back_to_a_mapped_client(site):
    """An IPv4 client of an IPv6 listener is an IPv4 client."""
    if not harness.has_ipv6():
        pytest.skip("no IPv6 here")
    hop = site.new_hop(host="127.0.0.2")
    site.start(Listen="[::]:0", OutAddress=str(hop.port))
    port = site.daemon.address.rpartition(":")[2]
    c = site.session(address="127.0.0.1:" + port, source="127.0.0.2")
    c.mail(body=BODY)
    c.quit()
    assert len(hop.messages) == 1
    site.daemon.wait_log("accepted connection from: 127.0.0.2$")


def test_back_to_nobody(site):
    site.start(OutAddress=str(harness.free_port()))
    c = site.client()
    c.expect("421 4.4.1")
    c.eof()
