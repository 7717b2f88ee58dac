"""How a message passes (DATA).

PROMISE 2: what clamd judged is what the recipient gets, plus our one header.
PROMISE 3: one message in, at most one out.
"""

import email.utils
import os
import random
import re
import time

import pytest

import vectors
from harness import (HEADER, INFECTED, VIRUS, same, since, stuff, turns, unstuff,
                     until)

NEAR = range(-3, 4)


def model(wire):
    """The body that must arrive for the bytes that a client sent after 354 (up to
    the dot).  First come the rules of a strict server: lines end in CRLF, and a dot
    at the start of a line is removed.  Then come the newline rules of the manual
    page."""
    return vectors.normal(unstuff(wire))


def relay(site, client, wire, drip=False):
    """Send a message as these bytes and the dot; return what arrived."""
    before = len(site.hop.messages)
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n")
    client.expect("250")
    client.expect("250")
    client.expect("354")
    if drip:
        client.drip(wire + b".\r\n")
    else:
        client.send(wire + b".\r\n")
    client.expect("250")
    assert len(site.hop.messages) == before + 1
    message = site.hop.messages[-1]
    same(site.clamd.scans[-1].mail, message.body, "what clamd saw and what arrived")
    return message


@pytest.fixture
def plain(site):
    """A session through a daemon that adds no header."""
    site.start(Header="")
    return site.session()


def text(size, seed=0):
    """So many bytes of ordinary lines; CRLF at the end."""
    line = b"%06d the quick brown fox jumps over the lazy dog %d\r\n"
    out = b"".join(line % (i, seed) for i in range(size // 50 + 1))[:size]
    out = re.sub(rb"\r(?!\n)", b"x", out)
    return out[:-2] + b"\r\n" if size >= 2 else out


# ---------------------------------------------------------------- fidelity

@pytest.mark.core
@pytest.mark.parametrize("size", [4096, 8192, 16384, 32768, 65536])
def test_body_sizes_around_buffers_arrive(site, plain, size):
    for delta in NEAR:
        body = text(size + delta, delta)
        same(relay(site, plain, body).body, body)
    plain.quit()


@pytest.mark.parametrize("size", [4096, 8192, 16384, 32768, 65536])
def test_body_sizes_around_buffers_byte_by_byte_arrive(site, plain, size):
    for delta in NEAR if size < 65536 else (-1, 0, 1):
        body = text(size + delta, delta)
        same(relay(site, plain, body, drip=True).body, body)
    plain.quit()


@pytest.mark.parametrize("size", [4096, 8192, 16384, 32768, 65536])
def test_body_dot_lines_at_each_position_arrive(site, plain, size):
    """A stuffed body has a line that begins with a dot at each offset."""
    for delta in range(-6, 7):
        for dots in (b"\r\n.\r\n", b"\r\n..\r\n", b"\r\n.x\r\n"):
            head = text(size + delta, delta)[:-2]
            body = head + dots + b"after\r\n"
            same(relay(site, plain, stuff(body)).body, body)
    plain.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: dots")
@pytest.mark.parametrize("size", [4096, 8192, 16384, 32768, 65536])
def test_body_of_dot_lines_arrives(site, plain, size):
    for delta in NEAR:
        body = (b".\r\n" * (size // 3 + 2))[:size + delta]
        body = body[:body.rfind(b"\r\n") + 2]
        same(relay(site, plain, stuff(body)).body, body)
    plain.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: dots")
@pytest.mark.core
@pytest.mark.parametrize("drip", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("body", [
    b"", b"\r\n", b"\r\n\r\n", b".\r\n", b"..\r\n", b"...\r\n", b".x\r\n",
    b"a\r\n.\r\n", b"a\r\n..\r\n.\r\n", b".\r\n.\r\n.\r\n",
    b"a\r\n\r\n.\r\n\r\n.a\r\n", b"a .\r\n", b"a.\r\nb.\r\n", b". \r\n",
])
def test_body_small_with_dots_arrives(site, plain, body, drip):
    message = relay(site, plain, stuff(body), drip)
    same(message.body, body)
    same(message.wire, stuff(body), "the wire")
    plain.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: everything else")
@pytest.mark.core
@pytest.mark.parametrize("body", [
    b"s: x\r\n\r\n" + b"x" * 1000 + b"\r\n",
    b"s: x\r\n\r\n" + b"y" * 100000 + b"\r\n",
    b"z" * 70000 + b"\r\n",
    b"s: x\r\n\r\n" + bytes(range(14, 256)) * 20 + b"\r\n",
    b"s: x\r\n\r\nnul \0 in the \0\0 middle\r\n\0 first\r\nlast \0\r\n",
    b"s: x\r\n\r\n" + b"\0" * 10000 + b"\r\n",
    "s: ä\r\n\r\nöäü €\r\n".encode(),
    b"s: x\r\n\r\n\xff\xfe\xfd\r\n",
    b"s: x\r\n\r\n\tx\x0b\x0c\x1b\x7f\x1a\x04\r\n",
], ids=["long line", "100000 bytes a line", "no header", "8 bit", "NUL",
        "only NULs", "UTF-8", "invalid UTF-8", "control characters"])
def test_body_bytes_of_every_kind_arrive(site, plain, body):
    same(relay(site, plain, stuff(body)).body, body)
    plain.quit()


def test_body_random_arrives_as_the_model_says(site, plain):
    random.seed(4711)
    atoms = [b"\r\n", b"\r\n.", b".", b"..", b"\n", b"\r", b"\0", b"a", b"b" * 40,
             b"\r\n\r\n", b"\r\r\n", b"\n\r", b":", b" ", b"\xe4"]
    for _ in range(300):
        wire = b"".join(random.choice(atoms)
                        for _ in range(random.randrange(60)))
        wire += b"\r\n" if wire else b""
        while wire.startswith(b".\r\n") or b"\r\n.\r\n" in wire:
            wire = wire.replace(b"\r\n.\r\n", b"\r\n..\r\n")
            wire = b"." + wire if wire.startswith(b".\r\n") else wire
        same(relay(site, plain, wire).body, model(wire), "for %r: bytes" % wire)
    plain.quit()


def test_body_large_takes_no_memory(site, plain):
    relay(site, plain, text(10000))
    before = site.daemon.rss()
    body = text(4 << 20)
    same(relay(site, plain, body).body, body)
    assert site.daemon.grown(before) < 1024
    plain.quit()


def test_body_read_in_large_pieces_takes_memory_only_then(site):
    """An idle daemon frees the memory that a read of 128 KiB needs and other reads
    do not."""
    site.start(Listen=site.path("in.sock"))
    client = site.session()
    client.mail(body=text(2000))
    before = site.daemon.rss()
    for _ in range(3):
        client.begin()
        turns(site)
        site.daemon.pause()
        client.send(text(120000) + b".\r\n")
        site.daemon.resume()
        client.expect("250")
    until(lambda: site.daemon.grown(before) < 64, "the memory is returned")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: 16 MiB")
def test_body_bytes_held_back_have_a_limit(site, plain):
    """PROMISE 5: NULs and CRs that are held back are only counted, and later
    written all at once."""
    for byte in (b"\0", b"\r"):
        plain.begin(b"Subject: x\r\n\r\n")
        plain.send(byte * ((1 << 24) + 1))
        site.daemon.rests()             # it has read and counted them
        plain.send(b"x\r\n.\r\n")
        plain.expect("554")
        assert site.hop.messages == [] and "DATA" not in site.hop.commands


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: 16 MiB")
@pytest.mark.parametrize("wire, want", [
    (b"\r\n" + b"\0" * (1 << 24), None), (b"\r" * (1 << 24), b" " * (1 << 24)),
    (b"x" + b"\0" * ((1 << 24) + 1), None),
], ids=["NULs", "CRs", "NULs within a line"])
def test_body_bytes_held_back_up_to_the_limit_arrive(site, plain, wire, want):
    plain.begin(wire)
    site.daemon.rests()
    plain.send(b"x\r\n.\r\n")
    plain.expect("250")
    same(site.hop.messages[0].body, (want or wire) + b"x\r\n")
    plain.quit()


@pytest.mark.skipif("TEST_QEMU" in os.environ, reason="CPU time is qemu's, too")
def test_body_of_bare_crs_costs_no_more_than_other_bytes(site, plain):
    """PROMISE 5: no byte is searched twice for the end of a line."""
    def cost(body):
        before = site.daemon.ticks()
        relay(site, plain, body)
        return site.daemon.ticks() - before
    usual = cost((b"a" * 98 + b"\r\n") * 40000)
    assert cost(b"a\r" * 2000000 + b"\r\n") < 50 + 10 * usual


# ---------------------------------------------------------------- newlines

@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: bare LF",
    "clamsmtpd.8 TRANSPARENCY: dots", "clamsmtpd.8 TRANSPARENCY: CRs before LF", "clamsmtpd.8 TRANSPARENCY: bare CR",
    "clamsmtpd.8 TRANSPARENCY: NULs")
@pytest.mark.core
@pytest.mark.parametrize("wire, want", [
    (b"a: b\n\nx\ny\r\n", b"a: b\r\n\r\nx\r\ny\r\n"),
    (b"a\r\r\nb\r\n", b"a\r\nb\r\n"),
    (b"a\r\r\r\r\nb\r\n", b"a\r\nb\r\n"),
    (b"a\rb\r\n", b"a b\r\n"),
    (b"a\r\rb\r\n", b"a  b\r\n"),
    (b"\ra\r\n", b" a\r\n"),
    (b"a\n\rb\r\n", b"a\r\n b\r\n"),
    (b"a\n.\nb\r\n", b"a\r\n.\r\nb\r\n"),
    (b"a\n.\r\nb\r\n", b"a\r\n.\r\nb\r\n"),
    (b"a\r\n.\nb\r\n", b"a\r\n\r\nb\r\n"),
    (b"a\r.\rb\r\n", b"a . b\r\n"),
    (b"a\r\n.\rb\r\n", b"a\r\n b\r\n"),
    (b"a\r.\r\nb\r\n", b"a .\r\nb\r\n"),
    (b"a\n..\r\nb\r\n", b"a\r\n..\r\nb\r\n"),
    (b"a\n\0.\nb\r\n", b"a\r\n.\r\nb\r\n"),
    (b"\0.\r\nb\r\n", b".\r\nb\r\n"),
    (b"\0\0\0.x\r\n", b".x\r\n"),
    (b"a\r\n\0\0.\r\nb\r\n", b"a\r\n.\r\nb\r\n"),
    (b"a\r\n.\0.\r\nb\r\n", b"a\r\n.\r\nb\r\n"),
    (b"a\r\n\0x.\r\n", b"a\r\n\0x.\r\n"),
    (b"a\0.\r\n", b"a\0.\r\n"),
    (b"a\r\n\0\r\n", b"a\r\n\0\r\n"),
    (b"a\r\n\0\0\n.b\r\n", b"a\r\n\0\0\r\n.b\r\n"),
    (b"a\r\0\n.\r\n", b"a \0\r\n.\r\n"),
    (b"\n\n\n\r\n", b"\r\n\r\n\r\n\r\n"),
])
def test_body_newlines_are_changed_by_the_rules(site, plain, wire, want):
    assert model(wire) == want          # the model and this table agree
    same(relay(site, plain, wire).body, want)
    same(relay(site, plain, wire, drip=True).body, want, "byte by byte: bytes")
    plain.quit()


# ---------------------------------------------------------------- the end

@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: end of data")
def test_body_ends_at_crlf_dot_crlf(site, plain):
    """The second envelope is a second message, and gets its own replies."""
    envelope, data, body = vectors.SECOND.partition(b"DATA\r\n")
    plain.begin(b"Subject: first\r\n\r\nfirst\r\n.\r\n" + envelope + data)
    for want in ("250 2.0.0", "250 2.1.0", "250 2.1.5", "354"):
        plain.expect(want)
    plain.send(body + b"\r\n.\r\n")
    plain.expect("250 2.0.0")
    assert [m.mail for m in site.hop.messages] == [
        "MAIL FROM:<a@example.com>", "MAIL FROM:<evil@example.com>"]
    assert len(site.clamd.scans) == 2
    plain.quit()


def test_body_end_of_data_split_anywhere_ends_it(site, plain):
    """The end of data comes in two packets, cut at each place."""
    end = b"x\r\n..\r\n.y\r\n.\r\n"
    for cut in range(len(end) + 1):
        plain.begin(b"Subject: x\r\n\r\n" + end[:cut])
        other = site.session()             # some turns of the loop
        other.quit()
        plain.send(end[cut:])
        plain.expect("250")
        same(site.hop.messages[-1].body, b"Subject: x\r\n\r\nx\r\n.\r\ny\r\n")
    plain.quit()


# ---------------------------------------------------------------- header

LINE = b"X-Test: yes\r\n"


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: place of the header",
    "clamsmtpd.8 TRANSPARENCY: no blank line", "clamsmtpd.8 TRANSPARENCY: mailbox lines")
@pytest.mark.core
@pytest.mark.parametrize("head, rest", [
    (b"Subject: x\r\n", b"\r\nbody\r\n"),
    (b"Subject: x\r\nFrom: a\r\n\tfolded\r\n folded\r\n", b"\r\nbody\r\n"),
    (b"Subject: x\r\n", b"\r\n"),
    (b"Subject: x\r\n", b""),
    (b"Subject: x\r\nTo: y\r\n", b""),
    (b"Subject: x\r\n folded\r\n", b""),
    (b"Subject: x\r\n", b"this is no header line\r\nnor this\r\n"),
    (b"Subject: x\r\n", b"no header\r\nBut: this\r\n\r\nis\r\n"),
    (b"", b"\r\nbody\r\n"),
    (b"", b"body only\r\n"),
    (b"", b"body only\r\n\r\nmore: body\r\n"),
    (b"", b""),
    (b"", b"\r\n"),
    (b"Subject: x\r\n", b"\r\n\r\nX-A: b\r\n\r\n"),
    (b"Subject:\r\n", b"\r\nb\r\n"),
    (b"Subject: " + b"x" * 70000 + b"\r\n", b"\r\nbody\r\n"),
    (b"A: b\r\n" * 5000, b"\r\nbody\r\n"),
    (b"From a@b  Mon Aug 22 09:45:15 2011\r\nSubject: x\r\n", b"\r\nbody\r\n"),
    (b">From a@b\r\nSubject: x\r\n folded\r\n", b"\r\nbody\r\n"),
    (b"From a\r\n>From b\r\n>>From c\r\nD: e\r\n", b"From f\r\nG: h\r\n\r\n"),
    (b"From a\r\n", b""), (b"From a\r\n", b"\r\nbody\r\n"),
    (b"From a\r\n", b"body only\r\n"), (b"From \r\n", b":\r\n"),
    (b"From: a\r\n", b"From b\r\n\r\n"), (b"From : a\r\nB: c\r\n", b"\r\n"),
    (b">F: a\r\n", b"\r\n"), (b"", b"Fro m: a\r\n"), (b"", b">\r\nA: b\r\n"),
    (b"", b"From\r\nA: b\r\n"), (b"", b"from a\r\nA: b\r\n"),
], ids=lambda v: repr(v[:30]))
@pytest.mark.parametrize("drip", [False, True], ids=["at once", "byte by byte"])
def test_header_stands_at_the_end_of_the_header_section(site, head, rest, drip):
    if drip and len(head) > 1000:
        head = head[:300] + head[-300:] if b":" in head[-300:] else \
            head[:600] + b"\r\n"
    site.start(Header="X-Test: yes")
    client = site.session()
    message = relay_with_header(site, client, stuff(head + rest), drip)
    same(message.body, head + LINE + rest)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: text that begins with a blank")
@pytest.mark.parametrize("mbox", [b"", b"From a\r\n", b">From a\r\nFrom b\r\n"])
@pytest.mark.parametrize("text", [b" one\r\ntwo\r\n", b"\tone\r\n", b" \r\n",
                                  b" One: 1\r\nTwo: 2\r\n\r\nthree\r\n"])
@pytest.mark.parametrize("header", [b"X-Test: yes\r\n", b"Received: yes\r\n", b""])
def test_first_line_with_a_blank_in_front_stays_text(site, header, text, mbox):
    """An empty line separates it from our header, which it would otherwise
    continue."""
    site.start(Header=header[:-2].decode())
    client = site.session()
    message = relay_with_header(site, client, mbox + text)
    same(message.body, mbox + (header and header + b"\r\n") + text)
    client.quit()


def test_first_line_with_a_blank_in_front_stays_text_below_a_virus_header(site):
    """The header of Action: pass is separated from the text as Header is."""
    site.start(Action="pass")
    client = site.session()
    message = relay_with_header(site, client, b"  EICAR\r\n")
    same(message.body, INFECTED + VIRUS.encode() + b"\r\n\r\n  EICAR\r\n")
    client.quit()


@pytest.mark.parametrize("header, want", [
    (".X: y", b".X: y\r\n"), (r"X: y\r\n..Z: .w\r\n\t.", b"X: y\r\n..Z: .w\r\n\t.\r\n"),
])
def test_dot_at_the_start_of_a_header_line_is_stuffed(site, header, want):
    """The next hop removes one dot from each line that begins with one."""
    site.start(Header=header)
    client = site.session()
    message = relay_with_header(site, client, b"A: b\r\n\r\n..c\r\n")
    same(message.wire, stuff(b"A: b\r\n" + want + b"\r\n.c\r\n"), "the wire")
    client.quit()


def relay_with_header(site, client, wire, drip=False):
    client.begin()
    (client.drip if drip else client.send)(wire + b".\r\n")
    client.expect("250")
    return site.hop.messages[-1]


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: place of the header")
@pytest.mark.parametrize("body", [
    b"Subject: x\r\n\r\nbody\r\n", b"", b"body only\r\n", b".dot\r\n", b"\r\n",
])
def test_header_received_stands_on_top(site, body):
    site.start(Header="Received: from %i by %l")
    client = site.session()
    message = relay_with_header(site, client, stuff(body))
    same(message.body, b"Received: from 127.0.0.1 by 127.0.0.1\r\n" + body)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: mailbox lines")
@pytest.mark.parametrize("mbox", [b"From a@b  Mon Aug 22 09:45:15 2011\r\n",
                                  b">From a\r\n>>From b\r\n"])
@pytest.mark.parametrize("rest", [b"", b"A: b\r\n\r\nc\r\n", b"text only\r\n"])
def test_header_received_stands_below_mbox_lines(site, mbox, rest):
    """A From_ line that is not the first line would end the header section."""
    site.start(Header="Received: here")
    client = site.session()
    message = relay_with_header(site, client, mbox + rest)
    same(message.body, mbox + b"Received: here\r\n" + rest)
    client.quit()


def test_body_of_the_next_hops_size_passes_and_one_byte_more_is_552(site):
    """The limit that the next hop names in its EHLO reply is exact."""
    site.hop = site.new_hop(ehlo=["SIZE 1000"])
    client = site.session()
    body = b"Subject: x\r\n\r\n" + b"x" * 984 + b"\r\n"
    assert len(body) == 1000
    client.mail(body=body)
    client.mail(body=b"X" + body, want="552 5.3.4 Message too big")
    client.quit()
    assert len(site.hop.messages) == 1


def test_header_with_bare_line_feeds_around_it_stands_right(site):
    site.start(Header="X-Test: yes")
    client = site.session()
    message = relay_with_header(site, client, b"Subject: x\n\nbody\n.\n\r\n")
    same(message.body, b"Subject: x\r\nX-Test: yes\r\n\r\nbody\r\n.\r\n\r\n")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Header",
    "clamsmtpd.8 TRANSPARENCY: what was scanned is forwarded")
def test_header_default_is_added(site):
    client = site.session()
    client.mail(body=b"Subject: x\r\n\r\nbody\r\n")
    same(site.hop.messages[0].body,
         b"Subject: x\r\n" + HEADER + b"\r\nbody\r\n")
    same(site.clamd.scans[0].mail, b"Subject: x\r\n\r\nbody\r\n")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Header: empty")
def test_header_empty_adds_none(site, plain):
    plain.mail(body=b"Subject: x\r\n\r\nbody\r\n")
    same(site.hop.messages[0].body, b"Subject: x\r\n\r\nbody\r\n")
    plain.quit()


def test_header_long_arrives_whole(site):
    """With its dates filled in, the header is several times as long as in the
    file."""
    site.start(Header="X-Long: " + "%d;" * 120)
    client = site.session()
    client.mail(body=b"A: b\r\n\r\nx\r\n")
    line = site.hop.messages[0].body.split(b"\r\n")[1]
    assert line.startswith(b"X-Long: ") and line.endswith(b";")
    assert line.count(b";") == 120 and len(line) > 120 * 25
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Header: %i", "clamsmtpd.conf.5 Header: %l",
    "clamsmtpd.conf.5 Header: %%", "clamsmtpd.conf.5 Header: \\r\\n, \\n, \\r",
    "clamsmtpd.conf.5 Header: \\t",
    "clamsmtpd.conf.5 Header: newline")
def test_header_escapes_are_replaced(site):
    """Any other percent sign and any other backslash are unchanged."""
    site.start(Listen="0.0.0.0:0",
               Header=r"X-Seen: from %i at %l 100%% 5%;\r\n\tsecond\nX-B: \a%I\n c\rX-D: e")
    client = site.session(source="127.0.0.5", address=site.daemon.address.replace(
        "0.0.0.0", "127.0.0.6"))
    client.mail(body=b"A: b\r\n\r\nx\r\n")
    same(site.hop.messages[0].body,
         b"A: b\r\nX-Seen: from 127.0.0.5 at 127.0.0.6 100% 5%;\r\n"
         b"\tsecond\r\nX-B: \\a%I\r\n c\r\nX-D: e\r\n\r\nx\r\n")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Header: %d")
def test_header_date_is_an_rfc_5322_date(site):
    site.start(Header="X-Date: %d")
    client = site.session()
    before = since()
    client.mail(body=b"A: b\r\n\r\nx\r\n")
    after = int(time.time())
    line = site.hop.messages[0].body.split(b"\r\n")[1].decode()
    assert re.fullmatch(r"X-Date: (Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d{1,2} "
                        r"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) "
                        r"\d{4} \d\d:\d\d:\d\d [+-]\d{4}", line)
    when = email.utils.parsedate_to_datetime(line[8:]).timestamp()
    assert before <= when <= after
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Header: %d")
def test_header_date_is_utc_whatever_tz_says(site):
    site.start(Header="X-Date: %d", env={"TZ": "XXX-5:30"})
    client = site.session()
    client.mail(body=b"A: b\r\n\r\nx\r\n")
    assert b" +0000\r\n" in site.hop.messages[0].body
    client.quit()


def test_header_of_two_messages_in_a_session_is_added_once_each(site):
    client = site.session()
    for _ in range(3):
        client.mail(body=b"A: b\r\n\r\nx\r\n")
    for message in site.hop.messages:
        assert message.body.count(HEADER) == 1
    client.quit()
