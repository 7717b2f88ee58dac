"""CHUNKING: the client sends BDAT, and the next hop gets one BDAT (or DATA)."""


import pytest

from harness import HEADER, Hold, VIRUS, same, turns, until

BODY = b"Subject: x\r\n\r\nLine one\r\n.line two\r\n.\r\nlast\r\n"


def with_header(body):
    """A body with the usual header at its place."""
    head, sep, rest = body.partition(b"\r\n\r\n")
    return head + b"\r\n" + HEADER + b"\r\n" + rest


@pytest.fixture
def chunky(site):
    site.hop = site.new_hop(chunking=True)
    return site.session()


def sizes(body, *cuts):
    cuts = [0, *cuts, len(body)]
    return [body[a:b] for a, b in zip(cuts, cuts[1:])]


def send_chunks(client, chunks, want="250"):
    client.envelope()
    for i, chunk in enumerate(chunks):
        client.chunk(chunk, last=i == len(chunks) - 1)
        client.expect(want if i == len(chunks) - 1 else "250")


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Clean",
    "clamsmtpd.8 TRANSPARENCY: BDAT")
@pytest.mark.core
@pytest.mark.parametrize("chunks", [
    [BODY], sizes(BODY, 1), sizes(BODY, 10, 20), [BODY, b""],
    [b"", BODY], [b"", b"", BODY, b""],
    [BODY[i:i + 1] for i in range(len(BODY))],
    sizes(BODY, 11, 12, 13, 14), sizes(BODY, len(BODY) - 1),
], ids=lambda c: "%d chunks of %s" % (len(c), [len(x) for x in c][:5]))
def test_any_split_arrives_as_one_bdat_last(site, chunky, chunks):
    send_chunks(chunky, chunks, "250 2.0.0 queued as 4711")
    message, = site.hop.messages
    assert message.how == "BDAT"
    same(message.body, with_header(BODY))
    assert site.hop.received("BDAT") == ["BDAT %d LAST" % len(with_header(BODY))]
    same(site.clamd.scans[0].mail, BODY, "what clamd saw")
    chunky.quit()


def test_bdat_message_ending_in_a_folded_header_gets_ours_before_it(site, chunky):
    """Our header comes before that header, not inside it."""
    send_chunks(chunky, [b"A: b\r\nC: d\r\n e"])
    same(site.hop.messages[0].body, b"A: b\r\n" + HEADER + b"C: d\r\n e")


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: mailbox lines")
@pytest.mark.parametrize("before, after", [
    (b"From a@b Mon\r\nC: d\r\n", b"\r\ntext\r\n"), (b">From a\nC: d\n", b"\ntext"),
    (b"From a\r\n", b""), (b"", b"From a"),
])
def test_header_of_chunks_stands_below_mbox_lines(site, chunky, before, after):
    """BDAT announces as many octets as follow."""
    send_chunks(chunky, [before[:3], before[3:] + after])
    message, = site.hop.messages
    same(message.body, before + HEADER + after)
    assert site.hop.received("BDAT") == ["BDAT %d LAST" % len(message.body)]
    chunky.quit()


@pytest.mark.parametrize("mbox", [b"", b"From a\n"])
def test_first_line_of_chunks_with_a_blank_in_front_stays_text(site, chunky, mbox):
    """The empty line after our header counts among the octets announced."""
    send_chunks(chunky, [mbox, b" ", b"text"])
    message, = site.hop.messages
    same(message.body, mbox + HEADER + b"\r\n text")
    assert site.hop.received("BDAT") == ["BDAT %d LAST" % len(message.body)]
    chunky.quit()


def test_dot_at_the_start_of_a_header_line_is_not_stuffed_in_chunks(site):
    """BDAT has no end of data that a dot could be taken for."""
    site.hop = site.new_hop(chunking=True)
    site.start(Header=".X: y")
    client = site.session()
    send_chunks(client, [b"A: b\r\n\r\n.c\r\n"])
    same(site.hop.messages[0].wire, b"A: b\r\n.X: y\r\n\r\n.c\r\n")
    client.quit()


@pytest.mark.core
def test_bdat_chunks_in_one_packet_are_answered_in_order(site, chunky):
    chunky.send(b"MAIL FROM:<a@b> BODY=8BITMIME\r\nRCPT TO:<c@d>\r\n"
                b"BDAT 11\r\n" + BODY[:11] + b"BDAT 3\r\n" + BODY[11:14] +
                b"BDAT %d LAST\r\n" % len(BODY[14:]) + BODY[14:] + b"NOOP\r\n")
    for want in ("250", "250", "250", "250", "250 2.0.0 queued", "250 2.0.0 noop"):
        chunky.expect(want)
    same(site.hop.messages[0].body, with_header(BODY))
    chunky.quit()


def test_bdat_chunks_one_byte_at_a_time_arrive(site, chunky):
    chunky.envelope()
    chunky.drip(b"BDAT 20\r\n" + BODY[:20] +
                b"bdat %d last\r\n" % len(BODY[20:]) + BODY[20:])
    chunky.expect("250")
    chunky.expect("250")
    same(site.hop.messages[0].body, with_header(BODY))
    chunky.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Commands answered by clamsmtpd",
    "clamsmtpd.8 THE SMTP DIALOGUE: chunk replies")
def test_bdat_chunk_is_answered_before_the_message_is_complete(site, chunky):
    chunky.envelope()
    for i in range(3):
        chunky.chunk(b"A: %d\r\n" % i)
        chunky.expect("250")
    assert site.hop.received("BDAT") == [] and site.clamd.scans == []
    chunky.chunk(b"\r\nx", last=True)
    chunky.expect("250")
    same(site.hop.messages[0].body, b"A: 0\r\nA: 1\r\nA: 2\r\n" + HEADER + b"\r\nx")
    chunky.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: BDAT")
@pytest.mark.core
@pytest.mark.parametrize("body", [
    b"A: b\r\n\r\nbare\nline\rends\r\r\nand \0 NULs\r\n\0.\r\n",
    b"A: b\r\n\r\n\r\n.\r\nMAIL FROM:<x@y>\r\n.\r\n",
    b"A: b\r\n\r\nno newline at the end",
    b"A: b\r\n\r\nends in CR\r",
    b"A: b\r\n\r\n" + bytes(range(256)) * 300,
    b"A: b\r\n\r\n" + b"x" * 100000,
    b"A: b\r\n\r\n.",
], ids=["newlines", "dots", "no newline", "CR", "binary", "long", "dot"])
def test_bdat_octets_stay_as_they_are(site, chunky, body):
    send_chunks(chunky, [body])
    same(site.hop.messages[0].body, with_header(body))
    same(site.clamd.scans[0].mail, body)
    chunky.quit()


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8191, 8192, 8193, 16384,
                                  65535, 65536, 65537])
def test_bdat_sizes_around_buffers_arrive(site, chunky, size):
    body = b"A: b\r\n\r\n" + b"0123456789" * 14000
    send_chunks(chunky, [body[:size], body[size:]])
    same(site.hop.messages[0].body, with_header(body))
    chunky.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Clean")
@pytest.mark.core
def test_data_stays_data_where_chunking_is_offered(site, chunky):
    chunky.mail(body=BODY)
    message, = site.hop.messages
    assert message.how == "DATA"
    same(message.body, with_header(BODY))
    chunky.quit()


def test_bdat_empty_message_arrives(site, chunky):
    send_chunks(chunky, [b""])
    same(site.hop.messages[0].body, HEADER)
    chunky.quit()


# ------------------------------------------------ next hop without CHUNKING

@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: BDAT without CHUNKING")
@pytest.mark.core
@pytest.mark.parametrize("body, want", [
    (BODY, BODY),
    (b"A: b\r\n\r\nno newline", b"A: b\r\n\r\nno newline\r\n"),
    (b"A: b\r\n\r\nbare\nlf\rcr\r\r\nx\r\n", b"A: b\r\n\r\nbare\r\nlf cr\r\nx\r\n"),
    (b"A: b\r\n\r\n\n.\n\r\n.\r\n", b"A: b\r\n\r\n\r\n.\r\n\r\n.\r\n"),
    (b"A: b\r\n\r\n\0.\r\n", b"A: b\r\n\r\n.\r\n"),
    (b"A: b\r\n\r\n..two\r\n", b"A: b\r\n\r\n..two\r\n"),
    (b"A: b\r\n\r\nends in CR\r", None),
])
def test_bdat_is_replayed_as_data_where_the_next_hop_has_no_chunking(
        site, body, want):
    """BDAT is understood even if it was not offered."""
    client = site.session()
    send_chunks(client, [body[:9], body[9:]])
    message, = site.hop.messages
    assert message.how == "DATA"
    if want is None:
        assert message.body.endswith(b"\r\n")
        assert b"\r" not in message.body.replace(b"\r\n", b"")
    else:
        same(message.body, with_header(want))
    same(site.clamd.scans[0].mail,
         message.body.replace(HEADER, b""), "what clamd saw")
    client.quit()


# ---------------------------------------------------------------- refusals

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: DATA without a recipient")
@pytest.mark.core
@pytest.mark.parametrize("before", [[], ["MAIL FROM:<a@b>"],
                                    ["MAIL FROM:<a@b>", "RCPT TO:<no@d>"]])
def test_bdat_out_of_order_is_503_after_its_octets(site, chunky, before):
    site.hop.on("RCPT", lambda s, line: "550 no" if "no@" in line else None)
    for command in before:
        chunky.line(command)
        chunky.reply()
    chunky.send(b"BDAT 6\r\nNOOP\r\nNOOP\r\n")
    chunky.expect("503 5.5.1")
    chunky.expect("250 2.0.0 noop")
    chunky.cmd("RSET", "250")
    send_chunks(chunky, [BODY])
    assert len(site.hop.messages) == 1 and site.hop.commands.count("NOOP") == 1
    chunky.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: BDAT size")
@pytest.mark.parametrize("size", ["", "x", "-1", "1x", "+1", "0x5", "1 FIRST",
                                  "1 LAST x", "99999999999999999999", "1.5"])
def test_bdat_unreadable_size_is_501_and_ends_the_session(site, chunky, size):
    chunky.envelope()
    chunky.send("BDAT %s\r\nNOOP\r\n" % size)
    chunky.expect("501 5.5.4")
    chunky.eof()
    site.hop.session.wait_end()
    assert "NOOP" not in site.hop.commands and site.hop.messages == []


def test_bdat_after_one_without_recipients_is_delivered(site, chunky):
    """A discarded chunk leaves no state that makes the next message fail."""
    chunky.chunk(b"discarded", last=True)
    chunky.expect("503 5.5.1")
    send_chunks(chunky, [BODY], "250 2.0.0 queued as 4711")
    same(site.hop.messages[0].body, with_header(BODY))
    assert len(site.daemon.log(r"status=")) == 1


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: BDAT size")
def test_bdat_without_a_size_is_501_and_ends_the_session(site, chunky):
    chunky.envelope()
    chunky.cmd("BDAT", "501 5.5.4")
    chunky.eof()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: BINARYMIME")
@pytest.mark.parametrize("command", ["MAIL FROM:<a@b> BODY=BINARYMIME",
                                     "mail from:<a@b> SIZE=5 body=binarymime"])
def test_binarymime_is_501_and_not_forwarded(site, chunky, command):
    chunky.cmd(command, "501 5.5.4")
    assert len(site.hop.commands) == 1
    chunky.mail()
    chunky.quit()


@pytest.mark.core
def test_rset_between_chunks_forgets_them(site, chunky):
    chunky.envelope()
    chunky.chunk(b"Subject: forgotten\r\n")
    chunky.expect("250")
    chunky.cmd("RSET", "250")
    assert site.hop.messages == [] and site.hop.received("BDAT") == []
    send_chunks(chunky, [BODY])
    same(site.hop.messages[0].body, with_header(BODY))
    chunky.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: XFORWARD in a transaction")
@pytest.mark.parametrize("command", ["DATA", "MAIL FROM:<x@y>", "RCPT TO:<x@y>",
                                     "AUTH PLAIN AA==", "ETRN x", "XFORWARD HELO=x"])
def test_other_commands_between_chunks_are_503(site, chunky, command):
    site.hop.on("MAIL", lambda s, line: "503 nested" if s.mail else None)
    chunky.envelope()
    chunky.chunk(b"Subject: x\r\n")
    chunky.expect("250")
    before = len(site.hop.commands)
    chunky.cmd(command, "503 5.5.1")
    assert len(site.hop.commands) == before
    chunky.cmd("RSET", "250")
    send_chunks(chunky, [BODY])
    assert len(site.hop.messages) == 1
    chunky.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: XFORWARD in a transaction")
@pytest.mark.parametrize("command", ["NOOP", "VRFY x", "EXPN x", "HELP"])
def test_harmless_command_between_chunks_changes_nothing(site, chunky, command):
    chunky.envelope()
    chunky.chunk(BODY[:20])
    chunky.expect("250")
    chunky.cmd(command, "2")
    chunky.chunk(BODY[20:], last=True)
    chunky.expect("250")
    same(site.hop.messages[0].body, with_header(BODY))
    chunky.quit()


def test_bdat_and_data_in_one_session_both_arrive(site, chunky):
    chunky.mail(body=BODY)
    send_chunks(chunky, [BODY])
    chunky.mail(body=BODY)
    assert [m.how for m in site.hop.messages] == ["DATA", "BDAT", "DATA"]
    for message in site.hop.messages:
        same(message.body, with_header(BODY))
    chunky.quit()


def test_bdat_commands_read_with_the_last_octets_are_all_answered(site):
    """A read of a body takes 128 KiB.  The commands after the body in it are more
    than another buffer holds."""
    site.hop = site.new_hop(chunking=True)
    site.start(Listen=site.path("in.sock"))
    client = site.session()
    client.envelope()
    client.send(b"BDAT 50000 LAST\r\n" + b"x" * 10)
    turns(site)
    site.daemon.pause()
    client.send(b"x" * 49990 + b"NOOP\r\n" * 8000)
    site.daemon.resume()
    for _ in range(8001):
        client.expect("250")
    assert len(site.hop.messages[0].body) == 50000 + len(HEADER)
    client.quit()


@pytest.mark.core
def test_bdat_chunk_above_the_limit_is_skipped_with_552(site):
    site.hop = site.new_hop(chunking=True)
    site.start(MaxScanSize="10K")
    client = site.session()
    before = site.daemon.rss()
    client.envelope()
    client.send(b"BDAT 1500000\r\n")
    client.send(b"z" * 1500000)
    client.expect("552 5.3.4")
    assert site.daemon.grown(before) < 1024
    client.send(b"BDAT 6 LAST\r\nNOOP\r\n")
    client.expect("503")
    client.cmd("RSET", "250")
    send_chunks(client, [BODY])
    assert len(site.hop.messages) == 1 and site.hop.received("BDAT") != []
    client.quit()


def test_bdat_chunks_above_the_limit_together_are_552(site):
    site.hop = site.new_hop(chunking=True)
    site.start(MaxScanSize="10K")
    client = site.session()
    client.envelope()
    client.chunk(b"A: b\r\n\r\n" + b"x" * 9000)
    client.expect("250")
    client.chunk(b"x" * 9000, last=True)
    client.expect("552 5.3.4")
    client.cmd("RSET", "250")
    client.mail()
    assert len(site.hop.messages) == 1
    client.quit()


# ---------------------------------------------------------------- verdicts

@pytest.mark.core
@pytest.mark.parametrize("action, want", [("drop", "250 2.0.0 Virus Detected"),
                                          ("bounce", "550 5.7.1 Virus Detected")])
def test_bdat_virus_across_chunks_is_found(site, action, want):
    site.hop = site.new_hop(chunking=True)
    site.start(Action=action)
    client = site.session()
    send_chunks(client, [b"A: b\r\n\r\nEI", b"CA", b"R"], want)
    assert site.hop.messages == [] and site.hop.received("BDAT") == []
    site.daemon.wait_log("status=VIRUS:" + VIRUS)
    send_chunks(client, [BODY])
    assert len(site.hop.messages) == 1
    client.quit()


def test_bdat_refused_by_the_next_hop_is_relayed(site, chunky):
    site.hop.on(".", ["554-5.6.0 no\n554 5.6.0 never"])
    send_chunks(chunky, [BODY], "554 5.6.0 never")
    chunky.cmd("RSET", "250")
    send_chunks(chunky, [BODY])
    chunky.quit()


@pytest.mark.parametrize("reply", [b"250 ok\r\n250 ok\r\n",
                                   b"250 ok\r\n250-ok\r\n250 ok\r\n"])
def test_bdat_unexpected_reply_is_not_that_of_the_message(site, chunky, reply):
    """PROMISE 1: an unexpected reply of the next hop is not the reply to a
    chunk."""
    site.hop.on("RCPT", [reply])
    chunky.send(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
                b"BDAT %d LAST\r\n" % len(BODY) + BODY)
    received = chunky.rest()
    assert site.hop.messages == []
    assert received.count(b"250") == 2, "2xx for a lost message: %r" % received


def test_bdat_chunk_that_ends_while_a_noop_is_out_waits_for_its_reply(site):
    """The replies to the NOOP and to the chunk are not confused."""
    noop = Hold()
    site.hop = site.new_hop(chunking=True)
    site.hop.on("NOOP", [noop])
    site.start(KeepAlives="1")
    client = site.session()
    client.envelope()
    client.send(b"BDAT 30\r\n" + b"A: b\r\n\r\n")
    noop.reached()
    client.send(b"x" * 22 + b"BDAT 0 LAST\r\nNOOP\r\n")
    turns(site)
    assert len(site.hop.sessions[0].commands) == 4
    noop.go()
    client.expect("250 2.0.0")
    client.expect("250 2.0.0 queued as 4711")
    client.expect("250 2.0.0 noop")
    assert len(site.hop.messages) == 1
    client.quit()


def test_keepalives_while_chunks_are_scanned_are_sent(site):
    hold = Hold()
    site.clamd.verdict = [hold]
    site.hop = site.new_hop(chunking=True)
    site.start(KeepAlives="1")
    client = site.session()
    client.envelope()
    client.chunk(BODY, last=True)
    hold.reached()
    until(lambda: site.hop.commands.count("NOOP") >= 2, "two NOOPs")
    hold.go()
    client.expect("250 2.0.0 queued")
    client.quit()


def test_keepalives_between_many_small_chunks_are_sent(site, clock):
    """Each chunk comes before the time at which a NOOP would be due if it were the
    first."""
    site.hop = site.new_hop(chunking=True)
    site.start(KeepAlives="60", **clock.settings())
    client = site.session()
    client.envelope()
    for _ in range(5):
        client.chunk(b"x")
        client.expect("250 2.0.0")
        clock.go(site.daemon, 50)
    assert site.hop.commands.count("NOOP") >= 2
    client.chunk(b"\r\n", last=True)
    client.expect("250 2.0.0 queued")
    client.quit()


@pytest.mark.core
@pytest.mark.parametrize("how", ["half_close", "reset"])
def test_client_gone_between_chunks_delivers_nothing(site, chunky, how):
    chunky.envelope()
    chunky.chunk(BODY[:20])
    chunky.expect("250")
    getattr(chunky, how)()
    site.hop.session.wait_end()
    assert site.hop.messages == [] and site.hop.received("BDAT") == []


@pytest.mark.parametrize("how", ["half_close", "close"])
def test_eof_at_once_after_the_last_chunk_is_served(site, chunky, how):
    """The mail of a device that waits for no reply is delivered."""
    chunky.envelope()
    chunky.chunk(BODY, last=True)
    getattr(chunky, how)()
    message, = site.hop.wait_messages(1)
    same(message.body, with_header(BODY))
    site.hop.session.wait_end()


@pytest.mark.parametrize("how", ["half_close", "reset"])
def test_client_gone_within_a_chunk_delivers_nothing(site, chunky, how):
    chunky.envelope()
    chunky.send(b"BDAT 1000 LAST\r\n" + BODY)
    getattr(chunky, how)()
    site.hop.session.wait_end()
    assert site.hop.messages == [] and site.hop.received("BDAT") == []
