"""TransparentProxy with the packet filter rules of docs/examples.

There are three network namespaces.  Only our descriptors hold them, so that they
always end with this process:

    client  10.9.1.2  ---  10.9.1.1  gateway  10.9.2.1  ---  10.9.2.2  server
        fd09:1::2     ---  fd09:1::1          fd09:2::1 ---  fd09:2::2
"""

import ctypes
import os
import re
import subprocess

import pytest

import harness
import real

pytestmark = pytest.mark.skipif(
    "TEST_QEMU" in os.environ,
    reason="qemu has no SO_ORIGINAL_DST, and IP_TRANSPARENT for IPv6 only")

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNET = 0x40000000
PORT = 10025            # free, since the namespace is new
SERVER = {4: "10.9.2.2", 6: "fd09:2::2"}
CLIENT = {4: "10.9.1.2", 6: "fd09:1::2"}
GATEWAY = {4: "10.9.1.1", 6: "fd09:1::1"}
TO_SERVER = {4: "10.9.2.1", 6: "fd09:2::1"}


def call(name, *args):
    if getattr(LIBC, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), name)


def here():
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Namespace:
    """A network namespace.  Sockets and processes that are made `with' it belong to
    it."""

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
        assert "syntax error" not in str(error)
        pytest.skip("rules refused: %s" % error)


def example(name):
    return real.example("transparent/" + name, {"lan0": "to1"})


def routes(net, what):
    net.gateway.run("sh", "-s", what, stdin=example("tproxy-routes"))


def redirect(net):
    rules(net, example("redirect.nft"))


def tproxy(net):
    rules(net, example("tproxy.nft"))
    routes(net, "add")


def start(site, net, listeners=2, **settings):
    with net.gateway:
        real.start_example(site, "transparent", {}, listeners, **settings)


def listen(site, net, family, port=25):
    with net.server:
        site.hop = site.new_hop(host=SERVER[family], port=port)


def at(host, port=25):
    return "[%s]:%d" % (host, port) if ":" in host else "%s:%d" % (host, port)


def client(site, net, address):
    with net.client:
        return site.client(address=address)


BODY = b"Subject: hello\r\n\r\nworld\r\n"


def passes(site, net, family, clamd, **kw):
    """Mail to the server goes through us, and a virus does not.  While clamd is
    down, no mail does."""
    listen(site, net, family)
    start(site, net, ClamAddress=clamd.path, **kw)
    c = client(site, net, at(SERVER[family]))
    c.hello()
    c.mail(body=BODY)
    c.mail(body=real.titled(b"sick", real.EICAR), want="550 5.7.1 Virus Detected; "
           "Content Rejected (%s)" % real.EICAR_NAME)
    clamd.kill()
    c.mail(body=BODY, want="451 4.3.0 Local Error (clamd: ")
    clamd.start()
    c.mail(body=BODY)
    assert site.hop.session.sock.getpeername()[0] == TO_SERVER[family]
    c.quit()
    assert len(site.hop.messages) == 2
    for message in site.hop.messages:
        assert harness.HEADER in message.body
    site.daemon.wait_log(r"^\w+: accepted connection from: %s$"
                         % CLIENT[family].replace(".", r"\."))
    assert len(site.hop.sessions) == 1


@pytest.mark.covers("clamsmtpd.8 TRANSPARENT PROXY FEATURE: original destination",
    "clamsmtpd.conf.5 TransparentProxy")
@pytest.mark.parametrize("family", [4, 6])
def test_redirect_leads_to_the_original_destination(open_site, net, family, real_clamd):
    """SO_ORIGINAL_DST has the address to which the client connected."""
    redirect(net)
    passes(open_site, net, family, real_clamd, OutAddress="127.0.0.1:1")


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: next hop")
@pytest.mark.parametrize("family", [4, 6])
def test_redirect_with_a_proxy_header_leads_to_the_original_destination(
        open_site, net, family):
    """The next hop is not at the destination that the header names."""
    redirect(net)
    listen(open_site, net, family)
    start(open_site, net, ProxyFrom=CLIENT[family])
    c = client(open_site, net, at(SERVER[family]))
    c.send(b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 25\r\n")
    c.hello()
    c.mail(body=BODY)
    c.quit()
    assert len(open_site.hop.messages) == 1
    open_site.daemon.wait_log(r"accepted connection from: 192\.0\.2\.7$")


@pytest.mark.covers("clamsmtpd.8 TRANSPARENT PROXY FEATURE: original destination",
    "clamsmtpd.8 TRANSPARENT PROXY FEATURE: TPROXY")
@pytest.mark.parametrize("family", [4, 6])
def test_tproxy_leads_to_the_original_destination(open_site, net, family, real_clamd):
    """The local address of the connection is the address to which the client
    connected.  The listener gets such connections without being root, too."""
    tproxy(net)
    passes(open_site, net, family, real_clamd)


@pytest.mark.covers("clamsmtpd.8 TRANSPARENT PROXY FEATURE: TPROXY")
@pytest.mark.parametrize("family", [4, 6])
def test_tproxy_with_the_capabilities_of_the_drop_in_passes(open_site, net, family, real_clamd):
    """The capabilities of tproxy.conf are enough for a daemon that is started as
    its user."""
    with open(os.path.join(real.EXAMPLES, "transparent/tproxy.conf")) as file:
        text = file.read()
    caps, = set(re.findall(r"(?m)^\w+(?:Set|Capabilities)=CAP_(\w+)$", text))
    assert "\nPrivateUsers=no\n" in text
    program = open_site.path("program")
    with open(program, "w") as file:
        file.write("#!/bin/sh\nexec setpriv --reuid nobody --regid nogroup --clear-groups "
                   "--no-new-privs --bounding-set=-all,+{0} --inh-caps=-all,+{0} "
                   "--ambient-caps=-all,+{0} {1} \"$@\"\n".format(caps.lower(), harness.CLAMSMTPD))
    os.chmod(program, 0o755)
    tproxy(net)
    passes(open_site, net, family, real_clamd, binary=program)
    assert not open_site.daemon.log("IP_TRANSPARENT")


@pytest.mark.parametrize("rules", [redirect, tproxy])
@pytest.mark.parametrize("family", [4, 6])
def test_transparent_without_the_daemon_nothing_passes(open_site, net, family, rules):
    rules(net)
    listen(open_site, net, family)
    with pytest.raises(ConnectionRefusedError):
        client(open_site, net, at(SERVER[family]))


@pytest.mark.parametrize("family", [4, 6])
def test_transparent_turned_off_leads_to_the_server(open_site, net, family):
    """After the steps of the page the client is connected to the server itself."""
    tproxy(net)
    routes(net, "del")
    net.gateway.run("nft", "delete", "table", "inet", "clamsmtpd")
    listen(open_site, net, family)
    client(open_site, net, at(SERVER[family])).expect("220 next.hop ")


def test_redirect_of_ipv4_to_a_listener_of_both_kinds(open_site, net):
    """The client's address and ours are IPv4 addresses mapped to IPv6."""
    redirect(net)
    listen(open_site, net, 4)
    start(open_site, net, 1, Listen="[::]:%d" % PORT)
    c = client(open_site, net, at(SERVER[4]))
    c.hello()
    c.mail(body=BODY)
    c.quit()
    assert len(open_site.hop.messages) == 1
    open_site.daemon.wait_log(r"accepted connection from: %s$" % CLIENT[4])


@pytest.mark.parametrize("family", [4, 6])
def test_redirect_of_two_servers_keeps_them_apart(open_site, net, family):
    """Each session goes to its own destination."""
    site = open_site
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


@pytest.mark.parametrize("family", [4, 6])
def test_transparent_destination_down_gives_421(open_site, net, family):
    redirect(net)
    start(open_site, net)
    c = client(open_site, net, at(SERVER[family]))
    c.expect("421 4.4.1")
    c.eof()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENT PROXY FEATURE: mail loop")
@pytest.mark.parametrize("family", [4, 6])
def test_transparent_loop_is_refused(open_site, net, family):
    """If the rules redirect our own connections to us, the session is refused and
    does not loop."""
    redirect(net)
    rules(net, """
        table inet more {
            chain own {
                type nat hook output priority -100
                tcp dport 25 redirect to :%d
            }
        }""" % PORT)
    listen(open_site, net, family)
    start(open_site, net)
    for turn in range(1, 4):
        c = client(open_site, net, at(SERVER[family]))
        c.expect("421 ")
        c.eof()
        open_site.daemon.wait_log("(?i)loop", turn)
    assert open_site.hop.sessions == []
    assert len(open_site.daemon.log("accepted connection from: ")) <= 6


@pytest.mark.covers("clamsmtpd.8 TRANSPARENT PROXY FEATURE: mail loop")
@pytest.mark.parametrize("family", [4, 6])
def test_transparent_direct_connection_is_a_loop(open_site, net, family):
    """For a client that was not redirected, the destination is ourselves."""
    redirect(net)
    start(open_site, net)
    c = client(open_site, net, at(GATEWAY[family], PORT))
    c.expect("421 ")
    c.eof()
    open_site.daemon.wait_log("(?i)loop")
    assert len(open_site.daemon.log("accepted connection from: ")) <= 2
