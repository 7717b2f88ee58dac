"""PROMISE 8: text of a peer is harmless wherever the daemon puts it, and the daemon
does not use what it has learnt from a peer after this has changed."""

import os
import re
import unicodedata

import pytest

from vectors import TEXTS
from harness import (BAD, GOOD, HEADER, Hold, NINE, VIRUS, XCLIENT, environment, same,
                     stuff)


@pytest.fixture(params=TEXTS)
def text(request, site):
    """Hostile text.  The @ in shell commands is replaced by a file that must never
    exist."""
    text = TEXTS[request.param]
    if request.param == "shell":
        canary = site.path("canary")
        text = text.replace(b"@", canary.encode())
        yield text
        assert not os.path.exists(canary)
    else:
        yield text


def harmless(text, other=b"?"):
    """The text after the rules for output: each byte of a control character (C0,
    DEL, C1) or of invalid UTF-8 is replaced."""
    def byte(char):
        data = char.encode("utf-8", "surrogateescape")
        return other * len(data) if unicodedata.category(char) in ("Cc", "Cs") else data
    return b"".join(map(byte, text.decode("utf-8", "surrogateescape")))


def xtext(text):
    return b"".join(b"%c" % c if 33 <= c <= 126 and c not in b"+=" else
                    b"+%02X" % c for c in text)


def check_log(site, *status):
    """The log has only harmless lines, and one line with status= for each of these
    values."""
    if status:
        site.daemon.wait_log("status=", len(status))
    with open(site.daemon.stderr, "rb") as file:
        lines = file.read().split(b"\n")
    assert lines.pop() == b""
    for line in lines:
        assert line.startswith(b"clamsmtpd: "), line[:200]
        assert len(line) - len(b"clamsmtpd: ") <= 1000, line
        assert line == harmless(line), line
    own = [line for line in lines if re.match(
        rb"clamsmtpd: [0-9A-F]{6}: from=", line)]
    assert len(own) == len(status)
    for line, want in zip(own, status):
        assert line.endswith(b" status=" + want.encode()), line
        assert len(re.findall(rb" (?=from=|status=)", line)) == 2, line
    return own


# ---------------------------------------------------------------- commands

@pytest.mark.core
def test_text_in_commands_is_harmless(site, text):
    """Text in HELO, XFORWARD, MAIL and RCPT is harmless in the log, at the next
    hop, in the header and in the variables of the VirusAction."""
    remote = text[:200] + b"\nLD_AUDIT=x\r\n\0LD_DEBUG=all"
    result = environment(site, Action="pass", Header="X-Scan: %i %l 100%% %s")
    client = site.client()
    client.expect("220 smtp.passthru")
    commands = [b"EHLO " + text, b"XFORWARD NAME=" + text,
                b"XFORWARD HELO=" + xtext(remote), b"XFORWARD ADDR=" + xtext(remote),
                b"MAIL FROM:<" + text + b">", b"RCPT TO:<" + text + b">",
                b"RCPT TO:<b@example.com>"]
    for command in commands:
        client.cmd(command, "250")
    client.data(BAD, "250 2.0.0 queued")
    for command in commands[-3:]:
        client.cmd(command, "250")
    client.data(GOOD, "250 2.0.0 queued")
    client.quit()

    # the next hop gets it unchanged
    sent = [c.encode("latin-1") for c in site.hop.commands]
    assert [c for c in sent if c != b"DATA"] == commands + commands[-3:] + [b"QUIT"]
    # the header is ours, without any text of theirs
    first, second = site.hop.messages
    same(first.body, BAD.replace(b"\r\n\r\n", b"\r\nX-Virus-Infected: " +
                                 VIRUS.encode() + b"\r\n\r\n", 1))
    same(second.body, GOOD.replace(
        b"\r\n\r\n", b"\r\nX-Scan: 127.0.0.1 127.0.0.1 100% %s\r\n\r\n", 1))
    # the variables are the nine, and those that existed before
    env = result()
    assert set(env) - set(NINE) <= {*os.environ, "TESTMARK", "PWD", "OLDPWD",
                                    "SHLVL", "_"}
    env = {k: v.encode("utf-8", "surrogateescape") for k, v in env.items()}
    assert env["SENDER"] == harmless(text)
    assert env["RECIPIENTS"].rstrip(b"\n") == harmless(text) + b"\nb@example.com"
    decoded = harmless(remote.split(b"\0")[0][:255])
    assert env["REMOTE"] == env["REMOTE_HELO"] == decoded
    assert env["CLIENT"] == b"127.0.0.1" and env["VIRUS"] == VIRUS.encode()
    # the log
    lines = check_log(site, "VIRUS:" + VIRUS, "CLEAN")
    if text in (TEXTS["format"], TEXTS["UTF-8"]):
        assert b"from=" + text + b", to=" + text in lines[0]


@pytest.mark.parametrize("name", ["control characters", "format", "shell",
                                  "invalid UTF-8", "10 KB"])
def test_text_in_helo_and_xclient_is_harmless(site, name):
    """XCLIENT is valid xtext and contains none of the client's text."""
    text = TEXTS[name]
    site.hop.ehlo = [XCLIENT]
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd(b"EHLO " + text, "250")
    client.mail()
    client.quit()
    first, xclient, again = site.hop.commands[:3]
    assert first == again == "EHLO " + text.decode("latin-1")
    word, *attributes = xclient.split(" ")
    assert word == "XCLIENT" and len(xclient) <= 510
    for attribute in attributes:
        key, _, value = attribute.partition("=")
        assert key in ("NAME", "ADDR", "PORT")
        # RFC 3461 4
        assert re.fullmatch(r"([!-*,-<>-~]|\+[0-9A-F]{2})+", value)
    assert len(attributes) == 3
    check_log(site, "CLEAN")


def test_text_in_an_unknown_command_is_harmless(site, text):
    client = site.session()
    client.cmd(b"X" + text, "500 5.5.1")
    client.cmd(b" " + text, "500")
    client.mail()
    client.quit()
    assert len(site.hop.commands) == 5
    check_log(site, "CLEAN")


def test_text_in_a_line_that_is_not_smtp_is_harmless(site, text):
    """The line that ends the session is logged as one harmless line."""
    client = site.session()
    client.cmd(b"GET " + text, "554 5.5.1")
    client.eof()
    site.daemon.wait_log("CLIENT: does not speak SMTP, session ends: GET ")
    check_log(site)


# ---------------------------------------------------------------- virus names

@pytest.mark.parametrize("name", [n for n in TEXTS if "10 KB" not in n])
def test_text_in_the_name_of_a_virus_is_harmless(site, name):
    """Header, variable and log have the name as one word of printable ASCII."""
    text = b"A " + TEXTS[name] + b"\r Z"
    want = re.sub(rb"[^!-~]", b"_", text)[:159].decode()
    site.clamd.verdict = b"stream: " + text + b" FOUND\0"
    result = environment(site, Action="pass")
    client = site.session()
    client.mail(body=GOOD)
    client.quit()
    same(site.hop.messages[0].body, GOOD.replace(
        b"\r\n\r\n", b"\r\nX-Virus-Infected: %s\r\n\r\n" % want.encode(), 1))
    assert result()["VIRUS"] == want
    check_log(site, "VIRUS:" + want)


@pytest.mark.parametrize("text", [
    b"why \x1b[2J%n%s\r\n250 ok\r\n", b"\xff\x07" * 900, b"%s" * 1000,
    b"$(id) '\"`", "gr\u00fc\u00dfe".encode()],
    ids=["lines", "controls", "format", "shell", "utf8"])
@pytest.mark.parametrize("failure", ["tempfail", "pass"])
def test_text_in_an_error_of_clamd_is_harmless(site, failure, text):
    """The error gets into a reply, a header and the log."""
    site.clamd.verdict = b"stream: " + text + b" ERROR\0"
    site.start(ScanFailure=failure)
    client = site.session()
    client.envelope()
    got = client.data(GOOD, "451 4.3.0 Local Error" if failure == "tempfail"
                      else "250")
    assert len(got.lines) == 1 and len(got.raw) <= 512
    assert re.fullmatch(rb"[ -~]*\r\n", got.raw)
    client.cmd("NOOP", "250 2.0.0 noop")
    client.quit()
    if failure == "pass":
        lines = site.hop.messages[0].body.split(b"\r\n")
        assert len(lines) == len(GOOD.split(b"\r\n")) + 1
        assert re.fullmatch(rb"X-Virus-Unscanned: [ -~]+", lines[1])
        assert len(lines[1]) <= 998
    check_log(site, "UNSCANNED" if failure == "pass" else "CLAMAV-ERROR")


# ---------------------------------------------------------------- replies

REPLIES = {"greeting": "554", "MAIL": "250", "RCPT": "550", "DATA": "554",
           ".": "250", "HELP": "214", "XFORWARD": "550", "NOOP": "421"}


def whole(client):
    """A reply, as the bytes that were received."""
    got = client.reply()
    assert b"\0" not in got.raw
    for line in got.raw.split(b"\r\n"):
        assert line == harmless(line), line
    return got


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: replies of the next hop")
@pytest.mark.core
@pytest.mark.parametrize("name", ["control characters", "C1 controls", "UTF-8",
                                  "format", "invalid UTF-8", "10 KB"])
@pytest.mark.parametrize("place", REPLIES)
def test_text_in_replies_of_the_next_hop_is_harmless(site, name, place):
    """A reply of two lines, with CR and NUL in one of them, arrives as two harmless
    lines."""
    text, code = TEXTS[name][:9000], REPLIES[place].encode()
    reply = (code + b"-%s\r" + text[:2000] + b"\0\r250 ok\r\n" +
             code + b" " + text + b"\r\n")
    want = [harmless(line, b" ") for line in reply.split(b"\r\n")]
    site.hop.on(place, [reply])
    client = site.client()
    said = [whole(client)]
    ending = place in ("greeting", "NOOP")
    mail = place not in ("greeting", "NOOP", "HELP", "XFORWARD")
    if mail:
        client.send("EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
                    "RCPT TO:<e@f>\r\nDATA\r\n")
        said += [whole(client) for _ in range(5)]
        client.send(GOOD + b".\r\n")
        said.append(whole(client))
    elif place != "greeting":
        client.send("EHLO me\r\n%s\r\n" % place)
        said += [whole(client) for _ in range(2)]
    raw = [got.raw for got in said]
    same(b"\r\n".join(want), raw[-1] if place in ("DATA", ".") or not mail else
         raw[2] if place == "MAIL" else raw[3])
    if place == "greeting":
        client.quit()
    elif ending:
        client.eof()
    else:
        client.cmd("NOOP", "250 2.0.0 noop")
        client.quit()
    check_log(site, *["CLEAN"] * mail)


def test_text_in_an_ehlo_reply_is_harmless(site, text):
    site.hop.on("EHLO", b"250-hi " + text[:6000] + b"\r\n250-SIZE 5000 " + text[:900] +
                b"\r\n250-X" + text[:2000] + b"\r\n250-DSN\r250-STARTTLS\r\n"
                b"250 AUTH " + text[:900] + b"\r\n")
    client = site.client()
    client.expect("220")
    client.line("EHLO me")
    got = whole(client)
    words = [line[4:].split()[0] for line in got.lines[1:]]
    assert words.count("PIPELINING") == 1
    assert set(words) <= {"SIZE", "AUTH", "DSN", "PIPELINING"}
    assert b"hi " not in got.raw
    client.mail()
    client.quit()
    check_log(site, "CLEAN")


def test_text_in_a_refusal_of_xclient_is_harmless(site, text):
    site.hop.ehlo = ["XCLIENT ADDR"]
    site.hop.on("XCLIENT", b"550-" + text[:3000] + b"\r\n550 " + text[:3000] +
                b"\r\n")
    site.start(XClient="on")
    client = site.session()
    client.mail()
    client.quit()
    check_log(site, "CLEAN")


def test_text_in_an_unexpected_reply_is_harmless(site, text):
    hold = Hold("OK")
    site.clamd.verdict = hold
    client = site.session()
    client.submit(GOOD)
    hold.reached()
    site.hop.session.sock.sendall(b"421 " + text + b"\r\n")
    got = whole(client)
    hold.go()
    assert got.code == "421" and len(got.lines) == 1
    check_log(site, "ERROR")
    assert site.hop.messages == []


# ---------------------------------------------------------------- STARTTLS

CLIENT_HELLO = bytes.fromhex(
    "16030100300100002c0303" + "0d0a" * 16 + "00000400ff002f0100")


@pytest.mark.parametrize("where", ["before EHLO", "before MAIL", "before DATA"])
def test_commands_after_starttls_are_ordinary(site, where):
    """A transaction is pipelined around STARTTLS.  The commands after it are
    neither dropped nor read as anything else."""
    script = ["EHLO me", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA"]
    want = ["250", "250 2.1.0", "250 2.1.5", "354"]
    at = [s[:4] for s in script].index(where.split()[1])
    script.insert(at, "STARTTLS")
    want.insert(at, "502 5.5.1")
    client = site.client()
    client.send("\r\n".join(script) + "\r\n")
    for code in ["220", *want]:
        client.expect(code)
    client.send(stuff(GOOD) + b".\r\nstarttls\r\nNOOP\r\n")
    for code in ["250 2.0.0 queued", "502", "250 2.0.0 noop"]:
        client.expect(code)
    client.quit()
    message, = site.hop.messages
    assert message.body.replace(HEADER, b"") == GOOD
    assert "STARTTLS" not in site.hop.session.verbs()


def test_tls_handshake_after_starttls_ends_the_session(site):
    """The first byte of the handshake is enough, since there may be no line end."""
    client = site.session()
    client.cmd("STARTTLS", "502")
    client.send(CLIENT_HELLO[:5])
    client.expect("554 5.5.1")
    client.send(CLIENT_HELLO[5:] + b"\r\nNOOP\r\n")
    client.eof()
    assert site.hop.session.wait_end() == "quit"
    assert site.hop.commands == ["EHLO client.example", "QUIT"]
    site.daemon.wait_log(r"^100000: CLIENT: does not speak SMTP, "
                         r"session ends: \\x16\\x03\\x01\\x000$")


# ---------------------------------------------------------------- AUTH

@pytest.mark.parametrize("ending", ["client cancels", "refused", "NUL",
                                    "too long", "client gone"])
def test_auth_broken_off_leaves_no_state(site, ending):
    """The next line is read as a command again."""
    site.hop.on("AUTH", "334 VXNlcm5hbWU6")
    site.hop.on("334", ["334 UGFzc3dvcmQ6", "501 5.7.0 cancelled"
                        if ending == "client cancels" else "535 5.7.8 no"])
    client = site.session()
    client.cmd("AUTH LOGIN", "334")
    client.cmd("dXNlcg==", "334")
    if ending in ("client cancels", "refused"):
        client.send(b"*\r\n" if ending == "client cancels" else b"c2VjcmV0\r\n")
        client.expect("501 5.7.0" if ending == "client cancels" else "535")
        client.cmd("STARTTLS", "502")
        client.cmd("XCLIENT ADDR=1.2.3.4", "554")
        client.cmd("c2VjcmV0", "500")
    elif ending == "client gone":
        client.close()
        assert site.hop.session.wait_end() != "quit"
        client = site.session()
    else:
        client.send(b"abc\0def\r\n" if ending == "NUL" else b"x" * 20000 + b"\r\n")
        client.expect("5")
        client.eof()            # no QUIT, since the next hop still waits for an answer
        assert site.hop.session.wait_end() != "quit"
        assert len(site.hop.session.commands) == 3
        client = site.session()
    client.mail()
    client.quit()
    site.daemon.wait_log("SERVER > QUIT")
    # secrets are no longer masked
    assert site.daemon.log(r"CLIENT < MAIL FROM:<a@example.com>$")
    assert len(site.hop.messages) == 1
    assert "STARTTLS" not in site.hop.commands
    assert "XCLIENT ADDR=1.2.3.4" not in site.hop.commands


def test_auth_broken_off_with_commands_pipelined_leaves_no_state(site):
    site.hop.on("AUTH", "334 go")
    site.hop.on("334", "501 5.7.0 cancelled")
    client = site.session()
    client.send(b"AUTH LOGIN\r\n*\r\nSTARTTLS\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>"
                b"\r\nDATA\r\n")
    for want in ("334 go", "501 5.7.0", "502", "250", "250", "354"):
        client.expect(want)
    client.send(GOOD + b".\r\nQUIT\r\n")
    for want in ("250", "221"):
        client.expect(want)
    client.eof()
    assert site.hop.session.verbs() == ["EHLO", "AUTH", "*", "MAIL", "RCPT",
                                        "DATA", "QUIT"]


def test_reply_334_without_auth_opens_nothing(site):
    """Only AUTH can make the next line of the client something else than a
    command."""
    site.hop.on("NOOP", "334 go")
    client = site.session()
    client.send(b"NOOP\r\nDATA\r\nQUIT\r\n")
    client.expect("4")
    client.eof()
    assert site.hop.session.commands == ["EHLO client.example", "NOOP"]


# ---------------------------------------------------------------- XFORWARD

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: XFORWARD in a transaction")
@pytest.mark.parametrize("before", [["MAIL FROM:<a@b>"],
                                    ["MAIL FROM:<a@b>", "RCPT TO:<c@d>"]])
def test_xforward_in_a_transaction_is_503(site, before):
    """The daemon's record of the client does not change."""
    result = environment(site)
    client = site.session()
    client.cmd("XFORWARD ADDR=192.0.2.1 HELO=first", "250")
    for command in before:
        client.cmd(command, "250")
    client.cmd("XFORWARD ADDR=192.0.2.2 HELO=second", "503 5.5.1")
    client.cmd("RCPT TO:<e@f>", "250")
    client.data(BAD, "250 2.0.0 Virus")
    client.cmd("XFORWARD ADDR=192.0.2.3", "250")
    client.quit()
    env = result()
    assert (env["REMOTE"], env["REMOTE_HELO"]) == ("192.0.2.1", "first")
    assert [c for c in site.hop.commands if c.startswith("XFORWARD")] == [
        "XFORWARD ADDR=192.0.2.1 HELO=first", "XFORWARD ADDR=192.0.2.3"]


@pytest.mark.parametrize("between", ["mail", "refused mail", "RSET", "EHLO", "HELO"])
def test_xforward_counts_for_one_mail(site, between):
    """The next mail must not be recorded with this client."""
    result = environment(site)
    client = site.session()
    client.cmd("XFORWARD ADDR=192.0.2.1 HELO=first", "250")
    if between == "mail":
        client.mail(body=GOOD)
    elif between == "refused mail":
        site.hop.on(".", ["550 5.7.1 no"])
        client.mail(body=GOOD, want="550")
    else:
        client.cmd(between + " again" * (between[1] != "S"), "250")
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.quit()
    env = result()
    assert "REMOTE" not in env and "REMOTE_HELO" not in env


# ---------------------------------------------------------------- extensions

def offer(*keywords):
    return "\n".join("250-" + k for k in ("next.hop",) + keywords) + \
        "\n250 ENHANCEDSTATUSCODES"


@pytest.mark.parametrize("by", ["AUTH", "a second EHLO", "HELO"])
def test_ehlo_extensions_that_change_are_followed(site, by):
    """The daemon changes its own use of SIZE and CHUNKING, too, not only the
    list."""
    site.hop = site.new_hop(chunking=True)
    site.hop.on("EHLO", [offer("SIZE 1000", "CHUNKING", "DSN", "AUTH PLAIN"),
                         offer("SIZE 5000", "XFORWARD ADDR")])
    client = site.client()
    client.expect("220")
    got = client.cmd("EHLO me", "250").keywords()
    assert sorted(got) == ["AUTH PLAIN", "CHUNKING", "DSN",
                           "ENHANCEDSTATUSCODES", "PIPELINING", "SIZE 1000"]
    client.cmd("MAIL FROM:<a@b> SIZE=2000", "552")
    if by == "AUTH":
        client.cmd("AUTH PLAIN AGEAYg==", "235")
    got = client.cmd("HELO me" if by == "HELO" else "EHLO me", "250")
    if by != "HELO":
        assert sorted(got.keywords()) == ["ENHANCEDSTATUSCODES", "PIPELINING",
                                          "SIZE 5000", "XFORWARD ADDR"]
        client.cmd("MAIL FROM:<a@b> SIZE=6000", "552")
    else:
        client.cmd("MAIL FROM:<a@b> SIZE=6000", "250")
        client.cmd("RSET", "250")
    client.cmd("MAIL FROM:<a@b> SIZE=2000", "250")
    client.cmd("RCPT TO:<c@d>", "250")
    client.chunk(GOOD + b"x" * 2000, last=True)
    client.expect("250 2.0.0 queued")
    # a next hop that has no CHUNKING any more gets no BDAT
    assert site.hop.messages[0].how == "DATA"
    client.quit()


def test_ehlo_extensions_that_come_late_are_used(site):
    site.hop = site.new_hop(chunking=True)
    site.hop.on("EHLO", [offer("SIZE 5000"), offer("SIZE 1000", "CHUNKING")])
    client = site.session()
    for how in "DATA", "BDAT":
        client.envelope()
        client.chunk(GOOD, last=True)
        client.expect("250 2.0.0 queued")
        assert site.hop.messages[-1].how == how
        if how == "DATA":
            client.cmd("EHLO again", "250")
    client.envelope()
    client.data(b"x" * 2000 + b"\r\n", "552")
    client.quit()


def test_ehlo_refused_changes_nothing(site):
    """The server keeps its state after it has refused EHLO, and so does the
    daemon."""
    site.hop = site.new_hop(chunking=True)
    site.hop.on("EHLO", [offer("SIZE 1000", "CHUNKING"), "501 5.5.4 what?"])
    client = site.session()
    client.cmd("EHLO again", "501")
    client.cmd("MAIL FROM:<a@b> SIZE=2000", "552")
    client.envelope()
    client.chunk(GOOD, last=True)
    client.expect("250 2.0.0 queued")
    assert site.hop.messages[0].how == "BDAT"
    client.quit()
