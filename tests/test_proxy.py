"""ProxyFrom, with PROXY headers of the test and of a real haproxy, and the recipe of
docs/haproxy.md."""

import collections
import os
import re
import signal
import socket
import struct
import subprocess
import threading

import pytest

import real
from harness import (BAD, Client, Failed, Hold, NextHop, RESET, TOP, XCLIENT, connect,
                     environment, has_ipv6, never, own_host, until)

V4, V6, PORT = "192.0.2.7", "2001:db8::7", 4711
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v1(client=V4, port=PORT):
    v6 = ":" in client
    return ("PROXY TCP%d %s %s %d 25\r\n" % (
        6 if v6 else 4, client, "2001:db8::1" if v6 else "198.51.100.1", port)).encode()


def v2_block(kind, block, length=None):
    """kind: version and command, family and protocol."""
    return SIGNATURE + bytes(kind) + struct.pack(
        "!H", len(block) if length is None else length) + block


def v2(client=V4, tlvs=b""):
    family = socket.AF_INET6 if ":" in client else socket.AF_INET
    address = socket.inet_pton(family, client)
    return v2_block((0x21, 0x21 if ":" in client else 0x11),
                    2 * address + struct.pack("!HH", PORT, 25) + tlvs)


V4_BLOCK = v2(V4)[16:]
TLVS = (b"\x05\0\x04\xff\0\r\n" + b"\x03\0\x04\x12\x34\x56\x78" + b"\x04\0\0" +
        b"\x20\0\x05\x01\0\0\0\0")


def proxied(site, header, **kw):
    """A session that began with this header."""
    client = site.client(**kw)
    client.send(header)
    client.hello()
    return client


def accepted(site):
    return [line.split("from: ")[1] for line in
            site.daemon.log("accepted connection from: ")]


# ---------------------------------------------------------------- the header

FS = ":".join(["ffff"] * 8)
NAMED = {
    "v1 IPv4": (v1(V4), V4),
    "v1 IPv6": (v1(V6), V6),
    "v1 mapped": (v1("::ffff:" + V4), V4),
    "v1 long": (("PROXY TCP6 %s %s 65535 65535\r\n" % (FS, FS)).encode(), FS),
    "v2 IPv4": (v2(V4), V4),
    "v2 IPv6": (v2(V6), V6),
    "v2 mapped": (v2("::ffff:" + V4), V4),
    "v2 with TLVs": (v2(V4, TLVS), V4),
    "v2 IPv6 with TLVs": (v2(V6, TLVS), V6),
    "v2 of 2 KB": (v2(V4, b"\x04\x07\xf1" + bytes(0x7f1)), V4),
}


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom")
@pytest.mark.core
@pytest.mark.parametrize("header, name", NAMED.values(), ids=list(NAMED))
def test_proxy_header_names_the_client(site, header, name):
    site.start(ProxyFrom="127.0.0.1")
    client = proxied(site, header)
    client.mail()
    client.quit()
    assert accepted(site) == [name]


@pytest.mark.core
@pytest.mark.parametrize("header", [v1(), v2(V4, TLVS)], ids=["v1", "v2"])
def test_proxy_header_in_single_bytes_or_with_commands_is_read(site, header):
    site.start(ProxyFrom="127.0.0.1")
    client = site.client()
    client.drip(header)
    client.hello()
    client.quit()
    client = site.client()
    client.send(header + b"EHLO x\r\nNOOP\r\nQUIT\r\n")
    for want in ("220", "250", "250", "221"):
        client.expect(want)
    client.eof()
    assert accepted(site) == [V4, V4]


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: original client")
@pytest.mark.parametrize("name, said", [(V4, V4), (V6, "IPV6:" + V6)])
def test_proxy_client_is_named_in_log_header_and_xclient(site, name, said):
    site.hop.ehlo = [XCLIENT]
    env = environment(site, ProxyFrom="127.0.0.1", XClient="on",
                      Header="X-From: %i to %l")
    client = proxied(site, v2(name))
    client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    assert site.hop.received("XCLIENT") == [
        "XCLIENT NAME=[UNAVAILABLE] ADDR=%s PORT=%d" % (said, PORT)]
    assert b"\r\nX-From: %s to 127.0.0.1\r\n" % name.encode() in \
        site.hop.messages[0].body
    assert env()["CLIENT"] == name
    client.quit()


NOBODY = {
    "v1 UNKNOWN": b"PROXY UNKNOWN\r\n",
    "v1 UNKNOWN with addresses": b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n",
    "v2 LOCAL": v2_block((0x20, 0), b""),
    "v2 LOCAL with an address": v2_block((0x20, 0x11), V4_BLOCK),
    "v2 of no family": v2_block((0x21, 0), b""),
    "v2 of no family, with something": v2_block((0x21, 0), b"x" * 100),
    "v2 UDP": v2_block((0x21, 0x12), V4_BLOCK),
    "v2 unix": v2_block((0x21, 0x31), b"/run/x".ljust(108, b"\0") * 2),
}


@pytest.mark.parametrize("header", NOBODY.values(), ids=list(NOBODY))
def test_proxy_header_without_a_client_leaves_the_peer(site, header):
    """A proxy's own health check has such a header.  The client is then the
    peer."""
    site.hop.ehlo = [XCLIENT]
    site.start(ProxyFrom="127.0.0.9", XClient="on")
    client = proxied(site, header, source="127.0.0.9")
    client.mail()
    assert accepted(site) == ["127.0.0.9"]
    assert site.hop.received("XCLIENT") == ["XCLIENT NAME=[UNAVAILABLE] ADDR=127.0.0.9 PORT=%d"
                              % client.sock.getsockname()[1]]
    client.quit()


WRONG = {
    "no header": b"EHLO x\r\n",
    "nothing": b"",
    "an empty line": b"\r\n",
    "half a v1": v1()[:-1],
    "half a v2": v2()[:-1],
    "half a signature": SIGNATURE[:-1],
    "v1 in small letters": v1().lower(),
    "v1 without a family": b"PROXY\r\n",
    "v1 of another family": v1().replace(b"TCP4", b"TCP5"),
    "v1 of UDP": v1().replace(b"TCP4", b"UDP4"),
    "v1 family and address": v1().replace(b"TCP4", b"TCP6"),
    "v1 address and family": v1(V6).replace(b"TCP6", b"TCP4"),
    "v1 with a name": v1().replace(V4.encode(), b"mail.example.com"),
    "v1 without an address": b"PROXY TCP4 \r\n",
    "v1 with one address": b"PROXY TCP4 192.0.2.7\r\n",
    "v1 without a port": b"PROXY TCP4 192.0.2.7 192.0.2.1\r\n",
    "v1 port too large": v1(port=65536),
    "v1 port negative": v1(port=-1),
    "v1 port of letters": v1().replace(b"4711", b"smtp"),
    "v1 with a LF alone": v1().replace(b"\r\n", b"\n"),
    "v1 two blanks": v1().replace(b"TCP4 ", b"TCP4  "),
    "v1 with a NUL": v1().replace(b" 198", b"\0198"),
    "v1 of 108 bytes": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    "v1 without an end": b"PROXY TCP4 " + b"1" * 20000,
    "v2 signature": v2().replace(b"QUIT", b"quit"),
    "v2 of version 1": v2_block((0x11, 0x11), V4_BLOCK),
    "v2 of version 3": v2_block((0x31, 0x11), V4_BLOCK),
    "v2 LOCAL of version 3": v2_block((0x30, 0), b""),
    "v2 of another command": v2_block((0x22, 0x11), V4_BLOCK),
    "v2 IPv4, too short": v2_block((0x21, 0x11), V4_BLOCK[:11]),
    "v2 IPv6, too short": v2_block((0x21, 0x21), bytes(35)),
    "v2 too long": v2_block((0x21, 0x11), V4_BLOCK + bytes(2037)),
    "v2 much too long": v2_block((0x21, 0x11), V4_BLOCK + bytes(20000), 65535),
}


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: 5 seconds")
@pytest.mark.parametrize("header", WRONG.values(), ids=list(WRONG))
def test_proxy_header_invalid_closes_the_connection(site, header):
    """The client gets no reply, and there is no connection to the next hop."""
    site.start(ProxyFrom="127.0.0.1")
    client = site.client()
    client.send(header)
    if header in (b"", b"\r\n", v1()[:-1], v2()[:-1], SIGNATURE[:-1]):
        client.half_close()             # otherwise the daemon would wait for more
    assert client.rest() == b""
    site.daemon.wait_log(r"^100000: 127\.0\.0\.1: no valid PROXY header")
    assert site.hop.accepted == 0 and accepted(site) == []


# ---------------------------------------------------------------- whom it believes

@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom")
@pytest.mark.core
@pytest.mark.parametrize("header, reply", [(v1(), "500"), (v2(), "500|501")],
                         ids=["v1", "v2"])
def test_proxy_header_of_a_stranger_is_an_unknown_command(site, header, reply):
    """The header gets the reply to an unknown command."""
    site.start(ProxyFrom="127.0.0.1", XClient="on")
    client = site.client(source="127.0.0.2")
    client.send(header)
    client.expect("220")
    assert re.match(reply, client.reply().code)
    assert accepted(site) == ["127.0.0.2"]


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: networks",
    "clamsmtpd.conf.5 ProxyFrom: 32 networks")
@pytest.mark.parametrize("networks, source, believed", [
    ("127.0.0.1", "127.0.0.1", True), ("127.0.0.1", "127.0.0.2", False),
    ("127.0.0.0/30", "127.0.0.3", True), ("127.0.0.0/30", "127.0.0.4", False),
    ("127.0.0.77/26", "127.0.0.64", True), ("127.0.0.77/26", "127.0.0.128", False),
    ("0.0.0.0/0", "127.0.0.1", True), ("::/0", "127.0.0.1", False),
    ("unix", "127.0.0.1", False), ("10.0.0.0/8 \t127.0.0.9", "127.0.0.9", True),
    (["10.0.0.0/8", "127.0.0.9"], "127.0.0.9", True),
    (["127.0.0.9", "10.0.0.0/8 fd00::/8"], "127.0.0.9", True),
    (None, "127.0.0.1", False),
])
def test_proxyfrom_networks_match_their_addresses(site, networks, source, believed):
    site.start(ProxyFrom=networks)
    client = site.client(source=source)
    client.send(v1())
    client.expect("220")
    assert accepted(site) == [V4 if believed else source]


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: networks")
@pytest.mark.parametrize("listen, networks, source", [
    ("[::1]:0", "::1", "::1"), ("[::1]:0", "::/1", "::1"),
    ("[::]:0", "127.0.0.0/8", "127.0.0.1")])
def test_proxyfrom_networks_of_an_ipv6_listener_match(site, listen, networks, source):
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    site.start(Listen=listen, ProxyFrom=networks)
    host = "[::1]" if source == "::1" else "127.0.0.1"
    port = site.daemon.address.rpartition(":")[2]
    client = proxied(site, v2(V6), address="%s:%s" % (host, port))
    assert accepted(site) == [V6]
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: unix")
@pytest.mark.parametrize("networks, name", [("unix", V4), ("127.0.0.0/8 ::/0", "local")])
def test_proxyfrom_unix_matches_unix_listeners(site, networks, name):
    site.start(Listen=site.path("in.sock"), ProxyFrom=networks)
    client = site.client()
    client.send(v1())
    client.expect("220")
    assert accepted(site) == [name]


def test_proxyfrom_of_the_environment_replaces_the_files(site):
    site.start(ProxyFrom="127.0.0.1",
               env={"CLAMSMTPD_PROXYFROM": "10.0.0.0/8\n127.0.0.9"})
    for source in ("127.0.0.9", "127.0.0.1"):
        client = site.client(source=source)
        client.send(v1())
        client.expect("220")
    assert accepted(site) == [V4, "127.0.0.1"]


def test_proxyfrom_changed_by_sighup_counts(site):
    listen = site.path("in.sock")
    site.start(Listen=listen, ProxyFrom="unix")
    early = site.client()
    site.reload(Listen=listen)
    site.session().mail()
    early.send(v1())                    # it began under the old settings
    early.hello()
    assert accepted(site) == ["local", V4]


# ---------------------------------------------------------------- what it is not for

@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: next hop")
def test_outaddress_port_alone_with_a_proxy_leads_to_the_proxy(site):
    """The next hop is not on the address that the header names."""
    there = NextHop(host="127.0.0.77", port=site.hop.port)
    site.servers.append(there)
    site.start(OutAddress=str(site.hop.port), ProxyFrom="127.0.0.1")
    client = proxied(site, v1("127.0.0.77"))
    client.mail()
    client.quit()
    assert (len(site.hop.messages), there.accepted) == (1, 0)


def test_proxy_header_cannot_make_a_loop(site):
    site.start(ProxyFrom="127.0.0.9")
    first = site.session()
    ours = site.hop.session.sock.getpeername()
    client = proxied(site, v1(*ours), source="127.0.0.9")
    client.mail()
    first.mail()
    assert not site.daemon.log("loop")


def test_proxy_header_cannot_hide_a_loop(site):
    port = site.port()
    site.start(Listen="127.0.0.1:%d" % port, OutAddress="127.0.0.1:%d" % port,
               ProxyFrom="127.0.0.9")
    client = site.client(source="127.0.0.9")
    client.send(v1())
    client.expect("421")
    site.daemon.wait_log(r"^100001: .*\bloop\b")
    assert accepted(site) == [V4, "127.0.0.1"]


# ---------------------------------------------------------------- time

@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: 5 seconds")
def test_proxy_header_missing_for_five_seconds_closes_the_connection(site, clock):
    site.start(ProxyFrom="127.0.0.1", **clock.settings())
    silent, slow, late = site.client(), site.client(), site.client()
    slow.send(v1()[:9])
    proxied(site, v1())                 # all that was sent has been read
    clock.go(site.daemon, 4)
    slow.send(v1()[9:20])
    late.send(v1())
    late.hello()
    clock.go(site.daemon, 1)
    assert silent.rest() == slow.rest() == b""
    late.mail()
    assert site.hop.accepted == 2


def test_proxy_connections_without_a_header_delay_nobody(site):
    site.start(ProxyFrom="127.0.0.1")
    waiting = [site.client() for _ in range(20)]
    proxied(site, v1()).mail()
    site.session(source="127.0.0.2").mail()
    site.daemon.send_signal(signal.SIGTERM)
    for client in waiting:
        client.rest()
        client.close()
    for client in site.clients:
        client.close()
    site.daemon.stop()


# ---------------------------------------------------------------- a real haproxy

needs_haproxy = pytest.mark.skipif(not real.find("haproxy"), reason="no haproxy here")


class Haproxy:
    """A haproxy with its frontend at this address.  It runs until close()."""

    def __init__(self, site, address, config):
        self.address = address
        self.socket = site.path("admin.sock")
        file = site.path("haproxy.cfg")
        with open(file, "w") as text:
            text.write(config.replace("/run/haproxy/admin.sock", self.socket))
        self.log = site.path("haproxy.log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [real.find("haproxy"), "-db", "-f", file], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=real.die_with_us)
        until(self.listens, "haproxy listens")

    def listens(self):
        if self.process.poll() is not None:
            with open(self.log) as log:
                raise Failed("haproxy ended: " + log.read())
        try:
            for address in self.address, self.socket:
                connect(address).close()
            return True
        except OSError:
            return False

    def command(self, text):
        with connect(self.socket) as sock:
            sock.sendall(text.encode() + b"\n")
            return sock.makefile().read()

    def states(self):
        """{server: state} of the backends."""
        rows = [row.split(",") for row in self.command("show stat").splitlines()]
        state = rows[0].index("status")
        return {row[1]: row[state] for row in rows[1:] if len(row) > state and
                row[1] not in ("FRONTEND", "BACKEND")}

    def wait_states(self, *want):
        until(lambda: list(self.states().values()) == list(want),
              "haproxy finds %s" % (want,))

    def close(self):
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def haproxy(site):
    made = []

    def haproxy(*args):
        made.append(Haproxy(site, *args))
        return made[-1]
    yield haproxy
    for one in made:
        one.close()


ONE = """
global
    stats socket /run/haproxy/admin.sock level admin
defaults
    mode tcp
    timeout connect 60s
    timeout client 60s
    timeout server 60s
    timeout check 60s
frontend in
    bind %s
    default_backend out
backend out
    option smtpchk EHLO check.example
    server one %s %s
"""


@needs_haproxy
@pytest.mark.parametrize("source", ["127.0.0.42", "::1"])
@pytest.mark.parametrize("options", [
    "send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,cert-cn"])
def test_haproxy_names_the_client(site, haproxy, options, source):
    if ":" in source and not has_ipv6():
        pytest.skip("no IPv6 here")
    site.hop.ehlo = [XCLIENT]
    site.start(ProxyFrom="127.0.0.1", XClient="on")
    host = "[::1]" if ":" in source else "127.0.0.1"
    address = "%s:%d" % (host, site.port(host.strip("[]")))
    proxy = haproxy(address, ONE % (address, site.daemon.address, options))
    client = site.session(address=proxy.address, source=source)
    client.mail()
    port = client.sock.getsockname()[1]
    assert source in accepted(site)     # the fixture looked at the port, too
    assert site.hop.received("XCLIENT")[-1] == "XCLIENT NAME=[UNAVAILABLE] ADDR=%s%s PORT=%d" % (
        "IPV6:" if ":" in source else "", source, port)
    client.quit()


@needs_haproxy
@pytest.mark.parametrize("options", ["send-proxy", "send-proxy-v2"])
def test_haproxy_checks_health(site, haproxy, options):
    """haproxy sends EHLO.  Its own connections have its own address."""
    site.start(ProxyFrom="127.0.0.1")
    address = "127.0.0.1:%d" % site.port()
    proxy = haproxy(address, ONE % (address, site.daemon.address,
                                    options + " check check-send-proxy inter 100ms"))
    until(lambda: len(site.hop.sessions) >= 3, "some checks")
    proxy.wait_states("UP")
    assert set(accepted(site)) == {"127.0.0.1"}
    assert not site.daemon.log("no valid PROXY header")
    site.hop.down()
    proxy.wait_states("DOWN")


@needs_haproxy
def test_haproxy_over_a_unix_socket_names_the_client(site, haproxy):
    site.start(Listen=site.path("in.sock"), ProxyFrom="unix")
    address = "127.0.0.1:%d" % site.port()
    proxy = haproxy(address, ONE % (address, site.path("in.sock"), "send-proxy-v2"))
    client = site.session(address=proxy.address, source="127.0.0.42")
    client.mail()
    client.quit()
    assert "127.0.0.42" in accepted(site)


# ---------------------------------------------------------------- the recipe

def page_settings():
    """The settings of clamsmtpd.conf in docs/haproxy.md: {name: [values]}."""
    with open(os.path.join(TOP, "docs", "haproxy.md")) as page:
        lines = re.findall(r"^    (\w+): (.*)$", page.read(), re.M)
    settings = collections.defaultdict(list)
    for name, value in lines:
        settings[name].append(value)
    return settings


class Recipe:
    """The files docs/haproxy.md and .cfg, with their addresses replaced by ones of
    this machine."""

    def __init__(self, site, haproxy):
        self.site = site
        site.hop.ehlo = [XCLIENT]
        self.clamds = [site.new_clamd(tcp=True) for _ in range(2)]
        self.address = "127.0.0.1:%d" % site.port()
        self.places = {
            r"\b10\.0\.0\.20:25$": site.hop.address,
            r"\b10\.0\.0\.31:3310$": self.clamds[0].address,
            r"\b10\.0\.0\.32:3310$": self.clamds[1].address,
            r"\b10\.0\.0\.1$": "127.0.0.1",
            r"\b10\.0\.0\.(1[123]):": own_host(r"\1:"),
            r"\b10025\b": str(site.port()),
            r"\b10080\b": str(site.port()),
            r"bind :25$": "bind " + self.address,
            r"log /dev/log mail$": "",
        }
        self.daemons = [self.start(i) for i in range(3)]
        with open(os.path.join(TOP, "docs", "haproxy.cfg")) as file:
            config = self.here(file.read())
        assert not re.search(r"\b10\.", config)
        self.haproxy = haproxy(self.address, config)
        self.haproxy.wait_states("UP", "UP", "UP")

    def here(self, text):
        for place, ours in self.places.items():
            text = re.sub(place, ours, text, flags=re.M)
        return text

    def start(self, number):
        settings = {name: [self.here(value.replace("10.0.0.11", "10.0.0.1%d" % (
            number + 1))) for value in values] for name, values in page_settings().items()}
        return self.site.start(**settings)


@pytest.fixture
def recipe(site, haproxy):
    return Recipe(site, haproxy)


class Sender(threading.Thread):
    """A mail client that repeats each message until it is accepted."""

    def __init__(self, address, name, count):
        super().__init__(daemon=True)
        self.address, self.name, self.count = address, name, count
        self.taken = []                 # numbers of messages, as their 250 came
        self.outcomes = []              # (message, code or "gone") of each attempt

    def run(self):
        for number in range(self.count):
            text = "%s.%d" % (self.name, number)
            while self.outcomes[-1:] != [(text, "250")]:
                self.outcomes.append((text, self.attempt(text)))
                if self.outcomes[-1][1][0] == "5":
                    return
            self.taken.append(text)

    def attempt(self, text):
        try:
            client = Client(self.address)
        except OSError:
            return "gone"
        try:
            code = client.reply().code
            for line in ("EHLO client.example", "MAIL FROM:<a@example.com>",
                         "RCPT TO:<b@example.com>", "DATA",
                         "Subject: %s\r\n\r\nhello\r\n." % text):
                if code[0] not in "23":
                    break
                client.line(line)
                code = client.reply().code
            return code
        except (Failed, OSError) as error:
            if "nothing came" in str(error):
                return "5 hangs"
            return "gone"
        finally:
            client.close()


@needs_haproxy
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_haproxy_recipe_one_of_three_ends_and_no_mail_is_lost(site, recipe, number):
    senders = [Sender(recipe.address, "sender%d" % i, 20) for i in range(6)]
    for sender in senders:
        sender.start()
    until(lambda: all(d.log("accepted connection") for d in recipe.daemons),
          "all three have work")
    first = recipe.daemons[0]
    first.send_signal(number)
    first.wait_exit()
    first.stopped = True
    until(lambda: not any(sender.is_alive() for sender in senders), "all is sent",
          limit=240)

    outcomes = [o for sender in senders for o in sender.outcomes]
    assert {o for _, o in outcomes if not re.match("250|4|gone", o)} == set()
    taken = [text for sender in senders for text in sender.taken]
    arrived = collections.Counter(
        re.match(rb"Subject: (\S+)", m.body)[1].decode() for m in site.hop.messages)
    assert len(taken) == 120 and set(taken) == set(arrived)
    twice = {text for text, n in arrived.items() if n > 1}
    assert twice <= {text for text, o in outcomes if o == "gone"}
    recipe.haproxy.wait_states("DOWN", "UP", "UP")

    again = recipe.start(0)
    recipe.haproxy.wait_states("UP", "UP", "UP")
    clients = [site.session(address=recipe.address) for _ in range(3)]
    assert again.log("accepted connection from: 127.0.0.1")
    for client in clients:
        client.mail()


@needs_haproxy
def test_haproxy_recipe_names_the_client_to_the_next_hop(site, recipe):
    client = site.session(address=recipe.address, source="127.0.0.42")
    client.mail()
    sent, = site.hop.received("XCLIENT")
    assert " ADDR=127.0.0.42 " in sent


@needs_haproxy
def test_haproxy_recipe_clamds_replace_each_other(site, recipe):
    """The first clamd gets as many scans as three clamsmtpd have slots for it.
    When it ends, the second one gets all scans."""
    slots = 3 * int(page_settings()["MaxScans"][0])
    one, other = recipe.clamds
    one.verdict = hold = Hold(RESET)
    clients = [site.session(address=recipe.address) for _ in range(slots + 1)]
    for client in clients:
        client.begin(b"Subject: x\r\n\r\nhello\r\n.\r\n")
    other.wait_scans(1)
    one.wait_scans(slots)
    never(lambda: len(one.scans) > slots, "more scans than slots")
    one.down()
    hold.go()
    for client in clients:
        client.expect("250 2.0.0 queued")
    assert len(other.scans) == slots + 1
    assert len(site.hop.messages) == slots + 1


@needs_haproxy
def test_haproxy_recipe_without_any_clamd_is_not_ready(site, recipe):
    for clamd in recipe.clamds:
        clamd.down()
    recipe.haproxy.wait_states("DOWN", "DOWN", "DOWN")
    for clamd in recipe.clamds:
        clamd.up()
    recipe.haproxy.wait_states("UP", "UP", "UP")
    client = site.session(address=recipe.address)
    client.mail()
